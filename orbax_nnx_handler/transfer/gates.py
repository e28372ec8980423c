"""Recurrent cells as Linen stores them: each gate's weights apart.

The opposite of the rules in `planning.structures`. Only names and shapes tell a
cell: `dense_i` and `dense_h` side by side, four, three or one hidden widths wide.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp

from orbax_nnx_handler.planning.conversion import Written
from orbax_nnx_handler.planning.leaves import Shape
from orbax_nnx_handler.planning.linen_names import Nested
from orbax_nnx_handler.planning.recipes import Slice
from orbax_nnx_handler.planning.structures import GRU_GATES, LSTM_GATES

Cell = Literal["LSTM", "GRU", "simple"]

_GATES: Mapping[Cell, str] = {"LSTM": LSTM_GATES, "GRU": GRU_GATES}
_WEIGHTS: Mapping[Cell, tuple[set[str], set[str]]] = {
    "LSTM": ({"kernel"}, {"kernel", "bias"}),
    "GRU": ({"kernel", "bias"}, {"kernel"}),
    "simple": ({"kernel", "bias"}, {"kernel"}),
}
_WIDTHS: Mapping[Cell, int] = {"LSTM": 4, "GRU": 3, "simple": 1}


def with_gates(tree: Nested, like: Nested | None = None) -> Nested:
    """Returns a tree with NNX's fused cells as Linen's gates.

    A moment is split as its parameter is. The bias of a `GRUCell` that NNX does
    not have becomes zeros: its value before any training, and the only one under
    which both programs agree.

    Args:
        tree: Nested dicts and lists, modules under their Linen names; its values are
            arrays, abstract arrays, leaves of a conversion, or save args.
        like: The tree whose shapes tell the cells, where the values of `tree` have
            none (save args); the same containers.
    """
    return cast(Nested, _rewritten(tree, tree if like is None else like))


def _rewritten(node: Any, like: Any) -> Any:
    if isinstance(node, list):
        return [_rewritten(part, shape) for part, shape in zip(cast(list[Any], node), like, strict=True)]
    if not isinstance(node, dict):
        return node
    module = cast(Nested, node)
    cell = _cell_of(cast(Nested, like))
    rest = {name: part for name, part in module.items() if cell is None or not name.startswith("dense_")}
    written = {name: _rewritten(part, like[name]) for name, part in rest.items()}
    return written if cell is None else written | _gates(cell, module, cast(Nested, like))


def _cell_of(module: Nested) -> Cell | None:
    parts = module.get("dense_i"), module.get("dense_h")
    if not all(isinstance(part, dict) for part in parts):
        return None
    inputs, hidden = cast(tuple[Nested, Nested], parts)
    kernels = _shape(inputs.get("kernel")), _shape(hidden.get("kernel"))
    if min(map(len, kernels)) < 2 or kernels[0][-1] != kernels[1][-1]:
        return None
    for cell, (input_weights, hidden_weights) in _WEIGHTS.items():
        named = set(inputs) == input_weights and set(hidden) == hidden_weights
        if named and kernels[1][-1] == _WIDTHS[cell] * kernels[1][-2]:
            return cell
    return None


def _shape(value: Any) -> Shape:
    return cast(Shape, getattr(value, "shape", ()))


def _gates(cell: Cell, module: Nested, like: Nested) -> Nested:
    written: Nested = {}
    for side in ("i", "h"):
        for weight, value in cast(Nested, module[f"dense_{side}"]).items():
            width = _shape(like[f"dense_{side}"][weight])[-1] // _WIDTHS[cell]
            for at, gate in enumerate(_GATES.get(cell, ("",))):
                written.setdefault(side + gate, {})[weight] = _part(value, at * width, width)
    if cell == "GRU":
        written["hn"]["bias"] = _zeros_like(written["in"]["bias"])
    return written


def _part(value: Any, start: int, size: int) -> Any:
    """Returns a part of the last axis; what is no array (save args) holds for each part."""
    if isinstance(value, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((*value.shape[:-1], size), value.dtype)
    if isinstance(value, Written):
        recipe = Slice(value.recipe, axis=len(value.shape) - 1, start=start, size=size)
        return dataclasses.replace(value, recipe=recipe, shape=(*value.shape[:-1], size))
    return value[..., start : start + size] if _shape(value) else value


def _zeros_like(value: Any) -> Any:
    if isinstance(value, jax.ShapeDtypeStruct) or not _shape(value):
        return value
    return jnp.zeros(value.shape, value.dtype) if isinstance(value, Written) else jnp.zeros_like(value)
