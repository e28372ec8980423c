"""Flax's Linen guide "Save and load checkpoints": the bundle, other dataclasses, other structures."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx
from flax.training import checkpoints, train_state

from orbax_nnx_handler import NNXLinenHandler, NNXLinenRestore, handler_registry, restore

TX = optax.adam(1e-3)


def linen_state() -> train_state.TrainState:
    """Returns the guide's state, after one step of training."""
    x = jnp.ones((1, 5))
    model = nn.Dense(3)
    state = train_state.TrainState.create(
        apply_fn=model.apply, params=model.init(jax.random.key(0), x)["params"], tx=TX
    )
    grads = jax.grad(lambda params: jnp.sum(model.apply({"params": params}, x) ** 2))(state.params)
    return state.apply_gradients(grads=grads)


def bundle() -> dict[str, Any]:
    """Returns what the guide saves: a train state, settings and data."""
    return {
        "model": linen_state(),
        "config": {"dimensions": np.array([5, 3])},
        "data": [np.arange(5.0, dtype=np.float32)],
    }


def training() -> dict[str, Any]:
    """Returns the NNX program's model and optimizer."""
    model = nnx.Linear(5, 3, rngs=nnx.Rngs(0))
    return {"model": model, "optimizer": nnx.Optimizer(model, TX, wrt=nnx.Param)}


@pytest.fixture
def saved(tmp_path):
    with ocp.Checkpointer(NNXLinenHandler()) as checkpointer:
        checkpointer.save(tmp_path / "bundle", args=ocp.args.PyTreeSave(bundle()))
    return tmp_path / "bundle"


def _assert_equal(ours: Any, theirs: Any) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_the_bundle_comes_back_raw_and_as_it_was(saved):
    raw = NNXLinenHandler().restore(saved)
    whole = NNXLinenHandler().restore(saved, args=ocp.args.PyTreeRestore(bundle()))

    np.testing.assert_array_equal(raw["config"]["dimensions"], [5, 3])
    _assert_equal(whole["model"].opt_state, bundle()["model"].opt_state)


def test_the_train_state_of_the_bundle_becomes_nnx_without_rules(saved):
    found = restore(saved, nnx.eval_shape(training))

    expected = linen_state()
    np.testing.assert_array_equal(found["model"].kernel[...], expected.params["kernel"])
    np.testing.assert_array_equal(
        found["optimizer"].opt_state[0].mu["kernel"][...], expected.opt_state[0].mu["kernel"]
    )
    assert int(found["optimizer"].step[...]) == 1


def test_what_lies_beside_the_train_state_comes_with_it(saved):
    target = nnx.eval_shape(training) | {"data": [jax.ShapeDtypeStruct((5,), jnp.float32)]}

    np.testing.assert_array_equal(restore(saved, target)["data"][0], np.arange(5))


def test_a_manager_keeps_steps_and_a_later_run_takes_the_newest(tmp_path):
    options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
    with ocp.CheckpointManager(tmp_path, options=options) as manager:
        for step in range(5):
            manager.save(step, args=ocp.args.StandardSave(linen_state()))

    with ocp.CheckpointManager(tmp_path, item_handlers=NNXLinenHandler()) as manager:
        found = manager.restore(manager.latest_step(), args=NNXLinenRestore(nnx.eval_shape(training)))

    np.testing.assert_array_equal(found["model"].kernel[...], linen_state().params["kernel"])


@flax.struct.dataclass
class OtherState:
    """The guide's own dataclass, with other fields than a `TrainState`."""

    step: Any
    params: Any
    extra: Any


def test_a_dataclass_of_its_own_comes_back_as_one(tmp_path):
    state = OtherState(step=2, params=linen_state().params, extra=np.ones(3))
    target = OtherState(step=0, params=jax.tree.map(jnp.zeros_like, state.params), extra=np.zeros(3))
    with ocp.CheckpointManager(tmp_path, handler_registry=handler_registry()) as manager:
        manager.save(0, args=ocp.args.StandardSave(state))
        _assert_equal(manager.restore(0, args=ocp.args.StandardRestore(target)), state)


def test_a_target_that_wants_less_than_is_stored_names_what_it_wants(saved):
    found = restore(saved, nnx.eval_shape(training)["model"], unexpected="ignore")

    np.testing.assert_array_equal(found.kernel[...], linen_state().params["kernel"])


class WithStatistics(nnx.Module):
    """The guide's new field: statistics that the older checkpoint lacks."""

    def __init__(self) -> None:
        self.kernel = nnx.Param(jnp.zeros((5, 3)))
        self.bias = nnx.Param(jnp.zeros(3))
        self.seen = nnx.BatchStat(jnp.full(3, 0.5))


def test_a_field_that_the_checkpoint_lacks_is_a_policy(saved):
    found = restore(
        saved,
        nnx.eval_shape(WithStatistics),
        policy={nnx.BatchStat: "init", ...: "error"},
        init=WithStatistics,
        unexpected="ignore",
    )

    np.testing.assert_array_equal(found.seen[...], np.full(3, 0.5))
    np.testing.assert_array_equal(found.kernel[...], linen_state().params["kernel"])


def test_files_of_the_legacy_api_are_read(tmp_path):
    checkpoints.save_checkpoint(tmp_path, linen_state(), step=3, overwrite=True)

    found = restore(tmp_path / "checkpoint_3", nnx.eval_shape(training))

    np.testing.assert_array_equal(found["model"].kernel[...], linen_state().params["kernel"])


def test_an_array_on_several_devices_comes_back_into_another_sharding(tmp_path):
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(-1), ("x",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    columns = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    size = len(jax.devices())
    kernel = jax.device_put(np.arange(size * size, dtype=np.float32).reshape(size, size), rows)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "item", {"params": {"kernel": kernel}})
    target = nnx.state(nnx.eval_shape(lambda: nnx.Linear(size, size, use_bias=False, rngs=nnx.Rngs(0))))
    target = jax.tree.map(lambda leaf: leaf.update(sharding=columns), target)

    found = restore(tmp_path / "item", target)["kernel"][...]

    assert found.sharding == columns
    np.testing.assert_array_equal(found, kernel)
