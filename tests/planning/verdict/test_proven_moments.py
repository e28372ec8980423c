"""Moments are proven many at a time: one that is not its parameter's is found wherever it stands."""

from unittest import mock

import jax
import numpy as np
import pytest
from flax import nnx

from orbax_nnx_handler import Transpose as TransposeRule
from orbax_nnx_handler.planning import verdict
from orbax_nnx_handler.planning.core.leaves import StoredLeaf
from orbax_nnx_handler.planning.core.recipes import Add, Scale, Transpose
from orbax_nnx_handler.planning.options import RestoreOptions
from orbax_nnx_handler.planning.restore_plan import make_plan
from orbax_nnx_handler.planning.target import flatten_target
from orbax_nnx_handler.planning.verdict.laws import certify

LAYERS = 100
FLOAT = np.dtype("float32")


@pytest.fixture(scope="module")
def plan():
    """What the laws are given for layers with Adam's moments, each of which fits: of one shape all."""
    tops = [
        (("params",), ("model",), nnx.Param),
        (("opt_state", 0, "mu"), ("optimizer", "opt_state", 0, "mu"), nnx.optimizer.OptArray),
        (("opt_state", 0, "nu"), ("optimizer", "opt_state", 0, "nu"), nnx.optimizer.OptArray),
    ]
    names = [(f"layer_{number}", "kernel") for number in range(LAYERS)]
    array = jax.ShapeDtypeStruct((4, 4), FLOAT)
    state = nnx.from_flat_state([((*top, *name), kind(array)) for _, top, kind in tops for name in names])
    stored = [(*top, *name) for top, _, _ in tops for name in names]
    leaves = {path: StoredLeaf(path=path, shape=(4, 4), dtype=FLOAT) for path in stored}
    return given_for(state, leaves)


def given_for(state, leaves, *rules):
    """Returns what the laws are given for a plan, which they find right."""
    given = []
    with mock.patch.object(verdict, "certify", lambda *arguments: given.append(arguments) or []):
        make_plan(flatten_target(state), leaves, RestoreOptions(renames=rules)).check()
    assert certify(*given[0]) == []
    return given[0]


def broken(plan, changed):
    """Returns the leaves that are refused where some are made otherwise."""
    wanted, placed, sources, known = plan
    made = [(item, changed.get(item.leaf.path, recipe), grounds) for item, recipe, grounds in sources]
    return {(fault.law, fault.wanted) for fault in certify(wanted, placed, made, known)}


def moment(field, number):
    return ("optimizer", "opt_state", 0, field, f"layer_{number}", "kernel")


def recipe_of(plan, path):
    return next(recipe for item, recipe, _ in plan[2] if item.leaf.path == path)


@pytest.mark.parametrize("number", [0, 1, 14, 15, 16, 17, 47, 48, 49, 98])
@pytest.mark.parametrize("field", ["mu", "nu"])
def test_two_moments_that_have_changed_places_are_refused(plan, field, number):
    one, other = moment(field, number), moment(field, number + 1)

    found = broken(plan, {one: recipe_of(plan, other), other: recipe_of(plan, one)})

    assert found == {(8, one), (8, other)}


@pytest.mark.parametrize("number", [0, 15, 16, 17, 99])
def test_a_moment_that_is_turned_and_its_parameter_not_is_refused(plan, number):
    path = moment("mu", number)

    assert broken(plan, {path: Transpose(recipe_of(plan, path), (1, 0))}) == {(8, path)}


@pytest.mark.parametrize("number", [0, 15, 16, 17, 99])
def test_a_parameter_that_is_turned_and_its_moments_not_is_refused(plan, number):
    path = ("model", f"layer_{number}", "kernel")

    found = broken(plan, {path: Transpose(recipe_of(plan, path), (1, 0))})

    assert {(8, moment("mu", number)), (8, moment("nu", number))} <= found


@pytest.mark.parametrize("number", [0, 15, 99])
def test_the_moments_of_a_scaled_parameter_are_refused_as_they_are_stored(plan, number):
    weight = ("model", f"layer_{number}", "kernel")

    refused = broken(plan, {weight: Scale(recipe_of(plan, weight), 2.0)})

    assert {(8, moment("mu", number)), (8, moment("nu", number))} <= refused


@pytest.mark.parametrize("number", [0, 15, 16, 17, 99])
def test_a_constant_of_a_parameter_is_refused_in_its_moments(plan, number):
    weight = ("model", f"layer_{number}", "kernel")
    names = [weight, moment("mu", number)]

    refused = broken(plan, {path: Add(recipe_of(plan, path), 1.0) for path in names})

    assert refused - {(7, weight)} == {(8, moment("mu", number))}


NETWORKS = [
    (("a", "b"), ("a_opt", "b_opt")),
    (("gen", "disc"), ("g_opt", "d_opt")),
    (("q_0", "q_1"), ("opt_0", "opt_1")),
    (("a/model", "b/model"), ("a/optimizer", "b/optimizer")),
    (("nets/0", "nets/1"), ("opts/0", "opts/1")),
]
WITHOUT_NAMES = [(("q", "r"), ("opt_a", "opt_b")), (("q", "r"), ("x", "y"))]
MOMENTS = [(*field, *name) for field in (("mu",), ("nu",)) for name in (("one", "kernel"), ("two", "kernel"))]


def keys(path):
    return tuple(int(key) if key.isdecimal() else key for key in path.split("/"))


def two_networks(networks, optimizers, *rules):
    """Returns what the laws are given for two networks of the same names and their optimizers."""
    names = [*({path[1:] for path in MOMENTS})]
    array = jax.ShapeDtypeStruct((4, 4), FLOAT)
    tops = [(keys(path), nnx.Param, names) for path in networks]
    tops += [((*keys(path), "opt_state", 0), nnx.optimizer.OptArray, MOMENTS) for path in optimizers]
    state = nnx.from_flat_state([((*top, *name), kind(array)) for top, kind, below in tops for name in below])
    stored = [
        ((*top, "params") if kind is nnx.Param else top, name) for top, kind, below in tops for name in below
    ]
    paths = [tuple(map(str, (*top, *name))) for top, name in stored]
    leaves = {path: StoredLeaf(path=path, shape=(4, 4), dtype=FLOAT) for path in paths}
    return given_for(state, leaves, *rules)


def moments_of(plan, optimizer):
    return [(*keys(optimizer), "opt_state", 0, *name) for name in MOMENTS]


@pytest.mark.parametrize(("networks", "optimizers"), NETWORKS)
def test_what_a_rule_does_to_one_of_two_networks_is_refused_in_the_moments_of_the_other(networks, optimizers):
    plan = two_networks(networks, optimizers, TransposeRule(f"{networks[1]}/params/one/kernel", (1, 0)))
    first, second = ([path for path in moments_of(plan, of) if "one" in path] for of in optimizers)
    turned = {path: Transpose(recipe_of(plan, path), (1, 0)) for path in first}
    straight = {path: recipe_of(plan, path).source for path in second}

    for changed in (turned, straight, turned | straight, dict([*turned.items()][:1])):
        found = broken(plan, changed)
        assert {law for law, _ in found} == {8}
        assert {path for _, path in found} <= changed.keys()


@pytest.mark.parametrize(("networks", "optimizers"), [*NETWORKS, *WITHOUT_NAMES])
def test_the_optimizers_of_two_networks_that_have_changed_places_are_refused(networks, optimizers):
    plan = two_networks(networks, optimizers)
    one, other = (moments_of(plan, of) for of in optimizers)
    changed = {here: recipe_of(plan, there) for here, there in zip(one + other, other + one, strict=True)}

    assert {law for law, _ in broken(plan, changed)} & {3, 8}


def test_what_a_rule_changes_beside_the_model_is_refused_as_it_is_stored():
    array = jax.ShapeDtypeStruct((4, 4), FLOAT)
    state = nnx.from_flat_state([((top, "kernel"), nnx.Param(array)) for top in ("model", "ema")])
    stored = [("params", "kernel"), ("nnx_aux", "ema", "kernel")]
    leaves = {path: StoredLeaf(path=path, shape=(4, 4), dtype=FLOAT) for path in stored}
    plan = given_for(state, leaves, TransposeRule("kernel", (1, 0)))
    path = ("ema", "kernel")

    assert isinstance(recipe_of(plan, path), Transpose)
    assert broken(plan, {path: recipe_of(plan, path).source}) == {(11, path)}
