"""Lines of text: counts, lists and sizes in words; sentences in a readable width; rows aligned; as HTML."""

import html
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

from orbax_nnx_handler.planning.core.errors import RestoreError
from orbax_nnx_handler.planning.core.folding import FROM, Folded, Row, fold
from orbax_nnx_handler.planning.core.paths import Path, printable, render


def counted(count: int, one: str, many: str = "", *, thousands: str = "") -> str:
    """Returns a count with its noun: `1 layer`, `4 layers`; `1,200 leaves` with `thousands=","`."""
    return f"{count:{thousands}} {one if count == 1 else many or one + 's'}"


def listed(names: Iterable[str]) -> str:
    """Returns names as a sentence lists them: `mu`, `mu and nu`, `a, b and c`."""
    every = list(names)
    return " and ".join([", ".join(every[:-1]), every[-1]] if len(every) > 1 else every)


def told_apart(paths: Collection[Path]) -> dict[Path, str]:
    """Returns as many of each path's last keys as tell it from the others: `kernel`, or `query/kernel`."""
    ends = Counter(path[-size:] for path in paths for size in range(1, len(path) + 1))

    def short(path: Path) -> Path:
        alone = (path[-n:] for n in range(1, len(path)) if ends[path[-n:]] == 1)
        return next((end for end in alone if not isinstance(end[0], int)), path)

    return {path: render(short(path)) for path in paths}


def share(count: int, total: int, noun: str) -> str:
    """Returns a part of a whole in words: `the mismatch`, `both mismatches`, `all 19`, `4 of the 19`."""
    if total == 1:
        return f"the {noun}"
    if count == total:
        return f"both {noun}s" if total == 2 else f"all {total} {noun}s"
    return f"{count} of the {total} {noun}s"


def sized(nbytes: int, digits: int = 2) -> str:
    """Returns bytes as a person writes them, in powers of ten: `1.50 GB`."""
    value, units = float(nbytes), ["B", "kB", "MB", "GB", "TB"]
    # What would be rounded to 1000 of a unit is 1 of the next.
    while value >= 1000 - 0.5 * 10**-digits and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{nbytes} B" if units[0] == "B" else f"{value:.{digits}f} {units[0]}"


def rated(nbytes: int, seconds: float) -> str:
    """Returns how fast bytes were restored: `3.21 GB/s`."""
    return f"{nbytes / max(seconds, 1e-9) / 1e9:.2f} GB/s"


WIDTH = 120
"""Columns of a line in an error, a plan or a log, where nothing forces more."""

_OPENING, _CLOSING = "([{", ")]}"


class Sentence(NamedTuple):
    """A sentence with the word in front that says what it is: `cause`, `hint` or `note`."""

    word: str
    text: str

    def __str__(self) -> str:
        return f"{self.word}: {printable(self.text)}"


Line = str | Sentence
"""A row as it is, or a sentence that may go on below itself."""


def lines_of(error: RestoreError) -> list[Line]:
    """Returns what an error says: its rows, and its hints as sentences."""
    return [*error.what.splitlines(), *(Sentence("hint", hint.words) for hint in error.hints)]


def joined(lines: Iterable[Line], width: int = WIDTH) -> str:
    """Returns lines as one text, sentences no wider than they must be; rows stay as they are."""
    return "\n".join(
        part
        for line in lines
        for part in (_wrapped(line, width) if isinstance(line, Sentence) else [printable(line)])
    )


def as_html(lines: Iterable[Line]) -> str:
    """Returns lines as HTML in which rows stay aligned; without a colour: a dark notebook has its own."""
    return "".join(f'<div style="white-space: pre-wrap">{_html_of(line)}</div>' for line in lines)


def _html_of(line: Line) -> str:
    if not isinstance(line, Sentence):
        return html.escape(printable(line))
    return f"<b>{html.escape(line.word)}:</b> {html.escape(printable(line.text))}"


def framed(content: str) -> str:
    """Returns HTML in the look of this package; what is wider than the notebook scrolls by itself."""
    return f'<div style="font-family: monospace; font-size: 12px; overflow-x: auto">{content}</div>'


def _wrapped(sentence: Sentence, width: int) -> Iterator[str]:
    line = str(sentence)
    if len(line) <= width:
        yield line
        return
    indent = " " * (len(sentence.word) + 2)
    current = ""
    for word in _words(line, width - len(indent)):
        if current.strip() and len(current) + 1 + len(word) > width:
            yield current
            current = indent + word
        else:
            current = f"{current} {word}" if current.strip() else current + word
    yield current


def _words(line: str, room: int) -> Iterator[str]:
    """Yields the words of a line; what stands in brackets or backticks is one word, so that it can be pasted.

    A list that is wider than a line is taken apart between its elements, where Python allows it too.
    """
    for word in _split(line, depth=0):
        yield from _split(word, depth=1) if len(word) > room else [word]


def _split(text: str, depth: int) -> Iterator[str]:
    level, quoted, word = 0, False, ""
    for letter in text:
        if letter == " " and level <= depth and not quoted and (not level or word.endswith(",")):
            yield word
            word = ""
            continue
        quoted ^= letter == "`"
        level = max(0, level + (letter in _OPENING) - (letter in _CLOSING))
        word += letter
    yield word


def aligned(rows: Iterable[Row], limit: int = 40, indent: str = "  ") -> str:
    """Returns folded rows as lines with aligned columns, cut with a count after `limit` lines."""
    return "\n".join(align(fold(rows), limit=limit, indent=indent))


def align(lines: Sequence[Folded], limit: int = 40, indent: str = "  ") -> list[str]:
    """Returns folded rows as text lines; a column that is empty everywhere takes no room.

    What does not fit into a line goes on below it: in most rows, the source.
    """
    shown = lines[:limit]
    table = [(line.text, *line.columns) for line in shown]
    width = max((len(cells) for cells in table), default=0)
    table = [(*cells, *[""] * (width - len(cells))) for cells in table]
    used = [at for at in range(width) if any(cells[at] for cells in table)]
    widths = _widths([[cells[at] for at in used] for cells in table], len(indent))
    texts = [text for cells in table for text in _row([cells[at] for at in used], widths, indent)]
    if len(lines) > limit:
        rest = sum(line.count for line in lines[limit:])
        texts.append(f"{indent}... and {rest} more")
    return texts


_GAP = "   "


def _widths(table: Sequence[Sequence[str]], indent: int) -> list[int]:
    """Returns the width of each column; a very long path must not push shapes out of everybody's line."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    sources = [
        at for at, column in enumerate(zip(*table, strict=True)) if any(c.startswith(FROM) for c in column)
    ]
    beside = widths[1 : sources[0] if sources else None]
    room = WIDTH - indent - sum(beside) - len(_GAP) * len(beside)
    return [min(widths[0], max(room, WIDTH // 3)), *widths[1:]] if widths else []


def _row(cells: Sequence[str], widths: Sequence[int], indent: str) -> list[str]:
    """Returns one row as lines: as many cells as fit, and the rest below."""
    lines, current = list[str](), indent
    for at, (cell, width) in enumerate(zip(cells, widths, strict=True)):
        text = f"{cell:<{width}}" if not lines else cell
        # Both shapes are compared with each other, so they stand in one line.
        pair = [*cells[at + 1 : at + 2]] if cell.startswith("stored ") else []
        if at and cell and not _fits([current, text, *pair]):
            if not _fits([current.rstrip(), cell, *pair]):
                lines.append(current.rstrip())
                current = f"{indent}    {cell}"
                continue
            current = current.rstrip()  # Out of its column, but in its line.
        if cell or not lines:
            current = f"{current}{_GAP}{text}" if current.strip() else current + text
    return [*lines, current.rstrip()]


def _fits(cells: Sequence[str]) -> bool:
    # A few columns more than a sentence may have: a row that breaks is harder to read.
    return len(_GAP.join(cells).rstrip()) <= WIDTH + 4
