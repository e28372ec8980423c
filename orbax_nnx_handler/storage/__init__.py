"""Disks and devices: metadata, reading, transforms, filling, writing; and the process that does it.

It pauses the collector, and one error says what it may have no more of: memory, file descriptors, threads.
All processes go on, or none does: one that fails alone would leave the others waiting in the next collective,
so after each step that can fail on one of them only, all compare notes.
"""

import contextlib
import errno
import gc
import resource
import threading
from collections.abc import Callable, Generator, Iterable
from typing import Literal, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from orbax_nnx_handler.planning.core.errors import RestoreError
from orbax_nnx_handler.planning.core.lines import sized
from orbax_nnx_handler.planning.core.paths import Path, render

T = TypeVar("T")


@contextlib.contextmanager
def paused_collection() -> Generator[None]:
    """Pauses the collector for the time of a `with` block.

    Each new object would otherwise be visited again and again, a tenth of the
    time at 2,000 leaves, and none of them can be garbage yet. At the end many of them count as old.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    before = gc.get_count()[0]
    try:
        yield
    finally:
        if was_enabled:
            # To ask whether anything is frozen takes as long as there is much of it.
            if gc.get_count()[0] - before > _FEW:
                _age()
            gc.enable()


# So few that the collector is through with them in a millisecond.
_FEW = 10_000
# So many are let pass between two collections of everything. Twice what a restore of 20,000 leaves makes.
_MANY = 2_000_000
_aged = (-1, 0)


def _age() -> None:
    """Makes old what is young, as the collector would once it had visited all of it in three rounds.

    Those rounds take a tenth of the restore of 20,000 leaves, and find nothing: it is the result, or is
    freed without them. So that what becomes garbage later is found, the collector is passed by for a while
    only, and not at all where the program has frozen objects of its own, which would be thawed.
    """
    global _aged
    young, rounds = gc.get_count()[0], int(gc.get_stats()[-1]["collections"])
    since, aged = _aged
    aged = aged + young if since == rounds else young
    if aged <= _MANY and not gc.get_freeze_count():
        _aged = rounds, aged
        gc.freeze()
        gc.unfreeze()


What = Literal["memory", "file descriptors", "threads"]

_LIMITS: dict[What, tuple[str, str]] = {
    "memory": ("RLIMIT_AS", "give the process more memory: ulimit -v, or the container's."),
    "file descriptors": ("RLIMIT_NOFILE", "allow the process more open files: ulimit -n 4096."),
    "threads": ("RLIMIT_NPROC", "allow the process more threads: ulimit -u, or the container's pids."),
}
_NO_LIMIT = "unlimited"
_NO_THREAD = "can't start new thread"


def short_of(error: BaseException) -> What | None:
    """Returns what ran out, if that is what an error says."""
    if isinstance(error, MemoryError):
        return "memory"
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return "memory"
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return "file descriptors"
    return "threads" if isinstance(error, RuntimeError) and _NO_THREAD in str(error) else None


def check_threads(number: int = 8) -> None:
    """Raises where the process may not have some more threads: TensorStore, refused one, ends the process.

    Raises:
        RuntimeError: As Python raises it.
    """
    done = threading.Event()
    started: list[threading.Thread] = []
    try:
        for _ in range(number):
            thread = threading.Thread(target=done.wait)
            thread.start()
            started.append(thread)
    finally:
        done.set()
        for thread in started:
            thread.join()


@contextlib.contextmanager
def naming_shortage(failed: str, leaves: Iterable[tuple[Path, int]], less: str = "") -> Generator[None]:
    """Turns what runs out into one error that names the limit and the largest leaf.

    Args:
        failed: What does not work then.
        leaves: The leaves with their bytes.
        less: A hint how to do with less memory.

    Raises:
        RestoreError: Memory, file descriptors or threads did not do.
    """
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        what = short_of(error)
        if what is None:
            raise
        hint = _LIMITS[what][1]
        largest = max(leaves, key=lambda leaf: leaf[1], default=None)
        paths = [] if largest is None else [largest[0]]
        leaf = "" if largest is None else f"\nlargest leaf: {render(largest[0])} {sized(largest[1])}"
        raise RestoreError(
            f"{failed}: this process may have no more {what} ({_limits(what)}).{leaf}",
            paths=paths,
            hints=[hint, less] if less and what == "memory" else [hint],
        ) from error


def _limits(what: What) -> str:
    name = _LIMITS[what][0]
    said = f"{name} is {_limit(name, what)}"
    memory = _limit("RLIMIT_AS", "memory")
    # Each thread takes memory for its stack, and the system's error is the same.
    return f"{said}, or memory: RLIMIT_AS is {memory}" if what == "threads" and memory != _NO_LIMIT else said


def _limit(name: str, what: What) -> str:
    soft = resource.getrlimit(getattr(resource, name))[0]
    if soft == resource.RLIM_INFINITY:
        return _NO_LIMIT
    return sized(soft) if what == "memory" else str(soft)


_MESSAGE_BYTES = 2048


class OtherProcessError(RestoreError):
    """Another process failed; its message is quoted."""


class DisagreementError(RestoreError):
    """The processes of one program look at different checkpoints."""


def agree(step: Callable[[], T]) -> T:
    """Runs a step on every process; raises on all if it fails on any.

    Raises:
        OtherProcessError: The step failed on another process only.
        Exception: Whatever the step itself raised here.
    """
    if jax.process_count() == 1:
        return step()
    result: T | None = None
    failure: Exception | None = None
    try:
        result = step()
    except Exception as error:  # Whatever it is, the others must hear of it.
        failure = error
    messages = _exchange("" if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    for process, message in enumerate(messages):
        if message:
            raise OtherProcessError(f"process {process} failed, so all stop: {message}")
    return result  # type: ignore[return-value]


def agree_on(what: str, step: Callable[[], T]) -> T:
    """Runs a step on every process; raises on all if it fails on any or if their results differ.

    Args:
        what: What the results are, for the message ("checkpoint").
        step: Gives a result whose text tells it from others.

    Raises:
        DisagreementError: The processes found different things; all are listed.
        OtherProcessError: The step failed on another process only.
    """
    result = agree(step)
    if jax.process_count() == 1:
        return result
    found = _exchange(str(result))
    if len(set(found)) > 1:
        listed = "\n".join(f"  process {process}: {text}" for process, text in enumerate(found))
        raise DisagreementError(
            f"the processes do not see the same {what}:\n{listed}",
            hints=["name the step, or wait until every host sees the same files."],
        )
    return result


def _exchange(message: str) -> list[str]:
    encoded = np.zeros(_MESSAGE_BYTES, np.uint8)
    content = message.encode()[:_MESSAGE_BYTES]
    encoded[: len(content)] = np.frombuffer(content, np.uint8)
    gathered = np.asarray(multihost_utils.process_allgather(encoded)).reshape(jax.process_count(), -1)
    return [bytes(row[row != 0]).decode(errors="replace") for row in gathered]
