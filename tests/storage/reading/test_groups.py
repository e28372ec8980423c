"""What is on its way at the same time, against the window; and the arrays that it becomes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from orbax_nnx_handler.planning.core.recipes import Index, Read, Stack
from orbax_nnx_handler.storage.reading import jobs
from orbax_nnx_handler.storage.reading.jobs import (
    Job,
    PlainJob,
    allocate_shards,
    groups,
    place_arrays,
    plain_job,
)
from orbax_nnx_handler.storage.reading.memory import Arena


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


def refuse(*_):
    raise TypeError("missing a required argument")


def meshes():
    """A mesh of one device and one of all."""
    return [
        Mesh(np.array(some).reshape(len(some), 1), ("x", "y")) for some in (jax.devices()[:1], jax.devices())
    ]


SHARDINGS = {
    "one device": SingleDeviceSharding(jax.devices()[0]),
    "another device": SingleDeviceSharding(jax.devices()[-1]),
    "a mesh of one": NamedSharding(meshes()[0], PartitionSpec("x")),
    "copies": NamedSharding(meshes()[1], PartitionSpec()),
    "rows": NamedSharding(meshes()[1], PartitionSpec("x")),
}


@pytest.mark.parametrize("last_step", [jobs._last_step, None, refuse], ids=["private", "none", "another"])
@pytest.mark.parametrize("name", SHARDINGS)
def test_arrays_are_what_jaxs_public_way_makes(monkeypatch, name, last_step):
    assert jobs._last_step is not None
    monkeypatch.setattr(jobs, "_last_step", last_step)
    kinds = [((8, 4), np.float32), ((8, 4), jnp.bfloat16), ((8,), np.int8), ((8, 0), np.float32)]
    asked = [
        Job(path=(n, at), recipe=Read(("x",)), shape=shape, dtype=np.dtype(dtype), sharding=SHARDINGS[name])
        for n in range(3)
        for at, (shape, dtype) in enumerate(kinds)
    ]
    plain, arena = [plain_job(job) for job in asked], Arena()
    filled = [allocate_shards(job, arena.allocate) for job in plain]
    values = [
        np.arange(np.prod(job.shape)).reshape(job.shape).astype(job.dtype) + n for n, job in enumerate(plain)
    ]
    for value, shards in zip(values, filled, strict=True):
        for region, buffer in shards.items():
            buffer[:] = value[tuple(slice(*each) for each in region)]

    arrays = place_arrays(zip(plain, filled, strict=True))

    assert list(arrays) == [job.path for job in asked]
    for job, value, array in zip(asked, values, arrays.values(), strict=True):
        public = jax.make_array_from_callback(job.shape, job.sharding, lambda at, value=value: value[at])
        assert (array.aval, array.sharding, array.committed) == (
            public.aval,
            public.sharding,
            public.committed,
        )
        assert type(array) is type(public)
        np.testing.assert_array_equal(np.asarray(array), value)
        np.testing.assert_array_equal(np.asarray(jax.jit(lambda x: x + x)(array)), value + value)
