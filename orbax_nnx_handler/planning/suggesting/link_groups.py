"""What one link shows of the others in its group.

First layers whose stacked axis lies elsewhere on the other side; then the links of one leaf in all layers.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from orbax_nnx_handler.planning.core.folding import around, plain_names
from orbax_nnx_handler.planning.core.leaves import Move, MovedGroup, Pair, moved_groups, order_after, permuted
from orbax_nnx_handler.planning.core.paths import is_number, levels, shared_levels
from orbax_nnx_handler.planning.likeness import in_list, lists_around, told_by_names
from orbax_nnx_handler.planning.likeness.joined_parts import kept_by_head
from orbax_nnx_handler.planning.likeness.links import Findings, Link, Tie
from orbax_nnx_handler.planning.likeness.module_parts import Leaf, is_alone, kinds_of_modules, part_of
from orbax_nnx_handler.planning.likeness.shapes import Way, transposed
from orbax_nnx_handler.planning.likeness.vocabulary import (
    Names,
    concepts,
    counts_of,
    meanings,
    words,
)
from orbax_nnx_handler.planning.mapping.roots import PLAIN_LEVELS, Roots
from orbax_nnx_handler.planning.rules.entries import Entry

Order = tuple[int, ...]
"""The axis that each axis comes from."""


def with_moved_axes(found: Findings) -> Findings:
    """Returns links under which all of a group is stacked along the axis that one of its leaves shows.

    Where several axes explain a group, or several orders a leaf that has none, which of them it is is asked.
    """
    made: dict[int, Link | None] = dict(enumerate(found.links))
    plain = [at for at, link in enumerate(found.links) if _is_plain(link)]
    pairs = [Pair((x := found.links[at]).target.names, x.source.shape, x.target.shape) for at in plain]
    ties: list[Tie] = []
    for group in moved_groups(pairs):
        places = [plain[at] for at in group.members]
        members = [found.links[at] for at in places]
        above = {link.source.names[: len(group.name) - len(link.target.names)] for link in members}
        if len(above) > 1:
            continue  # What is several modules in the checkpoint is no one stack.
        told = [(move, _told(group, move)) for move in group.moves]
        readings = [
            [_ordered(x, order_after(len(x.source.shape), move), said) for x in members]
            for move, said in told
        ]
        made |= zip(places, readings[0] if len(readings) == 1 else [None] * len(places), strict=True)
        if len(readings) > 1:
            ties.append(tie_of(readings))
    shares: dict[tuple[Names, Names], list[tuple[Link, Link]]] = defaultdict(list)
    layouts = defaultdict[_Window, set[Order]](set)
    for window, orders in (_layouts(found.links[at]) for at in plain):
        for key in (window, window[:2]) if len(orders) == 1 else ():
            layouts[key].update(orders)
    for at, link in enumerate(found.links):
        if (is_left := made[at] is link and _is_plain(link)) and (both := kept_by_head(link)) is not None:
            shares[plain_names(part_of(link.target)), plain_names(part_of(link.source))].append(both)
            made[at] = None
        orders = _orders(link, layouts) if is_left else []
        if len(orders) > 1:
            made[at] = None
            ties.append(tie_of([[_ordered(link, order, f"transpose {order}")] for order in orders]))
        elif orders and [_order_of(link, way) for way in link.ways[0]] != orders:
            grounds = "siblings" if link.grounds == "shapes" else link.grounds
            made[at] = dataclasses.replace(_ordered(link, orders[0]), grounds=grounds)
    ties += [tie_of(list(zip(*each, strict=True))) for each in shares.values()]
    links = [link for link in made.values() if link is not None]
    return Findings(links=links, ties=[*found.ties, *ties], groups=found.groups)


def _order_of(link: Link, way: Way) -> Order:
    return way.steps[0].axes if way.steps else tuple(range(len(link.source.shape)))


def _told(group: MovedGroup, move: Move) -> str:
    axis, to = move
    return f"layers on axis {axis}, moved to axis {to}" if len(group.moves) > 1 else ""


def _ordered(link: Link, order: tuple[int, ...], told: str = "") -> Link:
    """Returns a link that puts the axes into an order, with what is told where another may be meant."""
    is_kept = order == tuple(range(len(order)))
    # That of a convolution's outputs and inputs tells of matrices too.
    turned = bool(_layouts(link)[1]) and order.index(len(order) - 1) < order.index(len(order) - 2)
    way = Way(() if is_kept else (transposed(link.source.shape, order),), turned=turned)
    (named,) = told_by_names([link])
    return dataclasses.replace(named, ways=((way,),), told=told)


def tie_of(readings: Sequence[Sequence[Link]]) -> Tie:
    """Returns the choice between some readings of the same leaves."""
    ends = [(link.target, link.source) for link in readings[0]]
    wanted, stored = ([leaf.names for leaf in leaves] for leaves in zip(*ends, strict=True))
    return Tie(wanted=tuple(wanted), stored=tuple(stored), readings=tuple(map(tuple, readings)))


def _orders(link: Link, told: "Mapping[_Window, set[Order]]") -> list[Order]:
    """Returns the orders of axes that a link may stand for: of several, no convention tells which.

    The axes of space stay together in order where a kernel's shape allows it: `O, I, D, H, W` of PyTorch. So
    do they in the order that shapes alone tell of the model's other convolutions, first those of its window.
    """
    ways, (window, layouts) = link.ways[0], _layouts(link)
    if layouts:
        known = {*layouts} & (told.get(window) or told.get(window[:2], set()))
        first = _order_of(link, ways[0])
        return [*known] if len(known) == 1 else sorted(layouts, key=lambda order: order != first)
    if len(ways) != 1 or len(steps := ways[0].steps) != 1 or (step := steps[0]).kind != "transpose":
        return []
    different: dict[Order, Order] = {}
    for order in (step.axes, *itertools.permutations(range(len(step.before)))):
        if permuted(step.before, order) == step.shape:
            different.setdefault(tuple(at for at in order if step.before[at] > 1), order)
    # What keeps its name has its layers elsewhere.
    name = link.source.names[-1]
    is_kernel = len(step.before) > 3 and name.endswith("kernel") and name != link.target.names[-1]
    space = tuple(at for at in range(len(step.before) - 2) if step.before[at] > 1 and is_kernel)
    kept = [order for key, order in different.items() if space and _in_a_row(space, key)]
    return kept or list(different.values())


_Window = tuple[object, ...]
"""How many axes kernels have, whether they are of transposed convolutions, and over how many places."""


def _layouts(link: Link) -> tuple[_Window, list[Order]]:
    """Returns the orders of space, inputs and outputs that a convolution's kernel may have: space in a row.

    Outputs come first in all libraries that do not keep Linen's order; of a transposed one in some.
    """
    shape = link.source.shape
    if len(shape) < 3 or link.source.names[-1] != "kernel" or link.target.names[-1] == "kernel":
        return (), []  # Nearly every leaf.
    lengths, said = shape[:-2], concepts((*link.target.names, *link.source.names))
    if not (len(lengths) > 1 and len({*lengths}) == 1) and said.isdisjoint(("conv", "deconv")):
        return (), []
    *space, into, out = range(len(shape))
    ends = ((), (into,), (out,), (into, out), (out, into))
    orders = [(*x, *space, *y) for x, y in itertools.product(ends, ends) if {*x, *y} == {into, out}]
    every = (x for x in orders if len(x) == len(shape) == len(link.target.shape))
    fitting = [x for x in every if permuted(shape, x) == link.target.shape]
    led = [order for order in fitting if order[-1] == out or order.index(out) < order.index(into)]
    is_up = "deconv" in said or ("up" in said and not any(length % 2 for length in lengths))
    return (len(shape), is_up, *lengths), fitting if is_up or not led else led


def _in_a_row(some: tuple[int, ...], axes: tuple[int, ...]) -> bool:
    return some in {axes[at : at + len(some)] for at in range(len(axes))}


def _is_plain(link: Link) -> bool:
    """Tells whether a link is one stored leaf and one wanted one, whole, of which no name tells the axes."""
    is_one = len(link.wanted) == len(link.stored) == len(link.ways) == 1 and not link.ways[0][0].named
    return is_one and link.joint is None and link.layers is None and not (link.source.made or link.copied)


# Links of one kind in all layers.


Kinds = Mapping[object, Sequence[tuple[Link, tuple[str, ...]]]]
"""Links that only the numbers of layers tell apart, with those numbers."""


def kinds_of_links(links: Sequence[Link]) -> Kinds:
    """Returns the links of one leaf in all layers together; nothing where some are stacked."""
    kinds: dict[object, list[tuple[Link, tuple[str, ...]]]] = defaultdict(list)
    are_stacked = any(link.layers is not None or link.copied or link.source.made for link in links)
    for link in () if are_stacked else links:
        kind, numbers = _kind_of(link)
        kinds[kind].append((link, numbers))
    return kinds


def of_few_layers(
    links: Sequence[Link], kinds: Kinds, entries: Sequence[Entry], whole: Iterable[Link] = ()
) -> tuple[Sequence[Link], Sequence[Entry]]:
    """Returns the links of the first two and of the last layer of each kind; all where there are no kinds.

    Rules for them are most likely those for all, and take a fraction of the time to write.

    Args:
        links: The links.
        kinds: The same, by kind.
        entries: The stored model; what only the other links use is left out.
        whole: Links whose modules are returned in all layers.
    """
    if not kinds:
        return links, entries
    modules = {link.source.names[:-1] for link in whole}
    few = {
        id(link)
        for some in kinds.values()
        for link in _some_of(some, is_whole=any(link.source.names[:-1] in modules for link, _ in some))
    }
    if len(few) == len(links):
        return links, entries
    used = {leaf.source for link in links if id(link) in few for leaf in link.stored}
    others = {leaf.source for link in links if id(link) not in few for leaf in link.stored} - used
    return [link for link in links if id(link) in few], [x for x in entries if x.sources[0] not in others]


def _kind_of(link: Link) -> tuple[object, tuple[str, ...]]:
    """Returns what the links of one leaf in all layers share, and the numbers of the layers."""
    stored, wanted = ([list(leaf.names) for leaf in side] for side in (link.stored, link.wanted))
    numbers = tuple(_number(stored[0][seat]) for seat, _ in link.levels)
    for number, (seat, aim) in zip(numbers, link.levels, strict=True):
        for names, at in (*((names, seat) for names in stored), *((names, aim) for names in wanted)):
            if _number(names[at]) != number:
                return id(link), ()  # By itself: the two sides do not count alike.
            names[at] = "".join(names[at].rsplit(number, 1))
    names = tuple(tuple(map(tuple, side)) for side in (stored, wanted))
    return (names, link.levels, link.ways, link.joint, link.after, link.grounds, link.fact), numbers


def _number(name: str) -> str:
    return "".join(re.findall(r"\d+", name)[-1:])


def _some_of(members: Sequence[tuple[Link, tuple[str, ...]]], *, is_whole: bool) -> Iterator[Link]:
    columns = [sorted({*map(int, each)}) for each in zip(*(numbers for _, numbers in members), strict=True)]
    few = [{str(number) for number in (*column[:2], column[-1])} for column in columns]
    for link, numbers in members:
        if is_whole or all(number in some for number, some in zip(numbers, few, strict=True)):
            yield link


def by_module(links: Iterable[Link]) -> Mapping[object, list[Link]]:
    """Returns links by module and parameter, but for the numbers of layers: what one of them tells of all."""
    found: dict[object, list[Link]] = defaultdict(list)
    for link in links:
        sides = map(plain_names, (link.target.names, link.source.names))
        ends = [(names[:-2], names[-1:]) for names in sides]
        found[*ends, len(link.target.shape), len(link.source.shape)].append(link)
    return found


def outermost_apart(parts: Sequence[Names]) -> list[Names]:
    """Returns the outermost modules by which parts are told apart, or these."""
    first, count = len(shared_levels(parts, own=1)) + 1, len({*parts})
    each = ([part[:depth] for part in parts] for depth in range(first, max(map(len, parts)) + 1))
    return next((modules for modules in each if len({*modules}) == count), [*parts])


def possible_roots(links: Sequence[Link], roots: Roots, *, is_alone: bool) -> Iterator[tuple[int, Names]]:
    """Yields where the model may sit in the target, and the stored levels that go by themselves."""
    shared = shared_levels([leaf.names for link in links for leaf in link.wanted], own=1)
    named = (at for at, name in enumerate(shared) if name not in PLAIN_LEVELS and not name.isdecimal())
    plain = next(named, len(shared))
    kept = tuple(token for token in roots.stored if not is_number(token))
    begins = all(leaf.names[: len(kept)] == kept for link in links for leaf in link.stored)
    for depth in dict.fromkeys((0 if is_alone else plain, plain, len(roots.wanted), 0, len(shared))):
        if depth <= len(shared):
            # Rules that name the levels above the stored model save back by themselves.
            yield depth, ()
            if kept and begins and len(kept) == len(roots.stored):
                yield depth, kept


# Links that speak against each other, and questions that are one.


def without_strays(links: Sequence[Link], wanted: Iterable[Leaf], stored: Iterable[Leaf]) -> list[Link]:
    """Returns the links without those that order alone settles, between layers that do not fit each other.

    Of levels that the programs number the other way around, a norm may fit the wrong one, and nothing else.
    """
    if all(link.grounds != "order" for link in links):
        return list(links)
    ours, theirs = _sizes_by_layer(wanted), _sizes_by_layer(stored)
    held = Counter(_layer(leaf.names) for link in links for leaf in link.wanted)

    def is_stray(link: Link) -> bool:
        here, there = _layer(link.target.names), _layer(link.source.names)
        if not here or not there or 2 * held[here] >= len(ours[here]):
            return False
        return 2 * sum(size for size in ours[here] if size in theirs[there]) < sum(ours[here])

    return [link for link in links if link.grounds != "order" or not is_stray(link)]


def _sizes_by_layer(leaves: Iterable[Leaf]) -> Mapping[Names, list[int]]:
    found: dict[Names, list[int]] = defaultdict(list)
    for leaf in leaves:
        found[_layer(leaf.names)].append(math.prod(leaf.shape))
    return found


def _layer(names: Names) -> Names:
    """Returns what leads into the outermost layer that a part is in; nothing where it is in none."""
    inside = in_list(names)[1]
    return names[: len(names) - len(inside)] if len(inside) > 1 else ()


def with_networks_told(found: Findings) -> Findings:
    """Returns what is known, with what is asked of a network as other parts of it tell which one it is.

    A part is of the network that it lies in; what is no layer, also of the one that it is called after, as
    `decoder_pos_embedding` beside `decoder`.
    """
    told = [_told_by_networks(tie, found.links) for tie in found.ties]
    ties = [tie for tie, links in zip(found.ties, told, strict=True) if not links]
    return dataclasses.replace(found, links=[*found.links, *itertools.chain(*told)], ties=ties)


def _told_by_networks(tie: Tie, links: Iterable[Link]) -> Sequence[Link]:
    """Returns the only reading that agrees with all that is known of the networks; nothing of several."""
    ends = [{(part_of(x.target), part_of(x.source)) for x in each} for each in tie.readings]
    sides = [*zip(*(pair for each in ends for pair in each), strict=True)]
    depths = [len(shared_levels(side, own=2)) + 1 for side in sides]
    networks = [{names[:at] for names in side} for side, at in zip(sides, depths, strict=True)]
    if not sides or any(len(x) < 2 or any(counts_of("".join(y[-1:])) for y in x) for x in networks):
        return ()
    told = (x for x in links if x.grounds != "order")
    both = ((_network_of(x.target, networks[0]), _network_of(x.source, networks[1])) for x in told)
    known, count = {pair for pair in both if all(pair)} or {((), ())}, len(networks[0])
    made = [{(one[: depths[0]], other[: depths[1]]) for one, other in each} for each in ends]
    fitting = [x for x, each in zip(tie.readings, made, strict=True) if known <= each and len(each) == count]
    return fitting[0] if len(fitting) == 1 < len(ends) else ()


def _network_of(leaf: Leaf, networks: Collection[Names]) -> Names:
    depth = len(next(iter(networks)))
    if (own := leaf.names[:depth]) in networks:
        return own
    called = [x for x in networks if "/".join(own).startswith("/".join(x) + "_")]
    return called[0] if len(called) == 1 and leaf.names[-1] not in ("kernel", "bias") else ()


class Precedents:
    """Which parts of two modules are each other's, as far as all that is known of such modules agrees.

    Modules are of one kind if only numbers tell their paths apart, or if they are called alike and hold
    parts of the same names: an encoder's layers tell nothing of a decoder's that hold more.
    """

    def __init__(self, wanted: Iterable[Leaf], stored: Iterable[Leaf], links: Iterable[Link]) -> None:
        parts = [{part_of(leaf) for leaf in leaves} for leaves in (wanted, stored)]
        self._wanted, self._stored = map(kinds_of_modules, parts)
        self._counted = [*map(_lists_in, parts)]
        self._alike: dict[object, bool] = {}
        self._forth: dict[object, set[object]] = defaultdict(set)
        self._back: dict[object, set[object]] = defaultdict(set)
        self._takers: dict[object, set[object]] = defaultdict(set)
        self._numbers: dict[object, set[tuple[int | None, ...]]] = defaultdict(set)
        told = {(part_of(x.target), part_of(x.source)) for x in links if x.grounds != "order"}
        several = {plain_names(part) for part in parts[1] if part and levels(part)[-1].number}
        # The only norm of a block may be the second one of blocks that have two.
        alone = {x for _, x in told if plain_names(x) in several and is_alone(x, self._stored)}
        for one, other in (pair for pair in told if pair[1] not in alone):
            numbers = tuple(level.number for level in levels(one))
            for kinds, left, right in self._views(one, other):
                self._forth[key := (kinds, left)].add(right)
                self._back[kinds, right].add(left)
                self._numbers[key].add(numbers)
                if kinds == "list" and isinstance(right, tuple):
                    self._takers[right[:2]].add(left)

    def speak_for(self, wanted: Names, stored: Names) -> int:
        """Returns how much tells that a part is made from another one: lists, modules of each kind."""
        told = {
            "list" if kinds in ("list", "modules") else len(one)
            for kinds, one, other in self._views(wanted, stored)
            if self._forth.get((kinds, one)) == {other}
            and self._back[kinds, other] == {one}
            # One of modules, or of two lists of one class, does not tell where the others are.
            and (len(self._numbers[kinds, one]) > 1 or not self._is_unsure(kinds, other))
        }
        return len(told)

    def _is_unsure(self, kinds: object, other: object) -> bool:
        is_list = kinds == "list" and isinstance(other, tuple) and len(self._takers[other[:2]]) > 1
        return is_list or kinds == "modules"

    def _views(self, wanted: Names, stored: Names) -> Iterator[tuple[object, tuple[object, ...], object]]:
        """Yields two parts as those of the modules around them, of lists, and by their first or last word."""
        ours, theirs = levels(wanted), levels(stored)
        if not ours or not theirs:
            return
        sides = [[(at, _count_of(at)) for at in around(names)] for names in (wanted, stored)]
        is_counted = _count_of(wanted) == _count_of(stored)
        for (one, count), (other, against) in itertools.product(*sides):
            if is_counted and count != against:
                continue  # `down/1` and `down_1_block_0`: below them only one side still counts blocks.
            among = self._among(other, stored)
            for kinds in zip(self._wanted.get(one, ()), self._stored.get(other, ()), strict=False):
                yield (kinds, among), wanted[len(one) :], stored[len(other) :]
        modules = wanted[: -ours[-1].width], stored[: -theirs[-1].width]
        are_alone = is_alone(wanted, self._wanted) and is_alone(stored, self._stored)
        for kind, one, other in (("list", wanted, stored), ("modules", *modules))[: 1 + are_alone]:
            if told := self._place_in_list(one, other):
                yield kind, *told
        # What Linen counts of one class tells nothing of another: norms tell where their layers are.
        for word, against in () if theirs[-1].is_automatic else _one_word_apart(wanted[-1], stored[-1]):
            yield modules, word, against

    def _among(self, module: Names, part: Names) -> frozenset[int]:
        """Returns the numbers of a class that Linen has counted with a part: of others, they tell nothing."""
        first = next((level for level in levels(part[len(module) :])[:1] if level.is_automatic), None)
        return frozenset(self._counted[1].get((module, first.base), ()) if first else ())

    def _place_in_list(self, one: Names, other: Names) -> tuple[tuple[object, ...], object] | None:
        """Returns the lists that two parts are in, where one counts as the other, and as far."""
        here, there = levels(one)[-1:], levels(other)[-1:]
        if not here or not there or (at := here[0].number) is None or (to := there[0].number) is None:
            return None
        ours, theirs = (one[: -here[0].width], here[0].base), (other[: -there[0].width], there[0].base)
        if (key := (ours, theirs, to - at)) not in self._alike:  # Asked of each of their parts.
            counted = {number + to - at for number in self._counted[0][ours]}
            self._alike[key] = counted == self._counted[1][theirs]
        return (ours, (*theirs, to - at)) if self._alike[key] else None


@functools.lru_cache(maxsize=65536)
def _one_word_apart(one: str, other: str) -> Sequence[tuple[tuple[int, str], str]]:
    """Returns the first and the last word of two names, each where the others mean the same."""
    both = words(one), words(other)
    rests = ((at, [{*meanings("_".join(x[1:] if at == 0 else x[:-1]))} for x in both]) for at in (0, -1))
    told = (at for at, (left, right) in rests if left == right and left and not both[0][at].isdecimal())
    return [((at, both[0][at]), both[1][at]) for at in told]


def _lists_in(parts: Iterable[Names]) -> Mapping[tuple[Names, str], set[int]]:
    """Returns the numbers of each list, by where it is and what it is called."""
    found: dict[tuple[Names, str], set[int]] = defaultdict(set)
    for (*above, base), number, _ in (each for part in parts for each in lists_around(part)):
        found[tuple(above), base].add(number)
    return found


@functools.lru_cache(maxsize=1 << 16)
def _count_of(names: Names) -> int:
    """Returns how many numbers a path has."""
    return sum(map(str.isdecimal, itertools.chain(*map(words, names))))
