"""Stored names close to missing ones, where shape or name speak for it."""

import difflib
from collections import defaultdict
from collections.abc import Iterable, Sequence

from orbax_nnx_handler.planning.leaves import StoredLeaf, WantedLeaf
from orbax_nnx_handler.planning.paths import canonical, is_number, render
from orbax_nnx_handler.planning.placement import Placement
from orbax_nnx_handler.planning.roles import Wanted

_GROUPS = 24
_CANDIDATES = 400


def nearest(
    missing: Iterable[Wanted], unexpected: Iterable[Placement]
) -> list[tuple[WantedLeaf, StoredLeaf]]:
    """Returns missing leaves, one of each layer group, with the closest unexpected leaf of the same part.

    A leaf is close where it has the same shape, or the same last name and most
    of the path. A scalar has the shape of any other: its name has to be the same.
    No stored leaf is the closest of two.
    """
    by_shape: dict[object, list[StoredLeaf]] = defaultdict(list)
    by_name: dict[object, list[StoredLeaf]] = defaultdict(list)
    for item in unexpected:
        if item.leaf.shape:
            by_shape[item.section, item.leaf.shape].append(item.leaf)
        by_name[item.section, _last(item.leaf)].append(item.leaf)
    pairs: list[tuple[WantedLeaf, StoredLeaf]] = []
    taken: set[int] = set()
    for item in _one_of_each_group(missing):
        leaf = item.leaf
        close = _closest(leaf, by_shape[item.role, leaf.shape], 0.3, taken) or _closest(
            leaf, by_name[item.role, _last(leaf)], 0.6, taken
        )
        if close is not None:
            pairs.append((leaf, close))
            taken.add(id(close))
    return pairs


def _last(leaf: WantedLeaf | StoredLeaf) -> str:
    keys = [key for key in leaf.path if str(key) != "value"]
    return str(keys[-1]) if keys else ""


def _one_of_each_group(leaves: Iterable[Wanted]) -> list[Wanted]:
    found: dict[tuple[str, ...], Wanted] = {}
    for item in leaves:
        names = tuple(token for token in canonical(item.leaf.path) if not is_number(token))
        found.setdefault(names, item)
        if len(found) > _GROUPS:
            break
    return list(found.values())


def _closest(
    leaf: WantedLeaf, candidates: Sequence[StoredLeaf], cutoff: float, taken: set[int]
) -> StoredLeaf | None:
    names = {render(other.path): other for other in candidates[:_CANDIDATES] if id(other) not in taken}
    close = _most_alike(render(leaf.path), names, cutoff)
    return names[close] if close is not None else None


def _most_alike(name: str, others: Iterable[str], cutoff: float) -> str | None:
    """Returns what `difflib.get_close_matches` puts first, without working out what cannot be it."""
    best: tuple[float, str] | None = None
    matcher = difflib.SequenceMatcher[str](b=name)
    for other in others:
        least = cutoff if best is None else best[0]
        matcher.set_seq1(other)
        # Upper bounds of the ratio, each dearer and closer than the one before.
        if matcher.real_quick_ratio() < least or matcher.quick_ratio() < least:
            continue
        ratio = matcher.ratio()
        if ratio >= least and (best is None or (ratio, other) > best):
            best = (ratio, other)
    return None if best is None else best[1]
