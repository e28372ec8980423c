"""What a command prints: as wide as the terminal is, and as plain lines in a pipe.

Hints are written as Python; at a prompt they are followed by the options that do the same.
"""

import ast
import contextlib
import dataclasses
import json
import math
import re
import shlex
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, cast

from rich.console import Console
from rich.table import Table
from rich.text import Text

_WORD = re.compile(r"\b(item|layout|policy|renames)=(?=['\"{\[])")
_FILTERED = re.compile(r'nnx\.PathContains\("([^"]+)"\): ("\w+")')


def options_of(message: str) -> str:
    """Returns the options that do what the hints of a message tell; empty where none does."""
    hints = re.sub(r"\n +", " ", message).splitlines()
    words = [word for hint in hints if hint.startswith("hint: ") for word in _options(hint)]
    return " ".join(dict.fromkeys(words))


def _options(hint: str) -> Iterator[str]:
    for found in _WORD.finditer(hint):
        source = _expression(hint[found.end() :])
        if found[1] in ("item", "layout"):
            yield f"--{found[1]} {shlex.quote(str(ast.literal_eval(source)))}"
            # Of several layouts or items the hint names, the first stands for all.
            return
        yield from _policies(source) if found[1] == "policy" else _renames(source)


def _expression(text: str) -> str:
    """Returns the Python at the start of a text."""
    for end in range(1, len(text) + 1):
        try:
            ast.parse(text[:end], mode="eval")
        except SyntaxError:
            continue
        return text[:end]
    return "None"


def _policies(source: str) -> Iterator[str]:
    if source.startswith(('"', "'")):
        yield f"--policy {ast.literal_eval(source)}"
        return
    # Only keys of paths can be said at a prompt, no types of Variables; a part of a policy would mislead.
    found = _FILTERED.findall(source)
    if len(found) == source.count(": ") - source.count("...: "):
        yield from (f"--policy {shlex.quote(f'{key}={ast.literal_eval(value)}')}" for key, value in found)


def _renames(source: str) -> Iterator[str]:
    try:
        rules = cast("list[tuple[str, str]]", ast.literal_eval(source))
    except ValueError:
        return
    # A name with a space stands for one that the reader knows.
    if not any(" " in name for rule in rules for name in rule):
        yield from (f"--rename {shlex.quote(f'{stored}={wanted}')}" for stored, wanted in rules)


_GAP = 3


@dataclasses.dataclass(frozen=True)
class Screen:
    """Standard output and standard error.

    Attributes:
        out: Standard output.
        err: Standard error.
        as_json: Whether errors are JSON on standard output, as everything else then is.
    """

    out: Console
    err: Console
    as_json: bool = False

    @classmethod
    def standard(cls, *, as_json: bool = False) -> "Screen":
        """Returns the process's own."""
        # The stream of now: what is printed elsewhere may be turned away from it later.
        out = Console(file=sys.stdout, highlight=False)
        return cls(out, Console(stderr=True, highlight=False), as_json)

    def say(self, text: str = "", style: str = "") -> None:
        """Prints text as it is; a pipe gets no line that was broken for a terminal's sake."""
        self.out.print(Text(text, style), soft_wrap=True)

    def head(self, text: str) -> None:
        """Prints a heading."""
        self.say(text, "bold")

    def facts(self, facts: Sequence[tuple[str, str]]) -> None:
        """Prints one named fact a line; on a terminal a long one goes on below itself."""
        if not self.out.is_terminal:
            self.table(facts)
            return
        grid = Table.grid(padding=(0, _GAP, 0, 0))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, value in facts:
            grid.add_row(Text(f"  {name}"), Text(value))
        self.out.print(grid)

    def table(self, rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> None:
        """Prints rows with aligned columns; where a terminal is too narrow, a path has a line of its own."""
        lines = _plain(rows, right)
        if self.out.is_terminal and max(map(len, lines), default=0) > self.out.width:
            others = _plain([row[1:] for row in rows], [at - 1 for at in right])
            lines = [
                text
                for row, rest in zip(rows, others, strict=True)
                for text in (f"  {row[0]}", f"    {rest}")
            ]
        for line in lines:
            self.say(line)

    def json(self, value: Any) -> None:
        """Prints a value as JSON that a program can read."""
        self.out.print(
            Text(json.dumps(_for_json(value), indent=2, ensure_ascii=False, allow_nan=False)), soft_wrap=True
        )

    def error(self, kind: str, message: str, *, plain: str = "") -> None:
        """Prints an error to standard error; under `--json`, as JSON to standard output.

        Args:
            kind: The type of the error.
            message: What is wrong.
            plain: The whole text for a person, where it is not just kind and message.
        """
        if self.as_json:
            self.json({"error": {"type": kind, "message": message}})
            return
        word, colon, rest = (plain or f"{kind}: {message}").partition(": ")
        self.err.print(Text(word + colon, "bold red").append(rest, "default not bold"), soft_wrap=True)

    @contextlib.contextmanager
    def progress(self, nbytes: int, *phases: str) -> Generator[tuple[Callable[[int], None], ...]]:
        """Shows a bar with rate and time left on a terminal; nothing in a pipe.

        Args:
            nbytes: How many bytes each phase goes through.
            phases: What is done with them, one after the other. The bar of a phase, and
                with it its time left, starts with its first bytes.

        Yields:
            For each phase, what is to be called with the bytes done since the last call.
        """
        # Here, for it is a tenth of a second that `plan` need not wait.
        from orbax_nnx_handler.commands.bars import bars

        with bars(self.err, nbytes, phases) as steps:
            yield steps


def _for_json(value: Any) -> Any:
    """Returns a value with `NaN` and `Infinity` as words, as in Protobuf's JSON: JSON has no such numbers."""
    if isinstance(value, dict):
        return {key: _for_json(part) for key, part in cast("dict[str, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [_for_json(part) for part in cast("list[Any]", value)]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else f"{'-' * (value < 0)}Infinity"
    return value


def _plain(rows: Sequence[Sequence[str]], right: Sequence[int]) -> list[str]:
    widths = [max(len(row[at]) for row in rows) for at in range(max(map(len, rows), default=0))]
    lines: list[str] = []
    for row in rows:
        cells = [
            cell.rjust(width) if at in right else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  " + (" " * _GAP).join(cells).rstrip())
    return lines


def size(nbytes: int) -> str:
    """Returns a number of bytes as a person reads it; kB, MB and GB are powers of 1,000."""
    value, units = float(nbytes), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.95 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{nbytes} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def count(number: int, noun: str, plural: str = "") -> str:
    """Returns a number with its noun: `1 leaf`, `1,200 leaves`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
