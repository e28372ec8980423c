"""Which part of which stored leaf lands where in a region of a wanted leaf.

A host holds only its own shards of a wanted array. `cut` pushes the region of
one shard down through a recipe and returns the parts of stored leaves it is made
of. Stack, unstack, fuse, split and transpose only rename axes, so a part is read
straight into its place in the shard's buffer: there is no second copy. Below a
reshape a region is no rectangle; there the smallest rectangle that holds it is read.
`runs` tells which bytes of a stored array a region is, and `layer_of` how one element along an axis is made.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from orbax_nnx_handler.planning.core import recipes
from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.core.recipes import Arithmetic, Recipe

Region = tuple[tuple[int, int], ...]
"""Start and stop along each axis, in elements."""


def whole(shape: Shape) -> Region:
    """Returns the region that covers an array of this shape."""
    return tuple((0, size) for size in shape)


def rectangles(before: Shape, after: Shape, region: Region) -> tuple[Region, Region]:
    """Finds a small rectangle below a reshape that holds a region above it.

    Args:
        before: The shape below the reshape.
        after: The shape above it, with the same elements in C order.
        region: What is needed above.

    Returns:
        A rectangle below and one above that hold the same elements in the same
        order; the one above contains the region.
    """
    below: list[tuple[int, int]] = []
    above: list[tuple[int, int]] = []
    for old, new in _groups(before, after):
        low, high = _narrow(_at(before, old), _at(after, new), tuple(region[axis] for axis in new))
        below += low
        above += high
    return tuple(below), tuple(above)


def _at(shape: Shape, axes: range) -> Shape:
    return tuple(shape[axis] for axis in axes)


def _groups(before: Shape, after: Shape) -> list[tuple[range, range]]:
    """Pairs the runs of axes of two shapes that hold the same elements."""
    groups: list[tuple[range, range]] = []
    old = new = 0
    while old < len(before) or new < len(after):
        old_end, new_end = min(old + 1, len(before)), min(new + 1, len(after))
        while math.prod(before[old:old_end]) != math.prod(after[new:new_end]):
            if math.prod(before[old:old_end]) < math.prod(after[new:new_end]) and old_end < len(before):
                old_end += 1
            elif new_end < len(after):
                new_end += 1
            else:
                old_end += 1
        groups.append((range(old, old_end), range(new, new_end)))
        old, new = old_end, new_end
    return groups


def _narrow(before: Shape, after: Shape, wanted: Region) -> tuple[Region, Region]:
    """Narrows one run of axes along its leading axis, where rows of both shapes end together."""
    if not before or not after or math.prod(before) == 0:
        return whole(before), whole(after)
    old_row, new_row = math.prod(before[1:]), math.prod(after[1:])
    step = math.lcm(old_row, new_row)
    start = wanted[0][0] * new_row // step * step
    stop = min(-(-wanted[0][1] * new_row // step) * step, math.prod(before))
    low = ((start // old_row, stop // old_row), *whole(before[1:]))
    high = ((start // new_row, stop // new_row), *whole(after[1:]))
    return low, high


__all__ = [
    "Piece",
    "Refolded",
    "Region",
    "cut",
    "intersect",
    "place",
    "shape_of_region",
    "shift",
    "slices",
    "starts",
    "whole",
]


@dataclasses.dataclass(frozen=True)
class Refolded:
    """A rectangle of a recipe's value, read whole and then given another shape.

    Attributes:
        recipe: The recipe below the reshape.
        region: The rectangle of that recipe's value to read.
        shape: The shape the rectangle takes; its elements stay in C order.
    """

    recipe: Recipe
    region: Region
    shape: Shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """A rectangle of one source and its place in the wanted region.

    Attributes:
        source: The path of a stored leaf, or a rectangle to be folded first.
        source_region: The rectangle, per axis of the source.
        region: Its place, per axis of the wanted region, counted from the
            region's own start.
        axes: For each axis of the place, the source axis that runs along it;
            None for an axis that a stack adds.
        arithmetic: What is done to every element, in this order.
    """

    source: Path | Refolded
    source_region: Region
    region: Region
    axes: tuple[int | None, ...]
    arithmetic: tuple[Arithmetic, ...] = ()


def shape_of_region(region: Region) -> Shape:
    """Returns the lengths of a region."""
    return tuple(stop - start for start, stop in region)


def slices(region: Region) -> tuple[slice, ...]:
    """Returns the region as NumPy indexes with it."""
    return tuple(slice(start, stop) for start, stop in region)


def intersect(one: Region, other: Region) -> Region | None:
    """Returns what two regions of one array share, or None."""
    both = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return both if all(start < stop for start, stop in both) else None


def shift(region: Region, origin: Iterable[int]) -> Region:
    """Returns the region counted from `origin`."""
    return tuple((start - zero, stop - zero) for (start, stop), zero in zip(region, origin, strict=True))


def starts(region: Region) -> tuple[int, ...]:
    """Returns where a region begins."""
    return tuple(start for start, _ in region)


def place(part: Piece, buffer: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Returns the view of the buffer that the part's source rectangle fills.

    Args:
        part: A part of the region that the buffer holds.
        buffer: An array of the wanted region's shape.

    Returns:
        A writable view with the shape of `part.source_region`: what is read from
        there, axis by axis, is assigned to it as it is.
    """
    # The ellipsis keeps a view where there is no axis to slice.
    view = buffer[(..., *slices(part.region))]
    kept = [axis for axis, source in enumerate(part.axes) if source is not None]
    added = tuple(axis for axis, source in enumerate(part.axes) if source is None)
    order = sorted(range(len(kept)), key=lambda position: part.axes[kept[position]] or 0)
    view = np.squeeze(view, axis=added).transpose(order)
    present = {source for source in part.axes if source is not None}
    dropped = tuple(axis for axis in range(len(part.source_region)) if axis not in present)
    return np.expand_dims(view, dropped)


def cut(recipe: Recipe, region: Region, stored: Mapping[Path, Shape]) -> list[Piece]:
    """Returns the parts that together make a region of a recipe's value.

    Args:
        recipe: The recipe of a wanted leaf, without `Fill`.
        region: The region of the wanted leaf that is needed.
        stored: The shape of each stored leaf by path.

    Returns:
        Parts that cover the region without overlap; empty ones are left out.

    Raises:
        recipes.RecipeError: The recipe holds a `Fill`, which no read can give.
    """
    if any(start >= stop for start, stop in region):
        return []
    return _cut(recipe, region, stored)


def _cut(recipe: Recipe, region: Region, stored: Mapping[Path, Shape]) -> list[Piece]:
    """Cuts a region that is not empty; then no region further down is."""
    match recipe:
        case recipes.Read(path):
            axes = tuple(range(len(region)))
            return [Piece(source=path, source_region=region, region=shift(region, starts(region)), axes=axes)]
        case recipes.Fill(shape):
            raise recipes.RecipeError(f"a fill of shape {shape} cannot be read")
        case recipes.Index() | recipes.Slice():
            return _cut_part(recipe, region, stored)
        case recipes.Stack(sources, axis):
            return _cut_stack(sources, axis, region, stored)
        case recipes.Concat(sources, axis):
            return _cut_concat(sources, axis, region, stored)
        case recipes.Transpose(source, permutation):
            return _cut_transpose(source, permutation, region, stored)
        case recipes.Reshape(source, shape):
            return _cut_reshape(source, shape, region, stored)
        case recipes.Repeat():
            side_by_side = recipes.Stack((recipe.source,) * recipe.count, recipe.axis + 1)
            return _cut_reshape(side_by_side, recipes.shape_of(recipe, stored), region, stored)
        case recipes.Scale() | recipes.Add():
            return _cut_arithmetic(recipe, region, stored)


def _cut_part(
    recipe: recipes.Index | recipes.Slice, region: Region, stored: Mapping[Path, Shape]
) -> list[Piece]:
    axis = recipe.axis
    if isinstance(recipe, recipes.Slice):
        return _cut(recipe.source, _moved(region, axis, recipe.start), stored)
    inner = (*region[:axis], (recipe.index, recipe.index + 1), *region[axis:])
    return [_drop_axis(part, axis) for part in _cut(recipe.source, inner, stored)]


def _cut_arithmetic(
    recipe: recipes.Scale | recipes.Add, region: Region, stored: Mapping[Path, Shape]
) -> list[Piece]:
    match recipe:
        case recipes.Scale(_, factor):
            step = Arithmetic(factor=factor)
        case recipes.Add(_, constant):
            step = Arithmetic(constant=constant)
    parts = _cut(recipe.source, region, stored)
    return [dataclasses.replace(part, arithmetic=(*part.arithmetic, step)) for part in parts]


def _moved(region: Region, axis: int, by: int) -> Region:
    start, stop = region[axis]
    return (*region[:axis], (start + by, stop + by), *region[axis + 1 :])


def _drop_axis(part: Piece, axis: int) -> Piece:
    return dataclasses.replace(
        part,
        region=(*part.region[:axis], *part.region[axis + 1 :]),
        axes=(*part.axes[:axis], *part.axes[axis + 1 :]),
    )


def _cut_stack(
    sources: tuple[Recipe, ...], axis: int, region: Region, stored: Mapping[Path, Shape]
) -> list[Piece]:
    first, last = region[axis]
    inner = (*region[:axis], *region[axis + 1 :])
    found: list[Piece] = []
    for layer in range(first, last):
        at = (layer - first, layer - first + 1)
        for part in _cut(sources[layer], inner, stored):
            found.append(
                dataclasses.replace(
                    part,
                    region=(*part.region[:axis], at, *part.region[axis:]),
                    axes=(*part.axes[:axis], None, *part.axes[axis:]),
                )
            )
    return found


def _cut_concat(
    sources: tuple[Recipe, ...], axis: int, region: Region, stored: Mapping[Path, Shape]
) -> list[Piece]:
    first, last = region[axis]
    found: list[Piece] = []
    offset = 0
    for source in sources:
        size = recipes.shape_of(source, stored)[axis]
        start, stop = max(first, offset), min(last, offset + size)
        if start < stop:
            inner = (*region[:axis], (start - offset, stop - offset), *region[axis + 1 :])
            parts = _cut(source, inner, stored)
            found += [
                dataclasses.replace(part, region=_moved(part.region, axis, start - first)) for part in parts
            ]
        offset += size
    return found


def _cut_transpose(
    source: Recipe, permutation: tuple[int, ...], region: Region, stored: Mapping[Path, Shape]
) -> list[Piece]:
    inner = tuple(region[permutation.index(axis)] for axis in range(len(permutation)))
    return [
        dataclasses.replace(
            part,
            region=tuple(part.region[axis] for axis in permutation),
            axes=tuple(part.axes[axis] for axis in permutation),
        )
        for part in _cut(source, inner, stored)
    ]


def _cut_reshape(source: Recipe, shape: Shape, region: Region, stored: Mapping[Path, Shape]) -> list[Piece]:
    """Reads the smallest rectangle below the reshape that the region folds out of."""
    below, above = rectangles(recipes.shape_of(source, stored), shape, region)
    folded = Refolded(source, below, shape_of_region(above))
    inside = shift(region, starts(above))
    place_in_region = shift(region, starts(region))
    axes = tuple(range(len(shape)))
    return [Piece(source=folded, source_region=inside, region=place_in_region, axes=axes)]


def layer_of(recipe: Recipe, axis: int, layer: int, shapes: recipes.Shapes) -> Recipe:
    """Returns the recipe of one element of a leaf along an axis."""
    match recipe:
        case recipes.Stack(sources, at) if at == axis:
            return sources[layer]
        case recipes.Stack(sources, at):
            inner = axis - (at < axis)
            parts = tuple(layer_of(source, inner, layer, shapes) for source in sources)
            return recipes.Stack(parts, at - (axis < at))
        case recipes.Transpose(source, permutation):
            inner = permutation[axis]
            rest = tuple(at - (at > inner) for at in permutation if at != inner)
            return recipes.Transpose(layer_of(source, inner, layer, shapes), rest)
        case recipes.Reshape(source, shape) if (
            axis == 0 and recipes.shape_of(source, shapes)[:1] == shape[:1]
        ):
            return recipes.Reshape(layer_of(source, 0, layer, shapes), shape[1:])
        case recipes.Concat(sources, at) if at != axis:
            parts = tuple(layer_of(source, axis, layer, shapes) for source in sources)
            return recipes.Concat(parts, at - (axis < at))
        case recipes.Scale(source, factor):
            return recipes.Scale(layer_of(source, axis, layer, shapes), factor)
        case recipes.Add(source, constant):
            return recipes.Add(layer_of(source, axis, layer, shapes), constant)
        case _:
            return recipes.Index(recipe, axis, layer)


def of_all_layers(recipe: Recipe, axis: int, layer: int, shapes: recipes.Shapes) -> Recipe | None:
    """Returns how a leaf is made of which one layer along an axis is made so; None where none makes it.

    It is `layer_of` turned round: each stored stack is taken whole, and every step leaves out its layers.
    """
    match recipe:
        case recipes.Index(source, at, index) if index == layer:
            return _with_axis_at(source, at, axis, shapes)
        case recipes.Concat(sources, at):
            parts = [of_all_layers(source, axis, layer, shapes) for source in sources]
            known = tuple(part for part in parts if part is not None)
            return recipes.Concat(known, at + (axis <= at)) if len(known) == len(parts) else None
        case recipes.Transpose(source, permutation):
            whole = of_all_layers(source, 0, layer, shapes)
            others = [at + 1 for at in permutation]
            return whole and recipes.Transpose(whole, (*others[:axis], 0, *others[axis:]))
        case recipes.Reshape(source, shape):
            whole = of_all_layers(source, 0, layer, shapes)
            count = () if whole is None else recipes.shape_of(whole, shapes)[:1]
            return whole and _with_axis_at(recipes.Reshape(whole, (*count, *shape)), 0, axis, shapes)
        case recipes.Slice(source, at, start, size):
            whole = of_all_layers(source, axis, layer, shapes)
            return whole and recipes.Slice(whole, at + (axis <= at), start, size)
        case recipes.Scale(source) | recipes.Add(source):
            whole = of_all_layers(source, axis, layer, shapes)
            return whole and dataclasses.replace(recipe, source=whole)
        case _:
            return None


def _with_axis_at(recipe: Recipe, axis: int, to: int, shapes: recipes.Shapes) -> Recipe:
    """Returns a recipe with one of its axes in another place."""
    others = [at for at in range(len(recipes.shape_of(recipe, shapes))) if at != axis]
    return recipe if axis == to else recipes.Transpose(recipe, (*others[:to], axis, *others[to:]))


@functools.lru_cache(maxsize=1024)
def run_start(region: Region, shape: Shape) -> int | None:
    """Returns the position of the region's first element if the region is one run of a C-order array."""
    position, stride, inside = 0, 1, True
    for (start, stop), size in zip(reversed(region), reversed(shape), strict=True):
        if not inside and stop - start != 1:
            return None
        inside = inside and stop - start == size
        position += start * stride
        stride *= size
    return position


def widened(box: Region, shape: Shape, itemsize: int, gap_bytes: int) -> Region:
    """Grows a box over gaps that are cheaper to read than to skip."""
    grown, row = list(box), itemsize
    for axis in reversed(range(len(shape))):
        start, stop = grown[axis]
        alone = all(last - first == 1 for first, last in grown[:axis])
        if alone or (shape[axis] - (stop - start)) * row > gap_bytes:
            break
        grown[axis] = (0, shape[axis])
        row *= shape[axis]
    return tuple(grown)


def runs(block: Region, shape: Shape, itemsize: int) -> Iterator[tuple[int, int]]:
    """Yields start and length of the runs of bytes that a block of a C-order array is made of."""
    split = next((a for a in reversed(range(len(shape))) if block[a] != (0, shape[a])), 0)
    size = math.prod(shape_of_region(block[split:])) * itemsize
    for index in itertools.product(*(range(start, stop) for start, stop in block[:split])):
        first = (*((at, at + 1) for at in index), *block[split:])
        yield (run_start(first, shape) or 0) * itemsize, size
