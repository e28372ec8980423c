"""Which stored dtypes may become which wanted dtypes."""

import functools
from collections.abc import Iterable
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np

Cast = Literal["same", "wider", "narrower", "count", "integer"]
"""What a cast does: `count` and `integer` keep every value that fits, and refuse the others."""

_WITHOUT_X64 = {("int64", "int32"), ("uint64", "uint32")}
"""What JAX makes of 64-bit integers where it holds no 64 bits."""

KEY_IMPLEMENTATIONS = ("threefry2x32", "rbg", "unsafe_rbg")
"""The implementations of random keys that JAX brings (`jax.random.key`)."""


def cast_between(stored: np.dtype[Any], wanted: np.dtype[Any], is_count: bool) -> Cast | None:
    """Returns what a cast does, or None where it would change a value's meaning.

    Args:
        stored: The stored dtype.
        wanted: The wanted dtype.
        is_count: Whether the leaf is a step or an optimizer's count, which Linen
            keeps in int32 or int64 and NNX in uint32.
    """
    if stored == wanted:
        return "same"
    if is_count and _is_integer(stored) and _is_integer(wanted):
        return "count"
    if (stored.name, wanted.name) in _WITHOUT_X64:
        return "integer"
    for family in (jnp.floating, jnp.complexfloating):
        if jnp.issubdtype(stored, family) and jnp.issubdtype(wanted, family):
            return "wider" if holds(wanted, stored) else "narrower"
    return None


def worst(casts: Iterable[Cast | None]) -> Cast:
    """Returns the cast of several that takes the most care."""
    order: tuple[Cast, ...] = ("count", "integer", "narrower", "wider", "same")
    found = set(casts)
    return next(kind for kind in order if kind in found)


def changes_values(stored: np.dtype[Any] | None, wanted: np.dtype[Any]) -> bool:
    """Tells whether a cast does more than round: floats to integers, complex to real, integers cut off."""
    if stored is None:
        return True
    both_floats = jnp.issubdtype(stored, jnp.floating) and jnp.issubdtype(wanted, jnp.floating)
    return not both_floats and not holds(wanted, stored)


def wide_dtype(*dtypes: Any) -> Any:
    """Returns the dtype in which values of these dtypes are computed: float32, or the widest of them.

    Args:
        *dtypes: The stored dtypes and the wanted one.
    """
    wide: Any = np.dtype(np.float32)
    for dtype in dtypes:
        if not _is_integer(dtype) and not holds(wide, dtype):
            wide = np.promote_types(wide, dtype)
    return wide


def same_key(impl: str | None, dtype: Any) -> bool:
    """Tells whether a stored key's implementation is that of a wanted key dtype."""
    return impl is not None and jax.random.key(0, impl=impl).dtype == dtype


@functools.cache
def name_of(dtype: Any) -> str:
    """Returns a dtype's name, which NumPy puts together anew each time it is asked."""
    return str(dtype)


def is_count_dtype(dtype: Any) -> bool:
    """Tells whether a leaf of this dtype may be a step or a count."""
    return not jnp.issubdtype(dtype, jax.dtypes.prng_key) and _is_integer(dtype)


def held_dtype(dtype: Any) -> Any:
    """Returns the dtype that a JAX array of this dtype has: float32 for float64 without x64."""
    is_key = jnp.issubdtype(dtype, jax.dtypes.prng_key)
    return dtype if is_key else jax.dtypes.canonicalize_dtype(dtype)


def _is_integer(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.integer))


@functools.cache
def holds(wide: Any, narrow: Any) -> bool:
    """Tells whether every value of `narrow` is a value of `wide`, but for the rounding of an integer.

    Read off the limits: `jnp.promote_types` has no answer where 4- or 8-bit numbers meet others.
    """
    if wide == narrow or narrow == jnp.bool_:
        return True
    if not jnp.issubdtype(wide, jnp.inexact):
        return _is_integer(wide) and _is_integer(narrow) and _reaches(jnp.iinfo(wide), jnp.iinfo(narrow))
    if jnp.issubdtype(narrow, jnp.complexfloating) and not jnp.issubdtype(wide, jnp.complexfloating):
        return False
    if _is_integer(narrow):
        return _reaches(cast(Any, jnp.finfo(wide)), jnp.iinfo(narrow))
    one, other = cast(Any, jnp.finfo(wide)), cast(Any, jnp.finfo(narrow))
    finer = bool(one.nmant >= other.nmant and one.smallest_subnormal <= other.smallest_subnormal)
    return finer and _reaches(one, other)


def _reaches(wide: Any, narrow: Any) -> bool:
    """Tells whether the limits of one kind of number lie within another's."""
    return float(wide.min) <= float(narrow.min) and float(narrow.max) <= float(wide.max)


def is_key(dtype: Any) -> bool:
    """Tells whether a dtype is a random key's."""
    # NumPy has no dtype of keys: nearly every leaf is answered here.
    return not isinstance(dtype, np.dtype) and bool(jnp.issubdtype(dtype, jax.dtypes.prng_key))
