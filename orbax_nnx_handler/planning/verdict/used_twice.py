"""No stored element lands in two wanted leaves, whatever the recipes (law 4)."""

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.core.recipes import (
    Concat,
    Fill,
    Index,
    Read,
    Recipe,
    Slice,
    Stack,
    reads,
    shape_of,
)
from orbax_nnx_handler.planning.core.regions import Refolded, Region, cut, intersect, whole
from orbax_nnx_handler.planning.layouts.layout import Placement
from orbax_nnx_handler.planning.target.roles import Wanted


def used_twice(
    sources: Sequence[tuple[Wanted, Recipe]], placed: Mapping[Path, Placement], copies: frozenset[Path]
) -> Iterator[tuple[Path, Path, Path]]:
    """Yields each wanted leaf that reads an element which another one reads: it, the stored leaf, the other.

    Args:
        sources: What each wanted leaf is made from.
        placed: What each stored leaf is.
        copies: Stored leaves that a rule says are wanted more than once.
    """
    read: list[Path] = []
    for _, recipe in sources:
        read += (recipe.path,) if isinstance(recipe, Read) else reads(recipe)
    if len(set(read)) == len(read):
        return  # Nearly every plan.
    users: dict[Path, list[Path]] = defaultdict(list)
    for item, recipe in sources:
        for stored in dict.fromkeys(reads(recipe)):
            users[stored].append(item.leaf.path)
    shared = {stored: paths for stored, paths in users.items() if len(paths) > 1 and stored not in copies}
    recipes = {item.leaf.path: recipe for item, recipe in sources} if shared else {}
    shapes = {path: item.leaf.shape for path, item in placed.items()}
    for stored, paths in shared.items():
        if not _may_serve_many(placed[stored]):
            yield from _of_one(stored, paths, recipes, shapes)


def _may_serve_many(placement: Placement) -> bool:
    """Tells whether a leaf is a step, or what a factored state keeps in place of a moment."""
    return placement.section == "step" or placement.is_unused


def _of_one(
    stored: Path, paths: Sequence[Path], recipes: Mapping[Path, Recipe], shapes: Mapping[Path, Shape]
) -> Iterator[tuple[Path, Path, Path]]:
    taken = [(region, path) for path in paths for region in _regions(recipes[path], stored, shapes)]
    if _lie_in_a_row(taken, whole(shapes[stored])):
        return
    for at, (region, path) in enumerate(taken):
        for used, other in taken[:at]:
            if other == path or not intersect(used, region):
                continue
            if not _are_parts(recipes[path], recipes[other], stored):
                yield path, stored, other
                break


def _lie_in_a_row(taken: Sequence[tuple[Region, Path]], full: Region) -> bool:
    """Tells whether all rectangles are cut along one axis and none overlaps the next, as layers are."""
    axes = {axis for region, _ in taken for axis, part in enumerate(region) if part != full[axis]}
    if len(axes) != 1:
        return False
    (axis,) = axes
    parts = sorted(region[axis] for region, _ in taken)
    return all(one[1] <= other[0] for one, other in itertools.pairwise(parts))


def _are_parts(one: Recipe, other: Recipe, stored: Path) -> bool:
    """Tells whether two recipes read different parts of what they both make of a stored leaf first.

    Exact also below a reshape, where rectangles of the stored leaf say too much.
    """
    return all(_diverge(left, right) for left in _steps(one, stored) for right in _steps(other, stored))


def _diverge(left: Sequence[Recipe], right: Sequence[Recipe]) -> bool:
    first = next((pair for pair in zip(left, right, strict=False) if pair[0] != pair[1]), None)
    if first is None or not all(isinstance(step, Index | Slice) for step in first):
        return False
    (one, from_one, to_one), (other, from_other, to_other) = map(_range, first)
    return one == other and (to_one <= from_other or to_other <= from_one)


def _range(step: Recipe) -> tuple[int, int, int]:
    """Returns axis, first and end of what a step takes."""
    if isinstance(step, Slice):
        return step.axis, step.start, step.start + step.size
    return (step.axis, step.index, step.index + 1) if isinstance(step, Index) else (-1, 0, 0)


def _steps(recipe: Recipe, stored: Path) -> Iterator[tuple[Recipe, ...]]:
    """Yields what is done to each occurrence of a stored leaf, from the leaf on, up to where it is joined."""
    done: list[Recipe] = []
    while not isinstance(recipe, Read | Fill | Stack | Concat):
        done.insert(0, recipe)
        recipe = recipe.source
    if isinstance(recipe, Stack | Concat):
        for part in recipe.sources:
            yield from _steps(part, stored)
    elif isinstance(recipe, Read) and recipe.path == stored:
        yield (recipe, *done)


def _regions(recipe: Recipe, stored: Path, shapes: Mapping[Path, Shape]) -> Iterator[Region]:
    """Yields the rectangles of a stored leaf that a recipe reads."""
    full = whole(shapes[stored])
    match recipe:
        case Read():
            yield full
        case Index(source=Read(), axis=axis, index=index):
            yield (*full[:axis], (index, index + 1), *full[axis + 1 :])
        case Stack() | Concat():
            for part in recipe.sources:
                if stored in reads(part):
                    yield from _regions(part, stored, shapes)
        case _:
            yield from _cut(recipe, whole(shape_of(recipe, shapes)), stored, shapes)


def _cut(recipe: Recipe, region: Region, stored: Path, shapes: Mapping[Path, Shape]) -> Iterator[Region]:
    for piece in cut(recipe, region, shapes):
        if isinstance(piece.source, Refolded):
            yield from _cut(piece.source.recipe, piece.source.region, stored, shapes)
        elif piece.source == stored:
            yield piece.source_region
