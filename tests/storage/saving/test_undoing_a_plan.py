"""A save under the plan of a restore writes what the checkpoint had, and more where its layout reads it."""

import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from orbax_nnx_handler import RuleError, from_linen, plan_restore, restore, to_linen
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


def of_networks() -> dict[str, Any]:
    return {name: of_one_kernel() for name in ("actor", "critic")}


def test_the_steps_of_several_networks_are_saved_beside_their_fields() -> None:
    params = {"kernel": np.zeros((3, 4), "float32")}
    fields = {"params": params, "opt_state": ADAM.init(params)}
    stored = numbered(
        {f"{name}_{key}": value for name in ("actor", "critic") for key, value in fields.items()}
    )
    target = nnx.eval_shape(of_networks)
    policy: Any = {nnx.PathContains("step"): "warn", ...: "error"}
    state = from_linen(stored, target, policy=policy)
    for at, name in enumerate(("actor", "critic")):
        state[name]["optimizer"].step.set_value(jnp.uint32(70 + at))

    tree = to_linen(state, renames=plan_restore(stored, target, policy=policy))

    assert tree.keys() == {*stored, "actor_step", "critic_step"}
    back = from_linen(tree, target)
    assert [int(back[name]["optimizer"].step[...]) for name in back] == [70, 71]


@pytest.mark.parametrize("rules", [[("Dense_0", "lin")], [("net", "")], [("old", "model")]])
def test_what_a_rule_did_not_restore_is_found_under_the_same_rules(rules: Any) -> None:
    def made() -> dict[str, Any]:
        model = nnx.Dict(lin=nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
        return {"model": model, "optimizer": nnx.Optimizer(model, ADAM, wrt=nnx.Param)}

    names = [name for name in rules[0][0].split("/") if name in ("Dense_0", "net")]
    kernel: Any = {"kernel": np.zeros((2, 3), "float32")}
    params = {"Dense_0": kernel} if names == ["Dense_0"] else {"lin": kernel}
    params = {"net": params} if names == ["net"] else params
    stored = numbered({"params": params, "opt_state": ADAM.init(params), "step": np.int32(0)})
    stored = {"old": stored} if rules == [("old", "model")] else stored
    target = nnx.eval_shape(made)
    state = from_linen(stored, made(), renames=rules, policy="init")
    state["model"].lin.bias.set_value(jnp.asarray([5.0, 6.0, 7.0]))

    tree = to_linen(state, renames=plan_restore(stored, target, renames=rules, policy="warn"))

    back = from_linen(tree, target, renames=rules)
    for key in ("model", "optimizer"):
        pairs = zip(
            jax.tree.leaves(nnx.state(back[key])), jax.tree.leaves(nnx.state(state[key])), strict=True
        )
        assert all(np.array_equal(one, other) for one, other in pairs)


def test_the_sums_of_flax_optims_adagrad_are_optaxs_and_go_back_under_their_name() -> None:
    def made() -> dict[str, Any]:
        model = nnx.Dict(kernel=nnx.Param(jnp.zeros((3, 4))))
        return {"model": model, "optimizer": nnx.Optimizer(model, optax.adagrad(0.1), wrt=nnx.Param)}

    zeros = np.zeros((3, 4), "float32")
    slots = {"kernel": {"G": zeros}}
    stored = numbered({"target": {"kernel": zeros}, "state": {"step": np.int32(0), "param_states": slots}})
    state = from_linen(stored, nnx.eval_shape(made))

    sums = state["optimizer"].opt_state[0].sum_of_squares["kernel"][...]
    np.testing.assert_array_equal(sums, stored["state"]["param_states"]["kernel"]["G"])
    tree = to_linen(state, renames=plan_restore(stored, nnx.eval_shape(made)))
    assert tree.keys() == stored.keys()
    for one, other in zip(jax.tree.leaves(tree), jax.tree.leaves(stored), strict=True):
        np.testing.assert_array_equal(one, other)
