"""A proposal that builds on rules that are settled: for every pair and some parts of its right rules."""

import functools
import math
import random

import jax
import numpy as np
import pytest
from flax import nnx

from orbax_nnx_handler.planning.core.errors import RestoreError
from orbax_nnx_handler.planning.core.leaves import StoredLeaf
from orbax_nnx_handler.planning.options import RestoreOptions
from orbax_nnx_handler.planning.suggesting import propose
from orbax_nnx_handler.planning.target.target import flatten_target
from orbax_nnx_handler.planning.verdict.judge import judge
from tests.planning.plans import evaluate
from tests.planning.suggesting.pairs import FOREIGN, UNSEEN

KINDS = {"params": nnx.Param, "batch_stats": nnx.BatchStat}
PARTS = 3


def keys(path):
    return tuple(int(key) if key.isdecimal() else key for key in path.split("/"))


def sides(name):
    pair = FOREIGN.get(name) or UNSEEN[name]
    flat = [
        (keys(path), KINDS.get(kind, nnx.Variable)(jax.ShapeDtypeStruct(tuple(shape), "float32")))
        for path, (shape, kind, *_) in pair["wanted"].items()
    ]
    return flatten_target(nnx.from_flat_state(flat)), pair["stored"]


def stored_leaves(shapes):
    leaves, arrays, first = {}, {}, 0
    for text, shape in shapes.items():
        path, size = tuple(text.split("/")), math.prod(shape)
        leaves[path] = StoredLeaf(path=path, shape=tuple(shape), dtype=np.dtype("float32"))
        arrays[path] = np.arange(first, first + size).reshape(shape)
        first += size
    return leaves, arrays


def options(rules):
    return RestoreOptions.of(renames=rules, policy="warn", unexpected="ignore")


def values(target, stored, rules, arrays):
    verdict = judge(target, stored, options(rules))
    return {path: evaluate(item.recipe, arrays) for path, item in verdict.restored.items()}


def parts_of(rules, name):
    """Returns all rules but one, one alone, and about half of them."""
    chance = random.Random(name)
    one = chance.randrange(len(rules))
    half = tuple(rule for rule in rules if chance.random() < 0.5)
    return (*rules[:one], *rules[one + 1 :]), (rules[one],), half


@functools.lru_cache(maxsize=1)
def without_rules(name):
    """Returns both sides of a pair, all rules that are proposed for it, and what they give."""
    target, shapes = sides(name)
    stored, arrays = stored_leaves(shapes)
    rules = propose(target, stored, options(())).renames
    return target, stored, arrays, rules, values(target, stored, rules, arrays)


# By name first: all parts of a pair follow each other.
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("name", [*FOREIGN, *UNSEEN])
def test_a_part_of_the_right_rules_is_built_upon_and_nothing_becomes_wrong(name, part):
    target, stored, arrays, rules, right = without_rules(name)
    if not rules:
        return
    settled = parts_of(rules, name)[part]
    try:
        alone = values(target, stored, settled, arrays)
    except RestoreError:
        return  # These rules need the others.

    found = propose(target, stored, options(settled))

    after = values(target, stored, (*settled, *found.renames), arrays)
    wrong = {path for path, value in after.items() if not np.array_equal(value, right.get(path))}
    assert wrong <= {path for path, value in alone.items() if not np.array_equal(value, right.get(path))}
    assert alone.keys() <= after.keys()
