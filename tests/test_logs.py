"""A restore leaves one INFO line, and one WARNING where a reader should know something."""

import logging
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from orbax_nnx_handler import restore
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
        r"restored 2 leaves \(0\.000 GB\) in [\d.]+ s \([\d.]+ GB/s\), filled 0, defaulted 0, "
        r"1 unexpected; layout Linen variables",
        line,
    )
    assert not [text for text in lines(caplog, logging.WARNING) if "wanted" in text]


def test_one_warning_lists_zeros_and_leftovers_with_every_path(path, caplog):
    with caplog.at_level(logging.WARNING, logger="absl"):
        restore(path, target(5), policy="warn")

    found = [text for text in lines(caplog, logging.WARNING) if "missing" in text or "wanted" in text]
    assert found == [
        (
            "3 missing weights were filled with zeros: layers/2/kernel, layers/3/kernel, layers/4/kernel; "
            "1 stored leaf was not wanted: params/extra/kernel"
        )
    ]
    assert "\x1b" not in found[0]


def test_one_line_says_which_weights_were_given_initial_values_and_from_where(path, caplog):
    with caplog.at_level(logging.INFO, logger="absl"):
        restore(path, target(4), policy="init", unexpected="ignore")

    assert [text for text in lines(caplog, logging.INFO) if "initialised" in text] == [
        "2 missing weights were initialised, the target's own values: layers/2/kernel, layers/3/kernel"
    ]
