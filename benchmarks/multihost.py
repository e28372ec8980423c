"""Restores on several processes: `python -m benchmarks.multihost`.

On a cluster (where `jax.distributed` finds something to join) every process runs
this and the first reports. Anywhere else, 1, 2 and 4 processes are started on
this machine, joined over loopback.
"""

import argparse
import itertools
import json
import os
import pathlib
import socket
import statistics
import subprocess
import sys
from typing import Any

from benchmarks.measuring import ROOT, Row, arguments, report, settings_of, table
from benchmarks.models import Model, sized, write

# What is shown: where the parameters live, and whether what several processes hold alike is read once.
_DISTRIBUTIONS = {
    "sharded": ("sharded", False),
    "replicated": ("replicated", False),
    "replicated, single replica": ("replicated", True),
}
# What a scheduler sets where there is something to join.
_CLUSTER_SIGNS = (
    "JAX_COORDINATOR_ADDRESS",
    "SLURM_JOB_NUM_NODES",
    "OMPI_COMM_WORLD_SIZE",
    "TPU_WORKER_HOSTNAMES",
)


def main() -> None:
    """Runs on the cluster that this process belongs to, or on local processes."""
    if len(sys.argv) > 1 and sys.argv[1].startswith("{"):
        print(json.dumps(one_process(**json.loads(sys.argv[1]))))
        return
    options = arguments(__doc__ or "")
    if any(sign in os.environ for sign in _CLUSTER_SIGNS):
        _on_cluster(options)
    else:
        _on_this_machine(options)


def _on_this_machine(options: argparse.Namespace) -> None:
    model = sized(37 if options.toy else 301, int(options.gb * 1e9))
    path = write(model, options.scratch)
    settings = {
        title: settings_of(model, path, placement=distribution, single_replica=single)
        for title, (distribution, single) in _DISTRIBUTIONS.items()
    }
    rows: list[Row] = []
    if options.toy:
        for title, trial in zip(settings, _started(2, list(settings.values())), strict=True):
            rows.append({"parameters": title, "processes": 2, **_joined(model, [trial])})
    else:
        for title, count in itertools.product(settings, (1, 2, 4)):
            trials = [_started(count, [settings[title]])[0] for _ in range(options.rounds)]
            rows.append({"parameters": title, "processes": count, **_joined(model, trials)})
    report("multihost", options, rows, {f"{model.nbytes / 1e9:.3g} GB": table(rows)})


def _started(count: int, settings: list[Row]) -> list[list[Row]]:
    """Starts the processes, joins them, and returns for each restore the figures of each process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-m", "benchmarks.multihost"]
    # Each process has one device, whatever this one was given.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    running = [
        subprocess.Popen(
            [*command, json.dumps({"settings": settings, "join": [address, count, number]})],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT.parent,
            env=environment,
        )
        for number in range(count)
    ]
    outputs = [process.communicate(timeout=600) for process in running]
    for process, (_, errors) in zip(running, outputs, strict=True):
        if process.returncode:
            raise RuntimeError(f"a process failed:\n{errors[-3000:]}")
    figures = [json.loads(output.splitlines()[-1]) for output, _ in outputs]
    return [list(rows) for rows in zip(*figures, strict=True)]


def _joined(model: Model, trials: list[list[Row]]) -> Row:
    seconds = [max(row["seconds"] for row in trial) for trial in trials]
    middle = statistics.median(seconds)
    needed = sum(row["needed_bytes"] for row in trials[0])
    return {
        "seconds": middle,
        "from-to": [min(seconds), max(seconds)],
        "GB/s in all": needed / middle / 1e9,
        "read / model": statistics.median(sum(r["read_bytes"] for r in trial) for trial in trials)
        / model.nbytes,
        "peak / own part": max(row["peak_bytes"] / row["needed_bytes"] for trial in trials for row in trial),
    }


def one_process(settings: list[Row], join: tuple[str, int, int]) -> list[Row]:
    """Joins the others; returns its figures of each restore, after a check of this process's shards."""
    import jax

    address, count, number = join
    jax.config.update("jax_platforms", "cpu")
    if count > 1:
        jax.distributed.initialize(address, count, number, local_device_ids=[0])
    return [
        _restored(
            Model(**each["model"]), pathlib.Path(each["path"]), each["placement"], each["single_replica"]
        )
        for each in settings
    ]


def _restored(model: Model, path: pathlib.Path, distribution: str, single_replica: bool) -> Row:
    import dataclasses

    from jax.experimental import multihost_utils

    from benchmarks.contestants import ours
    from benchmarks.models import placement
    from benchmarks.trial import measured

    call, collect = ours(model, path, placement(distribution), single_replica=single_replica)
    multihost_utils.sync_global_devices("start")
    result, figures = measured(call)
    arrays = collect(result) or {}
    _check_own(model, arrays)
    needed = sum(shard.data.nbytes for array in arrays.values() for shard in array.addressable_shards)
    multihost_utils.sync_global_devices("end")
    return {**dataclasses.asdict(figures), "needed_bytes": needed}


def _check_own(model: Model, arrays: Any) -> None:
    import numpy as np

    for layer in range(model.layers):
        for name, value in model.values(layer).items():
            for shard in arrays["layers", layer, name, "kernel"].addressable_shards:
                np.testing.assert_array_equal(np.asarray(shard.data), value[shard.index])


def _on_cluster(options: argparse.Namespace) -> None:
    import jax
    from jax.experimental import multihost_utils

    jax.distributed.initialize()
    model = sized(301, int(options.gb * 1e9))
    if jax.process_index() == 0:
        write_alone(model, options.scratch)
    multihost_utils.sync_global_devices("written")
    rows: list[Row] = []
    for title, (distribution, single) in _DISTRIBUTIONS.items():
        for _ in range(options.rounds):
            row = _restored(model, options.scratch / model.name, distribution, single)
            rows.append({"parameters": title, "processes": jax.process_count(), **row})
    if jax.process_index() == 0:
        report("multihost", options, rows, {f"{model.nbytes / 1e9:.3g} GB, process 0": table(rows)})


def write_alone(model: Model, scratch: pathlib.Path) -> None:
    """Writes the checkpoint in a process that belongs to no cluster: Orbax would wait for the others."""
    code = (
        f"import pathlib; from benchmarks.models import *; write({model!r}, pathlib.Path({str(scratch)!r}))"
    )
    alone = {key: value for key, value in os.environ.items() if key not in _CLUSTER_SIGNS}
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=ROOT.parent, env={**alone, "JAX_PLATFORMS": "cpu"}
    )


if __name__ == "__main__":
    main()
