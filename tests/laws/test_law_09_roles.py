"""Law 9: a role is a place, not a name."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from orbax_nnx_handler import AmbiguousMappingError, Copy, RestoreError, Scale, from_linen, restore, save
from tests.laws import worlds
from tests.laws.worlds import (
    FORMS,
    Branch,
    Numbers,
    Training,
    check,
    refused,
    right_or_refused,
    target_of,
    training_target,
    write,
)
from tests.sampled import sampled

ADAM = optax.adam(1e-3)


class Count(nnx.Variable):
    pass


KINDS = {"count": Count, "statistic": nnx.BatchStat, "param": nnx.Param}


@pytest.mark.parametrize(
    ("optimizer", "place", "kind"), sampled([False, True], ["average", "ema", "quantised"], KINDS)
)
def test_a_models_own_step_is_not_the_train_states(tmp_path, place, kind, optimizer):
    numbers = Numbers()
    params = {place: {"dense": numbers.dense()}}
    stored = {"params": params, "opt_state": numbers.optimizer(ADAM, params), "step": np.int32(777)}

    class Train(Training):
        def __init__(self):
            if optimizer:
                super().__init__(params, ADAM, {})
            else:
                self.model = Branch(params, {})
            getattr(self.model, place).step = KINDS[kind](jnp.int32(0))

    path = write(tmp_path, stored)
    for unexpected in ("ignore", "error"):
        refused(path, nnx.eval_shape(Train), unexpected=unexpected)


@pytest.mark.parametrize("place", ["quantiser", "ema"])
def test_a_field_beside_the_model_called_step_is_not_the_train_states(tmp_path, place):
    numbers = Numbers()
    params = {"dense": numbers.dense()}
    stored = {"params": params, "opt_state": numbers.optimizer(ADAM, params), "step": np.int32(777)}

    class Train(Training):
        def __init__(self):
            super().__init__(params, ADAM, {})
            setattr(self, place, nnx.Dict(step=Count(jnp.int32(0))))

    refused(write(tmp_path, stored), nnx.eval_shape(Train), unexpected="ignore")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int32])
def test_a_new_parameter_called_step_is_initialised(tmp_path, dtype):
    numbers = Numbers()
    params = {"quantised": {"dense": numbers.dense()}}

    class Model(Branch):
        def __init__(self):
            super().__init__(params, {})
            self.quantised.step = nnx.Param(jnp.asarray(3, dtype))

    path = write(tmp_path, {"params": params, "opt_state": [], "step": np.int32(777)})
    result = restore(path, nnx.eval_shape(Model), policy="init", init=Model)
    assert float(result.quantised.step[...]) == 3
    check(result.quantised.dense, params["quantised"]["dense"])


@pytest.mark.parametrize("kind", ["statistic", "param"])
def test_a_models_own_step_is_restored_where_it_is_stored(tmp_path, kind):
    numbers = Numbers()
    params = {"average": {"dense": numbers.dense()}}
    own = {"average": {"step": np.int32(41)}}
    stored = {"params": params, "opt_state": [], "step": np.int32(777)}
    if kind == "param":
        stored["params"] = {"average": params["average"] | own["average"]}
    else:
        stored["batch_stats"] = own
    whole = {"average": params["average"] | own["average"]}
    target = worlds.model_target(whole, {"step": KINDS[kind]})
    check(restore(write(tmp_path, stored), target, unexpected="ignore"), whole)


NAMES = ("step", "params", "value", "mu", "nu", "opt_state", "model", "count", "batch_stats", "optimizer")


@pytest.mark.parametrize("name", NAMES)
def test_a_module_may_have_any_name(tmp_path, name):
    numbers = Numbers()
    params = {name: {"dense": numbers.dense()}, "other": numbers.dense()}
    opt_state = numbers.optimizer(ADAM, params)
    path = write(tmp_path, {"params": params, "opt_state": opt_state, "step": np.int32(777)})
    expected = worlds.below("model", params) | worlds.below("optimizer/opt_state", opt_state)
    check(restore(path, training_target(params, ADAM)), expected | {("optimizer", "step"): np.uint32(777)})


@pytest.mark.parametrize("name", NAMES)
def test_a_parameter_may_have_any_name(tmp_path, name):
    numbers = Numbers()
    params = {"layer": {name: numbers(4), "kernel": numbers(4)}}
    opt_state = numbers.optimizer(ADAM, params)
    path = write(tmp_path, {"params": params, "opt_state": opt_state, "step": np.int32(777)})
    expected = worlds.below("model", params) | worlds.below("optimizer/opt_state", opt_state)
    check(restore(path, training_target(params, ADAM)), expected | {("optimizer", "step"): np.uint32(777)})


class step(nnx.Variable):  # noqa: N801 its collection is called like the train state's field
    pass


class opt_state(nnx.Variable):  # noqa: N801
    pass


@pytest.mark.parametrize("kind", [step, opt_state])
def test_a_variable_type_called_like_a_field_of_the_train_state_is_stored_or_refused(tmp_path, kind):
    numbers = Numbers()
    params = {"dense": numbers.dense()}

    class Train(Training):
        def __init__(self):
            super().__init__(params, ADAM, {})
            self.model.clock = kind(jnp.arange(3.0) + 0.5)

    path = tmp_path / "saved"
    try:
        save(path, Train())
    except ValueError:
        return
    with ocp.PyTreeCheckpointer() as reader:
        stored = worlds.flat(reader.restore(path))
    assert any(np.array_equal(value, np.arange(3.0) + 0.5) for value in stored.values())


def _boxed(tree):
    return {k: _boxed(v) if isinstance(v, dict) else {"value": v} for k, v in tree.items()}


@pytest.mark.parametrize(
    ("name", "owner", "form"),
    sampled(["opt_state", "params", "batch_stats", "step"], [(), ("agent",)], FORMS),
)
def test_a_module_called_like_a_field_is_found_beside_copies_and_collections(tmp_path, name, owner, form):
    numbers = Numbers()
    params = {"block": {name: {"kernel": numbers(2, 3)}, "head": {"kernel": numbers(3, 2)}}}
    state = {"params": params, "ema_params": numbers.like(params), "step": np.int32(3)}
    path = write(tmp_path, {"agent": state} if owner else state)
    right_or_refused(path, target_of(form, params), params, unexpected="ignore")
    if form != "pure":  # Of an array without a type, a copy is a question.
        check(restore(path, target_of(form, params), unexpected="ignore"), params)


def test_a_module_called_step_with_a_leaf_called_value_makes_its_neighbour_no_optimizer(tmp_path):
    numbers = Numbers()
    model = {"step": {"value": numbers(2)}, "opt_state": {"Dense_0": {"pos": numbers(4)}}}
    path = write(tmp_path, {"params": model, "step": np.int32(3)})
    check(restore(path, {"model": worlds.pure_target(model)}, unexpected="ignore"), {"model": model})


@pytest.mark.parametrize("name", ["count", "mini_step"])
def test_a_module_called_count_below_one_called_opt_state_is_no_number_of_an_optimizer(tmp_path, name):
    numbers = Numbers()
    model = {"disc": {"opt_state": {name: {"kernel": numbers(2, 3)}}, "head": numbers.dense()}}
    opt_state = numbers.optimizer(ADAM, model["disc"])
    path = write(tmp_path, model | {"disc_opt": {"opt_state": opt_state, "step": np.uint32(7)}})
    check(restore(path, worlds.model_target(model), unexpected="ignore"), model)


@pytest.mark.parametrize("form", FORMS)
def test_a_weight_called_step_makes_its_neighbour_no_optimizer(tmp_path, form):
    numbers = Numbers()
    blocks = {"step": numbers(4, 4), "opt_state": {"Dense_0": {"w": numbers(4, 5)}}}
    model = {"blocks": blocks, "head": numbers.dense()}
    trained = {"opt_state": numbers.optimizer(ADAM, model), "step": np.uint32(7)}
    path = write(tmp_path, {"net": model, "net_opt": trained})
    check(restore(path, target_of(form, {"net": model}), unexpected="ignore"), {"net": model})


def test_gates_in_boxes_are_fused_too(tmp_path):
    numbers = Numbers()
    gates = {side + gate: {"kernel": numbers(4, 5)} for side in "ih" for gate in "ifgo"}
    for gate in "ifgo":
        gates[f"h{gate}"]["bias"] = numbers(5)
    wanted = {
        f"dense_{side}": {"kernel": np.concatenate([gates[side + gate]["kernel"] for gate in "ifgo"], 1)}
        for side in "ih"
    }
    wanted["dense_h"]["bias"] = np.concatenate([gates[f"h{gate}"]["bias"] for gate in "ifgo"])
    path = write(tmp_path, {"params": {"rnn": {"cell": _boxed(gates)}}})
    check(restore(path, target_of("module", {"rnn": {"cell": wanted}})), {"rnn": {"cell": wanted}})


def test_a_leaf_called_value_beside_others_is_no_box_and_its_module_no_count(tmp_path):
    numbers, tx = Numbers(), optax.adam(1e-3)
    params = {"count": {"value": numbers(3), "kernel": numbers(2, 3)}, "head": {"kernel": numbers(3, 2)}}
    opt_state = numbers.optimizer(tx, params)
    path = write(tmp_path, {"params": params, "opt_state": opt_state, "step": np.int32(1)})
    result = restore(path, training_target(params, tx))
    check(result, worlds.below("model", params) | worlds.below("optimizer/opt_state", opt_state))


@pytest.mark.parametrize("count", [1, 2, 6])
def test_fields_beside_a_model_say_nothing_of_where_it_lies_however_many_they_are(tmp_path, count):
    numbers = Numbers()
    params = {"net": {"scale": numbers(3)}}
    fields = {f"field_{at}": numbers(dtype=np.int32) for at in range(count)}
    path = write(tmp_path, {"params": params, **fields})
    target = {"model": worlds.model_target(params), **worlds.pure_target(fields)}
    result = restore(path, target)
    check(result["model"], params)
    check({key: result[key] for key in fields}, fields)


@pytest.mark.parametrize("rule", [Copy("step", "epoch"), Scale("step", 2.0)])
def test_a_rule_on_values_that_names_a_step_says_that_it_is_not_for_it(tmp_path, rule):
    numbers, tx = Numbers(), optax.adam(1e-3)
    params = {"dense": numbers.dense()}
    stored = {"params": params, "opt_state": numbers.optimizer(tx, params), "step": np.int32(7)}
    error = worlds.refused(write(tmp_path, stored), training_target(params, tx), renames=[rule])
    assert "nearest stored: step" not in str(error)
    assert "are their train state's own" in str(error)


def _with_a_module_called_params(numbers, name):
    if name == "leaf":
        return {"w": numbers(3), "params": {"w": numbers(3)}}
    return {"a": {"w": numbers(3)}, "params": {"a": {"w": numbers(3)}}}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["leaf", "module"])
def test_a_module_called_params_is_no_collection_and_is_not_swapped_with_its_parent(tmp_path, name, form):
    params = _with_a_module_called_params(Numbers(), name)
    path = write(tmp_path, {"params": params})
    check(restore(path, target_of(form, params)), params)


def _read(path, target, name):
    """Returns how to read a tree of modules, which may be collections; that it is a question is checked."""
    if name == "leaf":
        return {}
    assert isinstance(refused(path, target, unexpected="ignore"), AmbiguousMappingError)
    return {"layout": "variables"}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["leaf", "module"])
def test_boxed_weights_of_a_module_called_params_are_its_own_or_refused(tmp_path, name, form):
    params = _with_a_module_called_params(Numbers(), name)
    path = write(tmp_path, {"params": _boxed(params)})
    right_or_refused(path, target_of(form, params), params)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["leaf", "module"])
def test_the_parent_of_a_module_called_params_is_restored_without_it(tmp_path, name, form):
    params = _with_a_module_called_params(Numbers(), name)
    path = write(tmp_path, {"params": params})
    own = {key: part for key, part in params.items() if key != "params"}
    how = _read(path, target_of(form, own), name)
    check(restore(path, target_of(form, own), unexpected="ignore", **how), own)


def test_a_module_called_params_alone_is_a_question_where_a_collection_may_be_meant(tmp_path):
    params = _with_a_module_called_params(Numbers(), "leaf")
    path = write(tmp_path, {"params": params})
    inner = {"params": params["params"]}
    error = refused(path, target_of("module", inner), unexpected="ignore")
    assert isinstance(error, AmbiguousMappingError)
    assert "params/params/" in str(error)
    assert "in {'model': target} it is" in str(error)
    check(restore(path, {"model": target_of("module", inner)}, unexpected="ignore")["model"], inner)
    outer = {"params": {key: part for key, part in params.items() if key != "params"}}
    result = restore(
        path, target_of("module", inner), unexpected="ignore", renames=[("params/w", "params/w")]
    )
    check(result, outer)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["leaf", "module"])
@pytest.mark.parametrize("lacks_own", [False, True])
def test_one_leaf_stored_for_a_module_called_params_and_its_parent_is_a_question(
    tmp_path, name, lacks_own, form
):
    params = _with_a_module_called_params(Numbers(), name)
    stored = {key: part for key, part in params.items() if (key == "params") == lacks_own}
    path = write(tmp_path, {"params": stored})
    error = refused(path, target_of(form, params), policy="warn")
    assert isinstance(error, AmbiguousMappingError)


NESTED = (
    {"d": 0, "params": {"a": 0, "d": 0, "params": {"b": 0, "d": 0}}},
    {"a": 0, "d": 0, "params": {"b": 0, "d": 0}},
    {"d": 0, "params": {"d": 0, "params": {"d": 0}}},
    {"params": {"d": 0, "params": {"d": 0, "params": {"d": 0}}}},
    {"d": 0, "params": {"params": {"d": 0}}},
)
"""Models in which modules called `params` lie in one another."""


def _numbers(tree):
    return {path: tuple(leaf.ravel()) for path, leaf in worlds.flat(tree).items()}


@pytest.mark.parametrize(
    ("stored", "wanted", "leaf", "form"),
    sampled(range(len(NESTED)), range(len(NESTED)), [True, False], FORMS),
)
def test_modules_called_params_within_one_another_are_their_own_or_a_question(
    tmp_path, stored, wanted, leaf, form
):
    numbers = Numbers()

    def number(tree):
        return numbers(3) if leaf else numbers.dense()

    params = jax.tree.map(number, NESTED[stored])
    path = write(tmp_path, {"params": params})
    target = target_of(form, jax.tree.map(number, NESTED[wanted]))
    readings = [_numbers(tree) for tree in ({"params": params}, params, params["params"])]
    try:
        found = _numbers(restore(path, target, unexpected="ignore"))
    except RestoreError:
        return
    assert any(found.items() <= tree.items() for tree in readings)


def test_a_module_called_params_alone_is_a_question_beside_a_parameter_called_value(tmp_path):
    numbers = Numbers()
    path = write(tmp_path, {"params": {"params": {"kernel": numbers(3)}, "kernel": {"value": numbers(3)}}})
    error = refused(path, target_of("module", {"params": {"kernel": numbers(3)}}), unexpected="ignore")
    assert isinstance(error, AmbiguousMappingError)


def test_a_variables_dict_with_a_collection_beside_params_is_maxtexts_still(tmp_path):
    numbers = Numbers()
    params, statistics = {"norm": {"scale": numbers(3)}}, {"norm": {"mean": numbers(3)}}
    path = write(tmp_path, {"params": {"params": params, "batch_stats": statistics}, "step": np.int32(1)})
    wanted = {"norm": {"scale": params["norm"]["scale"], "mean": statistics["norm"]["mean"]}}
    check(restore(path, target_of("module", wanted), unexpected="ignore"), wanted)


def test_a_weight_called_step_at_the_root_of_a_pure_dict_is_a_weight():
    params = {"a": np.arange(6.0, dtype=np.float32), "step": np.arange(9.0, dtype=np.float32).reshape(3, 3)}
    wanted = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in params.items()}

    found = from_linen({"params": params}, wanted)

    for name, value in params.items():
        np.testing.assert_array_equal(found[name], value)
