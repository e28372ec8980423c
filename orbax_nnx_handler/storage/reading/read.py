"""Jobs to arrays: what this process needs is read and placed, on all processes of a program or on none.

The files are read by this package: which bytes each job's parts are made from, that they are there, and the
arrays that the filled memory becomes. Where a handler brings type handlers of its own (Pathways, custom array
types), only Orbax knows how those read: it reads them, and nothing else. With single replica, each byte is
read by one process and copied to the others.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from orbax_nnx_handler.orbax_interfaces import v0 as ocp
from orbax_nnx_handler.planning.core import recipes
from orbax_nnx_handler.planning.core.errors import UnreadableLeafError
from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.core.recipes import Recipe, reads
from orbax_nnx_handler.planning.core.regions import Region
from orbax_nnx_handler.storage import agree, paused_collection
from orbax_nnx_handler.storage.arithmetic import evaluate
from orbax_nnx_handler.storage.checkpoint.metadata import Checkpoint
from orbax_nnx_handler.storage.checkpoint.trees import EMPTY_TYPES
from orbax_nnx_handler.storage.reading.engine import Progress
from orbax_nnx_handler.storage.reading.fetch import fill_targets
from orbax_nnx_handler.storage.reading.jobs import (
    DEFAULT_WINDOW_BYTES,
    Buffer,
    Job,
    PlainJob,
    Work,
    allocate_shards,
    grouped,
    groups,
    place_arrays,
    plain_job,
    stored_shapes,
)
from orbax_nnx_handler.storage.reading.memory import Arena, Memory
from orbax_nnx_handler.storage.reading.single_replica import (
    Copied,
    broadcast_limit,
    copy_axes,
    copy_through_hosts,
    copy_to_all,
    share_out,
)
from orbax_nnx_handler.storage.stores.locations import kvstore_spec

_EMPTY_VALUES: dict[str, Any] = {"None": None, "NamedTuple": None, "Dict": {}, "List": [], "Tuple": ()}


def read_with_orbax(
    checkpoint: Checkpoint, jobs: Sequence[Job], handler: ocp.PyTreeCheckpointHandler
) -> dict[Path, jax.Array]:
    """Reads the jobs with a handler's own type handlers.

    The planned leaves are asked for through an item of the disk's own containers with a
    placeholder at every other leaf, which reads exactly those.

    Args:
        checkpoint: The checkpoint; its item must have a `_METADATA` file.
        jobs: The wanted arrays.
        handler: Orbax's handler with the type handlers that read. Not one that supports rich
            types: it would want the named tuples of the program that saved.

    Returns:
        The arrays by wanted path.

    Raises:
        UnreadableLeafError: Orbax could not read; its message is quoted.
    """
    shardings: dict[Path, Sharding] = {}
    for job in jobs:
        for path, sharding in source_shardings(job).items():
            shardings.setdefault(path, sharding)
    args = {path: _restore_args(checkpoint, path, sharding) for path, sharding in shardings.items()}
    item = _disk_tree(
        checkpoint,
        {path: jax.ShapeDtypeStruct(a.global_shape, a.dtype) for path, a in args.items()},
        ocp.PLACEHOLDER,
    )
    restore_args = _disk_tree(checkpoint, args, ocp.RestoreArgs())
    try:
        # Orbax has TensorStore open the directory: it must be the one that was listed.
        kvstore_spec(checkpoint.directory)
        tree = handler.restore(
            checkpoint.directory, args=ocp.args.PyTreeRestore(item=item, restore_args=restore_args)
        )
    except (ValueError, OSError) as error:
        message = f"Orbax cannot read the planned leaves of {checkpoint.directory}: {error}"
        raise UnreadableLeafError(message, paths=list(args)) from error
    return {job.path: _carry_out(job, tree) for job in jobs}


def _restore_args(checkpoint: Checkpoint, path: Path, sharding: Sharding) -> ocp.ArrayRestoreArgs:
    leaf = checkpoint.leaves[path]
    # A subclass of the plain args that every array handler takes and the single-replica one insists on.
    return ocp.type_handlers.SingleReplicaArrayRestoreArgs(
        restore_type=jax.Array, sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype
    )


def _disk_tree(checkpoint: Checkpoint, wanted: Mapping[Path, Any], other: Any) -> Any:
    """Builds the disk's own containers with values at the wanted leaves."""
    root: dict[Any, Any] = {}
    for path, value_type in checkpoint.nodes.items():
        node = root
        for key in path[:-1]:
            node = node.setdefault(key, {})
        value = _EMPTY_VALUES[value_type] if value_type in EMPTY_TYPES else other
        node[path[-1]] = wanted.get(path, value)
    return _lists(root)


def _lists(node: Any) -> Any:
    if not isinstance(node, dict) or not node:
        return cast(Any, node)
    children = {key: _lists(value) for key, value in cast(dict[Any, Any], node).items()}
    if all(isinstance(key, int) for key in children):
        return [children[number] for number in sorted(children)]
    return children


def _look_up(tree: Any, path: Path) -> jax.Array:
    return functools.reduce(lambda node, key: node[key], path, tree)


def _carry_out(job: Job, tree: Any) -> jax.Array:
    # A source that another job read to other devices moves here; otherwise this is nothing.
    sources = {path: jax.device_put(_look_up(tree, path), own) for path, own in source_shardings(job).items()}
    return cast(jax.Array, evaluate(job.recipe, sources, job.dtype, job.sharding))


def source_shardings(job: Job) -> dict[Path, Sharding]:
    """Chooses where each source is read to, so that the recipe moves as little as it can."""
    if isinstance(job.sharding, SingleDeviceSharding):
        return dict.fromkeys(recipes.reads(job.recipe), job.sharding)
    if not isinstance(job.sharding, NamedSharding):
        everywhere = NamedSharding(
            Mesh(np.array(list(cast(set[Any], job.sharding.device_set))), ("all",)), PartitionSpec()
        )
        same = isinstance(job.recipe, recipes.Read)
        return dict.fromkeys(recipes.reads(job.recipe), job.sharding if same else everywhere)
    spec = (*job.sharding.spec, *[None] * (len(job.shape) - len(job.sharding.spec)))
    mesh = job.sharding.mesh
    return {path: NamedSharding(mesh, PartitionSpec(*below)) for path, below in _specs(job.recipe, spec)}


def _specs(recipe: Recipe, spec: tuple[Any, ...]) -> list[tuple[Path, tuple[Any, ...]]]:
    """Pushes a partition down through a recipe; an axis whose length changes is left whole."""
    match recipe:
        case recipes.Read(path):
            return [(path, spec)]
        case recipes.Index(source, axis, _):
            return _specs(source, (*spec[:axis], None, *spec[axis:]))
        case recipes.Slice(source, axis, _, _) | recipes.Repeat(source, axis, _):
            return _specs(source, (*spec[:axis], None, *spec[axis + 1 :]))
        case recipes.Stack(sources, axis):
            return [found for s in sources for found in _specs(s, (*spec[:axis], *spec[axis + 1 :]))]
        case recipes.Concat(sources, axis):
            whole = (*spec[:axis], None, *spec[axis + 1 :])
            return [found for source in sources for found in _specs(source, whole)]
        case recipes.Transpose(source, permutation):
            return _specs(source, tuple(spec[permutation.index(axis)] for axis in range(len(permutation))))
        case recipes.Reshape():
            return [(path, ()) for path in recipes.reads(recipe)]
        case recipes.Scale(source, _) | recipes.Add(source, _):
            return _specs(source, spec)
        case recipes.Fill():
            return []


def read_arrays(
    checkpoint: Checkpoint,
    jobs: Sequence[Job],
    *,
    concurrent_bytes: int | None = None,
    progress: Progress | None = None,
    orbax: ocp.PyTreeCheckpointHandler | None = None,
    memory: Memory | None = None,
) -> dict[Path, jax.Array]:
    """Reads what the jobs need, each stored byte once, into place on the mesh.

    One rule chooses the reader: what a handler's own type handlers must read goes
    through Orbax (`orbax=`), everything else is read here.

    Args:
        checkpoint: What `read_metadata` returned.
        jobs: The wanted arrays.
        concurrent_bytes: Upper bound of the bytes on their way from the store
            to the devices; a single leaf may exceed it.
        progress: Called with the number of bytes put in place since the last
            call, from the threads that read.
        orbax: A handler with type handlers of its own, which then reads what
            lies in arrays.
        memory: Blocks that are ready to be read into.

    Returns:
        The arrays by wanted path.

    Raises:
        UnreadableLeafError: Stored bytes are absent or damaged; names leaves and
            files.
    """
    arrays: dict[Path, jax.Array] = {}
    held = checkpoint.values or {}
    if orbax is not None and _is_orbaxs(checkpoint):
        beside = [job for job in jobs if any(path in held for path in reads(job.recipe))]
        stored = [job for job in jobs if not any(path in held for path in reads(job.recipe))]
        read = read_with_orbax(checkpoint, stored, orbax) if stored else {}
        return read | (read_arrays(checkpoint, beside) if beside else {})
    with paused_collection():
        arrays |= _copied_from_host(held, jobs, progress)
        plain = [plain_job(job) for job in jobs if job.path not in arrays]
        under_way: dict[Path, jax.Array] = {}
        for group in groups(plain, concurrent_bytes):
            filled = read_shards(checkpoint, group, concurrent_bytes, progress, memory)
            placed = place_arrays(zip(group, filled, strict=True))
            # The host buffers of a group live until its transfer is done.
            jax.block_until_ready(under_way)
            arrays |= placed
            under_way = placed
    return {job.path: arrays[job.path] for job in jobs}


def _copied_from_host(
    held: Mapping[Path, Any], jobs: Sequence[Job], progress: Progress | None
) -> dict[Path, jax.Array]:
    """Copies what host memory holds as it is wanted, each leaf once and into memory of JAX's own."""
    here = [job for job in jobs if _is_held_as_wanted(job, held)] if held else []
    values = [np.asarray(held[job.recipe.path]) for job in here if isinstance(job.recipe, recipes.Read)]
    placed: list[jax.Array] = jax.device_put(values, [job.sharding for job in here])
    if not any(isinstance(array, Tracer) for array in placed):
        placed = _owned(placed, values)
        if progress is not None and placed:
            progress(sum(array.nbytes for array in placed))
    return {job.path: array for job, array in zip(here, placed, strict=True)}


def _owned(placed: Sequence[jax.Array], values: Sequence[np.ndarray[Any, Any]]) -> list[jax.Array]:
    """Waits for arrays, and copies those that lie in memory which NumPy may still write to."""
    arrays = {at: array.block_until_ready() for at, array in enumerate(placed)}
    adopted = {at: array for at, array in arrays.items() if _is_adopted(array, values[at])}
    # By the runtime: `jnp.copy` would be compiled anew for each shape.
    copies: dict[int, jax.Array]
    copies = jax.device_put(adopted, {at: array.sharding for at, array in adopted.items()}, may_alias=False)
    for array in copies.values():
        array.block_until_ready()
    return list((arrays | copies).values())


def _is_held_as_wanted(job: Job, held: Mapping[Path, Any]) -> bool:
    value = held.get(job.recipe.path) if isinstance(job.recipe, recipes.Read) else None
    fits = value is not None and value.dtype == job.dtype and value.flags.c_contiguous
    return fits and job.sharding.is_fully_addressable


def _is_adopted(array: jax.Array, value: np.ndarray[Any, Any]) -> bool:
    """Tells whether an array lies in memory that NumPy may still write to: JAX takes over some on CPUs."""
    shards = [shard for shard in array.addressable_shards if shard.device.platform == "cpu"]
    places: list[int] = [shard.data.unsafe_buffer_pointer() for shard in shards]
    start = value.ctypes.data
    return any(start <= place < start + value.nbytes for place in places)


def _is_orbaxs(checkpoint: Checkpoint) -> bool:
    """Tells whether Orbax can read the checkpoint leaf by leaf: no msgpack file, no file of many arrays."""
    # Values that are nodes of the tree come from a msgpack file.
    held = checkpoint.values or {}
    in_one_file = any(array.store.kind == "archive" for array in checkpoint.arrays.values())
    return not in_one_file and not any(path in checkpoint.nodes for path in held)


def read_shards(
    checkpoint: Checkpoint,
    group: Sequence[PlainJob],
    concurrent_bytes: int | None,
    progress: Progress | None,
    memory: Memory | None = None,
) -> list[dict[Region, Buffer]]:
    """Reads the shards of each job into fresh host memory."""
    arena, work = Arena(memory), Work()
    is_whole = all(isinstance(job.recipe, recipes.Read) for job in group)
    stored = {} if is_whole else stored_shapes(checkpoint)
    filled = [allocate_shards(job, arena.allocate) for job in group]
    for job, shards in zip(group, filled, strict=True):
        for region, buffer in shards.items():
            work.fill(job.recipe, region, buffer, stored)
    fill_targets(checkpoint, work.targets, concurrent_bytes, progress, arena.settle)
    for step in work.finish:
        step()
    return filled


def read_everywhere(
    checkpoint: Checkpoint,
    jobs: Sequence[Job],
    *,
    concurrent_bytes: int | None = None,
    progress: Progress | None = None,
    orbax: ocp.PyTreeCheckpointHandler | None = None,
    memory: Memory | None = None,
) -> dict[Path, jax.Array]:
    """Reads what the jobs need on every process.

    Jobs that ask for it and that lie on several processes in copies are read by one
    process a copy and come to the others over the mesh; each process reads its own parts
    of all other jobs. Takes what `read_arrays` takes; `progress` hears of what this process reads.

    Raises:
        UnreadableLeafError: Stored bytes are absent or damaged, on this process.
        OtherProcessError: Something failed on another process only.
    """
    held = checkpoint.values or {}
    copied = {} if orbax is not None else _copied_jobs(jobs, held)
    own = [job for job in jobs if job.path not in copied]
    arrays = agree(
        lambda: read_arrays(
            checkpoint, own, concurrent_bytes=concurrent_bytes, progress=progress, orbax=orbax, memory=memory
        )
    )
    if copied:
        arrays |= _read_copied(checkpoint, list(copied.values()), concurrent_bytes, progress)
    return {job.path: arrays[job.path] for job in jobs}


def _copied_jobs(jobs: Sequence[Job], held: Mapping[Path, Any]) -> dict[Path, PlainJob]:
    """Returns the jobs that are read once for several processes; what is held in memory needs no reading."""
    plain = [plain_job(job) for job in jobs if job.single_replica]
    return {
        job.job.path: job
        for job in plain
        if copy_axes(job) and not any(path in held for path in reads(job.recipe))
    }


def _read_copied(
    checkpoint: Checkpoint,
    jobs: Sequence[PlainJob],
    concurrent_bytes: int | None,
    progress: Progress | None,
) -> dict[Path, jax.Array]:
    arrays: dict[Path, jax.Array] = {}
    shared = share_out(jobs)
    on_cpu = all(item.on_cpu for family in shared for item in family)
    # What is read into host memory stays there; elsewhere, the contributions of a group are on the devices
    # beside its results, so that half is let in.
    limit = (concurrent_bytes or DEFAULT_WINDOW_BYTES) // 2
    everything = [item for family in shared for item in family]
    for_the_copying = broadcast_limit(everything)
    if for_the_copying is not None:
        limit = min(limit, for_the_copying * max(1, jax.local_device_count()))
    groups = [everything] if on_cpu else grouped(shared, _nbytes, limit)
    with paused_collection():
        for group in groups:
            read = functools.partial(read_shards, checkpoint, [item.job for item in group])
            # A process that cannot read must say so before the others wait for it in the copy.
            shards = agree(functools.partial(read, concurrent_bytes, progress))
            placed = copy_through_hosts(group, shards) if on_cpu else copy_to_all(group, shards)
            # The host memory of a group goes before the next is read.
            jax.block_until_ready(placed)
            arrays |= placed
    return arrays


def _nbytes(items: Sequence[Copied]) -> int:
    return sum(item.nbytes for item in items)
