"""Several processes: each sees what it sees with Orbax's own handler, failures on some of them included."""

from typing import Any

import pytest

from tests.conformance.worker import PROGRAMS
from tests.processes import run_processes
from tests.sampled import every

FAILING = {"another target on the others", "nothing there on the others", "a save that the others refuse"}


@pytest.fixture(scope="module", params=every(2, [4, 2]), ids="{} processes".format)
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process saw of every program, with either handler."""
    count, directory = request.param, tmp_path_factory.mktemp("processes")
    return run_processes("tests.conformance.worker", count, directory)


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_process_sees_what_it_sees_with_orbaxs_own_handler(seen, name) -> None:
    for process in seen:
        assert process[name]["ours"] == process[name]["stock"]


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_programs_fail_where_they_are_meant_to(seen, name) -> None:
    kinds = [process[name]["stock"][0] for process in seen]

    failing = len(seen) - 1 if name in FAILING else 0
    assert kinds == ["returned"] * (len(seen) - failing) + ["raised"] * failing
