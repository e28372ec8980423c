"""Scenic, with optax and with the `flax.optim` it began with."""

from pathlib import Path

import pytest

from tests.layouts import writers
from tests.layouts.programs import assert_goes_on, perceptron, trained

pytestmark = pytest.mark.filterwarnings("ignore:Flax Checkpointing will soon be deprecated")


@pytest.mark.parametrize("optimizer", ["adam", "adafactor"])
def test_a_train_state_goes_on_in_nnx(tmp_path: Path, optimizer: str) -> None:
    path = writers.write_flax(tmp_path, writers.scenic_state(trained(perceptron(optimizer))), orbax=False)

    assert_goes_on(perceptron(optimizer), path)


@pytest.mark.parametrize("optimizer", ["adam", "momentum"])
def test_an_early_train_state_goes_on_in_nnx(tmp_path: Path, optimizer: str) -> None:
    state = trained(perceptron(optimizer))
    tree = writers.early_scenic_tree(state, writers.flax_optim_slots(state))
    path = writers.write_flax(tmp_path, tree, orbax=False)

    assert_goes_on(perceptron(optimizer), path)
