"""Finds the item directory that a path means: a manager's root, a step, or an item."""

from etils import epath

from orbax_nnx_handler.planning.errors import NotACheckpointError
from orbax_nnx_handler.transfer import legacy
from orbax_nnx_handler.transfer.places import is_item, items_of, steps_of
from orbax_nnx_handler.transfer.together import parts_of
from orbax_nnx_handler.transfer.wrong_paths import is_part, is_unfinished, why_no_checkpoint, why_no_item

__all__ = ["find_item", "is_item", "steps_of"]

_USUAL_ITEMS = ("default", "items", "state", "params")


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
    if not root.exists() or is_unfinished(root) or is_part(root):
        raise NotACheckpointError(why_no_checkpoint(root))
    if root.is_file() or is_item(root):
        return root
    newest = _newest_step(root)
    return _item_of_step(newest or root, item)


def _newest_step(root: epath.Path) -> epath.Path | None:
    steps = steps_of(root)
    return steps[max(steps)] if steps else None


def _item_of_step(step: epath.Path, item: str | None) -> epath.Path:
    if item is not None:
        return _named_item(step, item)
    if step.is_file() or is_item(step) or parts_of(step):
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
    return found
