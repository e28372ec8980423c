"""What is asked of a reader: one array a job, what of it this process holds, and where that comes from.

All places that one stored leaf's values go to are gathered over all jobs: a stacked leaf that feeds eighty
layers is read once and scattered, not read eighty times. On processors the buffers that are read into become
the arrays, so there is nothing to bound. Elsewhere they are copied to the devices, and only as many as the
window allows exist on the host at once.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar, cast

import jax
import numpy as np
import numpy.typing as npt

from orbax_nnx_handler.planning.core import recipes
from orbax_nnx_handler.planning.core.dtypes import is_key
from orbax_nnx_handler.planning.core.leaves import Shape, record
from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.core.recipes import Arithmetic, Read, Recipe
from orbax_nnx_handler.planning.core.regions import (
    Piece,
    Refolded,
    Region,
    cut,
    place,
    shape_of_region,
    slices,
)
from orbax_nnx_handler.planning.options import SingleReplica
from orbax_nnx_handler.storage.arithmetic import put
from orbax_nnx_handler.storage.checkpoint.metadata import Checkpoint

_last_step: Callable[..., jax.Array] | None = None
with contextlib.suppress(ImportError, AttributeError):
    # Private: what `jax.make_array_from_callback` does last, in a quarter of its time.
    from jax._src.interpreters import pxla

    _last_step = cast(Any, pxla).batched_device_put


@record
class Job:
    """One array to come back.

    Attributes:
        path: The wanted path: the key of the result.
        recipe: How it is made from stored leaves; holds no `Fill`.
        shape: The shape of the array, over all devices and processes.
        dtype: Its dtype, a cast from the stored one included; a key dtype gives
            an array of random keys.
        sharding: Where it must live.
        single_replica: How one of the processes that hold the same part reads it and the
            others get it over the mesh; None where each reads its own.
        sharding_is_default: Whether arrays that are on devices already may stay on them.
    """

    path: Path
    recipe: Recipe
    shape: Shape
    dtype: np.dtype[Any]
    sharding: jax.sharding.Sharding
    single_replica: SingleReplica | None = None
    sharding_is_default: bool = False


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

    @functools.cached_property
    def shape(self) -> Shape:
        """The shape of the region."""
        return shape_of_region(self.region)


@dataclasses.dataclass(slots=True, kw_only=True)
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


def allocate_shards(job: PlainJob, allocate: Allocate) -> dict[Region, Buffer]:
    """Returns an uninitialised buffer for each shard."""
    return {shard.region: allocate(shard.shape, job.dtype) for shard in job.shards}


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


# Without a bound of the caller's: enough to keep disk and device busy.
DEFAULT_WINDOW_BYTES = 4 << 30

_Item = TypeVar("_Item")


def groups(jobs: Sequence[PlainJob], concurrent_bytes: int | None) -> Iterator[list[PlainJob]]:
    """Yields the jobs in groups that fit the window, largest first.

    Jobs that read the same stored leaf stay together, so that it is read once;
    such a family may exceed the window on its own.
    """
    # Jobs of one sharding and shape have the same shards, and a model has few of either.
    if all(job.on_cpu for job in {id(job.shards): job for job in jobs}.values()):
        yield list(jobs)
        return
    # Half: while one group is on its way to the devices, the next is read.
    limit = (concurrent_bytes or DEFAULT_WINDOW_BYTES) // 2
    yield from grouped(sorted(families(jobs), key=_size, reverse=True), _size, limit)


def grouped(
    families: Iterable[Sequence[_Item]], size_of: Callable[[Sequence[_Item]], int], limit: int
) -> Iterator[list[_Item]]:
    """Yields families in groups of bounded size, in order; one may exceed the bound on its own."""
    group: list[_Item] = []
    size = 0
    for family in families:
        if group and size + size_of(family) > limit:
            yield group
            group, size = [], 0
        group += family
        size += size_of(family)
    if group:
        yield group


def _size(family: Sequence[PlainJob]) -> int:
    return sum(job.host_nbytes for job in family)


class _HasRecipe(Protocol):
    @property
    def recipe(self) -> Recipe: ...


_Made = TypeVar("_Made", bound=_HasRecipe)


def families(jobs: Iterable[_Made]) -> list[list[_Made]]:
    """Groups the jobs that share a stored leaf, directly or through others."""
    family_of: dict[Path, list[_Made]] = {}
    for job in jobs:
        paths = set(recipes.reads(job.recipe))
        relatives = {id(family_of[path]): family_of[path] for path in paths if path in family_of}
        home = max(relatives.values(), key=len, default=list[_Made]())
        for other in relatives.values():
            if other is not home:
                home += other
                paths |= {path for member in other for path in recipes.reads(member.recipe)}
        home.append(job)
        family_of |= dict.fromkeys(paths, home)
    return list({id(family): family for family in family_of.values()}.values())


@dataclasses.dataclass(slots=True)
class Destination:
    """One rectangle of a stored leaf and the view that it fills.

    Attributes:
        region: The rectangle.
        view: Writable, of the rectangle's shape and the wanted dtype.
        steps: What is done to the stored values before they are cast.
    """

    region: Region
    view: Buffer
    steps: tuple[Arithmetic, ...] = ()

    def put(self, values: Buffer) -> None:
        """Computes stored values of the rectangle, or of a shape that spreads over it, into place.

        Raises:
            LostValueError: A value does not fit the wanted dtype.
        """
        spread = values if values.shape == self.view.shape else np.broadcast_to(values, self.view.shape)
        put(self.view, spread, self.steps)

    def part(self, region: Region, inside: tuple[slice, ...]) -> "Destination":
        """Returns the destination of a part of the rectangle."""
        return Destination(region, self.view[(..., *inside)], self.steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What fills a set of buffers: reads, then what is left to do on the host.

    Attributes:
        targets: The places of each stored leaf.
        finish: To be called in order once all targets are filled.
    """

    targets: dict[Path, list[Destination]] = dataclasses.field(default_factory=dict[Path, list[Destination]])
    finish: list[Callable[[], None]] = dataclasses.field(default_factory=list[Callable[[], None]])

    def fill(
        self,
        recipe: Recipe,
        region: Region,
        buffer: Buffer,
        stored: Mapping[Path, Shape],
        steps: tuple[Arithmetic, ...] = (),
    ) -> None:
        """Adds what fills a buffer with a region of a recipe's value, and does some steps to that."""
        if isinstance(recipe, Read):
            # Most leaves of most models: nothing to cut, and thousands of them.
            self.targets.setdefault(recipe.path, []).append(Destination(region, buffer, steps))
            return
        for part in cut(recipe, region, stored):
            view, all_steps = place(part, buffer), (*part.arithmetic, *steps)
            if isinstance(part.source, Refolded):
                self._fold(part, part.source, view, stored, all_steps)
            else:
                destination = Destination(part.source_region, view, all_steps)
                self.targets.setdefault(part.source, []).append(destination)

    def _fold(
        self,
        part: Piece,
        folded: Refolded,
        view: Buffer,
        stored: Mapping[Path, Shape],
        steps: tuple[Arithmetic, ...],
    ) -> None:
        rectangle = shape_of_region(folded.region)
        if view.shape == folded.shape and view.flags.c_contiguous:
            # The place itself can take the rectangle's shape: no second copy.
            self.fill(folded.recipe, folded.region, view.reshape(rectangle), stored, steps)
            return
        below = np.empty(rectangle, view.dtype)
        self.fill(folded.recipe, folded.region, below, stored, steps)
        chosen = below.reshape(folded.shape)[(..., *slices(part.source_region))]
        self.finish.append(lambda: np.copyto(view, chosen))


def stored_shapes(checkpoint: Checkpoint) -> dict[Path, Shape]:
    """Returns the shape of everything that can be read, the bits of random keys included."""
    shapes = {path: array.encoding.shape for path, array in checkpoint.arrays.items()}
    return shapes | {path: value.shape for path, value in (checkpoint.values or {}).items()}


def place_arrays(filled: Iterable[tuple[PlainJob, Mapping[Region, Buffer]]]) -> dict[Path, jax.Array]:
    """Puts the shards of jobs on their devices and joins them to one array a job.

    On CPU devices JAX adopts a 64-byte-aligned buffer instead of copying it, and
    keeps it alive as long as the array; so a buffer is never written again.
    """
    arrays: dict[Path, jax.Array] = {}
    first: dict[tuple[int, Shape, np.dtype[Any]], jax.Array] = {}
    for job, shards in filled:
        kind = (id(job.sharding), job.shape, job.dtype)
        like = first.get(kind)
        array = None if like is None else _array_like(like, job, shards)
        if array is None:
            array = first[kind] = _array_of(job, shards)
        arrays[job.job.path] = array if job.dtype is job.job.dtype else as_asked(job, array)
    return arrays


def _array_of(job: PlainJob, shards: Mapping[Region, Buffer]) -> jax.Array:
    # Of JAX's own ways to build an array this one costs least at thousands of leaves.
    only = next(iter(shards.values())) if len(shards) == 1 else None
    return jax.make_array_from_callback(
        job.shape,
        job.sharding,
        lambda index: shards[region_of(index, job.shape)] if only is None else only,
        # The buffers have it, and JAX looks into one that it is told.
        dtype=None if shards else job.dtype,
    )


def _array_like(like: jax.Array, job: PlainJob, shards: Mapping[Region, Buffer]) -> jax.Array | None:
    """Returns the array of one shard on one device; None where there are several, or no such way.

    It is what `jax.make_array_from_callback` does once it has found out what is the same for all leaves of
    a shape, a dtype and a sharding, which takes three times as long.
    """
    if _last_step is None or len(job.shards) != 1 or len(job.shards[0].devices) != 1:
        return None
    try:
        return _last_step(like.aval, like.sharding, [*shards.values()], job.shards[0].devices)
    except (AttributeError, TypeError):
        return None  # A JAX in which it takes something else.


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
