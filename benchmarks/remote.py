"""Restores over a network: `python -m benchmarks.remote`.

A bucket on loopback answers each request after 30 or 100 ms and at 50 MB/s a stream. Stock Orbax and this
package restore the same checkpoints from it in turns, each trial in a fresh process. Beside the time stand
the requests, the round trips in a row (each request of the chain began after the one before had ended) and
the bytes, which do not depend on the machine. Every value is checked.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.bucket import BUCKET, Served, ask, chain
from benchmarks.measuring import ROOT, Row, arguments, earlier, report, settings_of, table
from benchmarks.models import Model, write

_BANDWIDTH = 50e6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison.

    Attributes:
        title: What it shows.
        model: What is restored.
        contestants: Who restores it.
        delay: Seconds before each response.
        placement: Where the parameters go.
        devices: How many devices there are.
        steps: How many steps the root at the path has; 0 where it is an item.
    """

    title: str
    model: Model
    contestants: tuple[str, ...] = ("ours", "orbax")
    delay: float = 0.03
    placement: str = "one"
    devices: int = 1
    steps: int = 0


def cases(*, toy: bool) -> list[Case]:
    """Returns the comparisons."""
    small = Model(layers=10 if toy else 500, width=32, compressed=True)
    middle = Model(layers=1 if toy else 9, width=64 if toy else 1448, compressed=True)
    large = Model(layers=1, width=64 if toy else 4096, compressed=True)
    halves = Model(layers=1, width=64 if toy else 2896, projections=2)
    eight = {"devices": 8}
    found = [
        Case(title=f"{small.leaves} leaves of 4 kB, zstd, 30 ms", model=small),
        Case(title=f"{small.leaves} leaves of 4 kB, zstd, 100 ms", model=small, delay=0.1),
        Case(title=f"{middle.leaves} leaves of 8 MB, zstd", model=middle),
        Case(title=f"{middle.leaves} leaves of 8 MB, raw", model=_raw(middle)),
        Case(title="4 leaves of 64 MB, zstd", model=large),
        Case(title="4 leaves of 64 MB, raw", model=_raw(large)),
    ]
    for model, packed in ((halves, "raw"), (dataclasses.replace(halves, compressed=True), "zstd")):
        for placement in ("sharded", "columns"):
            rows = "rows" if placement == "sharded" else placement
            title = f"2 leaves of 32 MB, {packed}, {rows} over 8 devices"
            found.append(Case(title=title, model=model, placement=placement, **eight))
    steps = 3 if toy else 40
    return [
        *(found[:1] + found[-1:] if toy else found),
        Case(title=f"verdict, item path, {small.leaves} leaves", model=small, contestants=("verdict",)),
        Case(
            title=f"root with {steps} steps",
            model=dataclasses.replace(middle, layers=3, width=16),
            contestants=("verdict", "ours", "manager"),
            steps=steps,
        ),
    ]


def _raw(model: Model) -> Model:
    return dataclasses.replace(model, compressed=False)


def root_of(case: Case, item: pathlib.Path, scratch: pathlib.Path) -> pathlib.Path:
    """Returns a directory with many steps, each a copy of one item."""
    root = scratch / f"{case.model.name}-{case.steps}-steps"
    for step in range(1, case.steps + 1):
        if not (root / str(step) / "default").exists():
            shutil.copytree(item, root / str(step) / "default")
            for name in ("commit_success.txt", "_CHECKPOINT_METADATA"):
                shutil.copy(item / name, root / str(step) / name)
    return root


def main() -> None:
    """Runs all comparisons, or trials in this process."""
    if len(sys.argv) > 1 and sys.argv[1].startswith("["):
        print(json.dumps([trial(settings) for settings in json.loads(sys.argv[1])]))
        return
    options = arguments(__doc__ or "", choosable=True)
    results: dict[str, dict[str, Row]] = earlier("remote", options) if options.only else {}
    chosen = [case for case in cases(toy=options.toy) if options.only in case.title]
    # Of toys only the values count: one bucket and one process do for all.
    for together in [chosen] if options.toy else [[case] for case in chosen]:
        for title, rows in run(together, options).items():
            results[title] = rows
            print(f"**{title}**\n{table({'': who, **row} for who, row in rows.items())}\n", flush=True)
    report("remote", options, results, {})


def run(cases: Sequence[Case], options: argparse.Namespace) -> dict[str, dict[str, Row]]:
    """Returns the figures of each contestant, case by case."""
    items = {case.title: write(case.model, options.scratch) for case in cases}
    served = {
        case.title: root_of(case, items[case.title], options.scratch) if case.steps else items[case.title]
        for case in cases
    }
    found: dict[str, dict[str, list[Row]]] = {
        case.title: {who: [] for who in case.contestants} for case in cases
    }
    with Served({directory.name: directory for directory in served.values()}) as bucket:
        wanted = [
            (
                found[case.title][who],
                settings_of(
                    case.model,
                    items[case.title],
                    placement=case.placement,
                    devices=case.devices,
                    url=f"gs://{BUCKET}/{served[case.title].name}",
                    address=bucket.address,
                    delay=case.delay,
                    contestant=who,
                ),
            )
            for case in cases
            for who in case.contestants
        ]
        for _ in range(options.rounds):
            for group in [wanted] if options.toy else [[each] for each in wanted]:
                rows = _started([settings for _, settings in group], bucket.environment)
                for (kept, _), row in zip(group, rows, strict=True):
                    kept.append(row)
    return {
        title: _with_ratio({who: _middle(rows) for who, rows in each.items()})
        for title, each in found.items()
    }


def _started(settings: list[Row], environment: dict[str, str]) -> list[Row]:
    command = [sys.executable, "-m", "benchmarks.remote", json.dumps(settings)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT.parent, env=os.environ | environment
    )
    if done.returncode:
        raise RuntimeError(f"{settings} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _middle(rows: list[Row]) -> Row:
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def _with_ratio(rows: dict[str, Row]) -> dict[str, Row]:
    stock = next((rows[who] for who in ("orbax", "manager") if who in rows), None)
    if stock is None:
        return rows
    return {who: {**row, "x orbax": row["seconds"] / stock["seconds"]} for who, row in rows.items()}


def trial(settings: dict[str, Any]) -> Row:
    """Runs one contestant once, checks every value, and returns what it took."""
    if settings["devices"] > 1:
        os.environ["XLA_FLAGS"] = (
            f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={settings['devices']}"
        )
    import jax
    from etils import epath

    from benchmarks.contestants import orbax, ours
    from benchmarks.models import check, placement

    model, url = Model(**settings["model"]), epath.Path(settings["url"])
    jax.block_until_ready(jax.numpy.zeros(()))
    prepare = {"ours": ours, "orbax": orbax, "verdict": verdict, "manager": manager}[settings["contestant"]]
    call, collect = prepare(model, url, placement(settings["placement"]))
    ask(settings["address"], "reset", {"delay": settings["delay"], "bandwidth": _BANDWIDTH})
    start = time.perf_counter()
    result = jax.block_until_ready(call())
    seconds = time.perf_counter() - start
    log = ask(settings["address"], "log")
    arrays = collect(result)
    if arrays is not None:
        check(model, pathlib.Path(settings["path"]), dict(arrays))
    sent = sum(entry["bytes"] for entry in log)
    return {"requests": len(log), "chain": chain(log), "seconds": seconds, "MB": sent / 1e6}


def verdict(model: Model, url: Any, sharding: Any) -> Any:
    """Whether the checkpoint fits, from its metadata."""
    from benchmarks.models import target
    from orbax_nnx_handler import plan_restore

    wanted = target(model, sharding)

    def run() -> Any:
        plan = plan_restore(url, wanted)
        assert plan.fits, plan
        return ()

    return run, lambda _: None


def manager(model: Model, url: Any, sharding: Any) -> Any:
    """Stock Orbax: a manager finds the newest step of a root and restores it."""
    import orbax.checkpoint as ocp

    from benchmarks.contestants import disk_tree, of_disk_tree

    item = disk_tree(model, sharding)

    def run() -> Any:
        with ocp.CheckpointManager(url) as steps:
            return steps.restore(steps.latest_step(), args=ocp.args.StandardRestore(item))

    return run, of_disk_tree


if __name__ == "__main__":
    main()
