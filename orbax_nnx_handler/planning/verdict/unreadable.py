"""Leaves that a checkpoint's tree names and that cannot be read: damaged, or no numbers; never missing."""

import dataclasses
from collections.abc import Iterable, Mapping

from orbax_nnx_handler.planning.core.errors import UnreadableLeafError
from orbax_nnx_handler.planning.core.folding import Row
from orbax_nnx_handler.planning.core.lines import aligned, counted
from orbax_nnx_handler.planning.core.paths import Path, Tokens, segments
from orbax_nnx_handler.planning.rules import Drop, Rule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unreadable:
    """Stored leaves that cannot be read, each with the reason.

    Attributes:
        lost: Those whose metadata is damaged: not even their shapes are known.
        damaged: Those whose shapes are known and whose bytes are not all there.
        foreign: Those that hold no numbers, with what they hold.
        without_values: Those of a tree in memory that have a shape only, with what they are.
    """

    lost: Mapping[Path, str] = dataclasses.field(default_factory=dict[Path, str])
    damaged: Mapping[Path, str] = dataclasses.field(default_factory=dict[Path, str])
    foreign: Mapping[Path, str] = dataclasses.field(default_factory=dict[Path, str])
    without_values: Mapping[Path, str] = dataclasses.field(default_factory=dict[Path, str])


def rules_for_readable(rules: Iterable[Rule], stored: Iterable[Path], found: Unreadable) -> tuple[Rule, ...]:
    """Returns the rules without each `Drop` for nothing but leaves that cannot be found anyway."""
    paths = list(stored) if found.lost else []

    def is_idle(rule: Rule) -> bool:
        return (
            isinstance(rule, Drop) and any(map(rule.is_for, found.lost)) and not any(map(rule.is_for, paths))
        )

    return tuple(rule for rule in rules if not is_idle(rule))


def unreadable_leaves(
    found: Unreadable,
    *,
    used: Iterable[Path],
    missing: Iterable[Path],
    defaulted: Iterable[Path],
    dropped: Iterable[Path] = (),
    renamed: bool = False,
) -> Iterable[UnreadableLeafError]:
    """Yields the faults that a wanted leaf is, or may be, one that cannot be read; no policy fills that one.

    Args:
        found: The stored leaves that cannot be read.
        used: The stored leaves that the plan reads.
        missing: The wanted leaves for which no stored one can be read.
        defaulted: The wanted random state for which none can be read.
        dropped: The stored leaves that rules leave behind.
        renamed: Whether rules give stored leaves other names: a lost leaf may then be any
            missing one.
    """
    if found == Unreadable():
        return  # Nearly every checkpoint.
    wanted = [_plain(path) for path in missing]
    streams = [_plain(path) for path in defaulted]

    def may_be_wanted(path: Path) -> bool:
        plain = _plain(path)
        return any(_may_be(plain, other) for other in wanted) or _is_stream(plain, streams)

    # A rule that leaves a leaf behind does not make a wanted one missing.
    read = dict.fromkeys((*used, *filter(may_be_wanted, dropped)))
    damaged = {path: found.damaged[path] for path in read if path in found.damaged}
    damaged |= {path: why for path, why in found.lost.items() if may_be_wanted(path) or (renamed and wanted)}
    without_numbers = {path: what for path, what in found.foreign.items() if may_be_wanted(path)}
    if damaged:
        yield unreadable(damaged)
    if without_numbers:
        yield not_numbers(without_numbers)
    without_values = {path: found.without_values[path] for path in read if path in found.without_values}
    if without_values:
        yield _no_values(without_values)


def _may_be(stored: Tokens, wanted: Tokens) -> bool:
    """Tells whether a stored leaf may be a wanted one: by its last name, or by most of the other's names."""
    names = {name for name in wanted if not name.isdecimal()}
    return stored[-1:] == wanted[-1:] or 2 * len(names & set(stored)) >= len(names) > 0


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


def check_readable(found: Unreadable) -> None:
    """Raises if any leaf of a checkpoint cannot be read.

    Raises:
        UnreadableLeafError: Lists the damaged ones, or else those that hold no numbers.
    """
    if found.lost or found.damaged:
        raise unreadable({**found.lost, **found.damaged})
    if found.foreign:
        raise not_numbers(found.foreign)


class UnfitName(str):
    """Why a leaf cannot be read that is whole: it has a name that its store does not keep apart."""

    __slots__ = ()


def unreadable(lost: Mapping[Path, str]) -> UnreadableLeafError:
    """Returns the error that lists leaves whose arrays cannot be found."""
    hint = "a part of it is damaged, or was not copied: copy it again, or restore another step."
    if all(isinstance(reason, UnfitName) for reason in lost.values()):
        hint = "save it where it was written, under other names or with use_ocdbt=True."
    what = counted(len(lost), "leaf whose array", "leaves whose arrays")
    return _listing(lost, f"names {what} cannot be read", hint)


def not_numbers(foreign: Mapping[Path, str]) -> UnreadableLeafError:
    """Returns the error that lists leaves which are whole and hold no numbers."""
    return _listing(
        foreign,
        f"has {counted(len(foreign), 'leaf that holds', 'leaves that hold')} no numbers of a known type",
        "load it where it was written, and save them again as arrays of float32 or of integers.",
    )


def _no_values(leaves: Mapping[Path, str]) -> UnreadableLeafError:
    """Returns the error that lists leaves of a tree in memory which have a shape and no values."""
    return _listing(
        leaves,
        f"has {counted(len(leaves), 'leaf', 'leaves')} without values",
        "give it arrays; what would come of their shapes, "
        "jax.eval_shape(lambda tree: from_linen(tree, target), tree) tells.",
        whose="tree",
    )


def _listing(
    leaves: Mapping[Path, str], what: str, hint: str, whose: str = "checkpoint"
) -> UnreadableLeafError:
    rows = aligned(Row(path, (reason,)) for path, reason in leaves.items())
    return UnreadableLeafError(f"the {whose} {what}:\n{rows}", paths=list(leaves), hints=[hint])


def _plain(path: Path) -> Tokens:
    return tuple(name for name in segments(path) if name != "value")
