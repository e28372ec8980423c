"""What is wrong with a verdict: one error for each kind, with every leaf of that kind."""

from collections.abc import Callable, Sequence

from orbax_nnx_handler.planning.core.errors import (
    AmbiguousMappingError,
    DtypeMismatchError,
    KeyMismatchError,
    MissingParamError,
    RestoreError,
    ShapeMismatchError,
    UnexpectedParamError,
)
from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.diagnosis.evidence import Evidence
from orbax_nnx_handler.planning.text.lines import aligned
from orbax_nnx_handler.planning.text.words import counted
from orbax_nnx_handler.planning.verdict.outcomes import Verdict
from orbax_nnx_handler.planning.verdict.rows import mismatched_rows, missing_rows, stored_rows


def problems_of(verdict: Verdict) -> list[RestoreError]:
    """Returns what is wrong with a verdict, one error for each kind; empty if it fits."""
    return [*verdict.faults, *(problem for find in _FINDERS for problem in find(verdict))]


def _missing(verdict: Verdict) -> Sequence[RestoreError]:
    contested = _contested(verdict)
    bad = [item for path, item in verdict.missing.items() if item.policy == "error" and path not in contested]
    if not bad:
        return []
    total = verdict.wanted_count - len(verdict.defaulted)
    share = f"{len(bad)} of the {counted(total, 'leaf', 'leaves')}"
    if len(bad) == total:
        share = "the one leaf" if total == 1 else f"all {total} leaves"
    rows = aligned(missing_rows(bad))
    message = f"the checkpoint lacks {share} that the target needs:\n{rows}"
    return [MissingParamError(message, paths=[item.wanted.path for item in bad])]


def _contested(verdict: Verdict) -> set[Path]:
    """Returns wanted leaves that another fault names already: not missing, but claimed in two ways.

    Their moments follow them, and are as open.
    """
    named = {
        path for fault in verdict.faults if isinstance(fault, AmbiguousMappingError) for path in fault.paths
    }
    if not named:
        return set()
    evidence = Evidence(verdict=verdict)
    parameters = {evidence.below[path] for path in named if path in evidence.below}
    return named | {path for path, (_, parameter) in evidence.moments.items() if parameter in parameters}


def _sourceless(verdict: Verdict) -> Sequence[RestoreError]:
    bad = [item for item in verdict.missing.values() if item.policy == "init" and item.filled_by is None]
    if not bad:
        return []
    leaves = counted(len(bad), "missing weight")
    message = f'policy "init" has no initial value for {leaves}:\n{aligned(missing_rows(bad))}'
    return [MissingParamError(message, paths=[item.wanted.path for item in bad])]


def _mismatches(
    kind: str, error: type[RestoreError], what: str
) -> Callable[[Verdict], Sequence[RestoreError]]:
    def find(verdict: Verdict) -> Sequence[RestoreError]:
        bad = [item for item in verdict.mismatched.values() if item.kind == kind]
        if not bad:
            return []
        leaves = counted(len(bad), "leaf has", "leaves have")
        message = f"{leaves} another {what} in the checkpoint:\n{aligned(mismatched_rows(bad))}"
        return [error(message, paths=[item.wanted.path for item in bad])]

    return find


def _unexpected(verdict: Verdict) -> Sequence[RestoreError]:
    if verdict.unexpected_policy != "error" or not verdict.unexpected:
        return []
    count, rows = len(verdict.unexpected), aligned(stored_rows(verdict.unexpected.values()))
    message = (
        f"the checkpoint holds {counted(count, 'leaf', 'leaves')} that the target does not want:\n{rows}"
    )
    return [UnexpectedParamError(message, paths=list(verdict.unexpected))]


_FINDERS: tuple[Callable[[Verdict], Sequence[RestoreError]], ...] = (
    _missing,
    _sourceless,
    _mismatches("shape", ShapeMismatchError, "shape"),
    _mismatches("dtype", DtypeMismatchError, "kind of dtype"),
    _mismatches("key", KeyMismatchError, "random key implementation or shape"),
    _unexpected,
)
