"""How far apart the arrays of two programs are, and what rounding alone explains."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from orbax_nnx_handler.verifying.recording import Array

ROUNDING = 3e-6
"""What two ways of computing one module in float32 differ by, and no more, from equal inputs."""


TOLERANCE = 1e-5
"""How far apart two whole programs in float32 may be that compute the same."""


_MOST_ROUNDINGS = 5
"""How much more a whole program may differ by rounding than one module in it."""


_GROWTH = 16
"""How much a module may enlarge a difference that its inputs have already."""


_MOST_AXES = 5


MASK = 1e6
"""Values beyond it are a mask's, and say nothing about how large the others are."""


_COARSE = {"bfloat16": 2e-2, "float16": 2e-3}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distance:
    """How far arrays lie apart.

    Attributes:
        relative: The largest difference of two elements, divided by the larger of the element and the mean
            magnitude of its array.
        absolute: The largest difference itself.
        compared: How many arrays met one of the same size.
        left: How many met none.
        coarse: What a difference may be because the arrays were computed in fewer digits; 0 for float32.
    """

    relative: float = 0.0
    absolute: float = 0.0
    compared: int = 0
    left: int = 0
    coarse: float = 0.0


def distance(reference: Array, other: Array) -> tuple[float, float]:
    """Returns the relative and the absolute difference of two arrays of one size, element by element."""
    a, b = _numbers(reference).reshape(-1), _numbers(other).reshape(-1)
    if not a.size:
        return 0.0, 0.0
    with np.errstate(all="ignore"):
        apart = np.abs(a - b)
        apart[(a == b) | (np.isnan(a) & np.isnan(b))] = 0
        if not np.isfinite(apart).all():
            return float("inf"), float("inf")
        size = np.abs(a)
        usual = size[size < MASK]
        mean = float(usual.mean(dtype=np.float64)) if usual.size else 1.0
        relative = apart / np.maximum(size, max(mean, float(np.finfo(np.float32).tiny)))
        relative[apart == 0] = 0  # Where both are no number too.
    return float(relative.max()), float(apart.max())


def _numbers(array: Array) -> Array:
    if array.dtype == np.float64 or array.dtype.kind in "iu":
        return array.astype(np.float64)
    return array.astype(np.complex64 if array.dtype.kind == "c" else np.float32)


def compare(reference: Sequence[Array], others: Sequence[Array]) -> Distance:
    """Compares arrays, each with one of its size, whatever its shape: the nearest with each other."""
    pairs = [
        (*_nearest(array, other), one, at)
        for one, array in enumerate(reference)
        for at, other in enumerate(others)
        if _comparable(array, other)
    ]
    relative = absolute = coarse = 0.0
    met, taken = set[int](), set[int]()
    for apart, largest, one, at in sorted(pairs, key=lambda pair: max(ROUNDING, pair[0])):
        if one in met or at in taken:
            continue
        relative, absolute = max(relative, apart), max(absolute, largest)
        coarse = max(coarse, *(_COARSE.get(str(array.dtype), 0.0) for array in (reference[one], others[at])))
        met.add(one)
        taken.add(at)
    left = sum(array.dtype.kind != "b" for one, array in enumerate(reference) if one not in met)
    return Distance(relative=relative, absolute=absolute, compared=len(met), left=left, coarse=coarse)


def compare_inputs(reference: Sequence[Array], others: Sequence[Array]) -> Distance:
    """Compares what two modules are called with: floats alone where both have some.

    Masks and positions are a matter of taste: one side has them where the other works them out.
    """
    floats = [[array for array in arrays if array.dtype.kind not in "biu"] for arrays in (reference, others)]
    return compare(*floats) if all(floats) else compare(reference, others)


def _nearest(reference: Array, other: Array) -> tuple[float, float]:
    """Returns how far two arrays lie apart, with their axes in whichever order is nearest: NCHW is NHWC."""
    apart = distance(reference, other)
    if (
        apart[0] <= ROUNDING
        or other.shape == reference.shape
        or not 2 < other.ndim == reference.ndim <= _MOST_AXES
    ):
        return apart
    orders = itertools.permutations(range(other.ndim))
    turned = [order for order in orders if tuple(other.shape[axis] for axis in order) == reference.shape]
    return min([apart, *(distance(reference, other.transpose(order)) for order in turned)])


def _comparable(one: Array, other: Array) -> bool:
    return one.size == other.size and (one.dtype.kind in "biu") == (other.dtype.kind in "biu")


def exceeds(distance: Distance, limit: float) -> bool:
    """Tells whether a difference is more than a limit, where the arrays have the digits for it."""
    return distance.relative > max(limit, distance.coarse)


def changes_more_than_rounding(inputs: Distance, outputs: Distance, calls: int = 1) -> bool:
    """Tells whether outputs lie further apart than rounding explains.

    Args:
        inputs: How far the inputs lie apart.
        outputs: How far the outputs do.
        calls: Of how many modules, one after the other, the outputs come: each rounds.
    """
    rounding = ROUNDING * min(_MOST_ROUNDINGS, calls**0.5)
    return exceeds(outputs, max(rounding, _GROWTH * inputs.relative))


def same_numbers(reference: Sequence[Array], others: Sequence[Array]) -> bool:
    """Tells whether the arrays hold the same numbers in another order."""
    pairs = [(a, b) for a in reference for b in others if _comparable(a, b) and a.size > 1]
    return any(distance(np.sort(_flat(a)), np.sort(_flat(b)))[0] <= 10 * ROUNDING for a, b in pairs)


def _flat(array: Array) -> Array:
    return _numbers(array).reshape(-1)
