"""Weights, archives, arrays and links made by hand to do harm, beside what `hostile` derives from files.

Every case is a function that writes one checkpoint into a folder and returns its path.
"""

import gzip
import io
import json
import os
import pathlib
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import msgpack
import numpy as np
import zstandard

from tests.storage.checkpoint import hugging_face
from tests.storage.checkpoints import DiskFormat, save
from tests.storage.stores import ocdbt_writer as made

Make = Callable[[pathlib.Path], pathlib.Path]
Case = tuple[str, Make]

W = np.arange(24, dtype=np.float32).reshape(6, 4)
NAMES = [
    *("\ud800", "a\0b", "\x1b[2J", "a\n# b", "a\u202eb", "", "...", "/", "../../secret", "a" * 70_000),
    *(
        "." * 60_000,
        ".".join("a" * 3000),
        "9" * 5000,
        "0.0",
        "-rf",
        "C:\\x",
        "%s{0}",
        "\x07",
        "\ufeff",
        "a=b",
    ),
    *("layers_" + "9" * 4400, "a\"b'c\\", "a\rb", "~", "model.safetensors.index.json"),
]
HOLE = 6 << 30
OUT = ["/etc/passwd", "../../../secret", "/dev/zero", "/proc/self/mem", "/", "..", "."]


def entry(begin: Any = 0, end: Any = 96, dtype: Any = "F32", shape: Any = (6, 4)) -> dict[str, Any]:
    """Returns what a header of safetensors says of one array."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def file(name: str, content: bytes, *, under: str = "item/") -> Make:
    """Returns what writes one file; the checkpoint is its folder, or itself where there is none."""

    def make(folder: pathlib.Path) -> pathlib.Path:
        path = folder / f"{under}{name}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return path.parent if under else path

    return make


def tensors(header: Any, *, raw: bytes | None = None, length: int | None = None) -> Make:
    """Returns what writes `model.safetensors` with one array's bytes."""
    text = json.dumps(header).encode() if raw is None else raw
    size = len(text) if length is None else length
    return file("model.safetensors", struct.pack("<Q", size) + text + W.tobytes())


def orbax(folder: pathlib.Path) -> pathlib.Path:
    """Writes a good checkpoint of one array, a file for each chunk."""
    return save(folder / "item", {"w": W}, DiskFormat(False, True, True))


def database(folder: pathlib.Path) -> pathlib.Path:
    """Writes a good checkpoint of one array, in a database."""
    return save(folder / "item", {"w": W}, DiskFormat(True, True, True))


def weights(folder: pathlib.Path) -> pathlib.Path:
    """Writes good weights of one array."""
    return hugging_face.safetensors(folder / "item", {"w": W})


def npz(*members: tuple[str, Any], change: Callable[[bytes], bytes] = bytes) -> Make:
    """Returns what writes an archive; its bytes may be changed afterwards."""

    def make(folder: pathlib.Path) -> pathlib.Path:
        with zipfile.ZipFile(folder / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, value in members:
                member = io.BytesIO()
                if isinstance(value, bytes):
                    member.write(value)
                else:
                    np.save(member, value, allow_pickle=True)
                archive.writestr(name, member.getvalue())
        (folder / "a.npz").write_bytes(change((folder / "a.npz").read_bytes()))
        return folder / "a.npz"

    return make


def _npy(header: str, *, size: int | None = None) -> bytes:
    text = header.encode().ljust(100)
    return b"\x93NUMPY\x02\0" + struct.pack("<I", len(text) if size is None else size) + text


def _named_in_tree(name: str) -> Make:
    def make(folder: pathlib.Path) -> pathlib.Path:
        path = orbax(folder)
        fields = json.loads((path / "_METADATA").read_text())
        (leaf,) = fields["tree_metadata"].values()
        leaf["key_metadata"][0]["key"] = name
        (path / "_METADATA").write_text(json.dumps(fields))
        return path

    return make


def _of_names() -> Iterator[Case]:
    for number, name in enumerate(NAMES):
        text = name.encode(errors="surrogatepass")
        packed = msgpack.packb(text, use_bin_type=False)
        index = json.dumps({"weight_map": {"w": name}}).encode()
        yield f"name {number} in safetensors", tensors({name: entry()})
        yield f"name {number} in an index", file("model.safetensors.index.json", index)
        yield f"name {number} in msgpack", file("flax_model.msgpack", b"\x81" + packed + msgpack.packb(1.0))
        yield f"name {number} in a tree", _named_in_tree(name)
        if name.isprintable() and len(name) < 60_000:
            yield f"name {number} in an archive", npz((f"{name}.npy", W))


def _of_headers() -> Iterator[Case]:
    offsets = [
        *((0, 1 << 62), (1 << 62, 1 << 63), (-1, 95), (96, 0), (0, 95), (0, 97), (1, 97)),
        *((0.0, 96.0), (True, 97), ("0", "96"), (None, None), (0, 10**30)),
    ]
    shapes = [[1 << 62, 4], [1 << 31] * 2, [0, 1 << 62], [-6, -4], [6.0, 4], ["6", 4], [1] * 65, [10**30], []]
    dtypes = ["F4", "O", "|O", "V4", "f4,(1000000000,)f4", "", None, [], "F8_E8M0", "\x1b[2J"]
    for begin, end in offsets:
        yield f"offsets {begin} {end}", tensors({"w": entry(begin, end)})
    for shape in shapes:
        yield f"shape {str(shape)[:20]}", tensors({"w": entry(shape=shape)})
    yield "a shape without elements", tensors({"w": entry(0, 0, shape=[0, 1 << 62])})
    for dtype in dtypes:
        yield f"dtype {dtype!r}", tensors({"w": entry(dtype=dtype)})
    for length in (1 << 63, (1 << 64) - 1, 100_000_001, 0, 1, 7):
        yield f"header of {length} bytes", tensors({"w": entry()}, length=length)
    part = entry(48, 96, shape=(3, 4))
    headers = {
        "arrays that overlap": {"w": entry(), "v": part},
        "an array within another": {"w": entry(), "v": entry(4, 8, shape=(1,))},
        "an array and a subtree": {"w": entry(0, 48, shape=(3, 4)), "w.a": part},
        "metadata of megabytes": {"__metadata__": {"a": "b" * 5_000_000}, "w": entry()},
        "metadata of another type": {"__metadata__": [1, {"x": "\x1b[2J"}], "w": entry()},
    }
    for name, header in headers.items():
        yield f"header: {name}", tensors(header)
    raws = {
        "a name twice": b'{"w":1,"w":2}',
        "deep objects": b'{"a":' * 1_000_000,
        "deep lists": b'{"a":' + b"[" * 1_000_000,
        "a number of a million digits": b'{"w":{"dtype":"F32","shape":[' + b"9" * 1_000_000 + b"]}}",
        "no numbers": b'{"w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,1e999]}}',
        "UTF-16": json.dumps({"w": entry()}).encode("utf-16"),
        "no UTF-8": b'{"\xff\xfe":1}',
    }
    for name, raw in raws.items():
        yield f"header: {name}", tensors(None, raw=raw)


def _of_indices() -> Iterator[Case]:
    maps: dict[str, Any] = {
        "up": {"w": "../s.safetensors"},
        "absolute": {"w": "/etc/passwd"},
        "none": {},
        "a list": [],
        "a number": {"w": 7},
        "100,000 files": {f"w{number}": f"s{number}.safetensors" for number in range(100_000)},
        "an address": {"w": "http://x/s.safetensors"},
        "another kind": {"w": "s.py"},
        "a name of 10 MB": {"w": "s" * 10_000_000},
    }
    for name, where in maps.items():
        index = json.dumps({"weight_map": where}).encode()
        yield f"index: {name}", file("model.safetensors.index.json", index)
    yield "index: deep", file("model.safetensors.index.json", b'{"weight_map":' * 1_000_000)
    yield "tree: deep", file("_METADATA", b'{"tree_metadata":' * 1_000_000)
    yield "tree: deep lists", file("_METADATA", b'{"tree_metadata":' + b"[" * 1_000_000)


def _array(shape: Any, dtype: Any, content: Any) -> msgpack.ExtType:
    return msgpack.ExtType(1, msgpack.packb([shape, dtype, content]))


def _of_msgpack() -> Iterator[Case]:
    trees: dict[str, Any] = {
        "600,000 values": [None] * 600_000,
        "a type of gigabytes": {"w": _array([1], "f4,(1000000000,)f4", b"xxxx")},
        "raw bytes": {"w": _array([1], "V1000000", bytes(1_000_000))},
        "text": {"w": _array([6], "U4", bytes(96))},
        "times": {"w": _array([6, 2], "M8[ns]", bytes(96))},
        "a negative shape": {"w": _array([-1, 4], "float32", W.tobytes())},
        "a shape of nothing": {"w": _array([0, 1 << 62], "float32", b"")},
        "65 axes": {"w": _array([1] * 65, "float32", b"abcd")},
        "no shape": {"w": _array(None, "float32", b"abcd")},
        "a type within": {"w": _array([1], "float32", msgpack.ExtType(1, b"x"))},
        "an unknown type": {"w": msgpack.ExtType(77, b"x")},
        "a time": {"w": msgpack.Timestamp(1, 1)},
        "bytes": {"w": b"ab", "v": _array([6, 4], "float32", W.tobytes())},
        "text of bytes": {"w": _array([2], "S4", b"abcdefgh")},
        "fields": {"w": _array([2], "f4,f4", bytes(16))},
        "128 bits": {"w": _array([6], "float128", W.tobytes())},
        "complex numbers of 256 bits": {"w": _array([3], "complex256", W.tobytes())},
        "a type of 90 digits": {"w": _array([1], "V" + "9" * 90, b"x")},
        "a key that is a time": {msgpack.Timestamp(1, 1): 1},
        "keys that are numbers": {float("nan"): 1, 1.5: 2, 1 << 63: 3, "1.5": 4},
        "a damaged number": {"w": msgpack.ExtType(3, b"\xc1")},
        "no complex number": {"w": msgpack.ExtType(2, msgpack.packb(["x", "y"]))},
        "chunks of 10^18": {
            "w": {
                "__msgpack_chunked_array__": True,
                "shape": {"0": 10**9, "1": 10**9},
                "chunks": {"0": _array([1], "float32", b"abcd")},
            }
        },
        "chunks that are absent": {"w": {"__msgpack_chunked_array__": True}},
        "chunks with a gap": {
            "w": {
                "__msgpack_chunked_array__": True,
                "shape": {"0": 6, "1": 4},
                "chunks": {number: _array([12], "float32", W.tobytes()[:48]) for number in "02"},
            }
        },
        "chunks in a list": {"w": {"__msgpack_chunked_array__": True, "shape": [1], "chunks": [1.0]}},
        "booleans of other bits": {"w": _array([24], "bool", b"\7" * 24)},
        "an array elsewhere": {"w": "PLACEHOLDER:///etc/passwd"},
        "an array with a zero byte": {"w": "PLACEHOLDER://a\0b"},
        "an array that is the folder": {"w": "PLACEHOLDER://."},
        "parts elsewhere": {"w": "//GDAPlaceholder:../../../secret"},
        "a store of a number": {"w": {"driver": "zarr", "kvstore": {"path": 7}}},
    }
    contents = {name: msgpack.packb(tree) for name, tree in trees.items()} | {
        "a key that is a list": b"\x81\x90\x01",
        "a key twice": b"\x82\xa1w\x01\xa1w\x02",
        "no UTF-8": b"\x81\xa2\xff\xfe\x01",
        "something behind": msgpack.packb({"w": 1}) + b"junk",
        "500 levels": b"\x81\xa1a" * 500 + b"\x01",
        "1,000 levels": b"\x81\xa1a" * 1000 + b"\x01",
    }
    for name, content in contents.items():
        for place in ("checkpoint", "flax_model.msgpack"):
            yield f"{place}: {name}", file(place, content)
        yield f"checkpoint_3: {name}", file("checkpoint_3", content, under="")


def _of_archives() -> Iterator[Case]:
    values = {
        "objects": np.array([{"a": 1}], dtype=object),
        "records": np.zeros(3, [("a", "f4")]),
        "times": np.zeros(3, "M8[ns]"),
        "128 bits": np.zeros(3, np.longdouble),
        "complex numbers of 256 bits": np.zeros(3, np.clongdouble),
        "70 axes": _npy("{'descr':'<f4','fortran_order':False,'shape':(" + "1," * 70 + ")}") + b"abcd",
        "a header of 60 MB": _npy(" " * 60_000_000),
        "a header longer than the member": _npy("{", size=0xFFFFFFF),
        "a header of signs": _npy("-" * 60_000),
        "a power": _npy("{'descr':'<f4','fortran_order':False,'shape':(9**9**9,)}"),
        "a type of gigabytes": _npy("{'descr':'(1000000000,)f4','fortran_order':False,'shape':(3,)}"),
        "raw gigabytes": _npy("{'descr':'V2000000000','fortran_order':False,'shape':()}"),
    }
    for name, value in values.items():
        yield f"archive: {name}", npz(("w.npy", value))
    yield "archive: a member twice", npz(("w.npy", W), ("w.npy", W + 1))
    yield "archive: a member and its bare name", npz(("w.npy", W), ("w", W))
    changes: dict[str, Callable[[bytes], bytes]] = {
        "a size of 4 GB": lambda b: b.replace(struct.pack("<I", 224), struct.pack("<I", 0xFFFFFFF0)),
        "a place behind the end": lambda b: b[:-6] + struct.pack("<I", 0xFFFFFFFE) + b[-2:],
        "65,535 members": lambda b: b[:-14] + b"\xff\xff\xff\xff" + b[-10:],
        "another packing": lambda b: b.replace(b"\x08\0", b"\x0e\0"),
        "one run of bytes for 2000 members": _overlapping,
    }
    for name, change in changes.items():
        yield f"archive: {name}", npz(("w.npy", W), change=change)
    header = "{'descr': '<f4', 'fortran_order': False, 'shape': (6, 4)}".ljust(200_000_000)
    yield "archive: a header of 200 MB", npz(("w.npy", _npy(header) + W.tobytes()))


def _overlapping(content: bytes) -> bytes:
    listed, end = content.rindex(b"PK\1\2"), content.rindex(b"PK\5\6")
    one = content[listed:end]
    many = one + b"".join(one[:46] + b"%05d" % number + one[51:] for number in range(1999))
    tail = struct.pack("<HHHHIIH", 0, 0, 2000, 2000, len(many), listed, 0)
    return content[:listed] + many + b"PK\5\6" + tail


def _instead(good: Make, name: str, put: Callable[[pathlib.Path], object]) -> Make:
    def make(folder: pathlib.Path) -> pathlib.Path:
        path = good(folder)
        place = path / name
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)
        place.parent.mkdir(parents=True, exist_ok=True)
        put(place)
        return path

    return make


def _hole(place: pathlib.Path) -> None:
    with place.open("wb") as opened:
        opened.truncate(HOLE)


def _of_places() -> Iterator[Case]:
    """Links that lead out, pipes and holes in the place of each file and folder."""
    goods = {
        orbax: ("_METADATA", "_CHECKPOINT_METADATA", "array_metadatas", "w", "w/zarr.json", "w/c", "w/c/0/0"),
        database: ("manifest.ocdbt", "d", "ocdbt.process_0", "ocdbt.process_0/d", "_METADATA"),
        weights: ("model.safetensors", "config.json", "flax_model.msgpack", "model.safetensors.index.json"),
    }
    for good, names in goods.items():
        for name in names:
            for to in OUT:
                yield f"link {name} to {to}", _instead(good, name, lambda at, to=to: at.symlink_to(to))
            yield f"pipe {name}", _instead(good, name, os.mkfifo)
            yield f"hole {name}", _instead(good, name, _hole)
    yield "a name that means a link", _misread


def _misread(folder: pathlib.Path) -> pathlib.Path:
    """Writes an array under a name that TensorStore takes for a path through a link that leads out."""
    path = _tree(_leaf_at(("x\\y", 2)), at="x\\y")(folder)
    array = path / "x\\y" / "zarr.json"
    codecs = [
        {"name": "bytes", "configuration": {"endian": "little"}},
        {"name": "gzip", "configuration": {"level": 1}},
    ]
    array.write_text(json.dumps(json.loads(array.read_text()) | {"codecs": codecs}))
    for chunk in (path / "x\\y" / "c").rglob("0/0"):
        chunk.write_bytes(gzip.compress(W.tobytes()))
    shutil.copytree(path / "x\\y", folder / "outside" / "y")
    # Whoever opens this one waits for ever.
    for chunk in (folder / "outside" / "y" / "c").rglob("0/0"):
        chunk.unlink()
        os.mkfifo(chunk)
    (path / "x").symlink_to(folder / "outside")
    return path


def _array_of(
    codecs: Any, chunk: Any = (6, 4), content: Callable[[], bytes] | None = None, **more: Any
) -> Make:
    def make(folder: pathlib.Path) -> pathlib.Path:
        path = orbax(folder)
        array = path / "w" / "zarr.json"
        grid = {"name": "regular", "configuration": {"chunk_shape": list(chunk)}}
        array.write_text(
            json.dumps(json.loads(array.read_text()) | {"codecs": codecs, "chunk_grid": grid, **more})
        )
        if content is not None:
            next((path / "w" / "c").rglob("0/0")).write_bytes(content())
        return path

    return make


def _of_codecs() -> Iterator[Case]:
    plain = {"name": "bytes", "configuration": {"endian": "little"}}
    packed = {"name": "gzip", "configuration": {"level": 1}}
    zstd = {"name": "zstd", "configuration": {"level": 1}}
    large = (1 << 14, 1 << 14)

    def turned(order: Any) -> dict[str, Any]:
        return {"name": "transpose", "configuration": {"order": order}}

    def sharded(inner: Any, chunk: Any = (6, 4)) -> dict[str, Any]:
        index = [plain, {"name": "crc32c"}]
        return {
            "name": "sharding_indexed",
            "configuration": {"chunk_shape": chunk, "codecs": inner, "index_codecs": index},
        }

    def nested(depth: int) -> Any:
        return [plain] if not depth else [sharded(nested(depth - 1))]

    def zeros() -> bytes:
        return bytes(1 << 30)

    of: dict[str, Make] = {
        "a gzip bomb": _array_of([plain, packed], large, lambda: gzip.compress(zeros(), 1)),
        "a zstd bomb": _array_of([plain, zstd], large, lambda: zstandard.compress(zeros())),
        "a gzip bomb in a small chunk": _array_of([plain, packed], (6, 4), lambda: gzip.compress(zeros(), 1)),
        "a zstd bomb in a small chunk": _array_of([plain, zstd], (6, 4), lambda: zstandard.compress(zeros())),
        "a large chunk of few bytes": _array_of([plain], large, lambda: bytes(100)),
        "none": _array_of([]),
        "bytes twice": _array_of([plain, plain]),
        "an unknown one": _array_of([plain, {"name": "evil", "configuration": {"path": "/etc/passwd"}}]),
        "pickles": _array_of([plain, {"name": "numcodecs.pickle"}]),
        "an axis twice": _array_of([turned([0, 0]), plain]),
        "a thousand axes": _array_of([turned([*range(1000)]), plain]),
        "negative axes": _array_of([turned([-1, 5]), plain]),
        "shards of shards": _array_of(nested(5)),
        "shards on 200 levels": _array_of(nested(200)),
        "shards of nothing": _array_of([sharded([plain], (0, 4))]),
        "an index of gigabytes": _array_of(
            [sharded([plain], (1, 1))], (1 << 15, 1 << 15), lambda: bytes(100)
        ),
        "gzip a hundred times": _array_of([plain, *[packed] * 100]),
        "a level of 30 digits": _array_of([plain, {"name": "gzip", "configuration": {"level": 10**30}}]),
        "another order of bytes": _array_of([{"name": "bytes", "configuration": {"endian": "pdp"}}]),
        "transformers": _array_of([plain], storage_transformers=[{"name": "evil"}]),
        "a long fill value": _array_of([plain], fill_value="0x" + "f" * 100_000),
        "keys that lead out": _array_of(
            [plain], chunk_key_encoding={"name": "v2", "configuration": {"separator": "/../"}}
        ),
        "names of axes": _array_of([plain], dimension_names=["\x1b[2J", "\ud800"]),
    }
    for name, make in of.items():
        yield f"codecs: {name}", make


def _of_keys() -> Iterator[Case]:
    keys = [
        "a\0/zarr.json",
        "\x1b[2J/zarr.json",
        "../../secret/zarr.json",
        "/etc/zarr.json",
        "",
        "//zarr.json",
    ]
    for number, key in enumerate([*keys, "a" * 60_000 + "/zarr.json", "." * 60_000 + "/zarr.json"]):
        nodes = [made.leaf({key: b"{}"})]
        yield f"database: key {number}", lambda folder, nodes=nodes: made.write(folder / "item", nodes)
    twice = made.framed(made.NODE, bytes([0, 0, 2]) + made.keys("aa") + b"aa" + bytes([1, 1, 0, 0]) + b"xy")
    yield "database: a key twice", lambda folder: made.write(folder / "item", [twice])
    deep = [made.leaf({"w/zarr.json": b"[" * 1_000_000})]
    yield "database: deep", lambda folder: made.write(folder / "item", deep)


def _tree(change: Callable[[dict[str, Any]], object], *, at: str = "") -> Make:
    """Returns what writes a tree that is changed; with `at`, its one array lies under that name."""

    def make(folder: pathlib.Path) -> pathlib.Path:
        path = orbax(folder)
        fields = json.loads((path / "_METADATA").read_text())
        change(fields)
        (path / "_METADATA").write_text(json.dumps(fields))
        if at:
            (path / "w").rename(path / at)
        return path

    return make


def _leaf_at(*keys: tuple[Any, int]) -> Callable[[dict[str, Any]], object]:
    def change(fields: dict[str, Any]) -> None:
        (leaf,) = fields["tree_metadata"].values()
        leaf["key_metadata"] = [{"key": key, "key_type": kind} for key, kind in keys]

    return change


def _of_trees() -> Iterator[Case]:
    dict_key, index = 2, 1
    far = "999999999"
    yield "tree: a list of a billion", _tree(_leaf_at((far, index)), at=far)
    optimizer = [("opt_state", dict_key), ("99999999", index), ("mu", dict_key), ("w", dict_key)]
    yield "tree: an optimizer of 10^8 states", _tree(_leaf_at(*optimizer), at="opt_state.99999999.mu.w")
    yield "msgpack: a list of a billion", file("checkpoint", msgpack.packb({10**9: 1.0}))
    yield "msgpack: places below nothing", file("checkpoint", msgpack.packb({"a": {-1: 1.0, 0: 2.0}}))
    names = {
        "thousands of numbers": "a" + "_1" * 30_000,
        "numbers alone": "_".join(["7"] * 20_000),
        "a tuple of signs": "(" + "-" * 5000 + "1,)",
        "a tuple of signs, short": "(" + "-" * 990 + "1,)",
        "a tuple of tuples": "(" * 300 + "1," + ")" * 300,
        "a long tuple": "(" + "'a'," * 20_000 + ")",
        "a tuple of a power": "(9**9**9,)",
    }
    for name, key in names.items():
        yield f"tree: {name}", _tree(_leaf_at((key, dict_key)))
    more = {
        "a text of 5 MB": {"a": "x" * 5_000_000},
        "900 levels": json.loads('{"a":' * 900 + "1" + "}" * 900),
        "100,000 keys": {f"k{number}": number for number in range(100_000)},
        "signs": {"\x1b[2J": {"\x07": ["\u202e"]}},
    }
    for name, custom in more.items():
        yield f"metadata: {name}", _tree(lambda fields, custom=custom: fields.update(custom_metadata=custom))


def cases() -> list[Case]:
    """Returns all cases."""
    of = (
        _of_trees,
        _of_names,
        _of_headers,
        _of_indices,
        _of_msgpack,
        _of_archives,
        _of_places,
        _of_codecs,
        _of_keys,
    )
    return [case for each in of for case in each()]
