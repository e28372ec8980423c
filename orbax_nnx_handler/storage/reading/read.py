"""Jobs to arrays: what this process needs is read and placed, on all processes of a program or on none.

Reading is told of three steps only: which bytes each job's parts are made from, that they are there,
and the arrays that the filled memory becomes.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from orbax_nnx_handler.orbax_interfaces import v0 as ocp
from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.core.recipes import reads
from orbax_nnx_handler.planning.core.regions import Region
from orbax_nnx_handler.storage import paused_collection
from orbax_nnx_handler.storage.checkpoint.metadata import Checkpoint
from orbax_nnx_handler.storage.reading.agreement import agree
from orbax_nnx_handler.storage.reading.engine import Progress
from orbax_nnx_handler.storage.reading.fetch import fill_targets
from orbax_nnx_handler.storage.reading.jobs import (
    DEFAULT_WINDOW_BYTES,
    Arena,
    Buffer,
    Job,
    PlainJob,
    Work,
    allocate_shards,
    grouped,
    groups,
    place_array,
    plain_job,
    stored_shapes,
)
from orbax_nnx_handler.storage.reading.orbax_reader import read_with_orbax
from orbax_nnx_handler.storage.reading.single_replica import (
    Copied,
    broadcast_limit,
    copy_axes,
    copy_through_hosts,
    copy_to_all,
    share_out,
)


def read_arrays(
    checkpoint: Checkpoint,
    jobs: Sequence[Job],
    *,
    concurrent_bytes: int | None = None,
    progress: Progress | None = None,
    orbax: ocp.PyTreeCheckpointHandler | None = None,
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
        plain = [plain_job(job) for job in jobs]
        under_way: dict[Path, jax.Array] = {}
        for group in groups(plain, concurrent_bytes):
            filled = read_shards(checkpoint, group, concurrent_bytes, progress)
            placed = {
                job.job.path: place_array(job, shards) for job, shards in zip(group, filled, strict=True)
            }
            # The host buffers of a group live until its transfer is done.
            jax.block_until_ready(under_way)
            arrays |= placed
            under_way = placed
    return {job.path: arrays[job.path] for job in jobs}


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
) -> list[dict[Region, Buffer]]:
    """Reads the shards of each job into fresh host memory."""
    arena, work, stored = Arena(), Work(), stored_shapes(checkpoint)
    filled = [allocate_shards(job, arena.allocate) for job in group]
    for job, shards in zip(group, filled, strict=True):
        for region, buffer in shards.items():
            work.fill(job.recipe, region, buffer, stored)
    fill_targets(checkpoint, work.targets, concurrent_bytes, progress)
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
            checkpoint, own, concurrent_bytes=concurrent_bytes, progress=progress, orbax=orbax
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
