"""Modules that are counted otherwise than those they are made of: by class, and from the other end.

Linen counts all modules of a class in the one that holds them, by when they are made: which of these lie in
a list of the target and which before or behind it, which of them a shorter list holds, and whether they
are counted from the last one, since calls stand inside each other. So may levels of a U-Net be.
"""

import dataclasses
import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set

from orbax_nnx_handler.planning.core.leaves import with_fields
from orbax_nnx_handler.planning.core.paths import levels, natural_key
from orbax_nnx_handler.planning.likeness import apart_from, choice_of, in_list, lists_around, with_sources
from orbax_nnx_handler.planning.likeness.links import Findings, Link, Tie
from orbax_nnx_handler.planning.likeness.module_parts import Leaf, ModulePart, part_of
from orbax_nnx_handler.planning.likeness.norms_of_layers import links_between, with_pairs
from orbax_nnx_handler.planning.likeness.vocabulary import Names, order_word

# In a list and outside of it.

_MOST_OUTSIDE = 3


def with_runs_told(found: Findings, sides: Sequence[Sequence[ModulePart]]) -> Findings:
    """Returns what is known, and which modules of a class are those of a list where there are more of it.

    Linen counts a class through the module that holds it: of `LayerNorm_{0..3}` the first one may be an
    `embed_norm`, and those of `layers/{0..2}` begin with the second. What is called first or last of all that
    lies outside of the list tells that; else it is asked.
    """
    held = _counted(sides[1])
    plain = [
        x for x in (found.links if held else ()) if x.joint is None and x.layers is None and not x.copied
    ]
    homes = {part_of(link.source): part_of(link.target) for link in plain}
    ours = {part.names: part for part in (sides[0] if held else ())}
    made = {part_of(leaf) for link in (found.every if held else ()) for leaf in link.wanted}
    lacking = [part for names, part in ours.items() if names not in made]
    for (*_, look), members in held.items():
        gone = [(members[number], homes.get(members[number].names)) for number in sorted(members)]
        inside = [home for _, home in gone if home in ours and in_list(home)[0]]
        if len(inside) < 2 or len(inside) == len(gone) or len({*map(_in_any_layer, inside)}) > 1:
            continue
        free = [ours[home] for _, home in gone if home in ours and home not in inside]
        free += [part for part in lacking if _look(part) == look and not in_list(part.names)[0]]
        layers = [ours[home] for home in sorted(inside, key=natural_key)]
        orders = [*_orders(layers, free, len(gone))]
        told = [each for each, agrees in orders if agrees == len(free)]
        pairs = [list(zip(each, (part for part, _ in gone), strict=True)) for each in told or dict(orders)]
        readings = [links_between([(x, y) for x, y in each if x is not None], "order") for each in pairs]
        if len(readings) == 1:
            found = with_pairs(found, readings[0])
        elif readings:
            found = apart_from(found, [*itertools.chain(*readings)])
            found.ties.append(choice_of([*itertools.chain(*readings)], *readings))
    return found


def _counted(stored: Iterable[ModulePart]) -> Mapping[tuple[Names, Names, object], dict[int, ModulePart]]:
    """Returns the parts of modules that Linen counted by class, by class, path in it, shapes and number."""
    found = defaultdict[tuple[Names, Names, object], dict[int, ModulePart]](dict)
    for part in (x for x in stored if any(name[:1].isupper() for name in x.names)):
        for list_, number, inner in lists_around(part.names)[-1:]:
            if list_[-1][:1].isupper():
                found[list_, inner, _look(part)][number] = part
    return found


def _look(part: ModulePart) -> object:
    return frozenset((kind, leaf.shape) for kind, leaf in part.leaves.items())


def _in_any_layer(names: Names) -> tuple[Names, Names]:
    """Returns the list that a part is in, and its path in any layer of it."""
    list_, _, inner = lists_around(names)[0]
    return list_, inner


def _orders(
    layers: Sequence[ModulePart], free: Sequence[ModulePart], count: int
) -> Iterator[tuple[tuple[ModulePart | None, ...], int]]:
    """Yields orders in which layers follow each other, what is free before or behind, the likeliest first.

    With each the count of what is free whose names say so.
    """
    if not 0 < len(free) <= count - len(layers) <= _MOST_OUTSIDE:
        return
    outside = [*free, *[None] * (count - len(layers) - len(free))]
    found = dict[tuple[ModulePart | None, ...], int]()
    for order, at in itertools.product(itertools.permutations(outside), range(len(outside) + 1)):
        both = *((x, -1) for x in order[:at]), *((x, 1) for x in order[at:])
        found[*order[:at], *layers, *order[at:]] = sum(x is not None and _end(x) == way for x, way in both)
    yield from sorted(found.items(), key=lambda item: -item[1])


def _end(part: ModulePart) -> int:
    """Returns -1 for a part whose name says that it comes first in its model, 1 for the last one, or 0."""
    return order_word(part.said) or ("head" in part.said) - ("embed" in part.said)


# Layers that are counted from the last one.


def with_either_count(found: Findings) -> Findings:
    """Returns what is known, asked also whether Linen has counted the equal layers of modules from the last.

    Of `Dense(n)(relu(Dense(n)(x)))` it counts so, in all modules of the class. Where it is open which of
    these is which, no question would have the right answer. Not where some module of the class is known.
    """
    known = {_class_of(part_of(link.source)) for link in (found.links if found.ties else ())}
    ties = list[Tie]()
    for tie in found.ties:
        others = (_counted_back(reading, known) for reading in tie.readings)
        more = (other for other in others if other and other not in tie.readings)
        ties.append(dataclasses.replace(tie, readings=(*tie.readings, *more)))
    return dataclasses.replace(found, ties=ties)


def _counted_back(reading: Sequence[Link], known: Set[Names]) -> tuple[Link, ...]:
    """Returns a reading with the equal layers of several modules in reverse; nothing where they differ."""
    modules = defaultdict[tuple[object, ...], dict[int, tuple[int, Link]]](dict)
    for link in reading:
        part = part_of(link.source)
        if not part or link.joint is not None or link.layers is not None or _class_of(part) in known:
            return ()
        if not (last := levels(part)[-1]).is_automatic:
            return ()
        depth = len(part) - last.width
        kind = link.source.names[len(part) :], link.source.shape, part_of(link.target)[:-1]
        modules[part[:depth], last.base, kind][last.number or 0] = depth, link
    if len({home for home, *_ in modules}) < 2 or min(map(len, modules.values())) < 2:
        return ()
    made = list[Link]()
    for held in modules.values():
        order = [held[number] for number in sorted(held)]
        for (depth, link), (_, other) in zip(order, reversed(order), strict=True):
            seats = tuple(seat for seat in link.levels if seat[0] < depth)
            made.append(with_fields(link, stored=other.stored, levels=seats))
    return tuple(made)


def _class_of(part: Names) -> Names:
    return tuple(level.base for level in levels(part))


# Which modules of a class are a list where Linen counted more of it than that holds.

_MOST_RUNS = 8


def with_surplus_asked(found: Findings, stored: Sequence[ModulePart]) -> Findings:
    """Returns what is known, and asked which run of modules of one class, all alike, a shorter list holds.

    Nothing tells whether the first of `Block_{0..3}` is a stem, or the last one a head, that is not wanted.
    """
    used = {part_of(leaf) for link in found.every for leaf in link.stored}
    spare = {x[0] for part in stored if part.names not in used for x in _by_class(part.names)}
    held = defaultdict[Names, dict[int, dict[object, Leaf]]](lambda: defaultdict(dict))
    gone = defaultdict[Names, dict[int, list[Link]]](lambda: defaultdict(list))
    for part in stored if spare else ():
        for list_, number, _ in (x for x in _by_class(part.names) if x[0] in spare):
            for leaf in part.leaves.values():
                held[list_][number][leaf.names[len(list_) :], leaf.collection] = leaf
    for link in found.links if spare else ():
        for list_, number, _ in (x for x in _by_class(part_of(link.source)) if x[0] in spare):
            gone[list_][number].append(link)
    for list_, some in gone.items():
        modules, count = [each for _, each in sorted(held[list_].items())], len(some)
        looks = [{key: leaf.shape for key, leaf in each.items()} for each in modules]
        rest = {part_of(leaf) for each in modules[count:] for leaf in each.values()}
        is_first = sorted(some) == sorted(held[list_])[:count] and used.isdisjoint(rest)
        if not rest or not is_first or any(x != looks[0] for x in looks) or not _is_list(list_, some):
            continue
        links = [(link, at) for at, (_, each) in enumerate(sorted(some.items())) for link in each]
        last = len(modules) - count
        readings = [
            with_sources(
                (link, [modules[at + by].get((x.names[len(list_) :], x.collection)) for x in link.stored])
                for link, at in links
            )
            for by in sorted({*range(min(last, _MOST_RUNS)), last})
        ]
        every = [*itertools.chain(*readings)]
        if all(readings):
            found = apart_from(found, every)
            found.ties.append(choice_of(every, *readings))
    return found


def _by_class(names: Names) -> Iterator[tuple[Names, int, Names]]:
    """Yields the lists around a layer of a module that Linen counted by class, as of `Block_0/Dense_1`."""
    return (x for x in lists_around(names) if x[2] and x[0][-1][:1].isupper())


def _is_list(list_: Names, some: Mapping[int, Sequence[Link]]) -> bool:
    """Tells whether the modules of a class have gone one by one into a list that is called otherwise."""
    several: list[list[set[tuple[Names, int]]]] = [
        [{(to, at) for to, at, inner in lists_around(part_of(link.target)) if inner} for link in links]
        for _, links in sorted(some.items())
    ]
    into: list[dict[Names, int]] = [dict(sorted(set[tuple[Names, int]].intersection(*x))) for x in several]
    shared = set[Names].intersection(*(set(each) for each in into))
    is_plain = all(
        link.layers is None and link.grounds != "fact" for links in some.values() for link in links
    )
    return is_plain and any(
        to[-1] != list_[-1] and all(one[to] < other[to] for one, other in itertools.pairwise(into))
        for to in shared
    )


# Levels on the way up of a U-Net, which count from either end.

_Level = tuple[Link, re.Match[str], re.Match[str]]
_UP = re.compile(r"((?:.*?[/_])??(up[a-z_]*)/?)(\d+)(.*)")
_WAYS_UP = (
    re.compile(r"((?:.*?/)??((?!up)[a-z_]+)/?)(\d+)(/(?:up|dec)[a-z_]*(?:[/_]\d+)?/[^/]+/.*)"),
    _UP,
    re.compile(r"((?:.*?/)??(dec(?:oder)?s?(?:[/_][a-z_]+)?)[/_]?)(\d+)(.*)"),
)
"""A level that holds its way up, `levels/0/up`; one of these, `up_blocks/0`; one of a decoder."""


def by_level(links: Sequence[Link]) -> tuple[list[Link], list[list[list[Link]]]]:
    """Returns links under which one level is made from one, and readings of levels that may be reversed.

    diffusers counts its `up_blocks` from the lowest level, CompVis and ADM from the highest.
    """
    groups: dict[tuple[str, str], list[_Level]] = defaultdict(list)
    for link in links:
        one, other = (_way_up("/".join(leaf.names).lower()) for leaf in (link.target, link.source))
        if one and other and link.layers is None and link.joint is None:
            groups[one[1], other[1]].append((link, one, other))
    made, several = {id(link): [link] for link in links}, list[list[list[Link]]]()
    for group in groups.values():
        is_image = any(len(link.source.shape) > 3 for link, *_ in group)
        is_told = is_image or all(match.re is _UP for _, *ends in group for match in ends)
        sides = zip(*(ends for _, *ends in group), strict=True)
        # Of one name, levels that count from 1 may count from the other end.
        names = {(each[0][2].replace("_", ""), min(int(x[3]) for x in each)) for each in sides}
        # Of two decoders, those that count from other numbers, and not what lies in them.
        is_one = group[0][1].re is group[0][2].re is not _UP
        is_told &= not is_one or (len({at for _, at in names}) > 1 and not any("/" in x for x, _ in names))
        steps = (-1, 1) if len({name == "upblocks" for name, _ in names}) > 1 else (1, -1)
        found = [reading for step in steps if is_told and (reading := _read(group, step))]
        is_told = len(found) == 1 or len(names) == 1
        made |= {id(link): [] for link, *_ in group if found}
        made |= {id(group[0][0]): found[0]} if found and is_told else {}
        several += [found] if found and not is_told else []
    return [link for each in made.values() for link in each], several


def _way_up(path: str) -> re.Match[str] | None:
    """Returns how a path may lie in a level on the way up of a U-Net."""
    ways = _WAYS_UP if "up" in path or "dec" in path else ()
    return next(filter(None, (each.fullmatch(path) for each in ways)), None)


def _read(group: Sequence[_Level], step: int) -> list[Link]:
    """Returns the links of levels one by one, or the other way around; none where one does not fit."""
    stored = {(int(other[3]), other[4]): link.source for link, _, other in group}
    ours, theirs = sorted({int(one[3]) for _, one, _ in group}), sorted({at for at, _ in stored})
    below = {(one[4], other[4]) for _, one, other in group}
    if len(ours) != len(theirs) or len(ours) < 2 or len({one for one, _ in below}) < len(below):
        return []
    level = dict(zip(ours, theirs[::step], strict=True))
    return with_sources((link, [stored.get((level[int(one[3])], other[4]))]) for link, one, other in group)
