"""Moments belong to what an optimizer trains: Variables of any type, a part of a model, or a module in it."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from orbax_nnx_handler import from_linen, restore, save
from tests.laws import worlds
from tests.laws.worlds import Numbers, check, refused, write


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


@pytest.mark.parametrize("layout", ["linen", "maxtext"])
@pytest.mark.parametrize("tx", TXS)
@pytest.mark.parametrize(
    ("wrt", "kinds"),
    [
        (Own, (Own,)),
        (Own, (Own, Own)),
        (nnx.Any(Own, nnx.Param), (Own,)),
        (nnx.Any(Own, nnx.BatchStat), (Own, nnx.BatchStat)),
        (nnx.Variable, (nnx.Variable, nnx.Variable)),
    ],
)
def test_variables_of_any_type_come_back_with_their_moments(tmp_path, layout, tx, wrt, kinds):
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


@pytest.mark.parametrize("layout", ["linen", "maxtext"])
@pytest.mark.parametrize("names", [("adam", "adam"), ("chain", "momentum")])
@pytest.mark.parametrize("parts", [_of_types, _of_paths, _of_one_part_twice, _of_modules, _of_layers])
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


@pytest.mark.parametrize("layout", ["linen", "maxtext"])
@pytest.mark.parametrize("tx", TXS)
@pytest.mark.parametrize("kind", [nnx.BatchStat, Own, nnx.Param])
def test_a_number_of_the_model_called_like_a_field_of_optaxs_takes_nothing_from_the_optimizer(
    tmp_path, layout, tx, kind
):
    def make():
        model = Counting(kind)
        return nnx.Dict(model=model, optimizer=nnx.Optimizer(model, TXS[tx], wrt=nnx.Param))

    _comes_back(tmp_path / "saved", make, layout=layout)


@pytest.mark.parametrize("layout", ["linen", "maxtext"])
@pytest.mark.parametrize("tx", TXS)
@pytest.mark.parametrize("kind", [nnx.BatchStat, Own])
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


@pytest.mark.parametrize("layout", ["linen", "maxtext"])
@pytest.mark.parametrize("tx", TXS)
@pytest.mark.parametrize("beside", ["count", "model", "own"])
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
