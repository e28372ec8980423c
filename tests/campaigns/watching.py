"""What a trial costs and touches: time, memory, and files that are opened."""

import contextlib
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

_hooked: list[set[str]] = []


class HangError(BaseException):
    """A trial took longer than it may; no handler of ordinary errors takes it."""


def _hook(event, arguments):
    if event == "open":
        for names in _hooked:
            names.add(os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes) else "")


@contextlib.contextmanager
def opened_files() -> Iterator[set[str]]:
    """Gives the names of the files that Python opens meanwhile."""
    if not getattr(_hook, "is_set", False):
        # It cannot be taken away again.
        sys.addaudithook(_hook)
        _hook.is_set = True
    names: set[str] = set()
    _hooked.append(names)
    try:
        yield names
    finally:
        _hooked.remove(names)


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raises `HangError` where what is inside takes longer, as an interrupt would be raised."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(*_):
        raise HangError

    kept = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, kept)


@contextlib.contextmanager
def stopwatch() -> Iterator[Callable[[], float]]:
    """Gives the seconds since then, less those that this process's threads waited for a processor.

    Never less than the processors worked for it. So other programs on the machine do not count.
    """
    start, waited, worked = time.monotonic(), _waited_s(), time.process_time()
    yield lambda: max(time.process_time() - worked, time.monotonic() - start - max(0.0, _waited_s() - waited))


def _waited_s() -> float:
    total = 0
    for thread in pathlib.Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # It may have ended just now.
            total += int(thread.read_text().split()[1])
    return total / 1e9


def memory_bytes() -> int:
    """Returns this process's resident memory."""
    fields = pathlib.Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def in_child(work: Callable[[], int | None], *, limits: Callable[[], None] | None = None) -> int:
    """Forks, runs and returns the child's process id; its status is what `work` returns, 70 if it raises.

    Only where JAX has not been started: a process that is forked afterwards waits for threads that
    it does not have.
    """
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        if limits is not None:
            limits()
        status = work() or 0
    finally:
        os._exit(status)
