"""Which process reads which leaf where one of several reads for all."""

import itertools
import math
import types
from collections import Counter
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from orbax_nnx_handler.planning.core.recipes import Read
from orbax_nnx_handler.planning.options import SingleReplica
from orbax_nnx_handler.storage.reading import single_replica
from orbax_nnx_handler.storage.reading.jobs import PlainJob

HOSTS = 4


@pytest.fixture
def mesh(monkeypatch: pytest.MonkeyPatch) -> Mesh:
    """A mesh of four devices of which each passes for one of a host of its own."""

    def hosts(devices: np.ndarray) -> np.ndarray:
        return np.array([device.id for device in devices.ravel()]).reshape(devices.shape)

    monkeypatch.setattr(single_replica, "_process_of", hosts)
    monkeypatch.setattr(jax, "process_count", lambda: HOSTS)
    for cached in (single_replica._processes, single_replica._copy_axes):
        cached.cache_clear()
    yield Mesh(np.array(jax.devices()[:HOSTS]), ("replica",))
    for cached in (single_replica._processes, single_replica._copy_axes):
        cached.cache_clear()


def _job(mesh: Mesh, path: tuple[str, ...], *shape: int) -> PlainJob:
    job: Any = types.SimpleNamespace(path=path, single_replica=SingleReplica())
    sharding = NamedSharding(mesh, PartitionSpec())
    return PlainJob(
        job=job, recipe=Read(path), shape=shape, dtype=np.dtype(np.float32), sharding=sharding, shards=()
    )


def _readers(jobs: list[PlainJob]) -> dict[tuple[str, ...], int]:
    return {item.job.job.path: item.reader for family in single_replica.share_out(jobs) for item in family}


def _loads(jobs: list[PlainJob], readers: dict[tuple[str, ...], int]) -> Counter:
    loads: Counter = Counter()
    for job in jobs:
        loads[readers[job.job.path]] += math.prod(job.shape) * 4
    return loads


def test_neighbours_that_fill_no_request_are_read_by_the_same_process(mesh: Mesh) -> None:
    jobs = [_job(mesh, (f"layers_{at:03}", "kernel"), 64, 64) for at in range(100)]

    readers = _readers(jobs)

    assert [readers[job.job.path] for job in jobs] == sorted(readers.values())
    loads = _loads(jobs, readers)
    assert len(loads) == HOSTS
    assert max(loads.values()) <= 1.1 * min(loads.values())


def test_large_leaves_are_shared_out_by_size_and_small_ones_fill_up(mesh: Mesh) -> None:
    large = [_job(mesh, ("embedding", str(at)), size, 1024) for at, size in enumerate((4096, 4096, 2048))]
    small = [_job(mesh, ("layers", f"{at:03}"), 64, 1024) for at in range(96)]
    jobs = [*small, *large]

    readers = _readers(jobs)

    assert len({readers[job.job.path] for job in large}) == len(large)
    loads = _loads(jobs, readers)
    assert max(loads.values()) <= 1.1 * sum(loads.values()) / HOSTS
    changes = [readers[a.job.path] != readers[b.job.path] for a, b in itertools.pairwise(small)]
    assert sum(changes) < HOSTS
