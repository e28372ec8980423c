"""Whole models: a Linen train state goes on training in NNX as if nothing had happened."""

from pathlib import Path

import jax
import orbax.checkpoint as ocp
import pytest
from flax.training.train_state import TrainState

from orbax_nnx_handler import save
from tests.sampled import every
from tests.zoo.models import MODELS
from tests.zoo.models.base import (
    ModelPair,
    TrainingModel,
    abstract_state,
    flat,
    float_leaves,
    linen_step,
    nnx_step,
    restored_state,
    trained_state,
)
from tests.zoo.pairs import Outcome, assert_same, broken, differs, saved

# One step computed by two programs in float32: gradients are sums in another order.
TOLERANCE = 1e-4


# A model whose names nobody knows is another one under rules, of which the suite takes half; each is proposed
# by `suggest` too.
SAMPLE = [
    *(pair for pair in MODELS if not pair.renames),
    *every(2, [pair for pair in MODELS if pair.renames]),
]


# By fixture, not by mark: pytest then runs all tests of a model together, on one compilation.
@pytest.fixture(scope="module", params=SAMPLE, ids=str)
def pair(request: pytest.FixtureRequest) -> ModelPair:
    return request.param


@pytest.fixture(scope="module")
def state(pair: ModelPair) -> TrainState:
    return trained_state(pair)


@pytest.fixture(scope="module")
def target(pair: ModelPair) -> TrainingModel:
    return abstract_state(pair)


@pytest.fixture(scope="module")
def continued(
    pair: ModelPair, state: TrainState, target: TrainingModel, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Outcome, TrainingModel]:
    """What one NNX step shows and leaves behind, from the checkpoint that the Linen side wrote."""
    path = saved(state, tmp_path_factory.mktemp("model") / "checkpoint")
    model, optimizer = restored_state(pair, path, target)
    return nnx_step(pair, model, optimizer), (model, optimizer)


@pytest.fixture(scope="module")
def outcome(continued: tuple[Outcome, TrainingModel]) -> Outcome:
    return continued[0]


def test_logits_gradients_and_the_next_step_are_linens(
    pair: ModelPair, state: TrainState, outcome: Outcome
) -> None:
    _, expected = linen_step(pair, state)

    assert_same(expected, outcome, TOLERANCE)


def test_any_weight_statistic_or_moment_gone_wrong_is_noticed(
    pair: ModelPair, state: TrainState, outcome: Outcome
) -> None:
    unnoticed = [
        path
        for path in float_leaves(state, pair.without_variable)
        if not differs(linen_step(pair, broken(state, path))[1], outcome, TOLERANCE)
    ]

    assert unnoticed == []


def test_a_weight_swapped_on_disk_is_noticed(
    pair: ModelPair, state: TrainState, target: TrainingModel, tmp_path: Path
) -> None:
    _, expected = linen_step(pair, state)
    weight = next(path for path in float_leaves(state, pair.without_variable) if path.startswith("params/"))
    path = saved(broken(state, weight), tmp_path / "checkpoint")

    actual = nnx_step(pair, *restored_state(pair, path, target))

    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_same({"logits": expected["logits"]}, {"logits": actual["logits"]}, TOLERANCE)


def test_linen_goes_on_from_what_nnx_saves(
    pair: ModelPair, state: TrainState, continued: tuple[Outcome, TrainingModel], tmp_path: Path
) -> None:
    if not pair.saves_back:
        pytest.skip("NNX has other names or other layers, and saves its own")
    expected, _ = linen_step(pair, state)

    save(tmp_path / "checkpoint", continued[1])

    with ocp.StandardCheckpointer() as stock:
        actual = stock.restore(tmp_path / "checkpoint", jax.eval_shape(lambda: expected))
    assert_same(flat(expected), flat(actual), TOLERANCE)
