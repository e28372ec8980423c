"""The kernel that certifies plans, attacked: right mappings changed in every way a wrong heuristic could."""

import random

import jax
import numpy as np
import pytest
from flax import nnx

from orbax_nnx_handler import RestoreError
from orbax_nnx_handler.planning.core.recipes import Concat, Index
from orbax_nnx_handler.planning.layouts import LAYOUTS
from orbax_nnx_handler.planning.verdict.laws import Known, certify
from tests.laws.fuzz.optimizers import nested
from tests.laws.fuzz.trial import draw
from tests.laws.mutations import EXCHANGES, MUTATIONS, mutants
from tests.planning.mapping import scans
from tests.planning.plans import evaluate, plan_of

KINDS = (*MUTATIONS, *EXCHANGES, "two leaves swapped", "one source twice")
SEEDS = range(120)


def _right_plans():
    """Yields plans of random trees that are right, with what was stored."""
    for seed in SEEDS:
        tree, _ = draw(seed)
        if tree.answer == "must restore":
            plan = plan_of(tree.target(), nested(tree.stored), **tree.options)
            try:
                plan.check()
            except RestoreError:
                continue
            yield seed, plan, tree.stored


def _certified(plan, recipes):
    placed, wanted = plan.sides.placements, plan.sides.wanted
    layout = next(layout for layout in LAYOUTS if layout.title == plan.layout)
    layout = layout.of_tree({path: item.leaf for path, item in placed.items()})
    sources = [(wanted[path], recipe, plan.restored[path].evidence) for path, recipe in recipes.items()]
    known = Known(scan_axis=layout.scan_axis, scans=layout.scans)
    return certify(list(wanted.values()), placed, sources, known)


@pytest.fixture(scope="module")
def verdicts():
    """What was done to a plan, where, and whether the kernel refuses it, of mutants with other values."""
    found = []
    for seed, plan, stored in _right_plans():
        recipes = {path: item.recipe for path, item in plan.restored.items()}
        assert not _certified(plan, recipes), f"seed {seed}"
        shapes = {path: value.shape for path, value in stored.items()}
        for kind, mutant in mutants(recipes, shapes, random.Random(seed)):
            changed = [path for path in recipes if mutant[path] != recipes[path]]
            values = [
                [evaluate(which[path], stored).tobytes() for path in changed] for which in (mutant, recipes)
            ]
            if values[0] != values[1]:
                found.append((kind, f"seed {seed}: {changed[0]}", bool(_certified(plan, mutant))))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_refuses_a_mapping_that_reads_something_else(verdicts, kind):
    mine = [verdict for verdict in verdicts if verdict[0] == kind]
    passed = [where for _, where, refused in mine if not refused]
    assert mine
    assert not passed, f"{len(passed)} of {len(mine)} are certified: {passed[:5]}"


def _cells():
    """Returns two LSTM cells, stacked as Linen's vmap stacks them, and the plan of a list of them."""
    shapes = {f"{side}{gate}": (2, width, 4) for side, width in (("i", 3), ("h", 4)) for gate in "ifgo"}
    stored = {gate: {"kernel": np.zeros(shape, np.float32)} for gate, shape in shapes.items()}
    wanted = {
        f"dense_{side}": {"kernel": nnx.Param(jax.ShapeDtypeStruct((width, 16), np.float32))}
        for side, width in (("i", 3), ("h", 4))
    }
    target = nnx.State({"cells": dict.fromkeys((0, 1), wanted)})
    return plan_of(target, {"params": {"cells": stored}})


def test_the_gates_of_each_cell_in_a_list_come_from_its_layer():
    plan = _cells()
    plan.check()
    recipes = {path: item.recipe for path, item in plan.restored.items()}
    path = ("cells", 0, "dense_h", "kernel")
    right = recipes[path]
    wrong = [
        Index(right.source, 0, 1),
        Index(Concat((*right.source.sources[1:], right.source.sources[0]), 2), 0, 0),
        Index(Concat(right.source.sources[:1] * 4, 2), 0, 0),
        Concat(tuple(Index(part, 1, 0) for part in right.source.sources), 1),
    ]

    assert not _certified(plan, recipes)
    for other in wrong:
        assert _certified(plan, recipes | {path: other}), other


@pytest.mark.parametrize(
    "program",
    [
        scans.Scan(name="layers", members="numbered", left_over="numbers"),
        scans.Scan(members="numbered", left_over="numbers"),
        *(scans.Scan(left_over=left_over) for left_over in ("modules", "scan", "numbers")),
    ],
    ids=str,
)
def test_a_layer_behind_the_last_block_is_not_the_first_one(program):
    layers = scans.stack_of(4, local=2, unlike=False)
    plan, _ = scans.plan_of(program.write(layers), scans.one_by_one(layers))
    recipes = {path: item.recipe for path, item in plan.restored.items()}
    others = {path: recipe for path, recipe in recipes.items() if "layers_3" not in path}
    shifted = {
        path: recipes[tuple("layers_3" if key == "layers_0" else key for key in path)] for path in others
    }

    assert not _certified(plan, recipes)
    assert not _certified(plan, others)
    assert _certified(plan, shifted)
