"""Writes the part of `docs/supported.md` on other programs' models, from the pairs of the suite.

`python -m tests.planning.suggesting.table` rewrites the page; a test compares it. The tests of the pairs
hold every figure.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence

from tests.planning.suggesting.pairs import FOREIGN, OPEN, UNSEEN
from tests.zoo.table import PAGE

BEGIN, END = "<!-- pairs: begin (written by tests/planning/suggesting/table.py) -->", "<!-- pairs: end -->"

INTRODUCTION = """## Other programs' models

Names and shapes of a Linen program's checkpoint, and of an NNX model that somebody else wrote. `suggest`
alone, without either program, proposes the rules; the suite compares every value that they restore and what
a save by the same rules writes. No leaf is wrong. What is left open, `suggest` asks about or lists.

Right is what comes from the stored leaf that it is made of, in that one's arrangement. What no name and
no shape tells is by which convention two programs use equal values: which features of a head rotary
positions pair (EasyLM neighbours, Tunix halves), whether a norm's scale has its 1 in it, whether a
constant is folded into a weight. [Verify](proving.md) finds that.

| checkpoint of | model of | leaves | right | left open |
| --- | --- | --- | --- | --- |
"""


_PROGRAMS = {"lm1b": "flax's lm1b", "mixer": "google-research's MLP-Mixer"}


def section() -> str:
    """Returns the part of the page that the pairs know."""
    rows = [*_rows()]
    total = [str(sum(row[at] for row in rows)) for at in (2, 3, 4)]
    lines = [f"| {stored} | {wanted} | {a} | {b} | {c} |\n" for stored, wanted, a, b, c in rows]
    return f"{BEGIN}\n{INTRODUCTION}{''.join(lines)}| together | | {' | '.join(total)} |\n\n{END}"


def _rows() -> Iterator[tuple[str, str, int, int, int]]:
    found: dict[Sequence[str], list[int]] = defaultdict(lambda: [0, 0])
    for name, pair in FOREIGN.items():
        stored, _, wanted = name.replace("_", " ").partition(" -> ")
        found[_PROGRAMS.get(stored, f"{stored}, transformers' Flax"), wanted][0] += len(pair["truth"])
    for name, pair in UNSEEN.items():
        if not pair["about"].startswith("minimal"):
            counts = found[_sides(pair["about"])]
            counts[0] += len(pair["wanted"])
            counts[1] += OPEN.get(name, 0)
    for (stored, wanted), (leaves, left) in sorted(found.items(), key=lambda item: item[0][0].lower()):
        yield stored, wanted, leaves, leaves - left, left


def _sides(about: str) -> tuple[str, str]:
    stored, _, wanted = about.replace("HF Flax", "transformers' Flax").partition(" -> ")
    return stored, wanted


def rewritten(page: str) -> str:
    """Returns the page with this part brought up to date."""
    before, rest = page.split(BEGIN, 1)
    return before + section() + rest.split(END, 1)[1]


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text()))
