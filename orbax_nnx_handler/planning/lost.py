"""Leaves that a checkpoint's tree names and whose arrays cannot be found: damage, never a missing weight."""

from collections.abc import Iterable, Mapping

from orbax_nnx_handler.planning.aligning import aligned
from orbax_nnx_handler.planning.errors import UnreadableLeafError
from orbax_nnx_handler.planning.folding import Row
from orbax_nnx_handler.planning.paths import Path, segments
from orbax_nnx_handler.planning.plan import RestorePlan


def lost_leaves(plan: RestorePlan, lost: Mapping[Path, str]) -> Iterable[UnreadableLeafError]:
    """Yields the fault that a missing leaf may be one that is damaged; no policy fills that one.

    Args:
        plan: The plan, made from the leaves that can be read.
        lost: The others, each with the reason.
    """
    missing = {_last(path) for path in plan.missing}
    found = {path: reason for path, reason in lost.items() if _last(path) in missing}
    if found:
        yield unreadable(found)


def unreadable(lost: Mapping[Path, str]) -> UnreadableLeafError:
    """Returns the error that lists leaves whose arrays cannot be found."""
    leaves = "1 leaf whose array" if len(lost) == 1 else f"{len(lost)} leaves whose arrays"
    rows = aligned(Row(path, (reason,)) for path, reason in lost.items())
    return UnreadableLeafError(
        f"the checkpoint names {leaves} cannot be read:\n{rows}\n"
        "hint: a part of it is damaged, or was not copied: copy it again, or restore another step.",
        paths=list(lost),
    )


def _last(path: Path) -> str:
    names = [name for name in segments(path) if name != "value"]
    return names[-1] if names else ""
