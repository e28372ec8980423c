"""Moments follow their parameters, wherever optax nested them: the next update is the Linen program's."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from orbax_nnx_handler import MissingParamError, restore
from tests.handler.programs import HIDDEN, linen_state, save_stock, train_target


def _labels(params: Any) -> Any:
    return jax.tree.map(lambda value: "a" if value.ndim > 1 else "b", params)


def _kernels(params: Any) -> Any:
    return jax.tree.map(lambda value: value.ndim > 1, params)


OPTIMIZERS = {
    "adam": lambda: optax.adam(1e-2),
    "adamw": lambda: optax.adamw(1e-2),
    "sgd with momentum": lambda: optax.sgd(1e-2, momentum=0.9),
    "adafactor, factored": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=4),
    "adafactor, not factored": lambda: optax.adafactor(1e-2),
    "lion": lambda: optax.lion(1e-2),
    "chain of clip and adamw": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)),
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(1e-2), 2),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=1e-2),
    "masked": lambda: optax.masked(optax.adam(1e-2), _kernels),
    "multi_transform": lambda: optax.multi_transform(
        {"a": optax.adam(1e-2), "b": optax.sgd(1e-3, momentum=0.9)}, _labels
    ),
    "a schedule": lambda: optax.adamw(optax.linear_schedule(1e-2, 0.0, 100)),
    "un-chained adam": lambda: optax.scale_by_adam(),
}


def _gradients(params: Any) -> Any:
    return jax.tree.map(lambda value: 0.1 * jnp.cos(jnp.arange(value.size).reshape(value.shape)), params)


@jax.jit
def _updated_linen(state: Any) -> Any:
    return state.apply_gradients(grads=_gradients(state.params))


def _updated_nnx(net: nnx.Module, optimizer: nnx.Optimizer[Any]) -> Any:
    _update(net, optimizer)
    return nnx.to_pure_dict(nnx.state(net, nnx.Param))


@nnx.jit
def _update(net: nnx.Module, optimizer: nnx.Optimizer[Any]) -> None:
    optimizer.update(net, _gradients(nnx.state(net, nnx.Param)))


def _with_counts(state: Any) -> Any:
    """Gives every integer leaf of the optimizer a value of its own, as training would."""
    return state.replace(
        opt_state=jax.tree.map(
            lambda leaf: leaf + 1 if jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.integer) else leaf,
            state.opt_state,
        )
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_next_update_is_what_the_linen_program_computes(name: str, tmp_path) -> None:
    state = _with_counts(linen_state(OPTIMIZERS[name]()))
    item = save_stock(tmp_path / "item", state)

    net, optimizer = restore(item, train_target(OPTIMIZERS[name]()), unexpected="error")

    assert int(optimizer.step.get_value()) == 7
    expected = _updated_linen(state).params
    got = _updated_nnx(net, optimizer)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), got, expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_without_its_model_restores_the_same_state(name: str, tmp_path) -> None:
    item = save_stock(tmp_path / "item", linen_state(OPTIMIZERS[name]()))
    net, optimizer = train_target(OPTIMIZERS[name]())

    alone = restore(item, optimizer, unexpected="ignore")
    _, beside = restore(item, (net, optimizer))

    leaves, others = jax.tree.leaves(nnx.state(alone)), jax.tree.leaves(nnx.state(beside))
    assert len(leaves) == len(others) > 0
    for left, right in zip(leaves, others, strict=True):
        np.testing.assert_array_equal(left, right)


def test_a_missing_moment_is_a_missing_weight(tmp_path) -> None:
    state = linen_state(optax.adam(1e-2))
    first = state.opt_state[0]
    broken = state.replace(
        opt_state=(first._replace(nu={"up": first.nu["up"], "norm": first.nu["norm"]}), *state.opt_state[1:])
    )
    item = save_stock(tmp_path / "item", broken)

    with pytest.raises(MissingParamError) as caught:
        restore(item, train_target(optax.adam(1e-2)))

    prefix = (1, "opt_state", 0, "nu", "down")
    assert set(caught.value.paths) == {(*prefix, "kernel"), (*prefix, "bias")}


def test_a_moment_of_another_shape_is_refused_by_its_own_path(tmp_path) -> None:
    state = linen_state(optax.adam(1e-2))
    first = state.opt_state[0]
    mu = {**first.mu, "up": {**first.mu["up"], "bias": jnp.zeros((HIDDEN + 1,))}}
    item = save_stock(
        tmp_path / "item", state.replace(opt_state=(first._replace(mu=mu), *state.opt_state[1:]))
    )

    with pytest.raises(ValueError, match="up/bias") as caught:
        restore(item, train_target(optax.adam(1e-2)))

    assert caught.value.paths == ((1, "opt_state", 0, "mu", "up", "bias"),)
