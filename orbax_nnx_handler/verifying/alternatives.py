"""What could be otherwise about a module's weights: each change on which a plan's shapes have no say."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.paths import Path, natural_key, render
from orbax_nnx_handler.planning.core.recipes import (
    Concat,
    Recipe,
    Reshape,
    Shapes,
    Stack,
    Transpose,
    children,
    describe,
    render_reads,
    shape_of,
    simplify,
)

_MOST_AXES = 4
_MOST_PARTS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alternative:
    """Another way of making some leaves of a module.

    Attributes:
        words: What is otherwise.
        recipes: The leaves that change, with their recipes.
    """

    words: str
    recipes: Mapping[Path, Recipe]


def alternatives(
    doubtful: Mapping[Path, Recipe], others: Mapping[Path, Mapping[Path, Recipe]], shapes: Shapes
) -> Iterator[Alternative]:
    """Yields what could be otherwise, the likeliest first.

    Args:
        doubtful: The recipe of each leaf of the module that is not known to be right.
        others: The recipes of other modules by their path, nearest first, by the path of the doubtful
            leaf that each would be.
        shapes: The stored shapes.
    """
    for leaf, recipe in doubtful.items():
        yield from _axes(leaf, recipe, shapes)
    yield from _orders(doubtful)
    for module, recipes in others.items():
        yield _from_other(module, recipes)
    for one, other in itertools.combinations(doubtful, 2):
        if shape_of(doubtful[one], shapes) == shape_of(doubtful[other], shapes):
            words = f"{render(one)} and {render(other)} are exchanged"
            yield Alternative(words=words, recipes={one: doubtful[other], other: doubtful[one]})


def _from_other(module: Path, recipes: Mapping[Path, Recipe]) -> Alternative:
    sources = dict.fromkeys(render_reads(recipe) for recipe in recipes.values())
    words = f"it has the weights that {render(module)} was given: {', '.join(sources)}"
    return Alternative(words=words, recipes=recipes)


def _axes(leaf: Path, recipe: Recipe, shapes: Shapes) -> Iterator[Alternative]:
    """Yields the leaf with its axes in another order, and divided in another way."""
    shape = shape_of(recipe, shapes)
    seen = {recipe}
    for words, changed in itertools.chain(_turned(recipe, shape), _divided(recipe, shapes)):
        plain = simplify(changed, shapes)
        if plain not in seen:
            seen.add(plain)
            said = f"{leaf[-1]} is {words}: {describe(plain) or 'as it is stored'}"
            yield Alternative(words=said, recipes={leaf: plain})


def _turned(recipe: Recipe, shape: Shape) -> Iterator[tuple[str, Recipe]]:
    if 2 <= len(shape) <= _MOST_AXES:
        for order in itertools.permutations(range(len(shape))):
            if tuple(shape[axis] for axis in order) == shape:
                yield "transposed", Transpose(recipe, order)


def _divided(recipe: Recipe, shapes: Shapes) -> Iterator[tuple[str, Recipe]]:
    """Yields the same elements divided into axes in another order: heads before features, or after them."""
    shape = shape_of(recipe, shapes)
    for step in _chain(recipe):
        if not isinstance(step, Reshape):
            continue
        before = shape_of(step.source, shapes)
        for order in itertools.permutations(range(len(before))) if len(before) <= _MOST_AXES else ():
            yield (
                "divided otherwise",
                _again(recipe, step, Reshape(Transpose(step.source, order), step.shape)),
            )
        for order in itertools.permutations(range(len(step.shape))) if len(step.shape) <= _MOST_AXES else ():
            divided = Reshape(step.source, tuple(step.shape[axis] for axis in order))
            back = tuple(sorted(range(len(order)), key=order.__getitem__))
            yield "divided otherwise", _again(recipe, step, Transpose(divided, back))
    if len(shape) <= _MOST_AXES:
        yield from _refolded(recipe, shape)


def _refolded(recipe: Recipe, shape: Shape) -> Iterator[tuple[str, Recipe]]:
    """Yields an axis read as two that were exchanged, as interleaved heads or parts are."""
    for axis, length in enumerate(shape):
        for outer in (2, 3, 4, 6, 8, 12, 16):
            if length % outer == 0 and 1 < outer < length:
                split = (*shape[:axis], length // outer, outer, *shape[axis + 1 :])
                order = [*range(len(split))]
                order[axis], order[axis + 1] = axis + 1, axis
                yield (
                    "in another order of its parts",
                    Reshape(Transpose(Reshape(recipe, split), tuple(order)), shape),
                )


def _chain(recipe: Recipe) -> Iterator[Recipe]:
    yield recipe
    inner = children(recipe)
    if len(inner) == 1:
        yield from _chain(inner[0])


def _again(recipe: Recipe, step: Recipe, instead: Recipe) -> Recipe:
    """Returns a chain of steps with one of them replaced."""
    if recipe is step:
        return instead
    inner = _again(children(recipe)[0], step, instead)
    if isinstance(recipe, Stack | Concat):
        return dataclasses.replace(recipe, sources=(inner,))
    return dataclasses.replace(recipe, source=inner)


def _orders(doubtful: Mapping[Path, Recipe]) -> Iterator[Alternative]:
    """Yields fused leaves with their parts in another order, kernel and bias alike."""
    fused = {leaf: found for leaf, recipe in doubtful.items() if (found := _joint(recipe)) is not None}
    for count in sorted({len(joint.sources) for joint in fused.values()}):
        if count > _MOST_PARTS:
            continue
        together = {leaf: joint for leaf, joint in fused.items() if len(joint.sources) == count}
        groups = [[leaf] for leaf in together]
        groups = [list(together), *groups] if len(together) > 1 else groups
        for order in itertools.permutations(range(count)):
            if order == tuple(range(count)):
                continue
            for group in groups:
                recipes = {
                    leaf: _again(doubtful[leaf], together[leaf], _in_order(together[leaf], order))
                    for leaf in group
                }
                sources = ", ".join(render_reads(part) for part in _parts(together[group[0]], order))
                names = " and ".join(dict.fromkeys(str(leaf[-1]) for leaf in group))
                yield Alternative(words=f"{names} joined in another order: {sources}", recipes=recipes)


def _joint(recipe: Recipe) -> Concat | Stack | None:
    return next((step for step in _chain(recipe) if isinstance(step, Concat | Stack)), None)


def _parts(joint: Concat | Stack, order: Sequence[int]) -> list[Recipe]:
    return [joint.sources[at] for at in order]


def _in_order(joint: Concat | Stack, order: Sequence[int]) -> Recipe:
    return dataclasses.replace(joint, sources=tuple(_parts(joint, order)))


def nearest_modules(module: Path, others: Sequence[Path]) -> list[Path]:
    """Returns modules from the nearest on: siblings first, then those at the same place of another layer."""

    def apart(other: Path) -> tuple[int, int, object]:
        common = next((at for at, (a, b) in enumerate(zip(module, other, strict=False)) if a != b), 0)
        differing = sum(a != b for a, b in zip(module, other, strict=False))
        return (differing + abs(len(module) - len(other)), -common, natural_key(other))

    return sorted(others, key=apart)
