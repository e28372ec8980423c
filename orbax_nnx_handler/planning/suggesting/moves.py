"""What a rename does to one module: where it lies, where it goes, and what the rename would take along."""

import dataclasses
import functools
from collections.abc import Sequence

from orbax_nnx_handler.planning.core.paths import canonical
from orbax_nnx_handler.planning.likeness.links import Link
from orbax_nnx_handler.planning.likeness.shapes import Steps
from orbax_nnx_handler.planning.likeness.vocabulary import Names
from orbax_nnx_handler.planning.rules.entries import PathIndex
from orbax_nnx_handler.planning.rules.rule import Pattern, shared_ends, with_places


@dataclasses.dataclass
class Move:
    """One stored leaf on its way to a wanted path.

    Attributes:
        names: Its path now.
        aim: What it is to be called in the end.
        seats: The segments of both that count the same layers.
        link: What it belongs to.
        steps: What is still to be done with its shape.
    """

    names: Names
    aim: Names
    seats: list[tuple[int, int]]
    link: Link
    steps: Steps = ()

    @property
    def templates(self) -> list[tuple[Names, Names]]:
        """Both paths with places for the numbers of layers: for all, for all but the innermost, and so on."""
        return [
            (
                with_places(self.names, [now for now, _ in seats]),
                with_places(self.aim, [to for _, to in seats]),
            )
            for seats in (self.seats[:count] for count in range(len(self.seats), -1, -1))
        ]


def with_first(names: Names) -> Names:
    """Returns a path as that of the first layer: what is asked of 20,000 leaves is asked of one layer's."""
    at = next((at for at, name in enumerate(names) if name.isdecimal()), len(names))
    return (*names[:at], *("0" for _ in names[at : at + 1]), *names[at + 1 :])


@functools.lru_cache(maxsize=16384)
def compiled(text: str) -> Pattern:
    """Returns a pattern; each is asked for many leaves."""
    return Pattern(text)


def leads(template: Names, names: Names) -> bool:
    """Tells whether a template leads into a path."""
    at = len(template)
    return len(names) > at and compiled("/".join(template)).match(names[:at]) is not None


def led_into(template: Names, moves: Sequence[Move], index: PathIndex) -> list[int]:
    """Returns which moves a template leads into."""
    return [at for at in compiled("/".join(template)).within(index) if leads(template, moves[at].names)]


def alike(one: Names, other: Names) -> bool:
    """Tells whether two paths are one, however they spell the numbers of layers."""
    return canonical(one) == canonical(other)


def as_within(move: Move, head: int, led: int) -> Move:
    """Returns a leaf on its way to its name in a layer, the segments that lead there still as they are."""
    aim = (*move.names[:head], *move.aim[led:])
    seats = [(now, now if now < head else to + head - led) for now, to in move.seats]
    return dataclasses.replace(move, aim=aim, seats=seats)


def differing(move: Move) -> tuple[Names, Names]:
    """Returns what both paths do not share at either end, with places for numbers."""
    left, right = move.templates[0]
    after, before = shared_ends(left[::-1], right[::-1], 1)
    return left[before : len(left) - after], right[before : len(right) - after]
