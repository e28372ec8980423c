"""How often a store is asked before a verdict, and how many of the questions wait for an answer."""

import re
import shutil

import numpy as np
import pytest
from etils import epath

from benchmarks.simulate import TOY
from benchmarks.skeleton import Hosts, train_state, write
from orbax_nnx_handler import NotACheckpointError
from orbax_nnx_handler.storage.checkpoint.find import find_item
from orbax_nnx_handler.storage.checkpoint.metadata import read_metadata
from orbax_nnx_handler.storage.checkpoint.wrong_paths import damaged
from orbax_nnx_handler.storage.stores import files as stored_files
from orbax_nnx_handler.storage.stores.files import ReadFile, Sizes
from tests.storage.checkpoints import DiskFormat, save
from tests.storage.stores.fake_store import files_of

OCDBT, ZARR = DiskFormat(True, True, True), DiskFormat(False, False, True)


def weights(count):
    return {"params": {f"layer_{at}": np.full((2, 2), at, np.float32) for at in range(count)}}


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """A root with forty steps, an item of many leaves, and one with a directory per leaf."""
    folder = tmp_path_factory.mktemp("bucket")
    save(folder / "run" / "1" / "default", weights(3), OCDBT)
    (folder / "run" / "1" / "metrics").mkdir()
    (folder / "run" / "1" / "metrics" / "metrics").write_text("{}")
    (folder / "run" / "1" / "commit_success.txt").touch()
    for step in range(2, 41):
        shutil.copytree(folder / "run" / "1", folder / "run" / str(step))
    save(folder / "many", weights(600), OCDBT)
    save(folder / "zarr", weights(30), ZARR)
    (folder / "logs").mkdir()
    (folder / "logs" / "log.txt").touch()
    return folder


@pytest.fixture(scope="module")
def thousands(bucket, tmp_path_factory):
    """A root with 2,500 steps, of which nothing but the newest need be looked into."""
    folder = tmp_path_factory.mktemp("thousands")
    for step in range(1, 2_500):
        (folder / str(step)).mkdir()
        (folder / str(step) / "commit_success.txt").touch()
    shutil.copytree(bucket / "run" / "1", folder / "2500")
    return folder


def look(folder, path, **options):
    files, bucket = files_of(folder, **options)
    directory = find_item(f"gs://bucket/{path}".rstrip("/"), files=files)
    return read_metadata(directory, files), bucket


@pytest.mark.parametrize(
    ("path", "leaves", "requests", "trips"),
    [
        ("run/7/default", 3, 15, 5),
        ("many", 600, 15, 5),
        ("run/7", 3, 16, 6),
        ("run", 3, 20, 8),
        ("zarr", 30, 15 + 30, 5),
    ],
)
def test_a_verdict_takes_few_requests_and_few_trips(bucket, path, leaves, requests, trips):
    checkpoint, asked = look(bucket, path)

    assert len(checkpoint.leaves) == leaves
    assert asked.requests <= requests
    assert asked.trips <= trips


def test_a_database_without_its_manifest_is_not_asked_for_leaf_by_leaf(bucket, tmp_path):
    shutil.copytree(bucket / "many", tmp_path / "many")
    (tmp_path / "many" / "manifest.ocdbt").unlink()

    checkpoint, asked = look(tmp_path, "many")

    assert len(checkpoint.broken.lost) == 600
    assert asked.requests <= 15


def test_of_a_root_the_newest_step_is_taken_and_no_other_is_looked_into(bucket):
    checkpoint, asked = look(bucket, "run")

    assert str(checkpoint.directory) == "gs://bucket/run/40/default"
    assert not [question for question in asked.asked if "/39" in question.path]


@pytest.mark.parametrize(
    ("path", "requests", "trips"), [("", 20 + 2, 8 + 2), ("2500", 16, 6), ("2500/default", 15, 5)]
)
def test_a_root_of_thousands_of_steps_costs_the_pages_of_its_listing(thousands, path, requests, trips):
    checkpoint, asked = look(thousands, path)

    assert str(checkpoint.directory) == "gs://bucket/2500/default"
    assert asked.requests <= requests
    assert asked.trips <= trips
    assert not [question for question in asked.asked if "/2499" in question.path]


@pytest.mark.parametrize("path", ["2501", "2500/deflt", "2500/default/params", "log"])
def test_a_wrong_path_beside_thousands_of_steps_is_explained_in_few_requests(thousands, path):
    files, asked = files_of(thousands)

    with pytest.raises(NotACheckpointError):
        find_item(f"gs://bucket/{path}", files=files)

    assert asked.requests <= 20 + 2


def test_an_item_of_thousands_of_directories_costs_the_pages_of_its_listing(bucket, tmp_path):
    shutil.copytree(bucket / "zarr", tmp_path / "zarr")
    for name in range(2_500):
        (tmp_path / "zarr" / f"left_over_{name}").touch()

    checkpoint, asked = look(tmp_path, "zarr")

    assert len(checkpoint.leaves) == 30
    assert asked.requests <= 15 + 30 + 2
    assert asked.trips <= 5 + 2


@pytest.mark.parametrize(("left", "requests", "trips"), [(39, 18, 8), (37, 20, 8), (25, 54, 10), (1, 60, 11)])
def test_the_marks_of_steps_without_any_are_asked_for_together(bucket, tmp_path, left, requests, trips):
    shutil.copytree(bucket / "run", tmp_path / "run")
    for step in range(left + 1, 41):
        (tmp_path / "run" / str(step) / "commit_success.txt").unlink()

    checkpoint, asked = look(tmp_path, "run")

    assert str(checkpoint.directory) == f"gs://bucket/run/{left}/default"
    assert asked.requests <= requests
    assert asked.trips <= trips


def test_a_newest_step_without_its_mark_leads_to_the_one_before(bucket, tmp_path):
    shutil.copytree(bucket / "run", tmp_path / "run")
    (tmp_path / "run" / "40" / "commit_success.txt").unlink()

    checkpoint, asked = look(tmp_path, "run")

    assert str(checkpoint.directory) == "gs://bucket/run/39/default"
    assert asked.requests <= 22


@pytest.mark.parametrize(
    ("path", "mark"),
    [("run", "run/40/commit_success.txt"), ("run/40/default", "run/40/default/commit_success.txt")],
)
def test_a_mark_that_cannot_be_read_is_an_error_and_leads_to_no_older_step(bucket, path, mark):
    with pytest.raises(NotACheckpointError, match=re.escape(f"{mark} cannot be read: 403")):
        look(bucket, path, forbidden=(f"gs://bucket/{mark}",))


@pytest.mark.parametrize(
    "path", ["logs", "typo", "run/99", "run/7/deflt", "many/params/x", "no/such/run", "run/7/metrics"]
)
def test_a_wrong_path_is_explained_in_few_requests_and_never_above_the_bucket(bucket, path):
    files, asked = files_of(bucket)

    with pytest.raises(NotACheckpointError):
        find_item(f"gs://bucket/{path}", files=files)

    assert asked.requests <= 20
    assert {question.path for question in asked.asked} >= {f"gs://bucket/{path}"}


@pytest.fixture(scope="module")
def experiments(bucket, tmp_path_factory):
    """What lies above roots: one with many steps, ten runs, items without a step, folders of no use."""
    folder = tmp_path_factory.mktemp("experiments")
    for number in range(300):
        shutil.copytree(bucket / "run" / "1", folder / "one" / "run" / str(number + 1))
    for number in range(10):
        shutil.copytree(bucket / "run" / "1", folder / "many" / f"run{number}" / "10")
    for number in range(30):
        shutil.copytree(bucket / "run" / "1" / "default", folder / "items" / f"item{number}")
        (folder / "junk" / f"a{number}" / "b").mkdir(parents=True)
        (folder / "junk" / f"a{number}" / "b" / "log.txt").touch()
    return folder


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("one", "hint: gs://bucket/one/run is a manager's root; pass that."),
        ("many", "hint: gs://bucket/many/run0 is a manager's root; pass that, or another of its folders."),
        ("items", "hint: pass item='item0', or the path of one of them."),
        ("junk", "hint: "),
        ("one/ran", "hint: did you mean gs://bucket/one/run?"),
        ("many/runx", "hint: gs://bucket/many holds: run0, run1,"),
        ("junk/a3/b/c/d/e/f", "hint: gs://bucket/junk/a3/b holds: log.txt."),
    ],
)
def test_a_path_above_roots_is_explained_in_few_requests_whatever_lies_below(experiments, path, said):
    files, asked = files_of(experiments)

    with pytest.raises(NotACheckpointError) as raised:
        find_item(f"gs://bucket/{path}", files=files)

    assert said in str(raised.value)
    assert asked.requests <= 20
    assert asked.trips <= 12


def test_the_bucket_itself_is_explained_in_few_requests(experiments):
    files, asked = files_of(experiments)

    with pytest.raises(NotACheckpointError):
        find_item("gs://bucket", files=files)

    assert asked.requests <= 20


def test_an_item_of_an_unfinished_step_is_no_wrong_name(bucket, tmp_path):
    shutil.copytree(bucket / "run" / "1", tmp_path / "run" / "7")
    (tmp_path / "run" / "7" / "commit_success.txt").unlink()
    files, _ = files_of(tmp_path)

    with pytest.raises(NotACheckpointError, match="holds only a save that was interrupted: 7"):
        find_item("gs://bucket/run", "ema", files=files)


def test_a_hint_is_a_url(bucket):
    files, _ = files_of(bucket)

    with pytest.raises(NotACheckpointError) as raised:
        find_item("gs://bucket/run/99", files=files)

    assert str(raised.value) == (
        "there is nothing at gs://bucket/run/99.\n"
        "hint: gs://bucket/run holds the steps 33, 34, 35, 36, 37, 38, 39, 40 and 32 older ones."
    )


def test_what_the_store_refuses_near_a_wrong_path_does_not_hide_what_is_wrong(bucket):
    files, _ = files_of(bucket, forbidden=("gs://bucket/run",))

    with pytest.raises(NotACheckpointError, match="gs://bucket/run cannot be read: 403"):
        find_item("gs://bucket/run", files=files)
    with pytest.raises(NotACheckpointError, match=r"there is nothing at gs://bucket/typo/x"):
        find_item("gs://bucket/typo/x", files=files)


def test_a_refused_file_of_one_array_is_the_store_s_refusal_and_no_damage(bucket):
    with pytest.raises(NotACheckpointError, match=r"layer_7/\.zarray cannot be read: 403") as raised:
        look(bucket, "zarr", forbidden=("layer_7/.zarray",))

    assert "copy it again" not in str(raised.value)


def test_where_nobody_may_look_around_a_damaged_file_is_to_be_copied_again(bucket):
    files, _ = files_of(bucket, forbidden=("gs://bucket/run",))

    hint = damaged(epath.Path("gs://bucket/run/7/default/_METADATA"), files)

    assert hint.words.startswith("copy it again from where it was written")


def test_a_step_file_that_cannot_be_read_is_done_without(bucket):
    checkpoint, _ = look(bucket, "run/7/default", forbidden=("_CHECKPOINT_METADATA",))

    assert len(checkpoint.leaves) == 3


def test_files_are_listed_with_their_sizes_only_where_there_is_a_database(bucket):
    _, asked = look(bucket, "zarr")

    assert not [question for question in asked.asked if isinstance(question, Sizes)]


def test_a_question_is_asked_once(bucket):
    files, asked = files_of(bucket)
    for _ in range(3):
        assert files.exists(epath.Path("gs://bucket/run"))
        assert not files.exists(epath.Path("gs://bucket/run/99"))

    assert asked.requests == 2


@pytest.mark.parametrize("save_archive", [np.savez, np.savez_compressed])
def test_the_headers_of_an_archive_are_fetched_together(tmp_path, save_archive):
    arrays = {f"params/w{at}": np.full((30, 20), at, np.float32) for at in range(50)}
    with (tmp_path / "a.npz").open("wb") as file:
        save_archive(file, **arrays)

    checkpoint, asked = look(tmp_path, "a.npz")

    assert {path: leaf.shape for path, leaf in checkpoint.leaves.items()} == {
        ("params", f"w{at}"): (30, 20) for at in range(50)
    }
    assert asked.trips <= 2
    assert asked.requests <= 3


@pytest.mark.parametrize("side", [200, 20])
def test_large_members_of_an_archive_stay_where_they_are_and_small_ones_come_with_their_headers(
    tmp_path, side
):
    arrays = {f"w{at}": np.random.default_rng(at).normal(size=(side, side)) for at in range(40)}
    np.savez(tmp_path / "a.npz", **arrays)

    checkpoint, asked = look(tmp_path, "a.npz")

    held = [value for value in checkpoint.arrays["w0",].store.catalog.values() if isinstance(value, bytes)]
    fetched = sum(
        min(each.size, (tmp_path / "a.npz").stat().st_size)
        for each in asked.asked
        if each.path.endswith("npz") and isinstance(each, ReadFile)
    )
    assert len(held) == (40 if side == 20 else 3)
    assert fetched < 1.1 * (1 << 20) + 40 * (8 << 10)


def test_a_large_file_is_read_in_runs_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setattr(stored_files, "_LONGEST_RUN", 1000)
    content = np.random.default_rng(0).bytes(12_345)
    (tmp_path / "checkpoint_3").write_bytes(content)
    files, asked = files_of(tmp_path)
    path = epath.Path("gs://bucket/checkpoint_3")
    assert files.is_file(path)
    (tmp_path / "checkpoint_3").write_bytes(content + b"more")

    assert files.content(path) == content + b"more"
    assert (asked.trips, asked.requests) == (2, 14)


def test_the_files_of_many_processes_are_listed_in_parts_at_once(tmp_path):
    item = write(tmp_path / "item", train_state(TOY, stacked=True), Hosts(count=8, devices=1))
    for process in range(8, 128):
        (item / f"ocdbt.process_{process}").mkdir()
        (item / f"ocdbt.process_{process}" / "manifest.ocdbt").touch()
    files, asked = files_of(tmp_path)

    checkpoint = read_metadata(epath.Path("gs://bucket/item"), files)

    assert checkpoint.damaged == {}
    stores = [array.store for array in checkpoint.arrays.values()]
    names = {str(file.relative_to(item)) for file in item.rglob("*") if file.is_file()}
    assert stores[0].sizes.keys() == {name for name in names if name.startswith(("d/", "ocdbt.process_"))}
    listings = [question for question in asked.asked if isinstance(question, Sizes)]
    assert len(listings) == 11
    assert asked.trips <= 5
