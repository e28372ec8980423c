"""The table of contents of an OCDBT database: what it holds, and where.

One walk over the B-tree tells which chunks exist, holds the small values (the Zarr
metadata of every array), and gives file, offset and length of the large ones. So shapes
cost no read per array, a lost chunk shows before anything is read, and the bytes can be
read from the data files without asking the database again.

The nodes of a level are fetched together. Nothing is fetched or believed that the files,
as they were listed, cannot hold.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

from orbax_nnx_handler.storage.stores.ocdbt import (
    DamagedDatabaseError,
    Extent,
    NodeReference,
    decode_manifest,
    decode_node,
)

Catalog = Mapping[str, bytes | Extent]
"""The value of each key, or where it lies."""

Fetch = Callable[[Sequence[Extent]], Sequence[bytes]]
"""Returns the bytes of extents, asked for together."""

MANIFEST = "manifest.ocdbt"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Database:
    """What an OCDBT database holds.

    Attributes:
        catalog: The value of each key, or where it lies.
        damaged: The keys whose bytes are not where the catalog says, with the reason.
        sizes: The size of each file of the database.
    """

    catalog: Catalog
    damaged: Mapping[str, str]
    sizes: Mapping[str, int]


def read_catalog(manifest: bytes, sizes: Mapping[str, int], fetch: Fetch) -> Database:
    """Walks a database's B-tree.

    Raises:
        DamagedDatabaseError: Names the file and the field.
    """
    root = decode_manifest(manifest, MANIFEST)
    found: dict[bytes, bytes | Extent] = {}
    level = [] if root is None else [root]
    budget, seen = sum(sizes.values()), set[Extent]()
    while level:
        for reference in level:
            _check_node(reference, sizes, seen)
            budget -= reference.extent.size
        if budget < 0:
            raise DamagedDatabaseError(
                f"{level[0].extent.file} is damaged: data_file_length: the nodes of the B-tree "
                "are larger together than all files"
            )
        contents = fetch([reference.extent for reference in level])
        below: list[NodeReference] = []
        for reference, content in zip(level, contents, strict=True):
            node = decode_node(content, reference)
            below += node.children
            prefix = reference.prefix
            keys = [prefix + key for key in node.keys] if prefix else node.keys
            found.update(zip(keys, node.values, strict=True))
        level = below
    catalog = dict(zip(_texts(found), found.values(), strict=True))
    return Database(catalog=catalog, damaged=dict(_damaged(catalog, sizes)), sizes=sizes)


def _check_node(reference: NodeReference, sizes: Mapping[str, int], seen: set[Extent]) -> None:
    extent = reference.extent
    reason = outside(extent, sizes)
    if reason:
        raise DamagedDatabaseError(f"the B-tree cannot be read: a node of it is lost: {reason}")
    if extent in seen:
        raise DamagedDatabaseError(
            f"{extent.file} is damaged: data_file_offset: the B-tree comes twice to the node "
            f"at byte {extent.start}"
        )
    seen.add(extent)


def outside(extent: Extent, sizes: Mapping[str, int]) -> str | None:
    """Returns why a file cannot hold an extent, or None if it can."""
    size = sizes.get(extent.file)
    if size is None:
        return f"the file {extent.file} is absent"
    if extent.start + extent.size > size:
        return f"{extent.file} ends at byte {size}, before byte {extent.start + extent.size}"
    return None


def _damaged(catalog: Catalog, sizes: Mapping[str, int]) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for key, value in catalog.items():
        if isinstance(value, Extent):
            file, start, size = value
            if start + size > sizes.get(file, -1):
                found.append((key, outside(value, sizes) or ""))
    return found


def _texts(keys: Iterable[bytes]) -> list[str]:
    try:
        return [key.decode() for key in keys]
    except UnicodeDecodeError as error:
        raise DamagedDatabaseError(
            f"the B-tree is damaged: key: {error.object[:100]!r} is no text"
        ) from error
