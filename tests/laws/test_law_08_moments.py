"""Law 8: a moment is its parameter's, and optimizer states are matched as wholes, in order."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from orbax_nnx_handler import (
    Add,
    AmbiguousMappingError,
    MissingParamError,
    Repeat,
    Reshape,
    RestoreError,
    Scale,
    ShapeMismatchError,
    Split,
    Transpose,
    UnstackLayers,
    from_linen,
    restore,
)
from tests.laws import worlds
from tests.laws.worlds import Numbers, check, stacked, training_target, write
from tests.planning.plans import plan_of
from tests.sampled import checkered, sampled


def _schedule(count):
    return 1.0 + 0 * count


CHAINS = {
    "adam, schedule, plateau": lambda: [
        optax.scale_by_adam(),
        optax.scale_by_schedule(_schedule),
        optax.contrib.reduce_on_plateau(accumulation_size=10),
    ],
    "noise, schedule": lambda: [optax.add_noise(0.1, 0.5, 3), optax.scale_by_schedule(_schedule)],
    "two plateaus": lambda: [
        optax.contrib.reduce_on_plateau(accumulation_size=3),
        optax.scale_by_adam(),
        optax.contrib.reduce_on_plateau(accumulation_size=5),
    ],
    "inject, schedule": lambda: [
        optax.inject_hyperparams(optax.adam)(learning_rate=1e-3),
        optax.scale_by_schedule(_schedule),
    ],
    "two schedules": lambda: [
        optax.scale_by_schedule(_schedule),
        optax.scale_by_adam(),
        optax.scale_by_schedule(_schedule),
    ],
    "adam, trace, ema": lambda: [optax.scale_by_adam(), optax.trace(0.9), optax.ema(0.9)],
}
GROWN = {
    "the same": lambda parts: parts,
    "clip first": lambda parts: [optax.clip_by_global_norm(1.0), *parts],
    "decay last": lambda parts: [*parts, optax.add_decayed_weights(0.1)],
    "clip and decay within": lambda parts: [
        optax.clip(1.0),
        parts[0],
        optax.add_decayed_weights(0.1),
        *parts[1:],
    ],
    "nested": lambda parts: [optax.clip(1.0), optax.chain(*parts)],
}


def _states(state):
    """Returns the states of a chain that hold anything, in order, whatever they are nested in."""
    if isinstance(state, tuple) and not hasattr(state, "_fields"):
        return [inner for part in state for inner in _states(part)]
    return [state] if jax.tree.leaves(state) else []


@pytest.mark.parametrize(("chain", "grown", "backwards"), sampled(CHAINS, GROWN, [False, True]))
def test_states_of_a_chain_keep_their_numbers_when_it_grows_or_shrinks(tmp_path, chain, grown, backwards):
    numbers = Numbers()
    params = {"dense": numbers.dense()}
    plain, other = optax.chain(*CHAINS[chain]()), optax.chain(*GROWN[grown](CHAINS[chain]()))
    old, new = (other, plain) if backwards else (plain, other)
    opt_state = numbers.optimizer(old, params)
    path = write(tmp_path, {"params": params, "opt_state": opt_state, "step": np.int32(2)})
    try:
        result = restore(path, training_target(params, new))
    except RestoreError:
        if grown == "the same":
            raise
        return
    have = [worlds.flat(part) for part in _states(result.optimizer.opt_state)]
    want = [worlds.flat(part) for part in _states(opt_state)]

    def values(parts):
        return [[value.tolist() for value in part.values()] for part in parts]

    assert values(have) == values(want)


def _by_labels(first, second, inner=optax.adam):
    def labels(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: first if "dense" in jax.tree_util.keystr(path) else second, params
        )

    return optax.multi_transform({first: inner(1e-3), second: inner(1e-2)}, labels)


def test_an_optimizer_with_groups_is_restored_by_itself_and_never_for_other_groups(tmp_path):
    numbers = Numbers()
    params = {"dense": numbers.dense(), "other": numbers.dense()}
    opt_state = numbers.optimizer(_by_labels("x", "y"), params)
    target = training_target(params, _by_labels("x", "y")).optimizer
    alone = restore(write(tmp_path, opt_state), nnx.State({"opt_state": nnx.state(target)["opt_state"]}))
    for label, module in (("x", "dense"), ("y", "other")):
        have, want = (states["inner_states"][label] for states in (alone["opt_state"], opt_state._asdict()))
        moments = have["inner_state"][0]["mu"][module]["kernel"]
        np.testing.assert_array_equal(moments[...], want.inner_state[0].mu[module]["kernel"])

    whole = write(tmp_path, {"params": params, "opt_state": opt_state, "step": np.int32(2)})
    error = worlds.refused(whole, training_target(params, _by_labels("y", "x")))
    assert "the stored optimizer is for other groups of parameters" in str(error)
    assert not any("policy" in hint.arguments for hint in error.hints)


@pytest.mark.parametrize("labels", [("kernels", "no_decay"), ("y", "z"), ("y", "x"), ("a", "b")])
@pytest.mark.parametrize("policy", ["error", "warn"])
def test_groups_without_moments_are_those_of_their_labels(tmp_path, policy, labels):
    def tx(first, second):
        return _by_labels(first, second, optax.inject_hyperparams(optax.sgd))

    numbers = Numbers()
    params = {"dense": numbers.dense(), "other": numbers.dense()}
    path = write(tmp_path, {"params": params, "opt_state": tx("x", "y").init(params), "step": np.int32(2)})
    states = restore(path, training_target(params, tx("x", "y"))).optimizer.opt_state.inner_states
    assert [float(states[at].inner_state.hyperparams["learning_rate"][...]) for at in "xy"] == [
        np.float32(1e-3),
        np.float32(1e-2),
    ]
    if set(labels) == {"x", "y"}:  # By their labels, whatever they are for: rates are no moments.
        restore(path, training_target(params, tx(*labels)))
    else:
        assert "no field tells which" in str(
            worlds.refused(path, training_target(params, tx(*labels)), policy=policy)
        )


def test_the_rate_of_one_group_is_not_that_of_another_which_had_none(tmp_path):
    def tx(label):
        inner = {at: optax.sgd(0.1) for at in ("dense", "other")}
        inner[label] = optax.inject_hyperparams(optax.sgd)(0.2)
        return optax.multi_transform(inner, lambda params: jax.tree_util.tree_map_with_path(group, params))

    def group(path, _):
        return "dense" if "dense" in jax.tree_util.keystr(path) else "other"

    numbers = Numbers()
    params = {"dense": numbers.dense(), "other": numbers.dense()}
    path = write(tmp_path, {"params": params, "opt_state": tx("dense").init(params), "step": np.int32(2)})
    restore(path, training_target(params, tx("dense")))
    worlds.refused(path, training_target(params, tx("other")), policy="warn")


TURNED = {
    "adam, schedule": lambda: [optax.scale_by_adam(), optax.scale_by_schedule(_schedule)],
    "trace, ema": lambda: [optax.trace(0.9), optax.ema(0.9)],
    "rms, adam, trace": lambda: [optax.scale_by_rms(), optax.scale_by_adam(), optax.trace(0.9)],
}


@pytest.mark.parametrize("chain", TURNED)
def test_a_chain_in_another_order_is_a_question(tmp_path, chain):
    numbers = Numbers()
    params = {"dense": numbers.dense()}
    parts = TURNED[chain]()
    old, new = optax.chain(*parts), optax.chain(*parts[1:], parts[0])
    state = {"params": params, "opt_state": numbers.optimizer(old, params), "step": np.int32(2)}
    path = write(tmp_path, state)

    with pytest.raises(AmbiguousMappingError, match="would be taken from a chain in another order"):
        restore(path, training_target(params, new), policy="warn")
    check(restore(path, training_target(params, old)).model, params)


@pytest.mark.parametrize("name", ["mu", "nu", "trace", "count"])
def test_a_module_called_like_a_moment_is_not_one(tmp_path, name):
    numbers, tx = Numbers(), optax.adam(1e-3)
    params = {"dense": {"kernel": numbers(4, 4)}, name: {"dense": {"kernel": numbers(4, 4)}}}
    opt_state = numbers.optimizer(tx, params)
    path = write(tmp_path, {"params": params, "opt_state": opt_state, "step": np.int32(1)})
    rules = [Transpose(f"{name}/dense/kernel", (1, 0))]
    result = restore(path, training_target(params, tx), renames=rules)
    for slot in ("mu", "nu"):
        stored = getattr(opt_state[0], slot)
        turned = {"dense": stored["dense"], name: {"dense": {"kernel": stored[name]["dense"]["kernel"].T}}}
        have = getattr(result.optimizer.opt_state[0], slot)
        for key, part in turned.items():
            check(have[key], part)


@pytest.mark.parametrize("names", [("mu", "nu"), ("nu", "mu"), ("mu", "dense")])
def test_modules_called_mu_and_nu_beside_each_other_keep_their_moments(tmp_path, names):
    numbers, tx = Numbers(), optax.adam(1e-3)
    params = {name: numbers.dense(4, 4) for name in names}
    opt_state = numbers.optimizer(tx, params)
    path = write(tmp_path, {"params": params, "opt_state": opt_state, "step": np.int32(1)})
    result = restore(path, training_target(params, tx))
    check(result, worlds.below("model", params) | worlds.below("optimizer/opt_state", opt_state))


@pytest.mark.parametrize("axis", [0, 1])
def test_moments_are_unstacked_with_their_parameters(tmp_path, axis):
    numbers, tx = Numbers(), optax.adam(1e-3)
    layers = [numbers.dense(3, 5) for _ in range(4)]
    scanned = {"layers": stacked(layers, axis)}
    opt_state = numbers.optimizer(tx, scanned)
    path = write(tmp_path, {"params": scanned, "opt_state": opt_state, "step": np.int32(1)})
    result = restore(path, training_target({"layers": dict(enumerate(layers))}, tx))
    for slot in ("mu", "nu"):
        stored = getattr(opt_state[0], slot)["layers"]
        for at in range(4):
            have = getattr(result.optimizer.opt_state[0], slot)["layers"][at]
            check(worlds.flat(have), {key: np.take(value, at, axis) for key, value in stored.items()})


@pytest.mark.parametrize("typed", [True, False])
def test_moments_follow_in_a_target_that_is_keyed_like_the_stored_tree(tmp_path, typed):
    numbers, tx = Numbers(), optax.adam(1e-3)
    layers = [numbers.dense(3, 5) for _ in range(4)]
    params = {"layers": stacked(layers), "head": numbers.dense()}
    beside = {"batch_stats": {"layers": {"mean": numbers(4, 3)}}}
    opt_state = numbers.optimizer(tx, params)
    path = write(tmp_path, {"params": params, "opt_state": opt_state, "step": np.int32(1), **beside})

    def apart(tree):
        own = {f"layers_{at}": {k: v[at] for k, v in tree["layers"].items()} for at in range(4)}
        return own | {key: part for key, part in tree.items() if key != "layers"}

    adam = opt_state[0]._asdict()
    adam |= {slot: apart(adam[slot]) for slot in ("mu", "nu")}
    expected = {"params": apart(params), "opt_state": {0: adam}, "step": np.int32(1)}
    expected |= {"batch_stats": apart(beside["batch_stats"])}
    target = worlds.pure_target(expected)
    if typed:
        kinds = {"params": nnx.Param, "batch_stats": nnx.BatchStat}
        target |= {name: nnx.State(jax.tree.map(kind, target[name])) for name, kind in kinds.items()}
    found = restore(path, target)
    for name, part in expected.items():
        check(found[name], part)


@pytest.mark.parametrize("wanted", ["nu only", "mu only"])
def test_one_moment_is_not_taken_for_another(tmp_path, wanted):
    numbers = Numbers()
    params = {"dense": numbers.dense()}
    stored_tx, wanted_tx = optax.trace(0.9), optax.scale_by_rms()
    if wanted == "mu only":
        stored_tx, wanted_tx = wanted_tx, stored_tx
    stored = {"params": params, "opt_state": numbers.optimizer(stored_tx, params), "step": np.int32(1)}
    worlds.refused(write(tmp_path, stored), training_target(params, wanted_tx), unexpected="ignore")


@pytest.mark.parametrize(
    "tx", [optax.adam(0.1), optax.adadelta(0.1), optax.adafactor(0.1, min_dim_size_to_factor=4)]
)
@pytest.mark.parametrize("moments_too", [True, False])
@pytest.mark.parametrize("blocks", [True, False])
def test_one_layer_of_another_shape_is_one_error_about_the_parameter(tmp_path, blocks, moments_too, tx):
    numbers = Numbers()
    layers = [{"kernel": numbers(5, 6)} for _ in range(4)]
    wanted = {f"layers_{at}": stacked(layers[at::2]) for at in range(2)} if blocks else stacked(layers)
    stored = {f"layers_{at}": layer for at, layer in enumerate(layers)}
    odd = stored | {"layers_2": {"kernel": numbers(5, 7)}}
    moments = numbers.optimizer(tx, odd if moments_too else stored)
    path = write(tmp_path, {"params": odd, "opt_state": moments, "step": np.int32(3)})
    error = worlds.refused(path, training_target({"layers": wanted}, tx), unexpected="ignore")
    assert isinstance(error, ShapeMismatchError)
    assert "model/layers" in str(error)


@pytest.mark.parametrize("model", ["model", "net"])
@pytest.mark.parametrize("above", [(), ("state",)])
@pytest.mark.parametrize("form", ["typed", "pure"])
def test_moments_of_a_stack_in_an_nnx_state_come_apart_as_their_parameters_do(tmp_path, above, model, form):
    numbers = Numbers()
    names = ("layers", "mu")
    params = {name: {"kernel": numbers(3, 4, 5), "bias": numbers(3, 5)} for name in names}
    params |= {"out": numbers.dense()}
    moments = {name: numbers.like(params) for name in ("mu", "nu")}
    scalars = {"count": numbers(dtype=np.int32)}
    stored = {model: params, "optimizer": {"opt_state": {"0": scalars | moments}, "step": numbers()}}

    def wanted(tree):
        return tree | {name: {at: _layer(tree[name], at) for at in range(3)} for name in names}

    expected = {
        model: wanted(params),
        "optimizer": {
            "opt_state": {0: scalars | {name: wanted(tree) for name, tree in moments.items()}},
            "step": stored["optimizer"]["step"],
        },
    }
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), expected)
    if form == "typed":
        kinds = {model: nnx.Param, "optimizer": nnx.OptState}
        target = {key: jax.tree.map(kinds[key], part) for key, part in target.items()}
    for key in above:
        stored, expected, target = {key: stored}, {key: expected}, {key: target}
    target = nnx.State(target) if form == "typed" else target

    check(restore(write(tmp_path, stored), target, unexpected="error"), expected)


def _layer(tree, at):
    return jax.tree.map(lambda leaf: leaf[at], tree)


ONE_VALUE = {
    "novograd": optax.scale_by_novograd(),
    "layerwise dog": optax.scale_by_distance_over_gradients(),
    "nans": optax.zero_nans(),
}


@pytest.mark.parametrize("tx", ONE_VALUE.values(), ids=ONE_VALUE)
@pytest.mark.parametrize("change", ["stacked", "unstacked", "split"])
def test_one_value_of_a_whole_parameter_is_not_that_of_its_parts_or_of_several(tmp_path, tx, change):
    numbers = Numbers()
    layers = [numbers.dense(3, 4) for _ in range(2)]
    listed = {"layers": dict(enumerate(layers))}
    stored, wanted, rules = {"layers_0": layers[0], "layers_1": layers[1]}, {"layers": stacked(layers)}, []
    if change == "unstacked":
        stored, wanted = wanted, listed
    elif change == "split":
        stored, wanted = {"both": numbers(3, 4)}, {"one": numbers(3, 2), "two": numbers(3, 2)}
        rules = [Split("both", ("one", "two"), axis=1)]
    opt_state = numbers.optimizer(tx, stored)
    path = write(tmp_path, {"params": stored, "opt_state": opt_state, "step": np.int32(1)})
    error = worlds.refused(path, training_target(wanted, tx), unexpected="ignore", renames=rules)
    assert "is one value of all its elements" in str(error)


@pytest.mark.parametrize("tx", ONE_VALUE.values(), ids=ONE_VALUE)
def test_one_value_of_a_parameter_follows_where_it_stays_whole(tmp_path, tx):
    numbers = Numbers()
    params = {"a": {"kernel": numbers(3, 4)}, "b": {"kernel": numbers(3, 4)}}
    opt_state = numbers.optimizer(tx, params)
    path = write(tmp_path, {"params": params, "opt_state": opt_state, "step": np.int32(1)})
    wanted = {"b": {"kernel": numbers(4, 3)}, "a": {"kernel": numbers(3, 2, 2)}}
    rules = [("a", "b"), ("b", "a"), Transpose("b/kernel", (1, 0)), Reshape("a/kernel", (3, 2, 2))]
    result = restore(path, training_target(wanted, tx), renames=rules).optimizer.opt_state

    for field in opt_state._fields:
        old, new = getattr(opt_state, field), getattr(result, field)
        if isinstance(old, dict) and old["a"]["kernel"].size == 1:
            np.testing.assert_array_equal(new["a"]["kernel"], old["b"]["kernel"])
            np.testing.assert_array_equal(new["b"]["kernel"], old["a"]["kernel"])


COPYING = {
    "dog": optax.contrib.dog(1.0),
    "dowg": optax.contrib.dowg(1.0),
    "layerwise dog": optax.scale_by_distance_over_gradients(),
    "cocob": optax.contrib.cocob(),
    "lbfgs": optax.scale_by_lbfgs(),
    "mechanic": optax.contrib.mechanize(optax.adam(0.1)),
    "prodigy": optax.contrib.prodigy(),
    "schedule free": optax.contrib.schedule_free_sgd(0.1),
    "adam": optax.adam(0.1),
}
if hasattr(optax.contrib, "madgrad"):  # The floors' Optax is older.
    COPYING["madgrad"] = optax.contrib.madgrad(0.1)


@pytest.mark.parametrize(("copying", "layout"), checkered(COPYING, ["linen", "maxtext"]))
def test_a_constant_is_added_to_the_copies_of_a_parameter_that_an_optimizer_keeps(tmp_path, copying, layout):
    tx = COPYING[copying]
    numbers = Numbers()
    params = {"norm": {"scale": numbers(3)}}
    # Which fields are copies, optax says: they are the parameters while the state is new or just moved.
    new = tx.init(params)
    _, moved = tx.update({"norm": {"scale": np.full(3, 0.1, np.float32)}}, new, params)
    copies = {
        path
        for state in (new, moved)
        for path, leaf in worlds.flat(state).items()
        if path[-1] == "scale" and np.array_equal(leaf, params["norm"]["scale"])
    }
    opt_state, stored = numbers.optimizer(tx, params), {"params": params}
    expected = {path: leaf + 100 * (path in copies) for path, leaf in worlds.flat(opt_state).items()}
    stored |= {"opt_state": opt_state, "step": np.int32(1)}
    if layout == "maxtext":
        stored = {key: _below_params(part) for key, part in stored.items()}
    target = training_target(params, tx)
    result = restore(write(tmp_path, stored), target, renames=[Add("norm/scale", 100.0)])
    check(result.model, {"norm": {"scale": params["norm"]["scale"] + 100}})
    check(nnx.state(result.optimizer)["opt_state"], expected)


def _below_params(tree):
    def is_params(part):
        return isinstance(part, dict) and "norm" in part

    return jax.tree.map(lambda part: {"params": part} if is_params(part) else part, tree, is_leaf=is_params)


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        (Scale("b/kernel", 2.0), "a moment of a scaled parameter is not the scaled moment"),
        (Repeat("b/kernel", 1, 2), "the gradient of a repeated element is that of all its copies together"),
    ],
)
def test_no_moment_of_a_pure_dict_is_read_as_it_is_where_its_parameter_is_changed(rule, why):
    numbers = Numbers()
    params = {"a": {"kernel": numbers(2, 3)}, "b": {"kernel": numbers(3, 3)}}
    state = {"count": np.int32(1), "mu": params, "nu": params}
    stored = {"params": params, "opt_state": [state], "step": np.int32(1)}
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), stored)
    wide = 6 if isinstance(rule, Repeat) else 3
    for part in (target["params"], target["opt_state"][0]["mu"], target["opt_state"][0]["nu"]):
        part["b"]["kernel"] = jax.ShapeDtypeStruct((3, wide), "float32")

    plan = plan_of(target, stored, [rule])

    with pytest.raises(RestoreError) as caught:
        plan.check()
    assert "law 9" not in str(caught.value)
    assert why in " ".join(str(caught.value).split())
    assert set(caught.value.paths) == {("opt_state", 0, name, "b", "kernel") for name in ("mu", "nu")}


def test_moments_of_an_ensemble_are_not_begun_anew_where_a_rule_takes_its_weights_apart(tmp_path):
    numbers, tx = Numbers(), optax.adam(1e-3)
    one = [{"dense": numbers.dense()} for _ in range(3)]
    params = stacked(one)
    moments = jax.tree.map(
        lambda leaf: numbers(3, *leaf.shape, dtype=leaf.dtype), jax.eval_shape(tx.init, one[0])
    )
    path = write(tmp_path, {"params": params, "opt_state": moments, "step": np.full(3, 7, np.int32)})

    def members():
        models = [worlds.Branch(one[0], {}) for _ in range(3)]
        return [{"model": model, "optimizer": nnx.Optimizer(model, tx, wrt=nnx.Param)} for model in models]

    rules = [UnstackLayers("dense/{x}", "members/{i}/model/dense/{x}", 0)]
    error = worlds.refused(path, nnx.eval_shape(lambda: {"members": members()}), renames=rules)
    assert not any(hint.fills for hint in error.hints)
    assert "build the target's optimizer as it was saved, and take it apart in the program." in str(error)

    @nnx.vmap
    def ensemble(_):
        model = worlds.Branch(one[0], {})
        return {"model": model, "optimizer": nnx.Optimizer(model, tx, wrt=nnx.Param)}

    result = restore(path, nnx.eval_shape(lambda: ensemble(np.arange(3))))
    check(result["model"], params)
    check(result["optimizer"], worlds.below("opt_state", moments) | {("step",): np.full(3, 7, np.uint32)})


@pytest.mark.parametrize("above", [(), ("opt",), ("state", "opt")])
@pytest.mark.parametrize("chain", [optax.trace(0.9), optax.sgd(0.1, momentum=0.9), optax.contrib.acprop(0.1)])
def test_a_tree_of_moments_alone_is_no_model(above, chain):
    params = {"up": {"kernel": np.ones((2, 3), "float32")}}
    tree = chain.init(params)
    for key in reversed(above):
        tree = {key: tree}

    with pytest.raises(RestoreError):
        from_linen(tree, params)
    with pytest.raises(RestoreError):
        from_linen(
            tree, nnx.eval_shape(lambda: nnx.Dict(up=nnx.Linear(2, 3, use_bias=False, rngs=nnx.Rngs(0))))
        )


@pytest.mark.parametrize("name", ["mu", "trace", "v"])
def test_a_module_that_is_called_like_a_moment_is_a_model(name):
    params = {"up": {"kernel": np.ones((2, 3), "float32")}}

    whole = from_linen({"params": {name: params}}, {name: params})
    part = from_linen({"params": {name: params}}, params)
    by_rule = from_linen({name: params}, params, renames=[(name, "")])

    jax.tree.map(np.testing.assert_array_equal, (whole[name], part, by_rule), (params,) * 3)


@pytest.mark.parametrize("rule", [Scale("up/scale", 2.0), Add("up/scale", 1.0)], ids=str)
@pytest.mark.parametrize("chain", [optax.contrib.prodigy(), optax.contrib.schedule_free_sgd(0.1)])
def test_state_of_a_pure_dict_is_not_read_as_it_is_where_a_rule_computes_its_weight(chain, rule):
    params = {"up": {"scale": np.ones(3, "float32")}}
    target = {"params": params, "opt_state": chain.init(params)}

    with pytest.raises(RestoreError, match="up/scale"):
        from_linen({**target, "step": 3}, target, renames=[rule])
    same = from_linen({**target, "step": 3}, target)

    jax.tree.map(np.testing.assert_array_equal, same, target)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("typed", [False, True])
def test_a_state_that_holds_a_state_of_its_own_is_no_other_with_its_fields(backwards, typed):
    chains = [optax.contrib.sophia(1e-3), optax.adam(1e-3)]
    stored, wanted = reversed(chains) if backwards else chains
    numbers = Numbers()
    params = {"dense": numbers.dense()}
    tree = {"params": params, "opt_state": numbers.optimizer(stored, params), "step": np.int32(2)}
    target = training_target(params, wanted)
    if not typed:
        weights = jax.tree.map(lambda value: jax.ShapeDtypeStruct(value.shape, value.dtype), params)
        state = jax.eval_shape(wanted.init, weights)
        target = {"params": weights, "opt_state": state, "step": jax.ShapeDtypeStruct((), np.int32)}

    with pytest.raises(MissingParamError) as caught:
        from_linen(tree, target)
    result = from_linen(tree, target, policy="warn")

    assert {"mu", "nu"} <= {key for path in caught.value.paths for key in path}
    state = result.optimizer.opt_state if typed else result["opt_state"]
    moments = [value for path, value in worlds.flat(state).items() if {"mu", "nu"} & {*path}]
    assert len(moments) == 4
    assert not any(map(np.any, moments))
