"""The arithmetic of recipes and the last cast, the same on restore, save and convert.

Values are computed in float32 or a wider dtype and cast at the end. A value that
the dtype at the end cannot hold is refused: one that was finite and would be
infinite, or one outside the range of an integer type.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from orbax_nnx_handler.planning.core.dtypes import held_dtype, holds, wide_dtype
from orbax_nnx_handler.planning.core.errors import DtypeMismatchError
from orbax_nnx_handler.planning.core.paths import Path, render
from orbax_nnx_handler.planning.core.recipes import Arithmetic

Values = npt.NDArray[Any]
Dtype = Any  # NumPy's own and those of `ml_dtypes`.

# Elements cast and looked at together: they stay in the processor's cache.
_BLOCK = 1 << 19


class LostValueError(Exception):
    """A value that the wanted dtype cannot hold; `of` names the leaf.

    Attributes:
        value: The value as it is stored.
        computed: What rules made of it; the same where no rule acts.
        stored: The stored dtype.
        wanted: The dtype that cannot hold it.
    """

    def __init__(self, value: Any, computed: Any, stored: Dtype, wanted: Dtype):
        super().__init__(value, computed, stored, wanted)
        self.value, self.computed, self.stored, self.wanted = value, computed, stored, wanted

    def of(self, path: Path) -> DtypeMismatchError:
        """Returns the error for a user."""
        by_rules = not np.array_equal(self.value, self.computed, equal_nan=True)
        made = f" ({self.computed} by the rules)" if by_rules else ""
        way = "change the rules, or choose a dtype that can" if by_rules else f"choose {self._holding}"
        return DtypeMismatchError(
            f"stored leaf {render(path)} ({self.stored}) holds {self.value}{made}, "
            f"which {self.wanted} cannot hold.",
            paths=[path],
            hints=[f"{way}, for the target's leaf or as --dtype of convert."],
        )

    @property
    def _holding(self) -> str:
        held = held_dtype(self.stored) == self.stored
        return f"{self.stored}" if held else f"{self.stored} under jax_enable_x64"


def put(view: Values, values: Values, steps: Sequence[Arithmetic] = ()) -> None:
    """Computes values and casts them into a place.

    Args:
        view: The place; its dtype is the wanted one.
        values: As they are stored, of the same shape.
        steps: What is done to them before the cast.

    Raises:
        LostValueError: A value does not fit the dtype of the place.
    """
    if not steps and holds(view.dtype, values.dtype):
        view[...] = values
        return
    for part, block in _blocks(view, values):
        # NumPy would warn of just what is looked for here.
        with np.errstate(all="ignore"):
            computed = compute(block, steps, view.dtype)
            part[...] = computed
            if part.size and _may_be_lost(part, computed):
                refuse_lost(block, computed, view.dtype)


def _blocks(view: Values, values: Values) -> Iterator[tuple[Values, Values]]:
    if values.size <= _BLOCK:
        yield view, values
        return
    axis = next(axis for axis, length in enumerate(values.shape) if length > 1)
    step = max(1, _BLOCK * values.shape[axis] // values.size)
    for start in range(0, values.shape[axis], step):
        at = (slice(None),) * axis + (slice(start, start + step),)
        yield from _blocks(view[at], values[at])


def compute(values: Any, steps: Sequence[Arithmetic], wanted: Dtype) -> Any:
    """Returns what arithmetic makes of values, of NumPy or JAX, before the last cast."""
    if not steps:
        return values
    wide = wide_dtype(values.dtype, wanted)
    computed = values.astype(wide)
    for step in steps:
        if step.factor != 1.0:
            computed = computed * np.asarray(step.factor, wide)
        if step.constant != 0.0:
            computed = computed + np.asarray(step.constant, wide)
    return computed


def _may_be_lost(part: Values, computed: Values) -> bool:
    """Tells, fast, whether a value may not have fitted where it was put."""
    if _is_integer(part.dtype):
        low, high = _limits(computed.dtype, part.dtype)
        # In this form, since a NaN is on neither side of anything.
        return not (low <= computed.min() and computed.max() <= high)
    bits = _infinity(part.dtype)
    if bits is None:
        return part.dtype != np.bool_
    infinity, magnitude = bits
    return bool((part.view(infinity.dtype) & magnitude).max() >= infinity)


def refuse_lost(values: Values, computed: Values, wanted: Dtype) -> None:
    """Raises where a dtype cannot hold a value.

    Args:
        values: The values as they are stored.
        computed: What `compute` made of them.
        wanted: The dtype that they are cast to.

    Raises:
        LostValueError: Holds the first of them.
    """
    lost = np.asarray(lost_values(values, computed, wanted))
    if lost.any():
        raise LostValueError(values[lost][0], computed[lost][0], values.dtype, wanted)


def lost_values(values: Any, computed: Any, wanted: Dtype) -> Any:
    """Returns which elements a dtype cannot hold, as an array of booleans.

    Args:
        values: The values as they are stored, of NumPy or JAX.
        computed: What `compute` made of them.
        wanted: The dtype that they are cast to.
    """
    if _is_integer(wanted):
        low, high = _limits(computed.dtype, wanted)
        return ~((computed >= low) & (computed <= high))
    wide = wide_dtype(values.dtype, wanted)
    before, after = values.astype(wide), computed.astype(wanted).astype(wide)
    if _infinity(wanted) is not None or not jnp.issubdtype(wanted, jnp.floating):
        return (abs(before) < np.inf) & ~(abs(after) < np.inf)
    # Without an infinity, what is too large becomes NaN (float8_e4m3fn) or the largest value (float4_e2m1fn).
    too_large = abs(computed.astype(wide)) > _largest(wanted)
    return too_large | ((before == before) != (after == after))


def _is_integer(dtype: Dtype) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.integer))


@functools.cache
def _limits(dtype: Dtype, wanted: Dtype) -> tuple[Any, Any]:
    """Returns the first and the last value of a dtype that an integer type can hold."""
    limits = jnp.iinfo(wanted)
    if _is_integer(dtype):
        own = jnp.iinfo(dtype)
        return max(int(own.min), int(limits.min)), min(int(own.max), int(limits.max))
    # Fractions are cut off: 127.9 is held by int8, 128 is not.
    outside = np.array([float(limits.min) - 1, float(limits.max) + 1], wide_dtype(dtype))
    low, high = np.nextafter(outside, np.zeros(2, outside.dtype))
    # Wide floats have no number between the first integer of 64 bits and the one below.
    return min(low, outside.dtype.type(float(limits.min))), high


@functools.cache
def _infinity(dtype: Dtype) -> tuple[Any, Any] | None:
    """Returns the bits of infinity and those of every magnitude; None where a type has no infinity."""
    if not jnp.issubdtype(dtype, jnp.floating):
        return None
    value = np.asarray(np.inf, np.float32).astype(dtype)
    if not np.isinf(value.astype(np.float32)):
        return None
    infinity = value.view(f"uint{8 * dtype.itemsize}")[()]
    return infinity, infinity | (infinity - infinity.dtype.type(1))


@functools.cache
def _largest(dtype: Dtype) -> float:
    """Returns the largest number that rounds to a value of a floating-point type."""
    limits = cast(Any, jnp.finfo(dtype))
    largest = float(limits.max)
    return largest + 2.0 ** (math.floor(math.log2(largest)) - int(limits.nmant) - 1)
