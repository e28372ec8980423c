"""How one wanted leaf is made from stored leaves: a small, pure expression.

A recipe names stored paths and the array operations between them and the
wanted value. It can be checked against shapes before anything is read, printed,
rewritten to another leaf with the same layout (a moment of its parameter),
simplified where steps undo each other, and run on whole arrays or, in
`storage.reading`, region by region.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping

from orbax_nnx_handler.planning.core.leaves import COPIES, Shape
from orbax_nnx_handler.planning.core.paths import Path, render


@dataclasses.dataclass(frozen=True)
class Read:
    """The stored leaf at `path`, as it is."""

    path: Path

    def __init__(self, path: Path) -> None:
        # There is one for each leaf: half the time of the `__init__` that a frozen dataclass gets.
        self.__dict__["path"] = path


@dataclasses.dataclass(frozen=True)
class Index:
    """Element `index` along `axis`; the axis goes away."""

    source: "Recipe"
    axis: int
    index: int


@dataclasses.dataclass(frozen=True)
class Slice:
    """`size` elements along `axis` from `start`; the axis stays."""

    source: "Recipe"
    axis: int
    start: int
    size: int


@dataclasses.dataclass(frozen=True)
class Stack:
    """The sources side by side along a new `axis`."""

    sources: tuple["Recipe", ...]
    axis: int


@dataclasses.dataclass(frozen=True)
class Concat:
    """The sources end to end along an existing `axis`."""

    sources: tuple["Recipe", ...]
    axis: int


@dataclasses.dataclass(frozen=True)
class Transpose:
    """The axes in the order `permutation`, as `numpy.transpose` reads it."""

    source: "Recipe"
    permutation: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Reshape:
    """The same elements in C order under another shape."""

    source: "Recipe"
    shape: Shape


@dataclasses.dataclass(frozen=True)
class Scale:
    """Every element times `factor`, computed as `dtypes.wide_dtype` says."""

    source: "Recipe"
    factor: float


@dataclasses.dataclass(frozen=True)
class Add:
    """Every element plus `constant`, computed as `dtypes.wide_dtype` says."""

    source: "Recipe"
    constant: float


@dataclasses.dataclass(frozen=True)
class Repeat:
    """Every element along `axis` `count` times in a row, as `numpy.repeat` does."""

    source: "Recipe"
    axis: int
    count: int


@dataclasses.dataclass(frozen=True)
class Fill:
    """The part of the wanted value that no stored leaf holds (a missing layer).

    Only appears inside a `Stack`; the policy decides what it becomes.
    """

    shape: Shape


OneSource = Index | Slice | Transpose | Reshape | Scale | Add | Repeat
_ONE_SOURCE = (Transpose, Index, Slice, Reshape, Scale, Add, Repeat)
Recipe = Read | Stack | Concat | OneSource | Fill


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """What `Scale` and `Add` do to every element: times `factor`, then plus `constant`."""

    factor: float = 1.0
    constant: float = 0.0


class RecipeError(ValueError):
    """A recipe whose shapes do not come out."""


def children(recipe: Recipe) -> tuple[Recipe, ...]:
    """Returns the recipes that this one is made from."""
    match recipe:
        case Read() | Fill():
            return ()
        case Stack(sources) | Concat(sources):
            return sources
        case _:
            return (recipe.source,)


def reads(recipe: Recipe) -> tuple[Path, ...]:
    """Returns the stored paths of a recipe, in order, repeats included."""
    # A chain of steps is walked, not recursed into, and no union of types is made: planning asks this
    # of every leaf, several times.
    while not isinstance(recipe, Read):
        if isinstance(recipe, _ONE_SOURCE):
            recipe = recipe.source
        elif isinstance(recipe, Fill):
            return ()
        else:
            return tuple(path for child in recipe.sources for path in reads(child))
    return (recipe.path,)


def parts_of(recipe: Recipe) -> Iterator[Recipe]:
    """Yields a recipe and every recipe inside it."""
    yield recipe
    for child in children(recipe):
        yield from parts_of(child)


def computes(recipe: Recipe) -> bool:
    """Tells whether the recipe changes values, beside moving them."""
    while isinstance(recipe, _ONE_SOURCE):
        if isinstance(recipe, (Scale, Add)):
            return True
        recipe = recipe.source
    return not isinstance(recipe, Read) and any(computes(child) for child in children(recipe))


def without_arithmetic(recipe: Recipe) -> Recipe:
    """Returns a recipe that moves values as this one does, and leaves them as they are."""
    if not computes(recipe):
        return recipe
    match recipe:
        case Scale(source, _) | Add(source, _):
            return without_arithmetic(source)
        case Stack(sources, axis) | Concat(sources, axis):
            return type(recipe)(tuple(without_arithmetic(source) for source in sources), axis)
        case Read() | Fill():
            return recipe
        case _:
            return dataclasses.replace(recipe, source=without_arithmetic(recipe.source))


def of_moment(recipe: Recipe, field: str) -> Recipe:
    """Returns the recipe of an optimizer's field from its parameter's: a constant is added to copies only."""
    return recipe if field in COPIES else without_arithmetic(recipe)


def fills(recipe: Recipe) -> bool:
    """Tells whether a part of the recipe comes from no stored leaf."""
    return isinstance(recipe, Fill) or any(fills(child) for child in children(recipe))


def substitute(recipe: Recipe, swap: Callable[[Path], Recipe]) -> Recipe:
    """Returns the recipe with every `Read` replaced by `swap` of its path."""
    match recipe:
        case Read(path):
            return swap(path)
        case Fill():
            return recipe
        case Stack(sources) | Concat(sources):
            return type(recipe)(tuple(substitute(source, swap) for source in sources), recipe.axis)
        case _:
            # Not `dataclasses.replace`, which takes longer than all the rest of it.
            rest = [getattr(recipe, name) for name in recipe.__match_args__[1:]]
            return type(recipe)(substitute(recipe.source, swap), *rest)


def shape_of(recipe: Recipe, stored: Mapping[Path, Shape]) -> Shape:
    """Returns the shape that a recipe gives.

    Raises:
        RecipeError: The shapes do not fit; says which step and the shapes.
    """
    if isinstance(recipe, Read):
        return stored[recipe.path]
    match recipe:
        case Fill(shape):
            return shape
        case Stack(sources, axis):
            return _stack_shape([shape_of(s, stored) for s in sources], axis)
        case Concat(sources, axis):
            return _concat_shape([shape_of(s, stored) for s in sources], axis)
        case Index() | Slice():
            return _part_shape(recipe, shape_of(recipe.source, stored))
        case Transpose(source, permutation):
            return _transposed_shape(shape_of(source, stored), permutation)
        case Reshape(source, shape):
            return _reshaped_shape(shape_of(source, stored), shape)
        case Repeat(source, axis, count):
            return _repeated_shape(shape_of(source, stored), axis, count)
        case Scale(source, _) | Add(source, _):
            return shape_of(source, stored)


@functools.lru_cache(maxsize=1024)  # The layers of a model have few shapes between them.
def _transposed_shape(shape: Shape, permutation: tuple[int, ...]) -> Shape:
    if sorted(permutation) != list(range(len(shape))):
        raise RecipeError(f"permutation {permutation} does not fit shape {shape}")
    return tuple(shape[axis] for axis in permutation)


def _reshaped_shape(before: Shape, shape: Shape) -> Shape:
    if math.prod(before) != math.prod(shape):
        raise RecipeError(f"{before} has {math.prod(before)} elements, {shape} has {math.prod(shape)}")
    return shape


def _repeated_shape(shape: Shape, axis: int, count: int) -> Shape:
    if not 0 <= axis < len(shape):
        raise RecipeError(f"shape {shape} has no axis {axis}")
    return (*shape[:axis], shape[axis] * count, *shape[axis + 1 :])


def first_of_each(value: Recipe, shape: Shape, axis: int, count: int) -> Recipe:
    """Returns the first of each run of `count` elements along an axis: what `Repeat` has made them of.

    Args:
        value: The repeated value.
        shape: Its shape.
        axis: The axis.
        count: The length of a run.
    """
    in_runs = (*shape[:axis], shape[axis] // count, count, *shape[axis + 1 :])
    return Index(Reshape(value, in_runs), axis + 1, 0)


def repeats(recipe: Recipe) -> bool:
    """Tells whether an element is in the recipe's value more than once."""
    return any(isinstance(part, Repeat) for part in parts_of(recipe))


def _stack_shape(shapes: list[Shape], axis: int) -> Shape:
    first = shapes[0]
    if any(shape != first for shape in shapes):
        raise RecipeError(f"cannot stack shapes that differ: {sorted(set(shapes))}")
    if not 0 <= axis <= len(first):
        raise RecipeError(f"cannot stack {first} on axis {axis}")
    return (*first[:axis], len(shapes), *first[axis:])


def _concat_shape(shapes: list[Shape], axis: int) -> Shape:
    first = shapes[0]
    rest = {(*shape[:axis], *shape[axis + 1 :]) for shape in shapes}
    if not 0 <= axis < len(first) or len(rest) > 1 or len({len(s) for s in shapes}) > 1:
        raise RecipeError(f"cannot join shapes {shapes} on axis {axis}")
    return (*first[:axis], sum(shape[axis] for shape in shapes), *first[axis + 1 :])


def _part_shape(recipe: Index | Slice, shape: Shape) -> Shape:
    axis = recipe.axis
    if not 0 <= axis < len(shape):
        raise RecipeError(f"shape {shape} has no axis {axis}")
    if isinstance(recipe, Index):
        if not 0 <= recipe.index < shape[axis]:
            raise RecipeError(f"shape {shape} has no element {recipe.index} on axis {axis}")
        return (*shape[:axis], *shape[axis + 1 :])
    if recipe.start < 0 or recipe.start + recipe.size > shape[axis]:
        raise RecipeError(f"shape {shape} has no {recipe.start}..{recipe.start + recipe.size} on axis {axis}")
    return (*shape[:axis], recipe.size, *shape[axis + 1 :])


def describe(recipe: Recipe) -> str:
    """Returns what a recipe does, in a few words: `unstack axis 1 [3]`."""
    match recipe:
        case Read():
            return ""
        case Fill(shape):
            return f"fill {shape}"
        case Stack(sources, axis):
            return _join(_inner(sources), f"stack {len(sources)} on axis {axis}")
        case Concat(sources, axis):
            return _join(_inner(sources), f"fuse {len(sources)} on axis {axis}")
        case _:
            return _join(describe(recipe.source), _described(recipe))


def _described(recipe: OneSource) -> str:
    """Returns what the outermost step alone does."""
    match recipe:
        case Index(_, axis, index):
            return f"unstack axis {axis} [{index}]"
        case Slice(_, axis, start, size):
            return f"split axis {axis} [{start}:{start + size}]"
        case Transpose(_, permutation):
            return f"transpose {permutation}"
        case Reshape(_, shape):
            return f"reshape {shape}"
        case Repeat(_, axis, count):
            return f"repeat {count} times on axis {axis}"
        case Scale(_, factor):
            return f"scale {factor:g}"
        case Add(_, constant):
            return f"add {constant:g}"


def _inner(sources: tuple[Recipe, ...]) -> str:
    kinds = {describe(source) for source in sources}
    return kinds.pop() if len(kinds) == 1 else "each part in its own way"


def _join(first: str, then: str) -> str:
    return f"{first}, {then}" if first else then


def render_reads(recipe: Recipe) -> str:
    """Returns the stored paths of a recipe for a person: one, or first ... last."""
    paths = list(dict.fromkeys(reads(recipe)))
    if not paths:
        return "(nothing stored)"
    if len(paths) == 1:
        return render(paths[0])
    return f"{render(paths[0])} ... {render(paths[-1])} ({len(paths)})"


Shapes = Mapping[Path, Shape]


def simplify(recipe: Recipe, shapes: Shapes) -> Recipe:
    """Returns a recipe of the same value with fewer steps."""
    match recipe:
        case Read() | Fill():
            return recipe
        case Stack(sources, axis):
            return _stack(tuple(simplify(source, shapes) for source in sources), axis, shapes)
        case Concat(sources, axis):
            return _concat(tuple(simplify(source, shapes) for source in sources), axis, shapes)
        case _:
            return _step(dataclasses.replace(recipe, source=simplify(recipe.source, shapes)), shapes)


def _step(recipe: OneSource, shapes: Shapes) -> Recipe:
    match recipe:
        case Index(Stack(sources, axis), at, index) if at == axis:
            return sources[index]
        case Slice(source, axis, 0, size) if shape_of(source, shapes)[axis] == size:
            return source
        case Slice(Concat(sources, axis), at, start, size) if at == axis:
            return _part(recipe, sources, start, size, shapes)
        case Transpose(Transpose(source, first), second):
            return _step(Transpose(source, tuple(first[axis] for axis in second)), shapes)
        case Transpose(source, permutation) if permutation == tuple(range(len(permutation))):
            return source
        case Reshape(Reshape(source, _), shape):
            return _step(Reshape(source, shape), shapes)
        case Reshape(source, shape) if shape_of(source, shapes) == shape:
            return source
        case Scale() | Add():
            return _arithmetic(recipe)
        case _:
            return recipe


def _arithmetic(recipe: Scale | Add) -> Recipe:
    match recipe:
        case Scale(Scale(source, first), second):
            return _arithmetic(Scale(source, first * second))
        case Scale(source, 1.0) | Add(source, 0.0):
            return source
        case Add(Add(source, first), second) if second == -first:
            return source
        case _:
            return recipe


def _part(recipe: Slice, sources: tuple[Recipe, ...], start: int, size: int, shapes: Shapes) -> Recipe:
    """Returns the one source that a slice cuts out of several, if it is one."""
    at = 0
    for source in sources:
        length = shape_of(source, shapes)[recipe.axis]
        if (at, length) == (start, size):
            return source
        at += length
    return recipe


def _concat(sources: tuple[Recipe, ...], axis: int, shapes: Shapes) -> Recipe:
    at = 0
    for part in sources:
        first = sources[0]
        if not isinstance(part, Slice) or not isinstance(first, Slice):
            return Concat(sources, axis)
        if (part.source, part.axis, part.start) != (first.source, axis, at):
            return Concat(sources, axis)
        at += part.size
    whole = sources[0].source if isinstance(sources[0], Slice) else sources[0]
    return whole if shape_of(whole, shapes)[axis] == at else Concat(sources, axis)


def _stack(sources: tuple[Recipe, ...], axis: int, shapes: Shapes) -> Recipe:
    for at, part in enumerate(sources):
        first = sources[0]
        if not isinstance(part, Index) or not isinstance(first, Index):
            return Stack(sources, axis)
        if (part.source, part.axis, part.index) != (first.source, axis, at):
            return Stack(sources, axis)
    whole = sources[0].source if isinstance(sources[0], Index) else sources[0]
    return whole if shape_of(whole, shapes)[axis] == len(sources) else Stack(sources, axis)
