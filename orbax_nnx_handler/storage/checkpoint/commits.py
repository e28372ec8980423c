"""Which saves were finished.

Where a directory can be renamed, Orbax gives a save its name at the end. On gs://, and
wherever its `CommitFileTemporaryPath` is used, a save has its name from the start, and a
file `commit_success.txt` says at the end that all of it is there: in the step, and in each item.
"""

import os

from etils import epath

from orbax_nnx_handler.storage.checkpoint.fields import FieldError, parse_object
from orbax_nnx_handler.storage.stores.files import Files, Read

COMMIT_FILE = "commit_success.txt"
STEP_FILE = "_CHECKPOINT_METADATA"
UNFINISHED = ".orbax-checkpoint-tmp"
"""What Orbax has in the name of a directory until everything in it is written."""


def commit_questions(directory: epath.Path) -> list[Read]:
    """Returns what has to be known to tell whether an item and its step were finished."""
    folders = (directory, directory.parent)
    return [Read(os.fspath(folder / name)) for folder in folders for name in (COMMIT_FILE, STEP_FILE)]


def was_interrupted(item: epath.Path, files: Files) -> epath.Path | None:
    """Returns the item, or the step around it, if its save was never finished."""
    step = item.parent
    files.ask(*commit_questions(item))
    if _is_step(step, files) and lacks_commit(step, files):
        return step
    if lacks_commit(item, files) and not _has_commit(step, files):
        return item
    return None


def lacks_commit(directory: epath.Path, files: Files) -> bool:
    """Tells whether a directory's save has begun and no mark says that it ended."""
    if _has_commit(directory, files):
        return False
    return os.fspath(directory).startswith("gs://") or _is_only_begun(directory, files)


def _has_commit(directory: epath.Path, files: Files) -> bool:
    return files.optional(directory / COMMIT_FILE) is not None


def _is_step(directory: epath.Path, files: Files) -> bool:
    return files.optional(directory / STEP_FILE) is not None


def _is_only_begun(directory: epath.Path, files: Files) -> bool:
    """Tells whether Orbax noted when a save began, and not when it ended."""
    try:
        times = parse_object(files.optional(directory / STEP_FILE))
    # Absent, or damaged: nothing else depends on this file.
    except FieldError:
        return False
    return times.get("init_timestamp_nsecs") is not None and times.get("commit_timestamp_nsecs") is None
