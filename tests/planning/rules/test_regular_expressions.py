"""A rename by a regular expression rewrites the whole path as `re.sub` does."""

import re

import jax
import numpy as np
import pytest

from orbax_nnx_handler import Rename, RuleError, StackLayers, UnusedRuleError, from_linen
from orbax_nnx_handler.planning.layouts.linen import VARIABLES
from orbax_nnx_handler.planning.rules import apply_rules
from orbax_nnx_handler.planning.rules.entries import model_entries
from tests.planning.plans import leaves_of, stored_of

FLAT = {
    "model.layers.0.q_proj.weight": np.full((2, 3), 0.0, np.float32),
    "model.layers.1.q_proj.weight": np.full((2, 3), 1.0, np.float32),
    "model.norm.weight": np.full(3, 2.0, np.float32),
}


def renamed(tree, *rules):
    entries = model_entries(VARIABLES.place(stored_of(leaves_of({"params": tree}))))
    return ["/".join(entry.whole) for entry in apply_rules(entries, rules).entries]


@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [(r"_(\d+)/", r"/\1/"), (r"^params/", "weights/"), ("e", "E"), (r"/(\w+)$", r"/the_\1"), ("kernel", "")],
)
def test_paths_are_what_re_sub_makes_of_them(pattern: str, replacement: str) -> None:
    tree = {"layer_0": {"kernel": np.ones(1)}, "layer_1": {"scale": np.ones(1)}}

    found = renamed(tree, Rename(pattern, replacement, regex=True))

    texts = ("params/layer_0/kernel", "params/layer_1/scale")
    assert found == [re.sub(pattern, replacement, text).strip("/") for text in texts]


def test_it_sees_what_rules_before_it_wrote_and_later_names_are_left_alone() -> None:
    tree = {"a": {"kernel": np.ones(1)}}

    assert renamed(tree, Rename("a", "b"), Rename("^params/b", "params/c", regex=True)) == ["params/c/kernel"]
    with pytest.raises(UnusedRuleError):
        renamed(tree, Rename("/a/", "/b/", regex=True), Rename("b", "c"))


def test_a_flat_tree_with_dots_becomes_a_nested_one() -> None:
    wanted = {
        "layers": {"q_proj": {"weight": jax.ShapeDtypeStruct((2, 2, 3), np.float32)}},
        "norm": {"weight": jax.ShapeDtypeStruct((3,), np.float32)},
    }
    rules = [
        Rename(r"\.", "/", regex=True),
        Rename("^model/", "", regex=True),
        StackLayers("layers/{i}", "layers", axis=0),
    ]

    found = from_linen(FLAT, wanted, renames=rules, unexpected="error")

    np.testing.assert_array_equal(found["layers"]["q_proj"]["weight"][:, 0, 0], [0, 1])
    np.testing.assert_array_equal(found["norm"]["weight"], FLAT["model.norm.weight"])


def test_an_expression_without_effect_or_with_a_fault_is_an_error() -> None:
    rule = Rename("^encoder/", "", regex=True)

    with pytest.raises(UnusedRuleError, match=re.escape(str(rule))):
        renamed({"a": {"kernel": np.ones(1)}}, rule)
    for pattern, replacement in (("(", ""), ("a", r"\1"), ("", "x"), ("a", r"\g<name>")):
        with pytest.raises(RuleError, match="regex=True"):
            Rename(pattern, replacement, regex=True)
    with pytest.raises(RuleError, match="leaves no name"):
        renamed({"a": {"kernel": np.ones(1)}}, Rename(".*", "", regex=True))


def test_it_prints_as_the_python_that_makes_it_and_is_undone_by_a_plan_only() -> None:
    rule = Rename("a+", "b", regex=True)

    assert eval(str(rule)) == rule == eval(repr(rule))
    assert str(Rename("a", "b")) == "('a', 'b')"
    assert repr(Rename("a", "b")) == "Rename(pattern='a', replacement='b')"
    with pytest.raises(RuleError, match="save with the plan or the report of the restore"):
        rule.inverse()
