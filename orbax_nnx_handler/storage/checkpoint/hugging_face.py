"""Directories of Hugging Face's libraries: which files in them are the weights.

Flax models of transformers (below 5) write `flax_model.msgpack`, or in parts
`flax_model-00001-of-00002.msgpack` with an index, or `model.safetensors` (modeling_flax_utils.py
`save_pretrained`); those of diffusers `diffusion_flax_model.msgpack`. A directory often holds the same
weights for PyTorch too, as safetensors, so Flax's own file is taken first.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from orbax_nnx_handler.planning.core.errors import NotACheckpointError
from orbax_nnx_handler.planning.core.leaves import StoredLeaf
from orbax_nnx_handler.planning.core.paths import Path, spelled
from orbax_nnx_handler.storage.checkpoint.checkpoint import Checkpoint
from orbax_nnx_handler.storage.checkpoint.directories import (
    HUGGING_FACE_FILES,
    HUGGING_FACE_INDEX,
    HUGGING_FACE_SAFETENSORS,
    is_weights_file,
)
from orbax_nnx_handler.storage.checkpoint.fields import FieldError, object_of, parse_object, text_of
from orbax_nnx_handler.storage.checkpoint.safetensors import read_safetensors
from orbax_nnx_handler.storage.checkpoint.trees import packed_tree
from orbax_nnx_handler.storage.checkpoint.wrong_paths import damaged
from orbax_nnx_handler.storage.stores.files import Files, ReadFile

CONFIG_FILE = "config.json"
_LONGEST_CONFIG = 1 << 20
_LISTED = 20
_LONGEST_NAME = 255  # Of a file, on every system.
_OUTSIDE = frozenset("/\\\0")


def read_weights(path: epath.Path, files: Files) -> Checkpoint | None:
    """Reads the weights in a directory, or those that a file or an index is; None if it is none of these.

    Raises:
        NotACheckpointError: A file is damaged, or an index names one that is not there.
    """
    if files.is_file(path):
        file = path if is_weights_file(path.name) else None
    else:
        name = next((name for name in HUGGING_FACE_FILES if files.has_file(path, name)), None)
        file = None if name is None else path / name
    if file is None:
        return None
    parts = _parts(file, files) if file.name.endswith(HUGGING_FACE_INDEX) else [file]
    config = _read_config(file.parent, files)
    if HUGGING_FACE_SAFETENSORS in file.name:
        return read_safetensors(path, parts, files, config)
    return _read_packed(path, parts, files, config)


def _read_packed(
    directory: epath.Path, parts: Sequence[epath.Path], files: Files, config: Mapping[str, Any]
) -> Checkpoint:
    """Reads files of msgpack whole: they have no directory of what lies where."""
    nodes: dict[Path, str] = {}
    values: dict[Path, np.ndarray[Any, Any]] = {}
    lost: dict[Path, str] = {}
    foreign: dict[Path, str] = {}
    files.ask(*(ReadFile(os.fspath(part)) for part in parts))
    for part in parts:
        tree = packed_tree(part, part.parent, files)
        twice = next((path for path in tree.nodes if path in nodes), None)
        if twice is not None:
            what = f"{part} holds {spelled(twice)}, which another part of the weights holds too."
            raise NotACheckpointError(what, hints=[damaged(part, files)])
        nodes |= tree.nodes
        values |= tree.values
        foreign |= tree.foreign
        lost |= tree.lost
        lost |= dict.fromkeys(tree.names, f"{part.name} names an array outside the file")
    leaves = {
        path: StoredLeaf(path=path, shape=value.shape, dtype=value.dtype) for path, value in values.items()
    }
    return Checkpoint(
        directory=directory,
        leaves=leaves,
        lost=lost,
        foreign=foreign,
        disk_format="msgpack",
        custom_metadata=config,
        step_metadata={},
        values=values,
        nodes=nodes,
        arrays={},
        writes_fill=True,
    )


def _parts(index: epath.Path, files: Files) -> list[epath.Path]:
    """Returns the files that an index names: each in the index's own folder."""
    try:
        fields = object_of(parse_object(files.content(index)), "weight_map")
        names = sorted({text_of(fields, key) for key in fields})
        long = next((name for name in names if len(name) > _LONGEST_NAME), None)
        if long is not None:
            raise FieldError(f"weight_map names a file with {len(long)} characters")
        outside = [name for name in names if name in ("", ".", "..") or not _OUTSIDE.isdisjoint(name)]
        if outside or not names:
            raise FieldError(f"weight_map names {', '.join(map(repr, outside[:_LISTED])) or 'no file'}")
    except FieldError as error:
        raise NotACheckpointError(
            f"{index} is no index of weights: {str(error).removesuffix('.')}.", hints=[damaged(index, files)]
        ) from error
    absent = [name for name in names if not files.has_file(index.parent, name)]
    if absent:
        listed = "\n".join(f"  {name}" for name in absent[:_LISTED])
        listed += f"... and {len(absent) - _LISTED} more" if len(absent) > _LISTED else ""
        raise NotACheckpointError(
            f"{len(absent)} of the {len(names)} files that {index} names are not there:\n{listed}",
            hints=["download or copy the directory again."],
        )
    return [index.parent / name for name in names]


def _read_config(folder: epath.Path, files: Files) -> Mapping[str, Any]:
    """Returns what `config.json` says, by its name; nothing if it is absent or no JSON object."""
    listed = files.entries(folder).get(CONFIG_FILE)
    if listed is None or listed.kind != "file" or listed.size > _LONGEST_CONFIG:
        return {}
    content = files.optional(folder / CONFIG_FILE, warn=True)
    try:
        return {} if content is None else {CONFIG_FILE: parse_object(content)}
    # Nothing of a restore depends on it.
    except FieldError:
        return {}
