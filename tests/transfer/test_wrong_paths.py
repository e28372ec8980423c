"""A path that is no checkpoint is called what it is, and the one that was probably meant is named."""

import pathlib

import numpy as np
import pytest
from etils import epath

from orbax_nnx_handler import NotACheckpointError
from orbax_nnx_handler.transfer.locating import find_item
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
        "RUN/300.orbax-checkpoint-tmp-17 is a save that was interrupted: 300.orbax-checkpoint-tmp-17.\n"
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


def test_a_path_below_an_item_leads_to_the_item(run):
    assert said(run / "200" / "default" / "params" / "scale", run) == (
        "there is nothing at RUN/200/default/params/scale.\n"
        "hint: RUN/200/default is an item directory; pass that."
    )


def test_a_directory_with_nothing_near_it_gets_no_guess(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)

    assert said(tmp_path / "a" / "b", tmp_path) == (
        "RUN/a/b is no Orbax checkpoint; it holds: nothing.\n"
        "hint: pass a CheckpointManager's root, one of its steps, or an item in a step."
    )
