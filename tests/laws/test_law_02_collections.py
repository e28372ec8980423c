"""Law 2: a collection is a part of the name."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from orbax_nnx_handler import (
    AmbiguousMappingError,
    MissingParamError,
    RestoreError,
    UnmappedValueError,
    from_linen,
    restore,
    suggest,
)
from tests.laws import worlds
from tests.laws.worlds import (
    FORMS,
    Numbers,
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
from tests.sampled import every, sampled

# Names that sort before `params` and behind it.
COPIES = every(2, ("ema_params", "grads", "old_params", "slow_params", "target_params", "teacher_params"))


def _lstm(numbers, features=2, inputs=3):
    gates = {gate: {"kernel": numbers(inputs, features)} for gate in ("ii", "if", "ig", "io")}
    return gates | {gate: numbers.dense(features, features) for gate in ("hi", "hf", "hg", "ho")}


def _gru(numbers, features=2, inputs=3, last_bias=0.0):
    cell = {gate: numbers.dense(inputs, features) for gate in ("ir", "iz", "in")}
    cell |= {gate: {"kernel": numbers(features, features)} for gate in ("hr", "hz")}
    return cell | {
        "hn": {"kernel": numbers(features, features), "bias": np.full(features, last_bias, np.float32)}
    }


def _joined(cell, gates, name):
    return np.concatenate([cell[gate][name] for gate in gates], -1)


class _Cell(nnx.Module):
    def __init__(self, cell):
        self.cell = cell(3, 2, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("copy", COPIES)
def test_gates_are_joined_from_params(tmp_path, copy):
    numbers = Numbers()
    params = {"cell": _lstm(numbers)}
    path = write(tmp_path, {"params": params, copy: {"cell": _lstm(numbers)}, "step": np.int32(3)})
    result = restore(path, nnx.eval_shape(lambda: _Cell(nnx.OptimizedLSTMCell)), unexpected="ignore")
    cell = result.cell
    inputs, hidden = ("ii", "if", "ig", "io"), ("hi", "hf", "hg", "ho")
    np.testing.assert_array_equal(cell.dense_i.kernel[...], _joined(params["cell"], inputs, "kernel"))
    np.testing.assert_array_equal(cell.dense_h.kernel[...], _joined(params["cell"], hidden, "kernel"))
    np.testing.assert_array_equal(cell.dense_h.bias[...], _joined(params["cell"], hidden, "bias"))


@pytest.mark.parametrize("copy", COPIES)
def test_gates_of_a_gru_are_joined_from_params(tmp_path, copy):
    numbers = Numbers()
    params = {"cell": _gru(numbers)}
    path = write(tmp_path, {"params": params, copy: {"cell": _gru(numbers)}, "step": np.int32(3)})
    cell = restore(path, nnx.eval_shape(lambda: _Cell(nnx.GRUCell)), unexpected="ignore").cell
    for part, gates in (("dense_i", ("ir", "iz", "in")), ("dense_h", ("hr", "hz", "hn"))):
        np.testing.assert_array_equal(
            getattr(cell, part).kernel[...], _joined(params["cell"], gates, "kernel")
        )


@pytest.mark.parametrize("copy", COPIES)
def test_a_bias_that_nnx_cannot_hold_is_seen_beside_a_copy(tmp_path, copy):
    numbers = Numbers()
    params, other = {"cell": _gru(numbers, last_bias=0.5)}, {"cell": _gru(numbers)}
    path = write(tmp_path, {"params": params, copy: other, "step": np.int32(3)})
    error = refused(path, nnx.eval_shape(lambda: _Cell(nnx.GRUCell)), unexpected="ignore")
    assert isinstance(error, UnmappedValueError)


@pytest.mark.parametrize("copy", ["ema_params", "target_params"])
def test_a_weight_norm_takes_all_its_parts_from_params(tmp_path, copy):
    numbers = Numbers()
    init = linen.WeightNorm(linen.Dense(4)).init
    variables = jax.eval_shape(init, jax.random.key(0), jnp.ones((1, 3)))
    params = numbers.like(variables["params"])
    path = write(tmp_path, {"params": params, copy: numbers.like(params), "step": np.int32(3)})
    target = nnx.WeightNorm(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    result = restore(path, target, unexpected="ignore")
    kernel, bias = params["layer_instance"]["kernel"], params["layer_instance"]["bias"]
    scale = params["layer_instance/kernel/scale"]
    np.testing.assert_array_equal(result.layer_instance.kernel[...], kernel)
    np.testing.assert_array_equal(result.layer_instance.bias[...], bias)
    np.testing.assert_array_equal(result.scales[("kernel",)], scale)


@pytest.mark.parametrize("form", ["module", "state"])
@pytest.mark.parametrize("copy", COPIES)
def test_layers_are_taken_out_of_the_stack_in_params(tmp_path, copy, form):
    numbers = Numbers()
    layers = {at: numbers.dense(2, 4) for at in range(3)}
    scanned = {"layers": stacked(list(layers.values()))}
    path = write(tmp_path, {"params": scanned, copy: numbers.like(scanned), "step": np.int32(1)})
    result = restore(path, target_of(form, {"layers": layers}), unexpected="ignore")
    check(result, {"layers": layers})


@pytest.mark.parametrize("copy", ["ema_params", "target_params"])
def test_layers_for_a_pure_dict_are_never_those_of_the_copy(tmp_path, copy):
    numbers = Numbers()
    layers = {f"layers_{at}": {"kernel": numbers(2, 4)} for at in range(3)}
    scanned = {"layers": stacked(list(layers.values()))}
    path = write(
        tmp_path, {"params": scanned, copy: numbers.like(scanned), "opt_state": [], "step": np.int32(1)}
    )
    refused(path, pure_target(layers), unexpected="ignore")


@pytest.mark.parametrize("copy", ["ema_params", "target_params"])
def test_of_two_collections_that_hold_a_pure_dict_the_target_says_which(tmp_path, copy):
    numbers = Numbers()
    whole = {"hidden": numbers.dense(), "head": numbers.dense()}
    other = numbers.like(whole)
    path = write(tmp_path, {"params": whole, copy: other, "step": np.int32(1)})
    with pytest.raises(AmbiguousMappingError) as raised:
        restore(path, pure_target(whole), unexpected="ignore")
    # Nothing else is proposed: no search of names can tell.
    assert [hint.words for hint in raised.value.hints] == [
        f"pass {{{name!r}: target}} as the target if what {name!r} holds is meant."
        for name in ("params", copy)
    ]
    for name, values in (("params", whole), (copy, other)):
        result = restore(path, {name: pure_target(whole)}, unexpected="ignore")
        check(result, {name: values})


@pytest.mark.parametrize("copy", ["ema_params", "target_params"])
def test_of_two_collections_for_a_pure_dict_under_a_key_a_rule_says_which(tmp_path, copy):
    numbers = Numbers()
    whole = {"hidden": numbers.dense(), "head": numbers.dense()}
    stored = {"params": whole, copy: numbers.like(whole)}
    path = write(tmp_path, stored | {"step": np.int32(1)})
    target = {"model": pure_target(whole)}
    with pytest.raises(AmbiguousMappingError) as raised:
        restore(path, target, unexpected="ignore")
    rules = [hint.arguments["renames"] for hint in raised.value.hints]
    assert rules == [[("params", "model")], [(copy, "model")]]
    for [(name, root)] in rules:
        result = restore(path, target, renames=[(name, root)], unexpected="ignore")
        check(result["model"], stored[name])


@pytest.mark.parametrize("copy", ["ema_params", "target_params"])
def test_a_stack_for_a_pure_dict_is_never_made_from_the_copy(tmp_path, copy):
    numbers = Numbers()
    layers = {f"layers_{at}": {"kernel": numbers(2, 4)} for at in range(3)}
    scanned = {"layers": stacked(list(layers.values()))}
    path = write(tmp_path, {"params": layers, copy: numbers.like(layers), "step": np.int32(1)})
    right_or_refused(path, pure_target(scanned), scanned, unexpected="ignore")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("copy", ["ema_params", "grads", "masks", "target_params"])
def test_a_weight_that_only_a_copy_holds_is_missing(tmp_path, copy, form):
    numbers = Numbers()
    whole = {"hidden": numbers.dense(), "head": numbers.dense()}
    path = write(
        tmp_path,
        {"params": {"hidden": whole["hidden"]}, copy: numbers.like(whole), "step": np.int32(1)},
    )
    refused(path, target_of(form, whole), unexpected="ignore")


@pytest.mark.parametrize(
    "name", ["ema_stats", "ema_batch_stats", "teacher_batch_stats", "initial_batch_stats"]
)
@pytest.mark.parametrize("unexpected", ["ignore", "error"])
def test_statistics_are_not_taken_from_a_collection_of_another_name(tmp_path, name, unexpected):
    numbers = Numbers()
    params = {"bn": {"scale": numbers(4), "bias": numbers(4)}}
    stats = {"bn": {"mean": numbers(4), "var": numbers(4)}}
    path = write(tmp_path, {"params": params, name: stats, "step": np.int32(1)})
    whole = {"bn": params["bn"] | stats["bn"]}
    refused(path, model_target(whole), unexpected=unexpected)


@pytest.mark.parametrize("name", ["ema_batch_stats", "old_batch_stats", "test_batch_stats"])
@pytest.mark.parametrize("form", ["module", "state"])
def test_statistics_come_from_their_own_collection_beside_another(tmp_path, name, form):
    numbers = Numbers()
    params = {"bn": {"scale": numbers(4), "bias": numbers(4)}}
    stats = {"bn": {"mean": numbers(4), "var": numbers(4)}}
    stored = {"params": params, "batch_stats": stats, name: numbers.like(stats), "step": np.int32(1)}
    whole = {"bn": params["bn"] | stats["bn"]}
    check(restore(write(tmp_path, stored), target_of(form, whole), unexpected="ignore"), whole)


@pytest.mark.parametrize("field", ["model_state", "extra_variables", "mutable", "state", "variables", "aux"])
def test_statistics_one_level_down_are_found(tmp_path, field):
    numbers = Numbers()
    params = {"hidden": numbers.dense(), "bn": {"scale": numbers(4)}}
    stats = {"bn": {"mean": numbers(4), "var": numbers(4)}}
    tx = optax.adam(1e-3)
    opt_state = numbers.optimizer(tx, params)
    stored = {"params": params, field: {"batch_stats": stats}, "opt_state": opt_state, "step": np.int32(7)}
    whole = {"hidden": params["hidden"], "bn": params["bn"] | stats["bn"]}
    path = write(tmp_path, stored)
    check(restore(path, model_target(whole)), whole)
    result = restore(path, training_target(whole, tx))
    check(result, worlds.below("model", whole) | worlds.below("optimizer/opt_state", opt_state))


class Cached(nnx.Variable):
    pass


@pytest.mark.parametrize("other", ["metric", "kept", "state"])
def test_a_type_of_its_own_comes_from_its_own_collection(tmp_path, other):
    numbers = Numbers()
    name = nnx.variable_name_from_type(Cached, allow_register=True)
    params, own = {"hidden": numbers.dense()}, {"hidden": {"table": numbers(5)}}
    stored = {"params": params, name: own, other: numbers.like(own), "step": np.int32(1)}
    whole = {"hidden": params["hidden"] | own["hidden"]}
    target = model_target(whole, {"table": Cached})
    check(restore(write(tmp_path, stored), target, unexpected="ignore"), whole)
    del stored[name]
    refused(write(tmp_path, stored), target, unexpected="ignore")


@pytest.mark.parametrize("copy", [*COPIES, "masks", "last_batch"])
def test_a_copy_beside_params_does_not_take_the_moments(tmp_path, copy):
    numbers = Numbers()
    params, tx = {"hidden": numbers.dense(), "out": numbers.dense(4, 2)}, optax.adam(1e-3)
    other = {"hidden": {"kernel": numbers(2)}} if copy == "last_batch" else numbers.like(params)
    opt_state = numbers.optimizer(tx, params)
    path = write(tmp_path, {"params": params, copy: other, "opt_state": opt_state, "step": np.int32(7)})
    result = restore(path, training_target(params, tx), unexpected="ignore")
    check(result, worlds.below("model", params) | worlds.below("optimizer/opt_state", opt_state))


def test_a_copy_beside_params_is_seen_under_strict_unexpected(tmp_path):
    numbers = Numbers()
    params = {"hidden": numbers.dense()}
    path = write(tmp_path, {"params": params, "ema_params": numbers.like(params)})
    refused(path, model_target(params), unexpected="error")


@pytest.mark.parametrize(
    ("copy", "optimizer", "form"), sampled([*COPIES, "masks", "ema", "teacher"], [True, False], FORMS)
)
def test_a_copy_is_not_the_model_where_params_is_not_stored(tmp_path, copy, optimizer, form):
    numbers = Numbers()
    whole = {"hidden": numbers.dense(), "head": numbers.dense()}
    stored = {copy: whole, "step": np.int32(1)}
    if optimizer:
        stored["opt_state"] = numbers.optimizer(optax.adam(0.1), whole)
    path = write(tmp_path, stored)
    refused(path, target_of(form, whole), unexpected="ignore")
    refused(path, pure_target({"model": whole}), unexpected="ignore")
    check(restore(path, pure_target({copy: whole}), unexpected="ignore"), {copy: whole})
    named = restore(path, target_of(form, whole), renames=[(copy, "params")], unexpected="ignore")
    check(named, whole)


@pytest.mark.parametrize("name", ["grads", "ema_params", "masks"])
def test_a_module_called_like_a_collection_comes_from_params(tmp_path, name):
    numbers = Numbers()
    params = {name: {"embedding": numbers(2, 2), "kernel": numbers(2, 2)}}
    copy = {name: {"embedding": numbers(2, 2), "kernel": numbers(2, 2)}}
    path = write(tmp_path, {"params": params, name: copy, "step": np.int32(3)})
    check(restore(path, model_target(params), unexpected="ignore"), params)


_ALONE = (*COPIES, "ema", "params_ema", "old_batch_stats", "masks")


@pytest.mark.parametrize(("copy", "above", "form"), sampled(_ALONE, [(), ("state",)], FORMS))
def test_a_copy_that_is_stored_alone_is_used_only_by_the_rule_of_the_hint(tmp_path, copy, above, form):
    model = {"dense": Numbers().dense()}
    path = write(tmp_path, {above[0]: {copy: model}} if above else {copy: model})
    error = refused(path, target_of(form, model))
    (hint,) = error.hints
    assert hint.arguments == {"renames": [("/".join((*above, copy)), "params")]}
    check(restore(path, target_of(form, model), **hint.arguments), model)


@pytest.mark.parametrize("copy", ["ema", "params_ema", "ema_params", "polyak"])
def test_a_copy_that_is_all_of_a_collection_or_of_an_item_is_not_the_model(tmp_path, copy):
    numbers, tx = Numbers(), optax.adam(1e-3)
    model = {"dense": numbers.dense()}
    state = {"params": model, "opt_state": numbers.optimizer(tx, model), "step": np.int32(1)}
    for stored in ({"params": {copy: model}}, {copy: {"params": model}}):
        path = write(tmp_path, stored)
        (hint,) = refused(path, model_target(model)).hints
        check(restore(path, model_target(model), **hint.arguments), model)
    refused(write(tmp_path, {copy: state}), model_target(model))
    refused(write(tmp_path, {copy: state}), {"model": worlds.training_target(model, tx)})
    asked = restore(write(tmp_path, {copy: state}), {copy: model_target(model)}, unexpected="ignore")
    check(asked[copy], model)
    inside = restore(write(tmp_path, {"params": {copy: model}}), model_target({copy: model}))
    check(inside, {copy: model})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("copy", _ALONE)
def test_a_module_that_is_called_like_a_copy_is_itself(tmp_path, copy, form):
    model = {copy: {"dense": Numbers().dense()}}
    path = write(tmp_path, model)
    check(restore(path, target_of(form, model)), model)


@pytest.mark.parametrize("name", ["params", "model", "model_params", "net", "state"])
def test_a_level_that_names_no_copy_is_taken_away(tmp_path, name):
    model = {"dense": Numbers().dense()}
    check(restore(write(tmp_path, {name: model}), target_of("module", model)), model)


@pytest.mark.parametrize(("copy", "field"), [("ema_params", "ema"), ("target_params", "target_net")])
def test_the_rule_for_a_field_that_is_called_after_a_copy_is_in_the_hint(tmp_path, copy, field):
    numbers = Numbers()
    stored = {"params": {"dense": numbers.dense()}, copy: {"dense": numbers.dense()}, "step": np.int32(3)}
    path = write(tmp_path, stored)
    wanted = {"model": stored["params"], field: stored[copy]}
    error = refused(path, model_target(wanted), unexpected="ignore")
    (hint,) = error.hints
    assert hint.arguments == {"renames": [(copy, field)]}
    check(restore(path, model_target(wanted), unexpected="ignore", **hint.arguments), wanted)


class _Own(nnx.Variable):
    pass


class _Quantiser(nnx.Module):
    def __init__(self, kind):
        self.codebook = nnx.Param(jnp.zeros((4, 3)))
        self.sizes = kind(jnp.zeros(4))


@pytest.mark.parametrize("beside", [(), ("step",)], ids=["variables", "train-state"])
@pytest.mark.parametrize("is_abstract", [False, True])
@pytest.mark.parametrize("kind", [nnx.Variable, _Own])
def test_a_type_without_a_collection_is_not_defaulted_where_its_path_is_stored(
    tmp_path, kind, is_abstract, beside
):
    numbers = Numbers()
    values = {"codebook": numbers(4, 3), "sizes": numbers(4)}
    path = write(tmp_path, {"params": {"vq": values}} | dict.fromkeys(beside, np.int32(1)))

    def make():
        return nnx.Dict(vq=_Quantiser(kind))

    target = nnx.eval_shape(make) if is_abstract else make()
    error = refused(path, target)
    (hint,) = [hint for hint in error.hints if "renames" in hint.arguments]
    assert hint.arguments == {"renames": [("params/vq/sizes", "vq/sizes")]}
    result = restore(path, target, **hint.arguments)
    np.testing.assert_array_equal(result["vq"].sizes[...], values["sizes"])


def test_the_hint_for_a_type_of_ones_own_names_its_collection(tmp_path):
    numbers = Numbers()
    stored = {"params": {"a": numbers(3)}, "mine": {"a": numbers(3)}}
    path = write(tmp_path, stored)
    target = nnx.eval_shape(lambda: nnx.Dict(a=_Own(jnp.zeros(3))))
    (hint,) = refused(path, target).hints
    assert hint.arguments == {"renames": [("mine/a", "a")]}
    result = restore(path, target, unexpected="ignore", **hint.arguments)
    np.testing.assert_array_equal(result["a"][...], stored["mine"]["a"])


@pytest.mark.parametrize("kind", [nnx.Variable, _Own])
@pytest.mark.parametrize("beside", [(), ("step",)], ids=["variables", "train-state"])
def test_a_rule_may_say_which_collection_a_type_of_ones_own_is_kept_in(tmp_path, beside, kind):
    numbers = Numbers()
    stored = {"params": {"a": numbers(3), "b": numbers(3)}, "mine": {"a": numbers(3)}}
    path = write(tmp_path, stored | dict.fromkeys(beside, np.int32(1)))
    target = nnx.eval_shape(lambda: nnx.Dict(a=kind(jnp.zeros(3)), b=nnx.Param(jnp.zeros(3))))

    result = restore(path, target, unexpected="ignore", renames=[("mine", kind.__name__)])

    np.testing.assert_array_equal(result["a"][...], stored["mine"]["a"])
    np.testing.assert_array_equal(result["b"][...], stored["params"]["b"])


def test_a_pure_dict_is_not_filled_where_its_path_is_stored_in_a_collection_of_a_program(tmp_path):
    numbers = Numbers()
    model = {"vq": {"table": numbers(3), "sizes": numbers(4)}}
    stored = {
        "params": {"vq": {"table": model["vq"]["table"]}},
        "memory": {"vq": {"sizes": model["vq"]["sizes"]}},
    }
    path = write(tmp_path, stored)
    refused(path, pure_target(model), policy="warn")
    rule = [("memory/vq/sizes", "vq/sizes")]
    check(restore(path, pure_target(model), policy="warn", renames=rule), model)


@pytest.mark.parametrize("level", ["ema_params", "ema", "target_params", "params_old", "old"])
@pytest.mark.parametrize("form", FORMS)
def test_a_target_that_asks_for_a_copy_alone_is_not_given_the_weights(tmp_path, level, form):
    params = {"up": Numbers().dense(), "down": Numbers(100).dense()}
    for tree in ({"params": params, "step": np.int32(3)}, {"params": params}, params):
        path = write(tmp_path, tree)
        assert refused(path, target_of(form, {level: params}), unexpected="ignore")


@pytest.mark.parametrize("level", ["batch_stats", "opt_state", "cache", "old", "params_old"])
def test_what_is_no_collection_of_weights_is_no_level_above_them(tmp_path, level):
    params = {"up": Numbers().dense(), "down": Numbers(100).dense()}
    assert refused(write(tmp_path, {level: params}), model_target(params), unexpected="ignore")


@pytest.mark.parametrize("copy", ["lora_old", "old_lora", "ema_lora", "lora_ema", "target_lora", "LoRA_bak"])
@pytest.mark.parametrize("policy", ["error", "warn"])
def test_a_copy_is_not_the_collection_of_a_type_that_nobody_named(tmp_path, copy, policy):
    numbers = Numbers()
    base = {"up": numbers.dense(4, 4)}
    own, other = ({"up": {"lora": {"lora_a": numbers(4, 2), "lora_b": numbers(2, 4)}}} for _ in range(2))

    class Net(nnx.Module):
        def __init__(self):
            self.up = nnx.LoRALinear(4, 4, lora_rank=2, rngs=nnx.Rngs(0))

    target = nnx.eval_shape(Net)
    alone = write(tmp_path, {"params": base, copy: other})
    assert refused(alone, target, unexpected="ignore")
    both = write(tmp_path, {"params": base, "lora": own, copy: other})
    result = restore(both, target, unexpected="ignore", policy=policy)
    np.testing.assert_array_equal(result.up.lora.lora_a[...], own["up"]["lora"]["lora_a"])
    np.testing.assert_array_equal(result.up.lora.lora_b[...], own["up"]["lora"]["lora_b"])


@pytest.mark.parametrize("form", ["listed", "stacked"])
@pytest.mark.parametrize("collection", ["cached_value", "codebook"])
def test_layers_in_a_collection_of_their_own_are_not_filled_where_the_target_has_no_types(
    tmp_path, collection, form
):
    numbers = Numbers()
    layers = [{"scale": numbers(3), "kernel": numbers(3, 4)} for _ in range(5)]
    tables = [{"table": numbers(1)} for _ in layers]
    if form == "listed":
        stored = [{f"layers_{at}": part for at, part in enumerate(parts)} for parts in (layers, tables)]
        wanted = {"layers": worlds.stacked(layers) | worlds.stacked(tables)}
    else:
        stored = [{"layers": worlds.stacked(parts)} for parts in (layers, tables)]
        wanted = {
            f"layers_{at}": layer | table
            for at, (layer, table) in enumerate(zip(layers, tables, strict=True))
        }
    path = write(tmp_path, {"params": stored[0], collection: stored[1]})
    worlds.right_or_refused(path, worlds.pure_target(wanted), wanted, policy="warn", unexpected="ignore")


@pytest.mark.parametrize("level", ["ema", "unet_ema", "ema_unet", "EMA", "EMAModel", "averaged", "avg_model"])
@pytest.mark.parametrize("beside", ["ema", "ema_params", None])
def test_a_target_below_a_level_called_after_averages_is_never_given_the_raw_weights(tmp_path, level, beside):
    numbers, tx = Numbers(), optax.adam(1e-3)
    params, averages = ({"dense": numbers.dense()} for _ in range(2))
    state = {"params": params, "opt_state": numbers.optimizer(tx, params), "step": np.int32(7)}
    stored = {"model": state, "ema": averages} if beside == "ema" else state
    path = write(tmp_path, stored if beside != "ema_params" else {**state, "ema_params": averages})
    target = {level: target_of("module", params)}
    if level == beside:
        check(restore(path, target)[level], averages)
        return
    error = refused(path, target)
    assert suggest(path, target).renames == ()
    if beside is not None:
        check(restore(path, target, **error.hints[0].arguments)[level], averages)


@pytest.mark.parametrize("key", ["batch_stats", "model_state", "stats", "old_stats", "ema_state"])
@pytest.mark.parametrize("with_optimizer", [False, True])
def test_the_parts_that_split_gives_are_their_types_collections_whatever_their_keys(
    tmp_path, key, with_optimizer
):
    numbers, tx = Numbers(), optax.adam(1e-3)
    params = {"dense": numbers.dense(), "norm": {"scale": numbers(4)}}
    stats = {"norm": {"mean": numbers(4), "var": numbers(4)}}
    stored = {"params": params, "batch_stats": stats}
    if with_optimizer:
        stored |= {"opt_state": numbers.optimizer(tx, params), "step": np.int32(7)}
    model = worlds.model_target({"dense": params["dense"], "norm": params["norm"] | stats["norm"]})
    _, weights, rest = nnx.split(model, nnx.Param, ...)
    path, target = write(tmp_path, stored), {"params": weights, key: rest}
    if key in ("old_stats", "ema_state"):
        refused(path, target, unexpected="ignore")
        return
    result = restore(path, target, unexpected="ignore")
    check(result["params"], params)
    check(result[key], stats)


class _Counted(nnx.Variable):
    pass


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "with its own type"])
def test_the_collection_that_is_named_for_one_type_is_not_that_of_another(beside):
    nnx.register_variable_name("counted_by_a_test", _Counted, overwrite=True)
    numbers = Numbers()
    stored = {"params": {"w": numbers(3)}, "counted_by_a_test": {"m": numbers(3), "n": numbers(3)}}
    wanted = {"w": nnx.Param(jnp.zeros(3)), "m": _Own(jnp.zeros(3))}
    wanted |= {"n": _Counted(jnp.zeros(3))} if beside else {}

    with pytest.raises(RestoreError, match="counted_by_a_test/m"):
        from_linen(stored, nnx.State(wanted), unexpected="ignore")
    rule = [("counted_by_a_test/m", "m")]
    result = from_linen(stored, nnx.State(wanted), unexpected="ignore", renames=rule)

    np.testing.assert_array_equal(result["m"][...], stored["counted_by_a_test"]["m"])


class FastParam(nnx.Param):
    """A parameter in a collection of its own."""


class SlowParam(nnx.Param):
    """Another, that Flax's bridge has met."""


@pytest.mark.parametrize("is_met", [False, True])
@pytest.mark.parametrize("name", ["FastParam", "fast_params", "fast_param", "fast"])
def test_a_collection_that_is_called_as_a_type_is_its_own(name, is_met):
    kind = FastParam
    if is_met:
        kind, name = SlowParam, name.replace("fast", "slow").replace("Fast", "Slow")
        nnx.variable_name_from_type(SlowParam, allow_register=True)
    numbers = Numbers()
    stored = {"params": {"w": numbers(3), "x": numbers(3)}, name: {"w": numbers(3)}}
    target = nnx.State({"w": kind(jnp.zeros(3)), "x": kind(jnp.zeros(3))})

    with pytest.raises(MissingParamError) as caught:
        from_linen(stored, target)
    assert [*caught.value.paths] == [("x",)]
    result = from_linen(stored, nnx.State({"w": target["w"]}))
    np.testing.assert_array_equal(result["w"][...], stored[name]["w"])
    if is_met:  # What is registered has a collection of its own.
        with pytest.raises(MissingParamError):
            from_linen({"params": stored["params"]}, target)
    else:
        result = from_linen({"params": stored["params"]}, target)
        np.testing.assert_array_equal(result["w"][...], stored["params"]["w"])


@pytest.mark.parametrize("copy", ["ema_params", "teacher_params", "target_params"])
@pytest.mark.parametrize("level", ["teacher", "target_net", "slow"])
def test_a_network_that_follows_another_is_not_given_the_weights_beside_a_copy(level, copy):
    numbers = Numbers()
    params = {"dense": numbers.dense()}
    stored = {"params": params, copy: numbers.like(params)}
    target = {level: model_target(params)}

    with pytest.raises(AmbiguousMappingError, match=f"{copy}/dense"):
        from_linen(stored, target, unexpected="ignore")
    result = from_linen(stored, target, unexpected="ignore", renames=[(copy, level)])
    check(result[level], stored[copy])
    check(from_linen({"params": params}, target)[level], params)
