"""What is said of hosts that are not there, held against processes that are."""

import json

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.simulate import TOY, byte_plan, jobs_on, target_of
from benchmarks.skeleton import Hosts, train_state, write
from orbax_nnx_handler.planner import decide
from orbax_nnx_handler.planning.options import RestoreOptions
from orbax_nnx_handler.storage.checkpoint.metadata import read_metadata
from orbax_nnx_handler.storage.reading.byte_plan import DISK
from tests.benchmarks import toys
from tests.benchmarks.reader import SHAPES
from tests.processes import run_processes

WRITERS = Hosts(count=1, devices=8, tensor=2)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The train state as stock Orbax writes it from eight devices."""
    folder = tmp_path_factory.mktemp("simulate")
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("fsdp", "tensor"))
    random, tree = np.random.default_rng(0), {}
    for array in train_state(TOY, stacked=True):
        node = tree
        for key in array.path[:-1]:
            node = node.setdefault(key, {})
        value = random.standard_normal(array.shape).astype(array.dtype)
        node[array.path[-1]] = jax.device_put(value, NamedSharding(mesh, PartitionSpec(*array.axes)))
    tree["opt_state"] = [tree["opt_state"][0]]
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(folder / "toy", args=ocp.args.PyTreeSave(tree))
    return folder


def _planned(directory, *, stacked, hosts, host):
    target, axes = target_of(TOY, stacked=stacked)
    checkpoint = read_metadata(directory)
    plan, _ = decide(checkpoint, target, {}, RestoreOptions(), check=True)
    groups = byte_plan(checkpoint, jobs_on(plan, axes, hosts, host, "cpu"), DISK)
    return sorted([*request] for group in groups for request in group)


@pytest.mark.parametrize("count", [2, 4])
def test_each_process_reads_the_bytes_that_were_planned_for_its_host(toy, count):
    read = run_processes("tests.benchmarks.reader", count, toy)

    assert read[0] != read[1]
    for host, seen in enumerate(read):
        for name, (_, tensor) in SHAPES.items():
            hosts = Hosts(count=count, devices=8 // count, tensor=tensor)
            for stacked in (True, False):
                planned = _planned(toy / "toy", stacked=stacked, hosts=hosts, host=host)
                assert len(planned) > 1
                assert seen[f"{name}, {stacked}"] == planned


def test_a_skeleton_has_the_metadata_of_the_checkpoint_that_it_stands_for(toy, tmp_path):
    real = read_metadata(toy / "toy")
    skeleton = read_metadata(write(tmp_path / "item", train_state(TOY, stacked=True), WRITERS))

    assert (skeleton.damaged, skeleton.lost) == ({}, {})
    assert skeleton.leaves == real.leaves
    assert skeleton.disk_format == real.disk_format
    stores = [next(iter(item.arrays.values())).store for item in (skeleton, real)]
    assert stores[0].catalog.keys() == stores[1].catalog.keys()
    assert {path: array.encoding for path, array in skeleton.arrays.items()} == {
        path: array.encoding for path, array in real.arrays.items()
    }


def test_every_host_of_a_simulation_is_told_what_it_waits_for(tmp_path):
    toys.check("simulate", tmp_path)

    results = json.loads((tmp_path / "simulate.json").read_text())["results"]
    rows = [row for rows in results.values() for row in rows]
    assert all(row["of all that is stored"] == pytest.approx(1) for row in rows)
    assert all(0 < row["in a row"] < 6 for row in rows)
    assert {row["requests"] for row in rows} != {0}
