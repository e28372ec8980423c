"""What the suite's processes are started with, and one program in several of them, joined by JAX."""

import contextlib
import functools
import importlib
import importlib.util
import json
import mmap
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
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


def share_lowering_context() -> None:
    """Has JAX lower all programs of this process in one MLIR context.

    It makes one for each program, even for a single addition: 5 ms, and 1 MB until garbage is collected.
    """
    # Nothing public: where a version has it elsewhere, the suite only takes a tenth longer.
    with contextlib.suppress(ImportError, AttributeError):
        from jax._src.interpreters import mlir

        mlir.make_ir_context = functools.cache(mlir.make_ir_context)


def quick_directory() -> str:
    """Returns a directory in memory, if there is one with room for what the suite writes."""
    memory = "/dev/shm"
    roomy = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 4 << 30
    return memory if roomy else tempfile.gettempdir()


def run_processes(module: str, count: int, directory: pathlib.Path) -> list[dict[str, Any]]:
    """Runs `module.main(PORT, COUNT, NUMBER, DIRECTORY)` in each process; returns what each wrote as JSON.

    They have 8 devices in all.
    """
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={8 // count}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        # JAX warns of it; nothing of JAX runs when `_forked` forks.
        "PYTHONWARNINGS": "ignore:os.fork:RuntimeWarning",
    }
    command = [sys.executable, "-m", "tests.processes", module, str(_free_port()), str(count), str(directory)]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as group:
        try:
            output = group.communicate(timeout=300)[0]
        except BaseException:
            os.killpg(group.pid, signal.SIGKILL)
            raise
    assert group.returncode == 0, output[-8000:]
    return [json.loads((directory / f"{number}.json").read_text()) for number in range(count)]


def _forked(module: str, port: str, count: str, directory: str) -> list[int]:
    """Imports once for all processes, and returns their exit codes."""
    program = importlib.import_module(module).main
    share_lowering_context()
    processes: list[int] = []
    for number in range(int(count)):
        process = os.fork()
        if not process:
            program(port, count, str(number), directory)
            sys.exit()
        processes.append(process)
    return [os.waitpid(process, 0)[1] for process in processes]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(any(_forked(*sys.argv[1:])))
