"""The files of an OCDBT database: the manifest and the nodes of its B-tree, as bytes.

The format is described at https://google.github.io/tensorstore/kvstore/ocdbt/index.html#storage-format.
A database comes from a stranger: every count, length, height and path is checked before
anything is built from it, and the checksums are honoured. What is built is at most
`_limit` bytes for the bytes that are really there.
"""

import dataclasses
import functools
import itertools
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import zstandard

_POLYNOMIAL = 0x82F63B78
_ONES = 0xFFFFFFFF
# Bytes that are looked up in one table, of 256 KiB; runs that are looked up at a time.
_RUN = 256
_BLOCK_RUNS = 4096

_Words = np.ndarray[Any, np.dtype[np.uint32]]


def crc32c(content: bytes | memoryview) -> int:
    """Returns the CRC-32C checksum (Castagnoli, RFC 3720) of at least four bytes.

    The checksum is linear: what each byte of a run adds at its place is looked up, for all bytes at once.
    Two neighbours are joined by letting the left one run on over as many zero bytes as the right one is
    long, which is linear too.
    """
    data = np.frombuffer(content, np.uint8)
    rows = np.zeros((-(-len(data) // _RUN), _RUN), np.uint8)
    # Zeros in front change nothing as long as the register is zero; what it really begins
    # with is added to the first four bytes instead.
    filled = rows.reshape(-1)[rows.size - len(data) :]
    filled[:] = data
    filled[:4] ^= 0xFF
    place, added = np.arange(_RUN), _added()
    blocks = (rows[start : start + _BLOCK_RUNS] for start in range(0, len(rows), _BLOCK_RUNS))
    state: _Words = np.concatenate([np.bitwise_xor.reduce(added[place, block], axis=1) for block in blocks])
    level = 0
    while len(state) > 1:
        if len(state) % 2:
            state = np.concatenate([np.zeros(1, np.uint32), state])
        state = _apply(_over_zeros(level), state[0::2]) ^ state[1::2]
        level += 1
    return int(state[0]) ^ _ONES


@functools.cache
def _added() -> _Words:
    """Returns what a byte of a run adds to the register at the run's end, by place and value."""
    words = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        words = (words >> np.uint32(1)) ^ ((words & np.uint32(1)) * np.uint32(_POLYNOMIAL))
    places = [words]
    while len(places) < _RUN:
        places.append(words[places[-1] & 0xFF] ^ (places[-1] >> np.uint32(8)))
    return np.stack(places[::-1])


@functools.cache
def _over_zeros(level: int) -> _Words:
    """Returns where `2**level` runs of zeros take the register, by each of its four bytes."""
    # What is in the register acts as if it were added to the four bytes that come.
    return _added()[:4] if not level else _apply(_over_zeros(level - 1), _over_zeros(level - 1))


def _apply(images: _Words, words: _Words) -> _Words:
    """Applies the linear map that takes byte `value` at place `at` to `images[at, value]`."""
    first, second, third, fourth = ((words >> np.uint32(8 * at)) & 0xFF for at in range(4))
    return images[0, first] ^ images[1, second] ^ images[2, third] ^ images[3, fourth]


_MANIFEST, _NODE = 0x0CDB3A2A, 0x0CDB20DE
_HEADER, _FOOTER = struct.Struct(">I"), struct.Struct("<I")
_LENGTH = struct.Struct("<Q")
_MIN_BYTES = 16
_UUID_BYTES, _COMMIT_TIME_BYTES, _LEVEL_BYTES = 16, 8, 4
_MAX_ARITY = 1 << 20
_MAX_VERSIONS = 1 << 16
_MAX_NAME = (1 << 16) - 1
_MAX_INLINE = 1 << 20
_MISSING = (1 << 64) - 1
_VARINT_BYTES = 10
_STEP = 1 << 20
_WINDOW = 1 << 26

_Bytes = np.ndarray[Any, np.dtype[np.uint8]]
_Numbers = np.ndarray[Any, np.dtype[np.uint64]]


class DamagedDatabaseError(ValueError):
    """A file of the database is not what the format says; the message names file and field."""


class Extent(NamedTuple):
    """A run of bytes in a file below the database's directory."""

    file: str
    start: int
    size: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class NodeReference:
    """Where a node of the B-tree is.

    Attributes:
        extent: Its bytes.
        base: What comes before every path in it.
        height: Levels below it.
        prefix: What comes before every key in it.
    """

    extent: Extent
    base: str
    height: int
    prefix: bytes = b""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Node:
    """A decoded node: either children or values."""

    children: Sequence[NodeReference] = ()
    keys: Sequence[bytes] = ()
    values: Sequence[bytes | Extent] = ()


def decode_manifest(content: bytes, file: str) -> NodeReference | None:
    """Returns the root of the newest version, or None if it holds nothing.

    Raises:
        DamagedDatabaseError: See the class.
    """
    fields = _decode(content, _MANIFEST, file)
    fields.take(_UUID_BYTES, "uuid")
    if fields.byte("manifest_kind"):
        raise fields.fault("manifest_kind", "numbered manifests are not supported")
    fields.varints(2, "max_inline_value_bytes and max_decoded_node_bytes")
    fields.byte("version_tree_arity_log2")
    if fields.varint("compression_method"):
        fields.take(_LEVEL_BYTES, "compression configuration")
    files = _data_files(fields, "")
    count = fields.count("num_versions", _MAX_VERSIONS)
    if not count:
        raise fields.fault("num_versions", "0")
    fields.varints(count, "generation_number")
    height = int(fields.take(count, "root_height")[-1])
    extent, base = _references(fields, count, files)[-1]
    fields.take(count * _COMMIT_TIME_BYTES, "commit_time")
    if extent.start == extent.size == _MISSING:
        return None
    return NodeReference(extent=_checked(fields, extent), base=base, height=height)


def decode_node(content: bytes, reference: NodeReference) -> Node:
    """Returns what a node holds, keys without their prefix.

    Raises:
        DamagedDatabaseError: See the class.
    """
    place = f"{reference.extent.file} (B-tree node at byte {reference.extent.start})"
    fields = _decode(content, _NODE, place)
    height = fields.byte("height")
    if height != reference.height:
        raise fields.fault("height", f"{height} where the node above it says {reference.height}")
    files = _data_files(fields, reference.base)
    count = fields.count("num_entries", _MAX_ARITY)
    if not count:
        raise fields.fault("num_entries", "0")
    if not height:
        keys, _ = _keys(fields, count, interior=False)
        node = Node(keys=keys, values=_values(fields, count, files))
    else:
        keys, common = _keys(fields, count, interior=True)
        places = _references(fields, count, files)
        node = Node(
            children=[
                NodeReference(
                    extent=_checked(fields, extent),
                    base=base,
                    height=height - 1,
                    prefix=reference.prefix + key[:length],
                )
                for key, length, (extent, base) in zip(keys, common, places, strict=True)
            ]
        )
    fields.end()
    return node


class _Fields:
    """The fields of one file, read in order."""

    def __init__(self, data: _Bytes, place: str, limit: int) -> None:
        self._data, self._at, self._place = data, 0, place
        self.limit = limit

    def fault(self, field: str, reason: str) -> DamagedDatabaseError:
        return DamagedDatabaseError(f"{self._place} is damaged: {field}: {reason}")

    def take(self, size: int, field: str) -> _Bytes:
        taken = self._data[self._at : self._at + size]
        if len(taken) < size:
            raise self.fault(field, "the data ends within it")
        self._at += size
        return taken

    def rest(self) -> _Bytes:
        return self._data[self._at :]

    def byte(self, field: str) -> int:
        return int(self.take(1, field)[0])

    def varint(self, field: str) -> int:
        return self.varints(1, field)[0]

    def count(self, field: str, most: int) -> int:
        """Returns how many entries follow; each takes a byte at least."""
        count = self.varint(field)
        if count > min(most, len(self._data) - self._at):
            raise self.fault(field, f"{count} is more than there can be")
        return count

    def varints(self, count: int, field: str) -> list[int]:
        return self.column(count, field).tolist()

    def column(self, count: int, field: str) -> _Numbers:
        """Returns numbers in the encoding uleb128, all of a column at once."""
        if not count:
            return np.zeros(0, np.uint64)
        window = self._data[self._at : self._at + count * _VARINT_BYTES]
        ends = np.flatnonzero(window < 0x80)[:count]
        if len(ends) < count:
            raise self.fault(field, "the data ends within it")
        lengths = np.diff(ends, prepend=-1)
        longest = int(lengths.max())
        starts = ends - lengths + 1
        if longest > _VARINT_BYTES or (
            longest == _VARINT_BYTES and (window[ends[lengths == _VARINT_BYTES]] > 1).any()
        ):
            raise self.fault(field, "a number of more than 64 bits")
        values = np.zeros(count, np.uint64)
        for at in range(longest):
            present = np.flatnonzero(lengths > at)
            bits = window[starts[present] + at].astype(np.uint64) & np.uint64(0x7F)
            values[present] |= bits << np.uint64(7 * at)
        self._at += int(ends[-1]) + 1
        return values

    def end(self) -> None:
        if self._at != len(self._data):
            raise self.fault("length", f"{len(self._data) - self._at} bytes follow the last field")


def _decode(content: bytes, magic: int, place: str) -> _Fields:
    """Checks header and checksum; returns the fields behind them, unpacked."""
    whole = _Fields(np.frombuffer(content, np.uint8), place, 0)
    if len(content) < _MIN_BYTES:
        raise whole.fault("length", f"{len(content)} bytes")
    if _HEADER.unpack_from(content)[0] != magic:
        raise whole.fault("magic_value", content[:4].hex())
    (length,) = _LENGTH.unpack_from(content, 4)
    if length != len(content):
        raise whole.fault("length", f"{length} where there are {len(content)} bytes")
    if _FOOTER.unpack_from(content, len(content) - 4)[0] != crc32c(memoryview(content)[:-4]):
        raise whole.fault("crc32c_checksum", "the bytes have another one")
    body = _Fields(np.frombuffer(content, np.uint8)[12:-4], place, 0)
    version, compression = body.varints(2, "version and compression_format")
    if version or compression > 1:
        raise body.fault("version and compression_format", f"{version} and {compression} are not known")
    rest = body.rest()
    limit = _limit(len(content))
    if not compression:
        return _Fields(rest, place, limit)
    return _Fields(np.frombuffer(_unpack(body, rest, limit), np.uint8), place, limit)


def _limit(size: int) -> int:
    # JSON of thousands of arrays that are alike packs to a fiftieth; a bomb to a ten-thousandth.
    return (16 << 20) + 200 * size


def _unpack(fields: _Fields, packed: _Bytes, limit: int) -> bytes:
    reader = zstandard.ZstdDecompressor(max_window_size=_WINDOW).stream_reader(packed.tobytes())
    pieces: list[bytes] = []
    total = 0
    try:
        while piece := reader.read(_STEP):
            pieces.append(piece)
            total += len(piece)
            if total > limit:
                raise fields.fault("body", f"more than {limit} bytes from {len(packed)}")
    except zstandard.ZstdError as error:
        raise fields.fault("body", str(error)) from error
    return b"".join(pieces)


def _strings(
    fields: _Fields, count: int, what: str, also: str | None
) -> tuple[list[bytes], list[int], list[int]]:
    """Returns strings that are stored without what they share with the one before.

    A further column of numbers may stand between lengths and texts.
    """
    prefixes = np.concatenate([np.zeros(1, np.uint64), fields.column(count - 1, f"{what}_prefix_length")])
    suffixes = fields.column(count, f"{what}_suffix_length")
    more = fields.varints(count, also) if also else []
    _check_lengths(fields, prefixes, suffixes, f"{what}_prefix_length")
    shared, own = prefixes.tolist(), suffixes.tolist()
    text = fields.take(sum(own), f"{what}_suffix").tobytes()
    found: list[bytes] = []
    last, at = b"", 0
    for prefix, suffix in zip(shared, own, strict=True):
        last = last[:prefix] + text[at : at + suffix]
        at += suffix
        found.append(last)
    return found, shared, more


def _check_lengths(fields: _Fields, prefixes: _Numbers, suffixes: _Numbers, field: str) -> None:
    # Each alone first: the sum of two numbers of 64 bits may be a small one.
    longest = np.maximum(np.maximum(prefixes, suffixes), prefixes + suffixes)
    before = np.concatenate([np.zeros(1, np.uint64), longest[:-1]])
    wrong = np.flatnonzero((longest > _MAX_NAME) | (prefixes > before))
    if len(wrong):
        at = wrong[0]
        raise fields.fault(field, f"{prefixes[at]} of {before[at]}, {suffixes[at]} more")
    if (total := int(longest.sum())) > fields.limit:
        raise fields.fault(field, f"{total} bytes of names in all")


def _keys(fields: _Fields, count: int, *, interior: bool) -> tuple[list[bytes], list[int]]:
    keys, _, common = _strings(fields, count, "key", "subtree_common_prefix_length" if interior else None)
    if any(length > len(key) for length, key in zip(common, keys, strict=False)):
        raise fields.fault("subtree_common_prefix_length", "longer than the key")
    if any(first >= second for first, second in itertools.pairwise(keys)):
        raise fields.fault("key", "not in rising order")
    return keys, common


_Files = Sequence[tuple[str, str]]


def _data_files(fields: _Fields, base: str) -> _Files:
    """Returns the data files, each with what its name adds to the paths in a node that lies there."""
    count = fields.count("num_files", _MAX_ARITY)
    if not count:
        return []
    names, _, lengths = _strings(fields, count, "path", "base_path_length")
    found: list[tuple[str, str]] = []
    for name, length in zip(names, lengths, strict=True):
        if length > len(name):
            raise fields.fault("base_path_length", f"{length} of {len(name)}")
        try:
            found.append((base + name.decode(), base + name[:length].decode()))
        except UnicodeDecodeError as error:
            raise fields.fault("path_suffix", str(error)) from error
    return found


def _references(fields: _Fields, count: int, files: _Files) -> list[tuple[Extent, str]]:
    """Returns where nodes lie; the statistics that follow are of no use here."""
    numbers = fields.varints(count, "data_file_id")
    starts = fields.varints(count, "data_file_offset")
    sizes = fields.varints(count, "data_file_length")
    fields.varints(3 * count, "num_keys, num_tree_bytes and num_indirect_value_bytes")
    found: list[tuple[Extent, str]] = []
    for number, start, size in zip(numbers, starts, sizes, strict=True):
        name, base = _file(fields, files, number)
        found.append((Extent(name, start, size), base))
    return found


def _values(fields: _Fields, count: int, files: _Files) -> list[bytes | Extent]:
    sizes = fields.varints(count, "value_length")
    kinds = fields.take(count, "value_kind")
    if (kinds > 1).any():
        raise fields.fault("value_kind", str(kinds.max()))
    outside = int(kinds.sum())
    numbers = fields.varints(outside, "data_file_id")
    starts = fields.varints(outside, "data_file_offset")
    names = {number: _safe(fields, _file(fields, files, number)[0]) for number in set(numbers)}
    places = iter(zip(numbers, starts, strict=True))
    inline = [size for size, kind in zip(sizes, kinds.tolist(), strict=True) if not kind]
    if (largest := max(inline, default=0)) > _MAX_INLINE:
        raise fields.fault("value_length", f"{largest} for a value within the node")
    content, at = fields.take(sum(inline), "value").tobytes(), 0
    found: list[bytes | Extent] = []
    shared: dict[bytes, bytes] = {}  # The layers of a model have one description.
    for size, kind in zip(sizes, kinds.tolist(), strict=True):
        if kind:
            number, start = next(places)
            found.append(Extent(names[number], start, size))
        else:
            value = content[at : at + size]
            found.append(shared.setdefault(value, value))
            at += size
    return found


def _file(fields: _Fields, files: _Files, number: int) -> tuple[str, str]:
    if number >= len(files):
        raise fields.fault("data_file_id", f"{number} of {len(files)} files")
    return files[number]


def _checked(fields: _Fields, extent: Extent) -> Extent:
    return extent._replace(file=_safe(fields, extent.file))


def _safe(fields: _Fields, name: str) -> str:
    """Returns the name of a data file if it can lie nowhere but below the database's directory."""
    segments = name.split("/")
    if any(part in ("", ".", "..") for part in segments) or "\\" in name or not name.isprintable():
        raise fields.fault("path", f"{name!r} is no path below the database")
    return name
