"""One dimension behind many mismatches."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction

from orbax_nnx_handler.planning.diagnosis.causes import Cause
from orbax_nnx_handler.planning.diagnosis.depth import differing_axes
from orbax_nnx_handler.planning.diagnosis.places import (
    Place,
    is_attention,
    modules_of,
    name_of,
    output_module,
)
from orbax_nnx_handler.planning.diagnosis.scene import Scene
from orbax_nnx_handler.planning.diagnosis.size_causes import DimensionDiffers, HeadsDivided, OtherOutput
from orbax_nnx_handler.planning.paths import Path, render
from orbax_nnx_handler.planning.recipes import Read

Pair = tuple[int, int]
"""A size in the checkpoint and in the target."""


def find_heads(scene: Scene) -> Iterable[Cause]:
    """Yields the verdict that the same features are divided among another number of heads."""
    divided: dict[tuple[Pair, ...], list[Path]] = defaultdict(list)
    for path in scene.mismatched_weights:
        item = scene.mismatched[path]
        pairs = tuple((place.stored, place.wanted) for place in _places(scene, path))
        same_size = math.prod(item.stored_shape) == math.prod(item.wanted.shape)
        if len(pairs) == 2 and same_size and is_attention(path):
            divided[pairs].append(path)
    if len(divided) == 1:
        ((heads, size), paths) = divided.popitem()
        yield HeadsDivided(
            paths=scene.with_moments(paths),
            stored=(heads[0], size[0]),
            wanted=(heads[1], size[1]),
            count=len(paths),
            mismatches=len(scene.mismatched_weights),
        )


def find_dimensions(scene: Scene) -> Iterable[Cause]:
    """Yields the dimensions that explain the mismatched shapes: few of them, or none."""
    places: dict[Pair, list[Place]] = defaultdict(list)
    for path in scene.mismatched_weights:
        for place in _places(scene, path):
            places[place.stored, place.wanted].append(place)
    most = _most(scene)
    named = {pair: name_of(found, most) for pair, found in places.items()}
    widths = [pair for pair in places if named[pair] not in _NO_WIDTH and output_module(places[pair]) is None]
    if _one_width(widths, places, most):
        yield _cause(scene, sorted(widths), places, "")
        places = {pair: found for pair, found in places.items() if pair not in widths}
    outputs = {pair: output_module(found) for pair, found in places.items() if not named[pair]}
    # A model has one head; where several modules differ so, it is not a head that differs.
    heads = {pair: module for pair, module in outputs.items() if module is not None}
    for pair, found in sorted(places.items(), key=lambda item: -len(_paths(item[1]))):
        if pair in heads and len(heads) == 1:
            yield _output(scene, pair, found, heads[pair])
        # A size that stands in one weight explains nothing: its row says as much.
        elif named[pair] or len(_paths(found)) > 1:
            yield _cause(scene, [pair], places, named[pair] or modules_of(found))


_NO_WIDTH = ("the vocabulary", "the number of positions", "the number of experts")


def _places(scene: Scene, path: Path) -> list[Place]:
    item = scene.mismatched[path]
    stored, wanted = item.stored_shape, item.wanted.shape
    return [
        Place(path=path, axis=axis, rank=len(wanted), stored=stored[axis], wanted=wanted[axis])
        for axis in differing_axes(stored, wanted)
    ]


def _paths(places: Iterable[Place]) -> list[Path]:
    return list(dict.fromkeys(place.path for place in places))


def _most(scene: Scene) -> int:
    """Returns how many weights a dimension must differ in to be that of the whole model."""
    compared = [
        path for path in scene.weights if path in scene.plan.restored or path in scene.plan.mismatched
    ]
    return len(compared) // 2 + 1


def _one_width(pairs: Sequence[Pair], places: Mapping[Pair, Sequence[Place]], most: int) -> bool:
    """Tells whether several sizes grow together: by one ratio, and in most of the model.

    Two sizes that happen to double, each in a few weights, are two differences.
    """
    paths = {place.path for pair in pairs for place in places[pair]}
    ratios = {Fraction(wanted, stored) for stored, wanted in pairs if stored}
    return len(pairs) > 1 and len(ratios) == 1 and all(stored for stored, _ in pairs) and len(paths) >= most


def _cause(
    scene: Scene, pairs: Sequence[Pair], places: Mapping[Pair, Sequence[Place]], name: str
) -> DimensionDiffers:
    paths = _paths(place for pair in pairs for place in places[pair])
    return DimensionDiffers(
        paths=scene.with_moments(paths),
        pairs=tuple(pairs),
        ratio=_ratio(pairs[0]),
        count=len(paths),
        mismatches=len(scene.mismatched_weights),
        alone=all((p.stored, p.wanted) in pairs for path in paths for p in _places(scene, path)),
        name=name,
    )


def _ratio(pair: Pair) -> str:
    """Returns wanted over stored where it tells something: 32000 padded to 32128 has no telling ratio."""
    if not pair[0]:
        return ""
    ratio = Fraction(pair[1], pair[0])
    return str(ratio) if max(ratio.numerator, ratio.denominator) <= 64 else ""


def _output(scene: Scene, pair: Pair, places: Sequence[Place], module: Path) -> OtherOutput:
    paths = _paths(places)
    recipe = scene.mismatched[paths[0]].recipe
    source = scene.stored_weights.get(recipe.path) if isinstance(recipe, Read) else None
    return OtherOutput(
        paths=scene.with_moments(paths),
        module=render(module),
        key=str(module[-1]),
        pattern=render(source.path[:-1]) if source is not None and len(source.path) > 1 else "",
        stored=pair[0],
        wanted=pair[1],
    )
