"""Leaves that a checkpoint's tree names and that cannot be read: damaged, or no numbers; never missing."""

from collections.abc import Iterable, Mapping

from orbax_nnx_handler.planning.core.errors import UnreadableLeafError
from orbax_nnx_handler.planning.core.paths import Path, segments
from orbax_nnx_handler.planning.text.folding import Row
from orbax_nnx_handler.planning.text.lines import aligned


def unreadable_leaves(
    missing: Iterable[Path], lost: Mapping[Path, str], foreign: Mapping[Path, str]
) -> Iterable[UnreadableLeafError]:
    """Yields the faults that a missing leaf may be one that cannot be read; no policy fills that one.

    Args:
        missing: The wanted leaves for which no stored one can be read.
        lost: Stored leaves that are damaged, each with the reason.
        foreign: Stored leaves that hold no numbers, each with what they hold.
    """
    names = {_last(path) for path in missing}
    for leaves, error in ((lost, unreadable), (foreign, not_numbers)):
        found = {path: reason for path, reason in leaves.items() if _last(path) in names}
        if found:
            yield error(found)


def check_readable(lost: Mapping[Path, str], foreign: Mapping[Path, str]) -> None:
    """Raises if any leaf of a checkpoint cannot be read.

    Args:
        lost: See `unreadable_leaves`.
        foreign: See `unreadable_leaves`.

    Raises:
        UnreadableLeafError: Lists the damaged ones, or else those that hold no numbers.
    """
    if lost:
        raise unreadable(lost)
    if foreign:
        raise not_numbers(foreign)


def unreadable(lost: Mapping[Path, str]) -> UnreadableLeafError:
    """Returns the error that lists leaves whose arrays cannot be found."""
    leaves = "1 leaf whose array" if len(lost) == 1 else f"{len(lost)} leaves whose arrays"
    rows = aligned(Row(path, (reason,)) for path, reason in lost.items())
    return UnreadableLeafError(
        f"the checkpoint names {leaves} cannot be read:\n{rows}\n"
        "hint: a part of it is damaged, or was not copied: copy it again, or restore another step.",
        paths=list(lost),
    )


def not_numbers(foreign: Mapping[Path, str]) -> UnreadableLeafError:
    """Returns the error that lists leaves which are whole and hold no numbers."""
    leaves = "1 leaf that holds" if len(foreign) == 1 else f"{len(foreign)} leaves that hold"
    rows = aligned(Row(path, (what,)) for path, what in foreign.items())
    return UnreadableLeafError(
        f"the checkpoint has {leaves} no numbers of a known type:\n{rows}\n"
        "hint: load it where it was written, and save them again as arrays of float32 or of integers.",
        paths=list(foreign),
    )


def _last(path: Path) -> str:
    names = [name for name in segments(path) if name != "value"]
    return names[-1] if names else ""
