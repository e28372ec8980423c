"""Carries a parameter's recipe over to its moments.

Most moments have their parameter's shape and take its recipe as it is. Factored
ones (`adafactor`'s `v_row`, `v_col`) lack an axis, and the ones that an
optimizer does not use for a parameter are placeholders of one element.
"""

import math
from collections.abc import Mapping

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
    Stack,
    children,
    reads,
    shape_of,
    substitute,
)

Shapes = Mapping[Path, Shape]


def follow(recipe: Recipe, moments: Mapping[Path, StoredLeaf], parameters: Shapes, wanted: Shape) -> Recipe | None:
    """Returns how a moment is made, given how its parameter is made.

    Args:
        recipe: The parameter's recipe.
        moments: The stored moments of one slot, by their parameters' stored paths.
        parameters: Shapes of the stored parameters.
        wanted: The wanted moment's shape.

    Returns:
        The recipe, with `Fill` for layers whose moment is not stored; None if
        no moment is stored, or none that can follow its parameter.
    """
    sources = list(dict.fromkeys(reads(recipe)))
    stored = [path for path in sources if path in moments]
    if not stored:
        return None
    if all(moments[path].shape == parameters[path] for path in stored):
        return _prune(recipe, moments, parameters)
    if isinstance(recipe, Read):
        return Read(moments[recipe.path].path)
    shapes = {moments[path].path: moments[path].shape for path in stored}
    placeholder = math.prod(wanted) == 1 and all(math.prod(shape) == 1 for shape in shapes.values())
    if placeholder and shapes[moments[stored[0]].path] == wanted:
        # An unused slot: optax keeps one zero for it whatever the layer count.
        return Read(moments[stored[0]].path)
    return _reduced(recipe, moments, parameters, wanted)


def _prune(recipe: Recipe, moments: Mapping[Path, StoredLeaf], parameters: Shapes) -> Recipe | None:
    """Replaces parameters by moments; a stack keeps a `Fill` where one is absent."""
    if isinstance(recipe, Stack):
        empty = Fill(shape_of(recipe.sources[0], parameters))
        return Stack(tuple(_prune(part, moments, parameters) or empty for part in recipe.sources), recipe.axis)
    if isinstance(recipe, Fill):
        return recipe
    if any(path not in moments for path in reads(recipe)):
        return None
    return substitute(recipe, lambda path: Read(moments[path].path))


def _reduced(
    recipe: Recipe, moments: Mapping[Path, StoredLeaf], parameters: Shapes, wanted: Shape
) -> Recipe | None:
    """Rewrites the axes of a recipe for moments that lack one axis of their parameter."""
    if any(path not in moments for path in reads(recipe)):
        return None
    for axis in _lost_axes(shape_of(recipe, parameters), wanted):
        moved = _without_axis(recipe, axis, moments, parameters)
        shapes = {moments[path].path: moments[path].shape for path in reads(recipe)}
        try:
            if moved is not None and shape_of(moved, shapes) == wanted:
                return moved
        except RecipeError:
            continue
    return None


def _lost_axes(parameter: Shape, moment: Shape) -> list[int]:
    """Returns the axes whose loss explains a moment's shape.

    The two that optax factors, the largest ones (`optax.scale_by_factored_rms`),
    come first; later ones of equal size win, as `numpy.argsort` orders them.
    """
    order = [int(axis) for axis in np.argsort(parameter)[::-1]]
    return [axis for axis in order if (*parameter[:axis], *parameter[axis + 1 :]) == moment]


def _without_axis(
    recipe: Recipe, lost: int, moments: Mapping[Path, StoredLeaf], parameters: Shapes
) -> Recipe | None:
    """Returns the recipe on moments that lack axis `lost` of the recipe's result."""
    match recipe:
        case Read(path):
            return Read(moments[path].path)
        case Index(source, axis, index):
            inner = lost if lost < axis else lost + 1
            moved = _without_axis(source, inner, moments, parameters)
            return None if moved is None else Index(moved, axis - (inner < axis), index)
        case Stack(sources, axis) if lost != axis:
            inner = lost if lost < axis else lost - 1
            parts = [_without_axis(part, inner, moments, parameters) for part in sources]
            whole = [part for part in parts if part is not None]
            return Stack(tuple(whole), axis - (lost < axis)) if len(whole) == len(parts) else None
        case Concat(sources, axis) if lost != axis:
            parts = [_without_axis(part, lost, moments, parameters) for part in sources]
            whole = [part for part in parts if part is not None]
            return Concat(tuple(whole), axis - (lost < axis)) if len(whole) == len(parts) else None
        case _:
            return None


def missing_layers(recipe: Recipe) -> tuple[int, ...]:
    """Returns which parts of a stack no stored leaf holds."""
    if isinstance(recipe, Stack):
        return tuple(at for at, part in enumerate(recipe.sources) if isinstance(part, Fill))
    return tuple(at for child in children(recipe) for at in missing_layers(child))
