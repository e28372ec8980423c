"""Digests and differences of whole checkpoints, in bounded memory."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.core.recipes import Read
from orbax_nnx_handler.storage.checkpoint.metadata import Checkpoint
from orbax_nnx_handler.storage.converting.blocks import Block, read_blocks
from orbax_nnx_handler.storage.converting.written import Written
from orbax_nnx_handler.storage.reading.jobs import Buffer

Progress = Callable[[int], None]

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
    unequal = ~((left == right) | (np.isnan(left) & np.isnan(right)))
    if not unequal.any():
        return Difference(unequal=0, largest=0.0)
    apart = np.abs(left[unequal] - right[unequal])
    return Difference(unequal=int(unequal.sum()), largest=float(apart.max()))


def _combined(one: Difference, other: Difference) -> Difference:
    # `np.maximum` hands a NaN on, which `max` may lose.
    largest = float(np.maximum(one.largest, other.largest))
    return Difference(unequal=one.unequal + other.unequal, largest=largest)
