"""What a recipe reads, element by element, and the names that each element has on its side.

An element is a stored leaf, or one layer of it, that becomes all of a wanted leaf or one layer
of it. Its names are the paths under which a program may write it where every layer has a number:
`blocks/kernel`, layer 3, is `blocks/#3/kernel`. Two elements are one where a name of the one is
a name of the other.
"""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from functools import cached_property
from typing import NamedTuple

from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.paths import Path, Tokens, is_number
from orbax_nnx_handler.planning.core.recipes import Concat, Fill, Index, Read, Recipe, Stack, Transpose
from orbax_nnx_handler.planning.layouts.layout import Placement, ScannedBlocks


class Element(NamedTuple):
    """A part of a stored leaf that becomes a part of a wanted leaf.

    Attributes:
        path: The stored leaf.
        at: Its layer in the stored leaf, as numbers along `axis` and the next one; empty for all of it.
        axis: The axis along which that leaf is stacked.
        to: Its layer in the wanted leaf, likewise along `to_axis`.
        to_axis: The axis along which that one is stacked.
        gates: All stored leaves that are fused to it along its features; `path` is the first.
    """

    path: Path
    at: tuple[int, ...] = ()
    axis: int | None = None
    to: tuple[int, ...] = ()
    to_axis: int | None = None
    gates: tuple[Path, ...] = ()


def elements_of(recipe: Recipe, placed: Mapping[Path, Placement]) -> list[Element] | None:
    """Returns what a recipe of whole leaves and layers reads; None for a recipe with any other step.

    Args:
        recipe: The recipe.
        placed: What each stored leaf is.
    """
    match recipe:
        case Read(path):
            return [Element(path)]
        case Fill():
            return []
        case Index(Concat(sources, fused), axis, index) if axis == fused + 1:
            return _layer(_fused(sources, fused, placed, behind=1), axis, index)
        case Index(source, axis, index):
            return _layer(elements_of(source, placed), axis, index)
        case Stack(sources, axis):
            return _stacked([elements_of(part, placed) for part in sources], axis)
        case Concat(sources, axis):
            return _fused(sources, axis, placed)
        case _:
            return None


def _layer(inner: list[Element] | None, axis: int, index: int) -> list[Element] | None:
    if inner is None or len(inner) != 1 or inner[0].to or inner[0].axis not in (None, axis):
        return None
    return [inner[0]._replace(at=(*inner[0].at, index), axis=axis)]


def _stacked(parts: Sequence[list[Element] | None], axis: int) -> list[Element] | None:
    found: list[Element] = []
    for number, part in enumerate(parts):
        if part is None or any(element.to_axis not in (None, axis) for element in part):
            return None
        found += [element._replace(to=(number, *element.to), to_axis=axis) for element in part]
    return found


def _fused(
    sources: Sequence[Recipe], axis: int, placed: Mapping[Path, Placement], behind: int = 0
) -> list[Element] | None:
    """Returns leaves that are joined along their last axis, or the last but that of layers behind it."""
    paths = [part.path for part in sources if isinstance(part, Read)]
    is_last = all(axis == len(placed[path].leaf.shape) - 1 - behind for path in paths)
    return [Element(paths[0], gates=tuple(paths))] if is_last and len(paths) == len(sources) else None


Chain = tuple[Path | None, tuple[object, ...]]
"""A stored leaf and the steps of a recipe that takes a layer of it or turns axes; None for any other."""


def read_and_steps(recipe: Recipe) -> Chain:
    """Returns the stored leaf of which a recipe takes a layer or turns axes, if no more, and its steps."""
    steps: tuple[object, ...] = ()
    while type(recipe) is not Read:
        if type(recipe) is Transpose:
            steps = (*steps, recipe.permutation)
        elif type(recipe) is Index:
            steps = (*steps, "layer", recipe.axis, recipe.index)
        else:
            return None, ()
        recipe = recipe.source
    return recipe.path, steps


class Name(NamedTuple):
    """One name of an element.

    Attributes:
        tokens: The path, with a number for each layer.
        depth: Where the number stands that its own leaf's path does not have; 0 where it has all of them.
        scan: The scan in whose blocks the layer lies; None for a plain stack.
        is_left_over: Whether it lies behind the last block.
    """

    tokens: Tokens
    depth: int = 0
    scan: ScannedBlocks | None = None
    is_left_over: bool = False

    @property
    def is_known(self) -> bool:
        """Whether the layout knows the scan by its name."""
        return self.scan is not None and bool(self.scan.source)

    def form(self, layer: tuple[int, ...]) -> str:
        """Returns in a word how a side keeps what has these layer numbers."""
        if not layer:
            return "flat"
        return "stack" if self.scan is None else "known blocks" if self.is_known else "blocks"


class BlockCounts(NamedTuple):
    """The layers of one scan in blocks, as the names of one side tell.

    Attributes:
        prefix: Layers with numbers of their own that lie before the scan.
        size: Layers in a block.
        inner: Layers of the scan in a block.
        cycles: The numbers of blocks that the shapes allow.
    """

    prefix: int
    size: int
    inner: int
    cycles: Collection[int]


@dataclasses.dataclass(frozen=True)
class SideNames:
    """The names of the leaves of one side.

    Attributes:
        leaves: The canonical path and the shape of every leaf, those that a rule has dealt with left out;
            looked at once, in few plans.
        scans: The scans that the layout knows by name.
    """

    leaves: Iterable[tuple[Tokens, Shape]]
    scans: Sequence[ScannedBlocks]

    def of(self, tokens: Tokens, layer: tuple[int, ...]) -> Iterator[Name]:
        """Yields the names of all of a leaf, or of one layer of it."""
        places = [at for at in range(len(tokens) - 2) if not is_number(tokens[at])]
        # A name that the layout knows says more than that a layer has a number.
        for at in places if self.scans else ():
            for scan in self._known_at(tokens, at):
                yield from self._in_block(tokens, at, layer, scan)
        if not layer:
            yield Name(tokens)
        elif len(layer) == 1:
            for at in range(1, len(tokens)):
                yield Name((*tokens[:at], f"#{layer[0]}", *tokens[at:]), at)
        for at in places:
            scan = self._any_at(tokens, at)
            if scan is not None:
                yield from self._in_block(tokens, at, layer, scan)

    def _known_at(self, tokens: Tokens, at: int) -> Sequence[ScannedBlocks]:
        token, below = tokens[at], tokens[at + 1 :]
        known = [
            scan for scan in self.scans if token == scan.modules or _member(token, below, scan) is not None
        ]
        if all(token == scan.name for scan in known):
            return known
        # Several scans may leave over layers under one name: they are of those that are there.
        counts = [(scan, self.blocks(tokens[:at], scan)) for scan in known]
        return [scan for scan, blocks in counts if blocks is None or blocks.cycles != {0}] or known

    def _any_at(self, tokens: Tokens, at: int) -> ScannedBlocks | None:
        """Returns any program's scan: members have numbers, and nothing else lies beside them."""
        token, inner, number = tokens[at : at + 3]
        if is_number(inner) or not is_number(number) or self._known_at(tokens, at):
            return None
        layers = token.removesuffix("_remainder")
        remainder = f"{layers}_remainder"
        return ScannedBlocks(
            layers=layers, name=layers, numbered=frozenset({inner}), remainder=remainder, source=""
        )

    def _in_block(
        self, tokens: Tokens, at: int, layer: tuple[int, ...], scan: ScannedBlocks
    ) -> Iterator[Name]:
        blocks = self.blocks(tokens[:at], scan)
        if blocks is None:
            return
        is_scan, name, below = tokens[at] == scan.name, tokens[at + 1], tokens[at + 1 :]
        position, rest = _position(scan, tokens[at], below, blocks)
        if rest is None:
            return
        if is_scan:
            numbers = _numbers(blocks, layer, None if name == scan.inner_scan else position)
        elif name == scan.inner_scan:
            numbers = {cycles: cycles * blocks.size + layer[0] for cycles in blocks.cycles if len(layer) == 1}
        else:
            numbers = {cycles: cycles * blocks.size + position for cycles in blocks.cycles if not layer}
        for number in numbers.values():
            named = (*tokens[:at], scan.layers, f"#{blocks.prefix + number}", *rest)
            yield Name(named, at + 1, scan, not is_scan)

    def blocks(self, parent: Tokens, scan: ScannedBlocks) -> BlockCounts | None:
        """Returns what the names and shapes of a side tell of a scan; None where it is none."""
        key = (parent, scan)
        if key not in self._known:
            self._known[key] = self._blocks(parent, scan)
        return self._known[key]

    def layers_before(self, tokens: Tokens, *, may_be_lost: bool) -> Set[int]:
        """Returns how many layers lie before the known scan that a leaf is in, or what it leaves over.

        Args:
            tokens: The leaf.
            may_be_lost: Whether a scan that is not there was, so that what it leaves over tells nothing.
        """
        return {
            blocks.prefix + (0 if tokens[at] == scan.name else cycles * blocks.size)
            for at in range(len(tokens) - 2)
            for scan in self._known_at(tokens, at)
            if (blocks := self.blocks(tokens[:at], scan)) is not None
            if tokens[at] == scan.name or not may_be_lost or blocks.cycles != {0}
            for cycles in blocks.cycles
        }

    def known_blocks(self, name: Name) -> BlockCounts | None:
        """Returns the blocks that a name is about, where the layout knows their scan."""
        if name.scan is None or not name.is_known or name.is_left_over:
            return None
        return self.blocks(name.tokens[: name.depth - 1], name.scan)

    @cached_property
    def _known(self) -> dict[tuple[Tokens, ScannedBlocks], BlockCounts | None]:
        return {}

    @cached_property
    def _by_module(self) -> Mapping[Tokens, Sequence[tuple[Tokens, Shape]]]:
        found: dict[Tokens, list[tuple[Tokens, Shape]]] = defaultdict(list)
        for tokens, shape in self.leaves:
            for at in range(1, len(tokens)):
                found[tokens[:at]].append((tokens, shape))
        return found

    def _blocks(self, parent: Tokens, scan: ScannedBlocks) -> BlockCounts | None:
        depth = len(parent) + 1
        scanned = [(t[depth:], shape) for t, shape in self._by_module.get((*parent, scan.name), ())]
        flat = {t[depth] for t, _ in self._by_module.get((*parent, scan.layers), ())}
        members = {_member(scan.name, below, scan) for below, _ in scanned}
        if not scan.source:
            left_over = self._by_module.get((*parent, scan.remainder), ())
            members |= {_member(scan.remainder, tokens[depth:], scan) for tokens, _ in left_over} - {None}
            # A layer may hold numbered modules of its own.
            return None if None in members else _counted(0, members, scanned, scan)
        prefix = max((int(token[1:]) + 1 for token in flat if is_number(token)), default=0)
        return _counted(prefix, members - {None}, scanned, scan)


def _member(token: str, below: Tokens, scan: ScannedBlocks) -> int | None:
    """Returns the position of what lies below a scan or what it leaves over; None where it is no member."""
    name = below[0]
    if token not in (scan.name, scan.remainder):
        return None
    is_numbered = name in scan.numbered and not (scan.inner_scan and token == scan.name)
    if is_numbered and len(below) > 2 and is_number(below[1]):
        return int(below[1][1:])
    if name == scan.inner_scan and scan.inner_scan:
        return -1
    return scan.after.index(name) if name in scan.after else None


def _counted(
    prefix: int, members: Collection[int | None], scanned: Iterable[tuple[Tokens, Shape]], scan: ScannedBlocks
) -> BlockCounts | None:
    shapes = [(below[0], shape) for below, shape in scanned if _member(scan.name, below, scan) is not None]
    if not scan.inner_scan:
        numbers = {member for member in members if member is not None}
        cycles = set[int].intersection(*(set(shape) for _, shape in shapes)) if shapes else {0}
        return BlockCounts(prefix, len(numbers), 0, cycles) if numbers == set(range(len(numbers))) else None
    pairs = [set(itertools.pairwise(shape)) for name, shape in shapes if name == scan.inner_scan]
    singles = [set(shape) for name, shape in shapes if name != scan.inner_scan]
    both = set[tuple[int, int]].intersection(*pairs) if pairs else set[tuple[int, int]]()
    both = {pair for pair in both if all(pair[0] in shape for shape in singles)}
    inner = {pair[1] for pair in both}
    if len(inner) > 1:
        return None
    count = next(iter(inner), 0)
    return BlockCounts(prefix, count + len(scan.after), count, {pair[0] for pair in both} if shapes else {0})


def _position(
    scan: ScannedBlocks, token: str, below: Tokens, blocks: BlockCounts
) -> tuple[int, Tokens | None]:
    """Returns the position in the block of what lies below a scan, and the path below that."""
    if token == scan.modules and is_number(below[0]):
        return int(below[0][1:]), below[1:]
    if below[0] == scan.inner_scan:
        return 0, below[1:]
    if below[0] in scan.after and token == scan.name:
        return blocks.inner + scan.after.index(below[0]), below[1:]
    member = _member(token, below, scan) if below[0] in scan.numbered else None
    return (0, None) if member is None else (member, below[2:])


def _numbers(blocks: BlockCounts, layer: tuple[int, ...], position: int | None) -> dict[int, int]:
    """Returns the number of a layer within the scan: of the inner one where no position is given."""
    if position is None:
        return {0: layer[0] * blocks.size + layer[1]} if len(layer) == 2 else {}
    return {0: layer[0] * blocks.size + position} if len(layer) == 1 else {}


def positions(names: Iterable[Tokens]) -> Mapping[Tokens, Set[str]]:
    """Returns the numbers of the members of each block."""
    found: dict[Tokens, set[str]] = defaultdict(set)
    for name in names:
        for member in members_of(name):
            found[member].add(name[len(member)])
    return found


def members_of(name: Tokens) -> Iterator[Tokens]:
    """Yields what may be the members of a block in a name: all up to the member's number."""
    for at in range(2, len(name) - 1):
        if is_number(name[at]) and not is_number(name[at - 1]) and not is_number(name[at - 2]):
            yield name[:at]


def common_end(left: Tokens, right: Tokens) -> int:
    """Returns how many tokens two names end in alike."""
    shorter = min(len(left), len(right))
    if left[len(left) - shorter :] == right[len(right) - shorter :]:
        return shorter  # Nearly every pair.
    return next(n for n in range(shorter) if left[-1 - n] != right[-1 - n])
