"""Prints the demo: headings, sentences, figures, and what the library itself prints."""

import textwrap
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

MARGIN = "   "
WIDEST = 96


class Printer:
    """Prints to one console: in colour on a terminal, plain and without trailing spaces in a pipe."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(highlight=False)
        self.sections = 0

    def title(self, title: str, sentence: str) -> None:
        """Prints the title of the demo."""
        self._line()
        self._line(Text(title, style="bold"))
        self._line(Text(sentence, style="dim"))

    def section(self, heading: str) -> None:
        """Prints a numbered heading."""
        self.sections += 1
        self._line()
        self._line(Text(f"{self.sections}  {heading}", style="bold cyan"))
        self._line()

    def text(self, sentence: str) -> None:
        """Prints one sentence, wrapped."""
        width = min(self.console.width, WIDEST) - len(MARGIN)
        for line in textwrap.wrap(sentence, width):
            self._line(Text(MARGIN).append(line))

    def code(self, *lines: str) -> None:
        """Prints lines of the user's program, ahead of their output."""
        for line in lines:
            self._line(Text(MARGIN).append(line, "green"))
        self._line()

    def figures(self, **figures: str) -> None:
        """Prints one figure a row, after its name."""
        longest = max(map(len, figures))
        for name, figure in figures.items():
            label = name.replace("_", " ").ljust(longest)
            self._line(Text(MARGIN).append(label, "dim").append(f"   {figure}"))

    def table(self, names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Prints a table of figures, right-aligned."""
        widths = [max(len(row[i]) for row in (names, *rows)) for i in range(len(names))]
        for row in (names, *rows):
            cells = "   ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            self._line(Text(MARGIN).append(cells, "dim" if row is names else ""))

    def output(self, value: object, most: int | None = None) -> None:
        """Prints what the library itself prints, at most so many lines of it."""
        lines = str(value).splitlines()
        shown = lines[:most]
        if len(shown) < len(lines):
            shown.append(f"… and {len(lines) - len(shown)} more lines")
        for line in shown:
            self._line(Text(MARGIN).append("│ ", "dim").append(line))

    def blank(self) -> None:
        """Prints an empty line."""
        self._line()

    def end(self, sentence: str) -> None:
        """Prints the last sentence of the demo."""
        self._line()
        self._line(Text(sentence, style="dim"))

    def _line(self, line: Text | None = None) -> None:
        # Soft-wrapped: a path in a message stays whole, for the reader to copy.
        self.console.print(line or Text(), soft_wrap=True)
