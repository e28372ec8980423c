"""Which files are NumPy archives, and which one a directory of them means.

big_vision wrote `checkpoint.npz` over and over, and at some steps a copy of it,
`checkpoint.npz-000012000` (big_vision/utils.py `save_checkpoint`, until it came to
`tssave`). So the file without a number is the newest state, if it is there.
Weights are published in files of any name that ends in `.npz`.

What a directory is: one stored tree, or a manager's root with steps.
"""

import re
from typing import IO, cast

from etils import epath

from orbax_nnx_handler.storage.checkpoint.zarr import METADATA_KEY

_NAME = re.compile(r"(?P<run>.*)\.npz(?:-(?P<step>\d+))?")
# Written under this name first and renamed when it is complete.
_UNFINISHED = re.compile(r".*\.npz-TEMPORARY")
# What a zip file begins with: its first member, or its directory if it has none.
_BEGINNINGS = (b"PK\x03\x04", b"PK\x05\x06")


def is_archive(path: epath.Path) -> bool:
    """Tells whether a path is a NumPy archive, by its name or else by its first bytes."""
    if not path.is_file():
        return False
    if _NAME.fullmatch(path.name):
        return True
    with cast(IO[bytes], path.open("rb")) as file:
        return file.read(4) in _BEGINNINGS


def is_numbered(path: epath.Path) -> bool:
    """Tells whether a file is big_vision's copy of one step."""
    named = _NAME.fullmatch(path.name)
    return named is not None and named["step"] is not None and path.is_file()


def is_unfinished_archive(path: epath.Path) -> bool:
    """Tells whether a file is one that big_vision was still writing."""
    return _UNFINISHED.fullmatch(path.name) is not None


def archives_in(directory: epath.Path) -> list[epath.Path]:
    """Returns all archives of a directory, by name."""
    return [child for child in sorted(directory.iterdir()) if _NAME.fullmatch(child.name) and child.is_file()]


def newest_in(directory: epath.Path) -> list[epath.Path]:
    """Returns the newest archive of each run that has any in a directory."""
    newest: dict[str, epath.Path] = {}
    for path in sorted(archives_in(directory), key=_age):
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


_STEP = re.compile(r"(?:.*[_-])?(?P<step>\d+)")
_ITEM_FILES = ("_METADATA", "manifest.ocdbt", "checkpoint", ".zgroup")


def is_item(path: epath.Path) -> bool:
    """Tells whether a directory is one stored tree."""
    if any((path / name).exists() for name in _ITEM_FILES):
        return True
    children = [child for child in path.iterdir() if child.is_dir()]
    return any((child / key).exists() for child in children for key in METADATA_KEY.values())


def steps_of(root: epath.Path) -> dict[int, epath.Path]:
    """Returns a manager's finished steps, in rising order."""
    found: dict[int, epath.Path] = {}
    for child in root.iterdir():
        match = _STEP.fullmatch(child.name)
        if match and _is_finished(child):
            found[int(match["step"])] = child
    return dict(sorted(found.items()))


def _is_finished(step: epath.Path) -> bool:
    if is_flax_file(step) or is_numbered(step):
        return True
    # Here, for the verdict on an item needs nothing of Orbax, and importing it takes a quarter of a second.
    import orbax.checkpoint as ocp

    return ocp.utils.is_checkpoint_finalized(step)


def holds_tree(step: epath.Path) -> bool:
    """Tells whether a step is a stored tree or holds one."""
    return step.is_file() or is_item(step) or bool(items_of(step))


def is_root(path: epath.Path) -> bool:
    """Tells a manager's root from a step: below it lie steps, or items that are called by numbers alone."""
    if not path.is_dir() or is_item(path):
        return False
    if any(not is_item(step) and holds_tree(step) for step in steps_of(path).values() if step.is_dir()):
        return True
    items = items_of(path)
    return bool(items) and all(item.name.isdecimal() for item in items)


UNFINISHED = ".orbax-checkpoint-tmp"
"""What Orbax has in the name of a directory until everything in it is written."""


def is_unfinished(path: epath.Path) -> bool:
    """Tells whether a path lies in a save that was never finished."""
    return is_unfinished_archive(path) or any(UNFINISHED in part for part in path.parts)


def items_of(step: epath.Path) -> list[epath.Path]:
    """Returns the finished items of a step that hold a stored tree, by name."""
    folders = [child for child in sorted(step.iterdir()) if UNFINISHED not in child.name and child.is_dir()]
    return [child for child in folders if is_item(child)]


_FLAX_FILE = re.compile(r"checkpoint_\d+")


def is_flax_file(path: epath.Path) -> bool:
    """Tells whether a file is named as `flax.training.checkpoints` names a step's."""
    return _FLAX_FILE.fullmatch(path.name) is not None and path.is_file()


def last_of_big_vision(path: epath.Path) -> epath.Path:
    """Returns the checkpoint that `<path>-LAST` points to, or the path itself if there is no such file."""
    pointer = path.parent / f"{path.name}-LAST"
    return path.parent / f"{path.name}-{pointer.read_text().strip()}" if pointer.is_file() else path
