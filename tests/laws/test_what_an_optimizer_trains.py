"""Moments belong to what an optimizer trains: Variables of any type, a part of a model, or a module in it."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from orbax_nnx_handler import (
    Drop,
    MissingParamError,
    RestoreError,
    Transpose,
    from_linen,
    restore,
    save,
    to_linen,
)
from tests.laws import worlds
from tests.laws.worlds import Numbers, check, refused, write
from tests.sampled import sampled


class Own(nnx.Variable):
    """A type of a program's own, which is no parameter to Flax."""


class Dense(nnx.Module):
    def __init__(self, kind):
        self.kernel, self.bias = kind(jnp.zeros((3, 4))), kind(jnp.zeros(4))


class Model(nnx.Module):
    def __init__(self, kind, head=nnx.Param):
        self.embed, self.head = Dense(kind), Dense(head)
        self.layers = nnx.List([Dense(kind) for _ in range(2)])


TXS = {
    "adam": optax.adam(0.1),
    "chain": optax.chain(optax.clip(1.0), optax.adamw(optax.constant_schedule(0.1)), optax.ema(0.9)),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "scheduled": optax.sgd(optax.constant_schedule(0.1)),
}


def _comes_back(path, make, **options):
    state = make()
    expected = Numbers().like(worlds.flat(state))
    worlds.put(state, expected)
    save(path, state, **options)
    check(restore(path, nnx.eval_shape(make)), expected)


class Training(nnx.Module):
    def __init__(self, tx, wrt, *kinds):
        self.model = Model(*kinds)
        self.optimizer = nnx.Optimizer(self.model, tx, wrt=wrt)


@pytest.mark.parametrize(
    ("layout", "tx", "trained"),
    sampled(
        ["linen", "maxtext"],
        TXS,
        [
            (Own, (Own,)),
            (Own, (Own, Own)),
            (nnx.Any(Own, nnx.Param), (Own,)),
            (nnx.Any(Own, nnx.BatchStat), (Own, nnx.BatchStat)),
            (nnx.Variable, (nnx.Variable, nnx.Variable)),
        ],
    ),
)
def test_variables_of_any_type_come_back_with_their_moments(tmp_path, layout, tx, trained):
    wrt, kinds = trained
    _comes_back(tmp_path / "saved", lambda: Training(TXS[tx], wrt, *kinds), layout=layout)


def test_the_moments_of_a_parameter_are_not_those_of_what_has_its_path_in_another_collection(tmp_path):
    numbers, tx = Numbers(), TXS["adam"]
    params, own = ({"dense": numbers.dense()} for _ in range(2))
    tree = {"params": params, "Own": own, "opt_state": numbers.optimizer(tx, params), "step": np.int32(7)}
    path = write(tmp_path, tree)

    class Trained(nnx.Module):
        def __init__(self, kind):
            self.model = nnx.Dict(dense=Dense(kind))
            self.optimizer = nnx.Optimizer(self.model, tx, wrt=kind)

    error = refused(path, nnx.eval_shape(lambda: Trained(Own)))
    assert ("optimizer", "opt_state", 0, "mu", "dense", "kernel") in error.paths
    result = restore(path, nnx.eval_shape(lambda: Trained(nnx.Param)))
    check(nnx.state(result.model), params)
    check(nnx.state(result.optimizer), _moments(tree["opt_state"]))


def _moments(opt_state):
    fields = {"mu": opt_state[0].mu, "nu": opt_state[0].nu}
    return {("opt_state", 0, *path): leaf for path, leaf in worlds.flat(fields).items()}


def _of_types(model):
    return model, model, Own, nnx.Param


def _of_paths(model):
    embed = nnx.PathContains("embed")
    return model, model, nnx.All(nnx.Param, embed), nnx.All(nnx.Param, nnx.Not(embed))


def _of_one_part_twice(model):
    return model, model, nnx.Param, nnx.All(nnx.Param, nnx.PathContains("embed"))


def _of_modules(model):
    return model.embed, model.head, nnx.Variable, nnx.Variable


def _of_layers(model):
    return model.layers[0], model.layers[1], nnx.Variable, nnx.Variable


class Shared(nnx.Module):
    """One model, and two optimizers that train parts of it."""

    def __init__(self, parts, kind, txs):
        self.model = Model(kind)
        one, other, first, second = parts(self.model)
        self.optimizer = nnx.Optimizer(one, txs[0], wrt=first)
        self.other_optimizer = nnx.Optimizer(other, txs[1], wrt=second)


@pytest.mark.parametrize(
    ("layout", "names", "parts"),
    sampled(
        ["linen", "maxtext"],
        [("adam", "adam"), ("chain", "momentum")],
        [_of_types, _of_paths, _of_one_part_twice, _of_modules, _of_layers],
    ),
)
def test_two_optimizers_of_one_model_keep_their_own_moments(tmp_path, layout, names, parts):
    kind, txs = Own if parts is _of_types else nnx.Param, [TXS[name] for name in names]
    _comes_back(tmp_path / "saved", lambda: Shared(parts, kind, txs), layout=layout)


@pytest.mark.parametrize("layout", ["linen", "maxtext"])
def test_optimizers_of_two_networks_within_one_module_keep_their_own_moments(tmp_path, layout):
    class Networks(nnx.Module):
        def __init__(self):
            self.net = nnx.Dict(gen=Model(nnx.Param), disc=Model(nnx.Param))
            self.g_opt = nnx.Optimizer(self.net.gen, TXS["adam"], wrt=nnx.Param)
            self.d_opt = nnx.Optimizer(self.net.disc, TXS["adam"], wrt=nnx.Param)

    _comes_back(tmp_path / "saved", Networks, layout=layout)


class Counting(nnx.Module):
    """A model with a number that is called like the count of optax's states, and is not trained."""

    def __init__(self, kind):
        self.dense, self.count = Dense(nnx.Param), kind(jnp.zeros(()))


@pytest.mark.parametrize(
    ("layout", "tx", "kind"), sampled(["linen", "maxtext"], TXS, [nnx.BatchStat, Own, nnx.Param])
)
def test_a_number_of_the_model_called_like_a_field_of_optaxs_takes_nothing_from_the_optimizer(
    tmp_path, layout, tx, kind
):
    def make():
        model = Counting(kind)
        return nnx.Dict(model=model, optimizer=nnx.Optimizer(model, TXS[tx], wrt=nnx.Param))

    _comes_back(tmp_path / "saved", make, layout=layout)


@pytest.mark.parametrize(("layout", "tx", "kind"), sampled(["linen", "maxtext"], TXS, [nnx.BatchStat, Own]))
def test_an_optimizer_comes_back_where_its_model_got_a_number_called_like_its_count(
    tmp_path, layout, tx, kind
):
    def make(model):
        return nnx.Dict(model=model, optimizer=nnx.Optimizer(model, TXS[tx], wrt=nnx.Param))

    def init():
        return make(Counting(kind))

    state = make(nnx.Dict(dense=Dense(nnx.Param)))
    expected = Numbers().like(worlds.flat(state))
    worlds.put(state, expected)
    save(tmp_path / "saved", state, layout=layout)

    result = restore(tmp_path / "saved", nnx.eval_shape(init), policy={kind: "init", ...: "error"}, init=init)
    assert result.model.count.get_value() == 0
    check({path: leaf for path, leaf in worlds.flat(result).items() if path != ("model", "count")}, expected)


@pytest.mark.parametrize(
    ("layout", "tx", "beside"), sampled(["linen", "maxtext"], TXS, ["count", "model", "own"])
)
def test_a_programs_own_numbers_beside_an_optimizer_are_nobodys_parameters(tmp_path, layout, tx, beside):
    def make():
        net = Training(TXS[tx], nnx.Param, nnx.Param)
        return {"net": net.model, "optimizer": net.optimizer}

    item, own = make(), np.int32(3) if beside == "count" else {"count": np.int32(3)}
    expected = Numbers().like(worlds.flat(nnx.Dict(item)))
    worlds.put(nnx.Dict(item), expected)
    save(tmp_path / "saved", {**item, beside: own}, layout=layout)
    zeros = 0 if beside == "count" else {"count": 0}
    result = restore(tmp_path / "saved", {**nnx.eval_shape(make), beside: zeros})
    assert (result[beside] if beside == "count" else result[beside]["count"]) == 3
    check(nnx.Dict({name: result[name] for name in item}), expected)


class Backbone(nnx.Module):
    """A model whose backbone has a child called as the module beside it."""

    def __init__(self, wrt=nnx.Param, whole=False):
        self.backbone = nnx.Dict(up=Dense(nnx.Param), head=Dense(nnx.Param))
        self.head = Dense(nnx.Param)
        model = nnx.Dict(backbone=self.backbone, head=self.head)
        self.of_backbone = nnx.Optimizer(model if whole else self.backbone, TXS["adam"], wrt=wrt)


class Parts(nnx.Module):
    def __init__(self, tuples=False):
        model = Backbone()
        self.model = (
            nnx.List([model.backbone, model.head])
            if tuples
            else nnx.Dict(backbone=model.backbone, head=model.head)
        )
        self.first, self.second = model.of_backbone, nnx.Optimizer(model.head, TXS["adam"], wrt=nnx.Param)


@pytest.mark.parametrize("layout", ["linen", "maxtext"])
@pytest.mark.parametrize("numbered", [False, True])
def test_the_optimizer_of_a_part_is_its_own_where_a_child_is_called_as_a_module_beside_the_part(
    tmp_path, layout, numbered
):
    _comes_back(tmp_path / "saved", lambda: Parts(numbered), layout=layout)


@pytest.mark.parametrize("wrt", [nnx.Param, nnx.PathContains("head")])
def test_the_moments_of_a_whole_model_are_not_those_of_its_part(tmp_path, wrt):
    whole = Backbone(nnx.All(nnx.Param, wrt), whole=True)
    expected = Numbers().like(worlds.flat(whole))
    worlds.put(whole, expected)
    save(tmp_path / "saved", whole)
    error = refused(tmp_path / "saved", nnx.eval_shape(lambda: Backbone(nnx.All(nnx.Param, wrt))))
    assert "of_backbone" in str(error)


def test_an_optimizer_of_a_part_without_the_parts_name_is_told_and_its_moments_are_not_begun_anew(tmp_path):
    numbers, tx = Numbers(), TXS["adam"]
    params = {"base": numbers.dense(), "head": numbers.dense()}
    adam, scale = numbers.optimizer(tx, params["head"])
    tree = {"params": params, "opt_state": (adam, scale), "step": np.int32(7)}

    class Trained(nnx.Module):
        def __init__(self):
            self.model = nnx.Dict(base=Dense(nnx.Param), head=Dense(nnx.Param))
            wrt = nnx.All(nnx.Param, nnx.PathContains("head"))
            self.optimizer = nnx.Optimizer(self.model, tx, wrt=wrt)

    target = nnx.eval_shape(Trained)
    error = str(refused(write(tmp_path, tree), target))

    assert "below its mu and nu are no paths of stored weights" in error
    assert '"init"' not in error
    named = adam._replace(mu={"head": adam.mu}, nu={"head": adam.nu})
    found = worlds.flat(from_linen(tree | {"opt_state": (named, scale)}, target))
    for moment, own in (("mu", adam.mu), ("nu", adam.nu)):
        for name in ("kernel", "bias"):
            path = ("optimizer", "opt_state", 0, moment, "head", name)
            np.testing.assert_array_equal(found[path], own[name])


class Square(nnx.Module):
    def __init__(self):
        self.first, self.last = (nnx.Linear(3, 3, rngs=nnx.Rngs(0)) for _ in range(2))


def _beside(one, other, of_one, of_other):
    """Returns two networks of the same names beside their optimizers, and every element with its path."""
    first, second = Square(), Square()
    optimizers = {of_one: nnx.Optimizer(first, TXS["adam"], wrt=nnx.Param)}
    optimizers[of_other] = nnx.Optimizer(second, TXS["adam"], wrt=nnx.Param)
    return {one: first, other: second, **optimizers}


def _with_numbers(item):
    numbers, expected = Numbers(), {}
    for name, part in item.items():
        state = nnx.state(part)
        values = numbers.like(worlds.flat(state))
        worlds.put(state, values)
        nnx.update(part, state)
        expected |= {(name, *path): value for path, value in values.items()}
    return expected


def _as_restored(result):
    parts = {name: worlds.flat(nnx.state(part)) for name, part in result.items()}
    return {(name, *path): leaf for name, part in parts.items() for path, leaf in part.items()}


def _second_transposed(expected, other, of_other):
    ends = ("first", "kernel")
    return {
        path: value.T if path[0] in (other, of_other) and path[-2:] == ends else value
        for path, value in expected.items()
    }


@pytest.mark.parametrize("layout", ["linen", "maxtext"])
@pytest.mark.parametrize(
    "names",
    [("a", "b", "a_opt", "b_opt"), ("gen", "disc", "g_opt", "d_opt"), ("q_0", "q_1", "opt_0", "opt_1")],
)
def test_what_a_rule_does_to_one_of_two_networks_is_done_to_the_moments_of_its_own_optimizer(names, layout):
    item = _beside(*names)
    expected = _with_numbers(item)
    tree = to_linen(item, layout)
    above = f"{names[1]}/params" if layout == "linen" else f"{names[1]}/params/params"
    rule = Transpose(f"{above}/first/kernel", (1, 0))
    result = from_linen(tree, nnx.eval_shape(lambda: _beside(*names)), renames=[rule])
    check(_as_restored(result), _second_transposed(expected, names[1], names[3]))


@pytest.mark.parametrize("form", ["save", "pure"])
@pytest.mark.parametrize("names", [("q", "r", "opt_a", "opt_b"), ("net", "critic", "opt", "opt_critic")])
def test_where_no_name_tells_which_network_an_optimizer_trains_what_rules_do_to_one_is_a_question(
    names, form
):
    item = _beside(*names)
    expected = _with_numbers(item)
    tree = to_linen(item)
    if form == "pure":
        tree = {name: nnx.to_pure_dict(nnx.state(part)) for name, part in item.items()}
    target = nnx.eval_shape(lambda: _beside(*names))
    check(_as_restored(from_linen(tree, target)), expected)
    above = names[1] if form == "pure" else f"{names[1]}/params"
    for rules in (
        [Transpose(f"{above}/first/kernel", (1, 0))],
        [(f"{above}/first", f"{above}/last"), (f"{above}/last", f"{above}/first")],
    ):
        with pytest.raises(MissingParamError) as caught:
            from_linen(tree, target, renames=rules)
        if form == "save":
            assert f"no name tells whether {names[2]} trains" in " ".join(str(caught.value).split())


@pytest.mark.parametrize("layout", ["linen", "maxtext"])
@pytest.mark.parametrize("names", [("a", "b"), ("gen", "disc")])
def test_networks_beside_their_optimizers_are_exchanged_by_rules_for_both(names, layout):
    names = (*names, *(f"{name[0]}_opt" for name in names))
    item = _beside(*names)
    expected = _with_numbers(item)
    target, tree = nnx.eval_shape(lambda: _beside(*names)), to_linen(item, layout)
    one, other, of_one, of_other = names
    nets = {one: other, other: one}
    moved = nets | {of_one: of_other, of_other: of_one}
    result = from_linen(tree, target, renames=[*moved.items()])
    check(_as_restored(result), {(moved[path[0]], *path[1:]): value for path, value in expected.items()})
    with pytest.raises(RestoreError):  # No moments of one network for the weights of the other.
        from_linen(tree, target, renames=[*nets.items()])


def test_networks_of_a_list_are_exchanged_with_their_optimizers():
    def make():
        parts = _beside("a", "b", "a_opt", "b_opt")
        return {
            "nets": nnx.List([parts["a"], parts["b"]]),
            "opts": nnx.List([parts["a_opt"], parts["b_opt"]]),
        }

    item = make()
    expected = _with_numbers(item)
    rules = [(f"{name}/{at}", f"{name}/{1 - at}") for name in ("nets", "opts") for at in range(2)]
    result = from_linen(to_linen(item), nnx.eval_shape(make), renames=rules)
    check(_as_restored(result), {(name, 1 - at, *path): v for (name, at, *path), v in expected.items()})


def _in_tuple(*places, networks=("model", "ema")):
    """Returns networks and an optimizer of the first of them, in a tuple."""
    made = {name: Square() if name in ("model", "ema") else Dense(nnx.Param) for name in networks}
    parts = made | {"optimizer": nnx.Optimizer(made[networks[0]], TXS["adam"], wrt=nnx.Param)}
    return tuple(parts[place] for place in places)


@pytest.mark.parametrize("form", ["linen", "maxtext", "pure"])
def test_an_optimizer_at_another_place_of_a_tuple_is_that_of_the_only_network_that_it_can_train(form):
    def tree_of(*places, **networks):
        item = dict(enumerate(_in_tuple(*places, **networks)))
        expected = _with_numbers(item)
        if form == "pure":
            return [nnx.to_pure_dict(nnx.state(part)) for part in item.values()], expected
        return to_linen(tuple(item.values()), form), expected

    names = {"networks": ("model", "dense")}
    tree, expected = tree_of("model", "dense", "optimizer", **names)
    result = from_linen(tree, nnx.eval_shape(lambda: _in_tuple("model", "optimizer", **names)))
    places = {0: 0, 2: 1}
    expected = {(places[at], *path): value for (at, *path), value in expected.items() if at in places}
    check(_as_restored(dict(enumerate(result))), expected)

    # Of two networks with the names of its moments, the other one may be what it trains.
    for places in (("model", "ema", "optimizer"), ("ema", "model", "optimizer")):
        tree, _ = tree_of(*places)
        with pytest.raises(MissingParamError, match="wanted below '1' is stored below '2'") as caught:
            from_linen(tree, nnx.eval_shape(lambda: _in_tuple("model", "optimizer")))
        assert (1, "opt_state", 0, "mu", "first", "kernel") in caught.value.paths


@pytest.mark.parametrize("layout", ["linen", "maxtext"])
@pytest.mark.parametrize("name", ["models", "model", "agents"])
def test_a_list_of_networks_comes_back_with_the_one_optimizer_of_all(tmp_path, layout, name):
    def make():
        networks = nnx.List([Model(nnx.Param) for _ in range(2)])
        return {name: networks, "optimizer": nnx.Optimizer(networks, TXS["adam"], wrt=nnx.Param)}

    item = make()
    expected = _with_numbers(item)
    save(tmp_path / "saved", item, layout=layout)
    check(_as_restored(restore(tmp_path / "saved", nnx.eval_shape(make))), expected)


@pytest.mark.parametrize("policy", ["error", "warn"])
def test_moments_of_weights_that_no_layout_knows_are_left_where_a_rule_replaces_these(policy):
    """A program of several networks in MaxText's layout: that of `trainings` lies below two levels more."""

    def make():
        model = nnx.Dict(inner=Dense(nnx.Param))
        optimizer = nnx.Optimizer(model, TXS["momentum"], wrt=nnx.Param)
        return {"trainings": {"1": {"model": model, "optimizer": optimizer}}}

    numbers = Numbers()
    moments = {"params": {"inner": numbers.dense(3, 4)}}
    tree = {
        "teacher": {"params": {"params": {"inner": numbers.dense(3, 4)}}},
        "trainings": {
            "1": {
                "params": {"params": {"model": {"inner": numbers.dense(3, 4)}}},
                "optimizer": {"opt_state": [{"trace": moments}, None], "step": np.int32(3)},
            }
        },
    }
    target = nnx.eval_shape(make)["trainings"]["1"]
    target = {"trainings": {"1": {name: nnx.to_pure_dict(nnx.state(part)) for name, part in target.items()}}}
    old = "trainings/1/params/params/model"
    rules = [Drop(old, "replaced"), ("teacher/params", old)]

    with pytest.raises(RestoreError, match="a rule has replaced the weights that it was kept for"):
        from_linen(tree, target, renames=rules, policy=policy, unexpected="ignore")
