"""Regions of recipes against the same operations on whole NumPy arrays."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orbax_nnx_handler.planning.core import recipes
from orbax_nnx_handler.planning.core.recipes import (
    Add,
    Concat,
    Fill,
    Index,
    Read,
    Repeat,
    Reshape,
    Scale,
    Slice,
    Stack,
    Transpose,
)
from orbax_nnx_handler.planning.core.regions import (
    Refolded,
    cut,
    intersect,
    layer_of,
    of_all_layers,
    place,
    shape_of_region,
    slices,
    whole,
)


def evaluate(recipe, arrays):
    """What the recipe means, on whole arrays."""
    match recipe:
        case Read(path):
            return arrays[path]
        case Index(source, axis, index):
            return np.take(evaluate(source, arrays), index, axis)
        case Slice(source, axis, start, size):
            return np.take(evaluate(source, arrays), range(start, start + size), axis)
        case Stack(sources, axis):
            return np.stack([evaluate(source, arrays) for source in sources], axis)
        case Concat(sources, axis):
            return np.concatenate([evaluate(source, arrays) for source in sources], axis)
        case Transpose(source, permutation):
            return np.transpose(evaluate(source, arrays), permutation)
        case Reshape(source, shape):
            return np.reshape(evaluate(source, arrays), shape)
        case Repeat(source, axis, count):
            return np.repeat(evaluate(source, arrays), count, axis)
        case Scale() | Add():
            factor, constant = getattr(recipe, "factor", 1), getattr(recipe, "constant", 0)
            return evaluate(recipe.source, arrays) * factor + constant


def computed(values, steps):
    for step in steps:
        values = values * step.factor + step.constant
    return values


def assemble(recipe, region, arrays):
    """Builds a region of the recipe's value from its parts, each element exactly once."""
    shapes = {path: array.shape for path, array in arrays.items()}
    buffer = np.zeros(shape_of_region(region))
    touched = np.zeros(shape_of_region(region), dtype=int)
    for part in cut(recipe, region, shapes):
        if isinstance(part.source, Refolded):
            below = assemble(part.source.recipe, part.source.region, arrays)
            source = below.reshape(part.source.shape)
        else:
            source = arrays[part.source]
        place(part, buffer)[...] = computed(source[slices(part.source_region)], part.arithmetic)
        place(part, touched)[...] += 1
    assert (touched == 1).all()
    return buffer


@st.composite
def shaped_recipes(draw, shape=None, depth=3):
    """Draws a recipe and the shape it gives; leaves are drawn as `(path, shape)`."""
    if shape is None:
        shape = tuple(draw(st.lists(st.integers(1, 4), max_size=3)))
    choices = ["read"]
    if depth:
        choices += ["index", "transpose", "reshape", "scale", "add"]
        choices += ["slice", "stack", "concat"] if shape else []
        choices += ["repeat"] if any(length > 1 for length in shape) else []
    kind = draw(st.sampled_from(choices))
    return DRAWN[kind](draw, shape, lambda wanted: draw(shaped_recipes(shape=wanted, depth=depth - 1)))


def drawn_read(draw, shape, inner):
    return Read((draw(st.integers(0, 10**6)), shape))


def drawn_index(draw, shape, inner):
    size, axis = draw(st.integers(1, 3)), draw(st.integers(0, len(shape)))
    return Index(inner((*shape[:axis], size, *shape[axis:])), axis, draw(st.integers(0, size - 1)))


def drawn_slice(draw, shape, inner):
    axis, before, after = drawn_axis(draw, shape), draw(st.integers(0, 2)), draw(st.integers(0, 2))
    size = shape[axis]
    return Slice(inner((*shape[:axis], before + size + after, *shape[axis + 1 :])), axis, before, size)


def drawn_stack(draw, shape, inner):
    axis = drawn_axis(draw, shape)
    return Stack(tuple(inner((*shape[:axis], *shape[axis + 1 :])) for _ in range(shape[axis])), axis)


def drawn_concat(draw, shape, inner):
    axis = drawn_axis(draw, shape)
    sizes = draw(st.sampled_from([(shape[axis],), (1, shape[axis] - 1) if shape[axis] > 1 else (1,)]))
    return Concat(tuple(inner((*shape[:axis], size, *shape[axis + 1 :])) for size in sizes), axis)


def drawn_transpose(draw, shape, inner):
    permutation = tuple(draw(st.permutations(range(len(shape)))))
    below = [0] * len(shape)
    for to, source in enumerate(permutation):
        below[source] = shape[to]
    return Transpose(inner(tuple(below)), permutation)


def drawn_reshape(draw, shape, inner):
    return Reshape(inner(draw(refactored(shape))), shape)


def drawn_repeat(draw, shape, inner):
    axis = draw(st.sampled_from([axis for axis, length in enumerate(shape) if length > 1]))
    count = draw(st.sampled_from([n for n in range(2, shape[axis] + 1) if shape[axis] % n == 0]))
    return Repeat(inner((*shape[:axis], shape[axis] // count, *shape[axis + 1 :])), axis, count)


def drawn_scale(draw, shape, inner):
    return Scale(inner(shape), draw(st.sampled_from([0.5, 2.0])))


def drawn_add(draw, shape, inner):
    return Add(inner(shape), draw(st.sampled_from([-1.0, 0.5])))


def drawn_axis(draw, shape):
    return draw(st.integers(0, len(shape) - 1))


DRAWN = {
    "read": drawn_read,
    "index": drawn_index,
    "slice": drawn_slice,
    "stack": drawn_stack,
    "concat": drawn_concat,
    "transpose": drawn_transpose,
    "reshape": drawn_reshape,
    "repeat": drawn_repeat,
    "scale": drawn_scale,
    "add": drawn_add,
}


@st.composite
def refactored(draw, shape):
    """Draws another shape with the same number of elements."""
    left, found = math.prod(shape), []
    while left > 1:
        size = draw(st.sampled_from([d for d in range(2, left + 1) if left % d == 0]))
        found.append(size)
        left //= size
    if draw(st.booleans()):
        found.insert(draw(st.integers(0, len(found))), 1)
    return tuple(found)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_region_of_any_recipe_is_the_same_region_of_numpys_value(data):
    recipe = data.draw(shaped_recipes())
    arrays = {path: _numbers(path) for path in recipes.reads(recipe)}
    value = evaluate(recipe, arrays)
    region = tuple(
        (start, data.draw(st.integers(start, size)))
        for size in value.shape
        for start in [data.draw(st.integers(0, size))]
    )

    found = assemble(recipe, region, arrays)

    np.testing.assert_array_equal(found, value[slices(region)])


def _numbers(path):
    return np.random.default_rng(path[0]).integers(0, 1000, path[1]).astype(float)


def test_a_shard_of_a_stack_touches_only_its_own_layers():
    recipe = Stack((Read(("a",)), Read(("b",)), Read(("c",))), 1)
    stored = {("a",): (4, 2), ("b",): (4, 2), ("c",): (4, 2)}

    parts = cut(recipe, ((0, 2), (1, 3), (0, 2)), stored)

    assert [(part.source, part.source_region) for part in parts] == [
        (("b",), ((0, 2), (0, 2))),
        (("c",), ((0, 2), (0, 2))),
    ]


def test_merging_axes_reads_only_the_rows_and_heads_of_the_shard():
    recipe = Reshape(Read(("q",)), (8, 6))
    stored = {("q",): (8, 2, 3)}

    (part,) = cut(recipe, ((2, 4), (0, 3)), stored)

    assert isinstance(part.source, Refolded)
    assert part.source.region == ((2, 4), (0, 1), (0, 3))


def test_a_fill_cannot_be_cut():
    recipe = Stack((Read(("a",)), Fill((2,))), 0)

    with pytest.raises(recipes.RecipeError, match="fill"):
        cut(recipe, whole((2, 2)), {("a",): (2,)})


def test_regions_that_only_touch_share_nothing():
    assert intersect(((0, 2), (0, 4)), ((2, 3), (0, 4))) is None
    assert intersect(((0, 3), (1, 4)), ((2, 5), (0, 2))) == ((2, 3), (1, 2))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(
    "made",
    [
        lambda read: Concat((read("k"), read("q")), 1),
        lambda read: Concat((Transpose(read("k"), (1, 0)), Scale(read("q"), 2.0)), 0),
        lambda read: Slice(Add(read("q"), 1.0), 1, 2, 2),
        lambda read: Transpose(Reshape(Reshape(read("q"), (2, 2, 4)), (4, 4)), (1, 0)),
    ],
)
def test_what_makes_one_layer_makes_all_of_them(made, axis):
    shape = (*(4, 4)[:axis], 3, *(4, 4)[axis:])
    stored = {("q",): shape, ("k",): shape}
    arrays = {path: np.arange(48.0).reshape(shape) + len(path[0]) for path in stored}

    def made_of(layer):
        return made(lambda name: Index(Read((name,)), axis, layer))

    all_ = of_all_layers(made_of(2), axis, 2, stored)

    assert all_ is not None
    for layer in range(3):
        expected = evaluate(made_of(layer), arrays)
        np.testing.assert_array_equal(evaluate(layer_of(all_, axis, layer, stored), arrays), expected)


def test_what_reads_two_layers_is_no_layer_of_a_stack():
    made = Concat((Index(Read(("q",)), 0, 2), Index(Read(("q",)), 0, 1)), 0)
    assert of_all_layers(made, 0, 2, {("q",): (3, 4)}) is None
