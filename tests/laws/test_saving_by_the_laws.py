"""Saving obeys the laws backwards: every element once, to a place of its own, or the save is refused."""

import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from orbax_nnx_handler import Fuse, plan_restore, restore, save
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
