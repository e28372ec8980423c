"""What is asked of a store, in how many trips, and what becomes of answers that are wrong."""

import os
import pathlib

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from orbax_nnx_handler.planning.core.errors import UnreadableLeafError
from orbax_nnx_handler.storage.checkpoint.metadata import read_metadata
from orbax_nnx_handler.storage.reading import engine, read_arrays, read_values
from orbax_nnx_handler.storage.reading.base_store import LocalData
from orbax_nnx_handler.storage.reading.byte_plan import DISK
from orbax_nnx_handler.storage.reading.engine import Task, read_pieces
from orbax_nnx_handler.storage.reading.memory import Workers
from tests.sampled import sampled
from tests.storage.checkpoints import FORMATS, DiskFormat, as_remote, save
from tests.storage.jobs import plain_jobs
from tests.storage.reading.networks import behind_a_network

RAW, ZSTD = DiskFormat(True, True, False), DiskFormat(True, True, True)


def noise(shape):
    """Values that do not pack."""
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def stored_bytes(checkpoint):
    """The bytes of all data files that hold the checkpoint's leaves."""
    arrays = checkpoint.arrays.values()
    extents = [array.store.listed_extent(key) for array in arrays for key in keys_of(array)]
    return sum(extent.size for extent in extents if extent is not None)


def keys_of(array):
    region = tuple((0, size) for size in array.encoding.shape)
    return [array.key(index) for index in array.encoding.chunks(region)]


@pytest.mark.parametrize("disk_format", [RAW, ZSTD], ids=str)
def test_many_small_leaves_take_one_trip_and_a_request_a_file(tmp_path, monkeypatch, disk_format):
    tree = {f"w{number}": noise((20, 30)) + number for number in range(300)}
    checkpoint = read_metadata(save(tmp_path / "item", tree, disk_format))

    with behind_a_network(monkeypatch, checkpoint.directory) as store:
        found = read_arrays(as_remote(checkpoint, listed=True), plain_jobs(checkpoint))

    assert store.trips == 1
    assert len(store.asked) == len({key for key, _, _ in store.asked}) <= 20
    assert store.nbytes <= 1.1 * stored_bytes(checkpoint)
    for name, value in tree.items():
        np.testing.assert_array_equal(found[(name,)], value)


@pytest.mark.parametrize("disk_format", [RAW, ZSTD], ids=str)
def test_a_large_leaf_takes_one_trip_of_parallel_ranges(tmp_path, monkeypatch, disk_format):
    tree = {"w": noise((512, 512))}
    checkpoint = read_metadata(save(tmp_path / "item", tree, disk_format))
    monkeypatch.setenv("ORBAX_NNX_RANGE_BYTES", str(100 << 10))

    with behind_a_network(monkeypatch, checkpoint.directory) as store:
        found = read_arrays(as_remote(checkpoint, listed=True), plain_jobs(checkpoint))

    np.testing.assert_array_equal(found[("w",)], tree["w"])
    assert (store.trips, store.nbytes) == (1, stored_bytes(checkpoint))
    assert len(store.asked) == -(-stored_bytes(checkpoint) // (100 << 10))


@pytest.mark.parametrize("disk_format", [RAW, ZSTD], ids=str)
def test_a_chunk_too_large_to_be_held_is_unpacked_while_its_ranges_come(tmp_path, monkeypatch, disk_format):
    tree = {"w": noise((512, 512))}
    checkpoint = read_metadata(save(tmp_path / "item", tree, disk_format))
    monkeypatch.setenv("ORBAX_NNX_RANGE_BYTES", str(20 << 10))

    with behind_a_network(monkeypatch, checkpoint.directory) as store:
        jobs = plain_jobs(checkpoint)
        found = read_arrays(as_remote(checkpoint, listed=True), jobs, concurrent_bytes=200 << 10)

    np.testing.assert_array_equal(found[("w",)], tree["w"])
    assert store.most_bytes <= 200 << 10


@pytest.mark.parametrize("spec", [("fsdp",), (None, "fsdp"), (None, ("fsdp", "tensor"))])
@pytest.mark.parametrize("disk_format", [RAW, ZSTD], ids=str)
def test_rows_and_columns_on_many_devices_read_each_byte_once(tmp_path, monkeypatch, mesh, disk_format, spec):
    tree = {"w": noise((256, 512))}
    checkpoint = read_metadata(save(tmp_path / "item", tree, disk_format))
    jobs = plain_jobs(checkpoint, NamedSharding(mesh, PartitionSpec(*spec)))

    with behind_a_network(monkeypatch, checkpoint.directory) as store:
        found = read_arrays(as_remote(checkpoint, listed=True), jobs)

    np.testing.assert_array_equal(found[("w",)], tree["w"])
    assert (store.trips, len(store.asked), store.nbytes) == (1, 1, stored_bytes(checkpoint))


def test_columns_of_one_host_come_in_one_trip_and_far_runs_by_themselves(tmp_path, monkeypatch):
    tree = {"w": noise((16, 1 << 14))}
    checkpoint = as_remote(read_metadata(save(tmp_path / "item", tree, RAW)), listed=True)
    monkeypatch.setenv("ORBAX_NNX_GAP_BYTES", str(8 << 10))
    job = one_column_block(checkpoint, 1 << 10)

    with behind_a_network(monkeypatch, checkpoint.directory) as store:
        found = read_arrays(checkpoint, [job])

    np.testing.assert_array_equal(found[("w",)], tree["w"][:, : 1 << 10])
    # One run a row, and the shard's index.
    assert (store.trips, len(store.asked), store.nbytes) == (1, 16 + 1, 16 * 4096 + 20)


def test_two_stores_are_asked_in_the_same_trip(tmp_path, monkeypatch):
    import dataclasses

    tree = {"w": noise((64, 64))}
    path = save(tmp_path / "item", tree, ZSTD)
    checkpoint = as_remote(read_metadata(path), listed=True)
    (array,) = checkpoint.arrays.values()
    (leaf,) = checkpoint.leaves.values()
    again = dataclasses.replace(array, store=dataclasses.replace(array.store))
    checkpoint = dataclasses.replace(
        checkpoint,
        arrays={("w",): array, ("v",): again},
        leaves={("w",): leaf, ("v",): dataclasses.replace(leaf, path=("v",))},
    )

    with behind_a_network(monkeypatch, path) as store:
        found = read_arrays(checkpoint, plain_jobs(checkpoint))

    assert (store.trips, len(store.asked)) == (1, 2)
    for name in "wv":
        np.testing.assert_array_equal(found[(name,)], tree["w"])


def one_column_block(checkpoint, width):
    import dataclasses

    from orbax_nnx_handler.planning.core.recipes import Read, Slice

    (job,) = plain_jobs(checkpoint)
    return dataclasses.replace(job, recipe=Slice(Read(("w",)), 1, 0, width), shape=(16, width))


def test_no_more_requests_are_under_way_than_allowed(tmp_path, monkeypatch):
    tree = {f"w{number}": noise((64, 64)) + number for number in range(20)}
    checkpoint = read_metadata(save(tmp_path / "item", tree, DiskFormat(False, False, False)))
    monkeypatch.setenv("ORBAX_NNX_REQUESTS", "7")

    with behind_a_network(monkeypatch, checkpoint.directory) as store:
        read_arrays(as_remote(checkpoint, listed=True), plain_jobs(checkpoint))

    assert (store.most_requests, len(store.asked)) == (7, 20)
    assert store.trips == 3


def test_no_more_bytes_are_under_way_than_the_window_holds(tmp_path, monkeypatch):
    tree = {f"w{number}": noise((64, 64)) + number for number in range(20)}
    checkpoint = read_metadata(save(tmp_path / "item", tree, RAW))
    monkeypatch.setenv("ORBAX_NNX_RANGE_BYTES", str(17 << 10))

    with behind_a_network(monkeypatch, checkpoint.directory) as store:
        jobs = plain_jobs(checkpoint)
        found = read_arrays(as_remote(checkpoint, listed=True), jobs, concurrent_bytes=80 << 10)

    assert 0 < store.most_bytes <= 80 << 10
    for name, value in tree.items():
        np.testing.assert_array_equal(found[(name,)], value)


@pytest.mark.parametrize(
    ("answer", "listed", "disk_format"),
    sampled(["nothing", "less", "empty", "other bytes"], [True, False], FORMATS),
)
def test_a_wrong_answer_is_an_error_that_names_leaf_and_object_and_never_a_value(
    tmp_path, monkeypatch, disk_format, listed, answer
):
    path = save(tmp_path / "item", {"a": {"w": noise((64, 64))}}, disk_format)
    checkpoint = as_remote(read_metadata(path), listed=listed and disk_format.ocdbt)
    (array,) = checkpoint.arrays.values()
    if disk_format.ocdbt and not listed:
        pytest.skip("without a catalog the database itself is asked")
    if answer == "other bytes" and not disk_format.zarr3 and not disk_format.compressed:
        pytest.skip("uncompressed Zarr 2 has no redundancy: any bytes are values")
    changes = {
        "nothing": lambda _: None,
        "less": lambda content: content[:-1],
        "empty": lambda _: b"",
        "other bytes": lambda content: b"\x55" * len(content),
    }

    with behind_a_network(monkeypatch, path) as store:
        store.change = lambda _key, _start, content: changes[answer](content)
        with pytest.raises(UnreadableLeafError) as raised:
            read_values(checkpoint, [("a", "w")])

    key = array.key((0, 0))
    extent = array.store.listed_extent(key)
    message = str(raised.value)
    assert message.startswith("stored leaf a/w cannot be read: ")
    assert f"file: {path}/{extent.file if extent and listed else key}" in message
    assert raised.value.paths == (("a", "w"),)


def test_a_leaf_of_two_versions_of_an_object_is_an_error(tmp_path, monkeypatch):
    path = save(tmp_path / "item", {"w": noise((64, 64))}, RAW)
    checkpoint = as_remote(read_metadata(path), listed=True)
    monkeypatch.setenv("ORBAX_NNX_RANGE_BYTES", "9000")

    with behind_a_network(monkeypatch, path) as store:
        store.version = lambda _key, start: b"1" if start < 8000 else b"2"
        with pytest.raises(UnreadableLeafError) as raised:
            read_arrays(checkpoint, plain_jobs(checkpoint))

    assert "stored leaf w cannot be read: the object was written to while it was read" in str(raised.value)
    assert "hint: restore again once nothing is written there, or restore another step." in str(raised.value)


def test_a_data_file_that_vanished_is_never_zeros_even_where_the_writer_leaves_zeros_out(tmp_path):
    path = save(tmp_path / "item", {"w": noise((64, 64))}, ZSTD)
    content = (path / "_METADATA").read_text()
    (path / "_METADATA").write_text(content.replace('"store_array_data_equal_to_fill_value": true', '"x": 0'))
    checkpoint = read_metadata(path)
    assert not checkpoint.writes_fill
    (array,) = checkpoint.arrays.values()
    pathlib.Path(path / array.store.listed_extent(array.key((0, 0))).file).unlink()

    with pytest.raises(UnreadableLeafError, match="stored leaf w cannot be read: the file is absent"):
        read_arrays(checkpoint, plain_jobs(checkpoint))


@pytest.mark.parametrize("requests", ["64", "1"])
def test_a_store_that_stays_silent_is_given_up_and_the_object_named(tmp_path, monkeypatch, requests):
    tree = {f"w{number}": noise((64, 64)) + number for number in range(3)}
    checkpoint = read_metadata(save(tmp_path / "item", tree, DiskFormat(False, False, True)))
    monkeypatch.setattr(engine, "TIME_LIMIT_S", 0.2)
    monkeypatch.setenv("ORBAX_NNX_REQUESTS", requests)

    with behind_a_network(monkeypatch, checkpoint.directory) as store:
        store.silent = True
        with pytest.raises(UnreadableLeafError, match=r"leaf w\d cannot be read: .*nothing came") as raised:
            read_arrays(as_remote(checkpoint, listed=True), plain_jobs(checkpoint))

    assert "hint: " in str(raised.value)


def test_while_data_are_waited_for_the_log_says_so(tmp_path, monkeypatch, caplog):
    checkpoint = read_metadata(
        save(tmp_path / "item", {"w": noise((64, 64))}, DiskFormat(False, False, True))
    )
    monkeypatch.setattr(engine, "TIME_LIMIT_S", 0.5)
    monkeypatch.setattr(engine, "SAY_SO_AFTER_S", 0.1)

    with behind_a_network(monkeypatch, checkpoint.directory) as store:
        store.silent = True
        with pytest.raises(UnreadableLeafError, match="nothing came from the store for 0 s"):
            read_arrays(as_remote(checkpoint, listed=True), plain_jobs(checkpoint))

    waiting = [record.message for record in caplog.records if record.name == engine.__name__]
    assert 2 <= len(waiting) <= 5
    assert set(waiting) == {"still waiting for w/0.0; giving up in 0 s"}


@pytest.mark.parametrize("disk_format", [RAW, ZSTD, DiskFormat(False, True, True)], ids=str)
def test_whatever_fails_by_chance_the_values_are_right_or_there_is_one_error(
    tmp_path, monkeypatch, disk_format
):
    tree = {f"w{number}": noise((64, 64)) + number for number in range(6)}
    checkpoint = as_remote(
        read_metadata(save(tmp_path / "item", tree, disk_format)), listed=disk_format.ocdbt
    )
    monkeypatch.setenv("ORBAX_NNX_RANGE_BYTES", "9000")
    chance = np.random.default_rng(0)
    errors: list[str] = []

    def change(_key, _start, content):
        kind = chance.choice(["right", "absent", "short", "refused"], p=[0.96, 0.02, 0.01, 0.01])
        if kind == "refused":
            raise PermissionError("403 forbidden")
        return {"right": content, "absent": None, "short": content[: len(content) // 2]}[kind]

    for _ in range(30):
        with behind_a_network(monkeypatch, checkpoint.directory) as store:
            store.change = change
            try:
                found = read_arrays(checkpoint, plain_jobs(checkpoint))
            except UnreadableLeafError as error:
                errors.append(str(error))
            else:
                for name, value in tree.items():
                    np.testing.assert_array_equal(found[(name,)], value)

    assert 0 < len(errors) < 30
    assert all("cannot be read: " in error and "hint: " in error for error in errors)


def test_the_first_failure_stops_the_rest(tmp_path):
    ran = []

    def fail():
        raise ValueError("broken")

    tasks = [Task(run=fail, nbytes=64 << 20), *[Task(run=lambda: ran.append(1), nbytes=32 << 20)] * 1000]

    with pytest.raises(ValueError, match="broken"):
        read_pieces(LocalData(str(tmp_path), shared=True), [], DISK, tasks=tasks)

    assert len(ran) < 1000


def test_an_interrupt_leaves_no_thread_behind(tmp_path, monkeypatch):
    import threading

    checkpoint = read_metadata(save(tmp_path / "item", {"w": noise((512, 512))}, RAW))
    monkeypatch.setenv("ORBAX_NNX_RANGE_BYTES", str(100 << 10))

    def interrupted(key, start, content):
        if start:
            raise KeyboardInterrupt
        return content

    with behind_a_network(monkeypatch, checkpoint.directory) as store:
        store.change = interrupted
        with pytest.raises(KeyboardInterrupt):
            read_arrays(as_remote(checkpoint, listed=True), plain_jobs(checkpoint))

    assert not [thread for thread in threading.enumerate() if thread.name.startswith("restore")]


def test_two_hundred_reads_leave_nothing_behind(tmp_path):
    tree = {f"w{number}": noise((64, 64)) for number in range(20)} | {"big": noise((600, 600))}
    checkpoint = read_metadata(save(tmp_path / "item", tree, ZSTD))
    jobs = plain_jobs(checkpoint)
    after: list[int] = []

    for number in range(320):
        jax.block_until_ready(read_arrays(checkpoint, jobs))
        if number in (119, 319):
            after.append(resident_bytes())

    assert len(list(pathlib.Path("/proc/self/fd").iterdir())) < 200
    # Fifty times less than the values that were read.
    assert after[1] - after[0] < 200 * sum(value.nbytes for value in tree.values()) // 50


def resident_bytes():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("remote", [False, True], ids=["local", "behind a network"])
def test_a_shard_whose_index_points_elsewhere_is_refused_though_its_one_chunk_fills_it(remote, tmp_path):
    value = noise((16, 16))
    path = save(tmp_path / "item", {"params": {"w": value}}, RAW)
    for file in (file for file in path.rglob("*") if file.is_file()):
        before, chunk, index = file.read_bytes().partition(value.tobytes())
        if chunk:
            # Its first byte is the lowest of where the chunk begins.
            file.write_bytes(before + chunk + bytes([index[0] ^ 4]) + index[1:])
    checkpoint = read_metadata(path)

    with pytest.raises(UnreadableLeafError, match="the index of the shard points elsewhere"):
        read_values(as_remote(checkpoint, listed=True) if remote else checkpoint, [("params", "w")])


def test_what_is_answered_after_a_reading_was_given_up_is_wanted_by_nobody():
    done: list[str] = []
    workers = Workers(1)
    workers.expect()
    workers.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)

    workers.submit(lambda: done.append("late"))  # From a thread of the store's.

    assert done == []
