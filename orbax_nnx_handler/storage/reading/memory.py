"""What reading takes of a machine: the memory that is read into, threads, and bytes under way.

JAX on processors adopts a buffer that starts on a 64-byte boundary instead of copying
it. Large leaves get blocks of their own; small ones share blocks, so that
thousands of leaves cost a few allocations. A block lives as long as any array in
it, and no block is ever written again once its arrays exist.
"""

import contextlib
import ctypes
import functools
import io
import math
import mmap
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self, cast

import numpy as np
import numpy.typing as npt
from jax.sharding import Sharding

from orbax_nnx_handler.planning.core.leaves import Shape, WantedLeaf, total_nbytes
from orbax_nnx_handler.planning.target.shardings import is_abstract

ALIGNMENT = 64
# From here on a leaf has a block of its own, freed with it.
OWN_BLOCK_BYTES = 4 << 20
# What one surviving small leaf can keep alive at most.
SHARED_BLOCK_BYTES = 8 << 20
_Bytes = npt.NDArray[np.uint8]


class Memory:
    """Blocks for small leaves that a thread backs with pages while the plan is made.

    Page faults take several times what it takes to fill the pages (0.5 GB from the page cache: 0.03 s
    into memory that has its pages, 0.2 s into fresh memory), and need nothing of the plan but its size.
    Where the restore is refused, the blocks go with this; so much is touched at most until then.
    """

    MOST_BYTES = 1 << 30

    def __init__(self) -> None:
        self._blocks: deque[_Bytes] = deque()
        self._zeros: io.FileIO | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.settle()
        if self._zeros is not None:
            self._zeros.close()
        # The traceback of a refused restore holds this.
        self._blocks.clear()

    def expect(self, leaves: Collection[WantedLeaf]) -> None:
        """Begins to make memory ready for the leaves that will live in this process's own."""
        own = {
            number
            for number, one in {id(one.sharding): one for one in leaves}.items()
            if _is_own(one.sharding)
        }
        nbytes = total_nbytes([leaf for leaf in leaves if id(leaf.sharding) in own], below=OWN_BLOCK_BYTES)
        if nbytes >= SHARED_BLOCK_BYTES:
            count = min(nbytes, self.MOST_BYTES) // SHARED_BLOCK_BYTES
            # Where there may be no more threads or memory, the reading says so.
            with contextlib.suppress(RuntimeError, MemoryError, OSError, AttributeError):
                self._blocks += [_block(SHARED_BLOCK_BYTES) for _ in range(count)]
                self._make_ready([block.data for block in self._blocks])

    def _make_ready(self, blocks: Sequence[memoryview]) -> None:
        """Has a thread read zeros into blocks, from a file that has none on any disk, until it is cut off.

        That is one call: after each, the thread would wait 5 ms for the interpreter, where planning is under
        way. And `madvise` keeps whoever maps memory waiting as long as it takes. A system without such files
        gives the pages when they are filled.
        """
        if sys.platform == "linux":
            self._zeros = open(os.memfd_create("zeros"), "r+b", buffering=0)  # noqa: PTH123, SIM115
            self._zeros.truncate(len(blocks) * SHARED_BLOCK_BYTES)
            thread = threading.Thread(target=_read_some, args=(self._zeros, blocks))
            thread.start()
            self._thread = thread

    def take(self) -> _Bytes:
        """Returns the next block, those that are ready first; not to be written to before `settle`."""
        return self._blocks.popleft() if self._blocks else _block(SHARED_BLOCK_BYTES)

    def settle(self) -> None:
        """Waits until zeros are written to no block any more."""
        if self._zeros is not None and self._thread is not None:
            self._zeros.truncate(0)
            self._thread.join()


def _read_some(file: io.FileIO, blocks: Sequence[memoryview]) -> None:
    with contextlib.suppress(OSError):
        os.preadv(file.fileno(), blocks, 0)


def _is_own(sharding: Sharding | None) -> bool:
    if is_abstract(sharding):
        return False  # Under `jax.jit` nobody knows the devices.
    return (
        sharding is not None
        and sharding.is_fully_addressable
        and all(device.platform == "cpu" for device in cast("set[Any]", sharding.device_set))
    )


class Arena:
    """Hands out uninitialised buffers from blocks that are freed with their last array."""

    def __init__(self, memory: Memory | None = None) -> None:
        self._memory = memory or Memory()
        self._block: _Bytes = np.empty(0, np.uint8)
        self._used = 0

    def allocate(self, shape: Shape, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """Returns a buffer whose content is undefined; not to be written to before `settle`."""
        size = math.prod(shape) * dtype.itemsize
        if size >= OWN_BLOCK_BYTES:
            return np.ndarray(shape, dtype, cast(Any, _block(size)))
        if self._used + size > self._block.size:
            self._block, self._used = self._memory.take(), 0
        start = self._used
        self._used = -(-(start + size) // ALIGNMENT) * ALIGNMENT
        return np.ndarray(shape, dtype, cast(Any, self._block), start)

    def settle(self) -> None:
        """Has buffers keep what is written to them from now on."""
        self._memory.settle()


def _block(size: int) -> _Bytes:
    """Maps fresh memory, which starts on a page.

    Page faults, not copies, are what it costs, and those of private memory cost less than those of shared
    memory, which `mmap` gives unless told otherwise. Huge pages are not asked for, as NumPy would: where a
    host gives a virtual machine its memory only when it is touched, each took as long as a thousand small
    ones (0.5 GB from the page cache: 0.09 s where the host had given it already, 1.1 s where not; 0.28 s
    with small pages in both).
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return np.frombuffer(mmap.mmap(-1, max(size, 1), flags=flags), np.uint8)


# Linux 5.14; any other system answers that it knows no such advice.
_POPULATE_WRITE = 23


def back_with_pages(memory: memoryview) -> None:
    """Has the system back memory with pages in one call, where it can; other Python threads go on meanwhile.

    A third cheaper than one fault a page. `mmap.madvise` would keep the lock of the interpreter.
    """
    if sys.platform == "linux" and len(memory) >= mmap.PAGESIZE:
        start = np.frombuffer(memory, np.uint8).ctypes.data
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        size = (start + len(memory) - first) // mmap.PAGESIZE * mmap.PAGESIZE
        _madvise()(ctypes.c_void_p(first), ctypes.c_size_t(size), _POPULATE_WRITE)


@functools.cache
def _madvise() -> Callable[..., int]:
    return ctypes.CDLL(None).madvise


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
            return
        try:
            self._pool.submit(self._do, work)
        except RuntimeError:
            # What a store answers after the reading was given up is wanted by nobody.
            if not self.failed:
                raise

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
