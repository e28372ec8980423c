"""Optimizers: none saved, another one, one that is nested otherwise."""

from collections.abc import Iterable, Sequence

from orbax_nnx_handler.planning.diagnosis.causes import Cause
from orbax_nnx_handler.planning.diagnosis.filters import selecting
from orbax_nnx_handler.planning.diagnosis.optimizer_causes import NoOptimizer, OptimizerNested, OtherOptimizer
from orbax_nnx_handler.planning.diagnosis.scene import Scene, Tokens, spell
from orbax_nnx_handler.planning.folding import fold_paths
from orbax_nnx_handler.planning.moments import split
from orbax_nnx_handler.planning.paths import Path, canonical
from orbax_nnx_handler.planning.placement import Placement


def find_optimizers(scene: Scene) -> Iterable[Cause]:
    """Yields what is wrong with the optimizer as a whole; a single missing moment is no cause."""
    wanted = [path for path, item in scene.plan.evidence.wanted.items() if item.role == "optimizer"]
    lost = scene.of_role(scene.missing, "optimizer")
    if not lost or not any(path in scene.plan.restored for path in scene.weights):
        return
    stored = [item for item in scene.plan.evidence.placements.values() if item.section == "optimizer"]
    model = spell(scene.root)
    if not stored:
        complete = len(scene.weights) if scene.weights_complete else None
        lost += scene.of_role(scene.missing, "step")
        yield NoOptimizer(
            paths=tuple(lost),
            moments=len(wanted),
            weights=complete,
            model=model,
            filters=selecting(scene, lost),
        )
        return
    yield from _other_optimizer(scene, lost, model)


def _other_optimizer(scene: Scene, lost: Sequence[Path], model: str) -> Iterable[Cause]:
    kept = {path: slot[-1] for path, (slot, _) in scene.moments.items() if slot}
    restored = {kept[path] for path in kept if path in scene.plan.restored}
    names, new = _stored_slots(scene), set(kept.values()) - restored
    alone = [path for path in lost if path not in scene.moments]
    # A count alone: every moment is there, and no stored count is left over that it might be.
    if len(alone) == len(lost) and not _free_optimizer(scene):
        new = {fold_paths(alone)}
    if names and new and not new & names:
        yield OtherOptimizer(
            paths=tuple(lost),
            stored=tuple(sorted(names)),
            wanted=tuple(sorted(new | restored)),
            kept=tuple(sorted(restored)),
            counts=sum(path[-1] == "count" for path in alone),
            model=model,
            filters=selecting(scene, lost),
        )
        return
    yield from _nested(scene, lost, model)


def _nested(scene: Scene, lost: Sequence[Path], model: str) -> Iterable[Cause]:
    parameters = {scene.stored_below(item) for item in scene.stored_weights.values()}
    free = [split(_unboxed(canonical(item.path)), parameters) for item in _free_optimizer(scene)]
    stored = {slot for slot, parameter in free if parameter is not None}
    wanted = {scene.moments[path][0] for path in lost if path in scene.moments}
    if stored and wanted:
        yield OptimizerNested(
            paths=tuple(lost),
            stored=fold_paths(tuple(spell(slot).split("/")) for slot in sorted(stored)),
            wanted=fold_paths(tuple(spell(slot).split("/")) for slot in sorted(wanted)),
            model=model,
            filters=selecting(scene, lost),
        )


def _free_optimizer(scene: Scene) -> list[Placement]:
    placements = scene.plan.evidence.placements
    return [placements[path] for path in scene.unexpected if placements[path].section == "optimizer"]


def _unboxed(tokens: Tokens) -> Tokens:
    return tokens[:-1] if tokens[-1] == "value" else tokens


def _stored_slots(scene: Scene) -> set[str]:
    """Returns the names of the stored moments: the keys right above a parameter's path."""
    lasts = {scene.stored_below(item)[-1] for item in scene.stored_weights.values()}
    tops = {scene.stored_below(item)[0] for item in scene.stored_weights.values()} | {"params"}
    found: set[str] = set()
    for item in scene.plan.evidence.placements.values():
        tokens = canonical(item.path)
        tokens = _unboxed(tokens)
        if item.section != "optimizer" or tokens[-1] not in lasts:
            continue
        at = next((at for at, token in enumerate(tokens) if token in tops), 0)
        slot = item.slot[-1] if item.slot else tokens[at - 1] if at else ""
        found |= {slot} if slot and not slot.startswith("#") else set()
    return found
