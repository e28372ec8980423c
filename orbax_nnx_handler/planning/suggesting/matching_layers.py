"""Layers: which stored group is which wanted one, also where one side keeps them stacked."""

import dataclasses
import functools
import itertools
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from orbax_nnx_handler.planning.core.folding import same_numbers
from orbax_nnx_handler.planning.core.leaves import with_fields
from orbax_nnx_handler.planning.core.paths import Tokens, levels
from orbax_nnx_handler.planning.likeness import modules_beside, sizes_of, told_by_names
from orbax_nnx_handler.planning.likeness.highest_sums import choices_together, in_turn
from orbax_nnx_handler.planning.likeness.links import Findings, LayerPair, Layers, Link, Tie, in_all_layers
from orbax_nnx_handler.planning.likeness.module_parts import (
    Leaf,
    module_parts,
    part_sizes,
    sizes_within,
    stacks_in,
)
from orbax_nnx_handler.planning.likeness.shapes import without_axis
from orbax_nnx_handler.planning.likeness.vocabulary import Names
from orbax_nnx_handler.planning.suggesting.matching_parts import Known, match_parts
from orbax_nnx_handler.planning.suggesting.questions import by_modules
from orbax_nnx_handler.planning.suggesting.series import (
    Pairs,
    Series,
    alone,
    are_alike,
    equal_series,
    have_equal_layers,
    in_sequence,
    is_reversed,
    lists_within,
    paired_series,
    same_layers,
    series_of,
    side_by_side,
)
from orbax_nnx_handler.planning.suggesting.stacks import (
    Share,
    counted_through,
    in_any_order,
    in_stacks,
    kinds_of,
    lists_in_lists,
    shared_in,
    shares_of,
    stack_of,
    stacked_lists,
    stacked_twice,
    with_inner,
    without_rest,
)
from orbax_nnx_handler.planning.suggesting.whole_modules import as_they_lie
from orbax_nnx_handler.planning.target.roles import creation_place


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """Leaves of both sides that belong to each other.

    Attributes:
        wanted: The wanted leaves.
        stored: The stored ones.
        above: How many segments lead to the context, wanted and stored.
        levels: Segments above that count the same layers.
        order: Wanted names in the order of their creation, by module.
        known: How much of what is known elsewhere speaks for a wanted and a stored part.
    """

    wanted: Sequence[Leaf]
    stored: Sequence[Leaf]
    above: tuple[int, int] = (0, 0)
    levels: tuple[tuple[int, int], ...] = ()
    order: Mapping[Tokens, Sequence[str]] = dataclasses.field(default_factory=dict[Tokens, Sequence[str]])
    known: Known = lambda _wanted, _stored: 0


def match_context(context: Context) -> Findings:
    """Matches groups of layers first, each by one of its layers, then what is left."""
    return _Matching(context).result()


class _Matching:
    """What is matched of a context so far, and which leaves of both sides are used."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._sides = list(zip((context.wanted, context.stored), context.above, strict=True))
        self._rest = [*map(list, (context.wanted, context.stored))]
        self._groups = [series_of(leaves, above) for leaves, above in self._sides]
        self._found = Findings()
        self._taken: set[int] = set()
        self._unlike: set[object] = set()
        self._possible: dict[object, Any] = {}

    def result(self) -> Findings:
        self._match_stacked_twice()
        self._match_stacked_lists()
        self._match_side_by_side()
        self._match_in_sequence(arms=2)
        self._match_lists_in_lists()
        self._match_within(self._left())
        self._match(self._paired())
        in_places = in_turn(self._free(0), self._free(1), self._context.above)
        self._match([(alone(*one, 0), alone(*other, 1)) for one, other in in_places])
        self._match([*(pairs := self._paired()), *self._pairs_of_kinds(pairs)])
        for pairs in self._pairs_with_rests():
            self._match(pairs)
        self._match_within(self._series(1))  # `norm_{i}` and `up_{i}` are `layers/{i}/norm` and its `up`.
        self._match_in_sequence(arms=1)
        self._match([pair for pair in paired_series(*self._series(1)) if is_reversed(*pair)])
        self._match_stacks()
        self._match(self._paired())  # Where stacks took all others, one list is left on either side.
        for several in (*equal_series(*self._left()), *counted_through(*self._left())):
            self._match_or_ask(several)
        pairs = itertools.product(*self._left())  # Of lists of other lengths no number tells the layer.
        other = [x for y, x in pairs if have_equal_layers(x, y) and len(x.members) != len(y.members)]
        unlike = {id(leaf) for one in other for leaf in one.leaves}
        stored = [leaf for leaf in self._free(1) if id(leaf) not in unlike]
        self._found.add(_match_rest(self._free(0), stored, self._context))
        return self._found

    def _match_stacked_twice(self) -> None:
        """Matches modules that both sides keep stacked by one of their layers, where arrays differ."""
        for one, other in () if any(self._context.above) else stacked_twice(self._free(0), self._free(1)):
            above = len(one.names), len(other.names)
            inner = dataclasses.replace(self._context, wanted=one.layer, stored=other.layer, above=above)
            found = in_stacks(match_context(inner), one, other)
            linked = {leaf.names for link in found.links for leaf in link.wanted} if found else set[Names]()
            if found and 2 * len(linked) > len(one.leaves):
                self._found.add(found)
                self._take((*one.leaves, *other.leaves))

    def _match_stacked_lists(self) -> None:
        """Matches lists in the layers of a list with one that holds them stacked; asks which it holds."""
        for stacks, (one, other) in itertools.product((False, True), itertools.product(*self._left())):
            if not (self._is_taken(one) or self._is_taken(other)):
                self._match_or_ask_stacks(stacked_lists(*((other, one) if stacks else (one, other))), stacks)

    def _match_or_ask_stacks(self, several: Sequence[Sequence[Share]], stacks: bool) -> None:
        """Matches layers with stacks; asks which holds which where several readings are possible."""
        found = [[_matched_stack(share, stacks, self._context) for share in each] for each in several]
        readings = tuple(tuple(link for held in each for link in held.links) for each in found)
        if not readings or not all(readings):
            return
        if len(several) > 1:
            ends = [(name, x.template) if stacks else (x.template, name) for x, name, *_ in several[0]]
            wanted, stored = zip(*ends, strict=True)
            self._found.ties.append(Tie(wanted=wanted, stored=stored, readings=readings))
        for held in found[0] if len(several) == 1 else ():
            self._found.add(held)
        self._take(leaf for one, *_, inside in several[0] for leaf in (*one.leaves, *inside))

    def _left(self, groups: Sequence[Sequence[Series]] = ()) -> list[list[Series]]:
        return [[one for one in side if not self._is_taken(one)] for side in groups or self._groups]

    def _free(self, side: int) -> list[Leaf]:
        self._rest[side] = [leaf for leaf in self._rest[side] if id(leaf) not in self._taken]
        return self._rest[side]

    def _is_taken(self, series: Series) -> bool:
        return not self._taken.isdisjoint(map(id, series.leaves))

    def _take(self, leaves: Iterable[Leaf]) -> None:
        self._taken.update(map(id, leaves))

    def _match_in_sequence(self, arms: int) -> None:
        for side, other in ((1, 0), (0, 1)):
            free, above = self._free(other), self._context.above[other]
            for several in in_sequence(self._left()[side], free, above, arms):
                self._match_or_ask(several if other else [[(one, two) for two, one in x] for x in several])

    def _match_side_by_side(self) -> None:
        """Matches lists that hold together what the blocks of one list of the other side hold."""
        lists = self._series(1)
        for far, one in [(1 - at, x) for at in (0, 1) for x in self._left()[at]]:
            others = lists[far] if all(one.sizes != x.sizes for x in self._groups[far]) else []
            for layers, own in filter(None, [side_by_side(one, others, self._context.above[far])]):
                members = _match_members(*((one, layers) if far else (layers, one)), self._context)
                known = {id(x) for link in members.every for x in (*link.wanted, *link.stored)}
                if known >= {*map(id, (*one.leaves, *layers.leaves))}:
                    self._found.add(as_they_lie(members, own))
                    self._take((*one.leaves, *(leaf for leaf, *_ in own.values())))
                    lists = self._series(1)

    def _match_lists_in_lists(self) -> None:
        for step in (1, -1):
            groups, others = self._left()[::step]
            pairs = [pair[::step] for one in groups for pair in lists_in_lists(one, others)]
            self._match([(one, other) for one, other in pairs])

    def _match_within(self, groups: Sequence[Sequence[Series]]) -> None:
        """Matches lists with the parts of another list's blocks; asks where no name tells which is which."""
        for step, (blocks, lists) in ((1, groups), (-1, groups[::-1])):
            ways = [lists_within(one, lists) for one in blocks]
            for found, by_names in choices_together(ways, lambda x: x.template[:-1]):
                several = [[(pair[::step][0], pair[::step][1]) for pair in pairs] for pairs in found]
                if not any(self._is_taken(one) for pair in several[0] for one in pair):
                    self._match_or_ask(several, by_names=by_names)

    def _match_or_ask(self, several: Sequence[Pairs], *, by_names: bool = False) -> None:
        """Matches what all of several readings say; asks about the rest."""
        told = [pair for pair in several[0] if all(pair in each for each in several)]
        self._match(told, by_names=by_names)
        several = [[pair for pair in each if pair not in told] for each in several]
        if not (pairs := several[0]):
            return
        names = [tuple(pair[side].template for pair in pairs) for side in (0, 1)]
        held = ([_match_members(*pair, self._context).links for pair in each] for each in several)
        readings = tuple(tuple(itertools.chain(*each)) for each in held)
        self._found.ties.append(Tie(wanted=names[0], stored=names[1], readings=readings))
        self._take(leaf for pair in pairs for one in pair for leaf in one.leaves)

    def _match(self, pairs: Pairs, *, by_names: bool = False) -> None:
        """Matches groups of layers with each other; adds what is found, and what is no other group's then."""
        for one, other in pairs:
            kind = tuple((each.base, frozenset(each.looks.values())) for each in (one, other))
            if kind in self._unlike:
                continue  # As the layers before them, in a list that a program does not keep as one.
            members = _match_members(one, other, self._context)
            members = members.mapped(told_by_names) if by_names else members
            same = same_layers(one, other)
            # Of parts that are more on one side nothing says that they are of this layer.
            ties = [each for each in members.ties if len(each.wanted) == len(each.stored)]
            asked = [link for tie in ties if len(tie.readings) > 1 for link in tie.readings[0]]
            linked = {id(leaf) for link in (*members.links, *asked) for leaf in link.wanted}
            layers = [(one.members[left], other.members[right]) for left, right in same]
            if not members.links or not all(_hold_alike(*pair, linked) for pair in layers):
                self._unlike |= {kind}
                continue
            ours, theirs = ([leaf for held in side for leaf in held] for side in zip(*layers, strict=True))
            self._found.add(members)
            more = _more_of(one, {at for at, _ in same}), _more_of(other, {to for _, to in same})
            self._take((*ours, *theirs, *more[0], *more[1]))

    def _pairs_with_rests(self) -> Iterator[Pairs]:
        """Yields which lone groups are what layers that are matched hold beside what was found in them.

        `block_{i}` and `attn_{i}` are both `stages/{i}`, which have a block and an attention each. And which
        rests are each other's.
        """
        ours, theirs = self._left()
        for least in (2, 1):  # At last lists of single parts: `skips/{i}` of `layers/{i}`.
            used = {id(leaf) for link in self._found.every for leaf in (*link.wanted, *link.stored)}
            within = self._taken - used
            rests = [
                series_of([leaf for leaf in leaves if id(leaf) in within], above, least)
                for leaves, above in self._sides
            ]
            ours, theirs = self._series(1) if least == 1 else (ours, theirs)
            yield paired_series(rests[0], theirs) if theirs else []
            yield paired_series(ours, rests[1]) if ours else []
            # What ends one stage begins the next one elsewhere.
            yield [pair for pair in paired_series(*rests) if pair[0].numbers != pair[1].numbers and least > 1]

    def _series(self, least: int) -> list[list[Series]]:
        return [series_of(self._free(side), self._context.above[side], least) for side in (0, 1)]

    def _paired(self) -> Pairs:
        """Returns which groups are the same; not where what one has more may lie beside the other one.

        `resnets_{0..1}` and `attentions_0` are `mid/{0..2}`: no number tells which.
        """
        pairs = paired_series(*self._left())
        known = {id(leaf) for pair in pairs for one in pair for leaf in one.leaves}
        beside = [
            sizes_within([leaf for leaf in self._free(side) if id(leaf) not in known], above)
            for side, above in enumerate(self._context.above if pairs else ())
        ]

        def are_whole(pair: tuple[Series, Series]) -> bool:
            if pair[0].base[-1] == pair[1].base[-1] != "":
                return True  # Names decide.
            same = same_layers(*pair)
            sizes = [{at: part_sizes(held) for at, held in one.members.items()} for one in pair]
            unlike = [(sizes[0][at], sizes[1][to]) for at, to in same if sizes[0][at] != sizes[1][to]]
            for side, numbers in enumerate(map(set[int], zip(*same, strict=True))):
                more = {held for at, held in sizes[side].items() if at not in numbers}
                if more & (beside[1 - side] | {each[1 - side] for each in unlike}):
                    return False
            return True

        return list(filter(are_whole, pairs))

    def _pairs_of_kinds(self, pairs: Pairs) -> Pairs:
        """Returns which groups are the same among those left, layers of one kind by themselves.

        `denseblock1`, `transition1`, `denseblock2` are `layers/0`, `layers/1`, `layers/2` of a list.
        """
        used = {id(series) for pair in pairs for series in pair}
        left, right = ([y for x in side if id(x) not in used for y in kinds_of(x)] for side in self._left())
        return paired_series(left, right) if any(one.is_kind for one in (*left, *right)) else []

    def _match_stacks(self) -> None:
        """Matches groups with stacks of the other side; a remainder that lies apart after that."""
        ours, theirs = self._left()
        rests = [(one, without_rest(one, theirs)) for one in ours]
        groups = with_inner(one if rest is None else rest[0] for one, rest in rests), with_inner(theirs)
        rest: set[int] = set()  # Of a stack: another group may hold it.
        for least in (2, 1):
            left, right = groups if least > 1 else self._series(1)
            every = [*((one, False) for one in left), *((one, True) for one in right)]
            for series, stacks in 2 * every:  # Two may lie in one stack, of which one alone is too little.
                if not self._is_taken(series):
                    rest |= self._match_stack(series, stacks, least)
        self._taken |= rest
        for side, far in ((0, 1), (1, 0)) if any(left[1:] for left in self._left(groups)) else ():
            left, free = self._left(groups), (self._free(far), self._context.above[far])
            self._match_or_ask_stacks(in_any_order(left[side], left[far], stacks_in(*free)), side > 0)
        self._match([x for _, pair in rests if pair and self._is_taken(pair[0]) for x in pair[1]])

    def _match_stack(self, series: Series, stacks: bool, least: int) -> set[int]:
        """Adds what the other side keeps stacked of a group; returns all that lies in the stack."""
        if (known := (stacks, len(self._taken))) not in self._possible:
            free = self._free(1 - stacks), self._context.above[1 - stacks]
            self._possible = {known: (stacks_in(*free), functools.cache(functools.partial(series_of, *free)))}
        stack = stack_of(series, self._possible[known][0], least, self._left()[stacks])
        series = shared_in(series)
        found = [(series, *stack[1:])] if stack is not None and are_alike(series) else []
        found = found if found or stacks or least == 1 else shares_of(series, *self._possible[known])
        rest: set[int] = set()
        for share in found:
            matched, inside = _matched_stack(share, stacks, self._context), share[-1]
            used = {x.source for link in matched.every for x in (link.wanted if stacks else link.stored)}
            rest |= {id(leaf) for leaf in inside if used}
            self._take(leaf for leaf in inside if leaf.source in used)
            self._take(share[0].leaves if used else ())
            self._found.add(matched)
        return rest


def _hold_alike(ours: Sequence[Leaf], theirs: Sequence[Leaf], linked: Collection[int]) -> bool:
    """Tells whether two layers hold so much alike that they may be the same."""
    return 4 * sizes_of(leaf for leaf in ours if id(leaf) in linked) >= min(sizes_of(ours), sizes_of(theirs))


def _more_of(series: Series, matched: Collection[int]) -> list[Leaf]:
    """Returns the leaves of layers that one side has more of: like the matched ones, and nothing else."""
    held = {at: {leaf.names[series.depth :] for leaf in leaves} for at, leaves in series.members.items()}
    like = [held[number] for number in matched] if len(matched) > 1 else []
    return [x for at, each in series.members.items() if at not in matched and held[at] in like for x in each]


def _match_rest(wanted: Sequence[Leaf], stored: Sequence[Leaf], context: Context) -> Findings:
    if not (wanted and stored):
        return Findings()
    up, down = context.above
    start = wanted[0].names[:up], stored[0].names[:down]
    names = [tuple(level.base for level in levels(each)) for each in start]
    matched = match_parts(
        module_parts(wanted, up),
        module_parts(stored, down),
        (names[0], names[1]),
        lambda part: creation_place((*start[0], *part.names), context.order),
        lambda one, other: context.known((*start[0], *one), (*start[1], *other)),
        partial=(modules_beside(wanted, context.wanted, up), modules_beside(stored, context.stored, down)),
    )
    lone = (x for x in matched.links if len(x.wanted) == len(x.stored) == 1)
    counted = {id(x): same_numbers(x.target.names, x.source.names, context.above) for x in lone}
    ties = [
        Tie(
            wanted=tuple((*start[0], *path) for path in tie.wanted),
            stored=tuple((*start[1], *path) for path in tie.stored),
            readings=tuple(
                tuple(dataclasses.replace(link, levels=context.levels) for link in reading)
                for reading in tie.readings
            ),
        )
        for tie in by_modules(matched.ties)
    ]
    every = ((link, (*context.levels, *counted.get(id(link), ()))) for link in matched.links)
    return Findings(links=[with_fields(link, levels=at) for link, at in every], ties=ties)


# Groups of layers.


def _match_members(one: Series, other: Series, context: Context) -> Findings:
    """Matches two groups layer by layer; layers that look alike on both sides are matched once."""
    classes: dict[object, list[tuple[int, int]]] = defaultdict(list)
    for left, right in (pairs := same_layers(one, other)):
        classes[one.looks[left], other.looks[right]].append((left, right))
    found, depths = Findings(), (one.depth, other.depth)
    within = list[dict[tuple[Names, Names], tuple[Names, Names]]]()
    equal = all(left == right for left, right in pairs)
    seats = (*context.levels, *(((other.seat, one.seat),) if equal else ()))
    for numbers in classes.values():
        left, right = numbers[0]
        inner = dataclasses.replace(
            context, wanted=one.members[left], stored=other.members[right], above=depths, levels=seats
        )
        if not (inside := match_context(inner)).links and len(classes) == 1:
            return found
        layers = [_leaves_by_name(one, other, *pair) for pair in numbers]
        matched = inside.mapped(lambda links, layers=layers: in_all_layers(links, layers, depths))
        within.append({(_in_each(other, x), _in_each(one, y)): (x, y) for x, y in matched.groups})
        found.add(dataclasses.replace(matched, groups=[]))
        for pair in (*numbers[1:], numbers[0]) if not equal else ():
            found.groups.append((other.place(pair[1]), one.place(pair[0])))
    # A list inside layers of one kind may be another one inside the others.
    shared = {pair for each in within for pair in each if equal and all(pair in held for held in within)}
    found.groups.extend(pair if pair in shared else own for each in within for pair, own in each.items())
    if equal:
        found.groups.append((other.template, one.template))
    return found


def _in_each(series: Series, names: Names) -> Names:
    """Returns what leads into a list in one layer as that in each of them, by the number of both."""
    below = names[series.depth :]
    for place, inner in (("{k}", "{l}"), ("{j}", "{k}"), ("{i}", "{j}")):
        below = tuple(name.replace(place, inner) for name in below)
    return (*series.template, *below)


def _leaves_by_name(one: Series, other: Series, left: int, right: int) -> LayerPair:
    ours = {leaf.names[one.depth :]: leaf for leaf in one.members[left]}
    theirs = {leaf.names[other.depth :]: leaf for leaf in other.members[right]}
    return one.place(left), other.place(right), ours, theirs


def _matched_stack(share: Share, stacks: bool, context: Context) -> Findings:
    """Matches one layer with what a stack holds of one, and the rest like it; with a list, all layers."""
    series, prefix, axis, inside = share
    if isinstance(axis, Series):
        return _match_members(*((axis, series) if stacks else (series, axis)), context)
    members = series.members[series.numbers[0]]
    layer = [dataclasses.replace(leaf, shape=without_axis(leaf.shape, axis)) for leaf in inside]
    # The stack's path takes the place of a layer's, so that both sides count the same levels below.
    ours, theirs = (layer, members) if stacks else (members, layer)
    above = (len(prefix), series.depth) if stacks else (series.depth, len(prefix))
    inner = dataclasses.replace(context, wanted=ours, stored=theirs, above=above)
    counted = stacks or series.numbers == list(range(len(series.numbers)))
    # What counts otherwise than from 0, as `q1` and `q2`, takes its numbers once the stack is taken apart.
    template = series.template if counted else (*series.template[:-1], prefix[-1], "{i}")
    layers = Layers(template if stacks else prefix, prefix if stacks else template, axis, stacks, counted)

    def every_layer(links: Sequence[Link]) -> Iterator[Link]:
        for at, number in enumerate(series.numbers):
            own = {leaf.names[series.depth :]: leaf for leaf in series.members[number]}
            for link in links:
                side, held = ("stored", link.stored) if stacks else ("wanted", link.wanted)
                made = {side: tuple(own[leaf.names[series.depth :]] for leaf in held)}
                yield with_fields(link, **made, layers=layers, layer=number if counted else at)

    return match_context(inner).mapped(every_layer)
