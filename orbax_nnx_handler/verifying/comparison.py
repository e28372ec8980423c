"""Runs a Linen program and an NNX program on one input, from one checkpoint, and compares them."""

import contextlib
import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np
from etils import epath
from flax import nnx

from orbax_nnx_handler.planner import decide, flatten_wanted
from orbax_nnx_handler.planning.core.errors import RestoreError
from orbax_nnx_handler.planning.core.folding import fold_paths
from orbax_nnx_handler.planning.core.lines import counted
from orbax_nnx_handler.planning.core.paths import Path, spelled
from orbax_nnx_handler.planning.core.recipes import Recipe
from orbax_nnx_handler.planning.layouts import LayoutChoice
from orbax_nnx_handler.planning.options import Policies, RestoreOptions, UnexpectedPolicy
from orbax_nnx_handler.planning.restore_plan import RestorePlan
from orbax_nnx_handler.planning.rules import Drop, Rule
from orbax_nnx_handler.planning.suggesting import RUN_BOTH, Proposal, Suggestion, order_of, propose
from orbax_nnx_handler.planning.suggesting.suggestion import changed
from orbax_nnx_handler.storage.checkpoint.find import find_item
from orbax_nnx_handler.storage.checkpoint.metadata import Checkpoint, read_metadata
from orbax_nnx_handler.storage.stores.kvstore import files_at
from orbax_nnx_handler.storage.stores.locations import as_path
from orbax_nnx_handler.verifying import (
    TOLERANCE,
    Array,
    are_few,
    check_tolerance,
    exceeds,
    floats_in,
    idle_slices,
    usual_size,
)
from orbax_nnx_handler.verifying.first_difference import Search
from orbax_nnx_handler.verifying.pairing import by_path, called_otherwise, of_one_size
from orbax_nnx_handler.verifying.runs import Compared, Programs, Runs, misfilled, proved_otherwise, run_both
from orbax_nnx_handler.verifying.verification import FirstDifference, Verification
from orbax_nnx_handler.verifying.weights import (
    flat_state,
    has_near_zero,
    is_weight,
    on_one_device,
    whole_modules,
)

_PATIENCE = 5
"""The time that a search for the reason may take, in times of both programs (and of a second)."""


def verify(
    path: epath.PathLike,
    target: Any,
    linen_apply: Callable[..., Any],
    nnx_apply: Callable[..., Any],
    inputs: Sequence[Any],
    *,
    renames: Iterable[Rule | tuple[str, str]] = (),
    tolerance: float | None = None,
    policy: Policies = "error",
    layout: LayoutChoice = "auto",
    init: Callable[[], Any] | None = None,
    unexpected: UnexpectedPolicy = "warn",
    item: str | None = None,
) -> Verification:
    """Runs the Linen program and the NNX program on one input and compares them, module by module.

    Both run in float32 with exact matrix products, on one device, operation by operation
    (`jax.disable_jit`), so that each layer of a scan is a call of its own. Modules are paired by the
    weights that the plan gives them.

    ```python
    target = nnx.eval_shape(make_model)
    found = verify(path, target, linen_model.apply, lambda model, x: model(x), (tokens,))
    assert found.equal, found
    ```

    Args:
        path: The checkpoint's path, as `plan_restore` takes it.
        target: See `plan_restore`; the model that `nnx_apply` is called with. Its floats are restored
            as float32, whatever they are in the target.
        linen_apply: Called with the variables as Linen wrote them (`{"params": ...}` and the other
            collections, float32), and the inputs. Where the plan uses several train states, one such
            dict for each, below its keys.
        nnx_apply: Called with the restored target and the inputs. It returns what `linen_apply`
            does: arrays of the same shapes in the same structure.
        inputs: What both are called with; two examples of some thirty different tokens tell enough.
        renames: See `plan_restore`.
        tolerance: What the largest difference of two output elements may be, divided by the larger of
            the element and the mean magnitude of its array; by default 1e-5 (2e-5 beyond 32 calls of
            modules, 3e-5 beyond 128), or what the outputs' digits allow (bfloat16: 2e-2).
        policy: See `plan_restore`.
        layout: See `plan_restore`.
        init: See `plan_restore`.
        unexpected: See `plan_restore`.
        item: See `plan_restore`.

    Returns:
        Whether the outputs are equal; and else the first module whose inputs agree and whose output
        does not, with what is otherwise about its weights, or that its code differs.

    Raises:
        RestoreError: The checkpoint cannot become the target; nothing was run.
        VerificationError: One of the programs fails, or their outputs cannot be compared.
        ValueError: `tolerance` is no number from 0 on.
    """
    check_tolerance(tolerance)
    options = RestoreOptions().override(
        policy=policy, layout=layout, renames=renames, init=init, unexpected=unexpected
    )
    given = as_path(path)
    files = files_at(given)
    checkpoint = read_metadata(find_item(given, item, files), files)
    plan, parts = decide(checkpoint, target, on_one_device(target), options, check=True)
    programs = Programs(linen=linen_apply, nnx=nnx_apply, inputs=inputs)
    runs = run_both(checkpoint, plan, parts, programs, init)
    found = compared(runs, plan, tolerance)
    wrong = None if found.equal else misfilled(runs, plan)
    if wrong is None or not wrong.wanted:
        return found
    told = f"{wrong.words}. {RUN_BOTH} looks for its rules."
    found = dataclasses.replace(found, unused=(*wrong.sources,), remarks=(told, *found.remarks))
    for renames in (options.renames, ()):
        with contextlib.suppress(RestoreError):
            behind = dataclasses.replace(options, renames=renames)
            proposed = proposed_without(wrong.unused, checkpoint, target, behind)
            rules = (*renames, *proposed.answered([0] * len(proposed.questions)))
            behind = dataclasses.replace(options, renames=rules)
            other, parts = decide(checkpoint, target, on_one_device(target), behind, check=True)
            again = run_both(checkpoint, other, parts, programs, init, runs.linen)
            if compared(again, other, tolerance).equal:
                return proved_otherwise(found, wrong, plan, other)
    return found


def proposed_without(
    unused: Collection[Path], checkpoint: Checkpoint, target: Any, options: RestoreOptions
) -> Suggestion:
    """Returns what is proposed where some stored leaves are not meant, with the rules that leave them behind.

    Raises:
        RestoreError: As `suggest`.
    """
    meant = {path: leaf for path, leaf in checkpoint.leaves.items() if path not in unused}
    options = dataclasses.replace(options, policy="warn")
    found = propose(flatten_wanted(target, {}), meant, options, order_of(target, options.init))
    answered = found.answered([0] * len(found.questions))

    def makes(drops: Sequence[Rule]) -> Mapping[Path, Recipe] | None:
        rules = (*options.renames, *drops, *answered)
        plan, _ = decide(checkpoint, target, {}, dataclasses.replace(options, renames=rules))
        return None if plan.faults else {path: item.recipe for path, item in plan.restored.items()}

    modules, reason = whole_modules(unused, checkpoint.leaves), "the Linen program never calls it"
    drops = [Drop(spelled(module), reason) for module in modules]
    wanted = makes(drops)
    for drop in drops:  # One is needed only where the others alone do not make the same.
        fewer = [other for other in drops if other is not drop]
        with contextlib.suppress(RestoreError):
            drops = fewer if makes(fewer) == wanted else drops
    first, left = [Proposal(rule=drop, grounds="outputs") for drop in drops], found.unmatched_stored
    made = changed(found, lambda others: (*drops, *others))
    return dataclasses.replace(made, proposals=(*first, *found.proposals), unmatched_stored=(*left, *unused))


def compared(runs: Runs, plan: RestorePlan, tolerance: float | None = None) -> Verification:
    """Returns what one run of each program under a plan tells."""
    search = Search(
        compared=runs.compared,
        runner=runs.runner,
        restored=plan.restored,
        linen=runs.linen.calls,
        seconds=_PATIENCE * (runs.seconds + 1),
        limit=max(TOLERANCE, tolerance or 0.0, _rounding(runs)),
    )
    # One output of few digits says nothing about those beside it.
    usual = TOLERANCE * max(1, math.ceil(math.sqrt(len(runs.compared) / _CALLS)))
    allowed = [max(usual, one.coarse) if tolerance is None else tolerance for one in runs.outputs]
    worst = max(zip(runs.outputs, allowed, strict=True), key=lambda output: output[0].excess(output[1]))
    is_near = worst[0].relative <= worst[1]
    first = search.first() or search.set_up_otherwise(whatever=not is_near)
    equal = is_near and not (first is not None and first.proved)
    return Verification(
        equal=equal,
        relative=worst[0].relative,
        absolute=max(one.absolute for one in runs.outputs),
        tolerance=worst[1],
        directory=plan.directory,
        modules=tuple(one.found for one in runs.compared),
        first=first,
        remarks=tuple(_remarks(is_near, first, runs, plan)),
    )


_CALLS = 32
"""How many modules differ by `TOLERANCE` in all; roundings add up as random steps do."""


def _rounding(runs: Runs) -> float:
    """Returns how far apart inputs are in this run that differ by rounding: twice what modules return."""
    right = [one.found.outputs.relative for one in runs.compared if one.agrees]
    return min(_FAR, 2 * max(right, default=0.0))


_FEATURES = 3
"""Axes of an array of features: example, position, feature."""
_LEAST, _MOST = 1e-4, 1e4
"""The usual sizes of inputs."""
_FAR = 1e-3
"""What is no rounding, wherever in a program."""
_CHANCE = 1 / 16
"""The share of numbers that may be equal by chance."""


def _untold(runs: Runs, plan: RestorePlan, first: FirstDifference | None) -> Iterator[str]:
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


def _is_apart_throughout(one: Compared) -> bool:
    """Tells whether a module returns something else nearly everywhere, on whatever inputs."""
    pairs = [*zip(one.linen.outputs, one.nnx.outputs, strict=False)]
    if not exceeds(one.found.outputs, _FAR) or any(a.shape != b.shape for a, b in pairs):
        return False
    return all(np.isclose(a, b, rtol=_FAR, atol=0).mean() < _CHANCE for a, b in pairs if a.size)


def _without_effect(runs: Runs, plan: RestorePlan) -> Iterator[str]:
    """Yields which weights may be whatever they are, as the queries of a single token."""
    has_floats = bool(floats_in(runs.returned))
    if not has_floats:
        yield "the outputs hold no floats, so small differences do not show: let both return logits."
    # Slopes take several times what the programs do. Many tokens hardly leave a weight untold, unless what
    # comes of it is multiplied by nothing.
    # But those that no module shows may lie behind an argmax, each by itself.
    thorough = are_few(runs.inputs) or has_near_zero(runs.runner.model)
    slopes = _slopes(runs) if has_floats and (thorough or len(runs.hidden) > _MOST_RUNS) else None
    wholes, parts, steps = _idle(runs, slopes, plan, thorough=thorough)
    used = {path[:-1] for path in plan.restored if _is_statistic(path, plan) and path not in wholes}
    statistics = [path for path in wholes if _is_statistic(path, plan) and path[:-1] not in used]
    if others := [path for path in wholes if path not in statistics]:
        more = f" {_MORE}" if not {*others} <= {*runs.hidden} else ""
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
        yield f"the outputs depend on a part alone of {fold_paths(parts)}. {_MORE}"


_MORE = "Choose inputs of several examples, tokens and positions."
_MOST_GROUPS, _ROUNDED = 8, 1e-5
_MOST_RUNS = 3
"""Each takes half of what both programs did."""
_A_LITTLE = 1e-3
"""What is added to weights to see whether that has an effect: a unit of a relu that is off stays off."""


def _idle(
    runs: Runs, slopes: Mapping[Path, Array] | None, plan: RestorePlan, *, thorough: bool
) -> tuple[list[Path], list[Path], list[Path]]:
    """Returns weights that change nothing of the outputs, those of which a large part does not, and steps.

    Steps are weights of which a small change has no effect, and a large one has.
    """
    if slopes is None:
        quiet = [
            group for group in _unseen(runs, plan) if not runs.depend_on(_changes(runs, group, _A_LITTLE))
        ]
        steps = [group for group in quiet if runs.depend_on(_changes(runs, group, 1))]
        idle = [group for group in quiet if group not in steps]
        return [*itertools.chain(*idle)], [], [*itertools.chain(*steps)]
    least = _ROUNDED * max((float(np.abs(slope).max(initial=0)) for slope in slopes.values()), default=0.0)
    without = {path: np.abs(slope) <= least for path, slope in slopes.items() if _is_models(path, plan)}
    masks = {path: mask for path, zero in without.items() if (mask := idle_slices(path, zero)) is not None}
    if not thorough:
        unseen = {*runs.hidden, *runs.states}
        masks = {path: mask for path, mask in masks.items() if path in unseen and mask.all()}
    masks = {path: mask * _A_LITTLE for path, mask in masks.items()}
    # What has no derivative may have an effect all the same: a count, a rounded value.
    groups: dict[Path, dict[Path, Any]] = defaultdict(dict)
    for path, mask in masks.items():
        groups[tuple(key for key in path if not isinstance(key, int))][path] = mask
    several = [masks] if masks and not runs.depend_on(masks) else [*groups.values()][:_MOST_GROUPS]
    sure = [group for group in several if group is masks or not runs.depend_on(group)]
    found = [path for path in masks if any(path in group for group in sure)]
    wholes = [path for path in found if masks[path].all()]
    steps = [path for path in wholes if path in {*runs.hidden}]
    is_any = bool(steps) and runs.depend_on(_changes(runs, steps, 1))
    steps = [path for path in steps if is_any and runs.depend_on(_changes(runs, [path], 1))]
    parts = [path for path in found if not masks[path].all()]
    return [path for path in wholes if path not in steps], parts, steps


def _is_models(path: Path, plan: RestorePlan) -> bool:
    """Tells whether a leaf is a restored one of the model: moments are their parameters'."""
    return path in plan.restored and plan.sides.wanted[path].role == "model"


def _is_statistic(path: Path, plan: RestorePlan) -> bool:
    return plan.sides.wanted[path].collection == "batch_stats"


def _changes(runs: Runs, weights: Iterable[Path], size: float) -> dict[Path, Array]:
    """Returns random numbers to be added to weights: the same one throughout is what a norm takes away."""
    random, values = np.random.default_rng(0), dict(flat_state(runs.runner.model))
    return {path: size * random.normal(size=values[path].shape).astype(np.float32) for path in weights}


def _unseen(runs: Runs, plan: RestorePlan) -> list[list[Path]]:
    """Returns the weights whose use no call of a module shows, each group to be tried by itself.

    They are those in no module that was called, and what a program counts itself, as statistics, which a
    module in training has and does not use.
    """
    groups: dict[Path, list[Path]] = defaultdict(list)
    for path in runs.hidden:
        groups[path[:-1]].append(path)
    states = [path for path in runs.states if _is_models(path, plan) and path not in runs.hidden]
    found = [*groups.values()] if len(groups) <= _MOST_RUNS else [[*runs.hidden]]
    if len(runs.hidden) <= _MOST_RUNS:
        found = [[path] for path in runs.hidden]
    return [*found, *([states] if states else [])]


def _slopes(runs: Runs) -> Mapping[Path, Array] | None:
    """Returns how what the NNX program returns changes with each weight; None where JAX cannot tell.

    Of the sum of all floats that it returns, each times a random number.
    """
    graph, floats, others = cast(Any, nnx.split)(runs.runner.model, _is_weight_at, ...)

    def total(state: Any) -> Any:
        arrays = floats_in(runs.programs.nnx(nnx.merge(graph, state, others), *runs.inputs))
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


def _remarks(is_near: bool, first: FirstDifference | None, runs: Runs, plan: RestorePlan) -> Iterator[str]:
    if not runs.compared:
        yield "no module of the one program holds exactly the weights of a module of the other."
    if is_near and first is not None:
        how = "by more than rounding" if first.module.differs else "in its settings"
        what = (
            f"the weights of {first.path} are wrong" if first.proved else f"{first.path} still differs {how}"
        )
        yield f"the outputs are within the tolerance, and {what}."
    if not is_near and first is None and _all_agree(runs.compared):
        yield (
            "every module that was compared returns the same, so the difference arises outside of them: in "
            "linen_apply or nnx_apply, or in methods other than __call__."
        )
    elif not is_near and first is None and runs.compared:
        yield (
            "no module differs by more than rounding from equal inputs: either the difference grows little "
            "by little, as it does in deep models (then raise the tolerance), or it arises outside of the "
            "modules that were compared."
        )
    unread = [
        one.path
        for one in runs.compared
        if not one.found.outputs.compared and of_one_size(one.linen, one.nnx)
    ]
    if not is_near and first is None and unread:
        yield (
            f"{fold_paths(unread)}: it returns arrays of one size in another structure than Linen's module, "
            "and which is which is not told: let it return the same."
        )
    is_told = is_near or (first is not None and bool(first.proved))
    yield from () if is_told else called_otherwise(runs.pairs, by_path(runs.linen.calls), runs.runner.calls)
    if plan.missing:
        yield f"{counted(len(plan.missing), 'weight')} of the target not stored: a policy fills them."
    zeros = () if is_told else (path for path, item in plan.defaulted.items() if item.source == "zeros")
    inside = [path for path in zeros if first is None or path[: len(first.place)] == first.place]
    if inside:
        yield (
            f"{fold_paths(inside)}: not stored, and filled with zeros; if the program computes it as it is "
            "built (a table, a mask), pass init=make_model, the function that builds the target."
        )
    if is_near:
        yield from _untold(runs, plan, first)


def _all_agree(compared: Sequence[Compared]) -> bool:
    outputs = [one.found.outputs for one in compared if one.gets_the_same]
    return bool(outputs) and not any(exceeds(one, TOLERANCE) for one in outputs)
