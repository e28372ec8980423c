"""A save under the plan of a restore writes what the checkpoint had, and more where its layout reads it."""

import warnings
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from orbax_nnx_handler import RuleError, plan_restore, restore, to_linen
from tests.storage.saving.trees import leaves, numbered, written

ADAM = optax.adam(0.1)


def of_one_kernel() -> dict[str, Any]:
    model = nnx.Dict(kernel=nnx.Param(jnp.zeros((3, 4))))
    return {"model": model, "optimizer": nnx.Optimizer(model, ADAM, wrt=nnx.Param)}


def test_a_stored_int64_step_stays_int64_without_x64(tmp_path: Path) -> None:
    params = {"kernel": np.zeros((3, 4), "float32")}
    state = numbered({"params": params, "opt_state": ADAM.init(params)})
    path = written(state | {"step": 2**31 + 5}, tmp_path / "linen")
    target = nnx.eval_shape(of_one_kernel)

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        tree = to_linen(restore(path, target), renames=plan_restore(path, target))

    assert tree["step"].dtype == np.int64
    assert int(tree["step"]) == 2**31 + 5


def t5x_state() -> dict[str, Any]:
    slots = {"grad_ema": np.zeros((3, 4), "float32"), "grad_sq_ema": np.zeros((3, 4), "float32")}
    tree = {"target": {"kernel": slots["grad_ema"]}, "state": {"param_states": {"kernel": slots}}}
    return numbered(tree) | {"state": {**numbered(tree, 20)["state"], "step": np.int32(7)}}


def test_a_step_that_was_stored_once_and_restored_as_a_count_too_is_written_once(tmp_path: Path) -> None:
    path = written(t5x_state(), tmp_path / "t5x")
    target = nnx.eval_shape(of_one_kernel)
    plan, state = plan_restore(path, target), restore(path, target)

    tree = leaves(to_linen(state, renames=plan))

    stored = leaves(t5x_state())
    assert tree.keys() == stored.keys()
    for key, value in stored.items():
        np.testing.assert_array_equal(tree[key], value)

    state["optimizer"].step.set_value(jnp.uint32(8))
    with pytest.raises(RuleError, match="optimizer/step is no longer optimizer/opt_state/0/count"):
        to_linen(state, renames=plan)
