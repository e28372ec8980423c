"""No stored element becomes two wanted ones, also below a reshape: the law sees parts of what is folded."""

import numpy as np
import pytest
from flax import nnx

from orbax_nnx_handler.planning.core.recipes import Index, Read, Recipe, Reshape, Slice, Stack
from orbax_nnx_handler.planning.layouts.linen import VARIABLES
from orbax_nnx_handler.planning.target.roles import roles_of
from orbax_nnx_handler.planning.target.target import flatten_target
from orbax_nnx_handler.planning.verdict.laws import Known, Source, certify
from tests.planning.plans import params, stored_of

PATH = ("params", "w")
WHOLE = Read(PATH)
FOLDED = Reshape(WHOLE, (2, 6))


def refused(one: Recipe, other: Recipe, *, copied: bool = False) -> bool:
    """Tells whether two wanted leaves that are made so of a stored leaf of 12 elements break law 4."""
    wanted = roles_of(flatten_target(nnx.State(params({"a": (1,), "b": (1,)}))).leaves)
    sources = [Source(item, recipe, "rule") for item, recipe in zip(wanted, (one, other), strict=True)]
    marked = frozenset([PATH])
    placements = VARIABLES.place(stored_of({PATH: np.zeros(12, np.float32)}))
    placed = {item.leaf.path: item for item in placements}
    known = Known(by_rule=marked, copies=marked if copied else frozenset())
    broken = certify(wanted, placed, sources, known)
    return any(item.law == 4 for item in broken)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Slice(FOLDED, 1, 0, 3), Slice(FOLDED, 1, 3, 3)),
        (Index(FOLDED, 1, 0), Slice(FOLDED, 1, 1, 5)),
        (Reshape(Index(FOLDED, 1, 2), (1, 2)), Index(FOLDED, 1, 3)),
        (Stack((Index(FOLDED, 1, 4), Index(FOLDED, 1, 1)), 0), Index(FOLDED, 1, 0)),
        (Slice(WHOLE, 0, 0, 5), Reshape(Slice(WHOLE, 0, 5, 7), (7, 1))),
    ],
)
def test_parts_that_share_nothing_are_allowed(one: Recipe, other: Recipe) -> None:
    assert not refused(one, other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Slice(FOLDED, 1, 0, 4), Slice(FOLDED, 1, 3, 3)),
        (Slice(FOLDED, 0, 0, 1), Slice(FOLDED, 1, 3, 3)),
        (FOLDED, Slice(FOLDED, 1, 3, 3)),
        (FOLDED, WHOLE),
        (Stack((Index(FOLDED, 1, 4), Index(FOLDED, 1, 0)), 0), Index(FOLDED, 1, 0)),
        (Slice(FOLDED, 1, 0, 3), Slice(WHOLE, 0, 0, 1)),
    ],
)
def test_parts_that_share_an_element_are_refused_unless_it_is_copied(one: Recipe, other: Recipe) -> None:
    assert refused(one, other)
    assert not refused(one, other, copied=True)
