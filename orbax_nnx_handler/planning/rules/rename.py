"""Renames: whole path segments of a stored path become segments of a wanted path."""

import dataclasses
from collections.abc import Iterable, Sequence
from functools import cached_property

from orbax_nnx_handler.planning.entries import Entry
from orbax_nnx_handler.planning.errors import RuleError
from orbax_nnx_handler.planning.rules.base import (
    Applied,
    Match,
    Rule,
    at_root,
    check_pattern,
    check_places,
    reason_of,
)
from orbax_nnx_handler.planning.rules.patterns import Pattern, Span


@dataclasses.dataclass(frozen=True)
class Rename(Rule):
    """Segments that match `pattern` become `replacement`.

    A pattern is one or more segments (`"Dense_0"`, `"encoder/Block_{i}"`). `*`
    is any one segment, `{name}` any part of one; the replacement repeats them:
    `Rename("Block_{i}", "blocks/{i}")`. It applies wherever it matches, to the
    path below the collection, or from the root of the stored path if it begins
    there (`"params/params/logits_dense"`). Rules apply in order; a segment that
    one rename wrote is not rewritten by a later one, so two names can be swapped.

    Attributes:
        pattern: Stored segments, joined by slashes.
        replacement: Wanted segments, joined by slashes; empty to take them away.

    Raises:
        RuleError: The pattern is empty, or lacks a place that the replacement repeats.
    """

    pattern: str
    replacement: str

    def __post_init__(self) -> None:
        check_pattern(self, self._left)
        check_places(self, self._left, self._right)

    def __str__(self) -> str:
        return f"({self.pattern!r}, {self.replacement!r})"

    @cached_property
    def _left(self) -> Pattern:
        return Pattern(self.pattern)

    @cached_property
    def _right(self) -> Pattern:
        return Pattern(self.replacement)

    def apply(self, entries: Sequence[Entry]) -> Applied:
        """Returns all entries after the rule."""
        likely = self._left.candidates(entry.segments for entry in entries)
        rewritten = {at: self._rewrite(entries[at]) for at in likely}
        changed = {at: new for at, new in rewritten.items() if new is not entries[at]}
        if not changed:
            from_root = {at: self._rewrite_from_root(entry) for at, entry in enumerate(entries)}
            changed = {at: new for at, new in from_root.items() if new is not entries[at]}
        after = list(entries)
        for at, new in changed.items():
            after[at] = new
        return Applied(entries=after, matched=len(changed), changed=list(changed.values()))

    def inverse(self) -> Rule:
        """Returns the rename back."""
        if not self._right.width or self._left.places != self._right.places:
            return super().inverse()
        return Rename(self.replacement, self.pattern)

    @property
    def _loss(self) -> str:
        if not self._right.width:
            return "what it takes away can be put back in many places"
        return f"{self.replacement!r} does not hold every part that {self.pattern!r} leaves open"

    def _rewrite(self, entry: Entry) -> Entry:
        spans = list(self._left.spans(entry.segments, entry.fixed))
        if not spans:
            return entry
        names, fixed = list[str](), list[bool]()
        at = 0
        for span in [*spans, Span(len(entry.segments), len(entry.segments), {})]:
            names += entry.segments[at : span.start]
            fixed += entry.fixed[at : span.start] or [False] * (span.start - at)
            if span.start < span.stop:
                written = self._right.fill(span.bindings)
                names += written
                fixed += [True] * len(written)
            at = span.stop
        return self._renamed(entry, names, fixed)

    def _rewrite_from_root(self, entry: Entry) -> Entry:
        for span in at_root(self._left, entry):
            names = Match(entry, span).renamed(self._right)
            kept = len(entry.segments) - span.stop
            return self._renamed(entry, names, [True] * (len(names) - kept) + [False] * kept)
        return entry

    def _renamed(self, entry: Entry, names: Sequence[str], fixed: Sequence[bool]) -> Entry:
        if not names:
            raise RuleError(f"{self} leaves no name for {'/'.join((*entry.prefix, *entry.segments))}.")
        return dataclasses.replace(
            entry, segments=tuple(names), fixed=tuple(fixed), named=True, reason=reason_of(self, entry)
        )


def comes_late(rule: Rename, entries: Iterable[Entry]) -> bool:
    """Tells whether a rename without effect would match what one before it has written."""
    left = Pattern(rule.pattern)
    return any(True for entry in entries for _ in left.spans(entry.segments))
