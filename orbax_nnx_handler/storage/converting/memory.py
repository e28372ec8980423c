"""How much may be held at a time, so that the whole process stays within its memory."""

import ctypes
import functools
import math
import pathlib
import resource
import sys
from typing import Any

from orbax_nnx_handler.planning.core.errors import RestoreError

DEFAULT_BYTES = 1_000_000_000
"""How much a process may grow where no bound is given."""

# A batch of blocks exists this often at a time: as read, as compressed, as a file in the making.
# Measured: 2.2.
_COPIES = 2.5
# What Orbax, TensorStore and their threads come to take in the course of a save. Measured: up to 250 MiB,
# where one chunk of 1.5 GB is unpacked.
_PROGRAM_BYTES = 300 << 20
_LEAST_WINDOW_BYTES = 8 << 20
# `ru_maxrss` counts kilobytes, but bytes on a Mac.
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024


# `M_ARENA_MAX` of glibc's malloc.h.
_ARENA_MAX = -8


def release_freed() -> None:
    """Gives memory that was freed back to the system.

    glibc keeps it in the arena of each thread that allocated it: after 20,000 small
    leaves, through TensorStore's threads, 0.6 GB that nobody uses.
    """
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _share_arena() -> None:
    """Lets threads that are new allocate from one arena, so that less lies in it unused."""
    if (libc := _glibc()) is not None:
        libc.mallopt(_ARENA_MAX, 1)


@functools.cache
def _glibc() -> Any:
    """Returns the C library where it is glibc; None elsewhere, which is left to its own ways."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "malloc_trim") and hasattr(libc, "mallopt") else None


def window_of(bound_bytes: int | None) -> int:
    """Returns how many bytes of values may be read at a time.

    Args:
        bound_bytes: Upper bound of this process's memory; None for `DEFAULT_BYTES`
            above what the process holds now, which does for any process.

    Raises:
        RestoreError: The process holds so much already that the bound leaves too little.
    """
    if bound_bytes is not None:
        _share_arena()
    held = _resident_bytes()
    used = held + _PROGRAM_BYTES
    window = int(((held + DEFAULT_BYTES if bound_bytes is None else bound_bytes) - used) / _COPIES)
    if window < _LEAST_WINDOW_BYTES:
        least = (used + _COPIES * _LEAST_WINDOW_BYTES) / 1e9
        raise RestoreError(
            f"{(bound_bytes or 0) / 1e9:.2f} GB of memory are too little: the process holds "
            f"{held / 1e9:.2f} GB already, and reading and writing take {_PROGRAM_BYTES / 1e9:.2f} GB beside "
            "the values.",
            hints=[f"allow {math.ceil(least * 10) / 10:.1f} GB or more."],
        )
    return window


def _resident_bytes() -> int:
    """Returns the memory that this process has now."""
    now = pathlib.Path("/proc/self/statm")
    if now.exists():
        return int(now.read_text().split()[1]) * resource.getpagesize()
    # Elsewhere the most it ever had, which also counts the process that started it.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT
