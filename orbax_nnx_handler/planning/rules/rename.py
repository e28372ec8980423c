"""Renames: whole path segments of a stored path become segments of a wanted path.

And what a rule behind others is for, once these have given it another name.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from orbax_nnx_handler.planning.core.errors import RuleError, check_kinds
from orbax_nnx_handler.planning.core.leaves import derived
from orbax_nnx_handler.planning.core.paths import is_index, parse, render
from orbax_nnx_handler.planning.rules.entries import NUMBER, PLACE, PLACE_OR_NUMBER, Entries, Entry, Names
from orbax_nnx_handler.planning.rules.rule import (
    Applied,
    Match,
    Pattern,
    Rule,
    Span,
    check_pattern,
    check_places,
    compiled,
    find,
    patterns_of,
    reason_of,
    shared_ends,
)

_Marks = tuple[bool, ...]
_Written = tuple[Names, _Marks, _Marks]


@dataclasses.dataclass(frozen=True)
class Rename(Rule):
    r"""Segments that match `pattern` become `replacement`.

    A pattern is one or more segments (`"Dense_0"`, `"encoder/Block_{i}"`). `*`
    is any one segment, `{name}` any part of one; the replacement repeats them:
    `Rename("Block_{i}", "blocks/{i}")`. It applies wherever it matches in the
    stored path as `orbax-nnx tree` prints it, owner and collection included
    (`("ema_params", "ema")`, `("gen/opt_state", "g_opt/opt_state")`); moments follow
    the rules that name their parameters. Rules apply in order; a segment that one
    rename wrote is not rewritten by a later one, so two names can be swapped. A later
    one may name it where it stays: `("self_attn", "attn")`, then
    `("attn/{n}_proj/kernel", "attn/{n}_proj/w")`.

    ```python
    renames = [("Dense_0", "linear"), Rename("Block_{i}", "blocks/{i}")]  # a pair is a Rename
    ```

    With `regex=True` the pattern is a regular expression, and `re.sub` rewrites the whole
    path with it, as text with slashes: `Rename(r"^model/(\w+)_proj", r"\1", regex=True)`;
    `Rename(r"\.", "/", regex=True)` makes levels of dotted names. It sees what the rules
    before it have written, and may rewrite that. It cannot be undone from what it wrote:
    to save, pass the plan or the report of the restore.

    Attributes:
        pattern: Stored segments, joined by slashes.
        replacement: Wanted segments, joined by slashes; empty to take them away.
        regex: Whether both are a regular expression and its replacement.

    Raises:
        RuleError: The pattern is empty, or lacks a place that the replacement repeats, or is
            no regular expression.
    """

    pattern: str
    replacement: str
    regex: bool = False

    def __post_init__(self) -> None:
        check_kinds(self)
        if self.regex:
            self._check_expression()
        else:
            check_pattern(self, self._left)
            check_places(self, self._left, self._right)

    def _check_expression(self) -> None:
        try:
            re.sub(self.pattern, self.replacement, "")
        except (re.error, IndexError) as error:
            raise RuleError(f"{self} is no regular expression with its replacement: {error}.") from error
        if not self.pattern:
            raise RuleError(f"{self} has an empty pattern: it would match every leaf.")

    def __repr__(self) -> str:
        regex = ", regex=True" if self.regex else ""
        return f"Rename(pattern={self.pattern!r}, replacement={self.replacement!r}{regex})"

    def __str__(self) -> str:
        return repr(self) if self.regex else f"({self.pattern!r}, {self.replacement!r})"

    @derived
    def _left(self) -> Pattern:
        return compiled(self.pattern)

    @derived
    def _right(self) -> Pattern:
        return compiled(self.replacement)

    @derived
    def _ends(self) -> tuple[int, int]:
        """What both sides share as the rule spells them: a place may stand for what looks like the other."""
        return shared_ends(self._left.templates, self._right.templates)

    def apply(self, entries: Sequence[Entry]) -> Applied:
        """Returns all entries after the rule."""
        if self.regex:
            return self._apply_expression(entries)
        listed = Entries.of(entries)
        changed = dict(self.changes(listed))
        after = listed.with_changes(changed)
        return Applied(entries=after, matched=len(changed), changed=list(changed.values()))

    def changes(self, entries: Entries) -> Iterator[tuple[int, Entry]]:
        """Yields the places of what the rule, which is no regular expression, changes, with what comes."""
        for at in self._left.among(entries):
            if (new := self._rewrite(old := entries[at])) is not old:
                yield at, new

    def _apply_expression(self, entries: Sequence[Entry]) -> Applied:
        expression = re.compile(self.pattern)
        after, changed, matched = list[Entry](), list[Entry](), 0
        for entry in entries:
            text, found = expression.subn(self.replacement, "/".join(entry.whole))
            matched += bool(found)
            after.append(self._called(entry, parse(text)) if found else entry)
            changed += after[-1:] if found else []
        return Applied(entries=after, matched=matched, changed=changed)

    def inverse(self) -> Rule:
        """Returns the rename back."""
        if not has_inverse(self, self._left, self._right):
            return super().inverse()
        return Rename(self.replacement, self.pattern)

    @property
    def _loss(self) -> str:
        if self.regex:
            return (
                "what a regular expression matched is not known afterwards; save with the plan or the report "
                "of the restore in the place of the rules"
            )
        if not self._right.width:
            return "what it takes away can be put back in many places"
        return f"{self.replacement!r} does not hold every part that {self.pattern!r} leaves open"

    def spans(self, entry: Entry) -> list[Span]:
        """Returns where the rule, which is no regular expression, rewrites an entry's whole path."""
        return self._spans(entry.whole, entry.fixed or (False,) * len(entry.whole))[0]

    def _spans(self, before: Names, marks: _Marks) -> tuple[list[Span], dict[int, _Written]]:
        made: dict[int, _Written] = {}

        def accepts(span: Span) -> bool:
            made[span.start] = found = self._written(before, marks, span)
            return True not in found[2]  # What a rename has written stays.

        return list(self._left.spans(before, accepts)), made

    def _rewrite(self, entry: Entry) -> Entry:
        before = entry.whole
        marks = entry.fixed or (False,) * len(before)
        spans, made = self._spans(before, marks)
        if not spans:
            return entry
        end = spans[0].stop
        if spans[0].start == 0 and entry.prefix == before[:end] * 2:
            # MaxText's `params/params` is one collection.
            spans[:2] = [spans[0]._replace(stop=2 * end)]
            made[0] = self._written(before, marks, spans[0])
        if len(spans) == 1:  # Nearly every path.
            (start, stop, _), (written, its_marks, _) = spans[0], made[spans[0].start]
            whole = (*before[:start], *written, *before[stop:])
            return self._named(entry, whole, (*marks[:start], *its_marks, *marks[stop:]))
        names, fixed = list[str](), list[bool]()
        at = 0
        for span in spans:
            written, written_marks, _ = made[span.start]
            names += (*before[at : span.start], *written)
            fixed += (*marks[at : span.start], *written_marks)
            at = span.stop
        names += before[at:]
        fixed += marks[at:]
        return self._named(entry, names, fixed)

    def _called(self, entry: Entry, names: Sequence[str]) -> Entry:
        """Returns the entry under another whole path, of which what is the same at both ends is kept."""
        marks = entry.fixed or (False,) * len(entry.whole)
        return self._named(entry, names, _marked(marks, len(names), shared_ends(entry.whole, names))[0])

    def _named(self, entry: Entry, names: Sequence[str], fixed: Sequence[bool]) -> Entry:
        if not names:
            raise RuleError(f"{self} leaves no name for {'/'.join(entry.whole)}.")
        return entry.called(names, fixed, named=True, reason=reason_of(self, entry))

    def _written(self, before: Names, marks: _Marks, span: Span) -> _Written:
        """Returns what a match becomes, what of it is fixed then, and the marks that it would overwrite.

        What stands at both ends of the pattern and of the replacement is left as it is.
        """
        old, new = before[span.start : span.stop], self._right.fill(span.bindings)
        own = marks[span.start : span.stop]
        if old == new:
            return new, (True,) * len(new), own
        return (new, *_marked(own, len(new), self._ends))


@functools.lru_cache(maxsize=1024)  # Of each leaf that a rule is for.
def _marked(marks: _Marks, length: int, ends: tuple[int, int]) -> tuple[_Marks, _Marks]:
    """Returns what of so many new names is fixed, and the marks of the old ones that are gone.

    Args:
        marks: Which of the old names are fixed.
        length: How many new ones there are.
        ends: How many of both stay at the beginning and at the end.
    """
    head, tail = ends
    end = len(marks) - tail
    return (*marks[:head], *(True,) * (length - head - tail), *marks[end:]), marks[head:end]


def rename_of(stored: Names, wanted: Names) -> Rename | None:
    """Returns the rename of some segments; None where there is none."""
    try:
        return Rename("/".join(stored), "/".join(wanted)) if stored and wanted else None
    except RuleError:
        return None


def cuts(left: Names, right: Names) -> Iterable[tuple[int, int]]:
    """Yields how many shared segments of two paths a rename may leave out at either end, the most first."""
    after, before = shared_ends(left[::-1], right[::-1], 1)
    for stop in range(after, -1, -1):
        for start in range(before, -1, -1):
            if left[start][:1] != "{":  # A number alone stands for any name.
                yield start, stop


def comes_late(rule: Rename, entries: Iterable[Entry]) -> bool:
    """Tells whether a rename without effect would match what one before it has written."""
    if rule.regex:
        return False
    left = Pattern(rule.pattern)
    return any(True for entry in entries for _ in left.spans(entry.whole))


def has_inverse(rule: Rename, left: Pattern, right: Pattern) -> bool:
    """Tells whether the rename back, given both sides of a rename, holds all that it needs."""
    return not rule.regex and bool(right.width) and left.places == right.places


def matches_only(pattern: Pattern, entries: Entries, good: Collection[Names]) -> bool:
    """Tells whether a pattern matches no weights but those whose paths within their collection are good."""
    for at in pattern.among(entries):
        entry = entries[at]
        if entry.section in ("optimizer", "step"):
            continue
        if next(pattern.spans(entry.whole), None) is not None and entry.segments not in good:
            return False
    return True


@dataclasses.dataclass(frozen=True)
class Taken:
    """A rule after which another one, behind it, matches nothing; and what that one was for."""

    by: Rule
    lost: str
    matches: Mapping[str, Sequence[Match]]

    def what(self, met: Sequence[Entry]) -> str:
        """Returns what it has done to what the other one was for."""
        first = self.matches[self.lost][0].entry
        now = next((entry for entry in met if not set(first.sources).isdisjoint(entry.sources)), None)
        then = render(first.whole)
        return f"dropped {then}" if now is None else f"made {render(now.whole)} of {then}"

    def patterns(self, met: Sequence[Entry]) -> Mapping[str, str]:
        """Returns the patterns of just what the other one was for, as it is called now, if there are any."""
        now = {entry.recipe: entry.whole for entry in met}
        found: dict[str, str] = {}
        for text, matches in self.matches.items():
            names = [_now_matched(match, now.get(match.entry.recipe, ())) for match in matches]
            spelt = spelt_as(text, names[0])
            pattern = Pattern(spelt) if spelt else None
            before = {match.entry.recipe for match in matches}
            hits = find(pattern, met, weights_only=False).values() if pattern else ()
            if pattern is None or {match.entry.recipe for match in hits} != before:
                return {}
            found[text] = pattern.text
        return found


def _now_matched(match: Match, now: Names) -> Names:
    """Returns the segments that stand in the place of those that a pattern matched; none if more differs."""
    whole, span = match.entry.whole, match.span
    head, tail = shared_ends(whole[: span.start], now)[0], len(whole) - span.stop
    return now[head : len(now) - tail] if now[len(now) - tail :] == whole[span.stop :] else ()


def taken_from(rule: Rule, entries: Sequence[Entry], rules: Sequence[Rule]) -> Taken | None:
    """Returns the last rule that took from another one, behind it, all that a pattern of it matches."""
    patterns = [*map(Pattern, patterns_of(rule))]
    found, met = None, entries
    for earlier in itertools.takewhile(lambda one: one is not rule, rules):
        matches = {pattern.text: [*find(pattern, met, weights_only=False).values()] for pattern in patterns}
        met = earlier.apply(met).entries
        lost = next((each.text for each in patterns if not find(each, met, weights_only=False)), None)
        if lost is not None and all(matches.values()):
            found = Taken(earlier, lost, matches)
    return found


def spelt_as(text: str, names: Names) -> str | None:
    """Returns a pattern that matches these segments, with the places of another, or None."""
    spelt = "/".join(names)
    places, numbers = PLACE_OR_NUMBER.findall(text), NUMBER.findall(spelt)
    if len(places) == len(numbers):
        both = iter(zip(places, numbers, strict=True))

        def kept(_: "re.Match[str]") -> str:
            place, number = next(both)
            return number if place.isdecimal() else place

        written = _matching(NUMBER.sub(kept, spelt), names)
        if written is not None:
            return written
    if not PLACE.search(text):
        return spelt
    parts = parse(text)
    if len(parts) != len(names):
        return None
    kept_parts = [
        part if Pattern(part).match((name,)) is not None else name
        for part, name in zip(parts, names, strict=True)
    ]
    return _matching("/".join(kept_parts), names)


def _matching(text: str, names: Names) -> str | None:
    return text if Pattern(text).match(names) is not None else None


def keeping(list_: str, entries: Entries) -> Rename | None:
    """Returns a rename that only keeps `layers/0`, which a save would join to `layers_0`."""
    rule = Rename(f"{list_}/{{i}}", f"{list_}/{{i}}")
    pattern = compiled(rule.pattern)
    near = (entries[at].segments for at in pattern.among(entries))
    spans = (span for names in near for span in pattern.spans(names))
    return rule if all(is_index(span.bindings["i"]) for span in spans) else None


def with_place(place: str, one: str, other: str) -> tuple[str, str]:
    """Returns two names with a place for the words that both begin or end with."""
    if one == other:
        return place, place
    if (width := _shared_words(one, other)) > 0:
        return place + one[width:], place + other[width:]
    if (width := _shared_words(one[::-1], other[::-1])) > 0:
        return one[:-width] + place, other[:-width] + place
    return one, other


def _shared_words(one: str, other: str) -> int:
    """Returns how many letters lie before the last `_` of what two names begin with."""
    shared = next((at for at, pair in enumerate(zip(one, other, strict=False)) if len({*pair}) > 1), len(one))
    return one[:shared].rfind("_")


_PLACES = ("{i}", "{j}", "{k}", "{l}")
_LAST_NUMBER = re.compile(r"\d+(?=\D*$)")


def with_places(names: Names, seats: Iterable[int]) -> Names:
    """Returns a path with a place for the number in each of some segments."""
    found = list(names)
    for place, seat in zip(_PLACES, seats, strict=False):
        name = found[seat]
        found[seat] = _LAST_NUMBER.sub(place, name) if _LAST_NUMBER.search(name) else name + place
    return tuple(found)


# Whether the way back is clear.


def unclear_undone(back: Rename, met: Mapping[tuple[str, ...], Sequence[Span]]) -> tuple[str, ...]:
    """Returns a path of which the rename back does not tell which name in it was another one, if any.

    Args:
        back: The rename from what was written to what was stored.
        met: Each whole path that it rewrites, with where.
    """
    if back.pattern.replace("/", "_") == back.replacement.replace("/", "_"):
        return ()  # Lists as Linen spells them, in lists too.
    twice = next((names for names, spans in met.items() if len(spans) > 1), ())
    leaves = [names for names, spans in met.items() if spans[-1].stop == len(names)]
    return twice or (leaves[0] if 0 < len(leaves) < len(met) else ())


def leads_back(rule: Rename, before: Sequence[Entry], after: Entries) -> bool:
    """Tells whether the rename back makes of some entries what a rename has made them from.

    Args:
        rule: The rename.
        before: The entries before it.
        after: The same after it, in the same order.
    """
    left, right = compiled(rule.pattern), compiled(rule.replacement)
    if not has_inverse(rule, left, right):
        return False
    found = set(right.among(after))
    spans = {names: some for at in found if (some := [*right.spans(names := after[at].whole)])}
    if unclear_undone(Rename(rule.replacement, rule.pattern), spans):
        return False
    if _NUMBER_AT_END.search(rule.replacement):
        # A save reads `norm_1` into `norm/1` too, which Linen may have joined.
        kept = (at for at in right.among(after, _joined_of) if after[at] is before[at])
        joined = ((_joined_of(after[at]), after[at].whole) for at in kept)
        if any(names != whole and any(right.spans(names)) for names, whole in joined):
            return False
    return all(
        before[at].whole == _replaced(spans.get(names := after[at].whole, ()), left, names)
        for at in found | after.changed.keys()
    )


_NUMBER_AT_END = re.compile(r"_([0-9]+|\{\w+\})(/|$)")


def _joined_of(entry: Entry) -> tuple[str, ...]:
    found: list[str] = []
    for name in entry.whole:
        if name.isdecimal() and found:
            found[-1] += f"_{name}"
        else:
            found.append(name)
    return tuple(found)


def _replaced(spans: Iterable[Span], replacement: Pattern, names: tuple[str, ...]) -> tuple[str, ...]:
    found, at = list[str](), 0
    for span in spans:
        found += (*names[at : span.start], *replacement.fill(span.bindings))
        at = span.stop
    return (*found, *names[at:])
