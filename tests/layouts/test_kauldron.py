"""Kauldron: collections of their own level, written as the manager's default item."""

from pathlib import Path

import pytest

from tests.layouts import writers
from tests.layouts.programs import assert_goes_on, perceptron, trained


@pytest.mark.parametrize("optimizer", ["adam", "adafactor"])
def test_a_train_state_goes_on_in_nnx(tmp_path: Path, optimizer: str) -> None:
    root = writers.write_kauldron(tmp_path / "work", trained(perceptron(optimizer)))

    assert_goes_on(perceptron(optimizer), root)
