"""A vision transformer with a class token, and an encoder as a module of its own."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from tests.zoo.models.base import ModelPair
from tests.zoo.models.conversion import numbered, renamed
from tests.zoo.pairs import values

WIDTH, HIDDEN, HEADS, DEPTH, PATCH, SIDE = 8, 12, 2, 2, 2, 4
TOKENS = (SIDE // PATCH) ** 2 + 1


class LinenFeedForward(nn.Module):
    """Two layers around an activation."""

    named: bool

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.gelu(nn.Dense(HIDDEN, name="up" if self.named else None)(x))
        return nn.Dense(WIDTH, name="down" if self.named else None)(x)


class LinenEncoderBlock(nn.Module):
    """Attention with normalised queries and keys, and a feed-forward layer."""

    named: bool

    @nn.compact
    def __call__(self, x: Any) -> Any:
        def name(text: str) -> str | None:
            return text if self.named else None

        y = nn.LayerNorm(name=name("before_attention"))(x)
        x = x + nn.MultiHeadAttention(HEADS, normalize_qk=True, name=name("attention"))(y)
        y = nn.LayerNorm(name=name("before_mlp"))(x)
        return x + LinenFeedForward(self.named, name=name("mlp"))(y)


class LinenEncoder(nn.Module):
    """The blocks, with learned positions before and a norm after."""

    named: bool

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = x + self.param("positions", nn.initializers.normal(), (1, TOKENS, WIDTH))
        for index in range(DEPTH):
            x = LinenEncoderBlock(self.named, name=f"blocks_{index}" if self.named else None)(x)
        return nn.LayerNorm(name="norm" if self.named else None)(x)


class LinenViT(nn.Module):
    """The Linen program; `named` gives the modules NNX's names."""

    named: bool

    @nn.compact
    def __call__(self, images: Any) -> Any:
        def name(text: str) -> str | None:
            return text if self.named else None

        x = nn.Conv(WIDTH, (PATCH, PATCH), (PATCH, PATCH), "VALID", name=name("patches"))(images)
        x = x.reshape(x.shape[0], -1, WIDTH)
        token = self.param("token", nn.initializers.normal(), (1, 1, WIDTH))
        x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], axis=1)
        x = LinenEncoder(self.named, name=name("encoder"))(x)
        return nn.Dense(3, name=name("head"))(x[:, 0])


class NnxFeedForward(nnx.Module):
    """Two layers around an activation."""

    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, WIDTH, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.down(nnx.gelu(self.up(x)))


class NnxEncoderBlock(nnx.Module):
    """Attention with normalised queries and keys, and a feed-forward layer."""

    def __init__(self, rngs: nnx.Rngs):
        self.before_attention = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, normalize_qk=True, decode=False, rngs=rngs)
        self.before_mlp = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.mlp = NnxFeedForward(rngs)

    def __call__(self, x: Any) -> Any:
        x = x + self.attention(self.before_attention(x))
        return x + self.mlp(self.before_mlp(x))


class NnxEncoder(nnx.Module):
    """The blocks, with learned positions before and a norm after."""

    def __init__(self, rngs: nnx.Rngs):
        self.positions = nnx.Param(jnp.zeros((1, TOKENS, WIDTH)))
        self.blocks = nnx.List([NnxEncoderBlock(rngs) for _ in range(DEPTH)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = x + self.positions[...]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class NnxViT(nnx.Module):
    """The NNX program."""

    def __init__(self, rngs: nnx.Rngs):
        self.patches = nnx.Conv(3, WIDTH, (PATCH, PATCH), (PATCH, PATCH), padding="VALID", rngs=rngs)
        self.token = nnx.Param(jnp.zeros((1, 1, WIDTH)))
        self.encoder = NnxEncoder(rngs)
        self.head = nnx.Linear(WIDTH, 3, rngs=rngs)

    def __call__(self, images: Any) -> Any:
        x = self.patches(images)
        x = x.reshape(x.shape[0], -1, WIDTH)
        x = jnp.concatenate([jnp.tile(self.token[...], (x.shape[0], 1, 1)), x], axis=1)
        return self.head(self.encoder(x)[:, 0])


BATCH = (values(6, SIDE, SIDE, 3),)
LABELS = np.arange(6) % 3
OPTIMIZER = optax.lion(1e-2, weight_decay=1e-2)
BLOCK_NAMES = (
    ("LayerNorm_0", "before_attention"),
    ("MultiHeadAttention_0", "attention"),
    ("LayerNorm_1", "before_mlp"),
    ("LinenFeedForward_0/Dense_0", "mlp/up"),
    ("LinenFeedForward_0/Dense_1", "mlp/down"),
)

MODELS = (
    ModelPair(
        name="ViT",
        linen=LinenViT(named=True),
        nnx=NnxViT,
        inputs=BATCH,
        labels=LABELS,
        optimizer=OPTIMIZER,
        optimizer_name="lion",
        as_nnx=numbered,
    ),
    ModelPair(
        name="ViT, automatic names",
        linen=LinenViT(named=False),
        nnx=NnxViT,
        inputs=BATCH,
        labels=LABELS,
        optimizer=OPTIMIZER,
        optimizer_name="lion",
        as_nnx=lambda leaves: renamed(
            leaves,
            ("^LinenEncoder_0/LayerNorm_0", "encoder/norm"),
            (r"^LinenEncoder_0/LinenEncoderBlock_(\d)", r"encoder/blocks/\1"),
            ("^LinenEncoder_0", "encoder"),
            ("^Conv_0", "patches"),
            ("^Dense_0", "head"),
            *BLOCK_NAMES,
        ),
        renames=(
            *(
                (f"LinenEncoder_0/LinenEncoderBlock_{{i}}/{stored}", f"encoder/blocks/{{i}}/{wanted}")
                for stored, wanted in BLOCK_NAMES
            ),
            ("LinenEncoder_0/LayerNorm_0", "encoder/norm"),
            ("LinenEncoder_0", "encoder"),
            ("Conv_0", "patches"),
            ("Dense_0", "head"),
        ),
        determined="shapes and order",
    ),
)
