"""Law 7: below the root, module names meet; another wrapper's name is proposed as a rename, never taken."""

import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from orbax_nnx_handler import restore, save
from orbax_nnx_handler.cli import main
from tests.laws import worlds
from tests.laws.worlds import (
    FORMS,
    Numbers,
    check,
    model_target,
    pure_target,
    refused,
    target_of,
    training_target,
    write,
)
from tests.sampled import sampled

WRAPPERS = (("critic", "actor"), ("vit", "encoder"), ("teacher", "student"), ("ema", "online"))


def _trunk(numbers):
    return {"hidden": numbers.dense(), "out": numbers.dense(4, 2)}


@pytest.mark.parametrize(("names", "beside", "form"), sampled(WRAPPERS, [False, True], FORMS))
def test_a_wrapper_of_another_name_is_not_taken(tmp_path, names, beside, form):
    numbers = Numbers()
    head = {"head": numbers.dense()} if beside else {}
    stored, wanted = {names[0]: _trunk(numbers)} | head, {names[1]: _trunk(numbers)} | head
    refused(write(tmp_path, {"params": stored}), target_of(form, wanted), unexpected="ignore")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("names", WRAPPERS)
def test_a_wrapper_of_another_name_is_taken_by_rule(tmp_path, names, form):
    numbers = Numbers()
    stored = {names[0]: _trunk(numbers)}
    wanted = {names[1]: stored[names[0]]}
    path = write(tmp_path, {"params": stored})
    check(restore(path, target_of(form, wanted), renames=[names]), wanted)


@pytest.mark.parametrize("names", WRAPPERS)
def test_the_rule_to_paste_stands_in_the_error(tmp_path, names):
    numbers = Numbers()
    path = write(tmp_path, {"params": {names[0]: _trunk(numbers)}})
    text = str(refused(path, model_target({names[1]: _trunk(numbers)})))
    assert f"('{names[0]}', '{names[1]}')" in text or f'("{names[0]}", "{names[1]}")' in text


@pytest.mark.parametrize("form", FORMS)
def test_sibling_modules_of_equal_shapes_do_not_change_places(tmp_path, form):
    numbers = Numbers()
    stored = {"query": numbers.dense(3, 3), "key": numbers.dense(3, 3), "value": numbers.dense(3, 3)}
    wanted = {"q": stored["query"], "k": stored["key"], "v": stored["value"]}
    path = write(tmp_path, {"params": {"attention": stored}})
    refused(path, target_of(form, {"attention": wanted}), unexpected="ignore")
    check(restore(path, target_of(form, {"attention": stored})), {"attention": stored})


@pytest.mark.parametrize("inner", ["model", "params", "module", "net"])
def test_a_model_within_a_model_keeps_its_levels(tmp_path, inner):
    numbers, tx = Numbers(), optax.adam(1e-3)
    params = {inner: {"embed": {"embedding": numbers(7, 4)}, "norm": {"scale": numbers(4)}}}
    opt_state = numbers.optimizer(tx, params)
    target = training_target(params, tx)
    path = write(tmp_path, {"params": params, "opt_state": opt_state, "step": np.int32(5)})
    expected = worlds.below("model", params) | worlds.below("optimizer/opt_state", opt_state)
    check(restore(path, target), expected)


@pytest.mark.parametrize("inner", ["model", "params", "opt_state", "value", "mu", "step"])
def test_a_train_state_comes_back_from_its_own_save(tmp_path, inner):
    numbers, tx = Numbers(), optax.adam(1e-3)
    params = {inner: {"embed": {"embedding": numbers(7, 4)}, "norm": {"scale": numbers(4)}}}
    state = worlds.Training(params, tx, {})
    expected = numbers.like(worlds.flat(state))
    worlds.put(state, expected)
    save(tmp_path / "saved", state)
    check(restore(tmp_path / "saved", training_target(params, tx)), expected)


@pytest.mark.parametrize("name", ["params", "opt_state", "step"])
def test_convert_keeps_a_module_that_is_called_like_a_collection(tmp_path, name):
    numbers = Numbers()
    params = {name: {"kernel": numbers(2, 3)}, "head": {"kernel": numbers(2, 3)}}
    path, out = write(tmp_path, {"params": params}), tmp_path / "out"
    if main(["convert", str(path), str(out), "--to", "linen"]) == 0:
        with ocp.PyTreeCheckpointer() as reader:
            check(reader.restore(out), {"params": params})


@pytest.mark.parametrize("form", FORMS)
def test_a_pure_dict_and_a_module_agree_on_a_prefix_of_one_side(tmp_path, form):
    numbers = Numbers()
    wanted = _trunk(numbers)
    path = write(tmp_path, {"params": {"params": wanted}})
    check(restore(path, target_of(form, wanted)), wanted)
    assert pure_target(wanted)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("level", ["net", "MLP_0", "Transformer_1"])
def test_a_level_above_the_whole_model_goes_also_under_a_name_that_linen_makes(tmp_path, level, form):
    numbers, tx = Numbers(), optax.adam(1e-3)
    params = {**_trunk(numbers), "layers": {at: numbers.dense() for at in range(2)}}
    below = {level: worlds.linen_numbers(params)}
    opt_state = numbers.optimizer(tx, below)
    path = write(tmp_path, {"params": below, "opt_state": opt_state, "step": np.int32(7)})
    check(restore(path, target_of(form, params), unexpected="ignore"), params)
    moments = {("optimizer", "opt_state", 0, "count"): opt_state[0].count}
    check(restore(path, training_target(params, tx)), worlds.below("model", params) | moments)


@pytest.mark.parametrize("levels", [("MLP_0", "MLP_1"), ("MLP_0", "head")])
def test_one_of_several_modules_is_not_taken_for_the_whole_model(tmp_path, levels):
    numbers = Numbers()
    stored = {level: _trunk(numbers) for level in levels}
    refused(write(tmp_path, {"params": stored}), model_target(stored[levels[0]]), unexpected="ignore")
