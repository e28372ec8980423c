"""What is probably wrong with a plan and what to do about it, line by line.

The one error of a plan that cannot be carried out.
"""

from collections.abc import Callable, Collection, Iterable, Sequence

from orbax_nnx_handler.planning.core.dtypes import name_of
from orbax_nnx_handler.planning.core.errors import (
    AmbiguousMappingError,
    DtypeMismatchError,
    KeyMismatchError,
    MissingParamError,
    RestoreError,
    ShapeMismatchError,
    UnexpectedParamError,
    UnreadableLeafError,
)
from orbax_nnx_handler.planning.core.paths import Path, render
from orbax_nnx_handler.planning.diagnosis.cause import Cause, counted, fill_hint
from orbax_nnx_handler.planning.diagnosis.evidence import Evidence, selecting
from orbax_nnx_handler.planning.diagnosis.names import AnotherModel, OtherNames, nearest
from orbax_nnx_handler.planning.plan import RestorePlan
from orbax_nnx_handler.planning.text.folding import Row, fold
from orbax_nnx_handler.planning.text.lines import align, aligned, wrapped
from orbax_nnx_handler.planning.verdict.rows import look, mismatched_rows, missing_rows, stored_rows

_SHOWN = 6
_SOURCE = "the target is abstract, so initial values need init=..., a function that builds the target."


def advice(plan: RestorePlan) -> list[str]:
    """Returns the lines that say what is probably wrong and what to do about it."""
    if any(isinstance(fault, AmbiguousMappingError | UnreadableLeafError) for fault in plan.faults):
        # Until it is decided how to read the checkpoint, whatever is missing may be the other reading's;
        # and what cannot be read may be what is missing.
        return []
    causes = plan.causes
    lines = _closest(plan, {p for cause in causes if not isinstance(cause, OtherNames) for p in cause.paths})
    lines += _ways(causes)
    explained = {path for cause in causes for path in cause.paths}
    lines += [f"hint: {text}" for text in _general(plan, explained)]
    anew = [path for cause in causes if cause.may_begin_anew for path in cause.paths]
    word = "or " if any(cause.may_begin_anew and cause.way for cause in causes) else ""
    # What has another name has not to begin anew, and the rest of a renamed model may be renamed as well.
    renamed = any(isinstance(cause, OtherNames) for cause in causes)
    rest = [] if renamed or not plan.restored else _open(plan, explained)
    lines += [f"hint: {word}{text}" for text in _fill(plan, {*anew, *rest})]
    if any('"init"' in line for line in lines) and _has_no_source(plan):
        lines.append(f"hint: {_SOURCE}")
    return lines


def _ways(causes: Sequence[Cause]) -> list[str]:
    """Returns causes with their ways out; a way that several share comes once, after the last of them."""
    lines: list[str] = []
    for at, cause in enumerate(causes):
        if not isinstance(cause, AnotherModel):
            lines.append(f"cause: {cause.cause}")
        if cause.way and all(cause.way != later.way for later in causes[at + 1 :]):
            lines.append(f"hint: {cause.way}")
    return lines


def _fill(plan: RestorePlan, paths: Collection[Path]) -> Iterable[str]:
    """Yields the one policy that fills what may begin anew, and nothing that is merely named otherwise."""
    missing = {path for path in _open(plan, ()) if path in paths}
    filters = selecting(Evidence(plan=plan), missing)
    if filters:
        yield fill_hint(filters, len(missing))
    elif missing and len(missing) == len(_open(plan, ())):
        yield 'pass policy="init" to initialise all that is missing, or filters for a part of it.'


def _open(plan: RestorePlan, explained: Collection[Path]) -> list[Path]:
    return [path for path, item in plan.missing.items() if item.policy == "error" and path not in explained]


def _has_no_source(plan: RestorePlan) -> bool:
    return any(item.policy == "error" and item.filled_by is None for item in plan.missing.values())


def _closest(plan: RestorePlan, explained: Collection[Path]) -> list[str]:
    """Returns the nearest names of leaves that nothing but another name may explain."""
    missing = [plan.evidence.wanted[path] for path in _open(plan, explained) if path in plan.evidence.wanted]
    unexpected = [plan.evidence.placements[p] for p in plan.unexpected if p in plan.evidence.placements]
    pairs = nearest(missing, unexpected)
    if len(pairs) == 1:
        return [f"closest unexpected: {render(pairs[0][1].path)} {look(pairs[0][1])}"]
    rows = [Row(wanted.path, (look(stored),), render(stored.path)) for wanted, stored in pairs]
    return ["closest unexpected:", *align(fold(rows), limit=_SHOWN)] if rows else []


def _general(plan: RestorePlan, explained: Collection[Path]) -> Iterable[str]:
    """Yields the way out of what no cause explains."""
    left = [item for path, item in plan.mismatched.items() if path not in explained]
    kinds = {item.kind for item in left}
    if any(item.policy == "init" and item.filled_by is None for item in plan.missing.values()):
        yield _SOURCE
    if _is_renamed(plan, _open(plan, explained)):
        yield 'where only a name differs, pass renames=[("name in the checkpoint", "name in the target")].'
    elif not plan.restored and _open(plan, explained):
        yield "look at what is stored with `orbax-nnx tree CHECKPOINT`, and check the path and the target."
    if "shape" in kinds:
        yield "a weight is never cut, padded or reshaped: build the target with the stored shapes."
    # A mismatch with a detail says itself what to do.
    if any(item.kind == "dtype" and not item.detail for item in left):
        yield "integers, booleans and floats never become each other: give the target's leaf the stored kind."
    if "key" in kinds:
        yield "build the target with random keys of the stored implementation and shape."
    if plan.unexpected_policy == "error" and any(path not in explained for path in plan.unexpected):
        yield 'pass unexpected="warn" if nobody needs what is left over.'


def _is_renamed(plan: RestorePlan, missing: Iterable[Path]) -> bool:
    """Tells whether a missing leaf may be an unexpected one of another name: the shape has to agree."""
    shapes = {(leaf.shape, name_of(leaf.dtype)) for leaf in plan.unexpected.values() if leaf.shape}
    wanted = [plan.evidence.wanted[path] for path in missing if path in plan.evidence.wanted]
    weights = [item.leaf for item in wanted if item.role == "model"]
    return any((leaf.shape, name_of(leaf.dtype)) in shapes for leaf in weights)


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
    scene = Evidence(plan=plan)
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
