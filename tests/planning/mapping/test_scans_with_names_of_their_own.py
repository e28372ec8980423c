"""Layers that one program scans under another name come up exactly on a mesh, and go back as they were."""

import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx, traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from orbax_nnx_handler import NNXLinenHandler, NNXLinenSave, restore
from tests.planning.mapping.scans import (
    Flat,
    Scan,
    assert_exact,
    assert_nothing_wrong,
    model_with,
    one_by_one,
    plan_of,
    stack_of,
)

LAYERS = stack_of(13, local=5)
ARRANGEMENTS = {
    "one by one": one_by_one(LAYERS),
    "scan and remainder": Scan(local=5).write(LAYERS),
    "scan and modules that Linen numbered": Scan(local=5, left_over="modules").write(LAYERS),
}


def _nested(flat: Flat) -> Any:
    return traverse_util.unflatten_dict(flat)


def _train_state(model: Flat) -> Any:
    """Returns a state as MaxText's Linen trainer saves it: the optimizer runs on the variables dict."""
    nu = {path: value * 2 for path, value in model.items()}
    adam = {
        "count": np.int32(3),
        "mu": {"params": _nested({path: value + 1 for path, value in model.items()})},
        "nu": {"params": _nested(nu)},
    }
    return {
        "params": {"params": _nested(model)},
        "opt_state": [adam, None, {"count": np.int32(3)}],
        "step": np.int32(3),
    }


def _wanted(model: Flat) -> dict[tuple[Any, ...], tuple[type[Any], Any]]:
    state = ("optimizer", "opt_state")
    wanted: dict[tuple[Any, ...], tuple[type[Any], Any]] = {
        ("optimizer", "step"): (nnx.OptState, np.uint32(3)),
        (*state, 0, "count"): (nnx.optimizer.OptArray, np.int32(3)),
        (*state, 2, "count"): (nnx.optimizer.OptArray, np.int32(3)),
    }
    for path, value in model.items():
        wanted["model", *path] = (nnx.Param, value)
        wanted[*state, 0, "mu", *path] = (nnx.optimizer.OptVariable, value + 1)
        wanted[*state, 0, "nu", *path] = (nnx.optimizer.OptVariable, value * 2)
    return wanted


def _target(model: Flat, mesh: Mesh) -> Any:
    def leaf(value: Any) -> jax.ShapeDtypeStruct:
        axes = ["tensor" if length % 2 == 0 else None for length in value.shape]
        first = (
            [axis if at == axes.index("tensor") else None for at, axis in enumerate(axes)]
            if any(axes)
            else []
        )
        return jax.ShapeDtypeStruct(
            value.shape, value.dtype, sharding=NamedSharding(mesh, PartitionSpec(*first))
        )

    return nnx.from_flat_state([(path, kind(leaf(value))) for path, (kind, value) in _wanted(model).items()])


@pytest.mark.parametrize("wanted", ["one by one", "scan and remainder"])
@pytest.mark.parametrize("stored", list(ARRANGEMENTS))
def test_every_value_comes_up_where_the_layer_is(
    stored: str, wanted: str, mesh: Mesh, tmp_path: pathlib.Path
) -> None:
    model = model_with(ARRANGEMENTS[wanted])
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True)) as writer:
        writer.save(tmp_path / "items", _train_state(model_with(ARRANGEMENTS[stored])))

    state = restore(tmp_path / "items", _target(model, mesh), unexpected="error")

    restored = {path: variable.get_value() for path, variable in nnx.to_flat_state(state)}
    assert restored.keys() == _wanted(model).keys()
    for path, (_, value) in _wanted(model).items():
        np.testing.assert_array_equal(np.asarray(restored[path]), value)
        assert restored[path].dtype == value.dtype


@pytest.mark.parametrize("name", ["one by one", "scan and remainder"])
def test_what_is_saved_for_maxtext_has_its_paths_shapes_and_dtypes(
    name: str, mesh: Mesh, tmp_path: pathlib.Path
) -> None:
    model = model_with(ARRANGEMENTS[name])
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
        writer.save(tmp_path / "linen", _train_state(model))
    state = restore(tmp_path / "linen", _target(model, mesh))

    with ocp.Checkpointer(NNXLinenHandler()) as writer:
        writer.save(tmp_path / "nnx", args=NNXLinenSave(state, layout="maxtext"))

    assert _described(tmp_path / "nnx") == _described(tmp_path / "linen")


def _described(path: pathlib.Path) -> Any:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        tree = reader.metadata(path).item_metadata.tree
    return jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), tree, is_leaf=lambda node: hasattr(node, "shape")
    )


def test_a_stack_as_long_as_its_layers_are_wide_moves_to_the_axis_of_the_others() -> None:
    layers = stack_of(6, local=1)
    left, right = (Scan(axis=axis, local=1, members="numbered").write(layers) for axis in (0, 1))

    plan, disk = plan_of(left, right)

    (assert_exact if plan.fits else assert_nothing_wrong)(plan, disk, right)
