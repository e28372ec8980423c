"""Files of a stranger's checkpoint: no pipe is waited for, and no link leads out of it."""

import contextlib
import json
import os
import shutil
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts

from orbax_nnx_handler import RestoreError, UnreadableLeafError, plan_restore, restore
from tests.storage.checkpoints import DiskFormat, save

FORMATS = {
    "zarr": DiskFormat(False, False, False),
    "zarr, zstd": DiskFormat(False, False, True),
    "zarr3": DiskFormat(False, True, False),
    "ocdbt": DiskFormat(True, True, False),
}
GZIP = [
    {"name": "bytes", "configuration": {"endian": "little"}},
    {"name": "gzip", "configuration": {"level": 1}},
]
UNNEEDED = ("_CHECKPOINT_METADATA", "commit_success.txt", "_sharding", "process_0")
WANTED = {"w": jax.ShapeDtypeStruct((64, 40), jnp.float32)}


def files_of(path):
    return sorted(file for file in path.rglob("*") if file.is_file())


def item(tmp_path, disk_format):
    # Random numbers, so that the values are in a file of their own.
    values = np.random.default_rng(0).normal(size=(64, 40)).astype(np.float32)
    return save(tmp_path / "run" / "item", {"w": values}, FORMATS[disk_format]), values


_watching: list[set[str]] = []


def _watch(event, arguments):
    for names in _watching:
        if event == "open":
            names.add(str(arguments[0]))


@pytest.fixture(scope="session")
def watched():
    """Has files noted: an audit hook cannot be taken away again, and delays every test that follows."""
    sys.addaudithook(_watch)


@pytest.fixture
def opened(watched):
    """The files that this process opens."""
    _watching.append(set())
    yield _watching[-1]
    _watching.clear()


@pytest.mark.parametrize("disk_format", FORMATS)
def test_no_link_to_a_file_outside_is_followed(tmp_path, disk_format, opened):
    path, _ = item(tmp_path, disk_format)
    secret = tmp_path / "secret"
    for file in files_of(path):
        secret.write_bytes(file.read_bytes())
        kept = tmp_path / "kept"
        shutil.move(file, kept)
        file.symlink_to(secret)
        opened.clear()
        said = "done without it"
        with contextlib.suppress(RestoreError):
            try:
                restore(path, WANTED)
            except RestoreError as error:
                said = str(error)
                raise
        needed = file.name not in UNNEEDED and "ocdbt.process" not in str(file)
        assert not needed or "leads out of the checkpoint" in said
        assert not [name for name in opened if "secret" in name]
        file.unlink()
        shutil.move(kept, file)


@pytest.mark.parametrize("disk_format", ["zarr", "zarr3"])
def test_no_link_to_a_folder_outside_is_followed(tmp_path, disk_format, opened):
    path, _ = item(tmp_path, disk_format)
    shutil.move(path / "w", tmp_path / "secret")
    (path / "w").symlink_to(tmp_path / "secret")

    with pytest.raises(RestoreError, match="leads out of the checkpoint"):
        restore(path, WANTED)
    assert not [name for name in opened if "secret" in name]


def written_by_tensorstore(path, value):
    """Writes an array in a codec that is left to TensorStore, below a path without a backslash."""
    metadata = {"shape": [64, 40], "data_type": "float32", "codecs": GZIP}
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}, "metadata": metadata}
    ts.open(spec, create=True).result().write(np.full((64, 40), value, np.float32)).result()


@pytest.mark.parametrize("is_link", [True, False])
@pytest.mark.parametrize("disk_format", ["zarr", "zarr, zstd", "zarr3", "gzip"])
def test_a_name_with_a_backslash_reads_no_other_array(tmp_path, disk_format, is_link):
    path, _ = item(tmp_path, "zarr3" if disk_format == "gzip" else disk_format)
    fields = json.loads((path / "_METADATA").read_text())
    fields["tree_metadata"]["('w',)"]["key_metadata"][0]["key"] = "x\\secret"
    (path / "_METADATA").write_text(json.dumps(fields))
    shutil.move(path / "w", path / "x\\secret")
    if disk_format == "gzip":
        shutil.rmtree(path / "x\\secret")
        written_by_tensorstore(tmp_path / "own", 1.0)
        shutil.move(tmp_path / "own", path / "x\\secret")
    other = tmp_path / "outside" if is_link else path / "x"
    written_by_tensorstore(other / "secret", 42.0)
    if is_link:
        (path / "x").symlink_to(other)

    with pytest.raises(UnreadableLeafError, match="takes a backslash in a path for a separator") as caught:
        restore(path, {"x\\secret": WANTED["w"]})
    assert "x\\secret" in str(caught.value)
    assert [hint.words for hint in caught.value.hints] == [
        "save it where it was written, under other names or with use_ocdbt=True."
    ]
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("disk_format", FORMATS)
def test_a_database_keeps_a_name_with_a_backslash_and_a_directory_is_not_written(tmp_path, disk_format):
    values = np.arange(6, dtype=np.float32)
    path = save(tmp_path / "item", {"a\\b": values}, FORMATS[disk_format])

    wanted = {"a\\b": jax.ShapeDtypeStruct((6,), jnp.float32)}

    if disk_format == "ocdbt":
        np.testing.assert_array_equal(restore(path, wanted)["a\\b"], values)
        return
    with pytest.raises(UnreadableLeafError, match="takes a backslash in a path for a separator"):
        restore(path, wanted)


@pytest.mark.parametrize("folder", ["d/", "ocdbt.process_0/d/"])
@pytest.mark.parametrize("place", ["a link", "a pipe"])
def test_no_data_file_of_a_database_that_tensorstore_opens_is_a_link_out_or_a_pipe(tmp_path, folder, place):
    path, _ = item(tmp_path, "ocdbt")
    shutil.rmtree(path / "ocdbt.process_0", ignore_errors=True)
    shutil.rmtree(path / "d")
    (path / "manifest.ocdbt").unlink()
    database = {"driver": "ocdbt", "base": f"file://{path}/", "value_data_prefix": folder, "path": "w/"}
    metadata = {"shape": [64, 40], "data_type": "float32", "codecs": GZIP}
    array = ts.open({"driver": "zarr3", "kvstore": database, "metadata": metadata}, create=True).result()
    values = np.random.default_rng(0).normal(size=(64, 40)).astype(np.float32)
    array.write(values).result()
    np.testing.assert_array_equal(restore(path, WANTED)["w"], values)
    data = max((path / folder).iterdir(), key=lambda file: file.stat().st_size)
    shutil.move(data, tmp_path / "secret")
    if place == "a link":
        data.symlink_to(tmp_path / "secret")
    else:
        os.mkfifo(data)

    with pytest.raises(RestoreError, match="leads out of the checkpoint" if place == "a link" else "absent"):
        restore(path, WANTED)


@pytest.mark.parametrize("place", ["a link", "a pipe"])
def test_no_count_is_read_through_a_link_out_or_a_pipe(tmp_path, place):
    path = save(tmp_path / "item", {"step": np.int64(1 << 40)}, FORMATS["zarr3"])
    (chunk,) = [file for file in files_of(path / "step") if file.name != "zarr.json"]
    shutil.move(chunk, tmp_path / "secret")
    if place == "a link":
        chunk.symlink_to(tmp_path / "secret")
    else:
        os.mkfifo(chunk)

    said = "leads out of the checkpoint" if place == "a link" else "no regular file"
    with pytest.raises(UnreadableLeafError, match=said):
        restore(path, {"step": jax.ShapeDtypeStruct((), jnp.int32)})


def test_a_directory_with_a_backslash_is_read_itself_or_not_at_all(tmp_path):
    path, values = item(tmp_path, "zarr3")
    (tmp_path / "other").mkdir()
    shutil.move(path, tmp_path / "other\\item")
    written_by_tensorstore(tmp_path / "other" / "item" / "w", 42.0)
    path = tmp_path / "other\\item"

    np.testing.assert_array_equal(restore(path, WANTED)["w"], values)
    shutil.rmtree(path / "w")
    written_by_tensorstore(tmp_path / "own", 1.0)
    shutil.move(tmp_path / "own", path / "w")
    with pytest.raises(UnreadableLeafError, match="takes a backslash in a path for a separator"):
        restore(path, WANTED)


@pytest.mark.parametrize("disk_format", FORMATS)
def test_links_within_the_checkpoint_and_to_it_are_followed(tmp_path, disk_format):
    path, values = item(tmp_path, disk_format)
    shutil.copytree(path, tmp_path / "real")
    shutil.rmtree(path)
    path.symlink_to(tmp_path / "real")
    for number, file in enumerate(files_of(tmp_path / "real")):
        shutil.move(file, tmp_path / "real" / f"moved_{number}")
        file.symlink_to(os.path.relpath(tmp_path / "real" / f"moved_{number}", file.parent))

    np.testing.assert_array_equal(restore(path, WANTED)["w"], values)


@pytest.mark.parametrize("disk_format", FORMATS)
def test_a_snapshot_in_the_cache_of_hugging_face_is_read(tmp_path, disk_format):
    path, values = item(tmp_path, disk_format)
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123" / "item"
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    for number, file in enumerate(files_of(path)):
        place = snapshot / file.relative_to(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blobs / str(number))
        place.symlink_to(os.path.relpath(blobs / str(number), place.parent))

    np.testing.assert_array_equal(restore(snapshot, WANTED)["w"], values)


def test_an_archive_or_a_file_that_is_named_may_be_a_link(tmp_path):
    values = np.arange(6, dtype=np.float32)
    (tmp_path / "there").mkdir()
    np.savez(tmp_path / "there" / "a.npz", w=values)
    for name in ("b.npz", "without_an_ending"):
        (tmp_path / name).symlink_to(tmp_path / "there" / "a.npz")

        found = restore(tmp_path / name, {"w": jax.ShapeDtypeStruct((6,), jnp.float32)})
        np.testing.assert_array_equal(found["w"], values)


def test_weights_of_hugging_face_are_read_by_a_link_that_is_named_and_not_by_one_that_leads_out(tmp_path):
    header = json.dumps({"w": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}}).encode()
    values = np.arange(6, dtype=np.float32)
    (tmp_path / "there").write_bytes(len(header).to_bytes(8, "little") + header + values.tobytes())
    (tmp_path / "model").mkdir()
    for name in ("mine.safetensors", "model/model.safetensors"):
        (tmp_path / name).symlink_to(tmp_path / "there")
    wanted = {"w": jax.ShapeDtypeStruct((6,), jnp.float32)}

    np.testing.assert_array_equal(restore(tmp_path / "mine.safetensors", wanted)["w"], values)
    with pytest.raises(RestoreError, match="leads out of the checkpoint"):
        restore(tmp_path / "model", wanted)


@pytest.mark.parametrize("disk_format", FORMATS)
def test_a_pipe_in_place_of_any_file_is_refused_or_not_needed(tmp_path, disk_format):
    path, values = item(tmp_path, disk_format)
    for file in files_of(path):
        kept = file.read_bytes()
        file.unlink()
        os.mkfifo(file)
        done = []

        def attempt(done=done):
            try:
                done.append(restore(path, WANTED)["w"])
            except RestoreError as error:
                done.append(error)

        thread = threading.Thread(target=attempt, daemon=True)
        thread.start()
        thread.join(20)
        assert done, file
        if not isinstance(done[0], RestoreError):
            np.testing.assert_array_equal(done[0], values)
        file.unlink()
        file.write_bytes(kept)


def test_a_plan_names_the_file_and_where_its_link_leads(tmp_path):
    path, _ = item(tmp_path, "ocdbt")
    shutil.move(path / "_METADATA", tmp_path / "secret")
    (path / "_METADATA").symlink_to(tmp_path / "secret")

    with pytest.raises(RestoreError) as caught:
        plan_restore(path, WANTED)
    assert str(caught.value) == (
        f"{path}/_METADATA cannot be read: OutsideError: it is a link that leads out of the checkpoint, "
        f"to {tmp_path}/secret.\n"
        "hint: if that file belongs to it, copy the checkpoint with what its links mean: cp -rL FROM TO."
    )
