"""A save undoes what rules or a restore did: a checkpoint gets its own paths, shapes and dtypes back."""

from collections.abc import Callable
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
    Fuse,
    NNXLinenHandler,
    NNXLinenRestore,
    NNXLinenSave,
    Rename,
    Reshape,
    RestoreError,
    RuleError,
    Scale,
    StackLayers,
    Transpose,
    UnstackLayers,
    from_linen,
    plan_restore,
    restore,
    save,
    to_linen,
)
from tests.sampled import sampled
from tests.storage.saving.trees import described_leaves, flat, leaves, numbered, written

ADAM = optax.adam(0.1)


class Dense(nnx.Module):
    def __init__(self) -> None:
        self.kernel = nnx.Param(jnp.zeros((3, 4)))
        self.bias = nnx.Param(jnp.zeros(4))


class Net(nnx.Module):
    def __init__(self) -> None:
        self.layers = nnx.List([Dense(), Dense()])
        self.head = Dense()


def training() -> tuple[Net, nnx.Optimizer]:
    model = Net()
    return model, nnx.Optimizer(model, ADAM, wrt=nnx.Param)


def train_state(params: Any) -> Any:
    """Returns a train state whose elements are all different, as a Linen program stores it."""
    state = {"params": params, "opt_state": ADAM.init(params), "step": np.int32(0)}
    return numbered(state)


def dense() -> dict[str, Any]:
    return {"kernel": np.zeros((3, 4), "float32"), "bias": np.zeros(4, "float32")}


STORED: dict[str, tuple[Any, list[Any]]] = {
    "a number that is a key of its own": (
        {"encoder": {"layer": {"0": dense(), "1": dense()}}, "out": dense()},
        [Rename("encoder/layer/{i}", "layers/{i}"), Rename("out", "head")],
    ),
    "a number beside a rule, in the name": (
        {"layers_0": dense(), "layers_1": dense(), "out": dense()},
        [Rename("out", "head")],
    ),
    "a number beside a rule, as a key": (
        {"layers": {"0": dense(), "1": dense()}, "out": dense()},
        [Rename("out", "head")],
    ),
    "a level that a rule takes away": (
        {"stack": {"layers_0": dense(), "layers_1": dense()}, "head": dense()},
        [Rename("stack", "")],
    ),
    "scanned layers": (
        {"layers": jax.tree.map(lambda x: np.stack([x, x]), dense()), "head": dense()},
        [],
    ),
    "scanned layers by a rule, another order of axes": (
        {"scan": jax.tree.map(lambda x: np.stack([x, x], -1), dense()), "head": dense()},
        [UnstackLayers("scan", "layers/{i}", -1)],
    ),
    "a matrix of another shape without its shape before": (
        {
            "layers_0": dense(),
            "layers_1": dense(),
            "head": {"kernel": np.zeros((2, 6), "float32"), "bias": dense()["bias"]},
        },
        [Reshape("head/kernel", (3, 4))],
    ),
}


@pytest.mark.parametrize("name", STORED)
def test_a_save_after_a_restore_writes_the_checkpoints_own_tree(name: str, tmp_path: Path) -> None:
    params, rules = STORED[name]
    path = written(train_state(params), tmp_path / "linen")
    handler = NNXLinenHandler(renames=rules)
    with ocp.Checkpointer(handler) as checkpointer:
        state = checkpointer.restore(path, args=NNXLinenRestore(nnx.eval_shape(training)))
        checkpointer.save(tmp_path / "back", args=NNXLinenSave(state, renames=handler.report))

    assert described_leaves(tmp_path / "back") == described_leaves(path)
    before, after = flat(path), flat(tmp_path / "back")
    for key, value in before.items():
        np.testing.assert_array_equal(after[key], value, "/".join(key))


NOT_TOLD_BY_RULES = {"a level that a rule takes away", "a matrix of another shape without its shape before"}


@pytest.mark.parametrize("name", [name for name in STORED if STORED[name][1]])
def test_rules_alone_undo_what_they_tell(name: str, tmp_path: Path) -> None:
    params, rules = STORED[name]
    path = written(train_state(params), tmp_path / "linen")
    state = restore(path, nnx.eval_shape(training), renames=rules)
    if name in NOT_TOLD_BY_RULES:
        with pytest.raises(RuleError, match="cannot be undone"):
            save(tmp_path / "back", state, renames=rules)
        return

    save(tmp_path / "back", state, renames=rules)
    again = restore(tmp_path / "back", nnx.eval_shape(training), renames=rules)

    before, after = (jax.tree.leaves(nnx.state(item)) for item in (state, again))
    for ours, theirs in zip(after, before, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    spelled = name != "a number beside a rule, as a key"  # Nothing in the state tells it from a name.
    assert not spelled or described_leaves(tmp_path / "back") == described_leaves(path)


def test_names_that_only_look_numbered_stay_what_they_are() -> None:
    state = nnx.from_flat_state(
        [((name, "w"), nnx.Param(jnp.full(1, at))) for at, name in enumerate(["l_00", "l_1", "l", "a"])]
        + [(("k", "0", "w"), nnx.Param(jnp.full(1, 9.0)))]
    )

    tree = to_linen(state, renames=[("b", "a")])["params"]

    assert {key: float(tree[key]["w"][0]) for key in ("l_00", "l_1", "l", "b")} == {
        "l_00": 0,
        "l_1": 1,
        "l": 2,
        "b": 3,
    }
    assert float(tree["k"]["0"]["w"][0]) == 9


def test_the_bias_that_nnx_lacks_is_put_back(tmp_path: Path) -> None:
    cell = nnx.GRUCell(3, 4, rngs=nnx.Rngs(0))
    save(tmp_path / "linen", cell)
    plan = plan_restore(tmp_path / "linen", cell)
    assert len(plan.dropped) == 1

    save(tmp_path / "back", restore(tmp_path / "linen", cell), renames=plan)

    assert described_leaves(tmp_path / "back") == described_leaves(tmp_path / "linen")
    np.testing.assert_array_equal(flat(tmp_path / "back")["params", "hn", "bias"], np.zeros(4))


def test_leaves_that_no_checkpoint_held_are_stored_under_their_own_names(tmp_path: Path) -> None:
    params = {"stem": {"layers_0": dense(), "layers_1": dense()}}
    path = written(numbered({"params": params}), tmp_path / "linen")
    target = nnx.eval_shape(Net)
    plan = plan_restore(path, target, renames=[("stem/layers_{i}", "layers/{i}")], policy="warn")
    state = restore(path, target, renames=[("stem/layers_{i}", "layers/{i}")], policy="warn")

    tree = to_linen(state, renames=plan)["params"]

    assert set(tree) == {"stem", "head"}


def test_a_plan_of_another_item_is_refused(tmp_path: Path) -> None:
    params = {"layers_0": dense(), "layers_1": dense(), "head": dense()}
    plan = plan_restore(written(numbered({"params": params}), tmp_path / "a"), nnx.eval_shape(Net))

    with pytest.raises(ValueError, match="of another item: 6 of its leaves are not in this one, or have"):
        to_linen(nnx.Dict(other=Dense()), renames=plan)
    with pytest.raises(ValueError, match="of a whole of which this item is a part: 6 of its") as caught:
        to_linen(Dense(), renames=plan)
    assert "pass the plan of the part alone" in str(caught.value)


def test_two_leaves_that_rules_would_store_at_one_path_are_both_named() -> None:
    model = Net()

    with pytest.raises(RuleError) as caught:
        to_linen(model, renames=[("layers_0", "head")])

    assert str(caught.value) == (
        "params/head/bias and params/layers_0/bias would both be stored at params/layers_0/bias: "
        "undone, the rules give them one name.\nhint: name more of their paths in the rules."
    )


def test_rules_that_join_and_move_axes_are_undone_from_the_report_too(tmp_path: Path) -> None:
    class Fused(nnx.Module):
        def __init__(self) -> None:
            self.qkv = nnx.Param(jnp.zeros((6, 2, 3)))

    params = {name: {"w": np.zeros((3, 2), "float32")} for name in ("q_0", "k_0", "v_0", "q_1", "k_1", "v_1")}
    path = written(numbered({"params": params}), tmp_path / "linen")
    rules = [
        *[StackLayers(f"{name}_{{i}}/w", f"{name}/w", 0) for name in "qkv"],
        Fuse(("q/w", "k/w", "v/w"), "qkv", 0),
        Transpose("qkv", (0, 2, 1)),
    ]
    state = restore(path, nnx.eval_shape(Fused), renames=rules)
    expected = np.concatenate([[params_of(path, f"{n}_{i}").T for i in range(2)] for n in "qkv"])
    np.testing.assert_array_equal(state.qkv[...], expected)

    for undone in (rules, plan_restore(path, nnx.eval_shape(Fused), renames=rules)):
        tree = to_linen(state, renames=undone)["params"]
        for name in params:
            np.testing.assert_array_equal(tree[name]["w"], params_of(path, name))


def params_of(path: Path, name: str) -> Any:
    return flat(path)["params", name, "w"]


class Embedding(nnx.Param):
    pass


class Own(nnx.Variable[Any]):
    pass


def two(kind: Any, tx: Any = ADAM) -> dict[str, Any]:
    """Returns a training of two modules, only one kind of whose Variables an optimizer has."""

    class Module(nnx.Module):
        def __init__(self) -> None:
            self.kernel = nnx.Param(jnp.zeros((2, 2)))
            self.special = kind(jnp.zeros((2, 2)))

    class Pair(nnx.Module):
        def __init__(self) -> None:
            self.a, self.b = Module(), Module()

    model = Pair()
    return {"model": model, "optimizer": nnx.Optimizer(model, tx, wrt=kind)}


def filled(training: dict[str, Any]) -> dict[str, Any]:
    for at, part in enumerate(training.values()):
        leaves, structure = jax.tree.flatten(nnx.state(part))
        values = [1000 * at + 10 * n + jnp.arange(x.size).reshape(x.shape) for n, x in enumerate(leaves)]
        cast = [value.astype(x.dtype) for value, x in zip(values, leaves, strict=True)]
        nnx.update(part, jax.tree.unflatten(structure, cast))
    return training


SWAP = [Rename("a", "b"), Rename("b", "a")]


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        (nnx.LoRAParam, "linen"),
        (Embedding, "linen"),
        (Own, "linen"),
        (nnx.LoRAParam, "maxtext"),
        (Embedding, "maxtext"),
    ],
)
def test_moments_go_where_the_variables_of_their_own_collection_go(kind: Any, layout: Any) -> None:
    training = filled(two(kind))
    rules = [*SWAP, Transpose("a/special", (1, 0))]
    tree = leaves(to_linen(training, renames=rules, layout=layout))
    level = ("params",) if layout == "maxtext" else ()
    for field in ("mu", "nu"):
        moments = getattr(training["optimizer"].opt_state[0], field)
        stored = {at: tree["opt_state", "0", field, *level, at, "special"] for at in "ab"}
        assert np.array_equal(stored["b"], np.asarray(moments["a"]["special"].get_value()).T)
        assert np.array_equal(stored["a"], moments["b"]["special"].get_value())


@pytest.mark.parametrize("kind", [nnx.LoRAParam, Embedding])
@pytest.mark.parametrize("layout", ["linen", "maxtext"])
def test_moments_of_other_collections_come_back_under_the_rules_of_the_save(kind: Any, layout: Any) -> None:
    training = filled(two(kind))
    rules = [*SWAP, Transpose("a/special", (1, 0))]
    back = from_linen(
        to_linen(training, renames=rules, layout=layout), nnx.eval_shape(lambda: two(kind)), renames=rules
    )
    assert jax.tree.all(
        jax.tree.map(np.array_equal, *[{k: nnx.state(v) for k, v in x.items()} for x in (training, back)])
    )


@pytest.mark.parametrize("kind", [nnx.LoRAParam, Embedding, Own])
def test_a_moment_of_another_collection_is_refused_as_a_parameters_is(kind: Any) -> None:
    with pytest.raises(RuleError, match="its parameter is scaled"):
        to_linen(filled(two(kind)), renames=[Scale("a/special", 2.0)])


@pytest.mark.parametrize("kind", [nnx.LoRAParam, Own])
def test_what_is_added_reaches_the_copy_that_an_optimizer_keeps_of_another_collection(kind: Any) -> None:
    training = filled(two(kind, optax.contrib.prodigy(1.0)))
    plain, added = (leaves(to_linen(training, renames=rules)) for rules in ([], [Add("a/special", 1000.0)]))
    changed = {
        at: np.unique(np.asarray(added[at]) - np.asarray(plain[at])).tolist()
        for at in plain
        if not np.array_equal(plain[at], added[at])
    }
    assert changed.pop((kind.__name__, "a", "special")) == [-1000.0]
    assert {at[-3]: by for at, by in changed.items()} == {"params0": [-1000.0]}


def test_moments_of_another_collection_are_unstacked_as_their_variables_are() -> None:
    class Layers(nnx.Module):
        def __init__(self) -> None:
            self.stack = nnx.Dict(special=nnx.LoRAParam(jnp.zeros((3, 2))))

    model = Layers()
    training = filled({"model": model, "optimizer": nnx.Optimizer(model, ADAM, wrt=nnx.LoRAParam)})
    tree = leaves(to_linen(training, renames=[StackLayers("layers_{i}", "stack", 0)]))
    mu = training["optimizer"].opt_state[0].mu["stack"]["special"].get_value()
    stored = [tree["opt_state", "0", "mu", f"layers_{i}", "special"] for i in range(3)]
    assert np.array_equal(np.stack(stored), mu)


def test_a_counter_of_the_model_is_not_taken_for_that_of_an_optimizer() -> None:
    class Counting(nnx.Module):
        def __init__(self) -> None:
            self.w, self.count = nnx.Param(jnp.zeros(2)), nnx.BatchStat(jnp.zeros((), jnp.int32))

    def made() -> Any:
        model, schedule = Counting(), optax.scale_by_schedule(optax.constant_schedule(1.0))
        return {"model": model, "optimizer": nnx.Optimizer(model, optax.chain(schedule), wrt=nnx.Param)}

    tree = leaves(to_linen(made(), renames=[Rename("calls", "count")]))
    assert {("batch_stats", "calls"), ("opt_state", "0", "count")} <= tree.keys()


def test_moments_of_a_train_state_below_a_key_are_saved_with_the_plan_alone() -> None:
    def made() -> Any:
        return {"trainer": two(nnx.LoRAParam), "step": jnp.zeros((), jnp.int32)}

    item = made() | {"trainer": filled(two(nnx.LoRAParam))}
    stored = to_linen(item)
    with pytest.raises(RuleError, match="below a key"):
        to_linen(item, renames=SWAP)
    back = from_linen(stored, nnx.eval_shape(made), renames=SWAP)
    again = to_linen(back, renames=plan_restore(stored, nnx.eval_shape(made), renames=SWAP))
    assert jax.tree.all(jax.tree.map(np.array_equal, stored, again))


def _square(first: float) -> jax.Array:
    return first + jnp.array([[0.0, 0.25], [0.5, 0.75]])


class Pair(nnx.Module):
    def __init__(self, first: float = 0.0) -> None:
        for at, name in enumerate("abc"):
            setattr(self, name, nnx.Param(_square(first + at)))


def _with_a_copy(name: str) -> dict[str, Any]:
    return {"model": Pair(), name: Pair(10.0)}


def _training_with_a_copy(name: str) -> dict[str, Any]:
    item = _with_a_copy(name)
    return item | {"optimizer": nnx.Optimizer(item["model"], ADAM, wrt=nnx.Param)}


def _with_variables(name: str) -> dict[str, Any]:
    model = Pair()
    variables = {key: nnx.Variable(_square(20.0 + at)) for at, key in enumerate("abc")}
    return {"model": model, "optimizer": nnx.Optimizer(model, ADAM, wrt=nnx.Param), name: variables}


BESIDE_MODEL = {
    "swap": [("a", "b"), ("b", "a")],
    "rotation": [("a", "b"), ("b", "c"), ("c", "a")],
    "name": [("Dense_0", "a")],
    "name and values": [("Dense_0", "a"), Transpose("a", (1, 0))],
    "values and name": [Transpose("Dense_0", (1, 0)), ("Dense_0", "a"), Add("b", 1.0)],
    "swap and values": [("a", "b"), ("b", "a"), Transpose("a", (1, 0)), Reshape("b", (2, 2), before=(4,))],
    "model alone": [("params/a", "params/b"), ("params/b", "params/a")],
    "model alone, values": [
        ("params/a", "params/b"),
        ("params/b", "params/a"),
        Transpose("params/a", (1, 0)),
    ],
}


@pytest.mark.parametrize(
    ("make", "beside", "name"),
    sampled(
        [_with_a_copy, _training_with_a_copy, _with_variables],
        ["ema", "teacher", "ema_params"],
        BESIDE_MODEL,
    ),
)
def test_rules_are_undone_for_what_lies_beside_the_model(make: Any, beside: str, name: str) -> None:
    rules = BESIDE_MODEL[name]
    item = make(beside)

    back = from_linen(to_linen(item, renames=rules), nnx.eval_shape(lambda: make(beside)), renames=rules)

    for (path, value), (_, wanted) in zip(_flat_state(back), _flat_state(item), strict=True):
        np.testing.assert_array_equal(value, wanted, "/".join(map(str, path)))


def _flat_state(item: Any) -> list[tuple[Any, Any]]:
    return [(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.state(item))]


@pytest.mark.parametrize("make", [_with_a_copy, _with_variables])
def test_rules_are_undone_on_disk_for_what_lies_beside_the_model(make: Any, tmp_path: Path) -> None:
    item, rules = make("ema"), [("old/a", "a"), Transpose("a", (1, 0)), Add("c", 1.0)]
    rules += [Scale("b", 2.0)] if "optimizer" not in item else []
    save(tmp_path / "saved", item, renames=rules)
    stored = leaves(ocp.StandardCheckpointer().restore(tmp_path / "saved"))
    back = restore(tmp_path / "saved", nnx.eval_shape(lambda: make("ema")), renames=rules)

    assert {("params", "old", "a"), ("nnx_aux", "ema", "old", "a")} <= stored.keys()
    wanted = item["ema"]["a"] if isinstance(item["ema"], dict) else item["ema"].a
    np.testing.assert_array_equal(stored["nnx_aux", "ema", "old", "a"], wanted[...].T)
    for (path, value), (_, want) in zip(_flat_state(back), _flat_state(item), strict=True):
        np.testing.assert_array_equal(value, want, "/".join(map(str, path)))


def test_rules_that_cannot_be_undone_beside_the_model_are_refused() -> None:
    item = {"model": Net(), "ema": Net()}
    # A restore gives nothing aside what a rule makes of a part of a leaf.
    with pytest.raises(RuleError, match="beside the model") as caught:
        to_linen(item, renames=[UnstackLayers("layers", "layers_{i}", axis=0)])

    assert "nnx_aux/ema/layers/0/kernel" in str(caught.value)
    assert "params/" in str(caught.value)  # As the rules for the model alone above.


def test_a_collection_beside_params_that_a_rule_renamed_is_written_back_by_the_plan_alone() -> None:
    def made() -> dict[str, Any]:
        return {"model": Dense(), "ema": Dense()}

    stored = numbered({"params": dense(), "ema_params": dense()})
    rules = [("ema_params", "ema")]
    state = from_linen(stored, nnx.eval_shape(made), renames=rules)
    with pytest.raises(RuleError, match="names what lies beside the model") as caught:
        to_linen(state, renames=rules)
    assert "renames=handler.report" in str(caught.value)

    tree = to_linen(state, renames=plan_restore(stored, nnx.eval_shape(made), renames=rules))

    assert tree.keys() == stored.keys()
    for one, other in zip(jax.tree.leaves(tree), jax.tree.leaves(stored), strict=True):
        np.testing.assert_array_equal(one, other)


def _beside_their_optimizers(*keys: str) -> dict[str, Any]:
    models = {key: Dense() for key in keys}
    return {
        key: {"model": model, "optimizer": nnx.Optimizer(model, optax.adam(1.0), wrt=nnx.Param)}
        for key, model in models.items()
    }


COPIES_ALONE: dict[str, Callable[[], Any]] = {
    "model": lambda: {
        key if key == "optimizer" else "ema": node for key, node in _beside_their_optimizers("x")["x"].items()
    },
    "train state": lambda: _beside_their_optimizers("ema"),
    "one of two train states": lambda: _beside_their_optimizers("gen", "gen_ema"),
    "below a run": lambda: {"run": _beside_their_optimizers("params_ema")},
}


@pytest.mark.parametrize("layout", ["linen", "maxtext"])
@pytest.mark.parametrize("make", COPIES_ALONE.values(), ids=COPIES_ALONE.keys())
def test_what_is_called_a_copy_alone_keeps_its_name(make: Callable[[], Any], layout: Any) -> None:
    item = make()
    for at, node in enumerate(item.values()):
        nnx.update(node, jax.tree.map(lambda leaf, at=at: leaf + 10 * at + 1, nnx.state(node)))

    back = from_linen(to_linen(item, layout=layout), nnx.eval_shape(make))

    for (path, value), (_, wanted) in zip(_flat_state(back), _flat_state(item), strict=True):
        np.testing.assert_array_equal(value, wanted, "/".join(map(str, path)))


class Inner(nnx.Module):
    def __init__(self) -> None:
        self.a, self.b = Dense(), Dense()


def _training(**others: Callable[[Inner], Any]) -> dict[str, Any]:
    model = Inner()
    item = {"model": model, "optimizer": nnx.Optimizer(model, optax.adam(1.0), wrt=nnx.Param)}
    return {**{key: part(model) for key, part in others.items()}, **item}


class Training(nnx.Module):
    def __init__(self) -> None:
        for key, part in _training(backbone=lambda model: model.a).items():
            setattr(self, key, part)


SHARED: dict[str, Callable[[], Any]] = {
    "a part": lambda: _training(backbone=lambda model: model.a),
    "a part of a part": lambda: _training(backbone=lambda model: model.a, bias=lambda model: model.a.bias),
    "a Variable": lambda: _training(kernel=lambda model: model.b.kernel),
    "the whole": lambda: _training(ema=lambda model: model),
    "its state": lambda: _training(ema=nnx.state),
    "in a module": Training,
    "below a run": lambda: {"run": _training(backbone=lambda model: model.a)},
    "no optimizer": lambda: {"backbone": (model := Inner()).a, "model": model},
}


@pytest.mark.parametrize("layout", ["linen", "maxtext"])
@pytest.mark.parametrize("make", SHARED.values(), ids=SHARED.keys())
def test_what_a_program_also_holds_by_another_name_is_stored_as_the_models(
    make: Callable[[], Any], layout: Any
) -> None:
    graph, state = nnx.split(make())
    item = nnx.merge(graph, numbered(state))
    node = item["run"] if isinstance(item, dict) and "run" in item else item
    parts = node if isinstance(node, dict) else vars(node)
    alone = {key: parts[key] for key in ("model", "optimizer") if key in parts}

    tree = to_linen(item, layout=layout)

    wanted = to_linen({"run": alone} if node is not item else alone, layout=layout)
    assert jax.tree.structure(tree) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(tree), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(one, other)
    back = from_linen(tree, nnx.eval_shape(make))
    for (path, value), (_, own) in zip(_flat_state(back), _flat_state(item), strict=True):
        np.testing.assert_array_equal(value, own, "/".join(map(str, path)))


LISTS: dict[str, Callable[[], Any]] = {
    "modules": lambda: nnx.List([Dense(), Dense()]),
    "digits": lambda: nnx.Dict({"0": Dense(), "1": Dense()}),
    "Variables": lambda: nnx.List([nnx.Param(jnp.ones((2, at + 1))) for at in range(3)]),
}


@pytest.mark.parametrize("layout", ["linen", "maxtext"])
@pytest.mark.parametrize("make", LISTS.values(), ids=LISTS.keys())
def test_a_list_that_is_the_model_comes_back_beside_its_optimizer(
    make: Callable[[], Any], layout: Any
) -> None:
    def made() -> dict[str, Any]:
        model = make()
        return {"model": model, "optimizer": nnx.Optimizer(model, ADAM, wrt=nnx.Param)}

    graph, state = nnx.split(made())
    item = nnx.merge(graph, numbered(state))

    back = from_linen(to_linen(item, layout=layout), nnx.eval_shape(made))

    for (path, value), (_, own) in zip(_flat_state(back), _flat_state(item), strict=True):
        np.testing.assert_array_equal(value, own, "/".join(map(str, path)))


@pytest.mark.parametrize("above", [("trainer",), ("a", "b")])
def test_a_train_state_below_a_key_stays_there_where_a_field_lies_beside_it(above: tuple[str, ...]) -> None:
    def made() -> dict[str, Any]:
        item: Any = two(nnx.Param)
        for key in reversed(above):
            item = {key: item}
        return item | {"epoch": jnp.int32(7)}

    def inner(item: Any) -> Any:
        for key in above:
            item = item[key]
        return item

    item = made()
    filled(inner(item))
    tree = to_linen(item)
    assert inner(tree).keys() == {"params", "opt_state", "step"}
    back = from_linen(tree, nnx.eval_shape(made))
    assert int(back["epoch"]) == 7
    for key in ("model", "optimizer"):
        for one, other in zip(
            *(jax.tree.leaves(nnx.state(inner(x)[key])) for x in (back, item)), strict=True
        ):
            np.testing.assert_array_equal(one, other)
    with pytest.raises(RuleError, match="below a key"):
        to_linen(item, renames=SWAP)


@pytest.mark.parametrize(
    "rules", [[("old", "new")], [("params/old", "params/new")], [("old", "new"), ("head", "old")]]
)
def test_what_was_missing_is_not_lost_where_a_rule_took_its_name_from_another(rules: list[Any]) -> None:
    names = ("old", "new") if len(rules) == 1 else ("old", "new", "head")

    class Part(nnx.Module):
        def __init__(self) -> None:
            for at, name in enumerate(names):
                linear = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
                linear.kernel[...] += at
                setattr(self, name, linear)

    stored = {"params": {name: {"kernel": np.ones((2, 2)), "bias": np.ones(2)} for name in ("old", "head")}}
    item = {
        "params": {k: jax.tree.map(lambda x: x.astype(np.float32), v) for k, v in stored["params"].items()}
    }
    target = nnx.eval_shape(Part)
    plan = plan_restore(item, target, renames=rules, policy="warn", unexpected="ignore")
    with pytest.raises(RestoreError, match="would both be stored at params/"):
        to_linen(Part(), renames=plan)
