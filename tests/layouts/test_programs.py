"""The measure itself: a state that is wrong in one place does not go on as the Linen program does."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from tests.layouts import writers
from tests.layouts.programs import goes_on, perceptron, restored, trained


def spoiled(value: jax.Array) -> jax.Array:
    """Returns a value with the same shape and other numbers in it."""
    if jnp.issubdtype(value.dtype, jnp.integer):
        return jnp.zeros_like(value)
    return jnp.roll(value.reshape(-1), 1).reshape(value.shape) if value.size > 1 else value + 1


@pytest.mark.parametrize("optimizer", ["adam", "adafactor", "momentum"])
def test_any_weight_statistic_moment_or_count_gone_wrong_is_noticed(tmp_path: Path, optimizer: str) -> None:
    program = perceptron(optimizer)
    root = writers.write_kauldron(tmp_path / "work", trained(program))
    right = nnx.split(restored(program, root))

    unnoticed = [path for path in _leaves(right[1]) if _goes_on_without(program, right, path)]

    assert unnoticed == []


def _leaves(state: Any) -> list[tuple[Any, ...]]:
    return [path for path, leaf in nnx.to_flat_state(state) if not _is_unused(path, leaf.get_value())]


def _is_unused(path: tuple[Any, ...], value: jax.Array) -> bool:
    """Adafactor keeps a lone zero for a slot without use; `optax.ema` counts only to debias, which is off."""
    return value.shape == (1,) or path[-3:] == ("opt_state", 4, "count")


def _goes_on_without(program: Any, right: Any, path: tuple[Any, ...]) -> bool:
    # A copy: a step changes the variables in place.
    model, optimizer = nnx.merge(right[0], jax.tree.map(jnp.array, right[1]))
    (variable,) = [leaf for at, leaf in nnx.to_flat_state(nnx.state((model, optimizer))) if at == path]
    variable.set_value(spoiled(variable.get_value()))
    nnx.update((model, optimizer), nnx.from_flat_state([(path, variable)]))
    try:
        goes_on(program, model, optimizer)
    except AssertionError:
        return False
    return True
