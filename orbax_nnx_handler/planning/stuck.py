"""Stored moments that cannot follow what happens to their parameter."""

import dataclasses
from collections.abc import Mapping

from orbax_nnx_handler.planning.dtypes import changes_values
from orbax_nnx_handler.planning.leaves import Shape, StoredLeaf
from orbax_nnx_handler.planning.paths import Path
from orbax_nnx_handler.planning.recipes import Recipe, Scale, parts_of, reads
from orbax_nnx_handler.planning.rules import Casts


@dataclasses.dataclass(frozen=True, kw_only=True)
class StuckMoment:
    """A wanted moment whose stored ones cannot follow their parameter.

    Attributes:
        path: The wanted moment.
        stored: The stored ones.
        reason: What happens to the parameter, and by which rule.
        why: Why they cannot follow.
    """

    path: Path
    stored: tuple[Path, ...]
    reason: str
    why: str


def why_stuck(recipe: Recipe, stored: Mapping[Path, StoredLeaf], casts: Casts) -> str:
    """Returns why no moment can follow its parameter; empty if one can.

    Args:
        recipe: The parameter's recipe.
        stored: The stored leaves.
        casts: What rules cast.
    """
    for part in parts_of(recipe):
        if isinstance(part, Scale):
            return "a moment of a scaled parameter is not the scaled moment"
        if casts and part in casts:  # Not without casts: the hash of a recipe is that of all its parts.
            lossy = [path for path in reads(part) if changes_values(stored[path].dtype, casts[part])]
            if lossy:
                before = stored[lossy[0]].dtype
                return f"casting {before} to {casts[part]} changes the parameter under its moment"
    return ""


def why_lost(slot: str, stored: Shape, before: Shape, wanted: Shape, after: Shape) -> str:
    """Returns why a moment that lacks an axis does not follow where its parameter goes.

    Args:
        slot: What the moment is called (`v_row`).
        stored: Its stored shape.
        before: The stored shape of its parameter.
        wanted: Its wanted shape.
        after: The wanted shape of its parameter.
    """
    return (
        f"the {slot} {stored} of {before} is a mean over one axis, and does not tell "
        f"the mean {wanted} of {after}"
    )
