"""A decoder whose feed-forward layers are mixtures of gated experts."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from tests.zoo.models.base import ModelPair
from tests.zoo.models.conversion import numbered, renamed

VOCABULARY, LENGTH, WIDTH, HIDDEN, HEADS, DEPTH, EXPERTS, CHOSEN = 9, 5, 8, 6, 2, 2, 3, 2


def gates(scores: Any) -> Any:
    """Returns each expert's weight: a softmax over the highest scores, zero for the rest."""
    lowest = jax.lax.top_k(scores, CHOSEN)[0][..., -1:]
    return jax.nn.softmax(jnp.where(scores >= lowest, scores, -jnp.inf))


class LinenExpert(nn.Module):
    """One gated feed-forward layer."""

    named: bool

    @nn.compact
    def __call__(self, x: Any) -> Any:
        def dense(width: int, name: str) -> nn.Dense:
            return nn.Dense(width, use_bias=False, name=name if self.named else None)

        # Linen counts modules as they are constructed: in one expression `down` would be the first.
        hidden = nn.silu(dense(HIDDEN, "gate")(x)) * dense(HIDDEN, "up")(x)
        return dense(WIDTH, "down")(hidden)


class LinenBlock(nn.Module):
    """Attention and a mixture of experts, each after its norm."""

    named: bool

    @nn.compact
    def __call__(self, x: Any) -> Any:
        def name(text: str) -> str | None:
            return text if self.named else None

        mask = nn.make_causal_mask(jnp.ones(x.shape[:2]))
        y = nn.RMSNorm(name=name("attention_norm"))(x)
        x = x + nn.MultiHeadAttention(HEADS, use_bias=False, name=name("attention"))(y, mask=mask)
        y = nn.RMSNorm(name=name("expert_norm"))(x)
        weights = gates(nn.Dense(EXPERTS, use_bias=False, name=name("router"))(y))
        lifted = nn.vmap(
            LinenExpert,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            out_axes=-1,
            axis_size=EXPERTS,
        )
        return x + jnp.einsum("...de,...e->...d", lifted(self.named, name=name("experts"))(y), weights)


class LinenMoE(nn.Module):
    """The Linen program; `named` gives the modules NNX's names."""

    named: bool

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        def name(text: str) -> str | None:
            return text if self.named else None

        x = nn.Embed(VOCABULARY, WIDTH, name=name("embed"))(tokens)
        for index in range(DEPTH):
            x = LinenBlock(self.named, name=name(f"layers_{index}"))(x)
        x = nn.RMSNorm(name=name("norm"))(x)
        return nn.Dense(VOCABULARY, use_bias=False, name=name("head"))(x)


class NnxExpert(nnx.Module):
    """One gated feed-forward layer."""

    def __init__(self, rngs: nnx.Rngs):
        self.gate = nnx.Linear(WIDTH, HIDDEN, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, HIDDEN, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


class NnxBlock(nnx.Module):
    """Attention and a mixture of experts, each after its norm."""

    def __init__(self, rngs: nnx.Rngs):
        self.attention_norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, use_bias=False, decode=False, rngs=rngs)
        self.expert_norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.router = nnx.Linear(WIDTH, EXPERTS, use_bias=False, rngs=rngs)
        self.experts = self._experts(rngs)

    def __call__(self, x: Any) -> Any:
        mask = nnx.make_causal_mask(jnp.ones(x.shape[:2]))
        x = x + self.attention(self.attention_norm(x), mask=mask)
        y = self.expert_norm(x)
        every = nnx.vmap(lambda expert, y: expert(y), in_axes=(0, None), out_axes=-1)(self.experts, y)
        return x + jnp.einsum("...de,...e->...d", every, gates(self.router(y)))

    @staticmethod
    @nnx.split_rngs(splits=EXPERTS)
    @nnx.vmap
    def _experts(rngs: nnx.Rngs) -> NnxExpert:
        return NnxExpert(rngs)


class NnxMoE(nnx.Module):
    """The NNX program."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.layers = nnx.List([NnxBlock(rngs) for _ in range(DEPTH)])
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCABULARY, use_bias=False, rngs=rngs)

    def __call__(self, tokens: Any) -> Any:
        x = self.embed(tokens)
        for block in self.layers:
            x = block(x)
        return self.head(self.norm(x))


BATCH = (np.arange(4 * LENGTH).reshape(4, LENGTH) * 4 % VOCABULARY,)
LABELS = np.roll(BATCH[0], -1, axis=1)
OPTIMIZER = optax.adafactor(1e-2, min_dim_size_to_factor=4)
BLOCK_NAMES = (
    ("RMSNorm_0", "attention_norm"),
    ("MultiHeadAttention_0", "attention"),
    ("RMSNorm_1", "expert_norm"),
    ("VmapLinenExpert_0/Dense_0", "experts/gate"),
    ("VmapLinenExpert_0/Dense_1", "experts/up"),
    ("VmapLinenExpert_0/Dense_2", "experts/down"),
    ("Dense_0", "router"),
)
MODEL_NAMES = (("Embed_0", "embed"), ("RMSNorm_0", "norm"), ("Dense_0", "head"))

MODELS = (
    ModelPair(
        name="MoE decoder",
        linen=LinenMoE(named=True),
        nnx=NnxMoE,
        inputs=BATCH,
        labels=LABELS,
        optimizer=OPTIMIZER,
        optimizer_name="adafactor",
        as_nnx=numbered,
    ),
    ModelPair(
        name="MoE decoder, automatic names",
        linen=LinenMoE(named=False),
        nnx=NnxMoE,
        inputs=BATCH,
        labels=LABELS,
        optimizer=OPTIMIZER,
        optimizer_name="adafactor",
        as_nnx=lambda leaves: renamed(
            leaves,
            *((f"^{stored}", wanted) for stored, wanted in MODEL_NAMES),
            (r"^LinenBlock_(\d)", r"layers/\1"),
            *BLOCK_NAMES,
        ),
        renames=(
            *((f"LinenBlock_{{i}}/{stored}", f"layers/{{i}}/{wanted}") for stored, wanted in BLOCK_NAMES),
            *MODEL_NAMES,
        ),
        determined="outputs",
    ),
)
