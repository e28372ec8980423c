"""What a save writes, leaf by leaf: where, under which name of an array, and what of the item."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Set
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np

from orbax_nnx_handler.planning.core.errors import RestoreError
from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.paths import Path, printable, segments
from orbax_nnx_handler.planning.core.recipes import Fill, Read, Recipe, Slice, reads
from orbax_nnx_handler.planning.mapping.cells_and_wrappers import GRU_GATES, LSTM_GATES
from orbax_nnx_handler.storage.arithmetic import evaluate
from orbax_nnx_handler.storage.checkpoint.trees import array_name, leads_out
from orbax_nnx_handler.storage.saving.item import ItemLeaf
from orbax_nnx_handler.storage.stores.locations import MISREAD, is_misread


@dataclasses.dataclass(frozen=True, kw_only=True)
class SavedLeaf:
    """One leaf of a tree to be stored.

    Attributes:
        recipe: How it is made, over paths of the item; a `Fill` is zeros.
        shape: Its shape.
        dtype: Its dtype.
        like: The leaf of the item whose devices and save args it takes.
    """

    recipe: Recipe
    shape: Shape
    dtype: Any
    like: Path

    @classmethod
    def of(cls, leaf: ItemLeaf) -> "SavedLeaf":
        """Returns a leaf of the item as it is."""
        value = leaf.value if hasattr(leaf.value, "dtype") else np.asarray(leaf.value)
        return cls(recipe=Read(leaf.path), shape=tuple(value.shape), dtype=value.dtype, like=leaf.path)

    def through(self, recipe: Recipe, shape: Shape) -> "SavedLeaf":
        """Returns what a recipe makes of it."""
        return dataclasses.replace(self, recipe=recipe, shape=shape)

    @property
    def sources(self) -> tuple[Path, ...]:
        """The leaves of the item that it is made from."""
        return tuple(dict.fromkeys(reads(self.recipe)))

    def value(self, values: Mapping[Path, Any]) -> Any:
        """Returns what is stored: the item's own array where nothing changes.

        Args:
            values: The item's values by path: arrays, numbers, or `jax.ShapeDtypeStruct`s.
        """
        like = values[self.like]
        if isinstance(self.recipe, Read) and getattr(like, "dtype", self.dtype) == self.dtype:
            return like
        if _is_abstract(like) or any(_is_abstract(values[path]) for path in self.sources):
            return jax.ShapeDtypeStruct(self.shape, self.dtype)
        if isinstance(self.recipe, Fill):
            return _zeros(self.shape, self.dtype, like)
        return evaluate(self.recipe, values, self.dtype)


def _is_abstract(value: Any) -> bool:
    return isinstance(value, jax.ShapeDtypeStruct)


def _zeros(shape: Shape, dtype: Any, like: Any) -> Any:
    if not isinstance(like, jax.Array):
        return np.zeros(shape, dtype)

    def zeros(_: Any) -> jax.Array:
        return jnp.zeros(shape, dtype)

    # Under jit with the other as an argument, so that it is on the same devices of every process.
    return cast(jax.Array, jax.jit(zeros, keep_unused=True)(like))


_Cell = Literal["LSTM", "GRU", "simple"]

_GATES: Mapping[_Cell, tuple[str, ...]] = {"LSTM": (*LSTM_GATES,), "GRU": (*GRU_GATES,), "simple": ("",)}
_WEIGHTS: Mapping[_Cell, tuple[set[str], set[str]]] = {
    "LSTM": ({"kernel"}, {"kernel", "bias"}),
    "GRU": ({"kernel", "bias"}, {"kernel"}),
    "simple": ({"kernel", "bias"}, {"kernel"}),
}

_Shapes = Mapping[str, Shape]
_LAYERS = ("dense_i", "dense_h")
_IN_LAYERS = tuple((layer,) for layer in _LAYERS)


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
        for depth, key in enumerate(path[:-1]):
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


def with_gates(leaves: Mapping[Path, SavedLeaf], cells: Cells) -> dict[Path, SavedLeaf]:
    """Returns the leaves with NNX's fused cells as Linen's gates.

    The opposite of the rules in `planning.mapping.cells_and_wrappers`. A moment is split as its parameter is. The
    bias of a `GRUCell` that NNX does not have becomes zeros: its value before any training, and the
    only one under which both programs agree.
    """
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


_LOCK, _LONGEST = ".__lock", 255
_RENAME = "call one of the two otherwise, or save them as items of their own."


def check_names(paths: Iterable[Path]) -> None:
    """Raises where arrays would have one name on disk, or a name that no reader takes.

    Args:
        paths: The stored path of each array.

    Raises:
        RestoreError: Names both paths, and the name.
    """
    known: dict[str, Path] = {}
    for path in paths:
        name = array_name(path)
        if leads_out(name):
            raise RestoreError(
                f"{_keys(path)} cannot be stored: its array would be called {name!r}, which is no name "
                "inside a checkpoint.",
                paths=[path],
                hints=["no part of a key between slashes may be empty, '.' or '..': call it otherwise."],
            )
        other = known.setdefault(name, path)
        if other is not path:
            raise _both_at(repr(name), other, path, "Orbax joins the keys of a path by dots.")


def check_folders(paths: Iterable[Path]) -> None:
    """Raises where an array could not have a directory of its own, under its name.

    Raises:
        RestoreError: Names the path.
    """
    for path in paths:
        name = array_name(path)
        reason = MISREAD if is_misread(name) else ""
        if any(part.endswith(_LOCK) for part in name.split("/")):
            reason = f"TensorStore keeps names that end in '{_LOCK}' for itself"
        if any(len(part.encode(errors="replace")) > _LONGEST for part in name.split("/")):
            reason = f"a directory's name has at most {_LONGEST} bytes"
        if reason:
            raise RestoreError(
                f"{_keys(path)} cannot be stored in a directory of its own: {reason}.",
                paths=[path],
                hints=["save with use_ocdbt=True: the database keeps such names. Or call it otherwise."],
            )


def check_spellings(paths: Iterable[Path]) -> None:
    """Raises where two paths are spelled alike, so that no rule and no restore could tell them apart.

    Raises:
        RestoreError: Names both paths.
    """
    known: dict[tuple[str, ...], Path] = {}
    for path in paths:
        other = known.setdefault(segments(path), path)
        if other is not path:
            why = "a key with a slash is spelled as two keys are, and no restore could tell them apart."
            raise _both_at("/".join(segments(path)), other, path, why)


def _both_at(place: str, one: Path, other: Path, why: str) -> RestoreError:
    return RestoreError(
        f"{_keys(one)} and {_keys(other)} would both be stored at {place}: {why}",
        paths=[one, other],
        hints=[_RENAME],
    )


def _keys(path: Path) -> str:
    return printable(repr(tuple(map(str, path))))
