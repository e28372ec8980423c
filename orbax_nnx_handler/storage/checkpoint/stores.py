"""The table of contents of an OCDBT database: where the bytes of each key lie.

One walk over the B-tree tells which chunks exist, holds the small values (the
Zarr metadata of every array), and gives file, offset and length of the large
ones. So shapes cost no read per array, a lost chunk shows before anything is
read, and on a local disk the bytes come straight from the file.

The walk uses `tensorstore.ocdbt.dump`, which prints nodes in a documented form
(https://google.github.io/tensorstore/python/api/tensorstore.ocdbt.dump.html).
Should a later version print another form, `read_catalog` returns None and the
store is asked key by key.

One key-value store per checkpoint, whatever lies below it.
"""

import dataclasses
import functools
import logging
import os
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar
from urllib.parse import unquote

import tensorstore as ts
from etils import epath

_logger = logging.getLogger(__name__)


class Extent(NamedTuple):
    """A run of bytes in a file below the database's directory."""

    file: str
    start: int
    size: int


Catalog = Mapping[str, bytes | Extent]
"""The value of each key, or where it lies."""


def read_catalog(base: ts.KvStore) -> Catalog | None:
    """Returns the contents of the database in `base`, or None if they cannot be listed.

    Raises:
        ValueError: The database is damaged; TensorStore's message names the file.
    """
    manifest = ts.ocdbt.dump(base).result()
    try:
        return _walk(base, manifest["versions"][-1])
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        _logger.info("the B-tree of %s is printed in an unknown form (%r)", base.url, error)
        return None


def _walk(base: ts.KvStore, version: dict[str, Any]) -> Catalog:
    root = version["root"]
    if not root["statistics"]["num_keys"]:
        return {}
    found: dict[str, bytes | Extent] = {}
    level = [(b"", root["location"])]
    while level:
        dumps = [(prefix, ts.ocdbt.dump(base, location)) for prefix, location in level]
        level: list[tuple[bytes, str]] = []
        for prefix, dump in dumps:
            node = dump.result()
            if node["height"]:
                level += [(prefix + e["subtree_common_prefix"], e["location"]) for e in node["entries"]]
            else:
                found |= {(prefix + e["key"]).decode(): _value(e) for e in node["entries"]}
    return found


def _value(entry: dict[str, Any]) -> bytes | Extent:
    if "inline_value" in entry:
        return entry["inline_value"]
    # value:<directory of the process>:<file>:<offset>:<length>
    place, start, size = entry["indirect_value"].rsplit(":", 2)
    return Extent(_file(place), int(start), int(size))


@functools.lru_cache(maxsize=1024)  # Thousands of values lie in each file.
def _file(place: str) -> str:
    _, folder, file = place.split(":")
    return unquote(folder) + unquote(file)


_Key = TypeVar("_Key", bound=Hashable)

StoreKind = Literal["ocdbt", "files", "archive"]

# B-tree nodes only; array bytes never pass a cache.
_CACHE_BYTES = 100_000_000
_CONTEXT_SPEC = {"cache_pool": {"total_bytes_limit": _CACHE_BYTES}, "file_io_concurrency": {"limit": 128}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Store:
    """An open key-value store that holds arrays.

    Attributes:
        kind: One database, one directory per array, or one file with all of them.
        directory: Where it lies; for a file, the directory that it is in.
        local: Whether its files can be opened by this process directly.
        spec: TensorStore's description, to open single arrays with.
        kvstore: The handle that all reads share.
        context: TensorStore's limits and caches.
        catalog: The contents of the database or the file, where they can be listed.
    """

    kind: StoreKind
    directory: epath.Path
    local: bool
    spec: dict[str, Any]
    kvstore: ts.KvStore
    context: ts.Context
    catalog: Catalog | None = None

    def extent(self, key: str) -> Extent | None:
        """Returns the file that holds a key's value, or None where only the store can tell."""
        if not self.local:
            return None
        if self.kind == "files":
            return Extent(key, 0, -1)
        return self.listed_extent(key)

    def listed_extent(self, key: str) -> Extent | None:
        """Returns the file that the catalog has for a key's value, here or behind a network."""
        value = self.catalog.get(key) if self.catalog is not None else None
        return value if isinstance(value, Extent) else None

    def inline(self, key: str) -> bytes | None:
        """Returns a value small enough to lie in the catalog itself."""
        value = self.catalog.get(key) if self.catalog is not None else None
        return value if isinstance(value, bytes) else None

    def size_of(self, key: str) -> int | None:
        """Returns the length of a key's value, or None where only reading it can tell."""
        extent = self.listed_extent(key)
        return extent.size if extent is not None else None

    def lacks(self, key: str) -> bool:
        """Tells whether the catalog shows that a key is absent."""
        return self.catalog is not None and key not in self.catalog


def is_ocdbt(directory: epath.Path) -> bool:
    """Tells whether a directory is an OCDBT database."""
    return (directory / "manifest.ocdbt").exists()


def open_ocdbt(directory: epath.Path) -> Store:
    """Opens the OCDBT database in a directory and lists its contents.

    Raises:
        ValueError: The database is damaged.
    """
    base = _base_spec(directory)
    context = ts.Context(_CONTEXT_SPEC)
    catalog = read_catalog(ts.KvStore.open(base, context=context).result())
    spec = {"driver": "ocdbt", "base": base, "cache_pool": "cache_pool"}
    return _open("ocdbt", directory, spec, context, catalog)


def open_files(directory: epath.Path) -> Store:
    """Opens a directory with one subdirectory per array."""
    return _open("files", directory, _base_spec(directory), ts.Context(_CONTEXT_SPEC), None)


def open_archive(file: epath.Path, catalog: Catalog) -> Store:
    """Opens the directory of a file that holds many arrays.

    Args:
        file: The file.
        catalog: Where in it each value lies.
    """
    return _open("archive", file.parent, _base_spec(file.parent), ts.Context(_CONTEXT_SPEC), catalog)


def _base_spec(directory: epath.Path) -> Any:
    path = os.fspath(directory)
    if "://" in path:
        return path.rstrip("/") + "/"
    return {"driver": "file", "path": f"{directory.absolute()}/"}


def _open(
    kind: StoreKind,
    directory: epath.Path,
    spec: Any,
    context: ts.Context,
    catalog: Catalog | None,
) -> Store:
    kvstore = ts.KvStore.open(spec, context=context).result()
    return Store(
        kind=kind,
        directory=directory,
        local="://" not in os.fspath(directory),
        spec=kvstore.spec().to_json(),
        kvstore=kvstore,
        context=context,
        catalog=catalog,
    )


def read_small(store: Store, keys: Sequence[str]) -> list[bytes | None]:
    """Returns the values of many small keys, read together; None for an absent one."""
    catalog = store.catalog
    if catalog is None:
        return _read_all(store, keys)
    listed = [catalog.get(key) for key in keys]
    elsewhere = [key for key, value in zip(keys, listed, strict=True) if isinstance(value, Extent)]
    read = dict(zip(elsewhere, _read_all(store, elsewhere), strict=True))
    return [
        read[key] if isinstance(value, Extent) else value for key, value in zip(keys, listed, strict=True)
    ]


def _read_all(store: Store, keys: Sequence[str]) -> list[bytes | None]:
    results = [future.result() for future in [store.kvstore.read(key) for key in keys]]
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
