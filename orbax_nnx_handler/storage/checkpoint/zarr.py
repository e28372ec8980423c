"""How one stored array lies in its store: shape, dtype, chunks, encoding.

Zarr 2 keeps this in `.zarray`, Zarr 3 in `zarr.json`
(https://zarr-specs.readthedocs.io). Only what Orbax writes is read here in
detail; any other codec is left to TensorStore.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.regions import Region

ZarrDriver = Literal["zarr", "zarr3"]
Driver = ZarrDriver | Literal["npy"]
Codec = Literal["raw", "zstd", "other", "stored", "deflated"]

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
        ValueError: The content is no array metadata.
        KeyError: A required field is absent.
    """
    fields = json.loads(content)
    return _parse_zarr3(fields) if driver == "zarr3" else _parse_zarr2(fields)


def _parse_zarr2(fields: dict[str, Any]) -> Encoding:
    compressor = fields["compressor"]
    codec: Codec = "other"
    plain = not fields.get("filters") and fields.get("order", "C") == "C"
    if plain and compressor is None:
        codec = "raw"
    elif plain and compressor.get("id") == "zstd":
        codec = "zstd"
    name = fields["dtype"]
    big_endian = isinstance(name, str) and name.startswith(">")
    return Encoding(
        driver="zarr",
        shape=tuple(fields["shape"]),
        dtype=_dtype(name),
        chunk_shape=tuple(fields["chunks"]),
        codec="other" if big_endian else codec,
        sharded=False,
        separator=fields.get("dimension_separator", "."),
        fill_value=fields.get("fill_value"),
    )


def _parse_zarr3(fields: dict[str, Any]) -> Encoding:
    if fields.get("node_type") != "array":
        raise ValueError(f"a Zarr {fields.get('node_type')}, not an array")
    chunk_shape = tuple(fields["chunk_grid"]["configuration"]["chunk_shape"])
    codecs, sharded = _inner_codecs(fields["codecs"], chunk_shape)
    key = fields.get("chunk_key_encoding", {"name": "default"})
    default_key = key["name"] == "default"
    return Encoding(
        driver="zarr3",
        shape=tuple(fields["shape"]),
        dtype=_dtype(fields["data_type"]),
        chunk_shape=chunk_shape,
        codec=_codec(codecs) if default_key else "other",
        sharded=sharded,
        separator=key.get("configuration", {}).get("separator", "/"),
        fill_value=fields.get("fill_value"),
    )


def _inner_codecs(codecs: list[dict[str, Any]], chunk_shape: Shape) -> tuple[list[dict[str, Any]], bool]:
    """Looks into a shard that holds exactly one chunk; any other is TensorStore's."""
    if [codec["name"] for codec in codecs] != ["sharding_indexed"]:
        return codecs, False
    shard = codecs[0]["configuration"]
    one_chunk = tuple(shard["chunk_shape"]) == chunk_shape and shard.get("index_location", "end") == "end"
    index = [codec["name"] for codec in shard["index_codecs"]]
    if not one_chunk or index != ["bytes", "crc32c"]:
        return [], False
    return shard["codecs"], True


def _codec(codecs: list[dict[str, Any]]) -> Codec:
    match [codec["name"] for codec in codecs]:
        case ["bytes"]:
            found: Codec = "raw"
        case ["bytes", "zstd"]:
            found = "zstd"
        case _:
            return "other"
    endian = codecs[0].get("configuration", {}).get("endian", "little")
    return found if endian == "little" else "other"


def _dtype(name: Any) -> np.dtype[Any]:
    if not isinstance(name, str):
        raise ValueError(f"the dtype {name!r} is none of an array")
    if name[:1] in "<>|":
        # Bytes arrive in this machine's order, whatever order they have on disk.
        return np.dtype(name).newbyteorder("=")
    return jnp.dtype(name)
