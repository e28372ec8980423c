"""Stored names close to missing ones, where shape or name speak for it."""

import difflib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from orbax_nnx_handler.planning.leaves import StoredLeaf, WantedLeaf
from orbax_nnx_handler.planning.paths import Path, canonical, is_number, render

_PAIRS = 6
_CANDIDATES = 400


def nearest(
    missing: Iterable[WantedLeaf], unexpected: Mapping[Path, StoredLeaf]
) -> list[tuple[WantedLeaf, StoredLeaf]]:
    """Returns the first few missing leaves, one of each layer group, with the closest unexpected leaf.

    A leaf is close where it has the same shape, or the same last name and most
    of the path.
    """
    by_shape: dict[tuple[int, ...], list[StoredLeaf]] = defaultdict(list)
    by_name: dict[str, list[StoredLeaf]] = defaultdict(list)
    for leaf in unexpected.values():
        by_shape[leaf.shape].append(leaf)
        by_name[_last(leaf)].append(leaf)
    pairs: list[tuple[WantedLeaf, StoredLeaf]] = []
    for leaf in _one_of_each_group(missing):
        close = _closest(leaf, by_shape[leaf.shape], 0.3) or _closest(leaf, by_name[_last(leaf)], 0.6)
        if close is not None:
            pairs.append((leaf, close))
    return pairs[:_PAIRS]


def _last(leaf: WantedLeaf | StoredLeaf) -> str:
    keys = [key for key in leaf.path if str(key) != "value"]
    return str(keys[-1]) if keys else ""


def _one_of_each_group(leaves: Iterable[WantedLeaf]) -> list[WantedLeaf]:
    found: dict[tuple[str, ...], WantedLeaf] = {}
    for leaf in leaves:
        found.setdefault(tuple(token for token in canonical(leaf.path) if not is_number(token)), leaf)
        if len(found) > 4 * _PAIRS:
            break
    return list(found.values())


def _closest(leaf: WantedLeaf, candidates: Sequence[StoredLeaf], cutoff: float) -> StoredLeaf | None:
    names = {render(candidate.path): candidate for candidate in candidates[:_CANDIDATES]}
    close = difflib.get_close_matches(render(leaf.path), list(names), n=1, cutoff=cutoff)
    return names[close[0]] if close else None
