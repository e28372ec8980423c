"""Modules by what they hold: which outermost ones of two models are each other's, as whole networks.

A model of several networks keeps each in a module of its own: a generator and a discriminator, an actor
and a critic, an encoder and a decoder. Where one module of either side holds leaves of the same sizes,
nothing of it goes into another one, whatever its parts are called. Of several that hold the same, names tell
which is which, or nothing does. Then parts that two numbers count, and layers counted from the other end.
"""

import dataclasses
import functools
import itertools
import math
import operator
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.paths import levels, shared_levels
from orbax_nnx_handler.planning.likeness import in_list, outermost_list, share_word, with_sources
from orbax_nnx_handler.planning.likeness.assignment import best_pairs
from orbax_nnx_handler.planning.likeness.links import Findings, Link, Tie
from orbax_nnx_handler.planning.likeness.module_parts import Leaf, part_of, ranked
from orbax_nnx_handler.planning.likeness.vocabulary import (
    Names,
    concepts,
    counts_of,
    exclude,
    likeness,
    telling,
)


@dataclasses.dataclass(frozen=True)
class OuterModule:
    """An outermost module of a model, with more than one part: its path, and all that it holds."""

    names: Names
    leaves: list[Leaf]


_Pair = tuple[Sequence[OuterModule], Sequence[OuterModule]]
"""Networks of both sides that are each other's: one, or as many of which nothing tells which is which."""

_ROLES = frozenset("qkv")
"""What a network is not called: `q` and `value` are no parts of an attention."""
_NUMBER = 2.0
"""Of two networks that count alike: `q1` and `critic1`."""
_MOST = 4
"""Of more networks that hold the same, not every order can be chosen."""
_FEW = 32
"""A model of more modules that hold the same is none of several networks, but a list without numbers."""


def with_networks_apart(
    found: Findings,
    wanted: Sequence[Leaf],
    stored: Sequence[Leaf],
    match: Callable[[Sequence[Leaf], Sequence[Leaf]], Findings],
) -> Findings:
    """Returns what is known of a model; where parts of networks are crossed, each is matched by itself."""
    pairs = [*_paired(wanted, stored)]
    if not _are_crossed(found, pairs):
        return found
    made = Findings()
    for ours, theirs in pairs:
        made.add(_matched(ours, theirs, match))
    used = {leaf.part for link in made.every for leaf in (*link.wanted, *link.stored)}
    left = ([leaf for leaf in side if leaf.part not in used] for side in (wanted, stored))
    made.add(match(*left))
    return made


def _matched(
    ours: Sequence[OuterModule],
    theirs: Sequence[OuterModule],
    match: Callable[[Sequence[Leaf], Sequence[Leaf]], Findings],
) -> Findings:
    """Returns what is found of networks that are each other's; a question where several may be."""
    both = itertools.product(enumerate(ours), enumerate(theirs))
    each = {(at, to): match(one.leaves, other.leaves) for (at, one), (to, other) in both}
    if len(each) == 1:
        return each[0, 0]
    orders = itertools.permutations(range(len(theirs)))
    readings = ([each[pair].links for pair in enumerate(order)] for order in orders)
    names = [tuple(network.names for network in side) for side in (ours, theirs)]
    tie = Tie(
        wanted=names[0],
        stored=names[1],
        readings=tuple(tuple(itertools.chain(*several)) for several in readings),
    )
    return Findings(ties=[tie, *(tie for one in each.values() for tie in one.ties)])


_Home = tuple[int, Names]
"""To which networks that are each other's a leaf belongs, and to which one of them."""


def _are_crossed(found: Findings, pairs: Sequence[_Pair]) -> bool:
    """Tells whether parts of some network are those of another one, or left on both sides."""
    homes = [
        {
            leaf.part: (at, network.names)
            for at, pair in enumerate(pairs)
            for network in pair[side]
            for leaf in network.leaves
        }
        for side in (0, 1)
    ]

    def within(links: Iterable[Link]) -> set[tuple[_Home, _Home]]:
        both = ((x.part, y.part) for link in links for x in link.wanted for y in link.stored)
        return {(homes[0][x], homes[1][y]) for x, y in both if x in homes[0] and y in homes[1]}

    settled = within(found.links)
    for reading in ((), *(reading for tie in found.ties for reading in tie.readings)):
        made = settled | within(reading)
        if any(one[0] != other[0] for one, other in made):
            return True
        if any(len({pair[side] for pair in made}) < len(made) for side in (0, 1)):
            return True
    sides = operator.attrgetter("wanted"), operator.attrgetter("stored")
    linked = [{x.part for link in found.every for x in side(link)} for side in sides]
    left = [
        {
            (at, math.prod(x.shape))
            for at, pair in enumerate(pairs)
            for network in pair[side]
            for x in network.leaves
            if x.part not in linked[side]
        }
        for side in (0, 1)
    ]
    return bool(left[0] & left[1])


def _paired(wanted: Sequence[Leaf], stored: Sequence[Leaf]) -> Iterator[_Pair]:
    """Yields networks that hold the same; then those that lie deeper than these did."""
    sides = [wanted, stored]
    while True:
        ours, theirs = map(_by_contents, sides)
        both = [(ours[held], theirs[held]) for held in ours.keys() & theirs.keys()]
        both = [(one, other) for one, other in both if len(one) == len(other) <= _FEW]
        found = [pair for some in both for pair in _by_names(*some)]
        if not found:
            return
        yield from sorted(found, key=lambda pair: pair[0][0].names)
        taken = {id(x) for pair in found for side in pair for network in side for x in network.leaves}
        sides = [[leaf for leaf in side if id(leaf) not in taken] for side in sides]


def _by_names(ours: Sequence[OuterModule], theirs: Sequence[OuterModule]) -> Iterator[_Pair]:
    """Yields which networks are each other's by their names, and last those of which none tells."""
    said, says = ([concepts(network.names) for network in side] for side in (ours, theirs))
    words = telling(said), telling(says)
    counts = [[counts_of(network.names[-1]) for network in side] for side in (ours, theirs)]
    scores = {
        (at, to): 20 + likeness(words[0][at], words[1][to]) + _NUMBER * (counts[0][at] == counts[1][to] != ())
        for at, to in itertools.product(range(len(ours)), range(len(theirs)))
        if not exclude(said[at] - _ROLES, says[to] - _ROLES)
    }
    pairs = best_pairs(scores)
    yield from (([ours[at]], [theirs[to]]) for at, to in pairs)
    taken = [{*side} for side in zip(*pairs, strict=True)] or [set[int](), set[int]()]
    left = [[at for at in range(len(ours)) if at not in side] for side in taken]
    if 0 < len(left[0]) <= _MOST and (len(left[0]) > 1 or (left[0][0], left[1][0]) in scores):
        yield [ours[at] for at in left[0]], [theirs[to] for to in left[1]]


def _by_contents(leaves: Sequence[Leaf]) -> Mapping[object, list[OuterModule]]:
    """Returns the networks of a model by the sizes of all that they hold."""
    found: dict[object, list[OuterModule]] = defaultdict(list)
    for names, held in _outermost(leaves).items():
        if len({part_of(leaf) for leaf in held}) > 1:
            sizes = sorted((leaf.collection or "", leaf.number, math.prod(leaf.shape)) for leaf in held)
            found[tuple(sizes)].append(OuterModule(names, held))
    return found


def _outermost(leaves: Sequence[Leaf]) -> Mapping[Names, list[Leaf]]:
    """Returns the outermost modules of a model that are none of a list: below what leads to all of it."""
    above = len(shared_levels([leaf.names for leaf in leaves], own=1)) if leaves else 0
    found: dict[Names, list[Leaf]] = defaultdict(list)
    for leaf in leaves:
        if len(leaf.names) > (depth := above + levels(leaf.names[above:])[0].width):
            found[leaf.names[:depth]].append(leaf)
    ends = {names: levels(names[above:])[0] for names in found}
    counts = Counter(level.base for level in ends.values())
    return {
        names: found[names]
        for names, level in ends.items()
        if level.number is None or (counts[level.base] == level.width == 1)
    }


_DIGITS = re.compile(r"(\d+)")
_Numbers = tuple[str, ...]
_Counted = tuple[Link, _Numbers, _Numbers, str]
"""A link with the numbers of the wanted and of the stored path, and what follows the last stored one."""


def with_axes(found: Findings) -> Findings:
    """Returns links of which a number is that of the same word; asks where either of two may be the other.

    `conv1_0` is in `blocks/0/conv1`: the same word stands before 1 on both sides, and both lists count from
    0. In `block1/conv1` of as many blocks as convolutions it may be `conv1_2` or `conv2_1` that follows.
    """
    groups: dict[tuple[Names, Names], list[_Counted]] = defaultdict(list)
    for link in found.links:
        ours = _DIGITS.split("/".join(link.target.names))
        if len(ours) > 4 and link.layers is None and link.joint is None and not link.copied:
            theirs = _DIGITS.split("/".join(link.source.names))
            key = tuple(ours[:-1:2]), tuple(theirs[:-1:2])
            groups[key].append((link, tuple(ours[1::2]), tuple(theirs[1::2]), theirs[-1]))
    told, open_ = dict[object, set[bool]](), list[_Axes]()
    for axes in (each for key, group in groups.items() for each in _Axes.all_of(*key, group)):
        if axes.exchanged:
            open_.append(axes)
        else:
            told.setdefault(axes.around, set()).add(axes.is_straight)
    made, ties, seen = {id(link): link for link in found.links}, [*found.ties], set[int]()
    for axes in open_:
        is_open = axes.gain > -_STRAIGHT and told.get(axes.around) != {axes.is_straight}
        if id(axes.group) in seen or not (is_open or axes.gain >= 1):
            continue
        seen.add(id(axes.group))
        now = [made.pop(id(link)) for link, *_ in axes.group]
        if axes.gain >= 1:
            made |= zip(map(id, now), axes.exchanged, strict=True)
        else:
            ties.append(_choice(now, now, axes.exchanged))
    return Findings(links=[*made.values()], ties=ties, groups=found.groups)


_STRAIGHT = 0.5
"""That of two numbers with words of their own the first one is the outer one on both sides."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Axes:
    """Parts that two numbers count on both sides, each as often.

    Attributes:
        group: Their links.
        words: What stands before each number of both sides, wanted and stored.
        held: The values of each number of both sides.
        at: The places of the two among the numbers of the stored paths, and of the wanted ones.
    """

    group: Sequence[_Counted]
    words: tuple[Names, Names]
    held: tuple[Sequence[Sequence[str]], Sequence[Sequence[str]]]
    at: tuple[tuple[int, int], tuple[int, int]]

    @classmethod
    def all_of(cls, wanted: Names, stored: Names, group: Sequence[_Counted]) -> Iterator["_Axes"]:
        """Yields the pairs of numbers of which each counts what one of the other side does."""
        ours, theirs = (
            [ranked(column) for column in zip(*(x[side] for x in group), strict=True)] for side in (1, 2)
        )
        long = [at for at, (values, _) in enumerate(theirs) if len(values) > 1]
        aims = {at: [to for to, (_, ranks) in enumerate(ours) if ranks == theirs[at][1]] for at in long}
        held = [values for values, _ in ours], [values for values, _ in theirs]
        for one, other in itertools.combinations(long, 2):
            if len(held[1][one]) == len(held[1][other]) and len(aims[one]) == len(aims[other]) == 1:
                at = (one, other), (aims[one][0], aims[other][0])
                if at[1][0] != at[1][1]:
                    yield cls(group, (wanted, stored), held, at)

    @property
    def is_straight(self) -> bool:
        """Whether the first number of one side is the first one of the other."""
        return self.at[1][0] < self.at[1][1]

    @property
    def around(self) -> object:
        """What leads into the outer list, and how both count: what one part tells of those beside it."""
        one, other = self.at[0]
        return self.words[0][: min(self.at[1]) + 1], *map(tuple, (self.held[1][one], self.held[1][other]))

    @functools.cached_property
    def exchanged(self) -> list[Link]:
        """The links where either number is the other one; none where shapes allow only what is found."""
        one, other = self.at[0]
        forth = dict(zip(self.held[1][one], self.held[1][other], strict=True))
        back = {value: key for key, value in forth.items()}
        sources = {(x.source.collection, at, end): x.source for x, _, at, end in self.group}

        def exchanged(numbers: _Numbers) -> _Numbers:
            moved = {one: back[numbers[other]], other: forth[numbers[one]]}
            return tuple(moved.get(at, number) for at, number in enumerate(numbers))

        return with_sources(
            (link, sources.get((link.source.collection, exchanged(numbers), end)))
            for link, _, numbers, end in self.group
        )

    @property
    def gain(self) -> float:
        """How much more names and numbers speak for the exchange than for what is found."""
        (one, other), (first, second) = self.at
        found = self._alike(one, first) + self._alike(other, second)
        both = self._alike(one, second) + self._alike(other, first)
        sides = zip(self.words, (sorted(self.at[1]), self.at[0]), strict=True)
        # The first number of `conv1_0` may be either of two that have a word each.
        if {*itertools.starmap(_kind_of, sides)} == {"one word", "a word each"}:
            return both - found
        return both - found - (_STRAIGHT if self.is_straight else -_STRAIGHT)

    def _alike(self, at: int, to: int) -> int:
        """Returns how much tells that a number of a stored path is one of the wanted path."""
        called = share_word(self._word(1, at), self._word(0, to))
        return called + (self.held[1][at] == self.held[0][to])

    def _word(self, side: int, at: int) -> str:
        """Returns what a number counts; `conv1_0` is in a list `conv1`, where the two count otherwise."""
        held = self.held[side]
        is_in_list = _is_bare(self.words[side], at) and held[at - 1] != held[at]
        return "" if is_in_list else _word_before(self.words[side], at)


def _choice(found: Sequence[Link], *readings: Sequence[Link]) -> Tie:
    """Returns the choice between some readings of what was found, each leaf made of one."""
    ends = zip(*((part_of(link.target), part_of(link.source)) for link in found), strict=True)
    wanted, stored = (tuple(dict.fromkeys(side)) for side in ends)
    return Tie(wanted=wanted, stored=stored, readings=tuple(map(tuple, readings)))


def _is_bare(texts: Sequence[str], at: int) -> bool:
    """Tells whether a number follows another one in a name, as in `conv1_0`."""
    return at > 0 and "/" not in texts[at] and not any(map(str.isalpha, texts[at]))


def _kind_of(texts: Sequence[str], at: Sequence[int]) -> str:
    """Returns how two numbers are told apart: `conv1_0`, `block1/conv0`, or as in a list of lists."""
    word = _word_before(texts, at[1])
    if _is_bare(texts, at[1]):
        return "one word" if at[1] == at[0] + 1 and share_word(word, word) else ""
    return "a word each" if word else ""


def _word_before(texts: Sequence[str], at: int) -> str:
    """Returns what a number counts, by the name before it; both of `conv1_0` count convolutions."""
    while _is_bare(texts, at):
        at -= 1
    return next(filter(None, reversed(texts[at].split("/"))), "")


_Layers = dict[tuple[int, int], list[Link]]
_Lists = tuple[Names, Names]
_Told = Mapping[_Lists, tuple[tuple[int, ...], tuple[set[int], ...]]]


def with_either_end(found: Findings) -> Findings:
    """Asks about layers that nothing but order tells, where something tells that it may be reversed.

    Where shapes tell that `a_{0,1}` are `as/{1,0}`, `b_{0,1}` of one shape may be `bs/{1,0}`. Of what is
    called by sizes, `enc_{64,32,16}`, the largest may be the first. Where shapes allow one order, it is that.
    """
    held: dict[_Lists, _Layers] = defaultdict(lambda: defaultdict(list))
    for link in (x for x in found.links if x.joint is None and x.layers is None and not x.copied):
        (ours, at), (theirs, to) = (outermost_list(leaf.names) for leaf in (link.target, link.source))
        if at is not None and to is not None:
            held[ours, theirs][at, to].append(link)
    some = {pair: of for pair, of in held.items() if {*map(len, _sides(of))} == {len(of)}}
    told = {pair: (_order_of(of), _sides(of)) for pair, of in some.items() if _is_told(of)}
    if turned := {x: order for x, of in some.items() if (order := _other_order(x, of, told))}:
        links = _beside(found, map(some.__getitem__, turned))
        links += (link for x, order in turned.items() for link in _ordered(some[x], order))
        return with_either_end(dataclasses.replace(found, links=links))
    forwards = {list_ for x, (order, _) in told.items() if order == (*range(len(order)),) for list_ in x}
    near = {x: told if forwards.isdisjoint(x) else {} for x in some if x not in told}
    asked = [(some[x], each) for x, beside in near.items() if (each := _readings(x, some[x], beside))]
    ties = [*found.ties, *(_choice(each[-1], *each) for _, each in asked)]
    return dataclasses.replace(found, links=_beside(found, (of for of, _ in asked)), ties=ties)


def _readings(pair: _Lists, layers: _Layers, told: _Told) -> list[list[Link]]:
    """Returns layers in each order that may be theirs, one by one last; none where it is told."""
    straight, now = (*range(len(layers)),), _order_of(layers)
    back = [straight[::-1]] if _are_sizes(pair[1], _sides(layers)) else []
    others = {*back, *_like(pair, layers, told)} - {straight}
    readings = [_ordered(layers, order) for order in (*sorted(others), straight)]
    return readings if others and now not in others and all(readings) else []


def _like(pair: _Lists, layers: _Layers, told: _Told) -> set[tuple[int, ...]]:
    """Returns the orders of lists that are counted as this one, or beside it by Linen; no U-Net's middle."""
    sides, is_arm = _sides(layers), concepts(pair[0][-1:]).isdisjoint(("mid", "middle", "bottleneck"))
    near = (x for x in told if is_arm and x[0][:-1] == pair[0][:-1])
    beside = {x for x in near if _is_automatic(x[1]) and _is_automatic(pair[1])}
    every = ((x, *told[x]) for x in told if len(told[x][0]) == len(layers))
    return {order for x, order, others in every if others == sides or x in beside}


def _other_order(pair: _Lists, layers: _Layers, told: _Told) -> tuple[int, ...]:
    """Returns the order of layers, if another one: shapes allow no other, or others of their list tell it."""
    now, straight, is_counted = _order_of(layers), (*range(len(layers)),), _is_automatic(pair[1])
    own = {x: told[x] for x in told if x[0] == pair[0]} if is_counted and pair not in told else {}
    orders = _like(pair, layers, own)
    is_back = not orders and now != straight and not _ordered(layers, straight)
    (order,) = orders if len(orders) == 1 else {straight[::-1] if is_back else straight}
    return order if order not in (now, straight) and _ordered(layers, order) else ()


def _is_automatic(list_: Names) -> bool:
    return "".join(list_[-1:])[:1].isupper()


def _beside(found: Findings, several: Iterable[_Layers]) -> list[Link]:
    gone = {id(link) for layers in several for links in layers.values() for link in links}
    return [link for link in found.links if id(link) not in gone]


def _ordered(layers: _Layers, order: tuple[int, ...]) -> list[Link]:
    """Returns the links of layers in an order; none where shapes do not allow it."""
    ours, theirs = map(sorted, _sides(layers))
    into = {at: theirs[to] for at, to in zip(ours, order, strict=True)}
    leaves = {(to, _within(x)): x.source for (_, to), links in layers.items() for x in links}
    every = [(at, link) for (at, _), links in sorted(layers.items()) for link in links]
    return with_sources((link, leaves.get((into[at], _within(link)))) for at, link in every)


def _within(link: Link) -> tuple[Names, ...]:
    return tuple(in_list(leaf.names)[1] for leaf in (link.target, link.source))


def _sides(layers: _Layers) -> tuple[set[int], ...]:
    return tuple({pair[side] for pair in layers} for side in (0, 1))


def _order_of(layers: _Layers) -> tuple[int, ...]:
    ranks = {to: rank for rank, to in enumerate(sorted(_sides(layers)[1]))}
    return tuple(ranks[to] for _, to in sorted(layers))


def _is_told(layers: _Layers) -> bool:
    """Tells whether shapes tell in which order layers are each other's."""
    shapes: dict[Names, list[Shape]] = defaultdict(list)
    for link in itertools.chain.from_iterable(layers[pair] for pair in sorted(layers)):
        shapes[in_list(link.target.names)[1]].append(link.target.shape)
    return any(each != each[::-1] for each in shapes.values() if len(each) == len(layers))


def _are_sizes(list_: Names, sides: tuple[set[int], ...]) -> bool:
    """Tells whether layers are called by sizes, each twice another one, that need not grow."""
    sizes = sorted(sides[1])
    is_doubled = len(sizes) > 1 and all(2 * one == other for one, other in itertools.pairwise(sizes))
    is_growing = not concepts(list_).isdisjoint(("dec", "up", "upsample", "generator"))
    return is_doubled and sizes[-1] > 8 and sides[0] != sides[1] and not is_growing
