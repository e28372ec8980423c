"""The disk between the two programs, through stock Orbax alone."""

import pathlib
from typing import Any, cast

import orbax.checkpoint as ocp
from flax.training.train_state import TrainState


def save_linen(root: pathlib.Path, step: int, state: TrainState) -> None:
    """Saves a Linen program's state as such programs do."""
    with ocp.CheckpointManager(root) as manager:
        manager.save(step, args=ocp.args.StandardSave(state))


def copy_without(name: str, source: pathlib.Path, destination: pathlib.Path, step: int) -> None:
    """Writes the checkpoint again without the module of that name and its moments."""
    with ocp.CheckpointManager(source) as manager:
        tree = manager.restore(step, args=ocp.args.StandardRestore())
    with ocp.CheckpointManager(destination) as manager:
        manager.save(step, args=ocp.args.StandardSave(_without(name, tree)))


def size_on_disk(root: pathlib.Path) -> int:
    """Returns the bytes of all files below a directory."""
    return sum(file.stat().st_size for file in root.rglob("*") if file.is_file())


def _without(name: str, tree: Any) -> Any:
    if isinstance(tree, dict):
        branches = cast(dict[str, Any], tree)
        return {key: _without(name, branch) for key, branch in branches.items() if key != name}
    if isinstance(tree, list | tuple):
        return [_without(name, branch) for branch in cast(list[Any], tree)]
    return tree
