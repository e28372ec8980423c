"""Layers stacked by `nn.scan` and layers one by one: the same weights, arranged twice.

A group of layers named G under parent P is written in one of three ways:

    flat      P/G_0/rest, P/G_1/rest, ...          one leaf a layer
    stacked   P/G/rest                             one leaf, an extra axis
    blocks    P/G/X_0/rest ... P/G/X_{k-1}/rest    k leaves, an extra axis (cycles),
              P/G_remainder/X_0/rest ...           and what is left over, flat

In blocks, layer = cycle * k + position. Each way gives every layer of the group
a place, so any way can be made from any other.

The leaves of one side of a layer group, in every reading of their paths.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Literal, NamedTuple

from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.paths import Tokens, is_number
from orbax_nnx_handler.planning.rules.entries import Entry

Form = Literal["flat", "stacked", "block", "remainder"]


class Group(NamedTuple):
    """A group of layers: the path of its parent and its name."""

    # A named tuple, as `Seat` is: a model of 20,000 leaves has 50,000 of each, and most are looked up once.

    parent: Tokens
    name: str


class LayerPath(NamedTuple):
    """One reading of a path as a part of a layer group.

    Attributes:
        group: The group.
        rest: The path below one layer.
        form: How the path holds layers.
        position: The layer (flat), its position in the block, or in the remainder; 0 if stacked.
        inner: The name of the layers within a block (`layers` in `layers/layers_3`); empty if none.
    """

    group: Group
    rest: Tokens
    form: Form
    position: int = 0
    inner: str = ""


def seats(tokens: Tokens) -> Iterator[LayerPath]:
    """Yields every reading of a canonical path as a part of a layer group."""
    numbered = [is_number(token) for token in tokens]
    for at, token in enumerate(tokens[:-1]):
        if not numbered[at]:
            if not numbered[at + 1]:
                yield LayerPath(Group(tokens[:at], token), tokens[at + 1 :], "stacked")
            continue
        if at == 0:
            continue
        number, name, rest = int(token[1:]), tokens[at - 1], tokens[at + 1 :]
        yield LayerPath(Group(tokens[: at - 1], name), rest, "flat", number)
        if at >= 2 and not numbered[at - 2]:
            yield from _block_seats(tokens[: at - 2], tokens[at - 2], name, rest, number)


def flat_seats(tokens: Tokens) -> list[LayerPath]:
    """Returns the readings of a canonical path as a part of layers one by one."""
    return [
        LayerPath(Group(tokens[: at - 1], tokens[at - 1]), tokens[at + 1 :], "flat", int(token[1:]))
        for at, token in enumerate(tokens[:-1])
        if at and is_number(token)
    ]


def _block_seats(
    parent: Tokens, container: str, inner: str, rest: Tokens, number: int
) -> Iterator[LayerPath]:
    yield LayerPath(Group(parent, container), rest, "block", number, inner)
    name = container.removesuffix("_remainder")
    if name != container and name:
        yield LayerPath(Group(parent, name), rest, "remainder", number, inner)


Key = tuple[Group, Tokens]
"""A group and the path below one layer: what both sides must agree on."""


@dataclasses.dataclass(frozen=True)
class LayerPiece:
    """A leaf of either side in one reading."""

    seat: LayerPath
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

    pieces: Sequence[LayerPiece]
    every_piece: Callable[[], Iterable[LayerPiece]]

    @cached_property
    def by_key(self) -> Mapping[Key, list[LayerPiece]]:
        """The pieces by group and path below the layer."""
        found: dict[Key, list[LayerPiece]] = defaultdict(list)
        for piece in self.pieces:
            found[piece.seat.group, piece.seat.rest].append(piece)
        return found

    @cached_property
    def all_pieces(self) -> Sequence[LayerPiece]:
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


def pieces_of(tokens: Tokens, shape: Shape, entry: Entry | None = None) -> list[LayerPiece]:
    """Returns a leaf in every reading."""
    return [LayerPiece(seat, shape, tokens, entry) for seat in seats(tokens)]
