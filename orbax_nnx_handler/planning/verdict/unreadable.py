"""Leaves that a checkpoint's tree names and that cannot be read: damaged, or no numbers; never missing."""

from collections.abc import Iterable, Mapping

from orbax_nnx_handler.planning.core.errors import UnreadableLeafError
from orbax_nnx_handler.planning.core.paths import Path, Tokens, segments
from orbax_nnx_handler.planning.text.folding import Row
from orbax_nnx_handler.planning.text.lines import aligned


def unreadable_leaves(
    missing: Iterable[Path],
    defaulted: Iterable[Path],
    lost: Mapping[Path, str],
    foreign: Mapping[Path, str],
    *,
    renamed: bool = False,
) -> Iterable[UnreadableLeafError]:
    """Yields the faults that a missing leaf may be one that cannot be read; no policy fills that one.

    Args:
        missing: The wanted leaves for which no stored one can be read.
        defaulted: The wanted random state for which none can be read.
        lost: Stored leaves that are damaged, each with the reason.
        foreign: Stored leaves that hold no numbers, each with what they hold.
        renamed: Whether rules give stored leaves other names: a damaged leaf may then be any
            missing one.
    """
    names = {_last(path) for path in missing}
    streams = [_plain(path) for path in defaulted]

    def may_be_wanted(path: Path) -> bool:
        return _last(path) in names or _is_stream(_plain(path), streams)

    damaged = {path: why for path, why in lost.items() if may_be_wanted(path) or (renamed and names)}
    without_numbers = {path: what for path, what in foreign.items() if may_be_wanted(path)}
    if damaged:
        yield unreadable(damaged)
    if without_numbers:
        yield not_numbers(without_numbers)


def _is_stream(stored: Tokens, wanted: Iterable[Tokens]) -> bool:
    """Tells whether a stored leaf may be one of these random streams, in the layout of any Flax."""
    unnamed = (*stored[:-2], *stored[-1:])
    return any(
        _ends(stored, tokens) or _ends(stored, (*tokens[:-2], *tokens[-1:])) or _ends(unnamed, tokens)
        for tokens in wanted
    )


def _ends(stored: Tokens, wanted: Tokens) -> bool:
    """Tells whether two paths end alike: in two keys, or in all of the shorter one."""
    size = min(2, len(stored), len(wanted))
    return bool(size) and stored[-size:] == wanted[-size:]


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
    names = _plain(path)
    return names[-1] if names else ""


def _plain(path: Path) -> Tokens:
    return tuple(name for name in segments(path) if name != "value")
