"""The same model built otherwise: without biases, with tied embeddings, quantised."""

import re
from collections import defaultdict
from collections.abc import Iterable

import jax.numpy as jnp

from orbax_nnx_handler.planning.diagnosis.causes import Cause
from orbax_nnx_handler.planning.diagnosis.filters import selecting
from orbax_nnx_handler.planning.diagnosis.scene import Scene, Tokens
from orbax_nnx_handler.planning.diagnosis.variant_causes import NoBias, Quantised, TiedEmbedding
from orbax_nnx_handler.planning.paths import Path, is_number, render
from orbax_nnx_handler.planning.placement import Placement


def find_biases(scene: Scene) -> Iterable[Cause]:
    """Yields modules that have no stored bias, though all else of them is stored."""
    groups: dict[str, list[Path]] = defaultdict(list)
    for path in scene.missing_weights:
        if scene.below[path][-1] == "bias":
            groups[_module_name(scene.below[path])].append(path)
    if not groups:
        return
    stored = {
        _module_name(scene.stored_below(i)) for i in scene.stored_weights.values() if _is_bias(scene, i)
    }
    wanted = {_module_name(tokens) for tokens in scene.below.values() if tokens[-1] == "bias"}
    without = {name: paths for name, paths in groups.items() if name not in stored}
    paths = [path for each in without.values() for path in each]
    # One bias that is not there proves nothing about how the module was built.
    if len(paths) < 2 or not all(_has_siblings(scene, path) for path in paths):
        return
    everywhere = not stored and without.keys() == wanted
    explained = scene.with_moments(paths)
    yield NoBias(
        paths=explained,
        count=len(paths),
        modules=() if everywhere else tuple(sorted(without)),
        filters=selecting(scene, explained),
    )


def _is_bias(scene: Scene, placement: Placement) -> bool:
    return scene.stored_below(placement)[-1] == "bias"


def _module_name(tokens: Tokens) -> str:
    """Returns the name of a weight's module without its number: `norm` for `norm1` and `norm_1`."""
    names = [token for token in tokens[:-1] if not is_number(token)]
    return re.sub(r"\d+$", "", names[-1]) if names else ""


def _has_siblings(scene: Scene, path: Path) -> bool:
    module = scene.below[path][:-1]
    return any(
        tokens[:-1] == module and other in scene.plan.restored
        for other, tokens in scene.below.items()
        if len(tokens) == len(module) + 1
    )


def find_tied(scene: Scene) -> Iterable[Cause]:
    """Yields an output layer that is missing and has the shape of a stored embedding, turned."""
    if len(scene.missing_weights) != 1 or scene.free_weights:
        return
    (path,) = scene.missing_weights
    leaf = scene.missing[path].wanted
    # The words of an output layer, or else any square kernel would do.
    is_output = any(w in str(key).lower() for key in path for w in ("head", "logits", "output", "unembed"))
    embeddings = [
        item.leaf
        for item in scene.stored_weights.values()
        if item.leaf.shape == leaf.shape[::-1] and "embed" in render(item.leaf.path).lower()
    ]
    if is_output and len(leaf.shape) == 2 and len(embeddings) == 1:
        explained = scene.with_moments([path])
        yield TiedEmbedding(
            paths=explained,
            output=render(path),
            shape=leaf.shape,
            embedding=render(embeddings[0].path),
            filters=selecting(scene, explained),
        )


def find_quantised(scene: Scene) -> Iterable[Cause]:
    """Yields weights stored as integers that have scales beside them."""
    found: dict[str, list[Path]] = defaultdict(list)
    scales: dict[Tokens, set[str]] = defaultdict(set)
    for item in scene.free_weights.values():
        *module, name = scene.stored_below(item)
        if "scale" in name.lower():
            scales[tuple(module)].add(name)
    for path, item in scene.mismatched.items():
        is_weight = scene.role(path) == "model" and item.kind == "dtype"
        if (
            is_weight
            and jnp.issubdtype(item.wanted.dtype, jnp.floating)
            and scales.get(scene.below[path][:-1])
        ):
            found[item.stored_dtype].append(path)
    for dtype, paths in found.items():
        names = {name for path in paths for name in scales[scene.below[path][:-1]]}
        yield Quantised(
            paths=scene.with_moments(paths), dtype=dtype, scales=tuple(sorted(names)), count=len(paths)
        )
