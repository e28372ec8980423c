"""Random NNX states and random Linen checkpoints: saving undoes restoring, and restoring saving."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from orbax_nnx_handler import Rename, Transpose, UnstackLayers, to_linen
from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.options import RestoreOptions
from orbax_nnx_handler.planning.restore_plan import RestorePlan, make_plan
from orbax_nnx_handler.planning.target import flatten_target
from tests.laws.worlds import Branch, Numbers, Training, put, stacked
from tests.laws.worlds import flat as by_path
from tests.planning.plans import evaluate, leaves_of, stored_of
from tests.sampled import drawn

NAMES = (
    *("encoder", "layers", "layers_0", "layers_1", "block", "a_b", "if_"),
    *("dense_i", "dense_h", "i", "h"),
    *("params", "value", "mu", "count", "batch_stats", "nnx_aux"),
)
TXS: Mapping[str, Any] = {
    "sgd": optax.sgd(0.1),
    "adam": optax.adam(0.1),
    "chain": optax.chain(optax.clip(1.0), optax.adamw(optax.constant_schedule(0.1)), optax.ema(0.9)),
    "steps": optax.MultiSteps(optax.lion(0.1), 2).gradient_transformation(),
}


class Clock(nnx.Variable):
    """A type of a program's own."""


class step(nnx.Variable):  # noqa: N801
    """A type called like the train state's count."""


KINDS = {"clock": Clock, "step": step, "down": nnx.LoRAParam}


def dense(size: int = 3) -> dict[str, Any]:
    return {"kernel": np.zeros((2, size), "float32"), "bias": np.zeros(size, "float32")}


@st.composite
def modules(draw: st.DrawFn, depth: int = 2) -> dict[Any, Any]:
    """Draws a module: weights, statistics, lists of layers, modules of awkward names."""
    found: dict[Any, Any] = {}
    for name in draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True)):
        form = draw(
            st.sampled_from(["dense", "layers", "module", "norm", "custom"] if depth else ["dense", "norm"])
        )
        if form == "dense":
            found[name] = dense(draw(st.integers(1, 4)))
        elif form == "norm":
            found[name] = {"scale": np.zeros(2, "float32"), "mean": np.zeros(2, "float32")}
        elif form == "custom":
            found[name] = {"clock": np.zeros(3, "float32")}
        elif form == "layers":
            found[name] = {at: dense() for at in range(draw(st.integers(1, 3)))}
        else:
            found[name] = draw(modules(depth - 1))
    extra = draw(st.sampled_from([None, None, "clock", "step", "down"]))
    return found if extra is None else found | {extra: np.zeros((2, 1), "float32")}


def plan_for(item: Any, tree: Any, rules: Any = ()) -> RestorePlan:
    options = RestoreOptions.of(unexpected="error", renames=rules)
    plan = make_plan(flatten_target(item), stored_of(arrays_of(tree)), options)
    plan.check()
    return plan


def arrays_of(tree: Any) -> dict[Path, Any]:
    return {path: leaf for path, leaf in leaves_of(tree).items() if hasattr(leaf, "shape")}


def read_with(plan: RestorePlan, tree: Any) -> dict[Path, Any]:
    """Returns what a plan restores, computed with NumPy."""
    arrays = arrays_of(tree)
    return {path: evaluate(leaf.recipe, arrays).astype(leaf.dtype) for path, leaf in plan.restored.items()}


def assert_same(found: Mapping[Path, Any], expected: Mapping[Path, Any]) -> None:
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        assert found[path].dtype == value.dtype, path
        np.testing.assert_array_equal(found[path], value, str(path))


def saved_or_refused(item: Any, layout: Any, rules: Any = ()) -> Any:
    """Returns the tree of a save; None where leaves would collide, or no rule says where one goes."""
    try:
        return to_linen(item, layout, renames=rules)
    except ValueError as error:
        if "would both be stored at" in str(error) or "can be put back in many places" in str(error):
            return None
        raise


@settings(max_examples=drawn(20, 40))
@given(modules(), st.sampled_from([None, *TXS]), st.sampled_from(["linen", "maxtext"]), st.booleans())
def test_every_element_of_a_saved_state_comes_back(tree: Any, tx: Any, layout: Any, bare: bool) -> None:
    item = Branch(tree, KINDS) if tx is None else Training(tree, TXS[tx], KINDS)
    expected = Numbers().like(by_path(item))
    put(item, expected)
    saved = nnx.state(item) if bare else item

    stored = saved_or_refused(saved, layout)

    if stored is not None:
        assert_same(read_with(plan_for(saved, stored), stored), expected)


def weights() -> dict[str, Any]:
    """Returns a layer none of whose axes is as long as a list of layers, so that a stack has one reading."""
    return {"kernel": np.zeros((5, 7), "float32"), "bias": np.zeros(7, "float32")}


@st.composite
def linen_programs(draw: st.DrawFn) -> tuple[Any, Any, list[Any]]:
    """Draws the parameters of a Linen program, those of an NNX one, and the rules from one to the other."""
    linen: dict[str, Any] = {}
    wanted: dict[Any, Any] = {}
    rules: list[Any] = []
    for at in range(draw(st.integers(1, 4))):
        ours, theirs, count = f"{chr(97 + at)}_own", f"Dense_{at}", draw(st.integers(1, 3))
        form = draw(
            st.sampled_from(["same", "list", "keys", "scan", "renamed", "moved axes", "level", "by a rule"])
        )
        layers = {layer: weights() for layer in range(count)}
        wanted[ours] = layers if form in ("list", "keys", "scan", "by a rule") else weights()
        if form == "same":
            linen[ours] = weights()
        elif form == "list":
            linen |= {f"{ours}_{layer}": part for layer, part in layers.items()}
        elif form == "keys":
            linen[theirs] = {"layer": {str(layer): part for layer, part in layers.items()}}
            rules.append(Rename(f"{theirs}/layer/{{i}}", f"{ours}/{{i}}"))
        elif form == "scan":
            linen[ours] = stacked([weights()] * count)
        elif form == "renamed":
            linen[theirs] = weights()
            rules.append(Rename(theirs, ours))
        elif form == "moved axes":
            linen[ours] = weights() | {"kernel": np.zeros((7, 5), "float32")}
            rules.append(Transpose(f"{ours}/kernel", (1, 0)))
        elif form == "level":
            linen[theirs] = {ours: weights()}
            rules.append(Rename(theirs, ""))
        else:
            linen[theirs] = stacked([weights()] * count, -1)
            rules.append(UnstackLayers(theirs, f"{ours}/{{i}}", -1))
    return linen, wanted, rules


@settings(max_examples=drawn(20, 40))
@given(linen_programs(), st.sampled_from(list(TXS)), st.sampled_from(["linen", "maxtext"]))
def test_a_restored_checkpoint_is_saved_as_it_was(program: Any, tx: Any, layout: Any) -> None:
    params, wanted, rules = program
    params = {"params": params} if layout == "maxtext" else params
    numbers = Numbers()
    stored = numbers.like({"params": params, "step": np.zeros((), "int32")})
    stored["opt_state"] = disk_form(numbers.optimizer(TXS[tx], params))
    item = Training(wanted, TXS[tx], {})
    plan = plan_for(item, stored, rules)
    put(item, read_with(plan, stored))

    tree = to_linen(item, layout, renames=plan)

    assert_same(arrays_of(tree), arrays_of(stored))
    assert jax.tree.structure(tree) == jax.tree.structure(stored)


@settings(max_examples=drawn(15, 30))
@given(linen_programs(), st.sampled_from(["bare", "variables", "below a key", "beside others"]))
def test_a_restored_tree_of_weights_is_saved_where_it_was(program: Any, form: Any) -> None:
    params, wanted, rules = program
    stored: Any = Numbers().like({"params": params})
    stored = stored["params"] if form == "bare" else stored
    stored = {"agent": stored} if form == "below a key" else stored
    item = Branch(wanted, {})
    extra = {"config": {"size": np.ones((), "int32")}} if form == "beside others" else {}
    options = RestoreOptions.of(renames=rules)
    plan = make_plan(flatten_target(item), stored_of(arrays_of(stored | extra)), options)
    plan.check()
    put(item, read_with(plan, stored))

    assert_same(arrays_of(to_linen(item, renames=plan)), arrays_of(stored))


def disk_form(state: Any) -> Any:
    """Returns an optax state in the containers that Orbax stores: named tuples as dicts, tuples as lists."""
    if hasattr(state, "_fields"):
        return {name: disk_form(getattr(state, name)) for name in state._fields} or None
    if isinstance(state, tuple | list):
        return [disk_form(part) for part in state] or ()
    return {key: disk_form(part) for key, part in state.items()} if isinstance(state, dict) else state


@settings(max_examples=drawn(15, 30))
@given(linen_programs(), st.sampled_from([None, *TXS]), st.sampled_from(["linen", "maxtext"]), st.booleans())
def test_a_state_saved_under_rules_comes_back_by_them(program: Any, tx: Any, layout: Any, bare: bool) -> None:
    _, wanted, rules = program
    item = Branch(wanted, {}) if tx is None else Training(wanted, TXS[tx], {})
    expected = Numbers().like(by_path(item))
    put(item, expected)
    saved = nnx.state(item) if bare else item

    stored = saved_or_refused(saved, layout, rules)

    if stored is not None:
        assert_same(read_with(plan_for(saved, stored, rules), stored), expected)


@settings(max_examples=drawn(15, 30))
@given(st.lists(modules(1), min_size=2, max_size=3), st.data(), st.sampled_from(["linen", "maxtext"]))
def test_every_element_of_several_train_states_comes_back(trees: Any, data: Any, layout: Any) -> None:
    # A collection with nothing but a module `params` looks like a train state of its own.
    assume(all("clock" not in tree.get("params", ()) for tree in trees))
    txs = [data.draw(st.sampled_from(list(TXS))) for _ in trees]
    names = data.draw(st.permutations(["gen", "disc", "actor", "model"]))
    item: dict[str, Any] = {
        name: nnx.state(Training({"out": dense()} | tree, TXS[tx], KINDS))
        for name, tree, tx in zip(names, trees, txs, strict=False)
    }
    if data.draw(st.booleans()):
        item["ema"] = nnx.state(Branch(trees[0], KINDS))
    numbers = Numbers()
    expected: dict[Path, Any] = {}
    for name, part in item.items():
        values = numbers.like(by_path(part))
        put(part, values)
        expected |= {(name, *path): value for path, value in values.items()}

    stored = saved_or_refused(item, layout)

    if stored is not None:
        assert_same(read_with(plan_for(item, stored), stored), expected)
