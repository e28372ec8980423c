"""Random weights under random rules: plan, restore, save, plan is the identity."""

import math
from typing import Any

import numpy as np
from flax import nnx, traverse_util
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from orbax_nnx_handler.planning.core.recipes import Read
from orbax_nnx_handler.planning.layouts.linen import VARIABLES
from orbax_nnx_handler.planning.rules import (
    Fuse,
    Rename,
    Repeat,
    Reshape,
    Rule,
    Scale,
    Split,
    StackLayers,
    Transpose,
    UnstackLayers,
    apply_rules,
)
from orbax_nnx_handler.planning.rules.entries import Entry, model_entries
from orbax_nnx_handler.planning.rules.inverse import undo_rules
from tests.planning.plans import evaluate, leaves_of, params, plan_of, stored_of, values_of

SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)


@st.composite
def rule_for(draw: st.DrawFn, entries: list[Entry], fresh: str) -> Rule:
    """Draws a rule that fits some of the leaves; what it names is new, so that it can be undone."""
    leaf = draw(st.sampled_from(entries))
    name = "/".join(leaf.segments)
    axis = draw(st.integers(0, max(len(leaf.shape) - 1, 0)))
    same = [e for e in entries if e.shape == leaf.shape]
    fitting: list[Rule] = [
        Scale(name, draw(st.sampled_from([0.5, -2.0, 4.0]))),
        Transpose(name, tuple(draw(st.permutations(range(len(leaf.shape)))))),
        Reshape(name, (math.prod(leaf.shape),), before=leaf.shape),
        Reshape(name, (1, -1), before=(*leaf.shape[:-1], -1) if leaf.shape else ()),
    ]
    if not any(leaf.fixed):  # What one rename wrote, no other changes.
        fitting.append(Rename(name, f"{fresh}/leaf"))
    if leaf.shape and leaf.shape[axis] > 1:
        sizes = (1, leaf.shape[axis] - 1)
        fitting.append(Split(name, (f"{fresh}/left", f"{fresh}/right"), axis, sizes))
        fitting.append(Split(name, (f"{fresh}/left", f"{fresh}/right"), axis - len(leaf.shape), sizes))
    for at, length in enumerate(leaf.shape):
        if length == 2:
            both = (f"{fresh}/first", f"{fresh}/second")
            fitting.append(
                Split(name, both, draw(st.sampled_from([at, at - len(leaf.shape)])), drop_axis=True)
            )
    if leaf.shape:
        fitting.append(Repeat(name, axis, draw(st.integers(2, 3))))
        fitting.append(UnstackLayers(name, f"{fresh}/{{i}}/leaf", axis))
    if len(same) > 1 and leaf.shape:
        others = draw(st.permutations(same))[:2]
        names = tuple("/".join(e.segments) for e in others)
        fitting.append(Fuse(names, f"{fresh}/both", axis))
        fitting.append(Fuse(names, f"{fresh}/both", draw(st.integers(-1, len(leaf.shape))), new_axis=True))
    layers = [e for e in entries if len(e.segments) == 3 and e.segments[1].isdecimal()]
    if layers:
        layer = draw(st.sampled_from(layers))
        new_axis = draw(st.integers(0, len(layer.shape)))
        group = [e for e in layers if e.segments[0] == layer.segments[0]]
        numbers = sorted(int(e.segments[1]) for e in group)
        if numbers == list(range(len(group))) and len({e.shape for e in group}) == 1:
            fitting.append(StackLayers(f"{layer.segments[0]}/{{i}}/leaf", f"{fresh}/leaf", new_axis))
    return draw(st.sampled_from(fitting))


@st.composite
def problems(draw: st.DrawFn) -> tuple[dict[str, Any], list[Rule]]:
    count = draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    tree = {f"m{i}": {"kernel": rng.integers(-9, 9, draw(SHAPES)).astype("float32")} for i in range(count)}
    rules: list[Rule] = []
    entries = entries_of(tree)
    for step in range(draw(st.integers(0, 5))):
        rules.append(draw(rule_for(entries, f"n{chr(97 + step)}")))
        entries = list(apply_rules(entries_of(tree), rules).entries)
    return tree, rules


def entries_of(tree: dict[str, Any]) -> list[Entry]:
    return model_entries(VARIABLES.place(stored_of(leaves_of({"params": tree}))))


def nested(leaves: dict[tuple[str, ...], Any]) -> dict[str, Any]:
    return traverse_util.unflatten_dict(leaves)


BELOW_A_RESHAPE = [
    Reshape("m0/kernel", (2,), before=(1, 1, 2)),
    Split("m0/kernel", ("na/left", "na/right"), 0, (1, 1)),
]


@settings(max_examples=120, deadline=None)
@given(problems())
@example(({"m0": {"kernel": np.array([[[6, 2]]], "float32")}}, BELOW_A_RESHAPE))
def test_plan_restore_save_plan_is_the_identity(problem: tuple[dict[str, Any], list[Rule]]) -> None:
    tree, rules = problem
    stored = {"params": tree}
    wanted = nested({entry.segments: entry.shape for entry in apply_rules(entries_of(tree), rules).entries})

    plan = plan_of(nnx.State(params(wanted)), stored, rules, unexpected="error")
    plan.check()
    restored = nested({tuple(path.split("/")): value for path, value in values_of(plan, stored).items()})
    ways = undo_rules(entries_of(restored), rules).ways
    arrays = leaves_of({"params": restored})
    saved = nested({path: evaluate(way, arrays) for path, way in ways.items()})
    again = plan_of(nnx.State(params(wanted)), saved, rules, unexpected="error")

    before, after = leaves_of(stored), leaves_of(saved)
    assert before.keys() == after.keys()
    for path, value in before.items():
        np.testing.assert_array_equal(after[path], value)
    assert {p: i.recipe for p, i in again.restored.items()} == {p: i.recipe for p, i in plan.restored.items()}


@settings(max_examples=60, deadline=None)
@given(problems())
def test_rules_never_lose_or_double_an_element(problem: tuple[dict[str, Any], list[Rule]]) -> None:
    tree, rules = problem
    assume(not any(isinstance(rule, Repeat) for rule in rules))
    unscaled = [rule for rule in rules if not isinstance(rule, Scale)]
    numbers = iter(range(10_000))
    marked = {
        name: {"kernel": np.array([next(numbers) for _ in range(math.prod(shape))]).reshape(shape)}
        for name, shape in ((name, part["kernel"].shape) for name, part in tree.items())
    }
    arrays = leaves_of({"params": marked})

    entries = apply_rules(entries_of(tree), unscaled).entries

    elements = [int(x) for entry in entries for x in evaluate(entry.recipe, arrays).ravel()]
    assert sorted(elements) == list(range(sum(v.size for v in arrays.values())))
    assert all(evaluate(entry.recipe, arrays).shape == entry.shape for entry in entries)
    assert unscaled or all(isinstance(entry.recipe, Read) for entry in entries)
