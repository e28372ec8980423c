"""One dimension behind many mismatches."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from fractions import Fraction

from orbax_nnx_handler.planning.diagnosis.causes import Cause
from orbax_nnx_handler.planning.diagnosis.depth import differing_axes
from orbax_nnx_handler.planning.diagnosis.scene import Scene
from orbax_nnx_handler.planning.diagnosis.size_causes import DimensionDiffers
from orbax_nnx_handler.planning.leaves import Shape
from orbax_nnx_handler.planning.paths import Path, segments

Pair = tuple[int, int]


def find_dimensions(scene: Scene) -> Iterable[Cause]:
    """Yields the dimensions that explain the mismatched shapes: few of them, or none."""
    changes = {path: _changes(scene, path) for path in scene.mismatched_weights}
    changes = {path: pairs for path, pairs in changes.items() if pairs}
    if not changes:
        return
    regrouped = {tuple(_ordered(scene, path)) for path in changes if _same_size(scene, path)}
    if len(regrouped) == 1 and all(_same_size(scene, path) for path in changes):
        # Heads of another size: the same features, divided otherwise.
        yield _cause(
            scene, regrouped.pop(), list(changes), "the division into heads" if _all_heads(changes) else ""
        )
        return
    pairs = {pair for found in changes.values() for pair in found}
    ratios = {Fraction(wanted, stored) for stored, wanted in pairs if stored}
    if len(ratios) == 1 and len(pairs) > 1:
        yield _cause(scene, sorted(pairs), list(changes), "")
        return
    by_pair: dict[Pair, list[Path]] = defaultdict(list)
    for path, found in changes.items():
        for pair in found:
            by_pair[pair].append(path)
    # With as many dimensions as mismatches nothing is explained: the rows say as much.
    if len(by_pair) * 2 > len(changes) and len(changes) > 1:
        return
    for pair, paths in sorted(by_pair.items(), key=lambda item: -len(item[1])):
        yield _cause(scene, [pair], paths, _what(scene, pair, paths))


def _ordered(scene: Scene, path: Path) -> list[Pair]:
    item = scene.mismatched[path]
    axes = differing_axes(item.stored_shape, item.wanted.shape)
    return [(item.stored_shape[axis], item.wanted.shape[axis]) for axis in axes]


def _same_size(scene: Scene, path: Path) -> bool:
    item = scene.mismatched[path]
    return math.prod(item.stored_shape) == math.prod(item.wanted.shape)


def _changes(scene: Scene, path: Path) -> set[Pair]:
    return set(_ordered(scene, path))


def _cause(scene: Scene, pairs: Sequence[Pair], paths: Sequence[Path], name: str) -> DimensionDiffers:
    ratio = Fraction(pairs[0][1], pairs[0][0]) if pairs[0][0] else Fraction(0)
    return DimensionDiffers(
        paths=scene.with_moments(paths),
        pairs=tuple(pairs),
        # A vocabulary padded from 32000 to 32128 has a ratio that tells nothing.
        ratio=str(ratio) if _one_ratio(pairs) and max(ratio.numerator, ratio.denominator) <= 64 else "",
        count=len(paths),
        mismatches=len(scene.mismatched_weights),
        name=name,
    )


def _one_ratio(pairs: Sequence[Pair]) -> bool:
    return all(stored for stored, _ in pairs) and len({Fraction(w, s) for s, w in pairs}) == 1


def _what(scene: Scene, pair: Pair, paths: Sequence[Path]) -> str:
    """Returns what a dimension is where its places tell: never from its size."""
    names = [[part.lower() for part in segments(path)] for path in paths]
    if all(any("expert" in part or "moe" in part for part in parts) for parts in names):
        return "the number of experts" if _leads(scene, pair, paths) else ""
    embeds = [parts for parts in names if _embeds(parts)]
    if (
        embeds
        and all(_embeds(parts) or _is_output(parts) for parts in names)
        and _is_vocabulary(scene, pair, paths)
    ):
        return "the vocabulary"
    if _all_heads(paths):
        return "the number of heads" if _is_heads(scene, pair, paths) else ""
    stored = [item.leaf.shape for item in scene.stored_weights.values()]
    if len(paths) > 2 and 2 * sum(pair[0] in shape for shape in stored) > len(stored):
        return "the hidden size"
    return ""


def _all_heads(paths: Iterable[Path]) -> bool:
    words = ("query", "key", "value", "out", "attention", "attn")
    return all(any(word in part.lower() for word in words for part in segments(path)) for path in paths)


def _embeds(parts: Sequence[str]) -> bool:
    return any("embed" in part for part in parts)


def _is_output(parts: Sequence[str]) -> bool:
    return any(word in part for word in ("head", "logits", "output") for part in parts)


def _shapes(scene: Scene, paths: Sequence[Path]) -> list[Shape]:
    return [scene.mismatched[path].stored_shape for path in paths]


def _leads(scene: Scene, pair: Pair, paths: Sequence[Path]) -> bool:
    return all(pair[0] in shape[:2] for shape in _shapes(scene, paths))


def _is_vocabulary(scene: Scene, pair: Pair, paths: Sequence[Path]) -> bool:
    """Embeddings have the vocabulary first, output layers last."""
    return all(
        (shape[0] if _embeds([part.lower() for part in segments(path)]) else shape[-1]) == pair[0]
        for path, shape in zip(paths, _shapes(scene, paths), strict=True)
    )


def _is_heads(scene: Scene, pair: Pair, paths: Sequence[Path]) -> bool:
    """Heads are an inner axis of kernels of three axes and more; their biases have it first."""
    kernels = [shape for shape in _shapes(scene, paths) if len(shape) > 2]
    return bool(kernels) and all(pair[0] in shape[:-1] for shape in kernels)
