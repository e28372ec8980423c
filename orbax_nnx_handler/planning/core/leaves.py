"""The two sides of a restore: what the caller wants and what the disk holds."""

import dataclasses
import math
import sys
from typing import Any, Self

import jax
import numpy as np

from orbax_nnx_handler.planning.core.paths import Path

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WantedLeaf:
    """One variable of the target.

    Attributes:
        path: Keys from the target's root, the indices of tuples included.
        kind: The Variable's type; None where the target is a pure dict.
        shape: The shape to come back.
        dtype: The dtype to come back; a key dtype for random keys.
        sharding: Where the value must live, or None for the documented default.
        value: The concrete value the target carries, or None when abstract.
        dtype_is_chosen: Whether the leaf's restore args chose the dtype: it then wins
            over `dtype="stored"` too.
        sharding_is_default: Whether nothing says where the value must live, so that an array which
            is on devices already may stay on them.
    """

    path: Path
    kind: type[Any] | None
    shape: Shape
    dtype: np.dtype[Any]
    sharding: jax.sharding.Sharding | None = None
    value: Any = None
    dtype_is_chosen: bool = False
    sharding_is_default: bool = False

    def __getstate__(self) -> dict[str, Any]:
        # Devices and arrays belong to this process; what a plan says of the leaf does not need them.
        return vars(self) | {"kind": _importable(self.kind), "sharding": None, "value": None}

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: Any) -> Self:
        return self

    @property
    def nbytes(self) -> int:
        """Size in bytes of the whole array, over all devices."""
        return math.prod(self.shape) * self.dtype.itemsize


def _importable(kind: type[Any] | None) -> type[Any] | None:
    """Returns the type, or the first one above it that a pickle can name: a class may live in a function."""
    if kind is None:
        return None
    return next(
        each
        for each in kind.__mro__
        if getattr(sys.modules.get(each.__module__), each.__qualname__, 0) is each
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredLeaf:
    """One array of the checkpoint, from metadata alone.

    Attributes:
        path: Keys from the item's root, as the writing program had them.
        shape: The stored shape.
        dtype: The stored dtype, or None for a value that is no array (a string).
        chunk_shape: Shape of one chunk on disk, where the metadata tells.
        key_impl: The PRNG implementation ("threefry2x32") of a stored random key.
    """

    path: Path
    shape: Shape
    dtype: np.dtype[Any] | None
    chunk_shape: Shape | None = None
    key_impl: str | None = None

    @property
    def nbytes(self) -> int:
        """Size in bytes, uncompressed."""
        if self.dtype is None:
            return 0
        return math.prod(self.shape) * self.dtype.itemsize
