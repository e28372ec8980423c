"""Rounds of trials, each in a fresh process, interleaved; their medians, tables and files.

Toys, which only show that the values are right, all run in one process.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any, Literal

from benchmarks.models import Model

ROOT = pathlib.Path(__file__).parent
SCRATCH = ROOT / "scratch"
RESULTS = ROOT / "results"

Cache = Literal["warm", "cold"]
Row = dict[str, Any]


def arguments(description: str, *, choosable: bool = False) -> argparse.Namespace:
    """Reads the options that all benchmarks share, and `--only` where cases can be chosen."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--toy", action="store_true", help="tiny models and one round: for correctness only")
    parser.add_argument(
        "--gb", type=float, default=None, help="bytes of the model in 1e9 (default: by memory)"
    )
    parser.add_argument("--rounds", type=int, default=None, help="trials of each contestant (default 5)")
    parser.add_argument("--scratch", type=pathlib.Path, default=SCRATCH, help="where the checkpoints go")
    parser.add_argument("--out", type=pathlib.Path, default=None, help="where the results go (JSON)")
    if choosable:
        parser.add_argument(
            "--only", default="", help="cases whose title holds this; the others' results stay"
        )
    options = parser.parse_args()
    if options.rounds is None:
        options.rounds = 1 if options.toy else 5
    if options.gb is None:
        options.gb = 0.002 if options.toy else _fitting_gb()
    if options.toy:
        # Toys share this process, so it needs the devices of all cases; what is set already stays.
        os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    options.scratch.mkdir(parents=True, exist_ok=True)
    return options


def _fitting_gb() -> float:
    """Returns a size that a machine of any memory can hold several times over, 2 GB at most."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return round(min(2.0, memory / 1e9 / 20), 2)


def trials(settings: Sequence[Mapping[str, Any]], *, toy: bool = False) -> list[Row]:
    """Runs trials one after the other in one fresh process, of as many devices as the first asks for.

    Toys, of which only the values count, run in this process.

    Raises:
        RuntimeError: A trial failed in its process: a wrong value, or an error; its output is quoted.
    """
    if toy:
        # Here, for it imports this package's readers only when it runs.
        from benchmarks.trial import main as run

        return [run(dict(each)) for each in settings]
    command = [sys.executable, "-m", "benchmarks.trial", json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT.parent)
    if done.returncode:
        raise RuntimeError(f"trials {settings} failed:\n{done.stderr[-3000:]}")
    return [json.loads(line) for line in done.stdout.splitlines()[-len(settings) :]]


def _forget(path: pathlib.Path) -> None:
    """Drops a checkpoint's files from the page cache, as far as the system lets a user do so."""
    for file in [*path.rglob("*"), path.with_name(f"{path.name}.safetensors")]:
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def interleaved(
    contestants: Sequence[str],
    rounds: int,
    settings: Mapping[str, Any],
    cache: Cache = "warm",
    *,
    toy: bool = False,
) -> dict[str, list[Row]]:
    """Runs every contestant once per round, so that a slow minute of the machine hits all alike.

    Every other round goes backwards: what one trial leaves to the next, as pages still to be written, is
    not always left to the same one. Each trial has a process of its own, except for toys, of which only the
    values count.
    """
    wanted = [{**settings, "contestant": name} for name in contestants]
    if toy:
        return {name: [row] for name, row in zip(contestants, trials(wanted, toy=True), strict=True)}
    found: dict[str, list[Row]] = {name: [] for name in contestants}
    for number in range(rounds):
        for each in wanted[:: -1 if number % 2 else 1]:
            if cache == "cold":
                _forget(pathlib.Path(settings["path"]))
            found[each["contestant"]] += trials([each])
    return found


def summary(model: Model, trials: Sequence[Row]) -> Row:
    """Returns medians, the spread of the time, and figures per byte of the model."""
    seconds = [row["seconds"] for row in trials]
    middle = statistics.median(seconds)
    return {
        "seconds": middle,
        "fastest": min(seconds),
        "slowest": max(seconds),
        "GB/s": model.nbytes / middle / 1e9,
        "cpu_seconds": statistics.median(row["cpu_seconds"] for row in trials),
        "peak": statistics.median(row["peak_bytes"] for row in trials) / model.nbytes,
        "read": statistics.median(row["read_bytes"] for row in trials) / model.nbytes,
    }


def compared(model: Model, found: Mapping[str, Sequence[Row]], *references: str) -> dict[str, Row]:
    """Returns each contestant's summary, and its time over that of each reference that took part.

    A ratio is the median of those of the rounds: within a round all meet the same machine, while two medians
    may come from two different minutes of it.
    """
    rows = {name: summary(model, trials) for name, trials in found.items()}
    for name, trials in found.items():
        for reference in references:
            rounds = list(zip(trials, found.get(reference, ()), strict=False))
            if rounds:
                ratios = [ratio(own["seconds"], other["seconds"]) for own, other in rounds]
                rows[name] |= {
                    f"x {reference}": statistics.median(ratios),
                    f"x {reference}, from-to": [min(ratios), max(ratios)],
                    # On a machine with other work to do, processor time is the fairer figure.
                    f"cpu x {reference}": statistics.median(
                        ratio(own["cpu_seconds"], other["cpu_seconds"]) for own, other in rounds
                    ),
                }
    return rows


def ratio(own: float, other: float) -> float:
    """Returns how often one time goes into another; a toy may take no processor time that is counted."""
    return own / other if other else float("nan")


def command(*words: str) -> list[str]:
    """Returns what Python runs for a command of `orbax-nnx`."""
    return ["-m", "orbax_nnx_handler", *words]


def program(words: Sequence[str], status: int, *, toy: bool = False) -> Row:
    """Runs Python once; returns its time, its processor time and its peak of memory.

    As a toy, a command of `orbax-nnx` runs in this process, whose peak says nothing.

    Raises:
        RuntimeError: It ended with another exit status.
    """
    if toy and words[: len(command())] == command():
        return _command_here(words[len(command()) :], status)
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


def _command_here(words: Sequence[str], status: int) -> Row:
    """Runs a command of `orbax-nnx` in this process."""
    # Here, for what is measured must not be imported by what measures.
    from orbax_nnx_handler.cli import main

    start, cpu = time.monotonic(), time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        ended = main(list(words))
    if ended != status:
        raise RuntimeError(f"{words} ended with {ended}, not {status}")
    seconds, cpu = time.monotonic() - start, time.process_time() - cpu
    return {"seconds": seconds, "cpu_seconds": cpu, "peak GB": 0.0}


def _high_water(pid: int) -> int:
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Returns rows as a Markdown table."""
    listed = list(rows)
    columns = list(dict.fromkeys(column for row in listed for column in row))
    lines = [
        columns,
        ["---"] * len(columns),
        *([_cell(row.get(column)) for column in columns] for row in listed),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, list | tuple):
        return "–".join(_cell(part) for part in value)
    return "" if value is None else str(value)


def report(name: str, options: argparse.Namespace, results: Any, tables: Mapping[str, str]) -> None:
    """Prints the tables and writes everything to JSON, with machine, versions and command."""
    for title, content in tables.items():
        print(f"\n{title}\n\n{content}")
    out = options.out or (None if options.toy else RESULTS / f"{name}.json")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"circumstances": circumstances(), "results": results}, indent=1) + "\n")
        print(f"\nresults: {out}")


def earlier(name: str, options: argparse.Namespace) -> Any:
    """Returns the results that an earlier run left where this one will write."""
    out = options.out or RESULTS / f"{name}.json"
    return json.loads(out.read_text())["results"] if out.exists() else {}


def circumstances() -> Row:
    """Returns machine, versions and command."""
    packages = ("jax", "flax", "orbax-checkpoint", "tensorstore", "numpy", "zstandard")
    return {
        "command": f"python -m benchmarks.{pathlib.Path(sys.argv[0]).stem} {' '.join(sys.argv[1:])}".strip(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors",
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9),
        "python": platform.python_version(),
        "versions": {package: metadata.version(package) for package in packages},
    }


def settings_of(model: Model, path: pathlib.Path, **more: Any) -> Row:
    """Returns what a trial needs to know of a model."""
    return {"model": dataclasses.asdict(model), "path": str(path), "placement": "one", **more}
