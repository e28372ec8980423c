"""Whatever the trees are, the planner answers, and no leaf gets lost."""

from typing import Any

import jax
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from orbax_nnx_handler.planning.core.errors import RestoreError
from orbax_nnx_handler.planning.core.leaves import StoredLeaf
from orbax_nnx_handler.planning.core.recipes import reads, shape_of
from orbax_nnx_handler.planning.options import RestoreOptions
from orbax_nnx_handler.planning.restore_plan import make_plan
from orbax_nnx_handler.planning.rules import (
    Cast,
    Drop,
    Fuse,
    Rename,
    Reshape,
    Scale,
    ScanAxis,
    Split,
    StackLayers,
    Transpose,
    UnstackLayers,
)
from orbax_nnx_handler.planning.target import flatten_target
from tests.planning.plans import leaves_of
from tests.sampled import drawn

ODD_NAMES = (
    *(
        "params",
        "params",
        "opt_state",
        "step",
        "value",
        "key",
        "rngs",
        "count",
        "batch_stats",
        "nnx_aux",
        "mu",
    ),
    *(
        "layers",
        "layers_0",
        "layers_1",
        "layers_10",
        "layers_remainder",
        "blocks",
        "x_0_1",
        "_0",
        "0",
        "1",
        "#0",
    ),
    *(
        "kernel",
        "bias",
        "scale",
        "a/b",
        "Dense_0/kernel/u",
        "hn",
        "ir",
        "if",
        "if_",
        "dense_i",
        "target",
        "",
        " ",
    ),
)
KEYS = st.one_of(st.sampled_from(ODD_NAMES), st.integers(0, 2), st.just(("a", "b")), st.just(("tuple", 0)))
SHAPES = st.sampled_from([(), (0,), (1,), (2,), (2, 2), (2, 3), (3, 2, 3), (2, 2, 2)])
DTYPES = st.sampled_from(["float32", "bfloat16", "int32", "uint32", "bool", "complex64"])
KINDS = st.sampled_from(
    [
        nnx.Param,
        nnx.BatchStat,
        nnx.Cache,
        nnx.Intermediate,
        nnx.RngKey,
        nnx.RngCount,
        nnx.OptState,
        nnx.LoRAParam,
    ]
)


@st.composite
def leaf(draw: st.DrawFn) -> tuple[tuple[int, ...], str]:
    return draw(SHAPES), draw(DTYPES)


TREES = st.recursive(
    st.dictionaries(KEYS, leaf(), max_size=3),
    lambda part: st.dictionaries(KEYS, st.one_of(part, leaf()), max_size=4),
    max_leaves=12,
)


def stored_of(tree: Any) -> dict[Any, StoredLeaf]:
    return {
        path: StoredLeaf(path=path, shape=shape, dtype=jax.numpy.dtype(dtype))
        for path, (shape, dtype) in leaves_of(tree).items()
    }


def pure(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: pure(part) for key, part in tree.items()}
    return jax.ShapeDtypeStruct(tree[0], tree[1])


def typed(tree: Any, kinds: Any) -> Any:
    if isinstance(tree, dict):
        return {key: typed(part, kinds) for key, part in tree.items()}
    return kinds()(jax.ShapeDtypeStruct(tree[0], tree[1]))


@st.composite
def targets(draw: st.DrawFn, tree: Any) -> Any:
    if draw(st.booleans()):
        return pure(tree)
    state = typed(tree, lambda: draw(KINDS))
    return nnx.State(state) if draw(st.booleans()) else (nnx.State(state), {"more": pure(draw(TREES))})


PATTERNS = st.lists(
    st.sampled_from([*(str(name) for name in ODD_NAMES if name), "*", "layers_{i}", "{a}", "{i}_{i}"]),
    min_size=1,
    max_size=2,
).map("/".join)


@st.composite
def rules(draw: st.DrawFn) -> list[Any]:
    p, q, r = draw(PATTERNS), draw(PATTERNS), draw(PATTERNS)
    axis = draw(st.integers(-3, 3))
    makers = (
        lambda: (p, q),
        lambda: Rename(p, q),
        lambda: Transpose(p, draw(st.permutations(range(draw(st.integers(0, 3)))))),
        lambda: Reshape(p, draw(SHAPES), draw(st.none() | SHAPES)),
        lambda: Split(p, (q, r), axis, draw(st.none() | st.just((1, 1)))),
        lambda: Fuse((p, q), r, axis),
        lambda: StackLayers(p, q, axis),
        lambda: UnstackLayers(p, q, axis),
        lambda: Cast(p, draw(DTYPES)),
        lambda: Scale(p, draw(st.floats())),
        lambda: Drop(p, q),
        lambda: ScanAxis(p, axis),
    )
    return list(draw(st.lists(st.sampled_from(makers), max_size=3)))


def accounts(target: Any, stored: Any, made: list[Any]) -> None:
    """Plans, and checks that every leaf of both sides ends in exactly one place."""
    try:
        taken_apart = flatten_target(target)
        options = RestoreOptions.of(renames=[make() for make in made])
        plan = make_plan(taken_apart, stored, options)
    except RestoreError:
        return
    error = plan.error()
    assert error is None or isinstance(error, RestoreError)
    assert str(plan)
    assert plan.to_dict()["fits"] == (error is None)
    places = [plan.restored, plan.missing, plan.mismatched, plan.defaulted]
    assert sum(map(len, places)) == len(taken_apart.leaves)
    assert set().union(*places) == set(taken_apart.leaves)
    found = [*plan.restored.values(), *plan.mismatched.values(), *plan.missing.values()]
    used = {path for item in found if item.recipe is not None for path in reads(item.recipe)}
    left = [used, set(plan.unexpected), set(plan.skipped), set(plan.dropped)]
    assert set().union(*left) == set(stored)
    assert sum(map(len, left)) == len(stored)
    shapes = {path: leaf.shape for path, leaf in stored.items()}
    for item in plan.restored.values():
        assert shape_of(item.recipe, shapes) == item.wanted.shape


@settings(max_examples=drawn(100, 200), deadline=None)
@given(TREES, TREES, st.data())
def test_no_leaf_of_two_unrelated_trees_gets_lost(stored: Any, wanted: Any, drawn: st.DataObject) -> None:
    accounts(drawn.draw(targets(wanted)), stored_of(stored), drawn.draw(rules()))


@settings(max_examples=drawn(100, 200), deadline=None)
@given(TREES, st.data())
def test_no_leaf_of_a_tree_and_the_model_that_it_holds_gets_lost(tree: Any, drawn: st.DataObject) -> None:
    inner = tree.get("params", tree)
    target = drawn.draw(targets(inner if isinstance(inner, dict) else tree))

    accounts(target, stored_of(tree), drawn.draw(rules()))
