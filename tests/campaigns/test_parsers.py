"""Parsers of small files, fuzzed: what is parsed, or the one error that the parser declares."""

import contextlib
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orbax_nnx_handler import NotACheckpointError
from orbax_nnx_handler.storage.checkpoint.checkpoint import parse_encoding
from orbax_nnx_handler.storage.checkpoint.fields import FieldError
from orbax_nnx_handler.storage.checkpoint.metadata import read_metadata
from orbax_nnx_handler.storage.checkpoint.random_state import read_leftovers
from orbax_nnx_handler.storage.stores.ocdbt import (
    DamagedDatabaseError,
    Extent,
    NodeReference,
    decode_manifest,
    decode_node,
)
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
FUZZED = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


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


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    content=st.binary(max_size=200),
    name=st.sampled_from(["_METADATA", "checkpoint", "a.npz", "manifest.ocdbt"]),
)
def test_a_directory_with_one_file_of_any_bytes(tmp_path_factory, content, name):
    folder = tmp_path_factory.mktemp("any")
    (folder / name).write_bytes(content)
    with contextlib.suppress(NotACheckpointError):
        read_metadata(folder / name if name.endswith("npz") else folder)
