"""`flax.training.checkpoints`: one msgpack file, or its Orbax backend."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization

from orbax_nnx_handler import plan_restore
from orbax_nnx_handler.planning.core.errors import NotACheckpointError
from tests.layouts import writers
from tests.layouts.programs import assert_goes_on, perceptron, trained

pytestmark = pytest.mark.filterwarnings("ignore:Flax Checkpointing will soon be deprecated")


@pytest.mark.parametrize("orbax", [False, True], ids=["msgpack", "orbax"])
def test_a_train_state_goes_on_in_nnx(tmp_path: Path, orbax: bool) -> None:
    path = writers.write_flax(tmp_path, writers.flax_state(trained(perceptron("adam"))), orbax=orbax)

    assert_goes_on(perceptron("adam"), path)


@pytest.mark.parametrize("orbax", [False, True], ids=["msgpack", "orbax"])
def test_the_directory_of_all_steps_means_its_newest(tmp_path: Path, orbax: bool) -> None:
    old = jax.tree.map(jnp.zeros_like, writers.flax_state(trained(perceptron("adam"))))
    writers.write_flax(tmp_path, old, orbax=orbax, step=1)
    writers.write_flax(tmp_path, writers.flax_state(trained(perceptron("adam"))), orbax=orbax, step=12)

    assert_goes_on(perceptron("adam"), tmp_path)


def test_arrays_of_several_processes_lie_beside_the_file(tmp_path: Path) -> None:
    path = writers.write_flax_distributed(
        tmp_path, writers.flax_state(trained(perceptron("adam"))), "params/up/kernel"
    )

    assert_goes_on(perceptron("adam"), path)


def test_a_file_of_something_else_is_named(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_3"
    path.write_bytes(b"\xc1 no msgpack")

    with pytest.raises(NotACheckpointError, match=f"^{path} is no msgpack file of a checkpoint: "):
        plan_restore(path, {"kernel": jax.ShapeDtypeStruct((2,), np.float32)})


def test_a_file_with_one_value_is_no_tree(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_3"
    path.write_bytes(serialization.to_bytes(np.zeros(2)))

    with pytest.raises(NotACheckpointError) as caught:
        plan_restore(path, {"kernel": jax.ShapeDtypeStruct((2,), np.float32)})

    assert str(caught.value) == f"{path} holds one ndarray, not the tree of a checkpoint"
