"""Which stored part is which wanted one, within one block or one remainder of a model."""

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

from orbax_nnx_handler.planning.core.folding import Homes, lies_within
from orbax_nnx_handler.planning.core.leaves import with_fields
from orbax_nnx_handler.planning.core.paths import ascend, ranks_of, same_modules
from orbax_nnx_handler.planning.likeness import (
    by_first_letters,
    elsewhere,
    have_one_name,
    norms_told,
)
from orbax_nnx_handler.planning.likeness.arrangements import beside_turned
from orbax_nnx_handler.planning.likeness.assignment import (
    Fit,
    across_networks,
    are_unlike,
    beside_namesakes,
    displaced,
    fit_of,
    may_be,
    sizes_of_few,
)
from orbax_nnx_handler.planning.likeness.highest_sums import MOST_PAIRS, Table, components, merged
from orbax_nnx_handler.planning.likeness.joined_parts import either_way, gated, joined_parts
from orbax_nnx_handler.planning.likeness.links import (
    Findings,
    Link,
    PairGrounds,
    Tie,
    Undecided,
    together,
)
from orbax_nnx_handler.planning.likeness.module_parts import ModulePart, without_place
from orbax_nnx_handler.planning.likeness.named_parts import NamedPart, are_counted, in_order, named_parts
from orbax_nnx_handler.planning.likeness.vocabulary import (
    MARGIN,
    PARAMETER,
    STRONG,
    Names,
    in_strict_order,
    last_of_block,
    likeness,
)
from orbax_nnx_handler.planning.suggesting.questions import tie_of
from orbax_nnx_handler.planning.suggesting.whole_modules import exchanged

Created = Callable[[ModulePart], tuple[int, ...] | None]
"""The place of a wanted part in the order of creation, where it is known."""
Known = Callable[[Names, Names], int]
"""How much of what is known elsewhere speaks for a wanted and a stored part."""

_TOLD, _PRECEDENT = 2.0, 1.0
"""Of a module that another matrix in it tells; enough to decide between pairs of which nothing else tells."""

_Found = list[tuple[int, int, PairGrounds]]
_Choice = list[tuple[int, int]]
_Group = set[tuple[int, int]]


def match_parts(
    wanted: Sequence[ModulePart],
    stored: Sequence[ModulePart],
    above: tuple[Sequence[str], Sequence[str]] = ((), ()),
    created: Created = lambda _: None,
    known: Known = lambda _wanted, _stored: 0,
    partial: Sequence[Collection[Names]] = ((), ()),
) -> Findings:
    """Matches the parts of a context.

    Args:
        wanted: The wanted parts.
        stored: The stored ones.
        above: The names that lead to the context on either side.
        created: The place of a wanted part in the order of creation, or None.
        known: How much of what is known elsewhere speaks for a pair.
        partial: Modules of either side that hold more than these parts.
    """
    if are_unlike(wanted, stored, above):
        return Findings()  # As of another model.
    ours, theirs = named_parts(wanted, above[0]), named_parts(stored, above[1])
    links, ties, left, right = joined_parts(ours, theirs)
    ties += [*gated(left, right, split=False), *gated(right, left, split=True)]
    pairs = _Pairs((left, right), known, partial, is_outermost=not any(above))
    found, more = pairs.settle(created)
    links += [link for pair in found for link in pairs.links(*pair)]
    modules = {(left[one].part.module, right[other].part.module) for one, other, _ in found}
    return Findings(links=links, ties=[*ties, *either_way(left, right, modules), *more])


class _Pairs:
    """The possible pairs of a context, and which of them nothing else can be."""

    def __init__(
        self,
        sides: Sequence[Sequence[NamedPart]],
        known: Known,
        partial: Sequence[Collection[Names]],
        *,
        is_outermost: bool,
    ) -> None:
        self._wanted, self._stored = wanted, stored = sides
        self._partial, self._fits = partial, dict[tuple[int, int], Fit]()
        self._parts = [[role.part for role in side] for side in sides]
        self._excluded, self._known = set[tuple[int, int]](), set[tuple[int, int]]()
        self._homes = Homes(*([role.part.names for role in side] for side in (wanted, stored)))
        sizes: dict[int, list[int]] = defaultdict(list)
        for to, other in enumerate(stored):
            sizes[other.part.main_size].append(to)
        few = sizes_of_few(Counter(x.part.main_size for x in side) for side in sides)
        for at, one in enumerate(wanted):
            for to in sizes[one.part.main_size] if one.part.main_size in few else ():
                if (fit := fit_of(one, stored[to])) and may_be(fit, one, stored[to]):
                    self._fits[at, to] = fit
                    if told := known(one.part.names, stored[to].part.names):
                        self._fits[at, to] = with_fields(fit, score=fit.score + _PRECEDENT * told)
                        self._known.add((at, to))
                elif fit is not None:
                    self._excluded.add((at, to))
        self._exclude([*beside_namesakes(self._fits, wanted, stored)])
        self._exclude(beside_turned(self._fits, wanted, stored))
        self._exclude(without_place(self._fits, self._parts))
        modules, held = self._modules_told(), self._homes.held  # A module of one part is no whole one.
        self._told = {pair for pair in modules if min(held[0][pair[0]], held[1][pair[1]]) > 1}
        for pair, fit in self._fits.items():
            if self._homes.of(*pair) in modules:
                self._fits[pair] = with_fields(fit, score=fit.score + _TOLD)
        across = across_networks(self._fits, wanted, stored) if is_outermost else ()
        is_counted = any(not names[-1].isalpha() for pair in modules for names in pair)
        parts = {(at, to): (wanted[at].part, stored[to].part) for at, to in self._fits if is_counted}
        self._exclude([*elsewhere(parts, modules), *across])

    def _exclude(self, pairs: Collection[tuple[int, int]]) -> None:
        self._excluded.update(pairs)
        for pair in pairs:
            self._fits.pop(pair, None)

    def _modules_told(self) -> set[tuple[Names, Names]]:
        """Returns modules that are each other's by a matrix that no other one of them can be by its shape."""
        alike = [pair for pair in (*self._fits, *self._excluded) if self._has_same_shape(pair)]
        counts = [Counter(pair[side] for pair in alike) for side in (0, 1)]
        alone = [pair for pair in alike if counts[0][pair[0]] == counts[1][pair[1]] == 1]
        told = {self._homes.of(*pair) for pair in alone if self._wanted[pair[0]].part.is_layer}
        sides = [Counter(pair[side] for pair in told) for side in (0, 1)]
        return {pair for pair in told if all(pair) and sides[0][pair[0]] == sides[1][pair[1]] == 1}

    def settle(self, created: Created) -> tuple[_Found, list[Tie]]:
        """Returns the pairs that stand, and the choices that are left; none strays but attention outputs."""
        while True:
            self._ours, self._theirs = dict[int, int](), dict[int, int]()  # Of the best pairs.
            self._unlikely, self._closed = list[tuple[int, int]](), list[tuple[Names, Names]]()
            self._beside = defaultdict[tuple[int, int], _Choice](list)
            for pair, side in itertools.product((*self._fits, *self._excluded), (0, 1)):
                self._beside[side, pair[side]].append(pair)
            found, ties = self._settled(created)
            strays = self._homes.strays([pair[:2] for pair in found], self._fits, self._partial)
            strays -= {(at, to) for at, to in strays if "o" in self._wanted[at].said & self._stored[to].said}
            if not strays:
                return found, ties
            self._exclude(strays)

    def _settled(self, created: Created) -> tuple[_Found, list[Tie]]:
        found, ties, undecided, before = _Found(), list[Tie](), list[Undecided](), -1
        waiting = [group for group in components(self._fits) if len(group) <= MOST_PAIRS]
        self._closed += filter(all, map(self._homes.shared, waiting))  # Modules that hold all of a group.
        for group in waiting:
            undecided += [(tie, group) for tie in self._settle(group, found)]
        while undecided and len(found) > before:
            before = len(found)
            undecided = self._within_modules(undecided, found)
            undecided = [self._without_last(*item, created, found) for item in undecided]
            undecided = [item for item in undecided if not self._settle_in_order(*item, created, found)]
            for tie, group in together(undecided):
                if self._are_siblings(tie) and self._settle_in_order(tie, group, created, found):
                    undecided = [item for item in undecided if item[1] is not group]
        for tie, group in undecided:
            ours, theirs, rivals, lone = self._sides(tie, group, found)
            ties.append(self._tie(sorted({*ours, *lone}), sorted({*theirs, *rivals})))
        modules, homes = self._modules(found), [self._homes.of(at, to) for at, to, _ in found]
        among = Counter(itertools.starmap(self._homes.of, self._unlikely))
        wanted, stored = self._homes.held
        settled = {pair[:2] for pair in found}
        inside = {tuple(x[:-1] for x in self._names(at, to)) for at, to, _ in found}
        for at, to in self._unlikely:
            if any(at == one or to == other for one, other, _ in found):
                continue
            home, other = self._homes.of(at, to)
            is_whole = wanted[home] == stored[other] == among[home, other] > 1
            around = [there for here, there in homes if here == home]
            is_own = self._names(at, to) in inside  # `beta` in a module whose `alpha` has gone there.
            is_own |= any(x in settled for x in norms_told([(at, to)], self._parts).items())  # By its norm.
            if is_own or is_whole or modules.get(home) == other or around.count(other) == len(around) > 1:
                found.append((at, to, "names"))  # The only two of their shape in what is one module.
            else:
                ties.append(self._tie([at], [to]))
        return found, ties

    def _within_modules(self, undecided: list[Undecided], found: _Found) -> list[Undecided]:
        """Adds what modules that are known tell; returns what is left undecided."""
        while True:
            left: list[Undecided] = []
            modules = self._modules(found)
            for tie, group in undecided:
                kept = self._among_siblings(tie, group, modules, found)
                if kept is None:
                    left.append((tie, group))
                else:
                    left += [(each, kept) for each in self._settle(kept, found, asked=True)]
            if len(left) == len(undecided):
                return left
            undecided = left

    def _modules(self, found: Iterable[tuple[int, int, PairGrounds]]) -> Mapping[Names, Names]:
        """Returns which wanted module is which stored one; a list is one where both hold as many parts."""
        return same_modules([*(self._homes.of(at, to) for at, to, _ in found), *self._closed])

    def _among_siblings(
        self, tie: Sequence[tuple[int, int]], group: _Group, modules: Mapping[Names, Names], found: _Found
    ) -> _Group | None:
        """Returns the pairs of a tie that what is known allows; None where that changes nothing.

        Known modules hold what is theirs, layers have their norms, and parts of one list were made in its
        order.
        """
        ours, theirs, rivals, lone = map(set[int], self._sides(tie, group, found))
        sources = {other: one for one, other in modules.items()}
        among = {(at, to) for at, to in group if at in ours | lone and to in theirs | rivals}
        norms = norms_told([pair[:2] for pair in found], self._parts)
        told = {*norms.values()}
        kept: _Group = set()
        for at, to in among:
            one, other = self._homes.of(at, to)
            is_there = lies_within(one, other, modules) and lies_within(other, one, sources)
            is_there &= norms.get(at, to) == to and (at in norms or to not in told)
            if is_there and self._ascends((at, to), found):
                kept.add((at, to))
        is_whole = {at for at, _ in kept} >= ours and {to for _, to in kept} >= theirs
        return kept if is_whole and kept != among else None

    def _ascends(self, pair: tuple[int, int], found: _Found) -> bool:
        """Tells whether a pair and all that is found are in the order in which Linen numbered its modules."""
        left, right = self._wanted[pair[0]].part.levels, self._stored[pair[1]].part.levels
        anchors = ((self._wanted[at].part.levels, self._stored[to].part.levels) for at, to, _ in found)
        return all(ascend((left, ours), (right, theirs)) for ours, theirs in anchors)

    def _settle(self, group: _Group, found: _Found, *, asked: bool = False) -> list[_Choice]:
        """Adds the pairs of a group that stand; returns those that do not, by what depends on each other.

        What was asked about before stands where what is known has left one pair of several.
        """
        table = Table({pair: self._fits[pair].score for pair in group})
        best, value = table.best()
        for at, to in best:
            self._ours[to], self._theirs[at] = at, to
        doubtful = {frozenset((pair, other)) for pair in best for other in self._rather(pair, best, group)}
        doubtful.update(displaced(best, group, self._wanted, self._stored))
        # A module that takes a norm with its bias does not take a token.
        whole = (pair for pair in group if pair in best or self._fits[pair].is_exact)
        doubtful.update(exchanged(best, {pair: self._homes.of(*pair) for pair in whole}, self._told))
        unstable = {pair for tie in doubtful for pair in tie}  # Names that speak against each other.
        for pair in filter(lambda pair: pair not in unstable, best):
            second, lower = table.best(without=pair)
            if value - lower >= MARGIN or not self._rivals(pair, group):
                if asked or self._is_plausible(pair, group):
                    found.append((*pair, "names" if any(True for _ in self._others(pair)) else "shapes"))
                else:
                    self._unlikely.append(pair)
            else:
                doubtful.add(frozenset(best - second))
        unsure = {pair for tie in doubtful for pair in tie}
        for one, other in itertools.combinations(sorted(unsure), 2):
            if (crossed := (one[0], other[1])) in group and self._comes_near(crossed, group):
                doubtful.add(frozenset((one, other)))
        return [sorted(tie) for tie in merged(doubtful)]

    def _rather(
        self, pair: tuple[int, int], best: Collection[tuple[int, int]], group: _Group
    ) -> Iterator[tuple[int, int]]:
        """Yields best pairs whose stored part and this one's wanted part are both more like each other."""
        for other in best:
            if other != pair and (both := (pair[0], other[1])) in group:
                scores = [self._fits[each].score for each in (both, pair, other)]
                # What is only left because names exclude the fourth pair is told by no name of its own.
                is_left = (other[0], pair[1]) in self._excluded and not any(map(self._shares, (pair, other)))
                if scores[0] - (0 if is_left else MARGIN) >= max(scores[1:]):
                    yield other

    def _names(self, at: int, to: int) -> tuple[Names, Names]:
        return self._wanted[at].part.names, self._stored[to].part.names

    def _shares(self, pair: tuple[int, int]) -> bool:
        """Tells whether names say that two parts do the same in their block."""
        one, other = self._wanted[pair[0]], self._stored[pair[1]]
        kinds = [PARAMETER.get(role.part.names[-1], role) for role in (one, other)]
        return kinds[0] == kinds[1] or bool(one.part.own & other.part.own or one.said & other.said & STRONG)

    def _rivals(self, pair: tuple[int, int], group: _Group) -> bool:
        return any(other != pair and (other[0] == pair[0] or other[1] == pair[1]) for other in group)

    def _others(self, pair: tuple[int, int]) -> Iterator[tuple[int, int]]:
        """Yields the pairs that shapes alone allow for either part."""
        return (other for side in (0, 1) for other in self._beside[side, pair[side]] if other != pair)

    def _has_same_shape(self, pair: tuple[int, int]) -> bool:
        ours, theirs = self._wanted[pair[0]].part.leaves, self._stored[pair[1]].part.leaves
        return all(theirs[kind].shape == ours[kind].shape for kind in ours.keys() & theirs.keys())

    def _is_plausible(self, pair: tuple[int, int], group: _Group) -> bool:
        """Tells whether a pair is more than a coincidence of shape."""
        fit, one, other = self._fits[pair], self._wanted[pair[0]], self._stored[pair[1]]
        is_same = one.position is not None and one.position == other.position
        is_known = pair in self._known or is_same or have_one_name(one.part, other.part)
        if is_known or likeness(one.said, other.said) > 0 or one.said & other.said:
            return True
        leaf, is_one = one.part.leaves.get("main"), one.part.main_size == 1  # A scale and a bias of logits.
        is_layer = leaf and len(fit.pairs) > 1 and (is_one or len(leaf.shape) > 1)
        near = (other in self._excluded or self._fits[other].is_exact for other in self._others(pair))
        if fit.is_exact and is_layer and not any(near):
            return True  # Of one output too, where kernel and bias are vectors.
        # What could be another one as it is, is not this one reshaped.
        is_other = not self._has_same_shape(pair) and any(map(self._has_same_shape, self._others(pair)))
        is_told = leaf is None or len({*leaf.shape}) == len(leaf.shape) or not self._rivals(pair, group)
        return is_told and fit.is_exact and not (one.part.is_vector or is_other)

    def _sides(
        self, tie: Sequence[tuple[int, int]], group: _Group, found: _Found
    ) -> tuple[list[int], list[int], set[int], set[int]]:
        """Returns the parts of a tie on both sides, and what else could be in it: stored, wanted."""
        ours, theirs = sorted({at for at, _ in tie}), sorted({to for _, to in tie})
        near = [x for x in group if (x[0] in ours) != (x[1] in theirs) and self._comes_near(x, group)]
        taken = {at for at, _, _ in found}, {to for _, to, _ in found}
        rivals = {to for at, to in near if at in ours and to not in taken[1]}
        return ours, theirs, rivals, {at for at, to in near if to in theirs and at not in taken[0]}

    def _comes_near(self, pair: tuple[int, int], group: _Group) -> bool:
        """Tells whether the best pairs are nearly as good where two of them change places for another one."""
        at, to = pair
        before = (at, self._theirs.get(at, -1)), (self._ours.get(to, -1), to)
        after = pair, (before[1][0], before[0][1])
        scores = [[self._fits[each].score for each in pairs if each in group] for pairs in (before, after)]
        return sum(scores[0]) - sum(scores[1]) < MARGIN

    def _settle_in_order(
        self, tie: Sequence[tuple[int, int]], group: _Group, created: Created, found: _Found
    ) -> bool:
        """Adds the pairs of a tie that the order of both sides tells; tells whether it does."""
        ours, theirs, rivals, lone = self._sides(tie, group, found)
        sides = [self._wanted[at] for at in ours], [self._stored[to] for to in theirs]
        if lone or len({any("gate" in role.said for role in side) for side in sides}) > 1:
            return False  # Which of two layers is the gate, programs number either way.
        ordered = self._by_numbering(ours, theirs, {*theirs, *rivals})
        if ordered is None and not rivals:
            ordered = by_first_letters(ours, theirs, self._parts, self._fits)
            ordered = ordered or self._in_order(ours, theirs, created, found)
        if ordered is None or not {to for _, to in ordered}.isdisjoint(to for _, to, _ in found):
            return False
        if not all(pair in self._fits for pair in (*tie, *ordered)):
            return False  # Something speaks against one by now.
        if not all(self._ascends(pair, found) for pair in ordered):
            return False  # What shapes or names tell was made in another order.
        best, by_order = (sum(self._fits[pair].score for pair in pairs) for pairs in (tie, ordered))
        if len(tie) == len(ordered) and best - by_order >= MARGIN:
            return False  # Names speak against the order.
        grounds: PairGrounds = "shapes" if all(map(are_counted, sides)) else "order"
        found.extend((at, to, grounds) for at, to in ordered)
        return True

    def _without_last(self, tie: _Choice, group: _Group, created: Created, found: _Found) -> Undecided:
        """Adds the norm of a block's only network, which comes last; returns the other ones' tie."""
        ours, theirs, rivals, _ = self._sides(tie, group, found)
        last = last_of_block([self._wanted[at].place for at in ours])
        right = None if rivals else in_order([self._stored[to] for to in theirs], (), to_last=True)
        is_all = {at for at, to in group if to in theirs} == {*ours} and len(ours) == len(theirs)
        made = in_strict_order([created(self._wanted[at].part) for at in ours]) or [last]
        if last is None or right is None or not (is_all and made[-1] == last and self._are_siblings(tie)):
            return tie, group
        pair = ours.pop(last), theirs.pop(right[-1])
        found.append((*pair, "order"))
        return list(zip(ours, theirs, strict=True)), {x for x in group if x[0] != pair[0] and x[1] != pair[1]}

    def _are_siblings(self, tie: Sequence[tuple[int, int]]) -> bool:
        return len({(self._wanted[at].part.module, self._stored[to].part.module) for at, to in tie}) == 1

    def _by_numbering(self, ours: Sequence[int], theirs: Sequence[int], free: set[int]) -> _Choice | None:
        """Returns the pairs of parts that both sides count alike: `conv2_1` and `blocks/1/convs/0`."""
        sides = (self._wanted, ours[0]), (self._stored, theirs[0])
        left, right = (ranks_of([role.part.names for role in roles], like) for roles, like in sides)
        every = [(at, right.get(place, -1)) for place, at in left.items()]
        are_alike = len(left) == len(right) > 1 and all(pair in self._fits for pair in every)
        roles = *(self._wanted[at] for at in ours), *(self._stored[to] for to in theirs)
        ways_up = {role.way_up for role in roles} - {None}
        if len(ways_up) > 1 or any(role.is_either for role in roles) or not are_alike:
            return None
        pairs = [pair for pair in every if pair[0] in ours]
        is_all = len(pairs) == len(ours) and {to for _, to in pairs} <= free <= {*right.values()}
        return pairs if is_all else None

    def _in_order(
        self, ours: Sequence[int], theirs: Sequence[int], created: Created, found: _Found
    ) -> _Choice | None:
        """Returns the pairs that follow from the order of both sides, where each tells one."""
        sides = [self._wanted[at] for at in ours], [self._stored[to] for to in theirs]
        left, right = in_order(*sides), in_order(*sides[::-1])
        if left is None and right is not None:
            left = self._in_order_beside(0, ours, found)
        elif right is None and left is not None:
            right = self._in_order_beside(1, theirs, found)
        if right is None or len(ours) != len(theirs):
            return None
        # The order in which the target creates its modules only speaks against one that names tell: what
        # is created first is not therefore computed first, and Linen numbers what it computes.
        made = in_strict_order([created(self._wanted[at].part) for at in ours])
        if left is None or made not in (None, left):
            return None
        pairs = [(ours[one], theirs[other]) for one, other in zip(left, right, strict=True)]
        return pairs if all(pair in self._fits for pair in pairs) else None

    def _in_order_beside(self, side: int, parts: Sequence[int], found: _Found) -> list[int] | None:
        """Returns the order of what lies beside parts of one side, each in a module of its own.

        The other side counts it: `depthwise/bn`, `pointwise/bn`, whose convolutions are `Conv_0`, `Conv_1`.
        """
        beside: dict[Names, list[NamedPart]] = defaultdict(list)
        for at, to, _ in found:
            pair = self._wanted[at], self._stored[to]
            beside[pair[side].part.module].append(pair[1 - side])
        modules = [(self._wanted, self._stored)[side][at].part.module for at in parts]
        each = [beside[module] for module in modules]
        is_around = any(len(a) < len(b) and a == b[: len(a)] for a in modules for b in modules)
        families = {one.part.family for held in each for one in held}
        if is_around or not all(map(are_counted, each)) or len(families) > 1:
            return None
        return in_strict_order([min(one.part.levels[-1].number or 0 for one in held) for held in each])

    def _tie(self, ours: Sequence[int], theirs: Sequence[int]) -> Tie:
        names = [[role.part.names for role in side] for side in (self._wanted, self._stored)]
        return tie_of((ours, theirs), names, self._fits, lambda at, to: self.links(at, to, "names"))

    def links(self, at: int, to: int, grounds: PairGrounds) -> list[Link]:
        """Returns the leaves of a pair of parts."""
        whole = self._wanted[at]
        fact = "" if grounds != "names" or whole.fused else whole.fact or self._stored[to].fact
        kind: PairGrounds = "fact" if fact else grounds
        return [
            Link(wanted=(one,), stored=(other,), grounds=kind, ways=(found,), fact=fact)
            for one, other, found in self._fits[at, to].pairs
        ]
