"""Weights that are right and in the wrong module: told by what the modules are called with.

Modules are paired by their weights. A module that has another's weights is called with what that other one is
called with in Linen.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence

from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.paths import Path, render
from orbax_nnx_handler.planning.core.recipes import Recipe, shape_of
from orbax_nnx_handler.verifying.alone import Workbench
from orbax_nnx_handler.verifying.alternatives import Alternative
from orbax_nnx_handler.verifying.compared import Compared
from orbax_nnx_handler.verifying.comparing import TOLERANCE, compare, exceeds
from orbax_nnx_handler.verifying.verification import name_of

_BEGINNING = 64


def called_alike(one: Compared, compared: Sequence[Compared]) -> Iterator[Compared]:
    """Yields other modules whose Linen counterpart is called with what a module is called with."""
    sizes = [array.size for array in one.nnx.outputs]
    for other in compared:
        if other.pair.linen == one.pair.linen or [array.size for array in other.linen.outputs] != sizes:
            continue
        if _begin_alike(one, other):
            inputs = compare(other.linen.inputs, one.nnx.inputs)
            if inputs.compared and not inputs.left and not exceeds(inputs, TOLERANCE):
                yield other


def _begin_alike(one: Compared, other: Compared) -> bool:
    """Tells from a few elements whether it is worth comparing all."""
    pairs = zip(other.linen.inputs, one.nnx.inputs, strict=False)
    starts = [(a.reshape(-1)[:_BEGINNING], b.reshape(-1)[:_BEGINNING]) for a, b in pairs if a.size == b.size]
    return all(not exceeds(compare([a], [b]), 100 * TOLERANCE) for a, b in starts)


def weights_of(bench: Workbench, source: Compared, onto: Compared, layer: int | None) -> dict[Path, Recipe]:
    """Returns the recipes of one module with the weights of another; empty if they do not fit."""
    names = {leaf[len(onto.path) :] for leaf in onto.pair.leaves}
    if {leaf[len(source.path) :] for leaf in source.pair.leaves} != names:
        return {}
    shapes = bench.shapes
    theirs = bench.layer_at(source.path, source.nnx.call)
    found: dict[Path, Recipe] = {}
    for name in names:
        recipe = bench.recipe((*source.path, *name), theirs)
        if shape_of(recipe, shapes) != shape_of(bench.recipe((*onto.path, *name), layer), shapes):
            return {}
        found[*onto.path, *name] = recipe
    return found


def exchanges(bench: Workbench, inside: Sequence[Compared], layer: int | None) -> Iterator[Alternative]:
    """Yields every exchange of the weights of two modules within one, siblings first.

    Args:
        bench: Knows the recipes.
        inside: The modules within it.
        layer: The layer of the module that holds them, where it is scanned.
    """
    unique = list({one.path: one for one in inside}.values())
    pairs = [
        (one, other)
        for one, other in itertools.combinations(unique, 2)
        if not (one.encloses(other) or other.encloses(one))
    ]
    for one, other in sorted(pairs, key=lambda pair: pair[0].path[:-1] != pair[1].path[:-1]):
        mine, theirs = _recipes(bench, one, layer), _recipes(bench, other, layer)
        if _shapes(mine, bench) == _shapes(theirs, bench):
            changed = {(*one.path, *name): recipe for name, recipe in theirs.items()}
            changed |= {(*other.path, *name): recipe for name, recipe in mine.items()}
            words = f"{render(one.path)} and {render(other.path)} have each other's weights"
            yield Alternative(words=words, recipes=changed)


def _recipes(bench: Workbench, one: Compared, layer: int | None) -> dict[Path, Recipe]:
    return {leaf[len(one.path) :]: bench.recipe(leaf, layer) for leaf in one.pair.leaves}


def _shapes(recipes: Mapping[Path, Recipe], bench: Workbench) -> dict[Path, Shape]:
    return {name: shape_of(recipe, bench.shapes) for name, recipe in recipes.items()}


def words_of(one: Compared, other: Compared) -> str:
    """Returns what it means that a module is called like another one."""
    return (
        f"{name_of(one.pair.nnx)} is called with what Linen calls {name_of(other.pair.linen)} with, and has "
        f"the weights of {name_of(one.pair.linen)}. It needs those that {name_of(other.pair.nnx)} was given"
    )
