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
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

from etils import epath
from flax import serialization

from orbax_nnx_handler.planning.errors import NotACheckpointError
from orbax_nnx_handler.planning.paths import Path

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
_FLAX_FILE = re.compile(r"checkpoint_\d+")
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


def is_flax_file(path: epath.Path) -> bool:
    """Tells whether a file is named as `flax.training.checkpoints` names a step's."""
    return _FLAX_FILE.fullmatch(path.name) is not None and path.is_file()


def last_of_big_vision(path: epath.Path) -> epath.Path:
    """Returns the checkpoint that `<path>-LAST` points to, or the path itself if there is no such file."""
    pointer = path.parent / f"{path.name}-LAST"
    return path.parent / f"{path.name}-{pointer.read_text().strip()}" if pointer.is_file() else path


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
