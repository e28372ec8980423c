"""Sheets as plain text: for logs, files and `print`."""

from orbax_nnx_handler.planning.rendering.sheet import Summary
from orbax_nnx_handler.planning.text.lines import align, wrapped

_LIMIT = 30


def render_sheet(sheet: Summary) -> str:
    """Returns a sheet as text: counts first, then aligned rows, then the way out."""
    lines = [f"{sheet.head}: {sheet.counts}", f"checkpoint: {sheet.checkpoint}"]
    for section in sheet.sections:
        lines += [f"  {section.title}", *align(section.lines, limit=_LIMIT, indent="    ")]
    return wrapped("\n".join([*lines, *sheet.advice]))
