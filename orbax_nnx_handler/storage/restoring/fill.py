"""Values that no file gives: initial values, zeros, random state; and arrays that are on devices already.

The keys of random state are made from a base seed and each leaf's path. Two streams
never share a key, since their paths differ, and every process derives the same. They
are computed on the host: compiling hundreds of small outputs onto a mesh would take
longer than the restore.

Of arrays on devices, one jitted function makes all that comes from the same stored
leaves, and layers that are alike share it. Nothing is donated, and nothing passes
through the host.
"""

import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from orbax_nnx_handler.planning.core.dtypes import is_key
from orbax_nnx_handler.planning.core.errors import RestoreError
from orbax_nnx_handler.planning.core.leaves import Shape, WantedLeaf
from orbax_nnx_handler.planning.core.paths import Path, canonical, render
from orbax_nnx_handler.planning.core.recipes import Read, reads
from orbax_nnx_handler.planning.options import DefaultSource
from orbax_nnx_handler.planning.restore_plan import RestorePlan
from orbax_nnx_handler.planning.target import flatten_like
from orbax_nnx_handler.planning.target.shardings import is_abstract, is_traced, mesh_in_force
from orbax_nnx_handler.storage.arithmetic import Asked, axis_names, evaluate_together, explicit_mesh
from orbax_nnx_handler.storage.reading.jobs import Job, families
from orbax_nnx_handler.storage.reading.read import source_shardings

BASE_SEED = 0
"""Seed of keys that neither the checkpoint nor the target nor `init` gives."""

_KEY_IMPLS = ("threefry2x32", "rbg", "unsafe_rbg")


def derive_random(leaves: Sequence[WantedLeaf]) -> dict[Path, jax.Array]:
    """Returns a key for each key leaf, and zero for each count, on their own devices."""
    groups: dict[tuple[str, Shape], list[WantedLeaf]] = defaultdict(list)
    derived: dict[Path, jax.Array] = {}
    for leaf in leaves:
        if is_key(leaf.dtype):
            groups[_impl(leaf.dtype), leaf.shape].append(leaf)
        else:
            derived[leaf.path] = _place(np.zeros(leaf.shape, leaf.dtype), leaf)
    for (impl, shape), some in groups.items():
        bits = _key_bits(impl, shape, [_path_number(leaf.path) for leaf in some])
        for leaf, own in zip(some, bits, strict=True):
            derived[leaf.path] = jax.random.wrap_key_data(_place(own, leaf), impl=impl)
    return derived


def _impl(dtype: Any) -> str:
    return next(name for name in _KEY_IMPLS if jax.random.key(0, impl=name).dtype == dtype)


def _path_number(path: Path) -> int:
    # crc32, not hash(): string hashes differ between processes.
    return zlib.crc32("/".join(canonical(path)).encode())


def _key_bits(impl: str, shape: Shape, numbers: Sequence[int]) -> np.ndarray[Any, Any]:
    """Returns the bits of one key (or array of keys) for each number."""
    base = jax.random.key(BASE_SEED, impl=impl)

    def bits(number: jax.Array) -> jax.Array:
        key = jax.random.fold_in(base, number)
        return jax.random.key_data(jax.random.split(key, shape) if shape else key)

    with jax.default_device(jax.local_devices()[0]):
        return np.asarray(jax.vmap(bits)(jnp.array(numbers, jnp.uint32)))


def _place(value: np.ndarray[Any, Any], leaf: WantedLeaf) -> jax.Array:
    if is_abstract(leaf.sharding):
        return jnp.asarray(value)  # A constant of the program that is traced: no devices are known.
    # A key array's spec names its leading axes; the axis of bits behind them stays whole.
    return jax.make_array_from_callback(
        value.shape, cast(Sharding, leaf.sharding), lambda index: value[index]
    )


def check_built(plan: RestorePlan, init: Callable[[], Any] | None) -> None:
    """Raises where `init` does not build what it must fill; computes nothing.

    Raises:
        RestoreError: Names the leaves that `init` lacks or gives in another shape.
    """
    leaves = [leaf for leaf, source in _sources(plan) if source == "init"]
    if not leaves or init is None:
        return
    with _mesh_of(leaves):
        built = jax.eval_shape(lambda: flatten_like(init()))
    given = {leaf.path: getattr(built.get(leaf.path), "shape", "nothing") for leaf in leaves}
    bad = [leaf for leaf in leaves if given[leaf.path] != leaf.shape]
    if bad:
        rows = [f"  {render(leaf.path)}   wanted {leaf.shape}, init gives {given[leaf.path]}" for leaf in bad]
        raise RestoreError(
            f"init does not build {len(bad)} leaves of the target:\n" + "\n".join(rows),
            paths=[leaf.path for leaf in bad],
            hints=["init must build the target itself: the same containers, attributes and shapes."],
        )


def fill_leaves(plan: RestorePlan, init: Callable[[], Any] | None) -> dict[Path, jax.Array]:
    """Returns the values of all missing and defaulted leaves, each on its own devices.

    A leaf of which some layers are stored is filled whole; the stored layers are
    put over it afterwards.
    """
    by_source: dict[DefaultSource, list[WantedLeaf]] = {"target": [], "init": [], "seed": [], "zeros": []}
    for leaf, source in _sources(plan):
        by_source[source].append(leaf)
    filled = {leaf.path: _from_target(leaf) for leaf in by_source["target"]}
    if init is not None:
        filled |= _compute(by_source["init"], lambda: flatten_like(init()))
    # At once also where a program is being traced: a key is a constant of it.
    with jax.ensure_compile_time_eval():
        filled |= derive_random(by_source["seed"])
    zeros = by_source["zeros"]
    filled |= _compute(zeros, lambda: {leaf.path: jnp.zeros(leaf.shape, leaf.dtype) for leaf in zeros})
    return filled


def _sources(plan: RestorePlan) -> list[tuple[WantedLeaf, DefaultSource]]:
    missing: list[tuple[WantedLeaf, DefaultSource | None]]
    missing = [(item.wanted, item.filled_by) for item in plan.missing.values()]
    defaulted: list[tuple[WantedLeaf, DefaultSource | None]]
    defaulted = [(item.wanted, item.source) for item in plan.defaulted.values()]
    return [(leaf, source) for leaf, source in [*missing, *defaulted] if source is not None]


def _from_target(leaf: WantedLeaf) -> jax.Array:
    # A copy: a train step that donates the restored state must not delete the caller's arrays.
    value = jnp.copy(leaf.value) if isinstance(leaf.value, jax.Array) else jnp.asarray(leaf.value)
    if value.dtype != leaf.dtype:
        value = value.astype(leaf.dtype)
    return jax.device_put(value, leaf.sharding)


def _compute(leaves: Sequence[WantedLeaf], build: Callable[[], Mapping[Path, Any]]) -> dict[Path, jax.Array]:
    """Computes only these leaves of what `build` gives, in place on their devices.

    One compilation for all: XLA drops everything that the outputs do not need.
    """
    groups: dict[Any, list[WantedLeaf]] = {}
    for leaf in leaves:
        devices = cast("set[Any]", leaf.sharding.device_set) if leaf.sharding is not None else set[Any]()
        groups.setdefault(frozenset(devices), []).append(leaf)
    filled: dict[Path, jax.Array] = {}
    for group in groups.values():
        filled |= _compute_on(group, build)
    return filled


def _compute_on(
    leaves: Sequence[WantedLeaf], build: Callable[[], Mapping[Path, Any]]
) -> dict[Path, jax.Array]:
    def outputs() -> list[Any]:
        built = build()
        return [_cast(built[leaf.path], leaf) for leaf in leaves]

    with _mesh_of(leaves):
        compiled: Any = jax.jit(outputs, out_shardings=[leaf.sharding for leaf in leaves])
        values: list[jax.Array] = compiled()
    pairs = zip(leaves, values, strict=True)
    return {
        leaf.path: _placed(value, leaf.sharding) if _is_explicit(leaf.sharding) else value
        for leaf, value in pairs
    }


def _cast(value: Any, leaf: WantedLeaf) -> Any:
    value = jnp.asarray(value) if not isinstance(value, jax.Array) else value
    return value if value.dtype == leaf.dtype else value.astype(leaf.dtype)


def _mesh_of(leaves: Sequence[WantedLeaf]) -> AbstractContextManager[Any]:
    """Puts the leaves' mesh in force, which annotated Variables need to be built under."""
    if mesh_in_force() is not None:
        return nullcontext()
    for leaf in leaves:
        if isinstance(leaf.sharding, NamedSharding) and isinstance(leaf.sharding.mesh, Mesh):
            mesh = leaf.sharding.mesh
            return jax.sharding.use_abstract_mesh(mesh.abstract_mesh) if is_traced() else jax.set_mesh(mesh)
    return nullcontext()


ArraysByPath = Mapping[Path, Any]


def compute_on_devices(values: ArraysByPath, jobs: Sequence[Job]) -> dict[Path, jax.Array]:
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
    return _placed_traced(value, sharding) if isinstance(value, Tracer) else jax.device_put(value, sharding)


def _is_explicit(sharding: Sharding | None) -> bool:
    """Tells a sharding over a mesh with axes of `AxisType.Explicit`."""
    return isinstance(sharding, NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types


def _placed_traced(value: Any, sharding: Sharding) -> jax.Array:
    """Returns a traced array with a sharding."""
    if not isinstance(sharding, NamedSharding) or not _is_explicit(sharding):
        return jax.lax.with_sharding_constraint(value, sharding)
    # A type tells how the array is divided over the explicit axes, a constraint how over the others.
    value = jax.device_put(value, _over(sharding, AxisType.Explicit))
    if AxisType.Auto not in sharding.mesh.axis_types:
        return value
    return jax.lax.with_sharding_constraint(value, _over(sharding, AxisType.Auto))


def _over(sharding: NamedSharding, kind: AxisType) -> NamedSharding:
    """Returns a sharding without the axes of other kinds."""
    kinds = dict(zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True))
    parts = [tuple(name for name in axis_names(part) if kinds[name] is kind) for part in sharding.spec]
    return NamedSharding(sharding.mesh, PartitionSpec(*parts), memory_kind=sharding.memory_kind)


def _destination(job: Job, sources: Sequence[jax.Array]) -> Sharding | None:
    """Returns where an array goes; None where it stays with what it is made from."""
    if any(isinstance(source, Tracer) for source in sources):
        is_asked = isinstance(job.sharding, NamedSharding) and not job.sharding_is_default
        return job.sharding if is_asked else None
    places = {frozenset(cast("set[Any]", source.sharding.device_set)) for source in sources}
    default = frozenset(cast("set[Any]", job.sharding.device_set))
    at_home = len(places) == 1 and (isinstance(job.sharding, SingleDeviceSharding) or places == {default})
    return None if job.sharding_is_default and at_home else job.sharding


def _groups(jobs: Iterable[Job], values: ArraysByPath) -> Iterable[Sequence[Job]]:
    """Yields the jobs to compute together: those that share a source, where all sources are in one place."""
    for family in families(jobs):
        places = {_devices(source.sharding, source.shape) for source in _arrays(family, values)}
        yield from [family] if len(places) < 2 else ([job] for job in family)


def _arrays(jobs: Iterable[Job], values: ArraysByPath) -> list[jax.Array]:
    """Returns the arrays on devices that jobs read; traced ones are in no place yet."""
    found = (values[path] for job in jobs for path in reads(job.recipe))
    return [value for value in found if isinstance(value, jax.Array) and not isinstance(value, Tracer)]


def _devices(sharding: Sharding, shape: tuple[int, ...]) -> tuple[Any, ...]:
    # In their order, on which a jitted function insists.
    return tuple(cast("Mapping[Any, Any]", sharding.devices_indices_map(shape)))


def _computed(jobs: Sequence[Job], values: ArraysByPath) -> tuple[dict[Path, jax.Array], Callable[[], None]]:
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
    # Where types tell how traced arrays are divided, what is asked for comes after.
    typed = explicit_mesh(list(sources.values())) is not None
    asked = [
        Asked(job.recipe, job.dtype, goal if not typed and _is_there(goal, job, places) else None)
        for job, goal in zip(jobs, goals, strict=True)
    ]
    arrays, check = evaluate_together(asked, sources)
    pairs = zip(jobs, arrays, asked, goals, strict=True)
    return {
        job.path: array if one.sharding is goal else _placed(array, goal) for job, array, one, goal in pairs
    }, check


def _is_there(goal: Sharding | None, job: Job, places: set[tuple[Any, ...]]) -> bool:
    """Tells whether an array goes to the devices of its sources, so that one function makes it there."""
    if not places:
        return not _is_explicit(goal)  # What is asked of a traced result says nothing of its type.
    return goal is None or _devices(goal, job.shape) in places
