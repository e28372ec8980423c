"""Flax's guide "Migrate from Linen to NNX": each pair of programs, with the Linen program's checkpoint."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import linen as nn
from flax import nnx
from flax.training import train_state

from orbax_nnx_handler import restore

RNG = np.random.default_rng(0)


def stored(path: Any, tree: Any) -> Any:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "item", tree)
    return path / "item"


def scattered(tree: Any) -> Any:
    """Returns the tree with other values, so that a leaf in a wrong place shows."""
    return jax.tree.map(lambda leaf: jnp.asarray(np.abs(RNG.normal(size=leaf.shape)), leaf.dtype), tree)


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, *, training: bool) -> jax.Array:
        x = nn.Dense(16)(x)
        x = nn.BatchNorm(use_running_average=not training)(x)
        return nn.relu(nn.Dropout(0.5, deterministic=not training)(x))


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, *, training: bool = False) -> jax.Array:
        return nn.Dense(4)(LinenBlock()(x, training=training))


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(8, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.relu(self.dropout(self.norm(self.linear(x))))


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.block = Block(rngs)
        self.linear = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear(self.block(x))


BLOCK = [("LinenBlock_0", "block"), ("Dense_0", "linear"), ("BatchNorm_0", "norm")]


def test_modules_statistics_and_dropout(tmp_path):
    x = RNG.normal(size=(5, 8)).astype(np.float32)
    variables = scattered(LinenModel().init(jax.random.key(0), x))

    model = restore(stored(tmp_path, variables), nnx.eval_shape(lambda: Model(nnx.Rngs(0))), renames=BLOCK)
    model.eval()

    np.testing.assert_allclose(model(x), LinenModel().apply(variables, x), rtol=1e-5)


def test_a_training_step_goes_on_with_the_same_weights(tmp_path):
    x = RNG.normal(size=(5, 8)).astype(np.float32)
    tx = optax.adam(1e-2)

    def linen_loss(params: Any) -> jax.Array:
        return jnp.mean(nn.Dense(4).apply({"params": params}, x) ** 2)

    state = train_state.TrainState.create(
        apply_fn=None, params=nn.Dense(4).init(jax.random.key(0), x)["params"], tx=tx
    )
    state = state.apply_gradients(grads=jax.grad(linen_loss)(state.params))
    path = stored(tmp_path, state)

    def make() -> Any:
        model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

    model, optimizer = restore(path, nnx.eval_shape(make))
    optimizer.update(model, nnx.grad(lambda model: jnp.mean(model(x) ** 2))(model))
    state = state.apply_gradients(grads=jax.grad(linen_loss)(state.params))

    np.testing.assert_allclose(model.kernel[...], state.params["kernel"], rtol=1e-6)
    assert int(optimizer.step[...]) == int(state.step) == 2


class LinenAutoEncoder(nn.Module):
    """Two named submodules and more than one method."""

    def setup(self) -> None:
        self.encoder, self.decoder = nn.Dense(3), nn.Dense(8)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.decoder(self.encoder(x))

    def encode(self, x: jax.Array) -> jax.Array:
        return self.encoder(x)


class AutoEncoder(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.encoder, self.decoder = nnx.Linear(8, 3, rngs=rngs), nnx.Linear(3, 8, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.decoder(self.encoder(x))

    def encode(self, x: jax.Array) -> jax.Array:
        return self.encoder(x)


def test_several_methods(tmp_path):
    x = RNG.normal(size=(5, 8)).astype(np.float32)
    variables = scattered(LinenAutoEncoder().init(jax.random.key(0), x))

    model = restore(stored(tmp_path, variables), nnx.eval_shape(lambda: AutoEncoder(nnx.Rngs(0))))

    np.testing.assert_allclose(model(x), LinenAutoEncoder().apply(variables, x), rtol=1e-5)
    encoded = LinenAutoEncoder().apply(variables, x, method="encode")
    np.testing.assert_allclose(model.encode(x), encoded, rtol=1e-5)


class LinenCell(nn.Module):
    @nn.compact
    def __call__(self, carry: jax.Array, x: jax.Array) -> Any:
        x = nn.relu(nn.Dense(6)(jnp.concatenate([carry, x], axis=-1)))
        return x, x


class LinenRNN(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scan = nn.scan(
            LinenCell, variable_broadcast="params", split_rngs={"params": False}, in_axes=1, out_axes=1
        )
        return scan()(jnp.zeros((x.shape[0], 6)), x)[1]


class Cell(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(6 + 4, 6, rngs=rngs)

    def __call__(self, carry: jax.Array, x: jax.Array) -> Any:
        x = nnx.relu(self.linear(jnp.concatenate([carry, x], axis=-1)))
        return x, x


class RNN(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.cell = Cell(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        scan = nnx.scan(
            lambda carry, cell, x: cell(carry, x), in_axes=(nnx.Carry, None, 1), out_axes=(nnx.Carry, 1)
        )
        return scan(jnp.zeros((x.shape[0], 6)), self.cell, x)[1]


def test_scan_over_a_sequence(tmp_path):
    x = RNG.normal(size=(3, 7, 4)).astype(np.float32)
    variables = scattered(LinenRNN().init(jax.random.key(0), x))
    rules = [("ScanLinenCell_0/Dense_0", "cell/linear")]

    model = restore(stored(tmp_path, variables), nnx.eval_shape(lambda: RNN(nnx.Rngs(0))), renames=rules)

    np.testing.assert_allclose(model(x), LinenRNN().apply(variables, x), rtol=1e-4)


class LinenLayer(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: Any) -> Any:
        return nn.relu(nn.Dense(8)(x)), None


class LinenLayers(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scan = nn.scan(LinenLayer, variable_axes={"params": 0}, split_rngs={"params": True}, length=5)
        return scan()(x, None)[0]


class Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(8, 8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.relu(self.dropout(self.linear(x)))


class Layers(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=5)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def create(rngs: nnx.Rngs) -> Layer:
            return Layer(rngs)

        self.blocks = create(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)


def test_scan_over_layers(tmp_path):
    x = RNG.normal(size=(5, 8)).astype(np.float32)
    variables = scattered(LinenLayers().init(jax.random.key(0), x))
    rules = [("ScanLinenLayer_0/Dense_0", "blocks/linear")]

    model = restore(stored(tmp_path, variables), nnx.eval_shape(lambda: Layers(nnx.Rngs(0))), renames=rules)
    model.eval()

    np.testing.assert_allclose(model(x), LinenLayers().apply(variables, x), rtol=1e-4)


class StateWithMore(train_state.TrainState):
    """The guide's TrainState around an NNX model: its parameters and everything else."""

    others: nnx.State


def test_a_train_state_that_holds_nnx_states(tmp_path):
    x = RNG.normal(size=(5, 8)).astype(np.float32)
    tx = optax.adam(1e-3)
    variables = scattered(LinenModel().init(jax.random.key(0), x))
    linen = train_state.TrainState.create(apply_fn=None, params=variables["params"], tx=tx)
    path = stored(tmp_path, {**vars_of(linen), "batch_stats": variables["batch_stats"]})

    def make() -> StateWithMore:
        graph, params, others = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)
        return StateWithMore.create(apply_fn=graph.apply, params=params, others=others, tx=tx)

    state = restore(path, nnx.eval_shape(make), renames=[*BLOCK, ("batch_stats", "others")])

    kernel = variables["params"]["LinenBlock_0"]["Dense_0"]["kernel"]
    np.testing.assert_array_equal(state.params["block"]["linear"]["kernel"][...], kernel)
    mean = variables["batch_stats"]["LinenBlock_0"]["BatchNorm_0"]["mean"]
    np.testing.assert_array_equal(state.others["block"]["norm"]["mean"][...], mean)


def vars_of(state: Any) -> dict[str, Any]:
    """Returns the stored fields of a train state."""
    return {"params": state.params, "opt_state": state.opt_state, "step": state.step}
