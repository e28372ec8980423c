"""Recurrent cells as Linen stores them: each gate's weights apart.

The opposite of the rules in `planning.mapping.modules`. Only names and shapes tell a
cell: `dense_i` and `dense_h` side by side, four, three or one hidden widths wide.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Literal

from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.core.recipes import Fill, Slice
from orbax_nnx_handler.planning.mapping.modules import GRU_GATES, LSTM_GATES
from orbax_nnx_handler.storage.saving.saved import SavedLeaf

_Cell = Literal["LSTM", "GRU", "simple"]

_GATES: Mapping[_Cell, tuple[str, ...]] = {"LSTM": (*LSTM_GATES,), "GRU": (*GRU_GATES,), "simple": ("",)}
_WEIGHTS: Mapping[_Cell, tuple[set[str], set[str]]] = {
    "LSTM": ({"kernel"}, {"kernel", "bias"}),
    "GRU": ({"kernel", "bias"}, {"kernel"}),
    "simple": ({"kernel", "bias"}, {"kernel"}),
}

_Shapes = Mapping[str, Shape]


def with_gates(leaves: Mapping[Path, SavedLeaf]) -> dict[Path, SavedLeaf]:
    """Returns the leaves with NNX's fused cells as Linen's gates.

    A moment is split as its parameter is. The bias of a `GRUCell` that NNX does
    not have becomes zeros: its value before any training, and the only one under
    which both programs agree.
    """
    layers: dict[Path, dict[str, Shape]] = defaultdict(dict)
    for path, leaf in leaves.items():
        for depth, key in enumerate(path[:-1]):
            if key in ("dense_i", "dense_h"):
                # A deeper leaf has no weight's name here, so its layer is none of a cell's.
                layers[path[: depth + 1]]["/".join(map(str, path[depth + 1 :]))] = leaf.shape
    found: dict[Path, _Cell | None] = {path[:-1]: _cell(path[:-1], layers) for path in layers}
    if not any(found.values()):
        return dict(leaves)
    taken = {path[:depth] for path in leaves for depth in range(1, len(path) + 1)}
    # A module that has a gate beside its fused layers is no cell of Flax's.
    cells: dict[Path, _Cell] = {
        at: cell
        for at, cell in found.items()
        if cell and not any((*at, name) in taken for name in _names(cell))
    }
    written: dict[Path, SavedLeaf] = {}
    for path, leaf in leaves.items():
        cell = cells.get(path[:-2]) if path[-2:-1] in (("dense_i",), ("dense_h",)) else None
        written |= {path: leaf} if cell is None else _gates(cell, path, leaf)
    return written


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
