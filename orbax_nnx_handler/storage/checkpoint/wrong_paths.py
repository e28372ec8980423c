"""What a path is that is no checkpoint, and which one was probably meant.

Every sentence rests on what lies at the path, above it or right below it; where
nothing does, only the kinds of path that would do are named.
"""

import difflib
from collections.abc import Iterable, Mapping

from etils import epath

from orbax_nnx_handler.storage.checkpoint.directories import (
    UNFINISHED,
    archives_in,
    holds_tree,
    is_archive,
    is_item,
    is_root,
    is_unfinished,
    is_unfinished_archive,
    items_of,
    newest_in,
    steps_of,
)

_SHOWN = 8
_LOOKED_AT = 50
_DEPTH = 3
_NONE_FINISHED = "no finished step lies beside it: the job has to save again."


def why_no_checkpoint(path: epath.Path) -> str:
    """Returns what a path is instead of a checkpoint, and a hint."""
    if not path.exists():
        return f"there is nothing at {path}.\nhint: {_instead_of(path)}"
    if is_unfinished(path):
        return f"{path} is a save that was interrupted.\nhint: {_finished_near(path)}"
    unfinished = _unfinished(path)
    if unfinished:
        saves = "a save that was interrupted" if len(unfinished) == 1 else "saves that were interrupted"
        return f"{path} holds only {saves}: {_listed(unfinished)}.\nhint: {_finished_near(path)}"
    if path.is_file():
        return f"{path} is a file.\nhint: {_around(path)}"
    names = [child.name for child in sorted(path.iterdir())]
    return (
        f"{path} is no Orbax checkpoint; it holds: {_listed(names)}.\nhint: {_below(path) or _around(path)}"
    )


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
    more = f", ... and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    return (", ".join(every[:_SHOWN]) or "nothing") + more


def _unfinished(path: epath.Path) -> list[str]:
    """Returns the directories that an interrupted save left in a path."""
    if not path.is_dir():
        return []
    return [child.name for child in sorted(path.iterdir()) if UNFINISHED in child.name]


def _finished_near(path: epath.Path) -> str:
    if is_unfinished_archive(path):
        archives = newest_in(path.parent)
        newest = _listed(map(str, archives))
        return f"the newest finished one is {newest}." if archives else _NONE_FINISHED
    root = next((part.parent for part in (path, *path.parents) if UNFINISHED in part.name), path)
    # An unfinished item lies in a step; what lies beside that is one too if it is called the same.
    beside = {step: child for step, child in steps_of(root.parent).items() if _prefix(child) == _prefix(root)}
    for found in (steps_of(root), beside):
        steps = {step: child for step, child in found.items() if child not in (path, root)}
        if steps:
            return f"the newest finished step is {steps[max(steps)]}."
    return _NONE_FINISHED


def _prefix(step: epath.Path) -> str:
    """Returns what stands before the number in a step's name."""
    return step.name.rstrip("0123456789")


def _instead_of(path: epath.Path) -> str:
    """Returns what lies near a path that does not exist."""
    path = path.absolute()
    parent = next(part for part in path.parents if part.exists())
    if not parent.is_dir():
        return f"{parent} is a file."
    if is_item(parent):
        return f"{parent} is an item directory; pass that."
    steps = steps_of(parent)
    if steps:
        return _steps(parent, steps)
    names = [child.name for child in sorted(parent.iterdir())]
    missing = path.relative_to(parent).parts[0]
    close = difflib.get_close_matches(missing, names, n=1)
    return f"did you mean {parent / close[0]}?" if close else f"{parent} holds: {_listed(names)}."


def _steps(root: epath.Path, steps: Mapping[int, epath.Path]) -> str:
    """Returns the newest of a manager's steps, with the number of the older ones."""
    newest = list(steps)[-_SHOWN:]
    older = f" and {len(steps) - len(newest)} older ones" if len(steps) > len(newest) else ""
    word = "step" if len(steps) == 1 else "steps"
    return f"{root} holds the {word} {', '.join(map(str, newest))}{older}."


def damaged(path: epath.Path) -> str:
    """Returns a hint where a checkpoint's own files are damaged: which other step there is."""
    archives = _archives_beside(path) if is_archive(path) else []
    if archives:
        return f"copy it again, or restore another one that lies beside it: {_listed(map(str, archives))}."
    item = path if path.is_dir() else path.parent
    for step in (item, item.parent):
        others = {at: child for at, child in steps_of(step.parent).items() if child != step}
        if others:
            return f"copy it again, or restore another step: {_steps(step.parent, others)}"
    return "copy it again from where it was written: a file is truncated, or was not copied."


def _archives_beside(path: epath.Path) -> list[epath.Path]:
    return [other for other in archives_in(path.parent) if other != path]


def _below(path: epath.Path) -> str:
    """Returns the checkpoint below a path, if there is one."""
    folders = [path]
    for _ in range(_DEPTH):
        folders = [child for folder in folders for child in sorted(folder.iterdir()) if child.is_dir()]
        folders = folders[:_LOOKED_AT]
        # An item's own `ocdbt.process_0` ends in a number as a step does.
        roots = [child for child in folders if is_root(child)]
        found = roots or [child for child in folders if is_item(child)]
        what = "a manager's root" if roots else "an item"
        if len(found) == 1:
            return f"{found[0]} is {what}; pass that."
        if found:
            several = "managers' roots" if roots else "items"
            names = [str(child.relative_to(path)) for child in found]
            return f"it holds several {several}; pass one of them: {_listed(names)}."
    return ""


def _around(path: epath.Path) -> str:
    """Returns the checkpoint that a path lies in or beside."""
    above = next((part for part in path.parents if part.is_dir() and is_item(part)), None)
    if above is not None:
        return f"it is a part of the item {above}; pass that."
    beside = items_of(path.parent)
    if beside:
        return f"it lies beside the item {beside[0]}; pass that, or the step {path.parent}."
    # Names that end in a number are many; a step that is named to a reader holds something.
    others = {step: child for step, child in steps_of(path.parent).items() if child != path}
    steps = {step: child for step, child in others.items() if holds_tree(child)}
    if steps:
        return _steps(path.parent, steps)
    return "pass a CheckpointManager's root, one of its steps, or an item in a step."
