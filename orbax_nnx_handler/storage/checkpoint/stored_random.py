"""Random state beside the tree, where a Linen program's structure check does not see it.

Orbax compares every key of the stored tree with the item that a Linen program
restores into, so one `nnx_aux` among them would fail it. An item's custom metadata
is not compared; the few numbers of NNX random streams are stored there. Which arrays of the
tree are random keys, Orbax notes in files of its own.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, cast

import jax
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from orbax_nnx_handler.planning.core.dtypes import is_key
from orbax_nnx_handler.planning.core.errors import NotACheckpointError
from orbax_nnx_handler.planning.core.leaves import Shape, StoredLeaf, WantedLeaf
from orbax_nnx_handler.planning.core.paths import Path, segments
from orbax_nnx_handler.planning.layouts.linen import AUX
from orbax_nnx_handler.planning.target import Target
from orbax_nnx_handler.storage.checkpoint import (
    FieldError,
    object_of,
    objects_of,
    optional_object,
    parse_object,
    shape_field,
    text_of,
    texts_of,
)
from orbax_nnx_handler.storage.checkpoint.wrong_paths import damaged
from orbax_nnx_handler.storage.stores.files import Files

Json = dict[str, Any]

KEY_FILES, KEY_FILE = "array_metadatas", "process_0"
"""The folder in which Orbax notes which arrays are random keys, and its first process's file."""


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


def read_key_impls(directory: epath.Path, files: Files) -> dict[str, str]:
    """Returns the PRNG implementation of each stored random key, by array name.

    Orbax notes it in `array_metadatas/process_*`, beside the chunk shapes; every
    process's file names every array.

    Raises:
        NotACheckpointError: The file is damaged, or names an implementation that JAX does not have.
    """
    if not files.is_folder(directory) or KEY_FILES not in files.entries(directory):
        return {}
    folder = directory / KEY_FILES
    names = [name for name in files.entries(folder) if name.startswith("process_")]
    if not names:
        return {}
    file = folder / (KEY_FILE if KEY_FILE in names else names[0])
    content = files.content(file) or b""
    # The file is megabytes at thousands of leaves, and most hold no key.
    if b"random_key_impl" not in content:
        return {}
    try:
        entries = [
            object_of(entry, "array_metadata")
            for entry in objects_of(parse_object(content), "array_metadatas")
        ]
        keys = {text_of(entry, "param_name"): optional_object(entry, "ext_metadata") for entry in entries}
        found = {
            name: text_of(key, "random_key_impl") for name, key in keys.items() if key.get("random_key_impl")
        }
        for impl in found.values():
            key_type(impl)
    except (FieldError, ValueError) as error:
        raise NotACheckpointError(
            f"{file} cannot be read: {error}.", hints=[damaged(directory, files)]
        ) from error
    return found


@functools.cache
def key_type(impl: str) -> tuple[np.dtype[Any], Shape]:
    """Returns the dtype of a random key and the shape of one key's bits."""
    key = jax.eval_shape(lambda: jax.random.key(0, impl=impl))
    # A key dtype is an extended dtype: it has a name, a kind and an item size,
    # but is no `numpy.dtype` to a type checker.
    dtype = cast("np.dtype[Any]", key.dtype)
    return dtype, jax.eval_shape(jax.random.key_data, key).shape


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


def with_keys(parts: Target, stored: Mapping[Path, StoredLeaf]) -> Target:
    """Returns the target with a random key wherever a leaf describes the bits of the one at its path.

    `ocp.utils.to_shape_dtype_struct` describes a random key so, and Orbax restores the key.
    """
    keys = [path for path, leaf in stored.items() if leaf.key_impl is not None and path in parts.leaves]
    found = {path: _as_key(parts.leaves[path], stored[path]) for path in keys}
    return dataclasses.replace(parts, leaves={**parts.leaves, **found}) if found else parts


def _as_key(wanted: WantedLeaf, stored: StoredLeaf) -> WantedLeaf:
    dtype, bits = key_type(str(stored.key_impl))
    if wanted.value is not None or wanted.dtype != np.uint32 or wanted.shape != (*stored.shape, *bits):
        return wanted
    sharding = _without_bits(wanted.sharding, len(stored.shape))
    return dataclasses.replace(wanted, shape=stored.shape, dtype=dtype, sharding=sharding)


def _without_bits(sharding: Sharding | None, rank: int) -> Sharding | None:
    if not isinstance(sharding, NamedSharding):
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*tuple(sharding.spec)[:rank]))
