"""Renames that many modules share: what they call a leaf, and a word of their own names.

`('kernel', 'weight')`, and `('{x}_dense', 'net/{x}_linear')` for `up_dense`, `down_dense` and all
others: one rule where each module would have one.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from orbax_nnx_handler.planning.likeness.links import Move, alike, differing
from orbax_nnx_handler.planning.likeness.vocabulary import Names

Renamed = tuple[Names, Names]
"""The segments that a rename is for, and what they become."""

_MANY = 24
"""So many modules are rather renamed at once than one by one."""
_PLACES = ("{x}", "{y}", "{z}")


def of_leaves(moves: Sequence[Move]) -> Iterator[Renamed]:
    """Yields what many modules call a leaf, with what the wanted ones call it: `kernel`, `weight`."""
    return _shared(moves, lambda move: (move.names[-1:], move.aim[-1:]))


def of_modules(moves: Sequence[Move]) -> Iterator[Renamed]:
    """Yields renames of many modules, with places for what tells these apart: `{x}_dense`, `{x}_linear`."""
    others = [move for move in moves if not alike(move.names, move.aim)]
    return _shared(others, lambda move: _with_places(*differing(move)))


def _shared(moves: Sequence[Move], renamed: Callable[[Move], Renamed]) -> Iterator[Renamed]:
    groups = {(differing(move), renamed(move)) for move in moves}
    for (stored, wanted), count in Counter(each for _, each in groups).items():
        if stored != wanted and count > _MANY:
            yield stored, wanted


def _with_places(stored: Names, wanted: Names) -> Renamed:
    """Returns both with places for what their names have in common, where other words tell them still."""
    shared = min(len(stored), len(wanted))
    if shared > len(_PLACES) or any("{" in name for name in stored):
        return stored, wanted
    ends = stored[len(stored) - shared :], wanted[len(wanted) - shared :]
    made = [_with_place(*names) for names in zip(_PLACES, *ends, strict=False)]
    theirs = (*stored[: len(stored) - shared], *(one for one, _ in made))
    ours = (*wanted[: len(wanted) - shared], *(other for _, other in made))
    return (theirs, ours) if {*theirs}.difference(_PLACES) else (stored, wanted)


def _with_place(place: str, one: str, other: str) -> tuple[str, str]:
    """Returns two names with a place for the words that both begin or end with."""
    if one == other:
        return place, place
    if (width := _shared_words(one, other)) > 0:
        return place + one[width:], place + other[width:]
    if (width := _shared_words(one[::-1], other[::-1])) > 0:
        return one[:-width] + place, other[:-width] + place
    return one, other


def _shared_words(one: str, other: str) -> int:
    """Returns how many letters lie before the last `_` of what two names begin with."""
    shared = next((at for at, pair in enumerate(zip(one, other, strict=False)) if len({*pair}) > 1), len(one))
    return one[:shared].rfind("_")
