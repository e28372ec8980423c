"""Runs a Linen program and an NNX program on one input, from one checkpoint, and compares them."""

import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import jax
import numpy as np
from etils import epath
from flax import nnx

from orbax_nnx_handler.decide import decide
from orbax_nnx_handler.planning.core.errors import VerificationError
from orbax_nnx_handler.planning.core.lines import counted
from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.core.recipes import reads
from orbax_nnx_handler.planning.options import Policies, RestoreOptions, UnexpectedPolicy
from orbax_nnx_handler.planning.plan import RestorePlan
from orbax_nnx_handler.planning.rules import Rule
from orbax_nnx_handler.storage.checkpoint.find import find_item
from orbax_nnx_handler.storage.checkpoint.metadata import read_metadata
from orbax_nnx_handler.storage.restoring.restore import carry_out
from orbax_nnx_handler.storage.stores.kvstore import files_at
from orbax_nnx_handler.storage.stores.locations import as_path
from orbax_nnx_handler.verifying.alone import Workbench, scanned_axes
from orbax_nnx_handler.verifying.compared import Compared, by_path, compare_modules
from orbax_nnx_handler.verifying.comparing import TOLERANCE, Distance, compare
from orbax_nnx_handler.verifying.culprit import Search
from orbax_nnx_handler.verifying.pairing import pair_modules
from orbax_nnx_handler.verifying.programs import LinenWeights, find_nnx, owner_of, placed, restore_linen
from orbax_nnx_handler.verifying.recording import Call, run_linen, run_nnx
from orbax_nnx_handler.verifying.verification import FirstDifference, Verification

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
    layout: str = "auto",
    init: Callable[[], Any] | None = None,
    unexpected: UnexpectedPolicy = "warn",
    item: str | None = None,
) -> Verification:
    """Runs the Linen program and the NNX program on one input and compares them, module by module.

    Both run in float32 with exact matrix products, on one device, operation by operation
    (`jax.disable_jit`), so that each layer of a scan is a call of its own. Modules are paired by the
    weights that the plan gives them.

    ```python
    found = verify(path, nnx.eval_shape(make), linen_model.apply, lambda model, x: model(x), (x,))
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
    """
    options = RestoreOptions().override(
        policy=policy, layout=layout, renames=renames, init=init, unexpected=unexpected
    )
    given = as_path(path)
    files = files_at(given)
    directory = find_item(given, item, files)
    checkpoint = read_metadata(directory, files)
    plan, parts = decide(checkpoint, target, placed(target), options, check=True)
    weights = restore_linen(checkpoint, plan)
    start = time.monotonic()
    expected, linen_calls = _run_linen(linen_apply, weights, inputs)
    weights.variables.clear()
    model = parts.assemble(carry_out(checkpoint, plan, init=init, concurrent_bytes=None))
    found, nnx_calls = _run_nnx(nnx_apply, model, list(parts.leaves), inputs)
    outputs = _outputs_apart(expected, found)
    allowed = max(TOLERANCE, outputs.coarse) if tolerance is None else tolerance
    recipes = {
        leaf: item.recipe
        for leaf, item in plan.restored.items()
        if all(source in weights.location for source in reads(item.recipe))
    }
    pairs = pair_modules(recipes, weights.location, nnx_calls, linen_calls)
    compared = compare_modules(pairs, linen_calls, nnx_calls)
    calls = by_path(nnx_calls)
    bench = Workbench(
        model=model,
        checkpoint=checkpoint,
        recipes=recipes,
        axes=scanned_axes(calls, {leaf: wanted.shape for leaf, wanted in parts.leaves.items()}),
        calls=calls,
    )
    ran = time.monotonic() - start
    seconds = _PATIENCE * (ran + 1)
    search = Search(compared=compared, bench=bench, restored=plan.restored, seconds=seconds)
    equal = outputs.relative <= allowed
    first = search.first()
    return Verification(
        equal=equal,
        relative=outputs.relative,
        absolute=outputs.absolute,
        tolerance=allowed,
        directory=str(directory),
        modules=tuple(one.found for one in compared),
        first=first,
        remarks=_remarks(equal, first, compared, plan),
    )


def _run_linen(
    apply: Callable[..., Any], weights: LinenWeights, inputs: Sequence[Any]
) -> tuple[Any, list[Call]]:
    try:
        return run_linen(apply, weights.variables, *inputs, owner=lambda module: owner_of(weights, module))
    except Exception as error:
        held = ", ".join(map(repr, weights.variables))
        hint = (
            f"it is called with the variables (a dict with {held}) and {counted(len(inputs), 'input')}, such "
            "as linen_model.apply, or lambda variables, x: linen_model.apply(variables, x, train=False)."
        )
        raise VerificationError(f"linen_apply fails: {_told(error)}", hints=[hint]) from error


def _run_nnx(
    apply: Callable[..., Any], model: Any, wanted: Sequence[Path], inputs: Sequence[Any]
) -> tuple[Any, list[Call]]:
    def locate(module: Any, above: Path) -> Path | None:
        state = cast(Any, nnx.state(module))
        variables = [tuple(path) for path, _ in cast("Iterable[tuple[Path, Any]]", nnx.to_flat_state(state))]
        return find_nnx(wanted, variables, above)

    try:
        return run_nnx(apply, model, *inputs, locate=locate)
    except Exception as error:
        hint = (
            f"it is called with the restored target (a {type(model).__name__}) and "
            f"{counted(len(inputs), 'input')}, such as lambda model, x: model(x). A model with dropout wants "
            "model.eval() first, or rngs."
        )
        raise VerificationError(f"nnx_apply fails: {_told(error)}", hints=[hint]) from error


def _told(error: Exception) -> str:
    """Returns what an error of the caller's code is, and where in that code it was raised."""
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename
    ]
    own = __file__.rpartition("/")[0]
    place = next((frame for frame in reversed(frames) if not frame.filename.startswith(own)), None)
    where = f"\nat {place.filename}:{place.lineno}" if place is not None else ""
    return f"{type(error).__name__}: {error}{where}"


def _outputs_apart(expected: Any, found: Any) -> Distance:
    """Compares what both programs return.

    Raises:
        VerificationError: It is no arrays, of different structure, or of different shapes.
    """
    one, other = _structure(expected), _structure(found)
    if one != other:
        raise VerificationError(
            f"the programs return different things:\n  linen_apply  {one}\n  nnx_apply    {other}",
            hints=["let both functions return the same: an array, or the same arrays in one structure."],
        )
    pairs = list(zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True))
    shapes = [(np.shape(a), np.shape(b)) for a, b in pairs]
    if not pairs or any(a != b for a, b in shapes):
        rows = "\n".join(f"  linen_apply  {a}\n  nnx_apply    {b}" for a, b in shapes if a != b)
        raise VerificationError(
            f"the programs return arrays of different shapes:\n{rows}"
            if pairs
            else "the programs return no array.",
            hints=["let both functions return arrays that mean the same."],
        )
    apart = [compare([np.asarray(a)], [np.asarray(b)]) for a, b in pairs]
    return Distance(
        relative=max(one.relative for one in apart),
        absolute=max(one.absolute for one in apart),
        compared=len(apart),
        coarse=max(one.coarse for one in apart),
    )


def _structure(tree: Any) -> Any:
    return cast(Any, jax.tree.structure(tree))


def _remarks(
    equal: bool, first: FirstDifference | None, compared: Sequence[Compared], plan: RestorePlan
) -> tuple[str, ...]:
    remarks = list[str]()
    if not compared:
        remarks.append("no module of the one program holds exactly the weights of a module of the other.")
    if equal and first is not None:
        remarks.append(
            f"the outputs are within the tolerance, and {first.path} still differs by more than rounding."
        )
    if not equal and first is None and compared:
        remarks.append(
            "no module differs by more than rounding from equal inputs: either the difference grows little "
            "by little, as it does in deep models (then raise tolerance=...), or it arises outside of the "
            "modules that were compared."
        )
    if plan.missing:
        remarks.append(
            f"{counted(len(plan.missing), 'weight')} of the target is not stored, and a policy fills it."
        )
    return tuple(remarks)
