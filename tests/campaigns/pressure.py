"""Little memory, few descriptors or threads, small files, a full disk: done, or one error that names it.

Restores, forced saves and conversions, each in a process of its own under one of the system's own limits.
Where one fails, what was there before is whole and nothing new lies beside it.
"""

import collections
import contextlib
import ctypes
import dataclasses
import io
import logging
import os
import pathlib
import random
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from flax import nnx

import orbax_nnx_handler
from orbax_nnx_handler import RestoreError, cli, restore
from tests.campaigns.watching import in_child, memory_bytes
from tests.storage.checkpoints import FORMATS, DiskFormat, save

RIGHT, CLEAR, WRONG, TRACEBACK = 0, 3, 4, 5
ENDED = (127, -signal.SIGABRT)
"""A C or C++ library has ended the process: it had no memory for a new thread's own data. Rare."""
NAMES = {RIGHT: "right", CLEAR: "one clear error", WRONG: "WRONG", TRACEBACK: "another library's error"}
Tree = dict[str, np.ndarray[Any, Any]]
MANY: Tree = {f"layer_{at}": np.full((64, 64), float(at), np.float32) for at in range(300)}
LARGE: Tree = {"w": np.random.default_rng(0).integers(0, 1 << 23, 1 << 24).astype(np.float32)}
OLD: Tree = {"w": np.ones((64, 64), np.float32)}
TREES = {"many": MANY, "large": LARGE}
DISK_MB = 6
_SYS_ADMIN, _SYS_RESOURCE = 21, 24
_SYSCALL_CAPSET, _CAPABILITIES_3 = 126, 0x20080522  # Of Linux on x86-64.


class Wrong(AssertionError):
    """What is there afterwards is neither the old nor the new."""


def _write(folder: pathlib.Path) -> None:
    for disk_format in FORMATS:
        save(folder / "many" / str(disk_format), MANY, disk_format)
    for disk_format in FORMATS[::2]:
        save(folder / "large" / str(disk_format), LARGE, disk_format)


def _as_wanted(tree: Tree) -> Any:
    import jax

    return {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in tree.items()}


def _expect(path: pathlib.Path, tree: Tree, found: Any = None) -> None:
    found = found or restore(path, _as_wanted(tree))
    if not all(np.array_equal(found[name], value) for name, value in tree.items()):
        raise Wrong(path)


def _state(tree: Tree) -> nnx.State[Any, Any]:
    return nnx.State({name: nnx.Param(value) for name, value in tree.items()})


def _names_in(folder: pathlib.Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


@contextlib.contextmanager
def _restoring(source: pathlib.Path, _: pathlib.Path, tree: Tree) -> Iterator[Callable[[], None]]:
    found: list[Any] = []
    yield lambda: found.append(restore(source, _as_wanted(tree)))
    if found:
        _expect(source, tree, found[0])


@contextlib.contextmanager
def _saving(_: pathlib.Path, work: pathlib.Path, tree: Tree) -> Iterator[Callable[[], None]]:
    """A forced save over an old item: that or the new one is whole, alone in its directory."""
    orbax_nnx_handler.save(work / "item", _state(OLD))
    new, done = _state(tree), []

    def act() -> None:
        orbax_nnx_handler.save(work / "item", new, force=True)
        done.append(True)

    yield act
    if _names_in(work) != ["item"]:
        raise Wrong(f"left in {work}: {_names_in(work)}")
    _expect(work / "item", tree if done else OLD)


@contextlib.contextmanager
def _converting(source: pathlib.Path, work: pathlib.Path, tree: Tree) -> Iterator[Callable[[], None]]:
    """A conversion: it is there and whole, or nothing is."""
    done: list[bool] = []

    def act() -> None:
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            status = cli.main(["convert", str(source), str(work / "out")])
        if status == 1:
            raise RestoreError(said.getvalue())
        done.append(True)

    yield act
    if _names_in(work) != (["out"] if done else []):
        raise Wrong(f"left in {work}: {_names_in(work)}")
    if done:
        _expect(work / "out", tree)


ACTIONS = {"restore": _restoring, "save": _saving, "convert": _converting}


def _soft(limit: int, value: int) -> None:
    resource.setrlimit(limit, (value, resource.getrlimit(limit)[1]))


def _descriptors(number: int) -> None:
    _soft(resource.RLIMIT_NOFILE, len(list(pathlib.Path("/proc/self/fd").iterdir())) + number)


def _memory(more: int) -> None:
    mapped = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    _soft(resource.RLIMIT_AS, mapped + more)


def _as_another_user() -> None:
    """Has the kernel count and bound this process's threads, which it does not do for root.

    Files may still be opened as before: only the right to exceed limits is given up.
    """
    if os.getuid() == 0:
        os.setresuid(50_000 + os.getpid() % 10_000, 0, 0)
        kept = (1 << 32) - 1 & ~(1 << _SYS_ADMIN | 1 << _SYS_RESOURCE)
        head = (ctypes.c_uint32 * 2)(_CAPABILITIES_3, 0)
        sets = (ctypes.c_uint32 * 6)(kept, kept, 0, 0x1FF, 0x1FF, 0)
        if ctypes.CDLL(None).syscall(_SYSCALL_CAPSET, head, sets):
            raise OSError("capabilities cannot be given up")


def _processes(more: int) -> None:
    _soft(resource.RLIMIT_NPROC, len(list(pathlib.Path("/proc/self/task").iterdir())) + more)


def _threads(_: int) -> None:
    def refuse(*_):
        raise RuntimeError("can't start new thread")

    threading.Thread.start = refuse


def _file_size(largest: int) -> None:
    _soft(resource.RLIMIT_FSIZE, largest)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shortage:
    """What runs out, how much is left of it, and the words one of which an error has to say."""

    limit: Callable[[int], object]
    amounts: tuple[int, ...]
    words: tuple[str, ...]
    tree: str
    before: Callable[[], object] = lambda: None
    actions: tuple[str, ...] = ("restore", "save", "convert")


SHORTAGES = {
    "descriptors": Shortage(
        limit=_descriptors, amounts=(2, 6, 40), words=("descriptor", "Too many open files"), tree="many"
    ),
    "memory": Shortage(
        limit=_memory, amounts=(10 << 20, 50 << 20, 400 << 20), words=("memory",), tree="large"
    ),
    "threads, simulated": Shortage(
        limit=_threads, amounts=(0,), words=("thread",), tree="many", actions=("restore",)
    ),
    "threads": Shortage(
        limit=_processes, amounts=(0, 1, 2, 4), words=("thread",), tree="many", before=_as_another_user
    ),
    "file size": Shortage(
        limit=_file_size,
        amounts=(0, 1 << 16, 4 << 20),
        words=("File too large",),
        tree="large",
        actions=("save", "convert"),
    ),
    "disk": Shortage(
        limit=lambda _: None,
        amounts=(0,),
        words=("No space left",),
        tree="large",
        actions=("save", "convert"),
    ),
}


def _attempt(shortage: Shortage, amount: int, action: str, source: pathlib.Path, work: pathlib.Path) -> int:
    import jax

    logging.disable(logging.CRITICAL)
    shortage.before()
    jax.devices()
    limits = {name: resource.getrlimit(name) for name in map(_number, ("AS", "NOFILE", "NPROC", "FSIZE"))}
    status = RIGHT
    try:
        with ACTIONS[action](source, work, TREES[shortage.tree]) as act:
            shortage.limit(amount)
            try:
                act()
            except RestoreError as error:
                status = CLEAR if any(word in str(error) for word in shortage.words) else TRACEBACK
                if status != CLEAR:
                    _say(f"{action}: {error}")
            except Exception as error:
                status = TRACEBACK
                _say(f"{action}: {error!r}")
            finally:
                for name, kept in limits.items():
                    resource.setrlimit(name, kept)
    except BaseException as error:
        _say(f"{action}, afterwards: {error!r}")
        return WRONG
    return status


def _number(name: str) -> int:
    return getattr(resource, f"RLIMIT_{name}")


def _say(text: str) -> None:
    os.write(2, f"{text}\n"[:800].encode())


def _level(path: pathlib.Path) -> int:
    """Returns 0 where descriptors, threads and memory stay level over 500 restores in a loop."""
    logging.disable(logging.CRITICAL)
    held: dict[int, tuple[int, int, int]] = {}
    for number in range(1, 501):
        restore(path, _as_wanted(MANY))
        if number in (100, 300, 500):
            held[number] = _held()
    _say(f"{path.name}: descriptors, threads, memory after restores: {held}")
    grown = held[500][2] - held[100][2]
    return RIGHT if held[500][:2] == held[100][:2] and grown < 20 << 20 else WRONG


def _held() -> tuple[int, int, int]:
    tasks, opened = (len(list(pathlib.Path(f"/proc/self/{name}").iterdir())) for name in ("task", "fd"))
    return opened, tasks, memory_bytes()


def _status(work: Callable[[], int]) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(in_child(work), 0)[1])


@contextlib.contextmanager
def _small_disk(place: pathlib.Path) -> Iterator[bool]:
    """Mounts a disk of a few megabytes, and gives whether that may be done here."""
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(place)]
    mounted = os.getuid() == 0 and subprocess.run(words, check=False, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(place)], check=True)


def _sources(folder: pathlib.Path, shortage: Shortage, action: str) -> list[pathlib.Path]:
    found = sorted((folder / shortage.tree).iterdir())
    return found if action == "restore" else found[-1:]


def run(folder: pathlib.Path, *, seed: int, trials: int | None, seconds: float) -> tuple[list[str], bool]:
    """Works under each limit, each time in a process of its own; then restores in a loop without."""
    start = time.monotonic()
    folder.chmod(0o755)
    if _status(lambda: _write(folder) or 0):
        raise RuntimeError("the checkpoints could not be written")
    every = [
        (name, amount, action, path)
        for name, shortage in SHORTAGES.items()
        for amount in shortage.amounts
        for action in shortage.actions
        for path in _sources(folder, shortage, action)
    ]
    random.Random(seed).shuffle(every)
    counts = collections.Counter[str]()
    with _small_disk(folder / "disk") as mounted:
        for number, (name, amount, action, path) in enumerate(every[:trials]):
            if time.monotonic() - start > seconds:
                break
            if name == "disk" and not mounted:
                counts["disk: not asked, for none can be mounted here: right"] += 1
                continue
            work = folder / ("disk" if name == "disk" else "work") / str(number)
            work.mkdir(parents=True)

            def act(name=name, amount=amount, action=action, path=path, work=work) -> int:
                return _attempt(SHORTAGES[name], amount, action, path, work)

            status = _status(act)
            if status in ENDED and name == "memory" and action == "restore":
                # As if it had been killed; nothing is written.
                counts["memory, restore: ended by a library of C or C++: right"] += 1
                continue
            counts[f"{name}, {action}: {NAMES.get(status, f'ABORT {status}')}"] += 1
            if status not in (RIGHT, CLEAR):
                _say(f"  that was {name} {amount}, {action}, {path.name}: {status}")
            subprocess.run(["rm", "-rf", str(work)], check=True)
    if trials is None:
        loop = folder / "many" / str(DiskFormat(True, True, True))
        counts[f"loop: {NAMES[_status(lambda: _level(loop))]}"] += 1
    bad = [what for what in counts if not what.endswith(("right", "clear error"))]
    lines = [f"{counts.total()} processes in {time.monotonic() - start:.0f} s"]
    return [*lines, *(f"{what} {number}" for what, number in sorted(counts.items()))], not bad
