"""Recipes backwards, beside NumPy: what was read apart is put together again, element for element."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from flax import nnx, traverse_util
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from orbax_nnx_handler import Fuse, Rename, RuleError, from_linen, to_linen
from orbax_nnx_handler.planning.core.recipes import (
    Concat,
    Fill,
    Index,
    Read,
    Recipe,
    Reshape,
    Scale,
    Slice,
    Stack,
    Transpose,
)
from orbax_nnx_handler.planning.layouts.linen import VARIABLES
from orbax_nnx_handler.planning.rules import apply_rules
from orbax_nnx_handler.planning.rules.entries import Entry, model_entries
from orbax_nnx_handler.planning.rules.inverse import inverse, undo_rules
from tests.planning.plans import evaluate, leaves_of, params, stored_of
from tests.sampled import drawn

A, B = Read(("a",)), Read(("b",))
STORED = {
    ("a",): np.arange(24.0, dtype="float32").reshape(4, 6),
    ("b",): np.arange(90.0, 114.0).reshape(4, 6),
}


def undo(recipes: dict[str, Recipe]) -> dict[tuple[str, ...], np.ndarray]:
    """Restores with NumPy, then makes the stored leaves again from what came out."""
    wanted = {(name,): evaluate(recipe, STORED) for name, recipe in recipes.items()}
    ways = inverse(
        {(name,): recipe for name, recipe in recipes.items()},
        {path: value.shape for path, value in STORED.items()},
        {path: value.shape for path, value in wanted.items()},
    )
    return {path: evaluate(way, wanted) for path, way in ways.items()}


CASES: dict[str, dict[str, Recipe]] = {
    "as it is": {"x": A},
    "moved axes and another shape": {"x": Reshape(Transpose(A, (1, 0)), (3, 8))},
    "layers taken apart": {f"x{i}": Index(A, 1, i) for i in range(6)},
    "unequal parts": {"q": Slice(A, 1, 0, 2), "k": Slice(A, 1, 2, 1), "v": Slice(A, 1, 3, 3)},
    "layers taken apart, then split": {
        f"{name}{i}": Slice(Index(A, 0, i), 0, start, 3)
        for i in range(4)
        for name, start in (("k", 0), ("v", 3))
    },
    "fused and stacked": {"x": Stack((A, B), 2)},
    "scaled by a power of two": {"x": Scale(A, -0.25)},
    "two leaves crossed": {"x": Concat((Slice(A, 0, 0, 1), Slice(B, 0, 1, 3)), 0)}
    | {"y": Concat((Slice(B, 0, 0, 1), Slice(A, 0, 1, 3)), 0)},
}


@pytest.mark.parametrize("name", CASES)
def test_what_was_stored_is_made_again(name: str) -> None:
    found = undo(CASES[name])

    assert found
    for path, value in found.items():
        np.testing.assert_array_equal(value, STORED[path])


def test_a_plain_rename_stays_a_plain_read() -> None:
    assert inverse({("x",): A}, {("a",): (4, 6)}, {("x",): (4, 6)}) == {("a",): Read(("x",))}


def test_layers_that_were_not_stored_are_left_out() -> None:
    found = inverse({("x",): Stack((A, Fill((4, 6))), 1)}, {("a",): (4, 6)}, {("x",): (4, 2, 6)})

    assert found == {("a",): Index(Read(("x",)), 1, 0)}


@pytest.mark.parametrize(
    ("recipes", "message"),
    [
        ({"x": Slice(A, 0, 0, 3)}, "only in part in the state"),
        ({"x": A, "y": Scale(A, 2.0)}, "x and y were both restored from a|y and x were both restored from a"),
        ({"x": A, "y": Index(A, 0, 1)}, "were both restored from a"),
        ({"x": Index(A, 0, 1), "y": Index(A, 0, 1)}, "were both restored from a"),
        ({"x": Scale(A, 0.3)}, "scale 0.3 is not undone exactly"),
    ],
)
def test_what_cannot_be_made_again_is_refused_by_name(recipes: dict[str, Recipe], message: str) -> None:
    with pytest.raises(RuleError, match=message):
        undo(recipes)


def test_two_names_that_become_one_are_refused_where_rules_do_not_tell_them_apart():
    state = nnx.State(
        {part: {"norm": {"scale": nnx.Param(np.ones(3, "float32"))}} for part in ("encoder", "decoder")}
    )

    with pytest.raises(RuleError, match="matches no leaf of the state") as e:
        to_linen(state, renames=[("encoder_norm", "norm"), ("decoder_norm", "norm")])
    told = to_linen(
        state, renames=[("encoder/encoder_norm", "encoder/norm"), ("decoder/decoder_norm", "decoder/norm")]
    )

    assert "name more of the path" in str(e.value)
    assert {part: list(told["params"][part]) for part in told["params"]} == {
        "encoder": ["encoder_norm"],
        "decoder": ["decoder_norm"],
    }


def test_a_place_that_looks_like_the_other_side_is_not_written_twice():
    state = nnx.State(
        {"down": {"conv": nnx.Param(np.ones(3, "float32"))}, "conv1": nnx.Param(np.ones(2, "float32"))}
    )
    rules = [("layer/{k}/convolution", "conv{k}"), ("shortcut/convolution", "down/conv")]

    tree = to_linen(state, renames=rules)

    assert sorted(tree["params"]) == ["layer", "shortcut"]
    assert list(tree["params"]["shortcut"]) == ["convolution"]


def test_a_number_of_a_list_is_written_as_the_rule_spells_it_beside_a_name_with_a_number():
    state = nnx.State({"blocks": {0: {"norm_1": nnx.Param(np.ones(3, "float32"))}}})

    tree = to_linen(state, renames=[("h/{i}", "blocks/{i}"), ("blocks/{i}/ln_{j}", "blocks/{i}/norm_{j}")])

    assert tree["params"]["h"]["0"].keys() == {"ln_1"}


def test_a_fuse_whose_name_lacks_a_place_of_its_parts_cannot_be_undone() -> None:
    rule = Fuse(("layer_{i}/q", "layer_{i}/k"), "qk", axis=1)

    with pytest.raises(RuleError) as caught:
        rule.inverse()

    assert str(caught.value) == (
        f"{rule} cannot be undone, so it cannot save: "
        "'qk' does not hold every part that its patterns leave open."
    )


LEAVES = ("kernel", "bias", "scale", "embedding")


def _tree(*paths: str) -> dict[str, Any]:
    leaves = {tuple(path.split("/")): np.full(3, at, "float32") for at, path in enumerate(paths)}
    return {"params": traverse_util.unflatten_dict(leaves)}


def _entries(tree: Any) -> list[Entry]:
    return model_entries(VARIABLES.place(stored_of(leaves_of(tree))))


def _saved_back(paths: Sequence[str], rule: tuple[str, str]) -> dict[str, Any]:
    """Returns what is saved by the rule by which some stored paths were restored."""
    tree = _tree(*paths)
    wanted = {entry.segments: entry.shape for entry in apply_rules(_entries(tree), [Rename(*rule)]).entries}
    target = nnx.State(params(traverse_util.unflatten_dict(wanted)))
    return to_linen(from_linen(tree, target, renames=[rule]), renames=[rule])


@pytest.mark.parametrize(
    "stored", ["word_embed/{0}", "a/old/b/{0}", "old/new/{0}", "new/old/{0}", "old/new/x/{0}"]
)
@pytest.mark.parametrize("leaf", LEAVES)
def test_a_name_that_stands_in_a_path_twice_is_not_undone_where_nothing_tells_which_was_written(leaf, stored):
    is_module = "new" in stored
    old, new = ("old" if "old" in stored else "word_embed"), ("new" if is_module else leaf)

    with pytest.raises(RuleError, match=r"cannot be undone: it may have written .* in several places") as e:
        _saved_back([stored.format(leaf)], (old, new))

    assert "name more of the path on both sides" in str(e.value)


@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("old", ["word_embed", "Norm_0"])
def test_a_module_called_as_a_leaf_elsewhere_is_not_undone_in_that_leaf(leaf, old):
    with pytest.raises(RuleError, match="or as a module as well as a leaf"):
        _saved_back([f"{old}/w", f"other/{leaf}"], (old, leaf))


@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize(
    ("stored", "rule"),
    [
        ("word_embed/{0}", ("params/word_embed", "params/{0}")),
        ("word_embed/{0}", ("word_embed/{0}", "{0}/{0}")),
        ("a/encoder/enc/{0}", ("encoder/enc", "enc/enc")),
        ("a/encoder/encoder/{0}", ("encoder/encoder", "enc/enc")),
        ("layers_0/layers_1/{0}", ("layers_{{i}}", "layers/{{i}}")),
        ("layers_0/{0}", ("layers_{{i}}/{0}", "layers/{{i}}/w")),
        ("a/{0}", ("{0}", "w")),
        ("a/w", ("w", "{0}")),
    ],
)
def test_a_rule_that_tells_what_it_wrote_is_undone_in_nothing_else(leaf, stored, rule):
    paths, (old, new) = [stored.format(leaf), f"beside/x/{leaf}x"], rule

    saved = _saved_back(paths, (old.format(leaf), new.format(leaf)))

    assert leaves_of(saved).keys() == leaves_of(_tree(*paths)).keys()


NAMES = st.sampled_from(["a", "b", "kernel", "scale"])


@settings(max_examples=drawn(60, 600), deadline=None)
@given(st.lists(NAMES, min_size=2, max_size=4), st.lists(NAMES, min_size=1, max_size=2), NAMES)
def test_a_leaf_is_saved_where_it_was_stored_or_refused_whatever_name_a_rule_repeats(path, pattern, new):
    rule = Rename("/".join(pattern), new)
    applied = rule.apply(_entries(_tree("/".join(path))))
    assume(applied.matched)
    restored = _tree("/".join(applied.entries[0].segments))

    try:
        saved = undo_rules(_entries(restored), [rule]).ways
    except RuleError:
        return

    assert saved.keys() == {("params", *path)}
