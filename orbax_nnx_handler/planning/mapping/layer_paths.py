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

A layout may know of blocks under names that say nothing by themselves
(`layouts.layout.ScannedBlocks`): a scan with a name of its own, members that are scans
themselves, layers in front of the scan, modules for what is left over.
"""

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Literal, NamedTuple

from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.paths import Tokens, is_number
from orbax_nnx_handler.planning.layouts.layout import ScannedBlocks
from orbax_nnx_handler.planning.rules.entries import Entry

Form = Literal["flat", "stacked", "block", "remainder", "scan in block", "stacked remainder"]
"""How a leaf holds layers. `scan in block` has two extra axes, the cycles and then the layers of one."""

FLAT: frozenset[Form] = frozenset({"flat", "remainder"})
"""One layer a leaf: no axis is stacked."""


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
        scan: The scan that the layout knows by that name, if it is one.
    """

    group: Group
    rest: Tokens
    form: Form
    position: int = 0
    inner: str = ""
    scan: ScannedBlocks | None = None


@functools.lru_cache(maxsize=65536)
def layer_paths(tokens: Tokens) -> tuple[LayerPath, ...]:
    """Returns every reading of a canonical path as a part of a layer group; asked several times for each."""
    return tuple(_layer_paths(tokens))


def _layer_paths(tokens: Tokens) -> Iterator[LayerPath]:
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


def scan_paths(tokens: Tokens, scans: Iterable[ScannedBlocks]) -> Iterator[LayerPath]:
    """Yields the readings of a canonical path under the names that a layout knows."""
    for scan in scans:
        for at, token in enumerate(tokens[:-2]):
            if token in (scan.name, scan.remainder, scan.modules):
                yield from _members(scan, Group(tokens[:at], scan.layers), token, tokens[at + 1 :])


def _members(scan: ScannedBlocks, group: Group, token: str, below: Tokens) -> Iterator[LayerPath]:
    name, second = below[0], below[1]
    if token == scan.modules:
        if is_number(name):
            yield LayerPath(group, below[1:], "remainder", int(name[1:]), token, scan)
    elif name == scan.inner_scan:
        form: Form = "scan in block" if token == scan.name else "stacked remainder"
        yield LayerPath(group, below[1:], form, 0, name, scan)
    elif name in scan.after and token == scan.name:
        yield LayerPath(group, below[1:], "block", scan.after.index(name), name, scan)
    elif name in scan.numbered and is_number(second) and len(below) > 2:
        form = "block" if token == scan.name else "remainder"
        if form == "remainder" or not scan.inner_scan:
            yield LayerPath(group, below[2:], form, int(second[1:]), name, scan)


def _block_paths(
    parent: Tokens, container: str, inner: str, rest: Tokens, number: int
) -> Iterator[LayerPath]:
    yield LayerPath(Group(parent, container), rest, "block", number, inner)
    name = container.removesuffix("_remainder")
    if name != container and name:
        yield LayerPath(Group(parent, name), rest, "remainder", number, inner)


Key = tuple[Group, Tokens]
"""A group and the path below one layer: what both sides must agree on."""


class LayerPiece(NamedTuple):
    """A leaf of either side in one reading."""

    place: LayerPath
    shape: Shape
    tokens: Tokens
    entry: Entry | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """How many layers of a group lie where, under the names that a layout knows.

    Attributes:
        prefix: Layers in front of the scan.
        cycles: Blocks.
        inner: Layers of the scan in a block; 0 where it has none.
        size: Layers in a block.
        left_over: Layers behind the scan.
    """

    prefix: int
    cycles: int
    inner: int
    size: int
    left_over: int

    @property
    def total(self) -> int:
        """Layers of the group."""
        return self.prefix + self.cycles * self.size + self.left_over

    def admits(self, piece: LayerPiece, axis: int) -> bool:
        """Tells whether a piece may be stacked along an axis."""
        match piece.place.form:
            case "scan in block":
                return piece.shape[axis : axis + 2] == (self.cycles, self.inner)
            case "block":
                return piece.shape[axis] == self.cycles
            case "stacked remainder":
                return piece.shape[axis] == self.left_over
            case _:
                return True

    def layers(self, place: LayerPath) -> Sequence[int]:
        """Returns the layers of a piece, cycle by cycle."""
        behind = self.prefix + self.cycles * self.size
        match place.form:
            case "scan in block":
                starts = range(self.prefix, behind, self.size)
                return [start + at for start in starts for at in range(self.inner)]
            case "block":
                before = 0 if place.scan is None or place.inner in place.scan.numbered else self.inner
                return range(self.prefix + before + place.position, behind, self.size)
            case "stacked remainder":
                return range(behind, behind + self.left_over)
            case "remainder":
                return (behind + place.position,)
            case _:
                return (place.position,)


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
        groups = {p.place.group for p in self.pieces if p.place.inner}
        if not groups:
            return self
        blocks = {g: inner for g in groups if (inner := self._block_of(g)) is not None}
        submodules = {
            (group, rest[0]) for group, rest in other.keys_of_layers if len(rest) > 1 and is_number(rest[1])
        }

        def is_kept(piece: LayerPiece) -> bool:
            place = piece.place
            if not place.inner:
                return True
            is_block = place.scan is not None or blocks.get(place.group) == place.inner
            return is_block and (place.group, place.inner) not in submodules

        return Side([piece for piece in self.pieces if is_kept(piece)], self.every_piece)

    def knows(self, group: Group) -> bool:
        """Tells whether a leaf that is still to be placed has one of the layout's names in this group."""
        return group in self._known_groups

    @cached_property
    def _known_groups(self) -> set[Group]:
        return {piece.place.group for piece in self.pieces if piece.place.scan is not None}

    def last_layer(self, group: Group) -> int | None:
        """Returns how many layers a group has that is written one by one; None for any other."""
        numbers = [p.place.position for p in self._by_group.get(group, ()) if p.place.form == "flat"]
        return max(numbers) + 1 if numbers else None

    def known_blocks(self, group: Group) -> Sequence[Blocks] | None:
        """Returns what the shapes of a group allow under the layout's names; None where it has none of them.

        Empty where the names contradict each other: a member that is lost, two scans, a number
        behind the scan, two remainders.
        """
        pieces = self._by_group.get(group, ())
        known = [piece for piece in pieces if piece.place.scan is not None]
        if not known:
            return None
        named = {piece.tokens for piece in known}
        others = {piece.place.form for piece in pieces if piece.tokens not in named}
        prefix = _prefix_of(piece.place.position for piece in pieces if piece.place.form == "flat")
        if prefix is None or "stacked" in others:
            return ()
        scanned = [piece for piece in known if piece.place.form in ("block", "scan in block")]
        behind = [piece for piece in known if piece not in scanned]
        return [
            Blocks(prefix=prefix, cycles=cycles, inner=inner, size=size, left_over=left_over)
            for cycles, inner, size in _blocks_of(scanned)
            for left_over in _left_over(behind)
            if not scanned or left_over < size
        ]

    @cached_property
    def _by_group(self) -> Mapping[Group, list[LayerPiece]]:
        found: dict[Group, list[LayerPiece]] = defaultdict(list)
        for piece in self.all_pieces:
            found[piece.place.group].append(piece)
        return found

    def _block_of(self, group: Group) -> str | None:
        """Returns the name of the members of a block, if all of the group is one."""
        names, numbers = set[str](), set[int]()
        remainder = Group(group.parent, f"{group.name}_remainder")
        left_over = set[str]()
        for piece in (*self._by_group.get(group, ()), *self._by_group.get(remainder, ())):
            place = piece.place
            if place.form != "stacked":
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


def _blocks_of(scanned: Sequence[LayerPiece]) -> Collection[tuple[int, int, int]]:
    """Returns the numbers of cycles, of layers in the inner scan, and in a block that all shapes allow."""
    if not scanned:
        return {(0, 0, 0)}
    scans = {piece.place.scan for piece in scanned}
    scan = next(iter(scans))
    members = {(piece.place.inner, piece.place.position) for piece in scanned}
    if scan is None or len(scans) > 1:
        return ()
    if scan.inner_scan:
        if {name for name, _ in members} != {scan.inner_scan, *scan.after}:
            return ()
        pairs = [_neighbours(piece.shape) for piece in scanned if piece.place.form == "scan in block"]
        lengths = _lengths(piece for piece in scanned if piece.place.form == "block")
        both = set[tuple[int, ...]].intersection(*pairs)
        return {(cycles, inner, inner + len(scan.after)) for cycles, inner in both if cycles in lengths}
    size = _prefix_of(position for _, position in members)
    if size is None or len({name for name, _ in members}) > 1:
        return ()
    return {(cycles, 0, size) for cycles in _lengths(scanned)}


def _left_over(behind: Sequence[LayerPiece]) -> Collection[int]:
    """Returns how many layers what lies behind the scan may hold."""
    kinds = {(piece.place.form, piece.place.inner) for piece in behind}
    if len(kinds) > 1:
        return ()
    if kinds and behind[0].place.form == "stacked remainder":
        return _lengths(behind)
    count = _prefix_of(piece.place.position for piece in behind)
    return () if count is None else (count,)


def _lengths(pieces: Iterable[LayerPiece]) -> set[int]:
    return set[int].intersection(*(set(piece.shape) for piece in pieces))


def _neighbours(shape: Shape) -> set[tuple[int, ...]]:
    return {shape[at : at + 2] for at in range(len(shape) - 1)}


def _prefix_of(numbers: Iterable[int]) -> int | None:
    """Returns how many numbers there are, if they are the first ones; otherwise None."""
    distinct = set(numbers)
    return len(distinct) if distinct == set(range(len(distinct))) else None


def numbers_of(piece: LayerPiece, axis: int | None, blocks: Blocks | None) -> Sequence[int]:
    """Returns the layers of a piece, in a group that has blocks on one side at least."""
    if piece.place.form == "stacked":
        return range(length(piece, axis))
    return blocks.layers(piece.place) if blocks is not None else (piece.place.position,)


def layer_shape(piece: LayerPiece, axis: int | None) -> Shape:
    """Returns the shape of one layer of a piece."""
    if axis is None or piece.place.form in FLAT:
        return piece.shape
    count = 2 if piece.place.form == "scan in block" else 1
    return (*piece.shape[:axis], *piece.shape[axis + count :])


def length(piece: LayerPiece, axis: int | None) -> int:
    """Returns how long a piece is along an axis."""
    return piece.shape[axis] if axis is not None and axis < len(piece.shape) else 0


def pieces_of(
    tokens: Tokens, shape: Shape, entry: Entry | None = None, scans: Iterable[ScannedBlocks] = ()
) -> list[LayerPiece]:
    """Returns a leaf in every reading; names that the layout knows take the place of blocks by number."""
    known: dict[tuple[object, ...], LayerPath] = {}
    for place in scan_paths(tokens, scans) if scans else ():
        known.setdefault(place[:5], place)  # Several scans may leave over layers under one name.
    places = layer_paths(tokens)
    places = [*known.values(), *(place for place in places if not place.inner)] if known else places
    return [LayerPiece(place, shape, tokens, entry) for place in places]


Axes = tuple[int | None, int | None]
"""The stacked axis of the stored leaf and of the wanted leaf; None where flat."""


def two_of(options: Iterable[Collection[Axes]]) -> Iterable[tuple[Axes, ...]]:
    """Returns two of the ways to choose, where there is no telling: a question needs no more."""
    ordered = [sorted(axes, key=str) for axes in options]
    return {tuple(axes[0] for axes in ordered), tuple(axes[-1] for axes in ordered)}


def axes_between(wanted: LayerPiece, stored: LayerPiece) -> Iterable[Axes]:
    """Yields the axes under which two pieces hold layers of one shape."""
    forms = {wanted.place.form, stored.place.form}
    # What is left over after the blocks is flat on either side and tells no axis.
    if "remainder" in forms or forms in ({"flat"}, {"stacked"}):
        return
    for left in _axis_options(stored):
        for right in _axis_options(wanted):
            if layer_shape(stored, left) == layer_shape(wanted, right):
                yield left, right


def _axis_options(piece: LayerPiece) -> Iterable[int | None]:
    return (None,) if piece.place.form in FLAT else range(len(piece.shape))


def is_on_both(axes: Axes, said: int) -> bool:
    """Tells whether each side that is stacked is so along the axis meant."""
    return all(axis in (None, said) for axis in axes)


def is_first_stacked(axes: Axes, said: int) -> bool:
    """Tells whether the first that is stacked is the one meant."""
    return next((axis for axis in axes if axis is not None), said) == said


def is_wanted(axes: Axes, said: int) -> bool:
    """Tells whether the wanted leaf is stacked along the axis meant."""
    return axes[1] == said


def is_move(axes: Axes) -> bool:
    """Tells whether both are stacked, along different axes."""
    return None not in axes and axes[0] != axes[1]


def is_part_of(axes: Axes, pair: Axes) -> bool:
    """Tells whether the axes agree with a pair on each side that is stacked."""
    return axes[0] in (None, pair[0]) and axes[1] in (None, pair[1])
