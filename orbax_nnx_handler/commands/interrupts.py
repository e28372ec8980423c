"""Interrupts that are never lost: from the keyboard, or from a scheduler that ends a job."""

import contextlib
import signal
import threading
from collections.abc import Callable, Generator
from types import FrameType


@contextlib.contextmanager
def interrupts() -> Generator[Callable[[], None]]:
    """Turns SIGINT and SIGTERM into `KeyboardInterrupt`.

    Yields:
        To be called now and then: raises an interrupt that was lost. Python drops an
        exception where nobody can catch it, such as in a finaliser or a callback.
    """
    arrived = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        del number, frame
        arrived.set()
        raise KeyboardInterrupt

    def check() -> None:
        if arrived.is_set():
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield check
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
