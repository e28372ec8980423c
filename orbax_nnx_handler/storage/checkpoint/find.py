"""Finds the item directory that a path means: a manager's root, a step, or an item."""

from etils import epath

from orbax_nnx_handler.planning.core.errors import NotACheckpointError
from orbax_nnx_handler.storage.checkpoint.directories import (
    holds_tree,
    is_archive,
    is_flax_file,
    is_item,
    is_numbered,
    is_root,
    is_unfinished,
    items_of,
    last_of_big_vision,
    newest_in,
    steps_of,
)
from orbax_nnx_handler.storage.checkpoint.metadata import parts_of
from orbax_nnx_handler.storage.checkpoint.wrong_paths import why_no_checkpoint, why_no_item

__all__ = ["find_item", "is_item", "steps_of"]

_USUAL_ITEMS = ("default", "items", "state", "params")


def find_item(path: epath.PathLike, item: str | None = None) -> epath.Path:
    """Returns the item directory that a path means.

    Args:
        path: A manager's root (its newest step is taken), a step, an item, a msgpack
            file of `flax.serialization`, a NumPy archive, or a directory with one
            run's archives.
        item: The item's name within the step, where it holds several.

    Raises:
        NotACheckpointError: Says what the path is and which was probably meant.
    """
    given = epath.Path(path).expanduser()
    try:
        return _find_item(last_of_big_vision(given), item)
    # A store that cannot be reached, no permission, a library for the scheme that is not installed.
    except (OSError, ImportError) as error:
        raise NotACheckpointError(f"{given} cannot be read: {type(error).__name__}: {error}") from error


def _find_item(root: epath.Path, item: str | None) -> epath.Path:
    # What an interrupted save left may look whole, and lack what was not yet written.
    if not root.exists() or is_unfinished(root):
        raise NotACheckpointError(why_no_checkpoint(root))
    if root.is_file():
        return _file(root)
    if is_item(root):
        return root
    newest = _newest_step(root)
    if newest is None or is_numbered(newest):
        newest = _only_archive(root) or newest
    elif _is_no_step(newest):
        raise NotACheckpointError(why_no_checkpoint(root))
    return _item_of_step(newest or root, item)


def _only_archive(root: epath.Path) -> epath.Path | None:
    """Returns the NumPy archive that a directory of nothing else means.

    Raises:
        NotACheckpointError: It has those of several runs.
    """
    newest = [] if parts_of(root) or items_of(root) else newest_in(root)
    if len(newest) > 1:
        names = ", ".join(path.name for path in newest)
        raise NotACheckpointError(
            f"{root} holds several NumPy archives: {names}.\nhint: pass the path of one of them."
        )
    return newest[0] if newest else None


def _file(path: epath.Path) -> epath.Path:
    try:
        is_alone = is_flax_file(path) or is_archive(path)
        is_part = not is_alone and is_item(path.parent)
    except OSError:
        is_part = False
    if is_part:
        raise NotACheckpointError(why_no_checkpoint(path))
    return path


def _newest_step(root: epath.Path) -> epath.Path | None:
    steps = steps_of(root)
    return steps[max(steps)] if steps else None


def _is_no_step(path: epath.Path) -> bool:
    """Tells what only ends in a number: another run (`run-2`), or something else (`polkit-1`)."""
    if path.is_dir() and is_root(path):
        return True
    return not (path.name.isdecimal() or holds_tree(path) or any(map(is_unfinished, path.iterdir())))


def _item_of_step(step: epath.Path, item: str | None) -> epath.Path:
    if step.is_file():
        return step
    if item is not None:
        return _named_item(step, item)
    if is_item(step) or parts_of(step):
        return step
    items = items_of(step)
    usual = [child for name in _USUAL_ITEMS for child in items if child.name == name]
    if len(items) == 1 or usual:
        return (usual or items)[0]
    if items:
        names = ", ".join(child.name for child in items)
        raise NotACheckpointError(
            f"{step} holds several items: {names}.\n"
            f"hint: pass item={items[0].name!r}, or the path of one of them."
        )
    raise NotACheckpointError(why_no_checkpoint(step))


def _named_item(step: epath.Path, item: str) -> epath.Path:
    found = step / item
    if not found.exists():
        raise NotACheckpointError(why_no_item(step, item))
    if not is_item(found):
        raise NotACheckpointError(why_no_checkpoint(found))
    return found
