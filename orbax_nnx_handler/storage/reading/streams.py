"""The unpacked bytes of one chunk or archive member, in order.

What is stored comes from memory, where it has been read whole, or from a stream, where it is so
large that it is unpacked while it comes.
"""

import threading
import zlib
from typing import IO, Protocol, cast

import zstandard

from orbax_nnx_handler.storage.reading.base_store import ShortReadError

# Packed bytes taken from a stream at a time.
_PACKED_BYTES = 1 << 20

_own = threading.local()


class ByteStream(Protocol):
    """Stored bytes that are read forward."""

    def read(self, size: int = -1) -> bytes:
        """Returns some of the next bytes; an empty result is the end."""
        ...

    def read_into(self, target: memoryview) -> None:
        """Fills the target with the next bytes."""
        ...

    def skip(self, size: int) -> None:
        """Passes over some bytes."""
        ...


Content = memoryview | ByteStream
"""Stored bytes: all of them, or as they come."""


class MemoryStream:
    """Bytes in memory as a stream."""

    def __init__(self, content: memoryview) -> None:
        self._left = content

    def read(self, size: int = -1) -> bytes:
        """Returns the next bytes."""
        piece = self._left if size < 0 else self._left[:size]
        self._left = self._left[len(piece) :]
        return bytes(piece)

    def read_into(self, target: memoryview) -> None:
        """Fills the target with the next bytes."""
        if len(target) > len(self._left):
            raise ShortReadError(f"the value ends {len(target) - len(self._left)} bytes early")
        target[:] = self._left[: len(target)]
        self._left = self._left[len(target) :]

    def skip(self, size: int) -> None:
        """Passes over some bytes."""
        self._left = self._left[size:]


class FirstBytes:
    """The first bytes of a stream."""

    def __init__(self, stream: ByteStream, size: int) -> None:
        self._stream = stream
        self._left = size

    def read(self, size: int = -1) -> bytes:
        """Returns some of the next bytes; an empty result is the end."""
        piece = self._stream.read(min(size, self._left) if size >= 0 else self._left)
        self._left -= len(piece)
        return piece

    def read_into(self, target: memoryview) -> None:
        """Fills the target with the next bytes."""
        self._stream.read_into(target)
        self._left -= len(target)

    def skip(self, size: int) -> None:
        """Passes over some bytes."""
        self._stream.skip(size)
        self._left -= size


def as_stream(content: Content) -> ByteStream:
    """Returns stored bytes as a stream."""
    return MemoryStream(content) if isinstance(content, memoryview) else content


class Unpacked(Protocol):
    """Unpacked bytes that are read forward; positions count from the first byte."""

    def skip_to(self, position: int) -> None:
        """Goes to a position, never backward."""
        ...

    def read_into(self, target: memoryview) -> None:
        """Fills the target with the next bytes."""
        ...


class Uncompressed:
    """Bytes that are stored as they are: skipping costs nothing."""

    def __init__(self, content: Content) -> None:
        self._stream = as_stream(content)
        self._position = 0

    def skip_to(self, position: int) -> None:
        """Goes to a position."""
        self._stream.skip(position - self._position)
        self._position = position

    def read_into(self, target: memoryview) -> None:
        """Fills the target with the next bytes."""
        self._stream.read_into(target)
        self._position += len(target)


class Zstd:
    """Bytes packed with zstd: what is skipped is unpacked all the same.

    Where the packed bytes are in memory and the first call takes all of the unpacked ones, zstd
    unpacks straight into the target, without a window of its own: a quarter faster.
    """

    def __init__(self, content: Content) -> None:
        # A memory view is a source, too, which the stubs do not know.
        self._reader = decompressor().stream_reader(cast(IO[bytes], content), read_size=_PACKED_BYTES)
        self._position = 0

    def skip_to(self, position: int) -> None:
        """Unpacks up to a position."""
        while self._position < position:
            done = len(self._reader.read(min(position - self._position, _PACKED_BYTES)))
            if not done:
                raise ShortReadError(f"the packed chunk ends {position - self._position} bytes early")
            self._position += done

    def read_into(self, target: memoryview) -> None:
        """Fills the target with the next bytes."""
        left = target
        while left:
            done = self._reader.readinto(left)
            if not done:
                raise ShortReadError(f"the packed chunk ends {len(left)} bytes early")
            left = left[done:]
        self._position += len(target)


def decompressor() -> zstandard.ZstdDecompressor:
    """Returns this thread's decompressor: it is not safe to share, and takes long to make."""
    if not hasattr(_own, "decompressor"):
        _own.decompressor = zstandard.ZstdDecompressor()
    return _own.decompressor


class Deflated:
    """A member of a zip file that is deflated: what is skipped is unpacked all the same."""

    def __init__(self, content: Content) -> None:
        self._packed = as_stream(content)
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
            packed = self._inflater.unconsumed_tail or self._packed.read(_PACKED_BYTES)
            piece = self._inflater.decompress(packed, len(left))
            if not piece and not packed:
                raise ShortReadError(f"the packed array ends {len(left)} bytes early")
            left[: len(piece)] = piece
            left = left[len(piece) :]
        self._position += len(target)
