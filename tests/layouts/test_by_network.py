"""The fields of several train states side by side, each called after its network, as RL programs do."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from orbax_nnx_handler import RestoreError, restore, save
from tests.laws.worlds import Branch, Numbers, below, check, refused, write

ADAM = optax.adam(1e-3)
NAMES = ("actor", "critic")


def _networks(numbers, names=NAMES):
    return {name: {"dense": numbers.dense(3, 4), "out": numbers.dense(4, 2)} for name in names}


def _stored(numbers, networks, field="opt_state"):
    tree = {f"{name}_params": params for name, params in networks.items()}
    tree |= {f"{name}_{field}": numbers.optimizer(ADAM, params) for name, params in networks.items()}
    return tree | {"step": np.int32(77)}


def _models(networks):
    return {name: Branch(params, {}) for name, params in networks.items()}


def _trained(model):
    return nnx.Optimizer(model, ADAM, wrt=nnx.Param)


def _nested(networks):
    return {name: {"model": model, "optimizer": _trained(model)} for name, model in _models(networks).items()}


def _beside(networks, suffix):
    models = _models(networks)
    return models | {f"{name}_{suffix}": _trained(model) for name, model in models.items()}


def test_the_weights_of_each_network_are_its_own_and_one_alone_is_a_target(tmp_path):
    numbers = Numbers()
    networks = _networks(numbers)
    path = write(tmp_path, _stored(numbers, networks))
    result = restore(path, nnx.eval_shape(lambda: _models(networks)))
    for name in NAMES:
        check(result[name], networks[name])
    one = nnx.eval_shape(lambda: _models({"critic": networks["critic"]}))
    check(restore(path, one, unexpected="ignore")["critic"], networks["critic"])
    # Of two networks no name tells which one a model without a name is.
    refused(path, nnx.eval_shape(lambda: Branch(networks["actor"], {})), unexpected="ignore")


@pytest.mark.parametrize("field", ["opt_state", "optimizer_state"])
def test_moments_follow_their_network_and_the_one_step_is_set_as_the_hint_says(tmp_path, field):
    numbers = Numbers()
    networks = _networks(numbers)
    stored = _stored(numbers, networks, field)
    path = write(tmp_path, stored)
    first = refused(path, nnx.eval_shape(lambda: _nested(networks)))
    assert "hint: add 'step' to the target, and set these from 'step' in the program" in str(first)
    target = {**nnx.eval_shape(lambda: _nested(networks)), "step": jax.ShapeDtypeStruct((), np.int32)}
    error = refused(path, target)
    assert {found[-2:] for found in error.paths} == {("optimizer", "step")}
    assert "hint: set these from 'step' in the program" in str(error)
    (policy,) = [hint.arguments["policy"] for hint in error.hints if hint.fills]
    result = restore(path, target, policy=policy, init=lambda: {**_nested(networks), "step": np.int32(0)})
    for name, params in networks.items():
        check(result[name]["model"], params)
        check(result[name]["optimizer"], below("opt_state", stored[f"{name}_{field}"]))
    assert int(result["step"]) == 77
    save(tmp_path / "again", result)
    again = restore(tmp_path / "again", target)
    check(again["critic"]["optimizer"], below("opt_state", stored[f"critic_{field}"]))


@pytest.mark.parametrize("suffix", ["opt", "optimizer"])
def test_optimizers_beside_their_networks_come_by_the_rules_of_the_hint(tmp_path, suffix):
    numbers = Numbers()
    networks = _networks(numbers)
    stored = _stored(numbers, networks)
    path = write(tmp_path, stored)
    target = nnx.eval_shape(lambda: _beside(networks, suffix))
    error = refused(path, target)
    (rules,) = [hint.arguments["renames"] for hint in error.hints if "renames" in hint.arguments]
    assert rules == [(f"{name}_opt_state", f"{name}_{suffix}/opt_state") for name in NAMES]
    second = refused(path, target, renames=rules)
    (policy,) = [hint.arguments["policy"] for hint in second.hints if hint.fills]
    result = restore(path, target, renames=rules, policy=policy, init=lambda: _beside(networks, suffix))
    # Rules for the weights, under the names that they have without any, change nothing.
    weights = [(f"{name}_params", name) for name in NAMES]
    for more in ([*weights, *rules], [*rules, *weights[:1]]):
        same = restore(path, target, renames=more, policy=policy, init=lambda: _beside(networks, suffix))
        for key in target:
            jax.tree.map(np.testing.assert_array_equal, nnx.state(same[key]), nnx.state(result[key]))
    for name in NAMES:
        check(result[f"{name}_{suffix}"], below("opt_state", stored[f"{name}_opt_state"]))


@pytest.mark.parametrize("more", [False, True])
def test_of_one_trained_network_the_step_is_its_own(tmp_path, more):
    numbers = Numbers()
    networks = _networks(numbers, ["policy"])
    stored = _stored(numbers, networks) | {"policy_batch_stats": {"norm": {"mean": numbers(4)}}}
    if more:
        stored |= {"target_policy_params": numbers.like(networks["policy"])}
    path = write(tmp_path, stored)
    whole = {**networks["policy"], "norm": {"mean": np.zeros(4, np.float32)}}

    def make():
        model = Branch(whole, {})
        return {"policy": {"model": model, "optimizer": _trained(model)}}

    result = restore(path, nnx.eval_shape(make), unexpected="ignore")
    check(result["policy"]["model"], {**networks["policy"], **stored["policy_batch_stats"]})
    check(
        result["policy"]["optimizer"],
        below("opt_state", stored["policy_opt_state"]) | {("step",): np.uint32(77)},
    )


@pytest.mark.parametrize("trained", [["policy", "value"], ["value"]])
@pytest.mark.parametrize("wanted", ["policy", "value"])
def test_one_step_beside_a_network_whose_optimizer_keeps_nothing_is_that_of_none(tmp_path, wanted, trained):
    numbers = Numbers()
    networks = _networks(numbers, ["policy", "value"])
    stored = _stored(numbers, networks)
    for name in {"policy", "value"}.difference(trained[:1]):
        stored[f"{name}_opt_state"] = optax.sgd(0.1).init(networks[name])
    path = write(tmp_path, stored)

    def make():
        model = Branch(networks[wanted], {})
        keeps_nothing = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
        return {
            wanted: {"model": model, "optimizer": _trained(model) if wanted in trained[:1] else keeps_nothing}
        }

    with pytest.raises(RestoreError) as caught:
        restore(path, nnx.eval_shape(make), unexpected="ignore")
    assert caught.value.paths == ((wanted, "optimizer", "step"),)
    rules = [("step", f"{wanted}/optimizer/step")]
    result = restore(path, nnx.eval_shape(make), unexpected="ignore", renames=rules)
    assert result[wanted]["optimizer"].step[...] == 77
    check(result[wanted]["model"], networks[wanted])


def test_a_pure_dict_of_the_stored_names_is_read_by_its_names(tmp_path):
    numbers = Numbers()
    stored = _stored(numbers, _networks(numbers))
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), stored)
    check(restore(write(tmp_path, stored), target), stored)
