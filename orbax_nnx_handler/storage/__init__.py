"""Disks and devices: metadata, reading, transforms, filling, writing."""

import contextlib
import gc
from collections.abc import Generator


@contextlib.contextmanager
def paused_collection() -> Generator[None]:
    """Pauses the collector for the time of a `with` block.

    Each new object would otherwise be visited again and again, a tenth of the
    time at 2,000 leaves, and none of them can be garbage yet.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
