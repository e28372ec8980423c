"""Pairs that were written without a look at the search, each with its own truth: how many leaves come out.

`unseen_pairs.json` holds names and shapes of both sides, and of each wanted leaf a digest of what must
come: the stored leaves are counted through, so that no element is like another one.
"""

import functools
import hashlib
import math

import jax
import numpy as np
import pytest
from flax import nnx

from orbax_nnx_handler import from_linen, suggest, to_linen
from tests.planning.plans import leaves_of, plan_of
from tests.planning.suggesting.pairs import OPEN, UNSEEN

KINDS = {"params": nnx.Param, "batch_stats": nnx.BatchStat}


def keys(path):
    return tuple(int(key) if key.isdecimal() else key for key in path.split("/"))


def nested(shapes):
    tree, first = {}, 0
    for path, shape in shapes.items():
        *above, last = path.split("/")
        at = tree
        for key in above:
            at = at.setdefault(key, {})
        size = math.prod(shape)
        at[last] = np.arange(first, first + size, dtype="float32").reshape(shape)
        first += size
    assert first < 2**24
    return tree


def target_of(wanted):
    return nnx.from_flat_state(
        [
            (keys(path), KINDS[kind](jax.ShapeDtypeStruct(tuple(shape), "float32")))
            for path, (shape, kind, _) in wanted.items()
        ]
    )


@functools.cache
def proposed(name):
    """Returns the stored tree and what is proposed for it."""
    tree = nested(UNSEEN[name]["stored"])
    return tree, suggest(tree, target_of(UNSEEN[name]["wanted"]))


@pytest.mark.parametrize("name", UNSEEN)
def test_an_unseen_pair_is_right_but_for_what_stays_open_and_never_wrong(name):
    pair = UNSEEN[name]

    tree, found = proposed(name)

    left = {"/".join(map(str, path)) for path in found.unmatched_wanted}
    state = from_linen(
        tree, target_of(pair["wanted"]), renames=found.renames, policy="warn", unexpected="ignore"
    )
    wrong = []
    for path, leaf in nnx.to_flat_state(state):
        name_of = "/".join(map(str, path))
        value = np.ascontiguousarray(leaf.get_value(), dtype="float32")
        if (
            name_of not in left
            and hashlib.sha256(value.tobytes()).hexdigest()[:12] != pair["wanted"][name_of][2]
        ):
            wrong.append(name_of)
    assert wrong == []
    assert len(left) == OPEN.get(name, 0)


@pytest.mark.parametrize("name", [name for name in UNSEEN if OPEN.get(name) != len(UNSEEN[name]["wanted"])])
def test_the_rules_for_an_unseen_pair_save_back_what_was_stored(name):
    pair = UNSEEN[name]
    tree, found = proposed(name)
    covered = nnx.from_flat_state(
        [
            (path, leaf)
            for path, leaf in nnx.to_flat_state(target_of(pair["wanted"]))
            if path not in found.unmatched_wanted
        ]
    )
    state = from_linen(tree, covered, renames=found.renames, unexpected="ignore")
    unused = plan_of(covered, tree, found.renames, unexpected="ignore").unexpected

    layout = "maxtext" if "params" in tree["params"] else "linen"
    saved = leaves_of(to_linen(state, layout=layout, renames=found.renames))

    stored = {path: leaf for path, leaf in leaves_of(tree).items() if path not in unused}
    assert set(saved) == set(stored)
    assert [path for path in saved if not np.array_equal(saved[path], stored[path])] == []
