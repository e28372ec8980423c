"""Recipes backwards, beside NumPy: what was read apart is put together again, element for element."""

import numpy as np
import pytest
from flax import nnx

from orbax_nnx_handler import Fuse, RuleError, to_linen
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
from orbax_nnx_handler.planning.rules.inverse import inverse
from tests.planning.plans import evaluate

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
