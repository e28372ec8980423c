"""Threads that work, bytes under way, and what is said where the system has no more of either.

The first failure stops what has not begun.
"""

import contextlib
import errno
import resource
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, Self

from orbax_nnx_handler.planning.core.errors import RestoreError
from orbax_nnx_handler.planning.core.lines import sized
from orbax_nnx_handler.planning.core.paths import Path, render


class Workers:
    """Threads that work, or none where the caller does it; the first failure stops what has not begun."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="restore") if threads else None
        self._failures: list[BaseException] = []
        self._left = 0
        self._changed = threading.Condition()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            # Also an interrupt: what is under way ends, what waits is forgotten.
            self._failures.append(error)
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=error is not None)
        if error is None and self._failures:
            raise self._failures[0]

    @property
    def failed(self) -> bool:
        """Whether nothing more is to be begun."""
        return bool(self._failures)

    def expect(self) -> None:
        """Counts work that will be submitted, maybe later and from another thread."""
        with self._changed:
            self._left += 1

    def wait(self, seconds: float | None) -> bool:
        """Waits for all expected work; False if none was done for so long."""
        with self._changed:
            while left := self._left:
                if not self._changed.wait_for(lambda left=left: self._left < left, seconds):
                    return False
        return True

    def submit(self, work: Callable[[], None]) -> None:
        """Has expected work done."""
        if self._pool is None:
            self._do(work)
        else:
            self._pool.submit(self._do, work)

    def _do(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._failures.append(error)
        finally:
            with self._changed:
                self._left -= 1
                self._changed.notify_all()


class Window:
    """Lets in as many bytes as fit; what is larger than the window waits to be alone."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._used = 0
        self._changed = threading.Condition()

    def enter(self, size: int, seconds: float | None) -> bool:
        """Waits for room; False if there was none for so long."""
        size = min(size, self._size)
        with self._changed:
            if not self._changed.wait_for(lambda: self._used + size <= self._size, seconds):
                return False
            self._used += size
        return True

    def leave(self, size: int) -> None:
        """Gives room back."""
        with self._changed:
            self._used -= min(size, self._size)
            self._changed.notify_all()


class Last:
    """Calls something after the last of several."""

    def __init__(self, number: int, then: Callable[[], None]) -> None:
        self._left = number
        self._then = then
        self._lock = threading.Lock()

    def count(self) -> bool:
        """Notes that one more is there; True for the last."""
        with self._lock:
            self._left -= 1
            is_last = not self._left
        if is_last:
            self._then()
        return is_last


What = Literal["memory", "file descriptors", "threads"]

_LIMITS: dict[What, tuple[str, str]] = {
    "memory": ("RLIMIT_AS", "give the process more memory: ulimit -v, or the container's."),
    "file descriptors": ("RLIMIT_NOFILE", "allow the process more open files: ulimit -n 4096."),
    "threads": ("RLIMIT_NPROC", "allow the process more threads: ulimit -u, or the container's pids."),
}
_NO_LIMIT = "unlimited"
_NO_THREAD = "can't start new thread"


def short_of(error: BaseException) -> What | None:
    """Returns what ran out, if that is what an error says."""
    if isinstance(error, MemoryError):
        return "memory"
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return "memory"
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return "file descriptors"
    return "threads" if isinstance(error, RuntimeError) and _NO_THREAD in str(error) else None


def check_threads(number: int = 8) -> None:
    """Raises where the process may not have some more threads: TensorStore, refused one, ends the process.

    Raises:
        RuntimeError: As Python raises it.
    """
    done = threading.Event()
    started: list[threading.Thread] = []
    try:
        for _ in range(number):
            thread = threading.Thread(target=done.wait)
            thread.start()
            started.append(thread)
    finally:
        done.set()
        for thread in started:
            thread.join()


@contextlib.contextmanager
def naming_shortage(failed: str, leaves: Iterable[tuple[Path, int]], less: str = "") -> Generator[None]:
    """Turns what runs out into one error that names the limit and the largest leaf.

    Args:
        failed: What does not work then.
        leaves: The leaves with their bytes.
        less: A hint how to do with less memory.

    Raises:
        RestoreError: Memory, file descriptors or threads did not do.
    """
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        what = short_of(error)
        if what is None:
            raise
        hint = _LIMITS[what][1]
        largest = max(leaves, key=lambda leaf: leaf[1], default=None)
        paths = [] if largest is None else [largest[0]]
        leaf = "" if largest is None else f"\nlargest leaf: {render(largest[0])} {sized(largest[1])}"
        raise RestoreError(
            f"{failed}: this process may have no more {what} ({_limits(what)}).{leaf}",
            paths=paths,
            hints=[hint, less] if less and what == "memory" else [hint],
        ) from error


def _limits(what: What) -> str:
    name = _LIMITS[what][0]
    said = f"{name} is {_limit(name, what)}"
    memory = _limit("RLIMIT_AS", "memory")
    # Each thread takes memory for its stack, and the system's error is the same.
    return f"{said}, or memory: RLIMIT_AS is {memory}" if what == "threads" and memory != _NO_LIMIT else said


def _limit(name: str, what: What) -> str:
    soft = resource.getrlimit(getattr(resource, name))[0]
    if soft == resource.RLIM_INFINITY:
        return _NO_LIMIT
    return sized(soft) if what == "memory" else str(soft)
