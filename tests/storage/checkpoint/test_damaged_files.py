"""Every small file of a checkpoint, damaged: one error that names the file and the field, or the leaf."""

import json
import os
import shutil
import struct
import zipfile

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import orbax.checkpoint as ocp
import pytest
import zstandard

from orbax_nnx_handler import NotACheckpointError, UnreadableLeafError, plan_restore, restore
from orbax_nnx_handler.storage.checkpoint.metadata import read_metadata
from tests.storage.checkpoints import DiskFormat, save

ZARR2, ZARR3 = DiskFormat(False, False, False), DiskFormat(False, True, False)
OCDBT = DiskFormat(True, True, False)
DEEP = b"[" * 100_000
NO_JSON = [b"", b"{", b"[]", b"7", b"\xff\xfe", DEEP, b'{"a": 1} tail']


def item(tmp_path, disk_format, *, key=False):
    tree = {"w": np.ones((6, 4), np.float32)} | ({"key": jax.random.key(3)} if key else {})
    return save(tmp_path / "item", tree, disk_format)


def changed(fields, path, value):
    """Returns JSON with one field, at a path of keys, set to another value."""
    for name in path[:-1]:
        fields = fields[name]
    fields[path[-1]] = value


@pytest.mark.parametrize("content", NO_JSON, ids=range(len(NO_JSON)))
def test_a_tree_that_is_no_json_object_names_its_file(tmp_path, content):
    path = item(tmp_path, OCDBT)
    (path / "_METADATA").write_bytes(content)

    with pytest.raises(NotACheckpointError, match="_METADATA cannot be read as the tree"):
        read_metadata(path)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("tree_metadata",), []),
        (("tree_metadata", "('w',)"), 3),
        (("tree_metadata", "('w',)", "key_metadata"), [3]),
        (("tree_metadata", "('w',)", "key_metadata"), [{"key": 3, "key_type": 2}]),
        (("tree_metadata", "('w',)", "key_metadata"), [{"key": "\ud800", "key_type": 2}]),
        (("tree_metadata", "('w',)", "key_metadata"), [{"key": "9" * 5000, "key_type": 1}]),
        (("tree_metadata", "('w',)", "value_metadata"), None),
        (("custom_metadata",), [1]),
    ],
)
def test_a_tree_with_a_field_of_another_type_names_the_field(tmp_path, where, value):
    path = item(tmp_path, OCDBT)
    fields = json.loads((path / "_METADATA").read_text())
    changed(fields, where, value)
    (path / "_METADATA").write_text(json.dumps(fields))

    with pytest.raises(NotACheckpointError, match="_METADATA cannot be read as the tree"):
        read_metadata(path)


@pytest.mark.parametrize("name", ["../../outside", "/etc", "a/../../b", ".", "a//b"])
def test_a_name_that_leads_out_of_the_checkpoint_is_a_lost_leaf(tmp_path, name):
    path = item(tmp_path, ZARR2)
    fields = json.loads((path / "_METADATA").read_text())
    fields["tree_metadata"]["('w',)"]["key_metadata"][0]["key"] = name
    (path / "_METADATA").write_text(json.dumps(fields))

    assert "leads out of the checkpoint" in read_metadata(path).lost[(name,)]


@pytest.mark.parametrize("content", [*NO_JSON, b"{}"], ids=range(len(NO_JSON) + 1))
@pytest.mark.parametrize("disk_format", [ZARR2, ZARR3], ids=str)
def test_array_metadata_that_is_none_is_a_lost_leaf(tmp_path, disk_format, content):
    path = item(tmp_path, disk_format)
    name = "zarr.json" if disk_format.zarr3 else ".zarray"
    (path / "w" / name).write_bytes(content)

    assert f"w/{name} in {path} is damaged" in read_metadata(path).lost[("w",)]
    with pytest.raises(UnreadableLeafError):
        plan_restore(path, {"w": jax.ShapeDtypeStruct((6, 4), jnp.float32)}, policy="warn").check()


ZARR2_FIELDS = [
    (("shape",), value)
    for value in (None, 7, [-1, 4], [6.0, 4], ["6", 4], [True, 4], [1 << 70, 4], [6], [1] * 99)
] + [
    (("chunks",), value) for value in (None, [0, 4], [-6, 4], [6], [6, 4, 1])
] + [
    (("dtype",), value) for value in (None, 7, "<q9", "|O", "<U8", [["a", "<f4"]], "nonsense")
] + [
    (("compressor",), 7), (("dimension_separator",), "/../../outside/"), (("dimension_separator",), 7),
    (("fill_value",), {"a": 1}), (("fill_value",), "x"), (("zarr_format",), 3), (("zarr_format",), "2"),
    (("zarr_format",), None), (("dtype",), "float32"), (("shape",), [0, 1 << 62]),
]  # fmt: skip
ZARR3_FIELDS = [
    (("shape",), [-1, 4]), (("node_type",), "group"), (("data_type",), {"name": "x"}),
    (("codecs",), {"a": 1}),
    (("codecs",), [1]), (("codecs",), [{}]), (("chunk_grid",), None), (("chunk_grid", "configuration"), 3),
    (("chunk_grid", "configuration", "chunk_shape"), [0, 4]), (("chunk_key_encoding",), 3),
    (("chunk_key_encoding",), {"name": "default", "configuration": {"separator": "/../"}}),
    (("fill_value",), "x"), (("zarr_format",), 2), (("chunk_grid", "name"), "rectangular"),
    (("attributes",), 1),
    (("storage_transformers",), [{"name": "x"}]), (("new",), {"must_understand": True}), (("new",), 1),
    (("fill_value",), None), (("chunk_key_encoding",), None), (("chunk_key_encoding",), {}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("disk_format", "where", "value"),
    [(ZARR2, *case) for case in ZARR2_FIELDS] + [(ZARR3, *case) for case in ZARR3_FIELDS],
)
def test_array_metadata_with_a_wrong_field_is_a_lost_leaf(tmp_path, disk_format, where, value):
    path = item(tmp_path, disk_format)
    file = path / "w" / ("zarr.json" if disk_format.zarr3 else ".zarray")
    fields = json.loads(file.read_text())
    changed(fields, where, value)
    file.write_text(json.dumps(fields))

    assert set(read_metadata(path).lost) == {("w",)}


@pytest.mark.parametrize("is_null", [True, False], ids=["null", "absent"])
@pytest.mark.parametrize("name", ["fill_value", "chunk_key_encoding", "codecs", "data_type", "shape"])
def test_a_field_that_zarr_3_demands_is_demanded_as_stock_orbax_does(tmp_path, name, is_null):
    path = item(tmp_path, ZARR3)
    fields = json.loads((path / "w" / "zarr.json").read_text())
    fields = {**fields, name: None} if is_null else {key: fields[key] for key in fields if key != name}
    (path / "w" / "zarr.json").write_text(json.dumps(fields))

    with pytest.raises(UnreadableLeafError) as caught:
        restore(path, {"w": jax.ShapeDtypeStruct((6, 4), jnp.float32)})
    with pytest.raises(ValueError, match=name):
        ocp.PyTreeCheckpointer().restore(path)

    assert f"w/zarr.json in {path} is damaged: {name} is " in str(caught.value)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("new",), {"must_understand": False}),
        (("attributes",), {"a": "b"}),
        (("storage_transformers",), []),
        (("dimension_names",), ["x", None]),
        (("fill_value",), "NaN"),
    ],
)
def test_array_metadata_that_other_writers_add_to_is_read(tmp_path, where, value):
    path = item(tmp_path, ZARR3)
    fields = json.loads((path / "w" / "zarr.json").read_text())
    changed(fields, where, value)
    (path / "w" / "zarr.json").write_text(json.dumps(fields))

    assert not read_metadata(path).lost


def notes(name, impl):
    """What Orbax notes on one array."""
    entry = {"param_name": name, "ext_metadata": {"random_key_impl": impl}}
    return json.dumps({"array_metadatas": [{"array_metadata": entry}]}).encode()


@pytest.mark.parametrize(
    "content",
    [
        b'{"random_key_impl"',
        b'["random_key_impl"]',
        b'{"array_metadatas": [3], "random_key_impl": 1}',
        notes(3, "rbg"),
        notes("key", "no"),
        notes("key", [1]),
    ],
    ids=range(6),
)
def test_damaged_notes_on_random_keys_name_their_file(tmp_path, content):
    path = item(tmp_path, OCDBT, key=True)
    (path / "array_metadatas" / "process_0").write_bytes(content)

    with pytest.raises(NotACheckpointError, match=r"array_metadatas/process_0 cannot be read"):
        read_metadata(path)


@pytest.mark.parametrize("content", [*NO_JSON, b'{"custom_metadata": 3}', None], ids=range(len(NO_JSON) + 2))
def test_a_file_that_nothing_depends_on_is_a_warning(tmp_path, content, caplog):
    path = item(tmp_path, OCDBT)
    file = path / "_CHECKPOINT_METADATA"
    file.unlink()
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)

    checkpoint = read_metadata(path)

    assert set(checkpoint.leaves) == {("w",)}
    assert checkpoint.step_metadata == {}
    assert b"tail" in (content or b"") or "_CHECKPOINT_METADATA" in caplog.text


@pytest.mark.parametrize(
    "aux",
    [[3], [{}], [{"path": 3}], [{"path": ["rngs", "key"], "value": "x", "dtype": "uint32", "shape": [2]}],
     [{"path": ["rngs"], "value": [1], "dtype": "O", "shape": [1], "key_impl": None}],
     [{"path": ["rngs"], "value": [1], "dtype": "uint32", "shape": [1 << 60], "key_impl": None}],
     [{"path": ["rngs"], "value": [1, 2], "dtype": "uint32", "shape": [2], "key_impl": "nonsense"}]],
    ids=range(7),
)  # fmt: skip
def test_random_state_of_another_form_in_the_metadata_is_one_clear_error(tmp_path, aux):
    path = item(tmp_path, OCDBT)
    fields = json.loads((path / "_METADATA").read_text())
    fields["custom_metadata"] = {"nnx_aux": aux}
    (path / "_METADATA").write_text(json.dumps(fields))

    with pytest.raises(NotACheckpointError, match=r"_METADATA cannot be read: the random state .*nnx_aux"):
        read_metadata(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_named(tmp_path):
    path = item(tmp_path, OCDBT)
    (path / "_METADATA").chmod(0)

    with pytest.raises(NotACheckpointError, match="_METADATA cannot be read: PermissionError"):
        read_metadata(path)


@pytest.mark.parametrize(
    ("shape", "chunks"),
    [([10**9, 10**6], [10**9, 10**6]), ([10**9, 10**6], [1, 1]), ([1 << 20, 1 << 20], [1 << 10, 1 << 20])],
)
def test_an_array_that_cannot_be_in_its_files_is_damaged_at_once(tmp_path, shape, chunks):
    path = item(tmp_path, ZARR2)
    fields = json.loads((path / "w" / ".zarray").read_text())
    (path / "w" / ".zarray").write_text(json.dumps({**fields, "shape": shape, "chunks": chunks}))

    checkpoint = read_metadata(path)

    assert checkpoint.damaged[("w",)].startswith("an array of ")
    with pytest.raises(UnreadableLeafError):
        plan_restore(path, {"w": jax.ShapeDtypeStruct(tuple(shape), jnp.float32)}, policy="warn").check()


def wide(names):
    """Returns a file of safetensors that names arrays of nothing."""
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps(dict.fromkeys(names, entry)).encode()
    return struct.pack("<Q", len(header)) + header


@pytest.mark.parametrize("name", ["." * 1_000_000, ".".join("a" * 300)])
def test_a_leaf_deeper_than_a_programs_can_be_is_refused_at_once(tmp_path, name):
    (tmp_path / "w.safetensors").write_bytes(wide([name]))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr(name[:60_000].replace(".", "/") + "/w.npy", b"")
    path = item(tmp_path, ZARR3)
    fields = json.loads((path / "_METADATA").read_text())
    (leaf,) = fields["tree_metadata"].values()
    leaf["key_metadata"] *= 300
    (path / "_METADATA").write_text(json.dumps(fields))

    for deep in (tmp_path / "w.safetensors", tmp_path / "a.npz", path):
        with pytest.raises(NotACheckpointError, match=r"it names a leaf below \d+ others"):
            read_metadata(deep)


def test_half_a_million_leaves_in_a_megabyte_are_refused(tmp_path):
    (tmp_path / "item").mkdir()
    (tmp_path / "item" / "checkpoint").write_bytes(msgpack.packb([None] * 600_000))

    with pytest.raises(NotACheckpointError, match="it names more than 524,288 leaves"):
        read_metadata(tmp_path / "item")


def test_a_name_of_halves_of_characters_is_refused(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(wide(["\ud800"]))

    with pytest.raises(NotACheckpointError, match="surrogates not allowed"):
        read_metadata(tmp_path / "w.safetensors")


@pytest.mark.parametrize("name", ["_METADATA", "checkpoint"])
def test_a_file_that_is_one_large_hole_is_not_read(tmp_path, name):
    path = item(tmp_path, ZARR3)
    with (path / name).open("ab") as file:
        file.truncate(4 << 30)

    with pytest.raises(NotACheckpointError, match=f"{name} cannot be read: .* of its 4294967296 bytes only"):
        read_metadata(path)


def test_a_chunk_that_says_it_unpacks_to_gigabytes_is_damaged(tmp_path):
    path = item(tmp_path, DiskFormat(False, False, True))
    packed = zstandard.compress(bytes(6 * 4 * 4))
    assert packed[4:6] == bytes([0b00100000, 96])
    # A single segment with eight bytes of size (RFC 8878, 3.1.1.1), in place of the one byte that is there.
    lie = packed[:4] + bytes([0b11100000]) + (8 << 30).to_bytes(8, "little") + packed[6:]
    (path / "w" / "0.0").write_bytes(lie)

    with pytest.raises(UnreadableLeafError, match="unpacks to 8589934592 bytes where a chunk has 96"):
        restore(path, {"w": jax.ShapeDtypeStruct((6, 4), jnp.float32)})


def test_a_folder_that_is_a_link_to_everything_is_not_looked_through(tmp_path):
    path = item(tmp_path, OCDBT)
    shutil.rmtree(path / "d")
    (path / "d").symlink_to("/")

    with pytest.raises(NotACheckpointError, match="leads out of the checkpoint"):
        read_metadata(path)


def test_an_archive_whose_directory_points_behind_its_end_is_damaged(tmp_path):
    np.savez(tmp_path / "a.npz", w=np.ones(3))
    content = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(content[:-6] + struct.pack("<I", 0xFFFFFFFE) + content[-2:])

    assert "w.npy in" in read_metadata(tmp_path / "a.npz").lost["w",]


def test_a_list_of_more_places_than_a_program_has_leaves_is_refused(tmp_path):
    (tmp_path / "checkpoint").write_bytes(msgpack.packb({"a": {10**9: 1.0}}))

    with pytest.raises(NotACheckpointError, match="its lists would have more than 524,288 places"):
        read_metadata(tmp_path)


def test_a_chunk_far_larger_than_its_array_is_refused_before_it_is_unpacked(tmp_path):
    path = save(tmp_path / "item", {"w": np.ones((6, 4), np.float32)}, DiskFormat(False, True, True))
    file = path / "w" / "zarr.json"
    fields = json.loads(file.read_text())
    fields["chunk_grid"]["configuration"]["chunk_shape"] = [1 << 14, 1 << 14]
    fields["codecs"] = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "gzip"}]
    file.write_text(json.dumps(fields))

    with pytest.raises(
        UnreadableLeafError, match=r"a chunk would have 1\.07 GB, and the whole array has 96 B"
    ):
        restore(path, {"w": jax.ShapeDtypeStruct((6, 4), np.float32)})


def packed_array(shape, dtype="float32", content=bytes(96)):
    return msgpack.ExtType(1, msgpack.packb([shape, dtype, content]))


def in_chunks(shape, chunks):
    return {"__msgpack_chunked_array__": True, "shape": shape, "chunks": chunks}


HALF = packed_array([12], content=bytes(48))
DAMAGED_VALUES = {
    "a negative length": (packed_array([-1, 4]), "shape is [-1, 4], which is no shape"),
    "a length that is no integer": (packed_array([6.0, 4]), "shape is [6.0, 4], which is no shape"),
    "no shape": (packed_array(None), "shape is None, where a list should be"),
    "65 axes": (packed_array([1] * 65), "shape has 65 axes, which is no shape: 64 is the most"),
    "too few bytes": (packed_array([7, 4]), "it holds 96 bytes where (7, 4) float32 takes 112"),
    "no dtype": (packed_array([6, 4], "nonsense"), "its dtype is b'nonsense'"),
    "a dtype that is a number": (packed_array([6, 4], 7), "its dtype is 7"),
    "other parts": (msgpack.ExtType(1, msgpack.packb([1, 2])), "it has not the parts that Flax writes"),
    "no parts": (msgpack.ExtType(2, b"\xc1"), "its bytes are no msgpack"),
    "no complex number": (msgpack.ExtType(2, msgpack.packb(["x", "y"])), "a damaged complex number: "),
    "a gap": (in_chunks({"0": 6, "1": 4}, {"0": HALF, "2": HALF}), "chunks lacks number 1 of 2"),
    "a list": (in_chunks({"0": 6, "1": 4}, [HALF, HALF]), "where an object should be"),
    "no chunks": ({"__msgpack_chunked_array__": True}, "shape is absent"),
    "a chunk that is none": (in_chunks({"0": 24}, {"0": 1.0}), "chunks holds something else than arrays"),
    "a chunk too few": (
        in_chunks({"0": 6, "1": 4}, {"0": HALF}),
        "its chunks hold 12 values where (6, 4) takes 24",
    ),
    "a damaged chunk": (in_chunks({"0": 24}, {"0": packed_array([25])}), "it holds 96 bytes where (25,)"),
}


@pytest.mark.parametrize("name", ["flax_model.msgpack", "checkpoint"])
@pytest.mark.parametrize("kind", DAMAGED_VALUES)
def test_a_damaged_value_of_msgpack_is_a_lost_leaf_beside_the_others(tmp_path, kind, name):
    value, reason = DAMAGED_VALUES[kind]
    (tmp_path / name).write_bytes(msgpack.packb({"w": value, "v": packed_array([24])}))
    wanted = jax.ShapeDtypeStruct((24,), jnp.float32)

    assert restore(tmp_path, {"v": wanted})["v"].shape == (24,)
    with pytest.raises(UnreadableLeafError) as raised:
        restore(tmp_path, {"v": wanted, "w": wanted}, policy="init", init=lambda: {"v": 0.0, "w": 0.0})
    assert raised.value.paths == (("w",),)
    assert reason in str(raised.value)
    assert str(tmp_path / name) in str(raised.value)
    assert "copy it again" in str(raised.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x81\xa1a" * 100_000 + b"\xc0", "its maps lie deeper in one another than a program's"),
        (b"\x82\xa1w\x01\xa1w\x02", "a map in it has the key 'w' twice"),
        (b"\x81\x90\x01", "a map in it has a list for a key"),
    ],
)
def test_a_map_of_msgpack_that_no_program_writes_is_refused_in_words(tmp_path, content, reason):
    (tmp_path / "flax_model.msgpack").write_bytes(content)

    with pytest.raises(NotACheckpointError, match=f"flax_model.msgpack .*: {reason}.\nhint: copy it again"):
        read_metadata(tmp_path)


def test_an_array_of_flax_above_a_gigabyte_is_joined_from_its_chunks(tmp_path):
    value = np.arange(24, dtype=np.float32)
    chunks = {str(at): packed_array([2], content=value[2 * at : 2 * at + 2].tobytes()) for at in range(12)}
    (tmp_path / "flax_model.msgpack").write_bytes(msgpack.packb({"w": in_chunks({"0": 6, "1": 4}, chunks)}))

    found = restore(tmp_path, {"w": jax.ShapeDtypeStruct((6, 4), jnp.float32)})

    np.testing.assert_array_equal(found["w"], value.reshape(6, 4))
