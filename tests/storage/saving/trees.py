"""Trees whose elements are all different, and what stock Orbax reads of them."""

import itertools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

Flat = dict[tuple[str, ...], Any]


def numbered(tree: Any, start: int = 1) -> Any:
    """Returns a tree of the same containers, shapes and dtypes in which no number occurs twice."""
    numbers = itertools.count(start)

    def fill(leaf: Any) -> Any:
        values = [next(numbers) for _ in range(int(np.prod(np.shape(leaf))))]
        return np.asarray(values, dtype=np.asarray(leaf).dtype).reshape(np.shape(leaf))

    return jax.tree.map(fill, tree)


def written(tree: Any, path: Path) -> Path:
    """Saves a tree with stock Orbax."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
    return path


def flat(path: Path) -> Flat:
    """Returns the leaves that stock Orbax reads, by their keys as strings."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        return leaves(checkpointer.restore(path))


def leaves(tree: Any) -> Flat:
    """Returns the leaves of nested containers by their keys as strings."""
    found, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        tuple(str(getattr(key, "key", getattr(key, "idx", key))) for key in path): leaf
        for path, leaf in found
    }


def described_leaves(path: Path) -> dict[tuple[str, ...], tuple[tuple[int, ...], Any]]:
    """Returns shape and dtype of every stored leaf by path."""
    return {key: (np.shape(value), np.asarray(value).dtype) for key, value in flat(path).items()}
