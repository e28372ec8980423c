"""T5X, in Orbax's format and in its own, and the `flax.optim` that its layout comes from."""

from pathlib import Path

import pytest

from tests.layouts import writers
from tests.layouts.programs import assert_goes_on, perceptron, restored, trained

pytestmark = pytest.mark.filterwarnings("ignore:Flax Checkpointing will soon be deprecated")


def test_a_t5x_train_state_with_a_wrapped_optax_optimizer_goes_on_in_nnx(tmp_path: Path) -> None:
    root = writers.write_t5x(tmp_path / "model", writers.t5x_tree(trained(perceptron("adam"))))

    assert_goes_on(perceptron("adam"), root)


def test_a_t5x_train_state_with_adafactor_goes_on_in_nnx(tmp_path: Path) -> None:
    root = writers.write_t5x(tmp_path / "model", writers.t5x_adafactor_tree(trained(perceptron("adafactor"))))

    assert_goes_on(perceptron("adafactor"), root)


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
