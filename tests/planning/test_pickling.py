"""Errors, plans and reports cross from one process to another, can be copied, and go when nobody has them."""

import copy
import gc
import pickle
import weakref
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from orbax_nnx_handler import (
    AmbiguousMappingError,
    MissingParamError,
    RestoreError,
    RestorePlan,
    RestoreReport,
    ShapeMismatchError,
    Transpose,
)
from orbax_nnx_handler.planning.core.errors import error_of_kinds
from tests.planning.plans import plan_of

STORED = {
    "params": {
        "a": {"kernel": np.ones((2, 3), np.float32)},
        "b": {"kernel": np.ones((5, 4), np.float32)},
        "step": np.ones((), np.float32),
    },
    "opt_state": {"0": {"mu": {"a": {"kernel": np.ones((2, 3), np.float32)}}}},
}


class Gate(nnx.Param[Any]):
    """A Variable type of a module, not of a function."""


def _type_of_a_function() -> type[nnx.Param[Any]]:
    class Local(nnx.Param[Any]):
        pass

    return Local


Local = _type_of_a_function()


def target(width: int = 4) -> nnx.State:
    return nnx.State(
        {
            "a": {"kernel": nnx.Param(jnp.ones((2, width)))},
            "b": {"kernel": nnx.Param(jnp.ones((4, 5)))},
            "c": {"scale": Local(jnp.ones(5)), "gate": Gate(jnp.ones(2))},
            "rngs": {"key": nnx.RngKey(jax.random.key(0))},
        }
    )


def plan(**options: Any) -> RestorePlan:
    return plan_of(target(), STORED, **options)


def raise_error() -> None:
    """What a worker process does: it fails."""
    plan().check()


def same(one: RestoreError, other: RestoreError) -> bool:
    facts = [
        (type(e), str(e), e.what, e.paths, e.hints, e.causes, [str(problem) for problem in e.problems])
        for e in (one, other)
    ]
    return facts[0] == facts[1]


def test_an_error_of_several_kinds_is_the_same_after_pickling_and_copying() -> None:
    error = plan().error()

    assert isinstance(error, MissingParamError)
    assert isinstance(error, ShapeMismatchError)
    assert error.hints
    assert error.causes
    for again in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error), copy.copy(error)):
        assert same(error, again)
        assert [type(problem) for problem in again.problems] == [MissingParamError, ShapeMismatchError]


def test_an_error_of_one_kind_is_its_own_problem_after_pickling() -> None:
    error = pickle.loads(pickle.dumps(AmbiguousMappingError("two readings", paths=[("a", 0)], hints=["ask"])))

    assert str(error) == "two readings\nhint: ask"
    assert error.paths == (("a", 0),)
    assert error.problems == (error,)


def test_errors_of_the_same_kinds_have_one_type() -> None:
    assert error_of_kinds(MissingParamError, ShapeMismatchError) is type(plan().error())


def test_the_one_error_of_a_worker_process_reaches_the_process_that_asked() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        raised = pool.submit(raise_error).exception()

    assert isinstance(raised, MissingParamError)
    assert isinstance(raised, ShapeMismatchError)
    assert str(raised) == str(plan().error())


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
@pytest.mark.parametrize(
    "options", [{}, {"policy": "warn"}, {"renames": [Transpose("b/kernel", (1, 0))], "policy": "init"}]
)
def test_a_plan_says_the_same_after_pickling_and_copying(again, options) -> None:
    made = plan(**options)
    html = made._repr_html_()

    other = again(made)

    assert str(other) == str(made)
    assert other.to_dict() == made.to_dict()
    assert other._repr_html_() == html
    assert other.fits == made.fits
    assert other.under("warn").fits == made.under("warn").fits


def test_a_copy_keeps_the_shardings_and_a_pickle_leaves_them_behind() -> None:
    made = plan()

    def shardings(of: RestorePlan) -> set[Any]:
        return {item.wanted.sharding for item in of.missing.values()}

    assert None not in shardings(made)
    assert shardings(copy.deepcopy(made)) == shardings(made)
    assert shardings(pickle.loads(pickle.dumps(made))) == {None}


def test_a_pickle_does_not_grow_with_the_values_of_a_target() -> None:
    small, large = (plan_of(target(width), STORED) for width in (4, 100_000))

    assert len(pickle.dumps(large)) < len(pickle.dumps(small)) + 1000


def test_a_report_says_the_same_after_pickling_and_copying() -> None:
    report = RestoreReport.of(plan(policy="warn"), 1.5)

    for again in (pickle.loads(pickle.dumps(report)), copy.deepcopy(report)):
        assert str(again) == str(report)
        assert again.to_dict() == report.to_dict()
        assert again.warning == report.warning


def test_a_plan_that_was_read_goes_with_its_last_reference():
    plan = plan_of({"params": {"a": np.ones((2,), np.float32)}}, {"a": nnx.Param(jnp.zeros((2,)))})
    assert str(plan)
    assert plan.error() is None
    gone = weakref.ref(plan)
    gc.disable()
    try:
        del plan
        assert gone() is None
    finally:
        gc.enable()
