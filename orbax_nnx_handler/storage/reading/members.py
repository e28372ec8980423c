"""One member of a NumPy archive: which of its bytes are needed, and how they get to their places.

A zip file has a checksum of each member's unpacked bytes. It is compared wherever all bytes of a member
pass, which is every leaf that this process holds whole or in shards that together are whole. Of a member
that is stored as it is, a process that needs only a part reads only that part and cannot compare.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Iterator, Sequence

from orbax_nnx_handler.planning.core.regions import shape_of_region, whole
from orbax_nnx_handler.storage.checkpoint.npz import NpyEncoding
from orbax_nnx_handler.storage.reading.byte_plan import Limits, WantedBytes
from orbax_nnx_handler.storage.reading.chunks import (
    BLOCK_BYTES,
    ChunkPiece,
    DamagedError,
    Owner,
    box_of,
    memory_of,
    raw_pieces,
    scatter,
    takes_bytes,
)
from orbax_nnx_handler.storage.reading.jobs import Destination
from orbax_nnx_handler.storage.reading.streams import Content, Deflated, Uncompressed, Unpacked
from orbax_nnx_handler.storage.stores.ocdbt import Extent

# So much more than is needed is read, so that the checksum can be compared.
_SPARE_BYTES = 1 << 20


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
    values = _Values(content, laid)
    try:
        if len(places) == 1 and places[0].region == whole(laid.shape) and takes_bytes(places[0], laid):
            values.read_into(memory_of(places[0].view))
        else:
            scatter(values, laid, places)
    except zlib.error as error:
        raise DamagedError(str(error)) from error
    values.check()


class _Values:
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
