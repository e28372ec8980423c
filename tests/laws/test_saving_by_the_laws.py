"""Saving obeys the laws backwards: every element once, to a place of its own, or the save is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from orbax_nnx_handler import Fuse, from_linen, plan_restore, restore, save, to_linen
from tests.laws import worlds
from tests.laws.worlds import Branch, Numbers, check, pure_target, write


def _saved_or_refused(path, state, **options):
    try:
        save(path, state, **options)
    except ValueError:
        return None
    with ocp.PyTreeCheckpointer() as reader:
        return worlds.flat(reader.restore(path))


@pytest.mark.parametrize("gates", [("i", "h"), ("ii", "hi"), ("i", "h", "g")])
def test_modules_called_like_gates_beside_fused_ones_are_all_written(tmp_path, gates):
    numbers = Numbers()
    tree = {"cell": {name: numbers.dense() for name in ("dense_i", "dense_h", *gates)}}
    model = Branch(tree, {})
    worlds.put(model, worlds.flat(tree))
    stored = _saved_or_refused(tmp_path / "saved", model)
    if stored is not None:
        elements = {float(value) for leaf in stored.values() for value in np.ravel(leaf)}
        wanted = {float(value) for leaf in worlds.flat(tree).values() for value in np.ravel(leaf)}
        assert wanted <= elements


class RandomOnly(nnx.Module):
    def __init__(self):
        self.rngs = nnx.Rngs(dropout=3)


def test_a_module_of_random_state_only_is_saved_or_refused_by_name(tmp_path):
    state = RandomOnly()
    state.rngs.dropout()
    try:
        save(tmp_path / "saved", state)
    except ValueError:
        return
    result = restore(tmp_path / "saved", nnx.eval_shape(RandomOnly))
    assert int(result.rngs.dropout.count[...]) == 1


class Adapted(nnx.Module):
    def __init__(self):
        self.dense = nnx.LoRALinear(3, 4, lora_rank=2, rngs=nnx.Rngs(0))
        self.bn = nnx.BatchNorm(4, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "kinds", [(nnx.LoRAParam, nnx.BatchStat), (nnx.LoRAParam,), (nnx.BatchStat,), (nnx.Param,)]
)
def test_a_part_of_a_state_comes_back_from_its_own_save(tmp_path, kinds):
    state = nnx.state(Adapted(), nnx.Any(*kinds))
    expected = Numbers().like(worlds.flat(state))
    worlds.put(state, expected)
    save(tmp_path / "saved", state)
    check(restore(tmp_path / "saved", state), expected)


@pytest.mark.parametrize("order", ["qkv", "kqv", "vkq"])
def test_a_plan_lists_parts_in_the_order_in_which_they_are_joined(tmp_path, order):
    numbers = Numbers()
    path = write(tmp_path, {"params": {name: {"kernel": numbers(3, 2)} for name in "qkv"}})
    rules = [Fuse(tuple(order), "qkv", 1)]
    target = pure_target({"qkv": {"kernel": np.zeros((3, 6), np.float32)}})
    text = str(plan_restore(path, target, renames=rules)).replace("/", " ").replace(",", " ")
    shown = [word for word in text.split("<-")[1].split()[:12] if word in tuple("qkv")]
    assert shown[:3] == list(order)


@pytest.mark.parametrize("layout", ["linen", "maxtext"])
@pytest.mark.parametrize("name", ["layers", "blocks", "params", "0", "layer_1"])
def test_lists_and_odd_names_come_back_from_their_own_save(tmp_path, name, layout):
    numbers, tx = Numbers(), optax.adam(1e-3)
    tree = {name: {at: numbers.dense() for at in range(3)}, "head": numbers.dense()}
    state = worlds.Training(tree, tx, {})
    expected = numbers.like(worlds.flat(state))
    worlds.put(state, expected)
    save(tmp_path / "saved", state, layout=layout)
    check(restore(tmp_path / "saved", worlds.training_target(tree, tx)), expected)


def test_a_step_that_fits_is_stored_in_int32_as_linen_has_it(tmp_path):
    state = worlds.Training({"dense": Numbers().dense()}, optax.adam(1e-3), {})
    state.optimizer.step[...] = jnp.uint32(2**31 - 1)
    save(tmp_path / "saved", state)
    with ocp.PyTreeCheckpointer() as reader:
        assert int(reader.restore(tmp_path / "saved")["step"]) == 2**31 - 1


class Clock(nnx.Variable):
    """A type of a program's own."""


def _networks(tx, other):
    """Returns two networks and their optimizers side by side, as GANs have them."""
    numbers = Numbers()
    layers = {"layers": {at: numbers.dense() for at in range(2)}, "mu": numbers.dense()}
    extra = {"bn": {"scale": numbers(4), "mean": numbers(4)}, "clock": numbers(3)}
    gen, disc = (Branch(tree, {"clock": Clock}) for tree in (layers | extra, layers))
    optimizers = {
        name: nnx.Optimizer(model, tx, wrt=nnx.Param)
        for name, model, tx in (("g_opt", gen, tx), ("d_opt", disc, other))
    }
    return {"gen": gen, "disc": disc, **optimizers}


class SideBySide(nnx.Module):
    def __init__(self, tx, other):
        for name, part in _networks(tx, other).items():
            setattr(self, name, part)
        self.epoch = nnx.Variable(jnp.asarray(7))


TXS = {
    "adam": optax.adam(0.1),
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "chain": optax.chain(optax.clip(1.0), optax.adamw(optax.constant_schedule(0.1)), optax.ema(0.9)),
}


@pytest.mark.parametrize("layout", ["linen", "maxtext"])
@pytest.mark.parametrize("names", [("adam", "adam"), ("chain", "momentum"), ("adam", "sgd"), ("sgd", "sgd")])
@pytest.mark.parametrize("form", ["dict", "states", "module", "state"])
def test_optimizers_beside_their_models_come_back_each_with_its_count_and_step(form, names, layout):
    txs = [TXS[name] for name in names]
    item = SideBySide(*txs) if form in ("module", "state") else _networks(*txs)
    item = nnx.state(item) if form == "state" else item
    if form == "states":
        item = {name: nnx.state(part) for name, part in item.items()}
    numbers = Numbers()
    parts = item if isinstance(item, dict) else {"": item}
    expected = {}
    for name, part in parts.items():
        state = part if isinstance(part, nnx.State) else nnx.state(part)
        values = numbers.like(worlds.flat(state))
        worlds.put(state, values)
        if state is not part:
            nnx.update(part, state)
        expected |= {(name, *path): value for path, value in values.items()}

    tree = to_linen(item, layout)
    found = from_linen(tree, item, unexpected="error")

    parts = found if isinstance(found, dict) else {"": found}
    flat = {
        (name, *path): value
        for name, part in parts.items()
        for path, value in worlds.flat(part if isinstance(part, nnx.State) else nnx.state(part)).items()
    }
    check(flat, expected)
    assert tree["g_opt"]["step"] != tree["d_opt"]["step"]


@pytest.mark.parametrize("gates", [1, 3, 4])
def test_moments_of_a_part_of_a_cell_are_split_as_the_cell_is(gates):
    bias = "dense_h" if gates == 4 else "dense_i"
    numbers = Numbers()
    cell = {"dense_i": {"kernel": numbers(2, 3 * gates)}, "dense_h": {"kernel": numbers(3, 3 * gates)}}
    cell[bias]["bias"] = numbers(3 * gates)

    def label(params):
        return jax.tree.map(lambda leaf: "weights" if leaf.ndim > 1 else "others", params)

    tx = optax.multi_transform({"weights": TXS["adam"], "others": TXS["momentum"]}, label)
    item = worlds.Training({"cell": cell, "out": numbers.dense()}, tx, {})
    state = nnx.state(item)
    expected = numbers.like(_arrays(state))
    for path, leaf in nnx.to_flat_state(state):
        if tuple(path) in expected:
            leaf.set_value(jnp.asarray(expected[tuple(path)]))

    tree = to_linen(state)

    assert "dense_i" not in tree["params"]["cell"]
    assert "dense_i" not in tree["opt_state"]["inner_states"]["weights"]["inner_state"][0]["mu"]["cell"]
    found = from_linen(tree, state, unexpected="error")
    check(_arrays(found), expected)


def _arrays(state):
    """Returns the arrays of a state; what `optax.masked` leaves out has none."""
    pairs = ((tuple(path), leaf.get_value()) for path, leaf in nnx.to_flat_state(state))
    return {path: np.asarray(value) for path, value in pairs if hasattr(value, "shape")}
