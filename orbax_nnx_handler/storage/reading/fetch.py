"""Which chunks are absent, as far as metadata shows: known before anything is read.

One stored leaf: which chunks are read for which places, and what can go wrong.

All stored leaves of a wave, read into all their places.

A few stored values on the host, for decisions that need them.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from orbax_nnx_handler.planning.core.errors import UnreadableLeafError
from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.paths import Path, render
from orbax_nnx_handler.planning.core.regions import (
    Region,
    intersect,
    shape_of_region,
    shift,
    slices,
    starts,
    whole,
)
from orbax_nnx_handler.storage.checkpoint.metadata import Checkpoint, StoredArray
from orbax_nnx_handler.storage.checkpoint.npz import NpyEncoding
from orbax_nnx_handler.storage.reading.chunks import DamagedError, fill_from_chunk
from orbax_nnx_handler.storage.reading.members import fill_from_member
from orbax_nnx_handler.storage.reading.sources import AbsentError, Opener, Source
from orbax_nnx_handler.storage.reading.targets import Destination
from orbax_nnx_handler.storage.reading.tasks import Progress, Task, run_tasks


def absent_chunks(checkpoint: Checkpoint, regions: Mapping[Path, Sequence[Region]]) -> dict[Path, list[str]]:
    """Returns the keys of the chunks that the store's catalog does not list.

    Args:
        checkpoint: The checkpoint. Where its writer left out chunks of zeros,
            an absent chunk is none of these.
        regions: The regions needed of each stored leaf.

    Returns:
        The absent keys by stored leaf; leaves that have all their chunks are left out.
    """
    if not checkpoint.writes_fill:
        return {}
    found: dict[Path, list[str]] = {}
    for path, needed in regions.items():
        array = checkpoint.arrays.get(path)
        if array is None or array.store.catalog is None:
            continue
        indices = dict.fromkeys(index for region in needed for index in array.encoding.chunks(region))
        keys = [array.key(index) for index in indices]
        absent = [key for key in keys if array.store.lacks(key)]
        if absent:
            found[path] = absent
    return found


def check_presence(checkpoint: Checkpoint, regions: Mapping[Path, Sequence[Region]]) -> None:
    """Raises if the catalog shows that a needed chunk is absent.

    Raises:
        UnreadableLeafError: Lists every leaf and every absent chunk.
    """
    absent = absent_chunks(checkpoint, regions)
    if absent:
        lines = [f"  {render(path)}: {', '.join(keys)}" for path, keys in absent.items()]
        raise UnreadableLeafError(
            "\n".join(
                [f"chunks of {len(absent)} stored leaves are absent from {checkpoint.directory}:", *lines]
            ),
            paths=list(absent),
        )


# A large uncompressed chunk is read by several threads, this much by each.
_PIECE_BYTES = 32 << 20


@dataclasses.dataclass(frozen=True)
class LeafReader:
    """Reads one stored leaf.

    Attributes:
        path: The leaf, for messages.
        array: Where it lies.
        opener: Opens the values of its store.
        writes_fill: Whether an absent chunk is a loss.
    """

    path: Path
    array: StoredArray
    opener: Opener
    writes_fill: bool

    def tasks(self, places: Sequence[Destination]) -> Iterator[Task]:
        """Yields one task per chunk, several for a large uncompressed one."""
        encoding = self.array.encoding
        if encoding.codec == "other":
            for place in places:
                run = functools.partial(self._read_with_tensorstore, place)
                yield Task(self.path, _nbytes([place], encoding.dtype.itemsize), run)
            return
        for index, targets in self._by_chunk(places).items():
            key = self.array.key(index)
            # What can only be fetched whole is fetched once.
            divisible = self.array.store.local or self.array.store.size_of(key) is not None
            for piece in self._pieces(targets) if divisible else [targets]:
                run = functools.partial(self._read_chunk, key, piece)
                yield Task(self.path, _nbytes(piece, encoding.dtype.itemsize), run)

    def _by_chunk(self, places: Sequence[Destination]) -> dict[tuple[int, ...], list[Destination]]:
        encoding = self.array.encoding
        if encoding.is_one_chunk:
            return {(0,) * len(encoding.shape): list(places)}
        chunks: dict[tuple[int, ...], list[Destination]] = {}
        for place in places:
            for index in encoding.chunks(place.region):
                chunks.setdefault(index, []).extend(_within([place], encoding.chunk_region(index)))
        return chunks

    def _pieces(self, targets: list[Destination]) -> list[list[Destination]]:
        """Cuts a large uncompressed chunk into rows that several threads can read."""
        encoding = self.array.encoding
        axis = next((axis for axis, size in enumerate(encoding.chunk_shape) if size > 1), None)
        if encoding.codec != "raw" or encoding.chunk_nbytes <= _PIECE_BYTES or axis is None:
            return [targets]
        length = encoding.chunk_shape[axis]
        step = max(1, _PIECE_BYTES * length // encoding.chunk_nbytes)
        cuts = [(first, min(first + step, length)) for first in range(0, length, step)]
        covering = whole(encoding.chunk_shape)
        slabs = [(*covering[:axis], cut, *covering[axis + 1 :]) for cut in cuts]
        pieces = [_within(targets, slab, counted_from=(0,) * len(slab)) for slab in slabs]
        return [piece for piece in pieces if piece]

    def _read_chunk(self, key: str, targets: Sequence[Destination]) -> None:
        try:
            with self.opener.open(key) as source:
                self._fill_from(source, targets)
        except AbsentError as error:
            if self.writes_fill:
                raise self._unreadable(self.opener.file_of(key), "absent") from error
            self._fill(targets)
        except (DamagedError, OSError, ValueError) as error:
            raise self._unreadable(self.opener.file_of(key), str(error)) from error

    def _fill_from(self, source: Source, targets: Sequence[Destination]) -> None:
        encoding = self.array.encoding
        if isinstance(encoding, NpyEncoding):
            fill_from_member(source, encoding, targets)
        else:
            fill_from_chunk(source, encoding, targets)

    def _fill(self, targets: Sequence[Destination]) -> None:
        # A writer that leaves out chunks of fill value; null and absent mean zero.
        value = np.asarray(self.array.encoding.fill_value or 0).astype(self.array.encoding.dtype)
        for target in targets:
            target.put(value)

    def _read_with_tensorstore(self, place: Destination) -> None:
        store = self.array.store
        spec = {
            "driver": self.array.encoding.driver,
            "kvstore": {**store.spec, "path": f"{store.spec.get('path', '')}{self.array.name}/"},
            "fill_missing_data_reads": not self.writes_fill,
        }
        try:
            opened = ts.open(spec, open=True, read=True, context=store.context).result()
            place.put(opened[slices(place.region)].read().result())
        except ValueError as error:
            raise self._unreadable(f"{store.directory}/{self.array.name}", str(error)) from error

    def _unreadable(self, file: str, reason: str) -> UnreadableLeafError:
        return UnreadableLeafError(
            f"stored leaf {render(self.path)} cannot be read: {reason}\nfile: {file} ({self.array.name})\n"
            "hint: a part of it is damaged, or was not copied: copy it again, or restore another step.",
            paths=[self.path],
        )


def _within(
    targets: Sequence[Destination], covered: Region, *, counted_from: Shape | None = None
) -> list[Destination]:
    """Returns the parts of targets inside a region, counted from its start or as told."""
    origin = starts(covered) if counted_from is None else counted_from
    found: list[Destination] = []
    for target in targets:
        shared = intersect(target.region, covered)
        if shared is not None:
            inside = slices(shift(shared, starts(target.region)))
            found.append(target.part(shift(shared, origin), inside))
    return found


def _nbytes(targets: Sequence[Destination], itemsize: int) -> int:
    return sum(math.prod(shape_of_region(target.region)) for target in targets) * itemsize


def fill_targets(
    checkpoint: Checkpoint,
    targets: Mapping[Path, Sequence[Destination]],
    concurrent_bytes: int | None,
    progress: Progress | None,
) -> None:
    """Reads the values of stored leaves into all the places they go to.

    Args:
        checkpoint: Where the leaves lie.
        targets: The places of each leaf.
        concurrent_bytes: Upper bound of the bytes under way between store and place.
        progress: Called with the number of bytes put in place since the last call.

    Raises:
        UnreadableLeafError: Stored bytes are absent or damaged.
    """
    values = checkpoint.values or {}
    tasks = [_copy_task(path, values[path], places) for path, places in targets.items() if path in values]
    stored = {path: places for path, places in targets.items() if path not in values}
    check_presence(checkpoint, {path: [place.region for place in places] for path, places in stored.items()})
    stores = {id(store): store for store in (checkpoint.arrays[path].store for path in stored)}
    with contextlib.ExitStack() as stack:
        openers = {
            key: stack.enter_context(contextlib.closing(Opener(store))) for key, store in stores.items()
        }
        for path, places in stored.items():
            array = checkpoint.arrays[path]
            reader = LeafReader(path, array, openers[id(array.store)], checkpoint.writes_fill)
            tasks += reader.tasks(places)
        local = all(store.local for store in stores.values())
        run_tasks(tasks, local=local, concurrent_bytes=concurrent_bytes, progress=progress)


def _copy_task(path: Path, value: np.ndarray[Any, Any], places: Sequence[Destination]) -> Task:
    def run() -> None:
        for place in places:
            place.put(value[(..., *slices(place.region))])

    return Task(path, value.nbytes, run)


def read_values(checkpoint: Checkpoint, paths: Iterable[Path]) -> dict[Path, np.ndarray[Any, Any]]:
    """Reads stored leaves whole, as NumPy arrays; a random key as its bits.

    Args:
        checkpoint: What `read_metadata` returned.
        paths: The stored leaves.

    Raises:
        UnreadableLeafError: Stored bytes are absent or damaged.
    """
    held = checkpoint.values or {}
    values = {path: held[path] for path in paths if path in held}
    layouts = {path: checkpoint.arrays[path].encoding for path in paths if path not in held}
    buffers = {path: np.empty(layout.shape, layout.dtype) for path, layout in layouts.items()}
    targets = {
        path: [Destination(whole(buffer.shape), buffer)] for path, buffer in buffers.items() if buffer.size
    }
    fill_targets(checkpoint, targets, None, None)
    return values | buffers
