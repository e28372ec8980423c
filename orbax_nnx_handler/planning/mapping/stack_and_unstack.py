"""Makes the wanted arrangement of a layer group from the stored one.

Layer i comes from layer i, along an axis that the shapes leave no doubt about.
Flax stacks all variables of one collection along one axis, counted from the front
or from the back (`variable_axes` of flax/core/lift.py `scan` and `vmap`), so what
one leaf leaves open the others of its group and collection may settle; where they
do not, the group is a question.
"""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property

from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.paths import Tokens
from orbax_nnx_handler.planning.core.recipes import Fill, Index, Recipe, Stack
from orbax_nnx_handler.planning.mapping.layer_paths import (
    FLAT,
    Axes,
    Blocks,
    Group,
    Key,
    LayerPiece,
    Side,
    axes_between,
    is_first_stacked,
    is_move,
    is_on_both,
    is_part_of,
    is_wanted,
    layer_shape,
    length,
    numbers_of,
    two_of,
)
from orbax_nnx_handler.planning.mapping.matches import AxisGround, Restacked, UnclearAxis
from orbax_nnx_handler.planning.rules.entries import Entry

_BACKS = ((False, False), (False, True), (True, False), (True, True))
"""Whether the program of either side, stored first, counts its axis from the back."""


def restack(
    wanted: Side, stored: Side, said: Mapping[Tokens, int], known: int | None = None
) -> tuple[dict[Tokens, Restacked], list[UnclearAxis]]:
    """Finds wanted leaves that can be made from a stored layer group.

    Args:
        wanted: The wanted leaves that no stored leaf matches by path and shape, of one collection.
        stored: The stored entries of that collection that no wanted leaf matches.
        said: The stacked axis that the user says, by the group's canonical path.
        known: The axis along which the program of this layout stacks, where that is known.

    Returns:
        What was found, by canonical wanted path, and the groups whose stacked
        axis the shapes leave open, or do not allow to be the one the user says.
    """
    shared: dict[tuple[Group, str, str], list[Key]] = defaultdict(list)
    for key in wanted.by_key:
        if key in stored.by_key:
            forms = (_arrangement(wanted.by_key[key]), _arrangement(stored.by_key[key]))
            # The same arrangement would have matched by path: what differs then is not the arrangement.
            if forms[0] != forms[1] or forms[0] == "blocks":
                shared[key[0], *forms].append(key)
    found: dict[Tokens, Restacked] = {}
    unclear: list[UnclearAxis] = []
    for (group, *_), keys in sorted(shared.items(), key=lambda item: -len(item[1])):
        result = _join(wanted, stored, keys, _said_of(group, wanted, stored, keys, said), known)
        if isinstance(result, UnclearAxis):
            unclear.append(result)
        else:
            found = result | found
    others = {item.axis for item in found.values() if item.is_against_layout}
    if others:
        # A program stacks all of its scans along one axis: this one not along that of its layout.
        by_layout = {tokens: item for tokens, item in found.items() if item.ground == "layout"}
        found = {tokens: item for tokens, item in found.items() if tokens not in by_layout}
        unclear += _contradicted(by_layout, {known, *others} - {None})
    return found, [item for item in unclear if not found.keys() >= {*item.tokens}]


def _contradicted(leaves: Mapping[Tokens, Restacked], axes: Iterable[int | None]) -> Iterator[UnclearAxis]:
    """Yields the question for each group whose axis the layout says, and other groups deny."""
    for group in dict.fromkeys(item.group for item in leaves.values()):
        yield UnclearAxis(
            group=group,
            axes=tuple(sorted(axis for axis in axes if axis is not None)),
            tokens=tuple(tokens for tokens, item in leaves.items() if item.group == group),
            sources=(),
        )


def _arrangement(pieces: Sequence[LayerPiece]) -> str:
    return "blocks" if any(p.place.inner for p in pieces) else min(piece.place.form for piece in pieces)


def _said_of(
    group: Group, wanted: Side, stored: Side, keys: Iterable[Key], said: Mapping[Tokens, int]
) -> int | None:
    """Returns the axis that the user says for a group, by its name or by its scan's."""
    pieces = (piece for key in keys for side in (stored, wanted) for piece in side.by_key[key])
    scans = sorted({scan.name for piece in pieces if (scan := piece.place.scan) is not None})
    named = [said.get((*group.parent, name)) for name in (group.name, *scans)]
    return next((axis for axis in named if axis is not None), None)


def _join(
    wanted: Side, stored: Side, keys: Sequence[Key], said: int | None, known: int | None
) -> dict[Tokens, Restacked] | UnclearAxis:
    """Joins a group under the one number of cycles that the shapes of all its leaves and its layers allow."""
    group = keys[0][0]
    is_known = stored.knows(group) or wanted.knows(group)
    left, right = (side.known_blocks(group) if is_known else None for side in (stored, wanted))
    pairs = itertools.product((None,) if left is None else left, (None,) if right is None else right)
    joins = [_Join(wanted, stored, keys, said, known, pair) for pair in pairs]
    if len(joins) == 1:
        return joins[0].solve()
    fitting = [join for join in joins if join.has_all_layers and join.choices]
    fitting = [join for join in fitting if join.follows_layout] or fitting
    if not fitting or (said is None and not any(join.options for join in fitting)):
        solved = [join.solve() for join in fitting]
        return solved[0] if solved and all(other == solved[0] for other in solved) else {}
    return fitting[0].solve() if len(fitting) == 1 else fitting[0].unclear(fitting)


@dataclasses.dataclass(frozen=True)
class _Join:
    """One layer group on both sides."""

    wanted: Side
    stored: Side
    keys: Sequence[Key]
    said: int | None = None
    known: int | None = None
    blocks: tuple[Blocks | None, Blocks | None] = (None, None)

    def solve(self) -> dict[Tokens, Restacked] | UnclearAxis:
        if not self.choices:
            return {} if self.said is None else self.unclear([self])
        if len(self.choices) > 1:
            return self.unclear([self])
        (axes,) = self.choices
        surplus = self._count(self.stored, axes, 0) - self._count(self.wanted, axes, 1)
        if surplus and (self._has_blocks(self.stored) or set(axes.values()) == {(None, None)}):
            # With a position, a cycle or all cycles missing, every layer number behind would be off by some.
            return {}
        found: dict[Tokens, Restacked] = {}
        for key in self.keys:
            if key not in axes:
                continue
            layers = self._stored_layers(key, axes)
            for piece in self.wanted.by_key[key]:
                made = self._make(piece, layers, axes, max(0, surplus))
                if made is not None:
                    found[piece.tokens] = made
        return found

    def _has_blocks(self, side: Side) -> bool:
        return any(piece.place.inner for key in self.keys for piece in side.by_key[key])

    @property
    def has_all_layers(self) -> bool:
        """Whether both sides have as many layers, as far as names tell."""
        group = self.keys[0][0]
        sides = zip((self.stored, self.wanted), self.blocks, strict=True)
        totals = [blocks.total if blocks is not None else side.last_layer(group) for side, blocks in sides]
        return None in totals or totals[0] == totals[1]

    @property
    def follows_layout(self) -> bool:
        return any(all(map(self._is_known, choice.values())) for choice in self.choices)

    @cached_property
    def options(self) -> Mapping[Key, set[Axes]]:
        """The axes that each leaf may have, as a rule says where there is one; those without any left out."""
        found = self._allowed
        if self.said is None:
            return found
        # The axis of both sides, where the shapes allow it; else of the side that is or may be stacked on it.
        options: dict[Key, set[Axes]] = {}
        for meant in (is_on_both, is_first_stacked, is_wanted):
            agreed = {key: {axes for axes in some if meant(axes, self.said)} for key, some in found.items()}
            options = options or {key: axes for key, axes in agreed.items() if axes}
            if all(agreed.values()):
                return agreed
        return options

    @cached_property
    def _allowed(self) -> Mapping[Key, set[Axes]]:
        """The axes that each leaf's own shapes allow; leaves that allow none are left out."""
        return {key: some for key in self.keys if (some := self._fitting(key))}

    def _ground(self, piece: LayerPiece) -> AxisGround:
        """Returns what says the axis of a leaf, once all have one."""
        key = (piece.place.group, piece.place.rest)
        if len(self._allowed[key]) == 1:
            # The layout says what the numbers of layers alone tell, and the leaf's own shapes do not.
            own = {axes for other in self.stored.by_key[key] for axes in axes_between(piece, other)}
            return "layout" if len(own) > 1 and all(map(self._is_known, self._allowed[key])) else "shape"
        if len(self.options[key]) == 1:
            return "rule"
        several = [axes for axes in self.options.values() if len(axes) > 1]
        return "group" if len(several) == 1 and len(self._alike(self.options)) == 1 else "layout"

    def _is_against_layout(self, key: Key) -> bool:
        """Tells whether a leaf may be stacked along one axis only, and not that of the layout."""
        (axes, *others), known = self._allowed[key], self.known
        if known is None or others or self._is_known(axes):
            return False
        return any(known < len(piece.shape) for piece in (*self.stored.by_key[key], *self.wanted.by_key[key]))

    @cached_property
    def choices(self) -> list[dict[Key, Axes]]:
        """The ways to choose the axis of every leaf."""
        options = self.options
        flat: dict[Key, Axes] = {
            key: (None, None) for key in self.keys if key not in options and self._is_flat(key)
        }
        if not options:
            # Fewer layers than a block has: all of them are a remainder, and nothing is stacked.
            return [flat] if flat and (self.blocks != (None, None) or self._all_flat()) else []
        alike = self._alike(options)
        open_ends = [key for key, axes in options.items() if len(axes) > 1]
        if not open_ends:
            alike = [{key: next(iter(axes)) for key, axes in options.items()}]
        elif len(open_ends) > 1 or len(alike) != 1:
            # Of several leaves that each leave it open none settles the others; the program's layout may.
            # A target may stack what is stored layer by layer as `nnx.vmap` does by default.
            is_open = bool(self.known) and all((None, 0) in axes for axes in options.values())
            known = [each for each in alike if all(map(self._is_known, each.values())) and not is_open]
            two = [dict(zip(options, axes, strict=True)) for axes in two_of(options.values())]
            alike = known if len(known) == 1 else two
        return [choice | flat for choice in alike]

    def _is_known(self, axes: Axes) -> bool:
        return all(axis in (None, self.known) for axis in axes)

    def _alike(self, options: Mapping[Key, set[Axes]]) -> list[dict[Key, Axes]]:
        """Returns the choices in which all leaves are stacked along one axis, from the front or the back."""
        found: list[dict[Key, Axes]] = []
        # The two axes of a scan in a block are counted from the front, as are all of its layout.
        for backs in _BACKS if self.blocks == (None, None) else _BACKS[:1]:
            named = {key: {self._named(key, a, backs): a for a in axes} for key, axes in options.items()}
            left, right = (
                {name[at] for axes in named.values() for name in axes if name[at] is not None} or {None}
                for at in (0, 1)
            )
            for pair in sorted(itertools.product(left, right), key=str):
                if any(back and axis not in (None, -1) for back, axis in zip(backs, pair, strict=True)):
                    continue  # Programs count from the back for the last axis alone.
                # A leaf that is not stacked on one side has no say about the axis there.
                choice = {
                    key: axes[name] for key, axes in named.items() for name in axes if is_part_of(name, pair)
                }
                if len(choice) == len(named) and choice not in found:
                    found.append(choice)
        return found

    def _named(self, key: Key, axes: Axes, backs: tuple[bool, bool]) -> Axes:
        """Returns a pair of axes as programs would write it, each counted from the front or from the back."""
        ranks = (len(self.stored.by_key[key][0].shape), len(self.wanted.by_key[key][0].shape))
        stored, wanted = (
            axis - rank if back and axis is not None else axis
            for axis, rank, back in zip(axes, ranks, backs, strict=True)
        )
        return stored, wanted

    def _is_flat(self, key: Key) -> bool:
        return all(
            piece.place.form in FLAT for side in (self.wanted, self.stored) for piece in side.by_key[key]
        )

    def _all_flat(self) -> bool:
        pieces = (piece for side in (self.wanted, self.stored) for piece in side.all_pieces)
        groups = {key[0] for key in self.keys}
        return {piece.place.form for piece in pieces if piece.place.group in groups} <= {"flat", "remainder"}

    def _fitting(self, key: Key) -> set[Axes]:
        if self.blocks != (None, None):
            return self._fitting_by_number(key)
        pairs = itertools.product(self.wanted.by_key[key], self.stored.by_key[key])
        return set[Axes]().union(*(axes_between(left, right) for left, right in pairs))

    def _fitting_by_number(self, key: Key) -> set[Axes]:
        """Returns the axes under which every layer of one number has one shape on both sides."""
        stored, wanted = (
            self._shapes_by_axis(side.by_key[key], blocks)
            for side, blocks in zip((self.stored, self.wanted), self.blocks, strict=True)
        )
        return {
            (left, right)
            for left, right in itertools.product(stored, wanted)
            if (left, right) != (None, None)
            and (numbers := stored[left].keys() & wanted[right].keys())
            and all(stored[left][number] == wanted[right][number] for number in numbers)
        }

    def _shapes_by_axis(
        self, pieces: Sequence[LayerPiece], blocks: Blocks | None
    ) -> dict[int | None, dict[int, Shape]]:
        """Returns the shape of each layer, by each axis that the pieces may be stacked along."""
        stacked = [piece for piece in pieces if piece.place.form not in FLAT]
        axes = range(min(len(p.shape) for p in stacked)) if stacked else (None,)
        found: dict[int | None, dict[int, Shape]] = {}
        for axis in axes:
            if axis is None or blocks is None or all(blocks.admits(piece, axis) for piece in stacked):
                found[axis] = {
                    number: layer_shape(piece, axis)
                    for piece in pieces
                    for number in numbers_of(piece, axis, blocks)
                }
        return found

    def _count(self, side: Side, axes: Mapping[Key, Axes], which: int) -> int:
        """Returns how many layers the whole group has on one side."""
        if (blocks := self.blocks[which]) is not None:
            return blocks.total
        if self.blocks != (None, None) and (last_layer := side.last_layer(self.keys[0][0])) is not None:
            return last_layer
        cycles = self._cycles(side, axes, which)
        last = [
            max(self._layers(side, piece, axes[key][which], cycles, which), default=-1)
            for key in self.keys
            if key in axes
            for piece in side.by_key[key]
        ]
        return max(last, default=-1) + 1

    def _cycles(self, side: Side, axes: Mapping[Key, Axes], which: int) -> int:
        lengths = [
            length(piece, axes[key][which])
            for key in self.keys
            if key in axes
            for piece in side.by_key[key]
            if piece.place.form == "block"
        ]
        return max(lengths, default=0)

    def _layers(
        self, side: Side, piece: LayerPiece, axis: int | None, cycles: int, which: int
    ) -> Sequence[int]:
        place = piece.place
        if self.blocks[which] is not None:
            return numbers_of(piece, axis, self.blocks[which])
        match place.form:
            case "flat":
                return (place.position,)
            case "stacked":
                return range(length(piece, axis))
            case "block":
                size = side.block_size[place.group, place.inner]
                return range(place.position, length(piece, axis) * size + place.position, size)
            case _:
                return (cycles * side.block_size.get((place.group, place.inner), 0) + place.position,)

    def _stored_layers(self, key: Key, axes: Mapping[Key, Axes]) -> dict[int, list[tuple[Recipe, Entry]]]:
        axis, cycles = axes[key][0], self._cycles(self.stored, axes, 0)
        layers: dict[int, list[tuple[Recipe, Entry]]] = defaultdict(list)
        for piece in self.stored.by_key[key]:
            assert piece.entry is not None
            for at, layer in enumerate(self._layers(self.stored, piece, axis, cycles, 0)):
                recipe = self._element(piece, piece.entry.recipe, axis, at)
                layers[layer].append((recipe, piece.entry))
        return dict(layers)

    def _element(self, piece: LayerPiece, whole: Recipe, axis: int | None, at: int) -> Recipe:
        """Returns one layer of a stored piece, the `at`th."""
        blocks = self.blocks[0]
        if piece.place.form in FLAT or axis is None:
            return whole
        if piece.place.form == "scan in block" and blocks is not None:
            cycle, layer = divmod(at, blocks.inner)
            return Index(Index(whole, axis, cycle), axis, layer)
        return Index(whole, axis, at)

    def _stack(self, piece: LayerPiece, parts: Sequence[Recipe], axis: int) -> Recipe:
        """Returns a wanted piece from all of its layers."""
        blocks = self.blocks[1]
        if piece.place.form == "scan in block" and blocks is not None:
            starts = range(0, len(parts), blocks.inner)
            parts = [Stack(tuple(parts[start : start + blocks.inner]), axis) for start in starts]
        return Stack(tuple(parts), axis)

    def _make(
        self,
        piece: LayerPiece,
        layers: Mapping[int, Sequence[tuple[Recipe, Entry]]],
        axes: Mapping[Key, Axes],
        surplus: int,
    ) -> Restacked | None:
        key = (piece.place.group, piece.place.rest)
        stored_axis, axis = axes[key]
        cycles = 0 if piece.place.form in ("flat", "stacked") else self._cycles(self.wanted, axes, 1)
        numbers = self._layers(self.wanted, piece, axis, cycles, 1)
        missing = tuple(number for number in numbers if number not in layers)
        if len(missing) == len(numbers):
            return None
        claims = [entry for n in numbers if len(layers.get(n, ())) > 1 for _, entry in layers[n]]
        whole = piece.place.form in FLAT or axis is None
        empty = Fill(layer_shape(piece, None if whole else axis))
        parts = [layers[number][0][0] if number in layers else empty for number in numbers]
        recipe = parts[0] if whole or axis is None else self._stack(piece, parts, axis)
        sources = _each_once(made[0][1] for n in numbers if (made := layers.get(n)))
        # A layer that has a number on either side, as one left over behind the blocks, lies on no axis.
        is_read_whole = whole and recipe is sources[0].recipe
        stacked = None if is_read_whole else stored_axis if stored_axis is not None else axis
        return Restacked(
            recipe=recipe,
            group=piece.place.group,
            axis=stacked,
            ground=None if stacked is None else self._ground(piece),
            is_against_layout=stacked is not None and self._is_against_layout(key),
            missing=() if whole else missing,
            surplus=surplus,
            claims=_each_once(claims),
            sources=sources,
            moved=is_move(axes[key]),
            naming=self._naming,
        )

    @cached_property
    def _naming(self) -> str:
        pieces = [p for key in self.keys for side in (self.stored, self.wanted) for p in side.by_key[key]]
        scans = [scan for piece in pieces if (scan := piece.place.scan) is not None]
        return "; ".join(sorted({scan.source for scan in scans if scan.name != scan.layers}))

    def unclear(self, joins: Iterable["_Join"]) -> UnclearAxis:
        """Returns the question which of the axes that several readings allow is the stacked one."""
        each = [list(join.options.values()) for join in joins]
        options = list(itertools.chain(*each))
        named = {axis for some in options for axes in some for axis in axes if axis is not None}
        # What one leaf alone allows is no axis of the group.
        shared = {axis for axis in named if any(_all_allow(axis, some) for some in each)}
        return UnclearAxis(
            group=self.keys[0][0],
            axes=tuple(sorted(shared or named)),
            tokens=tuple(piece.tokens for key in self.keys for piece in self.wanted.by_key[key]),
            sources=tuple(piece.tokens for key in self.keys for piece in self.stored.by_key[key]),
            moved=any(map(is_move, itertools.chain(*options))),
        )


def _all_allow(axis: int, options: Iterable[Iterable[Axes]]) -> bool:
    return all(any(axis in axes for axes in some) for some in options)


def _each_once(entries: Iterable[Entry]) -> tuple[Entry, ...]:
    return tuple({id(entry): entry for entry in entries}.values())
