"""The evidence of the real cases reads true: what a leaf is said to rest on is what its recipe does."""

import re

import pytest

from orbax_nnx_handler import plan_restore
from orbax_nnx_handler.planning.core.recipes import Read, reads, substitute
from tests.cases import load_case, names


def _keys(path):
    return [str(key) for key in path]


@pytest.fixture(scope="module", params=names())
def plan(request):
    case = load_case(request.param)
    plan = plan_restore(case.path, case.target, unexpected="error")
    plan.check()
    return plan


def _of_kind(plan, *kinds):
    return {path: item for path, item in plan.restored.items() if item.evidence.kind in kinds}


def test_every_restored_leaf_says_what_it_rests_on(plan):
    assert plan.restored
    for item in plan.restored.values():
        assert item.evidence.words
        assert item.evidence.kind != "rule"


def test_a_leaf_said_to_have_the_same_path_is_read_from_it(plan):
    for path, item in _of_kind(plan, "same path").items():
        assert item.recipe == Read(item.recipe.path)
        assert _keys(item.recipe.path) == _keys(path)


def test_a_leaf_said_to_have_its_path_below_two_roots_is_read_whole_from_that_path(plan):
    for path, item in _of_kind(plan, "path below roots").items():
        here, there = re.fullmatch(r"same path below (\S+) and (\S+)", item.evidence.words).groups()
        assert isinstance(item.recipe, Read)
        wanted, stored = "/".join(_keys(path)), "/".join(_keys(item.recipe.path))
        assert wanted.removeprefix(f"{here}/") == stored.removeprefix(f"{there}/")
        assert wanted != stored


def test_a_leaf_said_to_be_made_of_layers_takes_them_from_that_axis_of_that_group(plan):
    for item in _of_kind(plan, "layers").values():
        group, axis = re.match(r"layer \w+ of (\S+?)(?:, axis (\d+)|,|$)", item.evidence.words).groups()
        # What is left over after the last cycle lies on no axis.
        assert (getattr(item.recipe, "axis", None), axis) == (axis and int(axis), axis)
        assert all(group in "/".join(_keys(path)) for path in reads(item.recipe))


def test_a_moment_takes_its_parameters_recipe(plan):
    parameters = {tuple(_keys(path)[1:]): item.recipe for path, item in plan.restored.items()}
    for path, item in _of_kind(plan, "moment").items():
        slot = _keys(path).index("opt_state") + 3
        recipe = parameters[tuple(_keys(path)[slot:])]
        there = reads(item.recipe)[0]
        prefix = there[: len(there) - len(reads(recipe)[0]) + 1]
        assert item.recipe == substitute(recipe, lambda at, above=prefix: Read((*above, *at[1:])))
        assert _keys(path)[slot - 1] in _keys(there)


def test_the_plan_prints_its_evidence_as_data(plan):
    listed = plan.to_dict()["restored"]
    items = listed.values() if isinstance(listed, dict) else listed
    assert all(item["evidence"]["kind"] for item in items)


def test_the_plan_prints_what_each_leaf_rests_on_like_leaves_in_one_line(plan):
    lines = plan.evidence().splitlines()
    assert 0 < len(lines) < 60
    for words in {item.evidence.words for item in plan.restored.values()}:
        assert any(words.split(":")[0][:24] in line for line in lines), words


def test_an_axis_is_said_with_what_tells_it(plan):
    for item in _of_kind(plan, "layers").values():
        assert ("axis" in item.evidence.words) == (item.evidence.axis_by is not None)
        assert item.evidence.axis_by in (None, "shape", "layout")
