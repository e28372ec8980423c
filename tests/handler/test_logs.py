"""A restore leaves one INFO line, and one WARNING where a reader should know something."""

import logging
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from orbax.checkpoint import v1 as ocp_v1

from orbax_nnx_handler import NNXLinenHandler, NNXLinenRestore, NNXLinenSave, RestoreError, restore, v1
from tests.gallery.models import save


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    layers = {f"layers_{at}": {"kernel": np.zeros((2, 2), np.float32)} for at in range(2)}
    return save(tmp_path / "item", {"params": layers | {"extra": {"kernel": np.zeros(3, np.float32)}}})


def target(layers: int) -> nnx.State:
    kernel = jnp.zeros((2, 2))
    return nnx.State({"layers": {at: {"kernel": nnx.Param(kernel)} for at in range(layers)}})


def lines(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    ours = [record for record in caplog.records if record.name == "absl" and record.levelno == level]
    return [record.getMessage() for record in ours]


def test_one_line_says_leaves_bytes_seconds_rate_and_layout(path, caplog):
    with caplog.at_level(logging.INFO, logger="absl"):
        restore(path, target(2), unexpected="ignore")

    (line,) = [text for text in lines(caplog, logging.INFO) if text.startswith("restored")]
    assert re.fullmatch(
        r"restored 2 leaves \(32 B\) in [\d.]+ s \([\d.]+ GB/s\), filled 0, defaulted 0, "
        rf"1 unexpected; layout Linen variables; from {path}",
        line,
    )
    assert not [text for text in lines(caplog, logging.WARNING) if "wanted" in text]


def test_one_warning_lists_zeros_and_leftovers_with_every_path(path, caplog):
    with caplog.at_level(logging.WARNING, logger="absl"):
        restore(path, target(5), policy="warn")

    found = [text for text in lines(caplog, logging.WARNING) if "missing" in text or "wanted" in text]
    assert found == [
        (
            f"restored from {path}: 3 missing weights were filled with zeros: "
            "layers/2/kernel, layers/3/kernel, layers/4/kernel; "
            "1 stored leaf was not wanted: params/extra/kernel"
        )
    ]
    assert "\x1b" not in found[0]


def test_one_line_says_which_weights_were_given_initial_values_and_from_where(path, caplog):
    with caplog.at_level(logging.INFO, logger="absl"):
        restore(path, target(4), policy="init", unexpected="ignore")

    assert [text for text in lines(caplog, logging.INFO) if "initialised" in text] == [
        (
            f"restored from {path}: 2 missing weights were initialised, the target's own values: "
            "layers/2/kernel, layers/3/kernel"
        )
    ]


def managed(root: pathlib.Path, wanted: nnx.State, *, is_async: bool) -> None:
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=is_async)
    with ocp.CheckpointManager(root, item_handlers=NNXLinenHandler(), options=options) as manager:
        manager.save(1, args=NNXLinenSave(target(2)))
        manager.wait_until_finished()
        manager.restore(1, args=NNXLinenRestore(wanted))


def loaded(root: pathlib.Path, wanted: nnx.State) -> None:
    with v1.context():
        ocp_v1.save(root, target(2))
        ocp_v1.load(root, wanted)


WAYS = {
    "manager": lambda root, wanted: managed(root, wanted, is_async=False),
    "async manager": lambda root, wanted: managed(root, wanted, is_async=True),
    "v1": loaded,
}


@pytest.mark.parametrize("way", WAYS)
def test_each_way_to_restore_leaves_its_one_line_and_no_warning(tmp_path, caplog, way):
    with caplog.at_level(logging.INFO, logger="absl"):
        WAYS[way](tmp_path / "run", target(2))

    assert len([text for text in lines(caplog, logging.INFO) if text.startswith("restored 2 leaves")]) == 1
    assert not [text for text in lines(caplog, logging.WARNING) if text.startswith("restored")]


@pytest.mark.parametrize("way", WAYS)
def test_a_restore_that_fails_claims_nothing(tmp_path, caplog, way):
    with caplog.at_level(logging.INFO, logger="absl"), pytest.raises(RestoreError):
        WAYS[way](tmp_path / "run", target(3))

    claims = [record.getMessage() for record in caplog.records if record.levelno < logging.ERROR]
    assert not [text for text in claims if text.startswith("restored")]


def test_another_process_than_the_first_says_nothing(path, caplog, monkeypatch):
    monkeypatch.setattr("orbax_nnx_handler.api.jax.process_index", lambda: 1)

    with caplog.at_level(logging.INFO, logger="absl"):
        restore(path, target(5), policy="warn")

    assert not [text for text in lines(caplog, logging.INFO) if text.startswith("restored")]
    assert not [text for text in lines(caplog, logging.WARNING) if text.startswith("restored")]
