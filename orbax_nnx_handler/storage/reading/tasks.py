"""Reads as independent tasks, and the threads that run them."""

import contextlib
import dataclasses
import os
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.storage.arithmetic import LostValueError

Progress = Callable[[int], None]

# Small reads are handed to a thread together: at thousands of leaves the
# handing over would cost more than the reads.
_BATCH_BYTES = 4 << 20
_BATCH_TASKS = 256
# A store behind a network answers late, so many questions are asked at once.
_REMOTE_THREADS = 64
_LOCAL_THREADS = 16
_TINY_BYTES = 16 << 10
_DEFAULT_WINDOW_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """The values of one stored leaf that one call reads.

    Attributes:
        path: The stored leaf.
        nbytes: Size of the values in bytes.
        run: Reads them into place.
    """

    path: Path
    nbytes: int
    run: Callable[[], None]


def run_tasks(
    tasks: Sequence[Task], *, local: bool, concurrent_bytes: int | None, progress: Progress | None
) -> None:
    """Runs all tasks; the first failure stops those not yet begun and is raised.

    Args:
        tasks: Independent of each other, in any order.
        local: Whether they read from this machine's files, where more threads
            than processors gain nothing.
        concurrent_bytes: How many bytes of values may be under way at once.
        progress: Called with the size of each batch that is done.
    """
    threads = _local_threads(tasks) if local else _REMOTE_THREADS
    window = _Window(concurrent_bytes or _DEFAULT_WINDOW_BYTES)
    stop = threading.Event()

    def run(batch: list[Task]) -> None:
        size = sum(task.nbytes for task in batch)
        with window.holding(size):
            for task in batch:
                if stop.is_set():
                    return
                try:
                    task.run()
                except LostValueError as error:
                    raise error.of(task.path) from None
        if progress is not None:
            progress(size)

    batches = list(_batches(tasks))
    if threads == 1 or len(batches) <= 1:
        for batch in batches:
            run(batch)
    else:
        _run_together(run, batches, min(threads, len(batches)), stop)


def _run_together(
    run: Callable[[list[Task]], None], batches: Sequence[list[Task]], threads: int, stop: threading.Event
) -> None:
    with ThreadPoolExecutor(threads, thread_name_prefix="restore") as pool:
        futures = [pool.submit(run, batch) for batch in batches]
        try:
            for future in futures:
                future.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _local_threads(tasks: Sequence[Task]) -> int:
    # Of a tiny read the interpreter's part is the larger one, and threads only
    # take its lock from each other (20,000 leaves of 2.5 kB: 0.37 s with one, 0.45 s with two).
    if sum(task.nbytes for task in tasks) < _TINY_BYTES * len(tasks):
        return 1
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(_LOCAL_THREADS, processors)


def _batches(tasks: Sequence[Task]) -> Iterator[list[Task]]:
    """Yields the tasks largest first, the small ones together and in their stored order."""
    for task in sorted((task for task in tasks if task.nbytes >= _BATCH_BYTES), key=_size, reverse=True):
        yield [task]
    batch: list[Task] = []
    size = 0
    for task in tasks:
        if task.nbytes >= _BATCH_BYTES:
            continue
        batch.append(task)
        size += task.nbytes
        if size >= _BATCH_BYTES or len(batch) >= _BATCH_TASKS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _size(task: Task) -> int:
    return task.nbytes


class _Window:
    """Lets in as many bytes as fit; what is larger than the window waits to be alone."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._used = 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def holding(self, size: int) -> Generator[None]:
        size = min(size, self._size)
        with self._changed:
            self._changed.wait_for(lambda: self._used + size <= self._size)
            self._used += size
        try:
            yield
        finally:
            with self._changed:
                self._used -= size
                self._changed.notify_all()
