"""What several processes hold alike is read by one of them and copied to the others.

It can be asked for here (`single_replica=True`) and in each of Orbax's own ways: restore args of a
leaf, a `SingleReplicaArrayHandler` among a handler's type handlers, and one that is registered for
all handlers. Who reads is decided leaf by leaf, so that all processes read equally much: a pure
function of jobs and meshes that comes out alike on every process.

The copies of a part lie along mesh axes. Where the devices are processors, each process sends what
it has read in blocks of bytes, which are gathered along these axes and put into the final host
memory: every byte travels once to each process, and one small program is compiled. Elsewhere the
copy that was read contributes its values and each other one zeros, and their sum, taken on the
values' bits as unsigned integers, is the value everywhere, to the bit, without leaving the devices.
"""

import bisect
import dataclasses
import functools
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from orbax_nnx_handler.orbax_interfaces import v0 as ocp
from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.core.recipes import reads
from orbax_nnx_handler.planning.core.regions import Region, shape_of_region
from orbax_nnx_handler.planning.options import SingleReplica
from orbax_nnx_handler.storage.reading.byte_plan import OBJECT_STORE
from orbax_nnx_handler.storage.reading.jobs import (
    Buffer,
    Device,
    PlainJob,
    as_asked,
    families,
    place_arrays,
    region_of,
)
from orbax_nnx_handler.storage.reading.memory import Arena


def single_replica_of(type_handlers: Any = None) -> SingleReplica | None:
    """Returns what Orbax's own single-replica handler is set to, where it is what reads arrays.

    Args:
        type_handlers: A registry of type handlers; None for the one of all handlers.
    """
    look_up = ocp.type_handlers.get_type_handler if type_handlers is None else type_handlers.get
    try:
        handler: Any = look_up(jax.Array)
    except ValueError:  # Nothing is registered for arrays.
        return None
    # A subclass may read in its own way, which only Orbax's reader honours.
    if type(handler) is not ocp.type_handlers.SingleReplicaArrayHandler:
        return None
    return SingleReplica(
        replica_axis_index=handler.replica_axis_index,
        broadcast_memory_limit_bytes=handler.broadcast_memory_limit_bytes,
    )


def single_replica_leaves(
    everywhere: bool | SingleReplica, restore_args: Mapping[Path, Any]
) -> Callable[[Path], SingleReplica | None]:
    """Returns what tells how a wanted leaf is to be read by one process of several; None for each its own."""
    chosen = SingleReplica() if everywhere is True else everywhere or single_replica_of()
    if chosen is not None:
        return lambda _: chosen
    asked = {
        path: SingleReplica()
        for path, args in restore_args.items()
        if isinstance(args, ocp.type_handlers.SingleReplicaArrayRestoreArgs)
    }
    return asked.get


_Indices = Mapping[Device, tuple[slice, ...]]
_Copies = tuple[Mesh, tuple[str, ...]]
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
        return cast(NamedSharding, self.job.sharding)  # No other kind has `copy_axes`.

    @property
    def mesh(self) -> Mesh:
        """The mesh of the job's array."""
        return cast(Mesh, self.sharding.mesh)

    @property
    def on_cpu(self) -> bool:
        """Whether the devices of all processes are processors."""
        return all(device.platform == "cpu" for device in cast("list[Device]", self.mesh.devices.flat))

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
        return max(1, self.part_nbytes * self.mesh.size // jax.process_count())

    @property
    def part_nbytes(self) -> int:
        """Bytes of the part of one device."""
        return math.prod(self.sharding.shard_shape(self.job.shape)) * self.job.dtype.itemsize

    @functools.cached_property
    def regions(self) -> Mapping[Device, Region]:
        """The part of each device of this process."""
        indices = cast(_Indices, self.sharding.addressable_devices_indices_map(self.job.shape))
        return {device: region_of(index, self.job.shape) for device, index in indices.items()}


def copy_axes(job: PlainJob) -> tuple[str, ...]:
    """Returns the mesh axes along which a job's parts lie in copies on different processes.

    None where a copy over the mesh is not possible: processes outside of the mesh could not
    take part in it, and of dtypes without whole bytes or with two parts there are no plain bits.
    """
    chosen = job.job.single_replica
    axis = None if chosen is None else chosen.replica_axis_index
    return _copy_axes(job.sharding, axis) if _has_plain_bits(job.dtype) else ()


def share_out(jobs: Sequence[PlainJob]) -> list[list[Copied]]:
    """Chooses which copy of each job (with `copy_axes`) is read, so that all processes read equally much.

    Returns:
        The jobs, large ones first; those that read the same stored leaf are together and, where they
        lie on one mesh, read by the same copy, so that a packed chunk is fetched once. Small ones are
        read by the copy that reads their neighbours in the store, so that one request brings several.
    """
    found = [(_global_nbytes(family), family) for family in families(jobs)]
    fair = sum(size for size, _ in found) // jax.process_count()
    large = min(fair // 8, OBJECT_STORE.range_bytes)
    found.sort(key=lambda item: (-item[0], "") if item[0] >= large else (0, _place(item[1])))
    loads: dict[int, int] = defaultdict(int)
    last: dict[_Copies, int] = {}
    shared: list[list[Copied]] = []
    for size, family in found:
        by_mesh: dict[_Copies, list[PlainJob]] = defaultdict(list)
        for job in family:
            by_mesh[cast(Mesh, cast(NamedSharding, job.sharding).mesh), copy_axes(job)].append(job)
        items: list[Copied] = []
        for copies, same in by_mesh.items():
            groups = _processes(*copies)
            loaded = [max(loads[process] for process in group) for group in groups]
            reader = last.get(copies, 0)
            if size >= large or loaded[reader] + size // 2 > fair:
                reader = loaded.index(min(loaded))
            last[copies] = reader
            items += _read_by(reader, same, copies[1])
            for process in groups[reader]:
                loads[process] += sum(item.nbytes for item in items[-len(same) :])
        shared.append(items)
    return shared


def _place(family: Sequence[PlainJob]) -> str:
    """Returns about where a store that is sorted by name holds the leaves."""
    return min("/".join(map(str, path)) for job in family for path in reads(job.recipe))


def _read_by(reader: int, jobs: Sequence[PlainJob], axes: tuple[str, ...]) -> Iterator[Copied]:
    for job in jobs:
        mine = set(own_devices(cast(NamedSharding, job.sharding), axes, reader))
        shards = tuple(shard for shard in job.shards if mine & set(shard.devices))
        yield Copied(job=dataclasses.replace(job, shards=shards), axes=axes, reader=reader)


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
def _copy_axes(sharding: jax.sharding.Sharding, only: int | None) -> tuple[str, ...]:
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh):
        return ()
    processes = _process_of(sharding.mesh.devices)
    if set(processes.ravel().tolist()) != set(range(jax.process_count())):
        return ()
    parts = cast("tuple[str | tuple[str, ...] | None, ...]", sharding.spec)
    used = {name for part in parts for name in ((part,) if isinstance(part, str) else part or ())}
    return tuple(
        name
        for axis, name in enumerate(sharding.mesh.axis_names)
        if only in (None, axis) and name not in used and bool(np.any(processes != processes.take([0], axis)))
    )


def _process_of(devices: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.array([device.process_index for device in devices.ravel()], np.int64).reshape(devices.shape)


@functools.cache
def _has_plain_bits(dtype: np.dtype[Any]) -> bool:
    if dtype == np.dtype(bool):
        return True
    if jnp.issubdtype(dtype, np.integer):
        return jnp.iinfo(dtype).bits == 8 * dtype.itemsize
    return jnp.issubdtype(dtype, np.floating) and cast(int, jnp.finfo(dtype).bits) == 8 * dtype.itemsize


def _global_nbytes(family: Sequence[PlainJob]) -> int:
    return sum(math.prod(job.shape) * job.dtype.itemsize for job in family)


# So many blocks carry what a process has read: while a block is on its way, so much less than
# the values themselves is held twice. Each costs some milliseconds beside its bytes.
_ROUNDS = 36
_LEAST_BLOCK_BYTES = 256 << 10
_MOST_BLOCK_BYTES = 64 << 20


def broadcast_limit(leaves: Sequence[Copied]) -> int | None:
    """Returns the smallest bound, in bytes, of what a device may hold for the copying of leaves."""
    chosen = [leaf.job.job.single_replica for leaf in leaves]
    limits = [one.broadcast_memory_limit_bytes for one in chosen if one is not None]
    return min((limit for limit in limits if limit is not None), default=None)


def copy_through_hosts(
    leaves: Sequence[Copied], read: Sequence[Mapping[Region, Buffer]]
) -> dict[Path, jax.Array]:
    """Returns the leaves' arrays on devices that are processors, each complete on all of them.

    Every process must call this with the same leaves in the same order.

    Args:
        leaves: The leaves.
        read: For each leaf, what this process read of it; it becomes a part of the arrays.
    """
    held = [dict(shards) for shards in read]
    alike: dict[_Copies, list[int]] = defaultdict(list)
    for number, leaf in enumerate(leaves):
        alike[leaf.mesh, leaf.axes].append(number)
    for (mesh, axes), numbers in alike.items():
        _Exchange(mesh, axes, {number: leaves[number] for number in numbers}, held).run()
    return place_arrays((leaf.job, held[n]) for n, leaf in enumerate(leaves))


class _Exchange:
    """Leaves of one mesh, and the bytes of each copy's readers, one leaf after the other."""

    def __init__(
        self,
        mesh: Mesh,
        axes: tuple[str, ...],
        leaves: Mapping[int, Copied],
        held: Sequence[dict[Region, Buffer]],
    ) -> None:
        others = tuple(name for name in mesh.axis_names if name not in axes) or None
        # A mesh of its own: that of the leaves may leave the placing to the program.
        mesh = Mesh(mesh.devices, mesh.axis_names)
        self._sent = NamedSharding(mesh, PartitionSpec(axes, others, None))
        self._gathered = NamedSharding(mesh, PartitionSpec(None, others, None))
        self._leaves = leaves
        self._held = held
        self._read = {(number, region) for number in leaves for region in held[number]}
        copies = math.prod(mesh.shape[axis] for axis in axes)
        # Number and first byte of each leaf, by the copy whose devices read it.
        self._starts: list[list[tuple[int, int]]] = [[] for _ in range(copies)]
        lengths = [0] * copies
        for number, leaf in leaves.items():
            self._starts[leaf.reader].append((lengths[leaf.reader], number))
            lengths[leaf.reader] += leaf.part_nbytes
        self._length = max(lengths)
        block = -(-self._length // _ROUNDS)
        self._block = min(max(block, _LEAST_BLOCK_BYTES), _MOST_BLOCK_BYTES, max(self._length, 1))
        limit = broadcast_limit(list(leaves.values()))
        if limit is not None:
            # Each device holds the block that it sends and one of each copy.
            self._block = max(1, min(self._block, limit // (copies + 1)))
        self._shape = (copies, mesh.size // copies, self._block)

    def run(self) -> None:
        """Fills what is not held yet."""
        arena = Arena()
        for number, leaf in self._leaves.items():
            for region in leaf.regions.values():
                if region not in self._held[number]:
                    shape = shape_of_region(region)
                    self._held[number][region] = arena.allocate(shape, leaf.job.dtype)
        # Each is filled anew once all that it brought has been copied: fresh memory would take longer.
        places = cast(_Indices, self._sent.addressable_devices_indices_map(self._shape))
        sending = Arena()
        blocks = {device: sending.allocate((1, 1, self._block), np.dtype(np.uint8)) for device in places}
        with jax.set_mesh(cast(Mesh, self._sent.mesh)):
            for start in range(0, self._length, self._block):
                self._gather(start, places, blocks)

    def _gather(self, start: int, places: _Indices, sending: Mapping[Device, Buffer]) -> None:
        blocks: list[jax.Array] = []
        for device, block in sending.items():
            for own, within in self._parts(device, places[device][0].start or 0, start):
                block[0, 0, within] = own
            blocks.append(jax.device_put(block, device))
        sent = jax.make_array_from_single_device_arrays(self._shape, self._sent, blocks)
        gathered = _gathering(self._gathered)(sent)
        filled = set(self._read)
        for shard in gathered.addressable_shards:
            content = np.asarray(shard.data)
            for copy in range(self._shape[0]):
                for own, within in self._parts(shard.device, copy, start, filled):
                    own[:] = content[copy, 0, within]
            filled |= {(number, leaf.regions[shard.device]) for number, leaf in self._leaves.items()}

    def _parts(
        self, device: Device, copy: int, start: int, filled: Collection[tuple[int, Region]] = ()
    ) -> Iterator[tuple[Buffer, slice]]:
        """Yields the bytes of a device's parts that one copy's block brings, and their place in it."""
        leaves = self._starts[copy]
        first = max(0, bisect.bisect_right(leaves, (start, math.inf)) - 1)
        for begin, number in leaves[first:]:
            if begin >= start + self._block:
                return
            leaf = self._leaves[number]
            region = leaf.regions[device]
            low, high = max(begin, start), min(begin + leaf.part_nbytes, start + self._block)
            if low < high and (number, region) not in filled:
                content = self._held[number][region].reshape(-1).view(np.uint8)
                yield content[low - begin : high - begin], slice(low - start, high - start)


@functools.lru_cache(maxsize=64)
def _gathering(sharding: NamedSharding) -> Any:
    def same(blocks: jax.Array) -> jax.Array:
        return blocks

    return jax.jit(same, out_shardings=sharding)


# Leaves that differ in nothing but their path share a compiled program, so many at a time.
_TOGETHER = 16


def copy_to_all(leaves: Sequence[Copied], read: Sequence[Mapping[Region, Buffer]]) -> dict[Path, jax.Array]:
    """Returns the leaves' arrays, each complete on all its devices.

    Every process must call this with the same leaves in the same order.
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
    indices = cast(_Indices, sharding.addressable_devices_indices_map(shape))
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
