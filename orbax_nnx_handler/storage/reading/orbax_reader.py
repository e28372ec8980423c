"""Orbax's own reader for the planned leaves, then the recipes under `jit`.

Used where a handler brings type handlers of its own (single-replica restore with
a broadcast, Pathways, custom array types): only Orbax knows how those read. The
planned leaves are asked for through an item of the disk's own containers with a
placeholder at every other leaf, which reads exactly those.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from orbax_nnx_handler.orbax_interfaces import v0 as ocp
from orbax_nnx_handler.planning.core import recipes
from orbax_nnx_handler.planning.core.errors import UnreadableLeafError
from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.core.recipes import Recipe
from orbax_nnx_handler.storage.arithmetic import evaluate
from orbax_nnx_handler.storage.checkpoint.metadata import Checkpoint
from orbax_nnx_handler.storage.checkpoint.trees import EMPTY_TYPES
from orbax_nnx_handler.storage.reading.jobs import Job

_EMPTY_VALUES: dict[str, Any] = {"None": None, "NamedTuple": None, "Dict": {}, "List": [], "Tuple": ()}


def read_with_orbax(
    checkpoint: Checkpoint, jobs: Sequence[Job], handler: ocp.PyTreeCheckpointHandler
) -> dict[Path, jax.Array]:
    """Reads the jobs with a handler's own type handlers.

    Args:
        checkpoint: The checkpoint; its item must have a `_METADATA` file.
        jobs: The wanted arrays.
        handler: Orbax's handler with the type handlers that read. Not one that supports rich
            types: it would want the named tuples of the program that saved.

    Returns:
        The arrays by wanted path.

    Raises:
        UnreadableLeafError: Orbax could not read; its message is quoted.
    """
    shardings: dict[Path, Sharding] = {}
    for job in jobs:
        for path, sharding in source_shardings(job).items():
            shardings.setdefault(path, sharding)
    args = {path: _restore_args(checkpoint, path, sharding) for path, sharding in shardings.items()}
    item = _disk_tree(
        checkpoint,
        {path: jax.ShapeDtypeStruct(a.global_shape, a.dtype) for path, a in args.items()},
        ocp.PLACEHOLDER,
    )
    restore_args = _disk_tree(checkpoint, args, ocp.RestoreArgs())
    try:
        tree = handler.restore(
            checkpoint.directory, args=ocp.args.PyTreeRestore(item=item, restore_args=restore_args)
        )
    except (ValueError, OSError) as error:
        message = f"Orbax cannot read the planned leaves of {checkpoint.directory}: {error}"
        raise UnreadableLeafError(message, paths=list(args)) from error
    return {job.path: _carry_out(job, tree) for job in jobs}


def _restore_args(checkpoint: Checkpoint, path: Path, sharding: Sharding) -> ocp.ArrayRestoreArgs:
    leaf = checkpoint.leaves[path]
    # A subclass of the plain args that every array handler takes and the single-replica one insists on.
    return ocp.type_handlers.SingleReplicaArrayRestoreArgs(
        restore_type=jax.Array, sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype
    )


def _disk_tree(checkpoint: Checkpoint, wanted: Mapping[Path, Any], other: Any) -> Any:
    """Builds the disk's own containers with values at the wanted leaves."""
    root: dict[Any, Any] = {}
    for path, value_type in checkpoint.nodes.items():
        node = root
        for key in path[:-1]:
            node = node.setdefault(key, {})
        value = _EMPTY_VALUES[value_type] if value_type in EMPTY_TYPES else other
        node[path[-1]] = wanted.get(path, value)
    return _lists(root)


def _lists(node: Any) -> Any:
    if not isinstance(node, dict) or not node:
        return cast(Any, node)
    children = {key: _lists(value) for key, value in cast(dict[Any, Any], node).items()}
    if all(isinstance(key, int) for key in children):
        return [children[number] for number in sorted(children)]
    return children


def _look_up(tree: Any, path: Path) -> jax.Array:
    return functools.reduce(lambda node, key: node[key], path, tree)


def _carry_out(job: Job, tree: Any) -> jax.Array:
    # A source that another job read to other devices moves here; otherwise this is nothing.
    sources = {path: jax.device_put(_look_up(tree, path), own) for path, own in source_shardings(job).items()}
    return cast(jax.Array, evaluate(job.recipe, sources, job.dtype, job.sharding))


def source_shardings(job: Job) -> dict[Path, Sharding]:
    """Chooses where each source is read to, so that the recipe moves as little as it can."""
    if isinstance(job.sharding, SingleDeviceSharding):
        return dict.fromkeys(recipes.reads(job.recipe), job.sharding)
    if not isinstance(job.sharding, NamedSharding):
        everywhere = NamedSharding(
            Mesh(np.array(list(cast(set[Any], job.sharding.device_set))), ("all",)), PartitionSpec()
        )
        same = isinstance(job.recipe, recipes.Read)
        return dict.fromkeys(recipes.reads(job.recipe), job.sharding if same else everywhere)
    spec = (*job.sharding.spec, *[None] * (len(job.shape) - len(job.sharding.spec)))
    mesh = job.sharding.mesh
    return {path: NamedSharding(mesh, PartitionSpec(*below)) for path, below in _specs(job.recipe, spec)}


def _specs(recipe: Recipe, spec: tuple[Any, ...]) -> list[tuple[Path, tuple[Any, ...]]]:
    """Pushes a partition down through a recipe; an axis whose length changes is left whole."""
    match recipe:
        case recipes.Read(path):
            return [(path, spec)]
        case recipes.Index(source, axis, _):
            return _specs(source, (*spec[:axis], None, *spec[axis:]))
        case recipes.Slice(source, axis, _, _) | recipes.Repeat(source, axis, _):
            return _specs(source, (*spec[:axis], None, *spec[axis + 1 :]))
        case recipes.Stack(sources, axis):
            return [found for s in sources for found in _specs(s, (*spec[:axis], *spec[axis + 1 :]))]
        case recipes.Concat(sources, axis):
            whole = (*spec[:axis], None, *spec[axis + 1 :])
            return [found for source in sources for found in _specs(source, whole)]
        case recipes.Transpose(source, permutation):
            return _specs(source, tuple(spec[permutation.index(axis)] for axis in range(len(permutation))))
        case recipes.Reshape():
            return [(path, ()) for path in recipes.reads(recipe)]
        case recipes.Scale(source, _) | recipes.Add(source, _):
            return _specs(source, spec)
        case recipes.Fill():
            return []
