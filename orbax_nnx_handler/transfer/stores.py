"""One key-value store per checkpoint, whatever lies below it."""

import dataclasses
import os
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeVar

import tensorstore as ts
from etils import epath

_Key = TypeVar("_Key", bound=Hashable)

# B-tree nodes only; array bytes never pass a cache.
_CACHE_BYTES = 100_000_000
_CONTEXT_SPEC = {"cache_pool": {"total_bytes_limit": _CACHE_BYTES}, "file_io_concurrency": {"limit": 128}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Store:
    """An open key-value store that holds arrays.

    Attributes:
        label: How messages call it.
        directory: Where it lies.
        spec: TensorStore's description, to open single arrays with.
        kvstore: The handle that all reads share.
        context: TensorStore's limits and caches.
    """

    label: str
    directory: epath.Path
    spec: dict[str, Any]
    kvstore: ts.KvStore
    context: ts.Context


def base_spec(directory: epath.Path) -> Any:
    """Returns the store of plain files below a directory, local or remote."""
    path = os.fspath(directory)
    if "://" in path:
        return path.rstrip("/") + "/"
    return {"driver": "file", "path": f"{directory.absolute()}/"}


def is_ocdbt(directory: epath.Path) -> bool:
    """Tells whether a directory is an OCDBT database."""
    return (directory / "manifest.ocdbt").exists()


def open_ocdbt(directory: epath.Path) -> Store:
    """Opens the OCDBT database in a directory."""
    return _open(
        "ocdbt", directory, {"driver": "ocdbt", "base": base_spec(directory), "cache_pool": "cache_pool"}
    )


def open_files(directory: epath.Path) -> Store:
    """Opens a directory with one subdirectory per array."""
    return _open("files", directory, base_spec(directory))


def _open(label: str, directory: epath.Path, spec: Any) -> Store:
    context = ts.Context(_CONTEXT_SPEC)
    kvstore = ts.KvStore.open(spec, context=context).result()
    full = kvstore.spec().to_json()
    return Store(label=label, directory=directory, spec=full, kvstore=kvstore, context=context)


def read_small(store: Store, keys: Sequence[str]) -> list[bytes | None]:
    """Returns the values of many small keys, read together; None for an absent one."""
    futures = [store.kvstore.read(key) for key in keys]
    results = [future.result() for future in futures]
    return [result.value if result.state == "value" else None for result in results]


def first_found(
    names: Mapping[_Key, str], places: Sequence[tuple[Store, str]]
) -> dict[_Key, tuple[int, bytes]]:
    """Looks every name up in the first place, what is left in the next, and so on.

    Args:
        names: The names by whatever the caller knows them as.
        places: Stores, each with the ending that a name takes there.

    Returns:
        For each found name, the number of the place and the value there.
    """
    found: dict[_Key, tuple[int, bytes]] = {}
    left = list(names)
    for number, (store, ending) in enumerate(places):
        values = read_small(store, [names[key] + ending for key in left])
        found |= {key: (number, value) for key, value in zip(left, values, strict=True) if value is not None}
        left = [key for key in left if key not in found]
    return found
