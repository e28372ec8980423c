"""Which of a factored parameter's two moments optax calls `v_row`.

T5X and optax name them by different rules. optax takes the two largest axes;
`v_row` has lost the largest, of equal ones the last. T5X with
`logical_factor_rules` (t5x/adafactor.py, in nearly all of its configurations)
goes by the names of the axes: `v_row` has lost the column, which for the output
of an attention is the first axis. Both moments have the same meaning to either
program, so that only which axis each has lost must be found, from the shapes.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np

from orbax_nnx_handler.planning.leaves import Shape

FACTORED = ("v_row", "v_col")

Naming = Literal["same", "swapped", "unknown"]


def optax_naming(parameter: Shape, moments: Mapping[str, Shape]) -> Naming:
    """Returns how optax's names for two factored moments relate to the stored ones.

    Args:
        parameter: The parameter's shape.
        moments: The shapes of its moments by stored name.

    Returns:
        `unknown` where the shapes would be the same under either naming.
    """
    shapes = [moments.get(name) for name in FACTORED]
    if len(parameter) < 2 or None in shapes or shapes == [(1,), (1,)]:
        return "same"
    largest, second = np.argsort(parameter)[::-1][:2]
    by_optax = [_without(parameter, int(axis)) for axis in (largest, second)]
    if by_optax[0] == by_optax[1] == shapes[0]:
        return "unknown"
    return "swapped" if shapes == by_optax[::-1] else "same"


def _without(shape: Shape, axis: int) -> Shape:
    return (*shape[:axis], *shape[axis + 1 :])
