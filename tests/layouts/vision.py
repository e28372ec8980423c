"""A vision transformer: in Linen with big_vision's names, in NNX with names of its own."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx

WIDTH, HIDDEN, HEADS, DEPTH, PATCH, SIDE = 8, 12, 2, 2, 2, 4
TOKENS = (SIDE // PATCH) ** 2


class LinenMlp(nn.Module):
    """big_vision/models/vit.py `MlpBlock`."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.gelu(nn.Dense(HIDDEN)(x))
        return nn.Dense(WIDTH)(x)


class LinenBlock(nn.Module):
    """big_vision/models/vit.py `Encoder1DBlock`; returns a pair for `nn.scan`."""

    @nn.compact
    def __call__(self, x: Any, _: Any = None) -> tuple[Any, None]:
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=HEADS)(y, y)
        return x + LinenMlp(name="MlpBlock_0")(nn.LayerNorm()(x)), None


class LinenEncoder(nn.Module):
    """big_vision/models/vit.py `Encoder` with `scan=True`."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        block = nn.scan(LinenBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=DEPTH)
        x, _ = block(name="encoderblock")(x, None)
        return nn.LayerNorm(name="encoder_norm")(x)


class LinenViT(nn.Module):
    """big_vision/models/vit.py `_Model` with `pool_type="gap"`."""

    @nn.compact
    def __call__(self, images: Any, *, train: bool) -> Any:  # noqa: ARG002
        x = nn.Conv(WIDTH, (PATCH, PATCH), strides=(PATCH, PATCH), padding="VALID", name="embedding")(images)
        x = x.reshape(x.shape[0], -1, WIDTH)
        x = x + self.param("pos_embedding", nn.initializers.normal(), (1, TOKENS, WIDTH))
        x = LinenEncoder(name="Transformer")(x)
        return nn.Dense(3, name="head")(x.mean(axis=1))


class NnxBlock(nnx.Module):
    """One layer of the encoder."""

    def __init__(self, rngs: nnx.Rngs):
        self.before_attention = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.before_mlp = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, WIDTH, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = x + self.attention(self.before_attention(x))
        return x + self.down(nnx.gelu(self.up(self.before_mlp(x))))


class NnxViT(nnx.Module):
    """The NNX program."""

    def __init__(self, rngs: nnx.Rngs):
        self.embedding = nnx.Conv(3, WIDTH, (PATCH, PATCH), (PATCH, PATCH), padding="VALID", rngs=rngs)
        self.pos_embedding = nnx.Param(jnp.zeros((1, TOKENS, WIDTH)))
        self.blocks = nnx.List([NnxBlock(rngs) for _ in range(DEPTH)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 3, rngs=rngs)

    def __call__(self, images: Any, *, train: bool) -> Any:  # noqa: ARG002
        x = self.embedding(images)
        x = x.reshape(x.shape[0], -1, WIDTH) + self.pos_embedding[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(axis=1))


RENAMES = (
    ("Transformer/encoderblock", "blocks"),
    ("Transformer/encoder_norm", "norm"),
    ("LayerNorm_0", "before_attention"),
    ("MultiHeadDotProductAttention_0", "attention"),
    ("LayerNorm_1", "before_mlp"),
    ("MlpBlock_0/Dense_0", "up"),
    ("MlpBlock_0/Dense_1", "down"),
)
