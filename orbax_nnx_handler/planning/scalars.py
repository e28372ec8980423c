"""Optimizer leaves that belong to no parameter, such as `count`: they go where the moments beside them go."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from orbax_nnx_handler.planning.leaves import Shape

Tokens = tuple[str, ...]
Shapes = Mapping[Tokens, Shape]
Moments = Mapping[Tokens, Tokens | None]
Pairs = dict[Tokens, Tokens]


def pair_scalars(wanted: Shapes, stored: Shapes, moments: Moments, slots: Iterable[Tokens]) -> Pairs:
    """Returns the stored place of each wanted leaf that has one.

    A name says little: every part of a chain may keep a `count`, and the same place
    in another chain is another part's. So the moments decide, which their names and
    parameters tell apart: what lies beside them has moved as they have. A leaf with
    no moments beside it may also be found by its place, or by a name that is left once.

    Args:
        wanted: The shape of each wanted leaf by its place.
        stored: The shape of each stored leaf by its place.
        moments: The stored slot of each wanted slot of moments; None where there is none.
        slots: All stored slots of moments.
    """
    moved = _moved(moments)
    # A count of moments that are not here, or not stored, is no one else's: they would be corrected by it.
    owned, owners = {slot[:-1] for slot in moments}, {slot[:-1] for slot in slots}
    beside = {place: (*moved[place[:-1]], place[-1]) for place in wanted if place[:-1] in moved}
    lone = {place: _moved_along(place, moved) for place in wanted if place[:-1] not in owned}
    found = {place: there for place, there in beside.items() if there in stored}
    found |= {place: to for place, to in lone.items() if to in stored and to[:-1] not in owners}
    free = {place for place in stored if place[:-1] not in owners} - set(found.values())
    lost = set(lone) - set(found)
    found |= {place: place for place in lost & free}
    # Shapes, because a moment whose parameter is not stored counts as belonging to none.
    here = _only(place for place in lost - set(found) if not wanted[place])
    there = _only(place for place in free - set(found.values()) if not stored[place])
    return found | {here[name]: there[name] for name in here if name in there}


def _moved(moments: Moments) -> Pairs:
    """Returns where each part of the optimizer that holds moments lies in the stored one."""
    ways: dict[Tokens, set[Tokens]] = defaultdict(set)
    for slot, stored in moments.items():
        if stored is None:
            continue
        here, there = slot[:-1], stored[:-1]
        ways[here].add(there)
        # What holds the part has moved along, as far as the keys down to it are the same.
        while here and there and here[-1] == there[-1]:
            here, there = here[:-1], there[:-1]
            ways[here].add(there)
    return {here: next(iter(there)) for here, there in ways.items() if len(there) == 1}


def _moved_along(place: Tokens, moved: Pairs) -> Tokens:
    """Returns where a leaf lies if it has moved with the nearest moments."""
    for at in reversed(range(len(place))):
        if place[:at] in moved:
            return (*moved[place[:at]], *place[at:])
    return place


def _only(places: Iterable[Tokens]) -> dict[str, Tokens]:
    """Returns the places whose last key no other has."""
    named = [place for place in places if place]
    counts = Counter(place[-1] for place in named)
    return {place[-1]: place for place in named if counts[place[-1]] == 1}
