"""NumPy archives (`.npz`) as big_vision and others wrote them: the directory, and each array's header.

An archive is a zip file of `.npy` files. A member's name is the path of an array,
`/` between the keys (big_vision/utils.py `tree_flatten_with_names`, `recover_tree`).
Nothing but the names tells the tree, so every key is a string.
"""

import dataclasses
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from typing import IO, cast

from etils import epath

from orbax_nnx_handler.planning.errors import NotACheckpointError
from orbax_nnx_handler.planning.leaves import StoredLeaf
from orbax_nnx_handler.planning.paths import Path, render
from orbax_nnx_handler.transfer import stores
from orbax_nnx_handler.transfer.catalog import Extent
from orbax_nnx_handler.transfer.checkpoint import Checkpoint, StoredArray
from orbax_nnx_handler.transfer.legacy import STRING_TYPE, UNKNOWN_TYPE
from orbax_nnx_handler.transfer.npy import ForeignError, NpyEncoding, Text, read_header
from orbax_nnx_handler.transfer.wrong_paths import damaged

DISK_FORMAT = "npz"

_ENDING = ".npy"
_SEPARATOR = "/"
_PACKINGS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ENCRYPTED = 1
# The header before a member's bytes (APPNOTE.TXT 4.3.7): a signature, 22 bytes that the
# directory repeats, and the lengths of two fields that may differ from the directory's.
_LOCAL = struct.Struct("<4s22xHH")
_SIGNATURE = b"PK\x03\x04"

# What damage makes zipfile and NumPy's parser of headers raise.
_DAMAGE = (
    *(zipfile.BadZipFile, struct.error, zlib.error, EOFError),
    *(SyntaxError, tokenize.TokenError, TypeError, ValueError, RuntimeError),
)


@dataclasses.dataclass(kw_only=True)
class _Found:
    """What the members of one archive turn out to be, while they are looked at."""

    encodings: dict[Path, NpyEncoding] = dataclasses.field(default_factory=dict[Path, NpyEncoding])
    extents: dict[Path, Extent] = dataclasses.field(default_factory=dict[Path, Extent])
    texts: set[Path] = dataclasses.field(default_factory=set[Path])
    lost: dict[Path, str] = dataclasses.field(default_factory=dict[Path, str])
    foreign: dict[Path, str] = dataclasses.field(default_factory=dict[Path, str])


def read_archive(path: epath.Path) -> Checkpoint:
    """Reads what an archive holds: its directory and headers, no values.

    Args:
        path: The file.

    Raises:
        NotACheckpointError: It is no whole archive of arrays, or its names are those of no tree.
    """
    with cast(IO[bytes], path.open("rb")) as file, _opened(path, file) as archive:
        members = _members(path, archive.infolist())
        return _checkpoint(path, members, _look(path, file, archive, members))


def _opened(path: epath.Path, file: IO[bytes]) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(file)
    except _DAMAGE as error:
        raise NotACheckpointError(
            f"{path} is no whole NumPy archive: {str(error).removesuffix('.')}.\nhint: {damaged(path)}"
        ) from error


def _members(path: epath.Path, infos: Iterable[zipfile.ZipInfo]) -> dict[Path, zipfile.ZipInfo]:
    """Returns the members by the paths that their names spell."""
    members: dict[Path, zipfile.ZipInfo] = {}
    twice: list[Path] = []
    for info in infos:
        if info.is_dir():
            continue
        keys = tuple(info.filename.removesuffix(_ENDING).split(_SEPARATOR))
        if keys in members:
            twice.append(keys)
        members[keys] = info
    if not any(info.filename.endswith(_ENDING) for info in members.values()):
        raise NotACheckpointError(
            f"{path} is a zip file without arrays.\n"
            "hint: pass a file that numpy.savez wrote, or a checkpoint of Orbax."
        )
    if twice:
        raise NotACheckpointError(_no_tree(path, "holds several arrays under one name", twice))
    inner = {keys[:depth] for keys in members for depth in range(1, len(keys))}
    both = [keys for keys in members if keys in inner]
    if both:
        raise NotACheckpointError(_no_tree(path, "has an array and a subtree under one name", both))
    return members


def _no_tree(path: epath.Path, what: str, paths: Iterable[Path]) -> str:
    listed = "\n".join(f"  {render(keys)}" for keys in dict.fromkeys(paths))
    return f"{path} {what}:\n{listed}\nhint: save it again with a name of its own for each array."


def _look(
    path: epath.Path, file: IO[bytes], archive: zipfile.ZipFile, members: dict[Path, zipfile.ZipInfo]
) -> _Found:
    found, size = _Found(), file.seek(0, os.SEEK_END)
    for keys, info in members.items():
        try:
            _check(info)
            with archive.open(info) as member:
                header = read_header(info, member)
            extent = _extent(path, file, info)
            if extent.start + extent.size > size:
                raise ValueError("the file ends before it does")
        except ForeignError as error:
            found.foreign[keys] = str(error)
        except _DAMAGE as error:
            found.lost[keys] = f"{info.filename} in {path} is damaged: {str(error).removesuffix('.')}"
        else:
            if isinstance(header, Text):
                found.texts.add(keys)
            else:
                found.encodings[keys], found.extents[keys] = header, extent
    return found


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
    signature, name, extra = _LOCAL.unpack(file.read(_LOCAL.size))
    if signature != _SIGNATURE:
        raise ValueError("no member begins where the directory says")
    return Extent(path.name, info.header_offset + _LOCAL.size + name + extra, info.compress_size)


def _checkpoint(path: epath.Path, members: dict[Path, zipfile.ZipInfo], found: _Found) -> Checkpoint:
    catalog: dict[str, bytes | Extent] = {}
    store = stores.open_archive(path, catalog)
    arrays = {
        keys: StoredArray(name=members[keys].filename, store=store, encoding=encoding)
        for keys, encoding in found.encodings.items()
    }
    catalog |= {array.key(()): found.extents[keys] for keys, array in arrays.items()}
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
