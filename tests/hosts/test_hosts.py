"""The same code on every host: all restore, or all raise the same error and none waits."""

from typing import Any

import pytest

from tests.hosts.bits import bits_in, write_bits
from tests.processes import run_processes
from tests.sampled import every

Seen = list[dict[str, Any]]


@pytest.fixture(scope="module", params=every(2, [4, 2]), ids="{} processes".format)
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """What each process saw of every scene."""
    count, directory = request.param, tmp_path_factory.mktemp("hosts")
    write_bits(directory)
    return [
        {
            **told,
            "bytes": sum(value.nbytes for value in bits_in(directory).values()),
            # int4 has no whole bytes that could be copied.
            "odd_bytes": sum(value.nbytes for name, value in bits_in(directory).items() if "int4" in name),
        }
        for told in run_processes("tests.hosts.worker", count, directory)
    ]


def _each(seen: Seen, scene: str) -> list[Any]:
    results = [process[scene] for process in seen]
    for result in results:
        assert "crashed" not in result, result["crashed"]
    return results


@pytest.mark.parametrize("scene", ["restore", "unstack", "stack"])
def test_every_process_holds_its_part_of_the_stored_values(seen: Seen, scene: str) -> None:
    results = _each(seen, scene)

    assert results == [{"wrong": []}] * len(seen)


def test_a_missing_weight_raises_the_same_error_on_every_process(seen: Seen) -> None:
    results = _each(seen, "missing_weight")

    assert {result["kind"] for result in results} == {"MissingParamError"}
    assert len({result["message"] for result in results}) == 1
    assert "model/decoder/extra/kernel" in results[0]["message"]


def test_a_filter_fills_a_missing_weight_in_place_on_all_processes(seen: Seen) -> None:
    results = _each(seen, "filled_by_filter")

    assert results == [{"wrong": [], "filled": True}] * len(seen)


@pytest.mark.parametrize("scene", ["unreadable_on_one", "unreadable_on_the_reader"])
def test_a_file_that_one_process_cannot_read_stops_them_all(seen: Seen, scene: str) -> None:
    results = _each(seen, scene)

    others = [result for number, result in enumerate(results) if number != 1]
    assert results[1] == {"kind": "OSError", "message": "the disk of process 1 is gone"}
    assert {result["kind"] for result in others} == {"OtherProcessError"}
    assert all("the disk of process 1 is gone" in result["message"] for result in others)


def test_a_checkpoint_that_one_process_does_not_see_stops_them_all(seen: Seen) -> None:
    results = _each(seen, "absent_on_one")

    kinds = ["OtherProcessError", "NotACheckpointError"] * (len(seen) // 2)
    assert [result["kind"] for result in results] == kinds


def test_processes_that_see_different_checkpoints_say_so(seen: Seen) -> None:
    results = _each(seen, "another_on_one")

    assert {result["kind"] for result in results} == {"DisagreementError"}
    first, *rest = results[0]["message"].splitlines()
    assert first == "the processes do not see the same checkpoint:"
    assert [line.rpartition("/")[2] for line in rest[:-1]] == ["bits", "bits_again"] * (len(seen) // 2)
    assert rest[-1] == "hint: name the step, or wait until every host sees the same files."


def test_derived_random_state_is_the_same_on_every_process(seen: Seen) -> None:
    results = _each(seen, "same_random_state")

    assert all(result == results[0] for result in results)
    distinct = {str(key) for key in results[0]["keys"]}
    assert len(distinct) == len(results[0]["keys"]) > 10


def test_what_many_processes_save_they_restore(seen: Seen) -> None:
    results = _each(seen, "saves_and_restores")

    assert results == [{"wrong": []}] * len(seen)


def test_random_state_that_no_process_holds_whole_is_saved_and_restored(seen: Seen) -> None:
    results = _each(seen, "divided_random_state")

    assert results == [{"wrong": False}] * len(seen)


@pytest.mark.parametrize(
    "scene",
    [
        *("copied", "copied_rows", "copied_columns_explicit", "copied_in_small_groups", "nothing_to_copy"),
        *("copied_along_one_axis", "copied_in_little_memory", "copied_in_little_memory_over_devices"),
        *("copied_over_devices", "copied_rows_over_devices", "copied_columns_over_devices"),
    ],
)
def test_with_single_replica_each_byte_is_read_by_one_process_and_all_have_it(seen: Seen, scene: str) -> None:
    results = _each(seen, scene)

    assert [result["wrong"] for result in results] == [[]] * len(seen)
    read_by_each = (len(seen) - 1) * seen[0]["odd_bytes"]
    assert sum(result["read"] for result in results) <= seen[0]["bytes"] + read_by_each


@pytest.mark.parametrize("scene", ["copied", "copied_rows", "copied_columns_explicit"])
def test_with_single_replica_all_processes_read_equally_much(seen: Seen, scene: str) -> None:
    results = _each(seen, scene)

    read = [result["read"] for result in results]
    assert max(read) - min(read) <= 0.1 * seen[0]["bytes"]


def test_a_device_holds_no_more_for_the_copying_than_the_bound(seen: Seen) -> None:
    held = [result["held"] for result in _each(seen, "copied_in_little_memory")]

    assert all(5_000 < size <= 10_000 for size in held)


def test_each_process_reads_for_itself_what_lies_in_copies_along_another_axis(seen: Seen) -> None:
    results = _each(seen, "copied_along_an_axis_without_copies")

    assert [result["wrong"] for result in results] == [[]] * len(seen)
    assert {result["read"] for result in results} == {seen[0]["bytes"]}


def test_without_single_replica_each_process_reads_the_whole_of_what_it_holds(seen: Seen) -> None:
    results = _each(seen, "read_by_each")

    assert [result["wrong"] for result in results] == [[]] * len(seen)
    assert {result["read"] for result in results} == {seen[0]["bytes"]}


@pytest.mark.parametrize(
    "scene", ["asked_with_restore_args", "asked_with_a_type_handler", "asked_for_all_handlers"]
)
def test_orbaxs_own_ways_of_asking_for_single_replica_do_the_same(seen: Seen, scene: str) -> None:
    results = _each(seen, scene)

    assert results == [{key: process["copied"][key] for key in ("wrong", "read")} for process in seen]
