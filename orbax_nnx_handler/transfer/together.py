"""Steps whose train state lies in two items: read together, they are one tree.

Tunix saves `model_params` and `optimizer_state`, openpi `params` and
`train_state`. Each item can be restored by itself (`item=`); a target that wants
model and optimizer needs both. The tree has the items' names as its first keys,
as the layouts `tunix` and `openpi` expect.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

from etils import epath

from orbax_nnx_handler.planning.leaves import StoredLeaf
from orbax_nnx_handler.planning.paths import Path
from orbax_nnx_handler.transfer.trees import EMPTY_TYPES, TREE_FILE, read_tree

if TYPE_CHECKING:
    from orbax_nnx_handler.transfer.metadata import Checkpoint

_TUNIX = ("model_params", "optimizer_state")
_OPENPI = ("params", "train_state")

_Value = TypeVar("_Value")


def parts_of(step: epath.Path) -> tuple[str, ...]:
    """Returns the items of a step that are one train state; none for any other directory."""
    if (step / TREE_FILE).exists():
        return ()
    for names in (_TUNIX, _OPENPI):
        if all((step / name / TREE_FILE).exists() for name in names):
            return () if names == _OPENPI and _has_weights(step / "train_state") else names
    return ()


def _has_weights(train_state: epath.Path) -> bool:
    """Tells whether openpi kept an average of its weights.

    The item `params` then holds the average and this one the weights in
    training. Which of the two is wanted, only the caller knows, by `item=`.
    """
    nodes = read_tree(train_state, lambda: None).nodes
    return any(path[:1] == ("params",) for path, kind in nodes.items() if kind not in EMPTY_TYPES)


def join_items(step: epath.Path, items: Mapping[str, "Checkpoint"]) -> "Checkpoint":
    """Returns the items of a step as one checkpoint, their names as first keys."""
    first = next(iter(items.values()))
    return dataclasses.replace(
        first,
        directory=step,
        leaves={path: _moved(leaf, path) for path, leaf in _joined(items, lambda item: item.leaves).items()},
        lost=_joined(items, lambda item: item.lost),
        disk_format=" and ".join(dict.fromkeys(item.disk_format for item in items.values())),
        values=_joined(items, lambda item: item.values or {}) or None,
        nodes=_joined(items, lambda item: item.nodes),
        arrays=_joined(items, lambda item: item.arrays),
        # Strict where the two differ: an absent chunk is then taken for a loss.
        writes_fill=any(item.writes_fill for item in items.values()),
    )


def _joined(
    items: Mapping[str, "Checkpoint"], field: Callable[["Checkpoint"], Mapping[Path, _Value]]
) -> dict[Path, _Value]:
    return {(name, *path): value for name, item in items.items() for path, value in field(item).items()}


def _moved(leaf: StoredLeaf, path: Path) -> StoredLeaf:
    return dataclasses.replace(leaf, path=path)
