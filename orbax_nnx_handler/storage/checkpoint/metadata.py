"""Steps whose train state lies in two items: read together, they are one tree.

Tunix saves `model_params` and `optimizer_state`, openpi `params` and
`train_state`. Each item can be restored by itself (`item=`); a target that wants
model and optimizer needs both. The tree has the items' names as its first keys,
as the layouts `tunix` and `openpi` expect.

What a checkpoint holds, from its metadata alone: no array byte is read.

The tree is parsed once (it is megabytes of JSON at 20,000 leaves) and serves the
plan and the read alike. Shapes and dtypes come from each array's own Zarr
metadata, all of them read through one handle on the store.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

import jax
import numpy as np
from etils import epath

from orbax_nnx_handler.planning.core.errors import NotACheckpointError
from orbax_nnx_handler.planning.core.leaves import Shape, StoredLeaf
from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.storage.checkpoint import npz, stores
from orbax_nnx_handler.storage.checkpoint.checkpoint import Checkpoint, StoredArray
from orbax_nnx_handler.storage.checkpoint.directories import is_archive
from orbax_nnx_handler.storage.checkpoint.random_state import StoredRandom, read_leftovers
from orbax_nnx_handler.storage.checkpoint.stores import Store
from orbax_nnx_handler.storage.checkpoint.trees import EMPTY_TYPES, STRING_TYPE, TREE_FILE, Tree, read_tree
from orbax_nnx_handler.storage.checkpoint.wrong_paths import damaged
from orbax_nnx_handler.storage.checkpoint.zarr import METADATA_KEY, Encoding, ZarrDriver, parse_encoding
from orbax_nnx_handler.storage.gc_pause import paused_collection

_TUNIX = ("model_params", "optimizer_state")
_OPENPI = ("params", "train_state")

_Value = TypeVar("_Value")


def parts_of(step: epath.Path) -> tuple[str, ...]:
    """Returns the items of a step that are one train state; none for any other directory."""
    if (step / TREE_FILE).exists():
        return ()
    for names in (_TUNIX, _OPENPI):
        if all((step / name / TREE_FILE).exists() for name in names):
            return () if names == _OPENPI and _has_weights(step / "train_state") else names
    return ()


def _has_weights(train_state: epath.Path) -> bool:
    """Tells whether openpi kept an average of its weights.

    The item `params` then holds the average and this one the weights in
    training. Which of the two is wanted, only the caller knows, by `item=`.
    """
    nodes = read_tree(train_state, lambda: None).nodes
    return any(path[:1] == ("params",) for path, kind in nodes.items() if kind not in EMPTY_TYPES)


def join_items(step: epath.Path, items: Mapping[str, "Checkpoint"]) -> "Checkpoint":
    """Returns the items of a step as one checkpoint, their names as first keys."""
    first = next(iter(items.values()))
    return dataclasses.replace(
        first,
        directory=step,
        leaves={path: _moved(leaf, path) for path, leaf in _joined(items, lambda item: item.leaves).items()},
        lost=_joined(items, lambda item: item.lost),
        disk_format=" and ".join(dict.fromkeys(item.disk_format for item in items.values())),
        values=_joined(items, lambda item: item.values or {}) or None,
        nodes=_joined(items, lambda item: item.nodes),
        arrays=_joined(items, lambda item: item.arrays),
        # Strict where the two differ: an absent chunk is then taken for a loss.
        writes_fill=any(item.writes_fill for item in items.values()),
    )


def _joined(
    items: Mapping[str, "Checkpoint"], field: Callable[["Checkpoint"], Mapping[Path, _Value]]
) -> dict[Path, _Value]:
    return {(name, *path): value for name, item in items.items() for path, value in field(item).items()}


def _moved(leaf: StoredLeaf, path: Path) -> StoredLeaf:
    return dataclasses.replace(leaf, path=path)


__all__ = ["Checkpoint", "StoredArray", "read_metadata"]


def read_metadata(directory: epath.PathLike) -> Checkpoint:
    """Reads what an item directory holds, without reading any array.

    Args:
        directory: An item directory that Orbax wrote, in any of its formats, a
            msgpack file that `flax.serialization` wrote, a NumPy archive, or a step
            whose items are one train state (`together`).

    Returns:
        The checkpoint's leaves, and where to read them.

    Raises:
        NotACheckpointError: The path is no item; says what it is instead.
    """
    directory = epath.Path(directory)
    with paused_collection():
        if is_archive(directory):
            return npz.read_archive(directory)
        parts = parts_of(directory)
        if parts:
            return join_items(directory, {name: _read(directory / name) for name in parts})
        return _read(directory)


def _read(directory: epath.Path) -> Checkpoint:
    tree, database = _read_tree(directory)
    arrays, lost = _locate(directory, tree, database)
    values = {path: np.asarray(value) for path, value in tree.values.items() if path not in arrays}
    key_impls = _read_key_impls(directory)
    leaves: dict[Path, StoredLeaf] = {}
    for path, value_type in tree.nodes.items():
        array = arrays.get(path)
        if array is not None:
            leaves[path] = _array_leaf(path, array.encoding, key_impls.get(array.name))
        elif path in values:
            leaves[path] = StoredLeaf(path=path, shape=values[path].shape, dtype=values[path].dtype)
        elif value_type == STRING_TYPE:
            leaves[path] = StoredLeaf(path=path, shape=(), dtype=None)
    leftovers = read_leftovers(tree.custom)
    return Checkpoint(
        directory=directory,
        leaves=leaves | {path: _leftover_leaf(path, leftover) for path, leftover in leftovers.items()},
        lost=lost,
        disk_format=_disk_format(arrays.values(), bool(values)),
        custom_metadata=tree.custom,
        step_metadata=_read_step_metadata(directory),
        values=values | {path: leftover.value for path, leftover in leftovers.items()} or None,
        nodes=tree.nodes,
        arrays=arrays,
        writes_fill=tree.writes_fill,
    )


def _read_tree(directory: epath.Path) -> tuple[Tree, Store | None]:
    """Returns tree and database; TensorStore walks the one while Python parses the other."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        opened = pool.submit(_open_database, directory)
        try:
            return read_tree(directory, opened.result), opened.result()
        except NotACheckpointError:
            # A database that is damaged says more than the absence of a tree.
            opened.result()
            raise


def _open_database(directory: epath.Path) -> Store | None:
    if not stores.is_ocdbt(directory):
        return None
    try:
        return stores.open_ocdbt(directory)
    except ValueError as error:
        raise _damaged(f"the database in {directory} cannot be opened", directory, error) from error


def _damaged(what: str, directory: epath.Path, error: Exception) -> NotACheckpointError:
    reason = str(error).removesuffix(".")
    return NotACheckpointError(f"{what}: {reason}.\nhint: {damaged(directory)}")


def _locate(
    directory: epath.Path, tree: Tree, database: Store | None
) -> tuple[dict[Path, StoredArray], dict[Path, str]]:
    """Finds each array's metadata: in the database first, then in its own directory."""
    wanted = {path: name for path, name in tree.names.items() if tree.nodes[path] != STRING_TYPE}
    if not wanted:
        return {}, {}
    drivers: tuple[ZarrDriver, ZarrDriver] = ("zarr3", "zarr") if tree.zarr3 else ("zarr", "zarr3")
    # Older checkpoints mix both: a database beside one directory per leaf.
    files = stores.open_files(tree.folder or directory)
    holders = [store for store in (database, files) if store is not None]
    places: list[tuple[Store, ZarrDriver]] = [(store, driver) for store in holders for driver in drivers]
    try:
        found = stores.first_found(wanted, [(s, f"/{METADATA_KEY[d]}") for s, d in places])
    except ValueError as error:
        raise _damaged(f"the store in {directory} cannot be read", directory, error) from error
    arrays: dict[Path, StoredArray] = {}
    lost: dict[Path, str] = {}
    for path, name in wanted.items():
        place = found.get(path)
        if place is None:
            if path not in tree.values:
                lost[path] = "the tree names it, but no store holds it"
            continue
        number, content = place
        store, driver = places[number]
        try:
            arrays[path] = StoredArray(name=name, store=store, encoding=_parse(driver, content))
        except (ValueError, KeyError, TypeError) as error:
            lost[path] = f"{name}/{METADATA_KEY[driver]} in {store.directory} is damaged: {error}"
    return arrays, lost


@functools.lru_cache(maxsize=1024)
def _parse(driver: ZarrDriver, content: bytes) -> Encoding:
    # Cached: the layers of a model share a few dozen layouts between them.
    return parse_encoding(driver, content)


def _array_leaf(path: Path, encoding: Encoding, key_impl: str | None) -> StoredLeaf:
    if key_impl is None:
        return StoredLeaf(
            path=path, shape=encoding.shape, dtype=encoding.dtype, chunk_shape=encoding.chunk_shape
        )
    dtype, bits = _key_type(key_impl)
    rank = len(encoding.shape) - len(bits)
    return StoredLeaf(
        path=path,
        shape=encoding.shape[:rank],
        dtype=dtype,
        chunk_shape=encoding.chunk_shape[:rank],
        key_impl=key_impl,
    )


def _leftover_leaf(path: Path, leftover: StoredRandom) -> StoredLeaf:
    shape, impl = leftover.value.shape, leftover.key_impl
    if impl is None:
        return StoredLeaf(path=path, shape=shape, dtype=leftover.value.dtype)
    dtype, bits = _key_type(impl)
    return StoredLeaf(path=path, shape=shape[: len(shape) - len(bits)], dtype=dtype, key_impl=impl)


@functools.cache
def _key_type(impl: str) -> tuple[np.dtype[Any], Shape]:
    """Returns the dtype of a random key and the shape of one key's bits."""
    key = jax.eval_shape(lambda: jax.random.key(0, impl=impl))
    # A key dtype is an extended dtype: it has a name, a kind and an item size,
    # but is no `numpy.dtype` to a type checker.
    dtype = cast("np.dtype[Any]", key.dtype)
    return dtype, jax.eval_shape(jax.random.key_data, key).shape


def _read_key_impls(directory: epath.Path) -> dict[str, str]:
    """Returns the PRNG implementation of each stored random key, by array name.

    Orbax notes it in `array_metadatas/process_*`, beside the chunk shapes; every
    process's file names every array.
    """
    folder = directory / "array_metadatas"
    if not directory.is_dir() or not folder.exists():
        return {}
    for file in sorted(folder.glob("process_*")):
        content = file.read_text()
        # The file is megabytes at thousands of leaves, and most hold no key.
        if "random_key_impl" not in content:
            return {}
        entries = [entry["array_metadata"] for entry in json.loads(content)["array_metadatas"]]
        keys = [entry for entry in entries if (entry.get("ext_metadata") or {}).get("random_key_impl")]
        return {entry["param_name"]: entry["ext_metadata"]["random_key_impl"] for entry in keys}
    return {}


def _read_step_metadata(directory: epath.Path) -> Mapping[str, Any]:
    """Returns the program's metadata of the step: beside the item, or above it."""
    for folder in (directory, directory.parent):
        file = folder / "_CHECKPOINT_METADATA"
        if folder.is_dir() and file.exists():
            try:
                return json.loads(file.read_text()).get("custom_metadata") or {}
            # Nothing of the restore depends on it, so a damaged file is no reason to stop.
            except ValueError:
                return {}
    return {}


def _disk_format(arrays: Iterable[StoredArray], has_values: bool) -> str:
    found = {(array.store.kind, array.encoding.driver) for array in arrays}
    kinds = sorted(f"ocdbt+{driver}" if kind == "ocdbt" else driver for kind, driver in found)
    return " and ".join([*kinds, *(["msgpack"] if has_values else [])]) or "empty"
