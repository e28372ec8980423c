"""Runs a benchmark at the size of a toy: what it measures is also a check of the values."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def run(name: str, scratch: pathlib.Path) -> subprocess.CompletedProcess[str]:
    """Runs a benchmark as a user does, with its checkpoints and its results in `scratch`."""
    command = ["-m", f"benchmarks.{name}", "--toy", "--scratch", scratch, "--out", scratch / f"{name}.json"]
    # The suite's eight devices are not the benchmarks': each asks for its own.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def check(name: str, scratch: pathlib.Path) -> None:
    """Asserts that a benchmark runs, finds every value right and writes results."""
    done = run(name, scratch)

    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads((scratch / f"{name}.json").read_text())["results"]
