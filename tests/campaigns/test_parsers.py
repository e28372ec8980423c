"""Parsers of small files, fuzzed: what is parsed, or the one error that the parser declares."""

import contextlib
import io
import json
import shutil
import struct
import zipfile

import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orbax_nnx_handler import NotACheckpointError
from orbax_nnx_handler.storage.checkpoint import FieldError
from orbax_nnx_handler.storage.checkpoint.checkpoint import parse_encoding
from orbax_nnx_handler.storage.checkpoint.metadata import read_metadata
from orbax_nnx_handler.storage.checkpoint.stored_random import read_leftovers
from orbax_nnx_handler.storage.stores.ocdbt import (
    DamagedDatabaseError,
    Extent,
    NodeReference,
    decode_manifest,
    decode_node,
)
from tests.sampled import drawn
from tests.storage.checkpoint import hugging_face
from tests.storage.checkpoints import DiskFormat, save
from tests.storage.stores import ocdbt_writer as made

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("<f4"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)
ZARR2 = {"shape": [6, 4], "chunks": [6, 4], "dtype": "<f4", "order": "C", "filters": None, "compressor": None}
ZARR3 = {
    "node_type": "array",
    "shape": [6, 4],
    "data_type": "float32",
    "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [6, 4]}},
    "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
}
FILES = ["_METADATA", "checkpoint", "a.npz", "manifest.ocdbt"]
FUZZED = settings(max_examples=drawn(30, 150), deadline=None, suppress_health_check=list(HealthCheck))


def places(value, path=()):
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from places(part, (*path, key))


def changed(value, path, new):
    if not path:
        return new
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[path[0]] = changed(copied[path[0]], path[1:], new)
    return copied


@pytest.mark.parametrize(("driver", "fields"), [("zarr", ZARR2), ("zarr3", ZARR3)])
@FUZZED
@given(data=st.data())
def test_array_metadata_with_any_value_in_any_field(driver, fields, data):
    for _ in range(data.draw(st.integers(1, 3))):
        fields = changed(fields, data.draw(st.sampled_from(list(places(fields)))), data.draw(VALUES))
    try:
        encoding = parse_encoding(driver, json.dumps(fields).encode())
    except FieldError:
        return
    assert all(length >= 0 for length in encoding.shape)
    assert all(length > 0 for length in encoding.chunk_shape)
    assert ".." not in encoding.chunk_key((0,) * len(encoding.shape))


@FUZZED
@given(content=st.binary(max_size=200), driver=st.sampled_from(["zarr", "zarr3"]))
def test_array_metadata_of_any_bytes(content, driver):
    with pytest.raises(FieldError):
        parse_encoding(driver, content)


@FUZZED
@given(entries=VALUES)
def test_random_state_of_any_form(entries):
    with contextlib.suppress(FieldError):
        read_leftovers({"nnx_aux": [entries]})


@pytest.mark.parametrize("packed", [False, True])
@FUZZED
@given(body=st.binary(max_size=120) | st.lists(st.integers(0, 9), max_size=60).map(bytes))
def test_database_files_of_any_body_under_a_right_checksum(packed, body):
    for height in (0, 1):
        content = made.framed(made.NODE, bytes([height]) + body, packed=packed)
        try:
            node = decode_node(
                content, NodeReference(extent=Extent("d/n", 0, len(content)), base="", height=height)
            )
        except DamagedDatabaseError:
            continue
        files = [value.file for value in node.values if isinstance(value, Extent)]
        files += [child.extent.file for child in node.children]
        assert not [file for file in files if ".." in file.split("/") or file.startswith("/")]
    with contextlib.suppress(DamagedDatabaseError):
        decode_manifest(made.framed(made.MANIFEST, bytes(16) + body, packed=packed), "manifest.ocdbt")


@FUZZED
@given(content=st.binary(max_size=300))
def test_database_files_of_any_bytes(content):
    with pytest.raises(DamagedDatabaseError):
        decode_manifest(content, "manifest.ocdbt")


@settings(max_examples=drawn(20, 60), deadline=None, suppress_health_check=list(HealthCheck))
@given(
    content=st.binary(max_size=200),
    name=st.sampled_from(["_METADATA", "checkpoint", "a.npz", "manifest.ocdbt"]),
)
def test_a_directory_with_one_file_of_any_bytes(tmp_path_factory, content, name):
    folder = tmp_path_factory.mktemp("any")
    (folder / name).write_bytes(content)
    with contextlib.suppress(NotACheckpointError):
        read_metadata(folder / name if name.endswith("npz") else folder)


W = np.arange(24, dtype=np.float32).reshape(6, 4)
IN_FILES = settings(max_examples=drawn(25, 80), deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint of each kind that has JSON files, and where to damage a copy."""
    folder = tmp_path_factory.mktemp("whole")
    save(folder / "orbax", {"w": jnp.asarray(W), "b": [W, {"c": W}]}, DiskFormat(False, True, True))
    hugging_face.safetensors(folder / "weights", {"w": W})
    hugging_face.safetensors_in_parts(folder / "parts", {"w": W, "v": W})
    hugging_face.msgpack_in_parts(folder / "packed", {"w": W, "v": W})
    return folder


def with_fields(whole, kind, name, data):
    """Returns a copy of a checkpoint with any value in up to three fields of one file."""
    made_at = shutil.copytree(whole / kind, whole / "copy", dirs_exist_ok=True)
    (file,) = made_at.glob(name)
    fields = json.loads(file.read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        fields = changed(fields, data.draw(st.sampled_from(list(places(fields)))), data.draw(VALUES))
    file.write_text(json.dumps(fields))
    return made_at


def is_sound(checkpoint):
    """Tells that whatever was read has shapes that an array can have."""
    return all(length >= 0 for leaf in checkpoint.leaves.values() for length in leaf.shape or ())


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("orbax", "_METADATA"),
        ("orbax", "w/zarr.json"),
        ("parts", "model.safetensors.index.json"),
        ("packed", "flax_model.msgpack.index.json"),
    ],
)
@IN_FILES
@given(data=st.data())
def test_a_json_file_with_any_value_in_any_field(whole, kind, name, data):
    with contextlib.suppress(NotACheckpointError):
        assert is_sound(read_metadata(with_fields(whole, kind, name, data)))
    shutil.rmtree(whole / "copy")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("orbax", "_CHECKPOINT_METADATA"),
        ("orbax", "array_metadatas/process_0"),
        ("weights", "config.json"),
    ],
)
@IN_FILES
@given(data=st.data())
def test_a_json_file_on_which_nothing_depends_never_ends_it(whole, kind, name, data):
    found = read_metadata(with_fields(whole, kind, name, data))
    shutil.rmtree(whole / "copy")

    assert len(found.leaves) == len(read_metadata(whole / kind).leaves)


@IN_FILES
@given(
    name=st.text(max_size=6),
    entry=VALUES
    | st.fixed_dictionaries(
        {},
        optional={
            "dtype": VALUES | st.sampled_from(["F32", "I8", "BF16", "F8_E4M3"]),
            "shape": VALUES | st.lists(st.integers(-1, 9), max_size=3),
            "data_offsets": VALUES | st.lists(st.integers(-1, 100), min_size=2, max_size=2),
        },
    ),
    length=st.none() | st.integers(0, (1 << 64) - 1) | st.integers(0, 90),
)
def test_headers_of_safetensors_of_any_form(tmp_path_factory, name, entry, length):
    file = tmp_path_factory.mktemp("any") / "model.safetensors"
    header = json.dumps({name: entry}).encode()
    file.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + W.tobytes())
    with contextlib.suppress(NotACheckpointError):
        assert is_sound(read_metadata(file))


@IN_FILES
@given(
    content=st.binary(max_size=80) | st.binary(max_size=80).map(lambda rest: b"\x02\0\0\0\0\0\0\0{}" + rest)
)
def test_files_of_safetensors_of_any_bytes(tmp_path_factory, content):
    file = tmp_path_factory.mktemp("any") / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(NotACheckpointError):
        read_metadata(file)


PACKED = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8)
    | st.builds(msgpack.ExtType, st.integers(0, 4), st.binary(max_size=30))
    | st.builds(
        lambda *fields: msgpack.ExtType(1, msgpack.packb(fields)),
        st.lists(st.integers(-2, 9), max_size=3) | st.none() | st.integers(0, 9),
        st.sampled_from(["float32", "int8", "O", "V4", "U2", "M8[ns]", "f4,f4", "bfloat16", "", "key<fry>"]),
        st.binary(max_size=40) | st.none() | st.text(max_size=4),
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(max_size=4)
            | st.sampled_from(["__msgpack_chunked_array__", "shape", "chunks", "kvstore"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=6,
)


@IN_FILES
@given(tree=PACKED, cut=st.integers(0, 3))
def test_msgpack_files_of_any_tree(tmp_path_factory, tree, cut):
    file = tmp_path_factory.mktemp("any") / "checkpoint_3"
    content = msgpack.packb(tree)
    file.write_bytes(content[: len(content) - cut])
    with contextlib.suppress(NotACheckpointError):
        assert is_sound(read_metadata(file))


NPY_FIELDS = {"descr": "<f4", "fortran_order": False, "shape": (6, 4)}
LITERALS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=8)
    | st.sampled_from(["<f4", "|O", ">i8", "V2", "(3,)f4", "f4,f4", "<U3", "M8[s]", "<f3", "", "|S9"])
    | st.tuples(st.integers(-2, 1 << 62), st.integers(-2, 9))
    | st.lists(st.tuples(st.text(max_size=2), st.just("<f4")), max_size=2)
)


@IN_FILES
@given(
    fields=st.dictionaries(st.sampled_from([*NPY_FIELDS, "x"]), LITERALS, max_size=4),
    text=st.none() | st.text(max_size=40),
    version=st.sampled_from([(1, "<H"), (2, "<I"), (3, "<I"), (9, "<H")]),
    size=st.integers(0, 130),
)
def test_npy_headers_of_any_form(tmp_path_factory, fields, text, version, size):
    file = tmp_path_factory.mktemp("any") / "a.npz"
    header = (repr(NPY_FIELDS | fields) if text is None else text).encode() + b"\n"
    magic = b"\x93NUMPY" + bytes([version[0], 0]) + struct.pack(version[1], len(header))
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("w.npy", magic + header + bytes(size))
    with contextlib.suppress(NotACheckpointError):
        assert is_sound(read_metadata(file))


@IN_FILES
@given(at=st.integers(0, 10_000), bits=st.integers(1, 255), cut=st.integers(0, 40))
def test_archives_with_any_byte_changed(tmp_path_factory, at, bits, cut):
    file = tmp_path_factory.mktemp("any") / "a.npz"
    written = io.BytesIO()
    np.savez(written, **{"w": W, "a/b": W})
    content = bytearray(written.getvalue())
    content[at % len(content)] ^= bits
    file.write_bytes(content[: len(content) - cut])
    with contextlib.suppress(NotACheckpointError):
        assert is_sound(read_metadata(file))
