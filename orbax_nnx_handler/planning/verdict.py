"""The one error of a plan that cannot be carried out."""

from collections.abc import Callable, Collection, Iterable, Sequence

from orbax_nnx_handler.planning.diagnosis.name_causes import AnotherModel, OtherNames
from orbax_nnx_handler.planning.errors import (
    AmbiguousMappingError,
    DtypeMismatchError,
    KeyMismatchError,
    MissingParamError,
    RestoreError,
    ShapeMismatchError,
    UnexpectedParamError,
)
from orbax_nnx_handler.planning.folding import Row, aligned
from orbax_nnx_handler.planning.nearest import nearest
from orbax_nnx_handler.planning.paths import Path, canonical, render
from orbax_nnx_handler.planning.plan import RestorePlan
from orbax_nnx_handler.planning.roots import strip
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
    if plan.faults:
        return []
    return [cause.cause for cause in plan.causes if isinstance(cause, AnotherModel)]


def advice(plan: RestorePlan) -> list[str]:
    """Returns the lines that say what is probably wrong and what to do about it."""
    if any(isinstance(fault, AmbiguousMappingError) for fault in plan.faults):
        # Until it is decided how to read the checkpoint, whatever is missing may be the other reading's.
        return []
    causes = plan.causes
    lines: list[str] = []
    elsewhere = {path for cause in causes if not isinstance(cause, OtherNames) for path in cause.paths}
    lines += _closest(plan, elsewhere)
    for cause in causes:
        if not isinstance(cause, AnotherModel):
            lines.append(f"cause: {cause.cause}")
        lines.append(f"hint: {cause.hint}")
    explained = {path for cause in causes for path in cause.paths}
    lines += [f"hint: {text}" for text in _general(plan, explained)]
    if any('"init"' in line for line in lines) and _has_no_source(plan):
        lines.append(f"hint: {_SOURCE}")
    return lines


_SOURCE = "the target is abstract, so initial values need init=..., a function that builds the target."


def _has_no_source(plan: RestorePlan) -> bool:
    return any(item.policy == "error" and item.filled_by is None for item in plan.missing.values())


def _closest(plan: RestorePlan, explained: Collection[Path]) -> list[str]:
    """Returns the nearest names of leaves that nothing but another name may explain."""
    missing = [i.wanted for path, i in plan.missing.items() if i.policy == "error" and path not in explained]
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
    if any(item.policy == "init" and item.filled_by is None for item in plan.missing.values()):
        yield _SOURCE
    if missing:
        if plan.unexpected:
            yield 'where only the name differs, pass renames=[("stored", "wanted")].'
        yield 'pass policy="init" to initialise what is missing, or filters for a part of it.'
    if "shape" in kinds:
        yield "a weight is never cut, padded or reshaped: build the target with the stored shapes."
    # A mismatch with a detail says itself what to do.
    if any(
        item.kind == "dtype" and not item.detail
        for path, item in plan.mismatched.items()
        if path not in known
    ):
        yield "integers, booleans and floats never become each other: give the target's leaf the stored kind."
    if "key" in kinds:
        yield "build the target with random keys of the stored implementation and shape."
    if plan.unexpected_policy == "error" and any(path not in known for path in plan.unexpected):
        yield 'pass unexpected="warn" if nobody needs what is left over.'


def _missing(plan: RestorePlan) -> Sequence[RestoreError]:
    contested = _contested(plan)
    bad = [item for path, item in plan.missing.items() if item.policy == "error" and path not in contested]
    if not bad:
        return []
    total = plan.wanted_count - len(plan.defaulted)
    share = f"all {total} leaves" if len(bad) == total else f"{len(bad)} of the {total} leaves"
    rows = aligned(missing_rows(bad))
    message = f"the checkpoint lacks {share} that the target needs:\n{rows}"
    return [MissingParamError(message, paths=[item.wanted.path for item in bad])]


def _contested(plan: RestorePlan) -> set[Path]:
    """Returns wanted leaves that another fault names already: not missing, but claimed in two ways."""
    named = {
        path for fault in plan.faults if isinstance(fault, AmbiguousMappingError) for path in fault.paths
    }
    if not named:
        return set()
    root = plan.evidence.roots.wanted
    return {path for path in plan.missing if path in named or strip(canonical(path), root) in named}


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
