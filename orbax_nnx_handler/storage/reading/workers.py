"""Threads that read, and bytes under way; the first failure stops what has not begun."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Self


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
                if not self._changed.wait_for(lambda: not self._left, seconds) and self._left == left:
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
                # Only then: a waiter takes the interpreter from the threads that work.
                if not self._left:
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
