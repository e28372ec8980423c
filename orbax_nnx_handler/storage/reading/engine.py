"""Carries out a byte plan: ranges are read, and each piece is unpacked and put in place as it is complete.

Files of this machine are read by the threads that also unpack, straight into final memory where the
bytes go there as they are. Behind a network, requests are sent ahead of the threads, as many as may be
under way; whatever is complete goes to a thread while the others are still coming. What is read
but not yet in place is bounded.
"""

import contextlib
import dataclasses
import functools
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence

import numpy as np

from orbax_nnx_handler.planning.core.errors import UnreadableLeafError
from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.storage import short_of
from orbax_nnx_handler.storage.arithmetic import LostValueError
from orbax_nnx_handler.storage.reading.base_store import (
    SAY_SO_AFTER_S,
    TIME_LIMIT_S,
    AbsentError,
    Answer,
    DataFiles,
    LocalData,
    LocalStream,
    RemoteData,
    RemoteStream,
)
from orbax_nnx_handler.storage.reading.byte_plan import (
    Batch,
    BytePlan,
    Limits,
    Request,
    RequestPart,
    cut_run,
    plan_bytes,
)
from orbax_nnx_handler.storage.reading.chunks import ChunkPiece
from orbax_nnx_handler.storage.reading.memory import Last, Window, Workers, back_with_pages

_logger = logging.getLogger(__name__)

Progress = Callable[[int], None]
DEFAULT_WINDOW_BYTES = 1 << 30
_THREADS = 16
_TINY_BYTES = 16 << 10
# From here on, the call that backs memory with pages costs less than it saves, a tenth of the reading.
_LARGE_BYTES = 128 << 10
# Ranges of a streamed chunk that are under way at once.
_AHEAD = 8
# The bytes of a gap go here; nobody looks at them.
_GAP = memoryview(bytearray(1 << 20))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """Work that is no reading of ranges: values that are there already, or that another library reads.

    Attributes:
        run: Does it.
        nbytes: Size of the values that it puts in place.
    """

    run: Callable[[], None]
    nbytes: int


def read_pieces(
    files: DataFiles,
    pieces: Sequence[ChunkPiece],
    limits: Limits,
    *,
    tasks: Sequence[Task] = (),
    concurrent_bytes: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Reads all pieces and puts them in place; the first failure stops what has not begun and is raised.

    Args:
        files: Where the bytes are.
        pieces: What is needed, in any order.
        limits: What the store makes cheap.
        tasks: What is to be done beside.
        concurrent_bytes: How many bytes may be read but not yet in place.
        progress: Called with the size of what was put in place since the last call, from any thread.

    Raises:
        UnreadableLeafError: Bytes are absent, too few or damaged.
    """
    others = [piece for piece in pieces if piece.streamed or not piece.wanted.runs]
    planned = [piece for piece in pieces if not piece.streamed and piece.wanted.runs] if others else pieces
    plan = plan_bytes([piece.wanted for piece in planned], limits)
    threads = min(threads_for(pieces), len(plan.batches) + len(others) + len(tasks))
    reading = _Reading(files, planned, limits, concurrent_bytes or DEFAULT_WINDOW_BYTES, progress)
    # Answers from a network come in threads of the store's own, which have others to receive.
    with Workers(threads if threads > 1 or isinstance(files, RemoteData) else 0) as workers:
        reading.run(workers, plan, others, tasks)


def threads_for(pieces: Sequence[ChunkPiece]) -> int:
    """Returns how many threads unpack and put in place."""
    # Of a tiny piece the interpreter's part is the larger one, and threads only
    # take its lock from each other (20,000 leaves of 2.5 kB: 0.37 s with one, 0.45 s with two).
    if sum(piece.nbytes for piece in pieces) < _TINY_BYTES * len(pieces):
        return 1
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(_THREADS, processors)


class _Reading:
    """One read: what is under way, and the memory that it takes."""

    def __init__(
        self,
        files: DataFiles,
        pieces: Sequence[ChunkPiece],
        limits: Limits,
        window_bytes: int,
        progress: Progress | None,
    ) -> None:
        self._files = files
        self._pieces = pieces
        self._limits = limits
        self._window = Window(window_bytes)
        self._under_way = threading.BoundedSemaphore(limits.requests)
        self._progress = progress
        self._own = threading.local()
        self._asked: dict[int, ChunkPiece] = {}
        self._heard = time.monotonic()
        self._limit = TIME_LIMIT_S
        self._patience = None if isinstance(files, LocalData) else min(self._limit, SAY_SO_AFTER_S)

    def run(
        self, workers: Workers, plan: BytePlan, others: Sequence[ChunkPiece], tasks: Sequence[Task]
    ) -> None:
        """Reads everything.

        Raises:
            UnreadableLeafError: The store has been silent for too long.
        """
        self._submit_all(workers, plan, others, tasks)
        self._until(workers.wait)

    def _until(self, happens: Callable[[float | None], bool]) -> None:
        """Waits for something; says so while the store is silent, and gives it up after a time."""
        since = time.monotonic()
        while not happens(self._patience):
            left = self._limit - (time.monotonic() - max(since, self._heard))
            for piece in list(self._asked.values())[:1]:
                if left <= 0:
                    silence = TimeoutError(f"nothing came from the store for {self._limit:.0f} s")
                    raise piece.owner.unreadable(silence)
                _logger.warning("still waiting for %s; giving up in %.0f s", piece.wanted.file, left)

    def _submit_all(
        self, workers: Workers, plan: BytePlan, others: Sequence[ChunkPiece], tasks: Sequence[Task]
    ) -> None:
        for task in tasks:
            self._submit(workers, _Step(task.run, held=task.nbytes, nbytes=task.nbytes))
        present = [piece for piece in others if piece.content is not None]
        if present:
            nbytes = sum(piece.nbytes for piece in present)
            work = functools.partial(self._use_present, present)
            self._submit(workers, _Step(work, held=0, nbytes=nbytes))
        for piece in others:
            if piece.content is not None:
                continue
            if piece.streamed:
                work = functools.partial(self._read_stream, piece)
                held = min(piece.size, _AHEAD * self._limits.range_bytes)
                self._submit(workers, _Step(work, held=held, nbytes=piece.nbytes))
            else:
                self._ask_whole(workers, piece)
        for batch in plan.batches:
            nbytes = sum(self._pieces[number].nbytes for number in batch.wanted)
            if isinstance(self._files, LocalData):
                work = functools.partial(self._read_local, self._files, batch)
                self._submit(workers, _Step(work, held=batch.nbytes, nbytes=nbytes))
            else:
                self._ask(workers, self._files, batch, nbytes)

    def _submit(self, workers: Workers, step: "_Step") -> None:
        if not workers.failed:
            self._until(functools.partial(self._window.enter, step.held))
            workers.expect()
            workers.submit(lambda: self._finish(workers, step))

    def _finish(self, workers: Workers, step: "_Step") -> None:
        try:
            if not workers.failed:
                step.work()
                if self._progress is not None:
                    self._progress(step.nbytes)
        finally:
            self._window.leave(step.held)

    def _ask(self, workers: Workers, files: RemoteData, batch: Batch, nbytes: int) -> None:
        begin = [functools.partial(files.begin, r.file, r.start, r.size) for r in batch.requests]
        self._send(
            workers,
            self._pieces[batch.wanted[0]],
            begin,
            lambda answers: _Step(
                functools.partial(self._place, files, batch, answers), held=batch.nbytes, nbytes=nbytes
            ),
        )

    def _ask_whole(self, workers: Workers, piece: ChunkPiece) -> None:
        assert isinstance(self._files, RemoteData)
        files, nbytes = self._files, piece.nbytes
        begin = functools.partial(files.begin_whole, piece.wanted.file)
        self._send(
            workers,
            piece,
            [begin],
            lambda answers: _Step(
                functools.partial(self._use_whole, files, piece, answers), held=nbytes, nbytes=nbytes
            ),
        )

    def _send(
        self,
        workers: Workers,
        piece: ChunkPiece,
        begin: Sequence[Callable[[], Answer]],
        step_of: Callable[[list[Answer]], "_Step"],
    ) -> None:
        """Begins requests; once all are answered, a thread takes over."""
        if workers.failed:
            return
        answers: list[Answer] = []
        step = step_of(answers)
        self._until(functools.partial(self._window.enter, step.held))
        workers.expect()
        self._asked[id(step)] = piece
        last = Last(len(begin), lambda: workers.submit(lambda: self._finish(workers, step)))
        for one in begin:
            self._until(lambda seconds: self._under_way.acquire(timeout=seconds))
            answers.append(one())
            answers[-1].add_done_callback(lambda _: self._answered(last, step))

    def _answered(self, last: Last, step: "_Step") -> None:
        self._heard = time.monotonic()
        self._under_way.release()
        if last.count():
            self._asked.pop(id(step), None)

    def _read_local(self, files: LocalData, batch: Batch) -> None:
        contents = self._memory(batch)
        # A failure names the first of the leaves that are read together.
        with _Named(self._pieces[batch.wanted[0]], listed=True):
            for request in batch.requests:
                buffers = list(_buffers(request, self._pieces, contents))
                files.read_into(request.file, request.start, buffers)
        self._use(batch, contents)

    def _memory(self, batch: Batch) -> dict[int, memoryview]:
        """Returns working memory of this thread for what is used, and has the final memory ready."""
        used: list[int] = []
        for number in batch.wanted:
            piece = self._pieces[number]
            if piece.use is not None:
                used.append(number)
            if piece.target is not None and len(piece.target) >= _LARGE_BYTES:
                # Right before it is filled: its first content, zeros, is in the processor's cache.
                back_with_pages(piece.target)
        sizes = [self._pieces[number].size_of_use for number in used]
        scratch, ends = self._scratch(sum(sizes)), itertools.accumulate(sizes)
        return {
            number: scratch[end - size : end] for number, size, end in zip(used, sizes, ends, strict=True)
        }

    def _scratch(self, size: int) -> memoryview:
        # Fresh memory costs as much as what is done in it, so each thread keeps its own until the end.
        if getattr(self._own, "scratch", None) is None or len(self._own.scratch) < size:
            self._own.scratch = np.empty(size, np.uint8).data
        return self._own.scratch

    def _place(self, files: RemoteData, batch: Batch, answers: Sequence[Answer]) -> None:
        contents: dict[int, memoryview] = {}
        for request, answer in zip(batch.requests, answers, strict=True):
            with _Named(self._pieces[request.parts[0].wanted], listed=True):
                content = files.content(request.file, answer, request.size)
                for part in request.parts:
                    self._put(part, content[part.start : part.start + part.size], contents)
        self._use(batch, contents)

    def _put(self, part: RequestPart, content: memoryview, contents: dict[int, memoryview]) -> None:
        piece = self._pieces[part.wanted]
        if piece.target is not None:
            direct = content[: len(piece.target) - part.at]
            piece.target[part.at : part.at + len(direct)] = direct
            contents[part.wanted] = content[len(direct) :]
        elif part.size == piece.size:
            contents[part.wanted] = content  # Used where it is, without a copy.
        else:
            if part.wanted not in contents:
                contents[part.wanted] = np.empty(piece.size, np.uint8).data
            contents[part.wanted][part.at : part.at + part.size] = content

    def _use(self, batch: Batch, contents: Mapping[int, memoryview]) -> None:
        for number in batch.wanted:
            piece = self._pieces[number]
            if piece.use is not None:
                with _Named(piece):
                    piece.use(contents[number])

    def _use_present(self, pieces: Sequence[ChunkPiece]) -> None:
        for piece in pieces:
            with _Named(piece):
                assert piece.use is not None
                assert piece.content is not None
                piece.use(memoryview(piece.content))

    def _use_whole(self, files: RemoteData, piece: ChunkPiece, answers: Sequence[Answer]) -> None:
        assert piece.use is not None
        with _Named(piece):
            piece.use(files.content(piece.wanted.file, answers[0]))

    def _read_stream(self, piece: ChunkPiece) -> None:
        (start, size), files = piece.wanted.runs[0], self._files
        assert piece.use is not None
        with _Named(piece):
            if isinstance(files, LocalData):
                piece.use(LocalStream(files, piece.wanted.file, start, size))
            else:
                ranges = cut_run(start, size, self._limits.range_bytes)
                piece.use(RemoteStream(files, piece.wanted.file, ranges, _AHEAD))


@dataclasses.dataclass(frozen=True)
class _Step:
    """Work of a thread, the bytes that the window holds for it, and the bytes that it puts in place."""

    work: Callable[[], None]
    held: int
    nbytes: int


def _buffers(
    request: Request, pieces: Sequence[ChunkPiece], contents: Mapping[int, memoryview]
) -> Iterator[memoryview]:
    """Yields where the bytes of a request go, those of gaps included."""
    position = 0
    for number, at, start, size in request.parts:
        while position < start:
            gap = _GAP[: start - position]
            yield gap
            position += len(gap)
        target = pieces[number].target
        if target is None:
            yield contents[number][at : at + size]
        elif number in contents:
            yield from (target, contents[number])
        else:
            yield target[at : at + size]
        position += size


class _Named:
    """Names leaf and file in what goes wrong in a `with` block; a class, for it is entered for each piece.

    Attributes:
        piece: Whose bytes they are.
        listed: Whether a catalog says that the bytes are there; their absence is a loss then.
    """

    __slots__ = ("listed", "piece")

    def __init__(self, piece: ChunkPiece, *, listed: bool = False) -> None:
        self.piece, self.listed = piece, listed

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, trace: object) -> bool:
        if error is None or isinstance(error, UnreadableLeafError):
            return False
        if isinstance(error, LostValueError):
            raise error.of(self.piece.owner.path) from None
        if isinstance(error, AbsentError) and not self.listed:
            self.piece.owner.fill_absent()
            return True
        # What a store answers, TensorStore raises as several kinds; and what ran out is not the file's fault.
        if isinstance(error, _OF_A_STORE) and short_of(error) is None:
            raise self.piece.owner.unreadable(error) from error
        return False


_OF_A_STORE = (OSError, ValueError, LookupError, RuntimeError, NotImplementedError)


@contextlib.contextmanager
def naming_lost_values(path: Path) -> Generator[None]:
    """Names the leaf of which a value does not fit its place."""
    try:
        yield
    except LostValueError as error:
        raise error.of(path) from None
