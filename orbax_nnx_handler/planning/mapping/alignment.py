"""Two sequences of states brought together in order, without a choice where several ways are equally good.

The best alignment pairs as many states as it can and moves as few of them as it can:
a longest common subsequence, and then whatever else has a counterpart. There may be
several best ones. What is the same in all of them is certain; the rest is open.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alignment:
    """What the best alignments of two sequences agree on.

    Attributes:
        pairs: The stored index of each wanted one, where all of them agree.
        undecided: The stored indices that a wanted one may be, where they do not.
    """

    pairs: Mapping[int, int]
    undecided: Mapping[int, tuple[int, ...]]


def align(choices: Sequence[Collection[int]], count: int) -> Alignment:
    """Aligns two sequences.

    Args:
        choices: For each wanted element, the stored ones that it may be, by index.
        count: How many stored elements there are.
    """
    if all(at in there for at, there in enumerate(choices)) and len(choices) == count:
        return Alignment(pairs={at: at for at in range(count)}, undecided={})
    claims = _reversed(choices, count)
    pairs = {here: there for here, there in _lone(choices) if len(claims[there]) == 1}
    pairs |= _in_every_subsequence(choices, count)
    left = {here: set(there) - set(pairs.values()) for here, there in enumerate(choices) if here not in pairs}
    # What is left has moved. It is certain where only one is left on either side.
    moved = {here: next(iter(there)) for here, there in left.items() if len(there) == 1}
    for here, there in moved.items():
        if sum(there in others for others in left.values()) == 1:
            pairs[here] = there
    undecided = {here: tuple(sorted(there)) for here, there in left.items() if there and here not in pairs}
    return Alignment(pairs=pairs, undecided=undecided)


def _lone(choices: Sequence[Collection[int]]) -> list[tuple[int, int]]:
    return [(here, next(iter(there))) for here, there in enumerate(choices) if len(there) == 1]


def _reversed(choices: Sequence[Collection[int]], count: int) -> list[list[int]]:
    claims: list[list[int]] = [[] for _ in range(count)]
    for here, there in enumerate(choices):
        for at in there:
            claims[at].append(here)
    return claims


def _in_every_subsequence(choices: Sequence[Collection[int]], count: int) -> dict[int, int]:
    """Returns the pairs that every longest common subsequence has."""
    ahead = _lengths(choices, count)
    mirrored = [[count - 1 - at for at in there] for there in reversed(choices)]
    # behind[i][j]: the longest of choices[i:] and the stored ones from j on.
    behind = [row[::-1] for row in reversed(_lengths(mirrored, count))]
    longest = ahead[-1][-1]
    pairs: dict[int, int] = {}
    for here, row in enumerate(choices):
        possible = [at for at in row if ahead[here][at] + 1 + behind[here + 1][at + 1] == longest]
        without = max(ahead[here][at] + behind[here + 1][at] for at in range(count + 1))
        if len(possible) == 1 and without < longest:
            pairs[here] = possible[0]
    return pairs


def _lengths(choices: Sequence[Collection[int]], count: int) -> list[list[int]]:
    """Returns the length of the longest common subsequence of every pair of beginnings."""
    table = [[0] * (count + 1)]
    for there in choices:
        last, row = table[-1], [0]
        for at in range(count):
            row.append(last[at] + 1 if at in there else max(last[at + 1], row[at]))
        table.append(row)
    return table
