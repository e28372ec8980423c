"""Summaries in a notebook: tables that fold, and a bar of the bytes."""

import html

from orbax_nnx_handler.planning.rendering.summary import COLOURS, ByteCounts, LeafList, Summary
from orbax_nnx_handler.planning.text.words import sized

_LIMIT = 200
_OPEN = ("missing", "filled", "mismatched", "unexpected")
"""What a reader has to see comes unfolded."""


def summary_as_html(summary: Summary) -> str:
    """Returns a summary as HTML that carries its own style: nothing is fetched, no script runs."""
    # Rows among the advice are aligned by spaces. No colour is set: a dark notebook has its own.
    advice = "".join(
        f'<div style="white-space: pre-wrap">{html.escape(str(line))}</div>' for line in summary.advice
    )
    return (
        '<div style="font-family: monospace; font-size: 12px">'
        f"<div><b>{html.escape(summary.head)}</b>: {html.escape(summary.counts)}</div>"
        f"<div>checkpoint: {html.escape(summary.checkpoint)}</div>"
        f"{_bar(summary.share)}{''.join(map(_table, summary.blocks))}{advice}</div>"
    )


def _table(block: LeafList) -> str:
    opened = " open" if block.kind in _OPEN else ""
    rows = "".join(map(_row, block.cells(_LIMIT)))
    rest = block.left_out(_LIMIT)
    if rest:
        rows += _row((f"… and {rest} more",))
    return (
        f"<details{opened}><summary>{html.escape(block.title)} ({block.count})</summary>"
        f"<table>{rows}</table></details>"
    )


def _row(cells: tuple[str, ...]) -> str:
    style = ' style="text-align: left; padding-right: 1em; white-space: nowrap"'
    return "<tr>" + "".join(f"<td{style}>{html.escape(cell)}</td>" for cell in cells) + "</tr>"


def _bar(share: ByteCounts) -> str:
    parts = share.parts()
    if not parts:
        return ""
    total = sum(nbytes for _, nbytes in parts)
    boxes: list[str] = []
    left = 0.0
    for part, nbytes in parts:
        width = 100 * nbytes / total
        title = f"{part}: {sized(nbytes)}"
        boxes.append(
            f'<rect x="{left:.3f}" y="0" width="{width:.3f}" height="10" fill="{COLOURS[part]}">'
            f"<title>{title}</title></rect>"
        )
        left += width
    spoken = ", ".join(f"{part} {sized(nbytes)}" for part, nbytes in parts)
    words = " ".join(
        f'<span style="color: {COLOURS[part]}">■</span> {part} {sized(nbytes)}' for part, nbytes in parts
    )
    return (
        '<svg viewBox="0 0 100 10" preserveAspectRatio="none" width="480" height="12" role="img" '
        f'aria-label="{html.escape(spoken)}">'
        f"{''.join(boxes)}</svg><div>{words}</div>"
    )
