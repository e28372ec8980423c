"""`verify` against both forward passes alone: `python -m benchmarks.verify`.

A decoder of two sizes, its layers scanned in Linen and a list in NNX. The forward passes run as `verify` runs
them, operation by operation, with nothing recorded and nothing compared; what `verify` takes beside them is
its own: restoring both, recording, comparing. Once with right rules, once with a mistake in them, which is
searched for.
"""

import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import linen as nn
from flax import nnx

from benchmarks.measuring import arguments, report, table
from orbax_nnx_handler import Fuse, UnstackLayers, from_linen, verify

_SIZES = {"6 layers of 256": (6, 256), "12 layers of 512": (12, 512)}


class _LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x: Any, _: Any) -> Any:
        width = x.shape[-1]
        y = nn.LayerNorm(name="ln_1")(x)
        q, k, v = (nn.Dense(width, name=name)(y) for name in ("query", "key", "value"))
        x = x + nn.Dense(width, name="out")(_attended(q, k, v))
        y = nn.gelu(nn.Dense(4 * width, name="up")(nn.LayerNorm(name="ln_2")(x)))
        return x + nn.Dense(width, name="down")(y), None


class _LinenDecoder(nn.Module):
    layers: int
    width: int

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        scan = nn.scan(
            _LinenBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers
        )
        x, _ = scan(name="layers")(nn.Embed(1024, self.width, name="embed")(tokens), None)
        return nn.Dense(1024, name="head")(x)


def _attended(q: Any, k: Any, v: Any) -> Any:
    q, k, v = (x.reshape(*x.shape[:2], -1, 64) for x in (q, k, v))
    scores = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / 8)
    return jnp.einsum("bhqk,bkhd->bqhd", scores, v).reshape(*q.shape[:2], -1)


class _Block(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.norm1, self.norm2 = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.qkv, self.out = nnx.Linear(width, 3 * width, rngs=rngs), nnx.Linear(width, width, rngs=rngs)
        self.up, self.down = nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = x + self.out(_attended(*jnp.split(self.qkv(self.norm1(x)), 3, axis=-1)))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class _Decoder(nnx.Module):
    def __init__(self, layers: int, width: int, rngs: nnx.Rngs) -> None:
        self.embed, self.head = nnx.Embed(1024, width, rngs=rngs), nnx.Linear(width, 1024, rngs=rngs)
        self.blocks = nnx.List([_Block(width, rngs) for _ in range(layers)])

    def __call__(self, tokens: Any) -> Any:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def _rules(*order: str) -> list[Any]:
    return [
        UnstackLayers("layers", "blocks/{i}", axis=0),
        ("ln_1", "norm1"),
        ("ln_2", "norm2"),
        Fuse([f"{name}/kernel" for name in order], "qkv/kernel", axis=1),
        Fuse([f"{name}/bias" for name in order], "qkv/bias", axis=0),
    ]


def _seconds(function: Callable[[], Any]) -> tuple[float, float, Any]:
    start, cpu = time.perf_counter(), time.process_time()
    result = jax.block_until_ready(function())
    return time.perf_counter() - start, time.process_time() - cpu, result


def _measure(folder: pathlib.Path, layers: int, width: int) -> dict[str, Any]:
    linen, tokens = _LinenDecoder(layers, width), np.arange(128).reshape(1, 128)
    shapes = jax.eval_shape(linen.init, jax.random.key(0), tokens)
    random = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: (random.normal(size=leaf.shape) / max(leaf.shape) ** 0.5 + 0.1).astype("f"), shapes
    )
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "checkpoint", variables, force=True)
    target = nnx.eval_shape(lambda: _Decoder(layers, width, nnx.Rngs(0)))
    right = _rules("query", "key", "value")
    model = from_linen(variables, target, renames=right)
    run = lambda model, tokens: model(tokens)  # noqa: E731

    def forward() -> Any:
        with jax.disable_jit(), jax.default_matmul_precision("highest"):
            return linen.apply(variables, tokens), model(tokens)

    def verified(rules: list[Any]) -> Any:
        return verify(folder / "checkpoint", target, linen.apply, run, (tokens,), renames=rules)

    forward()  # What is compiled once for each operation is compiled here.
    passes, passes_cpu, (expected, found) = _seconds(forward)
    np.testing.assert_allclose(expected, found, rtol=1e-3, atol=1e-3)
    both, both_cpu, equal = _seconds(lambda: verified(right))
    searched, searched_cpu, different = _seconds(lambda: verified(_rules("key", "query", "value")))
    assert equal.equal, equal
    assert different.first.path == "blocks/0/qkv", different
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(variables)),
        "both forward passes, s": passes,
        "verify, s": both,
        "verify with a mistake, s": searched,
        "verify ÷ passes": both / passes,
        "with a mistake ÷ passes": searched / passes,
        "verify ÷ passes, CPU": both_cpu / passes_cpu,
        "with a mistake ÷ passes, CPU": searched_cpu / passes_cpu,
    }


def main() -> None:
    """Measures both sizes."""
    options = arguments(__doc__ or "")
    sizes = {"2 layers of 64": (2, 64)} if options.toy else _SIZES
    results = dict[str, Any]()
    for at, (title, size) in enumerate(sizes.items()):
        folder = pathlib.Path(options.scratch) / str(at)
        results[title] = _measure(folder, *size)
        print(title, results[title], flush=True)
    report("verify", options, results, {"": table({"": title, **row} for title, row in results.items())})


if __name__ == "__main__":
    main()
