"""A tree in memory as a checkpoint: paths as Orbax would store them, shapes and dtypes from the leaves."""

from collections.abc import Hashable, Mapping
from typing import Any, cast

import jax
import numpy as np
from etils import epath
from flax import nnx
from jax.core import Tracer

from orbax_nnx_handler.planning.core.dtypes import is_array_dtype, is_key
from orbax_nnx_handler.planning.core.errors import NotACheckpointError
from orbax_nnx_handler.planning.core.leaves import StoredLeaf
from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.target.target import value_of
from orbax_nnx_handler.planning.verdict.outcomes import IN_MEMORY
from orbax_nnx_handler.storage.checkpoint.checkpoint import Checkpoint
from orbax_nnx_handler.storage.checkpoint.trees import STRING_TYPE, UNKNOWN_TYPE

_NUMBERS = (bool, int, float, complex, np.ndarray, np.generic)


def hold(variables: Any) -> Checkpoint:
    """Returns what there is to know of a tree in memory; no value is copied or looked at.

    Args:
        variables: Containers that JAX knows, with arrays, Python numbers, and strings and other
            values that nobody can want.

    Raises:
        NotACheckpointError: It has no leaf.
    """
    leaves = _leaves_of(variables)
    if not leaves:
        raise NotACheckpointError(
            f"{variables!r:.80} holds no leaf: from_linen takes a tree of arrays.",
            hints=["a checkpoint on disk is read by restore(path, target)."],
        )
    on_host = {path: np.asarray(leaf) for path, leaf in leaves.items() if isinstance(leaf, _NUMBERS)}
    foreign = {path: _values_of(value) for path, value in on_host.items() if not is_array_dtype(value.dtype)}
    # NumPy would hand over what lies under the mask.
    foreign |= {
        path: "a masked array: numpy.ma.filled makes an array of it"
        for path, leaf in leaves.items()
        if isinstance(leaf, np.ma.MaskedArray)
    }
    on_devices = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, jax.Array)}
    described = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, jax.ShapeDtypeStruct)}
    deleted = [path for path, leaf in on_devices.items() if _is_deleted(leaf)]
    arrays: dict[Path, Any] = {**on_host, **on_devices, **described}
    return Checkpoint(
        directory=epath.Path(IN_MEMORY),
        leaves={path: _stored(path, arrays.get(path)) for path in leaves if path not in foreign},
        lost={},
        foreign=foreign,
        without_values={
            **dict.fromkeys(described, "a jax.ShapeDtypeStruct"),
            **dict.fromkeys(deleted, "a deleted jax.Array"),
        },
        disk_format="memory",
        custom_metadata={},
        step_metadata={},
        values=on_host or None,
        on_devices=on_devices,
        nodes={path: UNKNOWN_TYPE if path in arrays else STRING_TYPE for path in leaves},
        arrays={},
        writes_fill=False,
    )


def _leaves_of(tree: Any) -> dict[Path, Any]:
    if isinstance(tree, str):
        return {}
    # Of a flat dict each value by itself: JAX cannot sort names that are tuples with numbers in them.
    flat = _flat_names(tree)
    parts = [((), tree)] if flat is None else [(flat[name], part) for name, part in tree.items()]
    return {
        (*above, *map(_key, path)): value_of(leaf)
        for above, part in parts
        for path, leaf in _with_paths(part)
        if above or path
    }


def _with_paths(tree: Any) -> list[tuple[tuple[Any, ...], Any]]:
    return cast(Any, jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_variable)[0])


def _flat_names(tree: Any) -> dict[Any, Path] | None:
    """Returns the path that each name of a flat dict stands for; None where a tree is no flat dict.

    It is what `flax.traverse_util.flatten_dict` makes, with tuples for names or with `sep="/"`: no value in
    it is a dict, which tells it from a tree that has slashes in its keys.
    """
    if not isinstance(tree, Mapping):
        return None
    named = cast("Mapping[Any, Any]", tree)
    names = [name for name, part in named.items() if not isinstance(part, Mapping)]
    if len(names) < len(named):
        return None
    if names and all(type(name) is tuple and name != () for name in names):
        return {name: tuple([str(key) for key in name]) for name in names}
    if all(isinstance(name, str) for name in names) and any("/" in name for name in names):
        return {name: tuple(name.split("/")) for name in names}
    return None


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _key(entry: Any) -> Hashable:
    """Returns a key as Orbax stores it: the place in a list as an int, all else as text."""
    if isinstance(entry, jax.tree_util.SequenceKey):
        return entry.idx
    if isinstance(entry, jax.tree_util.FlattenedIndexKey):
        return cast(int, entry.key)
    return str(getattr(entry, "key", getattr(entry, "name", entry)))


def _is_deleted(array: jax.Array) -> bool:
    return not isinstance(array, Tracer) and array.is_deleted()


def _values_of(value: np.ndarray[Any, Any]) -> str:
    return f"values of dtype {value.dtype}"


def _stored(path: Path, array: Any) -> StoredLeaf:
    if array is None:
        return StoredLeaf(path=path, shape=(), dtype=None)
    impl = _implementation(array) if is_key(array.dtype) else None
    return StoredLeaf(path=path, shape=tuple(array.shape), dtype=array.dtype, key_impl=impl)


def _implementation(key: Any) -> str:
    """Returns the name of a random key's implementation, which JAX tells of arrays and of what it traces."""
    names: list[str] = []

    def look(traced: Any) -> None:
        names.append(str(jax.random.key_impl(traced)))

    jax.eval_shape(look, key)
    return names[0]
