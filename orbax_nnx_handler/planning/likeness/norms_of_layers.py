"""Parts that Linen counts, placed by what is known of the others of their module.

Linen counts `Conv_0, Conv_1` and `BatchNorm_0, BatchNorm_1` apart, each in the order in which the
program computes them. Two things follow:

- Where each norm of a module is as wide as what its layer takes, or as what it returns, `BatchNorm_1` is
  the norm of `Conv_1`. A target says by names what belongs together: `conv1` and `bn1`, `skip_conv` and
  `skip_norm`, `downsample/0` and `downsample/1`. So a norm goes where its layer has gone, whatever the
  numbers of the two programs are.
- Where the names of a target, and what is known, leave one order of what is open, what is counted goes
  there one by one: `blocks/0/conv1, blocks/0/conv2, blocks/1/conv1`, and `final_norm` behind all blocks.

Last, lists that a program counts from one part further on, all of a module as one of them.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from orbax_nnx_handler.planning.core.paths import Level, levels, shared_levels
from orbax_nnx_handler.planning.likeness import Couples, apart_from, companions, lists_around
from orbax_nnx_handler.planning.likeness.links import Findings, Link, PairGrounds, Tie
from orbax_nnx_handler.planning.likeness.module_parts import (
    Leaf,
    ModulePart,
    counted_parts,
    leaves_below,
    module_parts,
    part_of,
    prefixes,
)
from orbax_nnx_handler.planning.likeness.named_parts import NamedPart, in_order, named_parts
from orbax_nnx_handler.planning.likeness.shapes import ways
from orbax_nnx_handler.planning.likeness.vocabulary import END, Names, arm, concepts, meanings, words
from orbax_nnx_handler.planning.target.roles import Order, all_behind, creation_place, only_order

_Pair = tuple[ModulePart, ModulePart]
"""A wanted part and the stored one that it is made from."""


def with_counted_parts(
    found: Findings, wanted: Sequence[Leaf], stored: Sequence[Leaf], order: Order
) -> Findings:
    """Returns what is known, with the norms where their layers are, and what the order of a target tells.

    Args:
        found: What is known; norms that it has elsewhere, or asks about, are told by their layers.
        wanted: The wanted leaves.
        stored: The stored leaves.
        order: The wanted names in the order of their creation, by module.
    """
    if not (counts := _counted(stored)):
        return found
    sides = module_parts(wanted), module_parts(stored)
    named = companions(sides[0])
    while True:
        homes = _homes(found)
        modules = [x for classes in counts.values() for x in _couples_in(classes, homes, named)]
        pairs = [pair for couples in modules for pair in _told_by(couples, homes, named)]
        found = with_pairs(found, links_between(pairs, "names"))
        homes, left = _homes(found), _left(found, sides)
        if not all(left):
            return found
        more = [*_told_by_order(counts, homes, left, sides[0], order)]
        alike = more or [*_told_by_sisters(counts, homes, left)] or [*_told_by_layers(homes, left, sides[1])]
        if not alike:
            return found
        found = with_pairs(found, links_between(alike, "order" if more else "names"))


_Homes = Mapping[Names, Names]
_Left = Sequence[Mapping[Names, ModulePart]]


def _homes(found: Findings) -> _Homes:
    """Returns where each stored part has gone that becomes one wanted part."""
    plain = (x for x in found.links if x.layers is None and x.joint is None and not x.copied)
    return {part_of(link.source): part_of(link.target) for link in plain}


def _left(found: Findings, sides: Sequence[Sequence[ModulePart]]) -> _Left:
    """Returns the wanted parts of which nothing is known, and the stored ones of which nothing is made."""
    made = {part_of(leaf) for link in found.links for leaf in link.wanted}
    used = {part_of(leaf) for link in found.links for leaf in link.stored}
    return [{x.names: x for x in y if x.names not in own} for y, own in zip(sides, (made, used), strict=True)]


_Counted = Mapping[str, Mapping[int, ModulePart]]
"""The parts of a module that Linen numbered, by class and number."""


def _counted(stored: Sequence[Leaf]) -> Mapping[Names, _Counted]:
    """Returns the parts that Linen numbered, by module."""
    counted: dict[Names, dict[str, dict[int, ModulePart]]] = defaultdict(lambda: defaultdict(dict))
    automatic = [leaf for leaf in stored if any(name[:1].isupper() for name in leaf.names)]
    for part in module_parts(automatic):
        for last in part.levels[-1:] if "main" in part.leaves else ():
            if last.is_automatic and last.number is not None:
                counted[part.module][last.base][last.number] = part
    return counted


def _couples_in(classes: _Counted, homes: _Homes, named: Couples) -> Iterator[Couples]:
    """Yields the layers and norms of a module in which Linen counts as many of both.

    Of layers that have gone where names give only some a norm, those are counted.
    """
    norms = [x for base, x in classes.items() if "norm" in meanings(base) and sorted(x) == [*range(len(x))]]
    layers = [x for x in classes.values() if all(part.is_layer for part in x.values())]
    fitting = [(x, y) for x in layers for y in norms if _are_couples(x, y)]
    if not fitting and len(norms) == 1 and all(part.names in homes for x in layers for part in x.values()):
        normed = [[part for _, part in sorted(x.items()) if homes[part.names] in named] for x in layers]
        some = [dict(enumerate(parts)) for parts in normed if parts]
        fitting = [(x, norms[0]) for x in some if len(some) == 1 and _are_couples(x, norms[0])]
    for ours, theirs in fitting if len(fitting) == 1 else ():
        yield {ours[at].names: theirs[at] for at in ours}


def _are_couples(layers: Mapping[int, ModulePart], norms: Mapping[int, ModulePart]) -> bool:
    """Tells whether each norm is as wide as what its layer takes, or each as what its layer returns."""
    if layers.keys() != norms.keys() or len(layers) < 2:
        return False
    sizes = [(layers[at].leaves["main"].shape, norms[at].leaves["main"].shape[-1:]) for at in layers]
    # A kernel that is convolved channel by channel has one input.
    takes = all((*shape[-2:-1],) in (width, (1,)) for shape, width in sizes)
    return takes or all(shape[-1:] == width for shape, width in sizes)


def _told_by(couples: Couples, homes: _Homes, named: Couples) -> list[_Pair]:
    """Returns the wanted norm of each layer of a module whose place is known, and the stored one."""
    told = [(homes[layer], norm) for layer, norm in couples.items() if layer in homes]
    pairs = [(named[home], norm) for home, norm in told if home in named]
    # What is no norm of a layer may be one of none of them.
    is_whole = len(pairs) == len(couples) == len({one.names for one, _ in pairs})
    return pairs if is_whole and all(map(_fit, pairs)) else []


def _fit(pair: _Pair) -> bool:
    ours, theirs = ({kind: leaf.shape for kind, leaf in part.leaves.items()} for part in pair)
    return ours == theirs


def with_pairs(found: Findings, links: Sequence[Link]) -> Findings:
    """Returns what is known, with some links and without what speaks against them."""
    known = {(x.target.source, x.source.source) for x in found.links}
    if all((x.target.source, x.source.source) in known for x in links):
        return found
    apart = apart_from(found, links)
    apart.links.extend(links)
    return apart


def links_between(pairs: Iterable[_Pair], grounds: PairGrounds) -> list[Link]:
    """Returns the links between the leaves of wanted and stored parts."""
    return [
        Link(wanted=(leaf,), stored=(other.leaves[kind],), grounds=grounds, ways=(how,))
        for one, other in pairs
        for kind, leaf in one.leaves.items()
        if kind in other.leaves and (how := ways(other.leaves[kind].shape, leaf.shape))
    ]


def _told_by_sisters(counts: Mapping[Names, _Counted], homes: _Homes, free: _Left) -> Iterator[_Pair]:
    """Yields what is left of modules whose rest has gone into one: as of their like, or all that is left."""
    known = defaultdict[object, list[Mapping[Names, Names]]](list)
    open_: list[tuple[Names, object, Mapping[Names, ModulePart], Mapping[Names, Names]]] = []
    for module, classes in counts.items():
        parts = {x.names[-1:]: x for some in classes.values() for x in some.values()}
        key = next((x.base for x in levels(module)[-1:] if x.is_automatic), ""), frozenset(parts)
        gone = {own: homes[x.names] for own, x in parts.items() if x.names in homes}
        if module and len(gone) == len(parts) > 1:
            above = len(shared_levels([*gone.values()]))
            known[key].append({own: names[above:] for own, names in gone.items()})
        elif module and gone:
            open_.append((module, key, parts, gone))
    ours, theirs = (leaves_below(parts.values()) for parts in free)
    for module, key, parts, gone in open_:
        told = known[key][0] if known[key] and all(x == known[key][0] for x in known[key]) else None
        one, rest = min(gone), {own: part for own, part in parts.items() if own not in gone}
        top = gone[one][: -len(told[one]) or None] if told else shared_levels([*gone.values()], own=1)
        left = {x.names[len(top) :]: x for x in ours.get(top, ())}
        places = dict[Names, ModulePart]()
        if told and all(names == (*top, *told[own]) for own, names in gone.items()):
            places = {told[own]: part for own, part in rest.items()}
        elif not told and top and len(gone) > 1 == len(theirs.get(module, ())):
            places = dict(zip(left, rest.values(), strict=False))
        pairs = [(left[at], part) for at, part in places.items() if left.keys() == places.keys()]
        if all(_fit(pair) and pair[1].names in free[1] for pair in pairs):
            yield from pairs


def _told_by_layers(homes: _Homes, free: _Left, stored: Sequence[ModulePart]) -> Iterator[_Pair]:
    """Yields parts of layers of which leaves are missing, where the whole layers of the list agree."""
    torn = dict.fromkeys(x[:2] for names in free[1] if (x := _seat(names)))
    layers = defaultdict[tuple[Names, int], dict[Names, ModulePart]](dict)
    for part in stored if torn else ():
        if seat := _seat(part.names):
            layers[seat[:2]][seat[2]] = part
    # Of whole layers that hold the same: the list that each part has gone to, and its path in a layer there.
    ends = defaultdict[object, list[tuple[Names, Names] | None]](list)
    for at, parts in layers.items():
        held = frozenset(parts)
        for inner, part in parts.items() if at not in torn else ():
            goal = _seat(homes.get(part.names, ()))
            ends[at[0], held, inner].append(goal and (goal[0], goal[2]))
    told = {key: some[0] for key, some in ends.items() if len({*some}) == 1 < len(some)}
    ours = {_seat(names): part for names, part in free[0].items() if torn}
    for at in torn:
        parts, held = layers[at], frozenset(layers[at])
        spots = {x[:2] for part in parts.values() if (x := _seat(homes.get(part.names, ())))}
        for inner, part in parts.items() if len(spots) == 1 else ():
            ((into, number),), end = spots, told.get((at[0], held, inner))
            one = ours.get((into, number, end[1])) if end and end[0] == into else None
            shapes = [{(kind, leaf.shape) for kind, leaf in x.leaves.items()} for x in (part, one) if x]
            if one is not None and part.names in free[1] and shapes[0] <= shapes[1]:
                yield one, part


def _seat(names: Names) -> tuple[Names, int, Names] | None:
    """Returns the list that a part lies in, the number of its layer and its path in that."""
    return next((seat for seat in lists_around(names)[:1] if seat[2]), None)


# What the order of a target tells.


def _told_by_order(
    counts: Mapping[Names, _Counted], homes: _Homes, free: _Left, wanted: Sequence[ModulePart], created: Order
) -> Iterator[_Pair]:
    """Yields the parts of which names, and what is known of the others, leave one order."""
    ours, theirs = (_by_shapes(parts.values()) for parts in free)
    roles: dict[Names, NamedPart] = {}
    for classes in counts.values():
        groups = [
            (some, held, left)
            for some in classes.values()
            for shapes, held in _by_shapes(x for _, x in sorted(some.items()) if x.names in free[1]).items()
            if len(theirs[shapes]) == len(held) == len(left := ours.get(shapes, [])) > 1
        ]
        if not groups:
            continue
        roles = roles or {role.part.names: role for role in named_parts(wanted)}
        known = [[homes.get(x.names) for _, x in sorted(some.items())] for some in classes.values()]
        others = named_parts([x for some in classes.values() for x in some.values()][:1])
        order = _Order(roles, others, [[*filter(None, some)] for some in known], created)
        for some, held, left in groups:
            anchors = {number: homes[x.names] for number, x in some.items() if x.names in homes}
            if len(left) + len(anchors) < _MOST:
                numbers = [number for number, x in sorted(some.items()) if x in held]
                told = order.told([x.names for x in left], numbers, anchors)
                pairs = [(roles[names].part, some[number]) for names, number in told]
                becomes = (
                    ways(y.leaves[kind].shape, x.shape) for one, y in pairs for kind, x in one.leaves.items()
                )
                yield from pairs if all(becomes) else ()


_MOST = 200
"""How many parts of one class are compared with each other."""


class _Order:
    """In which order a program computes the parts of a target, as far as names and known parts tell.

    Args:
        roles: The wanted parts, by path.
        others: Parts of the other side.
        known: For each class that Linen counts in a module, where its parts have gone, in their order.
        created: The wanted names in the order of their creation, by module.
    """

    def __init__(
        self,
        roles: Mapping[Names, NamedPart],
        others: Sequence[NamedPart],
        known: Iterable[Sequence[Names]],
        created: Order,
    ) -> None:
        self._roles, self._others, self._created = roles, others, created
        self._rising: dict[tuple[Names, str], set[bool]] = defaultdict(set)
        for some in known:
            numbers: dict[tuple[Names, str], list[int]] = defaultdict(list)
            for names in some:
                for prefix, level in prefixes(roles[names].part) if names in roles else ():
                    if level.number is not None:
                        numbers[prefix, level.base].append(level.number)
            for family, held in numbers.items():
                self._rising[family].update(x < y for x, y in itertools.pairwise(held) if x != y)
        self._alike: dict[str, set[bool]] = defaultdict(set)
        for (_, base), told in self._rising.items():
            self._alike[base] |= told

    def told(
        self, left: Sequence[Names], numbers: Sequence[int], anchors: Mapping[int, Names]
    ) -> list[tuple[Names, int]]:
        """Returns wanted parts with the numbers of the stored ones; nothing where that is not certain.

        Args:
            left: The wanted parts.
            numbers: The numbers of as many stored ones, in order.
            anchors: The wanted parts of those of the class whose place is known, by number.
        """
        fixed = [names for _, names in sorted(anchors.items()) if names in self._roles]
        behind: dict[Names, set[Names]] = defaultdict(set)
        for one, other in itertools.pairwise(fixed):
            behind[one].add(other)
        for at, one in enumerate(left):
            for other in (*left[at + 1 :], *fixed):
                if side := self._compared(self._roles[one], self._roles[other]):
                    behind[one if side < 0 else other].add(other if side < 0 else one)
        reached = {names: all_behind(names, behind) for names in (*left, *fixed)}
        places = {names: number for number, names in anchors.items()}
        if any(places[x] >= places[y] for x in fixed for y in reached[x] if y in places):
            return []
        bounds = {
            names: (
                max((places[x] for x in fixed if names in reached[x]), default=-1),
                min((places[x] for x in fixed if x in reached[names]), default=max(numbers) + 1),
            )
            for names in left
        }
        before = {x: {y for y in left if x in reached[y]} for x in left}
        return [*zip(only_order(numbers, bounds, before), numbers, strict=False)]

    def _compared(self, one: NamedPart, other: NamedPart) -> int:
        """Returns -1 where one part is computed before another one, 1 where behind it, 0 if nothing tells."""
        ours, theirs = one.part.levels, other.part.levels
        at = next((at for at, (x, y) in enumerate(zip(ours, theirs, strict=False)) if x != y), None)
        if at is None:
            return 0
        left, right = ours[at], theirs[at]
        is_last = at + 1 == len(ours) == len(theirs)
        if (left.base, left.style) == (right.base, right.style) and None not in (left.number, right.number):
            side = -1 if (left.number or 0) < (right.number or 0) else 1
            rises = self._rises(prefixes(one.part)[at][0], left.base, is_last)
            is_told = rises is not None and (not is_last or self._ordered(one, other) in (side, -side))
            return 0 if not is_told else side if rises else -side
        if any(level.number is not None for level in ours[:at]) or not (
            _in_list(ours[at:]) or _in_list(theirs[at:])
        ):
            are_alike = ours[at + 1 :] == theirs[at + 1 :] or (one.part.is_norm and other.part.is_norm)
            return self._ordered(one, other) if are_alike else 0
        ends = _end(one, at, other), _end(other, at, one)
        return ends[0] - ends[1] if 0 in ends else 0

    def _ordered(self, one: NamedPart, other: NamedPart) -> int:
        told = in_order([one, other], self._others)
        places = [creation_place(role.part.names, self._created) for role in (one, other)]
        speaks_against = None not in places and places != sorted(filter(None, places), reverse=told == [1, 0])
        return 0 if told is None or speaks_against else -1 if told == [0, 1] else 1

    def _rises(self, prefix: Names, base: str, is_last: bool) -> bool | None:
        """Tells whether what a name counts is computed from the first on; None where nothing tells."""
        told = self._rising.get((prefix, base), set[bool]())
        # On its way up a U-Net may count from either end; not so in one of its blocks.
        counted = [at for at, name in enumerate(prefix, 1) if any(map(str.isdecimal, words(name)))]
        is_arm = arm((*prefix[max(counted, default=0) :], base)) != 0
        told = told or (set[bool]() if is_arm else self._alike.get(base, set[bool]()))
        if len(told) == 1:
            return True in told
        # A list may be computed from its end, as levels that grow finer are; the parts of a block are not.
        return True if is_last and counted and not told and not is_arm else None


def _in_list(path: Sequence[Level]) -> bool:
    """Tells whether a path leads into a list of modules, or of parts."""
    return any(x.number is not None for x in path[:-1]) or path[-1].style == "/"


def _end(one: NamedPart, at: int, other: NamedPart) -> int:
    """Returns -1 for what comes before all that a model lists, as `other` is, 1 behind it, else 0.

    At level `at` its path leaves that of the other one.
    """
    first, *inner = one.part.levels[at:]
    said, against = frozenset(meanings(first.base)), concepts(x.base for x in other.part.levels[at:])
    if not one.part.is_norm or inner:
        # `action_net` leads out of the list `policy_net`, none of whose layers is as wide as what it returns.
        lengths = {length for leaf in other.part.leaves.values() for length in leaf.shape}
        width = (length for kind, leaf in one.part.leaves.items() if kind == "bias" for length in leaf.shape)
        is_of = bool(said) and said == frozenset(meanings(other.part.levels[-1].base))
        is_out = bool(said & {"head", "last"}) or (is_of and any(length not in lengths for length in width))
        side = is_out - bool(said & {"embed", "first", "stem"} and one.part.is_norm)
        return 0 if (_in_list(one.part.levels[at:]) and "head" not in said) or "head" in against else side
    if len(said) == 2 and "norm" in said and said & {"enc", "dec"}:
        return int(not against & (frozenset(("enc", "dec")) - said))
    is_told = one.position is not None and abs(one.position) == END and not {"embed", "post"} <= said
    return 0 if not is_told or {"pre", "head"} <= said else 1 if (one.position or 0) > 0 else -1


# What is counted from another number.


def with_one_before(found: Findings, wanted: Sequence[ModulePart], stored: Sequence[ModulePart]) -> Findings:
    """Returns what is known of lists of which one part has another name on the wanted side.

    Where shapes tell that `conv1` is `stem`, `conv2` is `conv1`, and `bn1` to `bn3` count so too. Where they
    do not, `conv3` may be `stem` as well, but for what is called an end.
    """
    groups = defaultdict[object, list[Sequence[list[_Pair]]]](list)
    for key, orders in _with_one_more(found, wanted, stored):
        groups[key].append(orders)
    for several in groups.values():
        first, last = ([pair for orders in several for pair in orders[at]] for at in (0, 1))
        ends = (concepts(orders[0][0][0].names[-2:]) for orders in several)
        if not all(map(_fit, last)):
            found = with_pairs(found, links_between(first if all(map(_fit, first)) else (), "order"))
        elif all(map(_fit, first)) and all(map(_LAST.isdisjoint, ends)):
            readings = tuple(tuple(links_between(pairs, "names")) for pairs in (first, last))
            ours, theirs = (tuple(part.names for part in side) for side in zip(*first, strict=True))
            found = apart_from(found, readings[0])
            found.ties.append(Tie(wanted=ours, stored=theirs, readings=readings))
    return found


_LAST = frozenset(("head", "last", "out", "post"))


def _with_one_more(
    found: Findings, ours: Sequence[ModulePart], theirs: Sequence[ModulePart]
) -> Iterator[tuple[object, Sequence[list[_Pair]]]]:
    """Yields the parts of a list with the wanted ones, where the one of another name is the first or last."""
    homes, made = defaultdict[Names, set[Names]](set), {part_of(x) for y in found.links for x in y.wanted}
    for link in found.every:
        homes[part_of(link.source)].add(part_of(link.target))
    lists = defaultdict[object, list[tuple[Names, Mapping[int, ModulePart]]]](list)
    for (above, base), own in counted_parts(ours).items():
        lists[base, len(own) + 1].append((above, own))
    for (module, base), held in counted_parts(theirs).items():
        aims = set[Names]().union(*(homes[part.names] for part in held.values()))
        for above, own in lists.get((base, len(held)), ()):
            names = {part.names for part in own.values()}
            near = ours if [*own] != [*held][1:] and not aims.isdisjoint(names) else ()
            near = (x for x in near if x.names[: len(above)] == above and len(x.names) < len(above) + 3)
            near = (x for x in near if x.names not in names and (x.names in aims or x.names not in made))
            some = [x for x in near if any(_fit((x, part)) for part in held.values())]
            if len(some) == 1:
                orders = (*some, *own.values()), (*own.values(), *some)
                pairs = [[*zip(order, held.values(), strict=True)] for order in orders]
                yield (module, above, *held, *own), pairs


def _by_shapes(parts: Iterable[ModulePart]) -> Mapping[object, list[ModulePart]]:
    """Returns parts by the shapes of their leaves, whichever way round these are."""
    found: dict[object, list[ModulePart]] = defaultdict(list)
    for part in parts:
        found[tuple(sorted((kind, *sorted(leaf.shape)) for kind, leaf in part.leaves.items()))].append(part)
    return found
