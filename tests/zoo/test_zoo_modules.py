"""Every Flax module that exists in Linen and NNX computes the same after a restore."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from orbax_nnx_handler import from_linen, save
from orbax_nnx_handler.planning.core.errors import UnmappedValueError
from tests.zoo.modules import PAIRS
from tests.zoo.pairs import (
    Outcome,
    Pair,
    Variables,
    abstract_module,
    assert_same,
    broken,
    differs,
    linen_outcome,
    nnx_outcome,
    path_of,
    replaced,
    restored_module,
    saved,
    stored_variables,
    weights_that_matter,
)

LinenRun = Callable[[Any], Outcome]


# By fixture, not by mark: pytest then runs all tests of a pair together, on one restore and one compilation.
@pytest.fixture(scope="module", params=PAIRS, ids=str)
def pair(request: pytest.FixtureRequest) -> Pair:
    return request.param


@pytest.fixture(scope="module")
def run_linen(pair: Pair) -> LinenRun:
    return jax.jit(functools.partial(linen_outcome, pair))


@pytest.fixture(scope="module")
def variables(pair: Pair) -> Variables:
    return stored_variables(pair)


@pytest.fixture(scope="module")
def expected(run_linen: LinenRun, variables: Variables) -> Outcome:
    return run_linen(variables)


@pytest.fixture(scope="module")
def target(pair: Pair) -> nnx.Module:
    return abstract_module(pair)


@pytest.fixture(scope="module")
def module(
    pair: Pair, variables: Variables, target: nnx.Module, tmp_path_factory: pytest.TempPathFactory
) -> nnx.Module:
    """The NNX side, restored from the checkpoint that the Linen side wrote."""
    return restored_module(pair, saved(variables, tmp_path_factory.mktemp("pair") / "checkpoint"), target)


@pytest.fixture(scope="module")
def outcome(pair: Pair, module: nnx.Module) -> Outcome:
    return nnx_outcome(pair, module)


def test_linen_and_nnx_compute_the_same_from_one_checkpoint(expected: Outcome, outcome: Outcome) -> None:
    assert_same(expected, outcome)


def test_any_weight_gone_wrong_is_noticed(
    pair: Pair, variables: Variables, run_linen: LinenRun, outcome: Outcome
) -> None:
    unnoticed = [
        weight
        for weight in weights_that_matter(pair, variables)
        if not differs(run_linen(broken(variables, weight)), outcome)
    ]

    assert unnoticed == []


def test_the_variables_in_memory_become_what_the_checkpoint_becomes(
    pair: Pair, variables: Variables, target: nnx.Module, module: nnx.Module
) -> None:
    in_memory = jax.device_put(variables)

    again = from_linen(in_memory, target, renames=pair.renames, unexpected="error")

    expected, found = nnx.state(module), nnx.state(again)
    assert jax.tree.structure(expected) == jax.tree.structure(found)
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert one.dtype == other.dtype
        bits = jax.random.key_data if jnp.issubdtype(one.dtype, jax.dtypes.prng_key) else np.asarray
        np.testing.assert_array_equal(bits(one), bits(other))


def test_a_weight_swapped_on_disk_is_noticed(
    pair: Pair, variables: Variables, target: nnx.Module, expected: Outcome, tmp_path: Path
) -> None:
    wrong = broken(variables, weights_that_matter(pair, variables)[0])

    actual = nnx_outcome(pair, restored_module(pair, saved(wrong, tmp_path / "checkpoint"), target))

    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_same(expected, actual)


# NNX has not the names or not the arrangement that this Linen program used, and saves its own.
OTHER_NAMES = ("low-rank module",)
OTHER_LAYERS = {
    ("scan", "List"),
    ("blocks one by one", "scan"),
    ("vmap", "List"),
    ("vmap of LSTMCell", "List"),
}
# Caches are computed again; boxes belong to the program, not to the weights; a cell is saved as Linen's
# own, which a Linen program that borrows NNX's by `bridge.ToLinen` is not. A wrapper is saved with its layer
# inside; where the Linen program's layer belongs to the model around it, NNX does not keep that name.
# A list of values is saved as Linen names a list of layers.
NOT_KEPT = {
    "decoding, cache stored",
    "boxes on some leaves",
    "boxed",
    "of GRUCell",
    "inside a model, bias too",
    "bool, uint8, complex, scalar",
}


def keeps_everything(pair: Pair) -> bool:
    names = (pair.linen_name, pair.nnx_name)
    return not (
        pair.renames or pair.linen_name in OTHER_NAMES or names in OTHER_LAYERS or pair.variant in NOT_KEPT
    )


def test_a_module_comes_back_to_linen_as_it_was(
    pair: Pair, variables: Variables, module: nnx.Module, tmp_path: Path
) -> None:
    if not keeps_everything(pair):
        pytest.skip("NNX has other names or another arrangement, and saves its own")

    save(tmp_path / "nnx", module)

    with ocp.StandardCheckpointer() as stock:
        actual = stock.restore(tmp_path / "nnx", jax.eval_shape(lambda: variables))
    differing = jax.tree_util.tree_map_with_path(
        lambda keys, left, right: None if np.array_equal(left, right) else path_of(keys), variables, actual
    )
    assert jax.tree.leaves(differing) == []


HOMELESS = [pair for pair in PAIRS if pair.without_variable]


@pytest.mark.parametrize("pair", HOMELESS, ids=str)
def test_a_value_that_nnx_has_no_home_for_is_refused_unless_it_is_zero(pair: Pair, tmp_path: Path) -> None:
    wrong = replaced(stored_variables(pair), pair.without_variable[0], np.array([0, 0, 0.1, 0], np.float32))
    path = saved(wrong, tmp_path / "checkpoint")

    with pytest.raises(UnmappedValueError) as caught:
        restored_module(pair, path)

    assert ["/".join(map(str, path)) for path in caught.value.paths] == [pair.without_variable[0]]
