"""Law 10: random state that is stored and wanted is restored, and two streams of one name stay two."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from orbax_nnx_handler import Transpose, plan_restore, restore, save
from tests.laws.worlds import Numbers, flat

ADAM = optax.adam(1e-3)


class Model(nnx.Module):
    def __init__(self, names, seed):
        self.dense = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
        self.rngs = nnx.Rngs(**{name: seed + at for at, name in enumerate(names)})


class Train(nnx.Module):
    def __init__(self, inner=("dropout",), outer=("dropout",)):
        self.model = Model(inner, 11)
        self.optimizer = nnx.Optimizer(self.model, ADAM, wrt=nnx.Param)
        self.rngs = nnx.Rngs(**{name: 22 + at for at, name in enumerate(outer)})


class TwoModels(nnx.Module):
    def __init__(self):
        self.gen, self.disc = Model(("dropout", "noise"), 11), Model(("dropout", "noise"), 44)


def _advance(state):
    """Draws from every stream, from each another number of times."""
    draws = itertools.count(1)
    for _, node in nnx.iter_graph(state):
        if isinstance(node, nnx.RngStream):
            for _ in range(next(draws)):
                node()
    return state


@pytest.mark.parametrize("layout", ["linen", "maxtext"])
@pytest.mark.parametrize(
    "streams",
    [
        (("dropout",), ("dropout",)),
        (("dropout", "params"), ("params", "dropout")),
        (("default",), ("default",)),
        (("dropout",), ("noise",)),
        (("rngs",), ("model",)),
    ],
)
def test_streams_of_a_model_and_of_its_train_state_stay_apart(tmp_path, streams, layout):
    state = _advance(Train(*streams))
    save(tmp_path / "saved", state, layout=layout)
    result = restore(tmp_path / "saved", nnx.eval_shape(lambda: Train(*streams)))
    have, want = flat(result), flat(state)
    for path, value in want.items():
        np.testing.assert_array_equal(have[path], value, str(path))


@pytest.mark.parametrize("layout", ["linen", "maxtext"])
def test_streams_of_two_models_stay_apart(tmp_path, layout):
    state = _advance(TwoModels())
    save(tmp_path / "saved", state, layout=layout)
    have, want = flat(restore(tmp_path / "saved", nnx.eval_shape(TwoModels))), flat(state)
    for path, value in want.items():
        np.testing.assert_array_equal(have[path], value, str(path))


@pytest.mark.parametrize("layout", ["linen", "maxtext"])
def test_streams_of_a_dict_of_states_stay_apart(tmp_path, layout):
    state = _advance(Train())
    parts = {"model": nnx.state(state.model), "rngs": nnx.state(state.rngs)}
    save(tmp_path / "saved", parts, layout=layout)
    result = restore(tmp_path / "saved", parts)
    for name, part in parts.items():
        have = flat(result[name])
        for path, value in flat(part).items():
            np.testing.assert_array_equal(have[path], value, f"{name} {path}")


def test_streams_that_are_not_stored_differ_from_each_other(tmp_path):
    state = Train()
    save(tmp_path / "saved", nnx.state(state, nnx.Not(nnx.RngState)))
    result = restore(tmp_path / "saved", nnx.eval_shape(Train))
    keys = [jax.random.key_data(part.rngs.dropout.key[...]).tolist() for part in (result, result.model)]
    assert keys[0] != keys[1]
    assert int(result.rngs.dropout.count[...]) == 0


@pytest.mark.parametrize("layout", ["linen", "maxtext"])
def test_streams_of_a_state_without_an_optimizer_stay_apart(tmp_path, layout):
    class State(nnx.Module):
        def __init__(self):
            self.model, self.rngs = Model(("dropout",), 11), nnx.Rngs(dropout=22)

    state = _advance(State())
    save(tmp_path / "saved", state, layout=layout)
    have, want = flat(restore(tmp_path / "saved", nnx.eval_shape(State))), flat(state)
    for path, value in want.items():
        np.testing.assert_array_equal(have[path], value, str(path))
    save(tmp_path / "state", nnx.state(state), layout=layout)
    have = flat(restore(tmp_path / "state", nnx.state(nnx.eval_shape(State))))
    for path, value in want.items():
        np.testing.assert_array_equal(have[path], value, str(path))


class _Part(nnx.Module):
    def __init__(self, seed):
        self.dense = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
        self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(dropout=seed))


class _Parts(nnx.Module):
    def __init__(self, **seeds):
        for name, seed in seeds.items():
            setattr(self, name, _Part(seed))


def _named(module):
    return {"/".join(map(str, path)): value for path, value in flat(module).items()}


@pytest.mark.parametrize("layout", ["linen", "maxtext"])
@pytest.mark.parametrize(
    ("rules", "names"),
    [
        ([("enc", "encoder")], {"enc": "encoder", "dec": "dec"}),
        ([("enc", "dec"), ("dec", "enc")], {"enc": "dec", "dec": "enc"}),
        ([("enc/drop", "enc/dropout"), ("enc", "first")], None),
    ],
)
def test_a_rule_for_a_module_takes_its_random_state_along(tmp_path, layout, rules, names):
    state = _advance(_Parts(enc=5, dec=6))
    save(tmp_path / "saved", state, layout=layout)
    if names is None:
        target = nnx.eval_shape(lambda: _Parts(first=1, dec=2))
        target.first.dropout = target.first.drop
        del target.first.drop
        names = {"enc/dense": "first/dense", "enc/drop": "first/dropout", "dec": "dec"}
    else:
        target = nnx.eval_shape(lambda: _Parts(**dict.fromkeys(names.values(), 1)))
    want = {}
    for path, value in _named(state).items():
        old = next(name for name in names if path.startswith(name + "/"))
        want[names[old] + path.removeprefix(old)] = value
    result = restore(tmp_path / "saved", target, renames=rules)
    have = _named(result)
    assert have.keys() == want.keys()
    for path, value in want.items():
        np.testing.assert_array_equal(have[path], value, path)
    # Saved with the same rules, or with what the restore did, all of it is back where it was.
    plan = plan_restore(tmp_path / "saved", target, renames=rules)
    for at, renames in (("plan", plan), *([("rules", rules)] if len(names) < 3 else [])):
        save(tmp_path / at, result, layout=layout, renames=renames)
        back = _named(restore(tmp_path / at, nnx.eval_shape(lambda: _Parts(enc=1, dec=2))))
        for path, value in _named(state).items():
            np.testing.assert_array_equal(back[path], value, path)


@pytest.mark.parametrize("layout", ["linen", "maxtext"])
@pytest.mark.parametrize("shape", [(3, 3), (3, 4)])
def test_what_lies_aside_is_turned_by_the_rule_that_turns_its_network(tmp_path, layout, shape):
    class Layered(nnx.Module):
        def __init__(self, shape):
            self.layers = nnx.List([nnx.Dict(w=nnx.Param(jnp.zeros(shape))) for _ in range(2)])

    def make(shape):
        return {"model": Layered(shape), "ema": Layered(shape)}

    item, numbers = make(shape), Numbers()
    for layer in (*item["model"].layers, *item["ema"].layers):
        layer["w"].set_value(jnp.asarray(numbers(*shape)))
    save(tmp_path / "saved", item, layout=layout)
    rules = [Transpose("layers_{i}/w", (1, 0))]
    result = restore(tmp_path / "saved", nnx.eval_shape(lambda: make(shape[::-1])), renames=rules)
    for name in item:
        for layer, own in zip(result[name].layers, item[name].layers, strict=True):
            np.testing.assert_array_equal(layer["w"][...], own["w"][...].T)
