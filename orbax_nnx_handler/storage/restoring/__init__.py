"""Carries a plan out: reads, fills and puts together the values of every leaf.

The few stored values that decide a verdict (counts that must fit, leftovers that must be
zero) are read before anything else, so that a failure is known before the first weight is read.
What a plan reads is also put together as the Linen program wrote it.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from orbax_nnx_handler.orbax_interfaces import v0 as ocp
from orbax_nnx_handler.planning.core.dtypes import is_key
from orbax_nnx_handler.planning.core.errors import (
    DtypeMismatchError,
    Hint,
    UnmappedValueError,
    UnreadableLeafError,
    as_python,
)
from orbax_nnx_handler.planning.core.lines import listed
from orbax_nnx_handler.planning.core.paths import Path, nested, render, segments
from orbax_nnx_handler.planning.core.recipes import Fill, Read, Recipe, Stack, reads
from orbax_nnx_handler.planning.layouts.layout import FLAX_COLLECTIONS, Placement
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


def widened(dtype: Any) -> np.dtype[Any] | None:
    """Returns in what a Linen program gets a leaf, if not as it is stored: a float in float32."""
    return np.dtype(np.float32) if jnp.issubdtype(dtype, np.floating) else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinenWeights:
    """The variables of a Linen program.

    Attributes:
        variables: Collections by name, as `module.apply` takes them; where the plan uses several train
            states, one such dict for each, below the keys of its owner.
        places: Where each stored leaf lies in them.
        location: Where each stored leaf lies: keys of the modules, and the leaf's name.
        of_array: The same by the identity of the array in `variables`.
    """

    variables: dict[str, Any]
    places: Mapping[Path, Path]
    location: Mapping[Path, Path]
    of_array: Mapping[int, Path]


def locate_stored(plan: RestorePlan) -> tuple[dict[Path, Path], dict[Path, Path]]:
    """Returns where each stored leaf lies in the variables, and where among the modules."""
    placements = plan.sides.placements
    read = {path for item in plan.restored.values() for path in reads(item.recipe)}
    model = [placement for placement in placements.values() if placement.section == "model"]
    # Where nothing is read yet, for no rule is settled, all that is stored may be meant.
    owners = {placement.owner for placement in model if placement.leaf.path in read or not read}
    mine = [placement for placement in model if placement.owner in owners]
    chosen = _asked_for(mine, read)
    parents, copies = _children([placement.path for placement in chosen]), _copies(chosen)
    flat = {placement.owner for placement in chosen} - {one.owner for one in chosen if len(one.path) > 1}
    # Some files have dots in place of slashes, in every key.
    plain = {one.owner for one in chosen if "." not in str(one.path[-1]) or "/" in str(one.path[-1])}
    known = {segments(placement.path) for placement in chosen}
    places: dict[Path, Path] = {}
    modules: dict[Path, Path] = {}
    for placement in chosen:
        keys = _unboxed(placement.path, parents)
        keys = segments(keys) if placement.owner in flat else _taken_apart(keys, known)
        if placement.owner in flat - plain:
            keys = tuple(str(keys[-1]).removeprefix("params.").split("."))
        above = placement.owner if len(owners) > 1 else ()
        places[placement.leaf.path] = (*above, placement.collection or "params", *keys)
        copy = copies.get((placement.owner, placement.collection), ())
        modules[placement.leaf.path] = (*segments(above), *copy, *map(str, keys))
    return places, modules


def _taken_apart(keys: Path, known: Collection[Path]) -> Path:
    """Returns keys without those that are several joined by slashes, as `flatten_dict(params, sep="/")` has.

    A normalising wrapper has them joined in the program too: what it keeps for the weight of another layer,
    `dense/kernel/scale`, for which that weight is stored.
    """
    *above, last = keys
    weight = str(last).split("/")[:-1]
    kept = bool(weight) and any((*segments((*above[:at],)), *weight) in known for at in range(len(keys)))
    joined = above if kept else [*above, last]
    apart = [part for key in joined for part in (key.split("/") if isinstance(key, str) else (key,))]
    return (*apart, *((last,) if kept else ()))


def _copies(placements: Iterable[Placement]) -> dict[tuple[Path, str | None], Path]:
    """Returns what stands for each copy of the parameters, by owner and collection: a model beside theirs."""
    found: dict[tuple[Path, str | None], set[Path]] = {}
    for one in placements:
        found.setdefault((one.owner, one.collection), set()).add(one.path)
    return {
        (owner, name): (re.sub("_?(params|batch_stats)_?", "", name) or name,)
        for (owner, name), paths in found.items()
        if name
        and any(not paths.isdisjoint(found.get((owner, own), ())) for own in FLAX_COLLECTIONS)
        and name not in FLAX_COLLECTIONS
    }


def _asked_for(placements: Iterable[Placement], read: set[Path]) -> list[Placement]:
    """Returns the leaves of collections that the plan reads, or that are no copy of the parameters."""
    found: dict[tuple[Path, str | None], list[Placement]] = {}
    for placement in placements:
        found.setdefault((placement.owner, placement.collection), []).append(placement)
    params = {owner: {one.path for one in ones} for (owner, name), ones in found.items() if name == "params"}
    return [
        one
        for (owner, name), ones in found.items()
        if name in FLAX_COLLECTIONS
        or any(one.leaf.path in read for one in ones)
        or {one.path for one in ones}.isdisjoint(params.get(owner, ()))
        for one in ones
    ]


def _children(paths: Iterable[Path]) -> dict[Path, set[Any]]:
    found: dict[Path, set[Any]] = {}
    for path in paths:
        found.setdefault(path[:-1], set()).add(path[-1])
    return found


def _unboxed(path: Path, children: Mapping[Path, set[Any]]) -> Path:
    """Takes the level away that a partitioned box adds: `kernel/value`."""
    boxed = len(path) > 1 and path[-1] == "value" and children[path[:-1]] == {"value"}
    return path[:-1] if boxed else path


def held_if_small(checkpoint: Checkpoint, plan: RestorePlan) -> Checkpoint:
    """Returns a checkpoint with what the Linen variables are made of in memory, where that is little.

    Both programs' weights are made of it, and what is tried in a search for a mistake.

    Raises:
        UnreadableLeafError: Stored bytes are absent or damaged.
    """
    arrays, values = checkpoint.arrays, checkpoint.values or {}
    stored = [path for path in locate_stored(plan)[0] if path in arrays and path not in values]
    stored = [path for path in stored if not is_key(checkpoint.leaves[path].dtype)]
    nbytes = sum(
        math.prod(arrays[path].encoding.shape) * arrays[path].encoding.dtype.itemsize for path in stored
    )
    if not 0 < nbytes <= _LITTLE:
        return checkpoint
    return dataclasses.replace(
        checkpoint, values={**values, **agree(lambda: read_values(checkpoint, stored))}
    )


_LITTLE = 2**28


def restore_linen(
    checkpoint: Checkpoint, plan: RestorePlan, where: Sharding, no_numbers: Iterable[Path] = ()
) -> LinenWeights:
    """Reads the variables of the train states that a plan reads, floats as float32.

    Args:
        checkpoint: What is stored.
        plan: The plan.
        where: The one device.
        no_numbers: Stored leaves of floats that are filled with NaN.

    Raises:
        UnreadableLeafError: Stored bytes are absent or damaged.
    """
    places, location = locate_stored(plan)
    arrays = read_jobs(checkpoint, [_job(checkpoint, path, where) for path in places])
    arrays |= {path: jnp.full_like(arrays[path], jnp.nan) for path in no_numbers}
    tree = nested({place: arrays[path] for path, place in places.items()})
    return LinenWeights(
        variables=cast("dict[str, Any]", with_lists(tree)),
        places=places,
        location=location,
        of_array={id(arrays[path]): location[path] for path in places},
    )


def _job(checkpoint: Checkpoint, path: Path, where: Sharding) -> Job:
    leaf = checkpoint.leaves[path]
    dtype = widened(leaf.dtype) or leaf.dtype
    return Job(
        path=path,
        recipe=Read(path),
        shape=leaf.shape,
        dtype=cast("np.dtype[Any]", dtype),
        sharding=where,
    )


def with_lists(tree: Any) -> Any:
    """Returns a tree of dicts with lists where keys are the numbers from 0 on."""
    if not isinstance(tree, dict):
        return tree
    nodes = {key: with_lists(node) for key, node in cast("dict[Any, Any]", tree).items()}
    if (
        nodes
        and sorted(map(str, nodes)) == sorted(map(str, range(len(nodes))))
        and all(type(key) is int for key in nodes)
    ):
        return [nodes[number] for number in range(len(nodes))]
    return nodes
