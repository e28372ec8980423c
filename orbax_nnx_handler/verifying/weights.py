"""Both programs' weights on one device in float32: the variables as Linen wrote them, and the model.

And what each layer of a weight is made from.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, TypeGuard, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.sharding import Sharding, SingleDeviceSharding

from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.paths import Path, nested, segments
from orbax_nnx_handler.planning.core.recipes import (
    Add,
    Concat,
    Read,
    Recipe,
    Reshape,
    Shapes,
    Slice,
    Stack,
    Transpose,
    children,
    reads,
    shape_of,
    simplify,
)
from orbax_nnx_handler.planning.layouts.layout import FLAX_COLLECTIONS, Placement
from orbax_nnx_handler.planning.likeness.vocabulary import concepts
from orbax_nnx_handler.planning.restore_plan import RestorePlan
from orbax_nnx_handler.planning.target import flatten_target
from orbax_nnx_handler.storage.checkpoint.metadata import Checkpoint
from orbax_nnx_handler.storage.reading import Job
from orbax_nnx_handler.storage.restoring import read_jobs


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneDevice:
    """What `restore` is told of one leaf.

    Attributes:
        sharding: The one device.
        dtype: float32 for a float, None for the target's own.
    """

    sharding: Sharding
    dtype: np.dtype[Any] | None


def one_device() -> Sharding:
    """Returns where both programs run: the device on which JAX makes an array now."""
    return SingleDeviceSharding(next(iter(jnp.zeros(()).devices())))


def on_one_device(target: Any) -> dict[Path, OneDevice]:
    """Returns the restore args of every leaf of a target."""
    leaves, where = flatten_target(target).leaves, one_device()
    return {path: OneDevice(sharding=where, dtype=_widened(leaf.dtype)) for path, leaf in leaves.items()}


def _widened(dtype: Any) -> np.dtype[Any] | None:
    return np.dtype(np.float32) if jnp.issubdtype(dtype, np.floating) else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinenWeights:
    """The variables of a Linen program.

    Attributes:
        variables: Collections by name, as `module.apply` takes them; where the plan uses several train
            states, one such dict for each, below the keys of its owner.
        places: Where each stored leaf lies in them.
        location: Where each stored leaf lies: keys of the modules, and the leaf's name.
        of_array: The same by the identity of the array in `variables`.
    """

    variables: dict[str, Any]
    places: Mapping[Path, Path]
    location: Mapping[Path, Path]
    of_array: Mapping[int, Path]


def locate_stored(plan: RestorePlan) -> tuple[dict[Path, Path], dict[Path, Path]]:
    """Returns where each stored leaf lies in the variables, and where among the modules."""
    placements = plan.sides.placements
    read = {path for item in plan.restored.values() for path in reads(item.recipe)}
    model = [placement for placement in placements.values() if placement.section == "model"]
    # Where nothing is read yet, for no rule is settled, all that is stored may be meant.
    owners = {placement.owner for placement in model if placement.leaf.path in read or not read}
    mine = [placement for placement in model if placement.owner in owners]
    chosen = _asked_for(mine, read)
    parents = _children([placement.path for placement in chosen])
    # Of one that is stored flat, as flatten_dict(params, sep="/") makes it, keys are joined; else a slash is
    # a part of a key, as Linen's weight norm has it.
    nested_owners = {placement.owner for placement in chosen if len(placement.path) > 1}
    places: dict[Path, Path] = {}
    modules: dict[Path, Path] = {}
    for placement in chosen:
        keys = _unboxed(placement.path, parents)
        keys = keys if placement.owner in nested_owners else segments(keys)
        above = placement.owner if len(owners) > 1 else ()
        places[placement.leaf.path] = (*above, placement.collection or "params", *keys)
        modules[placement.leaf.path] = (*segments(above), *map(str, keys))
    return places, modules


def _asked_for(placements: Iterable[Placement], read: set[Path]) -> list[Placement]:
    """Returns the leaves of collections that the plan reads, or that are no copy of the parameters."""
    found: dict[tuple[Path, str | None], list[Placement]] = {}
    for placement in placements:
        found.setdefault((placement.owner, placement.collection), []).append(placement)
    params = {owner: {one.path for one in ones} for (owner, name), ones in found.items() if name == "params"}
    return [
        one
        for (owner, name), ones in found.items()
        if name in FLAX_COLLECTIONS
        or any(one.leaf.path in read for one in ones)
        or {one.path for one in ones}.isdisjoint(params.get(owner, ()))
        for one in ones
    ]


def _children(paths: Iterable[Path]) -> dict[Path, set[Any]]:
    found: dict[Path, set[Any]] = {}
    for path in paths:
        found.setdefault(path[:-1], set()).add(path[-1])
    return found


def _unboxed(path: Path, children: Mapping[Path, set[Any]]) -> Path:
    """Takes the level away that a partitioned box adds: `kernel/value`."""
    boxed = len(path) > 1 and path[-1] == "value" and children[path[:-1]] == {"value"}
    return path[:-1] if boxed else path


def restore_linen(checkpoint: Checkpoint, plan: RestorePlan, no_numbers: Iterable[Path] = ()) -> LinenWeights:
    """Reads the variables of the train states that a plan reads, floats as float32.

    Args:
        checkpoint: What is stored.
        plan: The plan.
        no_numbers: Stored leaves of floats that are filled with NaN.

    Raises:
        UnreadableLeafError: Stored bytes are absent or damaged.
    """
    places, location = locate_stored(plan)
    where = one_device()
    arrays = read_jobs(checkpoint, [_job(checkpoint, path, where) for path in places])
    arrays |= {path: jnp.full_like(arrays[path], jnp.nan) for path in no_numbers}
    tree = nested({place: arrays[path] for path, place in places.items()})
    return LinenWeights(
        variables=cast("dict[str, Any]", _with_lists(tree)),
        places=places,
        location=location,
        of_array={id(arrays[path]): location[path] for path in places},
    )


def _job(checkpoint: Checkpoint, path: Path, where: Sharding) -> Job:
    leaf = checkpoint.leaves[path]
    dtype = _widened(leaf.dtype) or leaf.dtype
    return Job(
        path=path,
        recipe=Read(path),
        shape=leaf.shape,
        dtype=cast("np.dtype[Any]", dtype),
        sharding=where,
    )


def _with_lists(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    nodes = {key: _with_lists(node) for key, node in cast("dict[Any, Any]", tree).items()}
    if (
        nodes
        and sorted(map(str, nodes)) == sorted(map(str, range(len(nodes))))
        and all(type(key) is int for key in nodes)
    ):
        return [nodes[number] for number in range(len(nodes))]
    return nodes


def path_above(weights: LinenWeights, module: Any) -> Path | None:
    """Returns the keys above the path of a bound Linen module, if the arrays that it was given tell."""
    for collection in module.variables.values():
        flat = cast(Any, jax.tree_util.tree_flatten_with_path(collection))
        for keys, array in flat[0]:
            place = weights.of_array.get(id(array))
            if place is not None:
                return place[: len(place) - len(module.path) - len(keys)]
    return None


def find_nnx(wanted: Iterable[Path], variables: Iterable[Path], above: Path) -> Path | None:
    """Returns the keys above a module's Variables in the target, if only one place is possible."""
    paths = list(variables)
    if not paths:
        return None
    found: set[Path] | None = None
    known = set(wanted)
    for path in paths:
        ends = {
            one[: len(one) - len(path)]
            for one in known
            if one[: len(above)] == above and one[len(one) - len(path) :] == path
        }
        found = ends if found is None else found & ends
    return found.pop() if found and len(found) == 1 else None


def flat_state(module: Any) -> list[tuple[Path, Any]]:
    """Returns the Variables of a module by path."""
    flat = cast("Iterable[tuple[Path, Any]]", nnx.to_flat_state(cast(Any, nnx.state(module))))
    return [(tuple(path), leaf) for path, leaf in flat]


def is_other(own: Any, leaf: Any) -> bool:
    """Tells whether a Variable holds other floats than the model's own; a layer of it does not."""
    if own is None or not is_weight(leaf):
        return False
    one, two = own.get_raw_value(), leaf.get_raw_value()
    if one is two or isinstance(two, Tracer) or one.shape != two.shape or one.dtype != two.dtype:
        return False
    return not np.array_equal(one, two, equal_nan=True)


def is_weight(leaf: Any) -> bool:
    """Tells whether a Variable holds floats."""
    return isinstance(leaf, nnx.Variable) and bool(jnp.issubdtype(leaf.dtype, jnp.floating))


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
