"""What a path is that is no checkpoint, and which one was probably meant.

Every sentence rests on what lies at the path, above it or right below it; where
nothing does, only the kinds of path that would do are named.
"""

import difflib
from collections.abc import Iterable

from etils import epath

from orbax_nnx_handler.transfer.places import ITEM_FILES, is_item, items_of, steps_of

_UNFINISHED = ".orbax-checkpoint-tmp"
_SHOWN = 8
_LOOKED_AT = 50


def why_no_checkpoint(path: epath.Path) -> str:
    """Returns what a path is instead of a checkpoint, and a hint."""
    if not path.exists():
        return f"there is nothing at {path}.\nhint: {_instead_of(path)}"
    unfinished = _unfinished(path)
    if unfinished:
        return f"{path} is a save that was interrupted: {_listed(unfinished)}.\nhint: {_finished_near(path)}"
    if path.is_file():
        return f"{path} is a file.\nhint: {_around(path)}"
    names = [child.name for child in sorted(path.iterdir())]
    return (
        f"{path} is no Orbax checkpoint; it holds: {_listed(names)}.\nhint: {_below(path) or _around(path)}"
    )


def is_unfinished(path: epath.Path) -> bool:
    """Tells a directory that Orbax had not finished: some of its arrays may be written in part."""
    return any(_UNFINISHED in part.name for part in (path, *path.parents))


def is_part(path: epath.Path) -> bool:
    """Tells one file of a checkpoint's own."""
    # `checkpoint` alone is a tree of its own in the formats that have it.
    return path.is_file() and path.name in ITEM_FILES and path.name != "checkpoint"


def why_no_item(step: epath.Path, item: str) -> str:
    """Returns which items a step holds instead of the one that was asked for."""
    names = [child.name for child in sorted(step.iterdir()) if child.is_dir()]
    close = difflib.get_close_matches(item, names, n=1)
    trees = [child.name for child in items_of(step)]
    meant = close[0] if close else trees[0] if len(trees) == 1 else ""
    hint = f"\nhint: pass item={meant!r}." if meant else ""
    return f"{step} has no item {item!r}; it holds: {_listed(names)}.{hint}"


def _listed(names: Iterable[str]) -> str:
    every = list(names)
    more = f", … and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    return (", ".join(every[:_SHOWN]) or "nothing") + more


def _unfinished(path: epath.Path) -> list[str]:
    """Returns the directories that an interrupted save left: the path itself, or what is in it."""
    for part in (path, *path.parents):
        if _UNFINISHED in part.name:
            return [part.name]
    if not path.is_dir():
        return []
    return [child.name for child in sorted(path.iterdir()) if _UNFINISHED in child.name]


def _finished_near(path: epath.Path) -> str:
    root = next((part.parent for part in (path, *path.parents) if _UNFINISHED in part.name), path)
    for folder in (root, root.parent):
        steps = steps_of(folder)
        if steps:
            return f"the newest finished step is {steps[max(steps)]}."
    return "no finished step lies beside it: the job has to save again."


def _instead_of(path: epath.Path) -> str:
    """Returns what lies near a path that does not exist."""
    parent = next(part for part in path.parents if part.exists())
    if not parent.is_dir():
        return f"{parent} is a file."
    if is_item(parent):
        return f"{parent} is an item directory; pass that."
    steps = steps_of(parent)
    if steps:
        return f"{parent} holds the steps {_listed(map(str, list(steps)[-_SHOWN:]))}."
    names = [child.name for child in sorted(parent.iterdir())]
    missing = path.relative_to(parent).parts[0]
    close = difflib.get_close_matches(missing, names, n=1)
    return f"did you mean {parent / close[0]}?" if close else f"{parent} holds: {_listed(names)}."


def _below(path: epath.Path) -> str:
    """Returns the checkpoint right below a path, if there is one."""
    for child in [child for child in sorted(path.iterdir()) if child.is_dir()][:_LOOKED_AT]:
        if steps_of(child):
            return f"{child} is a manager's root; pass that."
        if is_item(child):
            return f"{child} is an item; pass that."
    return ""


def _around(path: epath.Path) -> str:
    """Returns the checkpoint that a path lies in or beside."""
    above = next((part for part in path.parents if part.is_dir() and is_item(part)), None)
    if above is not None:
        return f"it is a part of the item {above}; pass that."
    beside = items_of(path.parent)
    if beside:
        return f"it lies beside the item {beside[0]}; pass that, or the step {path.parent}."
    steps = steps_of(path.parent)
    if steps:
        return f"{path.parent} holds the steps {_listed(map(str, list(steps)[-_SHOWN:]))}."
    return "pass a CheckpointManager's root, one of its steps, or an item in a step."
