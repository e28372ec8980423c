"""A stock Linen loop, our NNX loop, and the stock Linen loop again: as if nothing had happened between.

Each loop opens the same directory with a `CheckpointManager` that saves in the
background, trains four steps and saves; Linen's is stock Orbax throughout.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState

from orbax_nnx_handler import NNXLinenHandler, NNXLinenRestore, NNXLinenSave

STEPS = 4
TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(1e-2, 1e-3, 3 * STEPS)))
DROPOUT = 0.3


class LinenNet(nn.Module):
    """Two blocks in a list, each with dropout; batch statistics in front where asked for."""

    normalised: bool = True

    def setup(self) -> None:
        if self.normalised:
            self.norm = nn.BatchNorm(momentum=0.9, use_running_average=False)
        self.layers = [nn.Dense(8), nn.Dense(8)]
        self.drop = nn.Dropout(DROPOUT, deterministic=False)
        self.head = nn.Dense(1)

    def __call__(self, x: jax.Array, key: jax.Array) -> jax.Array:
        if self.normalised:
            x = self.norm(x)
        for i, layer in enumerate(self.layers):
            x = self.drop(nn.gelu(layer(x)), rng=jax.random.fold_in(key, i))
        return self.head(x)


class NNXNet(nnx.Module):
    """The same model in NNX; its dropout has a stream of its own as well."""

    def __init__(self, rngs: nnx.Rngs, *, normalised: bool = True):
        if normalised:
            self.norm = nnx.BatchNorm(5, momentum=0.9, use_running_average=False, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(5, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)])
        self.drop = nnx.Dropout(DROPOUT, rngs=rngs)
        self.head = nnx.Linear(8, 1, rngs=rngs)
        self.normalised = normalised

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        if self.normalised:
            x = self.norm(x)
        for i, layer in enumerate(self.layers):
            rngs = None if key is None else jax.random.fold_in(key, i)
            x = self.drop(nnx.gelu(layer(x)), rngs=rngs)
        return self.head(x)


class LinenTrainState(TrainState):
    batch_stats: Any


def batches(start: int) -> Iterator[tuple[jax.Array, jax.Array, jax.Array]]:
    for step in range(start, start + STEPS):
        key = jax.random.fold_in(jax.random.key(11), step)
        x = jax.random.normal(key, (16, 5))
        yield x, jnp.sin(x.sum(1, keepdims=True)), key


def linen_loop(state: Any, start: int) -> tuple[Any, list[float]]:
    losses = []
    for batch in batches(start):
        state, loss = linen_step(state, *batch)
        losses.append(float(loss))
    return state, losses


@jax.jit
def linen_step(state: Any, x: jax.Array, y: jax.Array, key: jax.Array) -> tuple[Any, jax.Array]:
    def loss_of(params: Any) -> tuple[jax.Array, Any]:
        if isinstance(state, LinenTrainState):
            variables = {"params": params, "batch_stats": state.batch_stats}
            out, updates = state.apply_fn(variables, x, key, mutable=["batch_stats"])
            return jnp.mean((out - y) ** 2), updates
        return jnp.mean((state.apply_fn(params, x, key) - y) ** 2), {}

    (loss, updates), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, **updates), loss


def nnx_loop(model: NNXNet, optimizer: nnx.Optimizer, start: int, *, own_stream: bool = False) -> list[float]:
    return [
        float(nnx_step(model, optimizer, x, y, None if own_stream else key)) for x, y, key in batches(start)
    ]


@nnx.jit
def nnx_step(
    model: NNXNet, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array, key: jax.Array | None
) -> jax.Array:
    loss, grads = nnx.value_and_grad(lambda model: jnp.mean((model(x, key) - y) ** 2))(model)
    optimizer.update(model, grads)
    return loss


def linen_train_state() -> LinenTrainState:
    """Flax's own train state, with the collection that BatchNorm adds to it."""
    net = LinenNet()
    variables = net.init(jax.random.key(0), jnp.ones((2, 5)), jax.random.key(0))
    state = LinenTrainState.create(apply_fn=net.apply, tx=TX, **variables)
    return state.replace(step=jnp.int32(0))


def maxtext_train_state() -> TrainState:
    """MaxText's: its `params` are the whole variables dict, so `params/params` on disk."""
    net = LinenNet(normalised=False)
    variables = net.init(jax.random.key(0), jnp.ones((2, 5)), jax.random.key(0))
    return TrainState.create(apply_fn=net.apply, tx=TX, params=variables).replace(step=jnp.int32(0))


def nnx_train_state(*, normalised: bool = True) -> tuple[NNXNet, nnx.Optimizer]:
    model = NNXNet(nnx.Rngs(99), normalised=normalised)
    return model, nnx.Optimizer(model, TX, wrt=nnx.Param)


def stock_manager(path: Path) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(path, options=ocp.CheckpointManagerOptions(enable_async_checkpointing=True))


def our_manager(path: Path) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=True)
    return ocp.CheckpointManager(path, item_handlers=NNXLinenHandler(), options=options)


def our_part(
    path: Path, layout: Any, *, normalised: bool
) -> tuple[tuple[NNXNet, nnx.Optimizer], list[float]]:
    """Runs the NNX loop from Linen's newest step on, and saves in Linen's layout."""
    target = nnx.eval_shape(lambda: nnx_train_state(normalised=normalised))
    with our_manager(path) as manager:
        model, optimizer = manager.restore(STEPS, args=NNXLinenRestore(target))
        model.train()
        losses = nnx_loop(model, optimizer, STEPS)
        manager.save(2 * STEPS, args=NNXLinenSave((model, optimizer), layout=layout))
        # The background save must have taken its values before the next step changes the model.
        nnx_loop(model, optimizer, 0)
    return (model, optimizer), losses


def abstract(state: Any) -> Any:
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, state)


def test_a_linen_loop_goes_through_nnx_and_back_as_if_uninterrupted(tmp_path: Path) -> None:
    state = linen_train_state()
    expected_state, expected = state, []
    for start in (0, STEPS, 2 * STEPS):
        expected_state, losses = linen_loop(expected_state, start)
        expected += losses

    state, first = linen_loop(state, 0)
    with stock_manager(tmp_path) as manager:
        manager.save(STEPS, args=ocp.args.StandardSave(state))
    _, second = our_part(tmp_path, "linen", normalised=True)
    with stock_manager(tmp_path) as manager:
        state = manager.restore(2 * STEPS, args=ocp.args.StandardRestore(abstract(linen_train_state())))
    state, third = linen_loop(state, 2 * STEPS)

    np.testing.assert_allclose([*first, *second, *third], expected, rtol=2e-5)
    assert int(state.step) == 3 * STEPS
    assert_close(state.opt_state, expected_state.opt_state)
    assert_close(state.batch_stats, expected_state.batch_stats)
    assert_close(state.params, expected_state.params)


def test_a_maxtext_loop_goes_through_nnx_and_back_as_if_uninterrupted(tmp_path: Path) -> None:
    state = maxtext_train_state()
    expected_state, expected = state, []
    for start in (0, STEPS, 2 * STEPS):
        expected_state, losses = linen_loop(expected_state, start)
        expected += losses

    state, first = linen_loop(state, 0)
    with stock_manager(tmp_path) as manager:
        manager.save(STEPS, args=ocp.args.PyTreeSave(state))
    _, second = our_part(tmp_path, "maxtext", normalised=False)
    with stock_manager(tmp_path) as manager:
        target = abstract(maxtext_train_state())
        # As MaxText itself restores: its files may hold `nnx_aux` beside what Linen wants.
        arguments = ocp.args.PyTreeRestore(
            target, ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True
        )
        state = manager.restore(2 * STEPS, args=arguments)
    state, third = linen_loop(state, 2 * STEPS)

    np.testing.assert_allclose([*first, *second, *third], expected, rtol=2e-5)
    assert_close(state.opt_state, expected_state.opt_state)
    assert_close(state.params, expected_state.params)


@pytest.mark.parametrize("layout", ["linen", "maxtext"])
def test_an_nnx_loop_resumes_from_linens_layout_with_its_dropout_stream(layout: Any, tmp_path: Path) -> None:
    uninterrupted = nnx_train_state()
    expected = [
        *nnx_loop(*uninterrupted, 0, own_stream=True),
        *nnx_loop(*uninterrupted, STEPS, own_stream=True),
    ]

    item = nnx_train_state()
    first = nnx_loop(*item, 0, own_stream=True)
    with our_manager(tmp_path) as manager:
        manager.save(STEPS, args=NNXLinenSave(item, layout=layout))
        resumed = manager.restore(STEPS, args=NNXLinenRestore(nnx.eval_shape(nnx_train_state)))
    second = nnx_loop(*resumed, STEPS, own_stream=True)

    np.testing.assert_array_equal([*first, *second], expected)


def assert_close(ours: Any, theirs: Any) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for leaf, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert leaf.dtype == other.dtype
        np.testing.assert_allclose(leaf, other, rtol=2e-4, atol=2e-6)
