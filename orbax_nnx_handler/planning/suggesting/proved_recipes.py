"""Recipes of the same elements in another order, which outputs may prove; and links remade by those."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, TypeGuard, cast

from orbax_nnx_handler.planning.core import recipes
from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.paths import Path, canonical, is_number, segments
from orbax_nnx_handler.planning.core.recipes import (
    Add,
    Concat,
    Recipe,
    Reshape,
    Scale,
    Shapes,
    Slice,
    Stack,
    Transpose,
    children,
    reads,
    shape_of,
    simplify,
)
from orbax_nnx_handler.planning.likeness.links import Link
from orbax_nnx_handler.planning.likeness.module_parts import Leaf
from orbax_nnx_handler.planning.likeness.shapes import Joint, Way, chain_of, cuts_of, lifted, shaping
from orbax_nnx_handler.planning.likeness.vocabulary import concepts
from orbax_nnx_handler.planning.rules.entries import Entry, from_entries


@dataclasses.dataclass(frozen=True, kw_only=True)
class Remade:
    """A wanted leaf that is made otherwise than was thought; the layer is told where it is scanned."""

    leaf: Path
    layer: int | None
    recipe: Recipe


def remade_links(
    links: Sequence[Link], changes: Sequence[Remade], shapes: Shapes, others: Sequence[Link] = ()
) -> list[Link]:
    """Returns links under which some leaves are made otherwise, and those alike in other layers too.

    A change that moves weights from one module to another changes its own leaf alone, and one that no
    link can say changes none, if it is none of the others, which make a leaf of a stored one as it is.
    """
    linked = {leaf.source for link in links for leaf in link.wanted}
    links = [*links, *(link for link in others if link.target.source not in linked)]
    found, settled, every = list(links), set[int](), [*links, *others]
    for change in changes:
        for at, link in enumerate(found):
            # Among the links as they were: two that change places are still known.
            if (other := _remade(link, change, every, shapes)) is None:
                continue
            settled.add(at)
            order = [link.stored.index(leaf) for leaf in other.stored if leaf in link.stored]
            for to, like in enumerate(found):
                if to not in settled and len(order) == len(link.stored) and _looks(like) == _looks(link):
                    stored = tuple(like.stored[number] for number in order)
                    found[to] = dataclasses.replace(
                        like, stored=stored, ways=other.ways, joint=other.joint, after=other.after
                    )
            found[at] = other
            break
    return found


def remade_behind(
    links: Sequence[Link],
    changes: Sequence[Remade],
    sides: tuple[Sequence[Leaf], Sequence[Leaf]],
    entries: Iterable[Entry],
    shapes: Shapes,
) -> list[Link]:
    """Returns links under which leaves are made otherwise, what rules made before as if it were stored."""
    made = {("", *x.segments): x for x in entries if not isinstance(x.recipe, recipes.Read)}
    names = {entry.recipe: path for path, entry in made.items()}

    def behind(leaf: Leaf) -> Leaf:
        return dataclasses.replace(leaf, source=path) if (path := ("", *leaf.names)) in made else leaf

    every = [dataclasses.replace(x, stored=tuple(map(behind, x.stored))) for x in links] if made else links
    others = [dataclasses.replace(x, recipe=from_entries(x.recipe, names)) for x in changes]
    asis = _as_they_are(changes, *({leaf.source: leaf for leaf in side} for side in sides))
    return remade_links(every, others, {**shapes, **{path: x.shape for path, x in made.items()}}, asis)


def _as_they_are(
    changes: Sequence[Remade], ours: Mapping[Path, Leaf], theirs: Mapping[Path, Leaf]
) -> list[Link]:
    """Returns links that make leaves of stored ones as they are, for the changes that say so."""
    pairs = ((x.leaf, x.recipe.path) for x in changes if isinstance(x.recipe, recipes.Read))
    known = [(ours[leaf], theirs[path]) for leaf, path in pairs if leaf in ours and path in theirs]
    ways = ((Way(()),),)
    return [
        Link(wanted=(x,), stored=(y,), grounds="order", ways=ways) for x, y in known if x.shape == y.shape
    ]


def _looks(link: Link) -> tuple[object, ...]:
    """Returns what the links of one leaf in all layers share."""
    sides = ([_template(leaf) for leaf in side] for side in (link.wanted, link.stored))
    return link.ways, link.joint, link.after, *sides


def _template(leaf: Leaf) -> tuple[str, ...]:
    return tuple(token for token in canonical(leaf.names) if not is_number(token))


def _remade(link: Link, change: Remade, every: Sequence[Link], shapes: Shapes) -> Link | None:
    part = next((at for at, leaf in enumerate(link.wanted) if leaf.source == change.leaf), None)
    layers = link.layers
    if part is None or link.source.made or not shapes.keys() >= {*recipes.reads(change.recipe)}:
        return None
    if layers is not None and layers.stacks and change.layer not in (None, link.layer):
        return None
    whole, after = chain_of(change.recipe)
    if isinstance(whole, recipes.Concat | recipes.Stack):
        return _rejoined(link, whole, after, shapes)
    if link.joint is not None and not link.is_split:
        return None
    steps = shaping(after, shapes)
    cuts, source = cuts_of(whole)
    if source is None:
        return None
    if link.is_split:
        assert link.joint is not None
        if source != link.source.source or len(cuts) != 1 or link.joint.part_at(cuts[0]) != part:
            return None
        return dataclasses.replace(link, ways=(*link.ways[:part], (Way(steps),), *link.ways[part + 1 :]))
    if cuts and layers is None:
        found = lifted(cuts, steps, shapes[source], link.wanted[part].shape)
        if found is None:
            return None
        steps = found
    stored = next(
        (x for one in every if one.layers == layers for x in one.stored if x.source == source), None
    )
    return None if stored is None else dataclasses.replace(link, stored=(stored,), ways=((Way(steps),),))


def _rejoined(
    link: Link, whole: recipes.Concat | recipes.Stack, after: Sequence[Recipe], shapes: Shapes
) -> Link | None:
    """Returns a fuse of the same parts in another order, each or the whole shaped otherwise."""
    sources = [leaf.source for leaf in link.stored]
    parts = [chain_of(part) for part in whole.sources]
    reads = [cuts_of(part)[1] for part, _ in parts]
    if link.joint is None or link.is_split or len({*sources}) < len(sources) or {*reads} != {*sources}:
        return None
    order = [sources.index(path) for path in reads if path is not None]
    sizes = link.joint.sizes
    ways = tuple((Way(shaping(steps, shapes)),) for _, steps in parts)
    joint = Joint(
        whole.axis,
        isinstance(whole, recipes.Stack),
        tuple(sizes[at] for at in order) if sizes is not None else None,
        ways,
    )
    stored = tuple(link.stored[at] for at in order)
    return dataclasses.replace(link, stored=stored, ways=ways, joint=joint, after=shaping(after, shapes))


def orders_of_features(size: int) -> Iterator[tuple[Shape, tuple[int, ...]]]:
    """Yields every way to divide an axis into two or three parts, with every other order of them."""
    divisors = [length for length in range(2, size // 2 + 1) if size % length == 0]
    yield from (((outer, size // outer), (1, 0)) for outer in divisors)
    for outer, inner in itertools.product(divisors, divisors):
        if size % (outer * inner) == 0 and outer * inner < size:
            lengths = (outer, inner, size // (outer * inner))
            yield from ((lengths, order) for order in itertools.permutations(range(3)) if order != (0, 1, 2))


def with_features_in_order(
    recipe: Recipe, axis: int, lengths: Shape, order: Sequence[int], shapes: Shapes, *, plainly: bool = True
) -> Recipe:
    """Returns a recipe with one axis in another order: of features that were made one, as by a flatten.

    Args:
        recipe: The recipe.
        axis: The axis of the features.
        lengths: What it is divided into.
        order: Which of these parts comes where.
        shapes: The stored shapes.
        plainly: Whether it is said in the fewest steps.
    """
    shape = shape_of(recipe, shapes)
    divided = (*shape[:axis], *lengths, *shape[axis + 1 :])
    turned = [*range(axis), *(axis + at for at in order), *range(axis + len(order), len(divided))]
    made = Reshape(Transpose(Reshape(recipe, divided), tuple(turned)), shape)
    return simplify(made, shapes) if plainly else made


def as_stored(recipe: Recipe, shapes: Shapes) -> Recipe:
    """Returns a leaf before its axes are divided and put in another order, if it had the same shape."""
    source = recipe
    while isinstance(source, Reshape | Transpose):
        source = source.source
    return source if shape_of(source, shapes) == shape_of(recipe, shapes) else recipe


def by_groups(joint: Concat, groups: int, shapes: Shapes) -> Recipe:
    """Returns joined parts group by group: the query, key and value of each head side by side."""
    shape, axis, parts = shape_of(joint, shapes), joint.axis, len(joint.sources)
    divided = (*shape[:axis], parts, groups, shape[axis] // parts // groups, *shape[axis + 1 :])
    order = [*range(len(divided))]
    order[axis], order[axis + 1] = axis + 1, axis
    return Reshape(Transpose(Reshape(joint, divided), tuple(order)), shape)


def by_one(recipe: Recipe, shape: Shape) -> Iterator[tuple[str, Recipe]]:
    """Yields a vector with one added or taken away: a norm that multiplies with 1 + scale."""
    for constant in (1.0, -1.0) if len(shape) == 1 else ():
        yield f"{'larger' if constant > 0 else 'smaller'} by one", Add(recipe, constant)


def refolded(recipe: Recipe, shape: Shape) -> Iterator[tuple[str, Recipe]]:
    """Yields an axis read as two that were exchanged, as interleaved heads or parts are."""
    for axis, length in enumerate(shape):
        for outer in (2, 3, 4, 6, 8, 12, 16):
            if length % outer == 0 and 1 < outer < length:
                split = (*shape[:axis], length // outer, outer, *shape[axis + 1 :])
                order = [*range(len(split))]
                order[axis], order[axis + 1] = axis + 1, axis
                yield (
                    "in another order of its parts",
                    Reshape(Transpose(Reshape(recipe, split), tuple(order)), shape),
                )


_MOST_AXES = 4


def divided(recipe: Recipe, shapes: Shapes) -> Iterator[tuple[str, Recipe]]:
    """Yields the same elements divided into axes in another order: heads before features, or after them."""
    shape = shape_of(recipe, shapes)
    for step in chain(recipe):
        if not isinstance(step, Reshape):
            continue
        before = shape_of(step.source, shapes)
        for order in itertools.permutations(range(len(before))) if len(before) <= _MOST_AXES else ():
            yield (
                "divided otherwise",
                again(recipe, step, Reshape(Transpose(step.source, order), step.shape)),
            )
        for order in itertools.permutations(range(len(step.shape))) if len(step.shape) <= _MOST_AXES else ():
            divided = Reshape(step.source, tuple(step.shape[axis] for axis in order))
            back = tuple(sorted(range(len(order)), key=order.__getitem__))
            yield "divided otherwise", again(recipe, step, Transpose(divided, back))
    if len(shape) <= _MOST_AXES:
        yield from refolded(recipe, shape)


def chain(recipe: Recipe) -> Iterator[Recipe]:
    """Yields the steps of a recipe, the last first, as long as each has one source."""
    yield recipe
    inner = children(recipe)
    if len(inner) == 1:
        yield from chain(inner[0])


def again(recipe: Recipe, step: Recipe, instead: Recipe) -> Recipe:
    """Returns a chain of steps with one of them replaced."""
    if recipe is step:
        return instead
    inner = again(children(recipe)[0], step, instead)
    if isinstance(recipe, Stack | Concat):
        return dataclasses.replace(recipe, sources=(inner,))
    return dataclasses.replace(recipe, source=inner)


def joint_of(recipe: Recipe) -> Concat | Stack | None:
    """Returns the step of a recipe that joins several parts, the outermost one."""
    return next((step for step in chain(recipe) if isinstance(step, Concat | Stack)), None)


def with_parts(recipe: Recipe, joint: Concat | Stack, parts: Iterable[Recipe]) -> Recipe:
    """Returns a recipe whose step that joins has other parts."""
    return again(recipe, joint, dataclasses.replace(joint, sources=tuple(parts)))


_HEAD_SIZES = (256, 192, 160, 128, 96, 80, 64, 48, 40, 32, 24, 16, 12, 8, 6, 4)
"""How many features a head may have, of those that a matrix holds side by side."""


def heads_by_rotation(recipes: Mapping[Path, Recipe], shapes: Shapes) -> Iterator[Mapping[Path, Recipe]]:
    """Yields queries and keys whose features lie in each head as other rotary positions pair them.

    Meta's Llama and EasyLM turn neighbours, (0, 1), (2, 3); Hugging Face's and most others turn halves,
    (0, n/2), (1, n/2 + 1). Both compute the same from features in another order.

    Args:
        recipes: How the leaves of an attention are made, or of several.
        shapes: The stored shapes.
    """
    # Where rules join queries, keys and values, each part by itself.
    parts = {
        (leaf, at): part
        for leaf, recipe in recipes.items()
        for at, part in enumerate(recipe.sources if _is_joined(recipe) else (recipe,))
    }
    said = {key: _roles(part, None if _is_joined(recipes[key[0]]) else key[0]) for key, part in parts.items()}
    asked = {key: shape_of(part, shapes) for key, part in parts.items() if said[key] & {"q", "k"}}
    asked = {key: shape for key, shape in asked.items() if shape}
    most = max(map(len, asked.values()), default=0)
    if not {"q", "k"} <= frozenset().union(*(said[key] for key in asked)) or most < 2:
        return
    lasts = {shape[-1] for shape in asked.values()}
    # Inputs, heads, features; else a matrix holds the heads side by side.
    by_head = [min(lasts)] if most > 2 else []
    if most == 2 or any(len(said[key]) > 1 for key in asked):
        by_head += [n for n in _HEAD_SIZES if n not in by_head and all(last % n == 0 for last in lasts)]
    for size, divided in itertools.product((n for n in by_head if n % 2 == 0), (True, False)):
        pair = (2, size // 2) if divided else (size // 2, 2)
        for way in _ways_to_hold(max(map(len, said.values())), min(lasts) // size):
            places = {key: _place(shape, said[key], size, way) for key, shape in asked.items()}
            made = {key: _turned(parts[key], place, pair, shapes) for key, place in places.items() if place}
            if len(made) == len(asked):
                leaves = dict.fromkeys(key[0] for key in made)
                yield {leaf: _with_parts(leaf, recipes[leaf], made) for leaf in leaves}


def _is_joined(recipe: Recipe) -> TypeGuard[Concat | Stack]:
    return isinstance(recipe, Concat | Stack)


def _ways_to_hold(count: int, heads: int) -> Sequence[int | Fraction]:
    """Returns how queries, keys and values may lie in one array.

    By an axis of their own, counted from the end; side by side, by the share of the values; 0: head by head.
    """
    fewer = [n for n in range(heads // 3, 0, -1) if count == 3 and heads % n == 0]  # Several queries a key.
    shares = dict.fromkeys([Fraction(1, count), *(Fraction(n, heads) for n in fewer)])
    return (-2, -3, -4, 0, *shares) if count > 1 else (0,)


def _place(
    shape: Shape, roles: frozenset[str], size: int, way: int | Fraction
) -> tuple[Shape, int, int] | None:
    """Returns how an array is divided, on which axis its parts lie, and where queries and keys end there."""
    *others, last = shape
    count, heads, axis = len(roles), last // size, len(shape)
    if last % size or "v" not in roles:
        return None if last % size else (shape, axis - 1, last)
    if isinstance(way, Fraction):
        end = last - last * way
        return (shape, axis - 1, int(end)) if end % size == 0 else None
    if way == 0:
        return ((*others, heads // count, count, size), axis, count - 1) if heads % count == 0 else None
    return (shape, axis + way, count - 1) if axis >= -way and shape[way] == count else None


def _turned(part: Recipe, place: tuple[Shape, int, int], pair: tuple[int, int], shapes: Shapes) -> Recipe:
    """Returns queries and keys with each head's features in the other order; values stay as they are."""
    shape, (divided, axis, end) = shape_of(part, shapes), place
    whole = part if divided == shape else Reshape(part, divided)
    both = whole if end == divided[axis] else Slice(whole, axis, 0, end)
    *_, length = shape_of(both, shapes)
    lengths = (length // math.prod(pair), *pair)
    turned = with_features_in_order(both, len(divided) - 1, lengths, (0, 2, 1), shapes, plainly=False)
    if both is not whole:
        turned = Concat((turned, Slice(whole, axis, end, divided[axis] - end)), axis)
    return turned if divided == shape else Reshape(turned, shape)


def _roles(part: Recipe, leaf: Path | None) -> frozenset[str]:
    """Returns whether a part holds queries, keys or values, by its leaf or what is stored; else nothing."""
    paths = [*([leaf] if leaf is not None else []), *reads(part)[:1]]
    said = [concepts(segments(path)[-2:-1]) & frozenset("qkv") for path in paths]
    return next((roles for roles in sorted(said, key=len) if roles), frozenset[str]())


def _with_parts(leaf: Path, recipe: Recipe, made: Mapping[tuple[Path, int], Recipe]) -> Recipe:
    if not _is_joined(recipe):
        return made[leaf, 0]
    sources = tuple(made.get((leaf, at), part) for at, part in enumerate(recipe.sources))
    return dataclasses.replace(recipe, sources=sources)


def carried_over(recipe: Recipe, pairs: Iterable[tuple[Recipe, Recipe]]) -> Recipe:
    """Returns a recipe with other sources in it: those of another layer or expert in the place of one's own.

    Args:
        recipe: The recipe.
        pairs: How each leaf of the one is made, and how the other's is.
    """
    others = dict(itertools.chain.from_iterable(itertools.starmap(_differing, pairs)))

    def put(step: Recipe) -> Recipe:
        if step in others:
            return others[step]
        if isinstance(step, Stack | Concat):
            return dataclasses.replace(step, sources=tuple(map(put, step.sources)))
        inner = children(step)
        return dataclasses.replace(cast(Any, step), source=put(inner[0])) if inner else step

    return put(recipe)


def _differing(one: Recipe, other: Recipe) -> Iterator[tuple[Recipe, Recipe]]:
    """Yields the parts of two recipes that lie in each other's places: what is read, be it a layer of it."""
    inner, others = children(one), children(other)
    is_alike = type(one) is type(other) and len(inner) == len(others) > 0
    if is_alike and not isinstance(one, Stack | Concat):
        is_alike = dataclasses.replace(cast(Any, one), source=others[0]) == other
    if not is_alike:
        yield one, other
    for pair in zip(inner, others, strict=True) if is_alike else ():
        yield from _differing(*pair)


_MOST_PARTS = 4


def undone(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """Yields the same without what a rule multiplies it with, or adds to it."""
    for step in chain(recipe):
        if isinstance(step, Scale | Add):
            word = "scaled" if isinstance(step, Scale) else "shifted"
            yield f"not {word}", again(recipe, step, step.source)


def otherwise(count: int) -> Iterable[tuple[int, ...]]:
    """Returns the orders of so many, without the one that they are in; of many, those that are likely."""
    plain = [*range(count)]
    if count > _MOST_PARTS:
        return (*plain[1:], 0), (count - 1, *plain[:-1]), (*plain[::-1],)
    return itertools.islice(itertools.permutations(plain), 1, None)


def turned(recipe: Recipe, shape: Shape) -> Iterator[tuple[str, Recipe]]:
    """Yields the same with axes of one length in another order."""
    if 2 <= len(shape) <= _MOST_AXES:
        for order in otherwise(len(shape)):
            if tuple(shape[axis] for axis in order) == shape:
                yield "transposed", Transpose(recipe, order)
