"""What a process may not have more of: memory, file descriptors, threads; said in one error."""

import contextlib
import errno
import resource
from collections.abc import Generator, Iterable
from typing import Literal

from etils import epath

from orbax_nnx_handler.planning.core.errors import RestoreError
from orbax_nnx_handler.planning.core.leaves import WantedLeaf
from orbax_nnx_handler.planning.core.lines import sized
from orbax_nnx_handler.planning.core.paths import render

What = Literal["memory", "file descriptors", "threads"]

_LIMITS: dict[What, tuple[str, str]] = {
    "memory": (
        "RLIMIT_AS",
        (
            "give the process more memory (ulimit -v, or the container's), or bound what is under way "
            "at once: NNXLinenHandler(restore_concurrent_gb=1)."
        ),
    ),
    "file descriptors": ("RLIMIT_NOFILE", "allow the process more open files: ulimit -n 4096."),
    "threads": ("RLIMIT_NPROC", "allow the process more threads: ulimit -u, or the container's pids."),
}
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


@contextlib.contextmanager
def naming_shortage(directory: epath.Path, leaves: Iterable[WantedLeaf]) -> Generator[None]:
    """Turns what runs out into one error that names the limit and the largest leaf.

    Raises:
        RestoreError: Memory, file descriptors or threads did not do.
    """
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        what = short_of(error)
        if what is None:
            raise
        name, hint = _LIMITS[what]
        largest = max(leaves, key=lambda leaf: leaf.nbytes, default=None)
        paths = [] if largest is None else [largest.path]
        leaf = "" if largest is None else f"\nlargest leaf: {render(largest.path)} {sized(largest.nbytes)}"
        raise RestoreError(
            f"{directory} cannot be restored: this process may have no more {what} "
            f"({name} is {_limit(name, what)}).{leaf}",
            paths=paths,
            hints=[hint],
        ) from error


def _limit(name: str, what: What) -> str:
    soft = resource.getrlimit(getattr(resource, name))[0]
    if soft == resource.RLIM_INFINITY:
        return "unlimited"
    return sized(soft) if what == "memory" else str(soft)
