"""What lies at the paths of a store: every question is asked once, the questions of one call together.

A checkpoint's metadata is a dozen small files. Behind a network each of them costs a
round trip of 20 to 100 ms, so what is known from a listing (what exists, which kind it
is, how large it is) is never asked for again, and what does not depend on an answer
is asked for in the same trip.
"""

import bisect
import contextlib
import dataclasses
import io
import logging
import os
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol, TypeVar

from etils import epath

from orbax_nnx_handler.planning.core.errors import NotACheckpointError
from orbax_nnx_handler.storage.stores.ocdbt import Extent

_logger = logging.getLogger(__name__)

FileKind = Literal["file", "folder", "other"]

ANYWHERE = "/"
"""The folder that a file must lie in which the caller named: a link of the caller's own is followed."""


class FolderEntry(NamedTuple):
    """What a name stands for; `other` is a pipe, a device, or a link to nothing."""

    kind: FileKind
    size: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listing:
    """What lies at a path.

    Attributes:
        kind: What the path itself is.
        size: Bytes of a file.
        entries: What lies in a folder, by name.
    """

    kind: FileKind
    size: int = 0
    entries: Mapping[str, FolderEntry] = dataclasses.field(default_factory=dict[str, FolderEntry])


class List(NamedTuple):
    """Asks what lies at a path; the answer is a `Listing`, or None."""

    path: str


class Sizes(NamedTuple):
    """Asks for all files below a folder whose path in it begins with `prefix`; the answer is their sizes."""

    path: str
    prefix: str


class ReadFile(NamedTuple):
    """Asks for the bytes of a file, or a run of them; the answer is None where there is no file.

    Attributes:
        path: The file.
        start: The first byte.
        size: How many; None for all.
        below: The folder that no link on the way may lead out of; empty for the file's own.
    """

    path: str
    start: int = 0
    size: int | None = None
    below: str = ""


FileQuestion = List | Sizes | ReadFile
FileAnswer = Listing | dict[str, int] | bytes | NotACheckpointError | None


class Backend(Protocol):
    """Answers questions about one kind of store.

    Attributes:
        remote: Whether each question costs a round trip.
    """

    remote: bool

    @property
    def versions(self) -> Mapping[str, bytes]:
        """Of each object that was read, the version that was read first; none of local files."""
        ...

    def answer(self, questions: Sequence[FileQuestion]) -> list[FileAnswer]:
        """Answers all questions in one round trip, or as few as the store allows.

        An answer is an error where the store does not answer, or refuses.
        """
        ...


class SearchEndedError(Exception):
    """More would have to be asked than a search may; what is known until then has to do."""


class Files:
    """The files of a store as they were when first asked for.

    One is made for one restore and shared by its stages: nothing is kept longer, so that
    the next one sees what was written since.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._known: dict[FileQuestion, FileAnswer] = {}
        self._most: int | None = None

    @contextlib.contextmanager
    def at_most(self, questions: int) -> Generator[None]:
        """Ends a search behind a network with a `SearchEndedError` where more has to be asked, all in all."""
        self._most = questions if self.remote else None
        try:
            yield
        finally:
            self._most = None

    @property
    def remote(self) -> bool:
        """Whether each question costs a round trip."""
        return self._backend.remote

    def ask(self, *questions: FileQuestion) -> None:
        """Asks, in one trip, whatever of this is not known."""
        new = [question for question in dict.fromkeys(questions) if question not in self._known]
        if new and self._most is not None and len(self._known) + len(new) > self._most:
            raise SearchEndedError
        if new:
            self._known |= zip(new, self._answers(new), strict=True)

    def versions_of(self, objects: Iterable[epath.Path]) -> dict[str, bytes]:
        """Returns, by their names, which version of objects in a bucket was read."""
        known = self._backend.versions
        return {each.name: known[os.fspath(each)] for each in objects if os.fspath(each) in known}

    def look_into(self, paths: Iterable[epath.Path]) -> None:
        """Lists several folders in one trip."""
        self.ask(*(List(os.fspath(path)) for path in paths))

    def listing(self, path: epath.Path) -> Listing | None:
        """Returns what lies at a path, or None.

        Raises:
            NotACheckpointError: The store does not tell.
        """
        return _expect(Listing, self._answer(List(os.fspath(path))))

    def entries(self, folder: epath.Path) -> Mapping[str, FolderEntry]:
        """Returns what lies in a folder, in order of the names."""
        listing = self.listing(folder)
        return listing.entries if listing is not None else {}

    def exists(self, path: epath.Path) -> bool:
        """Tells whether anything lies at a path."""
        return self.listing(path) is not None

    def is_folder(self, path: epath.Path) -> bool:
        """Tells whether a path is a folder."""
        listing = self.listing(path)
        return listing is not None and listing.kind == "folder"

    def is_file(self, path: epath.Path) -> bool:
        """Tells whether a path is a file."""
        listing = self.listing(path)
        return listing is not None and listing.kind == "file"

    def folders(self, folder: epath.Path) -> list[epath.Path]:
        """Returns the folders in a folder, by name."""
        return [folder / name for name, entry in self.entries(folder).items() if entry.kind == "folder"]

    def has_file(self, folder: epath.Path, name: str) -> bool:
        """Tells from its listing whether a folder holds something by this name that is no folder."""
        entry = self.entries(folder).get(name)
        return entry is not None and entry.kind != "folder"

    def content(self, path: epath.Path, below: str = "") -> bytes | None:
        """Returns the bytes of a small file, or None if there is none; `below` as for `ReadFile`.

        Raises:
            NotACheckpointError: It cannot be read.
        """
        return _expect(bytes, self._answer(ReadFile(os.fspath(path), below=below)))

    def beginning(self, path: epath.Path, size: int) -> bytes:
        """Returns the first bytes of a file that the caller named, wherever it is a link to."""
        return _expect(bytes, self._answer(ReadFile(os.fspath(path), 0, size, ANYWHERE))) or b""

    def optional(self, path: epath.Path, *, warn: bool = False) -> bytes | None:
        """Returns the bytes of a file that can be done without, or None."""
        try:
            return self.content(path)
        except NotACheckpointError as error:
            if warn:
                _logger.warning("going on without a file: %s", str(error).splitlines()[0])
            return None

    def contents(self, folder: epath.Path, names: Sequence[str]) -> list[bytes | NotACheckpointError | None]:
        """Returns the bytes of small files below a folder, asked for together, or an error for each."""
        root = os.fspath(folder)
        questions = [ReadFile(f"{root}/{name}", below=root) for name in names]
        self.ask(*questions)
        answers = [self._known[question] for question in questions]
        return [answer if isinstance(answer, bytes | NotACheckpointError) else None for answer in answers]

    def extents(self, folder: epath.Path, extents: Sequence[Extent], below: str = "") -> list[bytes]:
        """Returns runs of bytes in files below a folder, asked for together and not kept.

        Links lead out of the folder only where `below` says so, as for `ReadFile`.
        """
        root = os.fspath(folder)
        answers = self._backend.answer(
            [ReadFile(f"{root}/{file}", start, size, below or root) for file, start, size in extents]
        )
        # A run is cut to its file, which was therefore there.
        return [
            _expect(bytes, _vanished(f"{root}/{file}") if answer is None else answer) or b""
            for (file, _, _), answer in zip(extents, answers, strict=True)
        ]

    def sizes(self, folder: epath.Path, prefix: str) -> Mapping[str, int]:
        """Returns the size of every file below a folder whose path in it begins with `prefix`."""
        found = self._answer(Sizes(os.fspath(folder), prefix))
        if isinstance(found, NotACheckpointError):
            raise found
        return found if isinstance(found, dict) else {}

    def _answer(self, question: FileQuestion) -> FileAnswer:
        self.ask(question)
        return self._known[question]

    def _answers(self, questions: Sequence[FileQuestion]) -> list[FileAnswer]:
        parts = [self._parts(question) for question in questions]
        answers = iter(self._backend.answer([part for some in parts for part in some]))
        found = [_joined([next(answers) for _ in some]) for some in parts]
        return [
            _vanished(question.path) if answer is None and self._listed(question).kind == "file" else answer
            for question, answer in zip(questions, found, strict=True)
        ]

    def _parts(self, question: FileQuestion) -> list[FileQuestion]:
        """Returns what is asked instead: of a large object behind a network several runs, side by side."""
        if not self.remote or not isinstance(question, ReadFile) or question.size is not None:
            return [question]
        size = self._listed(question).size
        # The last run has no end, so that an object that grew is not taken for what it was.
        starts = range(question.start, max(size, question.start + 1), _LONGEST_RUN)
        return [
            question._replace(start=start, size=_LONGEST_RUN if start + _LONGEST_RUN in starts else None)
            for start in starts
        ]

    def _listed(self, question: FileQuestion) -> FolderEntry:
        """Returns what a file was when it, or its folder, was listed."""
        if not isinstance(question, ReadFile):
            return _NOTHING
        folder, _, name = question.path.rpartition("/")
        own, listing = self._known.get(List(question.path)), self._known.get(List(folder))
        if isinstance(own, Listing):
            return FolderEntry(own.kind, own.size)
        return listing.entries.get(name, _NOTHING) if isinstance(listing, Listing) else _NOTHING


_NOTHING = FolderEntry("other")
# 8 MB take a few times as long to carry as to ask for.
_LONGEST_RUN = 8 << 20


def _joined(answers: Sequence[FileAnswer]) -> FileAnswer:
    """Returns the runs of one file as one, or what is the matter with one of them."""
    if len(answers) == 1:
        return answers[0]
    runs = [answer for answer in answers if isinstance(answer, bytes)]
    errors = [answer for answer in answers if isinstance(answer, NotACheckpointError)]
    return b"".join(runs) if len(runs) == len(answers) else next(iter(errors), None)


def _vanished(path: str) -> NotACheckpointError:
    return NotACheckpointError(
        f"{path} vanished while the checkpoint was read: it was listed, and is not there any more.",
        hints=["restore again: whoever deletes or replaces old steps may have come between."],
    )


_Expected = TypeVar("_Expected")


def _expect(kind: type[_Expected], answer: FileAnswer) -> _Expected | None:
    if isinstance(answer, NotACheckpointError):
        raise answer
    return answer if isinstance(answer, kind) else None


# What is fetched where something was not foreseen, and a gap that is read with what lies around it.
_AT_LEAST = 1 << 16


class RangedFile(io.RawIOBase):
    """The file; see `fetch`."""

    def __init__(self, files: Files, path: epath.Path) -> None:
        super().__init__()
        listing = files.listing(path)
        self.size = 0 if listing is None else listing.size
        self._files, self._path = files, path
        self._starts: list[int] = []
        self._runs: dict[int, bytes] = {}
        self._at = 0

    def fetch(self, runs: Iterable[tuple[int, int]]) -> None:
        """Fetches runs of bytes, each as start and length, in one trip; neighbours as one, none twice."""
        extents = [Extent(self._path.name, start, stop - start) for start, stop in self._new(runs)]
        if extents:
            fetched = self._files.extents(self._path.parent, extents)
            self._runs |= {extent.start: run for extent, run in zip(extents, fetched, strict=True)}
            self._starts = sorted(self._runs)

    def _new(self, runs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        joined: list[tuple[int, int]] = []
        for start, size in sorted(runs):
            if not 0 <= start < self.size or self.held(start, start + 1):
                continue
            following = bisect.bisect_right(self._starts, start)
            stop = min([start + size, self.size, *self._starts[following : following + 1]])
            first, last = joined[-1] if joined else (0, -1 - _AT_LEAST)
            if start - last <= _AT_LEAST and stop - first <= _LONGEST_RUN:
                joined[-1] = first, max(last, stop)
            elif max(start, last) < stop:
                joined.append((max(start, last), stop))
        return joined

    def held(self, start: int, stop: int) -> bytes:
        """Returns what was fetched already of the bytes between two positions, as far as it lies together."""
        at = bisect.bisect_right(self._starts, start) - 1
        if at < 0:
            return b""
        first = self._starts[at]
        return self._runs[first][start - first : stop - first]

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
            piece = self.held(self._at, stop)
            if not piece:
                self.fetch([(self._at, max(stop - self._at, _AT_LEAST))])
                piece = self.held(self._at, stop)
            if not piece:
                # The object is shorter than its listing said.
                break
            pieces.append(piece)
            self._at += len(piece)
        return b"".join(pieces)
