"""Encoders, and encoders with a decoder: heads apart and side by side, projections fused, tied embeddings."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from orbax_nnx_handler import Copy, Fuse, Reshape, Transpose
from tests.verifying.twins.twin import TOKENS, Twin, attend, attend_heads

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
    inputs=(TOKENS, TOKENS[:, ::-1].copy()),
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


# An encoder like BERT, norms last: heads apart against one projection, q, k and v of each head side by side.


class LinenHeads(nn.Module):
    @nn.compact
    def __call__(self, x):
        q, k, v = (nn.DenseGeneral((2, 4), name=name)(x) for name in ("query", "key", "value"))
        return nn.DenseGeneral(8, axis=(-2, -1), name="out")(attend_heads(q, k, v, causal=False))


class LinenBertLayer(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm(1e-12, name="attention_norm")(x + LinenHeads(name="attention")(x))
        y = nn.Dense(8, name="output")(nn.gelu(nn.Dense(16, name="intermediate")(x), approximate=False))
        return nn.LayerNorm(1e-12, name="output_norm")(x + y)


class LinenBert(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        words = nn.Embed(17, 8, name="word_embeddings")
        x = words(tokens) + nn.Embed(6, 8, name="position_embeddings")(np.arange(6))
        x = nn.LayerNorm(1e-12, name="embeddings_norm")(x)
        for layer in range(2):
            x = LinenBertLayer(name=f"layer_{layer}")(x)
        pooled = nn.tanh(nn.Dense(8, name="pooler")(x[:, 0]))
        x = nn.LayerNorm(1e-12, name="transform_norm")(
            nn.gelu(nn.Dense(8, name="transform")(x), approximate=False)
        )
        bias = self.param("bias", nn.initializers.zeros, (17,))
        return {"logits": words.attend(x) + bias, "pooled": pooled}


class InterleavedAttention(nnx.Module):
    def __init__(self, rngs):
        self.qkv, self.dense = nnx.Linear(8, 24, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        qkv = self.qkv(x).reshape(*x.shape[:2], 2, 3, 4)
        return self.dense(attend_heads(*(qkv[..., at, :] for at in range(3)), causal=False).reshape(x.shape))


class BertLayer(nnx.Module):
    def __init__(self, epsilon, exact_gelu, norm_first, rngs):
        self.attn, self.exact_gelu, self.norm_first = InterleavedAttention(rngs), exact_gelu, norm_first
        self.norm1, self.norm2 = (nnx.LayerNorm(8, epsilon=epsilon, rngs=rngs) for _ in range(2))
        self.fc1, self.fc2 = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, x):
        if self.norm_first:
            x = x + self.attn(self.norm1(x))
            return x + self.mlp(self.norm2(x))
        x = self.norm1(x + self.attn(x))
        return self.norm2(x + self.mlp(x))

    def mlp(self, x):
        return self.fc2(nnx.gelu(self.fc1(x), approximate=not self.exact_gelu))


class Bert(nnx.Module):
    def __init__(self, rngs, epsilon=1e-12, exact_gelu=True, norm_first=False):
        self.tokens, self.positions = nnx.Embed(17, 8, rngs=rngs), nnx.Embed(6, 8, rngs=rngs)
        self.norm, self.head_norm = (nnx.LayerNorm(8, epsilon=1e-12, rngs=rngs) for _ in range(2))
        self.layers = nnx.List([BertLayer(epsilon, exact_gelu, norm_first, rngs) for _ in range(2)])
        self.pool, self.head_dense = nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)
        self.decoder = nnx.Linear(8, 17, rngs=rngs)

    def __call__(self, tokens):
        x = self.norm(self.positions(np.arange(6)) + self.tokens(tokens))
        for layer in self.layers:
            x = layer(x)
        logits = self.decoder(self.head_norm(nnx.gelu(self.head_dense(x), approximate=False)))
        return {"pooled": jnp.tanh(self.pool(x[:, 0])), "logits": logits}


def _interleaved(stored: str, wanted: str) -> list[Any]:
    names = ("query", "key", "value")
    return [
        Fuse(tuple(f"{stored}/{name}/kernel" for name in names), f"{wanted}/kernel", axis=2, new_axis=True),
        Fuse(tuple(f"{stored}/{name}/bias" for name in names), f"{wanted}/bias", axis=1, new_axis=True),
        Reshape(f"{wanted}/kernel", (8, 24)),
        Reshape(f"{wanted}/bias", (24,)),
    ]


BERT = Twin(
    name="bert",
    linen=LinenBert(),
    make=lambda **changed: Bert(nnx.Rngs(0), **changed),
    inputs=(TOKENS,),
    rules=[
        Copy("word_embeddings/embedding", "decoder/kernel"),
        Transpose("decoder/kernel", (1, 0)),
        ("params/bias", "params/decoder/bias"),
        ("word_embeddings", "tokens"),
        ("position_embeddings", "positions"),
        ("embeddings_norm", "norm"),
        *_interleaved("layer_{i}/attention", "layers/{i}/attn/qkv"),
        Reshape("attention/out/kernel", (8, 8)),
        ("layer_{i}/attention/out", "layers/{i}/attn/dense"),
        ("layer_{i}/attention_norm", "layers/{i}/norm1"),
        ("layer_{i}/intermediate", "layers/{i}/fc1"),
        ("layer_{i}/output", "layers/{i}/fc2"),
        ("layer_{i}/output_norm", "layers/{i}/norm2"),
        ("pooler", "pool"),
        ("transform", "head_dense"),
        ("transform_norm", "head_norm"),
    ],
    faults={
        "another epsilon": ({"epsilon": 1e-5}, "layers/0/norm1"),
        "another gelu": ({"exact_gelu": False}, "layers/0"),
        "norms first instead of last": ({"norm_first": True}, "layers/0"),
    },
)


# An encoder of sounds and a decoder with cross attention, like Whisper: matrices against heads.


class LinenProjections(nn.Module):
    @nn.compact
    def __call__(self, x, memory, causal):
        q, v = nn.Dense(8, name="q_proj")(x), nn.Dense(8, name="v_proj")(memory)
        k = nn.Dense(8, use_bias=False, name="k_proj")(memory)
        return nn.Dense(8, name="out_proj")(attend(q, k, v, causal=causal))


class LinenSpeechLayer(nn.Module):
    is_decoder: bool

    @nn.compact
    def __call__(self, x, memory=None):
        y = nn.LayerNorm(1e-5, name="self_attn_layer_norm")(x)
        x = x + LinenProjections(name="self_attn")(y, y, self.is_decoder)
        if self.is_decoder:
            y = nn.LayerNorm(1e-5, name="encoder_attn_layer_norm")(x)
            x = x + LinenProjections(name="encoder_attn")(y, memory, False)
        y = nn.gelu(
            nn.Dense(16, name="fc1")(nn.LayerNorm(1e-5, name="final_layer_norm")(x)), approximate=False
        )
        return x + nn.Dense(8, name="fc2")(y)


class LinenSpeech(nn.Module):
    @nn.compact
    def __call__(self, sound, tokens):
        x = nn.gelu(nn.Conv(8, (3,), padding=1, name="conv1")(sound), approximate=False)
        x = nn.gelu(nn.Conv(8, (3,), strides=2, padding=1, name="conv2")(x), approximate=False)
        x = x + self.param("embed_positions", nn.initializers.normal(), (6, 8))
        for layer in range(2):
            x = LinenSpeechLayer(is_decoder=False, name=f"encoder_layers_{layer}")(x)
        memory = nn.LayerNorm(1e-5, name="encoder_layer_norm")(x)
        embed = nn.Embed(17, 8, name="embed_tokens")
        x = embed(tokens)
        for layer in range(2):
            x = LinenSpeechLayer(is_decoder=True, name=f"decoder_layers_{layer}")(x, memory)
        return embed.attend(nn.LayerNorm(1e-5, name="decoder_layer_norm")(x))


class SpeechLayer(nnx.Module):
    def __init__(self, is_decoder, rngs):
        def attention():
            return nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)

        self.attn, self.cross = attention(), attention() if is_decoder else None
        self.norms = nnx.List([nnx.LayerNorm(8, epsilon=1e-5, rngs=rngs) for _ in range(2 + is_decoder)])
        self.fc1, self.fc2 = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, x, memory=None):
        norms = iter(self.norms)
        mask = None if self.cross is None else nnx.make_causal_mask(x[..., 0])
        x = x + self.attn(next(norms)(x), mask=mask)
        if self.cross is not None:
            x = x + self.cross(next(norms)(x), memory)
        return x + self.fc2(nnx.gelu(self.fc1(next(norms)(x)), approximate=False))


class Speech(nnx.Module):
    def __init__(self, rngs, exact_gelu=True, memory_normed=True):
        self.conv1 = nnx.Conv(4, 8, (3,), padding=1, rngs=rngs)
        self.conv2 = nnx.Conv(8, 8, (3,), strides=2, padding=1, rngs=rngs)
        self.pos = nnx.Param(jnp.zeros((6, 8)))
        self.encoder = nnx.List([SpeechLayer(False, rngs) for _ in range(2)])
        self.decoder = nnx.List([SpeechLayer(True, rngs) for _ in range(2)])
        self.ln_post, self.ln = (
            nnx.LayerNorm(8, epsilon=1e-5, rngs=rngs),
            nnx.LayerNorm(8, epsilon=1e-5, rngs=rngs),
        )
        self.embed = nnx.Embed(17, 8, rngs=rngs)
        self.exact_gelu, self.memory_normed = exact_gelu, memory_normed

    def __call__(self, sound, tokens):
        x = nnx.gelu(self.conv1(sound), approximate=not self.exact_gelu)
        x = nnx.gelu(self.conv2(x), approximate=not self.exact_gelu) + self.pos
        for layer in self.encoder:
            x = layer(x)
        memory = self.ln_post(x) if self.memory_normed else x
        x = self.embed(tokens)
        for layer in self.decoder:
            x = layer(x, memory)
        return self.embed.attend(self.ln(x))


_MADE = functools.partial(lambda **changed: Speech(nnx.Rngs(0), **changed))

SPEECH = Twin(
    name="speech",
    linen=LinenSpeech(),
    make=_MADE,
    inputs=(np.random.default_rng(7).normal(size=(2, 12, 4)).astype("f"), TOKENS),
    rules=[
        ("embed_positions", "pos"),
        ("embed_tokens", "embed"),
        ("encoder_layer_norm", "ln_post"),
        ("decoder_layer_norm", "ln"),
        *(Reshape(f"{name}_proj/kernel", (8, 2, 4)) for name in "qkv"),
        *(Reshape(f"{name}_proj/bias", (2, 4)) for name in "qv"),
        Reshape("out_proj/kernel", (2, 4, 8)),
        *(
            rule
            for side, names in (
                ("encoder", {"self_attn": "attn"}),
                ("decoder", {"self_attn": "attn", "encoder_attn": "cross"}),
            )
            for at, (stored, wanted) in enumerate(names.items())
            for rule in (
                *(
                    (f"{side}_layers_{{i}}/{stored}/{name}", f"{side}/{{i}}/{wanted}/{long}")
                    for name, long in (
                        ("q_proj", "query"),
                        ("k_proj", "key"),
                        ("v_proj", "value"),
                        ("out_proj", "out"),
                    )
                ),
                (f"{side}_layers_{{i}}/{stored}_layer_norm", f"{side}/{{i}}/norms/{at}"),
            )
        ),
        ("encoder_layers_{i}/final_layer_norm", "encoder/{i}/norms/1"),
        ("decoder_layers_{i}/final_layer_norm", "decoder/{i}/norms/2"),
        *(
            (f"{side}_layers_{{i}}/{name}", f"{side}/{{i}}/{name}")
            for side in ("encoder", "decoder")
            for name in ("fc1", "fc2")
        ),
    ],
    options={"policy": {nnx.All(nnx.PathContains("key"), nnx.PathContains("bias")): "init"}, "init": _MADE},
    faults={
        "another gelu": ({"exact_gelu": False}, "(root)"),
        "a norm between encoder and decoder left out": ({"memory_normed": False}, "(root)"),
    },
)
