"""Rules that stack layers, take stacks apart, say which axis a scan used, or use a leaf twice."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from functools import cached_property

from orbax_nnx_handler.planning.core import recipes
from orbax_nnx_handler.planning.core.errors import RuleError, check_kinds
from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.paths import Tokens, canonical, is_index, parse
from orbax_nnx_handler.planning.core.recipes import RecipeError
from orbax_nnx_handler.planning.rules.entries import Entry
from orbax_nnx_handler.planning.rules.rule import (
    Applied,
    Join,
    Match,
    Pattern,
    Rule,
    Span,
    check_pattern,
    check_places,
    find,
    join,
    normal_axis,
    replace_each,
)
from orbax_nnx_handler.planning.rules.values import Drop


@dataclasses.dataclass(frozen=True)
class _Named(Rule):
    """A rule with one pattern on either side."""

    pattern: str
    into: str

    @cached_property
    def _left(self) -> Pattern:
        return Pattern(self.pattern)

    @cached_property
    def _right(self) -> Pattern:
        return Pattern(self.into)


@dataclasses.dataclass(frozen=True)
class StackLayers(_Named):
    """Layers that are stored one by one are stacked along a new axis.

    The layers are counted by the place that the result does not repeat, from 0 without a gap.

    ```python
    renames = [StackLayers("Block_{i}", "blocks", axis=0)]  # 12 of (512, 512) into (12, 512, 512)
    ```

    Attributes:
        pattern: Stored segments with the place that counts.
        into: What they become.
        axis: The new axis; negative ones count from the end of the result.

    Raises:
        RuleError: Not exactly one place of the pattern is left to count by.
    """

    axis: int

    def __post_init__(self) -> None:
        check_kinds(self)
        check_pattern(self, self._left, self._right)
        check_places(self, self._left, self._right)
        _check_counter(self, self._left, self._right)

    def apply(self, entries: Sequence[Entry]) -> Applied:
        """Returns all entries after the rule; a stack takes its first layer's place."""
        counter = _counter(self._left, self._right)
        groups: dict[tuple[str, ...], list[tuple[int, int]]] = defaultdict(list)
        named: dict[tuple[str, ...], Entry] = {}

        def is_layer(span: Span) -> bool:
            return is_index(span.bindings[counter])  # `{i}` alone matches every name.

        for at, match in find(self._left, entries, accepts=is_layer).items():
            name = match.renamed(self._right)
            named.setdefault(name.whole, name)
            groups[name.whole].append((int(match.span.bindings[counter]), at))
        return join(self, entries, [self._join(named[whole], layers) for whole, layers in groups.items()])

    def inverse(self) -> Rule:
        """Returns the unstacking."""
        return UnstackLayers(self.into, self.pattern, self.axis)

    def _join(self, name: Entry, layers: Sequence[tuple[int, int]]) -> Join:
        ordered = sorted(layers)
        numbers = [number for number, _ in ordered]
        fault = "" if numbers == list(range(len(numbers))) else f"the layers are {numbers}, not 0, 1, 2, ..."
        return Join(name=name, members=tuple(at for _, at in ordered), fault=fault, make=self._make)

    def _make(self, parts: Sequence[Entry]) -> Entry:
        return stacked(parts, self.axis, "layers")


def stacked(parts: Sequence[Entry], axis: int, what: str) -> Entry:
    """Returns entries side by side along a new axis.

    Raises:
        RecipeError: Their shapes differ, or the result has no such axis.
    """
    first = parts[0]
    different = sorted({part.shape for part in parts})
    if len(different) > 1:
        raise RecipeError(f"the {what} have different shapes: {different}")
    axis = normal_axis(axis, len(first.shape) + 1, first.shape)
    recipe = recipes.Stack(tuple(part.recipe for part in parts), axis)
    shape = (*first.shape[:axis], len(parts), *first.shape[axis:])
    return dataclasses.replace(first, recipe=recipe, shape=shape)


@dataclasses.dataclass(frozen=True)
class UnstackLayers(_Named):
    """Layers that are stored stacked along an axis are taken apart.

    ```python
    renames = [UnstackLayers("ScanBlock_0", "blocks/{i}", axis=0)]  # (12, 512, 512) into 12 of (512, 512)
    ```

    Attributes:
        pattern: Stored segments: `"ScanBlock_0"`.
        into: What they become, with a place for the layer's number: `"blocks/{i}"`.
        axis: The stacked axis; negative ones count from the end.

    Raises:
        RuleError: Not exactly one place of the result is left to count with.
    """

    axis: int

    def __post_init__(self) -> None:
        check_kinds(self)
        check_pattern(self, self._left, self._right)
        check_places(self, self._right, self._left)
        _check_counter(self, self._right, self._left)

    def apply(self, entries: Sequence[Entry]) -> Applied:
        """Returns all entries after the rule; the layers take their stack's place."""
        return replace_each(self, self._left, entries, self._layers)

    def inverse(self) -> Rule:
        """Returns the stacking."""
        return StackLayers(self.into, self.pattern, self.axis)

    def _layers(self, match: Match) -> list[Entry]:
        entry, counter = match.entry, _counter(self._right, self._left)
        axis = normal_axis(self.axis, len(entry.shape), entry.shape)
        if not entry.shape[axis]:
            raise RecipeError(f"axis {axis} has no layer")
        return [
            match.made_by(
                self,
                self._right,
                {**match.span.bindings, counter: str(layer)},
                recipe=recipes.Index(entry.recipe, axis, layer),
                shape=(*entry.shape[:axis], *entry.shape[axis + 1 :]),
            )
            for layer in range(entry.shape[axis])
        ]


_MOST_TRIED = 4


def stacking_otherwise(
    given: Sequence[Rule], axes: Iterable[int]
) -> Iterable[tuple[Sequence[StackLayers | UnstackLayers], Mapping[int | None, Sequence[Rule]]]]:
    """Yields rules of layers, with all rules as they are where these name an axis or come first (None)."""
    said = [rule for rule in given if isinstance(rule, StackLayers | UnstackLayers)][:_MOST_TRIED]
    alone = [[rule] for rule in said]
    # One wrong axis of two may leave parts that nothing wants: then only both together help.
    for rules in [*alone, said] if len(said) > 1 else alone:
        first = [*rules, *(each for each in given if each not in rules)]
        tried: dict[int | None, Sequence[Rule]] = {None: first} if first != [*given] else {}
        for axis in axes:
            new: dict[Rule, Rule] = {rule: dataclasses.replace(rule, axis=axis) for rule in rules}
            tried[axis] = [new.get(rule, rule) for rule in given]
        yield rules, tried


@dataclasses.dataclass(frozen=True)
class ScanAxis(Rule):
    """Says along which axis the layers of a stored group are stacked, where their shapes leave it open.

    Flax stacks each collection along an axis of its own (`variable_axes` of `nn.scan`), so a rule is for
    the parameters, or for the one collection that it names.

    ```python
    renames = [ScanAxis("decoder/layers", 1), ScanAxis("batch_stats/decoder/layers", 0)]
    ```

    Attributes:
        group: The group's path without layer numbers, from the model's root: `"decoder/layers"`; of
            another collection than `params` with its name in front, and of one of several networks with
            the network's, `"gen/layers"` or `"gen/params/layers"`.
        axis: The stacked axis of its stored leaves, or of its wanted ones where
            only those are stacked; not negative.

    Raises:
        RuleError: The group is empty or the axis is negative.
    """

    group: str
    axis: int

    def __post_init__(self) -> None:
        check_kinds(self)
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


@dataclasses.dataclass(frozen=True)
class Copy(_Named):
    """Every leaf that matches becomes another wanted leaf as well.

    For a program that uses its embedding as output layer and a model that has a head. Only this
    rule lets one stored leaf become two wanted ones. Moments follow on both sides. Saved with the same
    rules, both are stored as the one leaf that they were: they must be equal still, or the save is refused,
    since one of them would be lost.

    ```python
    renames = [Copy("embed/embedding", "head/kernel"), Transpose("head/kernel", (1, 0))]
    ```

    Attributes:
        pattern: Stored segments, as in `Rename`.
        into: What they become in the copy; the leaf itself keeps its name.

    Raises:
        RuleError: A pattern is empty, both are the same, or the copy repeats a place that
            the pattern lacks.
    """

    def __post_init__(self) -> None:
        check_kinds(self)
        check_pattern(self, self._left, self._right)
        check_places(self, self._left, self._right)
        if self.pattern == self.into:
            raise RuleError(f"{self} needs another name for the copy.")

    def apply(self, entries: Sequence[Entry]) -> Applied:
        """Returns all entries after the rule, each copy behind its leaf."""
        return replace_each(
            self, self._left, entries, lambda match: [match.entry, match.made_by(self, self._right)]
        )

    def inverse(self) -> Rule:
        """Returns the rule that leaves the copy behind; a save compares it with its leaf first."""
        return Drop(self.into, f"a copy of {self.pattern}")


def whole_parts(used: Set[Tokens], held: Iterable[Tokens], depth: int) -> Iterable[Tokens]:
    """Yields the paths within a module, from some depth on, of its largest parts that are used whole."""
    pending: list[Tokens] = [()]
    for below in pending:
        inside = [names for names in held if names[depth : depth + len(below)] == below]
        if all(names in used for names in inside):
            yield below
        elif any(names in used for names in inside):
            pending += dict.fromkeys(names[depth : depth + len(below) + 1] for names in sorted(inside))


def stacked_in_parts(
    rule: StackLayers, used: Set[Tokens], held: Iterable[Tokens]
) -> Iterator[tuple[StackLayers, Tokens]]:
    """Yields the rules that stack the parts which all layers hold, where one of them lacks another.

    Args:
        rule: The rule for whole layers, which does not fit.
        used: The paths that it is about.
        held: All paths within the layers.
    """
    depth = len(parse(rule.pattern))
    for below in whole_parts(used, held, depth):
        pattern, into = ("/".join((*parse(path), *below)) for path in (rule.pattern, rule.into))
        yield StackLayers(pattern, into, rule.axis), below


def nested_stacks(
    entries: Iterable[Entry], wanted: Iterable[tuple[Tokens, Shape]]
) -> Iterator[UnstackLayers]:
    """Yields rules for stacks of layers that hold stacks of parts, where the target has lists of lists.

    All that lies in the stack has one axis as long as the list, and is as large as it: `layers` with experts
    in `layers/moe/experts`, of which `blocks/{0..23}/moe/experts/{0..7}` is made.

    Args:
        entries: The stored model.
        wanted: The paths and shapes of the wanted leaves.
    """
    lists: dict[Tokens, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    inner: dict[Tokens, set[str]] = defaultdict(set)
    for names, shape in wanted:
        counted = [at for at, name in enumerate(names) if name.isdecimal()]
        if counted:
            lists[names[: counted[0]]][names[counted[0]]] += math.prod(shape)
            inner[names[: counted[0]]].update(names[at] for at in counted[1:2])
    below: dict[Tokens, list[Shape]] = defaultdict(list)
    for entry in entries:
        for at in range(1, len(entry.segments)):
            below[entry.segments[:at]].append(entry.shape)
    done = set[Tokens]()
    for above, sizes in lists.items():
        count, total = len(sizes), sum(sizes.values())
        if not inner[above] or sorted(map(int, sizes)) != [*range(count)] or count < 2:
            continue
        for module, shapes in sorted(below.items(), key=lambda item: len(item[0])):
            is_it = sum(map(math.prod, shapes)) == total and not any(
                module[:at] in done for at in range(len(module))
            )
            axes = range(min(map(len, shapes)) if is_it else 0)
            axes = [axis for axis in axes if all(shape[axis] == count for shape in shapes)]
            if len(axes) == 1:
                done.add(module)
                yield UnstackLayers("/".join(module), "/".join((*above, "{i}")), axes[0])
