"""NumPy archives (`.npz`) as big_vision and others wrote them: the directory, and each array's header.

An archive is a zip file of `.npy` files. A member's name is the path of an array,
`/` between the keys (big_vision/utils.py `tree_flatten_with_names`, `recover_tree`).
Nothing but the names tells the tree, so every key is a string.

A member (https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html) is
a header with dtype, order and shape, then the values in one run. `numpy.save` knows no
bfloat16 and stores its values as two raw bytes each, `V2`; big_vision's own reader takes
them for bfloat16 (big_vision/utils.py `recover_dtype`), and so does this one. Other raw
values could be of several types (`V1`: any float8, any 4-bit integer), so they are not guessed.
"""

import dataclasses
import io
import math
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, Literal, cast

import jax.numpy as jnp
import numpy as np
from etils import epath
from numpy.lib import format as npy_format

from orbax_nnx_handler.planning.core.dtypes import is_array_dtype
from orbax_nnx_handler.planning.core.errors import NotACheckpointError
from orbax_nnx_handler.planning.core.leaves import Shape, StoredLeaf
from orbax_nnx_handler.planning.core.paths import Path, render
from orbax_nnx_handler.storage.checkpoint import FieldError, check_paths, keys_of, shape_field
from orbax_nnx_handler.storage.checkpoint.checkpoint import Checkpoint, Encoding, StoredArray
from orbax_nnx_handler.storage.checkpoint.trees import STRING_TYPE, UNKNOWN_TYPE
from orbax_nnx_handler.storage.checkpoint.wrong_paths import damaged
from orbax_nnx_handler.storage.stores import kvstore
from orbax_nnx_handler.storage.stores.files import Files, RangedFile
from orbax_nnx_handler.storage.stores.ocdbt import Extent

_TEXT = "SU"
_LONGEST_HEADER = 10_000  # What NumPy holds to be safe to parse.
_BFLOAT16_BYTES = 2

_Header = tuple[Shape, bool, np.dtype[Any]]
_READERS: dict[tuple[int, int], Callable[[Any], _Header]] = {
    (1, 0): npy_format.read_array_header_1_0,
    (2, 0): npy_format.read_array_header_2_0,
}


class ForeignError(ValueError):
    """The member is in order, and its values are no numbers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NpyEncoding(Encoding):
    """The layout of one member.

    Attributes:
        prefix: Bytes before the first value: the header.
        order: Whether the last (`C`) or the first axis (`F`) lies closest together.
        stored_dtype: `dtype` in the byte order of the file.
        nbytes: Bytes of the unpacked member, the header included.
        crc: The checksum (CRC-32) of these bytes.
    """

    prefix: int
    order: Literal["C", "F"]
    stored_dtype: np.dtype[Any]
    nbytes: int
    crc: int

    def chunk_key(self, index: tuple[int, ...]) -> str:  # noqa: ARG002
        """Returns the key of the member's bytes below its name: there is one run of them."""
        return "npy"


@dataclasses.dataclass(frozen=True)
class TextArray:
    """A member that holds one text, which is no array to JAX."""


def read_header(info: zipfile.ZipInfo, member: IO[bytes]) -> NpyEncoding | TextArray:
    """Reads what a member's header says.

    Raises:
        ForeignError: The values are no numbers.
        ValueError: The member is no array, or its bytes are not those of its header.
    """
    shape, is_fortran, dtype = _parse(member)
    if dtype.kind in _TEXT and not shape:
        return TextArray()
    _check_type(dtype)
    if dtype.kind == "V":
        dtype = np.dtype(jnp.bfloat16)
    prefix = member.tell()
    shape = shape_field({"shape": list(shape)}, "shape", least=0)
    size = prefix + math.prod(shape) * dtype.itemsize
    if size != info.file_size:
        raise ValueError(f"holds {info.file_size} bytes where {shape} {dtype} takes {size}")
    return NpyEncoding(
        driver="npy",
        shape=shape,
        dtype=dtype.newbyteorder("="),
        # One chunk, which has no side of nothing.
        chunk_shape=tuple(max(1, length) for length in shape),
        codec="stored" if info.compress_type == zipfile.ZIP_STORED else "deflated",
        sharded=False,
        separator="",
        fill_value=None,
        prefix=prefix,
        order="F" if is_fortran else "C",
        stored_dtype=dtype,
        nbytes=size,
        crc=info.CRC,
    )


def _parse(member: IO[bytes]) -> _Header:
    version = npy_format.read_magic(member)
    if version not in _READERS:
        # Version 3.0 exists for one thing: names of fields that are not in Latin 1.
        raise ForeignError("records of several fields")
    # First, for a header of the second version may say that it has 4 GB, and a member may unpack to them.
    length = member.read(2 if version == (1, 0) else 4)
    header = int.from_bytes(length, "little")
    if header > _LONGEST_HEADER:
        raise ValueError(f"its header would have {header} bytes")
    return _READERS[version](io.BytesIO(length + member.read(header)))


def _check_type(dtype: np.dtype[Any]) -> None:
    if dtype.hasobject:
        raise ForeignError("pickled Python objects, which are never loaded")
    if dtype.fields is not None:
        raise ForeignError("records of several fields")
    if dtype.kind == "V" and dtype.itemsize != _BFLOAT16_BYTES:
        raise ForeignError(f"raw bytes (V{dtype.itemsize}), whose type NumPy does not store; V2 is bfloat16")
    if dtype.kind != "V" and not is_array_dtype(dtype):
        raise ForeignError(f"values of the type {dtype}, {_lacking(dtype)}")


def _lacking(dtype: np.dtype[Any]) -> str:
    return "which JAX does not have" if dtype.kind in "fc" else "which are no numbers"


DISK_FORMAT = "npz"

_ENDING = ".npy"
_SEPARATOR = "/"
_PACKINGS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ENCRYPTED = 1
# Bytes that are fetched at once behind a network: the directory of thousands of members, and for
# each of them as much as zipfile asks for to read a header of a hundred bytes.
_FETCHED_END, _FETCHED_HEADER = 1 << 20, 8 << 10
# The header before a member's bytes (APPNOTE.TXT 4.3.7): a signature, 22 bytes that the
# directory repeats, and the lengths of two fields that may differ from the directory's.
_LOCAL = struct.Struct("<4s22xHH")
_SIGNATURE = b"PK\x03\x04"
_SHOWN = 300  # Characters of another library's words.

# What damage makes zipfile and NumPy's parser of headers raise.
_DAMAGE = (
    *(zipfile.BadZipFile, struct.error, zlib.error, EOFError),
    *(SyntaxError, tokenize.TokenError, TypeError, ValueError, RuntimeError, OSError),
)


@dataclasses.dataclass(kw_only=True)
class _Found:
    """What the members of one archive turn out to be, while they are looked at."""

    encodings: dict[Path, NpyEncoding] = dataclasses.field(default_factory=dict[Path, NpyEncoding])
    values: dict[str, bytes | Extent] = dataclasses.field(default_factory=dict[str, bytes | Extent])
    texts: set[Path] = dataclasses.field(default_factory=set[Path])
    lost: dict[Path, str] = dataclasses.field(default_factory=dict[Path, str])
    foreign: dict[Path, str] = dataclasses.field(default_factory=dict[Path, str])


def read_archive(path: epath.Path, files: Files) -> Checkpoint:
    """Reads what an archive holds: its directory and headers, no values.

    Raises:
        NotACheckpointError: It is no whole archive of arrays, or its names are those of no tree.
    """
    seen = kvstore.states_before([path])
    with _file(path, files) as file, _opened(path, file, files) as archive:
        if isinstance(file, RangedFile):
            file.fetch((info.header_offset, _FETCHED_HEADER) for info in archive.infolist())
        try:
            check_paths([_keys(info) for info in archive.infolist()])
        except FieldError as error:
            raise NotACheckpointError(
                f"{path} cannot be read: {error}.", hints=[damaged(path, files)]
            ) from error
        members = _members(path, archive.infolist())
        found = _look(path, file, archive, members)
        store = kvstore.open_archive(path, found.values, seen, files.versions_of([path]))
        return _checkpoint(path, members, found, store)


def _keys(info: zipfile.ZipInfo) -> Path:
    return keys_of(info.filename.removesuffix(_ENDING), _SEPARATOR)


def _file(path: epath.Path, files: Files) -> IO[bytes]:
    if not files.remote:
        return cast(IO[bytes], path.open("rb"))
    file = RangedFile(files, path)
    # The directory of a zip file is its end.
    file.fetch([(max(0, file.size - _FETCHED_END), _FETCHED_END)])
    return cast(IO[bytes], file)


def _opened(path: epath.Path, file: IO[bytes], files: Files) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(file)
    except _DAMAGE as error:
        raise NotACheckpointError(
            f"{path} is no whole NumPy archive: {_in_words(error)}.",
            hints=[damaged(path, files)],
        ) from error


def _members(path: epath.Path, infos: Iterable[zipfile.ZipInfo]) -> dict[Path, zipfile.ZipInfo]:
    """Returns the members by the paths that their names spell."""
    members: dict[Path, zipfile.ZipInfo] = {}
    twice: list[Path] = []
    for info in infos:
        # `is_dir` fails on a member without a name.
        if info.filename.endswith("/"):
            continue
        keys = _keys(info)
        if keys in members:
            twice.append(keys)
        members[keys] = info
    if not any(info.filename.endswith(_ENDING) for info in members.values()):
        raise NotACheckpointError(
            f"{path} is a zip file without arrays.",
            hints=["pass a file that numpy.savez wrote, or a checkpoint of Orbax."],
        )
    if twice:
        raise _no_tree(path, "holds several arrays under one name", twice)
    inner = {keys[:depth] for keys in members for depth in range(1, len(keys))}
    both = [keys for keys in members if keys in inner]
    if both:
        raise _no_tree(path, "has an array and a subtree under one name", both)
    return members


def _no_tree(path: epath.Path, what: str, paths: Iterable[Path]) -> NotACheckpointError:
    listed = "\n".join(f"  {render(keys)}" for keys in dict.fromkeys(paths))
    return NotACheckpointError(
        f"{path} {what}:\n{listed}", hints=["save it again with a name of its own for each array."]
    )


def _look(
    path: epath.Path, file: IO[bytes], archive: zipfile.ZipFile, members: dict[Path, zipfile.ZipInfo]
) -> _Found:
    found, size = _Found(), file.seek(0, os.SEEK_END)
    for keys, info in members.items():
        try:
            _check(info)
            extent = _extent(path, file, info)
            # First, since Python 3.13's zipfile takes a file that was cut off for an attack.
            if extent.start + extent.size > size:
                raise ValueError(f"compress_size is {extent.size}, and the file ends before it does")
            with archive.open(info) as member:
                header = read_header(info, member)
        except ForeignError as error:
            found.foreign[keys] = f"{error} ({info.filename} in {path})"
        except _DAMAGE as error:
            found.lost[keys] = f"{info.filename} in {path} is damaged: {_in_words(error)}"
        else:
            if isinstance(header, TextArray):
                found.texts.add(keys)
            else:
                # Behind a network the bytes of small members came with their headers.
                end = extent.start + extent.size
                held = file.held(extent.start, end) if isinstance(file, RangedFile) else b""
                found.encodings[keys] = header
                found.values[f"{info.filename}/{header.chunk_key(())}"] = (
                    held if len(held) == extent.size else extent
                )
    return found


def _in_words(error: Exception) -> str:
    # zipfile says nothing where a member ends early, and NumPy quotes all of a header.
    return (str(error) or type(error).__name__)[:_SHOWN].removesuffix(".")


def _check(info: zipfile.ZipInfo) -> None:
    if not info.filename.endswith(_ENDING):
        raise ForeignError("a file that is no array")
    if info.flag_bits & _ENCRYPTED:
        raise ForeignError("encrypted")
    if info.compress_type not in _PACKINGS:
        raise ForeignError("packed in a way that numpy.savez does not use: neither stored nor deflated")


def _extent(path: epath.Path, file: IO[bytes], info: zipfile.ZipInfo) -> Extent:
    """Returns where a member's packed bytes lie in the file."""
    file.seek(info.header_offset)
    local = file.read(_LOCAL.size)
    if len(local) < _LOCAL.size or not local.startswith(_SIGNATURE):
        raise ValueError(f"header_offset is {info.header_offset}, where no member begins")
    _, name, extra = _LOCAL.unpack(local)
    return Extent(path.name, info.header_offset + _LOCAL.size + name + extra, info.compress_size)


def _checkpoint(
    path: epath.Path, members: dict[Path, zipfile.ZipInfo], found: _Found, store: kvstore.Store
) -> Checkpoint:
    arrays = {
        keys: StoredArray(name=members[keys].filename, store=store, encoding=encoding)
        for keys, encoding in found.encodings.items()
    }
    readable = [keys for keys in members if keys in arrays or keys in found.texts]
    return Checkpoint(
        directory=path,
        leaves=dict(_leaves(readable, found)),
        lost=found.lost,
        foreign=found.foreign,
        disk_format=DISK_FORMAT,
        custom_metadata={},
        step_metadata={},
        values=None,
        nodes={keys: STRING_TYPE if keys in found.texts else UNKNOWN_TYPE for keys in readable},
        arrays=arrays,
        writes_fill=True,
    )


def _leaves(paths: Iterable[Path], found: _Found) -> Iterator[tuple[Path, StoredLeaf]]:
    for keys in paths:
        encoding = found.encodings.get(keys)
        if encoding is None:
            yield keys, StoredLeaf(path=keys, shape=(), dtype=None)
        else:
            # It is read in one piece, whatever is needed of it.
            yield (
                keys,
                StoredLeaf(path=keys, shape=encoding.shape, dtype=encoding.dtype, chunk_shape=encoding.shape),
            )
