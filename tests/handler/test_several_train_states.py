"""Several train states in one item: saved as a Linen program keeps them, and restored identically."""

from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from orbax_nnx_handler import DtypeMismatchError, RuleError, plan_restore, restore, save
from orbax_nnx_handler.planning.rules import as_rules
from tests.cli.conftest import stock
from tests.laws.worlds import Numbers, check, flat


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.List([nnx.Linear(3, 3, rngs=rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)
        self.cell = nnx.OptimizedLSTMCell(3, 4, rngs=rngs)


def train_state(seed: int) -> dict[str, Any]:
    model = Net(nnx.Rngs(seed))
    tx = optax.chain(optax.clip(1.0), optax.adamw(1e-3)) if seed else optax.sgd(0.1, momentum=0.9)
    return {"model": model, "optimizer": nnx.Optimizer(model, tx, wrt=nnx.Param)}


def make() -> dict[str, Any]:
    return {"gen": train_state(0), "disc": train_state(1), "rngs": nnx.Rngs(7)}


def state() -> dict[str, Any]:
    item, numbers = make(), Numbers()
    for part in (*item["gen"].values(), *item["disc"].values(), item["rngs"]):
        nnx.update(part, numbers.like(nnx.state(part)))
    return item


def values(item: dict[str, Any]) -> dict[Any, Any]:
    parts = {(name, key): part for name in ("gen", "disc") for key, part in item[name].items()}
    parts[("rngs",)] = item["rngs"]
    return {
        (*at, *path): value for at, part in parts.items() for path, value in flat(nnx.state(part)).items()
    }


def test_a_network_under_another_name_comes_with_the_rules_that_make_it_that_one(tmp_path):
    saved = {name: part for name, part in state().items() if name != "rngs"}
    save(tmp_path / "item", saved)
    target = nnx.eval_shape(lambda: {"gen": train_state(0), "critic": train_state(1)})

    error = plan_restore(tmp_path / "item", target).error()
    rules = error.hints[0].arguments["renames"]
    weights = [("disc/batch_stats", "critic"), ("disc/params", "critic")]
    again = plan_restore(tmp_path / "item", target, renames=weights).error()

    assert "is stored below 'disc', and nothing" in str(error)
    assert "suggest" not in str(error)
    assert "init" not in str(again)
    others = again.hints[0].arguments["renames"]
    assert as_rules(others) == as_rules([*weights, ("disc/opt_state", "critic/optimizer/opt_state")])
    for each in (rules, others):
        result = restore(tmp_path / "item", target, renames=each)
        parts = [nnx.state(item, nnx.Not(nnx.RngState)) for item in (result["critic"], saved["disc"])]
        check(*map(flat, parts))


def test_a_state_without_values_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match=r"11 leaves with a shape and no value: .*model/hidden/"):
        save(tmp_path / "item", nnx.eval_shape(lambda: {"model": Net(nnx.Rngs(0))}))

    assert not (tmp_path / "item").exists()


@pytest.mark.parametrize("layout", ["linen", "maxtext"])
def test_each_of_them_comes_back_identically(tmp_path, layout):
    saved = state()
    save(tmp_path / "item", saved, layout=layout)

    check(values(restore(tmp_path / "item", nnx.eval_shape(make))), values(saved))


def test_a_linen_program_finds_each_below_its_own_key(tmp_path):
    saved = state()
    save(tmp_path / "item", saved)

    tree = stock(tmp_path / "item")

    assert tree.keys() == {"gen", "disc"}
    for name, chain in (("gen", 2), ("disc", 2)):
        assert tree[name].keys() == {"params", "batch_stats", "opt_state", "step"}
        assert len(tree[name]["opt_state"]) == chain
        kernel = saved[name]["model"].hidden[1].kernel[...]
        np.testing.assert_array_equal(tree[name]["params"]["hidden_1"]["kernel"], kernel)
        assert tree[name]["params"]["cell"].keys() >= {"if", "hf"}
        assert np.asarray(tree[name]["step"]).dtype in (np.int32, np.int64)


def test_one_of_them_is_restored_alone(tmp_path):
    saved = state()
    save(tmp_path / "item", saved)

    found = restore(tmp_path / "item", {"gen": nnx.eval_shape(lambda: train_state(0))})

    expected = {path: value for path, value in values(saved).items() if path[0] == "gen"}
    have = {("gen", key, *path): v for key, part in found["gen"].items() for path, v in flat(part).items()}
    check(have, expected)


def test_a_restore_is_undone_and_rules_ask_for_it(tmp_path):
    saved = state()
    save(tmp_path / "item", saved)
    plan = plan_restore(tmp_path / "item", nnx.eval_shape(make))

    save(tmp_path / "again", saved, renames=plan)

    jax.tree.map(np.testing.assert_array_equal, stock(tmp_path / "again"), stock(tmp_path / "item"))
    with pytest.raises(RuleError, match=r"renames=handler\.report"):
        save(tmp_path / "by_rules", saved, renames=[("a", "b")])


def test_each_step_must_fit_the_int32_of_a_linen_program(tmp_path):
    saved = state()
    saved["disc"]["optimizer"].step.set_value(np.uint32(3_000_000_000))

    with pytest.raises(DtypeMismatchError, match="3000000000"):
        save(tmp_path / "item", saved)


def test_two_optimizers_beside_one_model_come_back_each_with_its_step(tmp_path):
    pair = {
        "gen": train_state(0)["model"],
        "a": train_state(0)["optimizer"],
        "b": train_state(0)["optimizer"],
    }
    pair["b"].step.set_value(np.uint32(7))

    save(tmp_path / "item", pair)
    found = restore(tmp_path / "item", pair)

    assert (int(found["a"].step[...]), int(found["b"].step[...])) == (int(pair["a"].step[...]), 7)
