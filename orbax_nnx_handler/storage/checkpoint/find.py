"""The checkpoint that is meant: an item directory (of a root, a step or an item), or a tree in memory."""

from collections.abc import Hashable, Mapping
from typing import Any, cast

import jax
import numpy as np
from etils import epath
from flax import nnx
from jax.core import Tracer

from orbax_nnx_handler.planning.core.dtypes import is_array_dtype, is_key
from orbax_nnx_handler.planning.core.errors import Hint, NotACheckpointError
from orbax_nnx_handler.planning.core.leaves import StoredLeaf
from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.target import value_of
from orbax_nnx_handler.planning.verdict.outcomes import IN_MEMORY
from orbax_nnx_handler.storage.checkpoint.checkpoint import Checkpoint
from orbax_nnx_handler.storage.checkpoint.directories import (
    absent_indices,
    holds_tree,
    index_of,
    is_archive,
    is_flax_file,
    is_item,
    is_numbered,
    is_root,
    is_unfinished,
    is_weights_file,
    items_of,
    last_of_big_vision,
    last_question,
    newest_in,
    prefixes_of,
    steps_of,
)
from orbax_nnx_handler.storage.checkpoint.metadata import train_state_items
from orbax_nnx_handler.storage.checkpoint.trees import STRING_TYPE, UNKNOWN_TYPE
from orbax_nnx_handler.storage.checkpoint.wrong_paths import no_checkpoint, no_item, several_kinds
from orbax_nnx_handler.storage.stores.files import Files, List
from orbax_nnx_handler.storage.stores.kvstore import files_at
from orbax_nnx_handler.storage.stores.locations import as_path

_USUAL_ITEMS = ("default", "items", "state", "params")


def find_item(path: epath.PathLike, item: str | None = None, files: Files | None = None) -> epath.Path:
    """Returns the item directory that a path means.

    Args:
        path: A manager's root (its newest step is taken), a step, an item, a msgpack
            file of `flax.serialization`, a NumPy archive, a directory with one
            run's archives, or one of Hugging Face's with a Flax model or safetensors.
        item: The item's name within the step, where it holds several.
        files: The files of the path's store, if they are of use afterwards.

    Raises:
        NotACheckpointError: Says what the path is and which was probably meant, or why
            the store does not hand it out.
    """
    given = as_path(path)
    named: Any = item
    if not isinstance(named, str | None) or "/" in (named or ""):
        raise NotACheckpointError(f"item is the name of a step's item, not {named!r}.")
    files = files or files_at(given)
    files.ask(List(str(given)), last_question(given))
    root = last_of_big_vision(given, files)
    # What an interrupted save left may look whole, and lack what was not yet written.
    if not files.exists(root) or is_unfinished(root):
        raise no_checkpoint(root, files)
    if not files.is_folder(root):
        return _file(root, files)
    if is_item(root, files):
        if item not in (None, "", root.name):
            raise NotACheckpointError(
                f"{root} is an item already, and item={item!r} is another.",
                hints=[_instead(root, item or "", files)],
            )
        return root
    if absent_indices(root, files):
        raise no_checkpoint(root, files)
    newest = _newest_step(root, files)
    if newest is None or is_numbered(newest, files):
        newest = _only_archive(root, files) or newest
    elif _is_no_step(newest, files):
        raise no_checkpoint(root, files)
    return _item_of_step(newest or root, item, files)


def _instead(root: epath.Path, item: str, files: Files) -> str:
    """Returns what to pass for another item than the one that a path already is."""
    beside = root.parent / item
    if files.is_folder(beside) and is_item(beside, files):
        return f"pass the step {root.parent} for its item {item!r}, or leave the item's name out."
    return f"leave the item's name out; another checkpoint's item is named in its path, STEP/{item}."


def _only_archive(root: epath.Path, files: Files) -> epath.Path | None:
    """Returns the NumPy archive that a directory of nothing else means.

    Raises:
        NotACheckpointError: It has those of several runs.
    """
    newest = newest_in(root, files)
    if not newest or train_state_items(root, files) or items_of(root, files):
        return None
    if len(newest) > 1:
        names = ", ".join(path.name for path in newest)
        raise NotACheckpointError(
            f"{root} holds several NumPy archives: {names}.", hints=["pass the path of one of them."]
        )
    return newest[0]


def _file(path: epath.Path, files: Files) -> epath.Path:
    if not files.is_file(path) or index_of(path.name):
        raise no_checkpoint(path, files)
    try:
        is_alone = is_weights_file(path.name) or is_flax_file(path, files) or is_archive(path, files)
        is_part = not is_alone and is_item(path.parent, files)
    except NotACheckpointError:
        is_part = False
    if is_part:
        raise no_checkpoint(path, files)
    return path


def _newest_step(root: epath.Path, files: Files) -> epath.Path | None:
    steps = steps_of(root, files)
    if len(prefixes_of(path.name for path in steps.values())) > 1:
        steps = {step: path for step, path in steps.items() if holds_tree(path, files)}
        if len(prefixes_of(path.name for path in steps.values())) > 1:
            raise several_kinds(root, steps.values())
    return steps[max(steps)] if steps else None


def _is_no_step(path: epath.Path, files: Files) -> bool:
    """Tells what only ends in a number: another run (`run_2`), or something else (`log_1`)."""
    if files.is_folder(path) and is_root(path, files):
        return True
    unfinished = any(is_unfinished(path / name) for name in files.entries(path))
    return not (path.name.isdecimal() or holds_tree(path, files) or unfinished)


def _item_of_step(step: epath.Path, item: str | None, files: Files) -> epath.Path:
    if files.is_file(step):
        return step
    if item is not None:
        return _named_item(step, item, files)
    if is_item(step, files) or train_state_items(step, files):
        return step
    items = items_of(step, files)
    usual = [child for name in _USUAL_ITEMS for child in items if child.name == name]
    if len(items) == 1 or usual:
        return (usual or items)[0]
    if items:
        names = ", ".join(child.name for child in items)
        first = items[0].name
        hint = Hint(f"pass item={first!r}, or the path of one of them.", {"item": first})
        raise NotACheckpointError(f"{step} holds several items: {names}.", hints=[hint])
    raise no_checkpoint(step, files)


def _named_item(step: epath.Path, item: str, files: Files) -> epath.Path:
    found = step / item
    if not files.exists(found):
        raise no_item(step, item, files)
    if not is_item(found, files):
        raise no_checkpoint(found, files)
    return found


# A tree in memory: paths as Orbax would store them, shapes and dtypes from the leaves.

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
