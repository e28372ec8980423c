"""The same numbers in arrays of another arrangement: axes in another order, axes merged."""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

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
    found = _explained(scene, _permutation)
    if found:
        yield _cause(AxesPermuted, scene, "Transpose", found, swapped=_swapped(scene, _paths(found)))


def find_merged(scene: Scene) -> Iterable[Cause]:
    """Yields weights of which neighbouring axes are one axis on the other side."""
    found = _explained(scene, _merged)
    if found:
        yield _cause(AxesMerged, scene, "Reshape", found)


_Explained = Mapping[tuple[int, ...], Sequence[Path]]
"""Mismatched weights by what makes the stored shape the wanted one: an order of axes, or a shape."""


def _explained(scene: Scene, explain: Callable[[Shape, Shape], tuple[int, ...] | None]) -> _Explained:
    found: dict[tuple[int, ...], list[Path]] = defaultdict(list)
    for path in _plain(scene):
        item = scene.mismatched[path]
        change = explain(item.stored_shape, item.wanted.shape)
        if change is not None:
            found[change].append(path)
    return found


def _paths(found: _Explained) -> list[Path]:
    return [path for each in found.values() for path in each]


def _cause(kind: Callable[..., Cause], scene: Scene, rule: str, found: _Explained, **more: object) -> Cause:
    paths = _paths(found)
    first = scene.mismatched[paths[0]]
    return kind(
        paths=scene.with_moments(paths),
        stored=first.stored_shape,
        wanted=first.wanted.shape,
        count=len(paths),
        rules=_rules(scene, rule, found),
        **more,
    )


def _rules(scene: Scene, rule: str, found: _Explained) -> tuple[str, ...]:
    return tuple(
        f"{rule}({pattern!r}, {change})"
        for change, paths in found.items()
        for pattern in patterns_of(scene, _sources(scene, paths))
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


def _merged(stored: Shape, wanted: Shape) -> Shape | None:
    """Returns the wanted shape where merging axes, or cutting one, leads there."""
    long, short = sorted((stored, wanted), key=len, reverse=True)
    return wanted if len(long) > len(short) > 0 and _merges(long, short) else None


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
