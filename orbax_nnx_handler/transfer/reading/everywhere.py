"""Reading on all processes of a program: all get their arrays, or all raise."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp

from orbax_nnx_handler.planning.paths import Path
from orbax_nnx_handler.planning.recipes import reads
from orbax_nnx_handler.transfer.agreement import agree
from orbax_nnx_handler.transfer.collection import paused_collection
from orbax_nnx_handler.transfer.metadata import Checkpoint
from orbax_nnx_handler.transfer.reading.copying import copy_to_all
from orbax_nnx_handler.transfer.reading.jobs import Job
from orbax_nnx_handler.transfer.reading.read import read_arrays, read_shards
from orbax_nnx_handler.transfer.reading.replicas import Copied, copy_axes, share_out
from orbax_nnx_handler.transfer.reading.shards import PlainJob, plain_job
from orbax_nnx_handler.transfer.reading.tasks import Progress
from orbax_nnx_handler.transfer.reading.waves import DEFAULT_WINDOW_BYTES, packed


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
    of all other jobs.

    Args:
        checkpoint: What `read_metadata` returned.
        jobs: The wanted arrays, the same on every process.
        concurrent_bytes: See `read_arrays`.
        progress: See `read_arrays`; only of what this process reads.
        orbax: See `read_arrays`.

    Returns:
        The arrays by wanted path.

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
    # Half: the contributions of a wave are on the devices beside its results.
    limit = (concurrent_bytes or DEFAULT_WINDOW_BYTES) // 2
    with paused_collection():
        for wave in packed(share_out(jobs), _nbytes, limit):
            read = functools.partial(read_shards, checkpoint, [item.job for item in wave])
            # A process that cannot read must say so before the others wait for it in the copy.
            shards = agree(functools.partial(read, concurrent_bytes, progress))
            placed = copy_to_all(wave, shards)
            # The host memory of a wave goes before the next is read.
            jax.block_until_ready(placed)
            arrays |= placed
    return arrays


def _nbytes(items: Sequence[Copied]) -> int:
    return sum(item.nbytes for item in items)
