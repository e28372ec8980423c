"""The host buffers behind a job: one for each distinct shard of this process."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from orbax_nnx_handler.planning import recipes
from orbax_nnx_handler.planning.leaves import Shape
from orbax_nnx_handler.planning.recipes import Recipe
from orbax_nnx_handler.planning.regions import Region, shape_of_region
from orbax_nnx_handler.transfer.reading.jobs import Job

Buffer = npt.NDArray[Any]
Device = Any  # `jax.Device` is no class to a type checker.
_Indices = Mapping[Device, tuple[slice, ...] | None]
Allocate = Callable[[Shape, "np.dtype[Any]"], Buffer]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """A region of a job and the devices of this process that hold it.

    Replicas share one shard: it is read once and copied to each device.
    """

    region: Region
    devices: tuple[Device, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlainJob:
    """A job on plain numbers: random keys are their bits, with trailing axes.

    Attributes:
        job: The job as asked for.
        recipe: The recipe on stored arrays.
        shape: The shape with the trailing axes of key bits.
        dtype: The dtype of the numbers.
        sharding: The sharding, which leaves trailing axes whole.
        shards: The distinct regions of this process.
    """

    job: Job
    recipe: Recipe
    shape: Shape
    dtype: np.dtype[Any]
    sharding: jax.sharding.Sharding
    shards: tuple[Shard, ...]

    @property
    def on_cpu(self) -> bool:
        """Whether the host's own memory is the devices' memory."""
        return all(device.platform == "cpu" for shard in self.shards for device in shard.devices)

    @property
    def host_nbytes(self) -> int:
        """Bytes that the shards take on the host, each distinct one once."""
        elements = sum(math.prod(shape_of_region(shard.region)) for shard in self.shards)
        return elements * self.dtype.itemsize


def plain_job(job: Job) -> PlainJob:
    """Returns the job with random keys seen as their bits, and its shards."""
    recipe, shape, dtype = job.recipe, job.shape, job.dtype
    if is_key(dtype):
        bits = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct((), dtype))
        recipe, shape, dtype = _with_trailing(recipe, bits.shape), (*shape, *bits.shape), bits.dtype
    # A partition says nothing about axes behind its own, so the axes of bits stay whole.
    shards = _shards(job.sharding, shape)
    return PlainJob(job=job, recipe=recipe, shape=shape, dtype=dtype, sharding=job.sharding, shards=shards)


def is_key(dtype: np.dtype[Any]) -> bool:
    """Tells whether a dtype is one of random keys."""
    return jnp.issubdtype(dtype, jax.dtypes.prng_key)


def allocate_shards(job: PlainJob, allocate: Allocate) -> dict[Region, Buffer]:
    """Returns an uninitialised buffer for each shard."""
    return {shard.region: allocate(shape_of_region(shard.region), job.dtype) for shard in job.shards}


def region_of(index: tuple[slice, ...] | None, shape: Shape) -> Region:
    """Returns the region that a sharding's index means."""
    return tuple(part.indices(size)[:2] for part, size in zip(index or (), shape, strict=True))


@functools.lru_cache(maxsize=1024)
def _shards(sharding: jax.sharding.Sharding, shape: Shape) -> tuple[Shard, ...]:
    # Cached: a model has thousands of leaves and a few dozen shapes.
    holders: dict[Region, list[Device]] = {}
    indices = cast(_Indices, sharding.addressable_devices_indices_map(shape))
    for device, index in indices.items():
        holders.setdefault(region_of(index, shape), []).append(device)
    return tuple(Shard(region=region, devices=tuple(devices)) for region, devices in holders.items())


def _with_trailing(recipe: Recipe, extra: Shape) -> Recipe:
    """Extends what a recipe says about all axes to axes behind them."""
    match recipe:
        case recipes.Read() | recipes.Fill():
            return recipe
        case recipes.Stack(sources, axis):
            return recipes.Stack(tuple(_with_trailing(source, extra) for source in sources), axis)
        case recipes.Concat(sources, axis):
            return recipes.Concat(tuple(_with_trailing(source, extra) for source in sources), axis)
        case recipes.Transpose(source, permutation):
            last = range(len(permutation), len(permutation) + len(extra))
            return recipes.Transpose(_with_trailing(source, extra), (*permutation, *last))
        case recipes.Reshape(source, shape):
            return recipes.Reshape(_with_trailing(source, extra), (*shape, *extra))
        case _:
            return dataclasses.replace(recipe, source=_with_trailing(recipe.source, extra))
