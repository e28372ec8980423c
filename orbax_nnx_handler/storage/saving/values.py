"""Recurrent cells as Linen stores them: each gate's weights apart.

The opposite of the rules in `planning.structures`. Only names and shapes tell a
cell: `dense_i` and `dense_h` side by side, four, three or one hidden widths wide.

Takes a Linen tree back to the names and shapes before the user's rules.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np

from orbax_nnx_handler.planning.core import recipes
from orbax_nnx_handler.planning.core.containers import Nested, nest_named
from orbax_nnx_handler.planning.core.errors import RuleError
from orbax_nnx_handler.planning.core.leaves import Shape, StoredLeaf
from orbax_nnx_handler.planning.core.paths import Path, render
from orbax_nnx_handler.planning.core.recipes import (
    Read,
    Recipe,
    Scale,
    Slice,
    describe,
    parts_of,
    reads,
    render_reads,
    shape_of,
    substitute,
)
from orbax_nnx_handler.planning.layouts.linen import MAXTEXT, TRAIN_STATE
from orbax_nnx_handler.planning.mapping.modules import GRU_GATES, LSTM_GATES
from orbax_nnx_handler.planning.rules import Rule
from orbax_nnx_handler.planning.rules.entries import model_entries
from orbax_nnx_handler.planning.rules.undo import undo_rules
from orbax_nnx_handler.storage.saving.linen_tree import Flavour
from orbax_nnx_handler.storage.saving.written import Written

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


Values = Mapping[Path, Any]


def without_rules(
    tree: Nested, rules: Sequence[Rule], flavour: Flavour, like: Nested | None = None
) -> Nested:
    """Returns a Linen tree as it must be stored for the rules to restore it.

    Args:
        tree: The tree as it would be stored without rules.
        rules: The rules of the restore.
        flavour: The tree's layout.
        like: Where the tree is one of save args, the tree that they are for.

    Raises:
        RuleError: A rule cannot be undone, or a moment cannot follow its parameter.
    """
    if not rules:
        return tree
    shown = tree if like is None else like
    stored = {path: _described(path, value) for path, value in _outside_optimizer(shown).items()}
    layout = MAXTEXT if flavour == "maxtext" else TRAIN_STATE
    entries = model_entries(layout.place(stored))
    ways = undo_rules(entries, rules)
    touched = {entry.sources[0] for entry in entries}
    values = _outside_optimizer(tree)
    model = {path: _combined(recipe, values) for path, recipe in ways.items()}
    kept = {path: value for path, value in values.items() if path not in touched}
    saved = _nested(model | kept)
    if "opt_state" in tree:
        depth = 2 if flavour == "maxtext" else 1
        shapes = {path: leaf.shape for path, leaf in stored.items()}
        saved["opt_state"] = _Moments(ways, shapes, depth).rewritten(tree["opt_state"], shown["opt_state"])
    return saved


class _Moments:
    """Rewrites every subtree of an optimizer's state that mirrors the parameters."""

    def __init__(self, ways: Mapping[Path, Recipe], shapes: Mapping[Path, tuple[int, ...]], depth: int):
        heads = {path[:depth] for path in shapes if path[:depth] == ("params",) * depth}
        self._head: Path = next(iter(heads), ())
        self._ways = {path: way for path, way in ways.items() if path[:depth] == self._head}
        self._shapes = {path: shape for path, shape in shapes.items() if path[:depth] == self._head}

    def rewritten(self, node: Any, like: Any) -> Any:
        """Returns a part of the state with its moments under the stored names."""
        if isinstance(node, dict):
            part = cast(Nested, node)
            moments = _leaves(part)
            if moments and all((*self._head, *path) in self._shapes for path in moments):
                return self._moved(moments, _leaves(like))
            return {key: self.rewritten(child, like[key]) for key, child in part.items()}
        if isinstance(node, tuple | list):
            parts = [self.rewritten(a, b) for a, b in zip(cast(list[Any], node), like, strict=True)]
            kind = cast(Any, type(cast(Any, node)))
            return kind(*parts) if hasattr(kind, "_fields") else kind(parts)
        return node

    def _moved(self, moments: Values, like: Values) -> Nested:
        depth = len(self._head)
        values = {(*self._head, *path): value for path, value in moments.items()}
        shown = {(*self._head, *path): value for path, value in like.items()}
        found: dict[Path, Any] = {}
        for path, way in self._ways.items():
            sources = list(dict.fromkeys(reads(way)))
            if not any(source in values for source in sources):
                continue
            self._check(way, shown)
            found[path[depth:]] = _combined(way, values)
        return _nested(found)

    def _check(self, way: Recipe, shown: Values) -> None:
        if isinstance(way, Read):
            return
        pairs = [(getattr(shown.get(path), "shape", None), self._shapes[path]) for path in reads(way)]
        unlike = next((pair for pair in pairs if pair[0] != pair[1]), None)
        scaled = any(isinstance(part, Scale) for part in parts_of(way))
        if scaled:
            why = "its parameter is scaled"
        elif unlike:
            why = _unlike(*unlike)
        else:
            return
        raise RuleError(
            f"a moment of {render_reads(way)} cannot be saved under these rules ({describe(way)}): {why}.\n"
            "hint: save the model without its optimizer, or without renames.",
            paths=list(reads(way)),
        )


def _unlike(moment: object, parameter: object) -> str:
    return f"its shape is {moment}, that of its parameter {parameter}; rules speak of the parameter's axes"


def _nested(values: Values) -> Nested:
    return nest_named((tuple(map(str, path)), value, path) for path, value in values.items())


def _outside_optimizer(tree: Nested) -> dict[Path, Any]:
    return {path: value for path, value in _leaves(tree).items() if path[0] != "opt_state"}


def _leaves(tree: Any, prefix: Path = ()) -> dict[Path, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    found: dict[Path, Any] = {}
    for key, child in cast(Nested, tree).items():
        found |= _leaves(child, (*prefix, key))
    return found


def _described(path: Path, value: Any) -> StoredLeaf:
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        value = np.asarray(value)
    return StoredLeaf(path=path, shape=tuple(value.shape), dtype=value.dtype)


def _combined(recipe: Recipe, values: Values) -> Any:
    """Returns a recipe's value; of values that are no arrays (save args), the first."""
    if isinstance(recipe, Read):
        return values[recipe.path]
    sources = {path: values[path] for path in reads(recipe)}
    if any(isinstance(value, Written) for value in sources.values()):
        return _composed(recipe, sources)
    if any(not hasattr(value, "dtype") for value in sources.values()):
        return next(iter(sources.values()))
    ordered = list(sources)

    def compute(*arrays: Any) -> Any:
        return _evaluate(recipe, dict(zip(ordered, arrays, strict=True)))

    if any(isinstance(value, jax.ShapeDtypeStruct) for value in sources.values()):
        return jax.eval_shape(compute, *sources.values())
    # Under jit, so that arrays on many devices and processes stay where they are.
    return cast(Any, jax.jit(compute)(*sources.values()))


def _composed(recipe: Recipe, sources: Values) -> Written:
    """Returns the leaf of a conversion that a recipe makes of others."""
    computed = [path for path, value in sources.items() if not isinstance(value, Written)]
    if computed:
        listed = ", ".join(map(render, computed))
        raise RuleError(
            f"{render_reads(recipe)} cannot be joined: {listed} is not in the checkpoint.", paths=computed
        )
    return dataclasses.replace(
        next(iter(sources.values())),
        recipe=substitute(recipe, lambda path: sources[path].recipe),
        shape=shape_of(recipe, {path: value.shape for path, value in sources.items()}),
    )


def _evaluate(recipe: Recipe, values: Values) -> Any:
    match recipe:
        case Read(path):
            return values[path]
        case recipes.Index(source, axis, index):
            return jnp.take(_evaluate(source, values), index, axis)
        case recipes.Slice(source, axis, start, size):
            return jax.lax.slice_in_dim(_evaluate(source, values), start, start + size, axis=axis)
        case recipes.Stack(sources, axis):
            return jnp.stack([_evaluate(source, values) for source in sources], axis)
        case recipes.Concat(sources, axis):
            return jnp.concatenate([_evaluate(source, values) for source in sources], axis)
        case recipes.Transpose(source, permutation):
            return jnp.transpose(_evaluate(source, values), permutation)
        case recipes.Reshape(source, shape):
            return jnp.reshape(_evaluate(source, values), shape)
        case recipes.Scale(source, factor):
            value = _evaluate(source, values)
            return value * jnp.asarray(factor, value.dtype)
        case recipes.Fill(shape):
            raise RuleError(f"a part of shape {render(shape)} is nowhere in the state")
