"""Layers stacked by `nn.scan` and layers one by one: the same weights, arranged twice.

A group of layers named G under parent P is written in one of three ways:

    flat      P/G_0/rest, P/G_1/rest, ...          one leaf a layer
    stacked   P/G/rest                             one leaf, an extra axis
    blocks    P/G/X_0/rest ... P/G/X_{k-1}/rest    k leaves, an extra axis (cycles),
              P/G_remainder/X_0/rest ...           and what is left over, flat

In blocks, layer = cycle * k + position. Each way gives every layer of the group
a place, so any way can be made from any other.

`P/G/X_0/rest` may also be a numbered submodule of a scanned layer. It is a block
only where nothing under `P/G` belongs to a layer itself, all of it is `X_0` to
`X_{k-1}`, and no leaf of the other side has an `X` below one of its layers.
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

    # Named tuples: a model of 20,000 leaves has 50,000 of each, and most are looked up once.

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


def layer_paths(tokens: Tokens) -> Iterator[LayerPath]:
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
            yield from _block_paths(tokens[: at - 2], tokens[at - 2], name, rest, number)


def flat_paths(tokens: Tokens) -> list[LayerPath]:
    """Returns the readings of a canonical path as a part of layers one by one."""
    return [
        LayerPath(Group(tokens[: at - 1], tokens[at - 1]), tokens[at + 1 :], "flat", int(token[1:]))
        for at, token in enumerate(tokens[:-1])
        if at and is_number(token)
    ]


def _block_paths(
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

    place: LayerPath
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

    def without_blocks(self, other: "Side") -> "Side":
        """Returns the side with those readings as blocks left out that are numbered submodules."""
        groups = {p.place.group for p in self.pieces if p.place.form in ("block", "remainder")}
        if not groups:
            return self
        blocks = {g: inner for g in groups if (inner := self._block_of(g)) is not None}
        submodules = {
            (group, rest[0]) for group, rest in other.keys_of_layers if len(rest) > 1 and is_number(rest[1])
        }

        def is_kept(piece: LayerPiece) -> bool:
            place = piece.place
            if place.form not in ("block", "remainder"):
                return True
            return blocks.get(place.group) == place.inner and (place.group, place.inner) not in submodules

        return Side([piece for piece in self.pieces if is_kept(piece)], self.every_piece)

    def _block_of(self, group: Group) -> str | None:
        """Returns the name of the members of a block, if all of the group is one."""
        names, numbers = set[str](), set[int]()
        remainder = Group(group.parent, f"{group.name}_remainder")
        left_over = set[str]()
        for piece in self.all_pieces:
            place = piece.place
            if place.form != "stacked" or place.group not in (group, remainder):
                continue
            if len(place.rest) < 2 or not is_number(place.rest[1]):
                return None
            if place.group == group:
                names.add(place.rest[0])
                numbers.add(int(place.rest[1][1:]))
            else:
                left_over.add(place.rest[0])
        if len(names | left_over) != 1 or numbers != set(range(len(numbers))):
            return None
        return next(iter(names | left_over))

    @cached_property
    def keys_of_layers(self) -> set[Key]:
        """The groups and paths below a layer of the layers that are written one by one."""
        return {(p.place.group, p.place.rest) for p in self.all_pieces if p.place.form == "flat"}

    @cached_property
    def by_key(self) -> Mapping[Key, list[LayerPiece]]:
        """The pieces by group and path below the layer."""
        found: dict[Key, list[LayerPiece]] = defaultdict(list)
        for piece in self.pieces:
            found[piece.place.group, piece.place.rest].append(piece)
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
            if piece.place.form == "block":
                key = (piece.place.group, piece.place.inner)
                sizes[key] = max(sizes[key], piece.place.position + 1)
        return sizes


def pieces_of(tokens: Tokens, shape: Shape, entry: Entry | None = None) -> list[LayerPiece]:
    """Returns a leaf in every reading."""
    return [LayerPiece(place, shape, tokens, entry) for place in layer_paths(tokens)]
