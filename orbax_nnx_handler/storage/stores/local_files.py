"""Files of a local disk, or of what is mounted as one."""

import os
import pathlib
import stat
from collections.abc import Iterator, Sequence

from orbax_nnx_handler.storage.stores.errors import cannot_read
from orbax_nnx_handler.storage.stores.files import Answer, Entry, List, Listing, Question, Read, Sizes


class LocalFiles:
    """Answers from the file system, one question after the other."""

    remote = False

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """See `Backend`."""
        return [_answer(question) for question in questions]


def _answer(question: Question) -> Answer:
    try:
        match question:
            case List(path):
                return _list(path)
            case Sizes(path, prefix):
                return dict(_sizes(path, prefix))
            case Read(path, start, size):
                return _read(path, start, size)
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


def _entry(child: os.DirEntry[str]) -> Entry:
    try:
        # Of thousands of array directories none needs a call of its own.
        return Entry("folder") if child.is_dir() else _entry_of(child.stat())
    except OSError:
        return Entry("other")


def _entry_of(status: os.stat_result) -> Entry:
    if stat.S_ISDIR(status.st_mode):
        return Entry("folder")
    return Entry("file", status.st_size) if stat.S_ISREG(status.st_mode) else Entry("other")


def _sizes(path: str, prefix: str) -> Iterator[tuple[str, int]]:
    """Yields the sizes of the files below the folders in `path` whose names begin with `prefix`."""
    for name, entry in _list(path).entries.items():
        if not f"{name}/".startswith(prefix):
            continue
        if entry.kind == "file":
            yield name, entry.size
        elif entry.kind == "folder":
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


def _read(path: str, start: int, size: int | None) -> bytes | None:
    entry = _entry_of(pathlib.Path(path).stat())
    if entry.kind != "file":
        # Opening a pipe would wait for whoever writes to it.
        raise OSError("it is no regular file")
    with open(path, "rb") as file:  # noqa: PTH123
        file.seek(start)
        return file.read(entry.size if size is None else min(size, entry.size))
