"""Stored leaves, read into all their places: what is needed of each chunk, and who reads it.

One rule chooses: what is stored raw or packed with zstd, a chunk a value or a chunk a shard, and the members
of NumPy archives are read by this package's engine; an array in any other encoding (codec "other") is
opened by TensorStore. Which chunks are absent is known from the catalog before anything is read.
"""

import contextlib
import dataclasses
import functools
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from etils import epath

from orbax_nnx_handler.planning.core.errors import UnreadableLeafError
from orbax_nnx_handler.planning.core.paths import Path, printable, render
from orbax_nnx_handler.planning.core.regions import (
    Region,
    slices,
    whole,
)
from orbax_nnx_handler.storage.arithmetic import LostValueError
from orbax_nnx_handler.storage.checkpoint.metadata import Checkpoint, StoredArray
from orbax_nnx_handler.storage.checkpoint.npz import NpyEncoding
from orbax_nnx_handler.storage.reading.base_store import (
    AbsentError,
    ChangedError,
    ShortReadError,
    open_data,
)
from orbax_nnx_handler.storage.reading.byte_plan import Limits, WantedBytes, limits_of
from orbax_nnx_handler.storage.reading.chunks import (
    ChunkPiece,
    DamagedError,
    pieces_of_chunk,
    pieces_of_member,
)
from orbax_nnx_handler.storage.reading.engine import Progress, Task, naming_lost_values, read_pieces
from orbax_nnx_handler.storage.reading.jobs import Destination
from orbax_nnx_handler.storage.reading.streams import Content
from orbax_nnx_handler.storage.stores.kvstore import Store, files_at
from orbax_nnx_handler.storage.stores.locations import WRITTEN_TO, reason_and_hint
from orbax_nnx_handler.storage.stores.ocdbt import Extent

_REGION = operator.attrgetter("region")


def check_presence(checkpoint: Checkpoint, targets: Mapping[Path, Sequence[Destination]]) -> None:
    """Raises if the catalog shows that a chunk is absent which a place needs.

    Where the writer left out chunks of zeros, an absent chunk is no loss.

    Raises:
        UnreadableLeafError: Lists every leaf and every absent chunk.
    """
    if not checkpoint.writes_fill:
        return
    arrays = checkpoint.arrays
    found = {path: arrays[path].unlisted(map(_REGION, places)) for path, places in targets.items()}
    absent = {path: keys for path, keys in found.items() if keys}
    if absent:
        lines = [f"  {render(path)}: {printable(', '.join(keys))}" for path, keys in absent.items()]
        raise UnreadableLeafError(
            "\n".join(
                [f"chunks of {len(absent)} stored leaves are absent from {checkpoint.directory}:", *lines]
            ),
            paths=list(absent),
        )


@dataclasses.dataclass(slots=True, kw_only=True)
class LeafToRead:
    """A stored leaf and what its absence means.

    Attributes:
        path: The leaf, for messages.
        array: Where it lies.
        writes_fill: Whether an absent chunk is a loss.
    """

    path: Path
    array: StoredArray
    writes_fill: bool

    def unreadable(self, file: str, error: Exception) -> UnreadableLeafError:
        """Returns the error that names leaf and file."""
        reason = str(error)
        hint = "a part of it is damaged, or was not copied: copy it again, or restore another step."
        if isinstance(error, ChangedError):
            hint = WRITTEN_TO
        elif not isinstance(error, AbsentError | ShortReadError | DamagedError):
            # What a store or a disk answers has a remedy of its own.
            reason, hint = reason_and_hint(file, error)
        place = printable(f"{file} ({self.array.name})")
        return UnreadableLeafError(
            f"stored leaf {render(self.path)} cannot be read: {printable(reason)}\nfile: {place}",
            paths=[self.path],
            hints=[hint],
        )

    def read_with_tensorstore(self, place: Destination) -> None:
        """Has TensorStore read and decode what one place needs."""
        store = self.array.store
        try:
            opened = store.open_array(
                self.array.name, self.array.encoding.driver, writes_fill=self.writes_fill
            )
            place.put(opened[slices(place.region)].read().result())
        except LostValueError as error:
            raise error.of(self.path) from None
        except (ValueError, OSError) as error:
            raise self.unreadable(f"{store.directory}/{self.array.name}", error) from error


@dataclasses.dataclass(slots=True)
class _Chunk:
    """One chunk of a leaf and the places that its values go to, counted from its own start."""

    leaf: LeafToRead
    key: str
    targets: Sequence[Destination]

    @property
    def nbytes(self) -> int:
        return sum(target.view.nbytes for target in self.targets)

    @property
    def path(self) -> Path:
        """The leaf."""
        return self.leaf.path

    def unreadable(self, error: Exception) -> UnreadableLeafError:
        """Returns the error that names leaf and file."""
        store = self.leaf.array.store
        return self.leaf.unreadable(f"{store.directory}/{store.file_of(self.key)}", error)

    def fill_absent(self) -> None:
        """Puts the fill value into the places of an absent chunk; null and none mean zero.

        Raises:
            UnreadableLeafError: The writer left out no chunk, so that this one is lost.
        """
        if self.leaf.writes_fill:
            raise self.unreadable(AbsentError("absent"))
        encoding = self.leaf.array.encoding
        value = np.asarray(encoding.fill_value or 0).astype(encoding.dtype)
        for target in self.targets:
            target.put(value)

    def pieces(self, extent: Extent, limits: Limits) -> list[ChunkPiece]:
        """Returns what is needed of the chunk's bytes."""
        encoding = self.leaf.array.encoding
        try:
            if isinstance(encoding, NpyEncoding):
                return list(pieces_of_member(self, encoding, extent, self.targets, limits))
            return pieces_of_chunk(self, encoding, extent, self.targets, limits)
        except DamagedError as error:
            raise self.unreadable(error) from error

    def fill_from(self, content: Content) -> None:
        """Puts the values into place from the whole of the chunk's bytes."""
        assert isinstance(content, memoryview)
        for piece in self.pieces(Extent(self.key, 0, len(content)), _AT_ONCE):
            runs = [content[start : start + size] for start, size in piece.wanted.runs]
            piece.take(runs[0] if len(runs) == 1 else memoryview(b"".join(runs)))


def _fill_absent(chunk: _Chunk, _: Content) -> None:
    chunk.fill_absent()


# For bytes that are in memory: nothing is cut, nothing streamed.
_AT_ONCE = Limits(gap_bytes=0, range_bytes=1 << 62, requests=1, packed_bytes=1 << 62, member_bytes=1 << 62)


def fill_targets(
    checkpoint: Checkpoint,
    targets: Mapping[Path, Sequence[Destination]],
    concurrent_bytes: int | None,
    progress: Progress | None,
    settle: Callable[[], None] = lambda: None,
) -> None:
    """Reads stored leaves into all their places, each stored byte once.

    `settle` is called before a place is written to.

    Raises:
        UnreadableLeafError: Stored bytes are absent or damaged.
    """
    values, arrays = checkpoint.values or {}, checkpoint.arrays
    tasks = [_copy(path, values[path], targets[path]) for path in values if path in targets]
    stored = {path: targets[path] for path in targets if path not in values} if tasks else targets
    check_presence(checkpoint, stored)
    by_store: dict[int, dict[Path, Sequence[Destination]]] = defaultdict(dict)
    for path, places in stored.items():
        by_store[id(arrays[path].store)][path] = places
    groups: list[dict[Path, Sequence[Destination]]] = [*by_store.values()] or [{}]
    share = None if concurrent_bytes is None else concurrent_bytes // len(groups)
    beside = [tasks, *[[]] * (len(groups) - 1)]
    read = functools.partial(
        _read_from_one_store, checkpoint, concurrent_bytes=share, progress=progress, settle=settle
    )
    if len(groups) == 1 or all(checkpoint.arrays[path].store.local for path in stored):
        for group, more in zip(groups, beside, strict=True):
            read(group, more)
        return
    # Two items of one step, or a database beside single arrays: nobody waits for the other.
    with ThreadPoolExecutor(len(groups)) as pool:
        for future in [pool.submit(read, *each) for each in zip(groups, beside, strict=True)]:
            future.result()


def _copy(path: Path, value: np.ndarray[Any, Any], places: Sequence[Destination]) -> Task:
    def run() -> None:
        with naming_lost_values(path):
            for place in places:
                place.put(value[(..., *slices(place.region))])

    return Task(run=run, nbytes=value.nbytes)


def _read_from_one_store(
    checkpoint: Checkpoint,
    targets: Mapping[Path, Sequence[Destination]],
    tasks: Sequence[Task],
    *,
    concurrent_bytes: int | None,
    progress: Progress | None,
    settle: Callable[[], None],
) -> None:
    store = next((checkpoint.arrays[path].store for path in targets), None)
    limits = limits_of(local=store is None or store.local)
    if concurrent_bytes is not None:
        most = max(limits.range_bytes, concurrent_bytes // 4)
        limits = dataclasses.replace(limits, packed_bytes=min(limits.packed_bytes, most))
    chunks: list[_Chunk] = []
    beside = list(tasks)
    for path, places in targets.items():
        leaf = LeafToRead(path=path, array=checkpoint.arrays[path], writes_fill=checkpoint.writes_fill)
        if leaf.array.encoding.codec == "other":
            if _has_a_file_a_chunk(leaf.array.store):
                leaf.array.store.look_at(list(leaf.array.keys(place.region for place in places)))
            beside += [_tensorstore_task(leaf, place) for place in places]
        else:
            chunks += chunks_of(leaf, places)
    with contextlib.closing(open_data(store)) as files:
        pieces = list(pieces_to_read(store, chunks, limits)) if store is not None else []
        settle()
        read_pieces(
            files,
            pieces,
            limits,
            tasks=beside,
            concurrent_bytes=concurrent_bytes,
            progress=progress,
        )


def _tensorstore_task(leaf: LeafToRead, place: Destination) -> Task:
    return Task(run=functools.partial(leaf.read_with_tensorstore, place), nbytes=place.view.nbytes)


def chunks_of(leaf: LeafToRead, places: Sequence[Destination]) -> Iterator[_Chunk]:
    """Yields the chunks that the places need, each with its parts of them."""
    encoding = leaf.array.encoding
    filled = [place for place in places if place.view.size]
    if encoding.is_one_chunk:
        if filled:
            yield _Chunk(leaf, f"{leaf.array.name}/{encoding.first_key}", filled)
        return
    chunks: dict[tuple[int, ...], tuple[Region, list[Destination]]] = {}
    for place in filled:
        for index in encoding.chunks(place.region):
            if index not in chunks:
                chunks[index] = encoding.chunk_region(index), []
            covered, targets = chunks[index]
            targets += _within(place, covered)
    for index, (_, targets) in chunks.items():
        if targets:
            yield _Chunk(leaf, leaf.array.key(index), targets)


def _within(target: Destination, covered: Region) -> list[Destination]:
    """Returns the part of a target inside a region, counted from the region's start, if there is one."""
    # One loop: a stack that feeds a hundred layers comes here a million times on a host.
    region: list[tuple[int, int]] = []
    inside: list[slice] = []
    for (first, stop), (low, high) in zip(target.region, covered, strict=True):
        start, end = max(first, low), min(stop, high)
        if start >= end:
            return []
        region.append((start - low, end - low))
        inside.append(slice(start - first, end - first))
    return [target.part(tuple(region), tuple(inside))]


def pieces_to_read(store: Store, chunks: Sequence[_Chunk], limits: Limits) -> Iterator[ChunkPiece]:
    """Yields the pieces of all chunks, as far as a chunk is there."""
    states = store.look_at([chunk.key for chunk in chunks]) if _has_a_file_a_chunk(store) else {}
    catalog = store.catalog or {}
    for chunk in chunks:
        value = catalog.get(chunk.key)
        extent, state = value if isinstance(value, Extent) else None, states.get(chunk.key)
        if isinstance(state, OSError):
            raise chunk.unreadable(state)
        if extent is None and state is not None:
            extent = Extent(chunk.key, 0, state.size)
        if extent is not None:
            yield from chunk.pieces(extent, limits)
        elif chunk.key in states or store.lacks(chunk.key):
            # Not here: memory may be written to only when all is planned.
            wanted, fill = WantedBytes(chunk.key, ()), functools.partial(_fill_absent, chunk)
            yield ChunkPiece(chunk, wanted, chunk.nbytes, use=fill, content=b"")
        else:
            # A value in the catalog itself; or nobody knows how long it is, and it is asked for as a whole.
            yield ChunkPiece(
                chunk,
                WantedBytes(chunk.key, ()),
                chunk.nbytes,
                use=chunk.fill_from,
                content=store.inline(chunk.key),
            )


def _has_a_file_a_chunk(store: Store) -> bool:
    return store.kind == "files" and store.local


def check_one_save(checkpoint: Checkpoint) -> None:
    """Raises where a save has written to the same files since the metadata was read.

    Raises:
        UnreadableLeafError: Values may be of either save.
    """
    files = files_at(checkpoint.directory)
    stores = {id(array.store): array.store for array in checkpoint.arrays.values()}
    try:
        was_written_to = any(store.was_written_to for store in stores.values())
    except (ValueError, OSError) as error:
        reason, hint = reason_and_hint(str(checkpoint.directory), error)
        raise UnreadableLeafError(
            f"nobody can tell whether {checkpoint.directory} was saved again, or deleted, while it was read: "
            f"{printable(reason)}",
            hints=[hint],
        ) from error
    if was_written_to or any(
        files.content(epath.Path(file)) != content for file, content in checkpoint.stamps.items()
    ):
        raise UnreadableLeafError(
            f"{checkpoint.directory} was saved again, or deleted, while it was read: its values may be of "
            "either save.",
            hints=[WRITTEN_TO],
        )


def read_values(checkpoint: Checkpoint, paths: Iterable[Path]) -> dict[Path, np.ndarray[Any, Any]]:
    """Reads stored leaves whole, as NumPy arrays; a random key as its bits.

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
