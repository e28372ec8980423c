"""T5X, in Orbax's format and in its own, and the `flax.optim` that its layout comes from."""

from pathlib import Path
from typing import Any

import numpy as np
import optax
import pytest
from flax import nnx

from orbax_nnx_handler import MissingParamError, restore
from tests.layouts import writers
from tests.layouts.programs import assert_goes_on, perceptron, restored, trained

pytestmark = pytest.mark.filterwarnings("ignore:Flax Checkpointing will soon be deprecated")

SQUARE_MESSAGE = """the checkpoint lacks 2 of the 6 leaves that the target needs:
  1/opt_state/v_col/out/kernel   (8,) float32
  1/opt_state/v_row/out/kernel   (8,) float32
checkpoint: {}/checkpoint_3/state (layout: T5X, 6 stored leaves, 1 of them unexpected)
cause: 2 stored v_row and v_col belong to parameters with two axes of one size, and T5X does not \
store which axis it
       took for the row: optax may call them the other way round.
hint: pass policy={{nnx.PathContains("v_col"): "init", nnx.PathContains("v_row"): "init", \
...: "error"}} to initialise
      these 2 leaves and nothing else.
hint: the target is abstract, so initial values need init=..., a function that builds the target."""


def square_target() -> Any:
    def build() -> Any:
        model = nnx.Dict(out=nnx.Linear(8, 8, use_bias=False, rngs=nnx.Rngs(0)))
        optimizer = optax.scale_by_factored_rms(min_dim_size_to_factor=4)
        return model, nnx.Optimizer(model, optimizer, wrt=nnx.Param)

    return nnx.eval_shape(build)


def square_checkpoint(root: Path) -> Path:
    kernel = np.ones((8, 8), np.float32)
    moments = {"v_row": kernel[0], "v_col": kernel[1], "v": kernel[0, :1], "m": kernel[0, :1]}
    state = {"step": np.int32(3), "param_states": {"out": {"kernel": moments}}}
    return writers.write_t5x(root, {"target": {"out": {"kernel": kernel}}, "state": state})


def test_a_t5x_train_state_with_a_wrapped_optax_optimizer_goes_on_in_nnx(tmp_path: Path) -> None:
    root = writers.write_t5x(tmp_path / "model", writers.t5x_tree(trained(perceptron("adam"))))

    assert_goes_on(perceptron("adam"), root)


def test_a_t5x_train_state_with_adafactor_goes_on_in_nnx(tmp_path: Path) -> None:
    root = writers.write_t5x(tmp_path / "model", writers.t5x_adafactor_tree(trained(perceptron("adafactor"))))

    assert_goes_on(perceptron("adafactor"), root)


def test_moments_that_t5x_factors_by_the_names_of_axes_find_those_of_optax(tmp_path: Path) -> None:
    tree = writers.t5x_adafactor_tree(trained(perceptron("adafactor")), row_last=["up"])
    root = writers.write_t5x(tmp_path / "model", tree)

    assert_goes_on(perceptron("adafactor"), root)


def test_factored_moments_of_a_square_parameter_are_not_guessed(tmp_path: Path) -> None:
    target, stored = square_target(), square_checkpoint(tmp_path / "model")

    with pytest.raises(MissingParamError) as caught:
        restore(stored, target)

    assert str(caught.value) == SQUARE_MESSAGE.format(stored)


@pytest.mark.parametrize("optimizer", ["adam", "adafactor"])
def test_a_checkpoint_in_t5xs_own_format_goes_on_in_nnx(tmp_path: Path, optimizer: str) -> None:
    tree = writers.t5x_tree if optimizer == "adam" else writers.t5x_adafactor_tree
    directory = writers.write_t5x_native(tmp_path, tree(trained(perceptron(optimizer))))

    assert_goes_on(perceptron(optimizer), directory)


def test_t5xs_step_is_every_optimizers_count(tmp_path: Path) -> None:
    root = writers.write_t5x(tmp_path / "model", writers.t5x_adafactor_tree(trained(perceptron("adafactor"))))

    _, optimizer = restored(perceptron("adafactor"), root)

    counts = [optimizer.opt_state[0].count, optimizer.opt_state[4].count, optimizer.step]
    assert [int(count.get_value()) for count in counts] == [3, 3, 3]


@pytest.mark.parametrize("optimizer", ["adam", "momentum"])
def test_a_flax_optim_optimizer_goes_on_in_nnx(tmp_path: Path, optimizer: str) -> None:
    state = trained(perceptron(optimizer))
    tree = writers.flax_optim_tree(state, writers.flax_optim_slots(state))
    tree["flax_mutables"] = {"batch_stats": state.statistics}
    path = writers.write_flax(tmp_path, tree, orbax=False)

    assert_goes_on(perceptron(optimizer), path)
