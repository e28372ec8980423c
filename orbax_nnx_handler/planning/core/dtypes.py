"""Which stored dtypes may become which wanted dtypes, and which hold codes that are no weights."""

import functools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np

from orbax_nnx_handler.planning.core.leaves import StoredLeaf
from orbax_nnx_handler.planning.core.paths import Path, segments, without_box

CastKind = Literal["same", "wider", "narrower", "count", "integer"]
"""What a cast does: `count` and `integer` keep every value that fits, and refuse the others."""

_WITHOUT_X64 = {("int64", "int32"), ("uint64", "uint32")}
"""What JAX makes of 64-bit integers where it holds no 64 bits."""

KEY_IMPLEMENTATIONS = ("threefry2x32", "rbg", "unsafe_rbg")
"""The implementations of random keys that JAX brings (`jax.random.key`)."""


def cast_between(stored: np.dtype[Any], wanted: np.dtype[Any], is_count: bool) -> CastKind | None:
    """Returns what a cast does, or None where it would change a value's meaning.

    Args:
        stored: The stored dtype.
        wanted: The wanted dtype.
        is_count: Whether the leaf is a step or an optimizer's count, which Linen
            keeps in int32 or int64 and NNX in uint32.
    """
    if stored == wanted:
        return "same"
    if is_count and is_integer(stored) and is_integer(wanted):
        return "count"
    if (stored.name, wanted.name) in _WITHOUT_X64:
        return "integer"
    for family in (jnp.floating, jnp.complexfloating):
        if jnp.issubdtype(stored, family) and jnp.issubdtype(wanted, family):
            return "wider" if holds(wanted, stored) else "narrower"
    return None


def worst(casts: Iterable[CastKind | None]) -> CastKind:
    """Returns the cast of several that takes the most care."""
    order: tuple[CastKind, ...] = ("count", "integer", "narrower", "wider", "same")
    found = set(casts)
    return next(kind for kind in order if kind in found)


def changes_values(stored: np.dtype[Any] | None, wanted: np.dtype[Any]) -> bool:
    """Tells whether a cast does more than round: floats to integers, complex to real, integers cut off."""
    if stored is None:
        return True
    both_floats = jnp.issubdtype(stored, jnp.floating) and jnp.issubdtype(wanted, jnp.floating)
    return not both_floats and not holds(wanted, stored)


def wide_dtype(*dtypes: Any) -> Any:
    """Returns the dtype in which values of these dtypes are computed: float32, or the widest of them."""
    wide: Any = np.dtype(np.float32)
    for dtype in dtypes:
        if not is_integer(dtype) and not holds(wide, dtype):
            wide = np.promote_types(wide, dtype)
    return wide


def common_dtype(one: Any, other: Any) -> Any:
    """Returns the dtype in which values of two dtypes are compared.

    An integer and a float meet in float64, which has every integer up to 2 ** 53: float32 would round both.
    """
    if is_integer(one) != is_integer(other):
        has_complex = any(jnp.issubdtype(each, jnp.complexfloating) for each in (one, other))
        return np.dtype(np.complex128 if has_complex else np.float64)
    try:
        return jnp.promote_types(one, other)
    # JAX promotes 4- and 8-bit numbers to no other kind.
    except ValueError:
        wider = [wide for wide, narrow in ((one, other), (other, one)) if holds(wide, narrow)]
        return wider[0] if wider else wide_dtype(one, other)


def same_key(impl: str | None, dtype: Any) -> bool:
    """Tells whether a stored key's implementation is that of a wanted key dtype."""
    return impl is not None and jax.random.key(0, impl=impl).dtype == dtype


@functools.cache
def name_of(dtype: Any) -> str:
    """Returns a dtype's name, which NumPy puts together anew each time it is asked."""
    return str(dtype)


def is_count_dtype(dtype: Any) -> bool:
    """Tells whether a leaf of this dtype may be a step or a count."""
    return not jnp.issubdtype(dtype, jax.dtypes.prng_key) and is_integer(dtype)


def is_weight_called_step(path: Path, dtype: Any) -> bool:
    """Tells whether a leaf called `step` is a model's: a step of a train state is an integer."""
    plain = without_box(path)
    return bool(plain) and str(plain[-1]) == "step" and not is_count_dtype(dtype)


def held_dtype(dtype: Any) -> Any:
    """Returns the dtype that a JAX array of this dtype has: float32 for float64 without x64."""
    is_key = jnp.issubdtype(dtype, jax.dtypes.prng_key)
    return dtype if is_key else jax.dtypes.canonicalize_dtype(dtype)


@functools.cache
def is_array_dtype(dtype: np.dtype[Any]) -> bool:
    """Tells whether JAX has arrays of a stored dtype: numbers of at most 64 bits, and booleans."""
    most = 16 if jnp.issubdtype(dtype, jnp.complexfloating) else 8
    is_number = dtype == np.bool_ or bool(jnp.issubdtype(dtype, jnp.number))
    return is_number and dtype.itemsize <= most


def is_integer(dtype: Any) -> bool:
    """Tells an integer type, signed or not."""
    return bool(jnp.issubdtype(dtype, jnp.integer))


@functools.cache
def holds(wide: Any, narrow: Any) -> bool:
    """Tells whether every value of `narrow` is a value of `wide`, but for the rounding of an integer.

    Read off the limits: `jnp.promote_types` has no answer where 4- or 8-bit numbers meet others.
    """
    if wide == narrow or narrow == jnp.bool_:
        return True
    if not jnp.issubdtype(wide, jnp.inexact):
        return is_integer(wide) and is_integer(narrow) and _reaches(jnp.iinfo(wide), jnp.iinfo(narrow))
    if jnp.issubdtype(narrow, jnp.complexfloating) and not jnp.issubdtype(wide, jnp.complexfloating):
        return False
    if is_integer(narrow):
        return _reaches(cast(Any, jnp.finfo(wide)), jnp.iinfo(narrow))
    one, other = cast(Any, jnp.finfo(wide)), cast(Any, jnp.finfo(narrow))
    finer = bool(one.nmant >= other.nmant and one.smallest_subnormal <= other.smallest_subnormal)
    return finer and _reaches(one, other)


def _reaches(wide: Any, narrow: Any) -> bool:
    """Tells whether the limits of one kind of number lie within another's."""
    return float(wide.min) <= float(narrow.min) and float(narrow.max) <= float(wide.max)


@functools.cache
def integer_limits(dtype: Any, wanted: Any) -> tuple[Any, Any]:
    """Returns the first and the last value of a dtype that an integer type can hold."""
    limits = jnp.iinfo(wanted)
    if is_integer(dtype):
        own = jnp.iinfo(dtype)
        return max(int(own.min), int(limits.min)), min(int(own.max), int(limits.max))
    # Fractions are cut off: 127.9 is held by int8, 128 is not.
    outside = np.array([float(limits.min) - 1, float(limits.max) + 1], wide_dtype(dtype))
    low, high = np.nextafter(outside, np.zeros(2, outside.dtype))
    # Wide floats have no number between the first integer of 64 bits and the one below.
    return min(low, outside.dtype.type(float(limits.min))), high


@functools.cache
def infinity_bits(dtype: Any) -> tuple[Any, Any] | None:
    """Returns the bits of infinity and those of every magnitude; None where a type has no infinity."""
    if not jnp.issubdtype(dtype, jnp.floating):
        return None
    value = np.asarray(np.inf, np.float32).astype(dtype)
    if not np.isinf(value.astype(np.float32)):
        return None
    infinity = value.view(f"uint{8 * dtype.itemsize}")[()]
    return infinity, infinity | (infinity - infinity.dtype.type(1))


@functools.cache
def largest_value(dtype: Any) -> float:
    """Returns the largest number that rounds to a value of a floating-point type."""
    limits = cast(Any, jnp.finfo(dtype))
    largest = float(limits.max)
    return largest + 2.0 ** (math.floor(math.log2(largest)) - int(limits.nmant) - 1)


def is_key(dtype: Any) -> bool:
    """Tells whether a dtype is a random key's."""
    # NumPy has no dtype of keys: nearly every leaf is answered here.
    return not isinstance(dtype, np.dtype) and bool(jnp.issubdtype(dtype, jax.dtypes.prng_key))


_Names = tuple[str, ...]

_NO_SCALE = frozenset({"bias", "b"})


def scales_of(
    leaves: Iterable[StoredLeaf], unread: Set[Path] = frozenset()
) -> Mapping[Path, tuple[Path, ...]]:
    """Returns the scales of each leaf that holds codes.

    Told from metadata: a leaf of small floats or of integers, and a smaller leaf of
    wider floats that belongs to it by where it lies. Quantisers keep the two side by
    side (`kernel`, `kernel_scale_inv`), in one box (`kernel/{qvalue, scale}`,
    `kernel/{value, scale}`), or the scales in a collection of their own. That a target
    wants a scale too does not make weights of the codes.

    Args:
        leaves: The stored leaves.
        unread: Those that nothing reads: beside codes of 8 bits, they are scales whatever their names.
    """
    listed = list(leaves)
    codes = [leaf for leaf in listed if leaf.key_impl is None and leaf.shape and _is_code(leaf.dtype)]
    if not codes:
        return {}
    others = [leaf for leaf in listed if _is_float(leaf.dtype)]
    places = _Places(listed, others, unread)
    found = {leaf.path: tuple(_unique(places.beside(leaf))) for leaf in codes}
    return {path: scales for path, scales in found.items() if scales}


class _Places:
    """What lies where, as far as it may be a scale."""

    def __init__(self, leaves: Sequence[StoredLeaf], others: Sequence[StoredLeaf], unread: Set[Path]) -> None:
        self._unread = unread
        self._in_dict: dict[_Names, list[StoredLeaf]] = defaultdict(list)
        self._elsewhere: dict[_Names, list[StoredLeaf]] = defaultdict(list)
        for leaf in others:
            names = _names(leaf.path)
            self._in_dict[names[:-1]].append(leaf)
            for depth in range(1, len(names)):
                self._elsewhere[names[depth:-1]].append(leaf)
        self._sizes: dict[_Names, set[str]] = defaultdict(set)
        for leaf in leaves:
            names = _names(leaf.path)
            self._sizes[names[:-1]].add(names[-1])

    def beside(self, code: StoredLeaf) -> Iterable[StoredLeaf]:
        """Yields the scales of one leaf."""
        names = _names(code.path)
        module, name = names[:-1], names[-1]
        # In one box: `kernel/{value, scale}`, of which the first is `kernel` itself.
        yield from self._smaller(code, self._in_dict.get(names, ()))
        # A dict of a code and scales alone, `kernel/{qvalue, s}`, is a box too; one with a bias is a module.
        siblings = list(self._smaller(code, self._in_dict.get(module, ())))
        is_box = len(siblings) + 1 == len(self._sizes[module]) and not _NO_SCALE & self._sizes[module]
        yield from (leaf for leaf in siblings if is_box or _is_named(leaf, name))
        if cast(Any, code.dtype).itemsize == 1:
            left = (leaf for leaf in (*siblings, *self._called_after(code)) if leaf.path in self._unread)
            yield from (leaf for leaf in left if _names(leaf.path)[-1] not in {*_NO_SCALE, name})
        # Under the same path in a collection of scales: what lies above says so, or is not `params`.
        head = next((depth for depth, part in enumerate(names[:-1]) if part != "params"), len(names) - 1)
        for leaf in self._smaller(code, self._elsewhere.get(names[head:-1], ())):
            above = _names(leaf.path)[: -len(names[head:])]
            is_apart = bool(head) and above[:1] != ("params",)
            says_so = any("scale" in part.lower() for part in above)
            same = _names(leaf.path)[-1] == name
            if ((is_apart and head < len(names) - 1) or says_so) and (same or _is_named(leaf, name)):
                yield leaf

    def _called_after(self, code: StoredLeaf) -> Iterable[StoredLeaf]:
        """Yields leaves beside a code's module that begin with its name, and those of one path elsewhere."""
        *above, module, _ = ("", *_names(code.path))
        near = self._in_dict.get(tuple(above[1:]), ()) if module else ()
        yield from self._smaller(code, (leaf for leaf in near if _names(leaf.path)[-1].startswith(module)))
        below = tuple(part for part in (*above[1:], module) if part not in ("", "params"))
        if below:
            beside = self._elsewhere.get(below[:-1], ())
            named = (leaf for leaf in beside if _names(leaf.path)[-1].startswith(module))
            aside = (*self._elsewhere.get(below, ()), *named)
            yield from self._smaller(code, (leaf for leaf in aside if _names(leaf.path)[0] != "params"))

    def _smaller(self, code: StoredLeaf, leaves: Iterable[StoredLeaf]) -> Iterable[StoredLeaf]:
        # The scale of a single code is as large as the code itself.
        limit = max(_size(code) - 1, 1)
        return (
            leaf
            for leaf in leaves
            if leaf.path != code.path and _size(leaf) <= limit and _is_wider(leaf.dtype, code.dtype)
        )


def _is_named(leaf: StoredLeaf, code: str) -> bool:
    """Tells whether a leaf is called after its code, or as a scale."""
    name = _names(leaf.path)[-1]
    return "scale" in name.lower() or (name.startswith(code) and name != code)


def _names(path: Path) -> _Names:
    """Returns the path without the level `value` that boxes and NNX states add."""
    names = segments(path)
    return names[:-1] if len(names) > 1 and names[-1] == "value" else names


def _size(leaf: StoredLeaf) -> int:
    size = 1
    for length in leaf.shape:
        size *= length
    return size


def _unique(leaves: Iterable[StoredLeaf]) -> Iterable[Path]:
    return dict.fromkeys(leaf.path for leaf in leaves)


@functools.cache
def _is_code(dtype: Any) -> bool:
    return dtype is not None and (bool(jnp.issubdtype(dtype, jnp.integer)) or 0 < _bits(dtype) <= 8)


@functools.cache
def _is_float(dtype: Any) -> bool:
    return dtype is not None and _bits(dtype) > 0


@functools.cache
def _is_wider(scale: Any, code: Any) -> bool:
    # Scales of the microscaling formats are 8-bit exponents, whatever their codes.
    return str(scale) == "float8_e8m0fnu" or _bits(scale) > _bits(code)


@functools.cache
def _bits(dtype: Any) -> int:
    """Returns the width of a floating-point type; 0 for any other."""
    return int(cast(Any, jnp.finfo(dtype)).bits) if jnp.issubdtype(dtype, jnp.floating) else 0


@functools.cache
def number_of(dtype: Any) -> str:
    """Returns the kind of number of a dtype; a restore casts within one kind and never between two."""
    kinds = ("floating", "complexfloating", "integer", "bool_")
    found = (kind for kind in kinds if dtype is not None and jnp.issubdtype(dtype, getattr(jnp, kind)))
    return next(found, "other")
