"""The tree of a checkpoint: which paths there are, before any shape is known.

Newer checkpoints have it in `_METADATA` (JSON); what older ones have instead is
read by `legacy`.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from orbax_nnx_handler.planning.errors import NotACheckpointError
from orbax_nnx_handler.planning.paths import Path
from orbax_nnx_handler.transfer import legacy
from orbax_nnx_handler.transfer.stores import Store
from orbax_nnx_handler.transfer.wrong_paths import damaged
from orbax_nnx_handler.transfer.zarr import METADATA_KEY

TREE_FILE = "_METADATA"
MSGPACK_FILE = legacy.MSGPACK_FILE

# The value types of nodes that hold nothing, in the words of `_METADATA`.
EMPTY_TYPES = frozenset({"None", "Dict", "List", "Tuple", "NamedTuple"})
STRING_TYPE = legacy.STRING_TYPE
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
    packed = legacy.read_packed_tree(path)
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
    names = legacy.split_names(found)
    return Tree(nodes=dict.fromkeys(names, legacy.UNKNOWN_TYPE), names=names)


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
