"""What a directory or a file is: a manager's root, a step, an item, an archive; and whether it is finished.

Where a directory can be renamed, Orbax gives a save its name at the end. On gs://, and
wherever its `CommitFileTemporaryPath` is used, a save has its name from the start, and a
file `commit_success.txt` says at the end that all of it is there: in the step, and in each item.

Orbax names a step by its number, padded with zeros or not, or by a prefix, an underscore
and the number (`orbax.checkpoint.path.step`); all steps of a manager have the same prefix.
Other names that end in a number (`4_bak_20240101`, `backup-5`, `3.converting-815`) are a user's.

big_vision wrote `checkpoint.npz` over and over, and at some steps a copy of it,
`checkpoint.npz-000012000` (big_vision/utils.py `save_checkpoint`, until it came to
`tssave`). So the file without a number is the newest state, if it is there.
Weights are published in files of any name that ends in `.npz`.
"""

import logging
import os
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from etils import epath

from orbax_nnx_handler.storage.checkpoint import FieldError, parse_object
from orbax_nnx_handler.storage.checkpoint.checkpoint import METADATA_KEY
from orbax_nnx_handler.storage.stores.files import Files, ReadFile
from orbax_nnx_handler.storage.stores.locations import parents_of

_logger = logging.getLogger(__name__)

COMMIT_FILE = "commit_success.txt"
STEP_FILE = "_CHECKPOINT_METADATA"
UNFINISHED = ".orbax-checkpoint-tmp"
"""What Orbax has in the name of a directory until everything in it is written."""


def commit_questions(directory: epath.Path) -> list[ReadFile]:
    """Returns what has to be known to tell whether an item and its step were finished."""
    folders = (directory, directory.parent)
    return [ReadFile(os.fspath(folder / name)) for folder in folders for name in (COMMIT_FILE, STEP_FILE)]


def stamps_of(item: epath.Path, files: Files) -> dict[str, bytes]:
    """Returns the notes of when the saves of an item and of its step began and ended, by their files."""
    notes = [folder / STEP_FILE for folder in (item, item.parent)]
    known = {os.fspath(note): files.optional(note) for note in notes}
    return {file: content for file, content in known.items() if content is not None}


def was_interrupted(item: epath.Path, files: Files) -> epath.Path | None:
    """Returns the item, or the step around it, if its save was never finished."""
    step = item.parent
    files.ask(*commit_questions(item))
    if is_noted_step(step, files) and lacks_commit(step, files):
        return step
    is_lacking = lacks_commit(item, files)  # In any case: a mark that cannot be read is an error.
    if _has_commit(step, files):
        return None
    return item if is_lacking or _has_begun_its_note(item, files) else None


def _has_begun_its_note(item: epath.Path, files: Files) -> bool:
    """Tells whether a save ended while it wrote the note of its beginning: the note is empty, no tree there.

    Where the tree is there, the note was damaged later, and nothing else depends on it.
    """
    noted = (files.optional(folder / STEP_FILE) for folder in (item, item.parent))
    is_empty = any(content is not None and not content.strip() for content in noted)
    return is_empty and not _has_commit(item, files) and files.entries(item).keys().isdisjoint(_ITEM_FILES)


def was_only_begun(directory: epath.Path, files: Files) -> epath.Path | None:
    """Returns the save in, at or around a directory that has begun and got no tree and no mark."""
    around = [*parents_of(directory)[:1], directory]
    if any(files.optional(folder / COMMIT_FILE) is not None for folder in around):
        return None
    for folder in around:
        if is_noted_step(folder, files) and lacks_commit(folder, files):
            return folder
    folders = [directory, *files.folders(directory)[:_PROBED_REMOTE]]
    files.look_into(folders)
    begun = (folder for folder in folders if _holds_parts(folder, files) and lacks_commit(folder, files))
    return next(begun, None)


def _holds_parts(directory: epath.Path, files: Files) -> bool:
    """Tells whether a directory holds what Orbax writes before an item's tree."""
    return any(name in _BEFORE_THE_TREE or _PROCESS_PART.fullmatch(name) for name in files.entries(directory))


def lacks_commit(directory: epath.Path, files: Files) -> bool:
    """Tells whether a directory's save has begun and no mark says that it ended."""
    if _has_commit(directory, files):
        return False
    return os.fspath(directory).startswith("gs://") or _is_only_begun(directory, files)


def _has_commit(directory: epath.Path, files: Files) -> bool:
    # A mark that cannot be read is not absent: for an older step, the newest would be silently passed over.
    return files.content(directory / COMMIT_FILE) is not None


def is_noted_step(directory: epath.Path, files: Files) -> bool:
    """Tells whether Orbax noted in a directory that it is a step."""
    return files.optional(directory / STEP_FILE) is not None


def _is_only_begun(directory: epath.Path, files: Files) -> bool:
    """Tells whether Orbax noted when a save began, and not when it ended."""
    try:
        times = parse_object(files.optional(directory / STEP_FILE))
    # Absent, or damaged: nothing else depends on this file.
    except FieldError:
        return False
    return times.get("init_timestamp_nsecs") is not None and times.get("commit_timestamp_nsecs") is None


_NAME = re.compile(r"(?P<run>.*)\.npz(?:-(?P<step>[0-9]+))?")
# Written under this name first and renamed when it is complete.
_UNFINISHED_ARCHIVE = re.compile(r".*\.npz-TEMPORARY")
# What a zip file begins with: its first member, or its directory if it has none.
_BEGINNINGS = (b"PK\x03\x04", b"PK\x05\x06")
_FLAX_FILE = re.compile(r"checkpoint_[0-9]+")
_STEP = re.compile(r"(?:(?P<prefix>.+)_)?(?P<step>[0-9]{1,18})")
_PROCESS_PART = re.compile(r"ocdbt\.process_[0-9]+")
# Besides a process's own database: when the save began, how arrays are sharded, and their shapes.
_BEFORE_THE_TREE = (STEP_FILE, "_sharding", "array_metadatas")
_WORKING = re.compile(r".+\.converting-[0-9]+")
HUGGING_FACE_INDEX = ".index.json"
HUGGING_FACE_SAFETENSORS = ".safetensors"
_FLAX_SUFFIX = ".msgpack"
HUGGING_FACE_FILES = (
    *("flax_model.msgpack", "flax_model.msgpack.index.json"),
    *("diffusion_flax_model.msgpack", "model.safetensors", "model.safetensors.index.json"),
)
"""What transformers and diffusers call a model's weights, those of Flax first."""
# A file that is the only part is no part.
_WEIGHTS_PART = re.compile(
    r"(?P<whole>.+)-(?P<number>[0-9]{1,9})-of-(?!0*1\.)(?P<count>[0-9]{1,9})(?P<kind>\.msgpack|\.safetensors)"
)
CONFIG_FILE = "config.json"
_LONGEST_CONFIG = 1 << 20
_ITEM_FILES = ("_METADATA", "manifest.ocdbt", "checkpoint", ".zgroup")
# How many folders are looked into to see whether they hold an array; behind a network each costs a request.
_PROBED, _PROBED_REMOTE = 64, 4
_MORE_STEPS = 3
"""So many times the steps before are asked together for their marks."""


def is_archive(path: epath.Path, files: Files) -> bool:
    """Tells whether a path is a NumPy archive, by its name or else by its first bytes."""
    if not files.is_file(path):
        return False
    if _NAME.fullmatch(path.name):
        return True
    return files.beginning(path, len(_BEGINNINGS[0])) in _BEGINNINGS


def is_numbered(path: epath.Path, files: Files) -> bool:
    """Tells whether a file is big_vision's copy of one step."""
    named = _NAME.fullmatch(path.name)
    return named is not None and named["step"] is not None and files.is_file(path)


def is_unfinished_archive(path: epath.Path) -> bool:
    """Tells whether a file is one that big_vision was still writing."""
    return _UNFINISHED_ARCHIVE.fullmatch(path.name) is not None


def archives_in(directory: epath.Path, files: Files) -> list[epath.Path]:
    """Returns all archives of a directory, by name."""
    names = [name for name in files.entries(directory) if _NAME.fullmatch(name)]
    return [directory / name for name in names if files.has_file(directory, name)]


def newest_in(directory: epath.Path, files: Files) -> list[epath.Path]:
    """Returns the newest archive of each run that has any in a directory."""
    newest: dict[str, epath.Path] = {}
    for path in sorted(archives_in(directory, files), key=_age):
        newest[_match(path)["run"]] = path
    return list(newest.values())


def _age(path: epath.Path) -> tuple[bool, int]:
    step = _match(path)["step"]
    return step is None, int(step or 0)


def _match(path: epath.Path) -> re.Match[str]:
    named = _NAME.fullmatch(path.name)
    if named is None:
        raise ValueError(f"{path} has not the name of a NumPy archive")
    return named


def is_item(path: epath.Path, files: Files) -> bool:
    """Tells whether a directory is one stored tree."""
    return _is_listed_item(path, files) or bool(_array_folders(path, files))


def _is_listed_item(path: epath.Path, files: Files) -> bool:
    if _PROCESS_PART.fullmatch(path.name):
        return False
    return any(files.has_file(path, name) for name in (*_ITEM_FILES, *HUGGING_FACE_FILES))


def is_replaceable(path: epath.Path, files: Files) -> bool:
    """Tells whether all that a directory holds is one item, as Orbax writes it or was writing it."""
    if any(files.has_file(path, name) for name in _ITEM_FILES):
        return True
    parts = (*_BEFORE_THE_TREE, COMMIT_FILE)
    names = files.entries(path)
    return files.is_folder(path) and all(
        name in parts or _PROCESS_PART.fullmatch(name) is not None for name in names
    )


def _array_folders(path: epath.Path, files: Files) -> list[epath.Path]:
    """Returns folders in a directory that each hold an array, some of them if there are many."""
    folders = files.folders(path)
    if files.remote and any(folder.name.isdecimal() for folder in folders):
        # A root with steps: what lies in each of them is of no interest yet.
        return []
    folders = folders[: _PROBED_REMOTE if files.remote else _PROBED]
    files.look_into(folders)
    keys = METADATA_KEY.values()
    return [folder for folder in folders if any(files.has_file(folder, key) for key in keys)]


def items_of(step: epath.Path, files: Files) -> list[epath.Path]:
    """Returns the finished items of a step that hold a stored tree, by name."""
    folders = [child for child in files.folders(step) if not is_temporary(child.name)]
    if files.remote:
        # A step has few items, each with a file that tells; a directory of many folders is none.
        few = 2 * _PROBED_REMOTE
        folders = folders if len(folders) <= few else folders[:_PROBED_REMOTE]
    files.look_into(folders)
    listed = [child for child in folders if _is_listed_item(child, files)]
    if listed and files.remote:
        return listed
    if files.remote:
        folders = folders[:_PROBED_REMOTE]
    return [child for child in folders if is_item(child, files)]


def step_names(names: Iterable[str]) -> dict[int, str]:
    """Returns the names of a root's steps, in rising order of the steps.

    Numbers alone are the steps wherever there are any; else the names with a prefix are,
    of which there may be several groups. Of two names of one number the shorter one is taken.
    """
    found: dict[bool, dict[int, str]] = {True: {}, False: {}}
    for name in sorted(names, key=lambda name: (-len(name), name)):
        match = _STEP.fullmatch(name.partition(UNFINISHED)[0])
        if match and not _PROCESS_PART.fullmatch(name):
            found[match["prefix"] is None][int(match["step"])] = name
    return dict(sorted((found[True] or found[False]).items()))


def prefixes_of(names: Iterable[str]) -> list[str]:
    """Returns the different prefixes of steps' names."""
    matches = [_STEP.fullmatch(name) for name in names]
    return sorted({match["prefix"] or "" for match in matches if match})


def steps_of(root: epath.Path, files: Files) -> dict[int, epath.Path]:
    """Returns a manager's finished steps, in rising order.

    Behind a network only the newest is looked into, and those before it until one is
    finished; the others are taken to be.
    """
    entries = files.entries(root)
    found = {_age(path)[1]: path for path in archives_in(root, files) if not _age(path)[0]}
    found |= {
        step: root / name
        for step, name in step_names(entries).items()
        if UNFINISHED not in name and (entries[name].kind == "folder" or _FLAX_FILE.fullmatch(name))
    }
    if not files.remote:
        files.look_into(path for path in found.values() if entries[path.name].kind == "folder")
    ready = size = 1
    for at, step in enumerate(newest := sorted(found, reverse=True)):
        if files.remote and at == ready:  # Marks of ever more steps at once: a job may have failed for days.
            size *= _MORE_STEPS
            files.ask(*(ReadFile(os.fspath(found[s] / COMMIT_FILE)) for s in newest[at : at + size]))
            ready += size
        if entries[found[step].name].kind == "folder" and lacks_commit(found[step], files):
            del found[step]
        elif files.remote:
            break
    return dict(sorted(found.items()))


def holds_tree(step: epath.Path, files: Files) -> bool:
    """Tells whether a step is a stored tree or holds one."""
    return files.is_file(step) or is_item(step, files) or bool(items_of(step, files))


def is_root(path: epath.Path, files: Files) -> bool:
    """Tells a manager's root from a step: below it lie steps, or items that are called by numbers alone."""
    if not files.is_folder(path) or is_item(path, files):
        return False
    entries = files.entries(path)
    steps = [step for step in steps_of(path, files).values() if entries[step.name].kind == "folder"]
    # Behind a network, the newest tells of all.
    for step in steps[-1:] if files.remote else steps:
        if not is_item(step, files) and holds_tree(step, files):
            return True
    items = items_of(path, files)
    return bool(items) and all(item.name.isdecimal() for item in items)


def is_unfinished(path: epath.Path) -> bool:
    """Tells from its name whether a path lies in a save that was never finished."""
    return is_unfinished_archive(path) or any(map(is_temporary, path.parts))


def is_temporary(name: str) -> bool:
    """Tells whether a name is Orbax's, or this library's, for what is still being written."""
    return UNFINISHED in name or _WORKING.fullmatch(name) is not None


def working_name(name: str) -> str:
    """Returns the name of the directory in which this process writes what will have a name."""
    return f"{name}.converting-{os.getpid()}"


def is_working_name(name: str, of: str) -> bool:
    """Tells whether some process wrote there what would have a certain name."""
    return name.startswith(f"{of}.converting-") and _WORKING.fullmatch(name) is not None


def is_weights_file(name: str) -> bool:
    """Tells whether a file is named as Hugging Face's libraries name weights, or an index of them."""
    whole = name.removesuffix(HUGGING_FACE_INDEX)
    return whole.endswith(HUGGING_FACE_SAFETENSORS) or (name in HUGGING_FACE_FILES)


def first_weights(folder: epath.Path, files: Files) -> epath.Path | None:
    """Returns the file in a folder that holds a model's weights, or says where they lie; None if none does.

    A file that is named so is its own.
    Flax's file is taken before one for PyTorch, and a file alone before parts of its name: both are there
    where one was saved after the other. What is not read is said.
    """
    if files.is_file(folder):
        return folder if is_weights_file(folder.name) else None
    names = [name for name in HUGGING_FACE_FILES if files.has_file(folder, name)]
    if others := names[1:]:
        _logger.warning(
            "%s holds %s, which is read, and beside it the same weights, or those of another save, in %s, "
            "not read: name %s to read them",
            *(folder, names[0], " and ".join(others), " or ".join(str(folder / name) for name in others)),
        )
    return folder / names[0] if names else None


def read_config(folder: epath.Path, files: Files) -> Mapping[str, Any]:
    """Returns what `config.json` says, by its name; nothing if it is absent or no JSON object."""
    listed = files.entries(folder).get(CONFIG_FILE)
    if listed is None or listed.kind != "file" or listed.size > _LONGEST_CONFIG:
        return {}
    content = files.optional(folder / CONFIG_FILE, warn=True)
    try:
        return {} if content is None else {CONFIG_FILE: parse_object(content)}
    # Nothing of a restore depends on it.
    except FieldError:
        return {}


def first_unnamed(names: Collection[str]) -> str:
    """Returns a part of weights that the names of its neighbours tell of and that is none of them, or ""."""
    parts = filter(None, map(_WEIGHTS_PART.fullmatch, names))
    saves = {(part["whole"], len(part["number"]), part["count"], part["kind"]) for part in parts}
    for whole, width, count, kind in sorted(saves):
        for number in range(1, int(count) + 1):
            if (part := f"{whole}-{number:0{width}}-of-{count}{kind}") not in names:
                return part
    return ""


def index_of(part: str) -> str:
    """Returns the name of the index that a part of weights belongs to, or an empty text for another file."""
    named = _WEIGHTS_PART.fullmatch(part)
    return f"{named['whole']}{named['kind']}{HUGGING_FACE_INDEX}" if named else ""


def absent_indices(directory: epath.Path, files: Files) -> list[str]:
    """Returns the indices that parts of weights in a directory belong to and that are not there."""
    names = files.entries(directory)
    return sorted({index for name in names if (index := index_of(name)) and index not in names})


def weights_in(directory: epath.Path, files: Files) -> list[str]:
    """Returns the files of weights in a directory, whatever their names, that are each a checkpoint."""
    names = [name for name in files.entries(directory) if files.has_file(directory, name)]
    return [n for n in names if (is_weights_file(n) or n.endswith(_FLAX_SUFFIX)) and not index_of(n)]


def is_flax_file(path: epath.Path, files: Files) -> bool:
    """Tells whether a file is named as `flax.training.checkpoints` names a step's."""
    return _FLAX_FILE.fullmatch(path.name) is not None and files.is_file(path)


def last_of_big_vision(path: epath.Path, files: Files) -> epath.Path:
    """Returns the checkpoint that `<path>-LAST` points to, or the path itself if there is no such file."""
    last = files.optional(path.parent / f"{path.name}-LAST")
    name = (last or b"").decode(errors="replace").strip()
    return path.parent / f"{path.name}-{name}" if name and "/" not in name else path


def last_question(path: epath.Path) -> ReadFile:
    """Returns what `last_of_big_vision` asks."""
    return ReadFile(os.fspath(path.parent / f"{path.name}-LAST"))
