"""Leaves to be written: their values in blocks of bounded size, in the order of their bytes; digests."""

import ctypes
import dataclasses
import functools
import hashlib
import itertools
import math
import pathlib
import resource
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from orbax_nnx_handler.planning.core.errors import Hint, RestoreError
from orbax_nnx_handler.planning.core.folding import Row
from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.lines import aligned, counted
from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.core.recipes import Read, Recipe, reads
from orbax_nnx_handler.planning.core.regions import Region, shape_of_region
from orbax_nnx_handler.planning.layouts.layout import Section
from orbax_nnx_handler.planning.options import DEFAULT_BYTES
from orbax_nnx_handler.storage.checkpoint.metadata import Checkpoint
from orbax_nnx_handler.storage.reading.engine import Progress
from orbax_nnx_handler.storage.reading.fetch import fill_targets
from orbax_nnx_handler.storage.reading.jobs import Buffer, Work, stored_shapes

# A batch of blocks exists this often at a time: as read, as compressed, as a file in the making.
# Measured: 2.2.
_COPIES = 2.5
# What Orbax, TensorStore and their threads come to take in the course of a save. Measured: up to 250 MiB,
# where one chunk of 1.5 GB is unpacked.
_PROGRAM_BYTES = 300 << 20
_LEAST_WINDOW_BYTES = 8 << 20
# `ru_maxrss` counts kilobytes, but bytes on a Mac.
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024


# `M_ARENA_MAX` of glibc's malloc.h.
_ARENA_MAX = -8


def release_freed() -> None:
    """Gives memory that was freed back to the system.

    glibc keeps it in the arena of each thread that allocated it: after 20,000 small
    leaves, through TensorStore's threads, 0.6 GB that nobody uses.
    """
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _share_arena() -> None:
    """Lets threads that are new allocate from one arena, so that less lies in it unused."""
    if (libc := _glibc()) is not None:
        libc.mallopt(_ARENA_MAX, 1)


@functools.cache
def _glibc() -> Any:
    """Returns the C library where it is glibc; None elsewhere, which is left to its own ways."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "malloc_trim") and hasattr(libc, "mallopt") else None


def window_of(bound_bytes: int | None) -> int:
    """Returns how many bytes of values may be read at a time.

    Args:
        bound_bytes: Upper bound of this process's memory; None for `DEFAULT_BYTES`
            above what the process holds now, which does for any process.

    Raises:
        RestoreError: The process holds so much already that the bound leaves too little.
    """
    if bound_bytes is not None:
        _share_arena()
    held = _resident_bytes()
    used = held + _PROGRAM_BYTES
    window = int(((held + DEFAULT_BYTES if bound_bytes is None else bound_bytes) - used) / _COPIES)
    if window < _LEAST_WINDOW_BYTES:
        least = (used + _COPIES * _LEAST_WINDOW_BYTES) / 1e9
        raise RestoreError(
            f"{(bound_bytes or 0) / 1e9:.2f} GB of memory are too little: the process holds "
            f"{held / 1e9:.2f} GB already, and reading and writing take {_PROGRAM_BYTES / 1e9:.2f} GB beside "
            "the values.",
            hints=[f"allow {math.ceil(least * 10) / 10:.1f} GB or more."],
        )
    return window


def _resident_bytes() -> int:
    """Returns the memory that this process has now."""
    now = pathlib.Path("/proc/self/statm")
    if now.exists():
        return int(now.read_text().split()[1]) * resource.getpagesize()
    # Elsewhere the most it ever had, which also counts the process that started it.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT


@dataclasses.dataclass(frozen=True, kw_only=True)
class Written:
    """One leaf of a checkpoint to be written.

    Attributes:
        path: Where it will be.
        recipe: The stored leaves it is made from.
        shape: Its shape.
        dtype: Its dtype; a key dtype for random keys.
        section: The part of a train state that it belongs to.
        collection: The Linen collection of a model leaf, where the layout tells.
        parameter: For a model leaf its keys below the collection, for a moment
            those of its parameter; None for a leaf of neither.
        owner: The keys above the train state that it belongs to.
        is_unused: Whether it is what a factored optimizer keeps in place of a moment: `Placement.is_unused`.
    """

    path: Path
    recipe: Recipe
    shape: Shape
    dtype: np.dtype[Any]
    section: Section = "model"
    collection: str | None = None
    parameter: Path | None = None
    owner: Path = ()
    is_unused: bool = False

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def above(self) -> Path:
        """The keys above the parameter's own; an optimizer may know it by the last of them alone."""
        pairs = zip(reversed(self.path), reversed(self.parameter or ()), strict=False)
        own = sum(1 for _ in itertools.takewhile(lambda pair: str(pair[0]) == str(pair[1]), pairs))
        return self.path[: len(self.path) - own]


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
        if not math.prod(leaf.shape):
            yield leaf, tuple((0, length) for length in leaf.shape), True
            continue
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


# Elements compared at a time: they are widened to 64 bits for it.
_PART = 1 << 20


class Digests:
    """Digests of leaves that come block by block."""

    def __init__(self) -> None:
        self.done: dict[Path, str] = {}
        self._open: dict[Path, Any] = {}

    def add(self, block: Block) -> None:
        """Takes the next block of a leaf in."""
        path = block.leaf.path
        # SHA-256 for its speed: processors compute it themselves.
        digest = self._open.get(path) or self._open.setdefault(path, hashlib.sha256())
        digest.update(bytes_of(block.values))
        if block.is_last:
            self.done[path] = self._open.pop(path).hexdigest()[:32]


def bytes_of(values: Buffer) -> memoryview:
    """Returns the bytes of a contiguous array; `bfloat16` has no buffer format of its own."""
    return values.reshape(-1).view(np.uint8).data


def as_stored(checkpoint: Checkpoint) -> dict[Path, Written]:
    """Returns every array of a checkpoint as it is; random keys as their bits."""
    found = {
        path: Written(path=path, recipe=Read(path), shape=value.shape, dtype=value.dtype)
        for path, value in (checkpoint.values or {}).items()
    }
    for path, array in checkpoint.arrays.items():
        encoding = array.encoding
        found[path] = Written(path=path, recipe=Read(path), shape=encoding.shape, dtype=encoding.dtype)
    return found


def digests_of(
    checkpoint: Checkpoint, leaves: Sequence[Written], window_bytes: int, progress: Progress | None = None
) -> dict[Path, str]:
    """Returns the digest of each leaf's bytes in C order: half of its SHA-256, in hex."""
    digests = Digests()
    for batch in read_blocks(checkpoint, leaves, window_bytes):
        for block in batch:
            digests.add(block)
        if progress is not None:
            progress(sum(block.values.nbytes for block in batch))
        batch.clear()
    return digests.done


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """How the values of a leaf differ between two checkpoints.

    Attributes:
        unequal: Elements that differ; a NaN equals a NaN.
        largest: The largest absolute difference; NaN where only one side is NaN.
    """

    unequal: int
    largest: float


def differences(
    left: tuple[Checkpoint, Sequence[Written]],
    right: tuple[Checkpoint, Sequence[Written]],
    window_bytes: int,
    progress: Progress | None = None,
) -> Mapping[Path, Difference]:
    """Compares the values of two checkpoints, whose leaves have the same shapes and dtypes and one order."""
    found: dict[Path, Difference] = {}
    for ours, theirs in _together(left, right, window_bytes):
        for one, other in zip(ours, theirs, strict=True):
            before = found.get(one.leaf.path, Difference(unequal=0, largest=0.0))
            found[one.leaf.path] = _combined(before, _compare(one.values, other.values))
        if progress is not None:
            progress(sum(block.values.nbytes for block in ours))
        ours.clear()
        theirs.clear()
    return found


def _together(
    left: tuple[Checkpoint, Sequence[Written]], right: tuple[Checkpoint, Sequence[Written]], window_bytes: int
) -> Iterator[tuple[list[Block], list[Block]]]:
    yield from zip(read_blocks(*left, window_bytes), read_blocks(*right, window_bytes), strict=True)


def _compare(one: Buffer, other: Buffer) -> Difference:
    found = Difference(unequal=0, largest=0.0)
    left, right = one.reshape(-1), other.reshape(-1)
    for start in range(0, left.size, _PART):
        part = slice(start, start + _PART)
        if bytes_of(left[part]) != bytes_of(right[part]):
            found = _combined(found, _compare_part(left[part], right[part]))
    return found


def _compare_part(one: Buffer, other: Buffer) -> Difference:
    wide = np.complex128 if one.dtype.kind == "c" else np.float64
    left, right = one.astype(wide), other.astype(wide)
    # Two integers of 64 bits may be one float64.
    same = one == other if one.dtype.kind in "iub" else left == right
    unequal = ~(same | (np.isnan(left) & np.isnan(right)))
    if not unequal.any():
        return Difference(unequal=0, largest=0.0)
    apart = np.abs(left[unequal] - right[unequal])
    return Difference(unequal=int(unequal.sum()), largest=float(apart.max()))


def _combined(one: Difference, other: Difference) -> Difference:
    # `np.maximum` hands a NaN on, which `max` may lose.
    largest = float(np.maximum(one.largest, other.largest))
    return Difference(unequal=one.unequal + other.unequal, largest=largest)


# Leaves that stand in the way.

_LISTED = 20


def check_paths_distinct(leaves: Iterable[Written]) -> None:
    """Raises where two leaves would be written to one path.

    Raises:
        RestoreError: Names the paths.
    """
    seen: set[Path] = set()
    twice: list[Path] = []
    for leaf in leaves:
        (twice.append if leaf.path in seen else seen.add)(leaf.path)
    if twice:
        raise refusal("leaf", "leaves", "would be written to a path that another leaf has", twice)


def refusal(one: str, many: str, what: str, paths: Sequence[Path], hint: str | Hint = "") -> RestoreError:
    """Returns the error for a conversion that some leaves stand in the way of: `1 leaf` or `2 leaves` ..."""
    shown = aligned((Row(path) for path in paths), limit=_LISTED)
    hints = [hint] if hint else []
    return RestoreError(f"{counted(len(paths), one, many)} {what}:\n{shown}", paths=paths, hints=hints)
