"""One key-value store per checkpoint, whatever lies below it; of an OCDBT database, its table of contents.

One walk over the B-tree tells which chunks exist, holds the small values (the Zarr
metadata of every array), and gives file, offset and length of the large ones. So shapes
cost no read per array, a lost chunk shows before anything is read, and the bytes can be
read from the data files without asking the database again.

The nodes of a level are fetched together. Nothing is fetched or believed that the files,
as they were listed, cannot hold.
"""

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple, TypeVar

import tensorstore as ts
from etils import epath

from orbax_nnx_handler.planning.core.errors import NotACheckpointError
from orbax_nnx_handler.planning.verdict.leaf_verdicts import UnfitName
from orbax_nnx_handler.storage.stores.backends import CONTEXT_SPEC, TIME_LIMIT_S, LocalFiles, RemoteFiles
from orbax_nnx_handler.storage.stores.files import Files, ReadFile, Sizes
from orbax_nnx_handler.storage.stores.locations import MISREAD, check_files, is_misread, is_url, kvstore_spec
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
    extents = [(key, value) for key, value in catalog.items() if isinstance(value, Extent)]
    if all(start + size <= sizes.get(file, -1) for _, (file, start, size) in extents):
        return []  # Nearly every database.
    reasons = [(key, outside(extent, sizes)) for key, extent in extents]
    return [(key, reason) for key, reason in reasons if reason]


def _texts(keys: Iterable[bytes]) -> list[str]:
    try:
        return [key.decode() for key in keys]
    except UnicodeDecodeError as error:
        raise DamagedDatabaseError(
            f"the B-tree is damaged: key: {error.object[:100]!r} is no text"
        ) from error


_Key = TypeVar("_Key", bound=Hashable)

StoreKind = Literal["ocdbt", "files", "archive"]

# B-tree nodes only; array bytes never pass a cache.
_CACHE_BYTES = 100_000_000
# What Orbax writes its values to: each process has a database of its own, merged into one.
_OWN, _OF_A_PROCESS = "d/", "ocdbt.process_"
# A bucket names 1,000 files in an answer, and a process writes a handful.
_MANY_PROCESSES = 100
_MANY_FILES = 64
_STAT_THREADS = 16


class FileState(NamedTuple):
    """What tells a file from what another save wrote in its place.

    Not its inode: where a bucket is mounted, one file has now this and now that.
    """

    size: int
    modified_ns: int


FileStates = dict[str, FileState | OSError | None]
"""What files are by their names: None where there is none, an error where nobody can tell."""


def _is_another(result: ts.KvStore.ReadResult, version: bytes) -> bool:
    # A store that knows no such condition answers with what it has.
    return result.state == "missing" or (result.state == "value" and result.stamp.generation != version)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Store:
    """A key-value store that holds arrays. TensorStore opens it when it is first needed.

    Attributes:
        kind: One database, one directory per array, or one file with all of them.
        directory: Where it lies; for a file, the directory that it is in.
        catalog: The contents of the database or the file; None for directories.
        damaged: Keys whose bytes are not where the catalog says, with the reason.
        sizes: The size of each file of the database, by its path below the directory.
        local: Whether its files can be opened by this process directly.
        seen: What its files were when they were first looked at.
        versions: Behind a network, the version of each object when it was first read; of a database none.
    """

    kind: StoreKind
    directory: epath.Path
    local: bool
    catalog: Catalog | None = None
    damaged: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict[str, int])
    seen: FileStates = dataclasses.field(default_factory=FileStates)
    versions: dict[str, bytes] = dataclasses.field(default_factory=dict[str, bytes])

    def look_at(self, files: Sequence[str]) -> FileStates:
        """Returns what files of this machine are, and remembers it."""
        found = states_of(os.fspath(self.directory), files)
        for file, state in found.items():
            self.seen.setdefault(file, state)
        return found

    @property
    def was_written_to(self) -> bool:
        """Whether a file is another than when it was first looked at, or an object than when it was read.

        Asks a network once for each object, all at the same time, and gets no content of those that stayed.

        Raises:
            ValueError: A store behind a network did not answer; also `OSError`.
        """
        if states_of(os.fspath(self.directory), list(self.seen)) != self.seen:
            return True
        # One file, of which every read was of one version, is of one save.
        several = self.versions if self.kind == "files" or len(self.versions) > 1 else {}
        answers = [
            (self.base.read(key, if_not_equal=version, byte_range=slice(0, 1)), version)
            for key, version in several.items()
        ]
        return any(_is_another(answer.result(timeout=TIME_LIMIT_S), version) for answer, version in answers)

    @functools.cached_property
    def context(self) -> ts.Context:
        """TensorStore's limits and caches."""
        limits = {"cache_pool": {"total_bytes_limit": _CACHE_BYTES}, "file_io_concurrency": {"limit": 128}}
        return ts.Context({**limits, **CONTEXT_SPEC})

    @functools.cached_property
    def base(self) -> ts.KvStore:
        """The handle on the directory itself, in which the extents of the catalog lie."""
        return ts.KvStore.open(kvstore_spec(self.directory), context=self.context).result()

    @functools.cached_property
    def kvstore(self) -> ts.KvStore:
        """The handle on the keys."""
        if self.kind != "ocdbt":
            return self.base
        spec = {"driver": "ocdbt", "base": kvstore_spec(self.directory), "cache_pool": "cache_pool"}
        return ts.KvStore.open(spec, context=self.context).result()

    def open_array(self, name: str, driver: str, *, writes_fill: bool) -> ts.TensorStore:
        """Has TensorStore open an array.

        Args:
            name: The array's name.
            driver: `zarr` or `zarr3`.
            writes_fill: Whether an absent chunk is an error, and no fill value.

        Raises:
            ValueError: It is no array of this driver, or is damaged.
            MisreadError: TensorStore would open another.
            OutsideError: A link among its files, or the database's, leads out.
            OSError: One of them is a pipe or a device, or cannot be read.
        """
        spec = {
            "driver": driver,
            "kvstore": self._array_spec(name),
            "fill_missing_data_reads": not writes_fill,
        }
        return ts.open(spec, open=True, read=True, context=self.context).result()

    def _array_spec(self, name: str) -> dict[str, Any]:
        if self.kind != "ocdbt":
            if self.local:
                check_files(os.fspath(self.directory), name)
            return kvstore_spec(self.directory / name)
        if self.local:
            for folder in dict.fromkeys(file.partition("/")[0] for file in self.sizes):
                check_files(os.fspath(self.directory), folder)
        return {**self.kvstore.spec().to_json(), "path": f"{name}/"}

    def misread(self, name: str) -> str | None:
        """Returns why an array of this name is none of the store's, or None if it may be."""
        if self.kind != "files" or not self.local or not is_misread(name):
            return None
        return UnfitName(
            f"{self.directory} can have no directory {name!r}: {MISREAD} (OCDBT keeps such names)"
        )

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

    def file_of(self, key: str) -> str:
        """Returns the file in which a key's value lies, for messages."""
        extent = self.listed_extent(key)
        if extent is not None:
            return extent.file
        # Small members of an archive in a bucket came with its headers.
        return next(iter(self.versions), key) if self.kind == "archive" else key

    def inline(self, key: str) -> bytes | None:
        """Returns a value small enough to lie in the catalog itself."""
        value = self.catalog.get(key) if self.catalog is not None else None
        return value if isinstance(value, bytes) else None

    def lacks(self, key: str) -> bool:
        """Tells whether the catalog shows that a key is absent."""
        return self.catalog is not None and key not in self.catalog


def states_of(folder: str, files: Sequence[str]) -> FileStates:
    """Returns what files below a folder of this machine are."""
    if len(files) < _MANY_FILES:
        return dict(_states(folder, files))
    # A file system of another machine answers late, so it is asked many questions at a time.
    some = [files[start : start + _MANY_FILES] for start in range(0, len(files), _MANY_FILES)]
    with ThreadPoolExecutor(_STAT_THREADS) as pool:
        return dict(itertools.chain.from_iterable(pool.map(functools.partial(_states, folder), some)))


def _states(folder: str, files: Sequence[str]) -> list[tuple[str, FileState | OSError | None]]:
    return [(file, _state_of(f"{folder}/{file}")) for file in files]


def _state_of(file: str) -> FileState | OSError | None:
    try:
        found = os.stat(file)  # noqa: PTH116 - thousands of calls
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        return error
    return FileState(found.st_size, found.st_mtime_ns)


def _data_folders(entries: Iterable[str]) -> list[str]:
    """Returns how the names of the folders with a database's files begin, each to be listed by itself."""
    if sum(name.startswith(_OF_A_PROCESS) for name in entries) <= _MANY_PROCESSES:
        return [_OWN, _OF_A_PROCESS]
    # The pages of one listing would wait for each other.
    return [_OWN, *(f"{_OF_A_PROCESS}{digit}" for digit in range(10))]


def database_questions(directory: epath.Path, entries: Iterable[str]) -> list[ReadFile | Sizes]:
    """Returns what has to be known of a database before its tree can be walked.

    Args:
        directory: Where it lies.
        entries: What lies there.
    """
    path = str(directory)
    return [ReadFile(f"{path}/{MANIFEST}"), *(Sizes(path, prefix) for prefix in _data_folders(entries))]


def open_ocdbt(directory: epath.Path, files: Files) -> Store:
    """Lists the contents of the OCDBT database in a directory.

    Raises:
        DamagedDatabaseError: Names the file and the field.
    """
    entries = files.entries(directory)
    files.ask(*database_questions(directory, entries))
    sizes: dict[str, int] = {}
    for prefix in _data_folders(entries):
        sizes |= files.sizes(directory, prefix)
    manifest = files.content(directory / MANIFEST) or b""
    found: Database = read_catalog(manifest, sizes, functools.partial(files.extents, directory))
    return _store("ocdbt", directory, catalog=found.catalog, damaged=found.damaged, sizes=found.sizes)


def open_files(directory: epath.Path) -> Store:
    """Returns the store of a directory with one subdirectory per array."""
    return _store("files", directory)


def open_archive(file: epath.Path, catalog: Catalog, seen: FileStates, versions: dict[str, bytes]) -> Store:
    """Returns the store of a file that holds many arrays, or of several in one folder.

    Args:
        file: One of the files.
        catalog: Where each array lies.
        seen: What the files were before they were looked into.
        versions: Of objects in a bucket, which version was looked into.
    """
    return _store("archive", file.parent, catalog=catalog, seen=seen, versions=versions)


def states_before(files_read: Sequence[epath.Path]) -> FileStates:
    """Returns what files in one folder are that will be looked into; of a bucket's nothing is known."""
    folder = files_read[0].parent
    names = [file.name for file in files_read]
    return {} if is_url(folder) else states_of(os.fspath(folder), names)


def _store(kind: StoreKind, directory: epath.Path, **contents: Any) -> Store:
    return Store(kind=kind, directory=directory, local=not is_url(directory), **contents)


def files_at(path: epath.PathLike) -> Files:
    """Returns what asks the store in which a path lies."""
    return Files(RemoteFiles(path) if is_url(path) else LocalFiles())


def read_small(store: Store, keys: Sequence[str], files: Files) -> list[bytes | NotACheckpointError | None]:
    """Returns the values of many small keys, read together.

    None stands for an absent one, an error for one that cannot be read.
    """
    if store.catalog is None and store.local:
        return files.contents(store.directory, keys)
    if store.catalog is None:
        # Each is a request: only what the listing has is asked for.
        there = files.entries(store.directory)
        listed = [key for key in keys if key.partition("/")[0] in there]
        values = dict(zip(listed, files.contents(store.directory, listed), strict=True))
        return [values.get(key) for key in keys]
    found = [store.catalog.get(key) for key in keys]
    outside = {
        value: None
        for key, value in zip(keys, found, strict=True)
        if isinstance(value, Extent) and key not in store.damaged
    }
    read = dict(zip(outside, files.extents(store.directory, list(outside)), strict=True)) if outside else {}
    return [read.get(value, b"") if isinstance(value, Extent) else value for value in found]


def first_found(
    names: Mapping[_Key, str], places: Sequence[tuple[Store, str]], files: Files
) -> dict[_Key, tuple[int, bytes | NotACheckpointError]]:
    """Looks every name up in the first place, what is left in the next, and so on.

    Args:
        names: The names by whatever the caller knows them as.
        places: Stores, each with the ending that a name takes there.
        files: The files of the checkpoint.

    Returns:
        For each found name, the number of the place and the value there.
    """
    found: dict[_Key, tuple[int, bytes | NotACheckpointError]] = {}
    left = list(names)
    for number, (store, ending) in enumerate(places):
        values = read_small(store, [names[key] + ending for key in left], files)
        found |= {key: (number, value) for key, value in zip(left, values, strict=True) if value is not None}
        left = [key for key in left if key not in found] if len(found) < len(names) else []
        if not left:
            break
    return found
