"""Summaries as plain text: for logs, files and `print`."""

from orbax_nnx_handler.planning.rendering.summary import Summary
from orbax_nnx_handler.planning.text.lines import align, wrapped

_LIMIT = 30


def summary_as_text(summary: Summary) -> str:
    """Returns a summary as text: counts first, then aligned rows, then the way out."""
    lines = [f"{summary.head}: {summary.counts}", f"checkpoint: {summary.checkpoint}"]
    for section in summary.sections:
        lines += [f"  {section.title}", *align(section.lines, limit=_LIMIT, indent="    ")]
    return wrapped("\n".join([*lines, *summary.advice]))
