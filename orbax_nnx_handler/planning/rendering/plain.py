"""Summaries as plain text: for logs, files and `print`."""

from orbax_nnx_handler.planning.rendering.summary import Summary
from orbax_nnx_handler.planning.text.lines import align, joined

_LIMIT = 30


def summary_as_text(summary: Summary) -> str:
    """Returns a summary as text: counts first, then aligned rows, then the way out."""
    lines = [f"{summary.head}: {summary.counts}", f"checkpoint: {summary.checkpoint}"]
    for block in summary.blocks:
        lines += [f"  {block.title}", *align(block.lines, limit=_LIMIT, indent="    ")]
    return joined([*lines, *summary.advice])
