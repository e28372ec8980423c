"""Whether a restore was asked to read what several processes hold alike on one of them only.

It can be asked for here (`single_replica=True`) and in each of Orbax's own ways: restore args
of a leaf, a `SingleReplicaArrayHandler` among a handler's type handlers, and one that is
registered for all handlers.

Parts of leaves that several processes hold alike, and which of them reads each.

A leaf that a mesh holds in copies on several processes is read by one process and
copied over the mesh to the others (single-replica restore). Who reads is decided
leaf by leaf, so that all processes read equally much. Everything here is a pure
function of jobs and meshes and comes out alike on every process.

Copies what one process read to the devices of all that hold it, over the mesh.

The copies of a part lie along mesh axes. Along these, the one that was read
contributes its values and each other one zeros; their sum, taken on the values' bits
as unsigned integers, is the value everywhere, to the bit. It is the way of Orbax's
own single-replica restore, with a reader chosen leaf by leaf.
"""

import dataclasses
import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.core.regions import Region
from orbax_nnx_handler.storage.reading.arrays import as_asked
from orbax_nnx_handler.storage.reading.jobs import Buffer, Device, PlainJob, families, region_of


def is_single_replica(type_handlers: Any = None) -> bool:
    """Tells whether arrays are read by Orbax's own single-replica handler.

    Args:
        type_handlers: A registry of type handlers; None for the one of all handlers.
    """
    look_up = ocp.type_handlers.get_type_handler if type_handlers is None else type_handlers.get
    try:
        handler: Any = look_up(jax.Array)
    except ValueError:  # Nothing is registered for arrays.
        return False
    # A subclass may read in its own way, which only Orbax's reader honours.
    return type(handler) is ocp.type_handlers.SingleReplicaArrayHandler


def single_replica_leaves(everywhere: bool, restore_args: Mapping[Path, Any]) -> Callable[[Path], bool]:
    """Returns what tells whether a wanted leaf is to be read by one process of several.

    Args:
        everywhere: Whether it was asked for all leaves.
        restore_args: Restore args by wanted path.
    """
    if everywhere or is_single_replica():
        return lambda _: True
    asked = {
        path
        for path, args in restore_args.items()
        if isinstance(args, ocp.type_handlers.SingleReplicaArrayRestoreArgs)
    }
    return asked.__contains__


_BITS = {1: np.dtype(np.uint8), 2: np.dtype(np.uint16), 4: np.dtype(np.uint32), 8: np.dtype(np.uint64)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Copied:
    """A job that one copy's devices read and the others get over the mesh.

    Attributes:
        job: The job; its shards are those that this process reads.
        axes: The mesh axes along which the copies lie.
        reader: Which of the copies is read from the store, counted along the axes.
    """

    job: PlainJob
    axes: tuple[str, ...]
    reader: int

    @property
    def sharding(self) -> NamedSharding:
        """The sharding of the job's array."""
        return _sharding_of(self.job)

    @property
    def mesh(self) -> Mesh:
        """The mesh of the job's array."""
        return _mesh_of(self.job)

    @property
    def copies(self) -> int:
        """How many copies the mesh holds."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes)

    @property
    def bits(self) -> np.dtype[Any]:
        """The unsigned integers under which values are copied bit by bit."""
        return _BITS[self.job.dtype.itemsize]

    @property
    def nbytes(self) -> int:
        """Bytes of the parts of one process, the same figure on each of them."""
        part = math.prod(self.sharding.shard_shape(self.job.shape)) * self.job.dtype.itemsize
        return max(1, part * self.mesh.size // jax.process_count())


def copy_axes(job: PlainJob) -> tuple[str, ...]:
    """Returns the mesh axes along which a job's parts lie in copies on different processes.

    None where a copy over the mesh is not possible: processes outside of the mesh could not
    take part in it, and of dtypes without whole bytes or with two parts there are no plain bits.
    """
    return _copy_axes(job.sharding) if _has_plain_bits(job.dtype) else ()


def share_out(jobs: Sequence[PlainJob]) -> list[list[Copied]]:
    """Chooses which copy of each job is read, so that all processes read equally much.

    Args:
        jobs: Jobs that have `copy_axes`.

    Returns:
        The jobs, largest first; those that read the same stored leaf are together and, where they
        lie on one mesh, read by the same copy, so that a packed chunk is fetched once.
    """
    loads: dict[int, int] = defaultdict(int)
    shared: list[list[Copied]] = []
    for family in sorted(families(jobs), key=_global_nbytes, reverse=True):
        by_mesh: dict[tuple[Mesh, tuple[str, ...]], list[PlainJob]] = defaultdict(list)
        for job in family:
            by_mesh[_mesh_of(job), copy_axes(job)].append(job)
        shared.append([item for (_, axes), same in by_mesh.items() for item in _assign(same, axes, loads)])
    return shared


def _assign(jobs: Sequence[PlainJob], axes: tuple[str, ...], loads: dict[int, int]) -> Iterator[Copied]:
    groups = _processes(_mesh_of(jobs[0]), axes)
    reader = min(range(len(groups)), key=lambda copy: max(loads[process] for process in groups[copy]))
    for job in jobs:
        mine = set(own_devices(_sharding_of(job), axes, reader))
        shards = [shard for shard in job.shards if mine & set(shard.devices)]
        item = Copied(job=dataclasses.replace(job, shards=tuple(shards)), axes=axes, reader=reader)
        for process in groups[reader]:
            loads[process] += item.nbytes
        yield item


def _sharding_of(job: PlainJob) -> NamedSharding:
    """Returns the sharding of a job that has `copy_axes`, which no other kind of sharding has."""
    return cast(NamedSharding, job.sharding)


def _mesh_of(job: PlainJob) -> Mesh:
    return cast(Mesh, _sharding_of(job).mesh)


def own_devices(sharding: NamedSharding, axes: tuple[str, ...], copy: int) -> tuple[Device, ...]:
    """Returns this process's devices that hold one of the copies."""
    here = jax.process_index()
    devices = cast("list[Device]", _by_copy(cast(Mesh, sharding.mesh), axes)[copy].ravel().tolist())
    return tuple(device for device in devices if device.process_index == here)


@functools.lru_cache(maxsize=64)
def _processes(mesh: Mesh, axes: tuple[str, ...]) -> list[frozenset[int]]:
    """Returns the processes whose devices hold each copy."""
    return [frozenset(_process_of(copy).ravel().tolist()) for copy in _by_copy(mesh, axes)]


@functools.lru_cache(maxsize=64)
def _by_copy(mesh: Mesh, axes: tuple[str, ...]) -> np.ndarray[Any, Any]:
    """Returns the mesh's devices with the copies counted on the first axis."""
    first = [mesh.axis_names.index(axis) for axis in axes]
    rest = [axis for axis in range(mesh.devices.ndim) if axis not in first]
    return mesh.devices.transpose(*first, *rest).reshape(math.prod(mesh.shape[axis] for axis in axes), -1)


@functools.lru_cache(maxsize=256)
def _copy_axes(sharding: jax.sharding.Sharding) -> tuple[str, ...]:
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh):
        return ()
    processes = _process_of(sharding.mesh.devices)
    if set(processes.ravel().tolist()) != set(range(jax.process_count())):
        return ()
    used = _axes_of(sharding.spec)
    return tuple(
        name
        for axis, name in enumerate(sharding.mesh.axis_names)
        if name not in used and bool(np.any(processes != processes.take([0], axis)))
    )


def _process_of(devices: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.array([device.process_index for device in devices.ravel()], np.int64).reshape(devices.shape)


def _axes_of(spec: PartitionSpec) -> set[str]:
    used: set[str] = set()
    for part in cast("tuple[str | tuple[str, ...] | None, ...]", spec):
        used |= {part} if isinstance(part, str) else set(part or ())
    return used


@functools.cache
def _has_plain_bits(dtype: np.dtype[Any]) -> bool:
    if dtype == np.dtype(bool):
        return True
    if jnp.issubdtype(dtype, np.integer):
        return jnp.iinfo(dtype).bits == 8 * dtype.itemsize
    return jnp.issubdtype(dtype, np.floating) and cast(int, jnp.finfo(dtype).bits) == 8 * dtype.itemsize


def _global_nbytes(family: Sequence[PlainJob]) -> int:
    return sum(math.prod(job.shape) * job.dtype.itemsize for job in family)


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
