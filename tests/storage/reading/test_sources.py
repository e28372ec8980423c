"""Bytes by position: what is there is read, and what is not there is noticed."""

import dataclasses
import os

import numpy as np
import pytest

from orbax_nnx_handler.planning.core.errors import UnreadableLeafError
from orbax_nnx_handler.storage.checkpoint.metadata import read_metadata
from orbax_nnx_handler.storage.reading import fetch as leaf_reader
from orbax_nnx_handler.storage.reading import read_values, sources
from orbax_nnx_handler.storage.reading.arrays import ALIGNMENT, SHARED_BLOCK_BYTES, Arena
from orbax_nnx_handler.storage.reading.sources import FileSource, ShortReadError, StoreSource
from tests.storage.checkpoints import FORMATS, DiskFormat, numbers, save


@pytest.fixture
def ten_bytes(tmp_path):
    (tmp_path / "file").write_bytes(bytes(range(10)))
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    yield FileSource(descriptor, 2, 8), StoreSource(bytes(range(2, 10)))
    os.close(descriptor)


def test_a_run_of_a_file_and_a_value_in_memory_give_the_same_bytes(ten_bytes):
    for source in ten_bytes:
        target = bytearray(3)

        source.read_into(4, memoryview(target))

        assert target == bytes([6, 7, 8])


def test_a_read_past_the_end_is_an_error(ten_bytes):
    for source in ten_bytes:
        with pytest.raises(ShortReadError, match="2 bytes early"):
            source.read_into(4, memoryview(bytearray(6)))


def test_a_file_longer_than_its_chunk_is_damaged(tmp_path):
    path = save(tmp_path / "item", {"w": numbers((8, 8))}, DiskFormat(False, False, False))
    with (path / "w" / "0.0").open("ab") as file:
        file.write(b"more")

    with pytest.raises(UnreadableLeafError, match="holds 260 bytes where a chunk has 256"):
        read_values(read_metadata(path), [("w",)])


def test_buffers_are_aligned_and_do_not_overlap():
    arena = Arena()

    buffers = [arena.allocate((size,), np.dtype(np.uint8)) for size in (1, 63, 64, 65, 0, 3 << 20, 1)]

    starts = [buffer.ctypes.data for buffer in buffers]
    ends = [start + buffer.size for start, buffer in zip(starts, buffers, strict=True)]
    assert all(start % ALIGNMENT == 0 for start in starts)
    for number, start in enumerate(starts):
        assert not any(
            start < ends[n] and starts[n] < ends[number] for n in range(len(starts)) if n != number
        )


def test_small_leaves_share_blocks_and_keep_alive_one_block_at_most():
    arena = Arena()

    small = arena.allocate((16,), np.dtype(np.uint8))

    owner = small
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    assert owner.size <= SHARED_BLOCK_BYTES + (2 << 20)


@pytest.mark.parametrize("disk_format", FORMATS, ids=str)
@pytest.mark.parametrize("listed", [True, False])
def test_a_store_without_files_of_its_own_gives_the_same_values(tmp_path, monkeypatch, disk_format, listed):
    monkeypatch.setattr(sources, "_WHOLE_BYTES", 512)
    monkeypatch.setattr(leaf_reader, "_PIECE_BYTES", 256)
    tree = {"w": numbers((16, 32)), "v": numbers((5,))}
    checkpoint = as_remote(read_metadata(save(tmp_path / "item", tree, disk_format)), listed=listed)

    values = read_values(checkpoint, [("w",), ("v",)])

    for name, value in tree.items():
        np.testing.assert_array_equal(values[(name,)], np.asarray(value))


def test_a_large_remote_chunk_is_requested_once_per_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_WHOLE_BYTES", 512)
    monkeypatch.setattr(leaf_reader, "_PIECE_BYTES", 256)
    path = save(tmp_path / "item", {"w": numbers((16, 32))}, DiskFormat(True, True, False))
    requested = []
    original = sources.RangeSource.read_into

    def noting(self, start, target):
        requested.append(len(target))
        original(self, start, target)

    monkeypatch.setattr(sources.RangeSource, "read_into", noting)

    read_values(as_remote(read_metadata(path), listed=True), [("w",)])

    pieces = 16 * 32 * 4 // 256
    assert sum(requested) == 16 * 32 * 4 + pieces * 20


def as_remote(checkpoint, *, listed):
    """The same checkpoint as if its store were behind a network."""
    arrays = {}
    for path, array in checkpoint.arrays.items():
        catalog = array.store.catalog if listed else None
        store = dataclasses.replace(array.store, local=False, catalog=catalog)
        arrays[path] = dataclasses.replace(array, store=store)
    return dataclasses.replace(checkpoint, arrays=arrays)
