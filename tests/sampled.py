"""A part of many cases that are alike, for the suite; `python -m tests.sampled` runs those tests with all.

So it takes whole grids, every pair of `suggest` and of hints, every model under rules, every twin that is
proposed and proved, groups of two processes as well as of four, and more random cases.
"""

import itertools
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from tests.processes import ROOT

_WHOLE = "ORBAX_NNX_WHOLE_GRIDS"

T = TypeVar("T")


def sampled(*axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Returns so many combinations of three axes or more that each two values of two axes still meet."""
    combined = [*itertools.product(*map(enumerate, axes))]
    meeting = [
        {*itertools.combinations([(axis, at) for axis, (at, _) in enumerate(case)], 2)} for case in combined
    ]
    unmet, taken = set[Any]().union(*meeting), set[int]()
    while unmet:
        # Of those in which most meet for the first time, the first one.
        best = max(range(len(combined)), key=lambda number: len(meeting[number] & unmet))
        taken.add(best)
        unmet -= meeting[best]
    return [
        tuple(value for _, value in case)
        for number, case in enumerate(combined)
        if _WHOLE in os.environ or number in taken
    ]


def checkered(*axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Returns every other combination of axes, as the squares of one colour of a board."""
    return [
        tuple(value for _, value in case)
        for case in itertools.product(*map(enumerate, axes))
        if _WHOLE in os.environ or sum(at for at, _ in case) % 2 == 0
    ]


def every(step: int, cases: Iterable[T], first: int = 0) -> Sequence[T]:
    """Returns every so-many-th of a list of cases, from one of them on."""
    return [*cases] if _WHOLE in os.environ else [*cases][first::step]


def drawn(few: int, many: int) -> int:
    """Returns how many random cases are drawn: few in the suite."""
    return many if _WHOLE in os.environ else few


def main() -> int:
    """Runs the files that take a part of their cases, with all; what follows the command goes to pytest."""
    files = [
        str(path)
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if "tests.sampled" in path.read_text()
    ]
    words = [sys.executable, "-m", "pytest", *files, *sys.argv[1:]]
    return subprocess.run(words, cwd=ROOT, env=os.environ | {_WHOLE: "1"}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
