"""One trial: the library's answer, held against the oracle's."""

import dataclasses
import pathlib
import random
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx, serialization

from orbax_nnx_handler import RestoreError, restore
from tests.laws.fuzz.models import Flat, Path
from tests.laws.fuzz.optimizers import nested
from tests.laws.fuzz.perturbations import perturb
from tests.laws.fuzz.trees import Answer, Tree, draw_tree
from tests.planning.plans import evaluate, plan_of

Result = Literal["right", "refused", "refused without need", "wrong", "crashed"]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of one trial, and of which tree."""

    seed: int
    result: Result
    answer: Answer
    change: str
    detail: str = ""


def draw(seed: int) -> tuple[Tree, str]:
    """Returns the tree of a seed, and what was done to it."""
    rng = random.Random(seed)
    tree = draw_tree(rng)
    return tree, perturb(tree, rng)


def try_seed(seed: int, place: pathlib.Path | None = None, shard: bool = False) -> Outcome:
    """Draws a tree, restores it, and compares.

    Args:
        seed: The seed; the same seed is the same tree.
        place: Where to write a real checkpoint; without one only the plan is made, and carried out in NumPy.
        shard: Whether a real target is spread over all devices.
    """
    tree, change = draw(seed)
    result, detail = _judged(tree, place, shard)
    return Outcome(seed, result, tree.answer, change, detail)


def _judged(tree: Tree, place: pathlib.Path | None, shard: bool) -> tuple[Result, str]:
    try:
        values = _restored(tree, place, shard) if place and not tree.absent else _planned(tree)
    except RestoreError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        detail = f"{type(error).__name__}: {' | '.join(lines[:3])}"
        return "refused without need" if tree.answer == "must restore" else "refused", detail
    except Exception as error:
        return "crashed", f"{type(error).__name__}: {error}"
    lent = sorted(values.keys() & tree.absent, key=str)
    if lent:
        return "wrong", f"{lent[0]} was restored, but is not stored"
    if tree.answer == "must refuse":
        return "wrong", f"restored, although: {'; '.join(tree.why)}"
    differing = _differing(values, tree)
    return "wrong" if differing else "right", differing


def _differing(values: Flat, tree: Tree) -> str:
    """Returns the first wanted leaf that is not what it must be; empty for none."""
    for path, value in tree.expected().items():
        have = values.get(path)
        if have is None and tree.answer == "may refuse":
            continue  # A policy fills it and the report says so: refused leaf by leaf.
        if have is None:
            return f"{path} was not restored"
        if have.dtype != value.dtype or have.shape != value.shape or have.tobytes() != value.tobytes():
            said = [f"{array.ravel()[:3]} {array.dtype}{array.shape}" for array in (have, value)]
            return f"{path} is {said[0]}, must be {said[1]}"
    return ""


def _planned(tree: Tree) -> Flat:
    stored = tree.stored
    plan = plan_of(tree.target(), nested(stored), **tree.options)
    plan.check()
    return {
        path: evaluate(item.recipe, stored).astype(item.dtype, copy=False)
        for path, item in plan.restored.items()
    }


def _restored(tree: Tree, place: pathlib.Path, shard: bool) -> Flat:
    path = _written(tree, place)
    result = restore(path, tree.target(_sharding if shard else None), **tree.options)
    result = nnx.state(result) if tree.module else result
    pairs = nnx.to_flat_state(result) if tree.typed else _flat_dict(result)
    return {
        tuple(path): np.asarray(leaf.get_value() if tree.typed else leaf)
        for path, leaf in pairs
        if tuple(path) not in tree.random
    }


def _sharding(shape: tuple[int, ...]) -> jax.sharding.Sharding:
    """Spreads the first axis that divides over the devices, on half or all of them."""
    devices = np.array(jax.devices())
    mesh = jax.sharding.Mesh(devices.reshape(-1, 2), ("x", "y"))
    axes = ["x" if size % mesh.shape["x"] == 0 else "y" if size % 2 == 0 else None for size in shape]
    spec = [axis if axis not in axes[:at] else None for at, axis in enumerate(axes)]
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))


def _flat_dict(tree: Any) -> list[tuple[Path, Any]]:
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(tuple(key.key for key in path), leaf) for path, leaf in found]


def _written(tree: Tree, place: pathlib.Path) -> pathlib.Path:
    whole = _with_lists(nested(tree.stored))
    if any(isinstance(key, int) for path in tree.stored for key in path) or len(tree.stored) % 2:
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(place / "item", whole)
        return place / "item"
    (place / "checkpoint_1").write_bytes(serialization.to_bytes(whole))
    return place / "checkpoint_1"


def _with_lists(node: Any) -> Any:
    """Returns the tree with lists where keys are numbers, as an optax chain is stored."""
    if not isinstance(node, dict):
        return node
    if node and all(isinstance(key, int) for key in node):
        return [_with_lists(node.get(at)) for at in range(max(node) + 1)]
    return {key: _with_lists(part) for key, part in node.items()}
