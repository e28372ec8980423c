"""Quantised leaves: codes that are weights only together with the scales beside them.

Told from metadata: a leaf of small floats or of integers, and a smaller leaf of
wider floats that belongs to it by where it lies. Quantisers keep the two side by
side (`kernel`, `kernel_scale_inv`), in one box (`kernel/{qvalue, scale}`,
`kernel/{value, scale}`), or the scales in a collection of their own.
"""

import functools
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, cast

import jax.numpy as jnp

from orbax_nnx_handler.planning.core.leaves import StoredLeaf
from orbax_nnx_handler.planning.core.paths import Path, segments

_Names = tuple[str, ...]

_NO_SCALE = frozenset({"bias", "b"})


def scales_of(leaves: Iterable[StoredLeaf], used: Collection[Path] = ()) -> Mapping[Path, tuple[Path, ...]]:
    """Returns the scales of each leaf that holds codes.

    Args:
        leaves: All stored leaves.
        used: Those that are wanted as they are: a target that asks for a scale itself
            knows what to do with it.
    """
    listed = list(leaves)
    codes = [leaf for leaf in listed if leaf.key_impl is None and leaf.shape and _is_code(leaf.dtype)]
    if not codes:
        return {}
    others = [leaf for leaf in listed if leaf.path not in used and _is_float(leaf.dtype)]
    places = _Places(listed, others)
    found = {leaf.path: tuple(_unique(places.beside(leaf))) for leaf in codes}
    return {path: scales for path, scales in found.items() if scales}


class _Places:
    """What lies where, as far as it may be a scale."""

    def __init__(self, leaves: Sequence[StoredLeaf], others: Sequence[StoredLeaf]) -> None:
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
        # Under the same path in a collection of scales: what lies above says so, or is not `params`.
        head = next((depth for depth, part in enumerate(names[:-1]) if part != "params"), len(names) - 1)
        for leaf in self._smaller(code, self._elsewhere.get(names[head:-1], ())):
            above = _names(leaf.path)[: -len(names[head:])]
            is_apart = bool(head) and above[:1] != ("params",)
            says_so = any("scale" in part.lower() for part in above)
            same = _names(leaf.path)[-1] == name
            if ((is_apart and head < len(names) - 1) or says_so) and (same or _is_named(leaf, name)):
                yield leaf

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
