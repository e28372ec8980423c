"""Which pairs of two sides together fit best, and which of them no other assignment comes near to."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np

from orbax_nnx_handler.planning.suggesting.vocabulary import MARGIN

_DIGITS = re.compile(r"[0-9]+")


class Table:
    """The scores of pairs, and which pairs together have the highest sum."""

    def __init__(self, scores: Mapping[tuple[int, int], float]) -> None:
        self._rows = sorted({at for at, _ in scores})
        self._columns = sorted({to for _, to in scores})
        self._row_of = {at: row for row, at in enumerate(self._rows)}
        self._column_of = {to: column for column, to in enumerate(self._columns)}
        self._scores = np.zeros((len(self._rows), len(self._columns)))
        for (at, to), score in scores.items():
            self._scores[self._row_of[at], self._column_of[to]] = score

    def best(self, without: tuple[int, int] | None = None) -> tuple[frozenset[tuple[int, int]], float]:
        """Returns the pairs that give the highest sum, and the sum; one pair may be forbidden."""
        # Here, since it takes as long to load as all of this package, and only a proposal needs it.
        from scipy import optimize

        scores = self._scores
        if without is not None:
            scores = scores.copy()
            scores[self._row_of[without[0]], self._column_of[without[1]]] = 0.0
        chosen = cast(Any, optimize).linear_sum_assignment(scores, maximize=True)
        places = [(int(row), int(column)) for row, column in zip(*chosen, strict=True)]
        kept = [place for place in places if scores[place] > 0]
        pairs = frozenset((self._rows[row], self._columns[column]) for row, column in kept)
        return pairs, sum(float(scores[place]) for place in kept)


def best_pairs(scores: Mapping[tuple[int, int], float]) -> list[tuple[int, int]]:
    """Returns the pairs of the best assignment that no other one comes near to."""
    found: list[tuple[int, int]] = []
    for group in components(scores):
        table = Table({pair: scores[pair] for pair in group})
        best, value = table.best()
        found += [pair for pair in sorted(best) if value - table.best(without=pair)[1] >= MARGIN]
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


def in_strict_order(keys: Sequence[Any]) -> list[int] | None:
    """Returns the places in the order of their keys; None where a key is not known or is there twice."""
    if None in keys or len(set(keys)) < len(keys):
        return None
    return sorted(range(len(keys)), key=lambda at: keys[at])


def ranks_of(paths: Sequence[Sequence[str]], like: int) -> Mapping[tuple[int, ...], int]:
    """Returns the paths that are one of them but for numbers, by the ranks of their numbers."""
    template = [_DIGITS.sub("#", name) for name in paths[like]]
    alike = [at for at, path in enumerate(paths) if [_DIGITS.sub("#", name) for name in path] == template]
    numbers = [tuple(map(int, _DIGITS.findall("/".join(paths[at])))) for at in alike]
    ranks = [
        {number: rank for rank, number in enumerate(sorted({*level}))} for level in zip(*numbers, strict=True)
    ]
    return {
        tuple(rank[number] for rank, number in zip(ranks, counted, strict=True)): at
        for at, counted in zip(alike, numbers, strict=True)
    }
