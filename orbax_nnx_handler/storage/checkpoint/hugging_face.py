"""Hugging Face's directories and files: which of them are the weights, and what safetensors say.

Flax models of transformers (below 5) write `flax_model.msgpack`, or in parts
`flax_model-00001-of-00002.msgpack` with an index, or `model.safetensors` (modeling_flax_utils.py
`save_pretrained`); those of diffusers `diffusion_flax_model.msgpack`. A directory often holds the same
weights for PyTorch too, as safetensors, so Flax's own file is taken first.

A file of safetensors is eight bytes with the length of the header, the header (JSON), and the arrays' bytes
(https://github.com/huggingface/safetensors, "Format"); the engine reads these ranges. Nothing in it is code.
The header is a stranger's: every length in it is compared with the file's before anything is allocated.
"""

import dataclasses
import json
import logging
import math
import os
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
from etils import epath

from orbax_nnx_handler.planning.core.errors import NotACheckpointError
from orbax_nnx_handler.planning.core.folding import fold_paths
from orbax_nnx_handler.planning.core.leaves import StoredLeaf
from orbax_nnx_handler.planning.core.lines import counted
from orbax_nnx_handler.planning.core.paths import Path, spelled
from orbax_nnx_handler.storage.checkpoint import (
    FieldError,
    check_paths,
    each_once,
    keys_of,
    object_of,
    parse_object,
    shape_field,
    text_of,
)
from orbax_nnx_handler.storage.checkpoint.checkpoint import Checkpoint, Encoding, StoredArray
from orbax_nnx_handler.storage.checkpoint.directories import (
    HUGGING_FACE_INDEX,
    HUGGING_FACE_SAFETENSORS,
    first_unnamed,
    first_weights,
    read_config,
)
from orbax_nnx_handler.storage.checkpoint.trees import STRING_TYPE, UNKNOWN_TYPE, packed_tree
from orbax_nnx_handler.storage.checkpoint.wrong_paths import damaged, is_pointer, not_downloaded
from orbax_nnx_handler.storage.stores import kvstore
from orbax_nnx_handler.storage.stores.files import ANYWHERE, Files, ReadFile
from orbax_nnx_handler.storage.stores.ocdbt import Extent

_logger = logging.getLogger(__name__)
_LISTED = 20
_AGAIN = "download or copy the directory again."
_LONGEST_NAME = 255  # Of a file, on every system.
_OUTSIDE = frozenset("/\\\0")


def read_weights(path: epath.Path, files: Files) -> Checkpoint | None:
    """Reads the weights in a directory, or those that a file or an index is; None if it is none of these.

    Raises:
        NotACheckpointError: A file is damaged, or an index names one that is not there.
    """
    file = first_weights(path, files)
    if file is None:
        return None
    weights = _indexed(file, files) if file.name.endswith(HUGGING_FACE_INDEX) else _Weights([file])
    read = _read_headed if HUGGING_FACE_SAFETENSORS in file.name else _read_packed
    found = read(path, weights, files, read_config(file.parent, files))
    if weights.index is not None:
        _compare_sizes(weights.index, found, files)
    return found


def _compare_sizes(index: epath.Path, found: Checkpoint, files: Files) -> None:
    """Warns where an index counts other bytes than its parts hold: not all tools count alike."""
    said = parse_object(files.content(index)).get("metadata")
    total = cast("dict[str, Any]", said).get("total_size") if isinstance(said, dict) else None
    held = sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in found.leaves.values() if x.dtype)
    if isinstance(total, int | float) and total != held and not found.lost:
        _logger.warning("%s says that its parts hold %s bytes, and they hold %s", index, total, held)


@dataclasses.dataclass(frozen=True)
class _Weights:
    """The files that hold one model's weights.

    Attributes:
        parts: The files, all in one folder.
        index: The file that says which leaf lies in which part; None for a file alone.
        places: What it says: the name of the part by that of the leaf.
    """

    parts: Sequence[epath.Path]
    index: epath.Path | None = None
    places: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])

    def contradicted(self, held: Mapping[str, str]) -> Mapping[str, str]:
        """Returns the leaves that the parts do not hold as the index says, and why none can be trusted.

        Other readers take no more than the parts' names from an index. But where the two disagree,
        one of them was damaged, edited or left by another save, and no policy may fill what is lost; what
        is not wanted is no error, so it is said.

        Args:
            held: By a leaf's name that of the part in which it lies.
        """
        wrong: dict[str, str] = {}
        for name in dict.fromkeys((*self.places, *held)) if self.index else ():
            said, found = self.places.get(name), held.get(name)
            if said is None:
                wrong[name] = f"{found} holds it, and {self.index} does not name it"
            elif said != found:
                where = "and it does not" if found is None else f"and it lies in {found}"
                wrong[name] = f"{self.index} says that it lies in {said}, {where}"
        if wrong:
            leaves = fold_paths((name,) for name in wrong)
            _logger.warning("%s and its parts do not agree about %s: %s", self.index, leaves, _AGAIN)
        return wrong


def _read_packed(
    directory: epath.Path, weights: _Weights, files: Files, config: Mapping[str, Any]
) -> Checkpoint:
    """Reads files of msgpack whole: they have no directory of what lies where."""
    nodes: dict[Path, str] = {}
    values: dict[Path, np.ndarray[Any, Any]] = {}
    lost: dict[Path, str] = {}
    foreign: dict[Path, str] = {}
    paths: dict[str, Path] = {}
    places: dict[str, str] = {}
    twice: list[Path] = []
    files.ask(*(ReadFile(os.fspath(part)) for part in weights.parts))
    for part in weights.parts:
        tree = packed_tree(part, part.parent, files)
        held = {"/".join(map(str, path)): path for path, kind in tree.nodes.items() if kind == UNKNOWN_TYPE}
        twice += [path for name, path in held.items() if name in paths]
        paths |= held
        places |= dict.fromkeys(held, part.name)
        nodes |= tree.nodes
        values |= tree.values
        foreign |= tree.foreign
        lost |= tree.lost
        lost |= dict.fromkeys(tree.names, f"{part.name} names an array outside the file")
    wrong = {
        paths.get(name, tuple(name.split("/"))): why for name, why in weights.contradicted(places).items()
    }
    _check_tree(directory, {*paths.values(), *wrong}, twice)
    lost |= {path: why for path, why in wrong.items() if path not in values}
    texts = [path for path, kind in nodes.items() if kind == STRING_TYPE and path not in lost]
    return Checkpoint(
        directory=directory,
        leaves={
            **{path: StoredLeaf(path=path, shape=v.shape, dtype=v.dtype) for path, v in values.items()},
            **{path: StoredLeaf(path=path, shape=(), dtype=None) for path in texts},
        },
        lost=lost,
        damaged={path: why for path, why in wrong.items() if path in values},
        foreign=foreign,
        disk_format="msgpack",
        custom_metadata=config,
        step_metadata={},
        values=values,
        nodes=nodes,
        arrays={},
        writes_fill=True,
        is_of_flax_model=True,
    )


def _indexed(index: epath.Path, files: Files) -> _Weights:
    """Returns the files that an index names, each in the index's own folder, and what is in them."""
    try:
        fields = object_of(parse_object(files.content(index)), "weight_map")
        places = {text_of({key: key}, key): text_of(fields, key) for key in fields}
        separator = _SEPARATOR if HUGGING_FACE_SAFETENSORS in index.name else "/"
        check_paths([keys_of(key, separator) for key in places])
        names = sorted(set(places.values()))
        long = next((name for name in names if len(name) > _LONGEST_NAME), None)
        if long is not None:
            raise FieldError(f"weight_map names a file with {len(long)} characters")
        outside = [name for name in names if name in ("", ".", "..") or not _OUTSIDE.isdisjoint(name)]
        if outside or not names:
            raise FieldError(f"weight_map names {', '.join(map(repr, outside[:_LISTED])) or 'no file'}")
    except FieldError as error:
        what = f"{index} is no index of weights: {str(error).removesuffix('.')}."
        raise NotACheckpointError(what, hints=[damaged(index, files)]) from error
    absent = [name for name in names if not files.has_file(index.parent, name)]
    if absent:
        listed = "".join(f"\n  {name}" for name in absent[:_LISTED]) + "\n  ..." * (len(absent) > _LISTED)
        what = f"of {counted(len(names), 'file')} that {index} names, {len(absent)} cannot be found:{listed}"
        raise NotACheckpointError(what, hints=[_AGAIN])
    if part := first_unnamed(frozenset(names)):
        # No policy may fill what lies in a part that the index has lost.
        what = f"{index} does not name {part}, of which the names of the other parts tell."
        raise NotACheckpointError(what, hints=[_AGAIN])
    return _Weights([index.parent / name for name in names], index, places)


DISK_FORMAT = "safetensors"

_LENGTH = struct.Struct("<Q")
# The format's own bound; a header of 20,000 arrays has 2 MB.
_LONGEST_HEADER = 100_000_000
# Enough for the header of nearly every file, so that it comes in the first trip.
_FIRST = 1 << 18
_METADATA, _OF_FLAX = "__metadata__", {"format": "flax"}
# How transformers joins the keys of a tree (modeling_flax_utils.py `save_pretrained`).
_SEPARATOR = "."

_DTYPES: Mapping[str, Any] = {
    "BOOL": np.bool_,
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    "BF16": jnp.bfloat16,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
    "C64": np.complex64,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Found:
    """What the header says of one array.

    Attributes:
        name: The name in the header.
        encoding: How its values are stored; None where the header does not tell.
        extent: Where they lie; None where that is outside of the file.
        reason: What is wrong with it; empty for nothing.
    """

    name: str
    encoding: Encoding | None = None
    extent: Extent | None = None
    reason: str = ""


def _read_headed(
    directory: epath.Path, weights: _Weights, files: Files, config: Mapping[str, Any]
) -> Checkpoint:
    """Reads what files of safetensors hold together: their headers, no values."""
    # A file that the caller named may be a link; those of a directory stay within it.
    shards = weights.parts
    seen = kvstore.states_before(shards)
    headers = _read_headers(shards, files, ANYWHERE if files.is_file(directory) else "")
    found: dict[Path, _Found] = {}
    places: dict[str, str] = {}
    twice: list[Path] = []
    for shard, (header, start, size) in zip(shards, headers, strict=True):
        try:
            check_paths([keys_of(name, _SEPARATOR) for name in header])
        except FieldError as error:
            raise _no_safetensors(shard, files, str(error)) from error
        arrays = [*_arrays(shard.name, header, start, size)]
        rest = size - start - sum(one.extent.size for one in arrays if one.extent)
        if rest and not any(one.reason for one in arrays):  # The format has no holes: what follows was moved.
            raise _no_safetensors(shard, files, f"no array takes {rest} of the bytes behind its header")
        for one in arrays:
            keys = tuple(one.name.split(_SEPARATOR))
            twice += [keys] if keys in found else []
            found[keys] = one
            places[one.name] = shard.name
    for name, why in weights.contradicted(places).items():
        keys = tuple(name.split(_SEPARATOR))
        found[keys] = dataclasses.replace(found.get(keys, _Found(name=name)), reason=why)
    _check_tree(directory, found, twice)
    if not found:
        hint = "pass a file or a directory with weights."
        raise NotACheckpointError(f"{directory} holds no array.", hints=[hint])
    catalog: dict[str, bytes | Extent] = {}
    store = kvstore.open_archive(shards[0], catalog, seen, files.versions_of(shards))
    is_flax = all(header.get(_METADATA) == _OF_FLAX for header, *_ in headers)
    return dataclasses.replace(
        _checkpoint(directory, store, catalog, found, config), is_of_flax_model=is_flax
    )


def _read_headers(
    shards: Sequence[epath.Path], files: Files, below: str
) -> list[tuple[dict[str, Any], int, int]]:
    """Returns each file's header, where its arrays begin, and how many bytes it has."""
    folder = shards[0].parent
    sizes = [_size(shard, files) for shard in shards]
    firsts = [Extent(shard.name, 0, min(size, _FIRST)) for shard, size in zip(shards, sizes, strict=True)]
    beginnings = files.extents(folder, firsts, below)
    lengths = [_header_length(*each, files) for each in zip(shards, beginnings, sizes, strict=True)]
    rest = {
        at: Extent(shards[at].name, _FIRST, length + _LENGTH.size - _FIRST)
        for at, length in enumerate(lengths)
        if length + _LENGTH.size > _FIRST
    }
    if rest:
        for at, more in zip(rest, files.extents(folder, list(rest.values()), below), strict=True):
            beginnings[at] += more
    starts = [_LENGTH.size + length for length in lengths]
    contents = [content[_LENGTH.size : start] for content, start in zip(beginnings, starts, strict=True)]
    headers = [_header(*each, files) for each in zip(shards, contents, lengths, strict=True)]
    return list(zip(headers, starts, sizes, strict=True))


def _size(shard: epath.Path, files: Files) -> int:
    listed = files.entries(shard.parent).get(shard.name)
    if listed is None or listed.kind != "file":
        raise NotACheckpointError(f"there is no file {shard}.", hints=[damaged(shard, files)])
    return listed.size


def _header_length(shard: epath.Path, beginning: bytes, size: int, files: Files) -> int:
    if is_pointer(beginning):
        raise not_downloaded(shard)
    if len(beginning) < _LENGTH.size:
        raise _no_safetensors(shard, files, f"it has {len(beginning)} bytes")
    (length,) = _LENGTH.unpack(beginning[: _LENGTH.size])
    if length > min(size - _LENGTH.size, _LONGEST_HEADER):
        raise _no_safetensors(shard, files, f"its header would have {length} bytes, and the file has {size}")
    return length


def _header(shard: epath.Path, content: bytes, length: int, files: Files) -> dict[str, Any]:
    try:
        parsed = json.loads(content, object_pairs_hook=each_once)
    # Nested a thousand deep, the parser gives up with the interpreter's own error.
    except (ValueError, RecursionError) as error:
        why = f"its header is no JSON: {error or type(error).__name__}"
        raise _no_safetensors(shard, files, why) from error
    if len(content) != length or not isinstance(parsed, dict):
        raise _no_safetensors(shard, files, "its header is no JSON object")
    return cast("dict[str, Any]", parsed)


def _no_safetensors(shard: epath.Path, files: Files, why: str) -> NotACheckpointError:
    return NotACheckpointError(
        f"{shard} is no whole file of safetensors: {why.removesuffix('.')}.", hints=[damaged(shard, files)]
    )


def _arrays(file: str, header: Mapping[str, Any], start: int, size: int) -> Iterator[_Found]:
    """Yields what a header says of its arrays; two that share bytes are both damaged."""
    found = [_array(file, name, entry, start, size) for name, entry in header.items() if name != _METADATA]
    placed = [one for one in found if one.extent is not None and one.extent.size]
    placed.sort(key=lambda one: cast(Extent, one.extent).start)
    shared: set[str] = set()
    end, before = 0, ""
    for one in placed:
        assert one.extent is not None
        if one.extent.start < end:
            shared |= {one.name, before}
        if one.extent.start + one.extent.size > end:
            end, before = one.extent.start + one.extent.size, one.name
    for one in found:
        overlaps = one.name in shared
        yield dataclasses.replace(one, reason="its bytes are another array's too") if overlaps else one


def _array(file: str, name: str, entry: Any, start: int, size: int) -> _Found:
    try:
        if not isinstance(entry, dict):
            raise FieldError(f"it is a JSON {type(entry).__name__} where an object should be")
        fields = cast("dict[str, Any]", entry)
        encoding = _encoding(fields)
        begin, end = _offsets(fields)
    except FieldError as error:
        return _Found(name=name, reason=f"the header of {file} cannot be read: {error}")
    nbytes = math.prod(encoding.shape) * encoding.dtype.itemsize
    if end - begin != nbytes:
        takes = f"{encoding.shape} {encoding.dtype} takes {nbytes}"
        reason = f"{file} has {end - begin} bytes for it where {takes}"
        return _Found(name=name, encoding=encoding, reason=reason)
    if start + end > size:
        return _Found(name=name, encoding=encoding, reason=f"{file} ends before it does")
    return _Found(name=name, encoding=encoding, extent=Extent(file, start + begin, nbytes))


def _encoding(fields: dict[str, Any]) -> Encoding:
    name = text_of(fields, "dtype")
    if name not in _DTYPES:
        raise FieldError(f"dtype is {name[:80]!r}, which is none of NumPy's or JAX's")
    shape = shape_field(fields, "shape", least=0)
    # As the one chunk of a Zarr array without codecs: so its bytes lie.
    return Encoding(
        driver="zarr",
        shape=shape,
        dtype=jnp.dtype(_DTYPES[name]),
        chunk_shape=tuple(max(1, length) for length in shape),
        codec="raw",
        sharded=False,
        separator=".",
        fill_value=None,
    )


def _offsets(fields: dict[str, Any]) -> tuple[int, int]:
    offsets = shape_field(fields, "data_offsets", least=0)
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FieldError(f"data_offsets is {offsets}, which is no begin and end")
    return offsets[0], offsets[1]


def _check_tree(directory: epath.Path, found: Collection[Path], twice: Iterable[Path] = ()) -> None:
    inner = {keys[:depth] for keys in found for depth in range(1, len(keys))}
    both = [keys for keys in found if keys in inner]
    faults = {"several arrays under one name": [*twice], "an array and a subtree under one name": both}
    for what, paths in faults.items():
        if paths:
            listed = "\n".join(f"  {spelled(keys)}" for keys in dict.fromkeys(paths))
            hint = "save it again with a name of its own for each."
            raise NotACheckpointError(f"{directory} holds {what}:\n{listed}", hints=[hint])


def _checkpoint(
    directory: epath.Path,
    store: kvstore.Store,
    catalog: dict[str, bytes | Extent],
    found: Mapping[Path, _Found],
    config: Mapping[str, Any],
) -> Checkpoint:
    arrays: dict[Path, StoredArray] = {}
    for keys, one in found.items():
        if one.encoding is not None:
            array = StoredArray(name="/".join(map(str, keys)), store=store, encoding=one.encoding)
            arrays[keys] = array
            if one.extent is not None:
                catalog[array.key(tuple(0 for _ in one.encoding.shape))] = one.extent
    return Checkpoint(
        directory=directory,
        leaves={
            keys: StoredLeaf(
                path=keys,
                shape=array.encoding.shape,
                dtype=array.encoding.dtype,
                chunk_shape=array.encoding.shape,
            )
            for keys, array in arrays.items()
        },
        lost={keys: one.reason for keys, one in found.items() if one.encoding is None},
        damaged={keys: one.reason for keys, one in found.items() if one.encoding is not None and one.reason},
        disk_format=DISK_FORMAT,
        custom_metadata=config,
        step_metadata={},
        values=None,
        nodes=dict.fromkeys(arrays, UNKNOWN_TYPE),
        arrays=arrays,
        writes_fill=True,
    )
