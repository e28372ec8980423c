"""Time against leaves, layers and processes."""

import pathlib

import pytest

from tests.benchmarks import toys


@pytest.mark.parametrize("name", ["scaling", "multihost"])
def test_a_benchmark_checks_the_values_that_it_measures(name: str, tmp_path: pathlib.Path) -> None:
    toys.check(name, tmp_path)
