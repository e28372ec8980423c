"""Causes that are a matter of the optimizer: none saved, another one, one that is nested otherwise.

Optimizers: none saved, another one, one that is nested otherwise.

Moments that are stored and cannot follow what a rule, or another arrangement, does to their parameters.

Adafactor's factored moments whose axes a T5X checkpoint leaves open.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import ClassVar

from orbax_nnx_handler.planning.core.paths import Path, Tokens, canonical
from orbax_nnx_handler.planning.diagnosis.cause import Cause, counted, listed
from orbax_nnx_handler.planning.diagnosis.evidence import Evidence, selecting, spell
from orbax_nnx_handler.planning.layouts.layout import Placement
from orbax_nnx_handler.planning.layouts.t5x import FACTORED
from orbax_nnx_handler.planning.mapping.moments import StuckMoment
from orbax_nnx_handler.planning.mapping.optimizer import split
from orbax_nnx_handler.planning.text.folding import fold_paths


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoOptimizer(Cause):
    """The checkpoint holds no optimizer state.

    Attributes:
        moments: Optimizer leaves that the target wants.
        weights: Weights that the checkpoint gives, or None if not all of them.
        model: Where the model sits in the target; empty at its root.
    """

    moments: int
    weights: int | None
    model: str = ""
    may_begin_anew: ClassVar[bool] = True

    def _cause(self) -> str:
        found = (
            "there are weights"
            if self.weights is None
            else f"all {counted(self.weights, 'weight')} are there"
        )
        return f"no optimizer was saved: {found}, and 0 of the optimizer's {self.moments} leaves."

    def _way(self) -> str:
        return weights_alone(self.model)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OtherOptimizer(Cause):
    """The stored optimizer keeps other state than the target's.

    Attributes:
        stored: What the stored optimizer keeps, by name.
        wanted: What the target's optimizer keeps.
        kept: What of that is restored; the rest is what is missing.
        counts: How many counts are missing.
        model: Where the model sits in the target; empty at its root.
    """

    stored: tuple[str, ...]
    wanted: tuple[str, ...]
    kept: tuple[str, ...] = ()
    counts: int = 0
    model: str = ""
    may_begin_anew: ClassVar[bool] = True

    def _cause(self) -> str:
        stored = listed(self.stored) or "no moments"
        if not self.kept:
            return (
                f"the checkpoint was written with another optimizer: it keeps {stored}, "
                f"the target's keeps {listed(self.wanted)}."
            )
        new = listed(name for name in self.wanted if name not in self.kept)
        return (
            f"the target's optimizer keeps {new} as well, which the stored one does not: it keeps {stored}."
        )

    def _way(self) -> str:
        if not self.kept or not self.counts:
            return weights_alone(self.model)
        count = "a count that begins at 0 begins" if self.counts == 1 else "counts that begin at 0 begin"
        return f"{weights_alone(self.model).removesuffix('.')}; {count} a schedule anew."


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerNested(Cause):
    """The stored optimizer keeps its moments at other places than the target's.

    Attributes:
        stored: The stored places that nobody takes, folded.
        wanted: The wanted places that nothing fills, folded.
        model: Where the model sits in the target; empty at its root.
    """

    stored: str
    wanted: str
    model: str = ""
    may_begin_anew: ClassVar[bool] = True

    def _cause(self) -> str:
        return (
            f"the stored optimizer is built otherwise: its moments lie at {self.stored}, the target's at "
            f"{self.wanted}, and which of them belong together no name tells."
        )

    def _way(self) -> str:
        return weights_alone(self.model)


def weights_alone(model: str) -> str:
    """Returns the way out that leaves the optimizer aside."""
    part = f"the target's {model!r} by itself" if model else "the model by itself"
    return f"to restore the weights alone, pass {part} as target."


def find_optimizers(evidence: Evidence) -> Iterable[Cause]:
    """Yields what is wrong with the optimizer as a whole; a single missing moment is no cause."""
    wanted = [path for path, item in evidence.sides.wanted.items() if item.role == "optimizer"]
    lost = evidence.of_role(evidence.missing, "optimizer")
    if not lost or not any(path in evidence.restored for path in evidence.weights):
        return
    stored = [item for item in evidence.sides.placements.values() if item.section == "optimizer"]
    model = spell(evidence.root)
    if not stored:
        complete = len(evidence.weights) if evidence.weights_complete else None
        lost += evidence.of_role(evidence.missing, "step")
        yield NoOptimizer(
            paths=tuple(lost),
            moments=len(wanted),
            weights=complete,
            model=model,
            filters=selecting(evidence, lost),
        )
        return
    yield from _other_optimizer(evidence, lost, model)


def _other_optimizer(evidence: Evidence, lost: Sequence[Path], model: str) -> Iterable[Cause]:
    kept = {path: slot[-1] for path, (slot, _) in evidence.moments.items() if slot}
    restored = {kept[path] for path in kept if path in evidence.restored}
    names, new = _stored_slots(evidence), set(kept.values()) - restored
    alone = [path for path in lost if path not in evidence.moments]
    # A count alone: every moment is there, and no stored count is left over that it might be.
    if len(alone) == len(lost) and not _free_optimizer(evidence):
        new = {fold_paths(alone)}
    # A state is restored whole or not at all: of Lion's one moment and Adam's two, neither is the other's.
    other = not new & names or (not restored and new != names)
    if names and new and other:
        yield OtherOptimizer(
            paths=tuple(lost),
            stored=tuple(sorted(names)),
            wanted=tuple(sorted(new | restored)),
            kept=tuple(sorted(restored)),
            counts=sum(path[-1] == "count" for path in alone),
            model=model,
            filters=selecting(evidence, lost),
        )
        return
    yield from _nested(evidence, lost, model)


def _nested(evidence: Evidence, lost: Sequence[Path], model: str) -> Iterable[Cause]:
    parameters = {evidence.stored_below(item) for item in evidence.stored_weights.values()}
    free = [split(_unboxed(canonical(item.path)), parameters) for item in _free_optimizer(evidence)]
    stored = {slot for slot, parameter in free if parameter is not None}
    wanted = {evidence.moments[path][0] for path in lost if path in evidence.moments}
    if stored and wanted:
        yield OptimizerNested(
            paths=tuple(lost),
            stored=fold_paths(tuple(spell(slot).split("/")) for slot in sorted(stored)),
            wanted=fold_paths(tuple(spell(slot).split("/")) for slot in sorted(wanted)),
            model=model,
            filters=selecting(evidence, lost),
        )


def _free_optimizer(evidence: Evidence) -> list[Placement]:
    placements = evidence.sides.placements
    return [placements[path] for path in evidence.unexpected if placements[path].section == "optimizer"]


def _unboxed(tokens: Tokens) -> Tokens:
    return tokens[:-1] if tokens[-1] == "value" else tokens


def _stored_slots(evidence: Evidence) -> set[str]:
    """Returns the names of the stored moments: the keys right above a parameter's path."""
    lasts = {evidence.stored_below(item)[-1] for item in evidence.stored_weights.values()}
    tops = {evidence.stored_below(item)[0] for item in evidence.stored_weights.values()} | {"params"}
    found: set[str] = set()
    for item in evidence.sides.placements.values():
        tokens = canonical(item.path)
        tokens = _unboxed(tokens)
        if item.section != "optimizer" or tokens[-1] not in lasts:
            continue
        at = next((at for at, token in enumerate(tokens) if token in tops), 0)
        slot = item.slot[-1] if item.slot else tokens[at - 1] if at else ""
        found |= {slot} if slot and not slot.startswith("#") else set()
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class MomentsStay(Cause):
    """Optimizer moments that stay behind where their parameters are changed.

    Attributes:
        count: How many wanted moments.
        reason: What changes the parameters: a rule, or several, as Python; empty where
            layers are stacked otherwise.
        why: Why a moment cannot follow.
        model: Where the model sits in the target; empty at its root.
    """

    count: int
    reason: str
    why: str
    model: str = ""
    may_begin_anew: ClassVar[bool] = True

    def _cause(self) -> str:
        moments = counted(self.count, "optimizer moment")
        by = self.reason or "another arrangement of the layers"
        owners = "its parameter" if self.count == 1 else "their parameters"
        return f"{moments} cannot follow what {by} does to {owners}: {self.why}."

    def _way(self) -> str:
        rule = "leave the rule out and change the value in the program; or, " if self.reason else ""
        return rule + weights_alone(self.model)


def find_stuck_moments(evidence: Evidence) -> Iterable[Cause]:
    """Yields, for each rule, the missing moments that cannot follow."""
    groups: dict[str, list[StuckMoment]] = defaultdict(list)
    for item in evidence.sides.stuck:
        if item.path in evidence.missing:
            groups[item.reason].append(item)
    for reason, moments in groups.items():
        missing = [item.path for item in moments]
        stored = dict.fromkeys(
            path for item in moments for path in item.stored if path in evidence.unexpected
        )
        yield MomentsStay(
            paths=(*missing, *stored),
            count=len(missing),
            reason=reason,
            why=_why(moments),
            model=spell(evidence.root),
            filters=selecting(evidence, missing),
        )


def _why(moments: Iterable[StuckMoment]) -> str:
    """Returns the reasons, at most two: a rule on many layers would list a pair of shapes for each kind."""
    reasons = list(dict.fromkeys(item.why for item in moments))
    return "; ".join([*reasons[:2], *(["and so on"] if len(reasons) > 2 else [])])


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenFactoring(Cause):
    """Factored moments of square parameters: shapes do not tell which axis each has lost.

    Attributes:
        moments: How many wanted moments.
        stored: How many stored ones nobody can name.
    """

    moments: int
    stored: int
    may_begin_anew: ClassVar[bool] = True

    def _cause(self) -> str:
        return (
            f"{self.stored} stored v_row and v_col belong to parameters with two axes of one size, and T5X "
            "does not store which axis it took for the row: optax may call them the other way round."
        )

    def _way(self) -> str:
        return ""


def find_open_factoring(evidence: Evidence) -> Iterable[Cause]:
    """Yields the missing factored moments, where the checkpoint has some that no one can name."""
    placements = evidence.sides.placements
    stored = [
        path for path, item in placements.items() if item.section == "other" and _is_factored(item.slot)
    ]
    if not stored:
        return
    missing: list[Path] = [path for path, (slot, _) in evidence.moments.items() if _is_factored(slot[-1:])]
    missing = [path for path in missing if path in evidence.missing]
    if missing:
        yield OpenFactoring(paths=(*missing, *stored), moments=len(missing), stored=len(stored))


def _is_factored(slot: Path | None) -> bool:
    return slot is not None and slot[-1:] in {(name,) for name in FACTORED}
