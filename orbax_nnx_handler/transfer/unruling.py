"""Takes a Linen tree back to the names and shapes before the user's rules."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from orbax_nnx_handler.planning import recipes
from orbax_nnx_handler.planning.conversion import Written
from orbax_nnx_handler.planning.entries import model_entries
from orbax_nnx_handler.planning.errors import RuleError
from orbax_nnx_handler.planning.layouts.linen import MAXTEXT, TRAIN_STATE
from orbax_nnx_handler.planning.leaves import StoredLeaf
from orbax_nnx_handler.planning.linen_names import Nested, nest_named
from orbax_nnx_handler.planning.linen_tree import Flavour
from orbax_nnx_handler.planning.paths import Path, render
from orbax_nnx_handler.planning.recipes import (
    Read,
    Recipe,
    Scale,
    describe,
    parts_of,
    reads,
    render_reads,
    shape_of,
    substitute,
)
from orbax_nnx_handler.planning.rules import Rule
from orbax_nnx_handler.planning.rules.undoing import undo_rules

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
