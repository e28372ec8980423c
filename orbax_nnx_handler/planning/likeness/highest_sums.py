"""Which pairs of the parts of two sides together have the highest score.

Each part is in one pair at most. A pair stands only where every other way to pair the parts is worse by a
margin: what is nearly as likely is asked about. Then choices that several make among the same. Last, which
runs of modules in turn are each other's.
"""

import itertools
import math
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar, cast

import numpy as np

from orbax_nnx_handler.planning.core.paths import levels
from orbax_nnx_handler.planning.likeness.module_parts import Leaf, part_sizes
from orbax_nnx_handler.planning.likeness.vocabulary import MARGIN, Names, arm, concepts, exclude, likeness

T = TypeVar("T")
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


_Choices = Sequence[Sequence[tuple[T, T]]]


def choices_together(
    ways: Iterable[tuple[_Choices[T], bool]], home: Callable[[T], Names]
) -> Iterator[tuple[_Choices[T], bool]]:
    """Yields choices, those among the same things as one, in which none of these is chosen twice.

    Args:
        ways: The choices that each may make, as pairs of a part and what it is; whether names tell them.
        home: Where a part lies, or what it is. Those of one module go to as few as may be, by their names.
    """
    left = [way for way in ways if way[0]]
    while left:
        (found, by_names), *left = left
        among = {id(other) for each in found for _, other in each}
        rivals = [
            x for x in left if len(x[0]) > 1 and any(id(other) in among for each in x[0] for _, other in each)
        ]
        if len(found) > 1 and rivals:
            left = [x for x in left if not any(x is other for other in rivals)]
            every = map(itertools.chain.from_iterable, itertools.product(found, *(x[0] for x in rivals)))
            several = [[*each] for each in itertools.islice(every, MOST_PAIRS)]
            several = [x for x in several if len({id(other) for _, other in x}) == len(x)]
            homes = [{(home(one), home(other)) for one, other in x} for x in several]
            scores = {
                at: sum(likeness(*map(concepts, pair)) for pair in pairs)
                for at, pairs in enumerate(homes)
                if len(pairs) == min(map(len, homes)) and not any(exclude(*map(concepts, x)) for x in pairs)
            }
            best = sorted(scores, key=lambda at: -scores[at])
            is_told = len(best) > 1 and scores[best[0]] - scores[best[1]] >= MARGIN
            found = [several[at] for at in best[: 1 if is_told else None]]
        if found:
            yield found, by_names


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
