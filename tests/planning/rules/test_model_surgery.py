"""What Orbax's transformations make of a flat tree, rules make of it; and their trees are taken in."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from orbax_nnx_handler import Fuse, Rename, Repeat, RestoreError, StackLayers, from_linen
from orbax_nnx_handler.planning.rules import Rule

transformations = pytest.importorskip("orbax.checkpoint.experimental.model_surgery.transformations")
from orbax.checkpoint.experimental.model_surgery.transformations import (  # noqa: E402
    fusing,
    nesting,
    renaming,
    repeating,
    stacking,
)

Tree = dict[str, Any]
Transformations = list[Callable[[Tree], Tree]]
UNFLATTEN = Rename(r"\.", "/", regex=True)


def values(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def flat() -> Tree:
    tree: Tree = {"model.norm.weight": values(4)}
    for layer in range(12):
        for part in ("gate_proj", "up_proj"):
            tree[f"model.layers.{layer}.mlp.{part}.weight"] = values(4, 6) + layer
        tree[f"model.layers.{layer}.attn.k_proj.weight"] = values(2, 4) - layer
    return tree


ONE_BY_ONE: dict[str, tuple[Transformations, list[Rule | tuple[str, str]]]] = {
    "rename_by_regex": (
        [renaming.rename_by_regex([(r"^model\.", "decoder."), (r"_proj\.weight$", ".kernel")])],
        [
            UNFLATTEN,
            Rename("^model/", "decoder/", regex=True),
            Rename("_proj/weight$", "/kernel", regex=True),
        ],
    ),
    "unflatten": ([], [UNFLATTEN]),
    "repeat_by_pattern": (
        [repeating.repeat_by_pattern(pattern=r"^(.*)\.k_proj\.weight$", dimension=0, repeat_count=3)],
        [UNFLATTEN, Repeat("k_proj/weight", axis=0, count=3)],
    ),
    "repeat_by_keys": (
        [repeating.repeat_by_keys(target_keys=["model.norm.weight"], dimension=0, repeat_count=2)],
        [UNFLATTEN, Repeat("model/norm/weight", axis=0, count=2)],
    ),
    "fuse_by_pattern": (
        [
            fusing.fuse_by_pattern(
                pattern=r"^(.*)\.(gate_proj|up_proj)\.weight$",
                unique_parts=["gate_proj", "up_proj"],
                fused_unique_part="gate_up",
                axis=1,
            )
        ],
        [UNFLATTEN, Fuse(("gate_proj", "up_proj"), "gate_up", axis=1)],
    ),
    "fuse_by_keys": (
        [
            fusing.fuse_by_keys(
                source_keys=[f"model.layers.3.mlp.{part}.weight" for part in ("up_proj", "gate_proj")],
                target_key="model.layers.3.mlp.both",
            )
        ],
        [
            UNFLATTEN,
            Fuse(
                ("layers/3/mlp/up_proj/weight", "layers/3/mlp/gate_proj/weight"), "layers/3/mlp/both", axis=0
            ),
        ],
    ),
    "stack": (
        [stacking.stack(r"layers\.(\d+\.)", axis=1)],
        [UNFLATTEN, StackLayers("layers/{i}", "layers", axis=1)],
    ),
    "all of them": (
        [
            fusing.fuse_by_pattern(
                pattern=r".*", unique_parts=["gate_proj", "up_proj"], fused_unique_part="gate_up", axis=0
            ),
            repeating.repeat_by_pattern(pattern=r".*k_proj", dimension=1, repeat_count=2),
            stacking.stack(r"layers\.(\d+\.)"),
            renaming.rename_by_regex([(r"^model\.", "")]),
        ],
        [
            UNFLATTEN,
            Fuse(("gate_proj", "up_proj"), "gate_up", axis=0),
            Repeat("k_proj/weight", axis=1, count=2),
            StackLayers("layers/{i}", "layers", axis=0),
            Rename("^model/", "", regex=True),
        ],
    ),
}


def transformed(steps: Transformations) -> Tree:
    tree = {name: jnp.asarray(value) for name, value in flat().items()}
    for step in (*steps, nesting.unflatten()):
        tree = step(tree)
    return jax.tree.map(np.asarray, tree)


@pytest.mark.parametrize(("steps", "rules"), ONE_BY_ONE.values(), ids=ONE_BY_ONE)
@pytest.mark.parametrize("form", [np.asarray, jnp.asarray], ids=["NumPy", "on devices"])
def test_rules_make_what_the_transformation_makes(steps: Any, rules: Any, form: Any) -> None:
    expected = transformed(steps)
    wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), expected)

    found = from_linen(jax.tree.map(form, flat()), wanted, renames=rules, unexpected="error")

    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_tree_that_a_transformation_made_is_taken_in() -> None:
    class Layers(nnx.Module):
        def __init__(self) -> None:
            self.attn = nnx.Dict(k_proj=nnx.Dict(weight=nnx.Param(jnp.zeros((12, 2, 8)))))
            self.mlp = nnx.Dict(gate_up=nnx.Dict(weight=nnx.Param(jnp.zeros((12, 8, 6)))))

    class Net(nnx.Module):
        def __init__(self) -> None:
            self.layers = Layers()
            self.norm = nnx.Dict(weight=nnx.Param(jnp.zeros(4)))

    tree = transformed(ONE_BY_ONE["all of them"][0])

    net = from_linen(tree, nnx.eval_shape(Net), unexpected="error")

    np.testing.assert_array_equal(
        net.layers.mlp["gate_up"]["weight"].get_value(), tree["layers"]["mlp"]["gate_up"]["weight"]
    )


def test_what_a_transformation_only_warns_of_or_pads_is_an_error() -> None:
    tree = {name: value for name, value in flat().items() if "layers.3.mlp.up" not in name}
    wanted = {"x": jax.ShapeDtypeStruct((1,), np.float32)}
    for rule, message in (
        (Fuse(("gate_proj", "up_proj"), "gate_up", axis=1), "'up_proj' is not there"),
        (StackLayers("layers/{i}", "layers", axis=0), "the layers are [0, 1, 2, 4, 5"),
    ):
        with pytest.raises(RestoreError, match=re.escape(message)):
            from_linen(tree, wanted, renames=[UNFLATTEN, rule])
