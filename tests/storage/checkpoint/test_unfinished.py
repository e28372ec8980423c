"""A save that was not finished is refused from every path that leads to it; its leftovers are no steps."""

import json
import pathlib
import re
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from orbax.checkpoint import path as ocp_path
from safetensors.numpy import save_file

from orbax_nnx_handler import NotACheckpointError, UnreadableLeafError, restore
from orbax_nnx_handler.storage.checkpoint.find import find_item
from orbax_nnx_handler.storage.checkpoint.metadata import read_metadata
from orbax_nnx_handler.storage.checkpoint.wrong_paths import interrupted
from orbax_nnx_handler.storage.converting import Conversion, write_converted
from orbax_nnx_handler.storage.converting.blocks import as_stored
from orbax_nnx_handler.storage.reading import check_one_save, read_values
from orbax_nnx_handler.storage.stores.locations import as_path
from tests.processes import Forked
from tests.storage.checkpoints import FORMATS, DiskFormat, as_remote, save
from tests.storage.stores.fake_store import files_of

FILES = DiskFormat(False, False, False)
TREE = {"a": np.full((3,), 1.0, np.float32), "b": np.full((3,), 2.0, np.float32)}
TARGET = {name: jax.ShapeDtypeStruct((3,), jnp.float32) for name in TREE}


def manager_root(root, steps=(1,)):
    """Saves with commit files on a local disk, as a store without renames has them."""
    options = ocp.CheckpointManagerOptions(temporary_path_class=ocp_path.atomicity.CommitFileTemporaryPath)
    with ocp.CheckpointManager(root, options=options) as manager:
        for step in steps:
            manager.save(step, args=ocp.args.PyTreeSave(TREE))
    return root


def uncommitted(root, step=1):
    """Takes away what an interrupted save has not written yet: the marks of step and item."""
    for file in (root / str(step)).rglob("commit_success.txt"):
        file.unlink()
    file = root / str(step) / "_CHECKPOINT_METADATA"
    text = file.read_text()
    value = text.partition('"commit_timestamp_nsecs": ')[2].partition(",")[0].partition("}")[0]
    file.write_text(text.replace(f'"commit_timestamp_nsecs": {value}', '"commit_timestamp_nsecs": null'))
    return root


@pytest.mark.parametrize("path", ["", "1", "1/default"])
def test_a_save_without_its_mark_is_refused_from_root_step_and_item(tmp_path, path):
    root = uncommitted(manager_root(tmp_path / "run"))

    with pytest.raises(NotACheckpointError) as raised:
        restore(root / path, TARGET)

    message = str(raised.value)
    assert "default is an item" not in message
    if path:
        assert message == (
            f"{root / '1'} is a save that was interrupted: it has no commit_success.txt.\n"
            "hint: no finished step lies beside it: the job has to save again."
        )


@pytest.mark.parametrize("path", ["2", "2/default"])
def test_a_save_without_its_mark_leads_to_the_finished_step_beside_it(tmp_path, path):
    root = uncommitted(manager_root(tmp_path / "run", (1, 2)), 2)

    assert find_item(root) == epath.Path(root / "1" / "default")
    with pytest.raises(NotACheckpointError, match=f"the newest finished step is {root / '1'}"):
        restore(root / path, TARGET)


def test_a_finished_save_with_marks_is_restored(tmp_path):
    root = manager_root(tmp_path / "run")

    assert restore(root, TARGET)["b"].tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("removed", "refused"),
    [
        ((), False),
        (("run/1/commit_success.txt",), True),
        (("run/1/default/commit_success.txt",), False),
        (("run/1/commit_success.txt", "run/1/default/commit_success.txt"), True),
        (
            ("run/1/commit_success.txt", "run/1/default/commit_success.txt", "run/1/_CHECKPOINT_METADATA"),
            True,
        ),
    ],
)
def test_in_a_bucket_the_mark_alone_says_that_a_save_is_whole(tmp_path, removed, refused):
    manager_root(tmp_path / "run")
    for name in removed:
        (tmp_path / name).unlink()

    for path in ("run/1", "run/1/default"):
        files, _ = files_of(tmp_path)
        if refused:
            with pytest.raises(NotACheckpointError, match="is a save that was interrupted"):
                read_metadata(find_item(f"gs://bucket/{path}", files=files), files)
        else:
            assert len(read_metadata(find_item(f"gs://bucket/{path}", files=files), files).leaves) == 2


def test_an_item_that_was_saved_by_itself_into_a_bucket_is_named_where_its_step_has_no_mark(tmp_path):
    manager_root(tmp_path / "run")
    for name in ("commit_success.txt", "_CHECKPOINT_METADATA"):
        (tmp_path / "run" / "1" / name).unlink()

    files, _ = files_of(tmp_path)
    with pytest.raises(NotACheckpointError, match="holds only a save that was interrupted: 1") as raised:
        find_item("gs://bucket/run", files=files)

    [hint] = raised.value.hints
    assert hint.words == (
        "gs://bucket/run/1/default was finished by itself: pass that, unless a manager was to write more."
    )
    files, _ = files_of(tmp_path)
    item = find_item(hint.arguments["path"], files=files)
    assert len(read_metadata(item, files).leaves) == 2


def test_without_a_tree_an_absent_chunk_is_a_loss_and_never_zeros(tmp_path):
    path = save(tmp_path / "item", TREE, FILES)
    (path / "_METADATA").unlink()
    shutil.rmtree(path / "b" / "0", ignore_errors=True)
    (path / "b" / "0").unlink(missing_ok=True)

    with pytest.raises(UnreadableLeafError, match="b"):
        restore(path, TARGET, policy="warn")


@pytest.mark.parametrize("path", ["run", "run/1", "run/1/default"])
@pytest.mark.parametrize(
    "written",
    [
        ("1/_CHECKPOINT_METADATA", "1/default/ocdbt.process_0/d/1a2b"),
        ("1/_CHECKPOINT_METADATA", "1/default/_sharding"),
        ("1/default/array_metadatas/process_0",),
        ("1/default/_CHECKPOINT_METADATA",),
        ("1/default/ocdbt.process_0/manifest.ocdbt", "1/default/d/1a2b"),
    ],
)
def test_in_a_bucket_a_save_that_ended_before_its_tree_is_called_one(tmp_path, written, path):
    finished = manager_root(tmp_path / "other")
    for name in written:
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text((finished / "1" / "_CHECKPOINT_METADATA").read_text())

    files, _ = files_of(tmp_path)
    with pytest.raises(NotACheckpointError) as raised:
        find_item(f"gs://bucket/{path}", files=files)

    assert re.search("(is|holds only) a save that was interrupted", str(raised.value))
    assert raised.value.hints[0].words.startswith("no finished step lies beside it")


def test_beside_a_step_whose_item_has_no_mark_the_finished_steps_are_named(tmp_path):
    # A manager deletes an old step file by file; the step's own mark may be the last to go.
    root = manager_root(tmp_path / "run", steps=(2, 4, 6))
    (root / "2" / "default" / "commit_success.txt").unlink()

    error = interrupted(as_path("gs://bucket/run/2/default"), files_of(tmp_path)[0])

    assert "a save that was interrupted: it has no commit_success.txt" in str(error)
    assert error.hints[0].words == "the newest finished step is gs://bucket/run/6."


def test_in_a_finished_step_of_a_bucket_an_item_without_arrays_is_no_interrupted_save(tmp_path):
    root = manager_root(tmp_path / "run")
    (root / "1" / "iter").mkdir()
    (root / "1" / "iter" / "_CHECKPOINT_METADATA").write_text(
        (root / "1" / "_CHECKPOINT_METADATA").read_text()
    )
    (root / "1" / "iter" / "process_0-of-1.json").write_text("{}")

    files, _ = files_of(tmp_path)
    with pytest.raises(
        NotACheckpointError, match=r"is no Orbax checkpoint; it holds: _CHECK.*process_0-of-1\.json"
    ):
        find_item("gs://bucket/run/1/iter", files=files)


def test_in_a_bucket_a_finished_step_below_a_directory_makes_no_interrupted_save_of_it(tmp_path):
    root = manager_root(tmp_path / "runs")
    shutil.move(root / "1", root / "best")

    files, _ = files_of(tmp_path)
    with pytest.raises(NotACheckpointError, match="gs://bucket/runs is no Orbax checkpoint; it holds: best"):
        find_item("gs://bucket/runs", files=files)


@pytest.mark.parametrize(
    ("disk_format", "shares_files"), [(FILES, True), (DiskFormat(True, True, True), False)]
)
def test_a_save_into_the_files_that_are_read_is_an_error_and_no_mixture(tmp_path, disk_format, shares_files):
    old, new = (
        save(tmp_path / name / "default", {key: value + add for key, value in TREE.items()}, disk_format)
        for name, add in (("old", 0), ("new", 10))
    )
    for number, step in enumerate((old.parent, new.parent)):
        note = {"init_timestamp_nsecs": number, "commit_timestamp_nsecs": number + 1}
        (step / "_CHECKPOINT_METADATA").write_text(json.dumps(note))

    def save_again(_):
        shutil.copytree(new.parent, old.parent, dirs_exist_ok=True)

    if shares_files:
        with pytest.raises(
            UnreadableLeafError, match="default was saved again, or deleted, while it was read"
        ) as raised:
            restore(old, TARGET, progress=save_again)
        assert raised.value.hints[0].words.startswith("restore again once nothing is written there")
        assert restore(old, TARGET)["a"].tolist() == [11, 11, 11]
    else:
        assert restore(old, TARGET, progress=save_again)["a"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("kind", [*(str(one) for one in FORMATS if not one.ocdbt), "npz", "safetensors"])
def test_files_without_a_note_of_their_save_that_change_while_they_are_read_are_an_error(tmp_path, kind):
    formats = {str(one): one for one in FORMATS}
    old, new = ({name: value + add for name, value in TREE.items()} for add in (0, 10))
    paths = []
    for name, tree in (("old", old), ("new", new)):
        (tmp_path / name).mkdir()
        path = tmp_path / name / (f"weights.{kind}" if kind not in formats else "item")
        if kind == "npz":
            np.savez(path, **tree)
        elif kind == "safetensors":
            save_file(tree, path)
        else:
            save(path, tree, formats[kind])
            for note in path.rglob("_CHECKPOINT_METADATA"):
                note.unlink()
        paths.append(path)

    def save_again(_):
        if paths[0].is_dir():
            shutil.copytree(paths[1], paths[0], copy_function=shutil.copyfile, dirs_exist_ok=True)
        else:
            shutil.copyfile(paths[1], paths[0])

    checkpoint = read_metadata(paths[0])
    conversion = Conversion(source=checkpoint, leaves=list(as_stored(checkpoint).values()))
    with pytest.raises(UnreadableLeafError, match="was saved again, or deleted, while it was read"):
        write_converted(conversion, tmp_path / "converted", memory_bytes=None, progress=save_again)
    assert not (tmp_path / "converted").exists()
    with pytest.raises(UnreadableLeafError, match="was saved again, or deleted, while it was read"):
        restore(paths[0], TARGET, progress=save_again)
    assert restore(paths[0], TARGET)["a"].tolist() == [11, 11, 11]


@pytest.mark.parametrize("disk_format", [one for one in FORMATS if not one.ocdbt], ids=str)
def test_objects_that_change_after_they_were_read_are_an_error(tmp_path, disk_format):
    old, new = (
        save(tmp_path / name, {key: value + add for key, value in TREE.items()}, disk_format)
        for name, add in (("old", 0), ("new", 10))
    )
    for note in tmp_path.rglob("_CHECKPOINT_METADATA"):
        note.unlink()

    def change(name):
        for file in (new / name).rglob("*"):
            if file.is_file():
                # As a bucket does it: at once, and under another version.
                shutil.copyfile(file, tmp_path / "whole")
                (tmp_path / "whole").replace(old / file.relative_to(new))

    checkpoint = as_remote(read_metadata(old), listed=False)
    assert read_values(checkpoint, [("a",)])[("a",)].tolist() == [1, 1, 1]
    check_one_save(checkpoint)
    change("b")
    check_one_save(checkpoint)  # Nobody read it.
    change("a")
    with pytest.raises(UnreadableLeafError, match="was saved again, or deleted, while it was read"):
        check_one_save(checkpoint)
    again = as_remote(read_metadata(old), listed=False)
    assert read_values(again, [("a",)])[("a",)].tolist() == [11, 11, 11]
    check_one_save(again)
    shutil.rmtree(old / "a")
    with pytest.raises(UnreadableLeafError, match="was saved again, or deleted, while it was read"):
        check_one_save(again)


def test_the_database_of_one_process_is_no_step_and_no_item(tmp_path):
    item = save(tmp_path / "1" / "default", TREE, DiskFormat(True, True, True))
    for name in ("manifest.ocdbt", "_METADATA"):
        (item / name).unlink()

    for path in (item, item / "ocdbt.process_0"):
        with pytest.raises(NotACheckpointError) as raised:
            restore(path, TARGET)
        assert "is an item; pass that" not in str(raised.value)


@pytest.mark.parametrize(
    "name",
    [
        "4_bak_20240101",
        "before_lr_change_10",
        "3.converting-815",
        "backup-99",
        "4.tmp-99",
        "run.5",
        "ocdbt.process_77",
    ],
)
def test_a_copy_or_a_leftover_beside_steps_is_no_step(tmp_path, name):
    for step in ("4", "5"):
        save(tmp_path / step / "default", TREE)
    shutil.copytree(tmp_path / "4", tmp_path / name)

    assert find_item(tmp_path) == epath.Path(tmp_path / "5" / "default")


@pytest.mark.parametrize(
    "names", [("0004", "0012"), ("step_4", "step_12"), ("ckpt_0004", "ckpt_0012"), ("9", "10")]
)
def test_the_newest_step_is_found_by_any_name_that_orbax_gives(tmp_path, names):
    for name in names:
        save(tmp_path / name / "default", TREE)

    assert find_item(tmp_path) == epath.Path(tmp_path / names[1] / "default")


def test_steps_of_two_kinds_of_names_are_a_question(tmp_path):
    for name in ("step_4", "best_9"):
        save(tmp_path / name / "default", TREE)
    (tmp_path / "log_70").mkdir()

    with pytest.raises(NotACheckpointError) as raised:
        find_item(tmp_path)

    assert str(raised.value) == (
        f"{tmp_path} holds steps of several kinds of names: best_*, step_*.\n"
        f"hint: pass one step, such as {tmp_path / 'best_9'}."
    )


KILLED = """
import sys, jax.numpy as jnp, orbax.checkpoint as ocp
from orbax.checkpoint import path as ocp_path
options = ocp.CheckpointManagerOptions(temporary_path_class=ocp_path.atomicity.CommitFileTemporaryPath)
tree = {f"w{i}": jnp.full((64, 64), 2.0) for i in range(120)}
handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
manager = ocp.CheckpointManager(sys.argv[1], options=options, item_handlers=handler)
manager.save(1, args=ocp.args.PyTreeSave(tree))
manager.wait_until_finished()
"""


@pytest.mark.parametrize("after", [3, 60, 119])
def test_a_save_that_was_killed_is_refused_or_whole(tmp_path, after):
    root = tmp_path / "run"
    target = {f"w{i}": jax.ShapeDtypeStruct((64, 64), jnp.float32) for i in range(120)}
    deadline = time.monotonic() + 60
    process = Forked(KILLED, str(root))
    # Killed when so many arrays have been begun: the rest, tree and marks are not there.
    while len(list(root.glob("1/default/w*"))) < after and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() in (0, -signal.SIGKILL), process.stderr

    finished = (root / "1" / "commit_success.txt").exists()
    for path in (root, root / "1", root / "1" / "default"):
        if finished:
            values = restore(path, target)
            assert all(float(value.min()) == float(value.max()) == 2.0 for value in values.values())
        else:
            with pytest.raises(NotACheckpointError):
                restore(path, target, policy="warn")


@pytest.mark.parametrize("of_step", [True, False])
def test_a_save_that_ended_while_the_note_of_its_beginning_was_empty_is_refused(tmp_path, of_step):
    item = save(tmp_path / "run" / "1" / "default", TREE, FILES)
    note = item.parent / "_CHECKPOINT_METADATA" if of_step else item / "_CHECKPOINT_METADATA"
    note.write_text("")
    assert restore(item, TARGET)["a"].tolist() == [1, 1, 1]  # The tree is there: only the note is damaged.

    for name in ("_METADATA", "commit_success.txt"):
        (item / name).unlink()
    shutil.rmtree(item / "b")

    for path in (tmp_path / "run", item.parent, item):
        with pytest.raises(NotACheckpointError, match="is a save that was interrupted"):
            restore(path, TARGET, policy="warn")


def test_damage_of_a_leaf_is_no_missing_leaf_under_a_rule_and_any_policy(tmp_path):
    tree = {"params": {f"l_{at}": {"w": np.full((4, 3), 5.0, np.float32)} for at in range(3)}}
    path = save(tmp_path / "item", tree, FILES)
    file = pathlib.Path(path) / "params.l_1.w" / ".zarray"
    file.write_bytes(file.read_bytes()[:40])
    target = {"l": {"kernel": jax.ShapeDtypeStruct((3, 4, 3), jnp.float32)}}

    for policy in ("error", "warn", "init"):
        with pytest.raises(UnreadableLeafError) as raised:
            restore(
                path, target, policy=policy, renames=[("l_{i}/w", "l_{i}/kernel")],
                init=lambda: {"l": {"kernel": jnp.full((3, 4, 3), 9.0)}},
            )  # fmt: skip
        assert ("params", "l_1", "w") in raised.value.paths
