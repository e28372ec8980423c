"""Law 1: a stored leaf whose whole path is the wanted leaf's whole path is its source."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from orbax_nnx_handler import restore
from tests.laws import worlds
from tests.laws.worlds import FORMS, Branch, Numbers, check, refused, target_of, write

COPIES = ("ema_params", "target_params", "params_ema", "avg_params", "a_copy")


def _model(numbers):
    return {"hidden": numbers.dense(4, 8), "out": numbers.dense(8, 3)}


def _beside(numbers, copy, tx=None):
    params, average = _model(numbers), _model(numbers)
    tree = {"params": params, copy: average, "step": np.int32(7)}
    return tree | ({"opt_state": numbers.optimizer(tx, params)} if tx else {}), average


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("copy", COPIES)
def test_a_target_keyed_like_the_stored_average_gets_the_average(tmp_path, copy, form):
    stored, average = _beside(Numbers(), copy)
    result = restore(write(tmp_path, stored), {copy: target_of(form, average)}, unexpected="ignore")
    check(result[copy], average)


@pytest.mark.parametrize("copy", COPIES)
def test_an_optimizer_in_the_checkpoint_changes_nothing_for_an_average(tmp_path, copy):
    stored, average = _beside(Numbers(), copy, optax.adam(1e-3))
    result = restore(write(tmp_path, stored), {copy: target_of("module", average)}, unexpected="ignore")
    check(result[copy], average)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("copy", COPIES)
def test_weights_and_their_average_are_restored_side_by_side(tmp_path, copy, form):
    stored, average = _beside(Numbers(), copy)
    target = {"params": target_of(form, average), copy: target_of(form, average)}
    result = restore(write(tmp_path, stored), target, unexpected="ignore")
    check(result["params"], stored["params"])
    check(result[copy], average)


@pytest.mark.parametrize("copy", ["ema_params", "target_params"])
def test_an_average_that_is_not_stored_is_missing(tmp_path, copy):
    numbers = Numbers()
    params = _model(numbers)
    path = write(tmp_path, {"params": params, "step": np.int32(7)})
    refused(path, {"params": target_of("module", params), copy: target_of("module", params)})


class _Gan(nnx.Module):
    def __init__(self, tree, networks):
        for network in networks:
            setattr(self, network, Branch(tree[network], {}))
            optimizer = nnx.Optimizer(getattr(self, network), optax.adam(1e-3), wrt=nnx.Param)
            setattr(self, f"{network}_opt", optimizer)


def _stored_gan(numbers, names):
    networks = {name: _model(numbers) for name in names}
    optimizers = {
        f"{name}_opt": {
            "opt_state": numbers.optimizer(optax.adam(1e-3), network),
            "step": np.uint32(numbers(1)[0]),
        }
        for name, network in networks.items()
    }
    return networks | optimizers


@pytest.mark.parametrize("names", [("gen", "disc"), ("actor", "critic"), ("b", "a")])
def test_one_network_with_its_optimizer_is_restored_out_of_two(tmp_path, names):
    stored = _stored_gan(Numbers(), names)
    path = write(tmp_path, stored)
    for name in names:
        target = nnx.eval_shape(lambda name=name: _Gan(stored, [name]))
        result = restore(path, target, unexpected="ignore")
        check(result, worlds.below(name, stored[name]) | worlds.below(f"{name}_opt", stored[f"{name}_opt"]))


def test_both_networks_with_their_optimizers_are_restored(tmp_path):
    stored = _stored_gan(Numbers(), ("gen", "disc"))
    result = restore(write(tmp_path, stored), nnx.eval_shape(lambda: _Gan(stored, ("gen", "disc"))))
    check(result, worlds.flat(stored))


class _TwoOptimizers(nnx.Module):
    def __init__(self, names):
        self.model = nnx.LoRALinear(4, 8, lora_rank=2, rngs=nnx.Rngs(0))
        base = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))
        if "lora_opt" in names:
            self.lora_opt = nnx.Optimizer(self.model, optax.adam(1e-3), wrt=nnx.LoRAParam)
        if "base_opt" in names:
            self.base_opt = nnx.Optimizer(self.model, optax.sgd(1e-2, momentum=0.9), wrt=base)


@pytest.mark.parametrize("names", [("lora_opt",), ("base_opt",), ("lora_opt", "base_opt")])
def test_one_of_two_optimizers_of_a_model_is_restored(tmp_path, names):
    stored = Numbers().like(nnx.eval_shape(lambda: nnx.state(_TwoOptimizers(("lora_opt", "base_opt")))))
    target = nnx.eval_shape(lambda: _TwoOptimizers(names))
    result = restore(write(tmp_path, stored), target, unexpected="ignore")
    have = worlds.flat(stored)
    check(result, {path: have[path] for path in worlds.flat(nnx.state(_TwoOptimizers(names)))})


class _Metric(nnx.Variable):
    pass


@pytest.mark.parametrize("name", ["norm", "metrics", "loss"])
def test_what_lies_beside_a_train_state_is_restored_by_its_path(tmp_path, name):
    numbers = Numbers()
    params = _model(numbers)
    stored = {
        "params": params,
        "opt_state": numbers.optimizer(optax.adam(1e-3), params),
        "step": np.int32(7),
        name: {0: {"mean": numbers(4)}, 1: {"mean": numbers(4)}},
    }
    target = {
        "model": target_of("module", params),
        name: {at: {"mean": _Metric(jnp.zeros(4))} for at in (0, 1)},
    }
    result = restore(write(tmp_path, stored), target, unexpected="ignore")
    check(result["model"], params)
    for at in (0, 1):
        np.testing.assert_array_equal(result[name][at]["mean"].get_value(), stored[name][at]["mean"])
