"""The README's table of figures, taken from benchmarks/README.md."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]
_TABLE = re.compile(r"^\*\*(?P<title>[^*]+)\*\*\n\n(?P<rows>(?:\|.*\n)+)", re.MULTILINE)
_PLACE = re.compile(r"(<!-- figures: begin[^>]*-->\n).*?(<!-- figures: end -->)", re.DOTALL)


def rewritten(readme: str) -> str:
    """Returns the README with its table of figures anew."""
    tables = {found["title"]: _by_contestant(found["rows"]) for found in _TABLE.finditer(_benchmarks())}
    rows = [_row(title, table) for title, table in tables.items() if {"ours", "orbax"} <= table.keys()]
    head = [
        "| restore of | time ÷ Orbax's | CPU time ÷ Orbax's | peak memory ÷ bytes | Orbax's peak ÷ bytes |",
        "| --- | --- | --- | --- | --- |",
    ]
    return _PLACE.sub(lambda place: place[1] + "\n".join([*head, *rows]) + "\n" + place[2], readme)


def _benchmarks() -> str:
    return (ROOT / "benchmarks" / "README.md").read_text()


def _by_contestant(table: str) -> dict[str, dict[str, str]]:
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def _row(title: str, table: dict[str, dict[str, str]]) -> str:
    ours, orbax = table["ours"], table["orbax"]
    cells = (ours["× Orbax"], ours["CPU × Orbax"], ours["peak ÷ bytes"], orbax["peak ÷ bytes"])
    return f"| {title} | {' | '.join(cells)} |"
