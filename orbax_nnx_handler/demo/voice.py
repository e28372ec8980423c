"""How the demo speaks: headings, a sentence, figures, and what the library itself prints."""

import textwrap
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

MARGIN = "   "
WIDEST = 96


class Voice:
    """Speaks to one terminal, in colour; plain, without a trailing space, where that is a pipe."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(highlight=False)
        self.chapters = 0

    def title(self, title: str, sentence: str) -> None:
        """Opens the demo."""
        self._line()
        self._line(Text(title, style="bold"))
        self._line(Text(sentence, style="dim"))

    def chapter(self, heading: str) -> None:
        """Opens a chapter."""
        self.chapters += 1
        self._line()
        self._line(Text(f"{self.chapters}  {heading}", style="bold cyan"))
        self._line()

    def say(self, sentence: str) -> None:
        """Says one sentence."""
        width = min(self.console.width, WIDEST) - len(MARGIN)
        for line in textwrap.wrap(sentence, width):
            self._line(Text(MARGIN).append(line))

    def code(self, *lines: str) -> None:
        """Shows lines of the user's program, before what they print."""
        for line in lines:
            self._line(Text(MARGIN).append(line, "green"))
        self._line()

    def figures(self, **figures: str) -> None:
        """Shows one figure a row, its name before it."""
        longest = max(map(len, figures))
        for name, figure in figures.items():
            label = name.replace("_", " ").ljust(longest)
            self._line(Text(MARGIN).append(label, "dim").append(f"   {figure}"))

    def columns(self, names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Shows a table of figures, right-aligned."""
        widths = [max(len(row[i]) for row in (names, *rows)) for i in range(len(names))]
        for row in (names, *rows):
            cells = "   ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            self._line(Text(MARGIN).append(cells, "dim" if row is names else ""))

    def quote(self, words: object, most: int | None = None) -> None:
        """Shows what the library itself prints, word for word.

        Args:
            words: Anything that prints itself.
            most: Lines to show; the rest is counted. None for all.
        """
        lines = str(words).splitlines()
        shown = lines[:most]
        if len(shown) < len(lines):
            shown.append(f"… and {len(lines) - len(shown)} more lines")
        for line in shown:
            self._line(Text(MARGIN).append("│ ", "dim").append(line))

    def pause(self) -> None:
        """Leaves a line empty."""
        self._line()

    def end(self, sentence: str) -> None:
        """Closes the demo."""
        self._line()
        self._line(Text(sentence, style="dim"))

    def _line(self, line: Text | None = None) -> None:
        # Soft-wrapped: a path in a message stays whole, for the reader to copy.
        self.console.print(line or Text(), soft_wrap=True)
