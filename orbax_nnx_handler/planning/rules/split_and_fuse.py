"""Rules between one leaf and several: cut and joined along an axis, stacked layers, a leaf wanted twice."""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property

from orbax_nnx_handler.planning.core import recipes
from orbax_nnx_handler.planning.core.errors import RuleError, check_kinds
from orbax_nnx_handler.planning.core.paths import Path, Tokens, shared_levels
from orbax_nnx_handler.planning.core.recipes import Recipe, RecipeError, Shapes
from orbax_nnx_handler.planning.rules.entries import Entry
from orbax_nnx_handler.planning.rules.rule import (
    Applied,
    Join,
    Match,
    Pattern,
    Rule,
    check_pattern,
    check_places,
    find,
    join,
    normal_axis,
    replace_each,
)
from orbax_nnx_handler.planning.rules.stacking import stacked
from orbax_nnx_handler.planning.rules.values import Reshape, Transpose


@dataclasses.dataclass(frozen=True)
class Split(Rule):
    """Every leaf that matches is cut along an axis into several.

    Where each part is one element, `drop_axis=True` takes the axis away.

    ```python
    renames = [
        Split("qkv", ("query", "key", "value"), axis=1),  # (512, 1536) into three of (512, 512)
        Split("gating_einsum", ("gate", "up"), axis=0, drop_axis=True),  # (2, 512, 2048) into two matrices
    ]
    ```

    Attributes:
        pattern: Stored segments, as in `Rename`.
        into: What the segments become, one for each part, in order.
        axis: The axis; negative ones count from the end.
        sizes: Elements of each part along the axis; equal parts if None.
        drop_axis: Whether parts of one element lose the axis.

    Raises:
        RuleError: A pattern is empty or repeated, or names a place that is not bound; the
            axis is to be dropped from parts of several elements.
    """

    pattern: str
    into: tuple[str, ...]
    axis: int
    sizes: tuple[int, ...] | None = None
    drop_axis: bool = False

    def __post_init__(self) -> None:
        _set_parts(self, "into", self.drop_axis)
        check_pattern(self, self._left, *self._parts)
        for part in self._parts:
            check_places(self, self._left, part)

    def __repr__(self) -> str:
        return _written(self, "drop_axis")

    @cached_property
    def _left(self) -> Pattern:
        return Pattern(self.pattern)

    @cached_property
    def _parts(self) -> tuple[Pattern, ...]:
        return tuple(Pattern(part) for part in self.into)

    def apply(self, entries: Sequence[Entry]) -> Applied:
        """Returns all entries after the rule; the parts take their leaf's place."""
        return replace_each(self, self._left, entries, self._cut)

    def inverse(self) -> Rule:
        """Returns the fuse of the parts."""
        if any(part.places != self._left.places for part in self._parts):
            return super().inverse()
        return Fuse(self.into, self.pattern, self.axis, self.sizes, new_axis=self.drop_axis)

    @property
    def _loss(self) -> str:
        return f"its parts do not each hold every part that {self.pattern!r} leaves open"

    def _cut(self, match: Match) -> list[Entry]:
        entry = match.entry
        axis = normal_axis(self.axis, len(entry.shape), entry.shape)
        alike = 1 if self.drop_axis else entry.shape[axis] // len(self.into)
        sizes = self.sizes or (alike,) * len(self.into)
        if sum(sizes) != entry.shape[axis]:
            single = f"{len(self.into)} parts of one element"
            parts = single if self.drop_axis else f"{len(self.into)} equal parts"
            parts = f"sizes {sizes}" if self.sizes else parts
            raise RecipeError(f"axis {axis} has {entry.shape[axis]} elements, which are not {parts}")
        starts = [sum(sizes[:at]) for at in range(len(sizes))]
        return [
            match.made_by(
                self,
                part,
                recipe=recipes.Index(entry.recipe, axis, start)
                if self.drop_axis
                else recipes.Slice(entry.recipe, axis, start, size),
                shape=(*entry.shape[:axis], *(() if self.drop_axis else (size,)), *entry.shape[axis + 1 :]),
            )
            for part, start, size in zip(self._parts, starts, sizes, strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class Fuse(Rule):
    """Several leaves are joined end to end along an axis.

    With `new_axis=True` they are put side by side along an axis of their own, as `numpy.stack` does.

    ```python
    renames = [Fuse(("query", "key", "value"), "qkv", axis=1)]  # kernels into one, biases into one
    ```

    Attributes:
        patterns: Stored segments of each part, in the order in which they are joined.
        into: What they become.
        axis: The axis; negative ones count from the end.
        sizes: Elements of each part along the axis; equal parts if None.
        new_axis: Whether the axis is a new one, along which each part is one element.

    Raises:
        RuleError: A pattern is empty or repeated, or names a place that is not bound; sizes
            are given for a new axis.
    """

    patterns: tuple[str, ...]
    into: str
    axis: int
    sizes: tuple[int, ...] | None = None
    new_axis: bool = False

    def __post_init__(self) -> None:
        _set_parts(self, "patterns", self.new_axis)
        check_pattern(self, *self._parts, self._right)
        for part in self._parts:
            check_places(self, part, self._right)

    def __repr__(self) -> str:
        return _written(self, "new_axis")

    @cached_property
    def _parts(self) -> tuple[Pattern, ...]:
        return tuple(Pattern(pattern) for pattern in self.patterns)

    @cached_property
    def _right(self) -> Pattern:
        return Pattern(self.into)

    def apply(self, entries: Sequence[Entry]) -> Applied:
        """Returns all entries after the rule; what is joined takes the first part's place."""
        groups: dict[tuple[str, ...], dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        named: dict[tuple[str, ...], Entry] = {}
        for order, part in enumerate(self._parts):
            for at, match in find(part, entries).items():
                name = match.renamed(self._right)
                named.setdefault(name.whole, name)
                groups[name.whole][order].append(at)
        joins = [self._join(named[whole], places, entries) for whole, places in groups.items()]
        return join(self, entries, joins)

    def inverse(self) -> Rule:
        """Returns the split into the parts."""
        if any(part.places != self._right.places for part in self._parts):
            return super().inverse()
        return Split(self.into, self.patterns, self.axis, self.sizes, drop_axis=self.new_axis)

    @property
    def _loss(self) -> str:
        return f"{self.into!r} does not hold every part that its patterns leave open"

    def _join(self, name: Entry, places: Mapping[int, Sequence[int]], entries: Sequence[Entry]) -> Join:
        absent = [self.patterns[order] for order in range(len(self.patterns)) if order not in places]
        several = [at for found in places.values() for at in found if len(found) > 1]
        fault = f"{', '.join(map(repr, absent))} is not there" if absent else ""
        if several:
            listed = ", ".join("/".join(entries[at].segments) for at in several)
            fault = f"a part is there more than once: {listed}"
        members = tuple(places[order][0] for order in sorted(places))
        return Join(name=name, members=members, fault=fault, make=self._make)

    def _make(self, parts: Sequence[Entry]) -> Entry:
        if self.new_axis:
            return stacked(parts, self.axis, "parts")
        first = parts[0]
        axis = normal_axis(self.axis, len(first.shape), first.shape)
        recipe = recipes.Concat(tuple(part.recipe for part in parts), axis)
        keys: list[Path] = [("(part)", at) for at in range(len(parts))]
        shapes = {key: part.shape for key, part in zip(keys, parts, strict=True)}
        shape = recipes.shape_of(recipes.Concat(tuple(recipes.Read(key) for key in keys), axis), shapes)
        found = tuple(part.shape[axis] for part in parts)
        wanted = self.sizes or found[:1] * len(found)
        if found != wanted:
            said = f"sizes is {wanted}" if self.sizes else f"unequal parts need sizes={found}"
            raise RecipeError(f"the parts have {found} elements on axis {axis}; {said}")
        return dataclasses.replace(first, recipe=recipe, shape=shape)


def _set_parts(rule: "Split | Fuse", field: str, is_single: bool) -> None:
    """Raises where the parts' names and sizes do not fit together."""
    check_kinds(rule)
    listed = getattr(rule, field)
    if len(listed) < 2:
        raise RuleError(f"{rule} needs two different parts or more.")
    if twice := next((part for part in listed if listed.count(part) > 1), None):
        copy = (
            [f"put Copy({twice!r}, name) in front of it, and name the copy."] if field == "patterns" else []
        )
        raise RuleError(f"{rule} names the part {twice!r} twice.", hints=copy)
    if rule.sizes is None:
        return
    if len(rule.sizes) != len(listed) or min(rule.sizes) < 1:
        raise RuleError(f"{rule} needs a positive size for each of its {len(listed)} parts.")
    if is_single:
        raise RuleError(f"{rule} has parts of one element, so it takes no sizes.")


def _written(rule: "Split | Fuse", last: str) -> str:
    """Returns the call that makes a rule, without its last field where that is not set."""
    fields = [field.name for field in dataclasses.fields(rule) if field.name != last or getattr(rule, last)]
    return f"{type(rule).__name__}({', '.join(f'{name}={getattr(rule, name)!r}' for name in fields)})"


def cut_alike(parts: Sequence[Tokens], whole: Tokens, kept: int) -> tuple[list[Tokens], Tokens]:
    """Cuts what all paths share at their beginning; a kernel and a bias lie along other axes."""
    before = max(len(shared_levels([*parts, whole], own=1)) - kept, 0)
    return [path[before:] for path in parts], whole[before:]


def rules_making(
    recipe: Recipe, now: Recipe, name: str, shapes: Shapes, layers: int | None = None
) -> tuple[Rule, ...] | None:
    """Returns the rules that make a leaf by a recipe out of what it is made by now; None where none say it.

    Args:
        recipe: How it is to be made: `now`, its axes in another order, divided otherwise, or its parts so.
        now: How it is made.
        name: What it is called, as a pattern.
        shapes: The stored shapes.
        layers: How many layers lie in front of it, of which both make one; None where they make all.
    """
    before, front = ((), 0) if layers is None else ((layers,), 1)
    if recipe == now:
        return ()
    if isinstance(recipe, recipes.Concat):
        return _rejoining(recipe, now, name, shapes, layers)
    if isinstance(recipe, recipes.Reshape):
        shape = recipes.shape_of(recipe.source, shapes)
        step: Rule = Reshape(name, (*before, *recipe.shape), (*before, *shape))
    elif isinstance(recipe, recipes.Transpose):
        step = Transpose(name, (*range(front), *(axis + front for axis in recipe.permutation)))
    else:
        return None
    earlier = rules_making(recipe.source, now, name, shapes, layers)
    return None if earlier is None else (*earlier, step)


def _rejoining(
    joint: recipes.Concat, now: Recipe, name: str, shapes: Shapes, layers: int | None
) -> tuple[Rule, ...] | None:
    """Returns the rules that cut a leaf into parts, arrange each, and join them again."""
    cuts = list[recipes.Slice]()
    for part in joint.sources:
        while isinstance(part, recipes.Reshape | recipes.Transpose):
            part = part.source
        if not isinstance(part, recipes.Slice) or part.start != sum(cut.size for cut in cuts):
            return None
        cuts.append(part)
    if len({(cut.source, cut.axis) for cut in cuts}) > 1:
        return None
    made = [rules_making(cuts[0].source, now, name, shapes, layers)]
    names = tuple(f"{name}_{number}" for number, _ in enumerate(cuts))
    made += [
        rules_making(part, cut, own, shapes, layers)
        for part, cut, own in zip(joint.sources, cuts, names, strict=True)
    ]
    if None in made:
        return None
    front = 0 if layers is None else 1
    sizes = [
        tuple(recipes.shape_of(part, shapes)[axis] for part in some)
        for some, axis in ((cuts, cuts[0].axis), (joint.sources, joint.axis))
    ]
    split = Split(name, names, axis=cuts[0].axis + front, sizes=sizes[0])
    fuse = Fuse(names, name, axis=joint.axis + front, sizes=sizes[1])
    whole, *parts = [rules for rules in made if rules is not None]
    return (*whole, split, *(rule for rules in parts for rule in rules), fuse)
