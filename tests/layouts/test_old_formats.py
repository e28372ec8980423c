"""Every format on disk that Orbax has written: older versions' own files, and today's by its options."""

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from orbax_nnx_handler import plan_restore, restore
from orbax_nnx_handler.planning.core.errors import NotACheckpointError
from orbax_nnx_handler.storage.checkpoint.metadata import read_metadata
from tests.layouts.formats import OLD, OPTIONS, VERSIONS
from tests.layouts.old.write import tree


def target(sharding: Any = None) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree())


def written(directory: Path, **options: Any) -> Path:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
        checkpointer.save(directory, tree())
    return directory


def assert_holds_the_tree(found: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, tree())
    assert jax.tree.map(lambda leaf: leaf.dtype, found) == jax.tree.map(lambda leaf: leaf.dtype, tree())


@pytest.mark.parametrize("version", VERSIONS)
def test_files_of_an_older_orbax_are_restored(version: str) -> None:
    found = restore(OLD / version, target(), unexpected="error")

    assert_holds_the_tree(found)


@pytest.mark.parametrize(("version", "disk_format"), VERSIONS.items())
def test_files_of_an_older_orbax_are_recognised(version: str, disk_format: str) -> None:
    assert read_metadata(OLD / version).disk_format == disk_format


@pytest.mark.filterwarnings("ignore:Sharding info not provided when restoring")
@pytest.mark.parametrize("version", VERSIONS)
def test_orbax_itself_reads_the_same(version: str) -> None:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        by_orbax = checkpointer.restore(OLD / version)

    found = restore(OLD / version, target())

    values = zip(jax.tree.leaves(by_orbax), jax.tree.leaves(found), strict=True)
    assert all(np.array_equal(theirs, ours) for theirs, ours in values)


@pytest.mark.parametrize("version", ["orbax_0.2.3/msgpack", "orbax_0.2.3/mixed"])
def test_values_of_a_msgpack_file_are_placed_shard_by_shard(mesh: Mesh, version: str) -> None:
    sharding = NamedSharding(mesh, PartitionSpec(None, ("fsdp")))
    wanted = {"params": {"dense": {"kernel": jax.ShapeDtypeStruct((3, 4), np.float32, sharding=sharding)}}}

    found = restore(OLD / version, wanted, unexpected="ignore")["params"]["dense"]["kernel"]

    assert found.sharding == sharding
    np.testing.assert_array_equal(found, tree()["params"]["dense"]["kernel"])


@pytest.mark.parametrize(("disk_format", "options"), OPTIONS.items())
@pytest.mark.parametrize("has_tree", [True, False], ids=["", "without _METADATA"])
def test_each_of_todays_formats_is_restored(
    tmp_path: Path, disk_format: str, options: dict[str, bool], has_tree: bool
) -> None:
    directory = written(tmp_path / "item", **options)
    if not has_tree:
        (directory / "_METADATA").unlink()

    found = restore(directory, target(), unexpected="error")

    assert read_metadata(directory).disk_format == disk_format
    assert_holds_the_tree(found)


def test_a_directory_of_arrays_without_any_tree_is_restored(tmp_path: Path) -> None:
    directory = shutil.copytree(OLD / "orbax_0.2.3/zarr", tmp_path / "item")
    (directory / "checkpoint").unlink()

    found = restore(directory, target(), unexpected="error")

    assert_holds_the_tree(found)


def test_a_database_and_directories_side_by_side_are_restored(tmp_path: Path) -> None:
    directory = shutil.copytree(OLD / "orbax_0.4.2/ocdbt", tmp_path / "item")
    name = "params.dense.kernel"
    shutil.copytree(OLD / "orbax_0.2.3/zarr" / name, directory / name)
    database = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{directory}/"}).result()
    database.delete_range(ts.KvStore.KeyRange(f"{name}/", f"{name}0")).result()

    found = restore(directory, target(), unexpected="error")

    assert read_metadata(directory).disk_format == "ocdbt+zarr and zarr"
    assert_holds_the_tree(found)


def test_an_array_that_the_tree_names_and_nothing_holds_is_missed(tmp_path: Path) -> None:
    directory = shutil.copytree(OLD / "orbax_0.2.3/zarr", tmp_path / "item")
    shutil.rmtree(directory / "params.dense.kernel")

    plan = plan_restore(directory, target())

    assert ("params", "dense", "kernel") in plan.missing


def test_a_checkpoint_file_of_another_program_is_named(tmp_path: Path) -> None:
    directory = shutil.copytree(OLD / "orbax_0.2.3/zarr", tmp_path / "item")
    (directory / "checkpoint").write_text("step: 3")

    with pytest.raises(NotACheckpointError, match="/item/checkpoint is no msgpack file of a checkpoint: "):
        plan_restore(directory, target())
