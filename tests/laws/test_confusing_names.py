"""Random models whose modules are called as collections, fields and owners are: right by path, or refused."""

import random

import jax
import numpy as np
import optax
import pytest

from orbax_nnx_handler import RestoreError, from_linen
from tests.laws.worlds import Numbers, check, model_target
from tests.sampled import every

NAMES = (
    *("params", "params_ema", "batch_stats", "state", "model", "net", "head", "value", "kernel", "dense"),
    *("ema", "target", "teacher", "student", "old", "opt_state", "step", "mu", "nu", "count"),
    *("layers", "layers_0", "MLP_0", "Dense_0"),
)
LEAVES = ("kernel", "w", "value", "scale")
CHANGES = ("same", "a level more", "a level less", "a part")


def _tree(chance, numbers, depth=2):
    found = {}
    for name in chance.sample(NAMES, chance.randint(1, 3)):
        is_inner = depth > 0 and chance.random() < 0.6
        found[name] = (
            _tree(chance, numbers, depth - 1) if is_inner else {chance.choice(LEAVES): numbers(2, 3)}
        )
    return found


def _world(seed):
    """Returns what is stored, the target, and what it holds where every name is taken as it is."""
    chance, numbers = random.Random(seed), Numbers()
    params = _tree(chance, numbers)
    change, level = chance.choice(CHANGES), chance.choice(NAMES)
    stored = {level: params} if change == "a level less" else params
    wanted = {level: params} if change == "a level more" else params
    if change == "a part":
        part = chance.choice(list(params))
        wanted = {part: params[part]}
    tree = {"params": stored}
    if chance.random() < 0.6:
        tree |= {"opt_state": numbers.optimizer(optax.adam(1e-3), stored), "step": np.int32(7)}
    if chance.random() < 0.3:
        tree["batch_stats"] = {chance.choice(NAMES): {"mean": numbers(4)}}
    return tree, wanted, change


@pytest.mark.parametrize(
    "seeds", every(2, [range(first, first + 100) for first in range(0, 400, 100)]), ids=str
)
def test_a_leaf_has_the_path_that_its_name_says_or_there_is_a_question(seeds):
    restored = 0
    for seed in seeds:
        tree, wanted, change = _world(seed)
        try:
            result = from_linen(tree, model_target(wanted), unexpected="ignore")
        except RestoreError:
            assert change != "same", seed
            continue
        check(result, jax.tree.map(np.asarray, wanted))
        restored += 1
    assert restored > 0.7 * len(seeds)
