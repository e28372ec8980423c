"""Measurements in a process of their own: `python -m benchmarks.trial '[<settings>, ...]'`.

Prints one line of JSON for each. Alone in its process, nothing that an earlier trial left behind (compiled
code, thread pools, memory) can help or hurt a trial.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import sys
import time
from typing import Any

from benchmarks.models import Model

_STATUS = pathlib.Path("/proc/self/status")
_IO = pathlib.Path("/proc/self/io")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
    """What one timed call took.

    Attributes:
        seconds: Wall time.
        cpu_seconds: Processor time of all threads.
        peak_bytes: Highest resident memory above that before the call.
        read_bytes: Bytes that the process asked the system to read; a memory map does not count.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    read_bytes: int


def measured(call: Any) -> tuple[Any, Figures]:
    """Returns what a call returns, on the devices, and what it took."""
    import jax

    before, read = _resident("VmRSS"), _read_bytes()
    # Sets the highest mark back to what is resident now (Linux).
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    cpu, start = time.process_time(), time.perf_counter()
    result = jax.block_until_ready(call())
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return result, Figures(
        seconds=seconds,
        cpu_seconds=cpu,
        peak_bytes=max(0, _resident("VmHWM") - before),
        read_bytes=_read_bytes() - read,
    )


def _resident(field: str) -> int:
    if not _STATUS.exists():
        return 0
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _read_bytes() -> int:
    if not _IO.exists():
        return 0
    return int(_IO.read_text().split("rchar: ")[1].split()[0])


def main(settings: dict[str, Any]) -> dict[str, Any]:
    """Runs one contestant on one model and checks every value of the result."""
    if settings.get("devices", 1) > 1:
        os.environ["XLA_FLAGS"] = (
            f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={settings['devices']}"
        )
    import jax

    from benchmarks.broken import VERDICTS
    from benchmarks.contestants import CONTESTANTS
    from benchmarks.errands import ERRANDS
    from benchmarks.models import check, placement

    model, path = Model(**settings["model"]), pathlib.Path(settings["path"])
    assert len(jax.devices()) >= settings.get("devices", 1), "JAX was started with fewer devices"
    jax.block_until_ready(jax.numpy.zeros(()))
    prepare = {**CONTESTANTS, **ERRANDS, **VERDICTS}[settings["contestant"]]
    call, collect = prepare(model, path, placement(settings["placement"]))
    result, figures = measured(call)
    arrays = collect(result)
    if arrays is not None:
        check(model, path, dict(arrays))
    return dataclasses.asdict(figures)


if __name__ == "__main__":
    for one in json.loads(sys.argv[1]):
        print(json.dumps(main(one)))
