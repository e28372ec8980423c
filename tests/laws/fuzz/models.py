"""Random models, as descriptions: how Linen would store one and how NNX would hold it."""

import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import numpy as np

Path = tuple[Any, ...]
Flat = dict[Path, np.ndarray]
Way = Literal["flat", "list", "scan", "blocks"]
FLOAT32 = np.dtype(np.float32)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of a module, in one collection."""

    name: str
    shape: tuple[int, ...]
    collection: str = "params"
    dtype: Any = FLOAT32


@dataclasses.dataclass(frozen=True)
class Module:
    """A module and its parts."""

    name: str
    parts: "tuple[Node, ...]"


@dataclasses.dataclass(frozen=True)
class Cell:
    """A recurrent cell of Flax, which Linen stores gate by gate."""

    name: str
    kind: str
    inputs: int
    features: int


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """How the layers of a group lie: in their names, in the path, on an axis, or in blocks along an axis."""

    way: Way
    axis: int = 0
    block: int = 1


@dataclasses.dataclass(frozen=True)
class Group:
    """Layers of one kind."""

    name: str
    count: int
    parts: "tuple[Node, ...]"
    stored: Arrangement
    wanted: Arrangement


Node = Leaf | Module | Cell | Group
Side = Literal["stored", "wanted"]

# A cell's gates in Linen, which of them have a bias, and the leaf of NNX that joins them, in this order.
INPUT_GATES = {"lstm": ("ii", "if", "ig", "io"), "gru": ("ir", "iz", "in"), "simple": ("i",)}
HIDDEN_GATES = {"lstm": ("hi", "hf", "hg", "ho"), "gru": ("hr", "hz", "hn"), "simple": ("h",)}
BIASED = {"lstm": HIDDEN_GATES["lstm"], "gru": INPUT_GATES["gru"], "simple": ("i",)}
# The bias of a GRU's `hn` has no place in NNX and must be zero.
ZERO = "zero"


def leaves_of(parts: tuple[Node, ...], prefix: Path = ()) -> Iterator[tuple[Path, Leaf]]:
    """Yields every array of a model, each layer and each gate its own, by a path of the description."""
    for part in parts:
        match part:
            case Leaf(name):
                yield (*prefix, name), part
            case Module(name, inner):
                yield from leaves_of(inner, (*prefix, name))
            case Group(name, count, inner):
                for at in range(count):
                    yield from leaves_of(inner, (*prefix, (name, at)))
            case Cell(name):
                yield from _gates(part, (*prefix, name))


def _gates(cell: Cell, prefix: Path) -> Iterator[tuple[Path, Leaf]]:
    kind = "lstm" if cell.kind == "optimized_lstm" else cell.kind
    for gates, rows in ((INPUT_GATES, cell.inputs), (HIDDEN_GATES, cell.features)):
        for gate in gates[kind]:
            yield (*prefix, gate, "kernel"), Leaf("kernel", (rows, cell.features))
            if gate in BIASED[kind]:
                yield (*prefix, gate, "bias"), Leaf("bias", (cell.features,))
    if kind == "gru":
        yield (*prefix, "hn", "bias"), Leaf("bias", (cell.features,), ZERO)


Values = Mapping[Path, np.ndarray]


def arrange(parts: tuple[Node, ...], values: Values, side: Side) -> Flat:
    """Returns a model's arrays by the path that one side has them under."""
    return _arrange(parts, (), (), values, side)


def _arrange(parts: tuple[Node, ...], at: Path, prefix: Path, values: Values, side: Side) -> Flat:
    found: Flat = {}
    for part in parts:
        match part:
            case Leaf(name):
                if (*at, name) in values:
                    found[(*prefix, name)] = values[(*at, name)]
            case Module(name, inner):
                found |= _arrange(inner, (*at, name), (*prefix, name), values, side)
            case Cell(name):
                found |= _cell(part, (*at, name), (*prefix, name), values, side)
            case Group():
                found |= _group(part, at, prefix, values, side)
    return found


def _group(group: Group, at: Path, prefix: Path, values: Values, side: Side) -> Flat:
    how = group.stored if side == "stored" else group.wanted
    layers = [
        _arrange(group.parts, (*at, (group.name, layer)), (), values, side) for layer in range(group.count)
    ]
    found: Flat = {}
    if how.way == "flat":
        for layer, arrays in enumerate(layers):
            found |= _below((*prefix, f"{group.name}_{layer}"), arrays)
    elif how.way == "list":
        for layer, arrays in enumerate(layers):
            key: Any = str(layer) if side == "stored" else layer
            found |= _below((*prefix, group.name, key), arrays)
    elif how.way == "scan":
        found |= _below((*prefix, group.name), stack(layers, how.axis))
    else:
        cycles = group.count // how.block
        for place in range(how.block):
            scanned = stack(layers[place : cycles * how.block : how.block], how.axis)
            found |= _below((*prefix, group.name, f"{group.name}_{place}"), scanned)
        for place, arrays in enumerate(layers[cycles * how.block :]):
            found |= _below((*prefix, f"{group.name}_remainder", f"{group.name}_{place}"), arrays)
    return found


def _below(prefix: Path, arrays: Flat) -> Flat:
    return {(*prefix, *path): array for path, array in arrays.items()}


def stack(layers: list[Flat], axis: int) -> Flat:
    """Returns layers side by side along an axis."""
    return {path: np.stack([layer[path] for layer in layers], axis) for path in layers[0]}


def _cell(cell: Cell, at: Path, prefix: Path, values: Values, side: Side) -> Flat:
    own = {path[len(at) :]: value for path, value in values.items() if path[: len(at)] == at}
    if side == "stored":
        return _below(prefix, own)
    if cell.kind == "lstm":
        # `if` is no name of an attribute.
        return _below(
            prefix, {("if_" if gate == "if" else gate, leaf): own[gate, leaf] for gate, leaf in own}
        )
    kind = "lstm" if cell.kind == "optimized_lstm" else cell.kind
    found: Flat = {}
    for name, gates in (("dense_i", INPUT_GATES[kind]), ("dense_h", HIDDEN_GATES[kind])):
        for leaf in ("kernel", "bias"):
            parts = [own[gate, leaf] for gate in gates if (gate, leaf) in own]
            if len(parts) == len(gates):
                found[(*prefix, name, leaf)] = np.concatenate(parts, -1)
    return found


def groups_of(parts: tuple[Node, ...]) -> Iterator[Group]:
    """Yields every group of layers."""
    for part in parts:
        if isinstance(part, Group):
            yield part
        if isinstance(part, Group | Module):
            yield from groups_of(part.parts)


def rebuilt(parts: tuple[Node, ...], change: Callable[[Node], Node]) -> tuple[Node, ...]:
    """Returns a model with every part put through a change, the innermost first."""
    found: list[Node] = []
    for part in parts:
        if isinstance(part, Group | Module):
            part = dataclasses.replace(part, parts=rebuilt(part.parts, change))
        found.append(change(part))
    return tuple(found)


# What decides whether the shapes leave one reading of an axis.


def one_axis(group: Group) -> bool:
    """Tells whether the layers' axis follows from the shapes, so that nothing is left to ask."""
    if group.stored == group.wanted:
        return True
    stacked = [how for how in (group.stored, group.wanted) if how.way in ("scan", "blocks")]
    return all(_one_axis(group, how) for how in stacked)


def _one_axis(group: Group, how: Arrangement) -> bool:
    layers = group.count if how.way == "scan" else group.count // how.block
    by_collection: dict[str, list[tuple[int, set[int]]]] = {}
    for _, leaf in leaves_of(group.parts):
        rank = len(leaf.shape) + 1
        true = how.axis % rank
        whole = (*leaf.shape[:true], layers, *leaf.shape[true:])
        allowed = {
            a for a in range(rank) if whole[a] == layers and (*whole[:a], *whole[a + 1 :]) == leaf.shape
        }
        by_collection.setdefault(leaf.collection, []).append((rank, allowed))
    return all(map(_decided, by_collection.values()))


def _decided(leaves: list[tuple[int, set[int]]]) -> bool:
    """One leaf may be open where all others allow one axis, the same counted from either end."""
    unsure = [item for item in leaves if len(item[1]) > 1]
    if not unsure:
        return True
    sure = [item for item in leaves if len(item[1]) == 1]
    if len(unsure) > 1 or not sure:
        return False
    rank, allowed = unsure[0]
    fronts = {next(iter(axes)) for _, axes in sure}
    backs = {next(iter(axes)) - size for size, axes in sure}
    if len(fronts) != 1:
        return False
    readings = fronts | ({rank + back for back in backs} if len(backs) == 1 else set())
    return len(readings & allowed) == 1


# Drawing a model.


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    "dense hidden out attn mlp norm encoder decoder head embed mu nu step params value model opt_state count "
    "trace dense_0 dense_1 Dense_0 Conv_0 conv_3 batch_stats scan q k v query key block inner_state ema "
    "grads 0"
)
GROUP_NAMES = _words("layers blocks Block encoder_layers h resblocks layers block mu stage")
LEAF_NAMES = _words("kernel bias scale embedding w gamma step value mu params pos lora_a")
SIZES = (1, 2, 3, 4, 5)
CUSTOM = ("memory", "cached_value")


@dataclasses.dataclass(frozen=True)
class Habits:
    """How often what is drawn."""

    square: float = 0.3
    statistics: float = 0.3
    custom: float = 0.1
    cells: float = 0.15
    groups: float = 0.6
    odd_dtypes: float = 0.15


def draw_model(rng: random.Random, habits: Habits) -> tuple[Node, ...]:
    """Returns a random model with at least one parameter of float32."""
    size = rng.choice((2, 3, 4)) if rng.random() < habits.square else None
    parts = _Drawing(rng, habits, size).parts(depth=0)
    if any(leaf.collection == "params" and leaf.dtype == np.float32 for _, leaf in leaves_of(parts)):
        return parts
    return (*parts, Module("fallback", (Leaf("kernel", (2, 3)),)))


@dataclasses.dataclass(frozen=True)
class _Drawing:
    rng: random.Random
    habits: Habits
    size: int | None

    def parts(self, depth: int, within_group: bool = False) -> tuple[Node, ...]:
        rng, found = self.rng, dict[str, Node]()
        for _ in range(rng.choice((1, 2, 2, 3)) if depth < 2 else 1):
            part = self.part(depth, within_group)
            if not any(_clash(part, other) for other in found.values()):
                found[part.name] = part
        return tuple(found.values())

    def part(self, depth: int, within_group: bool) -> Node:
        rng, habits = self.rng, self.habits
        draw = rng.random()
        if depth == 0 and rng.random() < habits.groups:
            return self.group(depth)
        if draw < habits.cells and not within_group:
            kind = rng.choice(("lstm", "optimized_lstm", "gru", "simple"))
            return Cell(rng.choice(("cell", "rnn", "lstm")), kind, rng.choice(SIZES), rng.choice(SIZES))
        if draw < 0.3 and depth < 2:
            return Module(rng.choice(NAMES), self.parts(depth + 1, within_group))
        if depth == 1 and draw < 0.4 and not within_group:
            return self.group(depth)
        if depth > 0 and draw < 0.6:
            return self.leaf(rng.choice(LEAF_NAMES))
        return Module(rng.choice(NAMES), self.layer())

    def layer(self) -> tuple[Node, ...]:
        names = self.rng.sample(LEAF_NAMES, self.rng.choice((1, 2, 2)))
        parts: tuple[Node, ...] = tuple(map(self.leaf, names))
        if self.rng.random() < self.habits.statistics:
            features = self.dimension()
            parts += tuple(Leaf(name, (features,), "batch_stats") for name in ("mean", "var"))
        if self.rng.random() < self.habits.custom:
            kind = self.rng.choice(CUSTOM)
            parts += (Leaf(f"{kind}_table", (self.dimension(),), kind),)
        return parts

    def dimension(self) -> int:
        return self.size or self.rng.choice(SIZES)

    def leaf(self, name: str) -> Leaf:
        rank = (
            self.rng.choice((0, 1, 1, 2, 2, 2, 3))
            if name in ("step", "value")
            else self.rng.choice((1, 2, 2, 3))
        )
        dtype = "float32"
        if self.rng.random() < self.habits.odd_dtypes:
            dtype = self.rng.choice(("bfloat16", "bfloat16", "int32", "int8"))
        return Leaf(name, tuple(self.dimension() for _ in range(rank)), dtype=np.dtype(_extended(dtype)))

    def group(self, depth: int) -> Group:
        rng = self.rng
        name = rng.choice(GROUP_NAMES)
        count = self.size if self.size and rng.random() < 0.5 else rng.choice((1, 2, 3, 4, 5, 11))
        parts = self.parts(depth + 1, within_group=True)
        lowest = min(len(leaf.shape) for _, leaf in leaves_of(parts))
        return Group(name, count, parts, *self.arrangements(name, count, lowest))

    def arrangements(self, name: str, count: int, lowest: int) -> tuple[Arrangement, Arrangement]:
        rng = self.rng
        axes = [0, 0, 0, -1, *([1] if lowest >= 1 else [])]
        ways: list[Way] = ["flat", "flat", "scan", "scan", "scan", "list"]
        if name == "layers" and count >= 4:
            ways += ["blocks", "blocks"]
        stored = Arrangement(rng.choice(ways), rng.choice(axes), rng.choice((2, 3)) if count >= 6 else 2)
        wanted = Arrangement(rng.choice(ways), rng.choice(axes), stored.block)
        if stored.way == wanted.way and stored.way in ("scan", "blocks"):
            # Another axis on the other side cannot be told from the same one where shapes agree.
            wanted = stored
        return _plain(stored), _plain(wanted)


def _clash(one: Node, other: Node) -> bool:
    """Tells whether two siblings' names could be read as one group in two ways."""
    numbered = all(isinstance(part, Module) and part.name != _base(part.name) for part in (one, other))
    return one.name == other.name if numbered else _base(one.name) == _base(other.name)


def _base(name: str) -> str:
    return name.rstrip("0123456789").rstrip("_") or name


def _plain(how: Arrangement) -> Arrangement:
    """Returns an arrangement without the numbers that say nothing of it."""
    if how.way in ("flat", "list"):
        return Arrangement(how.way)
    if how.way == "scan":
        return Arrangement("scan", how.axis)
    return how if how.axis == 0 else dataclasses.replace(how, axis=0)


def _extended(name: str) -> Any:
    import ml_dtypes

    return getattr(ml_dtypes, name, None) or np.dtype(name)
