"""Moments that are stored and cannot follow what a rule, or another arrangement, does to their parameters."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable
from typing import ClassVar

from orbax_nnx_handler.planning.diagnosis.causes import Cause, counted
from orbax_nnx_handler.planning.diagnosis.filters import selecting
from orbax_nnx_handler.planning.diagnosis.optimizer_causes import weights_alone
from orbax_nnx_handler.planning.diagnosis.scene import Scene, spell
from orbax_nnx_handler.planning.stuck import StuckMoment


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


def find_stuck_moments(scene: Scene) -> Iterable[Cause]:
    """Yields, for each rule, the missing moments that cannot follow."""
    groups: dict[str, list[StuckMoment]] = defaultdict(list)
    for item in scene.plan.evidence.stuck:
        if item.path in scene.missing:
            groups[item.reason].append(item)
    for reason, moments in groups.items():
        missing = [item.path for item in moments]
        stored = dict.fromkeys(path for item in moments for path in item.stored if path in scene.unexpected)
        yield MomentsStay(
            paths=(*missing, *stored),
            count=len(missing),
            reason=reason,
            why=_why(moments),
            model=spell(scene.root),
            filters=selecting(scene, missing),
        )


def _why(moments: Iterable[StuckMoment]) -> str:
    """Returns the reasons, at most two: a rule on many layers would list a pair of shapes for each kind."""
    reasons = list(dict.fromkeys(item.why for item in moments))
    return "; ".join([*reasons[:2], *(["and so on"] if len(reasons) > 2 else [])])
