"""Small programs of both worlds, in every size that a broken restore needs."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx

from tests.written import write_once

Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """The sizes of a decoder."""

    layers: int = 2
    width: int = 16
    hidden: int = 64
    heads: int = 4
    vocabulary: int = 256


class LinenBlock(nn.Module):
    """One layer."""

    size: Size

    @nn.compact
    def __call__(self, x: Any, _: Any = None) -> tuple[Any, None]:
        y = nn.LayerNorm(name="norm", use_bias=False)(x)
        y = nn.MultiHeadDotProductAttention(self.size.heads, use_bias=False, name="attention")(y)
        y = nn.Dense(self.size.hidden, use_bias=False, name="up")(x + y)
        return nn.Dense(self.size.width, use_bias=False, name="down")(y), None


class LinenDecoder(nn.Module):
    """The Linen program."""

    size: Size
    scanned: bool = False

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        x = nn.Embed(self.size.vocabulary, self.size.width, name="embed")(tokens)
        if self.scanned:
            stack = nn.scan(
                LinenBlock,
                variable_axes={"params": 1},
                split_rngs={"params": True},
                length=self.size.layers,
            )
            x, _ = stack(self.size, name="layers")(x, None)
        else:
            for index in range(self.size.layers):
                x, _ = LinenBlock(self.size, name=f"layers_{index}")(x)
        x = nn.LayerNorm(name="norm", use_bias=False)(x)
        return nn.Dense(self.size.vocabulary, use_bias=False, name="head")(x)


class LinenMlp(nn.Module):
    """A perceptron whose layers carry the names that Linen gives."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.relu(nn.Dense(64)(x))
        x = nn.relu(nn.Dense(48)(x))
        return nn.Dense(10)(x)


class LinenConvNet(nn.Module):
    """A small image classifier with statistics."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for index, features in enumerate((8, 12, 24)):
            x = nn.Conv(features, (3, 3), name=f"conv_{index}")(x)
            x = nn.BatchNorm(use_running_average=True, name=f"norm_{index}")(x)
        return nn.Dense(10, name="classes")(x.mean((1, 2)))


class Attention(nnx.Module):
    """Four projections under Linen's names."""

    def __init__(self, size: Size, rngs: nnx.Rngs):
        shape = (size.heads, size.width // size.heads)
        self.query = nnx.LinearGeneral(size.width, shape, use_bias=False, rngs=rngs)
        self.key = nnx.LinearGeneral(size.width, shape, use_bias=False, rngs=rngs)
        self.value = nnx.LinearGeneral(size.width, shape, use_bias=False, rngs=rngs)
        self.out = nnx.LinearGeneral(shape, size.width, axis=(-2, -1), use_bias=False, rngs=rngs)


class Block(nnx.Module):
    """One layer."""

    def __init__(self, size: Size, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(size.width, use_bias=False, rngs=rngs)
        self.attention = Attention(size, rngs)
        self.up = nnx.Linear(size.width, size.hidden, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(size.hidden, size.width, use_bias=False, rngs=rngs)


class Decoder(nnx.Module):
    """The NNX program."""

    def __init__(self, size: Size, rngs: nnx.Rngs, *, scanned: bool = False):
        self.embed = nnx.Embed(size.vocabulary, size.width, rngs=rngs)
        self.layers = (
            _stack(size, rngs) if scanned else nnx.List(Block(size, rngs) for _ in range(size.layers))
        )
        self.norm = nnx.LayerNorm(size.width, use_bias=False, rngs=rngs)
        self.head = nnx.Linear(size.width, size.vocabulary, use_bias=False, rngs=rngs)


def _stack(size: Size, rngs: nnx.Rngs) -> Block:
    build = nnx.vmap(lambda key: Block(size, nnx.Rngs(key)), out_axes=nnx.StateAxes({nnx.Param: 1, ...: 0}))
    return build(jax.random.split(rngs.params(), size.layers))


class Mlp(nnx.Module):
    """The perceptron, with names of its own."""

    def __init__(self, rngs: nnx.Rngs):
        self.encode = nnx.Linear(32, 64, rngs=rngs)
        self.mix = nnx.Linear(64, 48, rngs=rngs)
        self.classes = nnx.Linear(48, 10, rngs=rngs)


class ConvNet(nnx.Module):
    """The image classifier."""

    def __init__(self, rngs: nnx.Rngs):
        for index, (before, after) in enumerate(((3, 8), (8, 12), (12, 24))):
            setattr(self, f"conv_{index}", nnx.Conv(before, after, (3, 3), rngs=rngs))
            setattr(self, f"norm_{index}", nnx.BatchNorm(after, use_running_average=True, rngs=rngs))
        self.classes = nnx.Linear(24, 10, rngs=rngs)


class Training(nnx.Module):
    """A model and its optimizer, as a loop keeps them."""

    def __init__(self, model: nnx.Module, optimizer: optax.GradientTransformation):
        self.model = model
        self.optimizer = nnx.Optimizer(model, optimizer, wrt=nnx.Param)


def decoder(size: Size | None = None, *, scanned: bool = False) -> Decoder:
    """Returns an abstract decoder of its own."""
    return nnx.clone(_decoder(size or Size(), scanned))


@functools.cache
def _decoder(size: Size, scanned: bool) -> Decoder:
    return nnx.eval_shape(lambda: Decoder(size, nnx.Rngs(0), scanned=scanned))


def training(build: Callable[[], nnx.Module], optimizer: optax.GradientTransformation) -> Training:
    """Returns an abstract train state."""
    return nnx.eval_shape(lambda: Training(build(), optimizer))


def variables(module: nn.Module, *inputs: Any) -> Tree:
    """Returns a Linen module's variables, all zero: nothing here looks at values."""
    return zeros(_shapes(module, *(jax.ShapeDtypeStruct(value.shape, value.dtype) for value in inputs)))


@functools.cache
def _shapes(module: nn.Module, *inputs: jax.ShapeDtypeStruct) -> Any:
    return jax.eval_shape(module.init, jax.random.key(0), *inputs)


def linen_decoder(size: Size | None = None, *, scanned: bool = False) -> Tree:
    """Returns the parameters of a Linen decoder."""
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    return variables(LinenDecoder(size or Size(), scanned), tokens)["params"]


def train_state(params: Tree, optimizer: optax.GradientTransformation | None, **collections: Any) -> Tree:
    """Returns what `flax.training.train_state.TrainState` stores."""
    state: Tree = {"params": params, "step": np.int32(1200), **collections}
    return (
        state if optimizer is None else state | {"opt_state": zeros(jax.eval_shape(optimizer.init, params))}
    )


def zeros(tree: Any) -> Any:
    """Returns arrays of zeros in the shapes of a tree."""
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), tree)


def save(path: pathlib.Path, tree: Any) -> pathlib.Path:
    """Saves a tree as stock Orbax does."""

    def write(path: pathlib.Path) -> None:
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(path, tree)

    return write_once(path, tree, write)
