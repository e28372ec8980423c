"""The decoded bytes of one chunk or member, in order."""

import zlib
from typing import IO, Protocol, cast

import zstandard

from orbax_nnx_handler.transfer.reading.sources import ShortReadError, Source

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
