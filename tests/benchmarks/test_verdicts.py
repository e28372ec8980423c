"""Verdicts on plans that fit and on plans that do not."""

import pathlib

import pytest

from tests.benchmarks import toys


@pytest.mark.parametrize("name", ["verdict", "planning"])
def test_a_benchmark_checks_what_it_measures(name: str, tmp_path: pathlib.Path) -> None:
    toys.check(name, tmp_path)
