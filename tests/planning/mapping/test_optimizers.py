"""Optimizers that are nested otherwise: one step from the same checkpoint is the step that Linen makes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

from orbax_nnx_handler import MissingParamError, plan_restore, restore
from tests.zoo.pairs import path_of, randomised, saved, values

X, Y = values(6, 3), values(6, 4, seed=1)
FALLING = optax.linear_schedule(0.1, 0.01, 20)
Optimizer = Callable[[], optax.GradientTransformation]


def falling_adam() -> optax.GradientTransformation:
    return optax.adam(FALLING)


def in_chain() -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1e9), falling_adam())


def guarded() -> optax.GradientTransformation:
    return optax.apply_if_finite(falling_adam(), 3)


def injected() -> optax.GradientTransformation:
    return optax.inject_hyperparams(optax.adam)(learning_rate=0.1)


def averaged() -> optax.GradientTransformation:
    return optax.chain(falling_adam(), optax.ema(0.9))


def averaged_in_chain() -> optax.GradientTransformation:
    return optax.chain(optax.identity(), optax.zero_nans(), averaged())


def injected_schedule() -> optax.GradientTransformation:
    return optax.inject_hyperparams(optax.adam)(learning_rate=FALLING)


def in_multi_steps() -> optax.GradientTransformation:
    return optax.MultiSteps(injected_schedule(), 2)


# Both optimizers of a pair make the same step; the first wrote the checkpoint.
PAIRS: list[tuple[Optimizer, Optimizer]] = [
    (injected, injected),
    (injected_schedule, injected_schedule),
    (in_multi_steps, in_multi_steps),
    (averaged, averaged),
    (injected, lambda: optax.adam(0.1)),
    (injected, lambda: optax.chain(optax.clip(1e9), injected())),
    (in_chain, falling_adam),
    (falling_adam, in_chain),
    (guarded, falling_adam),
    (guarded, lambda: optax.chain(optax.identity(), guarded())),
    (averaged_in_chain, averaged),
]


def loss_of(outputs: jax.Array) -> jax.Array:
    return jnp.mean((outputs - Y) ** 2)


def trained(tx: optax.GradientTransformation) -> TrainState:
    """Returns a train state of which every count is another number."""
    linen = nn.Dense(4)
    params = randomised(jax.eval_shape(linen.init, jax.random.key(0), X))["params"]
    state = TrainState.create(apply_fn=linen.apply, params=params, tx=tx)
    counts = iter(range(2, 100))

    def moved(keys: Sequence[Any], leaf: Any) -> Any:
        return jnp.asarray(next(counts), leaf.dtype) if path_of(keys).endswith("count") else leaf

    return state.replace(opt_state=jax.tree_util.tree_map_with_path(moved, stepped(state).opt_state))


@jax.jit
def stepped(state: TrainState) -> TrainState:
    gradients = jax.grad(lambda params: loss_of(state.apply_fn({"params": params}, X)))(state.params)
    return state.apply_gradients(grads=gradients)


@nnx.jit
def nnx_stepped(model: nnx.Module, optimizer: nnx.Optimizer[Any]) -> None:
    optimizer.update(model, nnx.grad(lambda model: loss_of(model(X)))(model))


def target(tx: optax.GradientTransformation) -> Any:
    def build() -> Any:
        model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

    return nnx.eval_shape(build)


@pytest.mark.parametrize(("stored", "wanted"), PAIRS)
def test_the_next_steps_are_those_of_the_linen_program(
    stored: Optimizer, wanted: Optimizer, tmp_path: Path
) -> None:
    state = trained(stored())

    model, optimizer = restore(saved(state, tmp_path / "checkpoint"), target(wanted()))

    for _ in range(2):
        state = stepped(state)
        nnx_stepped(model, optimizer)
        np.testing.assert_allclose(model.kernel.get_value(), state.params["kernel"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(model.bias.get_value(), state.params["bias"], rtol=1e-5, atol=1e-6)


def test_a_count_beside_moments_that_are_new_begins_anew_with_them(tmp_path: Path) -> None:
    path = saved(trained(optax.adam(0.1)), tmp_path / "checkpoint")
    more = target(optax.chain(optax.adam(0.1), optax.ema(0.9)))

    plan = plan_restore(path, more)

    assert {path[1:] for path in plan.missing} == {
        ("opt_state", 1, "count"),
        ("opt_state", 1, "ema", "bias"),
        ("opt_state", 1, "ema", "kernel"),
    }
    with pytest.raises(MissingParamError):
        plan.check()
