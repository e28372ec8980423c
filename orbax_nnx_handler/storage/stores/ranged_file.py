"""A file behind a network, read like one that is open; what will be needed is fetched together."""

import io
import os
from collections.abc import Iterable

from etils import epath

from orbax_nnx_handler.storage.stores.files import Files
from orbax_nnx_handler.storage.stores.ocdbt import Extent

# What is fetched where something was not foreseen.
_AT_LEAST = 1 << 16


class RangedFile(io.RawIOBase):
    """The file; see `fetch`."""

    def __init__(self, files: Files, path: epath.Path) -> None:
        super().__init__()
        listing = files.listing(path)
        self.size = 0 if listing is None else listing.size
        self._files, self._path = files, path
        self._runs: dict[int, bytes] = {}
        self._at = 0

    def fetch(self, runs: Iterable[tuple[int, int]]) -> None:
        """Fetches runs of bytes, each as start and length, in one trip."""
        cut = {start: min(size, self.size - start) for start, size in runs if 0 <= start < self.size}
        extents = [Extent(self._path.name, start, size) for start, size in cut.items()]
        if extents:
            self._runs |= dict(zip(cut, self._files.extents(self._path.parent, extents), strict=True))

    def readable(self) -> bool:
        """See `io.IOBase`."""
        return True

    def seekable(self) -> bool:
        """See `io.IOBase`."""
        return True

    def tell(self) -> int:
        """See `io.IOBase`."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """See `io.IOBase`."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.size}[whence]
        if start + offset < 0:
            raise OSError("a position before the first byte")
        self._at = start + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        """Returns the bytes at the position, fewer only at the end of the file."""
        stop = self.size if size < 0 else min(self.size, self._at + size)
        pieces: list[bytes] = []
        while self._at < stop:
            piece = self._held(stop)
            if not piece:
                self.fetch([(self._at, max(stop - self._at, _AT_LEAST))])
                piece = self._held(stop)
            if not piece:
                # The object is shorter than its listing said.
                break
            pieces.append(piece)
            self._at += len(piece)
        return b"".join(pieces)

    def _held(self, stop: int) -> bytes:
        for start, content in self._runs.items():
            if start <= self._at < start + len(content):
                return content[self._at - start : stop - start]
        return b""
