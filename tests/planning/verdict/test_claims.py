"""One claim, one use: no element becomes two wanted ones, also below a reshape, and none has two claims."""

from typing import Any

import numpy as np
import pytest
from flax import nnx

from orbax_nnx_handler.planning.core.leaves import WantedLeaf
from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.core.recipes import Index, Read, Recipe, Reshape, Slice, Stack
from orbax_nnx_handler.planning.layouts.linen import VARIABLES
from orbax_nnx_handler.planning.mapping.matches import MatchEvidence
from orbax_nnx_handler.planning.target import flatten_target
from orbax_nnx_handler.planning.target.roles import roles_of
from orbax_nnx_handler.planning.verdict.laws import Known, certify
from tests.planning.plans import params, stored_of

PATH = ("params", "w")
WHOLE = Read(PATH)
FOLDED = Reshape(WHOLE, (2, 6))


def refused(one: Recipe, other: Recipe, *, copied: bool = False) -> bool:
    """Tells whether two wanted leaves that are made so of a stored leaf of 12 elements break law 4."""
    wanted = roles_of(flatten_target(nnx.State(params({"a": (1,), "b": (1,)}))).leaves)
    grounds = MatchEvidence(kind="rule", words="")
    sources = [(item, recipe, grounds) for item, recipe in zip(wanted, (one, other), strict=True)]
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


Beside = tuple[Path, tuple[int, ...]]
"""The path and the shape of a stored leaf that nothing reads."""


def claimed(wanted: Path, read: Path, beside: Beside, shape: tuple[int, ...] = (2, 3), **known: Any) -> bool:
    """Tells whether a wanted leaf breaks law 4 where a stored leaf that nothing reads lies beside its own."""
    leaf = WantedLeaf(path=wanted, kind=nnx.Param, shape=shape, dtype=np.dtype("float32"))
    (item,) = roles_of({wanted: leaf})
    path, other = ("params", *read), ("params", *beside[0])
    leaves = stored_of({path: np.zeros(shape, np.float32), other: np.zeros(beside[1], np.float32)})
    placed = {placement.leaf.path: placement for placement in VARIABLES.place(leaves)}
    source = (item, Read(path), MatchEvidence(kind="path below roots", words=""))
    return any(fault.law == 4 for fault in certify([item], placed, [source], Known(**known)))


@pytest.mark.parametrize(
    ("wanted", "read", "beside"),
    [
        (("layers", 2, "w"), ("layers_2", "w"), (("layers", "w"), (4, 2, 3))),
        (("layers", 2, "w"), ("layers_2", "w"), (("layers", "w"), (2, 3, 3))),
        (("layers", 2, "w"), ("layers_2", "w"), (("layers_02", "w"), (2, 3))),
        (("layers", 2, "w"), ("layers_2", "w", "value"), (("layers", "w"), (4, 2, 3))),
        (("layers", 2, "w"), ("layers_2", "w"), (("layers", "w", "value"), (4, 2, 3))),
        (("model", "layers", 2, "w"), ("layers_2", "w"), (("layers", "w"), (4, 2, 3))),
    ],
)
def test_a_second_claim_is_seen_whatever_the_search_says(wanted: Path, read: Path, beside: Beside) -> None:
    assert claimed(wanted, read, beside)
    assert not claimed(wanted, read, beside, by_rule=frozenset([("params", *beside[0])]))


@pytest.mark.parametrize(
    ("wanted", "read", "beside"),
    [
        (("layers", 2, "w"), ("layers_2", "w"), (("layers", "w"), (2, 2, 3))),
        (("layers", 2, "w"), ("layers_2", "w"), (("layers", "w"), (4, 5, 3))),
        (("layers", 2, "w"), ("layers_2", "w"), (("layers_3", "w"), (2, 3))),
        (("layers", 2, "w"), ("layers_2", "w"), (("layers", "v"), (4, 2, 3))),
        (("layers", 2, "w"), ("layers", "2", "w"), (("layers_2", "w"), (2, 3))),
    ],
)
def test_another_layer_or_another_module_claims_nothing(wanted: Path, read: Path, beside: Beside) -> None:
    assert not claimed(wanted, read, beside)


def test_a_layer_stored_beside_its_stack_claims_a_part_of_it() -> None:
    assert claimed(("layers", "w"), ("layers", "w"), (("layers_2", "w"), (2, 3)), shape=(4, 2, 3))
    assert not claimed(("layers", "w"), ("layers", "w"), (("layers_4", "w"), (2, 3)), shape=(4, 2, 3))
