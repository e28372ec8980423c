"""big_vision: arrays named by their paths, optimizer fields by their numbers."""

from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from orbax_nnx_handler import plan_restore, restore
from tests.layouts import fixtures, writers
from tests.layouts.programs import assert_goes_on, trained, vision_transformer
from tests.layouts.writers import OPTIMIZERS


def written(root: Path, optimizer: str) -> Path:
    state = trained(vision_transformer(OPTIMIZERS[optimizer]))
    return writers.write_big_vision(root, state.params, state.opt_state)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_train_state_goes_on_in_nnx(tmp_path: Path, optimizer: str) -> None:
    path = written(tmp_path, optimizer)

    assert_goes_on(vision_transformer(OPTIMIZERS[optimizer]), path)


def test_the_directory_of_all_steps_means_its_newest(tmp_path: Path) -> None:
    written(tmp_path, "adam")

    assert_goes_on(vision_transformer(OPTIMIZERS["adam"]), tmp_path)


def test_the_pointer_to_the_last_checkpoint_is_followed(tmp_path: Path) -> None:
    kept = written(tmp_path, "adam")
    kept.rename(f"{kept}-tmp")  # Not to be kept for good, in big_vision's words.
    (tmp_path / "checkpoint.bv-LAST").write_text("000000003-tmp")

    assert_goes_on(vision_transformer(OPTIMIZERS["adam"]), tmp_path / "checkpoint.bv")


def test_the_collection_that_a_quantiser_keeps_beside_its_weights_is_restored(tmp_path: Path) -> None:
    params = {"head": {"kernel": np.full((4, 4), 2.0, np.float32)}}
    opt_state = fixtures.big_vision_adam().init(params)
    state = {"counts": np.arange(8, dtype=np.float32)}
    path = writers.write_big_vision(tmp_path, params, opt_state, state=state)
    target = nnx.State(
        {
            "head": {"kernel": nnx.Param(jax.ShapeDtypeStruct((4, 4), np.float32))},
            "counts": nnx.Variable(jax.ShapeDtypeStruct((8,), np.float32)),
        }
    )

    plan = plan_restore(path, target)
    found = restore(path, target, unexpected="ignore")

    assert plan.layout == "big_vision"
    np.testing.assert_array_equal(found["counts"].get_value(), state["counts"])
