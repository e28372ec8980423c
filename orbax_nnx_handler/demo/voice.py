"""How the demo speaks: headings, a sentence, figures, and what the library itself prints."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

INDENT = (0, 0, 0, 3)


class Voice:
    """Speaks to one terminal; plain where that is a pipe."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(highlight=False)
        self.chapters = 0

    def title(self, title: str, sentence: str) -> None:
        """Opens the demo."""
        self.console.print()
        self.console.print(Text(title, style="bold"))
        self.console.print(Text(sentence, style="dim"))

    def chapter(self, heading: str) -> None:
        """Opens a chapter."""
        self.chapters += 1
        self.console.print()
        self.console.print(Text(f"{self.chapters}  {heading}", style="bold cyan"))

    def say(self, sentence: str) -> None:
        """Says one sentence."""
        self._print(Text(sentence))

    def figures(self, rows: Iterable[tuple[str, str]]) -> None:
        """Shows one figure a row, its name before it."""
        table = Table.grid(padding=(0, 3))
        table.add_column(style="dim")
        table.add_column()
        for name, figure in rows:
            table.add_row(name, figure)
        self._print(table)

    def columns(self, names: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Shows a table of figures, right-aligned."""
        table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
        for name in names:
            table.add_column(name, justify="right")
        for row in rows:
            table.add_row(*row)
        self._print(table)

    def quote(self, words: object) -> None:
        """Shows what the library itself prints, untouched; long lines are for the reader to see whole."""
        self.console.print()
        for line in str(words).splitlines():
            self.console.print(Text("   │ ", style="dim").append(line, style="default"), soft_wrap=True)
        self.console.print()

    def end(self, sentence: str) -> None:
        """Closes the demo."""
        self.console.print()
        self.console.print(Text(sentence, style="dim"))

    def _print(self, renderable: Text | Table) -> None:
        self.console.print(Padding(renderable, INDENT, expand=False))
