"""The bytes of data files by range: from this machine's files, or from any store that TensorStore knows.

The files are read as they lie. Where they belong to an OCDBT database, the database itself is not
asked again: its catalog has told the place of every value, and asking through it would check for
each value whether the database has changed meanwhile.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from orbax_nnx_handler.storage.stores.files import ANYWHERE
from orbax_nnx_handler.storage.stores.kvstore import Store
from orbax_nnx_handler.storage.stores.locations import open_file

_logger = logging.getLogger(__name__)

# The most buffers that one call fills (IOV_MAX is 1024 on Linux and on macOS).
_BUFFERS = 1000
# A store that brings nothing for so long has a fault.
TIME_LIMIT_S = 300.0
SAY_SO_AFTER_S = 10.0


class AbsentError(LookupError):
    """The store does not hold the value."""


class ShortReadError(OSError):
    """The file ends before the value does."""


class ChangedError(OSError):
    """Somebody writes to the object while it is read."""


class LocalData:
    """Files of this machine, read straight into place.

    They are read, not mapped: a mapped file that is cut off while it is read would end the process, and
    JAX adopts only memory that starts on 64 bytes, as values within a data file rarely do.
    """

    def __init__(self, root: str, *, shared: bool, below: str | None = None) -> None:
        """Opens nothing yet.

        Args:
            root: The directory.
            shared: Whether a file holds many values and so stays open until `close`.
            below: What no link may lead out of; None for the directory.
        """
        self._root = root
        self._below = root if below is None else below
        self._shared = shared
        self._open: dict[str, int] = {}
        self._lock = threading.Lock()

    def read_into(self, file: str, start: int, buffers: Sequence[memoryview]) -> None:
        """Fills the buffers, one after the other, with the bytes from `start` on.

        Raises:
            AbsentError: There is no such file.
            ShortReadError: It ends too early.
            OSError: It cannot be read.
        """
        descriptor = self._descriptor(file)
        try:
            fill(descriptor, start, buffers)
        finally:
            if not self._shared:
                os.close(descriptor)

    def close(self) -> None:
        """Closes the files that were kept open."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def _descriptor(self, file: str) -> int:
        try:
            if not self._shared:
                return self._opened(file)
            with self._lock:
                if file not in self._open:
                    self._open[file] = self._opened(file)
                return self._open[file]
        except (FileNotFoundError, NotADirectoryError) as error:
            raise AbsentError("the file is absent") from error

    def _opened(self, file: str) -> int:
        return open_file(self._below, f"{self._root}/{file}"[len(self._below) :].lstrip("/"))


def fill(descriptor: int, start: int, buffers: Sequence[memoryview]) -> None:
    """Fills the buffers, one after the other, with the bytes of an open file from `start` on.

    Raises:
        ShortReadError: It ends too early.
        OSError: It cannot be read.
    """
    position = start
    for number in range(0, len(buffers), _BUFFERS):
        left = buffers[number : number + _BUFFERS]
        wanted = sum(map(len, left))
        while wanted:
            # One call may return less than asked for, and 2 GiB at most.
            done = os.preadv(descriptor, left, position)
            if not done:
                raise ShortReadError(f"the file ends {wanted} bytes early")
            position, wanted = position + done, wanted - done
            left = _after(left, done) if wanted else []


def _after(buffers: Sequence[memoryview], done: int) -> list[memoryview]:
    """Returns what is left of buffers once their first bytes are filled."""
    for number, buffer in enumerate(buffers):
        if done < len(buffer):
            return [buffer[done:], *buffers[number + 1 :]]
        done -= len(buffer)
    return []


class Answer(Protocol):
    """Bytes on their way; `ts.Future` is one."""

    def result(self, timeout: float | None = None) -> Any:
        """Waits for a `ts.KvStore.ReadResult`."""
        ...

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """Has something called when they are there, from a thread of the store's own."""
        ...


class KeyValueReader(Protocol):
    """What is asked of a store behind a network; `ts.KvStore` is one."""

    def read(self, key: str, *, byte_range: Any = None) -> Answer:
        """Begins to read a range of a value, or all of it."""
        ...


_MOST_TRIES = 3


class _AskedAgain:
    """A range that is asked for again where a store returns too little, which TensorStore does not."""

    def __init__(self, base: KeyValueReader, file: str, start: int, size: int) -> None:
        self._base, self._file, self._start, self._size = base, file, start, size
        self._answer = self._ask()

    def _ask(self) -> Answer:
        return self._base.read(self._file, byte_range=slice(self._start, self._start + self._size))

    def result(self, timeout: float | None = None) -> Any:
        for _ in range(_MOST_TRIES - 1):
            try:
                result = self._answer.result(timeout=timeout)
            except ValueError as error:
                if "OUT_OF_RANGE" not in str(error):
                    raise
            else:
                if result.state != "value" or len(result.value) >= self._size:
                    return result
            what = "the store returned too little for %d bytes of %s; asking again"
            _logger.warning(what, self._size, self._file)
            self._answer = self._ask()
        return self._answer.result(timeout=timeout)

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self._answer.add_done_callback(callback)


class RemoteData:
    """Objects behind a network: every read is begun at once and waited for later."""

    def __init__(self, base: KeyValueReader, versions: dict[str, bytes] | None = None) -> None:
        """Asks for nothing yet.

        Args:
            base: The store.
            versions: Of each object the version that was read first; those of this reading are added.
        """
        self._base = base
        self._versions: dict[str, bytes] = {} if versions is None else versions

    def begin(self, file: str, start: int, size: int) -> Answer:
        """Asks for a range, and again where the answer is shorter."""
        return _AskedAgain(self._base, file, start, size)

    def begin_whole(self, file: str) -> Answer:
        """Asks for all bytes of an object whose length nobody knows."""
        return self._base.read(file)

    def content(self, file: str, answer: Answer, size: int | None = None) -> memoryview:
        """Waits for the bytes that were asked for.

        Raises:
            AbsentError: The store does not hold the object.
            ShortReadError: It returned another number of bytes.
            ChangedError: They are of another version of the object than those that came before.
        """
        result = answer.result(timeout=TIME_LIMIT_S)
        if result.state != "value":
            raise AbsentError("the object is absent")
        content = memoryview(result.value)
        if size is not None and len(content) != size:
            raise ShortReadError(f"the store returned {len(content)} of {size} bytes")
        version = result.stamp.generation
        # Values stored as they are have no checksum that a mixture of two versions would fail.
        if self._versions.setdefault(file, version) != version:
            raise ChangedError("the object was written to while it was read")
        return content

    def close(self) -> None:
        """Does nothing: the store's connections are not this package's."""


DataFiles = LocalData | RemoteData
"""Where data files lie."""


def open_data(store: Store | None) -> DataFiles:
    """Returns a store's files; none of any without a store."""
    if store is None:
        return LocalData("", shared=True)
    if store.local and (store.kind == "files" or store.catalog is not None):
        # The caller named an archive itself, maybe by a link.
        below = ANYWHERE if store.kind == "archive" else None
        root = os.fspath(store.directory.absolute())
        return LocalData(root, shared=store.kind != "files", below=below)
    if store.kind != "ocdbt":
        return RemoteData(store.base, store.versions)
    # Without a catalog only the database itself knows its values.
    return RemoteData(store.base if store.catalog is not None else store.kvstore)


class LocalStream:
    """A run of a local file as a stream."""

    def __init__(self, files: LocalData, file: str, start: int, size: int) -> None:
        self._files = files
        self._file = file
        self._position = start
        self._end = start + size

    def read(self, size: int = -1) -> bytes:
        """Returns the next bytes; an empty result is the end."""
        left = self._end - self._position
        content = bytearray(left if size < 0 else min(left, size))
        self.read_into(memoryview(content))
        return bytes(content)

    def read_into(self, target: memoryview) -> None:
        """Fills the target with the next bytes."""
        if len(target) > self._end - self._position:
            raise ShortReadError(f"the value ends {len(target) - self._end + self._position} bytes early")
        self._files.read_into(self._file, self._position, [target])
        self._position += len(target)

    def skip(self, size: int) -> None:
        """Passes over some bytes without reading them."""
        self._position += size


class RemoteStream:
    """A run of a remote object as a stream that is asked for some ranges ahead."""

    def __init__(self, files: RemoteData, file: str, ranges: Iterator[tuple[int, int]], ahead: int) -> None:
        self._files = files
        self._file = file
        self._ranges = ranges
        self._answers: list[tuple[Answer, int]] = []
        self._content = memoryview(b"")
        for _ in range(ahead):
            self._ask()

    def _ask(self) -> None:
        following = next(self._ranges, None)
        if following is not None:
            start, size = following
            self._answers.append((self._files.begin(self._file, start, size), size))

    def read(self, size: int = -1) -> bytes:
        """Returns some of the next bytes; an empty result is the end."""
        if not self._content and self._answers:
            answer, length = self._answers.pop(0)
            self._content = self._files.content(self._file, answer, length)
            self._ask()
        piece = self._content[: len(self._content) if size < 0 else size]
        self._content = self._content[len(piece) :]
        return bytes(piece)

    def read_into(self, target: memoryview) -> None:
        """Fills the target with the next bytes."""
        while target:
            piece = self.read(len(target))
            if not piece:
                raise ShortReadError(f"the value ends {len(target)} bytes early")
            target[: len(piece)] = piece
            target = target[len(piece) :]

    def skip(self, size: int) -> None:
        """Passes over some bytes."""
        while size:
            passed = len(self.read(min(size, len(self._content) or size)))
            if not passed:
                raise ShortReadError(f"the value ends {size} bytes early")
            size -= passed
