"""Who answers questions about files: a local disk, or fsspec and TensorStore for a bucket."""

import asyncio
import concurrent.futures
import logging
import os
import pathlib
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, cast

import tensorstore as ts
from etils import epath

from orbax_nnx_handler.planning.core.errors import NotACheckpointError
from orbax_nnx_handler.storage.stores.files import (
    ANYWHERE,
    FileAnswer,
    FileQuestion,
    FolderEntry,
    List,
    Listing,
    ReadFile,
    Sizes,
)
from orbax_nnx_handler.storage.stores.locations import (
    WRITTEN_TO,
    cannot_read,
    check_inside,
    file_system,
    kvstore_spec,
    open_file,
)


class LocalFiles:
    """Answers from the file system, one question after the other."""

    remote = False
    versions: Mapping[str, bytes] = {}

    def answer(self, questions: Sequence[FileQuestion]) -> list[FileAnswer]:
        """See `Backend`."""
        return [_answer(question) for question in questions]


def _answer(question: FileQuestion) -> FileAnswer:
    try:
        match question:
            case List(path):
                return _list(path)
            case Sizes(path, prefix):
                return dict(_sizes(path, prefix))
            case ReadFile():
                return _read(question)
    except (FileNotFoundError, NotADirectoryError):
        return {} if isinstance(question, Sizes) else None
    except OSError as error:
        return cannot_read(question.path, error)


def _list(path: str) -> Listing:
    entry = _entry_of(pathlib.Path(path).stat())
    if entry.kind != "folder":
        return Listing(kind=entry.kind, size=entry.size)
    with os.scandir(path) as scan:
        found = sorted(scan, key=lambda child: child.name)
    return Listing(kind="folder", entries={child.name: _entry(child) for child in found})


def _entry(child: os.DirEntry[str]) -> FolderEntry:
    try:
        # Of thousands of array directories none needs a call of its own.
        return FolderEntry("folder") if child.is_dir() else _entry_of(child.stat())
    except OSError:
        return FolderEntry("other")


def _entry_of(status: os.stat_result) -> FolderEntry:
    if stat.S_ISDIR(status.st_mode):
        return FolderEntry("folder")
    return FolderEntry("file", status.st_size) if stat.S_ISREG(status.st_mode) else FolderEntry("other")


def _sizes(path: str, prefix: str) -> Iterator[tuple[str, int]]:
    """Yields the sizes of the files below the folders in `path` whose names begin with `prefix`."""
    for name, entry in _list(path).entries.items():
        if not f"{name}/".startswith(prefix):
            continue
        if entry.kind == "file":
            yield name, entry.size
        elif entry.kind == "folder":
            check_inside(path, name)
            yield from _sizes_below(path, name)


def _sizes_below(root: str, folder: str) -> Iterator[tuple[str, int]]:
    # Links to folders are not followed: they may lead in a circle.
    for path, _, names in os.walk(f"{root}/{folder}"):
        for name in names:
            file = f"{path}/{name}"
            try:
                entry = _entry_of(pathlib.Path(file).stat())
            except OSError:
                continue
            if entry.kind == "file":
                yield file[len(root) + 1 :], entry.size


def _read(question: ReadFile) -> bytes | None:
    path = question.path
    if question.below == ANYWHERE:
        path = os.fspath(pathlib.Path(path).absolute())
    folder = question.below or path.rpartition("/")[0] or "."
    descriptor = open_file(folder, path.removeprefix(folder).lstrip("/"))
    with open(descriptor, "rb") as file:  # noqa: PTH123
        held = os.fstat(descriptor).st_size
        if question.size is None and held > _MAY_BE_HOLE:
            _check_filled(descriptor, held)
        file.seek(question.start)
        return file.read(held if question.size is None else min(question.size, held))


# From here on a file that is read whole is looked at for holes; at least this part must lie on the disk.
_MAY_BE_HOLE, _FILLED = 64 << 20, 16


def _check_filled(descriptor: int, size: int) -> None:
    """Raises where a file is nearly all hole: what takes no bytes on the disk would take them in memory."""
    if not hasattr(os, "SEEK_DATA"):
        return
    at = filled = 0
    try:
        while filled * _FILLED < size:
            start = os.lseek(descriptor, at, os.SEEK_DATA)
            at = os.lseek(descriptor, start, os.SEEK_HOLE)
            filled += at - start
    except OSError as error:
        # No data follows. A file system that does not know about holes says that all is data.
        raise OSError(f"of its {size} bytes only {filled} are there") from error


_logger = logging.getLogger(__name__)

# A trip takes a tenth of a second; a store that has said nothing for a minute has a fault.
TIME_LIMIT_S = 60.0
_SAY_SO_AFTER_S = 10.0

_RETRIES = {"max_retries": 6, "initial_delay": "500ms", "max_delay": "8s"}
_CONCURRENCY = {"limit": 128}

CONTEXT_SPEC: Mapping[str, Any] = {
    "gcs_request_retries": _RETRIES,
    "s3_request_retries": _RETRIES,
    "gcs_request_concurrency": _CONCURRENCY,
    "s3_request_concurrency": _CONCURRENCY,
}
"""TensorStore's limits: half a minute of retries, where it would try for several."""


class _Pending(Protocol):
    """An answer that is on its way."""

    def result(self, timeout: float | None = None) -> Any: ...

    def cancel(self) -> Any: ...


class RemoteFiles:
    """Answers from a bucket; the questions of a call are on their way together."""

    remote = True

    def __init__(self, path: epath.PathLike) -> None:
        scheme, _, rest = os.fspath(path).partition("://")
        self._root = f"{scheme}://{rest.partition('/')[0]}"
        self._scheme = scheme
        self._kvstore: ts.KvStore | None = None
        self._filesystem: Any = None
        self.versions: dict[str, bytes] = {}

    def answer(self, questions: Sequence[FileQuestion]) -> list[FileAnswer]:
        """See `Backend`."""
        pending = [self._begin(question) for question in questions]
        answers: list[FileAnswer] = []
        since = time.monotonic()
        try:
            for question, begun in zip(questions, pending, strict=True):
                if isinstance(begun, NotACheckpointError):
                    answers.append(begun)
                    continue
                answers.append(self._finish(question, begun, since + TIME_LIMIT_S))
                if not isinstance(answers[-1], NotACheckpointError):
                    # A large file comes in many runs: as long as one after the other comes, it is waited for.
                    since = time.monotonic()
            return answers
        finally:
            # After an interrupt nothing is waited for.
            for begun in pending:
                if not isinstance(begun, NotACheckpointError):
                    begun.cancel()

    def _begin(self, question: FileQuestion) -> "_Pending | NotACheckpointError":
        try:
            return self._start(question)
        # A library is not installed, credentials are missing: each library has errors of its own.
        except Exception as error:
            return cannot_read(question.path, error)

    def _start(self, question: FileQuestion) -> _Pending:
        if isinstance(question, ReadFile):
            key = question.path.removeprefix(self._root).lstrip("/")
            stop = None if question.size is None else question.start + question.size
            whole = not question.start and stop is None
            return cast(
                _Pending, self._store().read(key, byte_range=None if whole else slice(question.start, stop))
            )
        filesystem = self._files()
        # A process that lives long would otherwise see the listing of an earlier call.
        filesystem.invalidate_cache()
        # The coroutines of an asynchronous file system are a public part of fsspec, underscore or not:
        # https://filesystem-spec.readthedocs.io/en/latest/async.html
        if isinstance(question, List):
            asked = filesystem._ls(question.path, detail=True)
        else:
            asked = filesystem._find(question.path, prefix=question.prefix, detail=True)
        return cast(_Pending, asyncio.run_coroutine_threadsafe(asked, filesystem.loop))

    def _finish(self, question: FileQuestion, future: _Pending, deadline: float) -> FileAnswer:
        try:
            result = _wait(question, future, deadline)
        except Exception as error:
            # That of a file of this machine, such as one with credentials, has the name of the file.
            if isinstance(error, FileNotFoundError) and not error.filename:
                return {} if isinstance(question, Sizes) else None
            return cannot_read(question.path, error)
        if isinstance(question, ReadFile):
            return self._of_one_version(question, result) if result.state == "value" else None
        path = question.path.partition("://")[2].strip("/")
        if isinstance(question, List):
            return _listing(path, result)
        return {
            name[len(path) + 1 :]: int(info["size"])
            for name, info in result.items()
            if info["type"] == "file" and not name.endswith("/")
        }

    def _of_one_version(self, question: ReadFile, result: Any) -> FileAnswer:
        version = result.stamp.generation
        if self.versions.setdefault(question.path, version) == version:
            return result.value
        # Several runs of one file, and values that have no checksum of their own.
        return NotACheckpointError(
            f"{question.path} was written to while it was read.",
            hints=[WRITTEN_TO],
        )

    def _store(self) -> ts.KvStore:
        if self._kvstore is None:
            context = ts.Context(dict(CONTEXT_SPEC))
            self._kvstore = ts.KvStore.open(kvstore_spec(epath.Path(self._root)), context=context).result()
        return self._kvstore

    def _files(self) -> Any:
        if self._filesystem is None:
            # In a thread: an interrupt would leave modules half imported, and every later call would fail.
            with concurrent.futures.ThreadPoolExecutor(1) as apart:
                self._filesystem = apart.submit(file_system, self._scheme).result()
        return self._filesystem


def _wait(question: FileQuestion, future: _Pending, deadline: float) -> Any:
    while True:
        left = deadline - time.monotonic()
        try:
            return future.result(timeout=max(0.0, min(left, _SAY_SO_AFTER_S)))
        except (TimeoutError, concurrent.futures.TimeoutError):
            if left <= _SAY_SO_AFTER_S:
                raise TimeoutError(f"no answer within {TIME_LIMIT_S:.0f} s") from None
            _logger.warning(
                "still waiting for %s; giving up in %.0f s", question.path, left - _SAY_SO_AFTER_S
            )


def _listing(path: str, infos: Sequence[Mapping[str, Any]]) -> Listing:
    entries: dict[str, FolderEntry] = {}
    for info in infos:
        name = str(info["name"]).strip("/")
        # An empty object whose key ends in a slash marks a folder; the consoles of the stores write those.
        is_file = info["type"] == "file" and not str(info["name"]).endswith("/")
        if name != path:
            entries[name.rpartition("/")[2]] = (
                FolderEntry("file", int(info["size"])) if is_file else FolderEntry("folder")
            )
        elif is_file and "/" in path:
            return Listing(kind="file", size=int(info["size"]))
    return Listing(kind="folder", entries=dict(sorted(entries.items())))
