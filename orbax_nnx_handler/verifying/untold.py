"""What equal outputs do not tell: weights that they do not depend on, and inputs that show little."""

import itertools
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from orbax_nnx_handler.planning.core.folding import fold_paths
from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.core.recipes import Concat, Stack, reads, shape_of
from orbax_nnx_handler.planning.restore_plan import RestorePlan
from orbax_nnx_handler.verifying import (
    MASK,
    MOST_ROUNDINGS,
    TOLERANCE,
    Array,
    are_the_same,
    compare,
    exceeds,
)
from orbax_nnx_handler.verifying.runs import Compared, Runs
from orbax_nnx_handler.verifying.single_module import ModuleRunner
from orbax_nnx_handler.verifying.verification import FirstDifference, outputs_apart
from orbax_nnx_handler.verifying.weights import (
    OF_EXPERTS,
    depends,
    floats_in,
    idle_experts,
    idle_slices,
    is_weight,
    is_zero_somewhere,
    least_chosen,
    of_expert,
    returned_with,
    slopes_of,
)

_FEATURES = 3
"""Axes of an array of features: example, position, feature."""
_LEAST, _MOST = 1e-4, 1e4
"""The usual sizes of inputs."""
FAR = 1e-3
"""What is no rounding, wherever in a program."""
_CHANCE = 1 / 16
"""The share of numbers that may be equal by chance."""


def untold(runs: Runs, plan: RestorePlan, first: FirstDifference | None) -> Iterator[str]:
    """Yields what equal outputs do not tell of the weights."""
    arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(runs.inputs) if np.size(leaf) > 1]
    numbers = [array for array in arrays if array.dtype.kind in "iuf"]
    flat = [array for array in numbers if np.all(array == array.flat[0])]
    # One that is the same throughout beside others is a mask or a type, but for features.
    if flat and (len(flat) == len(numbers) or any(array.ndim == _FEATURES for array in flat)):
        yield "an input is one number throughout, which tells little of the weights: choose random inputs."
    if any(np.array_equal(one, two) for one, two in itertools.combinations(numbers, 2)):
        yield "two inputs are the same, so what is told of the one may be the other's: choose different ones."
    sizes = [usual_size(array) for array in numbers if array.dtype.kind == "f"]
    strange = next((size for size in sizes if size and not _LEAST < size < _MOST), None)
    if strange is not None:
        yield f"an input's numbers are about {strange:.0e}, where weights hardly count: choose some of 1."
    returned = ((one.path, floats_in([*one.nnx.outputs])) for one in runs.compared)
    large = ((path, usual_size(array)) for path, arrays in returned for array in arrays)
    if strange is None and (beyond := next((each for each in large if each[1] > _MOST), None)):
        yield (
            f"{fold_paths(beyond[:1])}: it returns numbers of about {beyond[1]:.0e}, beside which small "
            "weights, such as a bias, do not show: this run does not tell that they are right."
        )
    calls: dict[Path, list[Compared]] = defaultdict(list)
    for one in runs.compared:
        calls[one.path].append(one)
    certain = [one for one in runs.compared if one.found.is_certain]
    # What is padding may differ, at some positions or in some calls of a module.
    quiet = [one for one in certain if one.found.differs or all(map(_is_apart_throughout, calls[one.path]))]
    quiet = [one for one in quiet if not one.is_reordered]
    if first is None and quiet:
        yield (
            f"{fold_paths(one.path for one in quiet)}: the outputs differ from Linen's, and what comes of "
            "them is the same: this run does not tell that the weights are right. Inputs of little hide it, "
            "weights of almost zero behind them, or outputs that are the same whatever goes in."
        )
    yield from _without_effect(runs, plan)
    yield from () if first is not None else _alike(runs)


def _alike(runs: Runs) -> Iterator[str]:
    """Yields which modules may have each other's weights, and both programs return the same."""
    values = runs.runner.variables
    for pairs in [*_exchangeable(runs).values()][:_MOST_GROUPS]:
        leaves = [
            (leaf, (*other, *leaf[len(one) :]))
            for pair in pairs
            for one, other in (pair, pair[::-1])
            for leaf in runs.runner.recipes
            if leaf[: len(one)] == one
        ]
        # By NumPy: JAX compiles a difference for each shape.
        arrays = {leaf: np.asarray(values[leaf].get_value()) for leaf, _ in leaves}
        if all(np.array_equal(arrays[leaf], arrays[other]) for leaf, other in leaves):
            continue
        if not _is_same_with(runs, pairs[0], leaves):
            continue
        apart = {leaf: arrays[other] - arrays[leaf] for leaf, other in leaves}
        found = outputs_apart(runs.returned, returned_with(runs.programs, runs.runner.model, apart))
        if not any(output.relative > TOLERANCE for output in found):
            one, other = (fold_paths([pair[at] for pair in pairs]) for at in (0, 1))
            yield (
                f"{one} and {other} may have each other's weights, and the outputs are the same: they do not "
                "tell which is which."
            )


def _exchangeable(runs: Runs) -> Mapping[object, Sequence[tuple[Path, Path]]]:
    """Returns modules beside each other that may well be alike to what comes of them, all layers together.

    They hold weights of the same shapes, and are called with the same, as the factors of a product and tables
    that are added are, or hold vectors alone, as the norms of queries and keys.
    """
    calls, shapes = runs.runner.calls, dict[Path, dict[Path, tuple[int, ...]]]()
    for leaf in runs.runner.recipes:
        for depth in range(1, len(leaf)):
            if leaf[:depth] in calls:
                seen = calls[leaf[:-1]][0].shapes.get(str(leaf[-1]), ()) if leaf[:-1] in calls else (0, 0)
                shapes.setdefault(leaf[:depth], {})[leaf[depth:]] = seen
    beside: dict[object, list[Path]] = defaultdict(list)
    for path, held in shapes.items():
        beside[path[:-1], len(calls[path]), frozenset(held.items())].append(path)
    found: dict[object, list[tuple[Path, Path]]] = defaultdict(list)
    for one, other in itertools.chain(*(itertools.combinations(group, 2) for group in beside.values())):
        is_vector = {*map(len, shapes[one].values())} == {1} and one[-1] != other[-1]
        is_vector = is_vector and isinstance(one[-1], str)
        names = tuple(tuple(key for key in path if not isinstance(key, int)) for path in (one, other))
        if {one, other} & {*itertools.chain(*found.get(names, ()))}:
            continue
        if is_vector or are_the_same(calls[one][0].inputs, calls[other][0].inputs):
            found[names].append((one, other))
    return found


def _is_same_with(runs: Runs, pair: tuple[Path, Path], leaves: Iterable[tuple[Path, Path]]) -> bool:
    """Tells whether the module around two returns the same where these have each other's weights."""
    runner, above = runs.runner, pair[0][:-1]
    holder = next(
        (above[:depth] for depth in range(len(above), -1, -1) if above[:depth] in runner.calls), None
    )
    if holder is None:
        return True
    call = runner.calls[holder][0]
    try:
        layer = runner.layer_at(holder, call)
        made = {leaf: runner.recipe(other, layer) for leaf, other in leaves if leaf[: len(holder)] == holder}
        found = runner.run(holder, layer, call, call.inputs, made)
    # The caller's module may fail in any way when it is called outside of its program.
    except Exception:
        return True
    return compare(call.outputs, found).relative <= TOLERANCE


def _is_apart_throughout(one: Compared) -> bool:
    """Tells whether a module returns something else nearly everywhere, on whatever inputs."""
    pairs = [*zip(one.linen.outputs, one.nnx.outputs, strict=False)]
    usual = max(FAR, MOST_ROUNDINGS * one.found.outputs.coarse)
    if not exceeds(one.found.outputs, usual) or any(a.shape != b.shape for a, b in pairs):
        return False
    return all(np.isclose(a, b, rtol=FAR, atol=0).mean() < _CHANCE for a, b in pairs if a.size)


def _without_effect(runs: Runs, plan: RestorePlan) -> Iterator[str]:
    """Yields which weights may be whatever they are, as the queries of a single token."""
    has_floats = bool(floats_in(runs.returned))
    if not has_floats:
        yield "the outputs hold no floats, so small differences do not show: let both return logits."
    # Slopes take several times what the programs do. Many tokens hardly leave a weight untold, unless what
    # comes of it is multiplied by nothing.
    # But those that no module shows may lie behind an argmax, each by itself.
    zeros = [*_near_zero(runs, plan)]
    experts = _stacks_of_experts(runs)
    thorough = bool(zeros) or are_few(runs.inputs) or _may_be_idle(runs, experts)
    is_asked = has_floats and (thorough or len(runs.hidden) > _MOST_RUNS)
    slopes = slopes_of(runs.programs, runs.runner.model) if is_asked else None
    wholes, parts, steps = _idle(runs, slopes, plan, experts if thorough else None)
    used = {path[:-1] for path in plan.restored if _is_statistic(path, plan) and path not in wholes}
    statistics = [path for path in wholes if _is_statistic(path, plan) and path[:-1] not in used]
    others = [path for path in wholes if path not in statistics]
    hidden = _changes(runs, [*others, *parts], 1)
    is_hidden = bool(zeros and hidden) and depend_on(runs, hidden, _changes(runs, zeros, 1))
    more = f" {_BEHIND.format(fold_paths(zeros))}" if is_hidden else f" {_MORE}"
    if others:
        more = "" if {*others} <= {*runs.hidden} else more
        yield f"the outputs tell nothing of weights that they do not depend on: {fold_paths(others)}.{more}"
    if statistics:
        yield (
            f"the outputs tell nothing of {fold_paths(statistics)}, which no module in training uses: "
            "run both in evaluation mode (use_running_average=True, model.eval())."
        )
    if steps:
        yield (
            f"the outputs do not tell a small difference in {fold_paths(steps)}: they depend on it by steps "
            "(argmax, rounding, top-k) or hardly. Let both programs return what comes before them too."
        )
    if parts:
        idle = {path: idle_experts(mask, experts) for path, mask in parts.items()}
        for which in dict.fromkeys(filter(None, idle.values())):
            some = [path for path in idle if idle[path] == which]
            yield f"these inputs do not reach {which} in {fold_paths(some)}: {_UNREACHED}"
        if left := [path for path, which in idle.items() if not which]:
            yield f"the outputs depend on a part alone of {fold_paths(left)}.{more if not others else ''}"


_UNREACHED = "whether their weights are right is not told. Choose inputs of more tokens, or others."
_MORE = "Choose inputs of several examples, tokens and positions."
_BEHIND = (
    "Weights of zero hide them, whatever the inputs are: {}. Only the comparison of single modules speaks "
    "for them; a checkpoint from later in training proves more."
)
_MOST_GROUPS, _ROUNDED = 8, 1e-5
_MOST_RUNS = 3
"""Each takes half of what both programs did."""
_A_LITTLE = 1e-3
"""What is added to weights to see whether that has an effect: a unit of a relu that is off stays off."""


def _idle(
    runs: Runs, slopes: Mapping[Path, Array] | None, plan: RestorePlan, experts: Collection[int] | None
) -> tuple[list[Path], Mapping[Path, Array], list[Path]]:
    """Returns weights that change nothing of the outputs, those of which a large part does not, and steps.

    Steps are weights of which a small change has no effect, and a large one has.
    """
    if slopes is None:
        quiet = [
            group for group in _unseen(runs, plan) if not depend_on(runs, _changes(runs, group, _A_LITTLE))
        ]
        steps = [group for group in quiet if depend_on(runs, _changes(runs, group, 1))]
        idle = [group for group in quiet if group not in steps]
        return [*itertools.chain(*idle)], {}, [*itertools.chain(*steps)]
    least = _ROUNDED * max((float(np.abs(slope).max(initial=0)) for slope in slopes.values()), default=0.0)
    without = {path: np.abs(slope) <= least for path, slope in slopes.items() if _is_models(path, plan)}
    axes = runs.runner.axes
    found = {path: idle_slices(path, zero, axes.get(path), experts or ()) for path, zero in without.items()}
    masks = {path: mask for path, mask in found.items() if mask is not None}
    if experts is None:
        unseen = {*runs.hidden, *_states(runs)}
        masks = {path: mask for path, mask in masks.items() if path in unseen and mask.all()}
    masks = {path: mask * _A_LITTLE for path, mask in masks.items()}
    # What has no derivative may have an effect all the same: a count, a rounded value.
    groups: dict[Path, dict[Path, Any]] = defaultdict(dict)
    for path, mask in masks.items():
        groups[tuple(key for key in path if not isinstance(key, int))][path] = mask
    several = [masks] if masks and not depend_on(runs, masks) else [*groups.values()][:_MOST_GROUPS]
    sure = [group for group in several if group is masks or not depend_on(runs, group)]
    found = [path for path in masks if any(path in group for group in sure)]
    wholes = [path for path in found if masks[path].all()]
    steps = [path for path in wholes if path in {*runs.hidden}]
    is_any = bool(steps) and depend_on(runs, _changes(runs, steps, 1))
    steps = [path for path in steps if is_any and depend_on(runs, _changes(runs, [path], 1))]
    parts = {path: masks[path] for path in found if not masks[path].all()}
    return [path for path in wholes if path not in steps], parts, steps


def vectors_without_effect(runs: Runs) -> Iterator[str]:
    """Yields vectors, or parts of joined ones, that no module shows: a bias of keys under a softmax.

    Each is tried in the first of several layers, by runs of the smallest module around it that is compared.
    """
    shown: dict[Path, list[Compared]] = defaultdict(list)
    for one in runs.compared:
        if one.found.is_certain and one.found.outputs.compared:
            shown[one.path].append(one)
    told, idle = dict[object, bool](), defaultdict[Path, list[Path]](list)
    for leaf in _small_leaves(runs):
        depths = (depth for depth in range(len(leaf) - 1, -1, -1) if leaf[:depth] in shown)
        calls = next((shown[leaf[:depth]] for depth in depths), None)
        if calls is None or len(calls[0].pair.leaves) <= _OF_A_LAYER:
            continue
        try:
            recipe = runs.runner.recipe(leaf, runs.runner.layer_at(calls[0].path, calls[0].nnx.call))
        except LookupError:
            continue
        for at, part in enumerate(recipe.sources if isinstance(recipe, Concat | Stack) else (recipe,)):
            name = (tuple(key for key in leaf if not isinstance(key, int)), at)
            if name not in told:
                told[name] = any(_is_told(runs.runner, each, leaf, at) for each in (calls[0], calls[-1]))
            idle[leaf] += [] if told[name] else reads(part)
    idle = {leaf: sources for leaf, sources in idle.items() if sources}
    if idle:
        sources = fold_paths(dict.fromkeys(itertools.chain(*idle.values())))
        yield (
            f"the outputs do not depend on {sources} in {fold_paths(idle)}, as they do not on a bias of "
            "keys, which a softmax takes away: they do not tell whether that is right."
        )


def _small_leaves(runs: Runs) -> Iterator[Path]:
    """Yields the leaves that are no more than vectors beside others: smaller than one of the same module."""
    shapes, recipes = runs.runner.shapes, runs.runner.recipes
    sizes = {leaf: math.prod(shape_of(recipe, shapes)) for leaf, recipe in recipes.items()}
    most: dict[Path, int] = defaultdict(int)
    for leaf, size in sizes.items():
        most[leaf[:-1]] = max(most[leaf[:-1]], size)
    yield from (leaf for leaf, size in sizes.items() if size < most[leaf[:-1]])


def _is_told(runner: ModuleRunner, holder: Compared, leaf: Path, part: int) -> bool:
    """Tells whether a call returns something else with other numbers in a leaf, or in one part of it."""
    call = holder.nnx.call
    try:
        layer = runner.layer_at(holder.path, call)
        recipe = runner.recipe(leaf, layer)
        value, where = np.array(runner.value(recipe)), (...,)
        if isinstance(recipe, Concat | Stack):
            shapes = [(*shape_of(each, runner.shapes), 1) for each in recipe.sources]
            lengths = [shape[recipe.axis] if isinstance(recipe, Concat) else 1 for shape in shapes]
            start = sum(lengths[:part])
            where = (*[slice(None)] * recipe.axis, slice(start, start + lengths[part]))
        value[where] += np.random.default_rng(0).normal(size=value[where].shape)
        found = runner.run(holder.path, layer, call, call.inputs, {leaf: value})
    # The caller's module may fail in any way when it is called outside of its program.
    except Exception:
        return True
    return exceeds(compare(call.outputs, found), TOLERANCE)


_OF_A_LAYER = 2
"""Leaves of a module that is a single layer, as a kernel and a bias: what it returns shows them."""


def _stacks_of_experts(runs: Runs) -> set[int]:
    """Returns how many experts mixtures have whose weights are stacked: several, of one length first."""
    lengths: dict[Path, list[int]] = defaultdict(list)
    for leaf, recipe in runs.runner.recipes.items():
        whole, layers = shape_of(recipe, runs.runner.shapes), runs.runner.axes.get(leaf)
        shape = [length for axis, length in enumerate(whole) if axis != layers]
        lengths[leaf[:-1]] += shape[:1] if len(shape) == OF_EXPERTS else []
    return {count for some in lengths.values() for count in some if some.count(count) > 1}


def _may_be_idle(runs: Runs, stacks: Collection[int]) -> bool:
    """Tells whether an expert may be sent nothing: the one that comes last has no effect."""
    lists: dict[Path, set[int]] = defaultdict(set)
    for leaf in runs.runner.recipes:
        for at, key in enumerate(leaf):
            if isinstance(key, int) and at:
                lists[leaf[: at - 1]].add(key)
    beside = {(above, len(numbers)) for above, numbers in lists.items()}
    chosen = list[tuple[int, int, Path, int]]()
    for path, calls in runs.runner.calls.items():
        for array in itertools.chain(*(call.outputs for call in calls)):
            count = (array.shape or (0,))[-1]
            if array.ndim > 1 and (count in stacks or (path[:-1], count) in beside):
                chosen.append((*least_chosen(array), path[:-1], count))
    if not {count for *_, count in chosen} >= {*stacks}:
        return True
    rank, expert, above, count = max(chosen, key=lambda one: one[0], default=(0, 0, (), 0))
    if rank == 0:
        return False
    inside = [leaf for leaf in runs.runner.recipes if leaf[: len(above)] == above]
    changes = _changes(runs, inside, 1)
    own = {leaf: of_expert(expert, count, leaf[len(above) + 1 :], changes[leaf]) for leaf in inside}
    return not depend_on(runs, {leaf: change for leaf, change in own.items() if change is not None})


def _near_zero(runs: Runs, plan: RestorePlan) -> Iterator[Path]:
    """Yields weights of (almost) zero that something is multiplied with, all of them or a slice."""
    for path, leaf in runs.runner.variables.items():
        is_factor = path in plan.restored and path[-1] != "bias" and not _is_statistic(path, plan)
        if is_factor and is_weight(leaf):
            weight, layers = np.asarray(leaf.get_value()), runs.runner.axes.get(path)
            yield from (path,) if is_zero_somewhere(weight, layers) else ()


def _is_models(path: Path, plan: RestorePlan) -> bool:
    """Tells whether a leaf is a restored one of the model: moments are their parameters'."""
    return path in plan.restored and plan.sides.wanted[path].role == "model"


def _is_statistic(path: Path, plan: RestorePlan) -> bool:
    return plan.sides.wanted[path].collection == "batch_stats"


def _changes(runs: Runs, weights: Iterable[Path], size: float) -> dict[Path, Array]:
    """Returns random numbers to be added to weights: the same one throughout is what a norm takes away."""
    random, values = np.random.default_rng(0), runs.runner.variables
    return {path: size * random.normal(size=values[path].shape).astype(np.float32) for path in weights}


def _unseen(runs: Runs, plan: RestorePlan) -> list[list[Path]]:
    """Returns the weights whose use no call of a module shows, each group to be tried by itself.

    They are those in no module that was called, and what a program counts itself, as statistics, which a
    module in training has and does not use.
    """
    groups: dict[Path, list[Path]] = defaultdict(list)
    for path in runs.hidden:
        groups[path[:-1]].append(path)
    states = [path for path in _states(runs) if _is_models(path, plan) and path not in runs.hidden]
    found = [*groups.values()] if len(groups) <= _MOST_RUNS else [[*runs.hidden]]
    if len(runs.hidden) <= _MOST_RUNS:
        found = [[path] for path in runs.hidden]
    return [*found, *([states] if states else [])]


def depend_on(runs: Runs, weights: Mapping[Path, Any], beside: Mapping[Path, Any] | None = None) -> bool:
    """Tells whether the NNX program returns something else with numbers added to weights, by path.

    `beside` are other weights that numbers are added to in either case.
    """
    programs, model = runs.programs, runs.runner.model
    found = returned_with(programs, model, beside) if beside else runs.returned
    return depends(programs, model, found, {**weights, **(beside or {})})


def _states(runs: Runs) -> list[Path]:
    """Returns the leaves of floats that no optimizer trains, as batch statistics."""
    variables = runs.runner.variables.items()
    return [path for path, leaf in variables if is_weight(leaf) and not isinstance(leaf, nnx.Param)]


_FEW, _ENOUGH = 8, 4096


def are_few(inputs: Sequence[Any]) -> bool:
    """Tells whether some input has few examples and positions: fewer than 8 that differ, or one token."""
    arrays = [x for leaf in jax.tree.leaves(inputs) if (x := np.asarray(leaf)).dtype.kind in "iuf"]
    arrays = [array for array in arrays if array.ndim > 1] or arrays  # Lengths and times stand beside them.
    return any(
        _positions(array) < _FEW
        or 1 in array.shape[1 : array.ndim - (array.dtype.kind == "f")]
        or (array.ndim > 1 + (array.dtype.kind == "f") and _positions(array[:1]) < 2)
        for array in arrays
    )


def _positions(array: Array) -> int:
    """Returns how many positions an array has that differ; the last axis of floats is features."""
    if array.dtype.kind != "f" or array.ndim < 2 or not array.size:
        return len(np.unique(array))
    return len(np.unique(array.reshape(-1, array.shape[-1])[:_ENOUGH], axis=0))


def usual_size(array: Array) -> float:
    """Returns how large an input's numbers are, those of a mask left out."""
    size = np.abs(array)
    usual = size[size < MASK]
    return float((usual if usual.size else size).mean(dtype=np.float64))
