"""What metadata tells about a checkpoint, against what stock Orbax restores from it."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import serialization

from orbax_nnx_handler import RestoreError
from orbax_nnx_handler.planning.core.errors import NotACheckpointError
from orbax_nnx_handler.storage.checkpoint.metadata import read_metadata
from tests.storage.checkpoints import FORMATS, DiskFormat, mixed_tree, numbers, save


@pytest.mark.parametrize("disk_format", FORMATS, ids=str)
def test_every_leaf_has_its_path_shape_and_dtype(tmp_path, disk_format):
    path = save(tmp_path / "item", mixed_tree(), disk_format)

    leaves = read_metadata(path).leaves

    found = {leaf.path: (leaf.shape, leaf.dtype) for leaf in leaves.values()}
    assert found == {
        ("params", "dense", "kernel"): ((6, 4), np.float32),
        ("params", "dense", "bias"): ((4,), jnp.bfloat16),
        ("params", "a/b"): ((2, 3, 5), np.int8),
        ("params", "flag"): ((2,), np.bool_),
        ("opt_state", 0, "count"): ((), np.int32),
        ("opt_state", 0, "mu"): ((6, 4), np.float32),
        ("step",): ((), np.int64),
        ("rate",): ((), np.float64),
        ("host",): ((2, 3), np.float64),
        ("name",): ((), None),
        ("key",): ((), jax.random.key(0).dtype),
        ("keys",): ((3,), jax.random.key(0, impl="rbg").dtype),
        ("old_key",): ((2,), np.uint32),
    }
    assert {leaf.path[0]: leaf.key_impl for leaf in leaves.values() if leaf.key_impl} == {
        "key": "threefry2x32",
        "keys": "rbg",
    }


@pytest.mark.parametrize(
    ("disk_format", "name"),
    [
        (DiskFormat(True, True, False), "ocdbt+zarr3"),
        (DiskFormat(True, False, False), "ocdbt+zarr"),
        (DiskFormat(False, True, False), "zarr3"),
        (DiskFormat(False, False, False), "zarr"),
    ],
)
def test_the_disk_format_has_a_name(tmp_path, disk_format, name):
    path = save(tmp_path / "item", {"a": numbers((2,))}, disk_format)

    assert read_metadata(path).disk_format == name


def test_no_array_byte_is_read(tmp_path):
    path = save(tmp_path / "item", {"a": numbers((64, 64))}, DiskFormat(True, True, False))
    (largest,) = [file for file in path.rglob("*") if file.is_file() and file.stat().st_size > 64 * 64 * 4]
    largest.unlink()

    checkpoint = read_metadata(path)

    assert checkpoint.leaves[("a",)].shape == (64, 64)


@pytest.mark.parametrize("ocdbt", [True, False])
def test_without_a_tree_the_names_in_the_store_are_split(tmp_path, ocdbt):
    path = save(
        tmp_path / "item", {"a": {"b": numbers((2, 3))}, "c": [numbers((4,))]}, DiskFormat(ocdbt, False, True)
    )
    (path / "_METADATA").unlink()

    leaves = read_metadata(path).leaves

    assert {path: leaf.shape for path, leaf in leaves.items()} == {("a", "b"): (2, 3), ("c", "0"): (4,)}


def test_a_msgpack_file_of_structure_points_to_its_arrays(tmp_path):
    path = save(tmp_path / "item", {"a": {"b": numbers((2, 3))}}, DiskFormat(False, False, True))
    (path / "_METADATA").unlink()
    tree = {"a": {"b": "PLACEHOLDER://a.b"}, "c": [np.float32(2.5), None, {}], "d": "text"}
    (path / "checkpoint").write_bytes(serialization.msgpack_serialize(tree))

    checkpoint = read_metadata(path)

    assert {path: leaf.shape for path, leaf in checkpoint.leaves.items()} == {
        ("a", "b"): (2, 3),
        ("c", 0): (),
        ("d",): (),
    }
    assert checkpoint.values == {("c", 0): np.float32(2.5)}
    assert checkpoint.disk_format == "zarr and msgpack"


def test_a_file_that_flax_wrote_is_a_checkpoint_of_host_values(tmp_path):
    tree = {"params": {"w": np.arange(6.0).reshape(2, 3)}, "step": 3}
    (tmp_path / "checkpoint_3").write_bytes(serialization.msgpack_serialize(tree))

    checkpoint = read_metadata(tmp_path / "checkpoint_3")

    assert checkpoint.disk_format == "msgpack"
    assert checkpoint.values is not None
    np.testing.assert_array_equal(checkpoint.values[("params", "w")], tree["params"]["w"])
    assert checkpoint.leaves[("step",)].shape == ()


def test_a_file_of_flax_that_ends_too_early_is_to_be_copied_again(tmp_path):
    file = tmp_path / "flax_model.msgpack"
    file.write_bytes(serialization.to_bytes({"dense": {"kernel": np.ones((40, 4))}})[:-9])

    with pytest.raises(
        NotACheckpointError, match=r"msgpack ends before the tree in it does\.\nhint: copy it"
    ):
        read_metadata(tmp_path)


def test_a_leaf_that_no_store_holds_is_lost_and_the_rest_is_there(tmp_path):
    path = save(tmp_path / "item", {"a": numbers((2,)), "b": numbers((3,))}, DiskFormat(False, False, True))
    (path / "a" / ".zarray").unlink()

    checkpoint = read_metadata(path)

    assert set(checkpoint.leaves) == {("b",)}
    assert checkpoint.lost == {("a",): "the tree names it, but no store holds it"}


def test_custom_metadata_of_item_and_step_are_there(tmp_path):
    with ocp.CheckpointManager(tmp_path) as manager:
        save_args = ocp.args.PyTreeSave({"a": numbers((2,))}, custom_metadata={"item": 1})
        manager.save(0, args=ocp.args.Composite(items=save_args), custom_metadata={"scan_layers": True})

    checkpoint = read_metadata(tmp_path / "0" / "items")

    assert checkpoint.custom_metadata == {"item": 1}
    assert checkpoint.step_metadata == {"scan_layers": True}


def test_a_step_is_no_item_and_the_error_names_its_items(tmp_path):
    save(tmp_path / "5" / "items", {"a": numbers((2,))})

    with pytest.raises(NotACheckpointError) as raised:
        read_metadata(tmp_path / "5")

    assert str(raised.value) == (
        f"{tmp_path / '5'} is a step, not an item; it holds: items.\nhint: pass {tmp_path / '5' / 'items'}."
    )


def test_a_manager_root_is_no_item_and_the_error_names_its_steps(tmp_path):
    for step in (5, 10):
        save(tmp_path / str(step) / "items", {"a": numbers((2,))})

    with pytest.raises(NotACheckpointError) as raised:
        read_metadata(tmp_path)

    assert str(raised.value) == (
        f"{tmp_path} is the root of a CheckpointManager, not an item; it holds the steps 5, 10.\n"
        f"hint: pass {tmp_path / '10' / 'items'}."
    )


@pytest.mark.parametrize("content", ["{", "[]", '{"tree_metadata": {"x": 1}}'])
def test_a_damaged_tree_is_an_error_that_names_the_file(tmp_path, content):
    path = save(tmp_path / "item", {"a": numbers((2,))})
    (path / "_METADATA").write_text(content)

    with pytest.raises(NotACheckpointError, match="_METADATA cannot be read"):
        read_metadata(path)


def test_a_damaged_database_is_an_error_that_names_it(tmp_path):
    path = save(tmp_path / "item", {"a": numbers((2,))})
    (path / "manifest.ocdbt").write_bytes(b"nonsense")

    with pytest.raises(NotACheckpointError, match=str(path)):
        read_metadata(path)


def test_a_path_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(NotACheckpointError, match=r"there is nothing at .*nowhere"):
        read_metadata(tmp_path / "nowhere")


def test_damaged_step_metadata_does_not_stop_a_restore(tmp_path):
    path = save(tmp_path / "item", {"a": numbers((2,))})
    (path / "_CHECKPOINT_METADATA").write_text("{")

    assert read_metadata(path).step_metadata == {}


def test_a_process_that_may_start_no_thread_is_told_so(tmp_path, monkeypatch):
    path = save(
        tmp_path / "item", {f"layer_{at}": np.ones(2) for at in range(70)}, DiskFormat(False, False, True)
    )

    def refuse(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RestoreError, match="item cannot be read: this process may have no more threads"):
        read_metadata(path)
