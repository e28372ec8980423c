"""Modules whose parameters Linen and NNX arrange differently: recurrent cells and normalising wrappers.

Most modules keep their parameters' names from Linen to NNX. A few do not:
recurrent cells fuse their gates into two layers, and the normalising wrappers
store their statistics under other names. Each rule here recognises one such
module by the stored names alone and says how NNX's parameters come out of it.
The results are candidates: the mapping asks for one only where a wanted path
has no stored path of the same name.

Linen names a wrapper's value after the layer and the weight that it belongs to, in one key
with slashes: `layer_instance/kernel/scale`, where the wrapper owns the layer. NNX
keeps a dict whose keys are the weights' paths. `in_linen_wrappers` leads from there to Linen.

A save goes the way back, from NNX's fused weights to the gates that Linen stores one by one: the last part.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from itertools import takewhile
from typing import Any, Literal, Protocol, TypeVar, cast

from orbax_nnx_handler.planning.core.folding import list_paths
from orbax_nnx_handler.planning.core.leaves import GRU_GATES, LSTM_GATES, Shape, StoredLeaf
from orbax_nnx_handler.planning.core.paths import Path, Tokens, canonical, is_number, segments
from orbax_nnx_handler.planning.core.recipes import Concat, Fill, Read, Recipe, Slice

Model = Mapping[Tokens, StoredLeaf]
"""The stored leaves of a model by canonical path, collections joined."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Derived:
    """A wanted path that the stored leaves can give under another arrangement.

    Attributes:
        path: The canonical path that NNX calls it, from the model's root.
        recipe: How it comes out of the stored leaves.
        reason: The rule in a few words, for reports.
    """

    path: Tokens
    recipe: Recipe
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class WithoutVariable:
    """A stored leaf that NNX's module has no variable for.

    It may be dropped only when all its values are zero, where it changes no
    output; the reader of the values checks that.

    Attributes:
        leaf: The leaf.
        reason: Why NNX has no variable for it.
        shape: The shape that it has in such a module; None where nothing tells.
        fused: The stored leaves beside it that such a module fuses; where no wanted leaf holds them all, the
            target has a module of another kind.
    """

    leaf: StoredLeaf
    reason: str
    shape: Shape | None = None
    fused: frozenset[Path] = frozenset()


def derive(model: Model) -> tuple[list[Derived], list[WithoutVariable]]:
    """Returns what NNX's own arrangement of the stored modules holds."""
    cells = _cells(model)
    derived = [*_fused_gates(cells), *_simple_cells(cells), *_normalising_wrappers(model)]
    return derived, list(_gru_bias(cells))


# A cell by the weights of its gates: ("ii", "kernel") -> leaf.
_Gates = dict[tuple[str, str], StoredLeaf]

_FUSED = (("LSTMCell gates fused", LSTM_GATES), ("GRUCell gates fused", GRU_GATES))


def _cells(model: Model) -> dict[Tokens, _Gates]:
    """Groups the leaves that may be gate weights by the module they belong to."""
    cells: dict[Tokens, _Gates] = defaultdict(dict)
    for path, leaf in model.items():
        if len(path) >= 2 and path[-2][:1] in ("i", "h") and len(path[-2]) <= 2:
            cells[path[:-2]][path[-2], path[-1]] = leaf
    return cells


def _fused_gates(cells: Mapping[Tokens, _Gates]) -> Iterator[Derived]:
    for cell, gates in cells.items():
        for reason, letters in _FUSED:
            if not _has_kernels(gates, letters):
                continue
            for side in ("i", "h"):
                yield from _fused_side(cell, gates, [side + letter for letter in letters], reason)


def _fused_side(cell: Tokens, gates: _Gates, names: Sequence[str], reason: str) -> Iterator[Derived]:
    for weight in ("kernel", "bias"):
        parts = [gates[name, weight] for name in names if (name, weight) in gates]
        # NNX's cell cuts the product into equal parts.
        fits = len({part.shape for part in parts}) == 1 and all(part.shape for part in parts)
        if fits and len(parts) == len(names):
            axis = _features_axis(parts[0].shape, gates["h" + names[0][1], "kernel"].shape)
            recipe = Concat(tuple(Read(part.path) for part in parts), axis=axis)
            yield Derived(path=(*cell, f"dense_{names[0][0]}", weight), recipe=recipe, reason=reason)


def _features_axis(shape: Shape, hidden: Shape) -> int:
    """Returns the axis that counts a gate's features: the last one, but where layers are stacked behind it.

    Args:
        shape: Of one of the gate's weights.
        hidden: Of the kernel from features to features, which tells how many they are.
    """
    size = next((size for size in hidden if hidden.count(size) == 2), hidden[-1])
    return shape.index(size) if shape[-1] != size and shape.count(size) == 1 else len(shape) - 1


def _has_kernels(gates: _Gates, letters: str) -> bool:
    return all((side + letter, "kernel") in gates for side in ("i", "h") for letter in letters)


def _simple_cells(cells: Mapping[Tokens, _Gates]) -> Iterator[Derived]:
    for cell, gates in cells.items():
        if ("i", "kernel") in gates and ("h", "kernel") in gates:
            for (name, weight), leaf in gates.items():
                if name in ("i", "h"):
                    path = (*cell, f"dense_{name}", weight)
                    yield Derived(path=path, recipe=Read(leaf.path), reason="SimpleCell layers renamed")


def _gru_bias(cells: Mapping[Tokens, _Gates]) -> Iterator[WithoutVariable]:
    """Yields Linen's bias of the candidate gate, which nnx.GRUCell has not."""
    for gates in cells.values():
        bias = gates.get(("hn", "bias"))
        if bias is not None and ("hr", "bias") not in gates and _has_kernels(gates, GRU_GATES):
            beside = gates.get(("in", "bias"))
            shape = None if beside is None else beside.shape
            yield WithoutVariable(
                leaf=bias,
                reason="nnx.GRUCell has no bias in its recurrent layer",
                shape=shape,
                fused=frozenset(gates[f"h{gate}", "kernel"].path for gate in GRU_GATES),
            )


_STATISTICS = {"scale": "WeightNorm", "u": "SpectralNorm", "sigma": "SpectralNorm"}


def _normalising_wrappers(model: Model) -> Iterator[Derived]:
    """Moves the layer under its wrapper, and the wrapper's own values to NNX's names.

    Linen names the value after the layer, in one key (`Dense_1/kernel/scale`),
    and keeps the layer beside the wrapper, or inside when the wrapper owns it.
    """
    homes: dict[Tokens, dict[Tokens, None]] = defaultdict(dict)  # A set, in the order of the leaves.
    for path, leaf in model.items():
        found = _wrapped(model, path, leaf)
        if found is None:
            continue
        wrapper, layer, weight = found
        home = ("scales", *weight) if path[-1] == "scale" else ("batch_stats", *weight, path[-1])
        reason = f"{_STATISTICS[path[-1]]} statistics"
        yield Derived(path=(*wrapper, *home), recipe=Read(leaf.path), reason=reason)
        homes[layer][(*wrapper, "layer_instance")] = None
    yield from _moved_layers(model, homes)


def _wrapped(model: Model, path: Tokens, leaf: StoredLeaf) -> tuple[Tokens, Tokens, Tokens] | None:
    """Returns the wrapper, the layer, and the weight's path within the layer.

    A rename may have changed the names of wrapper and layer, so that they are
    found by where the layer's own weight is. It is absent where the weight has
    its home already (a layer inside its wrapper); then the key tells.
    """
    key = leaf.path[-1] if leaf.path else None
    if not isinstance(key, str) or key.count("/") < 2 or path[-1] not in _STATISTICS:
        return None
    weight = canonical((*key.split("/")[1:-1],))
    stem = path[: -1 - len(weight)]
    if path[len(stem) : -1] != weight:
        return None
    for cut in reversed(range(len(stem))):
        wrapper, name = stem[:cut], stem[cut:]
        for owner in (wrapper, _parent(wrapper)):
            if (*owner, *name, *weight) in model:
                return wrapper, (*owner, *name), weight
    name = canonical((key.split("/")[0],))
    wrapper = stem[: -len(name)]
    return (wrapper, stem, weight) if stem == (*wrapper, *name) else None


def _parent(module: Tokens) -> Tokens:
    return module[:-2] if module and is_number(module[-1]) else module[:-1]


def _moved_layers(model: Model, homes: Mapping[Tokens, Mapping[Tokens, None]]) -> Iterator[Derived]:
    if not homes:
        return
    for path, leaf in model.items():
        for depth in range(1, len(path)):
            for home in homes.get(path[:depth], ()):
                if home != path[:depth]:
                    reason = "layer inside its normalising wrapper"
                    yield Derived(path=(*home, *path[depth:]), recipe=Read(leaf.path), reason=reason)


_LAYER = "layer_instance"
_SCALES, _BATCH_STATS = "scales", "batch_stats"


def in_linen_wrappers(leaves: Mapping[Path, Any]) -> dict[Path, Path]:
    """Returns, for each value of a normalising wrapper, its path under Linen's key."""
    found = {path: _linen_key(path, leaves) for path in leaves}
    return {path: place for path, place in found.items() if place is not None}


def is_scale(path: Path) -> bool:
    """Tells a scale of `WeightNorm` by Linen's key: NNX keeps it in no Variable, Linen as a parameter."""
    return str(path[-1]).endswith("/scale")


def is_wrapper_value(path: Path) -> bool:
    """Tells a value of one of NNX's normalising wrappers by its path.

    `nnx.SpectralNorm` calls the dict of its statistics `batch_stats`, as Linen calls a
    collection (flax/nnx/nn/normalization.py); each key in it is a tuple, the weight's path.
    """
    return len(path) >= 2 and isinstance(path[-1], tuple) and path[-2] in (_SCALES, _BATCH_STATS)


def _linen_key(path: Path, leaves: Mapping[Path, Any]) -> Path | None:
    if not is_wrapper_value(path):
        return None
    wrapper, home, keys = path[:-2], path[-2], cast(Path, path[-1])
    weight, name = (keys, "scale") if home == _SCALES else (keys[:-1], str(keys[-1]))
    if (*wrapper, _LAYER, *weight) not in leaves:
        return None
    return (*wrapper, "/".join(map(str, (_LAYER, *weight, name))))


def layers_inside(paths: Iterable[Path]) -> str:
    """Returns what to know of wrappers that are written with their layer inside; empty for none.

    NNX has one form of a wrapper, Linen has two, and nothing in the NNX model tells which one
    the Linen program is: under `@nn.compact` the layer belongs to the module around.

    Args:
        paths: The paths of a tree in Linen's form, collections included.
    """
    found = {path[1:-1]: None for path in paths if str(path[-1]).startswith(f"{_LAYER}/")}
    if not found:
        return ""
    named = list_paths(list(found))
    return (
        f"normalising wrappers are written with their layer inside ({_LAYER}): {named}. Linen reads that "
        "where setup() makes the wrapper: self.norm = nn.WeightNorm(nn.Dense(4)). Under @nn.compact the "
        "layer is kept beside the wrapper (Dense_0), and that program does not find these values."
    )


# The way back.


class _Saved(Protocol):
    """A leaf of a tree to be stored."""

    @property
    def recipe(self) -> Recipe: ...
    @property
    def shape(self) -> Shape: ...
    def through(self, recipe: Recipe, shape: Shape) -> Any:
        """Returns what a recipe makes of it."""
        ...


_Splits = TypeVar("_Splits", bound=_Saved)
_Cell = Literal["LSTM", "GRU", "simple"]
_GATES: Mapping[_Cell, tuple[str, ...]] = {"LSTM": (*LSTM_GATES,), "GRU": (*GRU_GATES,), "simple": ("",)}
_WEIGHTS: Mapping[_Cell, tuple[set[str], set[str]]] = {
    "LSTM": ({"kernel"}, {"kernel", "bias"}),
    "GRU": ({"kernel", "bias"}, {"kernel"}),
    "simple": ({"kernel", "bias"}, {"kernel"}),
}
_Shapes = Mapping[str, Shape]
_LAYERS = ("dense_i", "dense_h")
_IN_LAYERS, _IN_CELLS = tuple((layer,) for layer in _LAYERS), frozenset(_LAYERS)
Cells = Mapping[Path, _Cell]
"""The modules that hold a cell of Flax's, or the moments of one."""


def cells_of(leaves: Mapping[Path, _Splits], moments: Set[Path] = frozenset()) -> Cells:
    """Returns the modules that hold NNX's fused cells.

    Only names and shapes tell a cell: `dense_i` and `dense_h` side by side, four, three or one
    hidden widths wide. What an optimizer keeps of a part of a cell (`optax.multi_transform`) has
    its parameter's name.

    Args:
        leaves: The leaves by stored path.
        moments: The stored paths of optimizer states, also where they hold nothing.
    """
    layers: dict[Path, dict[str, Shape]] = defaultdict(dict)
    for path, leaf in leaves.items():
        for depth, key in enumerate(path[:-1] if not _IN_CELLS.isdisjoint(path) else ()):
            if key in _LAYERS:
                # A deeper leaf has no weight's name here, so its layer is none of a cell's.
                layers[path[: depth + 1]]["/".join(map(str, path[depth + 1 :]))] = leaf.shape
    found: dict[Path, _Cell | None] = {path[:-1]: _cell(path[:-1], layers) for path in layers}
    if not any(found.values()):
        return {}
    taken = {path[:depth] for path in leaves for depth in range(1, len(path) + 1)}
    # A module that has a gate beside its fused layers is no cell of Flax's.
    cells: dict[Path, _Cell] = {
        at: cell
        for at, cell in found.items()
        if cell and not any((*at, name) in taken for name in _names(cell))
    }
    of_moments = {path[:-2] for path in moments if len(path) > 1 and path[-2] in _LAYERS}
    whole: dict[Path, _Cell] = {at: cell for at, cell in cells.items() if at not in of_moments}
    for at in of_moments - cells.keys():
        cell = _cell_of_parameter(at, whole, layers)
        cells |= {at: cell} if cell else {}
    return cells


def without_aside(cells: Cells, moments: Set[Path], aside: Set[Path]) -> Cells:
    """Returns the cells without moments of what is kept aside, under its own names, gates not apart."""
    kept = {path[:-2] for path in aside if path[-2:-1] in _IN_LAYERS}
    if not kept or not cells:
        return cells  # Nearly every item.
    inside = {path[:-2] for path in moments}
    own = [at for at in cells if at not in inside]

    def name(at: Path) -> tuple[str, ...]:
        # MaxText's level lies within a moment's.
        return tuple(key for key in segments(at) if key != "params")

    def shared(at: Path, others: Iterable[Path]) -> int:
        ends = (zip(reversed(name(at)), reversed(name(other)), strict=False) for other in others)
        return max((len([*takewhile(lambda keys: keys[0] == keys[1], end)]) for end in ends), default=0)

    return {at: cell for at, cell in cells.items() if at not in inside or shared(at, own) >= shared(at, kept)}


def with_gates(leaves: Mapping[Path, _Splits], cells: Cells) -> dict[Path, _Splits]:
    """Returns the leaves with NNX's fused cells as Linen's gates.

    The opposite of what `derive` does. A moment is split as its parameter
    is. The bias of a `GRUCell` that NNX does not have becomes zeros: its value before any training, and the
    only one under which both programs agree.
    """
    if not cells:
        return dict(leaves)
    written: dict[Path, _Splits] = {}
    for path, leaf in leaves.items():
        cell = cells.get(path[:-2]) if path[-2:-1] in _IN_LAYERS else None
        written |= {path: leaf} if cell is None else _gates(cell, path, leaf)
    return written


def with_empty_gates(empty: Mapping[Path, Any], cells: Cells) -> dict[Path, Any]:
    """Returns the nodes that hold nothing, those of a cell's layers as those of its gates."""
    written: dict[Path, Any] = {}
    for path, value in empty.items():
        cell = cells.get(path[:-2]) if path[-2:-1] in _IN_LAYERS else None
        if cell is None:
            written[path] = value
            continue
        side = str(path[-2]).removeprefix("dense_")
        names = [side + gate for gate in _GATES[cell]]
        names += ["hn"] if cell == "GRU" and (side, path[-1]) == ("i", "bias") else []
        written |= {(*path[:-2], name, path[-1]): value for name in names}
    return written


def _cell_of_parameter(
    moment: Path, cells: Mapping[Path, _Cell], layers: Mapping[Path, _Shapes]
) -> _Cell | None:
    """Returns the cell whose name and shapes the moments of a part of it have; None for none, or several."""
    alike: set[_Cell] = {
        cell
        for at, cell in cells.items()
        if _ends_in_name(moment, at)
        and all(
            layers.get((*moment, side), {}).items() <= layers.get((*at, side), {}).items() for side in _LAYERS
        )
    }
    return alike.pop() if len(alike) == 1 else None


def _ends_in_name(moment: Path, parameter: Path) -> bool:
    """Tells whether a path ends in a parameter's, its collection and what is above that left out."""
    depths = range(1, len(parameter))
    return any(
        parameter[at - 1] == "params" and moment[-len(parameter) + at :] == parameter[at:] for at in depths
    )


def _cell(module: Path, layers: Mapping[Path, _Shapes]) -> _Cell | None:
    inputs, hidden = layers.get((*module, "dense_i"), {}), layers.get((*module, "dense_h"), {})
    kernels = inputs.get("kernel", ()), hidden.get("kernel", ())
    if min(map(len, kernels)) < 2 or kernels[0][-1] != kernels[1][-1]:
        return None
    for cell, weights in _WEIGHTS.items():
        if (set(inputs), set(hidden)) == weights and kernels[1][-1] == len(_GATES[cell]) * kernels[1][-2]:
            return cell
    return None


def _names(cell: _Cell) -> list[str]:
    return [side + gate for side in "ih" for gate in _GATES[cell]]


def _gates(cell: _Cell, path: Path, leaf: _Splits) -> dict[Path, _Splits]:
    module, layer, weight = path[:-2], str(path[-2]), path[-1]
    side, axis = layer.removeprefix("dense_"), len(leaf.shape) - 1
    width = leaf.shape[-1] // len(_GATES[cell])
    found: dict[Path, _Splits] = {}
    for at, gate in enumerate(_GATES[cell]):
        recipe = Slice(leaf.recipe, axis=axis, start=at * width, size=width)
        found[(*module, side + gate, weight)] = leaf.through(recipe, (*leaf.shape[:-1], width))
    if cell == "GRU" and (side, weight) == ("i", "bias"):
        shape = (*leaf.shape[:-1], width)
        found[(*module, "hn", "bias")] = leaf.through(Fill(shape), shape)
    return found
