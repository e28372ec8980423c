"""The stored leaves that no wanted leaf is made from, and why."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from orbax_nnx_handler.planning.leaves import StoredLeaf
from orbax_nnx_handler.planning.mapping import LeafMapping
from orbax_nnx_handler.planning.paths import Path
from orbax_nnx_handler.planning.plan import Discarded, Dropped
from orbax_nnx_handler.planning.recipes import Recipe, reads
from orbax_nnx_handler.planning.roles import Wanted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leftover:
    """The stored leaves beside the ones that are used; each in exactly one place.

    Attributes:
        unexpected: Leaves of the parts that the target asks for.
        skipped: Leaves of parts it does not ask for, caches of another shape, and
            values that are no arrays.
        dropped: Leaves without a home in NNX, and those that rules leave behind.
    """

    unexpected: Mapping[Path, StoredLeaf]
    skipped: Mapping[Path, StoredLeaf]
    dropped: Mapping[Path, Dropped | Discarded]


def left_over(wanted: Sequence[Wanted], mapping: LeafMapping, used: Iterable[Recipe]) -> Leftover:
    """Sorts the stored leaves that are not used.

    Args:
        wanted: The target's leaves.
        mapping: What the checkpoint can give them.
        used: The recipes of the leaves that come from it.
    """
    taken = {path for recipe in used for path in reads(recipe)}
    dropped = {path: item for path, item in _dropped(mapping).items() if path not in taken}
    left = [
        item for item in mapping.placements if item.leaf.path not in taken and item.leaf.path not in dropped
    ]
    roles = {item.role for item in wanted}
    asked = {"model"} | (roles & {"optimizer", "step"})
    open_ends = [item.leaf for item in left if item.section in asked and item.leaf.dtype is not None]
    # A leaf that was found and is not used all the same is a cache that the program recomputes.
    passed_over = mapping.used() if open_ends else ()
    unexpected = {leaf.path: leaf for leaf in open_ends if leaf.path not in passed_over}
    skipped = {item.leaf.path: item.leaf for item in left if item.leaf.path not in unexpected}
    return Leftover(unexpected=unexpected, skipped=skipped, dropped=dropped)


def _dropped(mapping: LeafMapping) -> dict[Path, Dropped | Discarded]:
    homeless = {item.leaf.path: Dropped(leaf=item.leaf, reason=item.reason) for item in mapping.homeless}
    return {**homeless, **mapping.discarded}
