"""Rules between one leaf and several: split and fuse along an axis."""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property

from orbax_nnx_handler.planning import recipes
from orbax_nnx_handler.planning.entries import Entry
from orbax_nnx_handler.planning.errors import RuleError
from orbax_nnx_handler.planning.paths import Path
from orbax_nnx_handler.planning.recipes import RecipeError
from orbax_nnx_handler.planning.rules.base import (
    Applied,
    Match,
    Rule,
    check_pattern,
    check_places,
    find,
    normal_axis,
    reason_of,
    refuse,
)
from orbax_nnx_handler.planning.rules.joining import Join, join
from orbax_nnx_handler.planning.rules.patterns import Pattern


@dataclasses.dataclass(frozen=True)
class Split(Rule):
    """Every leaf that matches is cut along an axis into several.

    `Split("qkv", ("query", "key", "value"), axis=1)` cuts `attention/qkv/kernel`
    into `attention/query/kernel` and so on.

    Attributes:
        pattern: Stored segments, as in `Rename`.
        into: What the segments become, one for each part, in order.
        axis: The axis; negative ones count from the end.
        sizes: Elements of each part along the axis; equal parts if None.

    Raises:
        RuleError: A pattern is empty or repeated, or names a place that is not bound.
    """

    pattern: str
    into: tuple[str, ...]
    axis: int
    sizes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _set_names(self, "into", self.into)
        _set_sizes(self, self.sizes, len(self.into))
        check_pattern(self, self._left, *self._parts)
        for part in self._parts:
            check_places(self, self._left, part)

    @cached_property
    def _left(self) -> Pattern:
        return Pattern(self.pattern)

    @cached_property
    def _parts(self) -> tuple[Pattern, ...]:
        return tuple(Pattern(part) for part in self.into)

    def apply(self, entries: Sequence[Entry]) -> Applied:
        """Returns all entries after the rule; the parts take their leaf's place."""
        matches = find(self._left, entries)
        after, changed, bad = list[Entry](), list[Entry](), list[tuple[Entry, str]]()
        for at, entry in enumerate(entries):
            if at not in matches:
                after.append(entry)
                continue
            try:
                parts = self._cut(matches[at])
            except RecipeError as error:
                bad.append((entry, str(error)))
            else:
                after += parts
                changed += parts
        if bad:
            refuse(self, bad)
        return Applied(entries=after, matched=len(matches), changed=changed)

    def inverse(self) -> Rule:
        """Returns the fuse of the parts."""
        if any(part.places != self._left.places for part in self._parts):
            return super().inverse()
        return Fuse(self.into, self.pattern, self.axis, self.sizes)

    @property
    def _loss(self) -> str:
        return f"its parts do not each hold every part that {self.pattern!r} leaves open"

    def _cut(self, match: Match) -> list[Entry]:
        entry = match.entry
        axis = normal_axis(self.axis, len(entry.shape), entry.shape)
        sizes = self.sizes or (entry.shape[axis] // len(self.into),) * len(self.into)
        if sum(sizes) != entry.shape[axis]:
            parts = f"sizes {sizes}" if self.sizes else f"{len(self.into)} equal parts"
            raise RecipeError(f"axis {axis} has {entry.shape[axis]} elements, which are not {parts}")
        starts = [sum(sizes[:at]) for at in range(len(sizes))]
        return [
            dataclasses.replace(
                entry,
                segments=match.renamed(part),
                recipe=recipes.Slice(entry.recipe, axis, start, size),
                shape=(*entry.shape[:axis], size, *entry.shape[axis + 1 :]),
                fixed=(),
                named=True,
                reason=reason_of(self, entry),
            )
            for part, start, size in zip(self._parts, starts, sizes, strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class Fuse(Rule):
    """Several leaves are joined end to end along an axis.

    `Fuse(("query", "key", "value"), "qkv", axis=1)` makes `attention/qkv/kernel`
    of the three kernels, and `attention/qkv/bias` of the biases.

    Attributes:
        patterns: Stored segments of each part, in the order in which they are joined.
        into: What they become.
        axis: The axis; negative ones count from the end.
        sizes: Elements of each part along the axis; equal parts if None.

    Raises:
        RuleError: A pattern is empty or repeated, or names a place that is not bound.
    """

    patterns: tuple[str, ...]
    into: str
    axis: int
    sizes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _set_names(self, "patterns", self.patterns)
        _set_sizes(self, self.sizes, len(self.patterns))
        check_pattern(self, *self._parts, self._right)
        for part in self._parts:
            check_places(self, part, self._right)

    @cached_property
    def _parts(self) -> tuple[Pattern, ...]:
        return tuple(Pattern(pattern) for pattern in self.patterns)

    @cached_property
    def _right(self) -> Pattern:
        return Pattern(self.into)

    def apply(self, entries: Sequence[Entry]) -> Applied:
        """Returns all entries after the rule; what is joined takes the first part's place."""
        groups: dict[tuple[str, ...], dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        for order, part in enumerate(self._parts):
            for at, match in find(part, entries).items():
                groups[match.renamed(self._right)][order].append(at)
        joins = [self._join(name, places, entries) for name, places in groups.items()]
        return join(self, entries, joins)

    def inverse(self) -> Rule:
        """Returns the split into the parts."""
        if any(part.places != self._right.places for part in self._parts):
            return super().inverse()
        return Split(self.into, self.patterns, self.axis, self.sizes)

    @property
    def _loss(self) -> str:
        return f"{self.into!r} does not hold every part that its patterns leave open"

    def _join(
        self, name: tuple[str, ...], places: Mapping[int, Sequence[int]], entries: Sequence[Entry]
    ) -> Join:
        absent = [self.patterns[order] for order in range(len(self.patterns)) if order not in places]
        several = [at for found in places.values() for at in found if len(found) > 1]
        fault = f"{', '.join(map(repr, absent))} is not there" if absent else ""
        if several:
            listed = ", ".join("/".join(entries[at].segments) for at in several)
            fault = f"a part is there more than once: {listed}"
        members = tuple(places[order][0] for order in sorted(places))
        return Join(name=name, members=members, fault=fault, make=self._make)

    def _make(self, parts: Sequence[Entry]) -> Entry:
        first = parts[0]
        axis = normal_axis(self.axis, len(first.shape), first.shape)
        recipe = recipes.Concat(tuple(part.recipe for part in parts), axis)
        keys: list[Path] = [("(part)", at) for at in range(len(parts))]
        shapes = {key: part.shape for key, part in zip(keys, parts, strict=True)}
        shape = recipes.shape_of(recipes.Concat(tuple(recipes.Read(key) for key in keys), axis), shapes)
        found = tuple(part.shape[axis] for part in parts)
        wanted = self.sizes or found[:1] * len(found)
        if found != wanted:
            said = f"sizes is {wanted}" if self.sizes else "unequal parts need sizes=(...)"
            raise RecipeError(f"the parts have {found} elements on axis {axis}; {said}")
        return dataclasses.replace(first, recipe=recipe, shape=shape)


def _set_names(rule: Rule, field: str, names: Sequence[str]) -> None:
    # A lone string is a sequence of its letters, which nobody means.
    listed = (names,) if isinstance(names, str) else tuple(names)
    object.__setattr__(rule, field, listed)
    if len(listed) < 2 or len(set(listed)) < len(listed):
        raise RuleError(f"{rule} needs two different parts or more.")


def _set_sizes(rule: Rule, sizes: Sequence[int] | None, count: int) -> None:
    if sizes is None:
        return
    listed = tuple(int(size) for size in sizes)
    object.__setattr__(rule, "sizes", listed)
    if len(listed) != count or min(listed) < 1:
        raise RuleError(f"{rule} needs a positive size for each of its {count} parts.")
