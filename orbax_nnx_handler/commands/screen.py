"""What a command says: on a terminal as wide as that is, in a pipe as plain lines, under `--json` as JSON.

Hints propose arguments; whoever reads them at a prompt gets the options instead.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any, cast

from rich.console import Console
from rich.table import Table
from rich.text import Text

from orbax_nnx_handler.commands.arguments import way_out
from orbax_nnx_handler.planning.core.errors import RestoreError
from orbax_nnx_handler.planning.core.lines import counted, sized
from orbax_nnx_handler.planning.core.paths import printable
from orbax_nnx_handler.planning.rendering.summary import error_to_dict

_GAP = 3
_A_WHILE_S = 2.0


class _Output(Console):
    """A console that leaves a pipe that its reader has closed to the caller; rich ends with status 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


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
        # Bound at this moment: what the user's own module prints may be sent elsewhere later.
        out = _Output(file=sys.stdout, highlight=False)
        return cls(out, Console(stderr=True, highlight=False), as_json)

    def say(self, text: str = "", style: str = "") -> None:
        """Prints text as it is; a pipe gets no line that was broken for a terminal's sake."""
        self.out.print(Text(printable(text, keep="\n"), style), soft_wrap=True)

    def head(self, text: str) -> None:
        """Prints a heading."""
        self.say(text, "bold")

    def show(self, value: Any) -> None:
        """Prints what knows a terminal, in colour and in its width; in a pipe its text."""
        if self.out.is_terminal:
            self.out.print(value)
        else:
            self.say(str(value))

    def facts(self, facts: Sequence[tuple[str, str]]) -> None:
        """Prints one named fact a line; on a terminal a long one goes on below itself."""
        if not self.out.is_terminal:
            self.table(facts)
            return
        grid = Table.grid(padding=(0, _GAP, 0, 0))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, value in facts:
            grid.add_row(Text(f"  {name}"), Text(printable(value)))
        self.out.print(grid)

    def table(self, rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> None:
        """Prints rows with aligned columns; where a terminal is too narrow, a path has a line of its own."""
        rows = [list(map(printable, row)) for row in rows]
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
        text = json.dumps(_for_json(value), indent=2, ensure_ascii=False, allow_nan=False)
        # A terminal may be what reads it: what cannot be seen is escaped as JSON has it.
        shown = "".join(
            letter if letter.isprintable() or letter == "\n" else json.dumps(letter)[1:-1] for letter in text
        )
        self.out.print(Text(shown), soft_wrap=True)

    def error(self, kind: str, message: str, *, word: str = "", text: str = "") -> None:
        """Prints an error to standard error; under `--json`, as JSON to standard output.

        Args:
            kind: The type of the error.
            message: What is wrong.
            word: What a person reads in front, if not the type.
            text: What a person reads behind it, if not the message.
        """
        if self.as_json:
            self.json({"error": {"type": kind, "message": message}})
            return
        what = printable(text or message, keep="\n")
        shown = Text(f"{word or kind}: ", "bold red").append(what, "default not bold")
        self.err.print(shown, soft_wrap=True)

    def refusal(self, error: RestoreError, arguments: argparse.Namespace) -> None:
        """Prints why a checkpoint cannot become a target, and what to type for what its hints propose."""
        if self.as_json:
            self.json({"error": error_to_dict(error)})
            return
        words = way_out(error.hints, arguments)
        more = f"\non the command line: {words}" if words else ""
        self.error(type(error).__name__, f"{error}{more}")

    @contextlib.contextmanager
    def waiting(self, what: str) -> Generator[None]:
        """Says on a terminal what is under way, once it has taken a while; nothing in a pipe."""
        if not self.err.is_terminal:
            yield
            return
        status = self.err.status(f"{what} …")
        begin = threading.Timer(_A_WHILE_S, status.start)
        begin.daemon = True
        begin.start()
        try:
            yield
        finally:
            begin.cancel()
            begin.join()
            status.stop()

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
        from rich import progress as bars

        columns = (
            bars.TextColumn("{task.description}"),
            bars.BarColumn(),
            bars.DownloadColumn(),
            bars.TransferSpeedColumn(),
            bars.TimeRemainingColumn(),
        )
        disable = not self.err.is_terminal
        with bars.Progress(*columns, console=self.err, transient=True, disable=disable) as shown:

            def step_of(task: bars.TaskID) -> Callable[[int], None]:
                def step(done: int) -> None:
                    shown.start_task(task)
                    shown.update(task, advance=done)

                return step

            yield tuple(step_of(shown.add_task(phase, total=nbytes, start=False)) for phase in phases)


def _for_json(value: Any) -> Any:
    """Returns a value with `NaN` and `Infinity` as words, as in Protobuf's JSON: JSON has no such numbers."""
    if isinstance(value, dict):
        return {key: _for_json(part) for key, part in cast("dict[str, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [_for_json(part) for part in cast("list[Any]", value)]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else f"{'-' * (value < 0)}Infinity"
    return value


_LONGEST_CELL = 200


def _plain(rows: Sequence[Sequence[str]], right: Sequence[int]) -> list[str]:
    # One name that is longer than any line must not push the others' columns away.
    widths = [
        min(_LONGEST_CELL, max(len(row[at]) for row in rows)) for at in range(max(map(len, rows), default=0))
    ]
    lines: list[str] = []
    for row in rows:
        cells = [
            cell.rjust(width) if at in right else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  " + (" " * _GAP).join(cells).rstrip())
    return lines


def size(nbytes: int) -> str:
    """Returns a number of bytes as a table has it; kB, MB and GB are powers of 1,000."""
    return sized(nbytes, digits=1)


def count(number: int, noun: str, plural: str = "") -> str:
    """Returns a number with its noun: `1 leaf`, `1,200 leaves`."""
    return counted(number, noun, plural, thousands=",")
