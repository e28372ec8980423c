"""Modules by what they hold: which outermost ones of two models are each other's, as whole networks.

A model of several networks keeps each in a module of its own: a generator and a discriminator, an actor
and a critic, an encoder and a decoder. Where one module of either side holds leaves of the same sizes,
nothing of it goes into another one, whatever its parts are called. Of several that hold the same, names
tell which is which, or nothing does.
"""

import dataclasses
import itertools
import math
import operator
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from orbax_nnx_handler.planning.core.paths import levels, shared_levels
from orbax_nnx_handler.planning.likeness.assignment import best_pairs
from orbax_nnx_handler.planning.likeness.links import Findings, Link, Tie
from orbax_nnx_handler.planning.likeness.module_parts import Leaf, part_of
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
    """An outermost module of a model, with more than one part.

    Attributes:
        names: Its path.
        leaves: All that it holds.
    """

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
    """Returns what is known of a model; where parts of networks are crossed, each matched with its own alone.

    Args:
        found: What is known of the whole model.
        wanted: The wanted leaves.
        stored: The stored leaves.
        match: Matches some leaves of both sides.
    """
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
