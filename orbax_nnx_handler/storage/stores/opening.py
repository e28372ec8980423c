"""Opens files of this machine for reading: regular ones, below the folder that they belong to.

A checkpoint may be a stranger's. A pipe in place of a file would wait for ever, a device may do
anything, and a link may lead to any file that this user can read. Links that stay within
the folder are followed, and those of Hugging Face's cache, which keeps the files of a snapshot in
a folder `blobs` of their own (https://huggingface.co/docs/huggingface_hub/guides/manage-cache).
"""

import os
import stat

_FLAGS = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
_SNAPSHOTS, _BLOBS = "/snapshots/", "/blobs/"


class OutsideError(OSError):
    """A link leads out of the checkpoint."""


def open_file(folder: str, name: str) -> int:
    """Returns a descriptor of a regular file.

    Args:
        folder: What it must lie in, links included.
        name: Its path below the folder.

    Raises:
        OutsideError: A link on the way leads elsewhere.
        OSError: There is no such file, it may not be read, or it is a pipe, a device or a folder.
    """
    path = f"{folder.rstrip('/')}/{name}"
    if _has_link(folder, name):
        path = _target(folder, path)
    descriptor = os.open(path, _FLAGS)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("it is no regular file")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def check_links(folder: str, name: str) -> None:
    """Raises if a link below a folder of files leads out, for readers that open files themselves.

    Raises:
        OutsideError: Says where it leads.
    """
    for path, folders, files in os.walk(f"{folder}/{name}"):
        for entry in (*folders, *files):
            inner = f"{path}/{entry}"[len(folder) + 1 :]
            if _has_link(folder, inner):
                _target(folder, f"{folder}/{inner}")


def _has_link(folder: str, name: str) -> bool:
    path = folder.rstrip("/")
    for part in name.split("/"):
        path = f"{path}/{part}"
        if os.path.islink(path):  # noqa: PTH114 - thousands of calls
            return True
    return False


def _target(folder: str, path: str) -> str:
    """Returns what a path with links means."""
    home = os.path.realpath(folder).rstrip("/") + "/"
    real = os.path.realpath(path)
    cache, snapshots, _ = home.rpartition(_SNAPSHOTS)
    if real.startswith(home) or (snapshots and real.startswith(cache + _BLOBS)):
        return real
    raise OutsideError(f"it is a link that leads out of the checkpoint, to {real}")
