"""The one error of a plan that cannot be carried out."""

from collections.abc import Callable, Iterable, Sequence

from orbax_nnx_handler.planning.diagnosis import diagnose
from orbax_nnx_handler.planning.diagnosis.causes import AnotherModel, Cause
from orbax_nnx_handler.planning.errors import (
    DtypeMismatchError,
    KeyMismatchError,
    MissingParamError,
    RestoreError,
    ShapeMismatchError,
    UnexpectedParamError,
)
from orbax_nnx_handler.planning.folding import Row, aligned
from orbax_nnx_handler.planning.nearest import nearest
from orbax_nnx_handler.planning.paths import render
from orbax_nnx_handler.planning.plan import RestorePlan
from orbax_nnx_handler.planning.rows import look, mismatched_rows, missing_rows, stored_rows


def error_of(plan: RestorePlan) -> RestoreError | None:
    """Returns the error that lists every problem of a plan; None if it fits."""
    problems = problems_of(plan)
    if not problems:
        return None
    kinds = list(dict.fromkeys(type(problem) for problem in problems))
    combined = kinds[0] if len(kinds) == 1 else type(" + ".join(k.__name__ for k in kinds), tuple(kinds), {})
    body = [str(problem) for problem in problems]
    paths = list(dict.fromkeys(path for problem in problems for path in problem.paths))
    message = "\n".join([*_first(plan), *body, _checkpoint(plan), *advice(plan)])
    return combined(message, paths=paths, problems=problems if len(problems) > 1 else ())


def problems_of(plan: RestorePlan) -> list[RestoreError]:
    """Returns what is wrong with a plan, one error for each kind; empty if it fits."""
    return [*plan.faults, *(problem for find in _FINDERS for problem in find(plan))]


def _first(plan: RestorePlan) -> list[str]:
    # The list of a foreign model's leaves would bury the one fact that matters.
    return [cause.cause for cause in diagnose(plan) if isinstance(cause, AnotherModel)]


def advice(plan: RestorePlan) -> list[str]:
    """Returns the lines that say what is probably wrong and what to do about it."""
    causes = diagnose(plan)
    lines: list[str] = []
    if not any(isinstance(cause, AnotherModel) for cause in causes):
        lines += _closest(plan)
    for cause in causes:
        if not isinstance(cause, AnotherModel):
            lines.append(f"cause: {cause.cause}")
        lines.append(f"hint: {cause.hint}")
    explained = {path for cause in causes for path in cause.paths}
    return [*lines, *(f"hint: {text}" for text in _general(plan, explained))]


def _closest(plan: RestorePlan) -> list[str]:
    missing = [item.wanted for item in plan.missing.values() if item.policy == "error"]
    pairs = nearest(missing, plan.unexpected)
    if len(pairs) == 1:
        return [f"closest unexpected: {render(pairs[0][1].path)} {look(pairs[0][1])}"]
    rows = [Row(wanted.path, (look(stored),), render(stored.path)) for wanted, stored in pairs]
    return ["closest unexpected:", aligned(rows)] if rows else []


def _general(plan: RestorePlan, explained: Iterable[object]) -> Iterable[str]:
    """Yields the way out of what no cause explains."""
    known = set(explained)
    missing = [p for p, item in plan.missing.items() if item.policy == "error" and p not in known]
    kinds = {item.kind for path, item in plan.mismatched.items() if path not in known}
    if missing:
        if plan.unexpected:
            yield 'where only the name differs, pass renames=[("stored", "wanted")].'
        yield 'pass policy="init" to initialise what is missing, or filters for a part of it.'
    if "shape" in kinds:
        yield "a weight is never cut, padded or reshaped: build the target with the stored shapes."
    if "dtype" in kinds:
        yield "integers, booleans and floats never turn into each other: give the target the stored kind."
    if "key" in kinds:
        yield "build the target with random keys of the stored implementation and shape."
    if plan.unexpected_policy == "error" and any(path not in known for path in plan.unexpected):
        yield 'pass unexpected="warn" if nobody needs what is left over.'


def _missing(plan: RestorePlan) -> Sequence[RestoreError]:
    bad = [item for item in plan.missing.values() if item.policy == "error"]
    if not bad:
        return []
    total = plan.wanted_count - len(plan.defaulted)
    rows = aligned(missing_rows(bad))
    message = f"the checkpoint lacks {len(bad)} of the {total} leaves that the target needs from it:\n{rows}"
    return [MissingParamError(message, paths=[item.wanted.path for item in bad])]


def _sourceless(plan: RestorePlan) -> Sequence[RestoreError]:
    bad = [item for item in plan.missing.values() if item.policy == "init" and item.filled_by is None]
    if not bad:
        return []
    message = (
        f'policy "init" has no initial value for {_weights(len(bad))}:\n{aligned(missing_rows(bad))}\n'
        "cause: the target is abstract and no init was given.\n"
        "hint: pass init=..., a function that builds the target with real values, or a concrete target."
    )
    return [MissingParamError(message, paths=[item.wanted.path for item in bad])]


def _weights(count: int) -> str:
    return "1 missing weight" if count == 1 else f"{count} missing weights"


def _mismatches(kind: str, error: type[RestoreError], what: str) -> Callable[[RestorePlan], Sequence[RestoreError]]:
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
    about = f"layout: {plan.layout}, {plan.stored_count} stored leaves"
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
