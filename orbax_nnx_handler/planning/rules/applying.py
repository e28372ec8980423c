"""Lists of rules: read from what a user wrote, applied one after another, and what had no effect is told."""

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeGuard, cast

import numpy as np

from orbax_nnx_handler.planning.core.errors import Hint, RuleError, UnusedRuleError
from orbax_nnx_handler.planning.core.paths import Path, render
from orbax_nnx_handler.planning.core.recipes import Fill, Recipe, children, render_reads
from orbax_nnx_handler.planning.rules.entries import Entry
from orbax_nnx_handler.planning.rules.nearest import is_for_values, names_optimizer_leaf, nearest
from orbax_nnx_handler.planning.rules.rename import Rename, comes_late
from orbax_nnx_handler.planning.rules.rule import Rule
from orbax_nnx_handler.planning.rules.stacking import Copy, ScanAxis

Casts = Mapping[Recipe, np.dtype[Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RulesApplied:
    """What a list of rules made of the stored model.

    Attributes:
        entries: The entries after all rules.
        made: Each rule with the entries it made, as they were when it had made them.
        discarded: The stored leaves that rules drop, each with the reason.
        axes: The rules that say along which axis a group's layers are stacked.
        casts: The dtype that a rule casts the value of a recipe to.
    """

    entries: Sequence[Entry]
    made: Sequence[tuple[Rule, Sequence[Entry]]]
    discarded: Mapping[Path, str]
    axes: tuple[ScanAxis, ...]
    casts: Casts

    @property
    def copied(self) -> frozenset[Path]:
        """The stored leaves that a rule says are wanted more than once."""
        made = (entries for rule, entries in self.made if isinstance(rule, Copy))
        return frozenset(path for entries in made for entry in entries for path in entry.sources)


def as_rules(renames: Iterable[Rule | tuple[str, str]]) -> tuple[Rule, ...]:
    """Returns rules from what a user may write: rule values or (pattern, replacement) pairs.

    Raises:
        RuleError: Something is neither.
    """
    given: object = renames
    if isinstance(given, Rule | str | Mapping) or _is_pair(given) or not hasattr(given, "__iter__"):
        raise RuleError(f"{given!r} is no list of rules.", hints=[_LIST])
    return tuple(
        rule if isinstance(rule, Rule) else _rename(rule) for rule in cast("Iterable[object]", given)
    )


_LIST = (
    'renames lists (pattern, replacement) pairs, such as [("Dense_0", "up")], and rules such as '
    "Transpose(pattern, (1, 0))."
)


def _is_pair(value: object) -> TypeGuard[tuple[str, str]]:
    """Tells one (pattern, replacement) from a list of them."""
    parts = cast("Sequence[object]", value) if isinstance(value, tuple | list) else ()
    return len(parts) == 2 and all(isinstance(part, str) for part in parts)


def _rename(pair: object) -> Rename:
    if _is_pair(pair):
        return Rename(*pair)
    raise RuleError(f"{pair!r} is no rule.", hints=[_LIST])


def invert(renames: Iterable[Rule | tuple[str, str]]) -> tuple[Rule, ...]:
    """Returns the rules that lead back from the wanted to the stored arrangement.

    ```python
    there = [("Dense_0", "linear"), Transpose("linear/kernel", (1, 0))]
    back = invert(there)  # (Transpose("linear/kernel", (1, 0)), Rename("linear", "Dense_0"))
    ```

    Raises:
        RuleError: Some rules cannot be undone; names each with what it loses.
    """
    back, lost = list[Rule](), list[str]()
    for rule in reversed(as_rules(renames)):
        try:
            back.append(rule.inverse())
        except RuleError as error:
            lost.append(str(error))
    if lost:
        raise RuleError("\n".join(lost))
    return tuple(back)


def apply_rules(entries: Sequence[Entry], rules: Sequence[Rule]) -> RulesApplied:
    """Applies the rules in order.

    Raises:
        UnusedRuleError: A rule matches no stored leaf.
        RuleError: A rule does not fit a leaf that it matches.
    """
    after: Sequence[Entry] = entries
    made, unused, discarded = list[tuple[Rule, Sequence[Entry]]](), list[UnmatchedRule](), dict[Path, str]()
    matched = list[Rule]()
    axes = tuple(rule for rule in rules if isinstance(rule, ScanAxis))
    for rule in rules:
        applied = rule.apply(after)
        if applied.matched:
            matched.append(rule)
        elif not isinstance(rule, ScanAxis):
            unused.append((rule, after))
        after = applied.entries
        made.append((rule, applied.changed))
        discarded |= applied.discarded
    if unused:
        raise _without_effect(unused, matched)
    casts = {entry.recipe: entry.cast for entry in after if entry.cast is not None}
    _check_copies(after, casts)
    return RulesApplied(entries=after, made=made, discarded=discarded, axes=axes, casts=casts)


def cast_of(recipe: Recipe, casts: Casts) -> np.dtype[Any] | None:
    """Returns the dtype that rules cast all of a recipe's value to; None if no rule does."""
    if not casts or recipe in casts:
        return casts.get(recipe)
    found = {cast_of(child, casts) for child in children(recipe) if not isinstance(child, Fill)}
    return found.pop() if len(found) == 1 else None


def _check_copies(entries: Sequence[Entry], casts: Casts) -> None:
    """Checks that no leaf is cast because a copy of it is: both are made of the same values.

    Raises:
        RuleError: One of two copies is cast, or each to another dtype.
    """
    unlike = [entry for entry in entries if cast_of(entry.recipe, casts) != entry.cast] if casts else []
    if unlike:
        rows = "\n".join(
            f"  {render(entry.segments)}  <-  {render_reads(entry.recipe)} {entry.reason}".rstrip()
            for entry in unlike
        )
        raise RuleError(
            f"a Cast is for one of the leaves that a Copy made of a stored leaf, and not for these:\n{rows}",
            paths=[path for entry in unlike for path in entry.sources],
            hints=["a leaf that is wanted twice is cast in both places: put the Cast in front of the Copy."],
        )


UnmatchedRule = tuple[Rule, Sequence[Entry]]
"""A rule that matches nothing, and what it met."""

_WHOLE = "a pattern is whole path segments as `orbax-nnx tree` prints them; correct it or take it out."
_LATE = (
    "what a rename wrote is not renamed again, so that names can be swapped; write in one rule "
    "what it becomes in the end."
)
_IN_OPTIMIZER = (
    "no rule reaches below opt_state: its states are matched as wholes, and moments follow their parameters. "
    "Weights that a program keeps there can be read with Orbax and given to from_linen."
)

_TWICE = "take out the repetition: a rule is for every leaf that its pattern matches."
_OF_ITS_OWN = (
    "a step and an optimizer are their train state's own: only renames and Drop are for them. Restore "
    "without the rule, and set a second count in the program."
)


_AXES = (
    "ScanAxis is for layers that are stacked on one side alone, its group written as `orbax-nnx tree` "
    "prints it, without layer numbers; take it out. Where both sides are stacked, along other axes, pass a "
    "Transpose for each leaf of the group."
)


def unused_axes(unused: Sequence[Rule]) -> UnusedRuleError:
    """Returns the error for axes of groups that no layers have to be taken from or put into."""
    return _unused_error([f"  {rule}" for rule in unused], Hint(_AXES))


def _without_effect(unused: Sequence[UnmatchedRule], matched: Collection[Rule]) -> UnusedRuleError:
    """Returns the error for rules that match nothing, with the stored paths that are nearest."""
    rows, corrected, late, repeated = list[str](), list[Rule](), False, 0
    for rule, met in unused:
        rows.append(f"  {rule}")
        if rule in matched:
            rows.append("    the same rule in front of it has matched all that it is for")
            repeated += 1
            continue
        if isinstance(rule, Rename) and comes_late(rule, met):
            late = True
            continue
        near = nearest(rule, met)
        if near.paths:
            rows.append(f"    nearest stored: {', '.join(near.paths)}")
        if near.rule is not None:
            corrected.append(near.rule)
    if any(names_optimizer_leaf(rule, met) for rule, met in unused):
        return _unused_error(rows, Hint(_IN_OPTIMIZER))
    if any(not isinstance(rule, Rename) and is_for_values(rule, met) for rule, met in unused):
        rows = [row for row in rows if not row.startswith("   ")]
        return _unused_error(rows, Hint(_OF_ITS_OWN))
    if repeated == len(unused):
        return _unused_error(rows, Hint(_TWICE))
    if len(corrected) == len(unused):
        return _unused_error(rows, Hint(f"if that is meant, write {', '.join(map(str, corrected))}."))
    return _unused_error(rows, Hint(_LATE if late else _WHOLE))


def _unused_error(rows: Sequence[str], hint: Hint) -> UnusedRuleError:
    count = sum(not row.startswith("   ") for row in rows)
    words = "1 rule matches" if count == 1 else f"{count} rules match"
    return UnusedRuleError(f"{words} no stored leaf:\n" + "\n".join(rows), hints=[hint])
