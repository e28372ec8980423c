"""How one stored array lies in its store: shape, dtype, chunks, encoding.

Zarr 2 keeps this in `.zarray`, Zarr 3 in `zarr.json`
(https://zarr-specs.readthedocs.io). Only what Orbax writes is read here in
detail; any other codec is left to TensorStore.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.regions import Region
from orbax_nnx_handler.storage.checkpoint.fields import (
    FieldError,
    object_of,
    objects_of,
    optional_object,
    parse_object,
    shape_of,
    text_of,
)

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

    @property
    def chunk_nbytes(self) -> int:
        """Bytes of one decoded chunk."""
        return math.prod(self.chunk_shape) * self.dtype.itemsize

    @property
    def is_one_chunk(self) -> bool:
        """Whether a single chunk holds the whole array."""
        return all(size <= chunk for size, chunk in zip(self.shape, self.chunk_shape, strict=True))

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


def parse_encoding(driver: ZarrDriver, content: bytes) -> Encoding:
    """Returns the encoding that an array's metadata file describes.

    Raises:
        ValueError: The content is no array metadata; the message names the field.
    """
    fields = parse_object(content)
    encoding = _parse_zarr3(fields) if driver == "zarr3" else _parse_zarr2(fields)
    if len(encoding.shape) != len(encoding.chunk_shape):
        raise FieldError(f"a chunk of shape {encoding.chunk_shape} in an array of shape {encoding.shape}")
    if encoding.separator not in _SEPARATORS:
        # It would lead to other directories.
        raise FieldError(f"the separator of chunk keys is {encoding.separator!r}")
    return encoding


def _parse_zarr2(fields: dict[str, Any]) -> Encoding:
    compressor = optional_object(fields, "compressor")
    codec: Codec = "other"
    plain = not fields.get("filters") and fields.get("order", "C") == "C"
    if plain and not compressor:
        codec = "raw"
    elif plain and compressor.get("id") == "zstd":
        codec = "zstd"
    name = text_of(fields, "dtype")
    return Encoding(
        driver="zarr",
        shape=shape_of(fields, "shape", least=0),
        dtype=_dtype(name),
        chunk_shape=shape_of(fields, "chunks", least=1),
        codec="other" if name.startswith(">") else codec,
        sharded=False,
        separator=fields.get("dimension_separator", "."),
        fill_value=_fill_value(fields),
    )


def _parse_zarr3(fields: dict[str, Any]) -> Encoding:
    if fields.get("node_type") != "array":
        raise FieldError(f"node_type is {fields.get('node_type')!r}, not 'array'")
    grid = object_of(object_of(fields, "chunk_grid"), "configuration")
    chunk_shape = shape_of(grid, "chunk_shape", least=1)
    codecs, sharded = _inner_codecs(objects_of(fields, "codecs"), chunk_shape)
    key = optional_object(fields, "chunk_key_encoding") or {"name": "default"}
    return Encoding(
        driver="zarr3",
        shape=shape_of(fields, "shape", least=0),
        dtype=_dtype(text_of(fields, "data_type")),
        chunk_shape=chunk_shape,
        codec=_codec(codecs) if text_of(key, "name") == "default" else "other",
        sharded=sharded,
        separator=optional_object(key, "configuration").get("separator", "/"),
        fill_value=_fill_value(fields),
    )


def _fill_value(fields: dict[str, Any]) -> Any:
    match fields.get("fill_value"):
        case str() | int() | float() | bool() | None as value:
            return value
        # How Zarr 3 spells a complex number.
        case [int() | float() as real, int() | float() as imaginary]:
            return complex(real, imaginary)
        case other:
            raise FieldError(f"fill_value is {str(other)[:80]}, which is no number")


def _inner_codecs(codecs: list[dict[str, Any]], chunk_shape: Shape) -> tuple[list[dict[str, Any]], bool]:
    """Looks into a shard that holds exactly one chunk; any other is TensorStore's."""
    if _names(codecs) != ["sharding_indexed"]:
        return codecs, False
    shard = object_of(codecs[0], "configuration")
    inner = shape_of(shard, "chunk_shape", least=1)
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
    # bfloat16 and its like are of the kind V too, and no raw bytes.
    if found.kind in "OSUMm" or found.type is np.void or not found.itemsize:
        raise FieldError(f"the dtype {name!r} is none of numbers")
    return found
