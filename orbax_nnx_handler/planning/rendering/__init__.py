"""Plans and reports for a person: as text, on a terminal, in a notebook, and as plain dicts.

Here how a summary looks as plain text, on a terminal, and in a notebook.
"""

import abc
import bisect
import html
import textwrap
from collections.abc import Iterable, Sequence

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from orbax_nnx_handler.planning.core.lines import Line, Sentence, align, as_html, framed, joined, sized
from orbax_nnx_handler.planning.core.paths import printable
from orbax_nnx_handler.planning.rendering.summary import COLOURS, ByteCounts, LeafList, Summary

_LIMIT = 30
# Lines of a terminal for the prompt and what a command adds.
_BELOW = 3


class Displayed(abc.ABC):
    """What prints as its summary: as text, on a terminal, in a notebook."""

    @property
    @abc.abstractmethod
    def _summary(self) -> Summary: ...

    def __str__(self) -> str:
        return summary_as_text(self._summary)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterable[RenderableType]:
        return summary_on_console(self._summary, console, options)

    def _repr_html_(self) -> str:
        return summary_as_html(self._summary)


def summary_as_text(summary: Summary) -> str:
    """Returns a summary as text: counts first, then aligned rows, then the way out."""
    lines = [f"{summary.head}: {summary.counts}", f"checkpoint: {summary.checkpoint}"]
    for block in summary.blocks:
        lines += [f"  {block.title}", *align(block.lines, limit=_LIMIT, indent="    ")]
    return joined([*lines, *summary.faults, *summary.advice])


_STYLES: dict[str, str] = {
    "missing": "red",
    "mismatched": "red",
    "unexpected": "yellow",
    "restored": "green",
}


def summary_on_console(
    summary: Summary, console: Console, options: ConsoleOptions
) -> Iterable[RenderableType]:
    """Yields a summary as one screen of a terminal; just its text where the output is none."""
    if not console.is_terminal:
        yield Text(summary_as_text(summary), overflow="fold")
        return

    def height(limits: tuple[int, int]) -> int:
        return len(console.render_lines(Group(*_screen(summary, options, *limits)), options, pad=False))

    # More rows take more lines, so a few renderings find how many there is room for.
    limits = [(wrong, 0) for wrong in range(_LIMIT)] + [(_LIMIT, rest) for rest in range(_LIMIT + 1)]
    fitting = bisect.bisect_right(limits, options.size.height - _BELOW, key=height)
    yield from _screen(summary, options, *limits[max(0, fitting - 1)])


def _screen(summary: Summary, options: ConsoleOptions, wrong: int, rest: int) -> Iterable[RenderableType]:
    """Yields why it does not fit, then what is wrong, then the rest; each list with so many rows at most."""
    width = options.max_width
    yield Text.assemble((summary.head, "bold green" if summary.is_good else "bold red"), ": ", summary.counts)
    yield Text.assemble(("checkpoint: ", "dim"), summary.checkpoint)
    yield _bar(summary.share, min(width, 60), "#" if options.ascii_only else "█")
    yield from (line_on_console(line, width) for line in summary.reasons)
    for block in sorted(summary.blocks, key=lambda block: not block.is_wrong):
        yield Text(f"  {block.title} ({block.count})", style=_STYLES.get(block.kind, "cyan"))
        limit = wrong if block.is_wrong else rest
        if limit:
            yield _rows(block, width, limit)
    yield from (line_on_console(line, width) for line in summary.meant)


def line_on_console(line: Line, width: int) -> RenderableType:
    """Returns a row that goes on below itself, or a sentence that goes on beside its first word."""
    if not isinstance(line, Sentence):
        hanging = " " * (len(line) - len(line.lstrip()) + 4)
        below = textwrap.wrap(printable(line), width, subsequent_indent=hanging, break_on_hyphens=False)
        return Text("\n".join(below))
    grid = Table.grid()
    grid.add_row(Text(f"{line.word}: ", style="bold"), Text(printable(line.text), overflow="fold"))
    return grid


def _rows(block: LeafList, width: int, limit: int) -> RenderableType:
    """Returns a table where it fits, and two lines for each leaf where it does not."""
    rows = [(f"    {first}", *others) for first, *others in block.cells(limit)]
    rest = block.left_out(limit)
    if rest:
        rows.append((f"    ... and {rest} more", *[""] * (len(rows[0]) - 1)))
    natural = sum(max(map(len, column)) + 2 for column in zip(*rows, strict=True))
    return _table(rows) if natural <= width else _pairs_of_lines(rows)


def _table(rows: Sequence[Sequence[str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    for first, *others in rows:
        # Text, since brackets in a transform would be read as markup.
        table.add_row(Text(first), *(Text(cell, style="dim") for cell in others))
    return table


def _pairs_of_lines(rows: Sequence[Sequence[str]]) -> Group:
    lines: list[RenderableType] = []
    for first, *others in rows:
        lines.append(Text(first, overflow="fold"))
        words = "   ".join(cell for cell in others if cell)
        lines += [Padding(Text(words, style="dim", overflow="fold"), (0, 0, 0, 8))] if words else []
    return Group(*lines)


def _bar(share: ByteCounts, width: int, block: str) -> Text:
    total = max(1, sum(nbytes for _, nbytes in share.parts()))
    bar = Text()
    for part, nbytes in share.parts():
        bar.append(block * max(1, round(width * nbytes / total)), style=COLOURS[part])
    words = [(f"{part} {sized(nbytes)}", COLOURS[part]) for part, nbytes in share.parts()]
    if words:
        # On a line of its own: beside the bar it would break where the terminal is narrow.
        bar.append("\n").append_text(Text("  ").join(Text(*word) for word in words))
    return bar


_HTML_ROWS = 200


def summary_as_html(summary: Summary) -> str:
    """Returns a summary as HTML that carries its own style: nothing is fetched, no script runs."""
    blocks = sorted(summary.blocks, key=lambda block: not block.is_wrong)
    return framed(
        f"<div><b>{html.escape(summary.head)}</b>: {html.escape(summary.counts)}</div>"
        f"<div>checkpoint: {html.escape(summary.checkpoint)}</div>{_html_bar(summary.share)}"
        f"{as_html(summary.reasons)}{''.join(map(_html_table, blocks))}{as_html(summary.meant)}"
    )


def _html_table(block: LeafList) -> str:
    opened = " open" if block.is_wrong else ""
    rows = "".join(map(_html_row, block.cells(_HTML_ROWS)))
    rest = block.left_out(_HTML_ROWS)
    if rest:
        rows += _html_row((f"… and {rest} more",))
    return (
        f"<details{opened}><summary>{html.escape(block.title)} ({block.count})</summary>"
        f"<table>{rows}</table></details>"
    )


def _html_row(cells: tuple[str, ...]) -> str:
    style = ' style="text-align: left; padding-right: 1em; white-space: nowrap"'
    return "<tr>" + "".join(f"<td{style}>{html.escape(cell)}</td>" for cell in cells) + "</tr>"


def _html_bar(share: ByteCounts) -> str:
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
