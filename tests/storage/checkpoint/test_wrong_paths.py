"""A path that is no checkpoint is called what it is, and the one that was probably meant is named."""

import pathlib
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from flax import nnx

from orbax_nnx_handler import NotACheckpointError, plan_restore, restore
from orbax_nnx_handler.planning.core.errors import UnreadableLeafError
from orbax_nnx_handler.storage.checkpoint.find import find_item
from orbax_nnx_handler.storage.stores import backends
from tests.gallery.models import save


@pytest.fixture
def run(tmp_path: pathlib.Path) -> pathlib.Path:
    """A manager's root with two finished steps and one that was interrupted."""
    tree = {"params": {"scale": np.zeros(3, np.float32)}}
    for step in ("100", "200"):
        save(tmp_path / "run" / step / "default", tree)
    (tmp_path / "run" / "300.orbax-checkpoint-tmp-17" / "default").mkdir(parents=True)
    return tmp_path / "run"


def said(path: pathlib.Path, root: pathlib.Path, item: str | None = None) -> str:
    with pytest.raises(NotACheckpointError) as caught:
        find_item(path, item)
    return str(caught.value).replace(str(root), "RUN")


def test_an_unfinished_save_is_passed_over(run):
    assert find_item(run) == epath.Path(run / "200" / "default")


def test_an_unfinished_save_named_outright_leads_to_the_newest_finished_step(run):
    assert said(run / "300.orbax-checkpoint-tmp-17", run) == (
        "RUN/300.orbax-checkpoint-tmp-17 is a save that was interrupted.\n"
        "hint: the newest finished step is RUN/200."
    )


def test_a_step_that_does_not_exist_leads_to_those_that_do(run):
    assert said(run / "150", run) == "there is nothing at RUN/150.\nhint: RUN holds the steps 100, 200."


def test_a_misspelt_directory_leads_to_the_one_of_the_nearest_name(run):
    assert said(run.parent / "rum", run.parent) == "there is nothing at RUN/rum.\nhint: did you mean RUN/run?"


def test_an_item_that_the_step_has_not_leads_to_the_one_it_has(run):
    assert said(run, run, item="items") == (
        "RUN/200 has no item 'items'; it holds: default.\nhint: pass item='default'."
    )


def test_another_item_than_the_one_that_a_path_is_is_named_by_the_step_that_holds_it_or_not_at_all(run):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(run / "200" / "teacher", {"params": np.ones(3)})

    assert said(run / "200" / "default", run, item="teacher") == (
        "RUN/200/default is an item already, and item='teacher' is another.\n"
        "hint: pass the step RUN/200 for its item 'teacher', or leave the item's name out."
    )
    assert said(run / "200" / "default", run, item="student") == (
        "RUN/200/default is an item already, and item='student' is another.\n"
        "hint: leave the item's name out; another checkpoint's item is named in its path, STEP/student."
    )


def test_a_path_below_an_item_leads_to_the_item(run):
    assert said(run / "200" / "default" / "params" / "scale", run) == (
        "there is nothing at RUN/200/default/params/scale.\n"
        "hint: RUN/200/default is an item directory; pass that."
    )


def test_a_directory_with_nothing_near_it_gets_no_guess(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)

    assert said(tmp_path / "a" / "b", tmp_path) == (
        "RUN/a/b is an empty directory.\n"
        "hint: pass a CheckpointManager's root, one of its steps, or an item in a step."
    )


def test_an_unfinished_save_is_never_restored_though_it_looks_whole(tmp_path):
    whole = save(tmp_path / "run" / "whole", {"params": {"scale": np.zeros(3, np.float32)}})
    whole.rename(tmp_path / "run" / "default.orbax-checkpoint-tmp-17")

    assert said(tmp_path / "run" / "default.orbax-checkpoint-tmp-17", tmp_path / "run") == (
        "RUN/default.orbax-checkpoint-tmp-17 is a save that was interrupted.\n"
        "hint: no finished step lies beside it: the job has to save again."
    )


def test_an_unfinished_item_is_no_item_of_its_step(run):
    (run / "200" / "default").rename(run / "200" / "default.orbax-checkpoint-tmp-17")

    assert said(run, run) == (
        "RUN/200 holds only a save that was interrupted: default.orbax-checkpoint-tmp-17.\n"
        "hint: the newest finished step is RUN/100."
    )


def test_several_runs_below_a_directory_are_all_named(run):
    (run.parent / "other").mkdir()
    run.rename(run.parent / "other" / "first")
    save(run.parent / "other" / "second" / "7" / "default", {"params": {"scale": np.zeros(3, np.float32)}})

    assert said(run.parent, run.parent) == (
        "RUN is no Orbax checkpoint; it holds: other.\n"
        "hint: it holds several managers' roots; pass one of them: other/first, other/second."
    )


def test_a_file_of_an_item_leads_to_the_item(run):
    assert said(run / "200" / "default" / "_METADATA", run) == (
        "RUN/200/default/_METADATA is a file.\nhint: it is a part of the item RUN/200/default; pass that."
    )


def test_an_item_without_arrays_that_was_asked_for_leads_to_the_one_with(run):
    (run / "200" / "metrics").mkdir()

    assert said(run, run, item="metrics") == (
        "RUN/200/metrics is an empty directory.\n"
        "hint: it lies beside the item RUN/200/default; pass that, or the step RUN/200."
    )


def test_a_url_that_pathlib_took_a_slash_from_is_given_back(run):
    assert said(pathlib.Path("gs://bucket/run"), run) == (
        "there is nothing at gs:/bucket/run.\n"
        "hint: pass 'gs://bucket/run', as a string: pathlib takes one of two slashes away."
    )


@pytest.mark.parametrize(
    ("path", "meant"), [("gs:bucket/run", "gs://bucket/run"), ("file:/nowhere/run", "/nowhere/run")]
)
def test_half_a_url_leads_to_what_it_means_and_not_to_the_working_directory(path, meant, run):
    assert said(path, run) == f"there is nothing at {path}.\nhint: pass {meant!r}."


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_store_that_cannot_be_reached_is_no_traceback_of_a_library(scheme, monkeypatch):
    # Nobody listens at port 1. gcsfs looks for credentials and tries again for most of a minute.
    monkeypatch.setattr(backends, "TIME_LIMIT_S", 2.0)
    for name in ("AWS_ENDPOINT_URL", "STORAGE_EMULATOR_HOST"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_MAX_ATTEMPTS"):
        monkeypatch.setenv(name, "1")

    message = said(epath.Path(f"{scheme}://no-such-bucket/run"), pathlib.Path("/nowhere"))

    assert message.startswith(f"{scheme}://no-such-bucket/run cannot be read: ")


def test_a_damaged_tree_leads_to_another_step(run):
    file = run / "200" / "default" / "_METADATA"
    file.write_text(file.read_text()[:80])

    with pytest.raises(
        NotACheckpointError, match=r"copy it again, or restore another step: .* holds the step 100"
    ):
        plan_restore(run, nnx.State({"scale": nnx.Param(np.zeros(3))}))


def test_a_damaged_tree_leads_to_another_step_from_a_relative_path_too(run, monkeypatch):
    file = run / "200" / "default" / "_METADATA"
    file.write_text(file.read_text()[:80])
    monkeypatch.chdir(run)

    with pytest.raises(NotACheckpointError, match=r"or restore another step: .* holds the step 100"):
        plan_restore("200", nnx.State({"scale": nnx.Param(np.zeros(3))}))


@pytest.mark.parametrize("policy", ["error", "warn", "init"])
def test_an_array_that_is_gone_is_no_missing_weight_under_any_policy(tmp_path, policy):
    item = tmp_path / "item"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        tree = {"params": {"head": {"kernel": np.ones((4, 2), np.float32)}, "norm": {"scale": np.ones(2)}}}
        checkpointer.save(item, args=ocp.args.PyTreeSave(tree))
    shutil.rmtree(item / "params.head.kernel")
    target = nnx.State({"head": {"kernel": nnx.Param(np.zeros((4, 2), np.float32))}})

    with pytest.raises(UnreadableLeafError) as caught:
        restore(item, target, policy=policy)

    assert ("params", "head", "kernel") in caught.value.paths
    assert "policy=" not in str(caught.value)


def test_an_array_that_is_gone_and_that_nobody_wants_is_no_error(tmp_path):
    item = tmp_path / "item"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        tree = {"params": {"head": {"kernel": np.ones((4, 2))}, "norm": {"scale": np.ones(2, np.float32)}}}
        checkpointer.save(item, args=ocp.args.PyTreeSave(tree))
    shutil.rmtree(item / "params.head.kernel")

    restored = restore(item, nnx.State({"norm": {"scale": nnx.Param(np.zeros(2, np.float32))}}))

    assert restored["norm"]["scale"].get_value().tolist() == [1, 1]


def test_runs_that_are_called_by_numbers_are_no_steps_of_the_directory_above(run):
    run.rename(run.parent / "run-1")
    save(run.parent / "run-2" / "7" / "default", {"params": {"scale": np.zeros(3, np.float32)}})

    assert said(run.parent, run.parent) == (
        "RUN is no Orbax checkpoint; it holds: run-1, run-2.\n"
        "hint: it holds several managers' roots; pass one of them: run-1, run-2."
    )


@pytest.mark.parametrize("step", ["7", "7/default"])
def test_a_run_that_is_called_by_a_number_is_a_root_whether_or_not_its_steps_hold_items(tmp_path, step):
    save(tmp_path / "exp_3" / step, {"params": {"scale": np.zeros(3, np.float32)}})

    assert said(tmp_path, tmp_path) == (
        "RUN is no Orbax checkpoint; it holds: exp_3.\nhint: RUN/exp_3 is a manager's root; pass that."
    )


def test_a_step_that_holds_no_tree_is_called_so_though_older_ones_do(run):
    (run / "400" / "metrics").mkdir(parents=True)

    assert said(run, run) == (
        "RUN/400 is no Orbax checkpoint; it holds: metrics.\nhint: RUN holds the steps 100, 200."
    )


def test_a_directory_whose_name_ends_in_a_number_by_chance_is_no_step(tmp_path):
    (tmp_path / "etc" / "polkit-1" / "rules").mkdir(parents=True)
    (tmp_path / "etc" / "hosts").touch()

    assert said(tmp_path / "etc", tmp_path / "etc") == (
        "RUN is no Orbax checkpoint; it holds: hosts, polkit-1.\n"
        "hint: pass a CheckpointManager's root, one of its steps, or an item in a step."
    )


@pytest.mark.parametrize(("name", "whose"), [("pytorch_model.bin", "PyTorch"), ("tf_model.h5", "TensorFlow")])
def test_weights_of_another_framework_lead_to_no_model_that_lies_beside_them(tmp_path, name, whose):
    save(tmp_path / "gpt_2" / "default", {"params": {"scale": np.zeros(3, np.float32)}})
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / name).write_bytes(b"PK")
    hint = (
        f"hint: {name} holds {whose}'s weights, which are not read: save them as safetensors, or as Flax "
        "weights (flax_model.msgpack)."
    )

    assert said(tmp_path / "bert", tmp_path) == f"RUN/bert is no Orbax checkpoint; it holds: {name}.\n{hint}"


@pytest.mark.parametrize("name", ["flax_model.msgpack", "model.safetensors"])
def test_a_pointer_of_git_lfs_is_called_so(tmp_path, name):
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 437936153\n"
    (tmp_path / name).write_text(pointer)

    with pytest.raises(NotACheckpointError) as caught:
        plan_restore(tmp_path, {"scale": jax.ShapeDtypeStruct((3,), np.float32)})

    assert str(caught.value).replace(str(tmp_path), "RUN") == (
        f"RUN/{name} is a pointer of Git LFS: the weights were not downloaded.\n"
        "hint: run `git lfs pull` in the clone: it downloads the file itself."
    )


@pytest.mark.parametrize("named", ["300", "300/default"])
def test_an_empty_step_or_item_is_called_empty_and_leads_to_steps_that_hold_something(run, named):
    (run / "300" / "default").mkdir(parents=True)
    if named == "300":
        (run / "300" / "default").rmdir()
    (run / "250").mkdir()

    assert said(run / named, run) == (
        f"RUN/{named} is an empty directory.\nhint: RUN holds the steps 100, 200."
    )


def test_an_item_asked_for_in_an_empty_step_leads_to_the_other_steps(run):
    (run / "300").mkdir()

    assert said(run, run, item="default") == (
        "RUN/300 is an empty directory.\nhint: RUN holds the steps 100, 200."
    )


@pytest.mark.parametrize("lost", ["_METADATA", "manifest.ocdbt", "d/"])
def test_a_file_that_vanishes_between_its_listing_and_its_read_is_named(run, lost, monkeypatch):
    def without(question):
        if question.path.partition("/default/")[2].startswith(lost):
            raise FileNotFoundError(question.path)
        return read(question)

    read = backends._read
    monkeypatch.setattr(backends, "_read", without)

    with pytest.raises(NotACheckpointError) as caught:
        plan_restore(run, nnx.State({"scale": nnx.Param(np.zeros(3, np.float32))}))

    file, _, rest = str(caught.value).replace(str(run), "RUN").partition(" ")
    assert file.startswith(f"RUN/200/default/{lost}")
    assert rest == (
        "vanished while the checkpoint was read: it was listed, and is not there any more.\n"
        "hint: restore again: whoever deletes or replaces old steps may have come between."
    )
