"""The one error of a plan that cannot be carried out."""

from collections.abc import Callable, Sequence

from orbax_nnx_handler.planning.advice import advice
from orbax_nnx_handler.planning.aligning import aligned
from orbax_nnx_handler.planning.diagnosis.causes import counted
from orbax_nnx_handler.planning.diagnosis.name_causes import AnotherModel
from orbax_nnx_handler.planning.diagnosis.scene import Scene
from orbax_nnx_handler.planning.errors import (
    AmbiguousMappingError,
    DtypeMismatchError,
    KeyMismatchError,
    MissingParamError,
    RestoreError,
    ShapeMismatchError,
    UnexpectedParamError,
)
from orbax_nnx_handler.planning.paths import Path
from orbax_nnx_handler.planning.plan import RestorePlan
from orbax_nnx_handler.planning.prose import wrapped
from orbax_nnx_handler.planning.rows import mismatched_rows, missing_rows, stored_rows


def error_of(plan: RestorePlan) -> RestoreError | None:
    """Returns the error that lists every problem of a plan; None if it fits."""
    problems = problems_of(plan)
    if not problems:
        return None
    kinds = list(dict.fromkeys(type(problem) for problem in problems))
    combined = kinds[0] if len(kinds) == 1 else type(" + ".join(k.__name__ for k in kinds), tuple(kinds), {})
    body = [str(problem) for problem in problems]
    paths = list(dict.fromkeys(path for problem in problems for path in problem.paths))
    message = wrapped("\n".join([*_first(plan), *body, _checkpoint(plan), *advice(plan)]))
    return combined(message, paths=paths, problems=problems if len(problems) > 1 else ())


def problems_of(plan: RestorePlan) -> list[RestoreError]:
    """Returns what is wrong with a plan, one error for each kind; empty if it fits."""
    return [*plan.faults, *(problem for find in _FINDERS for problem in find(plan))]


def _first(plan: RestorePlan) -> list[str]:
    # The list of a foreign model's leaves would bury the one fact that matters.
    if plan.faults:
        return []
    return [cause.cause for cause in plan.causes if isinstance(cause, AnotherModel)]


def _missing(plan: RestorePlan) -> Sequence[RestoreError]:
    contested = _contested(plan)
    bad = [item for path, item in plan.missing.items() if item.policy == "error" and path not in contested]
    if not bad:
        return []
    total = plan.wanted_count - len(plan.defaulted)
    share = f"{len(bad)} of the {counted(total, 'leaf', 'leaves')}"
    if len(bad) == total:
        share = "the one leaf" if total == 1 else f"all {total} leaves"
    rows = aligned(missing_rows(bad))
    message = f"the checkpoint lacks {share} that the target needs:\n{rows}"
    return [MissingParamError(message, paths=[item.wanted.path for item in bad])]


def _contested(plan: RestorePlan) -> set[Path]:
    """Returns wanted leaves that another fault names already: not missing, but claimed in two ways.

    Their moments follow them, and are as open.
    """
    named = {
        path for fault in plan.faults if isinstance(fault, AmbiguousMappingError) for path in fault.paths
    }
    if not named:
        return set()
    scene = Scene(plan=plan)
    parameters = {scene.below[path] for path in named if path in scene.below}
    return named | {path for path, (_, parameter) in scene.moments.items() if parameter in parameters}


def _sourceless(plan: RestorePlan) -> Sequence[RestoreError]:
    bad = [item for item in plan.missing.values() if item.policy == "init" and item.filled_by is None]
    if not bad:
        return []
    message = f'policy "init" has no initial value for {_weights(len(bad))}:\n{aligned(missing_rows(bad))}'
    return [MissingParamError(message, paths=[item.wanted.path for item in bad])]


def _weights(count: int) -> str:
    return "1 missing weight" if count == 1 else f"{count} missing weights"


def _mismatches(
    kind: str, error: type[RestoreError], what: str
) -> Callable[[RestorePlan], Sequence[RestoreError]]:
    def find(plan: RestorePlan) -> Sequence[RestoreError]:
        bad = [item for item in plan.mismatched.values() if item.kind == kind]
        if not bad:
            return []
        leaves = "1 leaf has" if len(bad) == 1 else f"{len(bad)} leaves have"
        message = f"{leaves} another {what} in the checkpoint:\n{aligned(mismatched_rows(bad))}"
        return [error(message, paths=[item.wanted.path for item in bad])]

    return find


def _unexpected(plan: RestorePlan) -> Sequence[RestoreError]:
    if plan.unexpected_policy != "error" or not plan.unexpected:
        return []
    count, rows = len(plan.unexpected), aligned(stored_rows(plan.unexpected.values()))
    leaves = "1 leaf" if count == 1 else f"{count} leaves"
    message = f"the checkpoint holds {leaves} that the target does not want:\n{rows}"
    return [UnexpectedParamError(message, paths=list(plan.unexpected))]


def _checkpoint(plan: RestorePlan) -> str:
    about = f"layout: {plan.layout}, {counted(plan.stored_count, 'stored leaf', 'stored leaves')}"
    if plan.unexpected:
        about += f", {len(plan.unexpected)} of them unexpected"
    return f"checkpoint: {plan.directory} ({about})"


_FINDERS: tuple[Callable[[RestorePlan], Sequence[RestoreError]], ...] = (
    _missing,
    _sourceless,
    _mismatches("shape", ShapeMismatchError, "shape"),
    _mismatches("dtype", DtypeMismatchError, "kind of dtype"),
    _mismatches("key", KeyMismatchError, "random key implementation or shape"),
    _unexpected,
)
