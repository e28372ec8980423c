"""Half of a grid of cases for the suite; `python -m tests.sampled` runs the same tests with all of them."""

import itertools
import os
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

from tests.processes import ROOT

_WHOLE = "ORBAX_NNX_WHOLE_GRIDS"


def sampled(*axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Returns every other combination of three axes or more: each two values of two axes still meet."""
    combined = [*itertools.product(*map(enumerate, axes))]
    return [
        tuple(value for _, value in case)
        for case in combined
        if _WHOLE in os.environ or sum(at for at, _ in case) % 2 == 0
    ]


def main() -> int:
    """Runs the files that take half of a grid, with all of it; what follows the command goes to pytest."""
    files = [
        str(path)
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if "tests.sampled" in path.read_text()
    ]
    words = [sys.executable, "-m", "pytest", *files, *sys.argv[1:]]
    return subprocess.run(words, cwd=ROOT, env=os.environ | {_WHOLE: "1"}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
