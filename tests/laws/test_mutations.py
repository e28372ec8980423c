"""The kernel that certifies plans, attacked: right mappings changed in every way a wrong heuristic could."""

import random

import pytest

from orbax_nnx_handler import RestoreError
from orbax_nnx_handler.planning.verdict.laws import Source, certify
from tests.laws.fuzz.optimizers import nested
from tests.laws.fuzz.trial import draw
from tests.laws.mutations import MUTATIONS, mutants
from tests.planning.plans import evaluate, plan_of

KINDS = (*MUTATIONS, "two leaves swapped", "one source twice")
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
    sources = {
        path: Source(recipe=recipe, kind=plan.restored[path].evidence.kind)
        for path, recipe in recipes.items()
    }
    return certify(list(plan.sides.wanted.values()), list(plan.sides.placements.values()), sources)


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
