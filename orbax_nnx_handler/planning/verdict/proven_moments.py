"""A moment takes its parameter's recipe, in the field of its name (law 8).

What is read is compared step by step with what the parameter is read from. Moments
that an optimizer has factored lack one axis, in every step alike.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from functools import cached_property
from typing import NamedTuple

import numpy as np

from orbax_nnx_handler.planning.core.leaves import COPIES, FACTORED, OF_GRADIENTS, UNUSED, Shape
from orbax_nnx_handler.planning.core.paths import Path, Tokens, canonical, render
from orbax_nnx_handler.planning.core.recipes import (
    Concat,
    Fill,
    Index,
    Read,
    Recipe,
    Reshape,
    Scale,
    Slice,
    Stack,
    Transpose,
    computes,
    parts_of,
    reads,
    without_arithmetic,
)
from orbax_nnx_handler.planning.layouts.layout import Placement, network_of, several
from orbax_nnx_handler.planning.target.roles import Wanted
from orbax_nnx_handler.planning.verdict.elements import Chain, read_and_steps
from orbax_nnx_handler.planning.verdict.states import (
    Claim,
    Followed,
    Slot,
    States,
    StoredNames,
    Trained,
    slot_of,
    spellings,
    spelt_alike,
)

_SAMPLES = 16
"""How many moments are looked at where the first one's weight is not in the result."""


class _Moment(NamedTuple):
    """A stored leaf as a moment of a stored parameter: what stands above the parameter's name."""

    stored: Path
    above: Tokens


_Weight = tuple[Wanted, Recipe, Path | None]
"""A weight of the result, what it is made from, and the keys of what it reads, if it reads one leaf."""

_FIRST_ROWS = 16
_NO_KEYS: Path = (object(),)  # No path has them.


class _Columns:
    """Leaves attribute by attribute: so memory answers several times faster than leaf by leaf."""

    def __init__(self, leaves: Sequence[tuple[Wanted, Recipe, object]], chains: Sequence[Chain]) -> None:
        self.paths = [item.leaf.path for item, _, _ in leaves]
        self.shapes = [item.leaf.shape for item, _, _ in leaves]
        self.reads = [read for read, _ in chains]
        self.steps = [steps for _, steps in chains]


class ProvenMoments:
    """Proves what the leaves of optimizers are made from.

    Attributes:
        states: Which states were read from which.
        owners: The stored owners that each wanted one reads from, leaves that a rule moved left out.
        orphans: Leaves whose parameter is not in the result.
    """

    def __init__(
        self,
        leaves: Sequence[tuple[Wanted, Recipe, object]],
        weights: Sequence[tuple[Wanted, Recipe, object]],
        wanted: Sequence[Wanted],
        placed: Mapping[Path, Placement],
        by_rule: Set[Path],
        chains: tuple[Sequence[Chain], Sequence[Chain]],
    ) -> None:
        self._leaves, self._placed, self._by_rule = leaves, placed, by_rule
        self._moments, self._made = _Columns(leaves, chains[0]), _Columns(weights, chains[1])
        own = [None if path is None else placed[path].path for path in self._made.reads]
        self._own = [_NO_KEYS if keys is None else keys for keys in own]
        self._weights = [(item, made, keys) for (item, made, _), keys in zip(weights, own, strict=True)]
        depths = {at for owner, of in _by_owner(leaves) for at in _depths(owner, of, self._weights)}
        self._by_key = _by_key(depths, self._weights)
        # In the order of the weights, where no two of them have the same keys.
        is_plain = len(depths) == 1 and len(self._by_key) == len(self._weights)
        self._in_order = list(self._by_key) if is_plain else []
        self._last: tuple[Path, Path, Path] = ((), (), ())
        self._networks = frozenset[Path]() if by_rule.isdisjoint(self._made.reads) else several(placed)
        self.states, self._names = States(wanted, placed), StoredNames(placed)
        self._trained = Trained(self._networks)
        self.owners: dict[Path, set[Path]] = defaultdict(set)
        self.orphans: list[Claim] = []

    def astray(self) -> Iterator[tuple[int, Path, Path, str]]:
        """Yields each leaf that is another parameter's or another field's: law, it, what it reads, why."""
        for item, recipe in self._unlike():
            law, why = self._why(item, recipe)
            if why:
                yield law, item.leaf.path, reads(recipe)[0], why
        for path, stored, why in (*self.states.crossed(), *self._trained.astray()):
            yield 8, path, stored, why

    def _unlike(self) -> Iterator[Claim]:
        """Yields the leaves that have not the keys of a parameter, in a field that is known: few.

        To be read in the loop that proves them: fields become known there, each in the parameters' order.
        """
        number = 0
        while number < len(self._leaves):
            item, recipe, _ = self._leaves[number]
            if not self._is_in_known_field(item, recipe):
                yield item, recipe
            number += 1
            found = self._found(item)
            if self._in_order and len(found) == 1:
                _, slot, below = self._last
                above = item.leaf.path[: len(item.leaf.path) - len(item.path) + len(slot)]
                number += self._proven(number, found[0] + 1, above, below)

    def _proven(self, first: int, at: int, above: Path, below: Path) -> int:
        """Returns how many leaves from one on are the moments of the weights from one on, made as they are.

        The keys of a weight stand below `above` in the field, and below `below` in the stored one.
        """
        moments, made, number, size = self._moments, self._made, first, _FIRST_ROWS
        while count := min(size, len(moments.paths) - number, len(self._in_order) - at):
            some, of = slice(number, number + count), slice(at, at + count)
            like = min(
                _alike(moments.paths[some], [above + keys for keys in self._in_order[of]]),
                _alike(moments.shapes[some], made.shapes[of]),
                _alike(moments.steps[some], made.steps[of]),
                _alike(moments.reads[some], [below + keys for keys in self._own[of]]),
            )
            number, at, size = number + like, at + like, 2 * size
            if like < count:
                break
        return number - first

    def _found(self, item: Wanted) -> Sequence[int]:
        """Returns the weights whose keys a leaf of the known field has."""
        owner, above, _ = self._last
        depth = len(above)
        if self._networks or not depth or item.path[:depth] != above or item.owner != owner:
            return ()
        return self._by_key.get(item.path[depth:], ())

    def _is_in_known_field(self, item: Wanted, recipe: Recipe) -> bool:
        found = self._found(item)
        if len(found) != 1:
            return False
        (at,), (read, steps) = found, read_and_steps(recipe)
        alike = item.leaf.shape == self._made.shapes[at] and steps == self._made.steps[at]
        return alike and read == self._last[2] + self._own[at]

    def _why(self, item: Wanted, recipe: Recipe) -> tuple[int, str]:
        stored = [self._placed[path] for path in dict.fromkeys(reads(recipe))]
        whole = canonical(item.leaf.path)
        if self._by_rule.isdisjoint(reads(recipe)):
            self.owners[item.owner].update(placed.owner for placed in stored)
        if all(placed.section == "aux" and canonical(placed.path) == whole for placed in stored):
            return 9, ""  # Kept aside under its own path.
        if any(placed.section not in ("optimizer", "step") for placed in stored):
            return 9, "it is no part of an optimizer"
        if any(placed.section == "step" for placed in stored):
            is_count = stored[0].slot == ("count",) and item.tokens[-1:] == ("count",)
            return 9, "" if is_count and isinstance(recipe, Read) else "it is the step"
        return 8, self._why_not_its_own(item, recipe, stored)

    def _why_not_its_own(self, item: Wanted, recipe: Recipe, stored: Sequence[Placement]) -> str:
        here = slot_of(item.tokens)
        if len(here.field) == 1 and isinstance(recipe, Read) and self._has_name(item, here, stored[0]):
            return ""  # A scalar of a state, also where a parameter has its name.
        candidates = list(self._candidates(item))
        reasons = [self._why_not_of(item, recipe, at, claim) for at, claim in candidates]
        if "" in reasons:
            return self._of_networks(item, candidates, reasons, stored[0])
        if reasons and len(here.field) > 1:
            return next((why for why in reasons if why.startswith("it is ")), reasons[0])
        if isinstance(recipe, Read) and self._has_name(item, here, stored[0]):
            return ""
        if len(here.field) > 1 and not reasons:
            return self._why_no_orphan(item, recipe, here, stored)
        return f"its name there is {render(canonical(stored[0].path))}"

    def _of_networks(
        self, item: Wanted, claims: list[tuple[int, _Weight]], reasons: list[str], stored: Placement
    ) -> str:
        networks = dict[Path, Followed]()  # Those that have a weight of the moment's name.
        is_own = not self._by_rule and canonical(stored.leaf.path) == canonical(item.leaf.path)
        for (at, (weight, made, _)), why in zip(claims, reasons, strict=True) if not is_own else ():
            size = len(item.path) - at if at > 0 else -at
            source = next((network_of(self._placed[path], size) for path in reads(made)), ())
            networks[weight.leaf.path[:-size]] = Followed(not why, source)
        if len(networks) > 1 or self._networks:
            self._trained.add(item, stored, networks)
        made = (reads(made)[0] for (_, (_, made, _)), why in zip(claims, reasons, strict=True) if not why)
        return "" if is_own else min(self._names.of_another(stored, self._placed[path]) for path in made)

    def _why_no_orphan(self, item: Wanted, recipe: Recipe, here: Slot, stored: Sequence[Placement]) -> str:
        """Returns why a moment of an unknown parameter is in another field; empty if its name is open."""
        for placed in stored:
            there = slot_of(canonical((*(placed.slot or ()), *placed.path)))
            if there.field[:1] != here.field[:1]:
                return f"it is {render(there.field[:1])}, not {render(here.field[:1])}"
            self.states.add(item, placed, here, there, is_moment=True)
        self.orphans.append((item, recipe))
        return ""

    def _candidates(self, item: Wanted) -> Iterator[tuple[int, _Weight]]:
        """Yields the weights whose moment a leaf may be, with where their names begin in the leaf's keys."""
        path, tokens = item.path, item.tokens
        keys = [(at, number) for at in range(1, len(path)) for number in self._by_key.get(path[at:], ())]
        found = [(at, self._weights[number]) for at, number in keys if _is_below_field(canonical(path[:at]))]
        yield from found
        for at in range(1, len(tokens)) if not found else ():
            if tokens[at:] in self._by_name and _is_below_field(tokens[:at]):
                yield from ((at - len(tokens), claim) for claim in self._by_name[tokens[at:]])

    @cached_property
    def _by_name(self) -> Mapping[Tokens, Sequence[_Weight]]:
        """The weights by the ends of their canonical paths."""
        found: dict[Tokens, list[_Weight]] = {}
        for claim in self._weights:
            for depth in range(min(len(claim[0].tokens), 3)):
                found.setdefault(claim[0].tokens[depth:], []).append(claim)
        return found

    def _why_not_of(self, item: Wanted, recipe: Recipe, at: int, claim: _Weight) -> str:
        """Returns why a leaf is no moment of a weight that its name allows; empty if it is one."""
        above = canonical(item.path[:at]) if at > 0 else item.tokens[:at]
        here = slot_of(above, of_moment=True)
        follower = _Follower(self._placed, here.field[-1:], self._names)
        scaled = any(isinstance(part, Scale) for part in parts_of(claim[1]))
        if scaled or not follower.follows(item, recipe, *claim[:2]):
            return "it is the moment of another parameter, or made otherwise than its parameter"
        alike = {(self._placed[moment.stored].owner, moment.above) for moment in follower.moments}
        for _, stored in alike:
            there = slot_of(stored, of_moment=True)
            if not (here.field == there.field or {*here.field[-1:], *there.field[-1:]} <= {*FACTORED}):
                return f"it is {render(there.field)}, not {render(here.field)}"
        if len(alike) > 1:
            return "its layers come from several states"
        for moment in follower.moments[:1]:
            placed = self._placed[moment.stored]
            self.states.add(item, placed, here, slot_of(moment.above, of_moment=True), is_moment=True)
            self._learn(item, at, recipe, claim)
        return ""

    def _learn(self, item: Wanted, at: int, recipe: Recipe, weight: _Weight) -> None:
        """Keeps the keys above a moment, so that the next one of the field is known by them."""
        path, below = read_and_steps(recipe)[0], weight[2]
        if at > 0 and path is not None and below and path[-len(below) :] == below:
            self._last = item.owner, item.path[:at], path[: -len(below)]

    def _has_name(self, item: Wanted, here: Slot, stored: Placement) -> bool:
        """Tells whether a stored leaf is the same field, parameter included, of the state it lies in."""
        there = slot_of(canonical(stored.slot or ()) + canonical(stored.path))
        if not spelt_alike(here.field, there.field):
            return False
        self.states.add(item, stored, here, there, is_moment=len(item.leaf.shape) > 0)
        return True


def _alike(some: Sequence[object], others: Sequence[object]) -> int:
    """Returns how many of the first of two columns are the same."""
    pairs = zip(some, others, strict=True)
    return len(some) if some == others else [one == other for one, other in pairs].index(False)


def _by_owner(leaves: Sequence[tuple[Wanted, Recipe, object]]) -> Iterable[tuple[Path, Sequence[Path]]]:
    """Returns each optimizer's owner, and the paths of its leaves."""
    found: dict[Path, list[Path]] = defaultdict(list)
    for item, _, _ in leaves:
        found[item.owner].append(item.path)
    return found.items()


def _by_key(depths: Iterable[int], weights: Sequence[_Weight]) -> Mapping[Path, Sequence[int]]:
    """Returns the numbers of the weights by the end of their paths that a moment has."""
    found: dict[Path, tuple[int, ...]] = {}
    for depth in depths:
        keys = [item.leaf.path[depth:] for item, _, _ in weights]
        if not found and len(set(keys)) == len(keys):
            found = {key: (number,) for number, key in enumerate(keys)}  # Nearly every model.
            continue
        for number, key in enumerate(keys):
            found[key] = (*found.get(key, ()), number)
    return found


def _depths(owner: Path, moments: Sequence[Path], weights: Sequence[_Weight]) -> set[int]:
    """Returns how many keys weights have in front of what they share with moments of their own: one tells."""
    if owner[:-1]:  # A weight beside the optimizer comes first.
        weights = [item for item in weights if item[0].leaf.path[: len(owner) - 1] == owner[:-1]] or weights
    best: set[int] = {0}
    longest = 0
    for moment in (max(moments, key=len), *moments[:: len(moments) // _SAMPLES + 1]):
        end = moment[-longest:] if longest else ()
        for item, _, _ in weights:
            path = item.leaf.path
            if longest and path[-longest:] != end:
                continue
            if longest:
                best.add(len(path) - longest)
            while longest < min(len(path), len(moment) - 1) and path[-longest - 1] == moment[-longest - 1]:
                longest += 1
                best, end = {len(path) - longest}, moment[-longest:]
        above = canonical(moment[: len(moment) - longest])
        if len(slot_of(above, of_moment=True).field) == 1:
            break
    return best


def _is_below_field(above: Tokens) -> bool:
    """Tells whether nothing but a field, and what may stand below one, is above a parameter's name."""
    return len(slot_of(above, of_moment=True).field) < 2


def wanted_as_weight(item: Wanted) -> Wanted:
    """Returns a wanted moment as if it were its parameter."""
    return dataclasses.replace(item, role="model", path=_parameter(slot_of(item.tokens)), owner=())


def stored_as_weight(item: Placement) -> Placement:
    """Returns a stored moment as if it were its parameter, in a collection of its state and field."""
    slot = slot_of(canonical((*(item.slot or ()), *item.path)))
    collection = "/".join((*slot.place, *slot.field[:1]))
    return dataclasses.replace(item, section="model", collection=collection, path=_parameter(slot), slot=None)


def _parameter(slot: Slot) -> Path:
    below = slot.field[1:]
    return below[1:] if below[:1] == ("params",) else below


class _Follower:
    """Compares what a moment is made from with what its parameter is made from."""

    def __init__(self, placed: Mapping[Path, Placement], field: Tokens, names: StoredNames) -> None:
        self._placed, self._field, self._names = placed, field[0] if field else "params", names
        self.moments: list[_Moment] = []
        self._above: Path = ()

    def follows(self, item: Wanted, made: Recipe, weight: Wanted, parameter: Recipe) -> bool:
        """Tells whether each step of the one is that of the other."""
        kind = COPIES if computes(made) else OF_GRADIENTS
        if computes(made) > computes(parameter) or (computes(parameter) and self._field not in kind):
            return False
        made, parameter = without_arithmetic(made), without_arithmetic(parameter)
        if isinstance(made, Read) and (isinstance(parameter, Read) or self._is_one(item, weight, parameter)):
            return any(self._is_moment(made.path, path, None) for path in dict.fromkeys(reads(parameter)))
        if item.leaf.shape == weight.leaf.shape and self._steps(made, parameter, None):
            return True
        lost = _lost_axes(weight.leaf.shape, item.leaf.shape, self._field)
        return any(self._steps(made, parameter, axis) for axis in lost)

    def _is_one(self, item: Wanted, weight: Wanted, parameter: Recipe) -> bool:
        """Tells whether a moment may be one value: of no use, or of the stored parameter as a whole."""
        shapes = [self._placed[path].leaf.shape for path in dict.fromkeys(reads(parameter))]
        unused = self._field in UNUSED and (1,) not in (weight.leaf.shape, *shapes)  # Those are in use.
        whole = [*map(math.prod, shapes)] == [math.prod(weight.leaf.shape)]
        return (unused and item.leaf.shape == (1,)) or (whole and math.prod(item.leaf.shape) == 1)

    def _steps(self, made: Recipe, parameter: Recipe, lost: int | None) -> bool:
        """Tells whether two recipes have the same steps, where the one's value may lack an axis."""
        match made, parameter:
            case Fill(), _:
                return True
            case Read(path), Read(of):
                return self._is_moment(path, of, lost)
            case Index(source, axis, index), Index(other, of_axis, of_index):
                inner = None if lost is None else lost + (lost >= of_axis)
                same = index == of_index and axis == of_axis - _before(inner, of_axis)
                return same and self._steps(source, other, inner)
            case Slice(source, axis), Slice(other, of_axis):
                part, of_part = (made.start, made.size), (parameter.start, parameter.size)
                same = part == of_part and lost != of_axis and axis == of_axis - _before(lost, of_axis)
                return same and self._steps(source, other, lost)
            case (Stack(), Stack()) | (Concat(), Concat()):
                return self._joined(made, parameter, lost)
            case Transpose(source, order), Transpose(other, of_order):
                inner = None if lost is None else of_order[lost]
                kept = tuple(axis - _before(inner, axis) for axis in of_order if axis != inner)
                return order == kept and self._steps(source, other, inner)
            case Reshape(source, shape), Reshape(other, of_shape):
                return lost is None and shape == of_shape and self._steps(source, other, None)
            case _:
                return False

    def _joined(self, made: Stack | Concat, parameter: Stack | Concat, lost: int | None) -> bool:
        if lost == parameter.axis or len(made.sources) != len(parameter.sources):
            return False
        added = isinstance(made, Stack) and lost is not None and lost > parameter.axis
        inner = None if lost is None else lost - added
        parts = zip(made.sources, parameter.sources, strict=True)
        same = made.axis == parameter.axis - _before(lost, parameter.axis)
        return same and all(self._steps(part, other, inner) for part, other in parts)

    def _is_moment(self, stored: Path, parameter: Path, lost: int | None) -> bool:
        """Tells whether a stored leaf has the name of a stored parameter below a field."""
        moment, placed = self._placed[stored], self._placed[parameter]
        if self._above and lost is None and stored == self._above + placed.path:
            return True  # As the layer before it.
        if lost is not None:
            slot = (*(moment.slot or ()), *moment.path)
            field = next((name for name in FACTORED if name in slot), "")
            if lost not in _lost_axes(placed.leaf.shape, moment.leaf.shape, field):
                return False
        tokens, name = canonical(moment.path), canonical(placed.path)
        for end in self._names.ends(moment, name):
            for whole in spellings(tokens):
                if moment.slot is not None and whole == end:
                    self.moments.append(_Moment(stored, canonical(moment.slot)))
                    return True
                if moment.slot is None and whole[-len(end) :] == end:
                    self.moments.append(_Moment(stored, whole[: -len(end)]))
                    size = len(placed.path)
                    self._above = stored[:-size] if stored[-size:] == placed.path else ()
                    return True
        return False


def _before(axis: int | None, other: int) -> int:
    return int(axis is not None and axis < other)


def _lost_axes(parameter: Shape, moment: Shape, field: str) -> Sequence[int]:
    """Returns the axes whose loss explains a moment's shape: of a factored one the one that optax chose."""
    order = [int(axis) for axis in np.argsort(parameter)[::-1]]
    possible = [axis for axis in order if (*parameter[:axis], *parameter[axis + 1 :]) == moment]
    rank = FACTORED.index(field) if field in FACTORED else len(order)
    return [order[rank]] if rank < len(order) and order[rank] in possible else possible
