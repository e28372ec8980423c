"""Stacks: what of the other side holds the layers of a group along an axis, or every second, third, …."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.paths import levels
from orbax_nnx_handler.planning.likeness.module_parts import Leaf, Stacks, depth_of
from orbax_nnx_handler.planning.likeness.shapes import without_axis
from orbax_nnx_handler.planning.likeness.vocabulary import (
    MARGIN,
    Names,
    concepts,
    exclude,
    likeness,
)
from orbax_nnx_handler.planning.suggesting.series import (
    Series,
    are_alike,
    is_complete,
    kinds_of,
    said_of,
    sizes_of,
)


def shared_in(series: Series) -> Series:
    """Returns a group with what all of its layers hold, where that is nearly all.

    The first one often holds something beside it: the table of relative positions.
    """
    looks = [{*held} for held in series.looks.values()]
    shared = set[tuple[Names, Shape]].intersection(*looks)
    if all(held == shared for held in looks) or not shared:
        return series
    members = {
        number: [leaf for leaf in held if (leaf.names[series.depth :], leaf.shape) in shared]
        for number, held in series.members.items()
    }
    shared_part = dataclasses.replace(series, members=members)
    return shared_part if shared_part.size * 10 > series.size * 9 else series


def stack_of(series: Series, possible: Stacks, least: int) -> tuple[Names, int, list[Leaf]] | None:
    """Returns the module whose leaves all have an axis for the layers, and the axis."""
    said, count = said_of(series), len(series.members)
    found: list[tuple[bool, float, float, int, Names, int, list[Leaf]]] = []
    for prefix, leaves, is_module in possible.get(count, ()):
        lengths = enumerate(leaves[0].shape[:3])
        axes = [at for at, length in lengths if length == count and _have_axis(leaves, at, count)]
        # What is a list or holds one is no query and no value of an attention.
        if not axes or exclude(said - {"q", "v"}, concepts(level.base for level in levels(prefix))):
            continue
        size = sizes_of(leaves)
        ratio = min(size, series.size) / max(size, series.size)
        if ratio > (0.5 if is_module and least > 1 else 0.99):
            alike, axis = likeness(said, concepts(prefix)), _likeliest_axis(series, leaves, axes)
            is_whole = 10 * size >= 9 * series.size  # Else it is a part of one that holds two groups.
            found.append((is_whole, ratio, alike, depth_of(prefix, leaves), prefix, axis, leaves))
    # A network of the group's own name comes first.
    found = [item for item in found if item[4][:1] == series.template[:1]] or found
    if not found:
        return None
    best, *others = sorted(found, key=lambda item: item[:6], reverse=True)
    # Of two of one size, that of the group's own words.
    alike = best[2] - MARGIN if best[2] > 0 else -math.inf
    rivals = [item for item in others if item[1] == best[1] and item[2] > alike]
    apart = (x != y for item in rivals for x, y in zip(item[4], best[4], strict=False))
    return None if best[5] < 0 or any(apart) else best[4:]


Share = tuple[Series, Names, int, list[Leaf]]
"""Some layers of a group, with the module that holds them stacked, the axis, and the leaves in it."""


def shares_of(series: Series, possible: Stacks, blocks: Callable[[], Iterable[Series]]) -> list[Share]:
    """Returns the stacks that together hold a group, each those of one kind or every second, third, …."""
    kinds = [(kind, stack_of(kind, possible, 2)) for kind in kinds_of(series)]
    found = [(kind, *stack) for kind, stack in kinds if stack is not None and are_alike(kind)]
    if len(kinds) > 1 and len(found) == len(kinds) and len({share[1] for share in found}) == len(found):
        return found
    options = [_every_few(series, block) for block in blocks()]
    options = [shares for shares in options if shares]
    return options[0] if len(options) == 1 else []


def _every_few(series: Series, block: Series) -> list[Share]:
    """Returns the layers of a group by the place in a block of layers, where a program scans over blocks."""
    step, numbers = len(block.members), series.numbers
    count, rest = divmod(len(numbers), step)
    found: list[Share] = []
    for place in block.numbers if not rest and count > 1 and is_complete(block) else ():
        first = block.numbers.index(place)
        share = dataclasses.replace(series, members={at: series.members[at] for at in numbers[first::step]})
        leaves = block.members[place]
        axes = [axis for axis in range(3) if _have_axis(leaves, axis, count)]
        axis = _likeliest_axis(share, leaves, axes) if axes else -1
        if axis < 0 or sizes_of(leaves) != share.size or not are_alike(share):
            return []
        found.append((share, block.place(place), axis, leaves))
    return found


def _have_axis(leaves: Iterable[Leaf], axis: int, count: int) -> bool:
    return all(len(leaf.shape) > axis and leaf.shape[axis] == count for leaf in leaves)


def _likeliest_axis(series: Series, leaves: Sequence[Leaf], axes: Sequence[int]) -> int:
    """Returns the one axis under which a layer has the shapes of the others; -1 where two have."""
    first = sorted(leaf.shape for leaf in series.members[series.numbers[0]])
    fitting = [axis for axis in axes if sorted(without_axis(leaf.shape, axis) for leaf in leaves) == first]
    return (fitting or axes)[0] if len(fitting or axes) == 1 else -1
