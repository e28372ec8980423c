"""Carries a plan out: reads, fills and puts together the values of every leaf."""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from orbax_nnx_handler.planning.paths import Path
from orbax_nnx_handler.planning.plan import Missing, RestorePlan
from orbax_nnx_handler.planning.recipes import Fill, Recipe, Stack
from orbax_nnx_handler.transfer.agreement import agree
from orbax_nnx_handler.transfer.filling import check_init, fill_leaves
from orbax_nnx_handler.transfer.metadata import Checkpoint
from orbax_nnx_handler.transfer.prechecks import check_values
from orbax_nnx_handler.transfer.reading import Job, read_everywhere


def carry_out(
    checkpoint: Checkpoint,
    plan: RestorePlan,
    *,
    init: Callable[[], Any] | None,
    concurrent_bytes: int | None,
    progress: Callable[[int], None] | None = None,
    orbax: ocp.PyTreeCheckpointHandler | None = None,
    single_replica: Callable[[Path], bool] = lambda _: False,
) -> dict[Path, jax.Array]:
    """Returns the value of every leaf of a plan that passed its check.

    Args:
        checkpoint: Where the stored leaves lie.
        plan: The plan.
        init: Builds the target, for `policy="init"`.
        concurrent_bytes: Upper bound of the bytes read but not yet in place.
        progress: Called with the bytes put in place since the last call.
        orbax: A handler with type handlers of its own, which then reads the arrays.
        single_replica: Whether a wanted leaf that several processes hold alike is read
            by one of them.

    Raises:
        RestoreError: A stored value cannot be read or does not fit, on any process.
    """

    def check() -> None:
        check_init(plan, init)
        check_values(checkpoint, plan)

    agree(check)
    arrays = read_everywhere(
        checkpoint,
        _jobs(plan, single_replica),
        concurrent_bytes=concurrent_bytes,
        progress=progress,
        orbax=orbax,
    )
    filled = fill_leaves(plan, init)
    for path, item in plan.missing.items():
        if item.recipe is not None:
            filled[path] = _overlay(item, filled[path], arrays.pop(path))
    return arrays | filled


def _jobs(plan: RestorePlan, single_replica: Callable[[Path], bool]) -> list[Job]:
    jobs = [
        Job(
            path=path,
            recipe=item.recipe,
            shape=item.wanted.shape,
            dtype=item.dtype,
            sharding=cast(Sharding, item.wanted.sharding),
            single_replica=single_replica(path),
        )
        for path, item in plan.restored.items()
    ]
    partly = [item for item in plan.missing.values() if item.recipe is not None]
    return [*jobs, *(_stored_layers(item) for item in partly)]


def _stored_layers(item: Missing) -> Job:
    """Returns the job for the layers that are stored, side by side."""
    stack = _stack(item.recipe)
    present = tuple(part for part in stack.sources if not isinstance(part, Fill))
    shape = item.wanted.shape
    return Job(
        path=item.wanted.path,
        recipe=Stack(present, stack.axis),
        shape=(*shape[: stack.axis], len(present), *shape[stack.axis + 1 :]),
        dtype=item.wanted.dtype,
        sharding=_unsharded_axis(cast(Sharding, item.wanted.sharding), stack.axis),
    )


def _stack(recipe: Recipe | None) -> Stack:
    if not isinstance(recipe, Stack):
        raise TypeError(f"only a stack can hold a part of a leaf, not {recipe}")
    return recipe


def _unsharded_axis(sharding: Sharding, axis: int) -> Sharding:
    """Returns the sharding with one axis whole: the stored layers may not divide over the mesh."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    spec = [*sharding.spec]
    if axis < len(spec):
        spec[axis] = None
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def _overlay(item: Missing, whole: jax.Array, layers: jax.Array) -> jax.Array:
    stack = _stack(item.recipe)
    present = jnp.array([at for at, part in enumerate(stack.sources) if not isinstance(part, Fill)])

    def put(whole: jax.Array, layers: jax.Array) -> jax.Array:
        return jnp.moveaxis(
            jnp.moveaxis(whole, stack.axis, 0).at[present].set(jnp.moveaxis(layers, stack.axis, 0)),
            0,
            stack.axis,
        )

    compiled: Any = jax.jit(put, out_shardings=item.wanted.sharding, donate_argnums=0)
    return compiled(whole, layers)
