"""One claim, one use (law 4): no stored element lands in two wanted leaves, no two become the same one."""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from functools import cached_property

from orbax_nnx_handler.planning.core.leaves import Shape, may_hold_layer
from orbax_nnx_handler.planning.core.paths import Path, Tokens, canonical, is_number, segments, without_box
from orbax_nnx_handler.planning.core.recipes import (
    Concat,
    Fill,
    Index,
    Read,
    Recipe,
    Slice,
    Stack,
    reads,
    shape_of,
)
from orbax_nnx_handler.planning.core.regions import Refolded, Region, cut, intersect, whole
from orbax_nnx_handler.planning.layouts.layout import FLAX_COLLECTIONS, Placement, is_copy_name, says_copy
from orbax_nnx_handler.planning.layouts.linen import AUX
from orbax_nnx_handler.planning.target.roles import Wanted
from orbax_nnx_handler.planning.verdict.elements import Chain, common_end
from orbax_nnx_handler.planning.verdict.weight_sources import PLAIN, Weights

Twice = tuple[Path, Path, Path]
"""A wanted leaf, a stored leaf that it reads, and the leaf that says otherwise."""


class Claims:
    """What the leaves of a result read.

    Attributes:
        read: Every stored leaf that is read, repeats included, in no order.
        are_plain: Whether each is read whole, or a layer of it, or with its axes turned.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Wanted, Recipe, object]],
        chains: Sequence[Chain],
        placed: Mapping[Path, Placement],
    ) -> None:
        self._sources, self._placed = sources, placed
        self.read = [path for path, _ in chains if path is not None]
        self.are_plain = len(self.read) == len(chains)
        if not self.are_plain:
            others = (source[1] for (path, _), source in zip(chains, sources, strict=True) if path is None)
            self.read += itertools.chain.from_iterable(map(reads, others))

    @cached_property
    def used(self) -> Set[Path]:
        """The stored leaves that are read."""
        return set(self.read)

    def unread(self, by_rule: Set[Path]) -> list[Path]:
        """Returns the weights that nothing reads and no rule names."""
        if len(self.used) == len(self._placed):
            return []  # Many a plan: all is read.
        left = self._placed.keys() - self.used - by_rule
        if not any(self._placed[path].section == "model" for path in left):
            return []  # Nearly every plan.
        return [path for path, item in self._placed.items() if item.section == "model" and path in left]

    def kept_aside(self, by_rule: Set[Path]) -> Iterator[Twice]:
        """Yields each wanted leaf not read from what a save kept aside under its path, layers apart."""
        aside: dict[Tokens, dict[Path, Tokens]] = defaultdict(dict)
        for path in self._placed:
            if path and path[0] == AUX:
                tokens = canonical(path[1:])
                aside[_without_layers(tokens)][path] = tokens
        # What a leaf of just its path reads is no layer of another one.
        reading = ((item, made.path) for item, made, _ in self._sources if aside and isinstance(made, Read))
        taken = {at for item, at in reading if at[:1] == (AUX,) and is_same_path(item.leaf.path, at[1:])}
        for item, recipe, _ in self._sources if aside else ():
            whole = canonical(item.leaf.path)
            name = _without_layers(whole)
            near = aside.get(name, {}).items()
            own = [path for path, at in near if path not in taken and _may_be_layers(at, whole)]
            if own and item.role != "transient":
                read = reads(recipe)
                if by_rule.isdisjoint(read) and set(read).isdisjoint(
                    [*own, *aside.get(("model", *name), ())]
                ):
                    yield item.leaf.path, read[0], own[0]

    def used_twice(self, copies: Set[Path]) -> Iterator[Twice]:
        """Yields each wanted leaf that reads an element which another one reads: with both leaves.

        Args:
            copies: Stored leaves that a rule says are wanted more than once.
        """
        if len(self.used) == len(self.read):
            return  # Nearly every plan.
        twice = {path for path, count in Counter(self.read).items() if count > 1} - copies
        users: dict[Path, list[tuple[Wanted, Recipe]]] = defaultdict(list)
        for item, recipe, _ in self._sources:
            for stored in dict.fromkeys(reads(recipe)):
                if stored in twice:
                    users[stored].append((item, recipe))
        doubtful = {
            stored: [item.leaf.path for item, _ in found]
            for stored, found in users.items()
            if len(found) > 1 and not _are_layers([recipe for _, recipe in found])
            if not _may_serve_many(self._placed[stored], [item for item, _ in found])
        }
        recipes = {item.leaf.path: recipe for item, recipe, _ in self._sources} if doubtful else {}
        shapes = {path: item.leaf.shape for path, item in self._placed.items()} if doubtful else {}
        for stored, paths in doubtful.items():
            yield from _of_one(stored, paths, recipes, shapes)

    def has_its_name(self, item: Wanted, read: Sequence[Path], other: Path) -> bool:
        """Tells whether a weight is read from its own collection, and so is what has its whole path.

        Of a model with `w` and `params/w`, the collection's `params/w` is the latter, and its `w`,
        stored as `params/w`, the former.
        """
        own, there = self._placed[read[0]], self._placed[other]
        same_place = own.collection is not None and _place(own) == _place(there)
        is_own = len(read) == 1 and same_place and item.tokens == stored_name(own)
        return is_own and (self._whole.get(stored_name(there)) == other)

    @cached_property
    def _whole(self) -> Mapping[Tokens, Path]:
        """What each weight that is read whole is read from."""
        models = (source for source in self._sources if source[0].role == "model")
        return {item.tokens: recipe.path for item, recipe, _ in models if isinstance(recipe, Read)}

    def of_two_names(self, wanted: Sequence[Wanted], unread: Sequence[Path]) -> Iterator[Twice]:
        """Yields each weight whose first level may be its collection or a module: with what it reads.

        Args:
            wanted: The target's leaves.
            unread: The stored weights that nothing reads.
        """
        same = {
            item.tokens: (item, recipe.path)
            for item, recipe, _ in self._sources
            if item.role == "model" and isinstance(recipe, Read)
            if _is_whole(item, recipe.path) and self._placed[recipe.path].collection is not None
        }
        others = {item.tokens: item for item in wanted if item.role == "model"} if same else {}
        beside = {(_place(self._placed[path]), stored_name(self._placed[path])): path for path in unread}
        for item, path in same.values():
            there = self._placed[path]
            name = stored_name(there)
            other = others.get(name) or others.get(without_box(name))
            if other is not None and (other.collection or "params") == there.collection:
                read = self._whole.get(other.tokens)
                if read is None or not _is_whole(other, read):
                    yield item.leaf.path, path, other.leaf.path
            twin = beside.get((_place(there), item.tokens)) if item.leaf.kind is not None else None
            if twin is not None and self._placed[twin].leaf.shape == item.leaf.shape:
                yield item.leaf.path, path, twin

    def claimed_twice(self, weights: Weights, unread: Sequence[Path]) -> Iterator[Twice]:
        """Yields each weight that a stored leaf beside the one it reads has the name of: with both of them.

        Args:
            weights: The names of either side, and what lies above them.
            unread: The stored weights that nothing reads.
        """
        rivals = [path for path in unread if weights.roots.get(_place(self._placed[path]))]
        if not rivals:
            return  # Nearly every plan.
        made: dict[_Place, _Made] = defaultdict(_Made)
        for item, recipe, _ in self._sources:
            read = reads(recipe) if item.role == "model" else ()
            if read:
                made[_place(self._placed[read[0]])].add(item, read[0])
        for path in rivals:
            place = _place(self._placed[path])
            for above, below in weights.roots[place]:
                name = weights.name(path)
                if name[: len(below)] == below:
                    yield from self._claims_of(path, (*above, *name[len(below) :]), made[place])

    def of_other_trees(self, by_rule: Set[Path]) -> Iterator[Twice]:
        """Yields a weight of each train state of a name of its own that some tree has all names of, too.

        Of `{"student": weights, "teacher": {"params": weights}}`, no name tells which one a bare model is.
        """
        other = (path for path, item in self._placed.items() if item.section == "other")
        beside = ((canonical(without_box(path)), path) for path in other)
        others = {tokens: path for tokens, path in beside if not any(map(says_copy, tokens))}
        networks: dict[Path, list[tuple[Wanted, Path]]] = defaultdict(list)
        for item, recipe, _ in self._sources if others else ():
            if item.role == "model" and isinstance(recipe, Read) and recipe.path not in by_rule:
                networks[self._placed[recipe.path].owner].append((item, recipe.path))
        for owner, weights in networks.items():
            item, read = weights[0]
            if {*canonical(owner)} <= {*PLAIN, *item.tokens}:
                continue
            pairs = [(item.tokens, without_box(self._placed[path].tokens)) for item, path in weights]
            names = [there[len(there) - common_end(here, there) :] for here, there in pairs]
            above = [tokens[: -len(names[0])] for tokens in others if tokens[-len(names[0]) :] == names[0]]
            found = next((at for at in above if all((*at, *name) in others for name in names)), None)
            if found is not None:
                yield item.leaf.path, read, others[*found, *names[0]]

    def _claims_of(self, path: Path, name: Tokens, made: "_Made") -> Iterator[Twice]:
        """Yields the weights that an unread leaf is, or holds as a layer, or is a layer of."""
        shape = self._placed[path].leaf.shape
        for tokens in (name, name[:-1]) if name[-1:] == ("value",) else (name,):
            for item, read in made.whole.get(tokens, ()):
                if not _is_spelt(item, self._placed[read]):
                    yield item.leaf.path, read, path
            for number, item, read in made.layers.get(tokens, ()):
                if may_hold_layer(shape, item.leaf.shape, number):
                    yield item.leaf.path, read, path
            for number, group in _groups(tokens):
                for item, read in made.whole.get(group, ()):
                    if may_hold_layer(item.leaf.shape, shape, number):
                        yield item.leaf.path, read, path


class _Made:
    """The weights of the result, with what they read.

    Attributes:
        whole: By their names.
        layers: By their names without the number of a layer, with that number.
    """

    def __init__(self) -> None:
        self.whole: dict[Tokens, list[tuple[Wanted, Path]]] = defaultdict(list)
        self.layers: dict[Tokens, list[tuple[int, Wanted, Path]]] = defaultdict(list)

    def add(self, item: Wanted, read: Path) -> None:
        self.whole[item.tokens].append((item, read))
        for number, group in _groups(item.tokens):
            self.layers[group].append((number, item, read))


class Unused:
    """Stored weights that nothing reads: what a wanted leaf without a source may be all the same.

    Attributes:
        names: Their names below the model's root, in boxes and without.
    """

    def __init__(self, leaves: Sequence[tuple[Tokens, Placement]]) -> None:
        self.names = {name for name, _ in leaves}
        self.names |= {name[:-1] for name in self.names if name[-1:] == ("value",)}
        # A copy is another value.
        self._in_own_collections = {
            name
            for name, item in leaves
            if item.collection not in (None, *FLAX_COLLECTIONS) and not is_copy_name(str(item.collection))
        }
        self._whole: dict[tuple[bool, Tokens], list[Shape]] = defaultdict(list)
        self._layers: dict[tuple[bool, Tokens], list[tuple[int, Shape]]] = defaultdict(list)
        for name, item in leaves:
            own = name in self._in_own_collections
            if own or item.collection in (None, *FLAX_COLLECTIONS):
                self._whole[own, name].append(item.leaf.shape)
                for number, group in _groups(name):
                    self._layers[own, group].append((number, item.leaf.shape))

    def may_be(self, item: Wanted, name: Tokens) -> bool:
        """Tells whether one may hold a weight: as layers, or in any collection if it has no type."""
        # Below levels that the target alone has, of which nothing tells which is the stored network.
        ends = (name[at:] for at in range(1, len(name) - 1))
        is_below = any(item.leaf.shape in self._whole.get((False, end), ()) for end in ends)
        if is_below or (item.leaf.kind is None and name in self._in_own_collections):
            return True
        return any(self._may_hold(item.leaf.shape, name, own) for own in (False, item.leaf.kind is None))

    def _may_hold(self, shape: Shape, name: Tokens, own: bool) -> bool:
        """Tells whether a weight may be a layer or a stack of these, whatever the order of its other axes."""
        whole, layers = self._whole, self._layers.get((own, name), ())
        stacks = [(stack, at) for at, group in _groups(name) for stack in whole.get((own, group), ())]
        is_layer = any(_holds_in_any_order(stack, shape, number) for stack, number in stacks)
        return is_layer or any(_holds_in_any_order(shape, layer, number) for number, layer in layers)


def _holds_in_any_order(stack: Shape, layer: Shape, number: int) -> bool:
    sizes = (sorted((*stack[:at], *stack[at + 1 :])) for at, size in enumerate(stack) if number < size)
    return sorted(layer) in sizes


_Place = tuple[Path, str | None]
"""The owner and the collection of a stored leaf."""


def _is_whole(item: Wanted, stored: Path) -> bool:
    """Tells whether a stored leaf has a wanted leaf's whole path, in a box or without."""
    name = canonical(segments(stored))
    return item.tokens in (name, without_box(name))


def stored_name(item: Placement) -> Tokens:
    """Returns the name of a stored leaf below its collection, with its train state's."""
    return canonical(item.owner) + item.tokens


def _place(placement: Placement) -> _Place:
    return placement.owner, placement.collection


def _groups(tokens: Tokens) -> Iterator[tuple[int, Tokens]]:
    """Yields each number that counts layers in a name, and the name without it."""
    for at, token in enumerate(tokens[:-1]):
        if at and is_number(token):
            yield int(token[1:]), (*tokens[:at], *tokens[at + 1 :])


def _is_spelt(item: Wanted, read: Placement) -> bool:
    """Tells whether a leaf is read from that of its very spelling: `layers/0` is not `layers_0` (law 5)."""
    here, there = segments(item.path), segments(read.path)
    there = there[:-1] if there[-1] == "value" and here[-1] != "value" else there
    common = min(len(here), len(there))
    return here[-common:] == there[-common:]


def _may_serve_many(placement: Placement, users: Sequence[Wanted]) -> bool:
    """Tells whether a leaf is one step beside the counts of its optimizer, or what stands for no moment."""
    steps = sum(item.role != "optimizer" for item in users)
    return placement.is_unused or (placement.section == "step" and steps < 2)


def _are_layers(recipes: Sequence[Recipe]) -> bool:
    """Tells whether each of these recipes takes another layer of one leaf, along one axis."""
    taken = [
        (recipe.axis, recipe.index)
        for recipe in recipes
        if isinstance(recipe, Index) and isinstance(recipe.source, Read)
    ]
    axes, numbers = {axis for axis, _ in taken}, {number for _, number in taken}
    return len(axes) == 1 and len(numbers) == len(recipes)


def _of_one(
    stored: Path, paths: Sequence[Path], recipes: Mapping[Path, Recipe], shapes: Mapping[Path, Shape]
) -> Iterator[tuple[Path, Path, Path]]:
    taken = [(region, path) for path in paths for region in _regions(recipes[path], stored, shapes)]
    if _lie_in_a_row(taken, whole(shapes[stored])):
        return
    for at, (region, path) in enumerate(taken):
        for used, other in taken[:at]:
            if other == path or not intersect(used, region):
                continue
            if not _are_parts(recipes[path], recipes[other], stored):
                yield path, stored, other
                break


def _lie_in_a_row(taken: Sequence[tuple[Region, Path]], full: Region) -> bool:
    """Tells whether all rectangles are cut along one axis and none overlaps the next, as layers are."""
    axes = {axis for region, _ in taken for axis, part in enumerate(region) if part != full[axis]}
    if len(axes) != 1:
        return False
    (axis,) = axes
    parts = sorted(region[axis] for region, _ in taken)
    return all(one[1] <= other[0] for one, other in itertools.pairwise(parts))


def _are_parts(one: Recipe, other: Recipe, stored: Path) -> bool:
    """Tells whether two recipes read different parts of what they both make of a stored leaf first.

    Exact also below a reshape, where rectangles of the stored leaf say too much.
    """
    return all(_diverge(left, right) for left in _steps(one, stored) for right in _steps(other, stored))


def _diverge(left: Sequence[Recipe], right: Sequence[Recipe]) -> bool:
    first = next((pair for pair in zip(left, right, strict=False) if pair[0] != pair[1]), None)
    if first is None or not all(isinstance(step, Index | Slice) for step in first):
        return False
    (one, from_one, to_one), (other, from_other, to_other) = map(_range, first)
    return one == other and (to_one <= from_other or to_other <= from_one)


def _range(step: Recipe) -> tuple[int, int, int]:
    """Returns axis, first and end of what a step takes."""
    if isinstance(step, Slice):
        return step.axis, step.start, step.start + step.size
    return (step.axis, step.index, step.index + 1) if isinstance(step, Index) else (-1, 0, 0)


def _steps(recipe: Recipe, stored: Path) -> Iterator[tuple[Recipe, ...]]:
    """Yields what is done to each occurrence of a stored leaf, from the leaf on, up to where it is joined."""
    done: list[Recipe] = []
    while not isinstance(recipe, Read | Fill | Stack | Concat):
        done.insert(0, recipe)
        recipe = recipe.source
    if isinstance(recipe, Stack | Concat):
        for part in recipe.sources:
            yield from _steps(part, stored)
    elif isinstance(recipe, Read) and recipe.path == stored:
        yield (recipe, *done)


def _regions(recipe: Recipe, stored: Path, shapes: Mapping[Path, Shape]) -> Iterator[Region]:
    """Yields the rectangles of a stored leaf that a recipe reads."""
    full = whole(shapes[stored])
    match recipe:
        case Read():
            yield full
        case Index(source=Read(), axis=axis, index=index):
            yield (*full[:axis], (index, index + 1), *full[axis + 1 :])
        case Stack() | Concat():
            for part in recipe.sources:
                if stored in reads(part):
                    yield from _regions(part, stored, shapes)
        case _:
            yield from _cut(recipe, whole(shape_of(recipe, shapes)), stored, shapes)


def _cut(recipe: Recipe, region: Region, stored: Path, shapes: Mapping[Path, Shape]) -> Iterator[Region]:
    for piece in cut(recipe, region, shapes):
        if isinstance(piece.source, Refolded):
            yield from _cut(piece.source.recipe, piece.source.region, stored, shapes)
        elif piece.source == stored:
            yield piece.source_region


def _may_be_layers(one: Tokens, other: Tokens) -> bool:
    """Tells whether two names that differ in numbers may be layers in a list, and the stack of them.

    Where both have as many numbers it is another layer, or another member of a tuple.
    """
    pairs = zip(_numbers(one), _numbers(other), strict=True)
    return all(left == right or len(left) != len(right) for left, right in pairs)


def _numbers(tokens: Tokens) -> list[Tokens]:
    """Returns the numbers in front of each word of a name."""
    found: list[Tokens] = [()]
    for token in tokens:
        if token[:1] == "#":
            found[-1] = (*found[-1], token)
        else:
            found.append(())
    return found


def _without_layers(tokens: Tokens) -> Tokens:
    return tuple(token for token in tokens if token[:1] != "#")


def is_same_path(wanted: Path, stored: Path) -> bool:
    """Tells whether two paths have the same keys, as they are spelt or by segments."""
    if wanted == stored:
        return True
    # By segments: Orbax writes a tuple key of a normalising wrapper as its text.
    here, there = canonical(segments(wanted)), canonical(segments(stored))
    return here == there or (there[-1:] == ("value",) and here == there[:-1])
