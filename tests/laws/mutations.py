"""What a wrong heuristic could make of a right mapping: other recipes of the same shape."""

import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.core.recipes import (
    Concat,
    Index,
    Read,
    Recipe,
    RecipeError,
    Slice,
    Stack,
    Transpose,
    reads,
    shape_of,
    substitute,
)

Recipes = dict[Path, Recipe]
Shapes = Mapping[Path, Shape]
Mutation = Callable[[Recipes, Shapes, random.Random], Iterator[tuple[Path, Recipe]]]
"""Yields wanted paths with another recipe for each."""


def mutants(recipes: Recipes, shapes: Shapes, rng: random.Random) -> Iterator[tuple[str, Recipes]]:
    """Yields wrong mappings, a few of each kind: the whole of the recipes, one or two of them changed.

    Args:
        recipes: The right recipe of each wanted path.
        shapes: The stored shapes.
        rng: Chooses where.
    """
    for name, mutation in MUTATIONS.items():
        found = list(mutation(recipes, shapes, rng))
        for path, recipe in rng.sample(found, min(len(found), 3)):
            if _comes_out(recipe, recipes[path], shapes):
                yield name, recipes | {path: recipe}
    yield from _swaps(recipes, shapes, rng)


def _comes_out(recipe: Recipe, right: Recipe, shapes: Shapes) -> bool:
    try:
        return recipe != right and shape_of(recipe, shapes) == shape_of(right, shapes)
    except (RecipeError, KeyError):
        return False


def _swaps(recipes: Recipes, shapes: Shapes, rng: random.Random) -> Iterator[tuple[str, Recipes]]:
    by_shape: dict[Shape, list[Path]] = {}
    for path, recipe in recipes.items():
        by_shape.setdefault(shape_of(recipe, shapes), []).append(path)
    pairs = [pair for paths in by_shape.values() for pair in itertools.combinations(paths[:12], 2)]
    for one, other in rng.sample(pairs, min(len(pairs), 4)):
        yield "two leaves swapped", recipes | {one: recipes[other], other: recipes[one]}
    for one, other in rng.sample(pairs, min(len(pairs), 2)):
        yield "one source twice", recipes | {one: recipes[other]}
    for name, key in EXCHANGES.items():
        alike: dict[Any, list[Path]] = {}
        for path, recipe in recipes.items():
            if OPT_STATE in path[:-1] and (group := key(path, path.index(OPT_STATE) + 1)) is not None:
                alike.setdefault((shape_of(recipe, shapes), group), []).append(path)
        pairs = [pair for paths in alike.values() for pair in itertools.combinations(paths[:12], 2)]
        for one, other in rng.sample(pairs, min(len(pairs), 3)):
            yield name, recipes | {one: recipes[other], other: recipes[one]}


def _read_elsewhere(change: Callable[[Path], Iterator[Path]]) -> Mutation:
    """Returns the mutation that reads one of a recipe's leaves from another path."""

    def mutation(recipes: Recipes, shapes: Shapes, rng: random.Random) -> Iterator[tuple[Path, Recipe]]:
        for path, recipe in recipes.items():
            for source in dict.fromkeys(reads(recipe)):
                others = [other for other in change(source) if other in shapes and other != source]
                if others:
                    other = rng.choice(others)
                    yield path, substitute(recipe, lambda at, s=source, o=other: Read(o if at == s else at))

    return mutation


def _another_key(names: tuple[str, ...]) -> Callable[[Path], Iterator[Path]]:
    def change(path: Path) -> Iterator[Path]:
        for at, key in enumerate(path):
            if key in names:
                yield from ((*path[:at], other, *path[at + 1 :]) for other in names)

    return change


def _another_number(path: Path) -> Iterator[Path]:
    for at, key in enumerate(path):
        name, _, number = str(key).rpartition("_")
        if number.isdecimal():
            for other in (int(number) - 1, int(number) + 1):
                new = other if isinstance(key, int) else f"{name}_{other}" if name else str(other)
                yield (*path[:at], new, *path[at + 1 :])


def _another_layer(recipes: Recipes, shapes: Shapes, rng: random.Random) -> Iterator[tuple[Path, Recipe]]:
    for path, recipe in recipes.items():
        if isinstance(recipe, Index):
            for index in (recipe.index - 1, recipe.index + 1):
                yield path, Index(recipe.source, recipe.axis, index)
        if isinstance(recipe, Slice):
            yield path, Slice(recipe.source, recipe.axis, recipe.start + recipe.size, recipe.size)


def _another_axis(recipes: Recipes, shapes: Shapes, rng: random.Random) -> Iterator[tuple[Path, Recipe]]:
    for path, recipe in recipes.items():
        rank = len(shape_of(recipe, shapes))
        if isinstance(recipe, Index):
            yield from (
                (path, Index(recipe.source, axis, recipe.index))
                for axis in range(rank + 1)
                if axis != recipe.axis
            )
        if isinstance(recipe, Stack | Concat):
            others = [axis for axis in range(rank) if axis != recipe.axis]
            yield from ((path, type(recipe)(recipe.sources, axis)) for axis in others)
        if rank > 1:
            yield path, Transpose(recipe, (*range(rank - 2), rank - 1, rank - 2))


def _another_order(recipes: Recipes, shapes: Shapes, rng: random.Random) -> Iterator[tuple[Path, Recipe]]:
    for path, recipe in recipes.items():
        if isinstance(recipe, Stack | Concat) and len(recipe.sources) > 1:
            first, second, *rest = recipe.sources
            yield path, type(recipe)((second, first, *rest), recipe.axis)
            yield path, type(recipe)((first, first, *rest), recipe.axis)
            yield path, type(recipe)((*recipe.sources[1:], first), recipe.axis)


def _field(path: Path, start: int) -> int | None:
    return next((at for at in range(start, len(path) - 1) if path[at] in SLOTS), None)


def _of_one_field(path: Path, start: int) -> Any:
    at = _field(path, start)
    return None if at is None else path[: at + 1]


def _of_one_parameter(path: Path, start: int) -> Any:
    at = _field(path, start)
    return None if at is None else (path[:at], path[at + 1 :])


def _of_one_name(path: Path, start: int) -> Any:
    return path[-1] if _field(path, start) is None else None


OPT_STATE = "opt_state"
EXCHANGES: dict[str, Callable[[Path, int], Any]] = {
    "moments of two parameters": _of_one_field,
    "two moments of a parameter": _of_one_parameter,
    "counts of two states": _of_one_name,
}
"""What makes two leaves of optimizers alike, so that a wrong heuristic might exchange them."""

COLLECTIONS = (
    "params", "ema_params", "target_params", "grads", "old_params", "slow_params", "teacher_params", "masks",
    "a_params", "batch_stats", "old_batch_stats", "ema_batch_stats", "initial_stats",
)  # fmt: skip
OWNERS = ("gen", "disc", "actor", "critic", "teacher", "student", "a", "b")
SLOTS = ("mu", "nu", "nu_max", "trace", "ema", "e_g", "e_x")

MUTATIONS: dict[str, Mutation] = {
    "another collection": _read_elsewhere(_another_key(COLLECTIONS)),
    "another owner": _read_elsewhere(_another_key(OWNERS)),
    "another moment": _read_elsewhere(_another_key(SLOTS)),
    "another number": _read_elsewhere(_another_number),
    "another layer": _another_layer,
    "another axis": _another_axis,
    "another order": _another_order,
}
