"""One stored leaf that the target wants twice: a tied embedding in a model with a head of its own."""

import dataclasses
from collections.abc import Sequence
from functools import cached_property

from orbax_nnx_handler.planning.core.errors import RuleError
from orbax_nnx_handler.planning.rules.entries import Entry
from orbax_nnx_handler.planning.rules.one_leaf import Drop
from orbax_nnx_handler.planning.rules.patterns import Pattern
from orbax_nnx_handler.planning.rules.rule import Applied, Rule, check_pattern, check_places, find, reason_of


@dataclasses.dataclass(frozen=True)
class Copy(Rule):
    """Every leaf that matches becomes another wanted leaf as well.

    `Copy("embed/embedding", "head/kernel")`, then `Transpose("head/kernel", (1, 0))`, for
    a program that uses its embedding as output layer and a model that has a head. Only
    this rule lets one stored leaf become two wanted ones. Moments follow on both sides.
    Saved with the same rules, both are stored as the one leaf that they were: they must
    be equal still, or the save is refused, since one of them would be lost.

    Attributes:
        pattern: Stored segments, as in `Rename`.
        into: What they become in the copy; the leaf itself keeps its name.

    Raises:
        RuleError: A pattern is empty, both are the same, or the copy repeats a place that
            the pattern lacks.
    """

    pattern: str
    into: str

    def __post_init__(self) -> None:
        check_pattern(self, self._left, self._right)
        check_places(self, self._left, self._right)
        if self.pattern == self.into:
            raise RuleError(f"{self} needs another name for the copy.")

    @cached_property
    def _left(self) -> Pattern:
        return Pattern(self.pattern)

    @cached_property
    def _right(self) -> Pattern:
        return Pattern(self.into)

    def apply(self, entries: Sequence[Entry]) -> Applied:
        """Returns all entries after the rule, each copy behind its leaf."""
        matches = find(self._left, entries)
        after, made = list[Entry](), list[Entry]()
        for at, entry in enumerate(entries):
            after.append(entry)
            if at in matches:
                name = matches[at].renamed(self._right)
                made.append(dataclasses.replace(name, fixed=(), named=True, reason=reason_of(self, entry)))
                after.append(made[-1])
        return Applied(entries=after, matched=len(matches), changed=made)

    def inverse(self) -> Rule:
        """Returns the rule that leaves the copy behind; a save compares it with its leaf first."""
        return Drop(self.into, f"a copy of {self.pattern}")
