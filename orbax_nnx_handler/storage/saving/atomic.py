"""A directory of this machine appears under its name whole, or not at all.

What is written lies beside its place, in a directory of this process's own, and gets its name at the
end. Where something is to be replaced, the two names are exchanged in one step, so that whoever looks,
or a process that dies at any moment, finds the old or the new. What a process that died was writing
goes when the next one writes under the same name: a lock tells that nobody holds it any more.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import pathlib
import platform
import shutil
import sys
import time
from collections.abc import Generator, Iterable
from typing import Any, cast

import jax
import numpy as np
from etils import epath

from orbax_nnx_handler.orbax_interfaces import v0 as ocp
from orbax_nnx_handler.planning.core.errors import RestoreError
from orbax_nnx_handler.planning.core.paths import Path, nodes_of
from orbax_nnx_handler.storage import agree, check_threads, naming_shortage
from orbax_nnx_handler.storage.checkpoint.directories import is_working_name, working_name
from orbax_nnx_handler.storage.checkpoint.wrong_paths import check_replaceable
from orbax_nnx_handler.storage.stores.kvstore import files_at
from orbax_nnx_handler.storage.stores.locations import cannot_write, is_url

# How often and at what distance a directory that is to go is looked at.
_CLEARINGS, _CLEARING_S, _TIMES_ABSENT = 50, 0.02, 3
# Of Linux (renameat2, linux/fs.h) and of macOS (renamex_np, sys/stdio.h).
_HERE, _EXCHANGE, _SWAP = -100, 2, 2
# In a directory that is being written to: locked by its process, and says on which machine that runs.
_OWNER = ".owner"
_REPLACED = ".replaced"
# To list and remove a tree of directories takes one for each level.
_SPARE_DESCRIPTORS = 8


def save_item(destination: epath.Path, arguments: ocp.args.PyTreeSave, *, force: bool) -> None:
    """Has Orbax write one item.

    Args:
        destination: The item directory.
        arguments: What is written.
        force: Whether to replace what is there.

    Raises:
        ValueError: Something is there, and is not to be replaced.
        NotACheckpointError: What is there is more than one item, or none.
        RestoreError: It cannot be written.
    """
    is_alone = jax.process_count() == 1
    is_taken = is_alone and files_at(destination).exists(destination)
    if force or is_taken or not is_url(destination):
        # Of several processes, one that is late may see what the first has begun to write.
        agree(lambda: check_replaceable(destination, files_at(destination)))
    if is_taken and not force:  # Of several processes, Orbax asks.
        raise ValueError(f"Destination {destination} already exists.\nhint: pass force=True to replace it.")
    opened = cast(Any, ocp.Checkpointer(ocp.PyTreeCheckpointHandler()))
    if is_url(destination) or not is_alone:
        # Other processes would have to know this one's directory; a bucket has none to rename.
        with opened as checkpointer, writing(destination, ()) if is_alone else contextlib.nullcontext():
            checkpointer.save(destination, args=arguments, force=force)
        return
    leaves = ((path, _nbytes(value)) for path, value in nodes_of(arguments.item))
    with opened as checkpointer, writing(destination, leaves), appearing(destination) as unfinished:
        checkpointer.save(unfinished, args=arguments)


def _nbytes(value: Any) -> int:
    return int(getattr(value, "nbytes", None) or np.asarray(value).nbytes)


@contextlib.contextmanager
def writing(destination: epath.Path, leaves: Iterable[tuple[Path, int]]) -> Generator[None]:
    """Says that it was the destination which failed, or that the process may have no more of something.

    Args:
        destination: Where it is written.
        leaves: The leaves with their bytes; the largest is named where something runs out.

    Raises:
        RestoreError: A full disk, a permission, a store's refusal, an interface that is down, memory,
            threads, descriptors.
    """
    failed = f"{destination} cannot be written"
    try:
        with naming_shortage(failed, leaves):
            check_threads()
            yield
    except RestoreError:
        raise
    except Exception as error:
        if is_url(destination):
            # The errors of a store's library are of no common type.
            raise cannot_write(destination, error) from error
        # TensorStore raises ValueError for most of what a disk refuses.
        if not isinstance(error, OSError | ValueError):
            raise
        reason = str(error).partition(" [source locations=")[0]
        raise RestoreError(f"{failed}: {reason}", hints=["nothing was left at the destination."]) from error


@contextlib.contextmanager
def appearing(destination: epath.Path) -> Generator[epath.Path]:
    """Gives a directory to write to, which is at the destination at the end, or goes.

    Directories above the destination that do not exist yet appear with it: an empty
    `new/1200` would be a finished step to a manager. What is at the destination is replaced.

    Args:
        destination: An absolute path of this machine.

    Raises:
        OSError: It cannot be written there.
    """
    top = destination
    while not top.parent.exists():
        top = top.parent
    _clear_left_behind(top)
    work = top.parent / working_name(top.name)
    with _held(work) as spare:
        try:
            inside = work / destination.relative_to(top.parent)
            inside.parent.mkdir(parents=True, exist_ok=True)
            yield inside
            if top == destination and destination.exists():
                _replace(inside, destination)
            else:
                (work / top.name).rename(top)
        except BaseException:
            spare.close()
            _clear(work)
            raise
        # Nothing writes any more, so that there is nothing to wait for.
        _remove(work)


@contextlib.contextmanager
def _held(work: epath.Path) -> Generator[contextlib.ExitStack]:
    """Makes a directory and holds its lock, which goes with the process however that ends.

    Gives descriptors to be closed where the process may open no more, so that it can clear up.
    """
    try:
        descriptor = _locked(work)
        try:
            with contextlib.ExitStack() as spare:
                with contextlib.suppress(OSError):
                    for _ in range(_SPARE_DESCRIPTORS):
                        spare.callback(os.close, os.dup(descriptor))
                yield spare
        finally:
            os.close(descriptor)
    except KeyboardInterrupt:
        # It may come when there is a directory, and before whoever asked for it can clear it up.
        _clear(work)
        raise


def _locked(work: epath.Path) -> int:
    """Makes a directory with the file that tells whose it is, and returns that opened and locked.

    Another process may take it for one left behind until it is locked, and remove it; then anew.

    Raises:
        OSError: It cannot be made, or another thread of this process writes under the same name.
    """
    for _ in range(_CLEARINGS):
        work.mkdir(exist_ok=True)
        try:
            descriptor = os.open(work / _OWNER, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except FileNotFoundError:
            continue
        except OSError:
            with contextlib.suppress(OSError):
                pathlib.Path(work).rmdir()
            raise
        if _lock(descriptor) and _is_at(work / _OWNER, descriptor):
            return descriptor
        os.close(descriptor)
        time.sleep(_CLEARING_S)
    raise OSError(errno.EBUSY, "another save to it is under way in this process", str(work))


def _lock(descriptor: int) -> bool:
    """Locks a file and writes this machine into it; False where somebody else holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(descriptor, _machine())
    except BlockingIOError:
        return False
    except OSError:
        # On a file system without locks nobody will know that it was left behind, so it will stay.
        return True
    return True


def _is_at(path: epath.Path, descriptor: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(pathlib.Path(path).stat(), os.fstat(descriptor))
    return False


def _clear_left_behind(top: epath.Path) -> None:
    """Removes what processes of this machine that are dead were writing under a name."""
    left: list[epath.Path] = []
    with contextlib.suppress(OSError):
        left += [child for child in top.parent.iterdir() if is_working_name(child.name, top.name)]
    for work in left:
        # Where names cannot be exchanged, a process may have died while this was all that there was.
        if top.exists() or not (work / f"{top.name}{_REPLACED}").exists():
            with contextlib.suppress(OSError):
                _clear_if_dead(work)


def _clear_if_dead(work: epath.Path) -> None:
    try:
        descriptor = os.open(work / _OWNER, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        pathlib.Path(
            work
        ).rmdir()  # A process died before it had put anything there; where there is something, it stays.
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Empty where a process died before it had written that.
        if os.read(descriptor, 1000) in (_machine(), b""):
            _remove(work)
    finally:
        os.close(descriptor)


def _remove(work: epath.Path) -> None:
    """Removes a directory; last of it what tells whose it is, for this process may die meanwhile."""
    with contextlib.suppress(OSError):
        for child in work.iterdir():
            if child.name != _OWNER:
                shutil.rmtree(child, ignore_errors=True)
    shutil.rmtree(work, ignore_errors=True)


def _machine() -> bytes:
    """Tells this machine, since it was started, from another one that sees the same files."""
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id")
    return boot.read_bytes() if boot.exists() else platform.node().encode()


def _replace(new: epath.Path, old: epath.Path) -> None:
    """Gives the name of what is there to another directory; what was there lies where that was."""
    if _exchange(os.fsencode(new), os.fsencode(old)):
        return
    # A file system that cannot exchange names: for a moment there is nothing under the name.
    aside = new.parent / f"{new.name}{_REPLACED}"
    old.rename(aside)
    try:
        new.rename(old)
    except BaseException:
        aside.rename(old)
        raise


def _exchange(one: bytes, other: bytes) -> bool:
    library = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "linux" and hasattr(library, "renameat2"):
        return library.renameat2(_HERE, one, _HERE, other, _EXCHANGE) == 0
    if sys.platform == "darwin" and hasattr(library, "renamex_np"):
        return library.renamex_np(one, other, _SWAP) == 0
    return False


def _clear(directory: epath.Path) -> None:
    """Removes a directory into which threads of an interrupted save may still write."""
    absent = 0
    for _ in range(_CLEARINGS):
        absent = 0 if directory.exists() else absent + 1
        if absent == _TIMES_ABSENT:
            return
        _remove(directory)
        time.sleep(_CLEARING_S)
