"""Restores and saves beside stock Orbax; and that the benchmarks notice wrong values."""

import json
import pathlib

import pytest

from tests.benchmarks import toys


@pytest.mark.parametrize("name", ["restore", "save"])
def test_a_benchmark_checks_the_values_that_it_measures(name: str, tmp_path: pathlib.Path) -> None:
    toys.check(name, tmp_path)


def test_a_benchmark_of_wrong_values_fails(tmp_path: pathlib.Path) -> None:
    assert toys.run("save", tmp_path).returncode == 0
    for file in tmp_path.glob("*/checksums.json"):
        sums = json.loads(file.read_text())
        file.write_text(json.dumps({name: value ^ 1 for name, value in sums.items()}))

    done = toys.run("save", tmp_path)

    assert done.returncode == 1
    assert "values differ in" in done.stderr
