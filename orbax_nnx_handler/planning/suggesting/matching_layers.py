"""Layers: which stored group is which wanted one, also where one side keeps them stacked."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

from orbax_nnx_handler.planning.core.paths import Tokens, levels, shared_levels
from orbax_nnx_handler.planning.suggesting.assignment import in_turn, part_sizes, sizes_within
from orbax_nnx_handler.planning.suggesting.matching_parts import Known, match_parts, nothing_known
from orbax_nnx_handler.planning.suggesting.module_parts import (
    Layers,
    Leaf,
    Link,
    Names,
    Tie,
    module_parts,
    numbered_segments,
    part_of,
)
from orbax_nnx_handler.planning.suggesting.named_parts import creation_place
from orbax_nnx_handler.planning.suggesting.series import (
    Looks,
    Series,
    alone,
    are_alike,
    have_equal_layers,
    in_sequence,
    kinds_of,
    looks_of,
    paired_series,
    same_layers,
    series_of,
    shared_in,
    shares_of,
    sizes_of,
    stack_of,
    with_inner,
    without_rest,
)
from orbax_nnx_handler.planning.suggesting.shapes import without_axis


@dataclasses.dataclass(frozen=True, kw_only=True)
class Findings:
    """What is known of a model.

    Attributes:
        links: The leaves that belong together.
        ties: Where nothing tells which is which.
        groups: The names that lead into the layers of both sides, `{i}` for equal numbers.
    """

    links: list[Link] = dataclasses.field(default_factory=list[Link])
    ties: list[Tie] = dataclasses.field(default_factory=list[Tie])
    groups: list[tuple[Names, Names]] = dataclasses.field(default_factory=list[tuple[Names, Names]])

    def mapped(self, change: Callable[[Sequence[Link]], Iterable[Link]]) -> "Findings":
        """Returns the same with every list of links changed, those of possible readings too."""
        ties = [
            dataclasses.replace(tie, readings=tuple(tuple(change(reading)) for reading in tie.readings))
            for tie in self.ties
        ]
        return Findings(links=list(change(self.links)), ties=ties, groups=self.groups)

    def add(self, other: "Findings") -> None:
        """Takes over what another context found."""
        self.links.extend(other.links)
        self.ties.extend(other.ties)
        self.groups.extend(other.groups)


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
    known: Known = nothing_known


def match_context(context: Context) -> Findings:
    """Matches groups of layers first, each by one of its layers, then what is left."""
    found = Findings()
    ours = series_of(context.wanted, context.above[0])
    theirs = series_of(context.stored, context.above[1])
    taken: set[int] = set()
    _match_in_sequence((ours, theirs), context, found, taken, arms=2)
    ours, theirs = ([one for one in side if not _is_taken(one, taken)] for side in (ours, theirs))
    _match_series(_paired(ours, theirs, context, taken), context, found, taken)
    in_places = in_turn(_free(context.wanted, taken), _free(context.stored, taken), context.above)
    _match_series([(alone(*one, 0), alone(*other, 1)) for one, other in in_places], context, found, taken)
    ours, theirs = ([one for one in side if not _is_taken(one, taken)] for side in (ours, theirs))
    pairs = _paired(ours, theirs, context, taken)
    _match_series([*pairs, *_pairs_of_kinds(ours, theirs, pairs)], context, found, taken)
    ours, theirs = ([one for one in side if not _is_taken(one, taken)] for side in (ours, theirs))
    for pairs in _pairs_with_rests(ours, theirs, context, found, taken):
        _match_series(pairs, context, found, taken)
    ours, theirs = ([one for one in side if not _is_taken(one, taken)] for side in (ours, theirs))
    _match_in_sequence((ours, theirs), context, found, taken, arms=1)
    ours, theirs = ([one for one in side if not _is_taken(one, taken)] for side in (ours, theirs))
    rests = [(one, without_rest(one, theirs)) for one in ours]
    heads = [one if rest is None else rest[0] for one, rest in rests]
    for one in _stacks(with_inner(heads), with_inner(theirs), context, taken):
        found.add(one)
    for _, rest in rests:
        if rest is not None and _is_taken(rest[0], taken):
            _match_series(rest[1], context, found, taken)
    ours, theirs = ([one for one in side if not _is_taken(one, taken)] for side in (ours, theirs))
    # Of lists of other lengths no number tells which layer is which.
    other = [
        one
        for one in theirs
        if any(have_equal_layers(one, our) and len(one.members) != len(our.members) for our in ours)
    ]
    unlike = {id(leaf) for one in other for held in one.members.values() for leaf in held}
    wanted, stored = _free(context.wanted, taken), _free(context.stored, taken | unlike)
    found.add(_match_rest(wanted, stored, context))
    return found


def _match_in_sequence(
    groups: Sequence[Sequence[Series]], context: Context, found: Findings, taken: set[int], arms: int
) -> None:
    ours, theirs = groups
    for pairs in in_sequence(theirs, _free(context.wanted, taken), context.above[0], arms):
        _match_series([(left, right) for right, left in pairs], context, found, taken)
    ours = [one for one in ours if not _is_taken(one, taken)]
    for pairs in in_sequence(ours, _free(context.stored, taken), context.above[1], arms):
        _match_series(pairs, context, found, taken)


def _match_series(
    pairs: Iterable[tuple[Series, Series]], context: Context, found: Findings, taken: set[int]
) -> None:
    """Matches groups of layers with each other; adds what is found, and what is no other group's then."""
    for one, other in pairs:
        members = _match_members(one, other, context)
        same = same_layers(one, other)
        ours = [leaf for left, _ in same for leaf in one.members[left]]
        theirs = [leaf for _, right in same for leaf in other.members[right]]
        asked = [link for tie in members.ties if len(tie.readings) > 1 for link in tie.readings[0]]
        linked = [leaf for link in (*members.links, *asked) for leaf in link.wanted]
        if not members.links or sizes_of(linked) * 4 < min(sizes_of(ours), sizes_of(theirs)):
            continue  # Layers that hold so little alike are not the same.
        found.add(members)
        taken |= {id(leaf) for leaf in (*ours, *theirs)}
        for series, side in ((one, 0), (other, 1)):
            taken |= _more_of(series, {pair[side] for pair in same})


def _more_of(series: Series, matched: Collection[int]) -> set[int]:
    """Returns the leaves of layers that one side has more of: like the matched ones, and nothing else."""
    held = {at: {leaf.names[series.depth :] for leaf in leaves} for at, leaves in series.members.items()}
    like = [held[number] for number in matched] if len(matched) > 1 else []
    more = (leaves for at, leaves in series.members.items() if at not in matched and held[at] in like)
    return {id(leaf) for leaves in more for leaf in leaves}


def _pairs_with_rests(
    ours: Sequence[Series], theirs: Sequence[Series], context: Context, found: Findings, taken: set[int]
) -> Iterator[list[tuple[Series, Series]]]:
    """Yields which lone groups are what layers that are matched hold beside what was found in them.

    `block_{i}` and `attn_{i}` are both `stages/{i}`, which have a block and an attention each. And which
    rests are each other's.
    """
    sides = list(zip((context.wanted, context.stored), context.above, strict=True))
    for least in (2, 1):  # At last lists of single parts: `skips/{i}` of `layers/{i}`.
        asked = [link for tie in found.ties for reading in tie.readings for link in reading]
        used = {id(leaf) for link in (*found.links, *asked) for leaf in (*link.wanted, *link.stored)}
        rests = [
            series_of([leaf for leaf in leaves if id(leaf) in taken and id(leaf) not in used], above, least)
            for leaves, above in sides
        ]
        if least == 1:
            ours, theirs = (series_of(_free(leaves, taken), above, least) for leaves, above in sides)
        yield paired_series(rests[0], theirs) if theirs else []
        yield paired_series(ours, rests[1]) if ours else []
        # What ends one stage begins the next one elsewhere.
        yield [pair for pair in paired_series(*rests) if pair[0].numbers != pair[1].numbers and least > 1]


def _paired(
    ours: Sequence[Series], theirs: Sequence[Series], context: Context, taken: set[int]
) -> list[tuple[Series, Series]]:
    """Returns which groups are the same; not where what one has more may lie beside the other one.

    `resnets_{0..1}` and `attentions_0` are `mid/{0..2}`: no number tells which.
    """
    pairs = paired_series(ours, theirs)
    known = {id(leaf) for pair in pairs for one in pair for held in one.members.values() for leaf in held}
    free = [_free(leaves, taken | known) for leaves in (context.wanted, context.stored)]

    def are_whole(pair: tuple[Series, Series]) -> bool:
        same = same_layers(*pair)
        sizes = [{at: part_sizes(held) for at, held in one.members.items()} for one in pair]
        unlike = [(sizes[0][at], sizes[1][to]) for at, to in same if sizes[0][at] != sizes[1][to]]
        for side, numbers in enumerate(zip(*same, strict=True)):
            more = {held for at, held in sizes[side].items() if at not in numbers}
            lacking = {each[1 - side] for each in unlike}
            if more & (lacking | sizes_within(free[1 - side], context.above[1 - side])):
                return False
        return True

    return list(filter(are_whole, pairs))


def _pairs_of_kinds(
    ours: Sequence[Series], theirs: Sequence[Series], pairs: Iterable[tuple[Series, Series]]
) -> list[tuple[Series, Series]]:
    """Returns which groups are the same among those left, layers of one kind by themselves.

    `denseblock1`, `transition1`, `denseblock2` are `layers/0`, `layers/1`, `layers/2` of a list.
    """
    used = {id(series) for pair in pairs for series in pair}
    groups = ([one for one in side if id(one) not in used] for side in (ours, theirs))
    left, right = ([kind for one in side for kind in kinds_of(one)] for side in groups)
    return paired_series(left, right) if any(one.is_kind for one in (*left, *right)) else []


def _is_taken(series: Series, taken: set[int]) -> bool:
    return any(id(leaf) in taken for held in series.members.values() for leaf in held)


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
    )
    counted = [(*context.levels, *_same_numbers(link, context)) for link in matched.links]
    pairs = zip(matched.links, counted, strict=True)
    ties = [
        Tie(
            wanted=tuple((*start[0], *path) for path in tie.wanted),
            stored=tuple((*start[1], *path) for path in tie.stored),
            readings=tuple(
                tuple(dataclasses.replace(link, levels=context.levels) for link in reading)
                for reading in tie.readings
            ),
        )
        for tie in _by_modules(matched.ties)
    ]
    return Findings(links=[dataclasses.replace(link, levels=at) for link, at in pairs], ties=ties)


_ModulePairs = frozenset[tuple[Names, Names]]


def _by_modules(ties: Iterable[Tie]) -> Iterator[Tie]:
    """Yields ties; those about parts of the same modules, the outermost ones, as one: none is torn apart."""
    groups: dict[object, list[tuple[Tie, Mapping[_ModulePairs, tuple[Link, ...]]]]] = defaultdict(list)
    for tie in ties:
        readings = {_module_pairs(reading): reading for reading in tie.readings}
        sides = {tuple(map(frozenset, zip(*pairs, strict=True))) for pairs in readings}
        is_one = len(sides) == 1 and all(len(pairs) == len(tie.wanted) > 1 for pairs in readings)
        groups[next(iter(sides)) if is_one else id(tie)].append((tie, readings))
    for items in groups.values():
        shared = [pairs for pairs in items[0][1] if all(pairs in readings for _, readings in items)]
        if len(items) == 1 or len(shared) < 2:
            yield from (tie for tie, _ in items)
            continue
        yield Tie(
            wanted=tuple(names for tie, _ in items for names in tie.wanted),
            stored=tuple(names for tie, _ in items for names in tie.stored),
            readings=tuple(tuple(link for _, made in items for link in made[pairs]) for pairs in shared),
        )


def _module_pairs(reading: Iterable[Link]) -> _ModulePairs:
    parts = [[part_of(leaf) for leaf in (link.target, link.source)] for link in reading]
    depths = [len(shared_levels(side, own=1)) + 1 for side in zip(*parts, strict=True)]
    return frozenset((one[: depths[0]], other[: depths[1]]) for one, other in parts)


def _same_numbers(link: Link, context: Context) -> tuple[tuple[int, int], ...]:
    """Returns the segments below the context in which both paths count the same.

    Numbers of one name, or those of the parts themselves: `Dense_3` and `layers/3`.
    """
    if len(link.wanted) != 1 or len(link.stored) != 1:
        return ()
    left = numbered_segments(link.target.names, context.above[0])
    right = numbered_segments(link.source.names, context.above[1])
    alone = len(left) == len(right)
    ends = len(link.target.names) - 2, len(link.source.names) - 2
    found: list[tuple[int, int]] = []
    for seat, level in right:
        for at, (other, against) in enumerate(left):
            are_last = alone and (other, seat) == ends
            if level.number == against.number and (level.base == against.base or are_last):
                found.append((seat, other))
                left = left[at + 1 :]
                break
    return tuple(found)


# Groups of layers.


def _match_members(one: Series, other: Series, context: Context) -> Findings:
    """Matches two groups layer by layer; layers that look alike on both sides are matched once."""
    classes: dict[tuple[Looks, Looks], list[tuple[int, int]]] = defaultdict(list)
    pairs = same_layers(one, other)
    for left, right in pairs:
        looks = (looks_of(one.members[left], one.depth), looks_of(other.members[right], other.depth))
        classes[looks].append((left, right))
    found = Findings()
    equal = all(left == right for left, right in pairs)
    seats = ((other.seat, one.seat),) if equal else ()
    for numbers in classes.values():
        left, right = numbers[0]
        inner = dataclasses.replace(
            context,
            wanted=one.members[left],
            stored=other.members[right],
            above=(one.depth, other.depth),
            levels=(*context.levels, *seats),
        )
        found.add(match_context(inner).mapped(lambda links, pairs=numbers: _moved(links, one, other, pairs)))
        for pair in (*numbers[1:], numbers[0]) if not equal else ():
            found.groups.append((other.place(pair[1]), one.place(pair[0])))
    if equal:
        found.groups.append((other.template, one.template))
    return found


def _moved(
    links: Iterable[Link], one: Series, other: Series, numbers: Sequence[tuple[int, int]]
) -> Iterator[Link]:
    """Yields the links of one layer for all layers that look alike."""
    every = list(links)
    for left, right in numbers:
        ours = {leaf.names[one.depth :]: leaf for leaf in one.members[left]}
        theirs = {leaf.names[other.depth :]: leaf for leaf in other.members[right]}
        for link in every:
            yield dataclasses.replace(
                link,
                wanted=tuple(ours[leaf.names[one.depth :]] for leaf in link.wanted),
                stored=tuple(theirs[leaf.names[other.depth :]] for leaf in link.stored),
                layers=_layers_in(link.layers, one.place(left), other.place(right)),
            )


def _layers_in(layers: Layers | None, wanted: Names, stored: Names) -> Layers | None:
    """Returns a stack within one layer as that within another one."""
    if layers is None or len(layers.wanted) < len(wanted) or len(layers.stored) < len(stored):
        return layers
    return dataclasses.replace(
        layers,
        stored=(*stored, *layers.stored[len(stored) :]),
        wanted=(*wanted, *layers.wanted[len(wanted) :]),
    )


# Stacks of layers.


def _stacks(
    ours: Sequence[Series], theirs: Sequence[Series], context: Context, taken: set[int]
) -> Iterator[Findings]:
    """Yields what groups of layers that the other side keeps stacked have in it; adds what is used."""
    rest: set[int] = set()  # Of a stack: another group may hold it.
    for least in (2, 1):
        left, right = list(ours), list(theirs)
        if least == 1:
            left = series_of(_free(context.wanted, taken), context.above[0], least)
            right = series_of(_free(context.stored, taken), context.above[1], least)
        for series, stacks in (*((one, False) for one in left), *((one, True) for one in right)):
            series, other = shared_in(series), context.wanted if stacks else context.stored
            above = context.above[0 if stacks else 1]
            stack = stack_of(series, _free(other, taken), above, least)
            found = [(series, *stack)] if stack is not None and are_alike(series) else []
            if not (found or stacks or least == 1):
                found = shares_of(series, _free(other, taken), above)
            for share, prefix, axis, inside in found:
                matched = _match_stack(share, prefix, axis, inside, stacks, context)
                asked = [link for tie in matched.ties for reading in tie.readings for link in reading]
                links = [*matched.links, *asked]
                used = {leaf.source for link in links for leaf in (link.wanted if stacks else link.stored)}
                rest |= {id(leaf) for leaf in inside}
                taken |= {id(leaf) for leaf in inside if leaf.source in used}
                taken |= {id(leaf) for held in share.members.values() for leaf in held}
                yield matched
    taken |= rest


def _free(leaves: Iterable[Leaf], taken: set[int]) -> list[Leaf]:
    return [leaf for leaf in leaves if id(leaf) not in taken]


def _match_stack(
    series: Series,
    prefix: Names,
    axis: int,
    inside: Sequence[Leaf],
    stacks: bool,
    context: Context,
) -> Findings:
    """Matches one layer with what a stack holds of one, and the rest like it."""
    first = series.numbers[0]
    members = series.members[first]
    layer = [dataclasses.replace(leaf, shape=without_axis(leaf.shape, axis)) for leaf in inside]
    # The stack's path takes the place of a layer's, so that both sides count the same levels below.
    inner = dataclasses.replace(
        context,
        wanted=layer if stacks else members,
        stored=members if stacks else layer,
        above=(len(prefix), series.depth) if stacks else (series.depth, len(prefix)),
    )
    counted = stacks or series.numbers == list(range(len(series.numbers)))
    # What counts otherwise than from 0, as `q1` and `q2`, takes its numbers once the stack is taken apart.
    template = series.template if counted else (*series.above, prefix[-1], "{i}")
    layers = Layers(template if stacks else prefix, prefix if stacks else template, axis, stacks, counted)

    def every_layer(links: Sequence[Link]) -> Iterator[Link]:
        for at, number in enumerate(series.numbers):
            own = {leaf.names[series.depth :]: leaf for leaf in series.members[number]}
            for link in links:
                wanted, stored = link.wanted, link.stored
                if stacks:
                    stored = tuple(own[leaf.names[series.depth :]] for leaf in stored)
                else:
                    wanted = tuple(own[leaf.names[series.depth :]] for leaf in wanted)
                layer = number if counted else at
                yield dataclasses.replace(link, wanted=wanted, stored=stored, layers=layers, layer=layer)

    return match_context(inner).mapped(every_layer)
