"""Faults that a rule itself has brought about: without it, the leaf would be there or would fit."""

from collections import defaultdict
from collections.abc import Iterable

from orbax_nnx_handler.planning.core.errors import Cause, Hint
from orbax_nnx_handler.planning.core.folding import fold_paths
from orbax_nnx_handler.planning.core.lines import counted
from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.core.recipes import Read, reads
from orbax_nnx_handler.planning.diagnosis.evidence import Evidence, selecting
from orbax_nnx_handler.planning.mapping.matches import Discarded


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
        yield Cause(
            kind="DroppedByRule",
            text=f"a Drop rule leaves {stored} behind ({reason!r}), and the target wants it.",
            paths=paths,
            way=Hint("take that rule out."),
            filters=selecting(evidence, paths),
            may_be_initialised=True,
            facts={"stored": stored, "reason": reason},
        )


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
        first, count = evidence.mismatched[paths[0]], len(paths)
        fit = "fits as it is" if count == 1 else "fit as they are"
        yield Cause(
            kind="UnneededRule",
            text=f"{counted(count, 'weight')} {fit} stored: {reason} makes {first.stored_shape} of "
            f"{first.wanted.shape}, which is wanted.",
            paths=evidence.with_moments(paths),
            way=Hint("take the rule out, or write more of the path in its pattern."),
            facts={"rule": reason, "count": count},
        )
