"""Law 4: no two stored elements claim one wanted element, and none lands in two wanted leaves."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from orbax_nnx_handler import AmbiguousMappingError, Drop, StackLayers, restore, save, to_linen
from orbax_nnx_handler.planning.core.leaves import StoredLeaf, WantedLeaf
from orbax_nnx_handler.planning.core.recipes import Read, Stack
from orbax_nnx_handler.planning.layouts.layout import Placement
from orbax_nnx_handler.planning.target.roles import Wanted
from orbax_nnx_handler.planning.verdict.claims import Claims
from orbax_nnx_handler.planning.verdict.elements import read_and_steps
from tests.laws.worlds import (
    FORMS,
    Numbers,
    below,
    check,
    model_target,
    pure_target,
    refused,
    right_or_refused,
    stacked,
    target_of,
    training_target,
    write,
)


def _kernels(numbers, *names):
    return {name: {"kernel": numbers(3, 4)} for name in names}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("double", ["layers_00", "layers_000"])
def test_two_spellings_of_layer_zero_are_two_claims(tmp_path, double, form):
    numbers = Numbers()
    layers = _kernels(numbers, "layers_0", double, "layers_1")
    wanted = {"layers": stacked([layers["layers_0"], layers["layers_1"]])}
    refused(write(tmp_path, {"params": layers}), target_of(form, wanted), unexpected="ignore")


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_in_the_name_and_one_in_the_path_are_two_claims(tmp_path, form):
    numbers = Numbers()
    layers = _kernels(numbers, "layers_0", "layers_1")
    stored = layers | {"layers": _kernels(numbers, "0")}
    wanted = {"layers": stacked([layers["layers_0"], layers["layers_1"]])}
    refused(write(tmp_path, {"params": stored}), target_of(form, wanted), unexpected="ignore")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("names", [("attn", "mlp"), ("mlp", "attn"), ("a", "b")])
def test_two_kinds_of_layer_do_not_become_one(tmp_path, names, form):
    numbers = Numbers()
    stored = {"blocks": {f"{name}_{at}": {"scale": numbers(4)} for name in names for at in range(2)}}
    wanted = {f"blocks_{at}": {"scale": np.zeros(4, np.float32)} for at in range(2)}
    refused(write(tmp_path, {"params": stored}), target_of(form, wanted), unexpected="ignore")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("old", ["old", "extra", "zzz"])
def test_a_rename_onto_a_stored_group_is_a_second_claim(tmp_path, old, form):
    numbers = Numbers()
    layers = _kernels(numbers, "layers_0", "layers_1")
    stored = layers | _kernels(numbers, f"{old}_0", f"{old}_1")
    path = write(tmp_path, {"params": stored})
    rules = [(f"{old}_{{i}}", "layers_{i}")]
    wanted = {"layers": stacked(list(layers.values()))}
    refused(path, target_of(form, wanted), renames=rules, unexpected="ignore")
    refused(path, target_of(form, layers), renames=rules, unexpected="ignore")


def test_a_rule_that_stacks_layers_counts_each_once(tmp_path):
    numbers = Numbers()
    layers = _kernels(numbers, "layers_0", "layers_00", "layers_1")
    wanted = {"layers": stacked([layers["layers_0"], layers["layers_1"]])}
    path = write(tmp_path, {"params": layers})
    refused(path, pure_target(wanted), renames=[StackLayers("layers_{i}", "layers", 0)], unexpected="ignore")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("submodule", ["dense_0", "Dense_0", "mlp_0"])
@pytest.mark.parametrize("policy", ["error", "warn"])
def test_a_new_bias_of_a_layer_is_not_that_of_its_submodule(tmp_path, submodule, policy, form):
    numbers = Numbers()
    stored = {"blocks": {submodule: {"kernel": numbers(3, 4, 4), "bias": numbers(3, 4)}}}
    layer = {
        "bias": np.zeros(4, np.float32),
        submodule: {"kernel": np.zeros((4, 4), np.float32), "bias": np.zeros(4, np.float32)},
    }
    wanted = (
        {"blocks": dict.fromkeys(range(3), layer)}
        if form != "pure"
        else {f"blocks_{at}": layer for at in range(3)}
    )
    path = write(tmp_path, {"params": stored})
    if policy == "error":
        refused(path, target_of(form, wanted), unexpected="error")
        return
    result = restore(path, target_of(form, wanted), policy="warn")
    inner = jax.tree.map(lambda leaf: leaf, stored["blocks"][submodule])
    layers = [
        {"bias": np.zeros(4, np.float32), submodule: {key: value[at] for key, value in inner.items()}}
        for at in range(3)
    ]
    check(
        result,
        {"blocks": dict(enumerate(layers))}
        if form != "pure"
        else {f"blocks_{at}": layers[at] for at in range(3)},
    )


@pytest.mark.parametrize("form", FORMS)
def test_one_bias_does_not_become_two(tmp_path, form):
    numbers = Numbers()
    stored = {f"blocks_{at}": {"bias": numbers(4)} for at in range(3)}
    wanted = {
        "blocks": {"bias": np.zeros((3, 4), np.float32), "dense_0": {"bias": np.zeros((3, 4), np.float32)}}
    }
    refused(write(tmp_path, {"params": stored}), target_of(form, wanted), unexpected="ignore")


@pytest.mark.parametrize("form", FORMS)
def test_a_weight_stored_once_is_not_used_under_two_names(tmp_path, form):
    numbers = Numbers()
    stored = {"embed": {"embedding": numbers(5, 4)}}
    wanted = {
        "embed": {"embedding": np.zeros((5, 4), np.float32)},
        "head": {"embedding": np.zeros((5, 4), np.float32)},
    }
    refused(write(tmp_path, {"params": stored}), target_of(form, wanted), unexpected="ignore")


class _Tied(nnx.Module):
    def __init__(self):
        self.embed = nnx.Embed(5, 4, rngs=nnx.Rngs(0))
        self.head = self.embed


def test_a_variable_that_the_target_shares_is_filled_once(tmp_path):
    stored = {"embed": {"embedding": Numbers()(5, 4)}}
    result = restore(write(tmp_path, {"params": stored}), nnx.eval_shape(_Tied))
    assert result.head is result.embed
    np.testing.assert_array_equal(result.head.embedding[...], stored["embed"]["embedding"])


@pytest.mark.parametrize(
    ("stored", "rules"),
    [
        (("embed", "head"), []),
        (("table", "head"), [("table", "embed")]),
        (("embed", "out"), [("out", "head")]),
        (("table", "out"), [("table", "embed"), ("out", "head")]),
    ],
)
@pytest.mark.parametrize("unexpected", ["warn", "ignore"])
def test_a_variable_that_the_target_shares_has_one_value(tmp_path, stored, rules, unexpected):
    numbers = Numbers()
    path = write(tmp_path, {"params": {name: {"embedding": numbers(5, 4)} for name in stored}})
    target = nnx.eval_shape(_Tied)

    error = refused(path, target, renames=rules, unexpected=unexpected)

    assert isinstance(error, AmbiguousMappingError)
    for name in stored:
        assert f"<- params/{name}/embedding" in str(error)
    kept, left = stored
    taken = [rule for rule in rules if rule[0] == kept]
    result = restore(path, target, renames=[Drop(left, "the table is tied now"), *taken])
    assert float(result.head.embedding[0, 0]) == 1


class _WithStreams(nnx.Module):
    def __init__(self):
        self.dense = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
        self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(1))
        self.again = self.drop


def test_a_random_stream_that_the_target_shares_is_no_claim_on_a_weight(tmp_path):
    model = _WithStreams()
    tree = to_linen(model, layout="maxtext")
    tree["params"]["params"]["more"] = {"kernel": Numbers()(2, 2)}

    found = restore(write(tmp_path, tree), nnx.eval_shape(_WithStreams), unexpected="ignore")

    check(nnx.state(found, nnx.Param), nnx.state(model, nnx.Param))


def test_a_layer_stored_both_alone_and_in_a_stack_is_asked_for(tmp_path):
    numbers = Numbers()
    layers = _kernels(numbers, "layers_0", "layers_1")
    stored = layers | {"layers": stacked(list(_kernels(numbers, "layers_0", "layers_1").values()))}
    right_or_refused(write(tmp_path, {"params": stored}), pure_target(layers), layers, unexpected="ignore")
    refused(
        write(tmp_path, {"params": stored}),
        model_target({"layers": {0: layers["layers_0"], 1: layers["layers_1"]}}),
        unexpected="ignore",
    )


def _of_one_step(tmp_path):
    """Returns a checkpoint, what it holds, and a model and an optimizer that want it."""
    numbers, tx = Numbers(), optax.adam(1e-3)
    params = {"dense": numbers.dense()}
    stored = {"params": params, "opt_state": numbers.optimizer(tx, params), "step": np.int32(7)}
    target = training_target(params, tx)
    return write(tmp_path, stored), stored, {"model": target.model, "optimizer": target.optimizer}


def test_one_stored_step_is_not_read_twice_and_the_hint_says_how_both_are_set(tmp_path):
    path, _, parts = _of_one_step(tmp_path)
    error = refused(path, {**parts, "step": jax.ShapeDtypeStruct((), np.int32)})
    assert [list(error.paths), error.causes[0].kind] == [[("optimizer", "step")], "SecondStep"]
    assert not any(hint.fills for hint in error.hints)
    assert "leave 'step' out of the target, and set it from 'optimizer/step' in the program." in str(error)
    result = restore(path, parts)
    assert int(result["optimizer"].step.get_value()) == 7
    save(tmp_path / "both", {**result, "step": result["optimizer"].step.get_value()})
    again = restore(tmp_path / "both", {**parts, "step": jax.ShapeDtypeStruct((), np.int32)})
    assert [int(again["step"]), int(again["optimizer"].step.get_value())] == [7, 7]


def test_a_rule_for_the_step_takes_it_to_the_optimizer_and_leaves_none_behind(tmp_path):
    path, stored, parts = _of_one_step(tmp_path)
    rules = [("step", "optimizer/step")]
    error = refused(path, {**parts, "step": jax.ShapeDtypeStruct((), np.int32)}, renames=rules)
    assert list(error.paths) == [("step",)]
    result = restore(path, {**parts, "step": np.int32(3)}, renames=rules, policy="init")
    assert [int(result["step"]), int(result["optimizer"].step.get_value())] == [3, 7]
    check(result["optimizer"], below("opt_state", stored["opt_state"]))


@pytest.mark.parametrize("policy", ["warn", "error"])
def test_a_reading_that_does_not_see_a_claim_does_not_win_over_one_that_does(tmp_path, policy):
    numbers = Numbers()
    blocks = {str(at): {"mlp": numbers.dense(4, 4)} for at in (1, 2, 3)}
    # `params/params` is a module here; read as a collection, `params/Block` would be another one.
    params = {"params": {"lin": numbers.dense(2, 2)}, "Block": blocks, "head": numbers.dense(3, 3)}
    stored = {"params": params, "old_params": numbers.like(params), "step": np.int32(3)}
    path = write(tmp_path, stored)
    wanted = pure_target({**params, "Block": jax.tree.map(lambda *x: np.stack(x), *blocks.values())})
    error = refused(path, wanted, policy=policy, unexpected="ignore")
    assert isinstance(error, AmbiguousMappingError)
    assert "Block/mlp/kernel" in str(error)


def test_the_kernel_sees_a_layer_that_a_stack_and_another_leaf_read():
    paths = [("params", "layers_0", "w"), ("params", "layers_1", "w")]
    placed = {
        path: Placement(
            leaf=StoredLeaf(path=path, shape=(3,), dtype=np.dtype("float32")), section="model", path=path[1:]
        )
        for path in paths
    }
    shapes = {("layers", "w"): (2, 3), ("head",): (3,)}
    stack, head = [
        Wanted(
            leaf=WantedLeaf(path=path, kind=nnx.Param, shape=shape, dtype=np.dtype("float32")),
            role="model",
            path=path,
        )
        for path, shape in shapes.items()
    ]
    sources = [(stack, Stack((Read(paths[0]), Read(paths[1])), 0), None), (head, Read(paths[1]), None)]
    claims = Claims(sources, [read_and_steps(recipe) for _, recipe, _ in sources], placed)

    assert list(claims.used_twice(frozenset())) == [(("head",), paths[1], ("layers", "w"))]
