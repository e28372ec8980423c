"""What is made while the collector is paused counts as old, and is found all the same once it is garbage."""

import gc
import weakref

import pytest

from orbax_nnx_handler import storage
from orbax_nnx_handler.storage import paused_collection


class Node:
    """Something that refers to itself."""

    def __init__(self):
        self.own = self


@pytest.fixture
def collected():
    """A program whose collector has just looked at everything, and has frozen nothing."""
    frozen = gc.get_freeze_count()
    gc.unfreeze()  # What the suite has frozen.
    gc.collect()
    storage._aged = (-1, 0)
    yield
    storage._aged = (-1, 0)
    if frozen:
        gc.freeze()


def old():
    return {id(each) for each in gc.get_objects(generation=2)}


def test_the_result_of_a_large_restore_is_not_visited_again_and_again(collected):
    with paused_collection():
        kept = [[number] for number in range(30_000)]

    assert old().issuperset(map(id, kept))


def test_a_few_objects_are_left_to_the_collector(collected):
    with paused_collection():
        kept = [[number] for number in range(100)]

    assert old().isdisjoint(map(id, kept))


def test_what_becomes_garbage_is_found(collected):
    with paused_collection():
        nodes = [Node() for _ in range(30_000)]
        last = weakref.ref(nodes[-1])
    del nodes
    gc.collect()

    assert last() is None


def test_repeated_restores_leave_work_to_the_collector(collected, monkeypatch):
    monkeypatch.setattr(storage, "_MANY", 70_000)
    results, found = [], []
    for _ in range(3):
        with paused_collection():
            results.append([[number] for number in range(30_000)])
        found.append(old().issuperset(map(id, results[-1])))

    assert found == [True, True, False]


def test_what_a_program_froze_stays_frozen(collected):
    gc.freeze()
    frozen = gc.get_freeze_count()
    try:
        with paused_collection():
            kept = [[number] for number in range(30_000)]
        assert gc.get_freeze_count() >= frozen
        assert old().isdisjoint(map(id, kept))
    finally:
        gc.unfreeze()
