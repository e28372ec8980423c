"""Random optax chains, and their states on both sides, leaf by leaf."""

import dataclasses
import functools
import random
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax
from flax import traverse_util

from tests.laws.fuzz.models import Flat, Path


def _schedule(count: Any) -> Any:
    return 1.0 / (1.0 + count)


def _labels(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: _label(_keys(path)[0]), params)


def _label(first: Any) -> str:
    """Labels a parameter by its first key without a number, which both sides have in common."""
    base = str(first).split(_MARK)[0].removesuffix("_remainder").rstrip("0123456789").rstrip("_")
    return "a" if sum(map(ord, base)) % 2 else "b"


PARTS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adam": optax.scale_by_adam,
    "adamax": optax.scale_by_adamax,
    "lion": optax.scale_by_lion,
    "rms": optax.scale_by_rms,
    "amsgrad": optax.scale_by_amsgrad,
    "yogi": optax.scale_by_yogi,
    "trace": lambda: optax.trace(0.9),
    "ema": lambda: optax.ema(0.9),
    "schedule": lambda: optax.scale_by_schedule(_schedule),
    "second schedule": lambda: optax.scale_by_schedule(_schedule),
    "plateau": lambda: optax.contrib.reduce_on_plateau(accumulation_size=3),
    "inject": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=_schedule, b1=0.9),
    "inject trace": lambda: optax.inject_hyperparams(optax.sgd)(learning_rate=0.1, momentum=0.9),
    "multi_transform": lambda: optax.multi_transform(
        {"a": optax.adam(1e-3), "b": optax.sgd(0.1, 0.9)}, _labels
    ),
    "masked": lambda: optax.masked(
        optax.scale_by_adam(), lambda p: jax.tree.map(lambda x: x == "a", _labels(p))
    ),
    "adadelta": optax.scale_by_adadelta,
    "finite": lambda: optax.apply_if_finite(optax.scale_by_adam(), 3),
}
STATELESS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "clip": lambda: optax.clip_by_global_norm(1.0),
    "decay": lambda: optax.add_decayed_weights(0.1),
    "rate": lambda: optax.scale(-0.1),
}


@dataclasses.dataclass(frozen=True)
class Chain:
    """Parts by name; a tuple of names is a chain within the chain."""

    parts: tuple[Any, ...]

    def build(self) -> optax.GradientTransformation:
        return optax.chain(*(_built(part) for part in self.parts))

    @property
    def stateful(self) -> list[str]:
        """The parts that hold anything, in order."""
        return [name for name, _ in _places(self.parts) if name in PARTS]

    def places(self) -> list[Path]:
        """Returns where in the chain's state the parts lie that hold anything, in order."""
        return [place for name, place in _places(self.parts) if name in PARTS]


def _built(part: Any) -> optax.GradientTransformation:
    return optax.chain(*map(_built, part)) if isinstance(part, tuple) else (PARTS | STATELESS)[part]()


def _places(parts: tuple[Any, ...], at: Path = ()) -> Iterator[tuple[str, Path]]:
    for place, part in enumerate(parts):
        if isinstance(part, tuple):
            yield from _places(part, (*at, place))
        else:
            yield part, (*at, place)


def draw_chain(rng: random.Random) -> Chain:
    """Returns a chain of one to four parts that hold state, and others between them."""
    parts = rng.choices(list(PARTS), k=rng.choice((1, 1, 2, 2, 3, 4)))
    for _ in range(rng.choice((0, 0, 1, 2))):
        parts.insert(rng.randrange(len(parts) + 1), rng.choice(list(STATELESS)))
    return Chain(tuple(parts))


def rewritten(chain: Chain, rng: random.Random) -> Chain:
    """Returns a chain of the same states in the same order, with parts without state put in, or nested."""
    parts = list(chain.parts)
    for _ in range(rng.choice((1, 1, 2))):
        if rng.random() < 0.6 or len(parts) < 2:
            parts.insert(rng.randrange(len(parts) + 1), rng.choice(list(STATELESS)))
        else:
            at = rng.randrange(len(parts) - 1)
            parts[at : at + 2] = [tuple(parts[at : at + 2])]
    return Chain(tuple(parts))


@dataclasses.dataclass(frozen=True)
class Slot:
    """One leaf of an optax state: a moment of a parameter, or a number of the state's own.

    Attributes:
        path: Where it lies in the state.
        parameter: The parameter's path, or None.
        shape: Its shape.
        dtype: Its dtype.
    """

    path: Path
    parameter: Path | None
    shape: tuple[int, ...]
    dtype: Any

    @property
    def prefix(self) -> Path:
        """The path without the parameter's."""
        return self.path[: len(self.path) - len(self.parameter)] if self.parameter else self.path


def slots_of(chain: Chain, params: Flat) -> list[Slot]:
    """Returns the leaves of the state that optax makes for parameters."""
    alike: dict[_Alike, list[Path]] = {}
    for path, value in params.items():
        alike.setdefault((_label(path[0]), value.dtype), []).append(path)
    slots: list[Slot] = []
    for slot, kind in _template(chain, tuple(sorted(alike, key=str))):
        if kind is None:
            slots.append(slot)
        else:
            slots += [Slot((*slot.path, *path), path, params[path].shape, slot.dtype) for path in alike[kind]]
    return slots


_Alike = tuple[str, np.dtype[Any]]
"""What the state of a parameter depends on: its label and its dtype."""
_MARK = "\N{SECTION SIGN}"


@functools.lru_cache(maxsize=4096)
def _template(chain: Chain, kinds: tuple[_Alike, ...]) -> list[tuple[Slot, _Alike | None]]:
    """Returns what optax itself makes of one parameter of each kind.

    They go in under names that occur nowhere else, so that the path alone says what was made of each.
    """
    names = {f"{label}{_MARK}{dtype}": (label, dtype) for label, dtype in kinds}
    state = jax.eval_shape(
        chain.build().init, {name: jax.ShapeDtypeStruct((), dtype) for name, (_, dtype) in names.items()}
    )
    found: list[tuple[Slot, _Alike | None]] = []
    for marked, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        path = _keys(marked)
        kind = names.get(path[-1])
        found.append((Slot(path[:-1] if kind else path, None, leaf.shape, leaf.dtype), kind))
    return found


def _keys(path: Any) -> Path:
    names = ("key", "name", "idx")
    return tuple(next(getattr(key, name) for name in names if hasattr(key, name)) for key in path)


def nested(flat: dict[Path, Any]) -> dict[Any, Any]:
    """Returns nested dicts."""
    return traverse_util.unflatten_dict(flat)
