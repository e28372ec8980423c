"""Small models written twice, by people who never met: other names, fused and divided weights, scans."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from orbax_nnx_handler import Fuse, Reshape, StackLayers, UnstackLayers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Twin:
    """A Linen program, an NNX program with the same weights under other names, and the rules between them."""

    name: str
    linen: nn.Module
    make: Callable[..., nnx.Module]
    inputs: Sequence[Any]
    rules: Sequence[Any]
    run: Callable[..., Any] = lambda model, *inputs: model(*inputs)

    def variables(self, seed: int = 0) -> Any:
        """Returns random weights, none of them zero or one."""
        shapes = jax.eval_shape(self.linen.init, jax.random.key(0), *self.inputs)
        leaves, structure = jax.tree.flatten(shapes)
        random = np.random.default_rng(seed)
        values = [self._value(random, leaf.shape) for leaf in leaves]
        return jax.tree.unflatten(structure, values)

    @staticmethod
    def _value(random: np.random.Generator, shape: tuple[int, ...]) -> Any:
        wide = random.normal(size=shape) / np.sqrt(max(1, shape[-2] if len(shape) > 1 else 1))
        return jnp.asarray(wide + (0.5 if len(shape) < 2 else 0), jnp.float32)


# A decoder like GPT-2: layers one by one with q, k, v apart; the other stacked, with one fused projection.

_HEADS = 2


def attend(q: Any, k: Any, v: Any, causal: bool = True) -> Any:
    """Returns attention over (batch, length, width), heads side by side in the width."""
    split = lambda x: x.reshape(*x.shape[:2], _HEADS, -1)  # noqa: E731
    q, k, v = split(q), split(k), split(v)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    if causal:
        mask = np.tril(np.ones(scores.shape[-2:], bool))
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v).reshape(*q.shape[:2], -1)


class LinenAttention(nn.Module):
    @nn.compact
    def __call__(self, x):
        q, k, v = (nn.Dense(x.shape[-1], name=f"{name}_proj")(x) for name in "qkv")
        return nn.Dense(x.shape[-1], name="c_proj")(attend(q, k, v))


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + LinenAttention(name="attn")(nn.LayerNorm(name="ln_1")(x))
        y = nn.Dense(4 * x.shape[-1], name="c_fc")(nn.LayerNorm(name="ln_2")(x))
        return x + nn.Dense(x.shape[-1], name="c_out")(nn.gelu(y))


class LinenDecoder(nn.Module):
    layers: int = 3

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(17, 8, name="wte")(tokens)
        x = x + self.param("wpe", nn.initializers.normal(), (16, 8))[: tokens.shape[1]]
        for layer in range(self.layers):
            x = LinenBlock(name=f"h_{layer}")(x)
        return nn.Dense(17, use_bias=False, name="lm_head")(nn.LayerNorm(name="ln_f")(x))


@dataclasses.dataclass(frozen=True)
class Config:
    """What the NNX decoder computes: faults of a port are other values."""

    layers: int = 3
    epsilon: float = 1e-6
    exact_gelu: bool = False
    scale: float = 1.0


class FusedAttention(nnx.Module):
    def __init__(self, width, config, rngs):
        self.qkv = nnx.Linear(width, 3 * width, rngs=rngs)
        self.out = nnx.Linear(width, width, rngs=rngs)
        self.config = config

    def __call__(self, x):
        q, k, v = jnp.split(self.qkv(x), 3, axis=-1)
        return self.out(attend(q * self.config.scale, k, v))


class Mlp(nnx.Module):
    def __init__(self, width, config, rngs):
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)
        self.config = config

    def __call__(self, x):
        return self.down(jax.nn.gelu(self.up(x), approximate=not self.config.exact_gelu))


class FusedBlock(nnx.Module):
    def __init__(self, width, config, rngs):
        self.norm1 = nnx.LayerNorm(width, epsilon=config.epsilon, rngs=rngs)
        self.attention = FusedAttention(width, config, rngs)
        self.norm2 = nnx.LayerNorm(width, epsilon=config.epsilon, rngs=rngs)
        self.mlp = Mlp(width, config, rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class StackedDecoder(nnx.Module):
    def __init__(self, config, rngs):
        self.tokens = nnx.Embed(17, 8, rngs=rngs)
        self.positions = nnx.Param(jnp.zeros((16, 8)))

        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def blocks(rngs):
            return FusedBlock(8, config, rngs)

        self.blocks = blocks(rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.head = nnx.Linear(8, 17, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.tokens(tokens) + self.positions[: tokens.shape[1]]

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, block):
            return nnx.remat(lambda block, x: block(x))(block, x)

        return self.head(self.norm(run(x, self.blocks)))


def stacked_decoder(**changed: Any) -> nnx.Module:
    return StackedDecoder(Config(**changed), nnx.Rngs(0))


_TOKENS = np.arange(12).reshape(2, 6) % 17

GPT = Twin(
    name="gpt",
    linen=LinenDecoder(),
    make=stacked_decoder,
    inputs=(_TOKENS,),
    rules=[
        ("wte", "tokens"),
        ("wpe", "positions"),
        ("ln_f", "norm"),
        ("lm_head", "head"),
        Fuse(
            ("attn/q_proj/kernel", "attn/k_proj/kernel", "attn/v_proj/kernel"), "attention/qkv/kernel", axis=1
        ),
        Fuse(("attn/q_proj/bias", "attn/k_proj/bias", "attn/v_proj/bias"), "attention/qkv/bias", axis=0),
        ("attn/c_proj", "attention/out"),
        ("ln_1", "norm1"),
        ("ln_2", "norm2"),
        ("c_fc", "mlp/up"),
        ("c_out", "mlp/down"),
        StackLayers("h_{i}", "blocks", axis=0),
    ],
)


# An encoder like ViT: nn.MultiHeadDotProductAttention against plain matrices, layers apart on both sides.


class LinenEncoderBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(y, y)
        y = nn.Dense(16)(nn.LayerNorm()(x))
        return x + nn.Dense(x.shape[-1])(nn.gelu(y))


class LinenVit(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = nn.Conv(8, (4, 4), (4, 4), padding="VALID", name="embedding")(images)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        for layer in range(2):
            x = LinenEncoderBlock(name=f"encoderblock_{layer}")(x)
        return nn.Dense(5, name="head")(nn.LayerNorm(name="encoder_norm")(x).mean(1))


class PlainAttention(nnx.Module):
    def __init__(self, rngs):
        self.to_q, self.to_k, self.to_v, self.to_out = (nnx.Linear(8, 8, rngs=rngs) for _ in range(4))

    def __call__(self, x):
        return self.to_out(attend(self.to_q(x), self.to_k(x), self.to_v(x), causal=False))


class PlainBlock(nnx.Module):
    def __init__(self, rngs):
        self.layernorm_before, self.layernorm_after = (nnx.LayerNorm(8, rngs=rngs) for _ in range(2))
        self.attn = PlainAttention(rngs)
        self.fc1, self.fc2 = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, x):
        x = x + self.attn(self.layernorm_before(x))
        return x + self.fc2(nnx.gelu(self.fc1(self.layernorm_after(x))))


class PlainVit(nnx.Module):
    def __init__(self, rngs):
        self.patches = nnx.Conv(3, 8, (4, 4), strides=(4, 4), padding="VALID", rngs=rngs)
        self.layers = nnx.List([PlainBlock(rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.classifier = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, images):
        x = self.patches(images)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        for layer in self.layers:
            x = layer(x)
        return self.classifier(self.norm(x).mean(1))


_MHA = "encoderblock_{i}/MultiHeadDotProductAttention_0"
VIT = Twin(
    name="vit",
    linen=LinenVit(),
    make=lambda: PlainVit(nnx.Rngs(0)),
    inputs=(np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype("f"),),
    rules=[
        ("embedding", "patches"),
        ("encoder_norm", "norm"),
        ("head", "classifier"),
        *(
            rule
            for name, short in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"))
            for rule in (
                Reshape(f"{name}/kernel", (8, 8)),
                Reshape(f"{name}/bias", (8,)),
                (f"{_MHA}/{name}", f"layers/{{i}}/attn/{short}"),
            )
        ),
        Reshape("out/kernel", (8, 8)),
        (f"{_MHA}/out", "layers/{i}/attn/to_out"),
        ("encoderblock_{i}/LayerNorm_0", "layers/{i}/layernorm_before"),
        ("encoderblock_{i}/LayerNorm_1", "layers/{i}/layernorm_after"),
        ("encoderblock_{i}/Dense_0", "layers/{i}/fc1"),
        ("encoderblock_{i}/Dense_1", "layers/{i}/fc2"),
    ],
)


# An encoder and a decoder with cross attention.


class LinenCross(nn.Module):
    @nn.compact
    def __call__(self, x, memory):
        q = nn.Dense(8, name="query")(x)
        k, v = nn.Dense(8, name="key")(memory), nn.Dense(8, name="value")(memory)
        return nn.Dense(8, name="out")(attend(q, k, v, causal=False))


class LinenTranslator(nn.Module):
    @nn.compact
    def __call__(self, source, target):
        embed = nn.Embed(17, 8, name="shared")
        memory = embed(source)
        memory = memory + LinenCross(name="encoder_self_attn")(memory, memory)
        x = embed(target)
        x = x + LinenCross(name="decoder_self_attn")(x, x)
        x = x + LinenCross(name="decoder_cross_attn")(nn.LayerNorm(name="decoder_norm")(x), memory)
        return embed.attend(nn.LayerNorm(name="final_norm")(x))


class Cross(nnx.Module):
    def __init__(self, rngs):
        self.q, self.k, self.v, self.o = (nnx.Linear(8, 8, rngs=rngs) for _ in range(4))

    def __call__(self, queries, context):
        return self.o(attend(self.q(queries), self.k(context), self.v(context), causal=False))


class Translator(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(17, 8, rngs=rngs)
        self.enc_attention, self.self_attention, self.cross_attention = (Cross(rngs) for _ in range(3))
        self.norm_cross, self.norm_out = (nnx.LayerNorm(8, rngs=rngs) for _ in range(2))

    def __call__(self, source, target):
        memory = self.embed(source)
        memory = memory + self.enc_attention(memory, memory)
        x = self.embed(target)
        x = x + self.self_attention(x, x)
        x = x + self.cross_attention(self.norm_cross(x), memory)
        return self.embed.attend(self.norm_out(x))


TRANSLATOR = Twin(
    name="translator",
    linen=LinenTranslator(),
    make=lambda: Translator(nnx.Rngs(0)),
    inputs=(_TOKENS, _TOKENS[:, ::-1].copy()),
    rules=[
        ("shared", "embed"),
        *(
            (f"{stored}/{long}", f"{wanted}/{short}")
            for stored, wanted in (
                ("encoder_self_attn", "enc_attention"),
                ("decoder_self_attn", "self_attention"),
                ("decoder_cross_attn", "cross_attention"),
            )
            for long, short in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o"))
        ),
        ("decoder_norm", "norm_cross"),
        ("final_norm", "norm_out"),
    ],
)


# A BiLSTM.


class LinenBiLstm(nn.Module):
    @nn.compact
    def __call__(self, x):
        forward = nn.RNN(nn.LSTMCell(8, name="forward_cell"), name="forward_lstm")
        backward = nn.RNN(
            nn.LSTMCell(8, name="backward_cell"), reverse=True, keep_order=True, name="backward_lstm"
        )
        return nn.Dense(3, name="output")(nn.Bidirectional(forward, backward)(x))


class BiLstm(nnx.Module):
    def __init__(self, rngs):
        self.fwd = nnx.RNN(nnx.LSTMCell(8, 8, rngs=rngs), rngs=rngs)
        self.bwd = nnx.RNN(nnx.LSTMCell(8, 8, rngs=rngs), reverse=True, keep_order=True, rngs=rngs)
        self.classifier = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        return self.classifier(jnp.concatenate([self.fwd(x), self.bwd(x)], -1))


BILSTM = Twin(
    name="bilstm",
    linen=LinenBiLstm(),
    make=lambda: BiLstm(nnx.Rngs(0)),
    inputs=(np.random.default_rng(2).normal(size=(2, 5, 8)).astype("f"),),
    rules=[("forward_cell", "fwd/cell"), ("backward_cell", "bwd/cell"), ("output", "classifier")],
)


# A scanned Linen model, its layers one by one in NNX.


def rotate(x: Any, base: float) -> Any:
    """Returns x (batch, length, width) with rotary positions, halves as pairs."""
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[1])[:, None] / base ** (np.arange(half) / half)
    cos, sin = np.cos(angles), np.sin(angles)
    return jnp.concatenate(
        [x[..., :half] * cos - x[..., half:] * sin, x[..., half:] * cos + x[..., :half] * sin], -1
    )


class LinenRotaryBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.RMSNorm(name="input_layernorm")(x)
        q, k, v = (nn.Dense(8, use_bias=False, name=f"{name}_proj")(y) for name in "qkv")
        y = attend(rotate(q, 1e4), rotate(k, 1e4), v)
        x = x + nn.Dense(8, use_bias=False, name="o_proj")(y)
        y = nn.RMSNorm(name="post_attention_layernorm")(x)
        gate, up = (nn.Dense(16, use_bias=False, name=name)(y) for name in ("gate_proj", "up_proj"))
        return x + nn.Dense(8, use_bias=False, name="down_proj")(nn.silu(gate) * up), None


class LinenRotary(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(17, 8, name="embed_tokens")(tokens)
        scan = nn.scan(
            nn.remat(LinenRotaryBlock, prevent_cse=False),
            variable_axes={"params": 1},
            split_rngs={"params": True},
            length=3,
        )
        x, _ = scan(name="layers")(x, None)
        return nn.Dense(17, use_bias=False, name="lm_head")(nn.RMSNorm(name="norm")(x))


class RotaryAttention(nnx.Module):
    def __init__(self, base, rngs):
        self.q, self.k, self.v, self.o = (nnx.Linear(8, 8, use_bias=False, rngs=rngs) for _ in range(4))
        self.base = base

    def __call__(self, x):
        return self.o(attend(rotate(self.q(x), self.base), rotate(self.k(x), self.base), self.v(x)))


class RotaryBlock(nnx.Module):
    def __init__(self, base, rngs):
        self.pre_norm, self.post_norm = (nnx.RMSNorm(8, rngs=rngs) for _ in range(2))
        self.attn = RotaryAttention(base, rngs)
        self.gate, self.up = (nnx.Linear(8, 16, use_bias=False, rngs=rngs) for _ in range(2))
        self.down = nnx.Linear(16, 8, use_bias=False, rngs=rngs)

    def __call__(self, x):
        x = x + self.attn(self.pre_norm(x))
        y = self.post_norm(x)
        return x + self.down(jax.nn.silu(self.gate(y)) * self.up(y))


class Rotary(nnx.Module):
    def __init__(self, base, rngs):
        self.embedder = nnx.Embed(17, 8, rngs=rngs)
        self.blocks = nnx.List([RotaryBlock(base, rngs) for _ in range(3)])
        self.final_norm = nnx.RMSNorm(8, rngs=rngs)
        self.unembed = nnx.Linear(8, 17, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.embedder(tokens)
        for block in self.blocks:
            x = block(x)
        return self.unembed(self.final_norm(x))


LLAMA = Twin(
    name="llama",
    linen=LinenRotary(),
    make=lambda base=1e4: Rotary(base, nnx.Rngs(0)),
    inputs=(_TOKENS,),
    rules=[
        ("embed_tokens", "embedder"),
        ("lm_head", "unembed"),
        ("params/norm", "params/final_norm"),
        UnstackLayers("layers", "blocks/{i}", axis=1),
        ("input_layernorm", "pre_norm"),
        ("post_attention_layernorm", "post_norm"),
        *((f"{name}_proj", f"attn/{name}") for name in "qkvo"),
        *((f"{name}_proj", name) for name in ("gate", "up", "down")),
    ],
)

TWINS = (GPT, VIT, TRANSLATOR, BILSTM, LLAMA)
