"""Several entries that become one: what fuse and stack have in common."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from orbax_nnx_handler.planning.entries import Entry
from orbax_nnx_handler.planning.recipes import RecipeError
from orbax_nnx_handler.planning.rules.base import Applied, Rule, reason_of, refuse


@dataclasses.dataclass(frozen=True, kw_only=True)
class Join:
    """Entries to become one.

    Attributes:
        name: The segments of the result.
        members: Their positions among all entries, in the order of the parts.
        fault: Why they cannot be joined, as far as names tell; empty if they can.
        make: Makes recipe and shape from the parts.
    """

    name: tuple[str, ...]
    members: tuple[int, ...]
    fault: str
    make: Callable[[Sequence[Entry]], Entry]


def join(rule: Rule, entries: Sequence[Entry], joins: Iterable[Join]) -> Applied:
    """Replaces the members of each join by its result, at the first member's place.

    Raises:
        RuleError: Parts do not fit together; quotes the rule and their shapes.
    """
    listed = list(joins)
    made, bad = dict[int, Entry](), list[tuple[Entry, str]]()
    uses = Counter(at for item in listed for at in item.members)
    for item in listed:
        parts = [entries[at] for at in item.members]
        twice = any(uses[at] > 1 for at in item.members)
        try:
            made[min(item.members)] = _joined(rule, item, parts, twice)
        except RecipeError as error:
            bad += [(part, str(error)) for part in parts]
    if bad:
        refuse(rule, bad)
    gone = {at for item in listed for at in item.members}
    after = [made.get(at, entry) for at, entry in enumerate(entries) if at in made or at not in gone]
    return Applied(entries=after, matched=len(gone), changed=list(made.values()))


def _joined(rule: Rule, item: Join, parts: Sequence[Entry], twice: bool) -> Entry:
    fault = item.fault or ("it is a part of two results" if twice else "") or _difference(parts)
    if fault:
        raise RecipeError(f"for {'/'.join(item.name)}, {fault}")
    return dataclasses.replace(
        item.make(parts), segments=item.name, fixed=(), named=True, reason=reason_of(rule, *parts)
    )


def _difference(parts: Sequence[Entry]) -> str:
    """Returns what keeps entries apart besides their shapes."""
    kinds = {(part.collection, part.prefix) for part in parts}
    if len(kinds) > 1:
        return "the parts come from different collections"
    dtypes = {str(part.cast or part.dtype) for part in parts}
    return f"the parts have different dtypes: {', '.join(sorted(dtypes))}" if len(dtypes) > 1 else ""
