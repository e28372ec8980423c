"""Random train states: what a Linen program stores of one, and what an NNX program wants of it."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.laws.fuzz.models import FLOAT32, ZERO, Node, Path, Values, arrange, leaves_of
from tests.laws.fuzz.optimizers import Chain, slots_of


class Numbers:
    """Gives arrays whose elements occur nowhere else, as far as their dtype has room."""

    def __init__(self) -> None:
        self._next = 1

    def array(self, shape: tuple[int, ...], dtype: Any = FLOAT32) -> np.ndarray:
        dtype = np.dtype(dtype)
        size = int(np.prod(shape))
        start, self._next = self._next, self._next + max(size, 1)
        numbers = np.arange(start, start + size)
        if dtype.name in ("bfloat16", "float16"):
            # Bit patterns of finite positive numbers: these types hold too few integers.
            return (numbers % 0x7000 + 0x200).astype(np.uint16).view(dtype).reshape(shape)
        if dtype.itemsize == 1:
            numbers = numbers % 120
        return numbers.reshape(shape).astype(dtype)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A stored array: what lies above the model's own path, and that path."""

    above: Path
    inner: Path
    value: np.ndarray
    what: str = "params"

    @property
    def path(self) -> Path:
        return (*self.above, *self.inner)


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A wanted leaf and the value that must come back; `inner` is its parameter's path in the model."""

    path: Path
    kind: str
    value: np.ndarray
    inner: Path = ()


Key = tuple[int, Path]
"""Which leaf of an optax state: the place of its part among those that hold anything, and the path below."""


@dataclasses.dataclass
class TrainState:
    """One model with all that belongs to it.

    Attributes:
        parts: The model, as it is wanted.
        stored_parts: The model, as it was stored: the same, but where something is wrong on purpose.
        values: Its arrays.
        owner: The keys above it in the checkpoint.
        wanted_owner: The keys above it in the target.
        chain: The stored optimizer, or None.
        wanted_chain: The wanted optimizer, or None.
        step: Its count of steps.
        copies: Trees of the model's shapes beside `params`, with numbers of their own.
        statistics_below: The field that holds `batch_stats`, empty for none.
        form: How the program stores it: plain, MaxText's, or with every array in a box.
    """

    parts: tuple[Node, ...]
    values: dict[Path, np.ndarray]
    numbers: Numbers
    owner: Path = ()
    wanted_owner: Path = ()
    chain: Chain | None = None
    wanted_chain: Chain | None = None
    step: int = 7
    copies: tuple[str, ...] = ()
    statistics_below: str = ""
    form: str = "plain"
    stored_parts: tuple[Node, ...] = ()
    moments: dict[Key, dict[Path, np.ndarray]] = dataclasses.field(default_factory=dict)
    scalars: dict[Key, np.ndarray] = dataclasses.field(default_factory=dict)

    def of(self, *collections: str, parts: tuple[Node, ...] | None = None) -> Values:
        names = {path for path, leaf in leaves_of(parts or self.parts) if leaf.collection in collections}
        return {path: value for path, value in self.values.items() if path in names}

    @property
    def collections(self) -> list[str]:
        """The collections beside `params`, in the order in which they occur."""
        names = (leaf.collection for _, leaf in leaves_of(self.parts))
        return [name for name in dict.fromkeys(names) if name not in ("params", ZERO)]

    def stored(self) -> list[Entry]:
        """Returns what the program stores."""
        parts = self.stored_parts or self.parts
        self.fill(parts)
        params = arrange(parts, self.of("params", ZERO, parts=parts), "stored")
        inside = ("params",) if self.form == "maxtext" else ()
        found = list(_entries((*self.owner, "params", *inside), params, "params"))
        for name in self.collections:
            above = (self.statistics_below,) if name == "batch_stats" and self.statistics_below else ()
            arrays = arrange(parts, self.of(name, parts=parts), "stored")
            found += _entries((*self.owner, *above, name, *inside), arrays, name)
        for name in self.copies:
            # A copy has the shapes of what it is a copy of.
            source = "batch_stats" if "stats" in name else "params"
            arrays = params if source == "params" else arrange(parts, self.of(source, parts=parts), "stored")
            other = {path: self.numbers.array(value.shape, value.dtype) for path, value in arrays.items()}
            found += _entries((*self.owner, name, *inside), other, "copy")
        if self.chain:
            found += self._stored_optimizer(parts, params, inside)
        found.append(Entry((*self.owner, "step"), (), np.asarray(self.step, np.int32), "step"))
        return [_boxed(entry) for entry in found] if self.form == "boxed" else found

    def _stored_optimizer(self, parts: tuple[Node, ...], params: dict, inside: Path) -> Iterator[Entry]:
        assert self.chain
        for key, slot in keyed_slots(self.chain, params):
            place = (*self.owner, "opt_state", *slot.prefix)
            if slot.parameter is None:
                self.scalars.setdefault(key, self.numbers.array(slot.shape, slot.dtype))
                yield Entry(place, (), self.scalars[key], "scalar")
            else:
                arrays = arrange(parts, self.moment(key, slot.dtype, parts), "stored")
                yield Entry((*place, *inside), slot.parameter, arrays[slot.parameter], "moment")

    def moment(self, key: Key, dtype: Any, parts: tuple[Node, ...]) -> dict[Path, np.ndarray]:
        """Returns one moment of every parameter: an array for each of the description's leaves."""
        own = self.moments.setdefault(key, {})
        for path, leaf in leaves_of(parts):
            if leaf.collection in ("params", ZERO) and path not in own:
                zero = leaf.collection == ZERO
                own[path] = (
                    np.zeros(leaf.shape, dtype) if zero else self.numbers.array(leaf.shape, leaf.dtype)
                )
        return own

    def fill(self, parts: tuple[Node, ...]) -> None:
        """Gives every leaf that has none an array."""
        for path, leaf in leaves_of(parts):
            if path not in self.values:
                zero = leaf.collection == ZERO
                made = (
                    np.zeros(leaf.shape, leaf.dtype) if zero else self.numbers.array(leaf.shape, leaf.dtype)
                )
                self.values[path] = made

    def wanted_model(self) -> list[Wanted]:
        """Returns the model's wanted leaves, by the path within the model."""
        self.fill(self.parts)
        found: list[Wanted] = []
        for name in ("params", *self.collections):
            arrays = arrange(self.parts, self.of(name), "wanted")
            found += [Wanted(path, name, value, path) for path, value in arrays.items()]
        return found

    def wanted_optimizer(self) -> list[Wanted]:
        """Returns the optimizer's wanted leaves, by the path below `opt_state`."""
        if not self.wanted_chain:
            return []
        params = arrange(self.parts, self.of("params"), "wanted")
        found: list[Wanted] = []
        for key, slot in keyed_slots(self.wanted_chain, params):
            if slot.parameter is None:
                self.scalars.setdefault(key, self.numbers.array(slot.shape, slot.dtype))
                found.append(Wanted(slot.path, "scalar", self.scalars[key]))
            else:
                arrays = arrange(self.parts, self.moment(key, slot.dtype, self.parts), "wanted")
                found.append(Wanted(slot.path, "moment", arrays[slot.parameter], slot.parameter))
        return found

    def made_from(self, below: Path) -> set[Path]:
        """Returns the wanted paths in the model that hold anything from below a path of the description."""
        every = {
            path: np.full(leaf.shape, path[: len(below)] == below) for path, leaf in leaves_of(self.parts)
        }
        return {path for path, value in arrange(self.parts, every, "wanted").items() if value.any()}


def keyed_slots(chain: Chain, params: dict[Path, np.ndarray]) -> Iterator[tuple[Key, Any]]:
    """Yields the leaves of a chain's state with the place of their part among those that hold anything."""
    places = list(chain.places())
    for slot in slots_of(chain, params):
        at = next(at for at, place in enumerate(places) if slot.path[: len(place)] == place)
        yield (at, slot.prefix[len(places[at]) :]), slot


def _entries(above: Path, arrays: dict[Path, np.ndarray], what: str) -> Iterator[Entry]:
    return (Entry(above, path, value, what) for path, value in arrays.items())


def _boxed(entry: Entry) -> Entry:
    if entry.what in ("params", "moment"):
        return dataclasses.replace(entry, inner=(*entry.inner, "value"))
    return entry
