"""A small Gemma: in Linen with the names of `gm.nn`, in NNX with its layers in a list."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

VOCABULARY, WIDTH, HIDDEN, HEADS, HEAD_WIDTH = 11, 8, 12, 2, 4
# Local and global attention take turns; an odd count leaves the kinds with unlike numbers of layers.
DEPTH, KINDS, WINDOW = 5, 2, 2

TOKENS = np.arange(12).reshape(2, 6) * 7 % VOCABULARY

SHAPES = {
    "attn/q_einsum/w": (HEADS, WIDTH, HEAD_WIDTH),
    "attn/kv_einsum/w": (2, 1, WIDTH, HEAD_WIDTH),
    "attn/attn_vec_einsum/w": (HEADS, HEAD_WIDTH, WIDTH),
    "attn/_query_norm/scale": (HEAD_WIDTH,),
    "attn/_key_norm/scale": (HEAD_WIDTH,),
    "mlp/gating_einsum": (2, HIDDEN, WIDTH),
    "mlp/linear": (HIDDEN, WIDTH),
    "pre_attention_norm/scale": (WIDTH,),
    "pre_ffw_norm/scale": (WIDTH,),
}


def run_layer(weights: Any, x: Any, layer: int) -> Any:
    """Runs one layer on weights by path; both programs only differ in where they keep them."""
    queries = jnp.einsum(
        "btd,ndh->btnh", _norm(x, weights["pre_attention_norm/scale"]), weights["attn/q_einsum/w"]
    )
    keys, values = jnp.einsum(
        "btd,ckdh->cbtkh", _norm(x, weights["pre_attention_norm/scale"]), weights["attn/kv_einsum/w"]
    )
    queries = _norm(queries, weights["attn/_query_norm/scale"])
    keys = _norm(keys, weights["attn/_key_norm/scale"])
    scores = jnp.where(_mask(x.shape[1], layer), jnp.einsum("btnh,bskh->bnts", queries, keys), -1e9)
    mixed = jnp.einsum("bnts,bskh->btnh", jax.nn.softmax(scores), values)
    x = x + jnp.einsum("btnh,nhd->btd", mixed, weights["attn/attn_vec_einsum/w"])
    gate, up = jnp.einsum(
        "btd,chd->cbth", _norm(x, weights["pre_ffw_norm/scale"]), weights["mlp/gating_einsum"]
    )
    return x + jax.nn.gelu(gate) * up @ weights["mlp/linear"]


def _norm(x: Any, scale: Any) -> Any:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * (1 + scale)


def _mask(length: int, layer: int) -> Any:
    distance = np.arange(length)[:, None] - np.arange(length)[None]
    return (distance >= 0) & ((distance < WINDOW) if layer % KINDS == 0 else True)


class LinenModule(nn.Module):
    """A module with parameters `shapes`, and below it modules by the same paths."""

    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @nn.compact
    def __call__(self) -> Any:
        below: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
        weights = {}
        for path, shape in self.shapes:
            first, _, rest = path.partition("/")
            if rest:
                below.setdefault(first, []).append((rest, shape))
            else:
                weights[first] = self.param(first, nn.initializers.normal(), shape)
        for name, shapes in below.items():
            inner = LinenModule(tuple(shapes), name=name)()
            weights |= {f"{name}/{path}": value for path, value in inner.items()}
        return weights


class LinenGemma(nn.Module):
    """gemma/gm/nn/_transformer.py `Transformer`, cut down."""

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        table = LinenModule((("input_embedding", (VOCABULARY, WIDTH)),), name="embedder")()["input_embedding"]
        x = table[tokens]
        for layer in range(DEPTH):
            x = run_layer(LinenModule(tuple(SHAPES.items()), name=f"layer_{layer}")(), x, layer)
        scale = LinenModule((("scale", (WIDTH,)),), name="final_norm")()["scale"]
        return _norm(x, scale) @ table.T


class NnxModule(nnx.Module):
    """The same in NNX."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        below: dict[str, dict[str, tuple[int, ...]]] = {}
        for path, shape in shapes.items():
            first, _, rest = path.partition("/")
            if rest:
                below.setdefault(first, {})[rest] = shape
            else:
                setattr(self, first, nnx.Param(jnp.zeros(shape)))
        for name, inner in below.items():
            setattr(self, name, NnxModule(inner))


# As Tunix has them (tunix/models/gemma/model.py `FeedForward`), and the example in Flax.
PORTED_SHAPES = {
    **{path: shape for path, shape in SHAPES.items() if not path.startswith("mlp/")},
    "mlp/gate_proj/kernel": (WIDTH, HIDDEN),
    "mlp/up_proj/kernel": (WIDTH, HIDDEN),
    "mlp/down_proj/kernel": (HIDDEN, WIDTH),
}


class NnxGemma(nnx.Module):
    """The NNX program: Google's ports have the layers in a list, too."""

    def __init__(self, shapes: dict[str, tuple[int, ...]] = SHAPES) -> None:
        self.embedder = NnxModule({"input_embedding": (VOCABULARY, WIDTH)})
        self.layers = nnx.List([NnxModule(shapes) for _ in range(DEPTH)])
        self.final_norm = NnxModule({"scale": (WIDTH,)})

    def __call__(self, tokens: Any) -> Any:
        table = self.embedder.input_embedding[...]
        x = table[tokens]
        for number, layer in enumerate(self.layers):
            leaves = nnx.to_flat_state(nnx.state(layer))
            weights = {"/".join(map(str, path)): leaf.get_value() for path, leaf in leaves}
            x = run_layer(_with_gemmas_names(weights), x, number)
        return _norm(x, self.final_norm.scale[...]) @ table.T


def _with_gemmas_names(weights: dict[str, Any]) -> dict[str, Any]:
    if "mlp/linear" in weights:
        return weights
    gates = jnp.stack([weights["mlp/gate_proj/kernel"].T, weights["mlp/up_proj/kernel"].T])
    return {**weights, "mlp/gating_einsum": gates, "mlp/linear": weights["mlp/down_proj/kernel"]}
