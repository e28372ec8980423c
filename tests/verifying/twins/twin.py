"""A model that was written twice, and what the twins share."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx


@dataclasses.dataclass(frozen=True, kw_only=True)
class Twin:
    """A Linen program, an NNX program with the same weights under other names, and the rules between them.

    Attributes:
        name: What it is called.
        linen: The Linen program.
        make: Builds the NNX program; its arguments are faults of the port.
        inputs: What both are called with.
        rules: The right rules.
        faults: Ports that compute something else: the arguments of `make` and the module that differs.
        wrong: Rules with mistakes of their own, by what is wrong.
        options: What `verify` is called with beside the rules.
        run: Runs the NNX program.
    """

    name: str
    linen: nn.Module
    make: Callable[..., nnx.Module]
    inputs: Sequence[Any]
    rules: Sequence[Any]
    faults: Mapping[str, tuple[Mapping[str, Any], str]] = dataclasses.field(default_factory=dict)
    wrong: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    run: Callable[..., Any] = lambda model, *inputs: model(*inputs)

    @property
    def apply(self) -> Callable[..., Any]:
        """Runs the Linen program."""
        return self.linen.apply

    def variables(self, seed: int = 0) -> Any:
        """Returns random weights, none of them zero or one."""
        shapes = jax.eval_shape(self.linen.init, jax.random.key(0), *self.inputs)
        random = np.random.default_rng(seed)
        positive = lambda keys: "'var'" in str(keys[-1])  # noqa: E731
        return jax.tree_util.tree_map_with_path(
            # Unlike jnp.asarray it compiles no program for each shape.
            lambda keys, leaf: jax.device_put(
                (np.abs if positive(keys) else np.asarray)(self._value(random, leaf.shape))
            ),
            shapes,
        )

    @staticmethod
    def _value(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        wide = random.normal(size=shape) / np.sqrt(max(1, shape[-2] if len(shape) > 1 else 1))
        return np.asarray(wide + (0.5 if len(shape) < 2 else 0), np.float32)


def attend(q: Any, k: Any, v: Any, causal: bool = True, heads: int = 2) -> Any:
    """Returns attention over (batch, length, width), heads side by side in the width."""
    split = lambda x: x.reshape(*x.shape[:2], heads, -1)  # noqa: E731
    return attend_heads(split(q), split(k), split(v), causal).reshape(*q.shape[:2], -1)


def attend_heads(q: Any, k: Any, v: Any, causal: bool = True) -> Any:
    """Returns attention over (batch, length, heads, width)."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    if causal:
        mask = np.tril(np.ones(scores.shape[-2:], bool))
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)


def rotate(x: Any, base: float) -> Any:
    """Returns x (batch, length, ..., width) with rotary positions, halves as pairs."""
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[1])[:, None] / base ** (np.arange(half) / half)
    angles = angles.reshape(x.shape[1], *[1] * (x.ndim - 3), half)
    cos, sin = np.cos(angles), np.sin(angles)
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


TOKENS = np.arange(12).reshape(2, 6) % 17
