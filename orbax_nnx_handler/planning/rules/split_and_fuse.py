"""Rules between one leaf and several: cut and joined along an axis, stacked layers, a leaf wanted twice.

Last, rules between one model and several networks, also as rules that rename each network.
"""

import dataclasses
import itertools
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, cast

from orbax_nnx_handler.planning.core import recipes
from orbax_nnx_handler.planning.core.errors import RuleError, check_kinds
from orbax_nnx_handler.planning.core.paths import Path, Tokens, shared_levels
from orbax_nnx_handler.planning.core.recipes import Recipe, RecipeError, Shapes
from orbax_nnx_handler.planning.layouts.layout import is_copy_beside, is_copy_level, words_of
from orbax_nnx_handler.planning.rules.entries import Entry, Names
from orbax_nnx_handler.planning.rules.rename import Rename
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
from orbax_nnx_handler.planning.rules.stacking import UnstackLayers, stacked
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


# What several networks of one checkpoint share.


def keys_as_names(entries: Iterable[Entry], roots: Sequence[Rename] = ()) -> tuple[Rename, ...]:
    """Returns rules under which several networks, each with params of its own, are parts of one model.

    Args:
        entries: What is stored.
        roots: Rules for the copies that are such a part; the other ones are none.
    """
    models = dict.fromkeys(entry.prefix for entry in entries if entry.section == "model")
    if len({prefix[:-1] for prefix in models}) < 2 or any(len(prefix) < 2 for prefix in models):
        return ()
    rules = {rule.pattern: rule for rule in roots}
    for prefix in models:
        if not is_copy_beside(prefix[-1], "params"):
            rules["/".join(prefix)] = Rename("/".join(prefix), "/".join(prefix[:-1]))
    stored = ("/".join(prefix) for prefix in models)
    return tuple(rules[path] for path in stored if path in rules)


def copies_as_roots(
    entries: Sequence[Entry], wanted: Iterable[Path]
) -> tuple[Collection[Names], tuple[Rename, ...]]:
    """Returns where copies of parameters lie, and rules under which they are wanted ones.

    What says the same words as a wanted copy is that, as `target_params/critic` and `critic/target_params`
    are `target_critic`; else the only one, or that with a word that no other one has.
    """
    copies, roots = _copies_in(entries), {str(path[0]) for path in wanted}
    named = [root for root in roots if is_copy_level(root) or is_copy_beside(root, "params")]
    levels = {*copies, *((*copy, part) for copy, parts in copies.items() for part in parts)}
    pairs = [(x, y) for x in levels for y in named if set[str]().union(*map(words_of, x)) == words_of(y)]
    if not pairs:
        is_one = len(copies) == len(named) == 1
        pairs = [(x, y) for x in copies for y in named if is_one or words_of(x[-1]) & words_of(y)]
    counts = Counter(itertools.chain(*pairs))
    alone = sorted((copy, root) for copy, root in pairs if counts[copy] == counts[root] == 1)
    rules = (Rename("/".join(copy), root) for copy, root in alone if len(roots) > len(alone))
    return copies.keys(), tuple(rules)


def _copies_in(entries: Iterable[Entry]) -> Mapping[Names, Collection[str]]:
    """Returns where copies of parameters lie, each with its parts.

    The copy of one of several networks lies below the name of this one: `target_params/critic`.
    """
    held: dict[Names, set[str]] = defaultdict(set)
    for entry in entries:
        if entry.section == "model" and entry.prefix:
            held[entry.prefix].add(entry.segments[0])
    copies = {prefix for prefix in held if is_copy_beside(prefix[-1], "params")}
    beside: dict[Names, set[str]] = defaultdict(set)
    for prefix in held.keys() - copies:
        beside[prefix[:-1]] |= held[prefix]
    alone = {copy for copy in copies if len(held[copy]) == 1 and held[copy] < beside[copy[:-1]]}
    found: dict[Names, Collection[str]] = {copy: held[copy] for copy in copies - alone}
    return found | {(*copy, *held[copy]): () for copy in alone}


def by_network(keys: Sequence[Rename], rules: Sequence[Rule]) -> Iterator[tuple[Rule, ...]]:
    """Yields rules that rename each network and what is in it, out of those for one model of all of them.

    Args:
        keys: The rules that made parts of one model of the networks.
        rules: They, and those behind them; nothing comes where one takes parts of two networks.
    """
    collections = {rule.replacement: rule.pattern.removeprefix(f"{rule.replacement}/") for rule in keys}
    owners, levels = dict[str, str](), set[str]()
    for rule in rules[len(keys) :]:
        if isinstance(rule, Rename | UnstackLayers):
            stored, _ = _parted(rule.pattern, dict.fromkeys(collections, ""))
            wanted, *rest = (rule.replacement if isinstance(rule, Rename) else rule.into).split("/")
            if stored and (not rest or owners.setdefault(stored, wanted) != wanted):
                return
            levels.update(rest[:1] if stored and len(rest) > 1 else ())
    # `model` beside an optimizer, or 0 of a tuple.
    for level in (*levels, "") if len(levels) == 1 else ("",):
        found: dict[object, dict[str, Rule]] = defaultdict(dict)
        for rule in rules[len(keys) :]:
            below = _below(rule, owners, collections, level)
            if below is None:
                return
            network, inner = below
            kind = type(rule), *_fields(inner)[0][1], getattr(rule, "axis", None)
            at = next(at for at in itertools.count() if network not in found[*kind, at])
            found[*kind, at][network] = inner
        yield tuple(_in_networks(owners, collections, found.values()))


def _below(
    rule: Rule, owners: Mapping[str, str], collections: Iterable[str], level: str
) -> tuple[str, Rule] | None:
    """Returns the network that a rule is about, if it is about one, and the rule below it; None for two."""
    stored = {key: (key, "") for key in collections}
    wanted = {owner: (key, level) for key, owner in owners.items()}
    networks, fields = set[str](), list[tuple[str, Sequence[str]]]()
    for name, paths in _fields(rule):
        # A rename leads from the stored names to the wanted ones.
        known = wanted | stored if name in ("pattern", "patterns") else stored | wanted
        parted = [_parted(path, {key: at for key, (_, at) in known.items()}) for path in paths]
        networks |= {known[key][0] for key, _ in parted if key}
        fields.append((name, [rest for _, rest in parted]))
    return None if len(networks) > 1 else (next(iter(networks), ""), _with_fields(rule, fields))


def _in_networks(
    owners: Mapping[str, str], collections: Mapping[str, str], found: Iterable[Mapping[str, Rule]]
) -> Iterator[Rule]:
    yield from (Rename(stored, wanted) for stored, wanted in owners.items() if stored != wanted)
    for rules in found:
        if len({*rules.values()}) == 1 and ("" in rules or len(rules) == len(collections)):
            yield next(iter(rules.values()))
            continue
        for stored in collections if "" in rules else rules:
            rule = rules.get(stored) or rules[""]
            above = f"{owners.get(stored, stored)}/{collections[stored]}"
            fields = [(name, [f"{above}/{path}" for path in paths]) for name, paths in _fields(rule)]
            yield _with_fields(rule, fields)


def _parted(path: str, above: Mapping[str, str]) -> tuple[str, str]:
    """Returns the network that a path begins with, if it does, and the rest without a level between."""
    key, _, rest = path.partition("/")
    return (key, rest.removeprefix(f"{above[key]}/")) if rest and key in above else ("", path)


def _fields(rule: Rule) -> list[tuple[str, tuple[str, ...]]]:
    """Returns the fields of a rule that hold paths, the stored ones first."""
    fields = ((name, getattr(rule, name, ())) for name in ("pattern", "patterns", "replacement", "into"))
    return [(name, (paths,) if isinstance(paths, str) else paths) for name, paths in fields if paths]


def _with_fields(rule: Rule, fields: Iterable[tuple[str, Sequence[str]]]) -> Rule:
    changes = {
        name: tuple(paths) if isinstance(getattr(rule, name), tuple) else paths[0] for name, paths in fields
    }
    return cast(Rule, dataclasses.replace(cast(Any, rule), **changes))
