"""Writes the layouts and formats of `docs/supported.md` from what the suite restores.

`python -m tests.layouts.table` rewrites the file; a test compares it.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from orbax_nnx_handler.planning.layouts import LAYOUTS
from tests.layouts.fixtures import FIXTURES
from tests.layouts.formats import OPTIONS, OTHERS, VERSIONS

PAGE = Path(__file__).parents[2] / "docs" / "supported.md"
BEGIN, END = "<!-- layouts: begin (written by tests/layouts/table.py) -->", "<!-- layouts: end -->"

LAYOUTS_INTRODUCTION = """## Layouts

Each row is a checkpoint that the suite writes as the codebase writes it, recognises without being told,
and restores into NNX; [Layouts and formats](layouts.md) shows the trees.
"""

FORMATS_INTRODUCTION = """## Formats on disk

Each row is restored bit for bit.
"""


def section() -> str:
    """Returns the part of the page that this package knows."""
    titles = {layout.name: layout.title for layout in LAYOUTS}
    rows = [
        (fixture.name, titles[fixture.layout], f"`{fixture.layout}`", fixture.shown) for fixture in FIXTURES
    ]
    layouts = _table(("Written by", "Layout", '`layout="auto"` finds', "Restored and compared"), rows)
    formats = _table(("Written by", "Format"), _formats())
    return "\n".join((BEGIN, LAYOUTS_INTRODUCTION, layouts, FORMATS_INTRODUCTION, formats, END))


def _formats() -> Iterator[Sequence[str]]:
    for version, disk_format in VERSIONS.items():
        orbax, _, _ = version.partition("/")
        yield orbax.replace("_", " ").title(), disk_format
    for disk_format in OPTIONS:
        yield "Orbax of today, with and without `_METADATA`", disk_format
    yield from OTHERS.items()


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def rewritten(page: str) -> str:
    """Returns the page with this part brought up to date."""
    if BEGIN not in page:
        return f"{page.rstrip()}\n\n{section()}\n".lstrip()
    before, rest = page.split(BEGIN, 1)
    return before + section() + rest.split(END, 1)[1]


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text() if PAGE.exists() else "# What is supported\n"))
