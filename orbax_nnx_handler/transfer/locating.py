"""Finds the item directory that a path means: a manager's root, a step, or an item."""

import re

import orbax.checkpoint as ocp
from etils import epath

from orbax_nnx_handler.planning.errors import NotACheckpointError
from orbax_nnx_handler.transfer import legacy
from orbax_nnx_handler.transfer.together import parts_of

_STEP = re.compile(r"(?:.*[_-])?(?P<step>\d+)")
_USUAL_ITEMS = ("default", "items", "state", "params")
_ITEM_FILES = ("_METADATA", "manifest.ocdbt", "checkpoint", ".zgroup")


def find_item(path: epath.PathLike, item: str | None = None) -> epath.Path:
    """Returns the item directory that a path means.

    Args:
        path: A manager's root (its newest step is taken), a step, an item, or a
            msgpack file of `flax.serialization`.
        item: The item's name within the step, where it holds several.

    Raises:
        NotACheckpointError: Says what the path is and which was probably meant.
    """
    root = legacy.last_of_big_vision(epath.Path(path))
    if not root.exists():
        raise NotACheckpointError(f"there is nothing at {root}.\nhint: {_nearby(root)}")
    if root.is_file() or is_item(root):
        return root
    newest = _newest_step(root)
    return _item_of_step(newest or root, item)


def is_item(path: epath.Path) -> bool:
    """Tells whether a directory is one stored tree."""
    if any((path / name).exists() for name in _ITEM_FILES):
        return True
    return any((child / ".zarray").exists() for child in path.iterdir() if child.is_dir())


def steps_of(root: epath.Path) -> dict[int, epath.Path]:
    """Returns a manager's finished steps, in rising order."""
    found: dict[int, epath.Path] = {}
    for child in root.iterdir():
        match = _STEP.fullmatch(child.name)
        if match and (legacy.is_flax_file(child) or ocp.utils.is_checkpoint_finalized(child)):
            found[int(match["step"])] = child
    return dict(sorted(found.items()))


def _newest_step(root: epath.Path) -> epath.Path | None:
    steps = steps_of(root)
    return steps[max(steps)] if steps else None


def _item_of_step(step: epath.Path, item: str | None) -> epath.Path:
    if item is not None:
        return _named_item(step, item)
    if step.is_file() or is_item(step) or parts_of(step):
        return step
    items = [child for child in sorted(step.iterdir()) if child.is_dir() and is_item(child)]
    usual = [child for name in _USUAL_ITEMS for child in items if child.name == name]
    if len(items) == 1 or usual:
        return (usual or items)[0]
    if items:
        names = ", ".join(child.name for child in items)
        raise NotACheckpointError(
            f"{step} holds several items: {names}.\nhint: pass the path of one of them."
        )
    raise NotACheckpointError(_why_nothing(step))


def _named_item(step: epath.Path, item: str) -> epath.Path:
    found = step / item
    if not found.exists():
        names = ", ".join(child.name for child in sorted(step.iterdir()) if child.is_dir())
        raise NotACheckpointError(f"{step} has no item {item!r}; it holds: {names or 'nothing'}.")
    return found


def _why_nothing(path: epath.Path) -> str:
    unfinished = [child.name for child in path.iterdir() if ".orbax-checkpoint-tmp" in child.name]
    if unfinished or ".orbax-checkpoint-tmp" in path.name:
        return (
            f"{path} holds no finished checkpoint, only a save that was interrupted: {', '.join(unfinished)}.\n"
            "hint: restore the step before it."
        )
    names = ", ".join(sorted(child.name for child in path.iterdir())[:8])
    return f"{path} is no Orbax checkpoint; it holds: {names or 'nothing'}.\nhint: {_nearby(path)}"


def _nearby(path: epath.Path) -> str:
    """Returns a sentence that names checkpoints close to a wrong path."""
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    if parent != path and is_item(parent):
        return f"{parent} is an item directory; pass that."
    steps = steps_of(parent)
    if steps:
        return f"{parent} holds the steps {', '.join(map(str, list(steps)[-8:]))}."
    inner = [child for child in sorted(path.iterdir()) if child.is_dir()] if path.is_dir() else []
    for child in inner[:50]:
        if is_item(child) or steps_of(child):
            return f"did you mean {child}?"
    return "pass a CheckpointManager's root, one of its steps, or an item in a step."
