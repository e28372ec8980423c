"""Takes out of a recipe the steps that undo each other."""

import dataclasses
from collections.abc import Mapping

from orbax_nnx_handler.planning.leaves import Shape
from orbax_nnx_handler.planning.paths import Path
from orbax_nnx_handler.planning.recipes import (
    Concat,
    Fill,
    Index,
    Read,
    Recipe,
    Reshape,
    Scale,
    Slice,
    Stack,
    Transpose,
    shape_of,
)

Shapes = Mapping[Path, Shape]


def simplify(recipe: Recipe, shapes: Shapes) -> Recipe:
    """Returns a recipe of the same value with fewer steps.

    Args:
        recipe: A recipe whose shapes come out.
        shapes: The stored shapes.
    """
    match recipe:
        case Read() | Fill():
            return recipe
        case Stack(sources, axis):
            return _stack(tuple(simplify(source, shapes) for source in sources), axis, shapes)
        case Concat(sources, axis):
            return _concat(tuple(simplify(source, shapes) for source in sources), axis, shapes)
        case _:
            return _step(dataclasses.replace(recipe, source=simplify(recipe.source, shapes)), shapes)


def _step(recipe: Index | Slice | Transpose | Reshape | Scale, shapes: Shapes) -> Recipe:
    match recipe:
        case Index(Stack(sources, axis), at, index) if at == axis:
            return sources[index]
        case Slice(source, axis, 0, size) if shape_of(source, shapes)[axis] == size:
            return source
        case Slice(Concat(sources, axis), at, start, size) if at == axis:
            return _part(recipe, sources, start, size, shapes)
        case Transpose(Transpose(source, first), second):
            return _step(Transpose(source, tuple(first[axis] for axis in second)), shapes)
        case Transpose(source, permutation) if permutation == tuple(range(len(permutation))):
            return source
        case Reshape(Reshape(source, _), shape):
            return _step(Reshape(source, shape), shapes)
        case Reshape(source, shape) if shape_of(source, shapes) == shape:
            return source
        case Scale(Scale(source, first), second):
            return _step(Scale(source, first * second), shapes)
        case Scale(source, 1.0):
            return source
        case _:
            return recipe


def _part(recipe: Slice, sources: tuple[Recipe, ...], start: int, size: int, shapes: Shapes) -> Recipe:
    """Returns the one source that a slice cuts out of several, if it is one."""
    at = 0
    for source in sources:
        length = shape_of(source, shapes)[recipe.axis]
        if (at, length) == (start, size):
            return source
        at += length
    return recipe


def _concat(sources: tuple[Recipe, ...], axis: int, shapes: Shapes) -> Recipe:
    at = 0
    for part in sources:
        first = sources[0]
        if not isinstance(part, Slice) or not isinstance(first, Slice):
            return Concat(sources, axis)
        if (part.source, part.axis, part.start) != (first.source, axis, at):
            return Concat(sources, axis)
        at += part.size
    whole = sources[0].source if isinstance(sources[0], Slice) else sources[0]
    return whole if shape_of(whole, shapes)[axis] == at else Concat(sources, axis)


def _stack(sources: tuple[Recipe, ...], axis: int, shapes: Shapes) -> Recipe:
    for at, part in enumerate(sources):
        first = sources[0]
        if not isinstance(part, Index) or not isinstance(first, Index):
            return Stack(sources, axis)
        if (part.source, part.axis, part.index) != (first.source, axis, at):
            return Stack(sources, axis)
    whole = sources[0].source if isinstance(sources[0], Index) else sources[0]
    return whole if shape_of(whole, shapes)[axis] == len(sources) else Stack(sources, axis)
