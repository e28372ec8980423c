"""Random state beside the tree, where a Linen program's structure check does not see it.

Orbax compares every key of the stored tree with the item that a Linen program
restores into, so one `nnx_aux` among them would fail it. An item's custom metadata
is not compared; the few numbers of NNX random streams are stored there.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from orbax_nnx_handler.planning.core.dtypes import is_key
from orbax_nnx_handler.planning.core.paths import Path, segments
from orbax_nnx_handler.planning.layouts.linen import AUX
from orbax_nnx_handler.storage.checkpoint.fields import FieldError, objects_of, shape_field, text_of, texts_of

Json = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredRandom:
    """One value that was stored in the metadata.

    Attributes:
        value: The numbers; for a random key, its bits.
        key_impl: The PRNG implementation of a random key, or None.
    """

    value: np.ndarray[Any, Any]
    key_impl: str | None = None


def add_leftovers(metadata: Any, leftovers: Mapping[Path, Any]) -> Json | None:
    """Returns an item's custom metadata with random state added.

    Args:
        metadata: What the program stores there itself: a JSON object, or None.
        leftovers: Keys and counts by path below `nnx_aux`.

    Raises:
        ValueError: The program's own metadata is no object, or uses the name.
    """
    if not leftovers:
        return metadata
    if metadata is not None and (not isinstance(metadata, Mapping) or AUX in metadata):
        raise ValueError(
            f"custom_metadata must be a dict without a key {AUX!r}: random state is stored there.\n"
            "hint: pass a dict, or save the state without it: nnx.split_state(state, nnx.RngState, ...)[1]."
        )
    numbers = {path: _numbers(value) for path, value in leftovers.items()}
    for value in numbers.values():
        if isinstance(value, jax.Array):
            # All on their way before the first is waited for: a large model has hundreds of streams.
            value.copy_to_host_async()
    entries = [_entry(path, leftovers[path], np.asarray(value)) for path, value in numbers.items()]
    return {**cast(Json, metadata or {}), AUX: entries}


def read_leftovers(metadata: Mapping[str, Any]) -> dict[Path, StoredRandom]:
    """Returns the random state in an item's custom metadata, by its path had it been in the tree.

    Raises:
        ValueError: What stands there is no random state; the message names the field.
    """
    # A program's own entry of this name is no list.
    if not isinstance(metadata.get(AUX), list):
        return {}
    entries = objects_of(dict(metadata), AUX)
    return {(AUX, *texts_of(entry, "path")): _leftover(entry) for entry in entries}


def _entry(path: Path, value: Any, numbers: np.ndarray[Any, Any]) -> Json:
    return {
        "path": list(segments(path)),
        "key_impl": str(jax.random.key_impl(value)) if _is_key(value) else None,
        "dtype": numbers.dtype.name,
        "shape": list(numbers.shape),
        "value": numbers.ravel().tolist(),
    }


def _is_key(value: Any) -> bool:
    return isinstance(value, jax.Array) and is_key(value.dtype)


def _numbers(value: Any) -> Any:
    """Returns a value's numbers, a key's bits, as an array that this process holds whole."""
    numbers = jax.random.key_data(value) if _is_key(value) else value
    if not isinstance(numbers, jax.Array) or numbers.is_fully_addressable:
        return numbers
    whole = numbers if numbers.is_fully_replicated else _replicated(numbers)
    return whole.addressable_data(0)


def _replicated(value: jax.Array) -> jax.Array:
    # A stack of keys over the layers of a sharded model: a few numbers each, and every process is here.
    mesh = cast(NamedSharding, value.sharding).mesh

    def same(part: Any) -> Any:
        return part

    return cast(jax.Array, jax.jit(same, out_shardings=NamedSharding(mesh, PartitionSpec()))(value))


def _leftover(entry: Json) -> StoredRandom:
    shape, name = shape_field(entry, "shape", least=0), text_of(entry, "dtype")
    impl = None if entry.get("key_impl") is None else text_of(entry, "key_impl")
    try:
        numbers = np.asarray(entry.get("value"), dtype=name).reshape(shape)
    except (TypeError, ValueError, OverflowError) as error:
        raise FieldError(f"value is none of shape {shape} and dtype {name!r}: {error}") from error
    if numbers.dtype.kind not in "biuf":
        raise FieldError(f"dtype is {name!r}, which is none of numbers")
    return StoredRandom(value=numbers, key_impl=impl)
