"""The decoded bytes of one chunk or member, in order.

One stored chunk, decoded straight into the places it goes to.
"""

import itertools
import math
import struct
import threading
import zlib
from collections.abc import Iterator, Sequence
from typing import IO, Protocol, cast

import numpy as np
import zstandard

from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.regions import (
    Region,
    intersect,
    shape_of_region,
    shift,
    slices,
    starts,
    whole,
)
from orbax_nnx_handler.storage.checkpoint.zarr import Encoding
from orbax_nnx_handler.storage.reading.jobs import Buffer
from orbax_nnx_handler.storage.reading.sources import AbsentError, ShortReadError, Source
from orbax_nnx_handler.storage.reading.targets import Destination

# Packed bytes read from the source at a time.
_PACKED_BYTES = 1 << 20


class Stream(Protocol):
    """Decoded bytes that are read forward; positions count from the chunk's first byte."""

    def skip_to(self, position: int) -> None:
        """Goes to a position, never backward."""
        ...

    def read_into(self, target: memoryview) -> None:
        """Fills the target with the next bytes."""
        ...


class RawStream:
    """A chunk that is stored as it is: skipping costs nothing."""

    def __init__(self, source: Source, start: int) -> None:
        self._source = source
        self._start = start
        self._position = 0

    def skip_to(self, position: int) -> None:
        """Goes to a position."""
        self._position = position

    def read_into(self, target: memoryview) -> None:
        """Fills the target with the next bytes."""
        self._source.read_into(self._start + self._position, target)
        self._position += len(target)


class ZstdStream:
    """A chunk packed with zstd: what is skipped is decoded all the same."""

    def __init__(
        self, source: Source, start: int, size: int, decompressor: zstandard.ZstdDecompressor
    ) -> None:
        self._reader = decompressor.stream_reader(cast(IO[bytes], _Packed(source, start, size)))
        self._position = 0

    def skip_to(self, position: int) -> None:
        """Decodes up to a position."""
        while self._position < position:
            self._position += len(self._reader.read(min(position - self._position, _PACKED_BYTES)))

    def read_into(self, target: memoryview) -> None:
        """Fills the target with the next bytes."""
        left = target
        while left:
            done = self._reader.readinto(left)
            if not done:
                raise ShortReadError(f"the packed chunk ends {len(left)} bytes early")
            left = left[done:]
        self._position += len(target)


class _Packed:
    """The packed bytes as a file to read from."""

    def __init__(self, source: Source, start: int, size: int) -> None:
        self._source = source
        self._position = start
        self._end = start + size

    def read(self, size: int = -1) -> bytes:
        """Returns the next bytes; an empty result is the end."""
        left = self._end - self._position
        wanted = min(left, _PACKED_BYTES if size < 0 else max(size, _PACKED_BYTES))
        content = bytearray(wanted)
        self._source.read_into(self._position, memoryview(content))
        self._position += wanted
        return bytes(content)


class InflateStream:
    """A member of a zip file that is deflated: what is skipped is unpacked all the same."""

    def __init__(self, source: Source) -> None:
        self._packed = _Packed(source, 0, source.size)
        # Without the header that zlib would put before it (APPNOTE.TXT 5.5 is bare DEFLATE).
        self._inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        self._position = 0

    def skip_to(self, position: int) -> None:
        """Unpacks up to a position."""
        while self._position < position:
            self.read_into(memoryview(bytearray(min(position - self._position, _PACKED_BYTES))))

    def read_into(self, target: memoryview) -> None:
        """Fills the target with the next bytes."""
        left = target
        while left:
            packed = self._inflater.unconsumed_tail or self._packed.read()
            piece = self._inflater.decompress(packed, len(left))
            if not piece and not packed:
                raise ShortReadError(f"the packed array ends {len(left)} bytes early")
            left[: len(piece)] = piece
            left = left[len(piece) :]
        self._position += len(target)


# Bytes decoded at a time where values are scattered or cast: they stay in the
# processor's cache until they are copied on.
BLOCK_BYTES = 2 << 20
# Below this, reading the gaps costs less than a call for each run.
_RUN_BYTES = 8 << 10

# Up to here zstd decodes fastest in one call; above, the fresh memory that such a
# call needs costs more than decoding in steps straight into place.
_ONE_CALL_BYTES = 64 << 10

# The index behind a shard's one chunk: offset, length, checksum.
_INDEX = struct.Struct("<QQI")
_NOTHING = 2**64 - 1

_own = threading.local()


class DamagedError(ValueError):
    """The bytes are not what the metadata says."""


def fill_from_chunk(source: Source, encoding: Encoding, targets: Sequence[Destination]) -> None:
    """Reads what the targets need from one chunk.

    Args:
        source: The chunk's stored bytes.
        encoding: How they are packed.
        targets: Rectangles of the chunk, counted from its own start.

    Raises:
        AbsentError: The shard is there but its chunk is not.
        DamagedError: The bytes do not decode to a chunk.
        OSError: The bytes cannot be read.
    """
    start, size = _payload(source, encoding)
    if encoding.codec == "raw":
        if size != encoding.chunk_nbytes:
            raise DamagedError(f"holds {size} bytes where a chunk has {encoding.chunk_nbytes}")
        _fill_from_raw(RawStream(source, start), encoding, targets)
        return
    try:
        _fill_from_zstd(source, start, size, encoding, targets)
    except zstandard.ZstdError as error:
        raise DamagedError(str(error)) from error


def _payload(source: Source, encoding: Encoding) -> tuple[int, int]:
    """Returns where the chunk lies within its value: behind it, a shard has an index."""
    if not encoding.sharded:
        return 0, source.size
    if source.size < _INDEX.size:
        raise DamagedError(f"holds {source.size} bytes, less than a shard's index")
    content = bytearray(_INDEX.size)
    source.read_into(source.size - _INDEX.size, memoryview(content))
    start, size, _ = _INDEX.unpack(content)
    if start == _NOTHING and size == _NOTHING:
        raise AbsentError("the shard is empty")
    if start + size > source.size - _INDEX.size:
        raise DamagedError("the index of the shard points outside it")
    return start, size


def _fill_from_raw(stream: RawStream, encoding: Encoding, targets: Sequence[Destination]) -> None:
    scattered: list[Destination] = []
    for target in targets:
        first = _run_start(target.region, encoding.chunk_shape)
        if first is None or not takes_bytes(target, encoding):
            scattered.append(target)
            continue
        stream.skip_to(first * encoding.dtype.itemsize)
        stream.read_into(memory_of(target.view))
    if scattered:
        scatter(stream, encoding, scattered)


def _fill_from_zstd(
    source: Source, start: int, size: int, encoding: Encoding, targets: Sequence[Destination]
) -> None:
    if encoding.chunk_nbytes <= _ONE_CALL_BYTES:
        packed = bytearray(size)
        source.read_into(start, memoryview(packed))
        content = _decompressor().decompress(packed, max_output_size=encoding.chunk_nbytes)
        if len(content) != encoding.chunk_nbytes:
            raise DamagedError(f"unpacks to {len(content)} bytes where a chunk has {encoding.chunk_nbytes}")
        chunk = np.frombuffer(content, encoding.dtype).reshape(encoding.chunk_shape)
        for target in targets:
            target.put(chunk[slices(target.region)])
        return
    stream = ZstdStream(source, start, size, _decompressor())
    if (
        len(targets) == 1
        and targets[0].region == whole(encoding.chunk_shape)
        and takes_bytes(targets[0], encoding)
    ):
        stream.read_into(memory_of(targets[0].view))
    else:
        scatter(stream, encoding, targets)


def _decompressor() -> zstandard.ZstdDecompressor:
    # Not safe to share between threads, and costly to make for each chunk.
    if not hasattr(_own, "decompressor"):
        _own.decompressor = zstandard.ZstdDecompressor()
    return _own.decompressor


def takes_bytes(target: Destination, encoding: Encoding) -> bool:
    """Tells whether a target's memory can take the stored bytes as they are."""
    return target.view.dtype == encoding.dtype and target.view.flags.c_contiguous and not target.steps


def memory_of(view: Buffer) -> memoryview:
    """Returns a contiguous array's bytes; `bfloat16` has no buffer format of its own."""
    return view.reshape(-1).view(np.uint8).data


def _run_start(region: Region, shape: Shape) -> int | None:
    """Returns the position of the region's first element if the region is one run of a C-order array."""
    position, stride, inside = 0, 1, True
    for (start, stop), size in zip(reversed(region), reversed(shape), strict=True):
        if not inside and stop - start != 1:
            return None
        inside = inside and stop - start == size
        position += start * stride
        stride *= size
    return position


def scatter(stream: Stream, encoding: Encoding, targets: Sequence[Destination]) -> None:
    """Decodes what the targets span block by block and copies each block's values to their places.

    Args:
        stream: The decoded bytes of a chunk in C order.
        encoding: Its shape and dtype.
        targets: Rectangles of it.
    """
    spans = zip(*(target.region for target in targets), strict=True)
    box = tuple((min(start for start, _ in span), max(stop for _, stop in span)) for span in spans)
    itemsize = encoding.dtype.itemsize
    for block in _blocks(_widened(box, encoding.chunk_shape, itemsize), itemsize):
        content = _scratch(math.prod(shape_of_region(block)) * itemsize)
        _gather(stream, block, encoding.chunk_shape, itemsize, content.data)
        values = content.view(encoding.dtype).reshape(shape_of_region(block))
        for target in targets:
            shared = intersect(target.region, block)
            if shared is not None:
                inside = slices(shift(shared, starts(target.region)))
                target.part(shared, inside).put(values[(..., *slices(shift(shared, starts(block))))])


def _widened(box: Region, shape: Shape, itemsize: int) -> Region:
    """Grows a box over gaps that are cheaper to read than to skip."""
    grown, row = list(box), itemsize
    for axis in reversed(range(len(shape))):
        start, stop = grown[axis]
        alone = all(last - first == 1 for first, last in grown[:axis])
        if alone or (stop - start < shape[axis] and (stop - start) * row >= _RUN_BYTES):
            break
        grown[axis] = (0, shape[axis])
        row *= shape[axis]
    return tuple(grown)


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


def _gather(stream: Stream, block: Region, shape: Shape, itemsize: int, target: memoryview) -> None:
    """Fills the target with a block's elements, run by run."""
    split = next((a for a in reversed(range(len(shape))) if block[a] != (0, shape[a])), 0)
    run = math.prod(shape_of_region(block[split:])) * itemsize
    filled = 0
    for index in itertools.product(*(range(start, stop) for start, stop in block[:split])):
        first = (*((at, at + 1) for at in index), *block[split:])
        stream.skip_to((_run_start(first, shape) or 0) * itemsize)
        stream.read_into(target[filled : filled + run])
        filled += run


def _scratch(size: int) -> Buffer:
    """Returns this thread's block of working memory, to be overwritten by the next call."""
    if getattr(_own, "scratch", None) is None or _own.scratch.size < size:
        _own.scratch = np.empty(max(size, BLOCK_BYTES), np.uint8)
    return _own.scratch[:size]
