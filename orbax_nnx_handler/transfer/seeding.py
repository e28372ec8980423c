"""Random state that nobody gives: keys from a base seed and each leaf's path.

Two streams never share a key, since their paths differ, and every process
derives the same. Computed on the host: compiling hundreds of small outputs onto
a mesh would take longer than the restore.
"""

import zlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from orbax_nnx_handler.planning.leaves import Shape, WantedLeaf
from orbax_nnx_handler.planning.paths import Path, canonical
from orbax_nnx_handler.planning.roles import is_key

BASE_SEED = 0
"""Seed of keys that neither the checkpoint nor the target nor `init` gives."""

_KEY_IMPLS = ("threefry2x32", "rbg", "unsafe_rbg")


def derive_random(leaves: Sequence[WantedLeaf]) -> dict[Path, jax.Array]:
    """Returns a key for each key leaf, and zero for each count, on their own devices."""
    groups: dict[tuple[str, Shape], list[WantedLeaf]] = defaultdict(list)
    derived: dict[Path, jax.Array] = {}
    for leaf in leaves:
        if is_key(leaf.dtype):
            groups[_impl(leaf.dtype), leaf.shape].append(leaf)
        else:
            derived[leaf.path] = _place(np.zeros(leaf.shape, leaf.dtype), leaf)
    for (impl, shape), some in groups.items():
        bits = _key_bits(impl, shape, [_path_number(leaf.path) for leaf in some])
        for leaf, own in zip(some, bits, strict=True):
            derived[leaf.path] = jax.random.wrap_key_data(_place(own, leaf), impl=impl)
    return derived


def _impl(dtype: Any) -> str:
    return next(name for name in _KEY_IMPLS if jax.random.key(0, impl=name).dtype == dtype)


def _path_number(path: Path) -> int:
    # crc32, not hash(): string hashes differ between processes.
    return zlib.crc32("/".join(canonical(path)).encode())


def _key_bits(impl: str, shape: Shape, numbers: Sequence[int]) -> np.ndarray[Any, Any]:
    """Returns the bits of one key (or array of keys) for each number."""
    base = jax.random.key(BASE_SEED, impl=impl)

    def bits(number: jax.Array) -> jax.Array:
        key = jax.random.fold_in(base, number)
        return jax.random.key_data(jax.random.split(key, shape) if shape else key)

    with jax.default_device(jax.local_devices()[0]):
        return np.asarray(jax.vmap(bits)(jnp.array(numbers, jnp.uint32)))


def _place(value: np.ndarray[Any, Any], leaf: WantedLeaf) -> jax.Array:
    # A key array's spec names its leading axes; the axis of bits behind them stays whole.
    return jax.make_array_from_callback(
        value.shape, cast(Sharding, leaf.sharding), lambda index: value[index]
    )
