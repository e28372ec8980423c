"""The reader: shards of wanted arrays, filled straight from the store."""

from collections.abc import Sequence

import jax
import orbax.checkpoint as ocp

from orbax_nnx_handler.planning.paths import Path
from orbax_nnx_handler.planning.recipes import reads
from orbax_nnx_handler.planning.regions import Region
from orbax_nnx_handler.transfer.archives import DISK_FORMAT
from orbax_nnx_handler.transfer.collection import paused_collection
from orbax_nnx_handler.transfer.metadata import Checkpoint
from orbax_nnx_handler.transfer.reading.arena import Arena
from orbax_nnx_handler.transfer.reading.gathering import fill_targets
from orbax_nnx_handler.transfer.reading.jobs import Job
from orbax_nnx_handler.transfer.reading.orbax_reader import read_with_orbax
from orbax_nnx_handler.transfer.reading.placing import place_array
from orbax_nnx_handler.transfer.reading.shards import Buffer, PlainJob, allocate_shards, plain_job
from orbax_nnx_handler.transfer.reading.targets import Work, stored_shapes
from orbax_nnx_handler.transfer.reading.tasks import Progress
from orbax_nnx_handler.transfer.reading.waves import waves


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
        for wave in waves(plain, concurrent_bytes):
            placed = _read_wave(checkpoint, wave, concurrent_bytes, progress)
            # The host buffers of a wave live until its transfer is done.
            jax.block_until_ready(under_way)
            arrays |= placed
            under_way = placed
    return {job.path: arrays[job.path] for job in jobs}


def _is_orbaxs(checkpoint: Checkpoint) -> bool:
    """Tells whether Orbax can read the checkpoint leaf by leaf: no msgpack file, no NumPy archive."""
    # Values that are nodes of the tree come from a msgpack file.
    held = checkpoint.values or {}
    return checkpoint.disk_format != DISK_FORMAT and not any(path in checkpoint.nodes for path in held)


def _read_wave(
    checkpoint: Checkpoint,
    wave: Sequence[PlainJob],
    concurrent_bytes: int | None,
    progress: Progress | None,
) -> dict[Path, jax.Array]:
    filled = read_shards(checkpoint, wave, concurrent_bytes, progress)
    return {job.job.path: place_array(job, shards) for job, shards in zip(wave, filled, strict=True)}


def read_shards(
    checkpoint: Checkpoint,
    wave: Sequence[PlainJob],
    concurrent_bytes: int | None,
    progress: Progress | None,
) -> list[dict[Region, Buffer]]:
    """Reads the shards of each job into fresh host memory."""
    arena, work, stored = Arena(), Work(), stored_shapes(checkpoint)
    filled = [allocate_shards(job, arena.allocate) for job in wave]
    for job, shards in zip(wave, filled, strict=True):
        for region, buffer in shards.items():
            work.fill(job.recipe, region, buffer, stored)
    fill_targets(checkpoint, work.targets, concurrent_bytes, progress)
    for step in work.finish:
        step()
    return filled
