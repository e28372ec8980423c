"""A save under the plan of a restore writes what the checkpoint had, and more where its layout reads it."""

import functools
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from orbax_nnx_handler import (
    Add,
    NNXLinenHandler,
    NNXLinenRestore,
    NNXLinenSave,
    RuleError,
    Transpose,
    from_linen,
    plan_restore,
    restore,
    save,
    to_linen,
)
from orbax_nnx_handler.planning.core.recipes import Read
from orbax_nnx_handler.storage.saving.saved import SavedLeaf, in_nodes
from tests.sampled import checkered
from tests.storage.saving.trees import described_leaves, flat, leaves, numbered, written
from tests.written import put_at

ADAM = optax.adam(0.1)


def of_one_kernel() -> dict[str, Any]:
    model = nnx.Dict(kernel=nnx.Param(jnp.zeros((3, 4))))
    return {"model": model, "optimizer": nnx.Optimizer(model, ADAM, wrt=nnx.Param)}


def test_a_stored_int64_step_stays_int64_without_x64(tmp_path: Path) -> None:
    params = {"kernel": np.zeros((3, 4), "float32")}
    state = numbered({"params": params, "opt_state": ADAM.init(params)})
    path = written(state | {"step": 2**31 + 5}, tmp_path / "linen")
    target = nnx.eval_shape(of_one_kernel)

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        tree = to_linen(restore(path, target), renames=plan_restore(path, target))

    assert tree["step"].dtype == np.int64
    assert int(tree["step"]) == 2**31 + 5


def t5x_state() -> dict[str, Any]:
    slots = {"grad_ema": np.zeros((3, 4), "float32"), "grad_sq_ema": np.zeros((3, 4), "float32")}
    tree = {"target": {"kernel": slots["grad_ema"]}, "state": {"param_states": {"kernel": slots}}}
    return numbered(tree) | {"state": {**numbered(tree, 20)["state"], "step": np.int32(7)}}


def test_a_step_that_was_stored_once_and_restored_as_a_count_too_is_written_once(tmp_path: Path) -> None:
    path = written(t5x_state(), tmp_path / "t5x")
    target = nnx.eval_shape(of_one_kernel)
    plan, state = plan_restore(path, target), restore(path, target)

    tree = leaves(to_linen(state, renames=plan))

    stored = leaves(t5x_state())
    assert tree.keys() == stored.keys()
    for key, value in stored.items():
        np.testing.assert_array_equal(tree[key], value)

    state["optimizer"].step.set_value(jnp.uint32(8))
    with pytest.raises(RuleError, match="optimizer/step is no longer optimizer/opt_state/0/count"):
        to_linen(state, renames=plan)


def of_networks() -> dict[str, Any]:
    return {name: of_one_kernel() for name in ("actor", "critic")}


def test_the_steps_of_several_networks_are_saved_beside_their_fields() -> None:
    params = {"kernel": np.zeros((3, 4), "float32")}
    fields = {"params": params, "opt_state": ADAM.init(params)}
    stored = numbered(
        {f"{name}_{key}": value for name in ("actor", "critic") for key, value in fields.items()}
    )
    target = nnx.eval_shape(of_networks)
    policy: Any = {nnx.PathContains("step"): "warn", ...: "error"}
    state = from_linen(stored, target, policy=policy)
    for at, name in enumerate(("actor", "critic")):
        state[name]["optimizer"].step.set_value(jnp.uint32(70 + at))

    tree = to_linen(state, renames=plan_restore(stored, target, policy=policy))

    assert tree.keys() == {*stored, "actor_step", "critic_step"}
    back = from_linen(tree, target)
    assert [int(back[name]["optimizer"].step[...]) for name in back] == [70, 71]


@pytest.mark.parametrize("rules", [[("Dense_0", "lin")], [("net", "")], [("old", "model")]])
def test_what_a_rule_did_not_restore_is_found_under_the_same_rules(rules: Any) -> None:
    def made() -> dict[str, Any]:
        model = nnx.Dict(lin=nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
        return {"model": model, "optimizer": nnx.Optimizer(model, ADAM, wrt=nnx.Param)}

    names = [name for name in rules[0][0].split("/") if name in ("Dense_0", "net")]
    kernel: Any = {"kernel": np.zeros((2, 3), "float32")}
    params = {"Dense_0": kernel} if names == ["Dense_0"] else {"lin": kernel}
    params = {"net": params} if names == ["net"] else params
    stored = numbered({"params": params, "opt_state": ADAM.init(params), "step": np.int32(0)})
    stored = {"old": stored} if rules == [("old", "model")] else stored
    target = nnx.eval_shape(made)
    state = from_linen(stored, made(), renames=rules, policy="init")
    state["model"].lin.bias.set_value(jnp.asarray([5.0, 6.0, 7.0]))

    tree = to_linen(state, renames=plan_restore(stored, target, renames=rules, policy="warn"))

    back = from_linen(tree, target, renames=rules)
    for key in ("model", "optimizer"):
        pairs = zip(
            jax.tree.leaves(nnx.state(back[key])), jax.tree.leaves(nnx.state(state[key])), strict=True
        )
        assert all(np.array_equal(one, other) for one, other in pairs)


def test_the_sums_of_flax_optims_adagrad_are_optaxs_and_go_back_under_their_name() -> None:
    def made() -> dict[str, Any]:
        model = nnx.Dict(kernel=nnx.Param(jnp.zeros((3, 4))))
        return {"model": model, "optimizer": nnx.Optimizer(model, optax.adagrad(0.1), wrt=nnx.Param)}

    zeros = np.zeros((3, 4), "float32")
    slots = {"kernel": {"G": zeros}}
    stored = numbered({"target": {"kernel": zeros}, "state": {"step": np.int32(0), "param_states": slots}})
    state = from_linen(stored, nnx.eval_shape(made))

    sums = state["optimizer"].opt_state[0].sum_of_squares["kernel"][...]
    np.testing.assert_array_equal(sums, stored["state"]["param_states"]["kernel"]["G"])
    tree = to_linen(state, renames=plan_restore(stored, nnx.eval_shape(made)))
    assert tree.keys() == stored.keys()
    for one, other in zip(jax.tree.leaves(tree), jax.tree.leaves(stored), strict=True):
        np.testing.assert_array_equal(one, other)


class Network(nnx.Module):
    def __init__(self) -> None:
        self.hidden = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
        self.out = nnx.Linear(3, 2, rngs=nnx.Rngs(0))


SCHEDULE = optax.linear_schedule(0.1, 0.0, 10)
OPTIMIZERS = {
    "sgd, adam": (optax.sgd(0.1), ADAM),
    "adam, sgd": (ADAM, optax.sgd(0.1)),
    "sgd, sgd": (optax.sgd(0.1), optax.sgd(0.1)),
    "adamw with a schedule, momentum": (optax.adamw(SCHEDULE), optax.sgd(SCHEDULE, 0.9)),
    "accumulated, clipped": (optax.MultiSteps(ADAM, 2), optax.chain(optax.clip(1.0), optax.sgd(0.1))),
}
PLACES = {
    "side by side": (("{}",), ("{}_opt",)),
    "in pairs": (("{}", "model"), ("{}", "optimizer")),
    "grouped": (("nets", "{}"), ("opts", "{}")),
    "a level deeper": (("run", "{}"), ("run", "{}_opt")),
    "levels of one name": (("nets", "{}", "core"), ("opts", "{}", "core")),
}


def two_networks(places: str, optimizers: str) -> dict[str, Any]:
    item: dict[str, Any] = {}
    for name, tx in zip("ab", OPTIMIZERS[optimizers], strict=True):
        model = Network()
        network, optimizer = (tuple(key.format(name) for key in place) for place in PLACES[places])
        put_at(item, network, model)
        put_at(item, optimizer, nnx.Optimizer(model, tx, wrt=nnx.Param))
    return item


@functools.cache
def item_and_target(places: str, optimizers: str) -> tuple[Any, Any]:
    return two_networks(places, optimizers), nnx.eval_shape(lambda: two_networks(places, optimizers))


def parts(item: Any) -> list[Any]:
    return jax.tree.leaves(item, is_leaf=lambda part: isinstance(part, nnx.Module | nnx.Optimizer))


def as_plain_dicts(item: Any, lists: bool) -> Any:
    """Returns numbered dicts, as a program of NNX saves them, or with optax's chains as lists."""

    def plain(part: Any) -> Any:
        if not (lists and isinstance(part, nnx.Optimizer)):
            return nnx.to_pure_dict(nnx.state(part))
        state = jax.tree.map(
            lambda leaf: leaf.get_value(), part.opt_state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
        )
        state = jax.tree.map(
            lambda node: nnx.to_pure_dict(node) if isinstance(node, nnx.State) else node,
            state,
            is_leaf=lambda node: isinstance(node, nnx.State),
        )
        return {"opt_state": state, "step": part.step.get_value()}

    return numbered(
        jax.tree.map(plain, item, is_leaf=lambda part: isinstance(part, nnx.Module | nnx.Optimizer))
    )


@pytest.mark.parametrize(
    ("places", "optimizers", "lists"),
    [
        # Each place and each pair of optimizers, with lists and without.
        (places, optimizers, row % 2 == 0)
        for (row, places), (column, optimizers) in checkered(enumerate(PLACES), enumerate(OPTIMIZERS))
    ],
)
def test_two_networks_and_optimizers_are_written_as_they_were(
    places: str, optimizers: str, lists: bool, tmp_path: Path
) -> None:
    item, target = item_and_target(places, optimizers)
    path = written(as_plain_dicts(item, lists), tmp_path / "plain")
    state = restore(path, target)

    save(tmp_path / "back", state, renames=plan_restore(path, target))

    before, after = flat(path), flat(tmp_path / "back")
    assert after.keys() == before.keys()
    for key, value in before.items():
        np.testing.assert_array_equal(after[key], value)
    assert lists or described_leaves(tmp_path / "back") == described_leaves(path)
    again = restore(tmp_path / "back", target)
    for part, other in zip(parts(again), parts(state), strict=True):
        assert jax.tree.all(jax.tree.map(np.array_equal, nnx.state(part), nnx.state(other)))


@pytest.mark.parametrize("nothing", [None, {}, (), optax.EmptyState()])
def test_a_node_that_holds_a_leaf_is_not_empty(nothing: Any) -> None:
    leaf = SavedLeaf(recipe=Read(("w",)), shape=(), dtype=np.dtype("float32"), like=("w",))
    kept = {("opt_state", 1): nothing, ("ema",): nothing}
    empty = {
        ("opt_state",): nothing,
        ("opt_state", 0, "mu"): nothing,
        ("opt_state", 0, "mu", "w", "x"): nothing,
    }

    assert in_nodes({("opt_state", 0, "mu", "w"): leaf}, empty | kept)[1] == kept


def test_the_keys_of_a_node_are_of_one_type() -> None:
    leaf = SavedLeaf(recipe=Read(("w",)), shape=(), dtype=np.dtype("float32"), like=("w",))
    paths = [("opt_state", "0", "mu"), ("opt_state", 1, "mu"), ("opt_state", "0", 2), ("list", 0)]

    found, empty = in_nodes(dict.fromkeys(paths, leaf), {("opt_state", 3): None, ("list", 1): None})

    assert [*found] == [
        ("opt_state", "0", "mu"),
        ("opt_state", "1", "mu"),
        ("opt_state", "0", "2"),
        ("list", 0),
    ]
    assert [*empty] == [("list", 1)]


@pytest.mark.parametrize("by", ["report", "rules", "the handler's rules"])
def test_a_dict_of_arrays_is_written_before_the_rules_too(by: str, tmp_path: Path) -> None:
    tree = numbered(
        {"params": {"a": {"w": np.zeros((3, 3), "float32")}, "b": {"w": np.zeros((3, 3), "float32")}}}
    )
    path = written(tree, tmp_path / "linen")
    rules = [Add("params/a/w", 1.0), Transpose("params/b/w", (1, 0))]
    handler = NNXLinenHandler(renames=rules)
    with ocp.Checkpointer(handler) as checkpointer:
        target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
        state = checkpointer.restore(path, args=NNXLinenRestore(target))
        np.testing.assert_array_equal(state["params"]["a"]["w"], tree["params"]["a"]["w"] + 1)
        undone: Any = {"report": handler.report, "rules": rules, "the handler's rules": None}[by]
        checkpointer.save(tmp_path / "back", args=NNXLinenSave(state, renames=undone))

    for key, value in flat(path).items():
        np.testing.assert_array_equal(flat(tmp_path / "back")[key], value)


def test_rules_alone_do_not_undo_the_moments_in_a_dict_of_arrays(tmp_path: Path) -> None:
    item = nnx.eval_shape(lambda: two_networks("side by side", "adam, sgd"))
    tree = as_plain_dicts(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), item), False)
    with pytest.raises(RuleError, match="pass what the restore did"):
        save(tmp_path / "plain", tree, renames=[Transpose("a/hidden/kernel", (1, 0))])


def with_streams() -> dict[str, Any]:
    rngs = nnx.Rngs(3)
    model = nnx.Dict(dense=nnx.Linear(2, 3, rngs=rngs), drop=nnx.Dropout(0.5, rngs=rngs))
    return {"model": model, "optimizer": nnx.Optimizer(model, ADAM, wrt=nnx.Param)}


@pytest.mark.parametrize("form", ["linen", "maxtext", "plain dicts", "states"])
def test_random_state_is_written_where_the_checkpoint_has_it(form: str, tmp_path: Path) -> None:
    path, item = tmp_path / "saved", with_streams()
    if form in ("linen", "maxtext"):
        save(path, item, layout="maxtext" if form == "maxtext" else "linen")
    else:
        states = {key: nnx.state(part) for key, part in item.items()}
        plain = {key: nnx.to_pure_dict(state) for key, state in states.items()}
        written(states if form == "states" else plain, path)
    target = nnx.eval_shape(with_streams)
    state = restore(path, target)

    save(tmp_path / "back", state, renames=plan_restore(path, target))

    assert flat(tmp_path / "back").keys() == flat(path).keys()
    again = restore(tmp_path / "back", target)
    streams = [result["model"]["drop"].rngs for result in (item, again)]
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), *map(nnx.state, streams))))
