"""What NNX and JAX containers hold, by path."""

from collections.abc import Hashable
from typing import Any, cast

import jax
from flax import nnx

from orbax_nnx_handler.planning.core.paths import Path

Leaves = dict[Path, Any]


def holds_nnx(item: Any) -> bool:
    """Tells whether any part of an item is an NNX object."""
    return any(_is_nnx(part) for part in _outermost(item))


def is_graph(item: Any) -> bool:
    """Tells whether any part of an item is an NNX module rather than a state."""
    return any(isinstance(part, nnx.Pytree | nnx.Module) for part in _outermost(item))


def flatten(tree: Any) -> Leaves:
    """Returns the leaves of a pytree by path; an `nnx.Variable` is a leaf."""
    pairs = cast(list[tuple[Path, Any]], jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_variable)[0])
    return {tuple(_key(entry) for entry in path): leaf for path, leaf in pairs}


def children(node: Any) -> list[tuple[Hashable, Any]] | None:
    """Returns the direct children of a pytree node by key; None for a leaf."""
    if _is_variable(node):
        return None
    if node is None:
        return []

    def is_child(part: Any) -> bool:
        return part is not node

    pairs = cast(list[tuple[Path, Any]], jax.tree_util.tree_flatten_with_path(node, is_leaf=is_child)[0])
    if any(len(path) != 1 for path, _ in pairs):
        return None
    return [(_key(path[0]), child) for path, child in pairs]


_NNX = (nnx.State, nnx.Pytree, nnx.Module, nnx.Variable)


def _outermost(item: Any) -> list[Any]:
    return jax.tree.leaves(item, is_leaf=_is_nnx)


def _is_nnx(node: Any) -> bool:
    return isinstance(node, _NNX)


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _key(entry: Any) -> Hashable:
    for name in ("key", "idx", "name"):
        if hasattr(entry, name):
            return cast(Hashable, getattr(entry, name))
    return str(entry)
