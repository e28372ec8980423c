"""Random programs: networks in the containers that people keep them in, saved and restored into others.

A network has layers in lists or stacked by a scan, with parameters, statistics, Variables of a type of its
own and random streams. The restored program may hold its layers the other way, lie below one level more or
less, or be a part of the saved one. Names tell all of it, so every element comes back, streams included.
Nothing here is the package's.
"""

import dataclasses
import pathlib
import random
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from orbax_nnx_handler import RestoreError, restore, save
from tests.laws.fuzz.trial import Outcome

Arrangement = Mapping[str, Literal["list", "stack"]]
"""How the layers of each name are held."""

LAYERS = ("layers", "blocks", "enc", "dec")
PAIRS = (("gen", "disc"), ("actor", "critic"), ("encoder", "decoder"), ("teacher", "student"), ("q1", "q2"))
LEVELS = ("agent", "trainer", "state")
FORMS = ("bare", "model", "optimizer", "average", "average and optimizer", "side by side")
FORMS += ("side by side, optimizers", "side by side, one optimizer", "nested", "tuple", "module")
NAMELESS = ("tuple", "side by side, one optimizer", "average and optimizer")
"""The trained one is stored as the root's model, what lies beside it with its level: a rule says the rest."""
CHANGES = ("same", "other arrangement", "level more", "level less", "part")


class Own(nnx.Variable[Any]):
    """A type of a program's own."""


class Block(nnx.Module):
    """Variables, for one layer or a stack of them."""

    def __init__(
        self, variables: list[tuple[str, type[Any], tuple[int, ...]]], count: int | None, stream: bool
    ):
        for name, kind, shape in variables:
            setattr(self, name, kind(jnp.zeros(shape if count is None else (count, *shape))))
        if stream:
            self.rngs = nnx.Rngs(dropout=0)
        if stream and count is not None:
            self.rngs.dropout.key.set_value(jax.random.split(jax.random.key(0), count))
            self.rngs.dropout.count.set_value(jnp.zeros(count, jnp.uint32))


@dataclasses.dataclass(frozen=True)
class Changed:
    """How a target's networks differ in names and axes: modules of other names, matrices turned."""

    names: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
    turned: tuple[str, str] | None = None


class Network(nnx.Module):
    """Layers of random Variables under some names, and an output."""

    def __init__(
        self, seed: int, arrangement: Arrangement, typed: bool, streams: bool, changed: Changed = Changed()
    ):
        rng = random.Random(seed)
        kinds = (nnx.Param, nnx.Param, nnx.BatchStat, Own) if typed else (nnx.Param,)
        for name, held in arrangement.items():
            count = rng.choice((2, 3))
            variables: list[Any] = [
                (key, rng.choice(kinds), rng.choice(((5,), (7,), (5, 7))))
                for key in rng.sample(("a", "b", "mean", "scale", "kernel"), rng.randint(1, 3))
            ]
            variables += (
                [("w", nnx.Param, (5, 5))] if nnx.Param not in [kind for _, kind, _ in variables] else []
            )
            stream = streams and rng.random() < 0.6
            one = (Block(variables, None, stream) for _ in range(count))
            setattr(self, name, nnx.List(one) if held == "list" else Block(variables, count, stream))
        mean: list[Any] = [("mean", nnx.BatchStat, (2,))] if typed else []
        self.out = Block([("kernel", nnx.Param, (2, 2)), *mean], None, streams and rng.random() < 0.5)
        for layer in getattr(self, changed.turned[0]) if changed.turned else ():
            variable = getattr(layer, changed.turned[1])
            variable.set_value(jnp.zeros(variable.shape[::-1]))
        parts = {new: getattr(self, old) for old, new in changed.names.items()}
        for old in changed.names:
            delattr(self, old)
        for new, part in parts.items():
            setattr(self, new, part)


class Both(nnx.Module):
    """Two networks in a module."""

    def __init__(self, networks: Mapping[str, Network]):
        for name, network in networks.items():
            setattr(self, name, network)


def try_program(seed: int, place: pathlib.Path) -> Outcome:
    """Draws a program, saves it, restores it into a changed one, and compares."""
    rng = random.Random(seed)
    names = rng.sample(LAYERS, rng.randint(1, 2))
    here, there = drawn_arrangement(rng, names), drawn_arrangement(rng, names)
    change, form, layout = rng.choice(CHANGES), rng.choice(FORMS), rng.choice(("linen", "maxtext"))
    if change in ("same", "part") or rng.random() < 0.5:
        there = there if change == "other arrangement" else here
    make = drawn_program(rng, form, 2 * seed)
    level, kept = rng.choice(LEVELS), None
    if change == "part" and isinstance(whole := make(here), dict) and len(whole) > 1:
        kept = rng.sample(list(whole), rng.randint(1, len(whole) - 1))
    saved = numbered({level: make(here)} if change == "level less" else make(here))

    def wanted() -> Any:
        item = make(there)
        item = {key: item[key] for key in kept} if kept else item
        return {level: item} if change == "level more" else item

    tag = f"{form}, {change}"
    detail = f"{layout}, {dict(here)} -> {dict(there)}{f', {kept}' if kept else ''}: "
    try:
        save(place / "saved", saved, layout=layout)
        result = restore(place / "saved", nnx.eval_shape(wanted))
    except RestoreError as error:
        said = " | ".join(str(error).splitlines()[:6])
        if change == "level less" and form in NAMELESS:
            return Outcome(seed, "refused", "may refuse", tag)
        return Outcome(seed, "refused without need", "must restore", tag, detail + said)
    except Exception as error:
        return Outcome(seed, "crashed", "must restore", tag, f"{detail}{type(error).__name__}: {error}")
    want, have = elements(saved, here), elements(result, there)
    want = {path[change == "level less" :]: value for path, value in want.items()}
    have = {path[change == "level more" :]: value for path, value in have.items()}
    wrong = [path for path in have if path not in want or not np.array_equal(have[path], want[path])]
    return Outcome(seed, "wrong" if wrong else "right", "must restore", tag, detail + str(wrong[:3]))


def drawn_arrangement(rng: random.Random, names: list[str]) -> Arrangement:
    """Returns how the layers of each name are held."""
    return {name: rng.choice(("list", "stack")) for name in names}


def drawn_program(rng: random.Random, form: str, seed: int) -> Callable[..., Any]:
    """Returns what makes a program of a form, by the arrangement of its layers and what is changed."""
    typed, streams = rng.random() < 0.6, rng.random() < 0.6
    (one, two), other = rng.choice(PAIRS), seed + rng.randint(0, 1)

    def make(arrangement: Arrangement, changed: Changed = Changed()) -> Any:
        others = dataclasses.replace(changed, turned=None)
        x, average = (Network(seed, arrangement, typed, streams, changed) for _ in range(2))
        y = Network(other, arrangement, typed, streams, others)
        model, pair = {"model": x}, {one: x, two: y}
        programs: dict[str, Callable[[], Any]] = {
            "bare": lambda: x,
            "model": lambda: model,
            "optimizer": lambda: model | {"optimizer": _optimizer(x)},
            "average": lambda: model | {"ema": average},
            "average and optimizer": lambda: model | {"optimizer": _optimizer(x), "ema": average},
            "side by side": lambda: pair,
            "side by side, optimizers": lambda: pair | {f"{k}_opt": _optimizer(m) for k, m in pair.items()},
            "side by side, one optimizer": lambda: pair | {f"{one}_opt": _optimizer(x)},
            "nested": lambda: {key: {"model": m, "optimizer": _optimizer(m)} for key, m in pair.items()},
            "tuple": lambda: (x, _optimizer(x), y),
            "module": lambda: Both(pair),
        }
        return programs[form]()

    return make


def _optimizer(model: nnx.Module) -> nnx.Optimizer[Any]:
    return nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)


def _is_key(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jax.dtypes.prng_key)


def numbered(item: Any) -> Any:
    """Returns the item with a number of its own in every element."""
    graph, state = nnx.split(item)
    done = 0

    def fill(array: Any) -> Any:
        nonlocal done
        shape = (*array.shape, 2) if _is_key(array) else array.shape
        size = int(np.prod(shape))
        numbers, done = np.arange(done + 1, done + 1 + size).reshape(shape), done + size
        if _is_key(array):
            return jax.random.wrap_key_data(jnp.asarray(numbers, jnp.uint32))
        return jnp.asarray(numbers, array.dtype)

    return nnx.merge(graph, jax.tree.map(fill, state))


def elements(item: Any, arrangement: Arrangement) -> dict[tuple[str, ...], np.ndarray]:
    """Returns the values by path, each layer of a stack by itself."""
    found: dict[tuple[str, ...], np.ndarray] = {}
    for keys, leaf in nnx.to_flat_state(nnx.split(item)[1]):
        path, value = tuple(map(str, keys)), leaf[...] if isinstance(leaf, nnx.Variable) else leaf
        value = np.asarray(jax.random.key_data(value) if _is_key(value) else value)
        at = next((at for at, key in enumerate(path) if arrangement.get(key) == "stack"), None)
        if at is None:
            found[path] = value
        else:
            found |= {(*path[: at + 1], str(i), *path[at + 1 :]): layer for i, layer in enumerate(value)}
    return found
