"""Parts that one side has and the other has not: a collection, a head, LoRA."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from flax import nnx

from orbax_nnx_handler.planning.diagnosis.causes import (
    Cause,
    CollectionMissing,
    LostWeights,
    NewPart,
    counted,
)
from orbax_nnx_handler.planning.diagnosis.filters import selecting
from orbax_nnx_handler.planning.diagnosis.scene import Scene
from orbax_nnx_handler.planning.folding import fold_paths
from orbax_nnx_handler.planning.paths import Path


def find_collections(scene: Scene) -> Iterable[Cause]:
    """Yields collections of which nothing is stored, where it can be told."""
    stored = {item.collection for item in scene.stored_weights.values()}
    if not any(path in scene.plan.restored for path in scene.weights):
        return
    # A layout without collections holds them all in one tree: what is left over may be the missing one.
    if None in stored and scene.free_weights:
        return
    missing: dict[str, list[Path]] = defaultdict(list)
    for path in scene.missing_weights:
        collection = scene.weights[path].collection
        if collection is not None and collection != "params" and collection not in stored:
            missing[collection].append(path)
    wanted = Counter(item.collection for item in scene.weights.values())
    for collection, paths in missing.items():
        kind = scene.missing[paths[0]].wanted.kind
        # A parameter of a subclass of nnx.Param is looked for in `params` as well: new, not left out.
        if len(paths) == wanted[collection] and kind is not None and not issubclass(kind, nnx.Param):
            yield CollectionMissing(
                paths=tuple(paths),
                collection=collection,
                filters=selecting(scene, paths),
                count=len(paths),
                stored=tuple(sorted(name for name in stored if name)),
            )


def find_lost_weights(scene: Scene) -> Iterable[Cause]:
    """Yields missing weights whose moments are restored."""
    kept = {parameter for path, (_, parameter) in scene.moments.items() if path in scene.plan.restored}
    lost = [path for path in scene.missing_weights if scene.below[path] in kept]
    if lost:
        yield LostWeights(paths=scene.with_moments(lost), names=fold_paths(lost), count=len(lost))


def find_new_parts(scene: Scene) -> Iterable[Cause]:
    """Yields a part of the target of which nothing is stored, where all the rest is there."""
    missing = scene.missing_weights
    rest = [path for path in scene.weights if path not in set(missing) and path not in scene.explained]
    # With anything else wrong, the missing leaves may be what the wrong ones were renamed from.
    if not missing or not rest or scene.free_weights or any(path not in scene.plan.restored for path in rest):
        return
    lora = [path for path in missing if issubclass(scene.missing[path].wanted.kind or object, nnx.LoRAParam)]
    modules = {_new_module(path, rest) for path in missing if path not in lora}
    if None in modules or len(missing) >= len(rest) + len(lora):
        return
    paths = scene.with_moments(missing)
    names = [fold_paths(filter(None, modules))] if modules else []
    names += [counted(len(lora), "LoRA weight")] if lora else []
    yield NewPart(paths=paths, names=tuple(names), filters=selecting(scene, paths), complete=len(rest))


def _new_module(path: Path, rest: Sequence[Path]) -> Path | None:
    """Returns the highest module above a weight under which nothing is stored; None for a lone weight."""
    for length in range(1, len(path)):
        prefix = path[:length]
        if not any(other[:length] == prefix for other in rest):
            return prefix if isinstance(prefix[-1], str) else None
    return None
