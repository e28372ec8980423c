"""Little memory, few file descriptors, no more threads: the values, or one error that names what is short."""

import collections
import logging
import os
import pathlib
import random
import resource
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from orbax_nnx_handler import RestoreError, restore
from tests.campaigns.watching import in_child, memory_bytes
from tests.storage.checkpoints import FORMATS, DiskFormat, save

RIGHT, CLEAR, WRONG, TRACEBACK = 0, 3, 4, 5
NAMES = {RIGHT: "right", CLEAR: "one clear error", WRONG: "WRONG", TRACEBACK: "another library's error"}
MANY = {f"layer_{at}": np.full((64, 64), float(at), np.float32) for at in range(300)}
LARGE = {"w": np.arange(1 << 24, dtype=np.float32)}


def _write(folder: pathlib.Path) -> None:
    for disk_format in FORMATS:
        save(folder / "many" / str(disk_format), MANY, disk_format)
    for disk_format in FORMATS[::2]:
        save(folder / "large" / str(disk_format), LARGE, disk_format)


def _attempt(path: pathlib.Path, tree: dict[str, Any], limit: Callable[[], None], word: str) -> int:
    import jax

    logging.disable(logging.CRITICAL)
    wanted = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in tree.items()}
    jax.devices()
    limit()
    try:
        found = restore(path, wanted)
    except RestoreError as error:
        if word in str(error):
            return CLEAR
        os.write(2, f"{path.name}: {error}\n"[:600].encode())
        return TRACEBACK
    except BaseException as error:
        os.write(2, f"{path.name}: {error!r}\n"[:600].encode())
        return TRACEBACK
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return RIGHT if all(np.array_equal(found[name], value) for name, value in tree.items()) else WRONG


def _descriptors(number: int) -> None:
    opened = len(list(pathlib.Path("/proc/self/fd").iterdir()))
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (opened + number, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    )


def _memory(more: int) -> None:
    mapped = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (mapped + more, resource.RLIM_INFINITY))


def _threads(_: int) -> None:
    def refuse(*_):
        raise RuntimeError("can't start new thread")

    threading.Thread.start = refuse


Limit = tuple[Callable[[int], None], tuple[int, ...], str, str, dict[str, Any]]
LIMITS: dict[str, Limit] = {
    "descriptors": (_descriptors, (2, 6, 40), "descriptor", "many", MANY),
    "memory": (_memory, (10 << 20, 50 << 20, 400 << 20), "memory", "large", LARGE),
    "threads": (_threads, (0,), "thread", "many", MANY),
}


def _level(path: pathlib.Path) -> int:
    """Returns 0 where descriptors, threads and memory stay level over restores in a loop."""
    import jax

    logging.disable(logging.CRITICAL)
    wanted = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in MANY.items()}
    before = (0, 0, 0)
    for number in range(120):
        restore(path, wanted)
        if number == 40:
            before = _held()
    after = _held()
    grown = after[2] - before[2]
    said = f"{path.name}: descriptors, threads, memory {before} -> {after} over 80 restores\n"
    os.write(2, said.encode())
    return RIGHT if after[:2] == before[:2] and grown < 20 << 20 else WRONG


def _held() -> tuple[int, int, int]:
    return len(list(pathlib.Path("/proc/self/fd").iterdir())), threading.active_count(), memory_bytes()


def _status(work: Callable[[], int]) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(in_child(work), 0)[1])


def run(folder: pathlib.Path, *, seed: int, trials: int | None, seconds: float) -> tuple[list[str], bool]:
    """Restores under each limit from each format, each in a process of its own; then in a loop without."""
    start = time.monotonic()
    if _status(lambda: _write(folder) or 0):
        raise RuntimeError("the checkpoints could not be written")
    every = [
        (name, amount, path)
        for name, (_, amounts, _, which, _) in LIMITS.items()
        for amount in amounts
        for path in sorted((folder / which).iterdir())
    ]
    random.Random(seed).shuffle(every)
    counts = collections.Counter[str]()
    for name, amount, path in every[:trials]:
        if time.monotonic() - start > seconds:
            break
        limit, _, word, _, tree = LIMITS[name]

        def work(path=path, tree=tree, limit=limit, amount=amount, word=word) -> int:
            return _attempt(path, tree, lambda: limit(amount), word)

        status = _status(work)
        counts[f"{name}: {NAMES.get(status, f'ABORT {status}')}"] += 1
    if trials is None:
        loop = DiskFormat(True, True, True)
        counts[f"loop: {NAMES[_status(lambda: _level(folder / 'many' / str(loop)))]}"] += 1
    bad = [what for what in counts if not what.endswith(("right", "clear error"))]
    lines = [f"{counts.total()} restores in {time.monotonic() - start:.0f} s"]
    return [*lines, *(f"{what} {number}" for what, number in sorted(counts.items()))], not bad
