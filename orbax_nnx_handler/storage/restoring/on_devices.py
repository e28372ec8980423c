"""Arrays that are on devices already: shared where they are wanted as they are, else computed where they lie.

One jitted function makes all that is made from the same stored leaves, and layers that are alike share it.
Nothing is donated, and nothing passes through the host.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import NamedSharding, Sharding, SingleDeviceSharding

from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.core.recipes import Read, reads
from orbax_nnx_handler.storage.arithmetic import Asked, evaluate_together
from orbax_nnx_handler.storage.reading.jobs import Job, families
from orbax_nnx_handler.storage.reading.read import source_shardings

Values = Mapping[Path, Any]


def compute_on_devices(values: Values, jobs: Sequence[Job]) -> dict[Path, jax.Array]:
    """Makes the arrays of jobs from arrays on devices, or from traced ones under `jax.jit`.

    Args:
        values: What the jobs read: JAX arrays, and NumPy arrays that are used together with some.
        jobs: The wanted arrays.

    Returns:
        The arrays by wanted path. One that is wanted as it is, is the very array of `values`; where
        two jobs want it, the second is a copy, so that both may be donated to one function.

    Raises:
        DtypeMismatchError: A value does not fit the wanted dtype; traced ones are not looked at.
    """
    shared: set[int] = set()
    made: dict[Path, jax.Array] = {}
    rest: list[Job] = []
    for job in jobs:
        value = values[job.recipe.path] if isinstance(job.recipe, Read) else None
        if not isinstance(value, jax.Array) or value.dtype != job.dtype:
            rest.append(job)
            continue
        made[job.path] = _placed(
            jnp.copy(value) if id(value) in shared else value, _destination(job, [value])
        )
        shared.add(id(value))
    checks: list[Callable[[], None]] = []
    for group in _groups(rest, values):
        arrays, check = _computed(group, values)
        made |= arrays
        checks.append(check)
    for check in checks:
        check()
    return {job.path: made[job.path] for job in jobs}


def _placed(value: jax.Array, sharding: Sharding | None) -> jax.Array:
    if sharding is None:
        return value
    if isinstance(value, Tracer):
        return jax.lax.with_sharding_constraint(value, sharding)
    return jax.device_put(value, sharding)


def _destination(job: Job, sources: Sequence[jax.Array]) -> Sharding | None:
    """Returns where an array goes; None where it stays with what it is made from."""
    if any(isinstance(source, Tracer) for source in sources):
        is_asked = isinstance(job.sharding, NamedSharding) and not job.sharding_is_default
        return job.sharding if is_asked else None
    places = {frozenset(cast("set[Any]", source.sharding.device_set)) for source in sources}
    default = frozenset(cast("set[Any]", job.sharding.device_set))
    at_home = len(places) == 1 and (isinstance(job.sharding, SingleDeviceSharding) or places == {default})
    return None if job.sharding_is_default and at_home else job.sharding


def _groups(jobs: Iterable[Job], values: Values) -> Iterable[Sequence[Job]]:
    """Yields the jobs to compute together: those that share a source, where all sources are in one place."""
    for family in families(jobs):
        places = {_devices(source.sharding, source.shape) for source in _arrays(family, values)}
        yield from [family] if len(places) < 2 else ([job] for job in family)


def _arrays(jobs: Iterable[Job], values: Values) -> list[jax.Array]:
    """Returns the arrays on devices that jobs read; traced ones are in no place yet."""
    found = (values[path] for job in jobs for path in reads(job.recipe))
    return [value for value in found if isinstance(value, jax.Array) and not isinstance(value, Tracer)]


def _devices(sharding: Sharding, shape: tuple[int, ...]) -> tuple[Any, ...]:
    # In their order, on which a jitted function insists.
    return tuple(cast("Mapping[Any, Any]", sharding.devices_indices_map(shape)))


def _computed(jobs: Sequence[Job], values: Values) -> tuple[dict[Path, jax.Array], Callable[[], None]]:
    sources = {path: values[path] for job in jobs for path in reads(job.recipe)}
    goals = [
        _destination(job, [sources[p] for p in reads(job.recipe) if isinstance(sources[p], jax.Array)])
        for job in jobs
    ]
    places = {_devices(source.sharding, source.shape) for source in _arrays(jobs, values)}
    if len(places) > 1:
        (job,) = jobs
        there = source_shardings(job)
        sources = {path: jax.device_put(source, there[path]) for path, source in sources.items()}
        places = {_devices(job.sharding, job.shape)}
    asked = [
        Asked(job.recipe, job.dtype, goal if _is_there(goal, job, places) else None)
        for job, goal in zip(jobs, goals, strict=True)
    ]
    arrays, check = evaluate_together(asked, sources)
    pairs = zip(jobs, arrays, asked, goals, strict=True)
    return {
        job.path: array if one.sharding is goal else _placed(array, goal) for job, array, one, goal in pairs
    }, check


def _is_there(goal: Sharding | None, job: Job, places: set[tuple[Any, ...]]) -> bool:
    """Tells whether an array goes to the devices of its sources, so that one function makes it there."""
    return goal is None or not places or _devices(goal, job.shape) in places
