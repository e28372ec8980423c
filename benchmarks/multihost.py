"""Restores on several processes: `python -m benchmarks.multihost`.

What several processes hold alike is read by each of them, or by one for all (single replica), by this
package and by stock Orbax's `SingleReplicaArrayHandler`; from files, and from a bucket on loopback.
On a cluster (where `jax.distributed` finds something to join) every process runs
this and the first reports. Anywhere else, 1, 2 and 4 processes are started on
this machine, joined over loopback.
"""

import argparse
import json
import os
import pathlib
import socket
import statistics
import subprocess
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from benchmarks.bucket import BUCKET, Served, ask
from benchmarks.measuring import ROOT, Row, arguments, report, settings_of, table
from benchmarks.models import Model, sized, write

# What is shown: where the parameters live, and who restores them.
_DISTRIBUTIONS = {
    "sharded": ("sharded", "ours"),
    "replicated": ("replicated", "ours"),
    "replicated, single replica": ("replicated", "single"),
    "replicated, single replica, stock Orbax": ("replicated", "single_orbax"),
}
# The same from a bucket: reading takes longer there than copying.
_FROM_A_BUCKET = ("replicated", "replicated, single replica")
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
        title: settings_of(model, path, placement=distribution, contestant=who, url=str(path))
        for title, (distribution, who) in _DISTRIBUTIONS.items()
    }
    rows: list[Row] = []
    if options.toy:
        for title, trial in zip(settings, _started(2, list(settings.values())), strict=True):
            rows.append({"parameters": title, "processes": 2, **_joined(model, [trial])})
    else:
        for count in (1, 2, 4):
            # A copy needs two.
            titles = [title for title in settings if count > 1 or "single" not in title]
            rows += _in_turns(model, count, {title: settings[title] for title in titles}, options.rounds)
        rows += _from_a_bucket(model, path, settings, options.rounds)
    report("multihost", options, rows, {f"{model.nbytes / 1e9:.3g} GB": table(rows)})


def _from_a_bucket(model: Model, path: pathlib.Path, settings: Mapping[str, Row], rounds: int) -> list[Row]:
    with Served({path.name: path}) as bucket:
        ask(bucket.address, "reset", {"delay": 0.03, "bandwidth": 50e6})
        url = f"gs://{BUCKET}/{path.name}"
        remote = {f"{title}, bucket": {**settings[title], "url": url} for title in _FROM_A_BUCKET}
        return _in_turns(model, 4, remote, rounds, bucket.environment)


def _in_turns(
    model: Model,
    count: int,
    settings: Mapping[str, Row],
    rounds: int,
    more: Mapping[str, str] = MappingProxyType({}),
) -> list[Row]:
    """Runs each once a round, every other round backwards, so that a slow minute hits all alike."""
    found: dict[str, list[list[Row]]] = {title: [] for title in settings}
    for number in range(rounds):
        for title in [*settings][:: -1 if number % 2 else 1]:
            found[title] += _started(count, [settings[title]], more)
    return [
        {"parameters": title, "processes": count, **_joined(model, trials)} for title, trials in found.items()
    ]


def _started(
    count: int, settings: list[Row], more: Mapping[str, str] = MappingProxyType({})
) -> list[list[Row]]:
    """Starts the processes, joins them, and returns for each restore the figures of each process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-m", "benchmarks.multihost"]
    # Each process has one device, whatever this one was given.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | dict(more)
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
        _restored(Model(**each["model"]), each["url"], each["placement"], each["contestant"])
        for each in settings
    ]


def _restored(model: Model, url: str, distribution: str, contestant: str) -> Row:
    import dataclasses
    import functools

    from etils import epath
    from jax.experimental import multihost_utils

    from benchmarks.contestants import orbax_single_replica, ours
    from benchmarks.models import placement
    from benchmarks.trial import measured

    single = functools.partial(ours, single_replica=True)
    prepare = {"ours": ours, "single": single, "single_orbax": orbax_single_replica}[contestant]
    call, collect = prepare(model, epath.Path(url), placement(distribution))
    # The store's own client takes a second of four processes to be imported, whoever reads.
    epath.Path(url).exists()
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
    for title, (distribution, contestant) in _DISTRIBUTIONS.items():
        for _ in range(options.rounds):
            row = _restored(model, str(options.scratch / model.name), distribution, contestant)
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
