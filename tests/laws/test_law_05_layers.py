"""Law 5: layer i is layer i."""

import numpy as np
import optax
import pytest

from orbax_nnx_handler import restore
from tests.laws import worlds
from tests.laws.worlds import (
    FORMS,
    Numbers,
    check,
    pure_target,
    refused,
    right_or_refused,
    stacked,
    target_of,
    training_target,
    write,
)
from tests.sampled import sampled

# What once opened the door to joining by order: any name with the word in it, stored or wanted.
BAITS = (None, "scan_aux", "x_remainder", "scanned_extra")


def _layers(numbers, name, which):
    return {f"{name}_{at}": numbers.dense(3, 3) for at in which}


def _with_bait(stored, bait, numbers):
    return stored | ({bait: {"kernel": numbers(2)}} if bait else {})


@pytest.mark.parametrize(
    ("which", "bait", "form"),
    sampled([(1, 2, 3), (0, 1, 3), (2, 3, 4), (0, 2, 4)], BAITS, ["module", "pure"]),
)
def test_layers_are_not_renumbered(tmp_path, which, bait, form):
    numbers = Numbers()
    stored = _with_bait(_layers(numbers, "layers", which), bait, numbers)
    wanted = _layers(numbers, "layers", range(3))
    refused(write(tmp_path, {"params": stored}), target_of(form, wanted), unexpected="ignore")


@pytest.mark.parametrize("bait", BAITS)
@pytest.mark.parametrize("which", [(1, 2, 3), (0, 1, 3)])
def test_a_layer_that_is_not_stored_is_filled_and_the_others_stay_where_they_are(tmp_path, which, bait):
    numbers = Numbers()
    stored = _with_bait(_layers(numbers, "layers", which), bait, numbers)
    wanted = _layers(numbers, "layers", range(3))
    result = restore(
        write(tmp_path, {"params": stored}), pure_target(wanted), policy="warn", unexpected="ignore"
    )
    zeros = {"kernel": np.zeros((3, 3), np.float32), "bias": np.zeros(3, np.float32)}
    check(result, {name: stored.get(name, zeros) for name in wanted})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["ScanBlock", "Block", "scan_layer"])
def test_numbers_in_names_are_not_shifted(tmp_path, name, form):
    numbers = Numbers()
    stored, wanted = _layers(numbers, name, (1, 2)), _layers(numbers, name, (0, 1))
    refused(write(tmp_path, {"params": stored}), target_of(form, wanted), unexpected="error")


@pytest.mark.parametrize(
    ("names", "bait", "form"),
    sampled(
        [("encoder_layers", "decoder_layers"), ("scanned_teacher_layers", "student_layers")],
        BAITS,
        ["module", "pure"],
    ),
)
def test_layers_of_one_name_do_not_become_those_of_another(tmp_path, names, bait, form):
    numbers = Numbers()
    stored = _with_bait(_layers(numbers, names[0], range(3)), bait, numbers)
    wanted = _layers(numbers, names[1], range(3))
    refused(write(tmp_path, {"params": stored}), target_of(form, wanted), unexpected="ignore")


@pytest.mark.parametrize("names", [("encoder", "decoder"), ("scanned_teacher_layers", "student_layers")])
def test_a_new_group_of_layers_keeps_its_initial_values(tmp_path, names):
    numbers = Numbers()
    trunk = {"trunk": numbers.dense()}
    stored = trunk | {names[0]: stacked(list(_layers(numbers, "x", range(3)).values()))}
    wanted = trunk | {names[1]: {at: numbers.dense(3, 3) for at in range(3)}}
    path = write(tmp_path, {"params": stored})
    result = restore(path, worlds.model_target(wanted), policy="warn", unexpected="ignore")
    zeros = {"kernel": np.zeros((3, 3), np.float32), "bias": np.zeros(3, np.float32)}
    check(result, trunk | {names[1]: dict.fromkeys(range(3), zeros)})


def test_a_wanted_name_with_scan_in_it_does_not_shift_the_others(tmp_path):
    numbers = Numbers()
    stored = _layers(numbers, "layers", (1, 2, 3))
    wanted = _layers(numbers, "layers", range(3)) | {"scan_new": numbers.dense()}
    refused(write(tmp_path, {"params": stored}), pure_target(wanted), unexpected="ignore")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("stored_block", "wanted_block"), [(2, 1), (1, 2)])
def test_blocks_of_another_length_keep_their_layers(tmp_path, stored_block, wanted_block, form):
    numbers = Numbers()
    layers = [{"kernel": numbers(3, 3)} for _ in range(2 * stored_block + 1)]
    few = layers[: 2 * wanted_block + 1]

    def blocks(layers, size):
        cycles = len(layers) // size
        scanned = {f"layers_{at}": stacked(layers[at : cycles * size : size]) for at in range(size)}
        rest = {f"layers_{at}": layer for at, layer in enumerate(layers[cycles * size :])}
        return {"layers": scanned} | ({"layers_remainder": rest} if rest else {})

    if len(few) < 2 * wanted_block + 1:
        few = [*few, *({"kernel": numbers(3, 3)} for _ in range(2 * wanted_block + 1 - len(few)))]
    path, wanted = write(tmp_path, {"params": blocks(layers, stored_block)}), blocks(few, wanted_block)
    refused(path, target_of(form, wanted), unexpected="error")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("which", [(0, 1), (1, 2)])
def test_a_stack_of_another_length_is_refused(tmp_path, which, form):
    numbers = Numbers()
    stored = {"layers": stacked(list(_layers(numbers, "layers", range(3)).values()))}
    wanted = _layers(numbers, "layers", which)
    error = refused(write(tmp_path, {"params": stored}), target_of(form, wanted), unexpected="error")
    assert "layers" in str(error)


def _own_and_numbered(numbers, layers, width, submodules):
    def layer():
        return {"bias": numbers(width)} | {name: numbers.dense(width, width) for name in submodules}

    return [layer() for _ in range(layers)]


@pytest.mark.parametrize(
    ("group", "submodules", "form"),
    sampled(
        ["blocks", "layers"], [("dense_0",), ("dense_0", "dense_1"), ("Dense_0",), ("mlp_0", "attn_0")], FORMS
    ),
)
def test_a_layers_own_bias_is_not_that_of_a_numbered_submodule(tmp_path, group, submodules, form):
    numbers = Numbers()
    layers = _own_and_numbered(numbers, 3, 4, submodules)
    path = write(tmp_path, {"params": {group: stacked(layers)}})
    if form == "pure":
        wanted = {f"{group}_{at}": layer for at, layer in enumerate(layers)}
    else:
        wanted = {group: dict(enumerate(layers))}
    check(restore(path, target_of(form, wanted)), wanted)


@pytest.mark.parametrize("submodules", [("dense_0",), ("dense_0", "dense_1")])
def test_moments_follow_a_layers_own_bias(tmp_path, submodules):
    numbers, tx = Numbers(), optax.adam(1e-3)
    layers = _own_and_numbered(numbers, 3, 5, submodules)
    scanned = {"blocks": stacked(layers)}
    opt_state = numbers.optimizer(tx, scanned)
    path = write(tmp_path, {"params": scanned, "opt_state": opt_state, "step": np.int32(3)})
    result = restore(path, training_target({"blocks": dict(enumerate(layers))}, tx))
    for at in range(3):
        np.testing.assert_array_equal(
            result.optimizer.opt_state[0].mu["blocks"][at]["bias"][...], opt_state[0].mu["blocks"]["bias"][at]
        )
    check(result.model, {"blocks": dict(enumerate(layers))})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("axis", [0, 1])
def test_layers_are_unstacked_and_stacked_in_their_order(tmp_path, axis, form):
    numbers = Numbers()
    layers = [numbers.dense(3, 4) for _ in range(11)]
    scanned = {"layers": stacked(layers, axis)}
    single = {f"layers_{at}": layer for at, layer in enumerate(layers)}
    check(restore(write(tmp_path, {"params": scanned}), target_of(form, single)), single)
    check(restore(write(tmp_path, {"params": single}), target_of(form, scanned)), scanned)


@pytest.mark.parametrize("names", [(0, 1, 1), (0, 0, 1)])
def test_a_reversed_or_doubled_list_is_not_guessed(tmp_path, names):
    numbers = Numbers()
    stored = {f"layers_{at}_{name}": numbers.dense(3, 3) for at, name in enumerate(names)}
    wanted = _layers(numbers, "layers", range(3))
    right_or_refused(write(tmp_path, {"params": stored}), pure_target(wanted), {}, unexpected="error")


@pytest.mark.parametrize("optimizer", [False, True])
def test_a_layer_of_another_shape_is_refused_where_a_stack_is_wanted(tmp_path, optimizer):
    numbers, tx = Numbers(), optax.adam(1e-3)
    layers = [{"kernel": numbers(3, 4)} for _ in range(3)]
    stored = {f"layers_{at}": layer for at, layer in enumerate(layers)}
    opt_state = numbers.optimizer(tx, stored)
    stored["layers_1"] = {"kernel": numbers(3, 8)}
    path = write(tmp_path, {"params": stored, "opt_state": opt_state, "step": np.int32(1)})
    wanted = {"layers": stacked(layers)}
    target = training_target(wanted, tx) if optimizer else worlds.model_target(wanted)
    refused(path, target, unexpected="ignore")


def _in_blocks(numbers, size, cycles, left_over, name):
    """Returns layers in blocks of `size`, stacked on axis 0, and what is left over behind them."""
    blocks = {f"{name}_{at}": {"kernel": numbers(cycles, 3, 3)} for at in range(size)}
    rest = {f"{name}_{at}": {"kernel": numbers(3, 3)} for at in range(left_over)}
    return {"layers": blocks} | ({"layers_remainder": rest} if rest else {})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["layers", "sub"])
@pytest.mark.parametrize(
    ("stored", "wanted"), [((2, 2, 1), (1, 2, 1)), ((3, 2, 1), (2, 2, 1)), ((2, 2, 0), (1, 2, 1))]
)
def test_blocks_of_another_length_are_no_blocks_of_these_layers(tmp_path, stored, wanted, name, form):
    path = write(tmp_path, {"params": _in_blocks(Numbers(), *stored, name)})
    refused(path, target_of(form, _in_blocks(Numbers(), *wanted, name)))


@pytest.mark.parametrize("form", FORMS)
def test_longer_blocks_are_not_initialised_between_stored_layers(tmp_path, form):
    path = write(tmp_path, {"params": _in_blocks(Numbers(), 1, 2, 1, "layers")})
    target = target_of(form, _in_blocks(Numbers(), 2, 2, 1, "layers"))
    refused(path, target, policy="warn")


@pytest.mark.parametrize("form", FORMS)
def test_one_of_the_numbered_modules_of_a_scanned_layer_may_be_restored_alone(tmp_path, form):
    stored = {"blocks": {"dense_0": Numbers().dense(), "dense_1": Numbers(100).dense()}}
    wanted = {"blocks": {"dense_0": stored["blocks"]["dense_0"]}}
    check(restore(write(tmp_path, {"params": stored}), target_of(form, wanted)), wanted)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(2, 3), (3, 3)])
def test_a_layer_beside_a_stack_that_ends_before_it_is_itself(tmp_path, shape, form):
    numbers = Numbers()
    layers = [{"kernel": numbers(*shape), "bias": numbers(5)} for _ in range(5)]
    path = write(tmp_path, {"params": {"layers": stacked(layers[:4]), "layers_4": layers[4]}})
    wanted = {f"layers_{at}": layer for at, layer in enumerate(layers)}
    check(restore(path, target_of(form, wanted)), wanted)


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_that_a_stack_holds_too_is_a_question(tmp_path, form):
    numbers = Numbers()
    layers = [{"kernel": numbers(2, 3), "bias": numbers(5)} for _ in range(4)]
    other = {"kernel": numbers(2, 3), "bias": numbers(5)}
    path = write(tmp_path, {"params": {"layers": stacked(layers), "layers_3": other}})
    refused(path, target_of(form, {f"layers_{at}": layer for at, layer in enumerate(layers)}))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("policy", ["warn", "error"])
def test_a_layer_that_an_unused_stack_may_hold_is_not_filled(tmp_path, policy, form):
    numbers = Numbers()
    stack = {"0": {"w": numbers(1, 2)}, "inner": {"kernel": numbers(1, 3, 4)}}
    wanted = {"block_0": {"0": {"w": stack["0"]["w"][0]}, "inner": {"kernel": stack["inner"]["kernel"][0]}}}
    path = write(tmp_path, {"params": {"block": stack}})
    refused(path, target_of(form, wanted), policy=policy, unexpected="ignore")
