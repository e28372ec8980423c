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
