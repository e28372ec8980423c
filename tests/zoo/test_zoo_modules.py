"""Every Flax module that exists in Linen and NNX computes the same after a restore."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from orbax_nnx_handler.planning.core.errors import UnmappedValueError
from tests.zoo.modules import PAIRS
from tests.zoo.pairs import (
    Outcome,
    Pair,
    assert_same,
    broken,
    linen_outcome,
    nnx_outcome,
    replaced,
    restored_module,
    saved,
    stored_variables,
    weights_that_matter,
)

LinenRun = Callable[[Any], Outcome]


# By fixture, not by mark: pytest then runs all tests of a pair together, on one restore and one compilation.
@pytest.fixture(scope="module", params=PAIRS, ids=str)
def pair(request: pytest.FixtureRequest) -> Pair:
    return request.param


@pytest.fixture(scope="module")
def run_linen(pair: Pair) -> LinenRun:
    return jax.jit(functools.partial(linen_outcome, pair))


@pytest.fixture(scope="module")
def outcome(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """What the NNX side shows, restored from the checkpoint that the Linen side wrote."""
    path = saved(stored_variables(pair), tmp_path_factory.mktemp("pair") / "checkpoint")
    return nnx_outcome(pair, restored_module(pair, path))


def test_linen_and_nnx_compute_the_same_from_one_checkpoint(
    pair: Pair, run_linen: LinenRun, outcome: Outcome
) -> None:
    expected = run_linen(stored_variables(pair))

    assert_same(expected, outcome)


def test_any_weight_gone_wrong_is_noticed(pair: Pair, run_linen: LinenRun, outcome: Outcome) -> None:
    variables = stored_variables(pair)

    unnoticed = [
        weight
        for weight in weights_that_matter(pair, variables)
        if not _differs(run_linen(broken(variables, weight)), outcome)
    ]

    assert unnoticed == []


def test_a_weight_swapped_on_disk_is_noticed(pair: Pair, run_linen: LinenRun, tmp_path: Path) -> None:
    variables = stored_variables(pair)
    expected = run_linen(variables)
    wrong = broken(variables, weights_that_matter(pair, variables)[0])

    actual = nnx_outcome(pair, restored_module(pair, saved(wrong, tmp_path / "checkpoint")))

    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_same(expected, actual)


def _differs(expected: Outcome, actual: Outcome) -> bool:
    try:
        assert_same(expected, actual)
    except AssertionError:
        return True
    return False


HOMELESS = [pair for pair in PAIRS if pair.homeless]


@pytest.mark.parametrize("pair", HOMELESS, ids=str)
def test_a_value_that_nnx_has_no_home_for_is_refused_unless_it_is_zero(pair: Pair, tmp_path: Path) -> None:
    wrong = replaced(stored_variables(pair), pair.homeless[0], np.array([0, 0, 0.1, 0], np.float32))
    path = saved(wrong, tmp_path / "checkpoint")

    with pytest.raises(UnmappedValueError) as caught:
        restored_module(pair, path)

    assert ["/".join(map(str, path)) for path in caught.value.paths] == [pair.homeless[0]]
