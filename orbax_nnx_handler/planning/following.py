"""Carries a parameter's recipe over to its moments.

Most moments have their parameter's shape and take its recipe as it is. Factored
ones (`adafactor`'s `v_row`, `v_col`) lack an axis, and the ones that an
optimizer does not use for a parameter are placeholders of one element.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping

import numpy as np

from orbax_nnx_handler.planning.leaves import Shape, StoredLeaf
from orbax_nnx_handler.planning.paths import Path
from orbax_nnx_handler.planning.recipes import (
    Concat,
    Fill,
    Index,
    Read,
    Recipe,
    RecipeError,
    Slice,
    Stack,
    Transpose,
    children,
    reads,
    shape_of,
    substitute,
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
