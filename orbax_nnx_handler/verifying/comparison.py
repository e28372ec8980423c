"""Runs a Linen program and an NNX program on one input, from one checkpoint, and compares them."""

import contextlib
import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from orbax_nnx_handler.planner import decide, flatten_wanted
from orbax_nnx_handler.planning.core.errors import RestoreError, VerificationError
from orbax_nnx_handler.planning.core.folding import fold_paths
from orbax_nnx_handler.planning.core.lines import counted
from orbax_nnx_handler.planning.core.paths import Path, shared_levels, spelled
from orbax_nnx_handler.planning.core.recipes import Recipe, reads
from orbax_nnx_handler.planning.layouts import LayoutChoice
from orbax_nnx_handler.planning.options import Policies, RestoreOptions, UnexpectedPolicy
from orbax_nnx_handler.planning.restore_plan import RestorePlan
from orbax_nnx_handler.planning.rules import Drop, Rule
from orbax_nnx_handler.planning.suggesting import RUN_BOTH, Proposal, Suggestion, order_of, propose
from orbax_nnx_handler.planning.suggesting.suggestion import changed
from orbax_nnx_handler.planning.target import Target
from orbax_nnx_handler.storage.checkpoint.find import find_item
from orbax_nnx_handler.storage.checkpoint.metadata import Checkpoint, read_metadata
from orbax_nnx_handler.storage.restoring import carry_out, held_if_small, locate_stored
from orbax_nnx_handler.storage.stores.kvstore import files_at
from orbax_nnx_handler.storage.stores.locations import as_path
from orbax_nnx_handler.verifying import (
    MOST_ROUNDINGS,
    TOLERANCE,
    Programs,
    check_tolerance,
    exceeds,
)
from orbax_nnx_handler.verifying.first_difference import Search
from orbax_nnx_handler.verifying.pairing import (
    by_path,
    called_otherwise,
    of_one_size,
    pair_modules,
    scanned_axes,
)
from orbax_nnx_handler.verifying.proved_rules import in_fewer_digits, tells
from orbax_nnx_handler.verifying.recording import run_linen
from orbax_nnx_handler.verifying.runs import (
    Compared,
    Digits,
    Runs,
    compare_modules,
)
from orbax_nnx_handler.verifying.single_module import ModuleRunner
from orbax_nnx_handler.verifying.untold import FAR, depend_on, untold, vectors_without_effect
from orbax_nnx_handler.verifying.verification import FirstDifference, Verification, outputs_apart
from orbax_nnx_handler.verifying.weights import (
    LinenRun,
    Misfilled,
    cast_in_one,
    depends,
    on_one_device,
    returned_with,
    run_linen_program,
    run_nnx_program,
    unused_leaves,
    whole_modules,
)


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

    Both get float32 weights and run with exact matrix products, on one device, operation by operation
    (`jax.disable_jit`), so that each layer of a scan is a call of its own. A module that is made with another
    dtype computes in that; pass modules with `dtype=jnp.float32`. Modules are paired by the weights that the
    plan gives them.

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
            modules, 3e-5 beyond 128), or what the digits allow in which a program computes (bfloat16:
            2e-2 at each module, so up to 1e-1 at the end).
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
            proposed = leaving_out(wrong.unused, checkpoint, target, behind)
            rules = (*renames, *proposed.answered([0] * len(proposed.questions)))
            behind = dataclasses.replace(options, renames=rules)
            other, parts = decide(checkpoint, target, on_one_device(target), behind, check=True)
            again = run_both(runs.runner.checkpoint, other, parts, programs, init, runs.linen)
            if compared(again, other, tolerance).equal:
                return proved_otherwise(found, wrong, plan, other)
    return found


def misfilled(runs: Runs, plan: RestorePlan) -> Misfilled | None:
    """Returns what is filled, or might be, from what Linen does not use, while what it calls fills nothing.

    That is what it never calls, and of what it calls a parameter beside another one of the size.
    """
    checkpoint, recipes, location = runs.runner.checkpoint, runs.runner.recipes, runs.linen.weights.location
    called, stored = {call.path for call in runs.linen.calls}, checkpoint.leaves
    floats = [path for path in location if jnp.issubdtype(stored[path].dtype or bool, jnp.floating)]
    silent = {path: stored[path] for path in floats if location[path][:-1] not in called}
    read = {path for recipe in recipes.values() for path in reads(recipe)}
    others = [path for path in floats if path not in read and path not in silent]
    left = {(path[:-1], math.prod(stored[path].shape)) for path in others}
    mine = {
        path: (path[:-1], math.prod(stored[path].shape)) for path in floats if path in read - silent.keys()
    }
    doubted = [path for path, beside in mine.items() if beside in left]
    open_ = {math.prod(item.wanted.shape) for item in plan.missing.values()}
    sizes = open_ | {math.prod(stored[path].shape) for path in (*silent, *doubted) if path in read}
    instead = [path for path in others if math.prod(stored[path].shape) in sizes]

    def run(variables: Any) -> Any:
        return run_linen(runs.programs.linen, variables, *runs.inputs, owner=lambda _: None)[0]

    groups = [[*each] for _, each in itertools.groupby(silent, key=lambda path: path[:-1])]
    groups += [[path] for path in doubted]
    unused = unused_leaves(checkpoint, plan, groups, run, runs.linen.returned) if instead else []
    read_by = {leaf: found for leaf, recipe in recipes.items() if (found := {*reads(recipe)} & {*unused})}
    # What neither program calls, such as a head for training, may well be each other's.
    idle = [leaf for leaf in read_by if leaf[:-1] not in runs.runner.calls]
    idle = [] if not idle or depend_on(runs, dict.fromkeys(idle, 1)) else idle
    kept = {*itertools.chain(*(read_by.pop(leaf) for leaf in idle))}
    sources = {*itertools.chain(*read_by.values())} - kept
    if not sources and not (open_ and {*unused} - kept):
        return None
    return Misfilled(
        wanted=whole_modules(read_by, recipes),
        sources=whole_modules(sources, stored),
        unused=[path for path in unused if path not in kept],
        instead=whole_modules(instead, stored),
    )


def proved_otherwise(
    found: Verification, wrong: Misfilled, plan: RestorePlan, other: RestorePlan
) -> Verification:
    """Returns a verification with what another plan, under which outputs are equal, proves to be wrong."""
    made = {leaf: item.recipe for leaf, item in other.restored.items() if leaf in plan.restored}
    changes = {leaf: recipe for leaf, recipe in made.items() if recipe != plan.restored[leaf].recipe}
    rules = ", ".join(rule.quoted for rule in other.renames)
    first = FirstDifference(
        module=min(found.modules, key=lambda one: len(one.nnx.path)),
        place=shared_levels([leaf[:-1] for leaf in changes]),
        weights=tuple(plan.restored[leaf] for leaf in changes),
        proved=f"{wrong.words}: {f'renames=[{rules}]' if rules else 'no rules are needed'}",
        changes=changes,
    )
    return dataclasses.replace(found, first=first, remarks=found.remarks[1:])


def leaving_out(
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

    modules, reason = whole_modules(unused, checkpoint.leaves), "the Linen program does not use it"
    drops = [Drop(spelled(module), reason) for module in modules]
    wanted = makes(drops)
    for drop in drops:  # One is needed only where the others alone do not make the same.
        fewer = [other for other in drops if other is not drop]
        with contextlib.suppress(RestoreError):
            drops = fewer if makes(fewer) == wanted else drops
    first, left = [Proposal(rule=drop, grounds="outputs") for drop in drops], found.unmatched_stored
    made = changed(found, lambda others: (*drops, *others))
    return dataclasses.replace(made, proposals=(*first, *found.proposals), unmatched_stored=(*left, *unused))


def exchanges_tell(wanted: Collection[Path], runs: Runs, relative: float) -> bool:
    """Tells whether an NNX program that is right returns something else with any two modules exchanged.

    Args:
        wanted: Leaves of the modules, which hold each other's shapes where they can be exchanged.
        runs: Both programs, which return the same.
        relative: Within how much they do.
    """
    values, held = runs.runner.variables, defaultdict[Path, dict[Any, Any]](dict)
    if not values.keys() >= {*wanted}:
        return False
    for leaf in wanted:
        held[leaf[:-1]][leaf[-1]] = np.asarray(values[leaf].get_value())
    shapes = {path: {name: array.shape for name, array in own.items()} for path, own in held.items()}
    pairs = [pair for pair in itertools.combinations(held, 2) if shapes[pair[0]] == shapes[pair[1]]]
    for pair in pairs if len(pairs) <= _MOST_EXCHANGES else ():
        apart = {
            (*one, name): held[other][name] - array
            for one, other in (pair, pair[::-1])
            for name, array in held[one].items()
        }
        found = outputs_apart(runs.returned, returned_with(runs.programs, runs.runner.model, apart))
        if not tells(relative, max(output.relative for output in found)):
            return False
    return 0 < len(pairs) <= _MOST_EXCHANGES


_MOST_EXCHANGES = 64
"""Each is a run of the NNX program."""


def compared(runs: Runs, plan: RestorePlan, tolerance: float | None = None) -> Verification:
    """Returns what one run of each program under a plan tells."""
    search = Search(
        compared=runs.compared,
        runner=runs.runner,
        restored=plan.restored,
        linen=runs.linen.calls,
        limit=max(TOLERANCE, tolerance or 0.0, _rounding(runs)),
    )
    # One output of few digits says nothing about those beside it.
    usual = TOLERANCE * max(1, math.ceil(math.sqrt(len(runs.compared) / _CALLS)))
    coarse = runs.digits.coarse * min(MOST_ROUNDINGS, math.sqrt(len(runs.compared)))
    allowed = [max(usual, one.coarse, coarse) if tolerance is None else tolerance for one in runs.outputs]
    worst = max(zip(runs.outputs, allowed, strict=True), key=lambda output: output[0].excess(output[1]))
    is_near = worst[0].relative <= worst[1]
    first = search.first() or search.set_up_otherwise(whatever=not is_near)
    if first is not None and not (first.proved or first.settings):
        first = dataclasses.replace(
            first, cast=cast_in_one(first.module.outputs, runs.programs, plan, runs.runner.model)
        )
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
        without_effect=tuple(vectors_without_effect(runs)) if equal else (),
    )


_CALLS = 32
"""How many modules differ by `TOLERANCE` in all; roundings add up as random steps do."""


def _rounding(runs: Runs) -> float:
    """Returns how far apart inputs are in this run that differ by rounding: twice what modules return."""
    right = [one.found.outputs.relative for one in runs.compared if one.agrees]
    return min(max(FAR, MOST_ROUNDINGS * runs.digits.coarse), 2 * max(right, default=0.0))


def _remarks(is_near: bool, first: FirstDifference | None, runs: Runs, plan: RestorePlan) -> Iterator[str]:
    yield from in_fewer_digits(runs.digits.linen, runs.digits.nnx, runs.outputs)
    is_told = is_near or (first is not None and bool(first.proved))
    yield from filter(None, () if is_told else (runs.calling_others,))
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
    yield from () if is_told else _of_another_size(runs.compared)
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
        yield from untold(runs, plan, first)


def _of_another_size(compared: Sequence[Compared]) -> Iterator[str]:
    """Yields which module, of those called with the same, first returns an array of other lengths."""
    alone = (x for x in compared if x.gets_the_same and len(x.linen.outputs) == len(x.nnx.outputs) == 1)
    for one in alone:
        (theirs,), (ours,) = ([array.shape for array in use.outputs] for use in (one.linen, one.nnx))
        if len(ours) == len(theirs) and math.prod(ours) != math.prod(theirs):
            yield (
                f"{fold_paths([one.path])} is called with the same and returns {ours} where Linen's module "
                f"returns {theirs}: look at its padding, strides and what it crops."
            )
            return


def _all_agree(compared: Sequence[Compared]) -> bool:
    outputs = [one.found.outputs for one in compared if one.gets_the_same]
    return bool(outputs) and not any(exceeds(one, TOLERANCE) for one in outputs)


def run_both(
    checkpoint: Checkpoint,
    plan: RestorePlan,
    parts: Target,
    programs: Programs,
    init: Callable[[], Any] | None = None,
    earlier: LinenRun | None = None,
) -> Runs:
    """Runs both programs and compares their modules. The Linen variables are gone when the model is restored.

    What Linen did earlier with the same leaves at the same places is not run again.

    Raises:
        VerificationError: One of the programs fails, or their outputs cannot be compared.
        UnreadableLeafError: Stored bytes are absent or damaged.
    """
    checkpoint = held_if_small(checkpoint, plan)
    if earlier is not None and (earlier.weights.places, earlier.weights.location) == locate_stored(plan):
        linen = earlier
    else:
        linen = run_linen_program(checkpoint, plan, programs)
    model = parts.assemble(carry_out(checkpoint, plan, init=init, concurrent_bytes=None))
    found, nnx_calls, is_used = run_nnx_program(programs, model, list(parts.leaves))
    outputs = outputs_apart(linen.returned, found)
    if not (is_used or depends(programs, model, found)):
        raise VerificationError(
            "nnx_apply returns the same whatever the weights of the model are that it is called with.",
            hints=["run the model that nnx_apply gets: lambda model, x: model(x)."],
        )
    recipes = _recipes_of_model(plan, linen.weights.location)
    calls, wanted = by_path(nnx_calls), {leaf: each.shape for leaf, each in parts.leaves.items()}
    shapes = (wanted, {path: leaf.shape for path, leaf in checkpoint.leaves.items()})
    pairs = pair_modules(recipes, shapes, linen.weights.location, calls, by_path(linen.calls))
    compared = compare_modules(pairs, linen.calls, nnx_calls)
    digits = Digits.of(linen.calls, nnx_calls, compared)
    if digits.dtype:
        linen = dataclasses.replace(linen, calls=[*map(digits.given, linen.calls)])
        compared = compare_modules(pairs, linen.calls, nnx_calls)
    hidden = [leaf for leaf in recipes if not any(path and leaf[: len(path)] == path for path in calls)]
    axes = scanned_axes(calls, wanted)
    runner = ModuleRunner(model=model, checkpoint=checkpoint, recipes=recipes, axes=axes, calls=calls)
    return Runs(
        outputs=outputs,
        compared=compared,
        runner=runner,
        programs=programs,
        returned=found,
        pairs=pairs,
        hidden=hidden,
        linen=linen,
        digits=digits,
    )


def _recipes_of_model(plan: RestorePlan, location: Mapping[Path, Path]) -> dict[Path, Recipe]:
    return {
        leaf: item.recipe
        for leaf, item in plan.restored.items()
        if all(source in location for source in reads(item.recipe))
    }
