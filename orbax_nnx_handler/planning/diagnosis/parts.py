"""Parts that one side has and the other has not: an optimizer, a collection, a head, LoRA."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from flax import nnx

from orbax_nnx_handler.planning.diagnosis.causes import (
    Cause,
    CollectionMissing,
    LostWeights,
    NewPart,
    NoOptimizer,
    OtherOptimizer,
)
from orbax_nnx_handler.planning.diagnosis.scene import Scene
from orbax_nnx_handler.planning.folding import fold_paths
from orbax_nnx_handler.planning.paths import Path, canonical, render


def find_optimizers(scene: Scene) -> Iterable[Cause]:
    """Yields what is wrong with the optimizer as a whole; a single missing moment is no cause."""
    wanted = [path for path, item in scene.plan.evidence.wanted.items() if item.role == "optimizer"]
    lost = scene.of_role(scene.missing, "optimizer")
    if not lost or not any(path in scene.plan.restored for path in scene.weights):
        return
    stored = [item for item in scene.plan.evidence.placements.values() if item.section == "optimizer"]
    if not stored:
        complete = len(scene.weights) if scene.weights_complete else None
        lost += scene.of_role(scene.missing, "step")
        yield NoOptimizer(paths=tuple(lost), moments=len(wanted), weights=complete)
        return
    slots = {slot[-1] for slot, _ in scene.moments.values() if slot}
    kept = {path: slot[-1] for path, (slot, _) in scene.moments.items() if slot}
    restored = {kept[path] for path in kept if path in scene.plan.restored}
    names = _stored_slots(scene)
    if names and slots - restored and not (slots - restored) & names:
        yield OtherOptimizer(paths=tuple(lost), stored=tuple(sorted(names)), wanted=tuple(sorted(slots)))


def _stored_slots(scene: Scene) -> set[str]:
    """Returns the names of the stored moments: the keys right above a parameter's path."""
    lasts = {scene.stored_below(item)[-1] for item in scene.stored_weights.values()}
    tops = {scene.stored_below(item)[0] for item in scene.stored_weights.values()} | {"params"}
    found: set[str] = set()
    for item in scene.plan.evidence.placements.values():
        tokens = canonical(item.path)
        tokens = tokens[:-1] if tokens[-1] == "value" else tokens
        if item.section != "optimizer" or tokens[-1] not in lasts:
            continue
        at = next((at for at, token in enumerate(tokens) if token in tops), 0)
        slot = item.slot[-1] if item.slot else tokens[at - 1] if at else ""
        found |= {slot} if slot and not slot.startswith("#") else set()
    return found


def find_collections(scene: Scene) -> Iterable[Cause]:
    """Yields collections of which nothing is stored, where the layout keeps collections apart."""
    stored = {item.collection for item in scene.stored_weights.values()}
    if None in stored or not any(path in scene.plan.restored for path in scene.weights):
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
                filter=_filter(kind),
                count=len(paths),
                stored=tuple(sorted(name for name in stored if name)),
            )


def _filter(kind: type) -> str:
    return f"nnx.{kind.__name__}" if getattr(nnx, kind.__name__, None) is kind else kind.__name__


def find_lost_weights(scene: Scene) -> Iterable[Cause]:
    """Yields missing weights whose moments are restored."""
    kept = {parameter for path, (_, parameter) in scene.moments.items() if path in scene.plan.restored}
    lost = [path for path in scene.missing_weights if scene.below[path] in kept]
    if lost:
        yield LostWeights(paths=scene.with_moments(lost), names=fold_paths(lost))


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
    names = [render(module) for module in sorted(filter(None, modules), key=render)]
    filters = list(dict.fromkeys(f'nnx.PathContains("{module[-1]}")' for module in filter(None, modules)))
    if lora:
        names.append(f"{len(lora)} LoRA weights")
        filters = [*_lora_filters(scene, lora), *filters]
    yield NewPart(
        paths=scene.with_moments(missing), names=tuple(names), filters=tuple(filters), complete=len(rest)
    )


def _lora_filters(scene: Scene, lora: Sequence[Path]) -> list[str]:
    if len(scene.with_moments(lora)) == len(lora):
        return ["nnx.LoRAParam"]
    # Their moments are no LoRAParams; the name they share with them selects both.
    return [f'nnx.PathContains("{name}")' for name in sorted({str(path[-1]) for path in lora})]


def _new_module(path: Path, rest: Sequence[Path]) -> Path | None:
    """Returns the highest module above a weight under which nothing is stored; None for a lone weight."""
    for length in range(1, len(path)):
        prefix = path[:length]
        if not any(other[:length] == prefix for other in rest):
            return prefix if isinstance(prefix[-1], str) else None
    return None
