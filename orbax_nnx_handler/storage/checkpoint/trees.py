"""Checkpoints without `_METADATA`: what the tree is, and where its arrays lie.

Four programs wrote such, and all of them are read here to one form:

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

The tree of a checkpoint: which paths there are, before any shape is known.

Newer checkpoints have it in `_METADATA` (JSON); what older ones have instead is
read by `legacy`.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

from etils import epath
from flax import serialization

from orbax_nnx_handler.planning.core.errors import NotACheckpointError
from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.storage.checkpoint.stores import Store
from orbax_nnx_handler.storage.checkpoint.wrong_paths import damaged
from orbax_nnx_handler.storage.checkpoint.zarr import METADATA_KEY

MSGPACK_FILE = "checkpoint"

# The value types of `_METADATA`, for what older trees tell.
UNKNOWN_TYPE, STRING_TYPE = "Unknown", "string"
_NODE_TYPES: Mapping[type, str] = {
    type(None): "None",
    str: STRING_TYPE,
    dict: "Dict",
    list: "List",
    tuple: "Tuple",
}

_ORBAX_PLACEHOLDERS = ("PLACEHOLDER://", "AGGREGATED://")
_FLAX_PLACEHOLDER = "//GDAPlaceholder:"
_FLAX_FOLDER = "_gda"
_BIG_VISION_SEPARATOR = "~"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LegacyTree:
    """A tree from before `_METADATA`.

    Attributes:
        nodes: The value type of each path, empty nodes included.
        names: The name in the store of each path that is an array there.
        values: The values that the msgpack file itself holds.
        folder: Where the arrays lie.
    """

    nodes: Mapping[Path, str]
    names: Mapping[Path, str]
    values: Mapping[Path, Any]
    folder: epath.Path


def read_packed_tree(path: epath.Path) -> LegacyTree | None:
    """Reads a msgpack tree: the file itself, or `checkpoint` in a directory.

    Returns:
        The tree, or None if there is no such file.

    Raises:
        NotACheckpointError: The file is no msgpack file of a checkpoint.
    """
    if path.is_dir():
        file, folder = path / MSGPACK_FILE, path
        if not file.is_file():
            return None
    else:
        file, folder = path, path.parent / (path.name + _FLAX_FOLDER)
    nodes: dict[Path, str] = {}
    names: dict[Path, str] = {}
    values: dict[Path, Any] = {}
    for keys, leaf in _walk(_unpack(file), ()):
        name = _array_name(leaf)
        nodes[keys] = _node_type(leaf) if name is None else UNKNOWN_TYPE
        if name is not None:
            names[keys] = name
        elif nodes[keys] == UNKNOWN_TYPE:
            values[keys] = leaf
    return LegacyTree(nodes=nodes, names=names, values=values, folder=folder)


def split_names(names: Iterable[str]) -> dict[Path, str]:
    """Returns the names of arrays by the paths they spell, where no tree tells.

    Orbax joins the keys of a path by dots, big_vision by `~`. A key of a
    big_vision tree may hold a dot, so one `~` anywhere decides.
    """
    names = sorted(names)
    separator = _BIG_VISION_SEPARATOR if any(_BIG_VISION_SEPARATOR in name for name in names) else "."
    return {tuple(name.split(separator)): name for name in names}


def _unpack(file: epath.Path) -> object:
    try:
        tree = cast(object, serialization.msgpack_restore(file.read_bytes()))
    # msgpack raises many types for a file that is something else.
    except Exception as error:
        raise NotACheckpointError(
            f"{file} is no msgpack file of a checkpoint: {str(error).removesuffix('.')}.\n"
            "hint: pass a CheckpointManager's root, one of its steps, or an item in a step."
        ) from error
    if not isinstance(tree, dict | list | tuple):
        raise NotACheckpointError(f"{file} holds one {type(tree).__name__}, not the tree of a checkpoint")
    return cast(object, tree)


def _walk(tree: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    if isinstance(tree, dict) and tree and _spec_name(cast(dict[Any, Any], tree)) is None:
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


def _node_type(leaf: object) -> str:
    return _NODE_TYPES.get(type(leaf), UNKNOWN_TYPE)


TREE_FILE = "_METADATA"

# The value types of nodes that hold nothing, in the words of `_METADATA`.
EMPTY_TYPES = frozenset({"None", "Dict", "List", "Tuple", "NamedTuple"})
# Entries of an item directory that are no array.
_NO_ARRAYS = frozenset({TREE_FILE, MSGPACK_FILE, "_sharding", "array_metadatas", "d", "_strings.json"})
_SEQUENCE = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tree:
    """The tree of one item.

    Attributes:
        nodes: The value type of each path, empty nodes included.
        names: The name in the store of each path that has a value there.
        values: The values that the tree's file itself held.
        zarr3: Whether the arrays are said to be Zarr 3.
        custom: What the program stored with the item.
        writes_fill: Whether the writer stored chunks even where they equal the
            fill value, so that an absent chunk is a loss.
        folder: Where arrays lie that are not in the directory itself.
    """

    nodes: Mapping[Path, str]
    names: Mapping[Path, str]
    values: Mapping[Path, Any] = dataclasses.field(default_factory=dict[Path, Any])
    zarr3: bool = False
    custom: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    writes_fill: bool = False
    folder: epath.Path | None = None


def read_tree(directory: epath.Path, database: Callable[[], Store | None]) -> Tree:
    """Reads the tree of an item directory, or of a msgpack file.

    Args:
        directory: The item directory, or a file that `flax.serialization` wrote.
        database: Returns the directory's OCDBT store, if any; asked where nothing else names the arrays.

    Raises:
        NotACheckpointError: There is no tree; says what is there instead.
    """
    if not directory.exists():
        raise NotACheckpointError(f"{directory} does not exist")
    packed = _packed_tree(directory)
    if packed and not directory.is_dir():
        return packed
    listed = _metadata_tree(directory / TREE_FILE) if (directory / TREE_FILE).exists() else None
    if listed and packed:
        return dataclasses.replace(listed, values=packed.values, names={**listed.names, **packed.names})
    tree = listed or packed or _named_tree(directory, database())
    if not tree.nodes:
        raise NotACheckpointError(_what_is(directory))
    return tree


def _metadata_tree(file: epath.Path) -> Tree:
    try:
        content = json.loads(file.read_text())
        entries = [_entry(entry) for entry in content["tree_metadata"].values()]
    except (ValueError, KeyError, TypeError) as error:
        reason = f"cannot be read as the tree of a checkpoint: {str(error).removesuffix('.')}"
        raise NotACheckpointError(f"{file} {reason}.\nhint: {damaged(file)}") from error
    nodes = {path: value_type for path, _, value_type in entries}
    names = {path: name for path, name, value_type in entries if value_type not in EMPTY_TYPES}
    return Tree(
        nodes=nodes,
        names=names,
        zarr3=bool(content.get("use_zarr3")),
        custom=content.get("custom_metadata") or {},
        writes_fill=bool(content.get("store_array_data_equal_to_fill_value")),
    )


def _entry(entry: dict[str, Any]) -> tuple[Path, str, str]:
    keys = entry["key_metadata"]
    path = tuple([int(key["key"]) if key["key_type"] == _SEQUENCE else key["key"] for key in keys])
    return path, ".".join([key["key"] for key in keys]), entry["value_metadata"]["value_type"]


def _packed_tree(path: epath.Path) -> Tree | None:
    packed = read_packed_tree(path)
    if packed is None:
        return None
    return Tree(nodes=packed.nodes, names=packed.names, values=packed.values, folder=packed.folder)


def _named_tree(directory: epath.Path, database: Store | None) -> Tree:
    """Splits the names of the arrays, which is all that is left to do."""
    endings = tuple(f"/{key}" for key in METADATA_KEY.values())
    if database is not None:
        keys = [key.decode() for key in database.kvstore.list().result()]
        found = [key.rpartition("/")[0] for key in keys if key.endswith(endings)]
    else:
        found = [
            entry.name
            for entry in directory.iterdir()
            if entry.name not in _NO_ARRAYS and any((entry / key).exists() for key in METADATA_KEY.values())
        ]
    names = split_names(found)
    return Tree(nodes=dict.fromkeys(names, UNKNOWN_TYPE), names=names)


def _what_is(directory: epath.Path) -> str:
    """Says what a directory is that is no item, and which item was probably meant."""
    below = sorted(entry.name for entry in directory.iterdir() if entry.is_dir())
    items = [name for name in below if _is_item(directory / name)]
    if items:
        named = ", ".join(items)
        return f"{directory} is a step, not an item. It holds: {named}. hint: pass {directory / items[-1]}"
    steps = [name for name in below if any(_is_item(entry) for entry in (directory / name).iterdir())]
    if steps:
        newest = max(steps, key=lambda name: (len(name), name))
        return (
            f"{directory} is the root of a checkpoint manager, not an item. It holds the steps "
            f"{', '.join(steps)}. hint: pass an item of a step, below {directory / newest}"
        )
    return f"{directory} is no checkpoint: it holds neither {TREE_FILE}, nor a msgpack file, nor arrays"


def _is_item(directory: epath.Path) -> bool:
    return (directory / TREE_FILE).exists() or (directory / MSGPACK_FILE).is_file()
