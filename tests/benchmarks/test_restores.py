"""Restores and saves beside stock Orbax; and that the benchmarks notice wrong values."""

import json
import pathlib

import pytest

from benchmarks.measuring import settings_of, trials
from benchmarks.models import sized, write
from tests.benchmarks import toys


@pytest.mark.parametrize("name", ["restore", "remote"])
def test_a_benchmark_checks_the_values_that_it_measures(name: str, tmp_path: pathlib.Path) -> None:
    toys.check(name, tmp_path)


@pytest.fixture(scope="module")
def saves(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Where the benchmark of saves has run, and has found every value right."""
    scratch = tmp_path_factory.mktemp("saves")
    toys.check("save", scratch)
    return scratch


def _with_wrong_checksums(scratch: pathlib.Path) -> None:
    for file in scratch.glob("*/checksums.json"):
        sums = json.loads(file.read_text())
        file.write_text(json.dumps({name: value ^ 1 for name, value in sums.items()}))


def test_a_benchmark_checks_right_values_and_fails_by_wrong_ones(saves: pathlib.Path) -> None:
    _with_wrong_checksums(saves)

    with pytest.raises((AssertionError, RuntimeError), match="values differ in"):
        toys.run("save", saves)


def test_a_trial_in_a_process_of_its_own_gives_figures_and_notices_wrong_values(
    tmp_path: pathlib.Path,
) -> None:
    model = sized(9, 10_000)
    settings = settings_of(
        model, write(model, tmp_path), contestant="ours", devices=2, placement="replicated"
    )

    (figures,) = trials([settings])

    assert figures["seconds"] > 0
    _with_wrong_checksums(tmp_path)
    with pytest.raises(RuntimeError, match="values differ in"):
        trials([settings])
