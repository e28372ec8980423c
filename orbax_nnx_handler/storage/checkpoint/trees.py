"""The tree of a checkpoint: which paths there are, before any shape is known.

Orbax keeps it in `_METADATA` (JSON). Before that, four programs wrote other forms, and
all of them are read here to one:

- Orbax 0.2 to 0.4: a msgpack file `checkpoint` with the tree. A leaf is its
  value, or `PLACEHOLDER://name` for an array of that name beside the file, in a
  directory of its own or in a database.
- T5X (its own format, before it moved to Orbax): the same, with a TensorStore
  spec in place of the placeholder, and the tree under `optimizer`
  (t5x/checkpoints.py `_write_state_to_tensorstore`).
- `flax.training.checkpoints`: a msgpack file `checkpoint_<step>` that holds every
  value, except those of several processes: `//GDAPlaceholder:a/b` stands for an
  array in `checkpoint_<step>_gda/a/b`.
- big_vision: no tree at all. An array's directory is its path, joined by `~`
  (big_vision/utils.py `tssave`).

Orbax without any tree is the fifth: names joined by dots.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypedDict, cast

import msgpack
import numpy as np
from etils import epath

from orbax_nnx_handler.planning.core.dtypes import is_array_dtype
from orbax_nnx_handler.planning.core.errors import NotACheckpointError
from orbax_nnx_handler.planning.core.paths import Path, is_index
from orbax_nnx_handler.storage.checkpoint import (
    MOST_LEAVES,
    FieldError,
    check_depth,
    check_paths,
    keys_of,
    object_of,
    objects_of,
    optional_object,
    parse_object,
    shape_field,
    text_of,
)
from orbax_nnx_handler.storage.checkpoint.checkpoint import METADATA_KEY
from orbax_nnx_handler.storage.checkpoint.wrong_paths import (
    ANY_KIND,
    COPY_AGAIN,
    damaged,
    is_pointer,
    not_downloaded,
)
from orbax_nnx_handler.storage.stores.files import ANYWHERE, Files
from orbax_nnx_handler.storage.stores.kvstore import Store

TREE_FILE, MSGPACK_FILE = "_METADATA", "checkpoint"

# The value types of `_METADATA`, for what older trees tell.
UNKNOWN_TYPE, STRING_TYPE = "Unknown", "string"
EMPTY_TYPES = frozenset({"None", "Dict", "List", "Tuple", "NamedTuple"})
"""The value types of nodes that hold nothing, in the words of `_METADATA`."""
_NODE_TYPES: Mapping[type, str] = {
    type(None): "None",
    str: STRING_TYPE,
    dict: "Dict",
    list: "List",
    tuple: "Tuple",
}
_SEQUENCE, _NAME = 1, 2

_ORBAX_PLACEHOLDERS = ("PLACEHOLDER://", "AGGREGATED://")
_FLAX_PLACEHOLDER = "//GDAPlaceholder:"
_FLAX_FOLDER = "_gda"
_BIG_VISION_SEPARATOR = "~"
# What `flax.serialization` writes: three types of its own, and arrays above a gigabyte in chunks.
_ARRAY, _COMPLEX, _SCALAR = 1, 2, 3
_CHUNKED = "__msgpack_chunked_array__"
_NUMBERS = (bool, int, float, complex, np.ndarray, np.generic)
_KEYS = (str, bytes, int, float, type(None))
_SHOWN = 80

# Folders of an item that are no array.
_NO_ARRAYS = frozenset({"array_metadatas", "d"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tree:
    """The tree of one item.

    Attributes:
        nodes: The value type of each path, empty nodes included.
        names: The name in the store of each path that has a value there.
        values: The values that the tree's file itself held.
        lost: The values in that file that are damaged, with the reason.
        foreign: The values in that file that are no arrays to JAX, with what they are.
        zarr3: Whether the arrays are said to be Zarr 3.
        custom: What the program stored with the item.
        writes_fill: Whether an absent chunk is a loss: the writer stores chunks also where
            they equal the fill value, or nothing tells that it was done.
        by_orbax: Whether Orbax wrote it, which marks a finished save.
        folder: Where arrays lie that are not in the directory itself.
    """

    nodes: Mapping[Path, str]
    names: Mapping[Path, str]
    values: Mapping[Path, np.ndarray[Any, Any]] = dataclasses.field(default_factory=dict[Path, Any])
    lost: Mapping[Path, str] = dataclasses.field(default_factory=dict[Path, str])
    foreign: Mapping[Path, str] = dataclasses.field(default_factory=dict[Path, str])
    zarr3: bool = False
    custom: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    writes_fill: bool = False
    by_orbax: bool = True
    folder: epath.Path | None = None


class _Held(TypedDict):
    values: Mapping[Path, np.ndarray[Any, Any]]
    lost: Mapping[Path, str]
    foreign: Mapping[Path, str]


def read_tree(directory: epath.Path, files: Files, database: Store | None) -> Tree | None:
    """Reads the tree of an item directory, or of a msgpack file.

    Args:
        directory: The item directory, or a file that `flax.serialization` wrote.
        files: The files of its store.
        database: The directory's OCDBT store, if it has one.

    Returns:
        The tree, or None if there is none.

    Raises:
        NotACheckpointError: The file of the tree is damaged.
    """
    if files.is_file(directory):
        folder = directory.parent / (directory.name + _FLAX_FOLDER)
        return packed_tree(directory, folder, files, below=ANYWHERE)
    listed = packed = None
    if files.has_file(directory, TREE_FILE):
        listed = _metadata_tree(directory / TREE_FILE, files)
    if files.has_file(directory, MSGPACK_FILE):
        packed = packed_tree(directory / MSGPACK_FILE, directory, files)
    if listed and packed:
        held = _Held(values=packed.values, lost=packed.lost, foreign=packed.foreign)
        return dataclasses.replace(listed, names={**listed.names, **packed.names}, **held)
    tree = listed or packed or _named_tree(directory, files, database)
    return tree if tree.nodes else None


def _metadata_tree(file: epath.Path, files: Files) -> Tree:
    try:
        content = parse_object(files.content(file))
        tree = object_of(content, "tree_metadata")
        entries = [_entry(object_of(tree, name)) for name in tree]
        check_paths([path for path, _, _ in entries])
        custom = optional_object(content, "custom_metadata")
    except FieldError as error:
        reason = f"cannot be read as the tree of a checkpoint: {str(error).removesuffix('.')}"
        raise NotACheckpointError(f"{file} {reason}.", hints=[damaged(file, files)]) from error
    nodes = {path: value_type for path, _, value_type in entries}
    names = {path: name for path, name, value_type in entries if value_type not in EMPTY_TYPES}
    return Tree(
        nodes=nodes,
        names=names,
        zarr3=bool(content.get("use_zarr3")),
        custom=custom,
        writes_fill=bool(content.get("store_array_data_equal_to_fill_value")),
    )


def _entry(entry: dict[str, Any]) -> tuple[Path, str, str]:
    path = tuple(
        [
            # Nearly every key: a call for each takes its time.
            name
            if type(name := key.get("key")) is str and name.isascii() and key.get("key_type") == _NAME
            else _key(key)
            for key in objects_of(entry, "key_metadata")
        ]
    )
    return path, array_name(path), text_of(object_of(entry, "value_metadata"), "value_type")


def _key(key: dict[str, Any]) -> str | int:
    name = text_of(key, "key")
    return _number(name) if key.get("key_type") == _SEQUENCE else name


def array_name(path: Path) -> str:
    """Returns the name that Orbax gives the array at a path."""
    return ".".join(map(str, path))


def leads_out(name: str) -> bool:
    """Tells an array's name that is none inside a checkpoint."""
    parts = name.split("/") if "/" in name else (name,)
    return not _NO_NAMES.isdisjoint(parts) or "\0" in name


_NO_NAMES = frozenset({"", ".", ".."})


def _number(name: str) -> int:
    if not name.isdecimal() or len(name) > 9:
        raise FieldError(f"key is {name!r}, where the index of a list should be")
    return int(name)


def packed_tree(file: epath.Path, folder: epath.Path, files: Files, below: str = "") -> Tree:
    """Reads the tree of a msgpack file, and the values in it.

    Args:
        file: The file.
        folder: Where the arrays lie that it only names.
        files: The files of its store.
        below: See `ReadFile`.

    Raises:
        NotACheckpointError: It is no msgpack file of a tree.
    """
    nodes: dict[Path, str] = {}
    names: dict[Path, str] = {}
    values: dict[Path, np.ndarray[Any, Any]] = {}
    lost: dict[Path, str] = {}
    foreign: dict[Path, str] = {}
    by_orbax = file.name == MSGPACK_FILE
    try:
        leaves = list(itertools.islice(_walk(_unpack(file, files, below), ()), MOST_LEAVES + 1))
        check_paths([keys for keys, _ in leaves])
    except FieldError as error:
        raise _no_packed_tree(file, error) from error
    for keys, leaf in leaves:
        name = _array_name(leaf)
        nodes[keys] = (
            _NODE_TYPES.get(type(cast(object, leaf)), UNKNOWN_TYPE) if name is None else UNKNOWN_TYPE
        )
        if name is not None:
            names[keys] = name
            by_orbax = by_orbax and not isinstance(leaf, dict)
        elif nodes[keys] == UNKNOWN_TYPE:
            value = _value(leaf)
            if isinstance(value, _Unread):
                (lost if value.is_damaged else foreign)[keys] = f"{value.what} ({file})"
            else:
                values[keys] = value
    held = _Held(values=values, lost=lost, foreign=foreign)
    return Tree(nodes=nodes, names=names, folder=folder, by_orbax=by_orbax, **held)


def _unpack(file: epath.Path, files: Files, below: str) -> object:
    content = files.content(file, below) or b""
    hooks: Any = {"ext_hook": _extension, "object_pairs_hook": _map}
    try:
        tree = cast(object, msgpack.unpackb(content, strict_map_key=False, **hooks))
    # msgpack raises many types for a file that is something else.
    except Exception as error:
        is_there = not is_pointer(content)
        raise (_no_packed_tree(file, error) if is_there else not_downloaded(file)) from error
    kind = type(tree).__name__
    if not isinstance(tree, dict | list) or (isinstance(tree, dict) and _CHUNKED in tree):
        raise NotACheckpointError(f"{file} holds one {kind}, not the tree of a checkpoint")
    return cast(object, tree)


def _no_packed_tree(file: epath.Path, error: Exception) -> NotACheckpointError:
    if "incomplete input" in str(error):
        return NotACheckpointError(f"{file} ends before the tree in it does.", hints=[COPY_AGAIN])
    if isinstance(error, msgpack.ExtraData) and isinstance(error.unpacked, dict):
        what = f"{file} holds {len(cast(bytes, error.extra))} bytes behind the tree in it."
        return NotACheckpointError(what, hints=[COPY_AGAIN])
    reason = str(error).removesuffix(".")
    # These two say nothing.
    if isinstance(error, msgpack.StackError):
        reason = "its maps lie deeper in one another than a program's"
    elif isinstance(error, msgpack.FormatError):
        reason = "it holds a byte that msgpack does not use"
    hint = COPY_AGAIN if isinstance(error, FieldError | msgpack.StackError) else ANY_KIND
    return NotACheckpointError(f"{file} is no msgpack file of a checkpoint: {reason}.", hints=[hint])


@dataclasses.dataclass(frozen=True)
class _Unread:
    """What stands in a tree for a value that is no array."""

    what: str
    is_damaged: bool = False


def _map(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for key, value in pairs:
        if not isinstance(key, _KEYS):
            raise FieldError(f"a map in it has a {type(key).__name__} for a key")
        if key in found:
            raise FieldError(f"a map in it has the key {key!r:.{_SHOWN}} twice")
        found[key] = value
    return found


def _extension(code: int, data: bytes) -> object:
    """Returns the value of one of Flax's types."""
    if code not in (_ARRAY, _COMPLEX, _SCALAR):
        return _Unread(f"a value of msgpack's type {code}, which Flax does not write")
    what = "complex number" if code == _COMPLEX else "array"
    try:
        parts = cast(object, msgpack.unpackb(data, raw=True))
    except (ValueError, TypeError):  # In words that differ between versions of msgpack, or none.
        return _Unread(f"a damaged {what}: its bytes are no msgpack", True)
    try:
        if not isinstance(parts, list) or len(cast(list[Any], parts)) != (2 if code == _COMPLEX else 3):
            raise FieldError("it has not the parts that Flax writes")
        return complex(*cast(list[Any], parts)) if code == _COMPLEX else _array(*cast(list[Any], parts))
    except (ValueError, TypeError, ArithmeticError) as error:
        return _Unread(f"a damaged {what}: {str(error)[:_SHOWN]}", True)


def _array(lengths: Any, name: Any, content: Any) -> np.ndarray[Any, Any] | _Unread:
    shape = shape_field({"shape": lengths}, "shape", least=0)
    try:
        dtype = np.dtype(name.decode())
    except (AttributeError, TypeError, ValueError, SyntaxError) as error:
        raise FieldError(f"its dtype is {name!r:.{_SHOWN}}") from error
    if not is_array_dtype(dtype):
        return _foreign(dtype)
    size = math.prod(shape) * dtype.itemsize
    if len(content) != size:
        raise FieldError(f"it holds {len(content)} bytes where {shape} {dtype} takes {size}")
    return np.frombuffer(content, dtype).reshape(shape)


def _foreign(dtype: np.dtype[Any]) -> _Unread:
    return _Unread(f"values of dtype {dtype!s:.{_SHOWN}}")


def _value(leaf: Any) -> np.ndarray[Any, Any] | _Unread:
    if isinstance(leaf, _Unread):
        return leaf
    if not isinstance(leaf, _NUMBERS):
        return _Unread(f"a value of the type {type(leaf).__name__}")
    value = np.asarray(leaf)
    return value if is_array_dtype(value.dtype) else _foreign(value.dtype)


def _from_chunks(node: dict[str, Any]) -> np.ndarray[Any, Any] | _Unread:
    """Joins the parts in which Flax writes an array above a gigabyte."""
    try:
        shape = shape_field({"shape": _numbered(node, "shape")}, "shape", least=0)
        chunks = _numbered(node, "chunks")
        unread = next((chunk for chunk in chunks if isinstance(chunk, _Unread)), None)
        if unread is not None:
            return unread
        if not chunks or not all(isinstance(chunk, np.ndarray) and chunk.ndim == 1 for chunk in chunks):
            raise FieldError("chunks holds something else than arrays of one axis")
        value: np.ndarray[Any, Any] = np.concatenate(chunks)
        if value.size != math.prod(shape):
            raise FieldError(f"its chunks hold {value.size} values where {shape} takes {math.prod(shape)}")
        return value.reshape(shape)
    # NumPy joins no two of some dtypes.
    except (ValueError, TypeError) as error:
        return _Unread(f"a damaged array in chunks: {error}", True)


def _numbered(node: dict[str, Any], name: str) -> list[Any]:
    parts = object_of(node, name)
    lacking = [str(at) for at in range(len(parts)) if str(at) not in parts]
    if lacking:
        raise FieldError(f"{name} lacks number {lacking[0]} of {len(parts)}")
    return [parts[str(at)] for at in range(len(parts))]


def _walk(tree: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    check_depth(len(path))
    if isinstance(tree, dict) and _CHUNKED in tree:
        yield path, _from_chunks(cast(dict[str, Any], tree))
    elif isinstance(tree, dict) and tree and _spec_name(cast(dict[Any, Any], tree)) is None:
        for key, value in cast(dict[Any, Any], tree).items():
            yield from _walk(value, (*path, key))
    elif isinstance(tree, list | tuple) and tree:
        for number, value in enumerate(cast(list[Any], tree)):
            yield from _walk(value, (*path, number))
    else:
        yield path, tree


def _array_name(leaf: Any) -> str | None:
    """Returns the name of the array that a leaf stands for, or None for a value."""
    if isinstance(leaf, dict):
        return _spec_name(cast(dict[Any, Any], leaf))
    if not isinstance(leaf, str):
        return None
    if leaf.startswith(_ORBAX_PLACEHOLDERS):
        return leaf.partition("://")[2]
    return leaf.removeprefix(_FLAX_PLACEHOLDER) if leaf.startswith(_FLAX_PLACEHOLDER) else None


def _spec_name(node: Mapping[Any, Any]) -> str | None:
    """Returns the name in a TensorStore spec as T5X writes it, or None for another dict."""
    store = node.get("kvstore")
    if not isinstance(store, dict) or node.get("driver") != "zarr":
        return None
    # TensorStore before 0.1.14 had the path in the spec, later ones have it in the store.
    path = cast(dict[str, Any], store).get("path", node.get("path"))
    return path.strip("/") if isinstance(path, str) else None


def _named_tree(directory: epath.Path, files: Files, database: Store | None) -> Tree:
    """Splits the names of the arrays, which is all that is left to do.

    Orbax joins the keys of a path by dots, big_vision by `~`. A key of a big_vision tree
    may hold a dot, so one `~` anywhere decides.
    """
    found = sorted(_array_names(directory, files, database))
    by_big_vision = any(_BIG_VISION_SEPARATOR in name for name in found)
    separator = _BIG_VISION_SEPARATOR if by_big_vision else "."
    try:
        names: dict[Path, str] = {keys_of(name, separator): name for name in found}
        check_paths(names)
    except FieldError as error:
        raise NotACheckpointError(f"{directory} cannot be read: {error}.", hints=[ANY_KIND]) from error
    return Tree(
        nodes=dict.fromkeys(names, UNKNOWN_TYPE),
        names=names,
        # Orbax writes its tree last, and nobody knows which chunks should have been there.
        writes_fill=not (by_big_vision and _is_pointed_to(directory, files)),
        by_orbax=not by_big_vision,
    )


def _array_names(directory: epath.Path, files: Files, database: Store | None) -> Iterable[str]:
    keys = tuple(METADATA_KEY.values())
    if database is not None and database.catalog is not None:
        return [key.rpartition("/")[0] for key in database.catalog if key.endswith(keys)]
    folders = [child for child in files.folders(directory) if child.name not in _NO_ARRAYS]
    files.look_into(folders)
    return [child.name for child in folders if any(files.has_file(child, key) for key in keys)]


def _is_pointed_to(directory: epath.Path, files: Files) -> bool:
    """Tells whether big_vision finished this save, or a later one of the same run."""
    run, _, step = directory.name.rpartition("-")
    last = files.content(directory.parent / f"{run}-LAST") if run else None
    newest = (last or b"").strip().decode(errors="replace")
    return newest == step or (is_index(newest) and is_index(step) and int(newest) >= int(step))
