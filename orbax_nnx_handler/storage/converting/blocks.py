"""Values of leaves in blocks of bounded size, each leaf's in the order of its bytes."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.core.recipes import reads
from orbax_nnx_handler.planning.core.regions import Region, shape_of_region
from orbax_nnx_handler.storage.checkpoint.metadata import Checkpoint
from orbax_nnx_handler.storage.converting.memory import release_freed
from orbax_nnx_handler.storage.converting.written import Written
from orbax_nnx_handler.storage.reading.fetch import fill_targets
from orbax_nnx_handler.storage.reading.jobs import Buffer, Work, stored_shapes

# One chunk of a written leaf: large enough for disks, small enough to be read in parallel.
_BLOCK_BYTES = 64 << 20
# Leaves are opened and written together; thousands at a time gain nothing.
_BATCH_LEAVES = 1024


@dataclasses.dataclass(frozen=True)
class Block:
    """A run of a leaf's elements.

    Attributes:
        leaf: The leaf.
        region: Where in the leaf; whole on all axes but the first ones.
        values: The elements.
        is_last: Whether it ends the leaf.
    """

    leaf: Written
    region: Region
    values: Buffer
    is_last: bool


def read_blocks(
    checkpoint: Checkpoint, leaves: Sequence[Written], window_bytes: int
) -> Iterator[list[Block]]:
    """Yields the values of leaves, some blocks at a time.

    A stored leaf that several of them are made from is read once for each batch
    that it appears in, so such leaves should be neighbours: see `by_source`.

    Raises:
        UnreadableLeafError: Stored bytes are absent or damaged.
    """
    stored = stored_shapes(checkpoint)
    batch: list[Block] = []
    size = 0
    for leaf, region, is_last in _cuts(leaves, window_bytes):
        nbytes = math.prod(shape_of_region(region)) * leaf.dtype.itemsize
        if batch and (size + nbytes > window_bytes or len(batch) >= _BATCH_LEAVES):
            _fill(checkpoint, batch, stored, window_bytes)
            yield batch
            # The caller holds the last batch until it asks for the next: forget it before more is allocated.
            batch, size = [], 0
            release_freed()
        batch.append(Block(leaf, region, np.empty(shape_of_region(region), leaf.dtype), is_last))
        size += nbytes
    if batch:
        _fill(checkpoint, batch, stored, window_bytes)
        yield batch


def by_source(leaves: Sequence[Written], checkpoint: Checkpoint) -> list[Written]:
    """Returns the leaves ordered so that those made from one stored leaf are neighbours."""
    order = {path: number for number, path in enumerate(checkpoint.leaves)}
    return sorted(leaves, key=lambda leaf: min((order[path] for path in reads(leaf.recipe)), default=0))


def block_shape(shape: Shape, dtype: np.dtype[Any], window_bytes: int) -> Shape:
    """Returns the shape of a leaf's blocks, which is also that of its chunks on disk.

    The first axes are cut, so that a block is one run of the leaf's bytes.
    """
    limit = max(1, min(_BLOCK_BYTES, window_bytes) // dtype.itemsize)
    cut = list(shape)
    for axis, length in enumerate(shape):
        below = math.prod(shape[axis + 1 :])
        cut[axis] = max(1, min(length, limit // max(1, below)))
        if below <= limit:
            break
    return tuple(cut)


def _cuts(leaves: Sequence[Written], window_bytes: int) -> Iterator[tuple[Written, Region, bool]]:
    for leaf in leaves:
        cut = block_shape(leaf.shape, leaf.dtype, window_bytes)
        pieces = [
            [(start, min(start + step, length)) for start in range(0, length, step)] or [(0, 0)]
            for length, step in zip(leaf.shape, cut, strict=True)
        ]
        regions = list(itertools.product(*pieces))
        for number, region in enumerate(regions):
            yield leaf, region, number == len(regions) - 1


def _fill(
    checkpoint: Checkpoint, batch: Sequence[Block], stored: Mapping[Path, Shape], window_bytes: int
) -> None:
    work = Work()
    for block in batch:
        if block.values.size:
            work.fill(block.leaf.recipe, block.region, block.values, stored)
    fill_targets(checkpoint, work.targets, window_bytes, None)
    for step in work.finish:
        step()
