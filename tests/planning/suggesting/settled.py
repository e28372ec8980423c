"""A proposal that builds on rules that are settled: for a pair and a part of the rules proposed for it.

The suite takes one part of a pair's rules, another kind of part from pair to pair, of every fifth unseen
one that it takes. `python -m tests.planning.suggesting.settled` takes all, and exits 1 where something became
wrong.
"""

import os
import random
import sys
from collections.abc import Mapping, Sequence
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np

from orbax_nnx_handler.planning.core.errors import RestoreError
from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.options import RestoreOptions
from orbax_nnx_handler.planning.suggesting import propose
from orbax_nnx_handler.planning.target import flatten_target
from orbax_nnx_handler.planning.verdict import judge
from tests.planning.plans import Arrays, evaluate, leaves_of, stored_of
from tests.planning.suggesting import foreign
from tests.planning.suggesting.pairs import FOREIGN, UNSEEN, proposed, target_of

PARTS = 3


def part_of_its_own(name: str, names: Sequence[str]) -> int:
    """Returns which part of a pair's rules the suite takes."""
    return list(names).index(name) % PARTS


def spoilt(name: str, part: int, target: Any, tree: Any, rules: Sequence[Any]) -> set[Path]:
    """Returns the leaves that a part of the rules gives, and a proposal built on it gives wrongly or no more.

    Args:
        name: The pair's.
        part: All rules but one, one alone, or about half of them.
        target: The wanted side.
        tree: The stored one.
        rules: What is proposed where nothing is settled.
    """
    if not rules:
        return set()
    wanted, arrays = flatten_target(target), leaves_of(tree)
    settled = _parts(rules, name)[part]
    try:
        alone = values_under(wanted, arrays, settled)
    except RestoreError:
        return set()  # These rules need the others.
    found = propose(wanted, stored_of(arrays), _options(settled))
    after = values_under(wanted, arrays, (*settled, *found.renames))
    right = values_under(wanted, arrays, rules)
    return (_wrong(after, right) - _wrong(alone, right)) | (alone.keys() - after.keys())


def _parts(rules: Sequence[Any], name: str) -> tuple[Sequence[Any], ...]:
    chance = random.Random(name)
    one = chance.randrange(len(rules))
    half = tuple(rule for rule in rules if chance.random() < 0.5)
    return (*rules[:one], *rules[one + 1 :]), (rules[one],), half


def _options(rules: Sequence[Any]) -> RestoreOptions:
    return RestoreOptions.of(renames=rules, policy="warn", unexpected="ignore")


def values_under(wanted: Any, arrays: Arrays, rules: Sequence[Any]) -> dict[Path, np.ndarray]:
    """Returns the values of a plan under rules, whatever else it says against them."""
    verdict = judge(wanted, stored_of(arrays), _options(rules))
    return {path: evaluate(item.recipe, arrays) for path, item in verdict.restored.items()}


def _wrong(values: Mapping[Path, np.ndarray], right: Mapping[Path, np.ndarray]) -> set[Path]:
    return {path for path, value in values.items() if not np.array_equal(value, right.get(path))}


def main() -> int:
    """Takes all parts of all pairs."""
    bad = 0
    for name in [*FOREIGN, *UNSEEN]:
        if name in FOREIGN:
            pair = FOREIGN[name]
            target, tree = foreign.target_of(pair), foreign.nested(foreign.arrays_of(pair))
            rules = foreign.proposed(name).renames
        else:
            target, (tree, found) = target_of(UNSEEN[name]["wanted"]), proposed(name)
            rules = found.renames
        for part in range(PARTS):
            wrong = spoilt(name, part, target, tree, rules)
            bad += bool(wrong)
            if wrong:
                print(f"{name}, part {part}:", *sorted("/".join(map(str, path)) for path in wrong))
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
