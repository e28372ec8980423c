"""Both programs' weights on one device in float32: the variables as Linen wrote them, and the model.

And both programs run with them, or with others.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.sharding import Sharding, SingleDeviceSharding

from orbax_nnx_handler.planning.core.errors import VerificationError
from orbax_nnx_handler.planning.core.folding import fold_paths
from orbax_nnx_handler.planning.core.lines import listed
from orbax_nnx_handler.planning.core.paths import Path, nested, segments
from orbax_nnx_handler.planning.likeness.vocabulary import concepts
from orbax_nnx_handler.planning.restore_plan import RestorePlan
from orbax_nnx_handler.planning.target import flatten_target
from orbax_nnx_handler.storage.checkpoint.metadata import Checkpoint
from orbax_nnx_handler.storage.restoring import (
    LinenWeights,
    locate_stored,
    restore_linen,
    widened,
    with_lists,
)
from orbax_nnx_handler.verifying import (
    MOST_ROUNDINGS,
    NNX,
    TOLERANCE,
    Array,
    Distance,
    Programs,
    are_identical,
    compare,
    error_in_words,
    exceeds,
    fewer,
    hint_for,
    inputs_in_words,
    is_dataclass,
    opened_up,
    rounding_of,
)
from orbax_nnx_handler.verifying.recording import Call, exact, run_linen, run_nnx


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneDevice:
    """What `restore` is told of one leaf.

    Attributes:
        sharding: The one device.
        dtype: float32 for a float, None for the target's own.
    """

    sharding: Sharding
    dtype: np.dtype[Any] | None


def one_device() -> Sharding:
    """Returns where both programs run: the device on which JAX makes an array now."""
    return SingleDeviceSharding(next(iter(jnp.zeros(()).devices())))


def on_one_device(target: Any) -> dict[Path, OneDevice]:
    """Returns the restore args of every leaf of a target."""
    leaves, where = flatten_target(target).leaves, one_device()
    return {path: OneDevice(sharding=where, dtype=widened(leaf.dtype)) for path, leaf in leaves.items()}


def path_above(weights: LinenWeights, module: Any) -> Path | None:
    """Returns the keys above the path of a bound Linen module, if the arrays that it was given tell."""
    # A copy that is given beside the parameters is not what the module uses.
    for _, collection in sorted(module.variables.items(), key=lambda item: item[0] != "params"):
        flat = cast(Any, jax.tree_util.tree_flatten_with_path(collection))
        for keys, array in flat[0]:
            place = weights.of_array.get(id(array))
            if place is not None:
                return place[: len(place) - len(module.path) - len(keys)]
    return None


def find_nnx(wanted: Iterable[Path], variables: Iterable[Path], above: Path) -> Path | None:
    """Returns the keys above a module's Variables in the target, if only one place is possible."""
    paths = list(variables)
    if not paths:
        return None
    found: set[Path] | None = None
    known = set(wanted)
    for path in paths:
        ends = {
            one[: len(one) - len(path)]
            for one in known
            if one[: len(above)] == above and one[len(one) - len(path) :] == path
        }
        found = ends if found is None else found & ends
    return found.pop() if found and len(found) == 1 else None


def flat_state(module: Any) -> list[tuple[Path, Any]]:
    """Returns the Variables of a module by path."""
    flat = cast("Iterable[tuple[Path, Any]]", nnx.to_flat_state(cast(Any, nnx.state(module))))
    return [(tuple(path), leaf) for path, leaf in flat]


def is_other(own: Any, leaf: Any) -> bool:
    """Tells whether a Variable holds other floats than the model's own; a layer of it does not."""
    if own is None or not is_weight(leaf):
        return False
    one, two = own.get_raw_value(), leaf.get_raw_value()
    if one is two or isinstance(two, Tracer) or one.shape != two.shape or one.dtype != two.dtype:
        return False
    return not np.array_equal(one, two, equal_nan=True)


def is_weight(leaf: Any) -> bool:
    """Tells whether a Variable holds floats."""
    return isinstance(leaf, nnx.Variable) and bool(jnp.issubdtype(leaf.dtype, jnp.floating))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinenRun:
    """What the Linen program did with the variables that it was called with; these are gone."""

    weights: LinenWeights
    returned: Any
    calls: Sequence[Call]


def run_linen_program(checkpoint: Checkpoint, plan: RestorePlan, programs: Programs) -> LinenRun:
    """Runs the Linen program on its variables; these are gone then."""
    inputs, weights = programs.inputs, restore_linen(checkpoint, plan, one_device())
    try:
        returned, calls = run_linen(
            programs.linen, weights.variables, *inputs, owner=lambda module: path_above(weights, module)
        )
    except Exception as error:
        held = ", ".join(map(repr, weights.variables))
        hint = (
            f"it is called with the variables (a dict with {held}) and {inputs_in_words(inputs)}, such as "
            "linen_model.apply, or lambda variables, x: linen_model.apply(variables, x, train=False)."
        )
        if isinstance(error, flax.errors.ScopeParamShapeError):
            hint = f"the weights are for inputs of another shape than {inputs_in_words(inputs)}."
        raise VerificationError(
            f"linen_apply fails: {error_in_words(error)}", hints=[hint_for(error, hint)]
        ) from error
    weights.variables.clear()
    return LinenRun(weights=weights, returned=returned, calls=calls)


def depends(programs: Programs, model: Any, found: Any, weights: Mapping[Path, Any] | None = None) -> bool:
    """Tells whether the NNX program returns something else with other weights, all or some of them."""
    other = returned_with(programs, model, weights)
    pairs = zip(jax.tree.leaves(opened_up(found)), jax.tree.leaves(opened_up(other)), strict=True)
    return any(exceeds(compare([np.asarray(one)], [np.asarray(two)]), _NO_EFFECT) for one, two in pairs)


def returned_with(programs: Programs, model: Any, weights: Mapping[Path, Any] | None) -> Any:
    """Returns what the NNX program returns with numbers added to weights, to all of them a one."""

    def changed(path: Path, leaf: Any) -> Any:
        return leaf.replace(leaf.get_value() + (1 if weights is None else weights.get(path, 0)))

    flat = [(path, changed(path, leaf) if is_weight(leaf) else leaf) for path, leaf in flat_state(model)]
    merged = nnx.merge(nnx.graphdef(model), nnx.from_flat_state(cast(Any, flat)))
    with exact():
        return programs.nnx(merged, *programs.inputs)


_NO_EFFECT = 1e-6
"""What rounding alone may change."""


def run_nnx_program(programs: Programs, model: Any, wanted: Sequence[Path]) -> tuple[Any, list[Call], bool]:
    """Runs the NNX program on a model; returns what `run_nnx` does."""
    inputs = programs.inputs

    @functools.cache
    def own() -> Mapping[Path, Any]:
        return dict(flat_state(model))

    def locate(module: Any, above: Path) -> Path | None:
        variables = flat_state(module)
        place = find_nnx(wanted, [path for path, _ in variables], above)
        # With other weights it is no module of this model: nothing shows those that lie in its place.
        if place is None or any(is_other(own().get((*place, *at)), leaf) for at, leaf in variables):
            return None
        return place

    try:
        return run_nnx(programs.nnx, model, *inputs, locate=locate)
    except Exception as error:
        hint = (
            f"it is called with the restored target (a {type(model).__name__}) and "
            f"{inputs_in_words(inputs)}, such as {NNX}. A model with dropout wants model.eval() "
            "first, or rngs."
        )
        raise VerificationError(
            f"nnx_apply fails: {error_in_words(error)}", hints=[hint_for(error, hint)]
        ) from error


_HARDLY, _BY_CHANCE = 1e-3, 4
"""What hardly differs from zero, and how many numbers may do so by chance."""


def is_zero_somewhere(weight: Array, layers: int | None) -> bool:
    """Tells whether a weight, or a slice of it along some axis, is so small that it hides what it multiplies.

    Args:
        weight: The weight.
        layers: The axis along which layers are stacked in it, each of which counts, however few its numbers.
    """
    if weight.ndim < 2 and layers is None:
        return weight.size > 0 and bool(np.abs(weight).max() < _HARDLY)
    for axis in range(weight.ndim):
        line = weight[tuple(slice(None) if at == axis else slice(1) for at in range(weight.ndim))]
        if axis == layers or line.size * _BY_CHANCE <= weight.size:
            small = np.flatnonzero(np.abs(line) < _HARDLY)  # Elsewhere a slice is not to be looked at.
            if any(np.abs(weight.take(at, axis)).max() < _HARDLY for at in small):
                return True
    return False


OF_EXPERTS = 3
"""Axes of the weights of experts: expert, feature, feature."""


def axis_of_experts(weight: Array, experts: Collection[int]) -> int | None:
    """Returns the axis of a weight, or of several stacked, along which its experts lie, if it has some."""
    axes = range(weight.ndim - OF_EXPERTS + 1)
    return next((axis for axis in axes if weight.shape[axis] in experts), None)


def idle_experts(mask: Array, experts: Collection[int]) -> str:
    """Returns which experts a mask is of, in words; nothing where it is of something else."""
    axis = axis_of_experts(mask, experts)
    if axis is None:
        return ""
    idle = np.moveaxis(mask, axis, 0).reshape(mask.shape[axis], -1).all(1)
    which = ", ".join(map(str, np.flatnonzero(idle)))
    return f"the experts {which} of {mask.shape[axis]}" if which else ""


def least_chosen(routed: Array) -> tuple[int, int]:
    """Returns the place that the expert last chosen has where it comes first, and its number."""
    places = (-routed).argsort(-1).argsort(-1).reshape(-1, routed.shape[-1]).min(0)
    return int(places.max()), int(places.argmax())


def of_expert(number: int, count: int, place: Path, change: Array) -> Array | None:
    """Returns the part of a change that is one expert's, of so many; None where it has none."""
    axis = axis_of_experts(change, (count,))
    if place[:1] == (number,):
        return change
    if axis is None:
        return None
    return change * (np.arange(count) == number).reshape(count, *[1] * (change.ndim - axis - 1))


_MUCH = 1 / 2
"""The share of a weight without an effect that is worth a word."""


def idle_slices(path: Path, zero: Array, layers: int | None, experts: Collection[int] = ()) -> Array | None:
    """Returns the slices of a weight without an effect along one axis: layers, experts, or a large part."""
    if zero.all():
        return zero if zero.size else None
    shares = [
        zero.all(axis=tuple(at for at in range(zero.ndim) if at != axis), keepdims=True)
        for axis in range(zero.ndim)
    ]
    if layers is not None and shares[layers].any():
        return np.broadcast_to(shares[layers], zero.shape)
    axis = axis_of_experts(zero, experts)
    if axis is not None and shares[axis].any():
        return np.broadcast_to(shares[axis], zero.shape)
    if not zero.ndim or concepts(segments(path)) & {"embed", "token", "pos", "type"}:
        return None  # One number, or words and positions that are not among the inputs.
    most = max(shares, key=lambda share: share.mean())
    return np.broadcast_to(most, zero.shape) if most.mean() >= _MUCH else None


def slopes_of(programs: Programs, model: Any) -> Mapping[Path, Array] | None:
    """Returns how what the NNX program returns changes with each weight; None where JAX cannot tell.

    Of the sum of all floats that it returns, each times a random number.
    """
    graph, floats, others = cast(Any, nnx.split)(model, _is_weight_at, ...)

    def total(state: Any) -> Any:
        arrays = floats_in(programs.nnx(nnx.merge(graph, state, others), *programs.inputs))
        keys = jax.random.split(jax.random.key(0), len(arrays))
        pairs = zip(keys, arrays, strict=True)
        return sum((array * jax.random.normal(key, array.shape)).sum() for key, array in pairs)

    for compiled in (True, False):  # A program that looks at values cannot be compiled.
        try:
            with jax.disable_jit(not compiled), jax.default_matmul_precision("highest"):
                found = cast(Any, jax.jit(jax.grad(total))(floats))
        except Exception:  # The caller's program may have no derivative, and fail in any way.
            continue
        flat = cast("Iterable[tuple[Path, Any]]", nnx.to_flat_state(found))
        return {tuple(path): np.asarray(leaf.get_value()) for path, leaf in flat}
    return None


def _is_weight_at(_: Any, leaf: Any) -> bool:
    return is_weight(leaf)


def floats_in(tree: Any) -> list[Any]:
    """Returns the arrays of floats in what a program returns, both parts of complex numbers."""
    found = list[Any]()
    for leaf in jax.tree.leaves(tree, is_leaf=is_dataclass):
        if is_dataclass(leaf):
            found += floats_in([getattr(leaf, field.name) for field in dataclasses.fields(leaf)])
        elif jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            found += [jnp.real(leaf), jnp.imag(leaf)] if jnp.iscomplexobj(leaf) else [leaf]
    return found


def whole_modules(some: Collection[Path], all_: Iterable[Path]) -> list[Path]:
    """Returns the outermost modules of which all leaves are among some."""
    others = {path[:depth] for path in all_ if path not in some for depth in range(len(path))}
    each = ((path[:n] for n in range(1, len(path) + 1) if path[:n] not in others) for path in some)
    return [*dict.fromkeys(next(modules) for modules in each)]


def unused_leaves(
    checkpoint: Checkpoint,
    plan: RestorePlan,
    groups: Sequence[Sequence[Path]],
    run: Callable[[Any], Any],
    returned: Any,
) -> list[Path]:
    """Returns which groups of stored floats a Linen program does not use: it returns the same without.

    Each is tried as NaN, many at once. `run` runs the program on other variables than those that it
    `returned` from.
    """
    runs = iter(range(_MOST_WITHOUT))

    def unused(some: Sequence[Sequence[Path]]) -> list[Path]:
        if not some or next(runs, None) is None:
            return []
        tried = [*itertools.chain(*some)]
        variables, half = restore_linen(checkpoint, plan, one_device(), tried).variables, len(some) // 2
        with contextlib.suppress(Exception):  # The program may refuse what is no number in any way.
            if are_identical(returned, run(variables)):
                return tried
        return [*unused(some[:half]), *unused(some[half:])] if half else []

    return unused(groups)


_MOST_WITHOUT = 16


def cast_in_one(apart: Distance, programs: Programs, plan: RestorePlan, model: Any) -> str:
    """Returns which program alone casts to fewer digits, where that may be all the difference."""
    least, most = MOST_ROUNDINGS * TOLERANCE, MOST_ROUNDINGS * rounding_of("bfloat16")
    found = _digits_inside(programs, plan, model) if least < apart.relative < most else {}
    low = {name: dtypes.difference(*(found[x] for x in found if x != name)) for name, dtypes in found.items()}
    return "; ".join(f"{name} casts to {listed(sorted(some))} in it" for name, some in low.items() if some)


def _digits_inside(programs: Programs, plan: RestorePlan, model: Any) -> dict[str, set[str]]:
    """Returns in which dtypes of fewer digits than float32's each program computes anything, by its name."""
    places, stored = locate_stored(plan)[0], plan.sides.placements
    dtypes = {path: widened(stored[path].leaf.dtype) or stored[path].leaf.dtype for path in places}
    held = {at: jax.ShapeDtypeStruct(stored[path].leaf.shape, dtypes[path]) for path, at in places.items()}
    again = nnx.merge(*nnx.split(model))  # What a program counts would be left in it.
    traced = {
        "linen_apply": lambda: jax.make_jaxpr(programs.linen)(with_lists(nested(held)), *programs.inputs),
        "nnx_apply": lambda: jax.make_jaxpr(functools.partial(programs.nnx, again))(*programs.inputs),
    }
    found = dict[str, set[str]]()
    with contextlib.suppress(Exception):  # A program that looks at values cannot be traced.
        for name, trace in traced.items():
            found[name] = {str(each.dtype) for each in _computed(trace().jaxpr) if fewer([each])}
    return found if len(found) == len(traced) else {}


def _computed(jaxpr: Any) -> Iterator[Any]:
    """Yields what a traced program computes, with what is computed in loops and branches."""
    for step in jaxpr.eqns:
        yield from (each.aval for each in step.outvars if hasattr(each.aval, "dtype"))
        for value in step.params.values():
            parts = cast("Sequence[Any]", value if isinstance(value, tuple | list) else [value])
            inner = (getattr(part, "jaxpr", part) for part in parts)
            yield from itertools.chain(*(_computed(part) for part in inner if hasattr(part, "eqns")))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Misfilled:
    """Leaves of the model that are filled from what the Linen program does not use.

    Attributes:
        wanted: The leaves, by modules of which all leaves are so; none where what is missing might be so.
        sources: What they are filled from, by modules too.
        unused: All stored leaves that were found not to be used.
        instead: What it calls, of the same sizes, and nothing is filled from, by modules.
    """

    wanted: Sequence[Path]
    sources: Sequence[Path]
    unused: Sequence[Path]
    instead: Sequence[Path]

    @property
    def words(self) -> str:
        """What is wrong."""
        wanted, sources, instead = map(fold_paths, (self.wanted, self.sources, self.instead))
        return (
            f"{wanted}: filled from {sources}, which the Linen program does not use, while {instead}, in "
            "what it calls and of the same sizes, fills nothing"
        )
