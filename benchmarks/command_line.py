"""What the command line takes: `python -m benchmarks.command_line`.

`plan` on 20,005 stored leaves, with the time that importing JAX takes for itself
beside it; and `convert` of a large checkpoint under several bounds of memory. Each
answer is checked: the verdict by its status, the conversion by `diff --values`
with the checkpoint that a program with the other arrangement of layers writes.
"""

import dataclasses
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from benchmarks.measuring import ROOT, Row, arguments, report, table
from benchmarks.models import Model, sized, target, write

MANY = 20005
BOUNDS_GB = (0.8, 1.0, 2.0)


def wanted(leaves: int, layers_more: int = 0) -> nnx.State:
    """Returns an abstract state of so many leaves: the factory of `plan`."""
    model = sized(leaves, 50_000_000, compressed=True)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return target(dataclasses.replace(model, layers=model.layers + layers_more), place)


def main() -> None:
    """Measures both commands."""
    options = arguments(__doc__ or "")
    plans = _plans(options)
    conversions = _conversions(options)
    tables = {"**plan**": _titled(plans), "**convert**": _titled(conversions)}
    report("command_line", options, {"plan": plans, "convert": conversions}, tables)


def _titled(rows: dict[str, Row]) -> str:
    return table({"": name, **row} for name, row in rows.items())


def _plans(options: Any) -> dict[str, Row]:
    leaves = 101 if options.toy else MANY
    path = str(write(sized(leaves, 50_000_000, compressed=True), options.scratch))
    commands = {
        "import jax": (["-c", "import jax"], 0),
        "import orbax_nnx_handler": (["-c", "import orbax_nnx_handler"], 0),
        "plan, fits": (_cli("plan", path, f"benchmarks.command_line:wanted({leaves})"), 0),
        "plan, a layer is missing": (_cli("plan", path, f"benchmarks.command_line:wanted({leaves}, 1)"), 1),
    }
    trials: dict[str, list[Row]] = {name: [] for name in commands}
    for _ in range(options.rounds):
        for name, (command, status) in commands.items():
            trials[name].append(_run(command, status))
    rows = {name: _medians(found) for name, found in trials.items()}
    alone = rows["import jax"]
    return {
        name: row
        | {
            "beyond JAX": row["seconds"] - alone["seconds"],
            "cpu beyond JAX": row["cpu_seconds"] - alone["cpu_seconds"],
        }
        for name, row in rows.items()
    }


def _conversions(options: Any) -> dict[str, Row]:
    nbytes = int(options.gb * 1e9)
    stacked = sized(64, nbytes, stored="stacked", compressed=True)
    apart = dataclasses.replace(stacked, stored="layers")
    source, expected = write(stacked, options.scratch), write(apart, options.scratch)
    rows: dict[str, Row] = {}
    for bound in BOUNDS_GB[1:2] if options.toy else BOUNDS_GB:
        out = options.scratch / "converted"
        shutil.rmtree(out, ignore_errors=True)
        unscan = ["--unscan", "layers", "--axis", "1", "--memory", str(bound)]
        row = _run(_cli("convert", str(source), str(out), *unscan), 0)
        _run(_cli("diff", str(out), str(expected), "--values"), 0)
        shutil.rmtree(out)
        row["GB/s"] = _size(stacked) / row["seconds"]
        if row["peak GB"] > bound:
            raise RuntimeError(f"--memory {bound} was exceeded: {row}")
        rows[f"--memory {bound}, {_size(stacked):.3g} GB"] = row
    return rows


def _size(model: Model) -> float:
    return model.nbytes / 1e9


def _cli(*words: str) -> list[str]:
    return ["-m", "orbax_nnx_handler", *words]


def _run(words: Sequence[str], status: int) -> Row:
    """Runs Python once; returns its time, its processor time and its peak of memory."""
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL, cwd=ROOT.parent)
    peak, code = 0, 0
    done, used = 0, None
    while not done:
        # The high-water mark of this program alone: `ru_maxrss` also counts the process that started it.
        peak = max(peak, _high_water(process.pid))
        done, code, used = os.wait4(process.pid, os.WNOHANG)
        time.sleep(0.02)
    seconds = time.monotonic() - start
    if os.waitstatus_to_exitcode(code) != status:
        raise RuntimeError(f"{words} ended with {os.waitstatus_to_exitcode(code)}, not {status}")
    return {"seconds": seconds, "cpu_seconds": used.ru_utime + used.ru_stime, "peak GB": peak / 1e9}


def _high_water(pid: int) -> int:
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def _medians(trials: Sequence[Row]) -> Row:
    return {key: statistics.median(row[key] for row in trials) for key in trials[0]}


if __name__ == "__main__":
    main()
