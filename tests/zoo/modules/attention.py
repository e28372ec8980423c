"""Attention: Linen's three classes against NNX's one."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.zoo.pairs import Pair, Training, values

SEQUENCE = values(2, 5, 8)
OTHER = values(2, 3, 6, seed=1)
CAUSAL = np.tril(np.ones((1, 1, 5, 5), bool))
MASK_KEY = jax.random.key(3)
# A softmax over keys does not change when the same number is added to each score: without
# normalisation the keys' bias adds query·bias to every key and changes no output.
NO_EFFECT = ("params/key/bias",)


class LinenDecoder(nn.Module):
    """Self-attention with a cache, or without one."""

    @nn.compact
    def __call__(self, x: Any, *, decode: bool) -> Any:
        return nn.MultiHeadAttention(2, decode=decode, name="attention")(x)


class NnxDecoder(nnx.Module):
    """The same."""

    def __init__(self, rngs: nnx.Rngs):
        self.attention = nnx.MultiHeadAttention(2, 8, rngs=rngs)
        self.attention.init_cache((2, 5, 8))

    def __call__(self, x: Any, *, decode: bool) -> Any:
        return self.attention(x, decode=decode)


def rotated(query: Any, key: Any, value: Any, **options: Any) -> Any:
    """Attention over queries and keys that are turned by their position, written out."""
    half = query.shape[-1] // 2
    angles = np.arange(query.shape[-3])[:, None, None] / 10_000 ** (np.arange(half) / half)

    def turn(x: Any) -> Any:
        first, second = x[..., :half], x[..., half:]
        cos, sin = np.cos(angles), np.sin(angles)
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    return nn.dot_product_attention(turn(query), turn(key), value, **options)


def nnx_rotated(rngs: nnx.Rngs) -> nnx.Module:
    """The same by Flax's own module, which keeps no tables where it is told no length."""
    attend = functools.partial(nnx.dot_product_attention_with_rope, rope=nnx.RoPE())
    return nnx_attention(rngs, attention_fn=attend)


def nnx_attention(rngs: nnx.Rngs, **options: Any) -> nnx.Module:
    """Self-attention with two heads over eight features, without a cache."""
    return nnx.MultiHeadAttention(2, 8, **options, decode=False, rngs=rngs)


PAIRS = (
    Pair(
        linen_name="MultiHeadDotProductAttention",
        nnx_name="MultiHeadAttention",
        linen=nn.MultiHeadDotProductAttention(2),
        nnx=nnx_attention,
        inputs=(SEQUENCE,),
        linen_kwargs={"mask": CAUSAL},
        nnx_kwargs={"mask": CAUSAL},
        unseen=NO_EFFECT,
    ),
    Pair(
        linen_name="MultiHeadAttention",
        nnx_name="MultiHeadAttention",
        variant="normalised queries and keys",
        linen=nn.MultiHeadAttention(2, normalize_qk=True),
        nnx=lambda rngs: nnx_attention(rngs, normalize_qk=True),
        inputs=(SEQUENCE,),
    ),
    Pair(
        linen_name="MultiHeadAttention",
        nnx_name="MultiHeadAttention",
        variant="dropout with its own random state",
        linen=nn.MultiHeadAttention(2, normalize_qk=True, dropout_rate=0.3, deterministic=False),
        nnx=lambda rngs: nnx_attention(rngs, normalize_qk=True, dropout_rate=0.3, deterministic=False),
        inputs=(SEQUENCE,),
        linen_kwargs={"dropout_rng": MASK_KEY},
        nnx_kwargs={"rngs": lambda: MASK_KEY},
    ),
    Pair(
        linen_name="MultiHeadAttention",
        nnx_name="MultiHeadAttention",
        variant="cross-attention, other widths, no bias",
        linen=nn.MultiHeadAttention(2, qkv_features=4, out_features=3, use_bias=False),
        nnx=lambda rngs: nnx_attention(
            rngs, qkv_features=4, out_features=3, in_kv_features=6, use_bias=False
        ),
        inputs=(SEQUENCE, OTHER),
    ),
    Pair(
        linen_name="MultiHeadAttention",
        nnx_name="MultiHeadAttention, RoPE",
        variant="positions as rotations, written out in Linen (flax 0.12.10)",
        linen=nn.MultiHeadAttention(2, attention_fn=rotated),
        nnx=nnx_rotated,
        inputs=(SEQUENCE,),
        needs="RoPE",
    ),
    Pair(
        linen_name="SelfAttention",
        nnx_name="MultiHeadAttention",
        linen=nn.SelfAttention(2, deterministic=True),
        nnx=nnx_attention,
        inputs=(SEQUENCE,),
        unseen=NO_EFFECT,
    ),
    Pair(
        linen_name="MultiHeadAttention",
        nnx_name="MultiHeadAttention",
        variant="decoding, cache stored",
        linen=LinenDecoder(),
        nnx=NnxDecoder,
        inputs=(values(2, 1, 8),),
        initial=((SEQUENCE,), {"decode": True}),
        linen_kwargs={"decode": False},
        nnx_kwargs={"decode": False},
        training=Training(
            linen={"decode": True}, nnx={"decode": True}, collections=("cache",), statistics=nnx.Cache
        ),
    ),
)
