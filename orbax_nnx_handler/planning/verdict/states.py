"""Optimizer states are read as wholes and in their order (law 8)."""

import itertools
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from functools import cached_property
from typing import NamedTuple

from orbax_nnx_handler.planning.core.paths import (
    Path,
    Tokens,
    canonical,
    is_number,
    render,
    shared_levels,
    trained_by,
)
from orbax_nnx_handler.planning.core.recipes import Read, Recipe, Scale, parts_of, reads, without_arithmetic
from orbax_nnx_handler.planning.layouts.layout import FLAX_COLLECTIONS, Placement, is_copy_level
from orbax_nnx_handler.planning.target.roles import Wanted
from orbax_nnx_handler.planning.verdict.weight_sources import common_end

_LABELLED = "inner_states"
"""The field of `optax.partition` that holds a state for each label."""

_CONTAINERS = frozenset(
    {
        *("inner_state", "inner_opt_state", "opt_state", _LABELLED),
        *("base_optimizer_state", "fast_state", "adv_state", "hessian_fn_state"),
    }
)
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


def _labels(place: Tokens) -> Tokens:
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
        return found

    @cached_property
    def _wanted_fields(self) -> Mapping[_State, set[Tokens]]:
        found: dict[_State, set[Tokens]] = defaultdict(set)
        for item in self._wanted:
            if item.role == "optimizer":
                slot = slot_of(item.tokens)
                found[item.owner, slot.place].add(slot.field[:1])
        return found

    def _of_other_labels(self) -> Iterator[tuple[Path, Path, str]]:
        """Yields states of one label that are read from another's, though theirs is stored."""
        for (_, place), stored in self._pairs.items():
            for (owner, there), leaves in stored.items():
                label = _labels(place)
                if label == _labels(there) or not label:
                    continue
                if any(label == _labels(other) for known, other in self._every_slot if known == owner):
                    yield *leaves, f"it is the state of {render(_labels(there))}"

    def _out_of_order(self) -> Iterator[tuple[Path, Path, str]]:
        """Yields states of one label whose order differs."""
        alike: dict[object, list[tuple[_Order, _Order, tuple[Path, Path]]]] = defaultdict(list)
        for (owner, place), stored in self._pairs.items():
            for (_, there), leaves in stored.items():
                kind = (owner, _labels(place), _labels(there))
                alike[kind].append((_in_order(place), _in_order(there), leaves))
        for states in alike.values():
            ordered = sorted(states, key=lambda state: state[0])
            for before, after in itertools.pairwise(ordered):
                if after[1] < before[1]:
                    yield *after[2], "its chain's states come in another order"

    def _with_other_fields(self) -> Iterator[tuple[Path, Path, str]]:
        """Yields states without moments that are read from a state which has other fields too."""
        for wanted, stored in self._pairs.items():
            for state, leaves in stored.items() if wanted not in self._with_moments else ():
                others = self._every_slot[state] - self._wanted_fields[wanted]
                if others:
                    yield *leaves, f"its state has {render(min(others))} too"


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


class _Made(NamedTuple):
    """A weight of the result.

    Attributes:
        name: Its path.
        read: The name of what a rule reads it from, where another stored leaf has its own; else None.
        is_changed: Whether a rule does more to it than to add a constant.
        item: The weight.
    """

    name: Tokens
    read: Tokens | None
    is_changed: bool
    item: Wanted

    def is_trained(self, network: Tokens) -> bool:
        """Tells whether it is neither a statistic nor in a copy below the network whose keys are given."""
        levels = map(str, self.name[len(network) :])
        return self.item.collection not in FLAX_COLLECTIONS[1:] and not any(map(is_copy_level, levels))

    def is_unlike(self, moment: Tokens) -> bool:
        """Tells whether a moment's stored name is not that of what is read, or that of the weight as well."""
        return self.read is not None and common_end(moment, self.read) <= common_end(moment, self.name)


REPLACED = "a rule has replaced the weights that it was kept for"
"""Why nothing that has trained other weights is read."""

Claim = tuple[Wanted, Recipe]
"""A leaf of the result and what it is made from."""

_Kept = tuple[int, Path, Path, str]
"""A law, a leaf that breaks it, what that is read from, and why."""


class ReplacedWeights:
    """What an optimizer keeps of weights that a rule has replaced by others is read no more (laws 3 and 8).

    Where a rule exchanges two networks, or drops one and makes another one take its name, what lies at an
    optimizer's own path has trained other weights than the ones that it would train from now on. The
    optimizer's weights are those of its moments' names, and of these the ones that it lies beside or is
    called after; where nothing tells, all of them. What a rule names is at the rule's word.
    """

    def __init__(
        self,
        weights: Sequence[tuple[Wanted, Recipe, object]],
        placed: Mapping[Path, Placement],
        by_rule: Set[Path],
        called: Mapping[Path, Set[Tokens]],
        wanted: Sequence[Wanted],
    ) -> None:
        """Takes what the result is made from, what rules name, and which owners they give to optimizers."""
        self._placed, self._by_rule, self._called, self._wanted = placed, by_rule, called, wanted
        some = (item for item in wanted if item.role in ("optimizer", "step")) if called else ()
        self._owners = {canonical(item.owner) for item in some}
        self._made: dict[Tokens, _Made] = {}
        self._by_end: dict[Tokens, list[Tokens]] = defaultdict(list)
        if not by_rule or all(by_rule.isdisjoint(reads(recipe)) for _, recipe, _ in weights):
            return  # Nearly every plan.
        whole = {path: canonical(path) for path in placed}
        models = {path: item for path, item in placed.items() if item.section == "model"}
        names = whole | {at: canonical(item.owner) + item.tokens for at, item in models.items()}
        owners = {canonical(item.owner) for item in models.values()} - {()}
        level = len(shared_levels([names[path] for path in models], 1))
        stored = {name[at:]: at for name in (*whole.values(), *names.values()) for at in range(level + 1)}
        above = len(shared_levels([canonical(item.leaf.path) for item, _, _ in weights], 1))
        for item, recipe, _ in weights:
            name, read = canonical(item.leaf.path), reads(recipe)
            own = {each[path][at:] for path in read for each in (names, whole) for at in range(level + 1)}
            spelt = [name[at:] for at in range(above + 1)]
            is_moved = not by_rule.isdisjoint(read) and own.isdisjoint(spelt)
            home = max((at for at in owners if name[: len(at)] == at), key=len, default=None)
            is_own = home in (None, *(canonical(placed[path].owner) for path in read))
            found = next((at for at in range(above + 1) if spelt[at] in stored), None)
            source = names[read[0]] if is_moved and not (found is None and is_own) else None
            if source is not None and found is not None:
                source = name[:found] + source[stored[spelt[found]] :]
            self._made[name] = _Made(name, source, _is_changed(recipe), item)
            for at in range(len(name)):
                self._by_end[name[at:]].append(name)
        if not any(made.read is not None or made.is_changed for made in self._made.values()):
            self._made.clear()

    def kept(self, leaves: Iterable[tuple[Wanted, Recipe, object]]) -> Iterator[_Kept]:
        """Yields what is read of an optimizer though its weights were replaced."""
        by_part: dict[tuple[Path, Tokens], list[Claim]] = defaultdict(list)
        for item, recipe, _ in leaves if self._made or self._called else ():
            by_part[item.owner, _labels_of(item)].append((item, recipe))
            if any(self._is_called_otherwise(canonical(item.owner), path) for path in reads(recipe)):
                yield 3, item.leaf.path, reads(recipe)[0], "a rule calls it otherwise"
        names: dict[tuple[Path, Tokens], set[Tokens]] = defaultdict(set)
        for item in self._wanted if self._made else ():
            name = _name_of(item)
            if name and name[-1:] in self._by_end:
                for labels in ((), _labels_of(item)):
                    names[item.owner, labels].add(name)
        for (owner, labels), some in by_part.items() if self._made else ():
            known = names.get((owner, labels), set[Tokens]())
            yield from self._kept_by(self._trained(labels[-1:] or canonical(owner), known), known, some)

    def _is_called_otherwise(self, owner: Tokens, path: Path) -> bool:
        """Tells whether a rule gives a leaf to another wanted optimizer."""
        called = self._called.get(path, set[Tokens]())
        others = [at for at in called if not _is_part(owner, at)]
        return 0 < len(called) == sum(any(_is_part(own, at) for own in self._owners) for at in others)

    def _kept_by(
        self, trained: Mapping[Tokens, Mapping[Tokens, _Made]], known: Set[Tokens], leaves: Sequence[Claim]
    ) -> Iterator[_Kept]:
        is_replaced = any(_are_others(made.values()) for made in trained.values())
        for item, recipe in leaves:
            path, read, name = item.leaf.path, reads(recipe), _name_of(item)
            if not read or not self._by_rule.isdisjoint(read):
                continue
            if name not in known:
                if is_replaced:
                    yield 3, path, read[0], REPLACED
                continue
            there = self._placed[read[0]]
            some = [network[at + name] for at, network in trained.items() if at + name in network]
            is_known = len(some) == len(trained) == 1
            for made in some or [self._made[at] for at in self._like(name)]:
                is_raw = isinstance(recipe, Read) and made.item.leaf.shape == item.leaf.shape and not is_known
                if made.is_unlike(canonical(there.slot or ()) + there.tokens) or (made.is_changed and is_raw):
                    yield 8, path, read[0], REPLACED
                    break

    def _like(self, name: Tokens) -> Sequence[Tokens]:
        """Returns the weights that have the longest end of a moment's name."""
        return next(self._by_end[name[at:]] for at in range(len(name)) if name[at:] in self._by_end)

    def _trained(self, owner: Tokens, names: Set[Tokens]) -> Mapping[Tokens, Mapping[Tokens, _Made]]:
        """Returns the weights of each network that an optimizer may train, by its keys and theirs."""
        some = next(iter(names), None)
        heads: list[Tokens] = [at[: len(at) - len(some)] for at in self._by_end.get(some, ())] if some else []
        heads = [head for head in heads if all(head + name in self._made for name in names)]
        if heads:
            trained = {head: {head + name: self._made[head + name] for name in names} for head in heads}
        else:  # Without moments, or where they have names of their own.
            level = len(shared_levels([*self._made], 1))
            above = [at for at in (owner, owner[:-1]) if at or not owner]
            beside = [at for at in above if any(name[: len(at)] == at for name in self._made)]
            heads = beside[:1] or list(dict.fromkeys(name[: level + 1] for name in self._made))
            below = {at: {n: w for n, w in self._made.items() if n[: len(at)] == at} for at in heads}
            trained = {
                at: {n: w for n, w in ws.items() if w.is_trained(at)} or ws for at, ws in below.items()
            }
        named = trained_by(owner, heads)
        return {at: made for at, made in trained.items() if len(named) != 1 or at in named}


def _is_part(one: Tokens, other: Tokens) -> bool:
    """Tells whether one owner is the other one, above or below levels of either side."""
    short, long = sorted((one, other), key=len)
    return short in (long[: len(short)], long[len(long) - len(short) :])


def _are_others(weights: Collection[_Made]) -> bool:
    """Tells whether weights come from others than those that were trained at their paths."""
    return {made.read or made.name for made in weights}.isdisjoint(made.name for made in weights)


def _labels_of(item: Wanted) -> Tokens:
    return _labels(slot_of(item.tokens).place) if item.role == "optimizer" else ()


def _name_of(item: Wanted) -> Tokens:
    """Returns a moment's name of its parameter; nothing for what is none."""
    return slot_of(item.tokens).field[1:] if item.role == "optimizer" else ()


def _is_changed(recipe: Recipe) -> bool:
    """Tells whether a rule does more to what is read than to add a constant."""
    if any(isinstance(part, Scale) for part in parts_of(recipe)):
        return True
    return not isinstance(without_arithmetic(recipe), Read)


class StoredNames:
    """The names of the stored parameters, and how the moments of an optimizer may have them."""

    def __init__(self, placed: Mapping[Path, Placement]) -> None:
        self._placed = placed
        self._below: dict[tuple[Path, Path | None, Tokens], Sequence[Tokens]] = {}

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


def spellings(tokens: Tokens) -> Iterable[Tokens]:
    """Returns a name with and without a box."""
    boxed = len(tokens) > 1 and tokens[-1] == "value"
    return (tokens, tokens[:-1]) if boxed else (tokens,)
