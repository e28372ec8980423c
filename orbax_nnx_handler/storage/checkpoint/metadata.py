"""What a checkpoint holds, from its metadata alone: no array byte is read.

The tree is parsed once (it is megabytes of JSON at 20,000 leaves) and serves the
plan and the read alike. Shapes and dtypes come from each array's own Zarr metadata.
Behind a network it takes a listing of the item, then all small files together, then the
levels of the database's B-tree.

A step whose train state lies in two items is read as one tree: Tunix saves
`model_params` and `optimizer_state`, openpi `params` and `train_state`. Each item can be
restored by itself (`item=`); a target that wants model and optimizer needs both. The tree
has the items' names as its first keys, as the layouts `tunix` and `openpi` expect.
"""

import dataclasses
import functools
import logging
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from etils import epath

from orbax_nnx_handler.planning.core.errors import NotACheckpointError
from orbax_nnx_handler.planning.core.leaves import StoredLeaf
from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.layouts.linen import AUX
from orbax_nnx_handler.planning.verdict.leaf_verdicts import SharedName
from orbax_nnx_handler.storage import naming_shortage, paused_collection
from orbax_nnx_handler.storage.checkpoint import FieldError, hugging_face, npz, optional_object, parse_object
from orbax_nnx_handler.storage.checkpoint.checkpoint import (
    METADATA_KEY,
    Checkpoint,
    Encoding,
    StoredArray,
    ZarrDriver,
    parse_encoding,
)
from orbax_nnx_handler.storage.checkpoint.directories import (
    STEP_FILE,
    UNFINISHED,
    commit_questions,
    is_archive,
    is_item,
    stamps_of,
    was_interrupted,
)
from orbax_nnx_handler.storage.checkpoint.stored_random import (
    KEY_FILE,
    KEY_FILES,
    StoredRandom,
    key_type,
    read_key_impls,
    read_leftovers,
)
from orbax_nnx_handler.storage.checkpoint.trees import (
    EMPTY_TYPES,
    MSGPACK_FILE,
    STRING_TYPE,
    TREE_FILE,
    Tree,
    leads_out,
    read_tree,
)
from orbax_nnx_handler.storage.checkpoint.wrong_paths import damaged, interrupted, no_checkpoint
from orbax_nnx_handler.storage.stores import kvstore
from orbax_nnx_handler.storage.stores.files import FileQuestion, Files, List, ReadFile, Sizes
from orbax_nnx_handler.storage.stores.kvstore import MANIFEST, Store
from orbax_nnx_handler.storage.stores.ocdbt import DamagedDatabaseError

__all__ = ["Checkpoint", "StoredArray", "read_metadata", "train_state_items"]

_logger = logging.getLogger(__name__)

_TUNIX = ("model_params", "optimizer_state")
_OPENPI = ("params", "train_state")

# Zarr's codecs pack zeros to a thirty-thousandth; what takes more than that is not there.
_PACKED_AT_MOST = 1 << 15
_LARGE, _LARGE_REMOTE = 1 << 30, 1 << 36

_Value = TypeVar("_Value")


def train_state_items(step: epath.Path, files: Files) -> tuple[str, ...]:
    """Returns the items of a step that are one train state; none for any other directory."""
    if files.has_file(step, TREE_FILE):
        return ()
    folders = {folder.name for folder in files.folders(step)}
    for names in (_TUNIX, _OPENPI):
        if folders.issuperset(names):
            files.look_into(step / name for name in names)
            if all(files.has_file(step / name, TREE_FILE) for name in names):
                return () if names == _OPENPI and _has_weights(step / "train_state", files) else names
    return ()


def _has_weights(train_state: epath.Path, files: Files) -> bool:
    """Tells whether openpi kept an average of its weights.

    The item `params` then holds the average and this one the weights in
    training. Which of the two is wanted, only the caller knows, by `item=`.
    """
    tree = read_tree(train_state, files, None)
    return tree is not None and any(
        path[:1] == ("params",) for path, kind in tree.nodes.items() if kind not in EMPTY_TYPES
    )


def _join_items(step: epath.Path, items: Mapping[str, Checkpoint]) -> Checkpoint:
    return dataclasses.replace(
        next(iter(items.values())),
        directory=step,
        leaves={
            path: dataclasses.replace(leaf, path=path)
            for path, leaf in _joined(items, lambda item: item.leaves).items()
        },
        lost=_joined(items, lambda item: item.lost),
        damaged=_joined(items, lambda item: item.damaged),
        foreign=_joined(items, lambda item: item.foreign),
        disk_format=" and ".join(dict.fromkeys(item.disk_format for item in items.values())),
        values=_joined(items, lambda item: item.values or {}) or None,
        nodes=_joined(items, lambda item: item.nodes),
        arrays=_joined(items, lambda item: item.arrays),
        # Strict where the two differ: an absent chunk is then taken for a loss.
        writes_fill=any(item.writes_fill for item in items.values()),
        stamps={file: content for item in items.values() for file, content in item.stamps.items()},
    )


def _joined(
    items: Mapping[str, Checkpoint], field: Callable[[Checkpoint], Mapping[Path, _Value]]
) -> dict[Path, _Value]:
    return {(name, *path): value for name, item in items.items() for path, value in field(item).items()}


def read_metadata(directory: epath.PathLike, files: Files | None = None) -> Checkpoint:
    """Reads what an item directory holds, without reading any array.

    Args:
        directory: An item directory that Orbax wrote, in any of its formats, a
            msgpack file that `flax.serialization` wrote, a NumPy archive, weights of
            Hugging Face's libraries, or a step whose items are one train state.
        files: The files of its store, where some are known already.

    Returns:
        The checkpoint's leaves, and where to read them.

    Raises:
        NotACheckpointError: The path is no item, or its save was interrupted; says what
            it is instead, or which file is damaged.
    """
    directory = epath.Path(directory)
    files = files or kvstore.files_at(directory)
    with paused_collection(), naming_shortage(f"{directory} cannot be read", ()):
        if (weights := hugging_face.read_weights(directory, files)) is not None:
            return weights
        if is_archive(directory, files):
            return npz.read_archive(directory, files)
        parts = train_state_items(directory, files)
        if not parts:
            return _read(directory, files)
        _ask(files, [directory / name for name in parts])
        return _join_items(directory, {name: _read(directory / name, files) for name in parts})


def _read(directory: epath.Path, files: Files) -> Checkpoint:
    if not files.exists(directory) or any(UNFINISHED in part for part in directory.parts):
        raise no_checkpoint(directory, files)
    _ask(files, [directory])
    _check_was_finished(directory, files)
    stamps = stamps_of(directory, files)
    database = _open_database(directory, files)
    tree = read_tree(directory, files, database)
    if tree is None:
        raise no_checkpoint(directory, files)
    arrays, lost = _locate(directory, tree, database, files)
    values = {path: value for path, value in tree.values.items() if path not in arrays}
    foreign = {path: what for path, what in tree.foreign.items() if path not in arrays}
    lost |= {path: why for path, why in tree.lost.items() if path not in arrays}
    lost = {path: why for path, why in lost.items() if path not in foreign}
    key_impls = read_key_impls(directory, files)
    leaves: dict[Path, StoredLeaf] = {}
    for path, value_type in tree.nodes.items():
        array = arrays.get(path)
        if array is not None:
            leaves[path] = _array_leaf(path, array.encoding, key_impls.get(array.name))
        elif path in values:
            leaves[path] = StoredLeaf(path=path, shape=values[path].shape, dtype=values[path].dtype)
        elif value_type == STRING_TYPE:
            leaves[path] = StoredLeaf(path=path, shape=(), dtype=None)
    leftovers = _read_leftovers(directory, tree, files)
    return Checkpoint(
        directory=directory,
        leaves=leaves | {path: leaf for path, (_, leaf) in leftovers.items()},
        lost=lost,
        damaged=dict(_damaged_arrays(arrays, files, writes_fill=tree.writes_fill)),
        disk_format=_disk_format(arrays.values(), bool(values)),
        custom_metadata=tree.custom,
        step_metadata=_read_step_metadata(directory, files),
        values=values | {path: leftover.value for path, (leftover, _) in leftovers.items()} or None,
        nodes=tree.nodes,
        arrays=arrays,
        writes_fill=tree.writes_fill,
        foreign=foreign,
        stamps=stamps if any(array.store.kind == "files" for array in arrays.values()) else {},
    )


def _ask(files: Files, directories: Iterable[epath.Path]) -> None:
    """Asks for all small files of items in one trip."""
    questions: list[FileQuestion] = []
    for directory in directories:
        entries = files.entries(directory)
        questions += commit_questions(directory)
        questions += [
            ReadFile(os.fspath(directory / name)) for name in (TREE_FILE, MSGPACK_FILE) if name in entries
        ]
        if MANIFEST in entries:
            questions += kvstore.database_questions(directory, entries)
        if KEY_FILES in entries:
            folder = os.fspath(directory / KEY_FILES)
            questions += [List(folder), ReadFile(f"{folder}/{KEY_FILE}")]
    files.ask(*questions)


def _check_was_finished(directory: epath.Path, files: Files) -> None:
    if not files.is_folder(directory) or not is_item(directory, files):
        return
    unfinished = was_interrupted(directory, files)
    if unfinished is not None and _is_orbax(directory, files):
        raise interrupted(unfinished, files)


def _is_orbax(directory: epath.Path, files: Files) -> bool:
    """Tells whether Orbax wrote an item; T5X and big_vision mark no finished save."""
    if files.has_file(directory, TREE_FILE) or files.has_file(directory, MANIFEST):
        return True
    tree = read_tree(directory, files, None)
    return tree is not None and tree.by_orbax


def _open_database(directory: epath.Path, files: Files) -> Store | None:
    if not files.is_folder(directory) or not files.has_file(directory, MANIFEST):
        return None
    try:
        return kvstore.open_ocdbt(directory, files)
    except DamagedDatabaseError as error:
        raise NotACheckpointError(
            f"the database in {directory} cannot be read: {error}.", hints=[damaged(directory, files)]
        ) from error


def _locate(
    directory: epath.Path, tree: Tree, database: Store | None, files: Files
) -> tuple[dict[Path, StoredArray], dict[Path, str]]:
    """Finds each array's metadata: in the database first, then in its own directory."""
    wanted = {path: name for path, name in tree.names.items() if tree.nodes[path] != STRING_TYPE}
    lost = _misnamed(wanted)
    wanted = {path: name for path, name in wanted.items() if path not in lost} if lost else wanted
    if not wanted:
        return {}, lost
    drivers: tuple[ZarrDriver, ZarrDriver] = ("zarr3", "zarr") if tree.zarr3 else ("zarr", "zarr3")
    # Older checkpoints mix both: a database beside one directory per leaf.
    beside = kvstore.open_files(tree.folder or directory)
    holders = [store for store in (database, beside) if store is not None]
    places: list[tuple[Store, ZarrDriver]] = [(store, driver) for store in holders for driver in drivers]
    found = kvstore.first_found(
        wanted, [(store, f"/{METADATA_KEY[driver]}") for store, driver in places], files
    )
    _check_not_refused(content for _, content in found.values() if files.remote)
    if beside.local:
        numbers = {
            number: METADATA_KEY[driver] for number, (store, driver) in enumerate(places) if store is beside
        }
        beside.look_at([f"{wanted[path]}/{numbers[at]}" for path, (at, _) in found.items() if at in numbers])
    arrays: dict[Path, StoredArray] = {}
    for path, name in wanted.items():
        place = found.get(path)
        number, content = place or (0, b"")
        store, driver = places[number]
        misread = store.misread(name) if store.kind == "files" else None
        if place is None or misread:
            if path not in tree.values:
                lost[path] = misread or "the tree names it, but no store holds it"
            continue
        try:
            if isinstance(content, NotACheckpointError):
                raise content
            arrays[path] = StoredArray(name=name, store=store, encoding=_parse(driver, content))
        except ValueError as error:
            lost[path] = f"{name}/{METADATA_KEY[driver]} in {store.directory} is damaged: {error}"
    return arrays, lost


def _check_not_refused(answers: Iterable[bytes | NotACheckpointError]) -> None:
    """Raises where a store refused a file: that is no damage to a leaf, and will be so for others."""
    for answer in answers:
        if isinstance(answer, NotACheckpointError):
            raise answer


def _misnamed(names: Mapping[Path, str]) -> dict[Path, str]:
    """Returns what is wrong with the names of arrays: they lead out, or several paths have one.

    Where paths share an array, the save that wrote them left the values of one of them alone.
    """
    lost = {
        path: f"its name {name!r} leads out of the checkpoint"
        for path, name in names.items()
        if leads_out(name)
    }
    if len(set(names.values())) == len(names):
        return lost
    sharing: dict[str, list[Path]] = defaultdict(list)
    for path, name in names.items():
        sharing[name].append(path)
    for name, paths in sharing.items():
        if len(paths) > 1:
            why = SharedName(f"{len(paths)} leaves have one array, {name!r}: it holds only one of them")
            lost |= dict.fromkeys(paths, why)
    return lost


@functools.lru_cache(maxsize=1024)
def _parse(driver: ZarrDriver, content: bytes) -> Encoding:
    # Cached: the layers of a model share a few dozen layouts between them.
    return parse_encoding(driver, content)


def _array_leaf(path: Path, encoding: Encoding, key_impl: str | None) -> StoredLeaf:
    if key_impl is None:
        return StoredLeaf(
            path=path, shape=encoding.shape, dtype=encoding.dtype, chunk_shape=encoding.chunk_shape
        )
    dtype, bits = key_type(key_impl)
    rank = len(encoding.shape) - len(bits)
    return StoredLeaf(
        path=path,
        shape=encoding.shape[:rank],
        dtype=dtype,
        chunk_shape=encoding.chunk_shape[:rank],
        key_impl=key_impl,
    )


def _read_leftovers(
    directory: epath.Path, tree: Tree, files: Files
) -> dict[Path, tuple[StoredRandom, StoredLeaf]]:
    try:
        leftovers = read_leftovers(tree.custom)
        return {path: (leftover, _leftover_leaf(path, leftover)) for path, leftover in leftovers.items()}
    except ValueError as error:
        raise NotACheckpointError(
            f"{directory / TREE_FILE} cannot be read: the random state in its metadata ({AUX}): {error}.",
            hints=[damaged(directory, files)],
        ) from error


def _leftover_leaf(path: Path, leftover: StoredRandom) -> StoredLeaf:
    shape, impl = leftover.value.shape, leftover.key_impl
    if impl is None:
        return StoredLeaf(path=path, shape=shape, dtype=leftover.value.dtype)
    dtype, bits = key_type(impl)
    return StoredLeaf(path=path, shape=shape[: len(shape) - len(bits)], dtype=dtype, key_impl=impl)


def _damaged_arrays(
    arrays: Mapping[Path, StoredArray], files: Files, *, writes_fill: bool
) -> Iterable[tuple[Path, str]]:
    """Yields the leaves whose shapes are known and whose bytes cannot all be there."""
    # One array of each store and encoding: the layers of a model have few between them.
    kinds = {(id(array.store), id(array.encoding)): array for array in arrays.values()}
    broken = {id(array.store): _by_array(array.store) for array in kinds.values()}
    large = {kind for kind, array in kinds.items() if _is_large(array)}
    if not large and not any(broken.values()):
        return  # Nearly every checkpoint.
    of_kind = {path: (id(array.store), id(array.encoding)) for path, array in arrays.items()}
    alone = [a for path, a in arrays.items() if a.store.kind == "files" and of_kind[path] in large]
    files.ask(*(_folder_sizes(array) for array in alone))
    for path, array in arrays.items():
        reason = broken[id(array.store)].get(array.name)
        if reason is None and of_kind[path] in large:
            reason = _implausible(array, files, writes_fill=writes_fill)
        if reason:
            yield path, reason


def _is_large(array: StoredArray) -> bool:
    """Tells whether an array is so large that what is stored of it is worth a look."""
    least = _LARGE if array.store.local or array.store.kind != "files" else _LARGE_REMOTE
    return math.prod(array.encoding.shape) * array.encoding.dtype.itemsize >= least


def _folder_sizes(array: StoredArray) -> Sizes:
    return Sizes(os.fspath(array.store.directory / array.name), "")


def _by_array(store: Store) -> dict[str, str]:
    """Returns the reason for each array of which the catalog shows a damaged chunk."""
    found: dict[str, str] = {}
    for key, reason in store.damaged.items():
        # A chunk's key below the array's name: `c/0/1`, or `0.1`, or `0/1`.
        parts = key.split("/")
        for end in range(1, len(parts)):
            found.setdefault("/".join(parts[:end]), f"{key}: {reason}")
    return found


def _implausible(array: StoredArray, files: Files, *, writes_fill: bool) -> str | None:
    """Returns why a large array cannot be in the bytes that are stored, or None if it can."""
    encoding, catalog = array.encoding, array.store.catalog
    size = math.prod(encoding.shape) * encoding.dtype.itemsize
    if array.store.kind == "files":
        question = _folder_sizes(array)
        stored = files.sizes(epath.Path(question.path), question.prefix)
    else:
        stored = array.store.sizes
    if size > _PACKED_AT_MOST * max(1, sum(stored.values())):
        return f"an array of {size} bytes cannot be in files of {sum(stored.values())}"
    lengths = zip(encoding.shape, encoding.chunk_shape, strict=True)
    chunks = math.prod(-(-length // chunk) for length, chunk in lengths)
    held = len(stored if catalog is None else catalog)
    if writes_fill and chunks > held:
        return f"it has {chunks} chunks, of which {held} can be there"
    return None


def _read_step_metadata(directory: epath.Path, files: Files) -> Mapping[str, Any]:
    """Returns the program's metadata of the step: beside the item, or above it."""
    if not files.is_folder(directory):
        return {}
    for folder in (directory, directory.parent):
        content = files.optional(folder / STEP_FILE, warn=True)
        if content is None:
            continue
        try:
            return optional_object(parse_object(content), "custom_metadata")
        except FieldError as error:
            # Nothing of the restore depends on it, so a damaged file is no reason to stop.
            _logger.warning("going on without %s: %s", folder / STEP_FILE, error)
            return {}
    return {}


def _disk_format(arrays: Iterable[StoredArray], has_values: bool) -> str:
    found = {(array.store.kind, array.encoding.driver) for array in arrays}
    kinds = sorted(f"ocdbt+{driver}" if kind == "ocdbt" else driver for kind, driver in found)
    return " and ".join([*kinds, *(["msgpack"] if has_values else [])]) or "empty"
