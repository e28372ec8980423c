"""Makes the wanted arrangement of a layer group from the stored one."""

import dataclasses
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.paths import Path, Tokens
from orbax_nnx_handler.planning.core.recipes import Fill, Index, Recipe, Stack
from orbax_nnx_handler.planning.mapping.layers import Form, Group, Key, LayerPiece, Side

Axes = tuple[int | None, int | None]
"""The stacked axis of the stored leaf and of the wanted leaf; None where flat."""

_FLAT: frozenset[Form] = frozenset({"flat", "remainder"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restacked:
    """How one wanted leaf comes from a layer group.

    Attributes:
        recipe: The recipe; holds `Fill` where a layer is missing.
        missing: The layers that no stored leaf holds.
        surplus: How many layers the stored group has more than the wanted one.
    """

    recipe: Recipe
    missing: tuple[int, ...]
    surplus: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnclearAxis:
    """A layer group whose shapes allow several stacked axes, or not the one that the user says.

    Attributes:
        group: The group.
        axes: The axes that are possible; empty if the user said another one.
        tokens: Its wanted leaves, below the model's root.
        sources: Its stored leaves.
        paths: Its wanted leaves as the target has them.
    """

    group: Group
    axes: tuple[int, ...]
    tokens: tuple[Tokens, ...]
    sources: tuple[Tokens, ...]
    paths: tuple[Path, ...] = ()


def restack(
    wanted: Side, stored: Side, axes: Mapping[Tokens, int] | None = None
) -> tuple[dict[Tokens, Restacked], list[UnclearAxis]]:
    """Finds wanted leaves that can be made from a stored layer group.

    Args:
        wanted: The wanted leaves that no stored leaf matches by path and shape.
        stored: The stored entries that no wanted leaf matches.
        axes: The stacked axis that the user says, by the group's canonical path.

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
    # The group with most leaves is the real one; a stray reading never takes a leaf twice.
    for (group, *_), keys in sorted(shared.items(), key=lambda item: -len(item[1])):
        result = _Join(wanted, stored, keys, said_axis(group, axes or {})).solve()
        if isinstance(result, UnclearAxis):
            unclear.append(result)
        else:
            found = result | found
    taken = set(found)
    return found, [item for item in unclear if not taken.issuperset(item.tokens)]


def _arrangement(pieces: Sequence[LayerPiece]) -> str:
    forms = {piece.seat.form for piece in pieces}
    return "blocks" if forms & {"block", "remainder"} else min(forms)


@dataclasses.dataclass(frozen=True)
class _Join:
    """One layer group on both sides."""

    wanted: Side
    stored: Side
    keys: Sequence[Key]
    said: int | None = None

    def solve(self) -> dict[Tokens, Restacked] | UnclearAxis:
        axes = self._axes()
        if not axes:
            return {} if self.said is None else self._unclear(())
        if len(axes) > 1:
            return self._unclear(axes)
        surplus = self._count(self.stored, axes[0][0]) - self._count(self.wanted, axes[0][1])
        if surplus and (self._has_blocks(self.stored) or axes == [(None, None)]):
            # With a position, a cycle or all cycles missing, every layer number behind would be off by some.
            return {}
        layers = {key: self._stored_layers(key, axes[0][0]) for key in self.keys}
        found: dict[Tokens, Restacked] = {}
        for key in self.keys:
            for piece in self.wanted.by_key[key]:
                made = self._make(piece, layers[key], axes[0][1], max(0, surplus))
                if made is not None:
                    found[piece.tokens] = made
        return found

    def _has_blocks(self, side: Side) -> bool:
        return any(
            piece.seat.form in ("block", "remainder") for key in self.keys for piece in side.by_key[key]
        )

    def _axes(self) -> list[Axes]:
        """Returns the pairs of stacked axes that fit the most leaves of the group."""
        votes: Counter[Axes] = Counter()
        for key in self.keys:
            votes.update(axes for axes in self._fitting(key) if self._agrees(axes))
        if not votes:
            # Fewer layers than a block has: all of them are a remainder, and nothing is stacked.
            return [(None, None)] if self._all_flat() else []
        top = max(votes.values())
        best = [axes for axes, count in votes.items() if count == top]
        same_count = [
            axes for axes in best if self._count(self.stored, axes[0]) == self._count(self.wanted, axes[1])
        ]
        best = same_count or best
        if any(None not in axes for axes in best):
            # Two stacks of one program family share their axis; a move of it would be a guess.
            best = [axes for axes in best if axes[0] == axes[1]] or best
        return sorted(best, key=str)

    def _all_flat(self) -> bool:
        pieces = (piece for side in (self.wanted, self.stored) for piece in side.all_pieces)
        groups = {key[0] for key in self.keys}
        return {piece.seat.form for piece in pieces if piece.seat.group in groups} <= {"flat", "remainder"}

    def _agrees(self, axes: Axes) -> bool:
        """Tells whether the user allows the axes: the first that is stacked is the one meant."""
        stacked = [axis for axis in axes if axis is not None]
        return self.said is None or not stacked or stacked[0] == self.said

    def _fitting(self, key: Key) -> set[Axes]:
        pairs = itertools.product(self.wanted.by_key[key], self.stored.by_key[key])
        return {axes for left, right in pairs for axes in _axes_between(left, right)}

    def _count(self, side: Side, axis: int | None) -> int:
        """Returns how many layers the whole group has on one side."""
        pieces = [piece for key in self.keys for piece in side.by_key[key]]
        cycles = self._cycles(side, axis)
        return max((self._last_layer(side, piece, axis, cycles) + 1 for piece in pieces), default=0)

    def _cycles(self, side: Side, axis: int | None) -> int:
        blocks = (p for key in self.keys for p in side.by_key[key] if p.seat.form == "block")
        return max((_length(piece, axis) for piece in blocks), default=0)

    def _last_layer(self, side: Side, piece: LayerPiece, axis: int | None, cycles: int) -> int:
        return max(self._layers(side, piece, axis, cycles), default=-1)

    def _layers(self, side: Side, piece: LayerPiece, axis: int | None, cycles: int) -> Sequence[int]:
        seat = piece.seat
        match seat.form:
            case "flat":
                return (seat.position,)
            case "stacked":
                return range(_length(piece, axis))
            case "block":
                size = side.block_size[seat.group, seat.inner]
                return range(seat.position, _length(piece, axis) * size + seat.position, size)
            case "remainder":
                return (cycles * side.block_size.get((seat.group, seat.inner), 0) + seat.position,)

    def _stored_layers(self, key: Key, axis: int | None) -> dict[int, Recipe]:
        cycles = self._cycles(self.stored, axis)
        layers: dict[int, Recipe] = {}
        for piece in self.stored.by_key[key]:
            assert piece.entry is not None
            for at, layer in enumerate(self._layers(self.stored, piece, axis, cycles)):
                whole = piece.seat.form in _FLAT or axis is None
                layers[layer] = piece.entry.recipe if whole else Index(piece.entry.recipe, axis or 0, at)
        return layers

    def _make(
        self, piece: LayerPiece, layers: Mapping[int, Recipe], axis: int | None, surplus: int
    ) -> Restacked | None:
        numbers = self._layers(self.wanted, piece, axis, self._cycles(self.wanted, axis))
        missing = tuple(number for number in numbers if number not in layers)
        if len(missing) == len(numbers):
            return None
        if piece.seat.form in _FLAT or axis is None:
            return Restacked(recipe=layers[numbers[0]], missing=(), surplus=surplus)
        empty = Fill(_without(piece.shape, axis))
        recipe = Stack(tuple(layers.get(number, empty) for number in numbers), axis)
        return Restacked(recipe=recipe, missing=missing, surplus=surplus)

    def _unclear(self, axes: Sequence[Axes]) -> UnclearAxis:
        options = sorted({axis for pair in axes for axis in pair if axis is not None})
        return UnclearAxis(
            group=self.keys[0][0],
            axes=tuple(options),
            tokens=tuple(piece.tokens for key in self.keys for piece in self.wanted.by_key[key]),
            sources=tuple(piece.tokens for key in self.keys for piece in self.stored.by_key[key]),
        )


def _axes_between(wanted: LayerPiece, stored: LayerPiece) -> Iterable[Axes]:
    """Yields the axes under which two pieces hold layers of one shape."""
    forms = {wanted.seat.form, stored.seat.form}
    # What is left over after the blocks is flat on either side and tells no axis.
    if "remainder" in forms or (len(forms) == 1 and forms != {"block"}):
        return
    for left in _axis_options(stored):
        for right in _axis_options(wanted):
            if _without(stored.shape, left) == _without(wanted.shape, right):
                yield left, right


def _axis_options(piece: LayerPiece) -> Iterable[int | None]:
    return (None,) if piece.seat.form in _FLAT else range(len(piece.shape))


def _without(shape: Shape, axis: int | None) -> Shape:
    return shape if axis is None else (*shape[:axis], *shape[axis + 1 :])


def _length(piece: LayerPiece, axis: int | None) -> int:
    return piece.shape[axis] if axis is not None and axis < len(piece.shape) else 0


def said_axis(group: Group, axes: Mapping[Tokens, int]) -> int | None:
    """Returns the axis that the user says for a group, by its path from the model's or the target's root."""
    path = (*group.parent, group.name)
    return next((axis for said, axis in axes.items() if said[-len(path) :] == path), None)
