"""Recipes backwards: what was stored, made again from the leaves that came of it."""

import itertools
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping

from orbax_nnx_handler.planning.core.errors import RuleError
from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.paths import Path, render
from orbax_nnx_handler.planning.core.recipes import (
    Add,
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
    describe,
    reads,
    render_reads,
    shape_of,
    simplify,
)

_Known = tuple[Recipe, Recipe]
"""A recipe over stored leaves, and its value as a recipe over wanted ones."""


def inverse(
    recipes: Mapping[Path, Recipe],
    stored: Mapping[Path, Shape],
    wanted: Mapping[Path, Shape],
    copied: Collection[Path] = (),
) -> dict[Path, Recipe]:
    """Returns each stored leaf as a recipe over the wanted leaves that were made from it.

    Args:
        recipes: How each wanted leaf was made.
        stored: The shapes of the stored leaves that are read.
        wanted: The shapes of the wanted leaves.
        copied: Stored leaves that several wanted ones hold; made from one of them.

    Raises:
        RuleError: A step cannot be undone, two wanted leaves hold one stored element, or
            an element of a stored leaf is in none of them.
    """
    found: dict[Recipe, Recipe] = {}
    parts: dict[tuple[Recipe, int], dict[tuple[int, int], Recipe]] = defaultdict(dict)
    pending: list[_Known] = [(recipe, Read(path)) for path, recipe in recipes.items()]
    while pending:
        recipe, value = pending.pop()
        if isinstance(recipe, Index | Slice):
            start, size = (recipe.index, 0) if isinstance(recipe, Index) else (recipe.start, recipe.size)
            pieces = parts[recipe.source, recipe.axis]
            if (start, size) in pieces:
                if _are_copied(recipe, copied):
                    continue
                raise _twice(recipe, pieces[start, size], value)
            pieces[start, size] = value
            whole = _whole(pieces, recipe.axis, shape_of(recipe.source, stored)[recipe.axis])
            if whole is not None:
                pending.append((recipe.source, whole))
                del parts[recipe.source, recipe.axis]
        elif recipe in found and _are_copied(recipe, copied):
            continue
        elif recipe in found:
            raise _twice(recipe, found[recipe], value)
        else:
            found[recipe] = value
            pending += _undone(recipe, value, stored)
    made = {recipe.path: value for recipe, value in found.items() if isinstance(recipe, Read)}
    _check_whole(recipes, made, {key: part for key, part in parts.items() if not _are_copied(key[0], copied)})
    return {path: simplify(value, wanted) for path, value in made.items()}


def _are_copied(recipe: Recipe, copied: Collection[Path]) -> bool:
    return bool(copied) and all(path in copied for path in reads(recipe))


def _check_whole(
    recipes: Mapping[Path, Recipe],
    made: Mapping[Path, Recipe],
    parts: Mapping[tuple[Recipe, int], Mapping[tuple[int, int], Recipe]],
) -> None:
    """Raises where a stored leaf is not whole, or an element of it is there once more."""
    for (source, _), pieces in parts.items():
        whole = next((made[path] for path in reads(source) if path in made), None)
        if whole is not None:
            raise _twice(source, whole, next(iter(pieces.values())))
    lost = dict.fromkeys(path for recipe in recipes.values() for path in reads(recipe) if path not in made)
    if lost:
        listed = "\n".join(f"  {render(path)}" for path in lost)
        raise RuleError(
            f"{len(lost)} stored leaves are only in part in the state, so they cannot be written again:\n"
            f"{listed}",
            paths=list(lost),
            hints=["save without renames: NNX's own names and shapes are written."],
        )


def _whole(pieces: Mapping[tuple[int, int], Recipe], axis: int, length: int) -> Recipe | None:
    """Returns what pieces along an axis make together, once none is missing."""
    ordered = sorted(pieces)
    values = tuple(pieces[key] for key in ordered)
    if ordered == [(index, 0) for index in range(length)]:
        return Stack(values, axis)
    ends = list(itertools.accumulate(size for _, size in ordered))
    tiled = [start for start, _ in ordered] == [0, *ends[:-1]] and ends[-1] == length
    return Concat(values, axis) if tiled else None


def _undone(recipe: Recipe, value: Recipe, stored: Mapping[Path, Shape]) -> Iterable[_Known]:
    """Yields the recipes inside one whose value is known, with their values."""
    match recipe:
        case Stack(sources, axis):
            return [(source, Index(value, axis, at)) for at, source in enumerate(sources)]
        case Concat(sources, axis):
            sizes = [shape_of(source, stored)[axis] for source in sources]
            starts = itertools.accumulate(sizes, initial=0)
            cuts = zip(sources, starts, sizes, strict=False)
            return [(source, Slice(value, axis, start, size)) for source, start, size in cuts]
        case Transpose(source, permutation):
            back = sorted(range(len(permutation)), key=permutation.__getitem__)
            return [(source, Transpose(value, tuple(back)))]
        case Reshape(source, _):
            return [(source, Reshape(value, shape_of(source, stored)))]
        case Scale(source, factor) if abs(math.frexp(factor)[0]) == 0.5:
            # A power of two, so that no digit is lost either way.
            return [(source, Scale(value, 1 / factor))]
        case Add(source, constant):
            return [(source, Add(value, -constant))]
        case Read() | Fill():
            return []
        case _:
            raise RuleError(
                f"{render_reads(recipe)} cannot be written again: {describe(recipe)} is not undone exactly.",
                paths=list(reads(recipe)),
                hints=["save without renames: NNX's own names and values are written."],
            )


def _twice(recipe: Recipe, first: Recipe, second: Recipe) -> RuleError:
    return RuleError(
        f"{render_reads(first)} and {render_reads(second)} were both restored from {render_reads(recipe)}, "
        "which cannot be written twice.",
        paths=[*reads(first), *reads(second)],
        hints=["save without renames: NNX's own names are written, one leaf each."],
    )
