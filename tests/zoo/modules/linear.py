"""Dense layers, embeddings, activations with weights, dropout and sequences of these."""

from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax import nnx

from tests.zoo.pairs import Pair, values

TOKENS = np.array([[0, 3, 1], [4, 2, 2]], np.int32)
MASK_KEY = jax.random.key(7)


class LinenTied(nn.Module):
    """An embedding whose table is also the output layer."""

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        embed = nn.Embed(6, 4, name="embed")
        return embed.attend(nn.Dense(4, name="hidden")(embed(tokens)))


class NnxTied(nnx.Module):
    """The same: one variable, read twice."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(6, 4, rngs=rngs)
        self.hidden = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, tokens: Any) -> Any:
        return self.embed.attend(self.hidden(self.embed(tokens)))


class NnxSharedTable(nnx.Module):
    """The same table as a variable that two modules hold: NNX's state has it once."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(6, 4, rngs=rngs)
        self.hidden = nnx.Linear(4, 4, rngs=rngs)
        self.output = nnx.Embed(6, 4, rngs=rngs)
        self.output.embedding = self.embed.embedding

    def __call__(self, tokens: Any) -> Any:
        return self.output.attend(self.hidden(self.embed(tokens)))


class LinenDropped(nn.Module):
    """Dropout between two layers, with a key of the caller's."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Dense(8, name="up")(x)
        return nn.Dense(3, name="down")(nn.Dropout(0.5, deterministic=False)(x, rng=MASK_KEY))


class NnxDropped(nnx.Module):
    """The same; its dropout holds random state that no Linen checkpoint has."""

    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(4, 8, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.down = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.down(self.drop(self.up(x), rngs=MASK_KEY))


class LinenLists(nn.Module):
    """Layers in a list, a list of lists and a dict."""

    def setup(self) -> None:
        self.row = [nn.Dense(4) for _ in range(11)]
        self.grid = [[nn.Dense(4), nn.Dense(4)], [nn.Dense(4)]]
        self.named = {"first": nn.Dense(4), "last": nn.Dense(4)}

    def __call__(self, x: Any) -> Any:
        for layer in (*self.row, *self.grid[0], *self.grid[1], self.named["first"], self.named["last"]):
            x = nn.tanh(layer(x))
        return x


class NnxLists(nnx.Module):
    """The same."""

    def __init__(self, rngs: nnx.Rngs):
        self.row = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(11)])
        rows = (2, 1)
        self.grid = nnx.List(
            [nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(length)]) for length in rows]
        )
        self.named = nnx.Dict(first=nnx.Linear(4, 4, rngs=rngs), last=nnx.Linear(4, 4, rngs=rngs))

    def __call__(self, x: Any) -> Any:
        for layer in (*self.row, *self.grid[0], *self.grid[1], self.named["first"], self.named["last"]):
            x = nn.tanh(layer(x))
        return x


PAIRS = (
    Pair(
        linen_name="Dense",
        nnx_name="Linear",
        linen=nn.Dense(3),
        nnx=lambda rngs: nnx.Linear(4, 3, rngs=rngs),
        inputs=(values(2, 4),),
    ),
    Pair(
        linen_name="Dense",
        nnx_name="Linear",
        variant="no bias, bfloat16 weights",
        linen=nn.Dense(3, use_bias=False, param_dtype=jax.numpy.bfloat16),
        nnx=lambda rngs: nnx.Linear(4, 3, use_bias=False, param_dtype=jax.numpy.bfloat16, rngs=rngs),
        inputs=(values(2, 4),),
    ),
    Pair(
        linen_name="DenseGeneral",
        nnx_name="LinearGeneral",
        variant="several axes",
        linen=nn.DenseGeneral((2, 5), axis=(-2, -1)),
        nnx=lambda rngs: nnx.LinearGeneral((3, 4), (2, 5), axis=(-2, -1), rngs=rngs),
        inputs=(values(2, 3, 4),),
    ),
    Pair(
        linen_name="DenseGeneral",
        nnx_name="LinearGeneral",
        variant="batch axis",
        linen=nn.DenseGeneral(5, axis=-1, batch_dims=(0,)),
        nnx=lambda rngs: nnx.LinearGeneral(4, 5, axis=-1, batch_axis={0: 2}, rngs=rngs),
        inputs=(values(2, 3, 4),),
    ),
    Pair(
        linen_name="Einsum",
        nnx_name="Einsum",
        linen=nn.Einsum((4, 2, 3), "ab,bcd->acd"),
        nnx=lambda rngs: nnx.Einsum("ab,bcd->acd", (4, 2, 3), (2, 3), rngs=rngs),
        inputs=(values(5, 4),),
    ),
    Pair(
        linen_name="Embed",
        nnx_name="Embed",
        linen=nn.Embed(6, 4),
        nnx=lambda rngs: nnx.Embed(6, 4, rngs=rngs),
        inputs=(TOKENS,),
    ),
    Pair(
        linen_name="Embed.attend",
        nnx_name="Embed.attend",
        variant="tied embeddings",
        linen=LinenTied(),
        nnx=NnxTied,
        inputs=(TOKENS,),
    ),
    Pair(
        linen_name="Embed.attend",
        nnx_name="Embed.attend",
        variant="one shared variable",
        linen=LinenTied(),
        nnx=NnxSharedTable,
        inputs=(TOKENS,),
    ),
    Pair(
        linen_name="Sequential",
        nnx_name="Sequential",
        variant="gaps between layers",
        linen=nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(4), nn.tanh, nn.LayerNorm(), nn.Dense(2)]),
        nnx=lambda rngs: nnx.Sequential(
            nnx.Linear(4, 4, rngs=rngs),
            nnx.relu,
            nnx.Linear(4, 4, rngs=rngs),
            nnx.tanh,
            nnx.LayerNorm(4, rngs=rngs),
            nnx.Linear(4, 2, rngs=rngs),
        ),
        inputs=(values(3, 4),),
    ),
    Pair(
        linen_name="list and dict attributes",
        nnx_name="List, Dict",
        variant="eleven layers, nested lists",
        linen=LinenLists(),
        nnx=NnxLists,
        inputs=(values(3, 4),),
        renames=(("named_first", "named/first"), ("named_last", "named/last")),
    ),
    Pair(
        linen_name="Dropout",
        nnx_name="Dropout",
        variant="one mask for both",
        linen=LinenDropped(),
        nnx=NnxDropped,
        inputs=(values(3, 4),),
    ),
    Pair(
        linen_name="PReLU",
        nnx_name="PReLU",
        linen=nn.PReLU(),
        nnx=lambda _rngs: nnx.PReLU(),
        inputs=(values(3, 4),),
    ),
)
