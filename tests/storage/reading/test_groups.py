"""What is on its way at the same time, against the window."""

import jax
import numpy as np
import pytest

from orbax_nnx_handler.planning.core.recipes import Index, Read, Stack
from orbax_nnx_handler.storage.reading.jobs import Job, PlainJob, groups, plain_job


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
