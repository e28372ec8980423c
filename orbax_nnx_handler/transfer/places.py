"""What a directory is: one stored tree, or a manager's root with steps."""

import re

from etils import epath

from orbax_nnx_handler.transfer import legacy, npz_files
from orbax_nnx_handler.transfer.zarr import METADATA_KEY

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
    if legacy.is_flax_file(step) or npz_files.is_numbered(step):
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
    return npz_files.is_unfinished(path) or any(UNFINISHED in part for part in path.parts)


def items_of(step: epath.Path) -> list[epath.Path]:
    """Returns the finished items of a step that hold a stored tree, by name."""
    folders = [child for child in sorted(step.iterdir()) if UNFINISHED not in child.name and child.is_dir()]
    return [child for child in folders if is_item(child)]
