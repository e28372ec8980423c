"""What is known of a checkpoint before any array is read: its leaves, and how each array lies in its store.

Zarr 2 keeps an array's layout in `.zarray`, Zarr 3 in `zarr.json`
(https://zarr-specs.readthedocs.io). Only what Orbax writes is read here in
detail; any other codec is left to TensorStore.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from orbax_nnx_handler.planning.core.dtypes import is_array_dtype
from orbax_nnx_handler.planning.core.leaves import Shape, StoredLeaf, record
from orbax_nnx_handler.planning.core.lines import sized
from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.core.regions import Region, whole
from orbax_nnx_handler.planning.verdict.leaf_verdicts import Unreadable
from orbax_nnx_handler.storage.checkpoint import (
    FieldError,
    object_of,
    objects_of,
    optional_object,
    parse_object,
    shape_field,
    text_of,
)
from orbax_nnx_handler.storage.stores.files import Files, Sizes
from orbax_nnx_handler.storage.stores.kvstore import Store

ZarrDriver = Literal["zarr", "zarr3"]
Driver = ZarrDriver | Literal["npy"]
Codec = Literal["raw", "zstd", "other", "stored", "deflated"]

_SEPARATORS = (".", "/")

METADATA_KEY: dict[ZarrDriver, str] = {"zarr": ".zarray", "zarr3": "zarr.json"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoding:
    """The layout of one array.

    Attributes:
        driver: TensorStore's name of the format; `npy` for a member of a NumPy archive.
        shape: The array's shape.
        dtype: The stored dtype, little-endian.
        chunk_shape: Shape of one chunk; those at the edge are stored whole.
        codec: How a chunk's bytes are packed; `stored` and `deflated` are those of archives.
        sharded: Whether a chunk is a Zarr 3 shard that holds one inner chunk,
            with its index behind it, as Orbax writes.
        separator: What stands between the grid indices in a chunk's key.
        fill_value: What an absent chunk stands for.
    """

    driver: Driver
    shape: Shape
    dtype: np.dtype[Any]
    chunk_shape: Shape
    codec: Codec
    sharded: bool
    separator: str
    fill_value: Any

    # The layers of a model share their encodings, so that these are worked out for one of them.
    @functools.cached_property
    def chunk_nbytes(self) -> int:
        """Bytes of one decoded chunk."""
        return math.prod(self.chunk_shape) * self.dtype.itemsize

    @functools.cached_property
    def whole_chunk(self) -> Region:
        """The region of all of one chunk."""
        return whole(self.chunk_shape)

    @functools.cached_property
    def is_one_chunk(self) -> bool:
        """Whether a single chunk holds the whole array."""
        return all(size <= chunk for size, chunk in zip(self.shape, self.chunk_shape, strict=True))

    @functools.cached_property
    def first_key(self) -> str:
        """The key of the first chunk below the array's own."""
        return self.chunk_key((0,) * len(self.shape))

    def chunks(self, region: Region) -> Iterator[tuple[int, ...]]:
        """Yields the grid indices of the chunks that a region touches."""
        ranges = [
            range(start // size, -(-stop // size))
            for (start, stop), size in zip(region, self.chunk_shape, strict=True)
        ]
        return itertools.product(*ranges)

    def chunk_region(self, index: tuple[int, ...]) -> Region:
        """Returns the region that a chunk covers, the overhang at the edge included."""
        return tuple((at * size, (at + 1) * size) for at, size in zip(index, self.chunk_shape, strict=True))

    def chunk_key(self, index: tuple[int, ...]) -> str:
        """Returns a chunk's key below the array's own."""
        if self.driver == "zarr3":
            return self.separator.join(["c", *map(str, index)])
        return self.separator.join(map(str, index)) or "0"


_FORMATS: dict[ZarrDriver, int] = {"zarr": 2, "zarr3": 3}

# A chunk beyond the array's sides is common in small arrays.
_LARGE_CHUNK, _LARGER = 64 << 20, 16


def parse_encoding(driver: ZarrDriver, content: bytes) -> Encoding:
    """Returns the encoding that an array's metadata file describes.

    Raises:
        ValueError: The content is no array metadata; the message names the field.
    """
    fields = parse_object(content)
    if fields.get("zarr_format", _FORMATS[driver]) != _FORMATS[driver]:
        raise FieldError(f"zarr_format is {repr(fields['zarr_format'])[:80]}, not {_FORMATS[driver]}")
    encoding = _parse_zarr3(fields) if driver == "zarr3" else _parse_zarr2(fields)
    if len(encoding.shape) != len(encoding.chunk_shape):
        raise FieldError(f"a chunk of shape {encoding.chunk_shape} in an array of shape {encoding.shape}")
    if encoding.separator not in _SEPARATORS:
        # It would lead to other directories.
        raise FieldError(f"the separator of chunk keys is {encoding.separator!r}")
    if encoding.codec == "other":
        _check_chunk(encoding)
    return encoding


def _check_chunk(encoding: Encoding) -> None:
    """Raises where a chunk is far larger than the array: TensorStore would unpack all of it."""
    chunk, array = (
        math.prod(shape) * encoding.dtype.itemsize for shape in (encoding.chunk_shape, encoding.shape)
    )
    if chunk > max(_LARGE_CHUNK, _LARGER * array):
        raise FieldError(f"a chunk would have {sized(chunk)}, and the whole array has {sized(array)}")


def _parse_zarr2(fields: dict[str, Any]) -> Encoding:
    compressor = optional_object(fields, "compressor")
    codec: Codec = "other"
    plain = not fields.get("filters") and fields.get("order", "C") == "C"
    if plain and not compressor:
        codec = "raw"
    elif plain and compressor.get("id") == "zstd":
        codec = "zstd"
    name = text_of(fields, "dtype")
    if name[:1] not in "<>|" and _dtype(name).isbuiltin == _BUILTIN:
        raise FieldError(f"the dtype {name!r} has no byte order")
    return Encoding(
        driver="zarr",
        shape=shape_field(fields, "shape", least=0),
        dtype=_dtype(name),
        chunk_shape=shape_field(fields, "chunks", least=1),
        codec="other" if name.startswith(">") else codec,
        sharded=False,
        separator=fields.get("dimension_separator", "."),
        fill_value=_fill_value(fields),
    )


def _parse_zarr3(fields: dict[str, Any]) -> Encoding:
    if fields.get("node_type") != "array":
        raise FieldError(f"node_type is {fields.get('node_type')!r}, not 'array'")
    _check_zarr3(fields)
    grid = object_of(object_of(fields, "chunk_grid"), "configuration")
    chunk_shape = shape_field(grid, "chunk_shape", least=1)
    codecs, sharded = _inner_codecs(objects_of(fields, "codecs"), chunk_shape)
    key = object_of(fields, "chunk_key_encoding")
    return Encoding(
        driver="zarr3",
        shape=shape_field(fields, "shape", least=0),
        dtype=_dtype(text_of(fields, "data_type")),
        chunk_shape=chunk_shape,
        codec=_codec(codecs) if text_of(key, "name") == "default" else "other",
        sharded=sharded,
        separator=optional_object(key, "configuration").get("separator", "/"),
        fill_value=_fill_value(fields),
    )


_KNOWN = frozenset(
    {
        *("zarr_format", "node_type", "shape", "data_type", "chunk_grid", "chunk_key_encoding", "codecs"),
        *("fill_value", "attributes", "dimension_names", "storage_transformers"),
    }
)
_BUILTIN = 1  # Of `numpy.dtype.isbuiltin`; bfloat16 and the like are registered with NumPy.


def _check_zarr3(fields: dict[str, Any]) -> None:
    """Raises where a field says that the array is to be read otherwise, or is none of Zarr 3."""
    grid = text_of(object_of(fields, "chunk_grid"), "name")
    if grid != "regular":
        raise FieldError(f"chunk_grid is {grid!r:.80}, not 'regular'")
    if fields.get("fill_value") is None:
        raise FieldError(f"fill_value is {'null' if 'fill_value' in fields else 'absent'}")
    if fields.get("storage_transformers"):
        raise FieldError("storage_transformers are none that are known")
    optional_object(fields, "attributes")
    for name in fields.keys() - _KNOWN:
        # So the specification lets a writer say that a reader may pass a field over.
        field = fields[name]
        if not isinstance(field, dict) or cast(dict[str, Any], field).get("must_understand") is not False:
            raise FieldError(f"{name!r:.80} is no field of Zarr 3")


_NO_NUMBERS = frozenset({"NaN", "Infinity", "-Infinity"})


def _fill_value(fields: dict[str, Any]) -> Any:
    match fields.get("fill_value"):
        case str() as value if value not in _NO_NUMBERS:
            raise FieldError(f"fill_value is {value!r:.80}, which is no number")
        case str() | int() | float() | bool() | None as value:
            return value
        # How Zarr 3 spells a complex number.
        case [int() | float() as real, int() | float() as imaginary]:
            return complex(real, imaginary)
        case other:
            raise FieldError(f"fill_value is {repr(other)[:80]}, which is no number")


def _inner_codecs(codecs: list[dict[str, Any]], chunk_shape: Shape) -> tuple[list[dict[str, Any]], bool]:
    """Looks into a shard that holds exactly one chunk; any other is TensorStore's."""
    if _names(codecs) != ["sharding_indexed"]:
        return codecs, False
    shard = object_of(codecs[0], "configuration")
    inner = shape_field(shard, "chunk_shape", least=1)
    one_chunk = inner == chunk_shape and shard.get("index_location", "end") == "end"
    if not one_chunk or _names(objects_of(shard, "index_codecs")) != ["bytes", "crc32c"]:
        return [], False
    return objects_of(shard, "codecs"), True


def _codec(codecs: list[dict[str, Any]]) -> Codec:
    match _names(codecs):
        case ["bytes"]:
            found: Codec = "raw"
        case ["bytes", "zstd"]:
            found = "zstd"
        case _:
            return "other"
    endian = optional_object(codecs[0], "configuration").get("endian", "little")
    return found if endian == "little" else "other"


def _names(codecs: list[dict[str, Any]]) -> list[str]:
    return [text_of(codec, "name") for codec in codecs]


def _dtype(name: str) -> np.dtype[Any]:
    try:
        # Bytes arrive in this machine's order, whatever order they have on disk.
        found = np.dtype(name).newbyteorder("=") if name[:1] in "<>|" else jnp.dtype(name)
    except (TypeError, ValueError, SyntaxError) as error:
        raise FieldError(f"the dtype {name!r} is none of an array") from error
    if not is_array_dtype(found):
        raise FieldError(f"the dtype {name!r} is none of JAX's arrays")
    return found


@record
class StoredArray:
    """Where and how one array is stored.

    Attributes:
        name: Its name in the store, dots between the keys of its path.
        store: The store that holds it.
        encoding: Its layout there; for a random key, that of the key's bits.
    """

    name: str
    store: Store
    encoding: Encoding

    def key(self, index: tuple[int, ...]) -> str:
        """Returns the store's key of one chunk."""
        return f"{self.name}/{self.encoding.chunk_key(index)}"

    def keys(self, regions: Iterable[Region]) -> Iterable[str]:
        """Returns the store's keys of the chunks that some regions touch, each once."""
        if self.encoding.is_one_chunk and 0 not in self.encoding.shape:
            return (f"{self.name}/{self.encoding.first_key}",)
        return map(self.key, dict.fromkeys(index for each in regions for index in self.encoding.chunks(each)))

    def unlisted(self, regions: Iterable[Region]) -> list[str]:
        """Returns those of these keys that the store's catalog shows to be absent."""
        catalog = self.store.catalog
        return [] if catalog is None else [key for key in self.keys(regions) if key not in catalog]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What is known of one item from its metadata.

    Attributes:
        directory: The item directory (or the msgpack file or NumPy archive itself).
        leaves: All leaves by path, as the disk's tree has them: a string for a
            dict key, an int for a list index. `None` and empty containers are no
            leaves. A random key has its key dtype and no trailing axis of bits.
        lost: Leaves that the tree names but whose array metadata cannot be read,
            with the reason.
        damaged: Leaves whose shapes are known and whose bytes are not all there, with the reason.
        disk_format: The format, such as "ocdbt+zarr3", "zarr", "msgpack" or "npz".
        custom_metadata: What the program stored with the item.
        step_metadata: What the program stored with the step (MaxText says there
            whether layers are scanned).
        values: The values that an older msgpack file held, and random state that
            this library saved in the custom metadata; None without any.
        nodes: Every path of the disk's tree with its value type, empty nodes
            included: the containers that Orbax expects an item to have.
        arrays: Where each array lies; the values of a msgpack file are not in it.
        writes_fill: Whether the writer stored chunks even where they equal the
            fill value. Then an absent chunk is a loss, otherwise it is zeros.
        foreign: Leaves that are whole but hold no numbers (pickled objects, records),
            with what they hold.
        on_devices: The arrays of a tree in memory that are JAX's already.
        without_values: The leaves of a tree in memory that have a shape only, with what they are.
        is_of_flax_model: Whether its form says that a Flax model of transformers or diffusers wrote it: a
            Linen program, whose modules may be called `0`, `1` as well.
        stamps: Files that say when it was saved, where another save would write to the same files,
            with their content: it tells after a read whether all of it is of one save.
    """

    directory: epath.Path
    leaves: Mapping[Path, StoredLeaf]
    lost: Mapping[Path, str]
    disk_format: str
    custom_metadata: Mapping[str, Any]
    step_metadata: Mapping[str, Any]
    values: Mapping[Path, np.ndarray[Any, Any]] | None
    nodes: Mapping[Path, str]
    arrays: Mapping[Path, StoredArray]
    writes_fill: bool
    damaged: Mapping[Path, str] = dataclasses.field(default_factory=dict[Path, str])
    foreign: Mapping[Path, str] = dataclasses.field(default_factory=dict[Path, str])
    on_devices: Mapping[Path, jax.Array] = dataclasses.field(default_factory=dict[Path, jax.Array])
    without_values: Mapping[Path, str] = dataclasses.field(default_factory=dict[Path, str])
    is_of_flax_model: bool = False
    stamps: Mapping[str, bytes] = dataclasses.field(default_factory=dict[str, bytes])

    @property
    def broken(self) -> Unreadable:
        """Every leaf that cannot be read, for a verdict."""
        return Unreadable(
            lost=self.lost,
            damaged=self.damaged,
            foreign=self.foreign,
            without_values=self.without_values,
        )

    def incomplete(self, paths: Iterable[Path], files: Files) -> dict[Path, str]:
        """Returns those stored leaves of which a chunk is not there, with the reason: one trip for all.

        Where the writer left out chunks of zeros, an absent chunk is no loss.
        """
        arrays = {path: self.arrays[path] for path in paths if self.writes_fill and path in self.arrays}
        folders = {path: Sizes(f"{a.store.directory}/{a.name}", "") for path, a in arrays.items()}
        folders = {path: asked for path, asked in folders.items() if arrays[path].store.kind == "files"}
        files.ask(*folders.values())
        found: dict[Path, str] = {}
        for path, array in arrays.items():
            needed = [whole(array.encoding.shape)]
            if path in folders:
                there = files.sizes(epath.Path(folders[path].path), "")
                absent = [
                    key for key in array.keys(needed) if key.removeprefix(f"{array.name}/") not in there
                ]
            else:
                absent = array.unlisted(needed)
            if absent:
                found[path] = f"{absent[0]} in {array.store.directory} is absent"
        return found
