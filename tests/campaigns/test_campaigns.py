"""The short form of every campaign, and that each of them notices what it is for."""

import pathlib
import re
import time

import pytest

from orbax_nnx_handler import RestoreError, restore
from tests.campaigns import corruption, crafted, hostile
from tests.processes import Forked
from tests.sampled import drawn

ROOT = pathlib.Path(__file__).parents[2]


def test_damaged_checkpoints_are_right_or_one_clear_error(tmp_path):
    lines, held = corruption.run(tmp_path, seed=5, trials=drawn(75, 150), seconds=60, every_stock=3)

    assert held, "\n".join(lines)


def test_hostile_checkpoints_are_refused_in_bounded_time_and_memory(tmp_path):
    lines, held = hostile.run(tmp_path, seed=5, trials=drawn(20, 40), seconds=60)

    assert held, "\n".join(lines)


@pytest.mark.parametrize(("campaign", "trials"), [("kill", 3), ("pressure", 6)])
def test_processes_that_are_killed_or_short_of_something(campaign, trials):
    program = "import runpy; runpy.run_module('tests.campaigns', run_name='__main__', alter_sys=True)"

    done = Forked(program, campaign, "--trials", str(trials), "--seconds", "60")

    assert done.wait() == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.endswith("\nheld\n")


def test_there_are_hundreds_of_hostile_cases(tmp_path):
    assert len(hostile.cases(tmp_path, 0)) > 1000


def test_the_hostile_campaign_notices_what_it_is_for(tmp_path, monkeypatch):
    monkeypatch.setattr(hostile, "LIMIT_S", 0.1)
    (tmp_path / "secret").write_bytes(b"S")
    kept = []

    def fail():
        raise KeyError("x")

    def escape():
        error = RestoreError("x")
        error.args = ("a\x1b[2J",)
        raise error

    found = {
        "hangs": lambda: time.sleep(5),
        r": \d+\.\d s$": lambda: time.sleep(0.3),
        "KeyError": fail,
        "in the error": escape,
        "opened a file outside": (tmp_path / "secret").read_bytes,
        "bytes": lambda: kept.append(b"x" * 300_000_000),
    }
    for words, operation in found.items():
        assert re.search(words, hostile._fault("case", operation, tmp_path))
    assert not hostile._fault("case", lambda: None, tmp_path)


def test_the_corruption_campaign_notices_wrong_values_and_other_errors(tmp_path, monkeypatch):
    monkeypatch.setattr(corruption, "restore", lambda *_: None)
    lines, held = corruption.run(tmp_path / "a", seed=1, trials=30, seconds=60)
    assert not held
    assert any(": wrong (stock" in line for line in lines)

    def fail(*_):
        raise KeyError("x")

    monkeypatch.setattr(corruption, "restore", fail)
    lines, held = corruption.run(tmp_path / "b", seed=1, trials=5, seconds=60, every_stock=9)
    assert not held
    assert any(": TRACEBACK (stock" in line for line in lines)


@pytest.fixture(scope="module")
def crafted_cases():
    """Every case by name; what they write is hundreds of megabytes."""
    return dict(crafted.cases())


@pytest.mark.parametrize(
    "name",
    [
        "checkpoint_3: 1,000 levels",
        "index: a name of 10 MB",
        "archive: a header of 200 MB",
        "a shape without elements",
    ],
)
def test_what_an_adversary_found_is_refused(tmp_path, crafted_cases, name):
    path = crafted_cases[name](tmp_path)

    for operation, act in hostile._operations(path, tmp_path).items():
        assert not hostile._fault(operation, act, tmp_path)
    with pytest.raises(RestoreError) as caught:
        restore(path, hostile.WANTED)
    assert len(str(caught.value)) < 2000
