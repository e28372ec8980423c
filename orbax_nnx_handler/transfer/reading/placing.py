"""From filled host buffers to arrays on their devices."""

import functools
from collections.abc import Hashable, Mapping
from typing import Any, cast

import jax
import numpy as np

from orbax_nnx_handler.planning.regions import Region
from orbax_nnx_handler.transfer.reading.shards import Buffer, PlainJob, is_key, region_of


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
