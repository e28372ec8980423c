"""Stacks of layers: the module that holds a group along an axis of its own, or every second, third, …."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.suggesting.module_parts import Leaf, Names, levels
from orbax_nnx_handler.planning.suggesting.series import (
    Series,
    are_alike,
    is_complete,
    kinds_of,
    looks_of,
    said_of,
    series_of,
    sizes_of,
)
from orbax_nnx_handler.planning.suggesting.shapes import without_axis
from orbax_nnx_handler.planning.suggesting.vocabulary import concepts, exclude, likeness


def shared_in(series: Series) -> Series:
    """Returns a group with what all of its layers hold, where that is nearly all.

    The first one often holds something beside it: the table of relative positions.
    """
    looks = [{*looks_of(held, series.depth)} for held in series.members.values()]
    shared = set[tuple[Names, Shape]].intersection(*looks)
    if all(held == shared for held in looks) or not shared:
        return series
    members = {
        number: [leaf for leaf in held if (leaf.names[series.depth :], leaf.shape) in shared]
        for number, held in series.members.items()
    }
    shared_part = dataclasses.replace(series, members=members)
    return shared_part if shared_part.size * 10 > series.size * 9 else series


def stack_of(
    series: Series, free: Sequence[Leaf], above: int, least: int
) -> tuple[Names, int, list[Leaf]] | None:
    """Returns the module whose leaves all have an axis for the layers, and the axis."""
    count = len(series.members)
    found: list[tuple[float, float, int, Names, int, list[Leaf]]] = []
    for prefix, leaves, enough in _possible_stacks(free, above, least):
        if exclude(said_of(series), concepts(level.base for level in levels(prefix))):
            continue
        axes = [axis for axis in range(3) if _have_axis(leaves, axis, count)]
        size = sizes_of(leaves)
        ratio = min(size, series.size) / max(size, series.size)
        alike = likeness(said_of(series), concepts(prefix))
        if axes and ratio > enough:
            axis = _likeliest_axis(series, leaves, axes)
            found.append((ratio, alike, _depth(prefix, leaves), prefix, axis, leaves))
    if not found:
        return None
    found.sort(key=lambda item: item[:5], reverse=True)
    best = found[0]
    if best[4] < 0 or any(item[0] == best[0] and not _nested(item[3], best[3]) for item in found[1:]):
        return None
    return best[3], best[4], best[5]


Share = tuple[Series, Names, int, list[Leaf]]
"""Some layers of a group, with the module that holds them stacked, the axis, and the leaves in it."""


def shares_of(series: Series, free: Sequence[Leaf], above: int) -> list[Share]:
    """Returns the stacks that together hold a group, each those of one kind or every second, third, …."""
    kinds = [(kind, stack_of(kind, free, above, 2)) for kind in kinds_of(series)]
    found = [(kind, *stack) for kind, stack in kinds if stack is not None and are_alike(kind)]
    if len(kinds) > 1 and len(found) == len(kinds) and len({share[1] for share in found}) == len(found):
        return found
    options = [_every_few(series, block) for block in series_of(free, above)]
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


def _possible_stacks(
    free: Sequence[Leaf], above: int, least: int
) -> Iterator[tuple[Names, list[Leaf], float]]:
    """Yields modules, and the arrays beside the modules in one, with how much of a group each has to be."""
    below: dict[Names, list[Leaf]] = defaultdict(list)
    beside: dict[Names, list[Leaf]] = defaultdict(list)
    for leaf in free:
        beside[leaf.names[:-1]].append(leaf)
        for depth in range(above + 1, len(leaf.names)):
            below[leaf.names[:depth]].append(leaf)
    for prefix, leaves in below.items():
        yield prefix, leaves, 0.5 if least > 1 else 0.99
    for prefix, leaves in beside.items():
        if len(leaves) < len(below.get(prefix, free)):
            yield prefix, leaves, 0.99


def _depth(prefix: Names, leaves: Sequence[Leaf]) -> int:
    """Returns how deep a module lies, less than nothing where it holds its leaves itself."""
    return len(prefix) if all(len(leaf.names) > len(prefix) + 1 for leaf in leaves) else -len(prefix)


def _nested(one: Names, other: Names) -> bool:
    shorter = min(len(one), len(other))
    return one[:shorter] == other[:shorter]


def _have_axis(leaves: Iterable[Leaf], axis: int, count: int) -> bool:
    return all(len(leaf.shape) > axis and leaf.shape[axis] == count for leaf in leaves)


def _likeliest_axis(series: Series, leaves: Sequence[Leaf], axes: Sequence[int]) -> int:
    """Returns the one axis under which a layer has the shapes of the others; -1 where two have."""
    if len(axes) == 1:
        return axes[0]
    first = sorted(leaf.shape for leaf in series.members[series.numbers[0]])
    fitting = [axis for axis in axes if sorted(without_axis(leaf.shape, axis) for leaf in leaves) == first]
    return (fitting or axes)[0] if len(fitting or axes) == 1 else -1
