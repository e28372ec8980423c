"""Law 6: each leaf has its own axis."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from orbax_nnx_handler import AmbiguousMappingError, ScanAxis, restore
from tests.laws.worlds import (
    FORMS,
    Branch,
    Numbers,
    below,
    check,
    pure_target,
    refused,
    stacked,
    target_of,
    training_target,
    write,
)


def _single(layers, name="layers"):
    return {f"{name}_{at}": layer for at, layer in enumerate(layers)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [3, 4])
def test_features_are_not_taken_for_layers_on_axis_minus_one(tmp_path, size, form):
    numbers = Numbers()
    layers = [{"dense": numbers.dense(3, size)} for _ in range(size)]
    path = write(tmp_path, {"params": {"layers": stacked(layers, -1)}})
    refused(path, target_of(form, _single(layers)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_shapes_that_allow_one_axis_only_decide_each_for_itself(tmp_path, axis, form):
    numbers = Numbers()
    layers = [{"dense": numbers.dense(3, 5)} for _ in range(4)]
    path = write(tmp_path, {"params": {"layers": stacked(layers, axis)}})
    check(restore(path, target_of(form, _single(layers))), _single(layers))


class _Tower(linen.Module):
    """Four networks side by side, their weights on the last axis."""

    @linen.compact
    def __call__(self, x):
        towers = linen.vmap(
            linen.Dense, variable_axes={"params": -1}, split_rngs={"params": True}, in_axes=None, axis_size=4
        )
        return towers(4, name="towers")(x)


def test_a_vmap_over_the_last_axis_is_not_transposed(tmp_path):
    variables = jax.eval_shape(_Tower().init, jax.random.key(0), jnp.ones((1, 4)))
    numbers = Numbers()
    params = numbers.like(variables["params"])
    wanted = {
        f"towers_{at}": {"kernel": np.zeros((4, 4), np.float32), "bias": np.zeros(4, np.float32)}
        for at in range(4)
    }
    refused(write(tmp_path, {"params": params}), pure_target(wanted))


@pytest.mark.parametrize("form", FORMS)
def test_statistics_may_lie_on_another_axis_than_parameters(tmp_path, form):
    numbers = Numbers()
    size = 4
    params = [{"bn": {"scale": numbers(3, size)}} for _ in range(size)]
    stats = [{"bn": {"mean": numbers(size)}} for _ in range(size)]
    stored = {"params": {"layers": stacked(params, 0)}, "batch_stats": {"layers": stacked(stats, 1)}}
    wanted = {f"layers_{at}": {"bn": params[at]["bn"] | stats[at]["bn"]} for at in range(size)}
    refused(write(tmp_path, stored), target_of(form, wanted))


@pytest.mark.parametrize("axes", [(1, 0), (0, 1), (1, 1), (0, 0)])
@pytest.mark.parametrize("size", [3, 4])
def test_a_rule_for_the_axis_of_the_parameters_says_nothing_of_the_statistics(tmp_path, size, axes):
    numbers = Numbers()
    # Four layers of two axes of length four; of three layers, the statistics alone tell their axis.
    params = [{"bn": {"scale": numbers(size, size)}} for _ in range(size)]
    stats = [{"bn": {"mean": numbers(4)}} for _ in range(size)]
    stored = {
        "params": {"layers": stacked(params, axes[0])},
        "batch_stats": {"layers": stacked(stats, axes[1])},
    }
    wanted = {f"layers_{at}": {"bn": params[at]["bn"] | stats[at]["bn"]} for at in range(size)}
    path, target = write(tmp_path, stored), target_of("module", wanted)
    rules = [ScanAxis("layers", axes[0])]

    if size == 4:
        error = refused(path, target, renames=rules)
        offered = [hint.arguments["renames"] for hint in error.hints]
        assert offered == [[*rules, ScanAxis("batch_stats/layers", at)] for at in (0, 1)]
        rules = offered[axes[1]]

    check(restore(path, target, renames=rules), wanted)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("said", "open_group"), [("encoder/layers", "layers"), ("layers", "encoder/layers")])
def test_a_rule_for_the_axis_of_one_group_says_nothing_of_another(tmp_path, said, open_group, form):
    numbers = Numbers()

    def square():
        return [{"kernel": numbers(4, 4)} for _ in range(4)]

    top, inner = square(), square()
    stored = {"layers": stacked(top, 1), "encoder": {"layers": stacked(inner, 1)}}
    wanted = {"layers": dict(enumerate(top)), "encoder": {"layers": dict(enumerate(inner))}}
    if form == "pure":
        wanted = _single(top) | {"encoder": _single(inner)}
    path = write(tmp_path, {"params": stored})
    error = refused(path, target_of(form, wanted), renames=[ScanAxis(said, 1)])
    assert isinstance(error, AmbiguousMappingError)
    assert open_group in str(error)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("axis", [0, 1])
def test_a_rule_for_exactly_a_group_decides_its_axis(tmp_path, axis, form):
    numbers = Numbers()
    layers = [{"kernel": numbers(4, 4)} for _ in range(4)]
    path = write(tmp_path, {"params": {"layers": stacked(layers, axis)}})
    result = restore(path, target_of(form, _single(layers)), renames=[ScanAxis("layers", axis)])
    check(result, _single(layers))


@pytest.mark.parametrize("form", FORMS)
def test_a_leaf_of_equal_axes_is_not_decided_apart_from_its_group(tmp_path, form):
    numbers = Numbers()
    layers = [{"bias": numbers(3), "dense_0": numbers.dense(5, 7)} for _ in range(3)]
    path = write(tmp_path, {"params": {"blocks": stacked(layers, 1)}})
    wanted = {"blocks": dict(enumerate(layers))} if form != "pure" else _single(layers, "blocks")
    check(restore(path, target_of(form, wanted)), wanted)


@pytest.mark.parametrize("form", FORMS)
def test_two_leaves_that_allow_two_axes_each_are_asked_for(tmp_path, form):
    numbers = Numbers()
    layers = [{"a": {"kernel": numbers(3, 5)}, "b": {"kernel": numbers(3, 7)}} for _ in range(3)]
    path = write(tmp_path, {"params": {"layers": stacked(layers, 0)}})
    refused(path, target_of(form, _single(layers)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("axis", [0, 1])
def test_a_group_decides_where_every_other_leaf_allows_the_same_one_axis(tmp_path, axis, form):
    numbers = Numbers()
    layers = [{"a": {"kernel": numbers(3, 3)}, "b": {"kernel": numbers(5, 7)}} for _ in range(3)]
    path = write(tmp_path, {"params": {"layers": stacked(layers, axis)}})
    check(restore(path, target_of(form, _single(layers))), _single(layers))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("axis", [0, 1])
def test_the_wanted_axis_does_not_follow_from_the_stored_one(tmp_path, axis, form):
    numbers = Numbers()
    layers = [{"kernel": numbers(4, 4)} for _ in range(4)]
    blocks = {f"layers_{at}": stacked(layers[at::2]) for at in range(2)}
    path = write(tmp_path, {"params": {"layers": blocks}})
    refused(path, target_of(form, {"layers": stacked(layers, axis)}))
    result = restore(
        path,
        target_of(form, {"layers": stacked(layers)}),
        renames=[ScanAxis("layers", 0)],
        unexpected="ignore",
    )
    check(result, {"layers": stacked(layers)})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("axis", [0, 1])
def test_a_second_params_level_alone_says_nothing_of_the_axis(tmp_path, axis, form):
    numbers = Numbers()
    layers = [{"kernel": numbers(3, 3), "bias": numbers(3)} for _ in range(3)]
    stored = {"params": {"params": {"encoder": {"blocks": stacked(layers, axis)}}}}
    wanted = {"encoder": {f"blocks_{at}": layer for at, layer in enumerate(layers)}}
    refused(write(tmp_path, stored), target_of(form, wanted))


def _in_maxtexts_modules():
    """Returns layers whose shapes tell no axis, and what MaxText has around them."""
    numbers = Numbers()
    layers = [{"kernel": numbers(3, 3), "bias": numbers(3)} for _ in range(3)]
    return layers, {
        "token_embedder": {"embedding": numbers(7, 3)},
        "decoder": {"decoder_norm": {"scale": numbers(3)}},
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("left_out", [(), ("token_embedder",), ("token_embedder", "decoder_norm")])
def test_maxtext_stacks_on_axis_1_where_its_own_modules_lie_there(tmp_path, left_out, form):
    layers, model = _in_maxtexts_modules()
    for name in left_out:
        model.pop(name, None)
        model["decoder"].pop(name, None)
    wanted = model | {
        "decoder": model["decoder"] | {f"layers_{at}": layer for at, layer in enumerate(layers)}
    }
    stored = model | {"decoder": model["decoder"] | {"layers": stacked(layers, 1)}}
    path = write(tmp_path, {"params": {"params": stored}})
    if len(left_out) < 2:
        check(restore(path, target_of(form, wanted)), wanted)
    else:
        refused(path, target_of(form, wanted))
        check(restore(path, target_of(form, wanted), layout="maxtext"), wanted)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("axis", [0, 1])
def test_maxtext_does_not_say_how_a_target_stacks_what_is_stored_layer_by_layer(tmp_path, axis, form):
    layers, stored = _in_maxtexts_modules()
    wanted = stored | {"decoder": stored["decoder"] | {"layers": stacked(layers, axis)}}
    stored["decoder"] |= {f"layers_{at}": layer for at, layer in enumerate(layers)}
    path = write(tmp_path, {"params": {"params": stored}})
    refused(path, target_of(form, wanted))
    check(restore(path, target_of(form, wanted), renames=[ScanAxis("decoder/layers", axis)]), wanted)


@pytest.mark.parametrize("axis", [0, 1])
def test_adapters_do_not_take_the_axis_of_maxtexts_parameters(tmp_path, axis):
    numbers = Numbers()
    layers = [{"kernel": numbers(4, 5), "lora_a": numbers(3, 3)} for _ in range(3)]
    kernels = stacked([{"kernel": layer["kernel"]} for layer in layers], 1)
    adapters = stacked([{"lora_a": layer["lora_a"]} for layer in layers], axis)
    norm = {"decoder_norm": {"scale": numbers(3)}}
    tree = {
        "params": {"decoder": norm | {"layers": kernels}},
        "lora_params": {"decoder": {"layers": adapters}},
    }
    path = write(tmp_path, {"params": tree})

    def make():
        modules = [Branch({"kernel": layer["kernel"]}, {}) for layer in layers]
        for module in modules:
            module.lora_a = nnx.LoRAParam(jnp.zeros((3, 3)))
        decoder = Branch(norm, {})
        decoder.layers = nnx.List(modules)
        return {"decoder": decoder}

    refused(path, nnx.eval_shape(make))
    result = restore(path, nnx.eval_shape(make), renames=[ScanAxis("lora_params/decoder/layers", axis)])
    for at, layer in enumerate(layers):
        held = result["decoder"].layers[at]
        np.testing.assert_array_equal(held.lora_a[...], layer["lora_a"])
        np.testing.assert_array_equal(held.kernel[...], layer["kernel"])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_blocks_do_not_take_the_axis_of_a_stored_scan(tmp_path, axis, form):
    numbers = Numbers()
    layers = [{"kernel": numbers(2, 2)} for _ in range(4)]
    path = write(tmp_path, {"params": {"layers": stacked(layers, axis)}})
    blocks = {f"layers_{at}": stacked(layers[at::2]) for at in range(2)}
    refused(path, target_of(form, {"layers": blocks}))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_rule_says_the_wanted_axis_where_only_that_is_open(tmp_path, axis, form):
    numbers = Numbers()
    layers = [{"kernel": numbers(4, 4)} for _ in range(4)]
    blocks = {f"layers_{at}": stacked(layers[at::2]) for at in range(2)}
    path = write(tmp_path, {"params": {"layers": blocks}})
    wanted = {"layers": stacked(layers, axis)}
    check(restore(path, target_of(form, wanted), renames=[ScanAxis("layers", axis)]), wanted)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("axis", [0, 1])
def test_the_axis_of_a_layout_is_a_question_where_another_group_denies_it(tmp_path, axis, form):
    numbers = Numbers()
    square = [{"kernel": numbers(3, 3), "bias": numbers(3)} for _ in range(3)]
    clear = [{"kernel": numbers(5, 7)} for _ in range(3)]
    model = {
        "token_embedder": {"embedding": numbers(7, 3)},
        "decoder": {"decoder_norm": {"scale": numbers(3)}},
    }

    def decoder(layers):
        return model | {"decoder": model["decoder"] | layers}

    stored = decoder({"dense_layers": stacked(clear, axis), "moe_layers": stacked(square, axis)})
    wanted = decoder(_single(clear, "dense_layers") | _single(square, "moe_layers"))
    path = write(tmp_path, {"params": {"params": stored}})
    if axis == 1:
        check(restore(path, target_of(form, wanted)), wanted)
        return
    error = refused(path, target_of(form, wanted))
    assert "axis 0 or 1" in str(error)
    said = [ScanAxis("decoder/moe_layers", 0)]
    check(restore(path, target_of(form, wanted), renames=said), wanted)


@pytest.mark.parametrize("form", FORMS)
def test_a_bias_of_another_width_decides_for_a_kernel_of_equal_axes(tmp_path, form):
    numbers = Numbers()
    layers = [{"kernel": numbers(4, 4), "bias": numbers(5)} for _ in range(4)]
    path = write(tmp_path, {"params": {"layers": stacked(layers, 0)}})
    check(restore(path, target_of(form, _single(layers))), _single(layers))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("axis", [1, -1])
def test_a_bias_that_is_stacked_on_its_last_axis_does_not_decide(tmp_path, axis, form):
    numbers = Numbers()
    layers = [{"kernel": numbers(4, 4), "bias": numbers(5)} for _ in range(4)]
    path = write(tmp_path, {"params": {"layers": stacked(layers, axis)}})
    error = refused(path, target_of(form, _single(layers)))
    assert "fit each" not in str(error)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("axis", [0, 1])
def test_a_hint_names_each_axis_that_may_be_meant_and_no_other(tmp_path, axis, form):
    numbers = Numbers()
    layers = [{"kernel": numbers(3, 3), "bias": numbers(3)} for _ in range(3)]
    path = write(tmp_path, {"params": {"layers": stacked(layers, axis)}})
    hints = refused(path, target_of(form, _single(layers))).hints
    assert [hint.arguments["renames"] for hint in hints] == [[ScanAxis("layers", at)] for at in (0, 1)]
    check(restore(path, target_of(form, _single(layers)), **hints[axis].arguments), _single(layers))


def test_the_two_sides_may_count_their_axes_from_different_ends(tmp_path):
    numbers = Numbers()
    block = {"kernel": numbers(2, 4, 4), "bias": numbers(2)}
    path = write(tmp_path, {"params": {"layers": {"layers_0": block, "layers_1": numbers.like(block)}}})
    # Stored along axis 0; wanted along axis 0, or along the last one: then the kernel's is 2.
    target = {"layers": {"kernel": numbers(4, 4, 4), "bias": numbers(4)}}

    error = refused(path, target_of("module", target))

    assert isinstance(error, AmbiguousMappingError)
    rule = next(hint.arguments["renames"] for hint in error.hints if "renames" in hint.arguments)
    assert rule == [ScanAxis("layers", 0)]


class _Cells(nnx.Module):
    def __init__(self, cell, layers):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([cell(5, 4, rngs=rngs) for _ in range(layers)])
        self.out = nnx.Linear(4, 6, rngs=rngs)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("moments", [False, True])
def test_fused_gates_of_scanned_cells_are_joined_along_their_features(tmp_path, axis, moments):
    numbers, layers = Numbers(), 3
    gates = [
        {f"i{gate}": {"kernel": numbers(5, 4)} for gate in "ifgo"}
        | {f"h{gate}": numbers.dense(4, 4) for gate in "ifgo"}
        for _ in range(layers)
    ]
    stack = jax.tree.map(lambda *leaves: np.stack(leaves, axis), *gates)
    params = {"layers": stack, "out": numbers.dense(4, 6)}
    tx = optax.adam(1e-3)

    def make():
        model = _Cells(nnx.OptimizedLSTMCell, layers)
        return {"model": model, "optimizer": nnx.Optimizer(model, tx, wrt=nnx.Param)} if moments else model

    state = numbers.optimizer(tx, params)
    path = write(tmp_path, {"params": params, "opt_state": state, "step": np.int32(3)})
    result = restore(path, nnx.eval_shape(make))
    model = result["model"] if moments else result

    def joined(tree, layer, side, name):
        parts = [np.take(tree["layers"][side + gate][name], layer, axis) for gate in "ifgo"]
        return np.concatenate(parts, -1)

    for layer in range(layers):
        cell = model.layers[layer]
        np.testing.assert_array_equal(cell.dense_i.kernel[...], joined(params, layer, "i", "kernel"))
        np.testing.assert_array_equal(cell.dense_h.kernel[...], joined(params, layer, "h", "kernel"))
        np.testing.assert_array_equal(cell.dense_h.bias[...], joined(params, layer, "h", "bias"))
        if moments:
            mu = result["optimizer"].opt_state[0].mu["layers"][layer]["dense_h"]["bias"]
            np.testing.assert_array_equal(mu.get_value(), joined(state[0].mu, layer, "h", "bias"))


@pytest.mark.parametrize("spelt", ["{}/layers", "{}/params/layers"])
@pytest.mark.parametrize("axes", [(0, 1), (1, 0), (1, 1)])
def test_each_of_two_networks_has_an_axis_of_its_own(tmp_path, spelt, axes):
    numbers, tx = Numbers(), optax.adam(1e-3)
    layers = {name: [{"w": numbers(3, 5)} for _ in range(3)] for name in ("gen", "disc")}
    params = {name: {"layers": stacked(layers[name], axis)} for name, axis in zip(layers, axes, strict=True)}
    stored = {
        name: {"params": part, "opt_state": numbers.optimizer(tx, part), "step": np.int32(7)}
        for name, part in params.items()
    }
    wanted = {name: {"layers": dict(enumerate(parts))} for name, parts in layers.items()}
    path, target = write(tmp_path, stored), {name: training_target(wanted[name], tx) for name in wanted}
    error = refused(path, target)
    asked = {hint.arguments["renames"][0] for hint in error.hints if "renames" in hint.arguments}
    rules = [ScanAxis(spelt.format(name), axis) for name, axis in zip(layers, axes, strict=True)]
    assert asked >= {
        ScanAxis(f"{name}/params/layers", rule.axis) for name, rule in zip(layers, rules, strict=True)
    }
    result = restore(path, target, renames=rules)
    for name in wanted:
        check(result[name], below("model", wanted[name]))


@pytest.mark.parametrize("policy", ["error", "warn"])
@pytest.mark.parametrize("width", [5, 3])
def test_a_stack_within_a_stack_is_not_taken_apart_for_some_of_its_leaves(tmp_path, width, policy):
    """What is counted on axis 1 of the stored leaves, and on axis 1 of a layer: the first axis of a bias."""
    numbers = Numbers()
    dense = [[numbers.dense(width, 8 - width) for _ in range(3)] for _ in range(2)]
    stored = {"blk": stacked([stacked(layers, 0) for layers in dense], 0)}
    layers = {f"blk_{at}": stacked(layers, 1) for at, layers in enumerate(dense)}
    path = write(tmp_path, {"params": {"stages": stored, "out": {"w": numbers(4)}}})

    refused(path, target_of("state", {"stages": layers, "out": {"w": numbers(4)}}), policy=policy)
