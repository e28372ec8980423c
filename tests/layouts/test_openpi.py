"""openpi: an NNX program's own state, weights and the rest of training in two items."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from orbax_nnx_handler import plan_restore, restore
from tests.layouts import writers
from tests.layouts.programs import Program, assert_goes_on, build, goes_on, nnx_state, perceptron, restored


@pytest.fixture(scope="module")
def program() -> Program:
    return perceptron("adam")


def items(program: Program, *, averaged: bool = False, boxed: bool = True) -> dict[str, Any]:
    """What training/checkpoints.py `_split_params` makes of a train state."""
    params, opt_state = nnx_state(program)
    average = jax.tree.map(lambda leaf: leaf * 0.5, params)
    return {
        "params": {"params": writers.boxed(average if averaged else params) if boxed else params},
        "train_state": {
            "step": jnp.asarray(3),
            "opt_state": writers.boxed_moments(opt_state),
            "params": writers.boxed(params) if averaged else {},
        },
    }


def test_a_step_goes_on_in_nnx(tmp_path: Path, program: Program) -> None:
    root = writers.write_items(tmp_path / "run", items(program))

    assert_goes_on(program, root)


@pytest.mark.parametrize("boxed", [True, False], ids=["as trained", "as released"])
def test_the_weights_alone_are_restored_from_their_item(
    tmp_path: Path, program: Program, boxed: bool
) -> None:
    root = writers.write_items(tmp_path / "run", {"params": items(program, boxed=boxed)["params"]})

    # Without its boxes it is `params` of Linen's, from which no statistic comes.
    target, layout = nnx.eval_shape(lambda: program.nnx(nnx.Rngs(0))), "auto" if boxed else "openpi_weights"
    model = restore(root, target, layout=layout, unexpected="error")

    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(model)), nnx_state(program)[0])


def test_the_optimizer_alone_is_restored_from_its_item(tmp_path: Path, program: Program) -> None:
    root = writers.write_items(tmp_path / "run", items(program))
    (target,) = (item for item in nnx.eval_shape(lambda: build(program)) if isinstance(item, nnx.Optimizer))

    optimizer = restore(root, target, item="train_state", unexpected="error")

    moments = nnx.to_pure_dict(nnx.state(optimizer, nnx.optimizer.OptState))["opt_state"]
    expected = jax.tree.leaves(nnx_state(program)[1])
    assert len(expected) > 8
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(moments), expected)
    assert int(optimizer.step.get_value()) == 3


def test_with_averaged_weights_each_item_is_named_by_the_caller(tmp_path: Path, program: Program) -> None:
    root = writers.write_items(tmp_path / "run", items(program, averaged=True))
    target = nnx.eval_shape(lambda: program.nnx(nnx.Rngs(0)))

    average = restore(root, target, item="params")
    model, optimizer = restored(program, root, item="train_state")

    halves = jax.tree.map(lambda leaf: leaf * 0.5, nnx_state(program)[0])
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(average)), halves)
    goes_on(program, model, optimizer)


def test_an_averaged_step_is_not_read_as_one(tmp_path: Path, program: Program) -> None:
    root = writers.write_items(tmp_path / "run", items(program, averaged=True))

    plan = plan_restore(root, nnx.eval_shape(lambda: program.nnx(nnx.Rngs(0))))

    assert Path(plan.directory).name == "params"
