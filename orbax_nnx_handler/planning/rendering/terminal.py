"""Sheets on a terminal: colours and a bar where there is one, plain text where there is none."""

from collections.abc import Iterable, Sequence

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from orbax_nnx_handler.planning.rendering.plain import render_sheet
from orbax_nnx_handler.planning.rendering.share import COLOURS, Share, sized
from orbax_nnx_handler.planning.rendering.sheet import Section, Sheet

_LIMIT = 30
_STYLES = {"missing": "red", "mismatched": "red", "unexpected": "yellow", "restored": "green"}


def sheet_on_console(sheet: Sheet, console: Console, options: ConsoleOptions) -> Iterable[RenderableType]:
    """Yields a sheet in the width of a terminal; just its text where the output is none."""
    if not console.is_terminal:
        yield Text(render_sheet(sheet), overflow="fold")
        return
    bad = "does not fit" in sheet.head
    yield Text.assemble((sheet.head, "bold red" if bad else "bold green"), ": ", sheet.counts)
    yield Text.assemble(("checkpoint: ", "dim"), sheet.checkpoint)
    yield _bar(sheet.share, min(options.max_width, 60), "#" if options.ascii_only else "█")
    for section in sheet.sections:
        yield Text(f"  {section.title}", style=_style(section.title))
        yield _rows(section, options.max_width)
    for line in sheet.advice:
        word, colon, rest = line.partition(": ")
        yield Text.assemble((word + colon, "bold"), rest) if colon and " " not in word else Text(line)


def _style(title: str) -> str:
    return next((style for word, style in _STYLES.items() if title.startswith(word)), "cyan")


def _rows(section: Section, width: int) -> RenderableType:
    """Returns a table where it fits, and two lines for each leaf where it does not."""
    shown = [(f"    {line.text}", *line.columns) for line in section.lines[:_LIMIT]]
    used = [at for at in range(max(map(len, shown))) if any(cells[at : at + 1] > ("",) for cells in shown)]
    rows = [[cells[at] if at < len(cells) else "" for at in used] for cells in shown]
    rest = sum(line.count for line in section.lines[_LIMIT:])
    if rest:
        rows.append([f"    ... and {rest} more", *[""] * (len(used) - 1)])
    natural = sum(max(len(row[at]) for row in rows) + 2 for at in range(len(used)))
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


def _bar(share: Share, width: int, block: str) -> Text:
    total = max(1, sum(nbytes for _, nbytes in share.parts()))
    bar = Text()
    for part, nbytes in share.parts():
        bar.append(block * max(1, round(width * nbytes / total)), style=COLOURS[part])
    for part, nbytes in share.parts():
        bar.append(f"  {part} {sized(nbytes)}", style=COLOURS[part])
    return bar
