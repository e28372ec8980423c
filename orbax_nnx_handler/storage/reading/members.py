"""One member of a NumPy archive, decoded straight into the places its values go to.

A zip file has a checksum of each member's unpacked bytes. It is compared where
one call reads a member from end to end, which is every leaf that this process
holds whole or in shards that together are whole. A process that holds only a
part reads only that part of a stored member and cannot compare.
"""

import dataclasses
import zlib
from collections.abc import Sequence

from orbax_nnx_handler.planning.core.regions import whole
from orbax_nnx_handler.storage.checkpoint.npz import NpyEncoding
from orbax_nnx_handler.storage.reading.chunks import (
    BLOCK_BYTES,
    DamagedError,
    InflateStream,
    RawStream,
    Stream,
    memory_of,
    scatter,
    takes_bytes,
)
from orbax_nnx_handler.storage.reading.sources import Source
from orbax_nnx_handler.storage.reading.targets import Destination

# Gaps up to here are read rather than skipped, so that the checksum stays known.
_GAP_BYTES = 64 << 10


def fill_from_member(source: Source, encoding: NpyEncoding, targets: Sequence[Destination]) -> None:
    """Reads what the targets need from one member.

    Args:
        source: The member's packed bytes.
        encoding: How the values lie in them.
        targets: Rectangles of the array.

    Raises:
        DamagedError: The bytes do not unpack, or their checksum is another one.
        OSError: The bytes cannot be read.
    """
    values = _Values(source, encoding)
    laid, places = _in_order_of_bytes(encoding, [target for target in targets if target.view.size])
    if not places:
        return
    try:
        if len(places) == 1 and places[0].region == whole(laid.shape) and takes_bytes(places[0], laid):
            values.read_into(memory_of(places[0].view))
        else:
            scatter(values, laid, places)
    except zlib.error as error:
        raise DamagedError(str(error)) from error
    values.check()


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


class _Values:
    """The values of a member as a stream that keeps the checksum of what it has passed."""

    def __init__(self, source: Source, encoding: NpyEncoding) -> None:
        self._is_packed = encoding.codec == "deflated"
        self._bytes: Stream = InflateStream(source) if self._is_packed else RawStream(source, 0)
        self._encoding = encoding
        self._position = 0  # As of the member: the header comes first.
        self._crc = 0
        self._has_all = True

    def skip_to(self, position: int) -> None:
        """Goes to a position among the values, never backward."""
        goal = self._encoding.prefix + position
        if not self._is_packed and goal - self._position > _GAP_BYTES:
            self._bytes.skip_to(goal)
            self._position, self._has_all = goal, False
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
        is_whole = self._has_all and self._position == self._encoding.nbytes
        if is_whole and self._crc != self._encoding.crc:
            raise DamagedError("its checksum is not the one that was stored with it")
