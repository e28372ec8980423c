"""Runs a Linen program and an NNX program on one input, from one checkpoint, and compares them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from numbers import Real
from typing import Any

import jax
import numpy as np
from etils import epath

from orbax_nnx_handler.planner import decide
from orbax_nnx_handler.planning.core.folding import fold_paths
from orbax_nnx_handler.planning.core.lines import counted
from orbax_nnx_handler.planning.layouts import LayoutChoice
from orbax_nnx_handler.planning.options import Policies, RestoreOptions, UnexpectedPolicy
from orbax_nnx_handler.planning.plan import RestorePlan
from orbax_nnx_handler.planning.rules import Rule
from orbax_nnx_handler.storage.checkpoint.find import find_item
from orbax_nnx_handler.storage.checkpoint.metadata import read_metadata
from orbax_nnx_handler.storage.stores.kvstore import files_at
from orbax_nnx_handler.storage.stores.locations import as_path
from orbax_nnx_handler.verifying.first_difference import Search
from orbax_nnx_handler.verifying.programs import on_one_device
from orbax_nnx_handler.verifying.runs import Compared, Programs, Runs, run_both
from orbax_nnx_handler.verifying.verification import (
    TOLERANCE,
    FirstDifference,
    Verification,
    exceeds,
    same_numbers,
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
        path: See `plan_restore`.
        target: See `plan_restore`; the model that `nnx_apply` is called with. Its floats are restored
            as float32, whatever they are in the target.
        linen_apply: Called with the variables as Linen wrote them (`{"params": ...}` and the other
            collections, float32), and the inputs. Where the plan uses several train states, one such
            dict for each, below its keys.
        nnx_apply: Called with the restored target and the inputs. It returns what `linen_apply`
            does: arrays of the same shapes in the same structure.
        inputs: What both are called with; a batch of one or two and a few tokens tell enough.
        renames: See `plan_restore`.
        tolerance: What the largest difference of two output elements may be, divided by the larger of
            the element and the mean magnitude of its array; by default 1e-5, or what the outputs'
            digits allow (bfloat16: 2e-2).
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
    if tolerance is not None and not (isinstance(tolerance, Real) and float(tolerance) >= 0):
        raise ValueError(f"tolerance is a number from 0 on, such as 1e-4, not {tolerance!r}")
    options = RestoreOptions().override(
        policy=policy, layout=layout, renames=renames, init=init, unexpected=unexpected
    )
    given = as_path(path)
    files = files_at(given)
    checkpoint = read_metadata(find_item(given, item, files), files)
    plan, parts = decide(checkpoint, target, on_one_device(target), options, check=True)
    programs = Programs(linen=linen_apply, nnx=nnx_apply, inputs=inputs)
    return compared(run_both(checkpoint, plan, parts, programs, init), plan, tolerance)


def compared(runs: Runs, plan: RestorePlan, tolerance: float | None = None) -> Verification:
    """Returns what one run of each program under a plan tells."""
    search = Search(
        compared=runs.compared,
        runner=runs.runner,
        restored=plan.restored,
        seconds=_PATIENCE * (runs.seconds + 1),
    )
    outputs = runs.outputs
    allowed = max(TOLERANCE, outputs.coarse) if tolerance is None else tolerance
    equal = outputs.relative <= allowed
    first = search.first() or search.set_up_otherwise(whatever=not equal)
    return Verification(
        equal=equal,
        relative=outputs.relative,
        absolute=outputs.absolute,
        tolerance=allowed,
        directory=plan.directory,
        modules=tuple(one.found for one in runs.compared),
        first=first,
        remarks=(*_remarks(equal, first, runs.compared, plan), *(_untold(runs, first) if equal else ())),
    )


def _untold(runs: Runs, first: FirstDifference | None) -> Iterator[str]:
    """Yields what equal outputs do not tell of the weights."""
    floats = [np.asarray(leaf) for leaf in jax.tree.leaves(runs.inputs) if np.size(leaf) > 1]
    if any(np.all(leaf == leaf.flat[0]) for leaf in floats):
        yield "an input is one number throughout, which tells little of the weights: choose random inputs."
    quiet = [one for one in runs.compared if one.found.differs and one.found.is_certain]
    quiet = [one for one in quiet if not same_numbers(one.linen.outputs, one.nnx.outputs)]
    if first is None and quiet:
        names = fold_paths(one.path for one in quiet)
        yield (
            f"{names}: the outputs differ from Linen's, and what comes of them is the same: these inputs "
            "do not tell that the weights are right."
        )
    if runs.idle:
        yield f"the outputs tell nothing of weights that they do not depend on: {fold_paths(runs.idle)}."


def _remarks(
    equal: bool, first: FirstDifference | None, compared: Sequence[Compared], plan: RestorePlan
) -> tuple[str, ...]:
    remarks = list[str]()
    if not compared:
        remarks.append("no module of the one program holds exactly the weights of a module of the other.")
    if equal and first is not None:
        how = "by more than rounding" if first.module.differs else "in its settings"
        remarks.append(f"the outputs are within the tolerance, and {first.path} still differs {how}.")
    if not equal and first is None and _all_agree(compared):
        remarks.append(
            "every module that was compared returns the same, so the difference arises outside of them: in "
            "linen_apply or nnx_apply, or in methods other than __call__."
        )
    elif not equal and first is None and compared:
        remarks.append(
            "no module differs by more than rounding from equal inputs: either the difference grows little "
            "by little, as it does in deep models (then raise tolerance=...), or it arises outside of the "
            "modules that were compared."
        )
    if plan.missing:
        remarks.append(
            f"{counted(len(plan.missing), 'weight')} of the target not stored: a policy fills them."
        )
    return tuple(remarks)


def _all_agree(compared: Sequence[Compared]) -> bool:
    outputs = [one.found.outputs for one in compared if one.gets_the_same]
    return bool(outputs) and not any(exceeds(one, TOLERANCE) for one in outputs)
