"""The command line; and that no benchmark is without a test."""

import math
import pathlib

import pytest

from benchmarks.measuring import program, ratio
from tests.benchmarks import toys

_TESTED = {
    "restore",
    "save",
    "scaling",
    "multihost",
    "verdict",
    "planning",
    "convert",
    "command_line",
    "remote",
    "accelerator",
    "in_memory",
    "simulate",
    "verify",
    "suggesting",
}
# Not benchmarks by themselves: one trial, a bucket, and the tables and plots of results.
_OTHER = {"trial", "tables", "bucket", "plots"}


@pytest.mark.parametrize(
    "name", ["convert", "command_line", "accelerator", "in_memory", "verify", "suggesting"]
)
def test_a_benchmark_checks_what_it_measures(name: str, tmp_path: pathlib.Path) -> None:
    toys.check(name, tmp_path)


def test_a_program_is_measured_by_itself_and_its_exit_status_checked() -> None:
    row = program(["-c", "import numpy"], 0)

    # This process holds more.
    assert 0 < row["peak GB"] < 0.3
    assert row["cpu_seconds"] > 0
    with pytest.raises(RuntimeError, match="ended with 1, not 0"):
        program(["-c", "raise SystemExit(1)"], 0)


def test_a_time_that_is_too_short_to_be_counted_has_no_ratio() -> None:
    assert ratio(0.5, 0.25) == 2
    assert math.isnan(ratio(0.5, 0.0))


def test_every_benchmark_is_tested() -> None:
    programs = {
        file.stem
        for file in (toys.ROOT / "benchmarks").glob("*.py")
        if 'if __name__ == "__main__"' in file.read_text()
    }

    assert programs == _TESTED | _OTHER
