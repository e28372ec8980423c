"""Optimizer leaves follow their parameters, wherever optax nested them.

An optimizer leaf's path is a slot (`0/mu`) and then the path of its parameter,
or a slot alone (`0/count`). Slots are matched between disk and target; what was
found for the parameter, transforms included, is reused for each of its moments.

Optimizer leaves that belong to no parameter, such as `count`: they go where the moments beside them go.
"""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from functools import cached_property

from orbax_nnx_handler.planning.core.leaves import Shape, StoredLeaf
from orbax_nnx_handler.planning.core.paths import Path, Tokens, canonical
from orbax_nnx_handler.planning.core.recipes import reads
from orbax_nnx_handler.planning.layouts.layout import Placement
from orbax_nnx_handler.planning.mapping.roots import strip
from orbax_nnx_handler.planning.rules.entries import Entry
from orbax_nnx_handler.planning.target.roles import Wanted


@dataclasses.dataclass(frozen=True)
class StoredMoments:
    """The stored optimizer state, slot by slot.

    Attributes:
        slots: For each slot the moment of each stored parameter, by the
            parameter's stored path.
        scalars: The leaves that belong to no parameter, by slot.
        count: The step that is every optimizer's count, in a layout whose optimizers
            keep none of their own.
    """

    slots: Mapping[Tokens, Mapping[Path, StoredLeaf]]
    scalars: Mapping[Tokens, StoredLeaf]
    count: StoredLeaf | None = None

    def orphan(self, slot: Tokens, parameter: Tokens) -> StoredLeaf | None:
        """Returns a stored moment whose parameter is not stored, by its own path."""
        return self.scalars.get((*slot, *parameter)) or self.scalars.get((*slot, "params", *parameter))

    @cached_property
    def _tails(self) -> Mapping[str, list[Tokens]]:
        return _by_tail(self.slots)

    def slot(self, wanted: Tokens, all_wanted: Collection[Tokens]) -> Tokens | None:
        """Returns the stored slot of a wanted one: the same, or the only one of that last name."""
        return _choose(wanted, all_wanted, self.slots, self._tails)


@dataclasses.dataclass(frozen=True)
class WantedMoment:
    """A wanted optimizer leaf taken apart; `parameter` is None for a slot alone."""

    wanted: Wanted
    slot: Tokens
    parameter: Tokens | None


def read_moments(placements: Iterable[Placement], parameters: Mapping[Tokens, Path]) -> StoredMoments:
    """Takes the stored optimizer leaves apart.

    Args:
        placements: All placements of the checkpoint.
        parameters: The stored parameters' paths by canonical path within the model.
    """
    slots: dict[Tokens, dict[Path, StoredLeaf]] = defaultdict(dict)
    scalars: dict[Tokens, StoredLeaf] = {}
    count: StoredLeaf | None = None
    for placement in placements:
        if placement.section == "step" and placement.slot == ("count",):
            count = placement.leaf
        if placement.section != "optimizer":
            continue
        slot, parameter = _split_stored(placement, parameters)
        if parameter is None:
            scalars[slot] = placement.leaf
        else:
            slots[slot][parameters[parameter]] = placement.leaf
    return StoredMoments(dict(slots), scalars, count)


def _split_stored(placement: Placement, parameters: Mapping[Tokens, Path]) -> tuple[Tokens, Tokens | None]:
    tokens = canonical(placement.path)
    if placement.slot is not None:
        return canonical(placement.slot), tokens if tokens in parameters else None
    slot, parameter = split(tokens, parameters)
    if parameter is not None and slot[-1:] == ("params",):
        # MaxText's optimizer runs on the whole variables dict: `mu/params/...`.
        slot = slot[:-1]
    if parameter is None and len(slot) > 1 and slot[-1] == "value":
        slot = slot[:-1]
    return slot, parameter


def split(tokens: Tokens, parameters: Collection[Tokens]) -> tuple[Tokens, Tokens | None]:
    """Returns slot and parameter of an optimizer path: the longest end that is a parameter."""
    for at in range(len(tokens)):
        if tokens[at:] in parameters:
            return tokens[:at], tokens[at:]
    return tokens, None


def split_wanted(wanted: Wanted, parameters: Collection[Tokens], root: Tokens) -> WantedMoment:
    """Takes a wanted optimizer leaf apart.

    Args:
        wanted: The leaf.
        parameters: Canonical paths of the target's parameters below the root.
        root: Tokens above the model. The optimizer may have been built for any
            module between the target's root and the model, so an end of the root
            may stand between slot and parameter.
    """
    slot, parameter = split(wanted.tokens, parameters)
    if parameter is not None:
        for start in range(len(root)):
            end = root[start:]
            if slot[-len(end) :] == end:
                slot = slot[: -len(end)]
                break
    return WantedMoment(wanted, slot, parameter)


def split_by_slots(wanted: Wanted, slots: Collection[Tokens]) -> WantedMoment:
    """Takes a leaf apart by the stored slots: for an optimizer without its model."""
    for length in range(len(wanted.tokens) - 1, 0, -1):
        if wanted.tokens[:length] in slots:
            return WantedMoment(wanted, wanted.tokens[:length], wanted.tokens[length:])
    return WantedMoment(wanted, wanted.tokens, None)


def parameter_paths(entries: Iterable[Entry], root: Tokens) -> dict[Tokens, Path]:
    """Returns stored path by canonical path, for stored parameters as they are on disk."""
    found: dict[Tokens, Path] = {}
    for entry in entries:
        (path,) = reads(entry.recipe)
        tokens = entry.tokens
        below = strip(tokens, root)
        found.setdefault(tokens, path)
        if below is not tokens:
            found.setdefault(below, path)
        unboxed = entry.unboxed
        if unboxed is not None:
            found.setdefault(unboxed, path)
            found.setdefault(below[:-1], path)
    return found


def _by_tail(slots: Iterable[Tokens]) -> dict[str, list[Tokens]]:
    found: dict[str, list[Tokens]] = defaultdict(list)
    for slot in slots:
        if slot:
            found[slot[-1]].append(slot)
    return found


def _choose(
    wanted: Tokens,
    all_wanted: Collection[Tokens],
    stored: Collection[Tokens],
    tails: Mapping[str, list[Tokens]],
) -> Tokens | None:
    if wanted in stored:
        return wanted
    if not wanted:
        return None
    rivals = [slot for slot in all_wanted if slot and slot[-1] == wanted[-1]]
    named = tails.get(wanted[-1], [])
    return named[0] if len(named) == 1 and len(rivals) == 1 else None


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
