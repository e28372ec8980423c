"""What programs add themselves: LoRA, own collections, partition boxes, names that mislead."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx

from tests.zoo.pairs import Pair, Training, values

X = values(3, 4)


class LinenLoRALinear(nn.Module):
    """A dense layer with a low-rank correction beside it."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        layer = nn.Dense(5)
        nn.share_scope(self, layer)
        return layer(x) + LinenLoRA(name="lora")(x)


class LinenLoRA(nn.Module):
    """The low-rank product alone, or on top of a base layer."""

    base: bool = False
    collection: str = "params"

    @nn.compact
    def __call__(self, x: Any) -> Any:
        lora_a = self._weight("lora_a", (4, 2))
        lora_b = self._weight("lora_b", (2, 5))
        return x @ lora_a @ lora_b + (nn.Dense(5, name="base_module")(x) if self.base else 0.0)

    def _weight(self, name: str, shape: tuple[int, int]) -> Any:
        if self.collection == "params":
            return self.param(name, nn.initializers.normal(), shape)
        return self.variable(self.collection, name, jnp.zeros, shape).value


def nnx_lora(rngs: nnx.Rngs) -> nnx.Module:
    """A low-rank product on top of a base layer."""
    return nnx.LoRA(4, 2, 5, base_module=nnx.Linear(4, 5, rngs=rngs), rngs=rngs)


class Seen(nnx.Variable):
    """How much a module has seen."""


class Codes(nnx.Variable):
    """Weights kept as small integers."""


nnx.register_variable_name("seen", Seen)
nnx.register_variable_name("codes", Codes)


class LinenCounting(nn.Module):
    """A layer with integer weights and a count in collections of its own."""

    @nn.compact
    def __call__(self, x: Any, *, train: bool) -> Any:
        seen = self.variable("seen", "batches", lambda: jnp.zeros((), jnp.int32))
        total = self.variable("seen", "total", jnp.zeros, (4,))
        codes = self.variable("codes", "kernel", lambda: jnp.zeros((4, 3), jnp.int8))
        if train:
            seen.value += 1
            total.value += x.sum(0)
        x = (x - total.value / (1 + seen.value)) @ codes.value.astype(x.dtype)
        return nn.Dense(2, name="head")(x)


class NnxCounting(nnx.Module):
    """The same, with a Variable type for each collection."""

    def __init__(self, rngs: nnx.Rngs):
        self.batches = Seen(jnp.zeros((), jnp.int32))
        self.total = Seen(jnp.zeros((4,)))
        self.kernel = Codes(jnp.zeros((4, 3), jnp.int8))
        self.head = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x: Any, *, train: bool) -> Any:
        if train:
            self.batches[...] += 1
            self.total[...] += x.sum(0)
        x = (x - self.total[...] / (1 + self.batches[...])) @ self.kernel[...].astype(x.dtype)
        return self.head(x)


class LinenMisnamed(nn.Module):
    """Weights under names that mean something else to Flax or Orbax."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for name in ("key", "rngs", "value", "opt_state", "step", "mu", "batch_stats"):
            x = nn.tanh(nn.Dense(4, name=name)(x))
        return x * self.param("count", nn.initializers.normal(), (4,))


class NnxMisnamed(nnx.Module):
    """The same."""

    def __init__(self, rngs: nnx.Rngs):
        for name in ("key", "rngs", "value", "opt_state", "step", "mu", "batch_stats"):
            setattr(self, name, nnx.Linear(4, 4, rngs=rngs))
        self.count = nnx.Param(jnp.zeros(4))

    def __call__(self, x: Any) -> Any:
        for name in ("key", "rngs", "value", "opt_state", "step", "mu", "batch_stats"):
            x = nnx.tanh(getattr(self, name)(x))
        return x * self.count[...]


class LinenNumbers(nn.Module):
    """Values of many kinds, as pytrees of one `self.param` or `self.variable`."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        shapes = {"in": jnp.zeros((4, 4)), "gain": jnp.zeros(()), "wave": jnp.zeros(4, jnp.complex64)}
        weights = self.param("weights", lambda _: shapes)
        seen = self.variable("seen", "masks", lambda: {"on": [jnp.zeros(4, bool), jnp.zeros(4, jnp.uint8)]})
        wave = weights["wave"].real - weights["wave"].imag
        return (x @ weights["in"]) * weights["gain"] + wave + seen.value["on"][0] + 2 * seen.value["on"][1]


class NnxNumbers(nnx.Module):
    """The same, one Variable for each leaf."""

    def __init__(self, _rngs: nnx.Rngs):
        self.weights = nnx.Dict(
            {
                "in": nnx.Param(jnp.zeros((4, 4))),
                "gain": nnx.Param(jnp.zeros(())),
                "wave": nnx.Param(jnp.zeros(4, jnp.complex64)),
            }
        )
        self.masks = nnx.Dict(on=nnx.List([Seen(jnp.zeros(4, bool)), Seen(jnp.zeros(4, jnp.uint8))]))

    def __call__(self, x: Any) -> Any:
        wave = self.weights["wave"][...]
        on = self.masks["on"]
        y = (x @ self.weights["in"][...]) * self.weights["gain"][...]
        return y + wave.real - wave.imag + on[0][...] + 2 * on[1][...]


PAIRS = (
    Pair(
        linen_name="low-rank module",
        nnx_name="LoRA",
        variant="with its base layer",
        linen=LinenLoRA(base=True),
        nnx=nnx_lora,
        inputs=(X,),
    ),
    Pair(
        linen_name="low-rank module",
        nnx_name="LoRA",
        variant="a collection of its own",
        linen=LinenLoRA(base=True, collection="lora"),
        nnx=nnx_lora,
        inputs=(X,),
    ),
    Pair(
        linen_name="low-rank module",
        nnx_name="LoRALinear",
        variant="shared scope",
        linen=LinenLoRALinear(),
        nnx=lambda rngs: nnx.LoRALinear(4, 5, lora_rank=2, rngs=rngs),
        inputs=(X,),
    ),
    Pair(
        linen_name="custom collections",
        nnx_name="custom Variables",
        linen=LinenCounting(),
        nnx=NnxCounting,
        inputs=(X,),
        linen_kwargs={"train": False},
        nnx_kwargs={"train": False},
        training=Training(linen={"train": True}, nnx={"train": True}, collections=("seen",), statistics=Seen),
    ),
    Pair(
        linen_name="with_partitioning",
        nnx_name="Linear",
        variant="boxes on some leaves",
        linen=nn.Dense(3, kernel_init=nn.with_partitioning(nn.initializers.normal(), (None, "model"))),
        nnx=lambda rngs: nnx.Linear(4, 3, rngs=rngs),
        inputs=(X,),
    ),
    Pair(
        linen_name="Dense",
        nnx_name="Linear",
        variant="misleading names",
        linen=LinenMisnamed(),
        nnx=NnxMisnamed,
        inputs=(X,),
    ),
    Pair(
        linen_name="pytrees of params and variables",
        nnx_name="Dict, List",
        variant="bool, uint8, complex, scalar",
        linen=LinenNumbers(),
        nnx=NnxNumbers,
        inputs=(X,),
    ),
)
