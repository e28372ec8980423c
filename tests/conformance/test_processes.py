"""Several processes: each sees what it sees with Orbax's own handler, failures on some of them included."""

import json
import os
import pathlib
import socket
import subprocess
import sys
from typing import Any

import pytest

from tests.conformance.worker import PROGRAMS

ROOT = pathlib.Path(__file__).parents[2]
FAILING = {"another target on the others", "nothing there on the others", "a save that the others refuse"}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module", params=[2, 4], ids=["2 processes", "4 processes"])
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process saw of every program, with either handler."""
    count, directory, port = request.param, tmp_path_factory.mktemp("processes"), _free_port()
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={8 // count}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "tests.conformance.worker", str(port), str(count)]
    processes = [
        subprocess.Popen(
            [*command, str(number), str(directory)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(count)
    ]
    try:
        output = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * count, "\n".join(output)[-8000:]
    return [json.loads((directory / f"{number}.json").read_text()) for number in range(count)]


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_process_sees_what_it_sees_with_orbaxs_own_handler(seen, name) -> None:
    for process in seen:
        assert process[name]["ours"] == process[name]["stock"]


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_programs_fail_where_they_are_meant_to(seen, name) -> None:
    kinds = [process[name]["stock"][0] for process in seen]

    failing = len(seen) - 1 if name in FAILING else 0
    assert kinds == ["returned"] * (len(seen) - failing) + ["raised"] * failing
