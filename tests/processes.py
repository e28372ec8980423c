"""One program in several real processes on this machine, joined by `jax.distributed`."""

import json
import os
import pathlib
import socket
import subprocess
import sys
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]


def run_processes(module: str, count: int, directory: pathlib.Path) -> list[dict[str, Any]]:
    """Runs `module PORT COUNT NUMBER DIRECTORY` on 8 devices in all; returns what each wrote as JSON."""
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={8 // count}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", module, str(_free_port()), str(count)]
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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
