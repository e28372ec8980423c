"""Rules tried out before they are proposed: what one takes away that is not its own, it must name closer.

A rename applies wherever its pattern matches. `Dense_{i}` for the first three
layers takes the next three too, and `Dense_0` for the head takes the one in
every block.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from orbax_nnx_handler.planning.entries import Entry
from orbax_nnx_handler.planning.paths import Path, canonical
from orbax_nnx_handler.planning.rules import Rename

Names = tuple[str, ...]
Renaming = tuple[Names, Names]
"""What of a stored path becomes what of the wanted one."""

Members = Mapping[Renaming, Sequence[Renaming]]
"""Each rule with the renamings of single modules that it stands for."""


def in_order(members: Members) -> list[Renaming]:
    """Returns the rules in the order in which they apply: longer patterns first."""
    return sorted(members, key=lambda names: -len(names[0]))


def without_strays(members: Members, entries: Sequence[Entry], aims: Mapping[Path, Names]) -> Members:
    """Returns rules that take every leaf where it belongs, as general as that allows.

    Args:
        members: The rules to try.
        entries: The stored model.
        aims: The segments that a leaf must have after the rules, by its stored path.
    """
    current = members
    while True:
        straying = _straying(current, entries, aims)
        closer = {names: _closer(names, current[names], entries) for names in straying}
        if not any(closer.values()):
            return current
        current = {
            rule: covered
            for names, before in current.items()
            for rule, covered in (closer.get(names) or {names: before}).items()
        }


def _straying(members: Members, entries: Sequence[Entry], aims: Mapping[Path, Names]) -> list[Renaming]:
    """Returns the rules that have a part in a leaf ending elsewhere than it must."""
    touched: dict[int, list[Renaming]] = defaultdict(list)
    after = entries
    for names in in_order(members):
        before, after = after, _rule(names).apply(after).entries
        for at, (old, new) in enumerate(zip(before, after, strict=True)):
            if old is not new:
                touched[at].append(names)
    astray = [
        at
        for at, entry in enumerate(entries)
        if at in touched
        and canonical(after[at].segments) != canonical(aims.get(entry.sources[0], after[at].segments))
    ]
    return list(dict.fromkeys(names for at in astray for names in touched[at]))


def _closer(names: Renaming, covered: Sequence[Renaming], entries: Sequence[Entry]) -> Members:
    """Returns the rules for single modules that a general one stands for, or a single one from the root.

    Empty where neither is left.
    """
    stored, wanted = names
    if len(stored) > len(covered[0][0]):
        return {}  # It begins at the root: closer it cannot be.
    if list(covered) != [names]:
        return {member: (member,) for member in covered}
    roots = {entry.prefix for entry in entries if entry.segments[: len(stored)] == stored and entry.prefix}
    return {((*root, *stored), wanted): (names,) for root in sorted(roots)}


def _rule(names: Renaming) -> Rename:
    return Rename(*("/".join(part) for part in names))
