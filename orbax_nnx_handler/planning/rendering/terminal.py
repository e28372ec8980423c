"""Summaries on a terminal: colours and a bar where there is one, plain text where there is none."""

from collections.abc import Iterable, Sequence

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from orbax_nnx_handler.planning.rendering.plain import summary_as_text
from orbax_nnx_handler.planning.rendering.summary import COLOURS, Block, ByteCounts, Summary, sized

_LIMIT = 30
_STYLES = {"missing": "red", "mismatched": "red", "unexpected": "yellow", "restored": "green"}


def summary_on_console(
    summary: Summary, console: Console, options: ConsoleOptions
) -> Iterable[RenderableType]:
    """Yields a summary in the width of a terminal; just its text where the output is none."""
    if not console.is_terminal:
        yield Text(summary_as_text(summary), overflow="fold")
        return
    bad = "does not fit" in summary.head
    yield Text.assemble((summary.head, "bold red" if bad else "bold green"), ": ", summary.counts)
    yield Text.assemble(("checkpoint: ", "dim"), summary.checkpoint)
    yield _bar(summary.share, min(options.max_width, 60), "#" if options.ascii_only else "█")
    for section in summary.sections:
        yield Text(f"  {section.title}", style=_style(section.title))
        yield _rows(section, options.max_width)
    for line in summary.advice:
        yield from _advice(line, options.max_width)


def _advice(line: str, width: int) -> Iterable[RenderableType]:
    """Yields a sentence with its first word in front, or a row with its source below where it is too wide."""
    word, colon, rest = line.partition(": ")
    if colon and " " not in word:
        grid = Table.grid()
        grid.add_row(Text(word + colon, style="bold"), Text(rest, overflow="fold"))
        yield grid
        return
    first, arrow, source = line.partition(" <- ") if len(line) > width else (line, "", "")
    yield Text(first.rstrip(), overflow="fold")
    if arrow:
        yield Padding(Text(f"<- {source}", overflow="fold"), (0, 0, 0, 6))


def _style(title: str) -> str:
    return next((style for word, style in _STYLES.items() if title.startswith(word)), "cyan")


def _rows(section: Block, width: int) -> RenderableType:
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
