"""The demo, with a model small enough for a suite: what it claims, held against the numbers."""

import io
import json
import re

import numpy as np
import pytest
from rich.console import Console

from orbax_nnx_handler import MissingParamError
from orbax_nnx_handler.cli import main
from orbax_nnx_handler.commands.demo.programs import ENCODED, TEXT, Size, batch_at, decode
from orbax_nnx_handler.commands.demo.walkthrough import Outcome, Printer, run
from tests.cli.schema import documented, found


@pytest.fixture(scope="module")
def printed_run() -> tuple[Outcome, str]:
    paper = io.StringIO()
    printer = Printer(Console(file=paper, highlight=False))
    size = Size(layers=2, width=16, heads=2, time=16, batch=8)
    outcome = run(printer, size, stop=12, end=16)
    return outcome, paper.getvalue()


def test_both_programs_give_the_same_logits(printed_run):
    outcome, _ = printed_run

    assert outcome.logit_difference < 1e-5


def test_training_goes_on_at_the_same_loss_with_the_optimizer_intact(printed_run):
    outcome, _ = printed_run

    np.testing.assert_allclose(outcome.nnx_losses, outcome.linen_losses, rtol=1e-5)


def test_a_checkpoint_without_a_layer_is_refused_by_the_names_of_what_it_lacks(printed_run):
    outcome, _ = printed_run

    assert isinstance(outcome.error, MissingParamError)
    assert len(outcome.error.paths) == 3 * 16
    assert all("blocks" in path and 1 in path for path in outcome.error.paths)


def test_a_layer_that_was_initialised_gives_other_losses(printed_run):
    outcome, _ = printed_run

    assert np.all(np.isfinite(outcome.filled_losses))
    assert not np.allclose(outcome.filled_losses, outcome.linen_losses, rtol=1e-4)


def test_the_output_is_plain_where_it_is_piped_and_has_seven_sections(printed_run):
    _, printed = printed_run

    assert re.findall(r"^(\d)  ", printed, re.MULTILINE) == list("1234567")
    assert "\x1b" not in printed
    assert not re.search(r"[ \t]$", printed, re.MULTILINE)


def test_json_gives_the_figures_alone(printed_run, monkeypatch, capsys):
    outcome, printed = printed_run
    monkeypatch.setattr("orbax_nnx_handler.commands.demo.main", lambda: print(printed) or outcome.to_dict())

    assert main(["demo", "--json"]) == 0

    said = json.loads(capsys.readouterr().out)
    assert set(found(said, documented("demo"))) == documented("demo") - {"refused"}
    assert said["nnx_losses"] == outcome.nnx_losses


def test_a_batch_is_the_same_in_every_program_and_its_targets_are_one_letter_on():
    batch = batch_at(3, size=2, time=8)

    assert np.array_equal(batch, batch_at(3, size=2, time=8))
    assert all(decode(row) in TEXT for row in batch)
    assert len(ENCODED) == len(TEXT)
