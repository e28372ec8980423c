"""The reader: shards of wanted arrays filled straight from the store."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from orbax_nnx_handler.planning.errors import UnreadableLeafError
from orbax_nnx_handler.planning.leaves import Shape
from orbax_nnx_handler.planning.paths import Path, render
from orbax_nnx_handler.planning.regions import Folded, Part, cut, place, shape_of_region, slices, whole
from orbax_nnx_handler.transfer.metadata import Checkpoint
from orbax_nnx_handler.transfer.reading.jobs import Job
from orbax_nnx_handler.transfer.reading.placing import place_arrays
from orbax_nnx_handler.transfer.reading.shards import Buffer, allocate_shards, plain_job


def read_arrays(
    checkpoint: Checkpoint,
    jobs: Sequence[Job],
    *,
    concurrent_bytes: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[Path, jax.Array]:
    """Reads what the jobs need, each stored chunk once, into place on the mesh.

    Args:
        checkpoint: What `read_metadata` returned.
        jobs: The wanted arrays.
        concurrent_bytes: Upper bound of the bytes read but not yet in place.
        progress: Called with the number of bytes put in place since the last call.

    Returns:
        The arrays by wanted path.

    Raises:
        UnreadableLeafError: Stored bytes are absent or damaged.
    """
    plain = [plain_job(job) for job in jobs]
    stored = _stored_shapes(checkpoint)
    filled = [(job, allocate_shards(job, np.empty)) for job in plain]
    for job, shards in filled:
        for region, buffer in shards.items():
            for part in cut(job.recipe, region, stored):
                _fill(checkpoint, part, place(part, buffer), stored)
    return place_arrays(filled)


def _stored_shapes(checkpoint: Checkpoint) -> dict[Path, Shape]:
    shapes = {path: array.encoding.shape for path, array in checkpoint.arrays.items()}
    return shapes | {path: value.shape for path, value in (checkpoint.values or {}).items()}


def _fill(checkpoint: Checkpoint, part: Part, view: Buffer, stored: Mapping[Path, Shape]) -> None:
    if isinstance(part.source, Folded):
        source = _folded(checkpoint, part.source, view.dtype, stored)[slices(part.source_region)]
    elif checkpoint.values and part.source in checkpoint.values:
        source = checkpoint.values[part.source][(..., *slices(part.source_region))]
    else:
        source = _read(checkpoint, part.source, part)
    view[...] = source
    if part.factor != 1.0:
        view *= np.asarray(part.factor, view.dtype)


def _folded(checkpoint: Checkpoint, folded: Folded, dtype: Any, stored: Mapping[Path, Shape]) -> Buffer:
    buffer = np.empty(shape_of_region(folded.region), dtype)
    for part in cut(folded.recipe, folded.region, stored):
        _fill(checkpoint, part, place(part, buffer), stored)
    return buffer.reshape(folded.shape)


def _read(checkpoint: Checkpoint, path: Path, part: Part) -> Any:
    array = checkpoint.arrays[path]
    spec = {
        "driver": array.encoding.driver,
        "kvstore": {**array.store.spec, "path": f"{array.store.spec.get('path', '')}{array.name}/"},
        "fill_missing_data_reads": not checkpoint.writes_fill,
    }
    try:
        opened = ts.open(spec, open=True, read=True, context=array.store.context).result()
        return opened[slices(part.source_region)].read().result()
    except ValueError as error:
        raise UnreadableLeafError(
            f"{render(path)} cannot be read from {array.store.directory}: {error}", paths=[path]
        ) from error
