"""One chunk, or one member of a NumPy archive: which bytes are needed, and how they get to their places.

Nothing here reads. A chunk becomes pieces: runs of bytes of a file, and either the memory that takes
them as they are, or what is to be done with them once they are there.

A zip file has a checksum of each member's unpacked bytes. It is compared wherever all bytes of a member
pass, which is every leaf that this process holds whole or in shards that together are whole. Of a member
that is stored as it is, a process that needs only a part reads only that part and cannot compare.
"""

import dataclasses
import functools
import itertools
import math
import struct
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, cast

import numpy as np
import zstandard

from orbax_nnx_handler.planning.core.errors import UnreadableLeafError
from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.core.regions import (
    Region,
    intersect,
    run_start,
    runs,
    shape_of_region,
    shift,
    slices,
    starts,
    whole,
    widened,
)
from orbax_nnx_handler.storage.checkpoint.checkpoint import Encoding
from orbax_nnx_handler.storage.checkpoint.npz import NpyEncoding
from orbax_nnx_handler.storage.reading.base_store import AbsentError
from orbax_nnx_handler.storage.reading.byte_plan import Limits, WantedBytes, cut_run
from orbax_nnx_handler.storage.reading.jobs import Buffer, Destination
from orbax_nnx_handler.storage.reading.streams import (
    ByteStream,
    Content,
    Deflated,
    FirstBytes,
    Uncompressed,
    Unpacked,
    Zstd,
    decompressor,
)
from orbax_nnx_handler.storage.stores.ocdbt import Extent

# Bytes unpacked at a time where values are scattered or cast: they stay in the
# processor's cache until they are copied on.
BLOCK_BYTES = 2 << 20

# Up to here zstd unpacks fastest in one call into memory of its own.
_ONE_CALL_BYTES = 64 << 10

# The index behind a shard's one chunk: offset, length, checksum.
_INDEX = struct.Struct("<QQI")
_NOTHING = 2**64 - 1

# So much more of a member than is needed is read, so that the checksum can be compared.
_SPARE_BYTES = 1 << 20

_own = threading.local()


class DamagedError(ValueError):
    """The bytes are not what the metadata says."""


class Owner(Protocol):
    """Whose bytes a piece holds."""

    @property
    def path(self) -> Path:
        """The stored leaf."""
        ...

    def unreadable(self, error: Exception) -> UnreadableLeafError:
        """Returns the error that names leaf and file."""
        ...

    def fill_absent(self) -> None:
        """Puts the fill value into the places of an absent chunk, or raises if there must be none."""
        ...


@dataclasses.dataclass(slots=True)
class ChunkPiece:
    """Bytes that are needed together, and what is done with them.

    Attributes:
        owner: Whose they are.
        wanted: Where they are stored.
        nbytes: Size of the values that they become.
        target: The memory that takes them, or all but the last of them, as they are; None if they are
            unpacked, cast or scattered.
        use: What is done with those that no memory takes.
        streamed: Whether they are so many that `use` gets a stream of them.
        content: The bytes themselves, where they are known without a read.
    """

    owner: Owner
    wanted: WantedBytes
    nbytes: int
    target: memoryview | None = None
    use: Callable[[Content], None] | None = None
    streamed: bool = False
    content: bytes | None = None

    @property
    def size(self) -> int:
        """How many bytes they are."""
        runs = self.wanted.runs
        return runs[0][1] if len(runs) == 1 else sum(size for _, size in runs)

    @property
    def size_of_use(self) -> int:
        """How many of them `use` gets."""
        return self.size if self.target is None else self.size - len(self.target)

    def take(self, content: memoryview) -> None:
        """Puts all of them into place."""
        if self.target is not None:
            direct, content = content[: len(self.target)], content[len(self.target) :]
            self.target[:] = direct
        if self.use is not None:
            self.use(content)


def pieces_of_chunk(
    owner: Owner, encoding: Encoding, extent: Extent, targets: Sequence[Destination], limits: Limits
) -> list[ChunkPiece]:
    """Returns what the targets need of one chunk.

    Args:
        owner: Whose chunk it is.
        encoding: How its values are stored.
        extent: Where its bytes lie.
        targets: Rectangles of the chunk, counted from its own start.
        limits: What the store makes cheap.

    Raises:
        DamagedError: The chunk has not the length that its metadata says.
    """
    behind = _INDEX.size if encoding.sharded else 0
    payload = extent.size - behind
    if payload < 0:
        raise DamagedError(f"holds {extent.size} bytes, less than a shard's index")
    if encoding.codec == "zstd":
        use = functools.partial(_fill_from_zstd, encoding, targets, extent.size)
        wanted = WantedBytes(extent.file, ((extent.start, extent.size),))
        streamed = extent.size > limits.packed_bytes
        return [ChunkPiece(owner, wanted, _nbytes(targets), use=use, streamed=streamed)]
    if payload != encoding.chunk_nbytes:
        raise DamagedError(f"holds {payload} bytes where a chunk has {encoding.chunk_nbytes}")
    only = targets[0] if len(targets) == 1 and extent.size <= limits.range_bytes else None
    if only is not None and only.region == encoding.whole_chunk and takes_bytes(only, encoding):
        # Nearly every leaf of a model. The chunk fills the shard, so that its place is known before the
        # index is read, which comes along to be compared.
        wanted = WantedBytes(extent.file, ((extent.start, extent.size),))
        use = _comparing(payload) if behind else None
        return [ChunkPiece(owner, wanted, payload, target=memory_of(only.view), use=use)]
    found = list(raw_pieces(owner, encoding, extent, targets, limits))
    if behind:
        wanted = WantedBytes(extent.file, ((extent.start + payload, behind),))
        found.append(ChunkPiece(owner, wanted, 0, use=_comparing(payload)))
    return found


def raw_pieces(
    owner: Owner, encoding: Encoding, extent: Extent, targets: Sequence[Destination], limits: Limits
) -> Iterator[ChunkPiece]:
    """Yields what the targets need of values that are stored as they are, in C order."""
    itemsize = encoding.dtype.itemsize
    direct = _direct_runs(encoding, targets)
    for (first, size), target in zip(direct, targets, strict=False):
        memory = memory_of(target.view)
        if size <= limits.range_bytes:
            yield ChunkPiece(
                owner, WantedBytes(extent.file, ((extent.start + first, size),)), size, target=memory
            )
            continue
        for start, length in cut_run(first, size, limits.range_bytes):
            wanted = WantedBytes(extent.file, ((extent.start + start, length),))
            yield ChunkPiece(owner, wanted, length, target=memory[start - first : start - first + length])
    if direct:
        return
    box = widened(box_of(targets), encoding.chunk_shape, itemsize, limits.gap_bytes)
    for block in _blocks(box, itemsize):
        size = math.prod(shape_of_region(block)) * itemsize
        places = [target for target in targets if intersect(target.region, block) is not None]
        if places:
            at = tuple(
                (extent.start + first, run) for first, run in runs(block, encoding.chunk_shape, itemsize)
            )
            use = functools.partial(_scatter_bytes, encoding, block, places)
            yield ChunkPiece(owner, WantedBytes(extent.file, at), _nbytes_within(places, block), use=use)


def _direct_runs(encoding: Encoding, targets: Sequence[Destination]) -> list[tuple[int, int]]:
    """Returns the run of bytes of each target where all of them can be read straight into place."""
    runs: list[tuple[int, int]] = []
    for target in targets:
        first = run_start(target.region, encoding.chunk_shape) if takes_bytes(target, encoding) else None
        if first is None:
            return []
        runs.append((first * encoding.dtype.itemsize, target.view.nbytes))
    # Bytes that two targets want are read once and copied.
    if len(runs) > 1 and any(
        start + size > after for (start, size), (after, _) in itertools.pairwise(sorted(runs))
    ):
        return []
    return runs


@functools.lru_cache(maxsize=1024)
def _comparing(payload: int) -> Callable[[Content], None]:
    return functools.partial(_compare_index, payload)


def _compare_index(payload: int, content: Content) -> None:
    found = content if isinstance(content, memoryview) else content.read(_INDEX.size)
    start, size, _ = _INDEX.unpack(found)
    if (start, size) != (0, payload):
        raise DamagedError("the index of the shard points elsewhere than to its one chunk")


def _fill_from_zstd(encoding: Encoding, targets: Sequence[Destination], size: int, content: Content) -> None:
    try:
        if isinstance(content, memoryview):
            _unpack(encoding, targets, _payload(encoding, content))
        else:
            _unpack(encoding, targets, _without_index(encoding, size, content))
    except zstandard.ZstdError as error:
        raise DamagedError(str(error)) from error


def _payload(encoding: Encoding, content: memoryview) -> memoryview:
    """Returns the chunk within its value: behind it, a shard has an index."""
    if not encoding.sharded:
        return content
    start, size, _ = _INDEX.unpack(content[-_INDEX.size :])
    if start == _NOTHING and size == _NOTHING:
        raise AbsentError("the shard is empty")
    if start + size > len(content) - _INDEX.size:
        raise DamagedError("the index of the shard points outside it")
    return content[start : start + size]


def _without_index(encoding: Encoding, size: int, content: ByteStream) -> ByteStream:
    # A shard so large is unpacked from its start; what is not there is noticed by zstd.
    return FirstBytes(content, size - _INDEX.size) if encoding.sharded else content


def _unpack(encoding: Encoding, targets: Sequence[Destination], content: Content) -> None:
    only = targets[0] if len(targets) == 1 and takes_bytes(targets[0], encoding) else None
    if only is not None and only.region != encoding.whole_chunk:
        only = None
    most = encoding.chunk_nbytes
    if most <= _ONE_CALL_BYTES and isinstance(content, memoryview):
        # Where the frame tells its size, zstd allocates that, whatever it may take at most.
        said = zstandard.frame_content_size(content)
        values = b"" if said > most else decompressor().decompress(content, max_output_size=most)
        if len(values) != most:
            raise DamagedError(f"unpacks to {max(said, len(values))} bytes where a chunk has {most}")
        if only is not None:
            memory_of(only.view)[:] = values
            return
        chunk = np.frombuffer(values, encoding.dtype).reshape(encoding.chunk_shape)
        for target in targets:
            target.put(chunk[slices(target.region)])
    elif only is not None:
        Zstd(content).read_into(memory_of(only.view))
    else:
        scatter(Zstd(content), encoding, targets)


def pieces_of_member(
    owner: Owner, encoding: NpyEncoding, extent: Extent, targets: Sequence[Destination], limits: Limits
) -> Iterator[ChunkPiece]:
    """Yields what the targets need of one member."""
    laid, places = _in_order_of_bytes(encoding, targets)
    needed = math.prod(shape_of_region(box_of(places))) * laid.dtype.itemsize
    if encoding.codec == "stored" and needed + _SPARE_BYTES < extent.size:
        values = Extent(extent.file, extent.start + encoding.prefix, extent.size - encoding.prefix)
        yield from raw_pieces(owner, laid, values, places, limits)
        return
    use = functools.partial(_fill_from_member, laid, places)
    nbytes = sum(place.view.nbytes for place in places)
    wanted = WantedBytes(extent.file, ((extent.start, extent.size),))
    yield ChunkPiece(owner, wanted, nbytes, use=use, streamed=extent.size > limits.member_bytes)


def _in_order_of_bytes(
    encoding: NpyEncoding, targets: Sequence[Destination]
) -> tuple[NpyEncoding, Sequence[Destination]]:
    """Returns the array as its bytes lie: one in Fortran order is its transpose in C order."""
    dtype = encoding.stored_dtype
    if encoding.order == "C":
        return dataclasses.replace(encoding, dtype=dtype), targets
    turned = dataclasses.replace(
        encoding, dtype=dtype, shape=encoding.shape[::-1], chunk_shape=encoding.chunk_shape[::-1]
    )
    return turned, [Destination(target.region[::-1], target.view.T, target.steps) for target in targets]


def _fill_from_member(laid: NpyEncoding, places: Sequence[Destination], content: Content) -> None:
    values = _MemberValues(content, laid)
    try:
        if len(places) == 1 and places[0].region == whole(laid.shape) and takes_bytes(places[0], laid):
            values.read_into(memory_of(places[0].view))
        else:
            scatter(values, laid, places)
    except zlib.error as error:
        raise DamagedError(str(error)) from error
    values.check()


class _MemberValues:
    """The values of a member as a stream that keeps the checksum of what it has passed."""

    def __init__(self, content: Content, encoding: NpyEncoding) -> None:
        is_packed = encoding.codec == "deflated"
        self._bytes: Unpacked = Deflated(content) if is_packed else Uncompressed(content)
        self._encoding = encoding
        self._position = 0  # As of the member: the header comes first.
        self._crc = 0

    def skip_to(self, position: int) -> None:
        """Goes to a position among the values, never backward."""
        goal = self._encoding.prefix + position
        while self._position < goal:
            self._take(memoryview(bytearray(min(goal - self._position, BLOCK_BYTES))))

    def read_into(self, target: memoryview) -> None:
        """Fills the target with the next values."""
        if not self._position:
            self.skip_to(0)
        # In blocks, of which the checksum is taken while they are in the processor's cache.
        for start in range(0, len(target), BLOCK_BYTES):
            self._take(target[start : start + BLOCK_BYTES])

    def _take(self, target: memoryview) -> None:
        self._bytes.read_into(target)
        self._crc = zlib.crc32(target, self._crc)
        self._position += len(target)

    def check(self) -> None:
        """Compares the checksum, where every byte has passed.

        Raises:
            DamagedError: It is another one.
        """
        if self._position == self._encoding.nbytes and self._crc != self._encoding.crc:
            raise DamagedError("its checksum is not the one that was stored with it")


def takes_bytes(target: Destination, encoding: Encoding) -> bool:
    """Tells whether a target's memory can take the stored bytes as they are."""
    return target.view.dtype == encoding.dtype and target.view.flags.c_contiguous and not target.steps


def memory_of(view: Buffer) -> memoryview:
    """Returns a contiguous array's bytes; `bfloat16` has no buffer format of its own."""
    return view.reshape(-1).view(np.uint8).data


def _nbytes(targets: Sequence[Destination]) -> int:
    return targets[0].view.nbytes if len(targets) == 1 else sum(target.view.nbytes for target in targets)


def _nbytes_within(targets: Sequence[Destination], block: Region) -> int:
    shared = [(intersect(target.region, block), target.view.itemsize) for target in targets]
    return sum(math.prod(shape_of_region(part)) * size for part, size in shared if part is not None)


def scatter(stream: Unpacked, encoding: Encoding, targets: Sequence[Destination]) -> None:
    """Unpacks what the targets span block by block and copies each block's values to their places."""
    itemsize = encoding.dtype.itemsize
    # All bytes pass anyway, so gaps cost nothing.
    box = widened(box_of(targets), encoding.chunk_shape, itemsize, encoding.chunk_nbytes)
    for block in _blocks(box, itemsize):
        content = _scratch(math.prod(shape_of_region(block)) * itemsize)
        filled = 0
        for start, size in runs(block, encoding.chunk_shape, itemsize):
            stream.skip_to(start)
            stream.read_into(content.data[filled : filled + size])
            filled += size
        _scatter_bytes(encoding, block, targets, content.data)


def _scatter_bytes(
    encoding: Encoding, block: Region, targets: Sequence[Destination], content: Content
) -> None:
    values = np.frombuffer(cast(bytes, content), encoding.dtype).reshape(shape_of_region(block))
    for target in targets:
        shared = intersect(target.region, block)
        if shared is not None:
            inside = slices(shift(shared, starts(target.region)))
            target.part(shared, inside).put(values[(..., *slices(shift(shared, starts(block))))])


def box_of(targets: Sequence[Destination]) -> Region:
    """Returns the smallest rectangle that holds all targets."""
    spans = zip(*(target.region for target in targets), strict=True)
    return tuple((min(start for start, _ in span), max(stop for _, stop in span)) for span in spans)


def _blocks(box: Region, itemsize: int) -> Iterator[Region]:
    """Yields the box in pieces of bounded size, in the order of their bytes."""
    lengths = shape_of_region(box)
    size = math.prod(lengths) * itemsize
    axis = next((axis for axis, length in enumerate(lengths) if length > 1), None)
    if size <= BLOCK_BYTES or axis is None:
        yield box
        return
    start, stop = box[axis]
    step = max(1, BLOCK_BYTES * (stop - start) // size)
    for first in range(start, stop, step):
        piece = (*box[:axis], (first, min(first + step, stop)), *box[axis + 1 :])
        yield from _blocks(piece, itemsize)


def _scratch(size: int) -> Buffer:
    """Returns this thread's block of working memory, to be overwritten by the next call."""
    if getattr(_own, "scratch", None) is None or _own.scratch.size < size:
        _own.scratch = np.empty(max(size, BLOCK_BYTES), np.uint8)
    return _own.scratch[:size]
