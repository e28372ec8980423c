"""Optimizer leaves follow their parameters, wherever optax nested them.

An optimizer leaf's path is a slot (`0/mu`) and then the path of its parameter,
or a slot alone (`0/count`). Slots are matched between disk and target; what was
found for the parameter, transforms included, is reused for each of its moments.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from functools import cached_property

from orbax_nnx_handler.planning.entries import Entry
from orbax_nnx_handler.planning.leaves import StoredLeaf
from orbax_nnx_handler.planning.paths import Path, canonical
from orbax_nnx_handler.planning.placement import Placement
from orbax_nnx_handler.planning.recipes import reads
from orbax_nnx_handler.planning.roles import Wanted
from orbax_nnx_handler.planning.roots import strip

Tokens = tuple[str, ...]


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
