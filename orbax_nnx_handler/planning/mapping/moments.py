"""Stored moments that cannot follow what happens to their parameter.

Carries a parameter's recipe over to its moments.

Most moments have their parameter's shape and take its recipe as it is. Factored
ones (`adafactor`'s `v_row`, `v_col`) lack an axis, and the ones that an
optimizer does not use for a parameter are placeholders of one element.

Finds the stored value of each wanted optimizer leaf: where its parameter goes, it goes.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

import numpy as np

from orbax_nnx_handler.planning import rules
from orbax_nnx_handler.planning.core.dtypes import changes_values
from orbax_nnx_handler.planning.core.leaves import Shape, StoredLeaf
from orbax_nnx_handler.planning.core.paths import Path, Tokens
from orbax_nnx_handler.planning.core.recipes import (
    Concat,
    Fill,
    Index,
    Read,
    Recipe,
    RecipeError,
    Scale,
    Slice,
    Stack,
    Transpose,
    children,
    parts_of,
    reads,
    shape_of,
    substitute,
)
from orbax_nnx_handler.planning.layouts.layout import Stored
from orbax_nnx_handler.planning.mapping.matches import Found
from orbax_nnx_handler.planning.mapping.optimizer import StoredMoments, WantedMoment, pair_scalars
from orbax_nnx_handler.planning.rules import Casts


@dataclasses.dataclass(frozen=True, kw_only=True)
class StuckMoment:
    """A wanted moment whose stored ones cannot follow their parameter.

    Attributes:
        path: The wanted moment.
        stored: The stored ones.
        reason: What happens to the parameter, and by which rule.
        why: Why they cannot follow.
    """

    path: Path
    stored: tuple[Path, ...]
    reason: str
    why: str


def why_stuck(recipe: Recipe, stored: Mapping[Path, StoredLeaf], casts: Casts) -> str:
    """Returns why no moment can follow its parameter; empty if one can.

    Args:
        recipe: The parameter's recipe.
        stored: The stored leaves.
        casts: What rules cast.
    """
    for part in parts_of(recipe):
        if isinstance(part, Scale):
            return "a moment of a scaled parameter is not the scaled moment"
        if casts and part in casts:  # Not without casts: the hash of a recipe is that of all its parts.
            lossy = [path for path in reads(part) if changes_values(stored[path].dtype, casts[part])]
            if lossy:
                before = stored[lossy[0]].dtype
                return f"casting {before} to {casts[part]} changes the parameter under its moment"
    return ""


def why_lost(slot: str, stored: Shape, before: Shape, wanted: Shape, after: Shape) -> str:
    """Returns why a moment that lacks an axis does not follow where its parameter goes.

    Args:
        slot: What the moment is called (`v_row`).
        stored: Its stored shape.
        before: The stored shape of its parameter.
        wanted: Its wanted shape.
        after: The wanted shape of its parameter.
    """
    return (
        f"the {slot} {stored} of {before} is a mean over one axis, and does not tell "
        f"the mean {wanted} of {after}"
    )


Shapes = Mapping[Path, Shape]

FACTORED = ("v_row", "v_col")
"""The moments without the largest and without the second axis, as optax calls them."""


def follow(
    recipe: Recipe,
    moments: Mapping[Path, StoredLeaf],
    parameters: Shapes,
    wanted: Shape,
    slot: str = "",
    wanted_slot: str | None = None,
) -> Recipe | None:
    """Returns how a moment is made, given how its parameter is made.

    Args:
        recipe: The parameter's recipe.
        moments: The stored moments of one slot, by their parameters' stored paths.
        parameters: Shapes of the stored parameters.
        wanted: The wanted moment's shape.
        slot: The last name of the stored slot (`v_row`).
        wanted_slot: That of the wanted one, where it is another.

    Returns:
        The recipe, with `Fill` for layers whose moment is not stored; None if
        no moment is stored, or none that can follow its parameter.
    """
    sources = list(dict.fromkeys(reads(recipe)))
    stored = [path for path in sources if path in moments]
    if not stored:
        return None
    if all(moments[path].shape == parameters[path] for path in stored):
        # Nearly every moment: one source, of the parameter's shape.
        whole = len(sources) == 1 and not isinstance(recipe, Stack)
        return _moved(recipe, moments) if whole else _prune(recipe, moments, parameters)
    if isinstance(recipe, Read):
        return Read(moments[recipe.path].path)
    shapes = {moments[path].path: moments[path].shape for path in stored}
    placeholder = math.prod(wanted) == 1 and all(math.prod(shape) == 1 for shape in shapes.values())
    if placeholder and shapes[moments[stored[0]].path] == wanted:
        # An unused slot: optax keeps one zero for it whatever the layer count.
        return Read(moments[stored[0]].path)
    reduced = _Reduced(moments=moments, parameters=parameters, slot=slot)
    return reduced.recipe(recipe, wanted, slot if wanted_slot is None else wanted_slot)


def _prune(recipe: Recipe, moments: Mapping[Path, StoredLeaf], parameters: Shapes) -> Recipe | None:
    """Replaces parameters by moments; a stack keeps a `Fill` where one is absent."""
    if isinstance(recipe, Stack):
        empty = Fill(shape_of(recipe.sources[0], parameters))
        return Stack(
            tuple(_prune(part, moments, parameters) or empty for part in recipe.sources), recipe.axis
        )
    if isinstance(recipe, Fill):
        return recipe
    if any(path not in moments for path in reads(recipe)):
        return None
    return _moved(recipe, moments)


def _moved(recipe: Recipe, moments: Mapping[Path, StoredLeaf]) -> Recipe:
    return substitute(recipe, lambda path: Read(moments[path].path))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Reduced:
    """Moments that lack one axis of their parameters."""

    moments: Mapping[Path, StoredLeaf]
    parameters: Shapes
    slot: str

    def recipe(self, recipe: Recipe, wanted: Shape, wanted_slot: str) -> Recipe | None:
        """Returns a parameter's recipe with its axes rewritten for the moment."""
        if any(path not in self.moments for path in reads(recipe)):
            return None
        for axis in _lost_axes(shape_of(recipe, self.parameters), wanted, wanted_slot):
            moved = self._without_axis(recipe, axis)
            shapes = {self.moments[path].path: self.moments[path].shape for path in reads(recipe)}
            try:
                if moved is not None and shape_of(moved, shapes) == wanted:
                    return moved
            except RecipeError:
                continue
        return None

    def _without_axis(self, recipe: Recipe, lost: int) -> Recipe | None:
        """Returns the recipe on moments that lack axis `lost` of the recipe's result."""
        match recipe:
            case Read(path):
                moment = self.moments[path]
                return (
                    Read(moment.path)
                    if lost in _lost_axes(self.parameters[path], moment.shape, self.slot)
                    else None
                )
            case Index(source, axis, index):
                inner = lost if lost < axis else lost + 1
                moved = self._without_axis(source, inner)
                return None if moved is None else Index(moved, axis - (inner < axis), index)
            case Slice(source, axis, start, size) if lost != axis:
                moved = self._without_axis(source, lost)
                return None if moved is None else Slice(moved, axis - (lost < axis), start, size)
            case Transpose(source, permutation):
                inner = permutation[lost]
                moved = self._without_axis(source, inner)
                kept = tuple(axis - (axis > inner) for axis in permutation if axis != inner)
                return None if moved is None else Transpose(moved, kept)
            case Stack(sources, axis) if lost != axis:
                parts = self._parts(sources, lost if lost < axis else lost - 1)
                return None if parts is None else Stack(parts, axis - (lost < axis))
            case Concat(sources, axis) if lost != axis:
                parts = self._parts(sources, lost)
                return None if parts is None else Concat(parts, axis - (lost < axis))
            case _:
                return None

    def _parts(self, sources: Iterable[Recipe], lost: int) -> tuple[Recipe, ...] | None:
        parts = [self._without_axis(part, lost) for part in sources]
        whole = tuple(part for part in parts if part is not None)
        return whole if len(whole) == len(parts) else None


def _lost_axes(parameter: Shape, moment: Shape, slot: str) -> list[int]:
    """Returns the axes whose loss explains a moment's shape.

    optax factors the two largest axes, the later one of equal size winning,
    as `numpy.argsort` orders them: `v_row` lacks the largest, `v_col` the
    second (`optax.scale_by_factored_rms`). Where the name does not tell,
    every axis is possible that the shapes allow.
    """
    order = [int(axis) for axis in np.argsort(parameter)[::-1]]
    possible = [axis for axis in order if (*parameter[:axis], *parameter[axis + 1 :]) == moment]
    rank = FACTORED.index(slot) if slot in FACTORED else len(order)
    return [order[rank]] if rank < len(order) and order[rank] in possible else possible


def missing_layers(recipe: Recipe) -> tuple[int, ...]:
    """Returns which parts of a stack no stored leaf holds."""
    if isinstance(recipe, Read):
        return ()
    if isinstance(recipe, Stack):
        return tuple(at for at, part in enumerate(recipe.sources) if isinstance(part, Fill))
    return tuple(at for child in children(recipe) for at in missing_layers(child))


@dataclasses.dataclass(frozen=True)
class MomentFollower:
    """Carries what was found for the parameters over to their moments.

    Attributes:
        moments: The stored optimizer state.
        wanted: The wanted optimizer leaves.
        parameters: The wanted path of each parameter by canonical path below the root.
        stored: All stored leaves.
        applied: What the user's rules did to the parameters.
    """

    moments: StoredMoments
    wanted: Sequence[WantedMoment]
    parameters: Mapping[Tokens, Path]
    stored: Stored
    applied: rules.RulesApplied

    def add_to(self, found: dict[Path, Found]) -> list[StuckMoment]:
        """Adds what the moments are made from; returns those that cannot follow their parameter."""
        stuck: list[StuckMoment] = []
        for item in self.wanted:
            made = self._scalar(item) if item.parameter is None else self._moment(item, item.parameter, found)
            if isinstance(made, StuckMoment):
                stuck.append(made)
            elif made is not None:
                found[item.wanted.leaf.path] = made
        return stuck

    @cached_property
    def _slots(self) -> set[Tokens]:
        return {item.slot for item in self.wanted if item.parameter is not None}

    @cached_property
    def _scalars(self) -> Mapping[Tokens, Tokens]:
        wanted = {item.slot: item.wanted.leaf.shape for item in self.wanted if item.parameter is None}
        stored = {slot: leaf.shape for slot, leaf in self.moments.scalars.items()}
        found = {slot: self.moments.slot(slot, self._slots) for slot in self._slots}
        return pair_scalars(wanted, stored, found, self.moments.slots)

    @cached_property
    def _may_stick(self) -> bool:
        return bool(self.applied.casts) or any(isinstance(rule, rules.Scale) for rule, _ in self.applied.made)

    @cached_property
    def _shapes(self) -> Mapping[Path, Shape]:
        return {path: leaf.shape for path, leaf in self.stored.items()}

    def _scalar(self, item: WantedMoment) -> Found | None:
        slot = self._scalars.get(item.slot)
        leaf = self.moments.count if item.slot[-1:] == ("count",) else None
        leaf = leaf if slot is None else self.moments.scalars[slot]
        return None if leaf is None else Found(recipe=Read(leaf.path))

    def _moment(
        self, item: WantedMoment, tokens: Tokens, found: Mapping[Path, Found]
    ) -> Found | StuckMoment | None:
        slot = self.moments.slot(item.slot, self._slots)
        parameter = found.get(self.parameters[tokens]) if tokens in self.parameters else None
        if slot is None or parameter is None:
            orphan = self.moments.orphan(item.slot, tokens)
            return None if orphan is None else Found(recipe=Read(orphan.path))
        stored = [
            self.moments.slots[slot][p] for p in reads(parameter.recipe) if p in self.moments.slots[slot]
        ]
        may_stick = stored and self._may_stick
        why = why_stuck(parameter.recipe, self.stored, self.applied.casts) if may_stick else ""
        recipe = None if why else self._follow(item, slot, parameter.recipe)
        if recipe is not None:
            gaps = parameter.missing_layers or missing_layers(recipe)
            spare = tuple({leaf.path for leaf in stored} - set(reads(recipe))) if len(stored) > 1 else ()
            return Found(
                recipe=recipe,
                reason=parameter.reason,
                missing_layers=gaps,
                surplus=parameter.surplus,
                spare=spare,
            )
        return self._stuck(item, slot, parameter, why) if stored else None

    def _follow(self, item: WantedMoment, slot: Tokens, parameter: Recipe) -> Recipe | None:
        """Returns how a moment is made; a factored one may be stored under the other's name.

        Which of two axes is the largest may change where a parameter is transposed: of
        equal ones, optax takes the last.
        """
        shape, wanted = item.wanted.leaf.shape, slot[-1] if slot else ""
        names = FACTORED if wanted in FACTORED else (wanted,)
        for name in sorted(names, key=lambda name: name != wanted):
            stored = self.moments.slots.get((*slot[:-1], name) if slot else slot, {})
            recipe = follow(parameter, stored, self._shapes, shape, name, wanted)
            if recipe is not None:
                return recipe
        return None

    def _stuck(self, item: WantedMoment, slot: Tokens, parameter: Found, why: str) -> StuckMoment | None:
        pairs = {path: self.moments.slots[slot].get(path) for path in reads(parameter.recipe)}
        stored = {path: leaf for path, leaf in pairs.items() if leaf is not None}
        if not why and len(stored) < len(pairs):
            return None
        first, leaf = next(iter(stored.items()))
        after = shape_of(parameter.recipe, self._shapes)
        return StuckMoment(
            path=item.wanted.leaf.path,
            stored=tuple(leaf.path for leaf in stored.values()),
            reason=parameter.reason,
            why=why or why_lost(slot[-1], leaf.shape, self._shapes[first], item.wanted.leaf.shape, after),
        )
