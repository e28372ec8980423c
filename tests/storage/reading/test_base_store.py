"""Bytes by position: what is there is read, and what is not there is noticed."""

import contextlib
import json
import os
import pathlib
import resource
import sys
import threading
import time

import jax
import numpy as np
import pytest
import tensorstore as ts
from flax import nnx
from jax.sharding import SingleDeviceSharding

from orbax_nnx_handler import MissingParamError, restore
from orbax_nnx_handler.planning.core.errors import UnreadableLeafError
from orbax_nnx_handler.planning.core.leaves import WantedLeaf
from orbax_nnx_handler.storage.checkpoint.metadata import read_metadata
from orbax_nnx_handler.storage.reading import base_store, memory, read_values
from orbax_nnx_handler.storage.reading.base_store import (
    AbsentError,
    ChangedError,
    LocalData,
    LocalStream,
    RemoteData,
    RemoteStream,
    ShortReadError,
)
from orbax_nnx_handler.storage.reading.memory import ALIGNMENT, SHARED_BLOCK_BYTES, Arena, Memory
from orbax_nnx_handler.storage.stores.kvstore import states_of
from tests.storage.checkpoints import FORMATS, DiskFormat, as_remote, numbers, save

CONTENT = bytes(range(10))


@pytest.fixture
def local(tmp_path):
    (tmp_path / "file").write_bytes(CONTENT)
    files = LocalData(str(tmp_path), shared=True)
    yield files
    files.close()


@pytest.fixture
def remote(tmp_path):
    (tmp_path / "file").write_bytes(CONTENT)
    return RemoteData(ts.KvStore.open({"driver": "file", "path": f"{tmp_path}/"}).result())


def filled(files, start, *sizes):
    """What a local read puts into buffers of these sizes."""
    buffers = [bytearray(size) for size in sizes]
    files.read_into("file", start, [memoryview(buffer) for buffer in buffers])
    return [bytes(buffer) for buffer in buffers]


def test_a_range_of_a_local_file_goes_to_several_places_at_once(local):
    assert filled(local, 2, 3, 0, 4) == [CONTENT[2:5], b"", CONTENT[5:9]]


def test_more_places_than_one_call_takes_are_filled(local, monkeypatch):
    monkeypatch.setattr(base_store, "_BUFFERS", 2)

    assert filled(local, 1, 1, 2, 3, 2) == [CONTENT[1:2], CONTENT[2:4], CONTENT[4:7], CONTENT[7:9]]


def test_a_call_that_returns_less_than_asked_for_is_followed_by_another(local, monkeypatch):
    original = os.preadv
    monkeypatch.setattr(os, "preadv", lambda f, buffers, at: original(f, [buffers[0][:2]], at))

    assert filled(local, 0, 5, 4) == [CONTENT[:5], CONTENT[5:9]]


def test_a_range_of_an_object_is_the_same_bytes(remote):
    assert remote.content("file", remote.begin("file", 2, 5), 5) == CONTENT[2:7]
    assert remote.content("file", remote.begin_whole("file")) == CONTENT


def test_a_read_past_the_end_is_an_error(local, remote):
    with pytest.raises(ShortReadError, match="the file ends 2 bytes early"):
        filled(local, 6, 6)
    with pytest.raises(ValueError, match="OUT_OF_RANGE"):
        remote.content("file", remote.begin("file", 6, 6), 6)


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_short_answer_is_asked_for_again_a_few_times(times, remote, caplog):
    asked = []

    class Short:
        def read(self, key, *, byte_range=None):
            asked.append(key)
            cut = 1 if len(asked) <= times else 0
            return remote._base.read(key, byte_range=slice(byte_range.start, byte_range.stop - cut))

    files = RemoteData(Short())
    with contextlib.nullcontext() if times < 3 else pytest.raises(ShortReadError, match="4 of 5 bytes"):
        assert files.content("file", files.begin("file", 2, 5), 5) == CONTENT[2:7]
    assert len(asked) == min(times + 1, 3)
    assert "too little for 5 bytes of file; asking again" in caplog.text


def test_an_answer_of_another_length_is_an_error(remote):
    with pytest.raises(ShortReadError, match="the store returned 4 of 6 bytes"):
        remote.content("file", remote.begin("file", 6, 4), 6)


def test_what_is_not_there_is_absent(local, remote):
    with pytest.raises(AbsentError):
        local.read_into("other", 0, [memoryview(bytearray(1))])
    with pytest.raises(AbsentError):
        remote.content("other", remote.begin("other", 0, 1), 1)


def test_ranges_of_two_versions_are_never_put_together(remote, tmp_path):
    remote.content("file", remote.begin("file", 0, 5), 5)
    (tmp_path / "new").write_bytes(CONTENT)
    (tmp_path / "new").replace(tmp_path / "file")

    with pytest.raises(ChangedError, match="was written to while it was read"):
        remote.content("file", remote.begin("file", 5, 5), 5)


def test_a_stream_gives_the_bytes_of_a_run_in_order(local, remote):
    ranges = iter([(1, 3), (4, 3), (7, 2)])
    for stream in (LocalStream(local, "file", 1, 8), RemoteStream(remote, "file", ranges, 2)):
        first = bytearray(2)
        stream.read_into(memoryview(first))
        stream.skip(3)
        rest = b"".join(iter(lambda stream=stream: stream.read(2), b""))

        assert (first, rest) == (CONTENT[1:3], CONTENT[6:9])


def test_what_many_files_are_is_asked_for_together(tmp_path):
    names = [f"f{number}" for number in range(200)]
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(bytes(number))

    found = states_of(str(tmp_path), [*names, "none"])

    assert found.pop("none") is None
    assert {name: state.size for name, state in found.items()} == {f"f{n}": n for n in range(200)}


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


def wanted_leaves(count, sharding):
    dtype = np.dtype(np.float32)
    return [
        WantedLeaf(path=(n,), kind=None, shape=(1 << 18,), dtype=dtype, sharding=sharding)
        for n in range(count)
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="no other system backs memory on request")
def test_memory_that_is_expected_has_its_pages_before_it_is_filled():
    with Memory() as memory:
        memory.expect(wanted_leaves(24, SingleDeviceSharding(jax.devices()[0])))
        memory._thread.join()
        arena = Arena(memory)
        buffers = [arena.allocate((1 << 18,), np.dtype(np.float32)) for _ in range(24)]
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        for buffer in buffers:
            buffer[:] = 1.0
        faults = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before

    # 24 MB have 6,000 pages.
    assert faults < 600
    assert all((buffer == 1.0).all() for buffer in buffers)


def test_memory_is_not_made_ready_for_leaves_that_live_elsewhere_or_are_too_few():
    with Memory() as memory:
        memory.expect(wanted_leaves(24, None))
        memory.expect(wanted_leaves(2, SingleDeviceSharding(jax.devices()[0])))

        assert memory._thread is None


def test_without_another_thread_memory_is_what_it_is(monkeypatch):
    def refuse(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)

    with Memory() as memory:
        memory.expect(wanted_leaves(24, SingleDeviceSharding(jax.devices()[0])))
        buffer = Arena(memory).allocate((4,), np.dtype(np.float32))

    assert buffer.shape == (4,)


def test_no_more_memory_is_made_ready_than_planning_takes_time_for(monkeypatch):
    monkeypatch.setattr(Memory, "MOST_BYTES", 2 * SHARED_BLOCK_BYTES)

    with Memory() as memory:
        memory.expect(wanted_leaves(24, SingleDeviceSharding(jax.devices()[0])))
        memory._thread.join()

        assert len(memory._blocks) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="descriptors are listed in a folder of Linux")
def test_once_memory_is_given_away_neither_a_thread_nor_a_file_is_left():
    before = len(list(pathlib.Path("/proc/self/fd").iterdir())), threading.active_count()

    with Memory() as memory:
        memory.expect(wanted_leaves(24, SingleDeviceSharding(jax.devices()[0])))

    assert (len(list(pathlib.Path("/proc/self/fd").iterdir())), threading.active_count()) == before


RAW_FORMATS = [
    DiskFormat(ocdbt, zarr3, compressed=False) for ocdbt in (True, False) for zarr3 in (True, False)
]


@pytest.mark.parametrize("disk_format", RAW_FORMATS, ids=str)
def test_what_is_read_and_what_is_absent_stay_where_memory_is_made_ready_late(
    tmp_path, monkeypatch, disk_format
):
    values = {"absent": np.full(3 << 18, 7, np.float32)} | {
        f"leaf_{n}": numbers((3 << 18,)) for n in range(12)
    }
    path = save(tmp_path / "item", {"params": values}, disk_format)
    _without_its_chunk(path, "params.absent", disk_format, 7)
    leaf = jax.ShapeDtypeStruct((3 << 18,), np.float32, sharding=SingleDeviceSharding(jax.devices()[0]))
    target = nnx.State({name: nnx.Param(leaf) for name in values})

    def late(_, blocks):
        time.sleep(0.5)  # Longer than all of the planning.
        for block in blocks:
            block[:] = bytes(len(block))

    monkeypatch.setattr(memory, "_read_some", late)
    restored = nnx.to_pure_dict(restore(path, target))

    for name, value in values.items():
        np.testing.assert_array_equal(restored[name], value)


def _without_its_chunk(path, name, disk_format, fill_value):
    """Removes the one chunk of an array, as a writer does that leaves out what equals the fill value."""
    if disk_format.ocdbt:
        store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{path}/"}).result()
    else:
        store = ts.KvStore.open({"driver": "file", "path": f"{path}/"}).result()
    fields, chunk = ("zarr.json", "c/0") if disk_format.zarr3 else (".zarray", "0")
    assert store[f"{name}/{chunk}"]
    del store[f"{name}/{chunk}"]
    described = json.loads(store[f"{name}/{fields}"]) | {"fill_value": fill_value}
    store[f"{name}/{fields}"] = json.dumps(described).encode()
    content = (path / "_METADATA").read_text()
    (path / "_METADATA").write_text(content.replace('"store_array_data_equal_to_fill_value": true', '"x": 0'))


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("memfd_create", OSError("not permitted")),
        ("memfd_create", AttributeError("memfd_create")),
        ("preadv", OSError("bad address")),
        ("preadv", None),
    ],
    ids=["that permits no such file", "without such files", "that reads nothing", "that reads little"],
)
def test_memory_is_what_it_is_on_a_system(monkeypatch, call, error):
    preadv = os.preadv

    def little(*args):
        if error is not None:
            raise error
        return preadv(args[0], [args[1][0][: 3 << 20]], args[2])

    monkeypatch.setattr(os, call, little, raising=False)

    with Memory() as blocks:
        blocks.expect(wanted_leaves(24, SingleDeviceSharding(jax.devices()[0])))
        block = blocks.take()
        blocks.settle()
        block[:] = 1

    assert block.size == SHARED_BLOCK_BYTES
    assert block.all()


@pytest.mark.skipif(sys.platform != "linux", reason="no other system says what is resident")
def test_a_refused_restore_gives_back_the_memory_that_was_made_ready(tmp_path):
    save(tmp_path / "item", {"params": {"other": numbers((4,))}}, FORMATS[0])
    leaf = jax.ShapeDtypeStruct((3 << 18,), np.float32, sharding=SingleDeviceSharding(jax.devices()[0]))
    target = nnx.State({f"layer_{n}": nnx.Param(leaf) for n in range(64)})  # 0.2 GB

    def resident():
        return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    with contextlib.suppress(MissingParamError):
        restore(tmp_path / "item", target)  # What is imported and compiled once is.
    before = resident()
    with pytest.raises(MissingParamError) as refused:
        restore(tmp_path / "item", target)

    assert resident() - before < 20e6
    assert len(refused.value.paths) == 64  # The error is held, with what its traceback holds.


@pytest.mark.parametrize("disk_format", FORMATS, ids=str)
@pytest.mark.parametrize("listed", [True, False])
def test_a_store_without_files_of_its_own_gives_the_same_values(tmp_path, monkeypatch, disk_format, listed):
    monkeypatch.setenv("ORBAX_NNX_RANGE_BYTES", "256")
    tree = {"w": numbers((16, 32)), "v": numbers((5,))}
    checkpoint = as_remote(read_metadata(save(tmp_path / "item", tree, disk_format)), listed=listed)

    values = read_values(checkpoint, [("w",), ("v",)])

    for name, value in tree.items():
        np.testing.assert_array_equal(values[(name,)], np.asarray(value))
