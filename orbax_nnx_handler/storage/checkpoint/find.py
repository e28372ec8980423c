"""Finds the item directory that a path means: a manager's root, a step, or an item."""

from typing import Any

from etils import epath

from orbax_nnx_handler.planning.core.errors import Hint, NotACheckpointError
from orbax_nnx_handler.storage.checkpoint.directories import (
    absent_indices,
    holds_tree,
    index_of,
    is_archive,
    is_flax_file,
    is_item,
    is_numbered,
    is_root,
    is_unfinished,
    is_weights_file,
    items_of,
    last_of_big_vision,
    last_question,
    newest_in,
    prefixes_of,
    steps_of,
)
from orbax_nnx_handler.storage.checkpoint.metadata import train_state_items
from orbax_nnx_handler.storage.checkpoint.wrong_paths import no_checkpoint, no_item, several_kinds
from orbax_nnx_handler.storage.stores.files import Files, List
from orbax_nnx_handler.storage.stores.kvstore import files_at
from orbax_nnx_handler.storage.stores.locations import as_path

_USUAL_ITEMS = ("default", "items", "state", "params")


def find_item(path: epath.PathLike, item: str | None = None, files: Files | None = None) -> epath.Path:
    """Returns the item directory that a path means.

    Args:
        path: A manager's root (its newest step is taken), a step, an item, a msgpack
            file of `flax.serialization`, a NumPy archive, a directory with one
            run's archives, or one of Hugging Face's with a Flax model or safetensors.
        item: The item's name within the step, where it holds several.
        files: The files of the path's store, if they are of use afterwards.

    Raises:
        NotACheckpointError: Says what the path is and which was probably meant, or why
            the store does not hand it out.
    """
    given = as_path(path)
    named: Any = item
    if not isinstance(named, str | None) or "/" in (named or ""):
        raise NotACheckpointError(f"item is the name of a step's item, not {named!r}.")
    files = files or files_at(given)
    files.ask(List(str(given)), last_question(given))
    root = last_of_big_vision(given, files)
    # What an interrupted save left may look whole, and lack what was not yet written.
    if not files.exists(root) or is_unfinished(root):
        raise no_checkpoint(root, files)
    if not files.is_folder(root):
        return _file(root, files)
    if is_item(root, files):
        if item not in (None, "", root.name):
            raise NotACheckpointError(
                f"{root} is an item already, and item={item!r} is another.",
                hints=[f"pass the step {root.parent} for its item {item!r}, or leave the item's name out."],
            )
        return root
    if absent_indices(root, files):
        raise no_checkpoint(root, files)
    newest = _newest_step(root, files)
    if newest is None or is_numbered(newest, files):
        newest = _only_archive(root, files) or newest
    elif _is_no_step(newest, files):
        raise no_checkpoint(root, files)
    return _item_of_step(newest or root, item, files)


def _only_archive(root: epath.Path, files: Files) -> epath.Path | None:
    """Returns the NumPy archive that a directory of nothing else means.

    Raises:
        NotACheckpointError: It has those of several runs.
    """
    newest = newest_in(root, files)
    if not newest or train_state_items(root, files) or items_of(root, files):
        return None
    if len(newest) > 1:
        names = ", ".join(path.name for path in newest)
        raise NotACheckpointError(
            f"{root} holds several NumPy archives: {names}.", hints=["pass the path of one of them."]
        )
    return newest[0]


def _file(path: epath.Path, files: Files) -> epath.Path:
    if not files.is_file(path) or index_of(path.name):
        raise no_checkpoint(path, files)
    try:
        is_alone = is_weights_file(path.name) or is_flax_file(path, files) or is_archive(path, files)
        is_part = not is_alone and is_item(path.parent, files)
    except NotACheckpointError:
        is_part = False
    if is_part:
        raise no_checkpoint(path, files)
    return path


def _newest_step(root: epath.Path, files: Files) -> epath.Path | None:
    steps = steps_of(root, files)
    if len(prefixes_of(path.name for path in steps.values())) > 1:
        steps = {step: path for step, path in steps.items() if holds_tree(path, files)}
        if len(prefixes_of(path.name for path in steps.values())) > 1:
            raise several_kinds(root, steps.values())
    return steps[max(steps)] if steps else None


def _is_no_step(path: epath.Path, files: Files) -> bool:
    """Tells what only ends in a number: another run (`run_2`), or something else (`log_1`)."""
    if files.is_folder(path) and is_root(path, files):
        return True
    unfinished = any(is_unfinished(path / name) for name in files.entries(path))
    return not (path.name.isdecimal() or holds_tree(path, files) or unfinished)


def _item_of_step(step: epath.Path, item: str | None, files: Files) -> epath.Path:
    if files.is_file(step):
        return step
    if item is not None:
        return _named_item(step, item, files)
    if is_item(step, files) or train_state_items(step, files):
        return step
    items = items_of(step, files)
    usual = [child for name in _USUAL_ITEMS for child in items if child.name == name]
    if len(items) == 1 or usual:
        return (usual or items)[0]
    if items:
        names = ", ".join(child.name for child in items)
        first = items[0].name
        hint = Hint(f"pass item={first!r}, or the path of one of them.", {"item": first})
        raise NotACheckpointError(f"{step} holds several items: {names}.", hints=[hint])
    raise no_checkpoint(step, files)


def _named_item(step: epath.Path, item: str, files: Files) -> epath.Path:
    found = step / item
    if not files.exists(found):
        raise no_item(step, item, files)
    if not is_item(found, files):
        raise no_checkpoint(found, files)
    return found
