"""Runs a benchmark at the size of a toy: what it measures is also a check of the values."""

import importlib
import json
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def run(name: str, scratch: pathlib.Path) -> None:
    """Runs a benchmark in this process, with its checkpoints and its results in `scratch`."""
    argv = [f"benchmarks/{name}.py", *arguments(name, scratch)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        importlib.import_module(f"benchmarks.{name}").main()


def arguments(name: str, scratch: pathlib.Path) -> list[str]:
    """Returns what follows `python -m benchmarks.<name>`."""
    return ["--toy", "--scratch", str(scratch), "--out", str(scratch / f"{name}.json")]


def check(name: str, scratch: pathlib.Path) -> None:
    """Asserts that a benchmark runs, finds every value right and writes results."""
    run(name, scratch)

    assert json.loads((scratch / f"{name}.json").read_text())["results"]
