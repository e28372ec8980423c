"""Which pairs of the parts of two sides together have the highest score.

Each part is in one pair at most. A pair stands only where every other way to pair the parts is worse by a
margin: what is nearly as likely is asked about. Then, which runs of modules in turn are each other's;
layers that a program may have counted from the last; last, which run of a class makes a shorter list.
"""

import dataclasses
import itertools
import math
import operator
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from functools import cached_property
from typing import Any, cast

import numpy as np

from orbax_nnx_handler.planning.core.leaves import with_fields
from orbax_nnx_handler.planning.core.paths import levels
from orbax_nnx_handler.planning.likeness import apart_from, choice_of, lists_around, with_sources
from orbax_nnx_handler.planning.likeness.links import Findings, Link, Tie
from orbax_nnx_handler.planning.likeness.module_parts import Leaf, ModulePart, part_of, part_sizes
from orbax_nnx_handler.planning.likeness.vocabulary import MARGIN, Names, arm, concepts, exclude, likeness

MOST_PAIRS = 10_000
"""A hundred parts of one shape on either side are no block of a model that names could tell apart."""


class Table:
    """The scores of pairs, and which pairs together have the highest sum."""

    def __init__(self, scores: Mapping[tuple[int, int], float]) -> None:
        self._every = scores
        sides = self._rows, self._columns = [sorted({pair[side] for pair in scores}) for side in (0, 1)]
        rows, columns = ({part: place for place, part in enumerate(side)} for side in sides)
        self._places = {(at, to): (rows[at], columns[to]) for at, to in scores}
        self._scores = np.zeros((len(rows), len(columns)))
        for pair, score in scores.items():
            self._scores[self._places[pair]] = score

    def best(self, without: tuple[int, int] | None = None) -> tuple[frozenset[tuple[int, int]], float]:
        """Returns the pairs that give the highest sum, and the sum; one pair may be forbidden."""
        if len(self._every) == 1:  # Nearly every one of a model whose parts differ in their shapes.
            alone = {pair: score for pair, score in self._every.items() if pair != without and score > 0}
            return frozenset(alone), sum(alone.values())
        scores = self._scores if without is None else self._scores.copy()
        if without is not None:
            scores[self._places[without]] = 0.0
        kept = [place for place in _places(scores) if scores[place] > 0]
        pairs = frozenset((self._rows[row], self._columns[column]) for row, column in kept)
        return pairs, sum(float(scores[place]) for place in kept)

    @cached_property
    def _is_clear(self) -> bool:
        """Whether each part of the shorter side has another best one."""
        is_wide = len(self._rows) <= len(self._columns)
        return _own_best(self._scores if is_wide else self._scores.T) is not None

    def leads(self, pair: tuple[int, int]) -> bool:
        """Tells at a glance that no sum without a pair of the highest one comes near; not always if so."""
        row, column = self._places[pair]
        is_wide = len(self._rows) <= len(self._columns)
        line, at = (self._scores[row], column) if is_wide else (self._scores[:, column], row)
        return self._is_clear and bool(line[at] - np.delete(line, at).max(initial=0.0) >= MARGIN)


def _own_best(scores: Any) -> list[int] | None:
    """Returns the column of each row's highest score; None where two share one, or a row has several."""
    best, highest = scores.argmax(axis=1), scores.max(axis=1)
    is_one = len({*best.tolist()}) == len(best) == np.count_nonzero(scores == highest[:, None])
    return best.tolist() if is_one else None


def _places(scores: Any) -> list[tuple[int, int]]:
    """Returns the places that give the highest sum."""
    is_wide = scores.shape[0] <= scores.shape[1]
    wide = scores if is_wide else scores.T
    if (own := _own_best(wide)) is None:
        rows, width = wide.tolist(), wide.shape[1]
        if math.perm(width, len(rows)) > _FEW_ORDERS:
            return _places_of_many(scores)
        orders = itertools.permutations(range(width), len(rows))
        own = max(orders, key=lambda order: sum(map(operator.getitem, rows, order)))
    return sorted((at, to) if is_wide else (to, at) for at, to in enumerate(own))


_FEW_ORDERS = 120
"""So many are tried in less time than it takes to load what knows the best of more."""


def _places_of_many(scores: Any) -> list[tuple[int, int]]:
    # Here, since it takes as long to load as all of this package, and only some proposals need it.
    from scipy import optimize

    chosen = cast(Any, optimize).linear_sum_assignment(scores, maximize=True)
    return [(int(row), int(column)) for row, column in zip(*chosen, strict=True)]


def best_pairs(scores: Mapping[tuple[int, int], float]) -> list[tuple[int, int]]:
    """Returns the pairs of the best assignment that no other one comes near to.

    Args:
        scores: How well the parts of each pair fit, by their places on both sides; what is missing or not
            above zero is no pair.
    """
    found: list[tuple[int, int]] = []
    for group in components(scores):
        table = Table({pair: scores[pair] for pair in group})
        best, value = table.best()
        stands = (pair for pair in sorted(best) if table.leads(pair) or value - table.best(pair)[1] >= MARGIN)
        found += stands
    return found


def components(pairs: Iterable[tuple[int, int]]) -> list[set[tuple[int, int]]]:
    """Returns the pairs in groups that share no part."""
    return [set(group) for group in merged(frozenset({pair}) for pair in pairs)]


def merged(groups: Iterable[frozenset[tuple[int, int]]]) -> list[frozenset[tuple[int, int]]]:
    """Returns groups of pairs, those that share a part of either side made one."""
    owner: dict[tuple[str, int], int] = {}
    found: dict[int, set[tuple[int, int]]] = {}
    for number, group in enumerate(sorted(groups, key=sorted)):
        found[number] = set(group)
        keys = [key for at, to in group for key in (("wanted", at), ("stored", to))]
        joined = {number, *(owner[key] for key in keys if key in owner)}
        large = max(sorted(joined), key=lambda at: len(found[at]))
        for small in sorted(joined - {large}):
            for at, to in (pairs := found.pop(small)):
                owner["wanted", at] = owner["stored", to] = large
            found[large] |= pairs
        owner |= dict.fromkeys(keys, large)
    return [frozenset(group) for group in found.values()]


# Modules in turn.


Module = tuple[Names, list[Leaf]]


Run = dict[tuple[int, str, int], Module]
"""Modules beside each other, or those in a list, by the number in the list, the name and its number."""


def in_turn(wanted: Sequence[Leaf], stored: Sequence[Leaf], above: Sequence[int]) -> list[list[Module]]:
    """Returns modules that both sides compute one after the other, each as large as the one in its place.

    `input_blocks/{0..11}/{0..2}` are `down_blocks_{0..2}/{resnets,attentions,downsamplers}_{0..1}`: which of
    several names comes next, sizes tell.
    """
    ours, theirs = _runs(wanted, above[0]), _runs(stored, above[1])
    scores, found = dict[tuple[int, int], float](), dict[tuple[int, int], list[list[Module]]]()
    alike: dict[tuple[bool, int], list[int]] = defaultdict(list)
    for to, (_, other) in enumerate(theirs):
        for length in range(len(other) - 1, len(other) + 2):
            alike[not _is_counted(other), length].append(to)  # Of one side alone numbers tell the order.
    near = [(at, to) for at, (_, x) in enumerate(ours) for to in alike[_is_counted(x), len(x)]]
    for at, to in near if len(near) <= MOST_PAIRS else ():
        (names, run), (others, other) = ours[at], theirs[to]
        pairs = _one_by_one(run, other) if _is_counted(run) else [x[::-1] for x in _one_by_one(other, run)]
        are_modules = sum(len({leaf.names[:-1] for leaf in held}) > 1 for (_, held), _ in pairs) > 1
        is_known = not any(exclude(concepts(one), concepts(two)) for (one, _), (two, _) in pairs)
        if are_modules and arm(names) * arm(others) >= 0 and is_known:
            found[at, to], scores[at, to] = pairs, 20 + likeness(concepts(names), concepts(others))
    return [pair for best in best_pairs(scores) for pair in found[best]]


def _runs(leaves: Iterable[Leaf], above: int) -> list[tuple[Names, Run]]:
    found: dict[tuple[Names, bool], Run] = defaultdict(dict)
    for leaf in leaves:
        path, end = levels(leaf.names), 0
        for level, inner in itertools.pairwise(path):
            end += level.width
            if end <= above:
                continue
            names, number = (*leaf.names[: end - level.width], level.base), level.number or 0
            key, deeper = (number, inner.base, inner.number or 0), leaf.names[: end + inner.width]
            found[names, True].setdefault(key, (deeper, []))[1].append(leaf)
            if level.number is not None:
                key = (0, "", number)
                found[names, False].setdefault(key, (leaf.names[:end], []))[1].append(leaf)
                break
    # What holds leaves beside its modules is no run of them.
    return [
        (names, run)
        for (names, _), run in found.items()
        if all(held[0].names != at for at, held in run.values())
    ]


def _one_by_one(run: Run, other: Run) -> list[list[Module]]:
    """Returns the pairs of a run of which only numbers tell the order, and of another one."""
    keys = sorted(run, key=lambda key: (key[0], key[2]))
    if len(keys) == len(other) + 1 and len({leaf.names[:-1] for leaf in run[keys[0]][1]}) == 1:
        keys = keys[1:]  # What leads in lies beside the list elsewhere.
    if len(keys) != len(other):
        return []
    left: dict[int, dict[str, list[Module]]] = defaultdict(lambda: defaultdict(list))
    for key in sorted(other, key=lambda key: key[::2], reverse=True):
        left[key[0]][key[1]].append(other[key])
    pairs: list[list[Module]] = []
    for key in keys:
        first = next(left[number] for number in sorted(left) if any(left[number].values()))
        size = sum(part_sizes(run[key][1]))
        heads = [held for held in first.values() if held and sum(part_sizes(held[-1][1])) == size]
        if len(heads) != 1:
            return []
        pairs.append([run[key], heads[0].pop()])
    return pairs


def _is_counted(run: Run) -> bool:
    return len({key[:2] for key in run}) == len({key[0] for key in run})


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
