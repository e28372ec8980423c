"""Adafactor's factored moments whose axes a T5X checkpoint leaves open."""

import dataclasses
from collections.abc import Iterable
from typing import ClassVar

from orbax_nnx_handler.planning.diagnosis.causes import Cause
from orbax_nnx_handler.planning.diagnosis.scene import Scene
from orbax_nnx_handler.planning.layouts.factoring import FACTORED
from orbax_nnx_handler.planning.paths import Path


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


def find_open_factoring(scene: Scene) -> Iterable[Cause]:
    """Yields the missing factored moments, where the checkpoint has some that no one can name."""
    placements = scene.plan.evidence.placements
    stored = [
        path for path, item in placements.items() if item.section == "other" and _is_factored(item.slot)
    ]
    if not stored:
        return
    missing: list[Path] = [path for path, (slot, _) in scene.moments.items() if _is_factored(slot[-1:])]
    missing = [path for path in missing if path in scene.missing]
    if missing:
        yield OpenFactoring(paths=(*missing, *stored), moments=len(missing), stored=len(stored))


def _is_factored(slot: Path | None) -> bool:
    return slot is not None and slot[-1:] in {(name,) for name in FACTORED}
