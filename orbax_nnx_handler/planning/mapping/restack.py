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
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property

from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.paths import Path, Tokens
from orbax_nnx_handler.planning.core.recipes import Fill, Index, Recipe, Stack
from orbax_nnx_handler.planning.mapping.layers import Form, Group, Key, LayerPiece, Side
from orbax_nnx_handler.planning.rules.entries import Entry

Axes = tuple[int | None, int | None]
"""The stacked axis of the stored leaf and of the wanted leaf; None where flat."""

_FLAT: frozenset[Form] = frozenset({"flat", "remainder"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restacked:
    """How one wanted leaf comes from a layer group.

    Attributes:
        recipe: The recipe; holds `Fill` where a layer is missing.
        group: The group.
        axis: The stacked axis of the stored leaf, or of the wanted one where only that is stacked.
        missing: The layers that no stored leaf holds.
        surplus: How many layers the stored group has more than the wanted one.
        claims: Where several stored leaves are the same layer: all of them.
        sources: The stored leaves that its layers come from.
    """

    recipe: Recipe
    group: Group
    axis: int | None
    missing: tuple[int, ...] = ()
    surplus: int = 0
    claims: tuple[Entry, ...] = ()
    sources: tuple[Entry, ...] = ()


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
        result = _Join(wanted, stored, keys, said.get((*group.parent, group.name)), known).solve()
        if isinstance(result, UnclearAxis):
            unclear.append(result)
        else:
            found = result | found
    taken = set(found)
    return found, [item for item in unclear if not taken.issuperset(item.tokens)]


def _arrangement(pieces: Sequence[LayerPiece]) -> str:
    forms = {piece.place.form for piece in pieces}
    return "blocks" if forms & {"block", "remainder"} else min(forms)


@dataclasses.dataclass(frozen=True)
class _Join:
    """One layer group on both sides."""

    wanted: Side
    stored: Side
    keys: Sequence[Key]
    said: int | None = None
    known: int | None = None

    def solve(self) -> dict[Tokens, Restacked] | UnclearAxis:
        choices = self._choices()
        if not choices:
            return {} if self.said is None else self._unclear()
        if len(choices) > 1:
            return self._unclear()
        (axes,) = choices
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
        return any(
            piece.place.form in ("block", "remainder") for key in self.keys for piece in side.by_key[key]
        )

    @cached_property
    def _options(self) -> Mapping[Key, set[Axes]]:
        """The axes that each leaf's own shapes allow; leaves that allow none are left out."""
        found = {key: self._fitting(key) for key in self.keys}
        return {key: axes for key, axes in found.items() if axes}

    def _choices(self) -> list[dict[Key, Axes]]:
        """Returns the ways to choose the axis of every leaf."""
        options = self._options
        if not options:
            # Fewer layers than a block has: all of them are a remainder, and nothing is stacked.
            return [dict.fromkeys(self.keys, (None, None))] if self._all_flat() else []
        alike = self._alike(options)
        open_ends = [key for key, axes in options.items() if len(axes) > 1]
        if not open_ends:
            alike = [{key: next(iter(axes)) for key, axes in options.items()}]
        elif len(open_ends) > 1 or len(alike) != 1:
            # Of several leaves that each leave it open none settles the others; the program's layout may.
            known = [choice for choice in alike if all(map(self._is_known, choice.values()))]
            two = [dict(zip(options, axes, strict=True)) for axes in _some(options.values())]
            alike = known if len(known) == 1 else two
        flat = {key: (None, None) for key in self.keys if key not in options and self._is_flat(key)}
        return [choice | flat for choice in alike]

    def _is_known(self, axes: Axes) -> bool:
        return all(axis in (None, self.known) for axis in axes)

    def _alike(self, options: Mapping[Key, set[Axes]]) -> list[dict[Key, Axes]]:
        """Returns the choices in which all leaves are stacked along one axis, from the front or the back."""
        found: list[dict[Key, Axes]] = []
        for from_back in (False, True):
            named = {key: {self._named(key, a, from_back): a for a in axes} for key, axes in options.items()}
            common = set[Axes].intersection(*(set(axes) for axes in named.values()))
            for name in sorted(common, key=str):
                choice = {key: axes[name] for key, axes in named.items()}
                if choice not in found:
                    found.append(choice)
        return found

    def _named(self, key: Key, axes: Axes, from_back: bool) -> Axes:
        """Returns a pair of axes as a program would write it, counted from the front or from the back."""
        if not from_back:
            return axes
        ranks = (len(self.stored.by_key[key][0].shape), len(self.wanted.by_key[key][0].shape))
        stored, wanted = (None if a is None else a - rank for a, rank in zip(axes, ranks, strict=True))
        return stored, wanted

    def _is_flat(self, key: Key) -> bool:
        return all(
            piece.place.form in _FLAT for side in (self.wanted, self.stored) for piece in side.by_key[key]
        )

    def _all_flat(self) -> bool:
        pieces = (piece for side in (self.wanted, self.stored) for piece in side.all_pieces)
        groups = {key[0] for key in self.keys}
        return {piece.place.form for piece in pieces if piece.place.group in groups} <= {"flat", "remainder"}

    def _agrees(self, axes: Axes) -> bool:
        """Tells whether the user allows the axes: the first that is stacked is the one meant."""
        stacked = [axis for axis in axes if axis is not None]
        return self.said is None or not stacked or stacked[0] == self.said

    def _fitting(self, key: Key) -> set[Axes]:
        pairs = itertools.product(self.wanted.by_key[key], self.stored.by_key[key])
        found = [set(_axes_between(left, right)) for left, right in pairs]
        fitting = set[Axes]().union(*found)
        # Two stacks of one program family share their axis; a move of it would be a guess.
        both = all(None not in axes for axes in fitting)
        kept = {axes for axes in fitting if axes[0] == axes[1]} if both else set[Axes]()
        return {axes for axes in kept or fitting if self._agrees(axes)}

    def _count(self, side: Side, axes: Mapping[Key, Axes], which: int) -> int:
        """Returns how many layers the whole group has on one side."""
        cycles = self._cycles(side, axes, which)
        last = [
            max(self._layers(side, piece, axes[key][which], cycles), default=-1)
            for key in self.keys
            if key in axes
            for piece in side.by_key[key]
        ]
        return max(last, default=-1) + 1

    def _cycles(self, side: Side, axes: Mapping[Key, Axes], which: int) -> int:
        lengths = [
            _length(piece, axes[key][which])
            for key in self.keys
            if key in axes
            for piece in side.by_key[key]
            if piece.place.form == "block"
        ]
        return max(lengths, default=0)

    def _layers(self, side: Side, piece: LayerPiece, axis: int | None, cycles: int) -> Sequence[int]:
        place = piece.place
        match place.form:
            case "flat":
                return (place.position,)
            case "stacked":
                return range(_length(piece, axis))
            case "block":
                size = side.block_size[place.group, place.inner]
                return range(place.position, _length(piece, axis) * size + place.position, size)
            case "remainder":
                return (cycles * side.block_size.get((place.group, place.inner), 0) + place.position,)

    def _stored_layers(self, key: Key, axes: Mapping[Key, Axes]) -> dict[int, list[tuple[Recipe, Entry]]]:
        axis, cycles = axes[key][0], self._cycles(self.stored, axes, 0)
        layers: dict[int, list[tuple[Recipe, Entry]]] = defaultdict(list)
        for piece in self.stored.by_key[key]:
            assert piece.entry is not None
            for at, layer in enumerate(self._layers(self.stored, piece, axis, cycles)):
                whole = piece.place.form in _FLAT or axis is None
                recipe = piece.entry.recipe if whole else Index(piece.entry.recipe, axis or 0, at)
                layers[layer].append((recipe, piece.entry))
        return dict(layers)

    def _make(
        self,
        piece: LayerPiece,
        layers: Mapping[int, Sequence[tuple[Recipe, Entry]]],
        axes: Mapping[Key, Axes],
        surplus: int,
    ) -> Restacked | None:
        key = (piece.place.group, piece.place.rest)
        stored_axis, axis = axes[key]
        numbers = self._layers(self.wanted, piece, axis, self._cycles(self.wanted, axes, 1))
        missing = tuple(number for number in numbers if number not in layers)
        if len(missing) == len(numbers):
            return None
        claims = [entry for n in numbers if len(layers.get(n, ())) > 1 for _, entry in layers[n]]
        first = {number: made[0][0] for number, made in layers.items()}
        whole = piece.place.form in _FLAT or axis is None
        empty = Fill(_without(piece.shape, None if whole else axis))
        recipe = first[numbers[0]] if whole else Stack(tuple(first.get(n, empty) for n in numbers), axis or 0)
        return Restacked(
            recipe=recipe,
            group=piece.place.group,
            axis=stored_axis if stored_axis is not None else axis,
            missing=() if whole else missing,
            surplus=surplus,
            claims=_each_once(claims),
            sources=_each_once(made[0][1] for n in numbers if (made := layers.get(n))),
        )

    def _unclear(self) -> UnclearAxis:
        options = self._options.values()
        named = {axis for some in options for axes in some for axis in axes if axis is not None}
        return UnclearAxis(
            group=self.keys[0][0],
            axes=tuple(sorted(named)),
            tokens=tuple(piece.tokens for key in self.keys for piece in self.wanted.by_key[key]),
            sources=tuple(piece.tokens for key in self.keys for piece in self.stored.by_key[key]),
        )


def _each_once(entries: Iterable[Entry]) -> tuple[Entry, ...]:
    return tuple({id(entry): entry for entry in entries}.values())


def _some(options: Iterable[Collection[Axes]]) -> Iterable[tuple[Axes, ...]]:
    """Returns two of the ways to choose, where there is no telling: a question needs no more."""
    ordered = [sorted(axes, key=str) for axes in options]
    return {tuple(axes[0] for axes in ordered), tuple(axes[-1] for axes in ordered)}


def _axes_between(wanted: LayerPiece, stored: LayerPiece) -> Iterable[Axes]:
    """Yields the axes under which two pieces hold layers of one shape."""
    forms = {wanted.place.form, stored.place.form}
    # What is left over after the blocks is flat on either side and tells no axis.
    if "remainder" in forms or (len(forms) == 1 and forms != {"block"}):
        return
    for left in _axis_options(stored):
        for right in _axis_options(wanted):
            if _without(stored.shape, left) == _without(wanted.shape, right):
                yield left, right


def _axis_options(piece: LayerPiece) -> Iterable[int | None]:
    return (None,) if piece.place.form in _FLAT else range(len(piece.shape))


def _without(shape: Shape, axis: int | None) -> Shape:
    return shape if axis is None else (*shape[:axis], *shape[axis + 1 :])


def _length(piece: LayerPiece, axis: int | None) -> int:
    return piece.shape[axis] if axis is not None and axis < len(piece.shape) else 0
