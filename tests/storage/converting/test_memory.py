"""How much is read at a time: so much that the process stays within its bound."""

import pytest

from orbax_nnx_handler.storage.converting import blocks


@pytest.fixture(params=[0.4e9, 40e9], ids=["small process", "large process"])
def held(request, monkeypatch) -> float:
    """What the process holds before the command starts, in bytes."""
    monkeypatch.setattr(blocks, "_resident_bytes", lambda: int(request.param))
    return request.param


def test_without_a_bound_the_window_is_the_same_whatever_the_process_holds(held) -> None:
    window = blocks.window_of(None)

    assert window == int((1e9 - (300 << 20)) / 2.5)


def test_a_bound_counts_what_the_process_holds_already(held) -> None:
    window = blocks.window_of(int(held + 2e9))

    assert window == int((2e9 - (300 << 20)) / 2.5)


@pytest.mark.parametrize(("bound", "shared"), [(None, 0), (int(1e12), 1)])
def test_threads_share_an_arena_where_the_process_is_bounded(monkeypatch, bound, shared) -> None:
    calls: list[None] = []
    monkeypatch.setattr(blocks, "_share_arena", lambda: calls.append(None))

    blocks.window_of(bound)

    assert len(calls) == shared


def test_without_glibc_nothing_is_asked_of_it(monkeypatch) -> None:
    monkeypatch.setattr(blocks, "_glibc", lambda: None)

    blocks.release_freed()
    blocks._share_arena()
