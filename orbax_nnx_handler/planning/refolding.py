"""Which rectangle of an array a region folds out of when the array is reshaped."""

import math

from orbax_nnx_handler.planning.leaves import Shape

Region = tuple[tuple[int, int], ...]
"""Start and stop along each axis, in elements."""


def whole(shape: Shape) -> Region:
    """Returns the region that covers an array of this shape."""
    return tuple((0, size) for size in shape)


def rectangles(before: Shape, after: Shape, region: Region) -> tuple[Region, Region]:
    """Finds a small rectangle below a reshape that holds a region above it.

    Args:
        before: The shape below the reshape.
        after: The shape above it, with the same elements in C order.
        region: What is needed above.

    Returns:
        A rectangle below and one above that hold the same elements in the same
        order; the one above contains the region.
    """
    below: list[tuple[int, int]] = []
    above: list[tuple[int, int]] = []
    for old, new in _groups(before, after):
        low, high = _narrow(_at(before, old), _at(after, new), tuple(region[axis] for axis in new))
        below += low
        above += high
    return tuple(below), tuple(above)


def _at(shape: Shape, axes: range) -> Shape:
    return tuple(shape[axis] for axis in axes)


def _groups(before: Shape, after: Shape) -> list[tuple[range, range]]:
    """Pairs the runs of axes of two shapes that hold the same elements."""
    groups: list[tuple[range, range]] = []
    old = new = 0
    while old < len(before) or new < len(after):
        old_end, new_end = min(old + 1, len(before)), min(new + 1, len(after))
        while math.prod(before[old:old_end]) != math.prod(after[new:new_end]):
            if math.prod(before[old:old_end]) < math.prod(after[new:new_end]) and old_end < len(before):
                old_end += 1
            elif new_end < len(after):
                new_end += 1
            else:
                old_end += 1
        groups.append((range(old, old_end), range(new, new_end)))
        old, new = old_end, new_end
    return groups


def _narrow(before: Shape, after: Shape, wanted: Region) -> tuple[Region, Region]:
    """Narrows one run of axes along its leading axis, where rows of both shapes end together."""
    if not before or not after or math.prod(before) == 0:
        return whole(before), whole(after)
    old_row, new_row = math.prod(before[1:]), math.prod(after[1:])
    step = math.lcm(old_row, new_row)
    start = wanted[0][0] * new_row // step * step
    stop = min(-(-wanted[0][1] * new_row // step) * step, math.prod(before))
    low = ((start // old_row, stop // old_row), *whole(before[1:]))
    high = ((start // new_row, stop // new_row), *whole(after[1:]))
    return low, high
