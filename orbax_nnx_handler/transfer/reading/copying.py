"""Copies what one process read to the devices of all that hold it, over the mesh.

The copies of a part lie along mesh axes. Along these, the one that was read
contributes its values and each other one zeros; their sum, taken on the values' bits
as unsigned integers, is the value everywhere, to the bit. It is the way of Orbax's
own single-replica restore, with a reader chosen leaf by leaf.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from orbax_nnx_handler.planning.leaves import Shape
from orbax_nnx_handler.planning.paths import Path
from orbax_nnx_handler.planning.regions import Region
from orbax_nnx_handler.transfer.reading.placing import as_asked
from orbax_nnx_handler.transfer.reading.replicas import Copied, own_devices
from orbax_nnx_handler.transfer.reading.shards import Buffer, Device, region_of

# Leaves that differ in nothing but their path share a compiled program, so many at a time.
_TOGETHER = 16


def copy_to_all(leaves: Sequence[Copied], read: Sequence[Mapping[Region, Buffer]]) -> dict[Path, jax.Array]:
    """Returns the leaves' arrays, each complete on all its devices.

    Every process must call this with the same leaves in the same order.

    Args:
        leaves: The leaves.
        read: For each leaf, what this process read of it.
    """
    arrays: dict[Path, jax.Array] = {}
    alike: dict[Any, list[tuple[Copied, jax.Array]]] = {}
    zeros = _Zeros()
    for leaf, shards in zip(leaves, read, strict=True):
        kind = (leaf.sharding, leaf.job.shape, leaf.job.dtype, leaf.axes)
        alike.setdefault(kind, []).append((leaf, _contributions(leaf, shards, zeros)))
    for same in alike.values():
        for start in range(0, len(same), _TOGETHER):
            group = same[start : start + _TOGETHER]
            first = group[0][0]
            run = _program(first.sharding, first.axes, first.job.dtype, len(group))
            # The mesh of the leaf, not one that the caller may have in force.
            with jax.set_mesh(first.mesh):
                results = run(*[contributions for _, contributions in group])
            for (leaf, _), array in zip(group, results, strict=True):
                arrays[leaf.job.job.path] = as_asked(leaf.job, jax.device_put(array, leaf.job.sharding))
    return arrays


def _contributions(leaf: Copied, shards: Mapping[Region, Buffer], zeros: "_Zeros") -> jax.Array:
    """Returns the array of all copies: values in the one that was read, zeros in the others."""
    shape, sharding = leaf.job.shape, leaf.sharding
    readers = set(own_devices(sharding, leaf.axes, leaf.reader))
    indices = cast("Mapping[Device, tuple[slice, ...]]", sharding.addressable_devices_indices_map(shape))
    pieces: list[jax.Array] = []
    for device, index in indices.items():
        if device in readers:
            values = shards[region_of(index, shape)].view(leaf.bits)[None]
            pieces.append(jax.device_put(values, device))
        else:
            pieces.append(zeros.on(device, (1, *sharding.shard_shape(shape)), leaf.bits))
    stacked = NamedSharding(leaf.mesh, PartitionSpec(leaf.axes, *sharding.spec))
    return jax.make_array_from_single_device_arrays((leaf.copies, *shape), stacked, pieces)


class _Zeros:
    """One array of zeros for each shape, dtype and device: nothing writes to them."""

    def __init__(self) -> None:
        self._made: dict[Any, jax.Array] = {}

    def on(self, device: Device, shape: Shape, dtype: np.dtype[Any]) -> jax.Array:
        key = (device, shape, dtype)
        if key not in self._made:
            self._made[key] = jnp.zeros(shape, dtype, device=device)
        return self._made[key]


@functools.lru_cache(maxsize=256)
def _program(sharding: NamedSharding, axes: tuple[str, ...], dtype: np.dtype[Any], count: int) -> Any:
    def add(*parts: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(_from_bits(cast(jax.Array, jax.lax.psum(part, axes))[0], dtype) for part in parts)

    spec = PartitionSpec(*sharding.spec)
    stacked = PartitionSpec(axes, *sharding.spec)
    mapped = jax.shard_map(add, mesh=sharding.mesh, in_specs=(stacked,) * count, out_specs=(spec,) * count)
    return jax.jit(mapped)


def _from_bits(bits: jax.Array, dtype: np.dtype[Any]) -> jax.Array:
    return bits != 0 if dtype == np.dtype(bool) else jax.lax.bitcast_convert_type(bits, dtype)
