"""Checkpoints of any size without their values: real metadata, a real B-tree, and data files that are holes.

What Orbax writes on many hosts: a database of each process, their B-tree merged into one, and one chunk for
each device that holds a part of its own. The data files are as long as their chunks need and take no
disk. So the whole decision, and the bytes that every host would ask for, can be worked out for a
checkpoint that no single machine can hold.
"""

import dataclasses
import itertools
import json
import math
import pathlib
import struct
from collections.abc import Iterator, Mapping, Sequence

import google_crc32c
import zstandard

Path = tuple[str | int, ...]
Axes = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hosts:
    """Hosts with equally many devices each, as a mesh of two axes.

    Attributes:
        count: How many hosts.
        devices: Devices of a host.
        tensor: Length of the mesh's last axis, over which heads, hidden units and tokens are spread; all
            other devices are on the first, `fsdp`, over which the width is spread.
    """

    count: int
    devices: int
    tensor: int = 1

    @property
    def shape(self) -> dict[str, int]:
        """The mesh."""
        return {"fsdp": self.count * self.devices // self.tensor, "tensor": self.tensor}

    def parts(self, axes: Axes) -> tuple[int, ...]:
        """Returns into how many parts each axis of an array is cut."""
        return tuple(1 if axis is None else self.shape[axis] for axis in axes)

    def part_of(self, device: int, axes: Axes) -> tuple[int, ...]:
        """Returns which part of an array a device holds, by the number of the part on each axis."""
        place = dict(zip(self.shape, divmod(device, self.tensor), strict=True))
        return tuple(0 if axis is None else place[axis] for axis in axes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoder:
    """The parameters of a decoder of the Llama family, in MaxText's names.

    Attributes:
        layers: How many.
        width: Of the residual stream.
        hidden: Of the feed-forward part.
        heads: Of the queries.
        kv_heads: Of keys and values.
        head_size: Of all heads.
        tokens: Size of the vocabulary.
    """

    layers: int
    width: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    tokens: int

    def parameters(self, *, stacked: bool) -> Iterator[tuple[Path, tuple[int, ...], Axes]]:
        """Yields path, shape and mesh axes of each parameter; layers stacked on axis 1, or one by one."""
        for path, shape, axes in self._layer():
            if stacked:
                here = (*shape[:1], self.layers, *shape[1:]), (*axes[:1], None, *axes[1:])
                yield ("decoder", "layers", *path), *here
            else:
                for number in range(self.layers):
                    yield ("decoder", f"layers_{number}", *path), shape, axes
        yield ("decoder", "decoder_norm", "scale"), (self.width,), ("fsdp",)
        yield ("decoder", "logits_dense", "kernel"), (self.width, self.tokens), ("fsdp", "tensor")
        yield ("token_embedder", "embedding"), (self.tokens, self.width), ("tensor", "fsdp")

    def _layer(self) -> Iterator[tuple[Path, tuple[int, ...], Axes]]:
        for name in ("wi_0", "wi_1"):
            yield ("mlp", name, "kernel"), (self.width, self.hidden), ("fsdp", "tensor")
        yield ("mlp", "wo", "kernel"), (self.hidden, self.width), ("tensor", "fsdp")
        for name in ("post_self_attention_layer_norm", "pre_self_attention_layer_norm"):
            yield (name, "scale"), (self.width,), ("fsdp",)
        for name, heads in (("key", self.kv_heads), ("query", self.heads), ("value", self.kv_heads)):
            shape = (self.width, heads, self.head_size)
            yield ("self_attention", name, "kernel"), shape, ("fsdp", "tensor", None)
        out = (self.heads, self.head_size, self.width)
        yield ("self_attention", "out", "kernel"), out, ("tensor", None, "fsdp")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Array:
    """An array and how it is cut into chunks.

    Attributes:
        path: Its path in MaxText's train state.
        shape: Its shape.
        axes: The mesh axis over which each of its axes is spread.
        dtype: Zarr's name of its dtype.
    """

    path: Path
    shape: tuple[int, ...]
    axes: Axes
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """Its name in the database."""
        return ".".join(map(str, self.path))

    def chunk_shape(self, hosts: Hosts) -> tuple[int, ...]:
        """Returns the shape of what one device writes."""
        return tuple(size // parts for size, parts in zip(self.shape, self._grid(hosts), strict=True))

    def chunks(self, hosts: Hosts) -> Iterator[tuple[tuple[int, ...], int]]:
        """Yields each chunk by its number on each axis, and the host that writes it."""
        grid, parts = self._grid(hosts), hosts.parts(self.axes)
        for device in range(hosts.count * hosts.devices):
            part = hosts.part_of(device, self.axes)
            copy = _copy_of(device, hosts, self.axes)
            if grid == parts:
                chosen = part if copy == 0 else None
            else:
                pairs = zip(part, parts, grid, strict=True)
                chosen = tuple(at if few == many else at * (many // few) + copy for at, few, many in pairs)
            if chosen is not None:
                yield chosen, device // hosts.devices

    def _grid(self, hosts: Hosts) -> tuple[int, ...]:
        """Returns into how many chunks each axis is cut: the holders of copies write a part each."""
        parts = hosts.parts(self.axes)
        copies = hosts.count * hosts.devices // math.prod(parts)
        for at, (size, cut) in enumerate(zip(self.shape, parts, strict=True)):
            if copies > 1 and size // cut % copies == 0:
                return (*parts[:at], cut * copies, *parts[at + 1 :])
        return parts


def _copy_of(device: int, hosts: Hosts, axes: Axes) -> int:
    """Returns which of the copies of its part a device holds."""
    number = 0
    for (axis, length), at in zip(hosts.shape.items(), divmod(device, hosts.tensor), strict=True):
        number = number if axis in axes else number * length + at
    return number


def train_state(model: Decoder, *, stacked: bool) -> list[Array]:
    """Returns MaxText's train state with Adam's moments, all float32."""
    arrays = [Array(path=("step",), shape=(), axes=(), dtype="int32")]
    arrays += [Array(path=("opt_state", 0, "count"), shape=(), axes=(), dtype="int32")]
    for above in (("params", "params"), ("opt_state", 0, "mu", "params"), ("opt_state", 0, "nu", "params")):
        for path, shape, axes in model.parameters(stacked=stacked):
            arrays.append(Array(path=(*above, *path), shape=shape, axes=axes))
    return arrays


_FILE_BYTES = 2 << 30
_NODE_BYTES = 64 << 20
_INLINE_BYTES = 1024
_PACKED = 0.92  # What zstd leaves of random float32 weights.


def write(directory: pathlib.Path, arrays: Sequence[Array], hosts: Hosts) -> pathlib.Path:
    """Writes the skeleton of an item.

    Args:
        directory: The item; a skeleton that is there is taken as it is.
        arrays: What it holds.
        hosts: Who wrote it.
    """
    if (directory / "manifest.ocdbt").exists():
        return directory
    directory.mkdir(parents=True)
    files = _DataFiles()
    values: dict[bytes, bytes | tuple[str, int, int]] = {}
    for array in arrays:
        chunk = array.chunk_shape(hosts)
        values[f"{array.name}/zarr.json".encode()] = _zarr(array, chunk)
        packed = int(math.prod(chunk) * 4 * _PACKED) + 32
        for index, host in array.chunks(hosts):
            key = f"{array.name}/{'/'.join(['c', *map(str, index)])}".encode()
            # No two chunks pack equally well.
            size = packed + google_crc32c.value(key) % (64 + packed // 100)
            values[key] = files.place(host, size) if size > _INLINE_BYTES else bytes(size)
    files.write(directory)
    _write_database(directory, values)
    _write_tree(directory, arrays, hosts)
    return directory


class _DataFiles:
    """Where the chunks of each host lie: one after the other, in files of a bounded size."""

    def __init__(self) -> None:
        self._sizes: dict[int, list[int]] = {}

    def place(self, host: int, size: int) -> tuple[str, int, int]:
        """Returns the place of a further chunk."""
        sizes = self._sizes.setdefault(host, [0])
        if sizes[-1] and sizes[-1] + size > _FILE_BYTES:
            sizes.append(0)
        sizes[-1] += size
        return _name(host, len(sizes) - 1), sizes[-1] - size, size

    def write(self, directory: pathlib.Path) -> None:
        """Makes the files, as holes."""
        for host, sizes in self._sizes.items():
            for number, size in enumerate(sizes):
                file = directory / _name(host, number)
                file.parent.mkdir(parents=True, exist_ok=True)
                with file.open("wb") as opened:
                    opened.truncate(size)
            (directory / f"ocdbt.process_{host}" / "manifest.ocdbt").write_bytes(b"of this host alone")


def _name(host: int, number: int) -> str:
    return f"ocdbt.process_{host}/d/{host:016x}{number:016x}"


def _zarr(array: Array, chunk: tuple[int, ...]) -> bytes:
    inner = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "zstd"}]
    shard = {
        "chunk_shape": chunk,
        "codecs": inner,
        "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
    }
    content = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": array.shape,
        "data_type": array.dtype,
        "fill_value": 0,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "chunk_key_encoding": {"name": "default"},
        "codecs": [{"name": "sharding_indexed", "configuration": shard}],
    }
    return json.dumps(content, separators=(",", ":")).encode()


def _write_tree(directory: pathlib.Path, arrays: Sequence[Array], hosts: Hosts) -> None:
    tree = {
        str(tuple(map(str, array.path))): {
            "key_metadata": [{"key": str(key), "key_type": 1 + isinstance(key, str)} for key in array.path],
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False},
        }
        for array in arrays
    }
    more = {"use_ocdbt": True, "use_zarr3": True, "store_array_data_equal_to_fill_value": True}
    (directory / "commit_success.txt").touch()
    (directory / "_METADATA").write_text(json.dumps({"tree_metadata": tree, **more}))
    names = [
        {"array_metadata": {"param_name": array.name, "chunk_shape": array.chunk_shape(hosts)}}
        for array in arrays
    ]
    (directory / "array_metadatas").mkdir()
    for host in range(hosts.count):
        file = directory / "array_metadatas" / f"process_{host}"
        file.write_text(json.dumps({"array_metadatas": names}))


# The database: https://google.github.io/tensorstore/kvstore/ocdbt/index.html#storage-format


def _write_database(directory: pathlib.Path, values: Mapping[bytes, bytes | tuple[str, int, int]]) -> None:
    """Writes manifest and B-tree: leaves as large as Orbax lets them become, and a root above several."""
    nodes, groups = bytearray(), list(_grouped(values))
    places: dict[bytes, tuple[str, int, int]] = {}
    for group in groups:
        node = _framed(0x0CDB20DE, _leaf({key: values[key] for key in group}))
        places[group[0]] = ("d/nodes", len(nodes), len(node))
        nodes += node
    if len(groups) > 1:
        root = _framed(0x0CDB20DE, _interior(places))
        top = ("d/nodes", len(nodes), len(root))
        nodes += root
    else:
        top = next(iter(places.values()))
    (directory / "d").mkdir()
    (directory / "d" / "nodes").write_bytes(nodes)
    body = bytes(17) + _varint(_INLINE_BYTES) + _varint(_NODE_BYTES) + bytes([4, 0]) + _file_table([top[0]])
    body += _varint(1) + _varint(1) + bytes([len(groups) > 1]) + _references([top], [top[0]])
    (directory / "manifest.ocdbt").write_bytes(_framed(0x0CDB3A2A, body + bytes(8) + _varint(0)))


def _grouped(values: Mapping[bytes, bytes | tuple[str, int, int]]) -> Iterator[list[bytes]]:
    group, size = list[bytes](), 0
    for key in sorted(values):
        value = values[key]
        more = len(key) + (len(value) if isinstance(value, bytes) else 20)
        if group and size + more > _NODE_BYTES:
            yield group
            group, size = [], 0
        group.append(key)
        size += more
    yield group


def _leaf(values: Mapping[bytes, bytes | tuple[str, int, int]]) -> bytes:
    places = list(values.values())
    outside = [place for place in places if isinstance(place, tuple)]
    files = sorted({place[0] for place in outside})
    number = {file: at for at, file in enumerate(files)}
    body = bytes([0]) + (_file_table(files) if files else bytes([0])) + _varint(len(values))
    body += _strings(list(values))
    body += _column(place[2] if isinstance(place, tuple) else len(place) for place in places)
    body += bytes(isinstance(place, tuple) for place in places)
    body += _column(number[place[0]] for place in outside) + _column(place[1] for place in outside)
    return body + b"".join(place for place in places if isinstance(place, bytes))


def _interior(children: Mapping[bytes, tuple[str, int, int]]) -> bytes:
    places = list(children.values())
    files = sorted({place[0] for place in places})
    names = _strings(list(children), also=_column([0] * len(children)))
    return bytes([1]) + _file_table(files) + _varint(len(children)) + names + _references(places, files)


def _file_table(files: Sequence[str]) -> bytes:
    return _varint(len(files)) + _strings([file.encode() for file in files], also=bytes(len(files)))


def _references(places: Sequence[tuple[str, int, int]], files: Sequence[str]) -> bytes:
    numbers = _column(files.index(place[0]) for place in places)
    where = _column(place[1] for place in places) + _column(place[2] for place in places)
    return numbers + where + _column([1] * 3 * len(places))


def _strings(names: Sequence[bytes], also: bytes = b"") -> bytes:
    """Returns names without what each shares with the one before."""
    shared = [0, *(_shared(first, second) for first, second in itertools.pairwise(names))]
    own = [name[length:] for name, length in zip(names, shared, strict=True)]
    return _column(shared[1:]) + _column(map(len, own)) + also + b"".join(own)


def _shared(first: bytes, second: bytes) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((at for at, (left, right) in pairs if left != right), min(len(first), len(second)))


def _framed(magic: int, body: bytes) -> bytes:
    inner = _varint(0) + _varint(1) + zstandard.compress(body)
    whole = struct.pack(">I", magic) + struct.pack("<Q", 12 + len(inner) + 4) + inner
    return whole + struct.pack("<I", google_crc32c.value(whole))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))


def _column(values: Iterator[int] | Sequence[int]) -> bytes:
    return b"".join(map(_varint, values))
