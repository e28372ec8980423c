"""What is made while the collector is paused counts as old, and is found all the same once it is garbage."""

import json
import subprocess
import sys

import pytest

from tests.processes import ROOT


@pytest.fixture(scope="module")
def seen():
    """What each scene of `tests.storage.collector` showed."""
    words = [sys.executable, "-m", "tests.storage.collector"]
    ran = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_the_result_of_a_large_restore_is_not_visited_again_and_again(seen):
    assert seen["large"] == [True]


def test_a_few_objects_are_left_to_the_collector(seen):
    assert seen["few"] == [False]


def test_what_becomes_garbage_is_found(seen):
    assert seen["garbage"] is True


def test_repeated_restores_leave_work_to_the_collector(seen):
    assert seen["repeated"] == [[True], [True], [False]]


def test_what_a_program_froze_stays_frozen(seen):
    assert seen["frozen"] == {"stays": True, "old": [False]}
