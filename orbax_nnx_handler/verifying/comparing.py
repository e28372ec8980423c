"""How far the numbers of two calls lie apart."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from orbax_nnx_handler.verifying.recording import Array, Call

ROUNDING = 3e-6
"""What two ways of computing one module in float32 differ by, and no more, from equal inputs."""
TOLERANCE = 1e-5
"""How far apart two whole programs in float32 may be that compute the same."""
_GROWTH = 16
"""How much a module may enlarge a difference that its inputs have already."""
_MASK = 1e6
"""Values beyond it are a mask's, and say nothing about how large the others are."""
_COARSE = {"bfloat16": 2e-2, "float16": 2e-3}

Relation = Literal["equal", "reordered", "different", "incomparable"]


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
        usual = size[size < _MASK]
        mean = float(usual.mean(dtype=np.float64)) if usual.size else 1.0
        relative = apart / np.maximum(size, max(mean, float(np.finfo(np.float32).tiny)))
    return float(relative.max()), float(apart.max())


def _numbers(array: Array) -> Array:
    if array.dtype == np.float64 or array.dtype.kind in "iu":
        return array.astype(np.float64)
    return array.astype(np.complex64 if array.dtype.kind == "c" else np.float32)


def compare(reference: Sequence[Array], others: Sequence[Array]) -> Distance:
    """Compares arrays, each with the nearest of its size that is not taken, whatever its shape."""
    free = list(others)
    relative = absolute = coarse = 0.0
    compared = left = 0
    for array in reference:
        same = [at for at, other in enumerate(free) if _comparable(array, other)]
        if not same:
            left += array.dtype.kind != "b"
            continue
        found = [(*distance(array, free[at]), at) for at in same]
        first = next((one for one in found if one[0] <= ROUNDING), min(found))
        relative, absolute = max(relative, first[0]), max(absolute, first[1])
        coarse = max(coarse, *(_COARSE.get(str(one.dtype), 0.0) for one in (array, free[first[2]])))
        compared += 1
        del free[first[2]]
    return Distance(relative=relative, absolute=absolute, compared=compared, left=left, coarse=coarse)


def _comparable(one: Array, other: Array) -> bool:
    return one.size == other.size and (one.dtype.kind in "biu") == (other.dtype.kind in "biu")


def exceeds(distance: Distance, limit: float) -> bool:
    """Tells whether a difference is more than a limit, where the arrays have the digits for it."""
    return distance.relative > max(limit, distance.coarse)


def changes_more_than_rounding(inputs: Distance, outputs: Distance) -> bool:
    """Tells whether outputs lie further apart than rounding explains, given how far the inputs do."""
    return exceeds(outputs, max(ROUNDING, _GROWTH * inputs.relative))


def same_numbers(reference: Sequence[Array], others: Sequence[Array]) -> bool:
    """Tells whether the arrays hold the same numbers in another order."""
    pairs = [(a, b) for a in reference for b in others if _comparable(a, b) and a.size > 1]
    return any(distance(np.sort(_flat(a)), np.sort(_flat(b)))[0] <= 10 * ROUNDING for a, b in pairs)


def _flat(array: Array) -> Array:
    return _numbers(array).reshape(-1)


def differing_settings(linen: Call, nnx: Call) -> dict[str, tuple[Any, Any]]:
    """Returns what both modules have under one name with different values: Linen's and NNX's."""
    return {
        name: (value, nnx.settings[name])
        for name, value in linen.settings.items()
        if name in nnx.settings and nnx.settings[name] != value
    }
