"""What many modules have in common is renamed by one rule, which takes no other one along."""

import itertools

import numpy as np
import pytest

from orbax_nnx_handler import Rename
from tests.planning.suggesting.proposals import filled, proposed

WORDS = [*map("".join, itertools.product("bdfg", "aeiou"))][:20]


def modules(stored, wanted, count=32):
    """Returns modules of one size each, by both their names, with places for two words."""
    places = itertools.islice(itertools.product(WORDS, WORDS[:2]), count)
    return {stored.format(*words): (wanted.format(*words), 4 + at) for at, words in enumerate(places)}


@pytest.mark.parametrize(
    ("stored", "wanted", "rule"),
    [
        ("{0}{1}_dense", "{0}{1}_linear", ("{x}_dense", "{x}_linear")),
        ("enc_{0}{1}", "encoder_{0}{1}", ("enc_{x}", "encoder_{x}")),
        ("{0}/{1}_dense", "net/{0}/{1}_linear", ("{x}/{y}_dense", "net/{x}/{y}_linear")),
        ("{0}{1}/block", "{0}{1}/unit", ("block", "unit")),
    ],
)
def test_a_word_of_many_modules_is_renamed_at_once(stored, wanted, rule):
    pairs = modules(stored, wanted)
    tree = filled({f"{name}/kernel": (3, size) for name, (_, size) in pairs.items()})

    found, values = proposed(tree, {f"{name}/kernel": (3, size) for name, size in pairs.values()})

    assert found.renames == (Rename(*rule),)
    for name, (new, _) in pairs.items():
        np.testing.assert_array_equal(values[f"{new}/kernel"], tree[f"{name}/kernel"], err_msg=name)


def test_a_module_that_keeps_its_name_is_not_taken_along():
    pairs = modules("{0}{1}_dense", "{0}{1}_linear") | {"own_dense": ("own_dense", 99)}
    tree = filled({f"{name}/kernel": (3, size) for name, (_, size) in pairs.items()})

    found, values = proposed(tree, {f"{name}/kernel": (3, size) for name, size in pairs.values()})

    assert not found.unmatched_wanted
    for name, (new, _) in pairs.items():
        np.testing.assert_array_equal(values[f"{new}/kernel"], tree[f"{name}/kernel"], err_msg=name)
