"""Decoders: layers one by one and stacked, projections apart and fused, rotary positions."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from orbax_nnx_handler import Add, Copy, Fuse, Repeat, Reshape, Split, StackLayers, Transpose, UnstackLayers
from tests.verifying.twins.twin import TOKENS, Twin, attend, attend_heads, rotate

# A decoder like GPT-2: layers one by one with q, k, v apart; the other stacked, with one fused projection.


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


_GPT_RULES = [
    ("wte", "tokens"),
    ("wpe", "positions"),
    ("ln_f", "norm"),
    ("lm_head", "head"),
    Fuse(("attn/q_proj/kernel", "attn/k_proj/kernel", "attn/v_proj/kernel"), "attention/qkv/kernel", axis=1),
    Fuse(("attn/q_proj/bias", "attn/k_proj/bias", "attn/v_proj/bias"), "attention/qkv/bias", axis=0),
    ("attn/c_proj", "attention/out"),
    ("ln_1", "norm1"),
    ("ln_2", "norm2"),
    ("c_fc", "mlp/up"),
    ("c_out", "mlp/down"),
    StackLayers("h_{i}", "blocks", axis=0),
]

GPT = Twin(
    name="gpt",
    linen=LinenDecoder(),
    make=stacked_decoder,
    inputs=(TOKENS,),
    rules=_GPT_RULES,
    wrong={
        "the biases of two norms exchanged": [
            ("ln_1/bias", "norm2/bias"),
            ("ln_2/bias", "norm1/bias"),
            *_GPT_RULES,
        ],
        "an output bias and a norm's exchanged": [
            ("ln_2/bias", "attention/out/bias"),
            ("attn/c_proj/bias", "norm2/bias"),
            *_GPT_RULES,
        ],
    },
    faults={
        "another epsilon": ({"epsilon": 1e-5}, "blocks/norm1"),
        "another gelu": ({"exact_gelu": True}, "blocks/mlp"),
        "another scale in attention": ({"scale": 1.5}, "blocks/attention"),
    },
)


# A scanned Linen model, its layers one by one in NNX.


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
    def __init__(self, base, causal, rngs):
        self.q, self.k, self.v, self.o = (nnx.Linear(8, 8, use_bias=False, rngs=rngs) for _ in range(4))
        self.base, self.causal = base, causal

    def __call__(self, x):
        q, k = rotate(self.q(x), self.base), rotate(self.k(x), self.base)
        return self.o(attend(q, k, self.v(x), self.causal))


class RotaryBlock(nnx.Module):
    def __init__(self, base, rngs, *, causal, residual, dtype):
        self.pre_norm, self.post_norm = (nnx.RMSNorm(8, rngs=rngs) for _ in range(2))
        self.attn = RotaryAttention(base, causal, rngs)
        self.gate, self.up = (nnx.Linear(8, 16, use_bias=False, dtype=dtype, rngs=rngs) for _ in range(2))
        self.down = nnx.Linear(16, 8, use_bias=False, rngs=rngs)
        self.residual = residual

    def __call__(self, x):
        x = self.attn(self.pre_norm(x)) + (x if self.residual else 0)
        y = self.post_norm(x)
        return x + self.down(jax.nn.silu(self.gate(y)) * self.up(y))


class Rotary(nnx.Module):
    def __init__(self, rngs, base=1e4, causal=True, residual=True, dtype=None):
        self.embedder = nnx.Embed(17, 8, rngs=rngs)
        self.blocks = nnx.List(
            [RotaryBlock(base, rngs, causal=causal, residual=residual, dtype=dtype) for _ in range(3)]
        )
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
    make=lambda **changed: Rotary(nnx.Rngs(0), **changed),
    inputs=(TOKENS,),
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
    faults={
        "another base of rotary positions": ({"base": 5e5}, "blocks/0/attn"),
        "no causal mask": ({"causal": False}, "blocks/0/attn"),
        "a residual left out": ({"residual": False}, "blocks/0"),
        "layers in bfloat16": ({"dtype": jnp.bfloat16}, "blocks/0"),
    },
)


# A decoder like Gemma, stacked on both sides: norms that multiply with 1 + scale, few heads for keys and
# values, fused projections, an embedding that is scaled and serves as the head.


class LinenScale(nn.Module):
    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.zeros, x.shape[-1:])
        return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * (1 + scale)


class LinenEinsum(nn.Module):
    equation: str
    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        return jnp.einsum(self.equation, x, self.param("w", nn.initializers.normal(), self.shape))


class LinenGroupedAttention(nn.Module):
    @nn.compact
    def __call__(self, x):
        q = LinenEinsum("btd,ndh->btnh", (4, 8, 4), name="q_einsum")(x)
        k, v = LinenEinsum("btd,ckdh->cbtkh", (2, 2, 8, 4), name="kv_einsum")(x)
        k, v = (jnp.repeat(each, 2, axis=2) for each in (rotate(k, 1e4), v))
        return LinenEinsum("btnh,nhd->btd", (4, 4, 8), name="attn_vec_einsum")(
            attend_heads(rotate(q, 1e4), k, v)
        )


class LinenGated(nn.Module):
    @nn.compact
    def __call__(self, x):
        gating = self.param("gating_einsum", nn.initializers.normal(), (2, 8, 16))
        gate, up = jnp.einsum("btd,cdf->cbtf", x, gating)
        return (nn.gelu(gate) * up) @ self.param("linear", nn.initializers.normal(), (16, 8))


class LinenGemmaBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = x + LinenGroupedAttention(name="attn")(LinenScale(name="pre_attention_norm")(x))
        return x + LinenGated(name="mlp")(LinenScale(name="pre_ffw_norm")(x)), None


class LinenEmbedder(nn.Module):
    def setup(self):
        self.table = self.param("input_embedding", nn.initializers.normal(), (17, 8))

    def encode(self, tokens):
        return self.table[tokens] * np.sqrt(8).astype("f")

    def decode(self, x):
        return x @ self.table.T


class LinenGemma(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embedder = LinenEmbedder(name="embedder")
        scan = nn.scan(LinenGemmaBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = scan(name="layers")(embedder.encode(tokens), None)
        x = embedder.decode(LinenScale(name="final_norm")(x))
        return 30 * jnp.tanh(x / 30)


@dataclasses.dataclass(frozen=True)
class GemmaConfig:
    """What the port computes."""

    base: float = 1e4
    embedding_scale: bool = True
    cap: float = 30.0
    exact_gelu: bool = False
    epsilon: float = 1e-6


class WholeAttention(nnx.Module):
    def __init__(self, config, rngs):
        self.q_proj, self.k_proj, self.v_proj = (
            nnx.LinearGeneral(8, (4, 4), use_bias=False, rngs=rngs) for _ in range(3)
        )
        self.o_proj = nnx.LinearGeneral((4, 4), 8, axis=(-2, -1), use_bias=False, rngs=rngs)
        self.config = config

    def __call__(self, x):
        q, k = (rotate(each(x), self.config.base) for each in (self.q_proj, self.k_proj))
        return self.o_proj(attend_heads(q, k, self.v_proj(x)))


class GatedMlp(nnx.Module):
    def __init__(self, config, rngs):
        self.gate_proj, self.up_proj = (nnx.Linear(8, 16, use_bias=False, rngs=rngs) for _ in range(2))
        self.down_proj = nnx.Linear(16, 8, use_bias=False, rngs=rngs)
        self.config = config

    def __call__(self, x):
        gate = jax.nn.gelu(self.gate_proj(x), approximate=not self.config.exact_gelu)
        return self.down_proj(gate * self.up_proj(x))


class GemmaBlock(nnx.Module):
    def __init__(self, config, rngs):
        self.input_norm, self.post_norm = (
            nnx.RMSNorm(8, epsilon=config.epsilon, rngs=rngs) for _ in range(2)
        )
        self.self_attn, self.mlp = WholeAttention(config, rngs), GatedMlp(config, rngs)

    def __call__(self, x):
        x = x + self.self_attn(self.input_norm(x))
        return x + self.mlp(self.post_norm(x))


class Gemma(nnx.Module):
    def __init__(self, config, rngs):
        self.embed = nnx.Embed(17, 8, rngs=rngs)
        build = nnx.vmap(lambda rngs: GemmaBlock(config, rngs), in_axes=(0,), out_axes=0)
        self.layers = nnx.split_rngs(splits=3)(build)(rngs)
        self.norm = nnx.RMSNorm(8, rngs=rngs)
        self.lm_head = nnx.Linear(8, 17, use_bias=False, rngs=rngs)
        self.config = config

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = x * np.sqrt(8).astype("f") if self.config.embedding_scale else x
        run = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        x = self.lm_head(self.norm(run(x, self.layers)))
        return self.config.cap * jnp.tanh(x / self.config.cap)


_GEMMA_RULES = [
    Copy("embedder/input_embedding", "lm_head/kernel"),
    Transpose("lm_head/kernel", (1, 0)),
    ("embedder/input_embedding", "embed/embedding"),
    Add("scale", 1.0),
    ("pre_attention_norm", "input_norm"),
    ("pre_ffw_norm", "post_norm"),
    ("params/final_norm", "params/norm"),
    ("attn/q_einsum/w", "self_attn/q_proj/kernel"),
    Transpose("self_attn/q_proj/kernel", (0, 2, 1, 3)),
    Split("attn/kv_einsum/w", ("self_attn/k_proj/kernel", "self_attn/v_proj/kernel"), axis=1, drop_axis=True),
    *(
        rule
        for name in "kv"
        for rule in (
            Transpose(f"self_attn/{name}_proj/kernel", (0, 2, 1, 3)),
            Repeat(f"self_attn/{name}_proj/kernel", axis=2, count=2),
        )
    ),
    ("attn/attn_vec_einsum/w", "self_attn/o_proj/kernel"),
    Split("mlp/gating_einsum", ("mlp/gate_proj/kernel", "mlp/up_proj/kernel"), axis=1, drop_axis=True),
    ("mlp/linear", "mlp/down_proj/kernel"),
]

GEMMA = Twin(
    name="gemma",
    linen=LinenGemma(),
    make=lambda **changed: Gemma(GemmaConfig(**changed), nnx.Rngs(0)),
    inputs=(TOKENS,),
    rules=_GEMMA_RULES,
    wrong={
        "heads repeated all together": [
            *_GEMMA_RULES,
            *(
                rule
                for name in "kv"
                for rule in (
                    Reshape(f"self_attn/{name}_proj/kernel", (3, 8, 2, 2, 4)),
                    Transpose(f"self_attn/{name}_proj/kernel", (0, 1, 3, 2, 4)),
                    Reshape(f"self_attn/{name}_proj/kernel", (3, 8, 4, 4)),
                )
            ),
        ],
    },
    faults={
        "another base of rotary positions": ({"base": 1e6}, "layers/self_attn"),
        "the embedding is not scaled": ({"embedding_scale": False}, "(root)"),
        "another cap of the logits": ({"cap": 50.0}, "(root)"),
        "another gelu": ({"exact_gelu": True}, "layers/mlp"),
        "another epsilon": ({"epsilon": 1e-5}, "layers/input_norm"),
    },
)


# Mixtures of experts: stacked by nn.vmap in the first layer, as plain parameters in the second.


class LinenExpert(nn.Module):
    @nn.compact
    def __call__(self, x):
        gate, up = (nn.Dense(16, use_bias=False, name=name)(x) for name in ("wi_0", "wi_1"))
        return nn.Dense(8, use_bias=False, name="wo")(nn.silu(gate) * up)


class LinenMixture(nn.Module):
    plain: bool

    @nn.compact
    def __call__(self, x):
        chosen = top_two(nn.softmax(nn.Dense(4, use_bias=False, name="router")(x)))
        if self.plain:
            normal = nn.initializers.normal()
            gate, up = (
                jnp.einsum("btd,edf->ebtf", x, self.param(n, normal, (4, 8, 16))) for n in ("w1", "w3")
            )
            found = jnp.einsum("ebtf,efd->ebtd", nn.silu(gate) * up, self.param("w2", normal, (4, 16, 8)))
        else:
            experts = nn.vmap(
                LinenExpert,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=None,
                axis_size=4,
            )
            found = experts(name="experts")(x)
        return jnp.einsum("ebtd,bte->btd", found, chosen)


class LinenMixtures(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(17, 8, name="embed")(tokens)
        for layer in range(2):
            x = x + LinenMixture(plain=layer == 1, name=f"layers_{layer}")(
                nn.RMSNorm(name=f"norm_{layer}")(x)
            )
        return nn.Dense(17, use_bias=False, name="head")(x)


def top_two(weights: Any, *, normalized: bool = True) -> Any:
    """Returns the two largest weights of each token, the others as zero."""
    least = jnp.sort(weights, axis=-1)[..., -2:-1]
    kept = jnp.where(weights >= least, weights, 0)
    return kept / kept.sum(-1, keepdims=True) if normalized else kept


class Expert(nnx.Module):
    def __init__(self, rngs):
        self.gate_proj, self.up_proj = (nnx.Linear(8, 16, use_bias=False, rngs=rngs) for _ in range(2))
        self.down_proj = nnx.Linear(16, 8, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.down_proj(nnx.silu(self.gate_proj(x)) * self.up_proj(x))


class Mixture(nnx.Module):
    def __init__(self, normalized, rngs):
        self.gate = nnx.Linear(8, 4, use_bias=False, rngs=rngs)
        self.experts = nnx.List([Expert(rngs) for _ in range(4)])
        self.normalized = normalized

    def __call__(self, x):
        chosen = top_two(nnx.softmax(self.gate(x)), normalized=self.normalized)
        return sum(expert(x) * chosen[..., at, None] for at, expert in enumerate(self.experts))


class Mixtures(nnx.Module):
    def __init__(self, normalized, rngs):
        self.embedding = nnx.Embed(17, 8, rngs=rngs)
        self.norms = nnx.List([nnx.RMSNorm(8, rngs=rngs) for _ in range(2)])
        self.blocks = nnx.List([Mixture(normalized, rngs) for _ in range(2)])
        self.unembed = nnx.Linear(8, 17, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.embedding(tokens)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        return self.unembed(x)


MIXTURES = Twin(
    name="mixtures",
    linen=LinenMixtures(),
    make=lambda normalized=True: Mixtures(normalized, nnx.Rngs(0)),
    inputs=(TOKENS,),
    rules=[
        ("embed", "embedding"),
        ("head", "unembed"),
        ("norm_{i}", "norms/{i}"),
        ("layers_{i}/router", "blocks/{i}/gate"),
        *(
            rule
            for number, above, end, names in (
                (0, "experts/", "/kernel", ("wi_0", "wi_1", "wo")),
                (1, "", "", ("w1", "w3", "w2")),
            )
            for name, port in zip(names, ("gate", "up", "down"), strict=True)
            for rule in (
                UnstackLayers(
                    f"layers_{number}/{above}{name}{end}",
                    f"blocks/{number}/experts/{{e}}/{port}_proj/kernel",
                    axis=0,
                ),
            )
        ),
    ],
    faults={"weights of experts not normalised": ({"normalized": False}, "blocks/0")},
)
