"""Rules between layers one by one and layers stacked along an axis."""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property

from orbax_nnx_handler.planning import recipes
from orbax_nnx_handler.planning.entries import Entry
from orbax_nnx_handler.planning.errors import RuleError
from orbax_nnx_handler.planning.paths import canonical, parse
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
class StackLayers(Rule):
    """Layers that are stored one by one are stacked along a new axis.

    `StackLayers("Block_{i}", "blocks", axis=0)` makes `blocks/mlp/kernel` of
    `Block_0/mlp/kernel`, `Block_1/mlp/kernel`, … The layers are counted by the
    place that the result does not repeat, from 0 without a gap.

    Attributes:
        pattern: Stored segments with the place that counts.
        into: What they become.
        axis: The new axis; negative ones count from the end of the result.

    Raises:
        RuleError: Not exactly one place of the pattern is left to count by.
    """

    pattern: str
    into: str
    axis: int

    def __post_init__(self) -> None:
        check_pattern(self, self._left, self._right)
        check_places(self, self._left, self._right)
        _check_counter(self, self._left, self._right)

    @cached_property
    def _left(self) -> Pattern:
        return Pattern(self.pattern)

    @cached_property
    def _right(self) -> Pattern:
        return Pattern(self.into)

    def apply(self, entries: Sequence[Entry]) -> Applied:
        """Returns all entries after the rule; a stack takes its first layer's place."""
        counter = _counter(self._left, self._right)
        groups: dict[tuple[str, ...], dict[str, int]] = defaultdict(dict)
        for at, match in find(self._left, entries).items():
            number = match.span.bindings[counter]
            if number.isdecimal():
                groups[match.renamed(self._right)][str(int(number))] = at
        return join(self, entries, [self._join(name, layers) for name, layers in groups.items()])

    def inverse(self) -> Rule:
        """Returns the unstacking."""
        return UnstackLayers(self.into, self.pattern, self.axis)

    def _join(self, name: tuple[str, ...], layers: Mapping[str, int]) -> Join:
        numbers = sorted(map(int, layers))
        fault = "" if numbers == list(range(len(numbers))) else f"the layers are {numbers}, not 0, 1, 2, ..."
        return Join(name=name, members=tuple(layers[str(n)] for n in numbers), fault=fault, make=self._make)

    def _make(self, parts: Sequence[Entry]) -> Entry:
        first = parts[0]
        different = sorted({part.shape for part in parts})
        if len(different) > 1:
            raise RecipeError(f"the layers have different shapes: {different}")
        axis = normal_axis(self.axis, len(first.shape) + 1, first.shape)
        recipe = recipes.Stack(tuple(part.recipe for part in parts), axis)
        return dataclasses.replace(
            first, recipe=recipe, shape=(*first.shape[:axis], len(parts), *first.shape[axis:])
        )


@dataclasses.dataclass(frozen=True)
class UnstackLayers(Rule):
    """Layers that are stored stacked along an axis are taken apart.

    Attributes:
        pattern: Stored segments: `"ScanBlock_0"`.
        into: What they become, with a place for the layer's number: `"blocks/{i}"`.
        axis: The stacked axis; negative ones count from the end.

    Raises:
        RuleError: Not exactly one place of the result is left to count with.
    """

    pattern: str
    into: str
    axis: int

    def __post_init__(self) -> None:
        check_pattern(self, self._left, self._right)
        check_places(self, self._right, self._left)
        _check_counter(self, self._right, self._left)

    @cached_property
    def _left(self) -> Pattern:
        return Pattern(self.pattern)

    @cached_property
    def _right(self) -> Pattern:
        return Pattern(self.into)

    def apply(self, entries: Sequence[Entry]) -> Applied:
        """Returns all entries after the rule; the layers take their stack's place."""
        matches = find(self._left, entries)
        after, changed, bad = list[Entry](), list[Entry](), list[tuple[Entry, str]]()
        for at, entry in enumerate(entries):
            if at not in matches:
                after.append(entry)
                continue
            try:
                layers = self._layers(matches[at])
            except RecipeError as error:
                bad.append((entry, str(error)))
            else:
                after += layers
                changed += layers
        if bad:
            refuse(self, bad)
        return Applied(entries=after, matched=len(matches), changed=changed)

    def inverse(self) -> Rule:
        """Returns the stacking."""
        return StackLayers(self.into, self.pattern, self.axis)

    def _layers(self, match: Match) -> list[Entry]:
        entry, counter = match.entry, _counter(self._right, self._left)
        axis = normal_axis(self.axis, len(entry.shape), entry.shape)
        if not entry.shape[axis]:
            raise RecipeError(f"axis {axis} has no layer")
        return [
            dataclasses.replace(
                entry,
                segments=match.renamed(self._right, {**match.span.bindings, counter: str(layer)}),
                recipe=recipes.Index(entry.recipe, axis, layer),
                shape=(*entry.shape[:axis], *entry.shape[axis + 1 :]),
                fixed=(),
                named=True,
                reason=reason_of(self, entry),
            )
            for layer in range(entry.shape[axis])
        ]


@dataclasses.dataclass(frozen=True)
class ScanAxis(Rule):
    """Says along which axis the layers of a stored group are stacked, where their shapes leave it open.

    Attributes:
        group: The group's path without layer numbers, from the model's root: `"decoder/layers"`.
        axis: The stacked axis of its stored leaves, or of its wanted ones where
            only those are stacked; not negative.

    Raises:
        RuleError: The group is empty or the axis is negative.
    """

    group: str
    axis: int

    def __post_init__(self) -> None:
        if not self.tokens or self.axis < 0:
            raise RuleError(f"{self} needs a group's name and an axis counted from the front.")

    @cached_property
    def tokens(self) -> tuple[str, ...]:
        """The group's canonical path."""
        return canonical(parse(self.group))

    def apply(self, entries: Sequence[Entry]) -> Applied:
        """Returns the entries as they are: the rule is for the mapping of layer groups."""
        return Applied(entries=entries, matched=0)

    @property
    def _loss(self) -> str:
        return "it says how to read a group; StackLayers and UnstackLayers also write one"


def _counter(counting: Pattern, other: Pattern) -> str:
    return next(iter(counting.places - other.places))


def _check_counter(rule: Rule, counting: Pattern, other: Pattern) -> None:
    if len(counting.places - other.places) != 1:
        raise RuleError(f"{rule} needs exactly one place, such as {{i}}, that counts the layers.")
