"""What the suite's processes are started with, and one program in several of them, joined by JAX."""

import importlib.util
import json
import mmap
import os
import pathlib
import socket
import subprocess
import sys
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
# A program of the suite runs a few times on tiny arrays: compiling it well takes longer than running it.
_HASTY = {
    "xla_backend_optimization_level": "0",
    "xla_cpu_parallel_codegen_split_count": "1",
    "xla_cpu_use_fusion_emitters": "false",
}


def hasty_flags() -> list[str]:
    """Returns XLA's flags for compiling in haste that this XLA has; it ends at one that it does not know."""
    library = pathlib.Path(importlib.util.find_spec("jaxlib").origin).with_name("libjax_common.so")
    if not library.exists():
        return []
    with library.open() as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        # A name that stands alone is a flag's; one within a longer run is a field's, which may be unused.
        return [
            f"--{name}={value}"
            for name, value in _HASTY.items()
            if content.find(b"\0" + name.encode() + b"\0") >= 0
        ]


def run_processes(module: str, count: int, directory: pathlib.Path) -> list[dict[str, Any]]:
    """Runs `module PORT COUNT NUMBER DIRECTORY` on 8 devices in all; returns what each wrote as JSON."""
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={8 // count}",
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
