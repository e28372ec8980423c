"""What is on its way at the same time, against the window."""

import dataclasses
import threading

import jax
import numpy as np
import pytest

from orbax_nnx_handler.planning.core.errors import UnreadableLeafError
from orbax_nnx_handler.planning.core.recipes import Index, Read, Reshape, Stack
from orbax_nnx_handler.storage.checkpoint.metadata import read_metadata
from orbax_nnx_handler.storage.reading import fetch, read
from orbax_nnx_handler.storage.reading.base_store import LocalData
from orbax_nnx_handler.storage.reading.jobs import Job, PlainJob, groups, place_array, plain_job
from tests.storage.checkpoints import FORMATS, DiskFormat, numbers, save
from tests.storage.jobs import plain_jobs


def plain(name, recipe, size):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return plain_job(
        Job(path=(name,), recipe=recipe, shape=(size,), dtype=np.dtype(np.int8), sharding=sharding)
    )


def names(found):
    return [[job.job.path[0] for job in group] for group in found]


@pytest.fixture
def accelerator(monkeypatch):
    """CPU devices that count as devices with memory of their own."""
    monkeypatch.setattr(PlainJob, "on_cpu", property(lambda _: False))


def test_on_cpu_everything_is_read_at_once():
    jobs = [plain(name, Read((name,)), 10) for name in "abc"]

    assert names(groups(jobs, 10)) == [["a", "b", "c"]]


@pytest.mark.usefixtures("accelerator")
def test_elsewhere_the_largest_go_first_and_half_the_window_is_filled():
    jobs = [plain("a", Read(("a",)), 10), plain("b", Read(("b",)), 40), plain("c", Read(("c",)), 30)]

    assert names(groups(jobs, 80)) == [["b"], ["c", "a"]]


@pytest.mark.usefixtures("accelerator")
def test_jobs_that_share_a_stored_leaf_stay_together_and_may_exceed_the_window():
    jobs = [
        plain("a", Index(Read(("s",)), 0, 0), 30),
        plain("other", Read(("o",)), 50),
        plain("b", Stack((Read(("t",)), Read(("s",))), 0), 30),
        plain("c", Read(("t",)), 30),
    ]

    assert names(groups(jobs, 100)) == [["a", "b", "c"], ["other"]]


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of one leaf each, where a part is 64 kB, as parts of larger ones would be."""
    monkeypatch.setattr(fetch, "_PART_BYTES", 64 << 10)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("disk_format", FORMATS, ids=str)
def test_what_is_read_becomes_an_array_while_others_are_being_read(tmp_path, monkeypatch, disk_format):
    tree = {f"w{number}": numbers((128, 128), seed=number) for number in range(6)}
    checkpoint = read_metadata(save(tmp_path / "item", tree, disk_format))
    made, waited = threading.Event(), []

    class Files(LocalData):
        def read_into(self, file, start, buffers):
            # Where three parts are there, what comes next waits until one of them is an array.
            waited.append(len(waited) < 3 or made.wait(5))
            super().read_into(file, start, buffers)

    def place(job, shards):
        made.set()
        return place_array(job, shards)

    monkeypatch.setattr(fetch, "open_data", lambda store: Files(str(store.directory), shared=False))
    monkeypatch.setattr(read, "place_array", place)

    found = read.read_arrays(checkpoint, plain_jobs(checkpoint))

    assert len(waited) == 6
    assert all(waited)
    assert [path for (path,) in found] == list(tree)
    for name, value in tree.items():
        np.testing.assert_array_equal(found[(name,)], value)


@pytest.mark.usefixtures("small_parts")
def test_what_is_made_of_leaves_of_several_parts_is_made_at_the_end(tmp_path):
    tree = {f"w{number}": numbers((128, 128), seed=number) for number in range(6)}
    checkpoint = read_metadata(save(tmp_path / "item", tree))
    stack = Stack((Read(("w5",)), Read(("w0",)), Reshape(Read(("w3",)), (128, 128))), 1)
    job = dataclasses.replace(plain_jobs(checkpoint)[0], path=("stack",), recipe=stack, shape=(128, 3, 128))

    found = read.read_arrays(checkpoint, [job, *plain_jobs(checkpoint)])

    np.testing.assert_array_equal(found[("stack",)], np.stack([tree["w5"], tree["w0"], tree["w3"]], 1))
    np.testing.assert_array_equal(found[("w3",)], tree["w3"])


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("lost", [0, 3, 5])
def test_a_part_that_cannot_be_read_stops_the_others_and_is_named(tmp_path, lost):
    tree = {f"w{number}": numbers((128, 128), seed=number) for number in range(6)}
    path = save(tmp_path / "item", tree, DiskFormat(ocdbt=False, zarr3=False, compressed=False))
    checkpoint = read_metadata(path)
    (path / f"w{lost}" / "0.0").write_bytes(b"too short")

    with pytest.raises(UnreadableLeafError, match=f"stored leaf w{lost} cannot be read") as raised:
        read.read_arrays(checkpoint, plain_jobs(checkpoint))

    assert raised.value.paths == ((f"w{lost}",),)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("restore")]


@pytest.mark.usefixtures("small_parts")
def test_an_array_that_cannot_be_made_leaves_no_thread_behind(tmp_path, monkeypatch):
    tree = {f"w{number}": numbers((128, 128), seed=number) for number in range(6)}
    checkpoint = read_metadata(save(tmp_path / "item", tree))

    def fails(*_):
        raise RuntimeError("no room on the device")

    monkeypatch.setattr(read, "place_array", fails)

    with pytest.raises(RuntimeError, match="no room"):
        read.read_arrays(checkpoint, plain_jobs(checkpoint))

    assert not [thread for thread in threading.enumerate() if thread.name.startswith("restore")]
