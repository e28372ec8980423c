"""Every benchmark at the size of a toy: what it measures is also a check of the values."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
NAMES = sorted(
    file.stem
    for file in (ROOT / "benchmarks").glob("*.py")
    if 'if __name__ == "__main__"' in file.read_text()
)
# Not benchmarks by themselves: one trial, and the tables of results.
BENCHMARKS = [name for name in NAMES if name not in ("trial", "tables")]


def _run(name: str, scratch: pathlib.Path) -> subprocess.CompletedProcess[str]:
    command = ["-m", f"benchmarks.{name}", "--toy", "--scratch", scratch, "--out", scratch / f"{name}.json"]
    # The suite's eight devices are not the benchmarks': each asks for its own.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("benchmarks")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_checks_the_values_that_it_measures(name: str, scratch: pathlib.Path) -> None:
    done = _run(name, scratch)

    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads((scratch / f"{name}.json").read_text())["results"]


def test_a_benchmark_of_wrong_values_fails(tmp_path: pathlib.Path) -> None:
    assert _run("save", tmp_path).returncode == 0
    for file in tmp_path.glob("*/checksums.json"):
        sums = json.loads(file.read_text())
        file.write_text(json.dumps({name: value ^ 1 for name, value in sums.items()}))

    done = _run("save", tmp_path)

    assert done.returncode == 1
    assert "values differ in" in done.stderr
