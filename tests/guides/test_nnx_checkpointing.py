"""Flax's NNX guide "Save and load checkpoints", step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from orbax_nnx_handler import NNXLinenHandler, NNXLinenRestore, NNXLinenSave, restore, save

X = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)


class TwoLayers(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, *, bias: bool = False):
        self.linear1 = nnx.Linear(4, 4, rngs=rngs, use_bias=bias)
        self.linear2 = nnx.Linear(4, 4, rngs=rngs, use_bias=bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear2(self.linear1(x))


def abstract(*, bias: bool = False) -> TwoLayers:
    return nnx.eval_shape(lambda: TwoLayers(nnx.Rngs(0), bias=bias))


@pytest.fixture
def model() -> TwoLayers:
    return TwoLayers(nnx.Rngs(3))


@pytest.fixture
def guides_state(model, tmp_path):
    """What the guide saves: the state, as the pytree of its Variables."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.state(model))
    return tmp_path / "state"


@pytest.fixture
def guides_pure_dict(model, tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "pure_dict", nnx.to_pure_dict(nnx.state(model)))
    return tmp_path / "pure_dict"


def test_a_state_is_saved_and_the_model_comes_back(model, tmp_path):
    save(tmp_path / "item", model)

    np.testing.assert_array_equal(restore(tmp_path / "item", abstract())(X), model(X))


def test_the_guides_state_comes_back_as_a_state_and_as_a_model(model, guides_state):
    state = restore(guides_state, nnx.state(abstract()))
    again = restore(guides_state, abstract())

    assert jax.tree.structure(state) == jax.tree.structure(nnx.state(model))
    jax.tree.map(np.testing.assert_array_equal, state, nnx.state(model))
    np.testing.assert_array_equal(again(X), model(X))


def test_the_guides_pure_dict_comes_back_without_replacing_by_hand(model, guides_pure_dict):
    np.testing.assert_array_equal(restore(guides_pure_dict, abstract())(X), model(X))


def test_biases_that_the_checkpoint_lacks_are_a_policy_and_nothing_is_edited(model, guides_pure_dict):
    policy = {nnx.PathContains("bias"): "init", ...: "error"}

    wider = restore(
        guides_pure_dict,
        abstract(bias=True),
        policy=policy,
        init=lambda: TwoLayers(nnx.Rngs(0), bias=True),
    )

    np.testing.assert_array_equal(wider.linear1.bias[...], np.zeros(4))
    np.testing.assert_allclose(wider(X), model(X), rtol=1e-6)


def test_a_sharded_model_comes_back_on_its_mesh(model, guides_state):
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, -1), ("data", "model"))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "data"))
    target = nnx.state(abstract())
    target = jax.tree.map(lambda leaf: leaf.update(sharding=sharding), target)

    found = restore(guides_state, target)

    assert {leaf.sharding for leaf in jax.tree.leaves(found)} == {sharding}
    jax.tree.map(np.testing.assert_array_equal, found, nnx.state(model))


def test_a_manager_with_an_optimizer_goes_on_where_it_was(tmp_path):
    import optax

    def make():
        model = TwoLayers(nnx.Rngs(1))
        return {"model": model, "optimizer": nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)}

    def step(training):
        grads = nnx.grad(lambda model: jnp.mean(model(X) ** 2))(training["model"])
        training["optimizer"].update(training["model"], grads)

    training = make()
    step(training)
    with ocp.CheckpointManager(tmp_path, item_handlers=NNXLinenHandler()) as manager:
        manager.save(1, args=NNXLinenSave(training))
        manager.wait_until_finished()
        again = manager.restore(1, args=NNXLinenRestore(nnx.eval_shape(make)))
    step(training)
    step(again)

    np.testing.assert_array_equal(again["model"](X), training["model"](X))
