"""From filled host buffers to arrays on their devices."""

import functools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from orbax_nnx_handler.planning.paths import Path
from orbax_nnx_handler.planning.regions import Region
from orbax_nnx_handler.transfer.reading.shards import Buffer, PlainJob, is_key


def place_arrays(filled: Sequence[tuple[PlainJob, Mapping[Region, Buffer]]]) -> dict[Path, jax.Array]:
    """Puts all shards on their devices in one call and joins them to arrays.

    On CPU devices JAX adopts a 64-byte-aligned buffer instead of copying it, and
    keeps it alive as long as the array; so a buffer is never written again.
    """
    buffers: list[Buffer] = []
    targets: list[SingleDeviceSharding] = []
    for job, shards in filled:
        for shard in job.shards:
            for device in shard.devices:
                buffers.append(shards[shard.region])
                targets.append(SingleDeviceSharding(device, memory_kind=job.sharding.memory_kind))
    pieces = iter(jax.device_put(buffers, targets))
    arrays: dict[Path, jax.Array] = {}
    for job, _ in filled:
        own = [next(pieces) for shard in job.shards for _ in shard.devices]
        arrays[job.job.path] = _joined(job, own)
    return arrays


def _joined(job: PlainJob, pieces: list[jax.Array]) -> jax.Array:
    array = jax.make_array_from_single_device_arrays(job.shape, job.sharding, pieces, dtype=job.dtype)
    if not is_key(job.job.dtype):
        return array
    return jax.random.wrap_key_data(array, impl=_impl_of(job.job.dtype))


@functools.cache
def _impl_of(dtype: np.dtype[Any]) -> Hashable:
    """Returns the PRNG implementation behind a key dtype.

    `jax.random.key_impl` wants an array; a traced one costs nothing.
    """
    found: list[Hashable] = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), jax.ShapeDtypeStruct((), dtype))
    return found[0]
