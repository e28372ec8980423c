"""Orbax's guide "Checkpointing PyTrees of Arrays", with an NNX target in the place of the plain tree.

What the guide does with plain trees is Orbax's own here too; see `tests/conformance`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from orbax_nnx_handler import (
    Cast,
    DtypeMismatchError,
    NNXLinenHandler,
    NNXLinenRestore,
    NNXLinenSave,
    ShapeMismatchError,
    restore,
)


class Net(nnx.Module):
    """Two layers, and numbers that count."""

    def __init__(self, rngs: nnx.Rngs, *, counts: Any = jnp.int32, wide: int = 16):
        self.layer1 = nnx.Linear(8, wide, rngs=rngs)
        self.layer2 = nnx.Linear(wide, 4, rngs=rngs)
        self.seen = nnx.BatchStat(jnp.arange(4, dtype=counts))


def make() -> Net:
    return Net(nnx.Rngs(0))


def abstract(**options: Any) -> Net:
    return nnx.eval_shape(lambda: Net(nnx.Rngs(1), **options))


@pytest.fixture
def path(tmp_path):
    with ocp.AsyncCheckpointer(NNXLinenHandler()) as checkpointer:
        checkpointer.save(tmp_path / "1", args=NNXLinenSave(make()))
        checkpointer.wait_until_finished()
    return tmp_path / "1"


def assert_equal(ours: Any, theirs: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, nnx.state(ours), nnx.state(theirs))


def test_an_abstract_and_a_concrete_target_give_the_same(path):
    handler = NNXLinenHandler()

    assert_equal(handler.restore(path, args=NNXLinenRestore(abstract())), make())
    assert_equal(handler.restore(path, args=ocp.args.StandardRestore(Net(nnx.Rngs(5)))), make())


def test_floats_take_the_targets_dtype_and_the_report_says_so(path):
    target = jax.tree.map(
        lambda leaf: leaf.update(dtype=jnp.bfloat16) if leaf.dtype == jnp.float32 else leaf,
        nnx.state(abstract()),
    )
    handler = NNXLinenHandler()

    found = handler.restore(path, args=NNXLinenRestore(target))

    assert found["layer1"]["kernel"].dtype == jnp.bfloat16
    assert ("layer1", "kernel") in handler.report.narrowed


def test_integers_of_another_width_are_asked_for_by_a_rule(path):
    with pytest.raises(DtypeMismatchError) as error:
        restore(path, abstract(counts=jnp.int16))
    found = restore(path, abstract(counts=jnp.int16), renames=[Cast("seen", "int16")])

    assert "Cast" in str(error.value)
    assert found.seen[...].dtype == jnp.int16


@pytest.mark.parametrize("strict", [True, False])
def test_another_shape_is_refused_and_never_padded(path, strict):
    target = abstract(wide=8)
    args = jax.tree.map(lambda _: ocp.ArrayRestoreArgs(strict=strict), nnx.state(target))

    with pytest.raises(ShapeMismatchError, match="layer1/kernel"):
        restore(path, nnx.state(target), args)


def test_a_sharding_of_the_target_decides_where_a_leaf_goes(path):
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(-1), ("x",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    target = jax.tree.map(lambda leaf: leaf.update(sharding=everywhere), nnx.state(abstract()))

    found = restore(path, target)

    assert {leaf.sharding for leaf in jax.tree.leaves(found)} == {everywhere}


def test_a_part_is_the_part_of_the_state_in_the_place_of_placeholders(path):
    part = nnx.state(abstract(), nnx.PathContains("layer2"))

    found = restore(path, part, unexpected="ignore")

    assert set(found) == {"layer2"}
    np.testing.assert_array_equal(found["layer2"]["kernel"][...], make().layer2.kernel[...])


def test_omission_is_asked_for_as_in_orbax(path):
    part = nnx.state(abstract(), nnx.PathContains("layer2"))

    found = NNXLinenHandler(unexpected="error").restore(
        path, args=ocp.args.PyTreeRestore(part, partial_restore=True)
    )

    assert set(found) == {"layer2"}


def test_a_dtype_for_what_is_stored_is_a_save_arg(tmp_path):
    state = nnx.state(make())
    args = jax.tree.map(
        lambda leaf: ocp.SaveArgs(dtype=np.dtype(np.float16) if leaf.dtype == jnp.float32 else None), state
    )
    with ocp.Checkpointer(NNXLinenHandler()) as checkpointer:
        checkpointer.save(tmp_path / "2", args=NNXLinenSave(state, args))

    stored = ocp.PyTreeCheckpointHandler().metadata(tmp_path / "2").tree
    assert stored["params"]["layer1"]["kernel"].dtype == np.float16


def test_a_transform_is_a_rename(path):
    class Other(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.up, self.down = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 4, rngs=rngs)

    found = restore(
        path,
        nnx.eval_shape(lambda: Other(nnx.Rngs(0))),
        renames=[("layer1", "up"), ("layer2", "down")],
        unexpected="ignore",
    )

    np.testing.assert_array_equal(found.up.kernel[...], make().layer1.kernel[...])
    np.testing.assert_array_equal(found.down.kernel[...], make().layer2.kernel[...])
