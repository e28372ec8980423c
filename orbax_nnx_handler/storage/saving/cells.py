"""Cells of recurrent modules: NNX's fused weights as the gates that Linen stores one by one.

The way back of `planning/mapping/cells_and_wrappers.py`: a new cell goes into both.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Set
from typing import Any, Literal

from orbax_nnx_handler.planning.core.leaves import GRU_GATES, LSTM_GATES, Shape
from orbax_nnx_handler.planning.core.paths import Path, segments
from orbax_nnx_handler.planning.core.recipes import Fill, Slice
from orbax_nnx_handler.planning.verdict.elements import common_end
from orbax_nnx_handler.storage.saving.saved import SavedLeaf

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


def cells_of(leaves: Mapping[Path, SavedLeaf], moments: Set[Path] = frozenset()) -> Cells:
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
        return max((common_end(name(at), name(other)) for other in others), default=0)

    return {at: cell for at, cell in cells.items() if at not in inside or shared(at, own) >= shared(at, kept)}


def with_gates(leaves: Mapping[Path, SavedLeaf], cells: Cells) -> dict[Path, SavedLeaf]:
    """Returns the leaves with NNX's fused cells as Linen's gates.

    The opposite of the rules in `planning.mapping.cells_and_wrappers`. A moment is split as its parameter
    is. The bias of a `GRUCell` that NNX does not have becomes zeros: its value before any training, and the
    only one under which both programs agree.
    """
    if not cells:
        return dict(leaves)
    written: dict[Path, SavedLeaf] = {}
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


def _gates(cell: _Cell, path: Path, leaf: SavedLeaf) -> dict[Path, SavedLeaf]:
    module, layer, weight = path[:-2], str(path[-2]), path[-1]
    side, axis = layer.removeprefix("dense_"), len(leaf.shape) - 1
    width = leaf.shape[-1] // len(_GATES[cell])
    found: dict[Path, SavedLeaf] = {}
    for at, gate in enumerate(_GATES[cell]):
        recipe = Slice(leaf.recipe, axis=axis, start=at * width, size=width)
        found[(*module, side + gate, weight)] = leaf.through(recipe, (*leaf.shape[:-1], width))
    if cell == "GRU" and (side, weight) == ("i", "bias"):
        shape = (*leaf.shape[:-1], width)
        found[(*module, "hn", "bias")] = leaf.through(Fill(shape), shape)
    return found
