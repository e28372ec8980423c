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
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from orbax_nnx_handler.planning.core.paths import levels, shared_levels
from orbax_nnx_handler.planning.likeness import called_alike, choice_of, in_list, lists_around, with_sources
from orbax_nnx_handler.planning.likeness.highest_sums import best_pairs
from orbax_nnx_handler.planning.likeness.links import Findings, Link, Tie
from orbax_nnx_handler.planning.likeness.module_parts import Leaf, part_of, ranked
from orbax_nnx_handler.planning.likeness.vocabulary import (
    Concepts,
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


_Match = Callable[[Sequence[Leaf], Sequence[Leaf]], Findings]
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
    found: Findings, wanted: Sequence[Leaf], stored: Sequence[Leaf], match: _Match
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


def _matched(ours: Sequence[OuterModule], theirs: Sequence[OuterModule], match: _Match) -> Findings:
    """Returns what is found of networks that are each other's; a question where several may be."""
    both = itertools.product(enumerate(ours), enumerate(theirs))
    each = {(at, to): match(one.leaves, other.leaves) for (at, one), (to, other) in both}
    if len(each) == 1:
        return each[0, 0]
    orders = itertools.permutations(range(len(theirs)))
    several = ((each[pair].links for pair in enumerate(order)) for order in orders)
    readings = tuple(tuple(itertools.chain(*links)) for links in several)
    names = [tuple(network.names for network in side) for side in (ours, theirs)]
    tie = Tie(wanted=names[0], stored=names[1], readings=readings)
    return Findings(ties=[tie, *(tie for one in each.values() for tie in one.ties)])


def _are_crossed(found: Findings, pairs: Sequence[_Pair]) -> bool:
    """Tells whether parts of some network are those of another one, or left on both sides."""
    homes = [
        {
            leaf.part: ((at, network.names), math.prod(leaf.shape))
            for at, pair in enumerate(pairs)
            for network in pair[side]
            for leaf in network.leaves
        }
        for side in (0, 1)
    ]

    def within(links: Iterable[Link]) -> set[Sequence[tuple[int, Names]]]:
        both = ((x.part, y.part) for link in links for x in link.wanted for y in link.stored)
        return {(homes[0][x][0], homes[1][y][0]) for x, y in both if x in homes[0] and y in homes[1]}

    settled = within(found.links)
    for reading in ((), *(reading for tie in found.ties for reading in tie.readings)):
        made = settled | within(reading)
        are_torn = any(len({pair[side] for pair in made}) < len(made) for side in (0, 1))
        if are_torn or any(one[0] != other[0] for one, other in made):
            return True
    linked = [{x.part for link in found.every for x in (link.wanted, link.stored)[i]} for i in (0, 1)]
    sizes = ({(at, size) for x, ((at, _), size) in homes[i].items() if x not in linked[i]} for i in (0, 1))
    return not set.isdisjoint(*sizes)


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
_Counted = tuple[Link, Names, Names, str]
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
    every = [axes for key, group in groups.items() for axes in _Axes.all_of(*key, group)]
    told: dict[object, set[bool]] = defaultdict(set)
    for axes in (axes for axes in every if not axes.exchanged):
        told[axes.around].add(axes.is_straight)
    made, ties, seen = {id(link): link for link in found.links}, [*found.ties], set[int]()
    for axes in (axes for axes in every if axes.exchanged):
        is_open = axes.gain > -_STRAIGHT and told[axes.around] != {axes.is_straight}
        if id(axes.group) in seen or not (is_open or axes.gain >= _WORD):
            continue
        seen.add(id(axes.group))
        now = [made.pop(id(link)) for link, *_ in axes.group]
        if axes.gain >= _WORD:
            made |= zip(map(id, now), axes.exchanged, strict=True)
        else:
            ties.append(choice_of(now, now, axes.exchanged))
    return Findings(links=[*made.values()], ties=ties, groups=found.groups)


_STRAIGHT, _WORD = 0.5, 2
"""That of two numbers with a word each the first is the outer one on both sides; that a word is the same."""
_SAID = 0.5  # More than that tells it, rather than that there are layers, or a letter.


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
        sources = {(x.source.collection, *at, end): x.source for x, _, at, end in self.group}
        others = list[Leaf | None]()
        for link, _, held, end in self.group:
            numbers = [*held]
            numbers[one], numbers[other] = back[numbers[other]], forth[numbers[one]]
            others.append(sources.get((link.source.collection, *numbers, end)))
        return with_sources((link, [leaf]) for (link, *_), leaf in zip(self.group, others, strict=True))

    @property
    def gain(self) -> float:
        """How much more names and numbers speak for the exchange than for what is found."""
        (one, other), (first, second) = self.at
        ways = ((one, first), (other, second)), ((one, second), (other, first))
        found, both = (sum(self.held[1][at] == self.held[0][to] for at, to in way) for way in ways)
        straight, crossed = ([called_alike(self._word(1, x), self._word(0, y)) for x, y in z] for z in ways)
        kinds = {*itertools.starmap(_kind_of, zip(self.words, (sorted(self.at[1]), self.at[0]), strict=True))}
        if kinds == {"a word each"} and any(crossed) and not any(straight):
            are_more = not all(crossed) and sum(len(x) > 1 for x in self.held[1]) > 2  # Three in a circle.
            return both - found + _WORD * sum(x > _SAID or x for x in crossed) - are_more * _STRAIGHT
        both, found = (x + _WORD * sum(map(_SAID.__lt__, y)) for x, y in ((both, crossed), (found, straight)))
        # The first number of `conv1_0` may be either of two that have a word each.
        if kinds == {"one word", "a word each"}:
            return both - found
        return both - found - (_STRAIGHT if self.is_straight else -_STRAIGHT)

    def _word(self, side: int, at: int) -> str:
        """Returns what a number counts; `conv1_0` is in a list `conv1`, where the two count otherwise."""
        held = self.held[side]
        is_in_list = _is_bare(self.words[side], at) and held[at - 1] != held[at]
        return "" if is_in_list else _word_before(self.words[side], at)


def _is_bare(texts: Sequence[str], at: int) -> bool:
    """Tells whether a number follows another one in a name, as in `conv1_0`."""
    return at > 0 and "/" not in texts[at] and not any(map(str.isalpha, texts[at]))


def _kind_of(texts: Sequence[str], at: Sequence[int]) -> str:
    """Returns how two numbers are told apart: `conv1_0`, `block1/conv0`, or as in a list of lists."""
    word = _word_before(texts, at[1])
    if _is_bare(texts, at[1]):
        return "one word" if at[1] == at[0] + 1 and called_alike(word, word) > _SAID else ""
    return "a word each" if word else ""


def _word_before(texts: Sequence[str], at: int) -> str:
    """Returns what a number counts, by the name before it; both of `conv1_0` count convolutions."""
    while _is_bare(texts, at):
        at -= 1
    return next(filter(None, reversed(texts[at].split("/"))), "")


_Lists = tuple[Names, Names]
"""A wanted list and the stored one."""
_Layers = dict[tuple[int, int], list[tuple[Link, Sequence[Names]]]]
"""By both numbers the links of each layer, with the paths of the stored leaves in it."""
_Order = tuple[int, ...]
_Told = Mapping[_Lists, _Layers]


def with_either_end(found: Findings) -> Findings:
    """Asks about layers that nothing but order tells, where something tells that it may be reversed.

    Where shapes tell that `a_{0,1}` are `as/{1,0}`, one program counts from the other end, and `b_{0,1}` of
    one shape may be `bs/{1,0}`, or `b_{1,0}`. Of what is called by sizes, `enc_{64,32,16}`, the largest may
    be the first. Where shapes allow one order, it is that.
    """
    lists = _lists_of(found.links)
    outer = {pair: layers for pair, layers in lists.items() if pair == _around(layers)}
    told = {pair: layers for pair, layers in outer.items() if not _allow(layers, _order_of(layers)[::-1])}
    orders = {pair: _best_order(pair, layers, told) for pair, layers in outer.items()}
    if turned := {x: order for x, order in orders.items() if order != _order_of(outer[x])}:
        links = _beside(found, map(outer.__getitem__, turned))
        links += (link for x, order in turned.items() for link in with_sources(_exchanged(outer[x], order)))
        return with_either_end(dataclasses.replace(found, links=links))
    asked, ties = dict[_Lists, _Layers](), [*found.ties]
    for pair, layers in lists.items():
        is_open = (around := _around(layers)) not in told and around not in asked
        if is_open and (readings := _readings(pair, layers, told)):
            asked[pair] = layers
            ties.append(choice_of(readings[-1], *readings))
    return dataclasses.replace(found, links=_beside(found, asked.values()), ties=ties)


def _lists_of(links: Iterable[Link]) -> Mapping[_Lists, _Layers]:
    """Returns the lists of which each layer is one of the other side, the outermost ones first."""
    held: dict[_Lists, _Layers] = defaultdict(lambda: defaultdict(list))
    for link in (x for x in links if x.layers is None and not x.copied):
        sides = [[lists_around(leaf.names) for leaf in side] for side in (link.wanted, link.stored)]
        counts = {len(lists) for side in sides for lists in side}
        for at in range(min(*counts, 2) if len(counts) == 1 else min(*counts, 1)):
            ours, theirs = ({lists[at][:2] for lists in side} for side in sides)
            if len(ours) == len(theirs) == 1:
                ((one, number), (other, to)) = *ours, *theirs
                held[one, other][number, to].append((link, [lists[at][2] for lists in sides[1]]))
    pairs = sorted(held, key=lambda pair: len(pair[0]))
    return {pair: held[pair] for pair in pairs if {*map(len, _sides(held[pair]))} == {len(held[pair])}}


def _around(layers: _Layers) -> _Lists:
    """Returns the outermost lists that layers are in."""
    link, _ = next(iter(layers.values()))[0]
    return in_list(link.target.names)[0], in_list(link.source.names)[0]


def _readings(pair: _Lists, layers: _Layers, told: _Told) -> list[list[Link]]:
    """Returns layers in each order that may be theirs, one by one last; none where it is told."""
    straight, ways = (*range(len(layers)),), _ways(pair)
    forwards = {x for x, of in told.items() if _order_of(of) == (*range(len(of)),)}
    on_way = {x for x in told if ways & _ways(x)}  # Down or up a U-Net.
    if (on_way and on_way <= forwards) or any(not {*x}.isdisjoint(_around(layers)) for x in forwards):
        return []
    said = {concepts(x) & {"up", "dec"} for x in pair}  # Levels from either end, and steps upwards.
    may_turn = _are_sizes(pair[1], _sides(layers)) or (len(said) > 1 and all(said))
    others = sorted({*_like(pair, layers, told), *[straight[::-1]] * may_turn} - {straight})
    orders = (*others, straight) if others and _order_of(layers) not in others else ()
    readings = [with_sources(_exchanged(layers, order)) for order in orders]
    return readings if all(readings) else []


def _ways(pair: _Lists) -> Concepts:
    return concepts(itertools.chain(*pair)) & {"down", "up", "enc", "dec"}


def _like(pair: _Lists, layers: _Layers, told: _Told) -> set[_Order]:
    """Returns the orders of lists that count as this one, or as many beside it; no U-Net's middle.

    Beside levels in reverse what lies between them, one less, is so too, and the levels in each of a list.
    """
    straight, found, around = (*range(len(layers)),), set[_Order](), _around(layers)
    is_outer, is_arm = pair == around, concepts(pair[0][-1:]).isdisjoint(("mid", "middle", "bottleneck"))
    for x, of in told.items():
        order, is_alike = _order_of(of), _sides(of) == _sides(layers)
        near = [one[:-1] == other[:-1] for one, other in zip(x, around, strict=True)]
        is_beside = is_arm and (near[0] or (near[1] and not _is_automatic(pair[1])))
        is_alike = is_alike or is_beside if is_outer else is_alike and is_beside and len(order) > 2
        if is_alike and len(order) == len(straight):
            found.add(order)
        elif is_alike and is_beside and order == (len(straight), *straight[::-1]):
            found.add(straight[::-1])
    return found


def _best_order(pair: _Lists, layers: _Layers, told: _Told) -> _Order:
    """Returns the order of layers: that of others of their list by Linen, or the first that shapes allow."""
    is_counted, now, straight = _is_automatic(pair[1]), _order_of(layers), (*range(len(layers)),)
    own = {x: told[x] for x in told if x[0] == pair[0]} if is_counted and pair not in told else {}
    orders = _like(pair, layers, own)
    options = orders if len(orders) == 1 else (straight, straight[::-1])
    return next((x for x in options if x == now or _allow(layers, x)), now)


def _is_automatic(list_: Names) -> bool:
    return "".join(list_[-1:])[:1].isupper()


def _beside(found: Findings, several: Iterable[_Layers]) -> list[Link]:
    gone = {id(link) for layers in several for links in layers.values() for link, _ in links}
    return [link for link in found.links if id(link) not in gone]


def _allow(layers: _Layers, order: _Order) -> bool:
    """Tells whether the shapes of layers allow an order."""
    sides = (([x and x.shape for x in y], [x.shape for x in z.stored]) for z, y in _exchanged(layers, order))
    return all(one == other for one, other in sides)


def _exchanged(layers: _Layers, order: _Order) -> Iterator[tuple[Link, list[Leaf | None]]]:
    """Yields the links of layers with the stored leaves that each has in an order."""
    ours, theirs = map(sorted, _sides(layers))
    into = {at: theirs[to] for at, to in zip(ours, order, strict=True)}
    every = [(at, to, *each) for (at, to), links in sorted(layers.items()) for each in links]
    leaves = {(to, x): y for _, to, z, inside in every for x, y in zip(inside, z.stored, strict=True)}
    return ((link, [leaves.get((into[at], x)) for x in inside]) for at, _, link, inside in every)


def _sides(layers: _Layers) -> tuple[set[int], ...]:
    return tuple({pair[side] for pair in layers} for side in (0, 1))


def _order_of(layers: _Layers) -> _Order:
    ranks = {to: rank for rank, to in enumerate(sorted(_sides(layers)[1]))}
    return tuple(ranks[to] for _, to in sorted(layers))


def _are_sizes(list_: Names, sides: tuple[set[int], ...]) -> bool:
    """Tells whether layers are called by sizes, each twice another one, that need not grow."""
    sizes = sorted(sides[1])
    is_doubled = len(sizes) > 1 and all(2 * one == other for one, other in itertools.pairwise(sizes))
    is_growing = not concepts(list_).isdisjoint(("dec", "up", "upsample", "generator"))
    return is_doubled and sizes[-1] > 8 and sides[0] != sides[1] and not is_growing
