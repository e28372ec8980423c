"""Plans made from trees in memory: what the planner's tests share."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from orbax_nnx_handler.planning.core import recipes
from orbax_nnx_handler.planning.core.leaves import StoredLeaf
from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.options import RestoreOptions
from orbax_nnx_handler.planning.restore_plan import RestorePlan, make_plan
from orbax_nnx_handler.planning.target import flatten_target

Arrays = Mapping[Path, np.ndarray]


class Numbers:
    """Gives every element of a checkpoint its own number, so that none is taken for another."""

    def __init__(self) -> None:
        self.next = 0

    def array(self, *shape: int) -> np.ndarray:
        """Returns the next numbers in a shape."""
        size = int(np.prod(shape))
        self.next += size
        return np.arange(self.next - size, self.next, dtype=np.float32).reshape(shape)


def leaves_of(tree: Any, prefix: Path = ()) -> dict[Path, Any]:
    """Returns the leaves of nested dicts and lists by path."""
    if isinstance(tree, dict):
        return {
            path: leaf for key, part in tree.items() for path, leaf in leaves_of(part, (*prefix, key)).items()
        }
    if isinstance(tree, list):
        parts = enumerate(tree)
        return {path: leaf for key, part in parts for path, leaf in leaves_of(part, (*prefix, key)).items()}
    return {} if tree is None else {prefix: tree}


def stored_of(arrays: Mapping[Path, Any]) -> dict[Path, StoredLeaf]:
    """Returns the stored leaves of arrays by path."""
    return {
        path: StoredLeaf(path=path, shape=tuple(np.shape(leaf)), dtype=np.asarray(leaf).dtype)
        for path, leaf in arrays.items()
    }


def params(tree: Any) -> Any:
    """Returns nested dicts of shapes as an abstract `nnx.State` of parameters."""
    if isinstance(tree, dict):
        return {key: params(part) for key, part in tree.items()}
    return nnx.Param(jax.ShapeDtypeStruct(tree, np.dtype("float32")))


def plan_of(target: Any, stored: Any, renames: Sequence[Any] = (), **options: Any) -> RestorePlan:
    """Returns the plan of a target against a stored tree of arrays."""
    return make_plan(
        flatten_target(target), stored_of(leaves_of(stored)), RestoreOptions.of(renames=renames, **options)
    )


def evaluate(recipe: recipes.Recipe, arrays: Arrays) -> np.ndarray:
    """Computes a recipe with NumPy's own operations."""
    match recipe:
        case recipes.Read(path):
            return np.asarray(arrays[path])
        case recipes.Index(source, axis, index):
            return np.take(evaluate(source, arrays), index, axis)
        case recipes.Slice(source, axis, start, size):
            return np.take(evaluate(source, arrays), range(start, start + size), axis)
        case recipes.Stack(sources, axis):
            return np.stack([evaluate(source, arrays) for source in sources], axis)
        case recipes.Concat(sources, axis):
            return np.concatenate([evaluate(source, arrays) for source in sources], axis)
        case recipes.Transpose(source, permutation):
            return np.transpose(evaluate(source, arrays), permutation)
        case recipes.Reshape(source, shape):
            return np.reshape(evaluate(source, arrays), shape)
        case recipes.Repeat(source, axis, count):
            return np.repeat(evaluate(source, arrays), count, axis)
        case recipes.Scale() | recipes.Add():
            factor, constant = getattr(recipe, "factor", 1), getattr(recipe, "constant", 0)
            return evaluate(recipe.source, arrays) * np.float32(factor) + np.float32(constant)
    raise TypeError(recipe)


def values_of(plan: RestorePlan, stored: Any) -> dict[str, np.ndarray]:
    """Returns what a plan restores, by the wanted path joined with slashes."""
    arrays = leaves_of(stored)
    return {
        "/".join(map(str, path)): evaluate(item.recipe, arrays).astype(item.dtype)
        for path, item in plan.restored.items()
    }
