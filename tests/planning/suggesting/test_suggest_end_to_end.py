"""The first proposal for whole models under automatic names, from the checkpoint to the logits."""

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from flax.training.train_state import TrainState

from orbax_nnx_handler import Suggestion, restore, suggest
from orbax_nnx_handler.planning.suggesting import Question
from tests.zoo.models import MODELS
from tests.zoo.models.base import ModelPair, build, initial_state
from tests.zoo.pairs import saved

UNNAMED = [pair for pair in MODELS if pair.determined is not None]


@pytest.fixture(scope="module", params=UNNAMED, ids=str)
def pair(request: pytest.FixtureRequest) -> ModelPair:
    return request.param


@pytest.fixture(scope="module")
def state(pair: ModelPair) -> TrainState:
    return initial_state(pair)


@pytest.fixture(scope="module")
def path(state: TrainState, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(state, tmp_path_factory.mktemp("model") / "checkpoint")


@pytest.fixture(scope="module")
def target(pair: ModelPair) -> Any:
    return nnx.eval_shape(lambda: build(pair))


@pytest.fixture(scope="module")
def proposal(pair: ModelPair, path: Path, target: Any) -> Suggestion:
    return suggest(path, target, init=functools.partial(build, pair))


def test_the_first_proposal_gives_linens_logits_wherever_shapes_and_order_tell(
    pair: ModelPair, state: TrainState, path: Path, target: Any, proposal: Suggestion
) -> None:
    if pair.determined == "outputs":
        assert {about for about, _ in map(_places, proposal.questions)} == {("Dense_0", "Dense_1")}
        return
    if pair.determined == "nothing":
        assert proposal.questions
        return
    assert gives_linens_logits(pair, state, path, target, proposal)


def _places(question: Question) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Returns the last names of what a question is about, stored and wanted."""
    stored, wanted = (tuple(sorted({path[-1] for path in side})) for side in question.parts)
    return stored, wanted


def gives_linens_logits(
    pair: ModelPair, state: TrainState, path: Path, target: Any, proposal: Suggestion
) -> bool:
    model, _ = restore(path, target, renames=proposal.renames, unexpected="error")

    variables = {"params": state.params}
    if hasattr(state, "batch_stats"):
        variables["batch_stats"] = state.batch_stats
    mode = {"train": False} if pair.has_statistics else {}
    # Each as one program: their operations one by one would be compiled one by one.
    expected = jax.jit(functools.partial(pair.linen.apply, **mode))(variables, *pair.inputs)
    actual = nnx.jit(lambda model, *inputs: model(*inputs, **mode))(model, *pair.inputs)
    return np.allclose(actual, expected, rtol=2e-5, atol=2e-5)


def test_it_says_what_it_rests_on(pair: ModelPair, proposal: Suggestion) -> None:
    assert proposal.problem == ""
    if pair.determined in ("outputs", "nothing"):
        assert proposal.confidence == "open"
        return
    assert proposal.unmatched_wanted == proposal.unmatched_stored == ()
    assert proposal.questions == ()
    assert proposal.confidence == ("certain" if pair.determined == "shapes" else "likely")


def test_where_the_order_is_forgotten_it_asks_or_names_tell(
    pair: ModelPair, state: TrainState, path: Path, target: Any
) -> None:
    proposal = suggest(path, target)

    assert (proposal.confidence == "certain") == (pair.determined == "shapes")
    assert proposal.confidence == "open" or gives_linens_logits(pair, state, path, target, proposal)
    assert bool(proposal.questions) == (proposal.confidence == "open")
