"""Proposals beside rules that are settled already: they build on them, and cover no less than without."""

import numpy as np
import pytest
from flax import traverse_util

from orbax_nnx_handler import Copy, Fuse, Reshape, Split, Transpose, UnstackLayers, suggest
from orbax_nnx_handler.planning.rules import as_rules
from orbax_nnx_handler.planning.target import flatten_target
from tests.planning.plans import leaves_of
from tests.planning.suggesting.proposals import abstract, filled
from tests.planning.suggesting.settled import values_under

LAYERS = 3
STORED = {
    "h/ln/scale": (LAYERS, 16),
    "h/fused_in/kernel": (LAYERS, 16, 80),
    "h/attn_out/kernel": (LAYERS, 16, 16),
    "h/ff_out/kernel": (LAYERS, 24, 16),
    "wte/embedding": (50, 16),
}
WANTED = {
    "embedder/embedding": (50, 16),
    **{
        f"layers/{at}/{path}": shape
        for at in range(LAYERS)
        for path, shape in {
            "input_norm/scale": (16,),
            "att/q": (4, 16, 4),
            "att/kv": (2, 2, 16, 4),
            "att/o": (4, 4, 16),
            "mlp/gate_proj/kernel": (16, 24),
            "mlp/up_proj/kernel": (16, 24),
            "mlp/down_proj/kernel": (24, 16),
        }.items()
    },
}
"""Stacked layers whose queries, keys, values, gate and what it gates lie in one array, the target's apart."""


def steps(q, k, v, gate, up):
    """Returns the conversion step by step; the names are those of what the array is taken apart into."""
    sizes = (16, 8, 8, 24, 24)
    return [
        UnstackLayers("h", "layers/{i}", axis=0),
        Split("fused_in/kernel", (q, k, v, gate, up), axis=1, sizes=sizes),
        Reshape(k, (16, 2, 4), before=(16, 8)),
        Reshape(v, (16, 2, 4), before=(16, 8)),
        Transpose(k, (1, 0, 2)),
        Transpose(v, (1, 0, 2)),
        Fuse((k, v), "att/kv", axis=0, new_axis=True),
        Reshape("attn_out/kernel", (4, 4, 16), before=(16, 16)),
        ("attn_out/kernel", "att/o"),
        Reshape(q, (16, 4, 4), before=(16, 16)),
        Transpose(q, (1, 0, 2)),
        (f"layers/{{i}}/{q}", "layers/{i}/att/q"),
        (f"layers/{{i}}/{gate}", "layers/{i}/mlp/gate_proj/kernel"),
        (f"layers/{{i}}/{up}", "layers/{i}/mlp/up_proj/kernel"),
        ("ln", "input_norm"),
        ("ff_out", "mlp/down_proj"),
        ("wte", "embedder"),
    ]


NAMES = ("q", "k", "v", "gate_proj", "up_proj")
MODULES = tuple(f"{name}/kernel" for name in NAMES)


@pytest.mark.parametrize("names", [NAMES, MODULES], ids=["parameters", "modules"])
def test_each_rule_that_is_settled_leaves_what_was_found_and_what_it_cuts_out_is_found_too(names):
    rules, target = as_rules(steps(*names)), abstract(WANTED)
    stored = {"params": traverse_util.unflatten_dict(filled(STORED), sep="/")}
    sides, before = (flatten_target(target), leaves_of(stored)), 0
    right = values_under(*sides, rules)

    for count in range(len(rules) + 1):
        found = suggest(stored, target, renames=rules[:count])
        asked = {path for question in found.questions for path in question.wanted}
        covered = found.covered + len(asked & set(found.unmatched_wanted))
        assert covered >= before, rules[:count]
        before = covered
        for path, value in values_under(*sides, (*rules[:count], *found.renames)).items():
            np.testing.assert_array_equal(value, right[path], err_msg=f"{path} after {count} rules")
        if count > 6:  # Keys and values are one array.
            assert covered == len(WANTED)
    assert found.confidence == "likely"  # That the rules are right, nothing here says.


def test_an_order_of_axes_that_a_rule_gives_is_not_asked_again():
    stored = {"params": {"a": {"q": {"kernel": np.zeros((8, 4, 4), "f")}}}}
    turned = [Transpose("q/kernel", (1, 0, 2))]

    found = suggest(stored, abstract({"att/q": (4, 8, 4)}), renames=turned)
    plain = suggest(
        {"params": {"a": {"q": {"kernel": np.zeros((4, 8, 4), "f")}}}}, abstract({"att/q": (4, 8, 4)})
    )

    assert plain.questions != ()
    assert (found.questions, found.unmatched_wanted) == ((), ())


TIED = [Copy("embed/embedding", "head/kernel"), Transpose("head/kernel", (1, 0)), ("embed", "tok")]


@pytest.mark.parametrize("count", range(len(TIED) + 1))
def test_both_of_a_leaf_and_its_copy_are_found_whichever_is_settled(count):
    stored = {"params": {"embed": {"embedding": np.ones((20, 8), "f")}, "norm": {"scale": np.ones(8, "f")}}}
    wanted = {"tok/embedding": (20, 8), "head/kernel": (8, 20), "norm/scale": (8,)}

    found = suggest(stored, abstract(wanted), renames=TIED[:count])

    assert (found.covered, found.questions) == (3, ())
