"""The table of contents of an OCDBT database: where the bytes of each key lie.

One walk over the B-tree tells which chunks exist, holds the small values (the
Zarr metadata of every array), and gives file, offset and length of the large
ones. So shapes cost no read per array, a lost chunk shows before anything is
read, and on a local disk the bytes come straight from the file.

The walk uses `tensorstore.ocdbt.dump`, which prints nodes in a documented form
(https://google.github.io/tensorstore/python/api/tensorstore.ocdbt.dump.html).
Should a later version print another form, `read_catalog` returns None and the
store is asked key by key.
"""

import functools
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import unquote

import tensorstore as ts

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
