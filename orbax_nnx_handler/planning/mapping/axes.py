"""The stacked axes that a stored leaf and a wanted leaf may have."""

from collections.abc import Collection, Iterable

from orbax_nnx_handler.planning.mapping.layers import FLAT, LayerPiece, layer_shape

Axes = tuple[int | None, int | None]
"""The stacked axis of the stored leaf and of the wanted leaf; None where flat."""


def two_of(options: Iterable[Collection[Axes]]) -> Iterable[tuple[Axes, ...]]:
    """Returns two of the ways to choose, where there is no telling: a question needs no more."""
    ordered = [sorted(axes, key=str) for axes in options]
    return {tuple(axes[0] for axes in ordered), tuple(axes[-1] for axes in ordered)}


def axes_between(wanted: LayerPiece, stored: LayerPiece) -> Iterable[Axes]:
    """Yields the axes under which two pieces hold layers of one shape."""
    forms = {wanted.place.form, stored.place.form}
    # What is left over after the blocks is flat on either side and tells no axis.
    if "remainder" in forms or (len(forms) == 1 and forms != {"block"}):
        return
    for left in _axis_options(stored):
        for right in _axis_options(wanted):
            if layer_shape(stored, left) == layer_shape(wanted, right):
                yield left, right


def _axis_options(piece: LayerPiece) -> Iterable[int | None]:
    return (None,) if piece.place.form in FLAT else range(len(piece.shape))


def is_on_both(axes: Axes, said: int) -> bool:
    """Tells whether each side that is stacked is so along the axis meant."""
    return all(axis in (None, said) for axis in axes)


def is_first_stacked(axes: Axes, said: int) -> bool:
    """Tells whether the first that is stacked is the one meant."""
    stacked = [axis for axis in axes if axis is not None]
    return not stacked or stacked[0] == said


def is_wanted(axes: Axes, said: int) -> bool:
    """Tells whether the wanted leaf is stacked along the axis meant."""
    return axes[1] == said


def is_move(axes: Axes) -> bool:
    """Tells whether both are stacked, along different axes."""
    return None not in axes and axes[0] != axes[1]


def is_part_of(axes: Axes, pair: Axes) -> bool:
    """Tells whether the axes agree with a pair on each side that is stacked."""
    return axes[0] in (None, pair[0]) and axes[1] in (None, pair[1])
