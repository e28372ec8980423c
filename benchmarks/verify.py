"""`verify` against both forward passes alone: `python -m benchmarks.verify`.

A decoder of two sizes, its layers scanned in Linen and a list in NNX, and a decoder with mixtures of experts.
The forward passes run as `verify` runs them, operation by operation, with nothing recorded and nothing
compared; what `verify` takes beside them is its own: restoring both, recording, comparing. Once with right
rules, and once with each of several mistakes in them, or in the code of the NNX program, which is searched
for.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import linen as nn
from flax import nnx

from benchmarks.measuring import arguments, report, table
from orbax_nnx_handler import Fuse, Split, UnstackLayers, from_linen, verify

_WORDS, _EXPERTS = 1024, 8


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


def _attended(q: Any, k: Any, v: Any, scale: float = 1 / 8) -> Any:
    q, k, v = (x.reshape(*x.shape[:2], -1, 64) for x in (q, k, v))
    scores = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * scale)
    return jnp.einsum("bhqk,bkhd->bqhd", scores, v).reshape(*q.shape[:2], -1)


class _Block(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs, scale: float, activation: Callable[[Any], Any]) -> None:
        self.scale, self.activation = scale, activation
        self.norm1, self.norm2 = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.qkv, self.out = nnx.Linear(width, 3 * width, rngs=rngs), nnx.Linear(width, width, rngs=rngs)
        self.up, self.down = nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = x + self.out(_attended(*jnp.split(self.qkv(self.norm1(x)), 3, axis=-1), self.scale))
        return x + self.down(self.activation(self.up(self.norm2(x))))


class _Decoder(nnx.Module):
    def __init__(
        self, layers: int, width: int, scale: float = 1 / 8, activation: Callable[[Any], Any] = nnx.gelu
    ) -> None:
        rngs = nnx.Rngs(0)
        self.embed, self.head = nnx.Embed(1024, width, rngs=rngs), nnx.Linear(width, 1024, rngs=rngs)
        self.blocks = nnx.List([_Block(width, rngs, scale, activation) for _ in range(layers)])

    def __call__(self, tokens: Any) -> Any:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class _LinenExperts(nn.Module):
    """Experts as most programs have them: parameters of one module, which calls no other."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        width, normal = x.shape[-1], nn.initializers.normal()
        gate, up, down = (
            self.param(name, normal, (_EXPERTS, width, width)) for name in ("wi_0", "wi_1", "wo")
        )
        inner = nn.silu(jnp.einsum("btd,edf->ebtf", x, gate)) * jnp.einsum("btd,edf->ebtf", x, up)
        chosen = nn.softmax(nn.Dense(_EXPERTS, use_bias=False, name="router")(x))
        return jnp.einsum("ebtd,bte->btd", jnp.einsum("ebtf,efd->ebtd", inner, down), chosen)


class _LinenMixtures(nn.Module):
    layers: int
    width: int

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        x = nn.Embed(_WORDS, self.width, name="embed")(tokens)
        for layer in range(self.layers):
            x = x + _LinenExperts(name=f"layers_{layer}")(nn.RMSNorm(name=f"norm_{layer}")(x))
        return nn.Dense(_WORDS, name="head")(x)


class _Expert(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.gate, self.up, self.down = (
            nnx.Linear(width, width, use_bias=False, rngs=rngs) for _ in range(3)
        )

    def __call__(self, x: Any) -> Any:
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


class _Mixture(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs, chosen: Callable[[Any], Any]) -> None:
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.router = nnx.Linear(width, _EXPERTS, use_bias=False, rngs=rngs)
        self.experts = nnx.List([_Expert(width, rngs) for _ in range(_EXPERTS)])
        self.chosen = chosen

    def __call__(self, x: Any) -> Any:
        x = self.norm(x)
        chosen = self.chosen(self.router(x))
        return sum(expert(x) * chosen[..., at, None] for at, expert in enumerate(self.experts))


class _Mixtures(nnx.Module):
    def __init__(self, layers: int, width: int, chosen: Callable[[Any], Any] = nnx.softmax) -> None:
        rngs = nnx.Rngs(0)
        self.embed, self.head = nnx.Embed(_WORDS, width, rngs=rngs), nnx.Linear(width, _WORDS, rngs=rngs)
        self.blocks = nnx.List([_Mixture(width, rngs, chosen) for _ in range(layers)])

    def __call__(self, tokens: Any) -> Any:
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


Rules = Sequence[Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Case:
    """A model that was written twice.

    Attributes:
        linen: The Linen program.
        make: Builds the NNX program.
        rules: The right rules.
        mistakes: Rules with a mistake, and the module that has to be named, by what is wrong.
        faults: The same for programs whose code differs.
    """

    linen: nn.Module
    make: Callable[[], nnx.Module]
    rules: Rules
    mistakes: Mapping[str, tuple[Rules, str]]
    faults: Mapping[str, tuple[Callable[[], nnx.Module], str]]


def _decoder(layers: int, width: int) -> _Case:
    def rules(unstacked: Any, *order: str) -> Rules:
        fused = [Fuse([f"{name}/kernel" for name in order], "qkv/kernel", axis=1)]
        fused += [Fuse([f"{name}/bias" for name in order], "qkv/bias", axis=0)]
        return [unstacked, ("ln_1", "norm1"), ("ln_2", "norm2"), *fused]

    unstacked = UnstackLayers("layers", "blocks/{i}", axis=0)
    further = [f"blocks/{(layer + 1) % layers}" for layer in range(layers)]
    shifted = Split("layers", further, axis=0, drop_axis=True)
    return _Case(
        linen=_LinenDecoder(layers, width),
        make=lambda: _Decoder(layers, width),
        rules=rules(unstacked, "query", "key", "value"),
        mistakes={
            "parts of a fuse in another order": (rules(unstacked, "key", "query", "value"), "blocks/0/qkv"),
            "layers shifted by one": (rules(shifted, "query", "key", "value"), "blocks/0"),
        },
        faults={
            "another scale in attention": (lambda: _Decoder(layers, width, scale=1 / 7), "blocks/0"),
            "another activation": (lambda: _Decoder(layers, width, activation=nnx.relu), "blocks/0"),
        },
    )


def _mixtures(layers: int, width: int) -> _Case:
    def rules(gate: str, up: str, down: Callable[[int], int] = lambda layer: layer) -> Rules:
        names = {"wi_0": gate, "wi_1": up}
        found: list[Any] = [("norm_{i}", "blocks/{i}/norm"), ("layers_{i}/router", "blocks/{i}/router")]
        for layer in range(layers):
            for stored, name in {**names, "wo": "down"}.items():
                at = down(layer) if name == "down" else layer
                into = f"blocks/{at}/experts/{{e}}/{name}/kernel"
                found.append(UnstackLayers(f"layers_{layer}/{stored}", into, axis=0))
        return found

    return _Case(
        linen=_LinenMixtures(layers, width),
        make=lambda: _Mixtures(layers, width),
        rules=rules("gate", "up"),
        mistakes={
            "two weights of all experts exchanged": (rules("up", "gate"), "blocks/0/experts/0"),
            "a weight of experts exchanged between layers": (
                rules("gate", "up", lambda layer: layer ^ 1 if layer < 2 else layer),
                "blocks/0/experts/0/down",
            ),
        },
        # Linen has no module that is a block, with the norm in it.
        faults={"experts chosen otherwise": (lambda: _Mixtures(layers, width, nnx.sigmoid), "(root)")},
    )


_CASES = {
    "6 layers of 256": lambda: _decoder(6, 256),
    "12 layers of 512": lambda: _decoder(12, 512),
    "4 mixtures of 8 experts of 256": lambda: _mixtures(4, 256),
}
_TOYS = {"2 layers of 64": lambda: _decoder(2, 64), "2 mixtures": lambda: _mixtures(2, 16)}


def _seconds(function: Callable[[], Any]) -> tuple[float, float, Any]:
    start, cpu = time.perf_counter(), time.process_time()
    result = jax.block_until_ready(function())
    return time.perf_counter() - start, time.process_time() - cpu, result


def _measure(folder: pathlib.Path, title: str, case: _Case) -> dict[str, dict[str, Any]]:
    linen, tokens = case.linen, np.arange(128).reshape(1, 128)
    shapes = jax.eval_shape(linen.init, jax.random.key(0), tokens)
    random = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: (random.normal(size=leaf.shape) / max(leaf.shape) ** 0.5).astype("f"), shapes
    )
    # On a device that they name, as restored arrays are: for others JAX compiles each operation once more.
    variables = jax.device_put(variables, jax.devices()[0])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "checkpoint", variables, force=True)
    target = nnx.eval_shape(case.make)
    model: Any = from_linen(variables, target, renames=case.rules)
    run = lambda model, tokens: model(tokens)  # noqa: E731

    def forward() -> Any:
        with jax.disable_jit(), jax.default_matmul_precision("highest"):
            return linen.apply(variables, tokens), model(tokens)

    forward()  # What is compiled once for each operation is compiled here.
    passes, passes_cpu, (expected, found) = min((_seconds(forward) for _ in range(5)), key=lambda run: run[0])
    np.testing.assert_allclose(expected, found, rtol=1e-3, atol=1e-3)
    rows = dict[str, dict[str, Any]]()
    runs = {name: (case.make, *given) for name, given in case.mistakes.items()}
    runs |= {name: (make, case.rules, path) for name, (make, path) in case.faults.items()}
    for name, (make, rules, path) in {"right rules": (case.make, case.rules, ""), **runs}.items():
        target = nnx.eval_shape(make)
        seconds, cpu, found = _seconds(
            lambda target=target, rules=rules: verify(
                folder / "checkpoint", target, linen.apply, run, (tokens,), renames=rules
            )
        )
        assert found.equal if not path else found.first.path == path, found
        rows[f"{title}, {name}"] = {
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(variables)),
            "both forward passes, s": passes,
            "verify, s": seconds,
            "verify ÷ passes": seconds / passes,
            "verify ÷ passes, CPU": cpu / passes_cpu,
        }
    return rows


def main() -> None:
    """Measures every case."""
    options = arguments(__doc__ or "")
    results = dict[str, dict[str, Any]]()
    for at, (title, case) in enumerate((_TOYS if options.toy else _CASES).items()):
        results |= _measure(pathlib.Path(options.scratch) / str(at), title, case())
    report("verify", options, results, {"": table({"": title, **row} for title, row in results.items())})


if __name__ == "__main__":
    main()
