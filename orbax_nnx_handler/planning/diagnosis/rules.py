"""Faults that a rule itself has brought about: without it, the leaf would be there or would fit."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable
from typing import ClassVar

from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.core.recipes import Read, reads
from orbax_nnx_handler.planning.diagnosis.cause import Cause, counted
from orbax_nnx_handler.planning.diagnosis.evidence import Evidence, selecting
from orbax_nnx_handler.planning.mapping.matches import Discarded
from orbax_nnx_handler.planning.text.folding import fold_paths


@dataclasses.dataclass(frozen=True, kw_only=True)
class DroppedByRule(Cause):
    """Weights that a `Drop` leaves behind, and the target wants.

    Attributes:
        stored: The stored weights, folded.
        reason: The reason that the rule gives.
    """

    stored: str
    reason: str
    may_begin_anew: ClassVar[bool] = True

    def _cause(self) -> str:
        return f"a Drop rule leaves {self.stored} behind ({self.reason!r}), and the target wants it."

    def _way(self) -> str:
        return "take that rule out."


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnneededRule(Cause):
    """Weights that have the wanted shape as they are stored, and another one after a rule.

    Attributes:
        count: How many.
        rule: The rule, or several, as Python.
        stored: The stored and wanted shape of the first.
        made: What the rule makes of it.
    """

    count: int
    rule: str
    stored: Shape
    made: Shape

    def _cause(self) -> str:
        weights = counted(self.count, "weight")
        fit = "fits as it is" if self.count == 1 else "fit as they are"
        return f"{weights} {fit} stored: {self.rule} makes {self.made} of {self.stored}, which is wanted."

    def _way(self) -> str:
        return "take the rule out, or write more of the path in its pattern."


def find_dropped(evidence: Evidence) -> Iterable[Cause]:
    """Yields the missing weights that a rule leaves behind, by its reason."""
    discarded = {path: i for path, i in evidence.verdict.dropped.items() if isinstance(i, Discarded)}
    if not discarded:
        return
    below = {evidence.below[path]: path for path in evidence.missing_weights}
    groups: dict[str, list[tuple[Path, Path]]] = defaultdict(list)
    for path, item in discarded.items():
        placement = evidence.stored_weights.get(path)
        wanted = below.get(evidence.stored_below(placement)) if placement is not None else None
        if wanted is not None:
            groups[item.reason].append((path, wanted))
    for reason, pairs in groups.items():
        paths = evidence.with_moments([wanted for _, wanted in pairs])
        stored = fold_paths([path for path, _ in pairs])
        yield DroppedByRule(paths=paths, stored=stored, reason=reason, filters=selecting(evidence, paths))


def find_unneeded(evidence: Evidence) -> Iterable[Cause]:
    """Yields the weights of another shape that would fit without the rule that made them."""
    groups: dict[str, list[Path]] = defaultdict(list)
    for path in evidence.mismatched_weights:
        item = evidence.mismatched[path]
        if not item.reason or isinstance(item.recipe, Read):
            continue
        sources = [evidence.stored_weights[source].leaf for source in dict.fromkeys(reads(item.recipe))]
        if len(sources) == 1 and sources[0].shape == item.wanted.shape:
            groups[item.reason].append(path)
    for reason, paths in groups.items():
        first = evidence.mismatched[paths[0]]
        yield UnneededRule(
            paths=evidence.with_moments(paths),
            count=len(paths),
            rule=reason,
            stored=first.wanted.shape,
            made=first.stored_shape,
        )
