"""Requests, bytes and trips of a read, counted before anything is read."""

import itertools

import hypothesis
import hypothesis.strategies as st
import pytest

from orbax_nnx_handler.storage.reading.byte_plan import (
    DISK,
    OBJECT_STORE,
    Limits,
    WantedBytes,
    cut_run,
    limits_of,
    plan_bytes,
)

SMALL = Limits(gap_bytes=4, range_bytes=100, requests=8, packed_bytes=1000, member_bytes=1000)
MB = 1 << 20


def one(start, size, file="f"):
    return WantedBytes(file, ((start, size),))


def ranges(plan):
    return [(request.start, request.size) for batch in plan.batches for request in batch.requests]


def test_neighbours_become_one_request_while_the_gap_is_small_and_the_range_short():
    plan = plan_bytes([one(0, 10), one(14, 10), one(29, 10), one(45, 60)], SMALL)

    assert ranges(plan) == [(0, 24), (29, 10), (45, 60)]
    assert (plan.requests, plan.nbytes, plan.trips) == (3, 94, 1)


def test_a_range_grows_no_longer_than_allowed_but_takes_the_few_bytes_behind_it():
    assert ranges(plan_bytes([one(0, 60), one(60, 60)], SMALL)) == [(0, 60), (60, 60)]
    assert ranges(plan_bytes([one(0, 100), one(100, 1)], SMALL)) == [(0, 101)]


def test_what_is_long_is_asked_for_in_parallel_ranges_with_what_follows_it():
    plan = plan_bytes([one(0, 250), one(250, 1), one(252, 10)], SMALL)

    assert ranges(plan) == [(0, 84), (84, 84), (168, 94)]
    assert len(plan.batches) == 1


def test_files_are_not_joined_and_the_longest_goes_first():
    plan = plan_bytes([one(0, 10, "a"), one(10, 10, "b"), one(0, 300, "c")], SMALL)

    assert [batch.requests[0].file for batch in plan.batches] == ["c", "a", "b"]


def test_what_overlaps_is_asked_for_by_itself():
    assert ranges(plan_bytes([one(0, 10), one(5, 10)], SMALL)) == [(0, 10), (5, 10)]


def test_more_requests_than_may_be_under_way_take_several_trips():
    plan = plan_bytes([one(1000 * number, 1) for number in range(17)], SMALL)

    assert (plan.requests, plan.trips) == (17, 3)


def test_two_thousand_small_leaves_take_a_request_a_file_and_one_trip():
    wanted = [one(4000 * number, 3900, f"d/{part}") for part in range(28) for number in range(72)]

    plan = plan_bytes(wanted, OBJECT_STORE)

    assert (plan.requests, plan.trips) == (28, 1)
    assert plan.nbytes <= 1.1 * sum(size for leaf in wanted for _, size in leaf.runs)


def test_large_leaves_take_a_request_for_8_mb_and_one_trip():
    wanted = [one(0, 58 * MB, f"d/{number}") for number in range(4)]

    plan = plan_bytes(wanted, OBJECT_STORE)

    assert (plan.requests, plan.trips) == (32, 1)
    assert plan.nbytes == 4 * 58 * MB


def test_the_runs_of_one_piece_stay_together_even_where_they_are_apart():
    plan = plan_bytes([WantedBytes("f", ((0, 10), (12, 10), (500, 10))), one(515, 5)], SMALL)

    assert [batch.wanted for batch in plan.batches] == [(0,), (1,)] or plan.requests == 2
    assert sorted(ranges(plan))[0] == (0, 22)


@hypothesis.given(
    runs=st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 2000), st.integers(1, 400)), max_size=30),
    gap=st.integers(0, 50),
    most=st.integers(1, 300),
)
def test_every_byte_arrives_once_and_in_its_place(runs, gap, most):
    limits = Limits(gap_bytes=gap, range_bytes=most, requests=4, packed_bytes=1, member_bytes=1)
    wanted = [one(start, size, file) for file, start, size in runs]

    plan = plan_bytes(wanted, limits)

    arrived = {number: {} for number in range(len(wanted))}
    for batch in plan.batches:
        seen = set()
        for request in batch.requests:
            assert request.size <= most + most // 64
            end = 0
            for part in request.parts:
                assert 0 <= part.start - end <= gap
                assert wanted[part.wanted].file == request.file
                for byte in range(part.size):
                    assert part.at + byte not in arrived[part.wanted]
                    arrived[part.wanted][part.at + byte] = request.start + part.start + byte
                end = part.start + part.size
                seen.add(part.wanted)
            assert end == request.size
        assert seen == set(batch.wanted)
    for number, leaf in enumerate(wanted):
        ((start, size),) = leaf.runs
        assert arrived[number] == {at: start + at for at in range(size)}


@hypothesis.given(size=st.integers(1, 1000), most=st.integers(1, 100))
def test_a_run_is_cut_without_holes(size, most):
    pieces = list(cut_run(7, size, most))

    assert all(0 < length <= most for _, length in pieces)
    assert [start for start, _ in pieces] == list(itertools.accumulate([7, *(n for _, n in pieces[:-1])]))
    assert sum(length for _, length in pieces) == size


def test_the_environment_sets_the_limits():
    environment = {"ORBAX_NNX_GAP_BYTES": "0", "ORBAX_NNX_RANGE_BYTES": "5", "ORBAX_NNX_REQUESTS": "6"}

    limits = limits_of(local=False, environment=environment)

    assert (limits.gap_bytes, limits.range_bytes, limits.requests) == (0, 5, 6)
    assert (limits_of(local=True, environment={}), limits_of(local=False, environment={})) == (
        DISK,
        OBJECT_STORE,
    )


@pytest.mark.parametrize("text", ["0", "-1", "8MB", ""])
def test_a_setting_that_is_no_number_is_refused(text):
    with pytest.raises(ValueError, match=r"ORBAX_NNX_REQUESTS='.*' is no whole number from 1 on"):
        limits_of(local=True, environment={"ORBAX_NNX_REQUESTS": text})
