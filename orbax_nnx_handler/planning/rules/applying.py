"""Lists of rules: read from what a user wrote, applied one after another; what had no effect is told."""

import dataclasses
import difflib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard, cast

import numpy as np

from orbax_nnx_handler.planning.core.errors import Hint, RuleError, UnusedRuleError
from orbax_nnx_handler.planning.core.paths import Path, numbered, parse, render, segments
from orbax_nnx_handler.planning.core.recipes import Fill, Recipe, children, render_reads
from orbax_nnx_handler.planning.layouts.linen import AUX
from orbax_nnx_handler.planning.rules.entries import (
    ALIKE,
    SHOWN,
    Entry,
    Names,
    alike,
    plain,
)
from orbax_nnx_handler.planning.rules.rename import Rename, comes_late, spelt_as, taken_from
from orbax_nnx_handler.planning.rules.rule import Pattern, Rule, patterns_of
from orbax_nnx_handler.planning.rules.stacking import Copy, ScanAxis
from orbax_nnx_handler.planning.rules.values import Drop

Casts = Mapping[Recipe, np.dtype[Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RulesApplied:
    """What a list of rules made of the stored model.

    Attributes:
        entries: The entries after all rules.
        made: Each rule with the entries it made, as they were when it had made them.
        discarded: The stored leaves that rules drop, each with the rule.
        axes: The rules that say along which axis a group's layers are stacked.
        casts: The dtype that a rule casts the value of a recipe to.
    """

    entries: Sequence[Entry]
    made: Sequence[tuple[Rule, Sequence[Entry]]]
    discarded: Mapping[Path, Drop]
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
    after: Sequence[Entry] = numbered_as_weights(entries, rules)
    made, unused, discarded = list[tuple[Rule, Sequence[Entry]]](), list[UnmatchedRule](), dict[Path, Drop]()
    matched = list[Rule]()
    axes = tuple(rule for rule in rules if isinstance(rule, ScanAxis))
    for rule in rules:
        try:
            applied = rule.apply(after)
        except RuleError as error:
            raise _with_what_was_taken(error, rule, after, entries, rules) from None
        if weights := _meant_weights(rule, applied.changed, after):
            unused.append((rule, weights))
        elif applied.matched:
            matched.append(rule)
        elif not isinstance(rule, ScanAxis):
            unused.append((rule, after))
        after = applied.entries
        made.append((rule, applied.changed))
        if isinstance(rule, Drop):
            discarded |= dict.fromkeys(applied.discarded, rule)
    if unused:
        raise _without_effect(unused, matched, entries, rules)
    casts = {entry.recipe: entry.cast for entry in after if entry.cast is not None}
    _check_copies(after, casts)
    return RulesApplied(entries=after, made=made, discarded=discarded, axes=axes, casts=casts)


def _meant_weights(rule: Rule, changed: Sequence[Entry], entries: Sequence[Entry]) -> Sequence[Entry]:
    """Returns all weights if a rule reaches only what lies aside, and, numbered as in Linen, is theirs."""
    aside = (AUX in map(str, path) for entry in changed for path in entry.sources)
    if not (next(aside, False) and all(aside)):
        return ()  # Nearly every rule: its first leaf tells.
    texts = [text.split("/") for text in patterns_of(rule)]
    patterns = [Pattern("/".join(numbered(text))) for text in texts if numbered(text) != tuple(text)]
    weights = [entry for entry in entries if AUX not in entry.whole]
    are_met = any(pattern.candidates(entry.whole for entry in weights) for pattern in patterns)
    return weights if are_met else ()


def numbered_as_weights(entries: Sequence[Entry], rules: Sequence[Rule]) -> Sequence[Entry]:
    """Returns the entries, what lies aside numbered as Linen's weights are where more rules match it so.

    A save keeps it under NNX's own path: a rule for `layers_1` is for `layers/1` there.
    """
    if not any(AUX in entry.whole for entry in entries):
        return entries  # Nearly every checkpoint.
    patterns = [Pattern(text) for rule in rules for text in patterns_of(rule)]

    def matches(names: Sequence[str]) -> set[int]:
        return {at for at, pattern in enumerate(patterns) if next(pattern.spans(names), None) is not None}

    def as_weight(entry: Entry) -> Entry:
        names = numbered(entry.segments) if AUX in entry.whole else entry.segments
        if names == entry.segments or not matches(entry.whole) < matches((*entry.prefix, *names)):
            return entry
        return dataclasses.replace(entry, segments=names)

    return [as_weight(entry) for entry in entries]


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

WHOLE = (
    "a pattern is whole path segments as `orbax-nnx tree` prints them, or as the rules in front of it "
    "write them; correct it or take it out."
)
_MEANT = "if that is meant, write"
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


def _without_effect(
    unused: Sequence[UnmatchedRule],
    matched: Collection[Rule],
    entries: Sequence[Entry],
    rules: Sequence[Rule],
) -> UnusedRuleError:
    """Returns the error for rules that match nothing, with the stored paths that are nearest."""
    rows, corrected, moved = list[str](), list[Rule](), list[str]()
    late, repeated = list[Rename](), 0
    for rule, met in unused:
        rows.append(f"  {rule}")
        if rule in matched:
            rows.append("    the same rule in front of it has matched all that it is for")
            repeated += 1
            continue
        if isinstance(rule, Rename) and comes_late(rule, met):
            late.append(rule)
            continue
        told, meant = _what_it_met(rule, met, entries, rules)
        rows += told
        if isinstance(meant, Rule):
            corrected.append(meant)
        elif meant:
            moved.append(meant)
    if repeated == len(unused):
        hint = _TWICE
    elif len(late) == len(unused):
        hint = _in_one(late, matched)
    elif what := _what_no_rule_is_for(unused):
        rows, hint = [row for row in rows if what is _IN_OPTIMIZER or not row.startswith("   ")], what
    elif len(corrected) + len(moved) == len(unused):
        written = [f"{_MEANT} {', '.join(map(str, corrected))}"] if corrected else []
        hint = f"{'; '.join((*written, *moved))}."
    else:
        hint = _LATE if late else WHOLE
    error = _unused_error(rows, Hint(hint))
    error.rules = [rule for rule, _ in unused]
    error.meant = corrected if len(corrected) == len(unused) else ()
    return error


def _what_it_met(
    rule: Rule, met: Sequence[Entry], entries: Sequence[Entry], rules: Sequence[Rule]
) -> tuple[list[str], Rule | str | None]:
    """Returns the row on what a rule without effect is for, and the rule or the place that is meant."""
    taken = taken_from(rule, entries, rules)
    if taken is None:
        paths, meant = _nearest(rule, met)
        return [f"    nearest stored: {', '.join(paths)}"] if paths else [], meant
    meant = _with_patterns(rule, taken.patterns(met), met)
    if meant is None and _is_right_in_front(rule, taken.by, entries, rules):
        meant = f"put {rule} in front of {taken.by}"
    return [f"    {taken.by} in front of it has {taken.what(met)}"], meant


def _with_what_was_taken(
    error: RuleError, rule: Rule, met: Sequence[Entry], entries: Sequence[Entry], rules: Sequence[Rule]
) -> RuleError:
    """Returns the error of a rule that does not fit, with the one in front that has taken what it is for."""
    if taken_from(rule, entries, rules) is None:
        return error
    told, meant = _what_it_met(rule, met, entries, rules)
    ways = [f"{_MEANT} {meant}." if isinstance(meant, Rule) else f"{meant}."] if meant else error.hints
    return RuleError("\n".join((error.what, *told)), paths=error.paths, hints=ways)


def _what_no_rule_is_for(unused: Sequence[UnmatchedRule]) -> str:
    if any(names_optimizer_leaf(rule, met) for rule, met in unused):
        return _IN_OPTIMIZER
    named = any(not isinstance(rule, Rename) and is_for_values(rule, met) for rule, met in unused)
    return _OF_ITS_OWN if named else ""


def _in_one(late: Iterable[Rename], matched: Collection[Rule]) -> str:
    """Returns the hint for renames of what others have written, each pair of them as one rule."""
    renames = [rule for rule in matched if isinstance(rule, Rename)]
    pairs = [(first, rule) for rule in late for first in renames if first.replacement == rule.pattern]
    shown = (f"{Rename(one.pattern, two.replacement)} for {one} and {two}" for one, two in pairs)
    return _LATE[:-1] + (f": {', '.join(shown)}." if pairs else ".")


def _unused_error(rows: Sequence[str], hint: Hint) -> UnusedRuleError:
    count = sum(not row.startswith("   ") for row in rows)
    words = "1 rule matches" if count == 1 else f"{count} rules match"
    return UnusedRuleError(f"{words} no stored leaf:\n" + "\n".join(rows), hints=[hint])


_EXPRESSION = re.compile(r"[\\()\[\]+^$|?]")


def _nearest(rule: Rule, entries: Sequence[Entry]) -> tuple[Sequence[str], Rule | None]:
    """Returns the stored paths nearest to a rule's pattern, and the rule spelt as they are, or None."""
    paths: list[str] = []
    corrected: dict[str, str] = {}
    for text in patterns_of(rule):
        runs = alike(text, entries)
        written = [spelt_as(text, names) for names, _ in runs if _end_alike(text, names)]
        if isinstance(rule, Rename) and not written and (end := next(_ends_of(text, entries), None)):
            written, runs = [end[0]], [((), end[1])]
        paths += [_shown(entry) for _, entry in runs]
        corrected[text] = next((new for new in written if new is not None and new != text), text)
    return [*dict.fromkeys(paths)][:SHOWN], _with_patterns(rule, corrected, entries)


def _is_right_in_front(rule: Rule, of: Rule, entries: Sequence[Entry], rules: Sequence[Rule]) -> bool:
    """Tells whether a rule has an effect in front of another one, and all others have too."""
    rest = [one for one in rules if one is not rule]
    at, met = rest.index(of), entries
    for one in (*rest[:at], rule, *rest[at:]):
        try:
            applied = one.apply(met)
        except RuleError:
            return False
        if not applied.matched and not isinstance(one, ScanAxis):
            return False
        met = applied.entries
    return True


def _end_alike(text: str, names: Names) -> bool:
    """Tells whether segments end about as a pattern does: its last one says what the rule is for."""
    ends = (plain(part).rpartition("/")[2] for part in (text, "/".join(names)))
    return difflib.SequenceMatcher(None, *ends, autojunk=False).ratio() >= ALIKE


def _ends_of(text: str, entries: Sequence[Entry]) -> Iterator[tuple[str, Entry]]:
    """Yields the ends of a pattern that match, longest first: levels in front may be the target's."""
    parts = parse(text)
    ends = (Pattern("/".join(parts[at:])) for at in range(1, len(parts)))
    return ((end.text, entry) for end in ends for entry in entries if any(end.spans(entry.whole)))


def names_optimizer_leaf(rule: Rule, entries: Iterable[Entry]) -> bool:
    """Tells whether a pattern names what lies below an `opt_state`, which rules see as one whole."""
    return _names_one_of(rule, {segments(path) for entry in entries for path in entry.leaves})


def is_for_values(rule: Rule, entries: Iterable[Entry]) -> bool:
    """Tells whether a rule on values names an optimizer or a step, which it is not for."""
    return _names_one_of(rule, [entry.whole for entry in entries if entry.section in ("optimizer", "step")])


def _names_one_of(rule: Rule, paths: Iterable[Names]) -> bool:
    patterns = [*map(Pattern, patterns_of(rule))]
    return any(any(pattern.spans(path)) for path in paths for pattern in patterns)


def _with_patterns(rule: Rule, corrected: Mapping[str, str], entries: Sequence[Entry]) -> Rule | None:
    """Returns the rule with other patterns, if it has an effect then."""
    changed = _changed(rule, corrected)
    if not changed or not dataclasses.is_dataclass(rule):
        return None
    try:
        new = dataclasses.replace(rule, **changed)
        return new if new.apply(entries).matched else None
    except RuleError:
        return None


def _changed(rule: Rule, corrected: Mapping[str, str]) -> dict[str, Any]:
    """Returns the fields of a rule that were meant otherwise; empty if there are none."""
    texts = tuple(corrected.values())
    rename = rule if isinstance(rule, Rename) and not rule.regex else None
    if rename and _EXPRESSION.search(rename.pattern):
        return {"regex": True}
    if all(old == new for old, new in corrected.items()):
        return {}
    if not rename:
        return {"patterns": texts} if "patterns" in vars(rule) else {"pattern": texts[0]}
    # Where a pattern has dots for slashes, the other side has too.
    is_dotted = "." in rename.pattern and "." not in texts[0]
    right = rename.replacement.replace(".", "/") if is_dotted else rename.replacement
    return {} if texts[0] == right else {"pattern": texts[0], "replacement": right}


def _shown(entry: Entry) -> str:
    """Returns the path of a stored leaf; what rules have made of it, where they have."""
    stored, now = render(entry.whole if entry.leaves else entry.sources[0]), render(entry.whole)
    return stored if stored == now else f"{stored} (now {now})"


def unboxed(entries: Sequence[Entry]) -> Sequence[Entry]:
    """Returns entries without the level `value` of a box, as rules may name a leaf in one too.

    A box holds nothing else: beside a `query` and a `key`, `value` is a leaf's own name.
    """
    boxes = {x.whole[:-1] for x in entries if len(x.segments) > 1 and x.segments[-1] == "value"}
    if not boxes:
        return entries  # Nearly every checkpoint.
    held = Counter(x.whole[:at] for x in entries for at in range(1, len(x.whole)))
    return [
        dataclasses.replace(x, segments=x.segments[:-1], fixed=x.fixed[: len(x.whole) - 1])
        if x.section == "model"
        and x.whole[-1] == "value"
        and x.whole[:-1] in boxes
        and held[x.whole[:-1]] == 1
        else x
        for x in entries
    ]
