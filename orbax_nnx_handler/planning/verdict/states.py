"""Optimizer states are read as wholes and in their order (law 8)."""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from functools import cached_property
from typing import NamedTuple

from orbax_nnx_handler.planning.core.paths import (
    Path,
    Tokens,
    canonical,
    is_number,
    render,
    trained_by,
    without_box,
)
from orbax_nnx_handler.planning.core.recipes import Recipe
from orbax_nnx_handler.planning.layouts.layout import FLAX_COLLECTIONS, Placement, says_copy, words_of
from orbax_nnx_handler.planning.target.roles import Wanted
from orbax_nnx_handler.planning.verdict.elements import common_end

_LABELLED = "inner_states"
"""The field of `optax.partition` that holds a state for each label."""

_OWN_PARTS = frozenset({"fast_state", "adv_state", "hessian_fn_state"})
"""Fields of one kind of optax's states alone that hold a further state (lookahead, SAM, Sophia)."""

_CONTAINERS = _OWN_PARTS | {"inner_state", "inner_opt_state", "opt_state", "base_optimizer_state", _LABELLED}
"""Fields of optax's wrappers that hold other states (`optax.transforms`, `optax.contrib`)."""

_RECORDS = frozenset({"hyperparams", "hyperparams_states", "skip_state", "measurement", "info"})
"""Fields of optax's states that hold several scalars by name."""

_BETWEEN = frozenset({"params", "model"})
"""Levels between field and parameter, of an optimizer for a variables dict or a wrapped model."""


class Slot(NamedTuple):
    """A leaf's place in an optimizer: the containers down to its state, and its field there."""

    place: Tokens
    field: Tokens


def slot_of(tokens: Tokens, *, of_moment: bool = False) -> Slot:
    """Returns the place and the field that a canonical path below `opt_state` names.

    Args:
        tokens: The path; with `of_moment`, the part above a parameter's own.
        of_moment: Whether levels between a field and its parameter are left out.
    """
    at, end = 0, len(tokens)
    while at < end and (is_number(tokens[at]) or tokens[at] in _CONTAINERS):
        at += 2 if tokens[at] == _LABELLED else 1
    field = tokens[at:]
    return Slot(tokens[:at], tuple(name for name in field if name not in _BETWEEN) if of_moment else field)


def spelt_alike(wanted: Tokens, stored: Tokens) -> bool:
    """Tells whether two fields are one, whatever stands between them and a parameter, boxed or not."""
    if wanted == stored:
        return True
    here, there = (
        (*field[:1], *(name for name in field[1:] if name not in _BETWEEN)) for field in (wanted, stored)
    )
    return here in (there, there[:-1] if there[-1:] == ("value",) else there)


def labels_of(place: Tokens) -> Tokens:
    """Returns the labels of `optax.partition` in a place."""
    return tuple(place[at + 1] for at, key in enumerate(place[:-1]) if key == _LABELLED)


_Order = list[tuple[bool, int, str]]


def _in_order(place: Tokens) -> _Order:
    return [(is_number(key), int(key[1:]) if is_number(key) else 0, key) for key in place]


_State = tuple[Path, Tokens]
"""An owner and a place."""


class States:
    """Which stored state each wanted one is read from."""

    def __init__(self, wanted: Sequence[Wanted], placed: Mapping[Path, Placement]) -> None:
        self._wanted, self._placed = wanted, placed
        self._pairs: dict[_State, dict[_State, tuple[Path, Path]]] = defaultdict(dict)
        self._with_moments: set[_State] = set()

    def add(self, item: Wanted, stored: Placement, here: Slot, there: Slot, *, is_moment: bool) -> None:
        """Records that a leaf of one state is read from a leaf of another."""
        wanted = (item.owner, here.place)
        if is_moment:
            self._with_moments.add(wanted)
        if stored.slot is None:
            self._pairs[wanted].setdefault((stored.owner, there.place), (item.leaf.path, stored.leaf.path))

    def crossed(self) -> Iterator[tuple[Path, Path, str]]:
        """Yields where one state is read from several, several from one, or in another order; and why."""
        users: dict[_State, list[tuple[Path, Path]]] = defaultdict(list)
        for stored in self._pairs.values():
            for state, leaves in stored.items():
                users[state].append(leaves)
            if len(stored) > 1:
                yield from (
                    (*leaves, "other leaves of its state come from another one") for leaves in stored.values()
                )
        for several in users.values():
            if len(several) > 1:
                yield from ((*leaves, "another state is read from it too") for leaves in several)
        yield from self._of_other_labels()
        yield from self._out_of_order()
        yield from self._with_other_fields()

    @cached_property
    def _every_slot(self) -> Mapping[_State, set[Tokens]]:
        found: dict[_State, set[Tokens]] = defaultdict(set)
        for item in self._placed.values():
            if item.section == "optimizer" and item.slot is None:
                slot = slot_of(canonical(item.path))
                found[item.owner, slot.place].add(slot.field[:1])
        return _with_parts(found)

    @cached_property
    def _wanted_fields(self) -> Mapping[_State, set[Tokens]]:
        found: dict[_State, set[Tokens]] = defaultdict(set)
        for item in self._wanted:
            if item.role == "optimizer":
                slot = slot_of(item.tokens)
                found[item.owner, slot.place].add(slot.field[:1])
        return _with_parts(found)

    def _of_other_labels(self) -> Iterator[tuple[Path, Path, str]]:
        """Yields states that are read from another label's: theirs is stored, or no moment tells it."""
        stored = {state: labels_of(state[1]) for state in self._every_slot}
        wanted = {state: labels_of(state[1]) for state in self._wanted_fields}
        told = {
            (wanted[state], stored[other])
            for state in self._with_moments
            for other in self._pairs.get(state, ())
        }
        for state, others in self._pairs.items():
            for other, leaves in others.items():
                if wanted[state] == stored[other]:
                    continue
                there = {label for at, label in stored.items() if at[0] == other[0] and label}
                here = {label for at, label in wanted.items() if at[0] == state[0] and label}
                if wanted[state] in there:
                    yield *leaves, f"it is the state of {render(stored[other])}"
                elif (wanted[state], stored[other]) not in told and len(here) + len(there) > 1:
                    yield *leaves, f"nothing tells that it is of {render(stored[other] or other[1])}"

    def _out_of_order(self) -> Iterator[tuple[Path, Path, str]]:
        """Yields states of one label whose order differs."""
        alike: dict[object, list[tuple[_Order, _Order, tuple[Path, Path]]]] = defaultdict(list)
        for (owner, place), stored in self._pairs.items():
            for (_, there), leaves in stored.items():
                kind = (owner, labels_of(place), labels_of(there))
                alike[kind].append((_in_order(place), _in_order(there), leaves))
        for states in alike.values():
            ordered = sorted(states, key=lambda state: state[0])
            for before, after in itertools.pairwise(ordered):
                if after[1] < before[1]:
                    yield *after[2], "its chain's states come in another order"

    def _with_other_fields(self) -> Iterator[tuple[Path, Path, str]]:
        """Yields states that are read from a state of another kind, which has other fields too.

        Some of the moments of a state may be wanted alone, but not without what its kind alone holds.
        """
        for wanted, stored in self._pairs.items():
            for state, leaves in stored.items():
                there, here = self._every_slot[state], self._wanted_fields[wanted]
                others = there - here
                if wanted in self._with_moments:
                    others = {field for field in there ^ here if not _OWN_PARTS.isdisjoint(field)}
                if others:
                    yield *leaves, f"its state has {render(min(others))} too"


def _with_parts(fields: Mapping[_State, set[Tokens]]) -> Mapping[_State, set[Tokens]]:
    """Returns the fields of each state, with those that hold a further state of its own."""
    for owner, place in list(fields):
        for at, key in enumerate(place):
            if key in _OWN_PARTS and (owner, place[:at]) in fields:
                fields[owner, place[:at]].add((key,))
    return fields


class Followed(NamedTuple):
    """A network with a weight of a moment's name.

    Attributes:
        is_followed: Whether the moment is made as the weight is.
        source: The network of what the weight reads.
    """

    is_followed: bool
    source: Path


class Trained:
    """Which network each optimizer trains, of those that have the names of its moments.

    It trains one of them: the one that it lies beside, or that it is called after. What it is read
    from has trained the stored network that this one is read from.
    """

    def __init__(self, stored: Set[Path]) -> None:
        """Takes the stored networks, where a rule may have moved weights from one to another."""
        self._stored = stored
        self._moments: dict[Path, list[tuple[Wanted, Placement, Mapping[Path, Followed]]]] = defaultdict(list)

    def add(self, item: Wanted, stored: Placement, networks: Mapping[Path, Followed]) -> None:
        """Records the networks with a weight of a moment's name, by the keys above their weights."""
        self._moments[item.owner].append((item, stored, networks))

    def astray(self) -> Iterator[tuple[Path, Path, str]]:
        """Yields a moment of each optimizer that follows another network than its own; and why."""
        for owner, moments in self._moments.items():
            roots = dict.fromkeys(root for *_, networks in moments for root in networks)
            sources = dict.fromkeys(network.source for *_, of in moments for network in of.values())
            own = trained_by(owner, roots) or list(roots)
            sources = self._stored or sources
            trained = {at: trained_by(at, sources) for at in {stored.owner for _, stored, _ in moments}}
            for item, stored, networks in moments:
                own = [root for root in own if root not in networks or networks[root].is_followed]
                if not own:
                    yield item.leaf.path, stored.leaf.path, "it is made as the weights of another network"
                    break
                there = trained[stored.owner]
                read = {networks[root].source for root in own if root in networks}
                if there and read and read.isdisjoint(there):
                    yield item.leaf.path, stored.leaf.path, f"it is a moment of {render(there[0])}"
                    break


Claim = tuple[Wanted, Recipe]
"""A leaf of the result and what it is made from."""


class StoredNames:
    """The names of the stored parameters, and how the moments of an optimizer may have them."""

    def __init__(self, placed: Mapping[Path, Placement]) -> None:
        self._placed = placed
        self._below: dict[tuple[Path, Path | None, Tokens], Sequence[Tokens]] = {}
        self._others: dict[tuple[Path, Tokens], str] = {}

    @cached_property
    def _parameters(self) -> Set[Tokens]:
        return {canonical(at.path) for at in self._placed.values() if at.section == "model"}

    def ends(self, moment: Placement, name: Tokens) -> Iterator[Tokens]:
        """Yields a parameter's name as its moment may have it.

        The moments of a part of the model may lack the part's own levels, where no other
        parameter has the name that is left, or where the optimizer can only be that part's.
        """
        yield from spellings(name)
        for depth in range(1, len(name)):
            if name[depth:] not in self._parameters or self._is_of_part(moment, name, depth):
                yield from spellings(name[depth:])

    def _is_of_part(self, moment: Placement, name: Tokens, depth: int) -> bool:
        """Tells whether every name beside a moment is a parameter's below its part, and not each without."""
        size, spelt = depth - len(name), spellings(canonical(moment.path))
        above = next((end[:size] for end in spelt if end[size:] == name[depth:]), None)
        if above is None:
            return False
        if len(slot_of((*canonical(moment.slot or ()), *above), of_moment=True).field) > 1:
            return False
        names = self._names_below(moment, above)
        part = [[(*name[:depth], *spelt) for spelt in spellings(below)] for below in names]
        return not any(map(self._parameters.isdisjoint, part)) and any(
            self._parameters.isdisjoint(spellings(below)) for below in names
        )

    def of_another(self, moment: Placement, weight: Placement) -> str:
        """Returns why a moment may be of another network than that of a weight; empty if its name tells.

        Of networks side by side, without collections of Flax's, an optimizer trains the one that is called as
        such (`model`, `net`), or that its own name holds: of `student` and `teacher` it may train either.
        """
        name = _with_field(weight)
        own = name[: len(name) - common_end(name, without_box(_parameter_of(moment)))]
        if weight.collection in FLAX_COLLECTIONS or not any(words_of(level) for level in own):
            return ""
        key = moment.owner, own
        if key not in self._others:
            beside = (at for at in self._placed.values() if at.section == "optimizer")
            names = {without_box(_parameter_of(at)) for at in beside if at.owner == moment.owner} - {()}
            below = {_with_field(at) for at in self._placed.values() if at.section == "model"}
            ends = {tokens[: -len(end)] for tokens in below for end in names if tokens[-len(end) :] == end}
            likely = [at for at in ends if at != own and not any(map(says_copy, at))]
            whole = [at for at in likely if all((*at, *end) in below for end in names)]
            told = trained_by(moment.owner, [own, *whole]) == [own]
            self._others[key] = "" if told or not whole else f"it may be a moment of {render(whole[0])}"
        return self._others[key]

    def _names_below(self, moment: Placement, above: Tokens) -> Sequence[Tokens]:
        """Returns what stands below a field, for all of its moments."""
        key = (moment.owner, moment.slot, above)
        if key not in self._below:
            beside = (
                canonical(at.path)
                for at in self._placed.values()
                if (at.section, at.owner, at.slot) == ("optimizer", moment.owner, moment.slot)
            )
            size = len(above)
            self._below[key] = [path[size:] for path in beside if path[:size] == above and len(path) > size]
        return self._below[key]


def _with_field(weight: Placement) -> Tokens:
    """Returns a weight's name below the field of its train state that holds it, if that is none of Flax's."""
    field = () if weight.collection in (None, *FLAX_COLLECTIONS) else (str(weight.collection),)
    return (*field, *without_box(weight.tokens))


def _parameter_of(moment: Placement) -> Tokens:
    """Returns what a stored moment calls its parameter; nothing for what is none."""
    return slot_of(canonical((*(moment.slot or ()), *moment.path))).field[1:]


def spellings(tokens: Tokens) -> Iterable[Tokens]:
    """Returns a name with and without a box."""
    boxed = len(tokens) > 1 and tokens[-1] == "value"
    return (tokens, tokens[:-1]) if boxed else (tokens,)
