"""Carries a plan out: reads, fills and puts together the values of every leaf.

The few stored values that decide a verdict (counts that must fit, leftovers that must be
zero) are read before anything else, so that a failure is known before the first weight is read.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from orbax_nnx_handler.orbax_interfaces import v0 as ocp
from orbax_nnx_handler.planning.core.errors import (
    DtypeMismatchError,
    Hint,
    UnmappedValueError,
    UnreadableLeafError,
    as_python,
)
from orbax_nnx_handler.planning.core.lines import listed
from orbax_nnx_handler.planning.core.paths import Path, render
from orbax_nnx_handler.planning.core.recipes import Fill, Recipe, Stack, reads
from orbax_nnx_handler.planning.mapping.matches import Dropped
from orbax_nnx_handler.planning.options import SingleReplica
from orbax_nnx_handler.planning.restore_plan import RestorePlan
from orbax_nnx_handler.planning.rules import Drop
from orbax_nnx_handler.planning.verdict.outcomes import Missing, Restored
from orbax_nnx_handler.storage import agree
from orbax_nnx_handler.storage.checkpoint.metadata import Checkpoint
from orbax_nnx_handler.storage.reading import Job, check_one_save, read_everywhere, read_values
from orbax_nnx_handler.storage.reading.memory import Memory
from orbax_nnx_handler.storage.restoring.fill import check_built, compute_on_devices, fill_leaves


def check_values(checkpoint: Checkpoint, plan: RestorePlan) -> None:
    """Reads and judges the values that a plan leaves open.

    Raises:
        DtypeMismatchError: A step or count does not fit the wanted integer type.
        UnmappedValueError: A value that NNX has no Variable for is not zero.
    """
    _check_counts(checkpoint, [item for item in plan.restored.values() if item.cast == "count"])
    without_variable = [item for item in plan.dropped.values() if isinstance(item, Dropped)]
    _check_dropped(checkpoint, without_variable)


def _check_counts(checkpoint: Checkpoint, counts: Iterable[Restored]) -> None:
    bad: list[tuple[Path, str]] = []
    for item in counts:
        limits = np.iinfo(item.dtype)
        for path in reads(item.recipe):
            value = _read(checkpoint, path)
            if isinstance(value, Tracer):
                continue
            if int(value.min()) < limits.min or int(value.max()) > limits.max:
                bad.append(
                    (
                        item.wanted.path,
                        f"stored {value} ({value.dtype}) from {render(path)}, wanted {item.dtype}",
                    )
                )
    if bad:
        rows = "\n".join(f"  {render(path)}   {text}" for path, text in bad)
        raise DtypeMismatchError(
            f"{len(bad)} counts do not fit the wanted integer type:\n{rows}\n"
            f"checkpoint: {checkpoint.directory}",
            paths=[path for path, _ in bad],
            hints=[
                Hint(
                    'give the target a wider integer type for them, or pass dtype="stored".',
                    {"dtype": "stored"},
                )
            ],
        )


def _check_dropped(checkpoint: Checkpoint, dropped: Iterable[Dropped]) -> None:
    bad = [item for item in dropped if _is_not_zero(_read(checkpoint, item.leaf.path))]
    if bad:
        rows = "\n".join(f"  {render(item.leaf.path)}   {item.leaf.shape}   {item.reason}" for item in bad)
        patterns = dict.fromkeys("/".join(map(str, item.leaf.path[-2:])) for item in bad)
        rules = [Drop(pattern, "why") for pattern in patterns]
        own = listed(repr((pattern, pattern.replace("/", "_"))) for pattern in patterns)
        raise UnmappedValueError(
            f"{'1 stored value has' if len(bad) == 1 else f'{len(bad)} stored values have'} "
            f"no counterpart in NNX and {'is' if len(bad) == 1 else 'are'} not zero:\n{rows}\n"
            f"checkpoint: {checkpoint.directory}",
            paths=[item.leaf.path for item in bad],
            hints=[
                Hint(
                    "without them the model computes something else: give the target's module Variables for "
                    f"them, which it uses as Linen's does, and name these by rules, {own}; or "
                    f"leave them behind on purpose with renames={as_python(rules)}.",
                    {"renames": rules},
                )
            ],
        )


def _is_not_zero(value: Any) -> bool:
    return not isinstance(value, Tracer) and bool(value.any())


def _read(checkpoint: Checkpoint, path: Path) -> Any:
    """Returns one stored value; an array of a tree in memory is where it is, and may be traced."""
    if path in checkpoint.on_devices:
        return checkpoint.on_devices[path]
    if checkpoint.values and path in checkpoint.values:
        return checkpoint.values[path]
    array = checkpoint.arrays[path]
    if array.store.kind == "archive":
        return read_values(checkpoint, [path])[path]
    try:
        opened = array.store.open_array(array.name, array.encoding.driver, writes_fill=checkpoint.writes_fill)
        return opened.read().result()
    except (ValueError, OSError) as error:
        raise UnreadableLeafError(
            f"{render(path)} cannot be read from {array.store.directory}: {error}", paths=[path]
        ) from error


def carry_out(
    checkpoint: Checkpoint,
    plan: RestorePlan,
    *,
    init: Callable[[], Any] | None,
    concurrent_bytes: int | None = None,
    progress: Callable[[int], None] | None = None,
    orbax: ocp.PyTreeCheckpointHandler | None = None,
    memory: Memory | None = None,
    single_replica: Callable[[Path], SingleReplica | None] = lambda _: None,
) -> dict[Path, jax.Array]:
    """Returns the value of every leaf of a plan that passed its check.

    Args:
        checkpoint: Where the stored leaves lie.
        plan: The plan.
        init: Builds the target, for `policy="init"`.
        concurrent_bytes: Upper bound of the bytes read but not yet in place.
        progress: Called with the bytes put in place since the last call.
        orbax: A handler with type handlers of its own, which then reads the arrays.
        memory: Blocks that are ready to be read into.
        single_replica: How a wanted leaf that several processes hold alike is read
            by one of them.

    Raises:
        RestoreError: A stored value cannot be read or does not fit, on any process.
    """

    def check() -> None:
        check_built(plan, init)
        check_values(checkpoint, plan)

    agree(check)
    arrays = read_jobs(
        checkpoint,
        _jobs(plan, single_replica),
        concurrent_bytes=concurrent_bytes,
        progress=progress,
        orbax=orbax,
        memory=memory,
    )
    agree(lambda: check_one_save(checkpoint))
    filled = fill_leaves(plan, init)
    for path, item in plan.missing.items():
        if item.recipe is not None:
            filled[path] = _overlay(item, filled[path], arrays.pop(path))
    return arrays | filled


def read_jobs(checkpoint: Checkpoint, jobs: Sequence[Job], **reading: Any) -> dict[Path, jax.Array]:
    """Returns the arrays of jobs: those of a tree in memory from where they are, all others read.

    Args:
        checkpoint: Where the stored leaves lie.
        jobs: What is to be made.
        reading: See `read_everywhere`.

    Raises:
        RestoreError: A stored value cannot be read, on any process.
    """
    arrays = dict[Path, jax.Array]()
    if checkpoint.on_devices:
        there = [job for job in jobs if not checkpoint.on_devices.keys().isdisjoint(reads(job.recipe))]
        values = {**(checkpoint.values or {}), **checkpoint.on_devices}
        arrays = agree(lambda: compute_on_devices(values, there))
        jobs = [job for job in jobs if job.path not in arrays]
    return arrays | read_everywhere(checkpoint, jobs, **reading)


def _jobs(plan: RestorePlan, single_replica: Callable[[Path], SingleReplica | None]) -> list[Job]:
    jobs = [
        Job(
            path=path,
            recipe=item.recipe,
            shape=item.wanted.shape,
            dtype=item.dtype,
            sharding=cast(Sharding, item.wanted.sharding),
            single_replica=single_replica(path),
            sharding_is_default=item.wanted.sharding_is_default,
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
