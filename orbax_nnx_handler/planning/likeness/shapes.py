"""How a stored shape becomes a wanted one: axes split or joined, in another order, elements repeated."""

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from orbax_nnx_handler.planning.core import recipes
from orbax_nnx_handler.planning.core.leaves import Shape, permuted
from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.core.recipes import Recipe, Shapes, shape_of
from orbax_nnx_handler.planning.rules import Add, Repeat, Reshape, Rule, Transpose

_MOST_AXES = 6


@dataclasses.dataclass(frozen=True)
class Step:
    """One change of shape, or of every element.

    Attributes:
        kind: What is done.
        before: The shape before.
        shape: The shape that comes out.
        axes: Of a transpose, the axis that each axis comes from; of a repeat, the axis.
        constant: What is added.
    """

    kind: Literal["reshape", "transpose", "repeat", "add"]
    before: Shape
    shape: Shape
    axes: tuple[int, ...] = ()
    constant: float = 0.0

    def __str__(self) -> str:
        return f"{self.kind} {self.axes or self.shape}"


Steps = tuple[Step, ...]


@dataclasses.dataclass(frozen=True)
class Way:
    """One way from a stored shape to a wanted one.

    Attributes:
        steps: What is done, in order.
        turned: Whether a matrix is transposed: its inputs and outputs change places.
        named: Whether names tell what the axes of both arrays are; None where they alone could, and do not.
    """

    steps: Steps
    turned: bool = False
    named: bool | None = False

    @property
    def cost(self) -> float:
        """How far it is from doing nothing; a reshape that splits heads is nearly nothing."""
        return sum(0.5 if len(step.shape) == len(step.before) else 0.1 for step in self.steps)

    @property
    def flattens(self) -> bool:
        """Whether places and channels of a convolution are one axis on one side, in an order not told."""
        both = (sorted((step.before, step.shape), key=len) for step in self.steps if step.kind == "reshape")
        return any(
            len(few) == 2 < len(many) - max(1, many.count(1)) and (few[0] == many[0] or few[1] == many[-1])
            for few, many in both
        )


@functools.lru_cache(maxsize=65536)
def ways(stored: Shape, wanted: Shape) -> tuple[Way, ...]:
    """Returns the ways from one shape to another, the simplest first; none where there is none.

    Elements never change their order within an axis. Of the ways that turn a matrix, and of those that do
    not, the simplest each: which of the two is meant, shapes tell only where one of them does not come out.
    """
    if math.prod(stored) != math.prod(wanted) or max(len(stored), len(wanted)) > _MOST_AXES:
        return ()
    straight = _straight(stored, wanted)
    turned = None if is_vector(stored) or is_vector(wanted) else _turned(stored, wanted)  # Or a bias.
    if straight is None and _flattens_an_image(stored, wanted):
        return ()
    if straight is None and turned is None:
        straight, turned = map(dict(_moved(stored, wanted)).get, (False, True))
        long = [[at for at in x[0].axes if stored[at] > 1] for x in (straight, turned) if x]
        straight = None if len(long) > 1 and [] != long[0] == long[1] else straight  # Both do the same.
    found = [Way(straight)] if straight is not None else []
    return (*found, *([Way(turned, turned=True)] if turned is not None else []))


def is_vector(shape: Shape) -> bool:
    """Tells whether at most one axis has more than one element."""
    return len(shape) - shape.count(1) < 2


def _flattens_an_image(stored: Shape, wanted: Shape) -> bool:
    """Tells whether only outputs tell if channels or places of an image come first in what is flattened."""
    short, long = sorted((stored, wanted), key=len)
    return (len(short), len(long)) == (2, 4) and (long[0] == long[1] > 1 or long[2] == long[3] > 1)


def _straight(stored: Shape, wanted: Shape) -> Steps | None:
    """Returns the steps that leave the axes in their order; heads are never joined with inputs."""
    if stored == wanted:
        return ()
    few, many = sorted((stored, wanted), key=len)
    is_torn = (len(few), len(many)) == (2, 4) and many[0] != few[0] and many[-1] != few[-1]
    if _regroups(stored, wanted) and not is_torn:
        return (Step("reshape", stored, wanted),)
    # Image axes last, of as many outputs as inputs: nothing tells which of these two comes first.
    is_open = len(stored) == 4 and stored[:2] == wanted[2:] and stored[2:] == wanted[:2] == wanted[1::-1]
    return (transposed(stored, (2, 3, 0, 1)),) if is_open else None


def _turned(stored: Shape, wanted: Shape) -> Steps | None:
    """Returns the steps that put the last axis of a stored matrix first."""
    for axes in _turns(stored):
        longer = [axis for axis in axes if stored[axis] > 1]  # Where these stay in order nothing is turned.
        if permuted(stored, axes) == wanted and longer != sorted(longer):
            return (transposed(stored, axes),)
    # Heads of as many features as inputs, or outputs, are as a matrix on either side of these.
    is_any = len(stored) > 2 and (wanted[:1] == wanted[1:] or 1 < len({*stored}) < len(stored))
    cuts = range(1, len(stored)) if is_any else ()
    if (plain := wanted[::-1]) in [(math.prod(stored[:at]), math.prod(stored[at:])) for at in cuts]:
        return (Step("reshape", stored, plain), transposed(plain, (1, 0)))
    is_split = len(stored) == 2 and _regroups(stored[::-1], wanted)
    return (transposed(stored, (1, 0)), Step("reshape", stored[::-1], wanted)) if is_split else None


def _turns(shape: Shape) -> Sequence[tuple[int, ...]]:
    if len(shape) < 4:  # A matrix; a stack of matrices; PyTorch's kernels over one axis.
        return [axes for axes in ((1, 0), (0, 2, 1), (2, 1, 0)) if len(axes) == len(shape)]
    # To or from PyTorch's outputs, inputs, height, width: the axes of the image are the smaller ones.
    forth, back, depthwise = (3, 2, 0, 1), (2, 3, 1, 0), (2, 3, 0, 1)  # The last one of TensorFlow's kernels.
    orders = (forth, depthwise, back)[:: 1 if max(shape[:2]) <= max(shape[2:]) else -1]
    return [axes for axes in orders if len(shape) == 4 and (axes != depthwise or 1 in shape[1::2])]


def _moved(stored: Shape, wanted: Shape) -> Iterator[tuple[bool, Steps]]:
    """Yields a split and then another order of axes, or another order and then a join.

    What was one axis keeps its order: heads come before what each of them holds. First the ways
    that move the most, so that the last of each kind is the simplest.
    """
    for axes in reversed(_orders(len(wanted))):
        split = tuple(wanted[axes.index(at)] for at in range(len(wanted)))
        if not _keeps_order(split, axes):
            continue
        if split == stored and not _is_turn(axes):
            yield False, (transposed(stored, axes),)
        groups = _groups(stored, split) if len(split) > len(stored) else None
        if groups is not None and all(_ascends(axes.index(at) for at in group) for group in groups):
            turned = _turns_heads(groups, [axes.index(at) for at in range(len(axes))])
            yield turned, (Step("reshape", stored, split), transposed(split, axes))
    for axes in reversed(_orders(len(stored))):
        moved = permuted(stored, axes)
        groups = _groups(wanted, moved) if len(stored) > len(wanted) and _keeps_order(stored, axes) else None
        if groups is not None and all(_ascends(axes[at] for at in group) for group in groups):
            yield _turns_heads(groups, axes), (transposed(stored, axes), Step("reshape", moved, wanted))


def _turns_heads(groups: Sequence[Sequence[int]], places: Sequence[int]) -> bool:
    """Tells whether the axis beside the heads, of outputs where it is the last one, changes sides."""
    whole = [at for at, group in enumerate(groups) if len(group) == 1]
    is_beside = len(groups) == 2 and len(whole) == 1
    return is_beside and whole[0] != (places[groups[whole[0]][0]] == len(places) - 1)


def without_axis(shape: Shape, axis: int) -> Shape:
    """Returns a shape without one of its axes."""
    return (*shape[:axis], *shape[axis + 1 :])


def _keeps_order(shape: Shape, axes: tuple[int, ...]) -> bool:
    """Tells whether axes of one length stay in their order: heads and features of each, where both are 4."""
    return all(
        axes.index(one) < axes.index(other)
        for one, other in itertools.combinations(range(len(shape)), 2)
        if shape[one] == shape[other] != 1
    )


def _groups(whole: Shape, parts: Shape) -> list[list[int]] | None:
    """Returns which axes of a finer shape each axis of a coarser one is split into; None if it is not."""
    found: list[list[int]] = []
    at = 0
    for length in whole:
        group: list[int] = []
        size = 1
        while at < len(parts) and (size < length or (not group and length == 1)):
            size *= parts[at]
            group.append(at)
            at += 1
        if size != length:
            return None
        found.append(group)
    return found if at == len(parts) else None


def _ascends(places: Iterable[int]) -> bool:
    listed = list(places)
    return listed == sorted(listed)


@functools.lru_cache
def _orders(rank: int) -> Sequence[tuple[int, ...]]:
    """Returns the orders of so many axes but their own, those that move the fewest first."""
    every = [axes for axes in itertools.permutations(range(rank)) if axes != tuple(range(rank))]
    return sorted(every, key=lambda axes: (_runs(axes), sum(map(operator.ne, axes, range(rank))), axes))


def _runs(axes: Sequence[int]) -> int:
    """Counts the runs of axes that stay together: one axis moved over the others makes two or three."""
    return 1 + sum(b != a + 1 for a, b in itertools.pairwise(axes))


def _is_turn(axes: tuple[int, ...]) -> bool:
    # Rows and columns keep their order: a kernel of 1 by 5 is none of 5 by 1.
    return axes in ((1, 0), (0, 2, 1), (2, 1, 0), (2, 3, 1, 0), (3, 2, 1, 0))


def transposed(before: Shape, axes: tuple[int, ...]) -> Step:
    """Returns the step that puts the axes of a shape into another order."""
    return Step("transpose", before, permuted(before, axes), axes)


def _regroups(one: Shape, other: Shape) -> bool:
    """Tells whether one shape only splits axes of the other: heads and their width, axes of one element."""
    left, right = _edges(one), _edges(other)
    windows = {shape[0] for shape in (one, other) if len(shape) == 4 and shape[0] == shape[1]}
    # A convolution over one place is none over a window.
    return (left <= right or right <= left) and not (len(windows) == 2 and 1 in windows)


def _edges(shape: Shape) -> set[int]:
    lengths = (length for length in shape if length != 1)
    return {*itertools.accumulate(lengths, operator.mul)} - {math.prod(shape)}


@dataclasses.dataclass(frozen=True)
class Joint:
    """How several parts lie in one array.

    Attributes:
        axis: The axis along which they lie.
        is_new: Whether each part is one element of an axis of its own.
        sizes: The elements of each part along the axis; None where they are alike.
        parts: For each part its ways: into the array, or out of it.
    """

    axis: int
    is_new: bool
    sizes: tuple[int, ...] | None
    parts: tuple[tuple[Way, ...], ...]

    def part_at(self, cut: recipes.Index | recipes.Slice) -> int | None:
        """Returns which part a cut takes out of the whole; None for a piece that is none."""
        if self.is_new or isinstance(cut, recipes.Index):
            return cut.index if self.is_new and isinstance(cut, recipes.Index) else None
        sizes = self.sizes or (cut.size,) * len(self.parts)
        starts = [sum(sizes[:at]) for at in range(len(sizes))]
        return starts.index(cut.start) if cut.start in starts else None


def joints(parts: Sequence[Shape], whole: Shape, *, split: bool) -> Iterator[Joint]:
    """Yields how parts may lie in a whole.

    Args:
        parts: The shapes of the parts, in their order.
        whole: The shape of the whole.
        split: Whether the whole is stored and the parts are wanted.
    """
    count, sizes = len(parts), [math.prod(part) for part in parts]
    if sum(sizes) != math.prod(whole):
        return
    for axis, length in enumerate(whole):
        rest = without_axis(whole, axis)
        across = math.prod(rest)
        if len(rest) == 1 and all(
            len(part) == 3 and part[0] == part[1] * part[2] != across for part in parts
        ):
            continue  # It would tear heads apart.
        if length == count and len(set(sizes)) == 1:
            found = _ways_of(parts, (rest,) * count, split)
            if all(found):
                yield Joint(axis, True, None, found)
        if across and all(size % across == 0 for size in sizes):
            lengths = tuple(size // across for size in sizes)
            shapes = [(*whole[:axis], each, *whole[axis + 1 :]) for each in lengths]
            found = _ways_of(parts, shapes, split)
            if all(found):
                yield Joint(axis, False, lengths if len(set(lengths)) > 1 else None, found)


def _ways_of(parts: Sequence[Shape], pieces: Sequence[Shape], split: bool) -> tuple[tuple[Way, ...], ...]:
    both = zip(parts, pieces, strict=True)
    return tuple(ways(piece, part) if split else ways(part, piece) for part, piece in both)


def several_times(way: Way, shape: Shape, axis: int, times: int, together: bool) -> Way:
    """Returns a way after which the heads along an axis are there several times, in a row or together."""
    more = (*shape[:axis], shape[axis] * times, *shape[axis + 1 :])
    if not together:
        return Way((*way.steps, Step("repeat", shape, more, (axis,))))
    one, several = ((*shape[:axis], count, *shape[axis:]) for count in (1, times))
    steps = Step("reshape", shape, one), Step("repeat", one, several, (axis,)), Step("reshape", several, more)
    return Way((*way.steps, *steps))


_HEAD = 64
"""The usual number of features of a head."""


def arrangements(
    wholes: Sequence[Shape], axes: Sequence[int], roles: Sequence[str], parts: Sequence[Shape], *, split: bool
) -> Iterator[tuple[str, Sequence[Steps]]]:
    """Yields how parts may lie in arrays: side by side, or for each head its share of each part.

    A gate and what it gates, which have no heads, may take turns: a feature of each.

    Args:
        wholes: The shapes of the arrays: of a kernel, of its bias.
        axes: The axis along which the parts lie in each.
        roles: What the parts are, in their order.
        parts: Their shapes, where they are kept apart; one with an axis of heads tells how many there are.
        split: Whether the arrays are stored; then the steps lead to parts side by side.

    Yields:
        The arrangement in words, and for each array the steps to or from parts side by side.
    """
    yield "side by side", [()] * len(wholes)
    count, in_turns = len(roles), "gate" in roles
    lengths = {shape[axis] // count for shape, axis in zip(wholes, axes, strict=True)}
    if len(lengths) > 1 or any(shape[axis] % count for shape, axis in zip(wholes, axes, strict=True)):
        return
    (length,) = lengths
    for heads in [length] if in_turns else _heads_of(length, parts):
        counts = (heads, count) if split else (count, heads)
        steps = [_by_head(shape, axis, counts) for shape, axis in zip(wholes, axes, strict=True)]
        yield "in turns" if in_turns else f"head by head, {heads} heads", steps


def _heads_of(length: int, shapes: Sequence[Shape]) -> list[int]:
    """Returns how many heads so many features may belong to, likely ones first."""
    numbers = [number for number in range(2, length) if length % number == 0]
    told = [
        number
        for number in numbers
        if shapes and all(shape[-2:] == (number, length // number) for shape in shapes)
    ]
    return told or sorted(numbers, key=lambda number: abs(math.log(length / number / _HEAD)))


def _by_head(shape: Shape, axis: int, counts: tuple[int, int]) -> Steps:
    width = shape[axis] // math.prod(counts)
    divided, moved = ((*shape[:axis], *each, width, *shape[axis + 1 :]) for each in (counts, counts[::-1]))
    order = [*range(len(divided))]
    order[axis], order[axis + 1] = axis + 1, axis
    return (Step("reshape", shape, divided), transposed(divided, tuple(order)), Step("reshape", moved, shape))


def shaping_rule(pattern: str, step: Step) -> Rule:
    """Returns the rule of one step."""
    match step.kind:
        case "transpose":
            return Transpose(pattern, step.axes)
        case "reshape":
            return Reshape(pattern, step.shape, step.before)
        case "repeat":
            (axis,) = step.axes
            return Repeat(pattern, axis, step.shape[axis] // step.before[axis])
        case "add":
            return Add(pattern, step.constant)


# Steps out of recipes.


_SHAPING = (recipes.Transpose, recipes.Reshape, recipes.Repeat, recipes.Add)


def chain_of(recipe: Recipe) -> tuple[Recipe, list[Recipe]]:
    """Returns what is shaped, and the steps on it in their order."""
    steps: list[Recipe] = []
    while isinstance(recipe, _SHAPING):
        steps.insert(0, recipe)
        recipe = recipe.source
    return recipe, steps


def cuts_of(recipe: Recipe) -> tuple[list[recipes.Index | recipes.Slice], Path | None]:
    """Returns what is cut out of a stored leaf, and the leaf; None for what is more than that."""
    cuts: list[recipes.Index | recipes.Slice] = []
    while isinstance(recipe, recipes.Index | recipes.Slice):
        cuts.append(recipe)
        recipe = recipe.source
    return cuts, recipe.path if isinstance(recipe, recipes.Read) else None


def shaping(steps: Sequence[Recipe], shapes: Shapes) -> Steps:
    """Returns the steps of a chain."""
    return tuple(_step(step, shapes) for step in steps)


def _step(step: Recipe, shapes: Shapes) -> Step:
    shape = shape_of(step, shapes)
    match step:
        case recipes.Transpose(source, permutation):
            return Step("transpose", shape_of(source, shapes), shape, permutation)
        case recipes.Repeat(source, axis, _):
            return Step("repeat", shape_of(source, shapes), shape, (axis,))
        case recipes.Add(source, constant):
            return Step("add", shape, shape, constant=constant)
        case recipes.Reshape(source, _):
            return Step("reshape", shape_of(source, shapes), shape)
        case _:
            raise AssertionError(step)


def lifted(
    cuts: Sequence[recipes.Index | recipes.Slice], steps: Steps, stored: Shape, wanted: Shape
) -> Steps | None:
    """Returns the steps of one layer as steps of a stack whose layers lie first on both sides."""
    cut = cuts[0] if len(cuts) == 1 and wanted[:1] == stored[:1] else None
    if not isinstance(cut, recipes.Index) or cut.axis != 0:
        return None
    count = stored[0]
    return tuple(
        dataclasses.replace(
            step,
            before=(count, *step.before),
            shape=(count, *step.shape),
            axes=tuple(axis + 1 for axis in step.axes) if step.kind == "repeat" else _below_first(step),
        )
        for step in steps
    )


def _below_first(step: Step) -> tuple[int, ...]:
    return (0, *(axis + 1 for axis in step.axes)) if step.kind == "transpose" else ()


def follow(*shapes: Shape) -> bool:
    """Tells whether each layer has as many outputs, or pairs of gated ones, as the next one has inputs."""
    pairs = itertools.pairwise(shapes)
    return all(len(x) != 2 or len(y) != 2 or x[1] in (y[0], 2 * y[0]) for x, y in pairs)
