"""The bytes of one stored value, by position: from a file, or through the store."""

import contextlib
import dataclasses
import os
import threading
from collections.abc import Generator
from typing import Protocol

import tensorstore as ts

from orbax_nnx_handler.storage.checkpoint.stores import Store

# Up to here one request for all bytes of a value costs less than one for its index
# and one for what is needed of it.
_WHOLE_BYTES = 4 << 20


class AbsentError(LookupError):
    """The store does not hold the value."""


class ShortReadError(OSError):
    """The file ends before the value does."""


class Source(Protocol):
    """The bytes of one value."""

    @property
    def size(self) -> int:
        """Length of the value in bytes."""
        ...

    def read_into(self, start: int, target: memoryview) -> None:
        """Fills the target with the bytes from `start` on."""
        ...


@dataclasses.dataclass(frozen=True)
class FileSource:
    """A run of bytes in an open file, read into place without a copy."""

    descriptor: int
    start: int
    size: int

    def read_into(self, start: int, target: memoryview) -> None:
        """Fills the target; one call may return less than asked for (2 GiB at most)."""
        position, left = self.start + start, target
        while left:
            done = os.preadv(self.descriptor, [left], position)
            if not done:
                raise ShortReadError(f"the file ends {len(left)} bytes early")
            position, left = position + done, left[done:]


@dataclasses.dataclass(frozen=True)
class StoreSource:
    """A value in memory, as a store without files of its own returned it."""

    content: bytes

    @property
    def size(self) -> int:
        """Length of the value in bytes."""
        return len(self.content)

    def read_into(self, start: int, target: memoryview) -> None:
        """Copies the bytes."""
        piece = memoryview(self.content)[start : start + len(target)]
        if len(piece) < len(target):
            raise ShortReadError(f"the value ends {len(target) - len(piece)} bytes early")
        target[:] = piece


@dataclasses.dataclass(frozen=True)
class RangeSource:
    """A run of bytes in a store without files of its own: asked for piece by piece."""

    kvstore: ts.KvStore
    key: str
    size: int
    start: int = 0

    def read_into(self, start: int, target: memoryview) -> None:
        """Requests the bytes and copies them."""
        first = self.start + start
        result = self.kvstore.read(self.key, byte_range=slice(first, first + len(target))).result()
        if result.state != "value":
            raise AbsentError(self.key)
        target[:] = result.value


class Opener:
    """Opens the values of a store; a file that holds many values is opened once."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._root = os.fspath(store.directory)
        self._shared: dict[str, int] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def open(self, key: str) -> Generator[Source]:
        """Gives the bytes of a key's value for the time of a `with` block.

        Raises:
            AbsentError: The store does not hold the key.
            OSError: The file cannot be opened.
        """
        inline = self.store.inline(key)
        extent = self.store.extent(key)
        size = self.store.size_of(key)
        if inline is not None:
            yield StoreSource(inline)
        elif self.store.kind == "archive" and extent is None:
            yield self._part_of_archive(key)
        elif extent is None and size is not None and size > _WHOLE_BYTES:
            yield RangeSource(self.store.kvstore, key, size)
        elif extent is None:
            yield self._fetch(key)
        elif self.store.kind != "files":
            yield FileSource(self._shared_descriptor(extent.file), extent.start, extent.size)
        else:
            # One file per chunk: there may be more of them than descriptors.
            descriptor = self._descriptor(key)
            try:
                yield FileSource(descriptor, 0, os.fstat(descriptor).st_size)
            finally:
                os.close(descriptor)

    def file_of(self, key: str) -> str:
        """Returns the file that holds a key's value, for messages."""
        extent = self.store.extent(key) or self.store.listed_extent(key)
        return f"{self._root}/{extent.file if extent else key}"

    def close(self) -> None:
        """Closes the shared files."""
        for descriptor in self._shared.values():
            os.close(descriptor)
        self._shared.clear()

    def _fetch(self, key: str) -> StoreSource:
        result = self.store.kvstore.read(key).result()
        if result.state != "value":
            raise AbsentError(key)
        return StoreSource(result.value)

    def _part_of_archive(self, key: str) -> Source:
        extent = self.store.listed_extent(key)
        if extent is None:
            raise AbsentError(key)
        part = RangeSource(self.store.kvstore, extent.file, extent.size, extent.start)
        if extent.size > _WHOLE_BYTES:
            return part
        content = bytearray(extent.size)
        part.read_into(0, memoryview(content))
        return StoreSource(bytes(content))

    def _descriptor(self, file: str) -> int:
        try:
            return os.open(f"{self._root}/{file}", os.O_RDONLY)
        except FileNotFoundError as error:
            raise AbsentError(file) from error

    def _shared_descriptor(self, file: str) -> int:
        with self._lock:
            if file not in self._shared:
                self._shared[file] = os.open(f"{self._root}/{file}", os.O_RDONLY)
            return self._shared[file]
