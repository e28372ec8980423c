"""The leaves of one side of a layer group, in every reading of their paths."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property

from orbax_nnx_handler.planning.entries import Entry
from orbax_nnx_handler.planning.layers import Group, Seat, Tokens, seats
from orbax_nnx_handler.planning.leaves import Shape

Key = tuple[Group, Tokens]
"""A group and the path below one layer: what both sides must agree on."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """A leaf of either side in one reading."""

    seat: Seat
    shape: Shape
    tokens: Tokens
    entry: Entry | None = None


@dataclasses.dataclass(frozen=True)
class Side:
    """One side's pieces, by key and by group.

    Attributes:
        pieces: The leaves that are still to be placed, in every reading.
        every_piece: Gives every leaf of the side.
    """

    pieces: Sequence[Piece]
    every_piece: Callable[[], Iterable[Piece]]

    @cached_property
    def by_key(self) -> Mapping[Key, list[Piece]]:
        """The pieces by group and path below the layer."""
        found: dict[Key, list[Piece]] = defaultdict(list)
        for piece in self.pieces:
            found[piece.seat.group, piece.seat.rest].append(piece)
        return found

    @cached_property
    def all_pieces(self) -> Sequence[Piece]:
        """Every leaf of the side: what counts the positions of a block, where there is one."""
        return list(self.every_piece())

    @cached_property
    def block_size(self) -> Mapping[tuple[Group, str], int]:
        """Positions in one block, by group and inner name."""
        sizes: dict[tuple[Group, str], int] = defaultdict(int)
        for piece in self.all_pieces:
            if piece.seat.form == "block":
                key = (piece.seat.group, piece.seat.inner)
                sizes[key] = max(sizes[key], piece.seat.position + 1)
        return sizes


def pieces_of(tokens: Tokens, shape: Shape, entry: Entry | None = None) -> list[Piece]:
    """Returns a leaf in every reading."""
    return [Piece(seat, shape, tokens, entry) for seat in seats(tokens)]
