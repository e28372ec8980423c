"""Every Flax module that exists in Linen and NNX computes the same after a restore."""

import functools
from pathlib import Path
from typing import Any

import jax
import pytest

from tests.zoo.modules import PAIRS
from tests.zoo.pairs import (
    Outcome,
    Pair,
    assert_same,
    broken,
    linen_outcome,
    nnx_outcome,
    restored_module,
    saved,
    stored_variables,
    weights_that_matter,
)

every_pair = pytest.mark.parametrize("pair", PAIRS, ids=str)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Returns what the NNX side of a pair shows, from one restore for all tests of the pair."""

    def outcome(pair: Pair) -> Outcome:
        path = saved(stored_variables(pair), tmp_path_factory.mktemp("pair") / "checkpoint")
        return nnx_outcome(pair, restored_module(pair, path))

    return functools.lru_cache(maxsize=1)(lambda index: outcome(PAIRS[index]))


@every_pair
def test_linen_and_nnx_compute_the_same_from_one_checkpoint(pair: Pair, outcomes: Any) -> None:
    expected = linen_outcome(pair, stored_variables(pair))

    actual = outcomes(PAIRS.index(pair))

    assert_same(expected, actual)


@every_pair
def test_any_weight_gone_wrong_is_noticed(pair: Pair, outcomes: Any) -> None:
    variables = stored_variables(pair)
    run = jax.jit(functools.partial(linen_outcome, pair))
    actual = outcomes(PAIRS.index(pair))

    unnoticed = []
    for weight in weights_that_matter(pair, variables):
        try:
            assert_same(run(broken(variables, weight)), actual)
        except AssertionError:
            continue
        unnoticed.append(weight)

    assert_same(run(variables), actual)
    assert unnoticed == []


@every_pair
def test_a_weight_swapped_on_disk_is_noticed(pair: Pair, tmp_path: Path) -> None:
    variables = stored_variables(pair)
    expected = linen_outcome(pair, variables)
    wrong = broken(variables, weights_that_matter(pair, variables)[0])

    actual = nnx_outcome(pair, restored_module(pair, saved(wrong, tmp_path / "checkpoint")))

    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_same(expected, actual)
