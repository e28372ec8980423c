"""Tunix: the states of an NNX model and of its optimizer, in two items of a step."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from orbax_nnx_handler import restore
from tests.layouts import writers
from tests.layouts.programs import Program, assert_goes_on, build, nnx_state, perceptron, trained_nnx


@pytest.fixture(scope="module")
def program() -> Program:
    return perceptron("adam")


def items(program: Program) -> dict[str, Any]:
    """What sft/checkpoint_manager.py `save` hands to Orbax."""
    model, optimizer = trained_nnx(program)
    return {
        "model_params": nnx.state(model),
        "optimizer_state": nnx.state(optimizer, nnx.optimizer.OptState),
    }


def test_a_step_goes_on(tmp_path: Path, program: Program) -> None:
    root = writers.write_tunix(tmp_path / "run", items(program))

    assert_goes_on(program, root)


def test_each_item_is_restored_by_its_name(tmp_path: Path, program: Program) -> None:
    root = writers.write_tunix(tmp_path / "run", items(program))
    model, optimizer = nnx.eval_shape(lambda: build(program))

    weights = restore(root, model, item="model_params", unexpected="error")
    moments = restore(root, optimizer, item="optimizer_state", unexpected="error")

    expected, expected_moments = trained_nnx(program)
    for found, saved in [(weights, expected), (moments, expected_moments)]:
        jax.tree.map(
            np.testing.assert_array_equal,
            nnx.to_pure_dict(nnx.state(found)),
            nnx.to_pure_dict(nnx.state(saved)),
        )


def test_a_step_with_the_model_only_is_an_nnx_state(tmp_path: Path, program: Program) -> None:
    root = writers.write_tunix(tmp_path / "run", {"model_params": items(program)["model_params"]})
    model, _ = nnx.eval_shape(lambda: build(program))

    restored = restore(root, model, unexpected="error")

    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(restored)), nnx_state(program)[0])
