"""Host memory for the values, and the arrays that it becomes.

JAX on processors adopts a buffer that starts on a 64-byte boundary instead of copying
it. Large leaves get blocks of their own; small ones share blocks, so that
thousands of leaves cost a few allocations. A block lives as long as any array in
it, and no block is ever written again once its arrays exist.
"""

import functools
import math
import mmap
from collections.abc import Hashable, Mapping
from typing import Any, cast

import jax
import numpy as np
import numpy.typing as npt

from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.regions import Region
from orbax_nnx_handler.storage.reading.jobs import Buffer, PlainJob, is_key, region_of


def place_array(job: PlainJob, shards: Mapping[Region, Buffer]) -> jax.Array:
    """Puts a job's shards on their devices and joins them to one array.

    On CPU devices JAX adopts a 64-byte-aligned buffer instead of copying it, and
    keeps it alive as long as the array; so a buffer is never written again. Of
    JAX's ways to build an array this one costs least at thousands of leaves.
    """
    only = next(iter(shards.values())) if len(shards) == 1 else None
    array: jax.Array = jax.make_array_from_callback(
        job.shape,
        job.sharding,
        lambda index: shards[region_of(index, job.shape)] if only is None else only,
        dtype=job.dtype,
    )
    return as_asked(job, array)


def as_asked(job: PlainJob, array: jax.Array) -> jax.Array:
    """Returns the array in the dtype of the job as asked for: bits as random keys."""
    if not is_key(job.job.dtype):
        return array
    return cast(jax.Array, jax.random.wrap_key_data(array, impl=_impl_of(job.job.dtype)))


@functools.cache
def _impl_of(dtype: np.dtype[Any]) -> Hashable:
    """Returns the PRNG implementation behind a key dtype.

    `jax.random.key_impl` wants an array; a traced one costs nothing.
    """
    found: list[Hashable] = []

    def note(key: jax.Array) -> None:
        found.append(jax.random.key_impl(key))

    jax.eval_shape(note, jax.ShapeDtypeStruct((), dtype))
    return found[0]


ALIGNMENT = 64
# What one surviving small leaf can keep alive at most.
SHARED_BLOCK_BYTES = 8 << 20
# From here on a leaf has a block of its own, freed with it.
OWN_BLOCK_BYTES = 1 << 20
_HUGE_PAGE = 2 << 20


class Arena:
    """Hands out uninitialised buffers from blocks that are freed with their last array."""

    def __init__(self) -> None:
        self._block: npt.NDArray[np.uint8] = np.empty(0, np.uint8)
        self._used = 0

    def allocate(self, shape: Shape, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """Returns a buffer whose content is undefined.

        Args:
            shape: Its shape.
            dtype: Its dtype.
        """
        size = math.prod(shape) * dtype.itemsize
        raw = _block(size) if size >= OWN_BLOCK_BYTES else self._slice(size)
        return raw[:size].view(dtype).reshape(shape)

    def _slice(self, size: int) -> npt.NDArray[np.uint8]:
        if self._used + size > self._block.size:
            self._block, self._used = _block(SHARED_BLOCK_BYTES), 0
        start = self._used
        self._used = -(-(start + size) // ALIGNMENT) * ALIGNMENT
        return self._block[start : start + size]


def _block(size: int) -> npt.NDArray[np.uint8]:
    """Maps fresh memory; from one huge page on, aligned to it and advised to use it.

    Page faults, not copies, are what fresh memory costs: 4 KiB at a time they
    took longer than reading the bytes (measured on a 2 GB model, page cache warm).
    """
    if size < _HUGE_PAGE:
        return np.frombuffer(mmap.mmap(-1, max(size, 1)), np.uint8)
    memory = mmap.mmap(-1, size + _HUGE_PAGE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    raw = np.frombuffer(memory, np.uint8)
    offset = -raw.ctypes.data % _HUGE_PAGE
    return raw[offset : offset + size]
