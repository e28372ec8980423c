"""The same numbers in arrays of another arrangement: axes in another order, axes merged."""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from orbax_nnx_handler.planning.diagnosis.arrangement_causes import AxesMerged, AxesPermuted
from orbax_nnx_handler.planning.diagnosis.causes import Cause
from orbax_nnx_handler.planning.diagnosis.patterns import patterns_of
from orbax_nnx_handler.planning.diagnosis.scene import Scene
from orbax_nnx_handler.planning.leaves import Shape
from orbax_nnx_handler.planning.paths import Path
from orbax_nnx_handler.planning.recipes import Read

Permutation = tuple[int, ...]


def find_permuted(scene: Scene) -> Iterable[Cause]:
    """Yields weights whose stored shape is the wanted one with its axes in another order."""
    found: dict[Permutation, list[Path]] = defaultdict(list)
    for path in _plain(scene):
        item = scene.mismatched[path]
        permutation = _permutation(item.stored_shape, item.wanted.shape)
        if permutation is not None:
            found[permutation].append(path)
    if not found:
        return
    paths = [path for each in found.values() for path in each]
    first = scene.mismatched[paths[0]]
    rules = [
        f"Transpose({pattern!r}, {permutation})"
        for permutation, each in found.items()
        for pattern in patterns_of(scene, _sources(scene, each))
    ]
    yield AxesPermuted(
        paths=scene.with_moments(paths),
        stored=first.stored_shape,
        wanted=first.wanted.shape,
        count=len(paths),
        rules=tuple(rules),
        swapped=_swapped(scene, paths),
    )


def find_merged(scene: Scene) -> Iterable[Cause]:
    """Yields weights of which neighbouring axes are one axis on the other side."""
    found: dict[Shape, list[Path]] = defaultdict(list)
    for path in _plain(scene):
        item = scene.mismatched[path]
        long, short = sorted((item.stored_shape, item.wanted.shape), key=len, reverse=True)
        if len(long) > len(short) > 0 and _merges(long, short):
            found[item.wanted.shape].append(path)
    if not found:
        return
    paths = [path for each in found.values() for path in each]
    first = scene.mismatched[paths[0]]
    rules = [
        f"Reshape({pattern!r}, {shape})"
        for shape, each in found.items()
        for pattern in patterns_of(scene, _sources(scene, each))
    ]
    yield AxesMerged(
        paths=scene.with_moments(paths),
        stored=first.stored_shape,
        wanted=first.wanted.shape,
        count=len(paths),
        rules=tuple(rules),
    )


def _plain(scene: Scene) -> list[Path]:
    """Returns mismatched weights that are one stored leaf each, as it is."""
    return [path for path in scene.mismatched_weights if isinstance(scene.mismatched[path].recipe, Read)]


def _sources(scene: Scene, paths: Iterable[Path]) -> list[Path]:
    recipes = [scene.mismatched[path].recipe for path in paths]
    return [recipe.path for recipe in recipes if isinstance(recipe, Read)]


def _permutation(stored: Shape, wanted: Shape) -> Permutation | None:
    """Returns the order of the stored axes that gives the wanted shape; None for none, and for several."""
    if sorted(stored) != sorted(wanted) or stored == wanted or len(stored) > 6:
        return None
    orders = itertools.permutations(range(len(stored)))
    fitting = [order for order in orders if tuple(stored[axis] for axis in order) == wanted]
    return fitting[0] if len(fitting) == 1 else None


def _merges(long: Shape, short: Shape) -> bool:
    """Tells whether products of neighbouring axes of one shape give the other."""
    rest = list(long)
    for size in short:
        product = 1
        while rest and (product < size or (product == size and rest[0] == 1 and len(rest) > 1)):
            product *= rest.pop(0)
        if product != size:
            return False
    return math.prod(rest) == 1


def _swapped(scene: Scene, paths: Sequence[Path]) -> tuple[str, ...]:
    """Returns two names whose weights have each other's shapes throughout."""
    modules: dict[tuple[Path, object], dict[str, tuple[Shape, Shape]]] = defaultdict(dict)
    for path in paths:
        item = scene.mismatched[path]
        if len(path) < 2 or not isinstance(path[-2], str):
            return ()
        modules[path[:-2], path[-1]][path[-2]] = (item.stored_shape, item.wanted.shape)
    names = {tuple(sorted(shapes)) for shapes in modules.values()}
    if len(names) != 1 or not all(_crossed(shapes) for shapes in modules.values()):
        return ()
    return names.pop()


def _crossed(shapes: Mapping[str, tuple[Shape, Shape]]) -> bool:
    if len(shapes) != 2:
        return False
    (stored, wanted), (other_stored, other_wanted) = shapes.values()
    return stored == other_wanted and wanted == other_stored
