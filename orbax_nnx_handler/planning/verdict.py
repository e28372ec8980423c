"""The one error of a plan that cannot be carried out."""

from collections.abc import Callable, Sequence

from orbax_nnx_handler.planning.diagnosis import hints
from orbax_nnx_handler.planning.errors import (
    DtypeMismatchError,
    KeyMismatchError,
    MissingParamError,
    RestoreError,
    ShapeMismatchError,
    UnexpectedParamError,
)
from orbax_nnx_handler.planning.folding import Row, aligned, ranges
from orbax_nnx_handler.planning.plan import Mismatched, Missing, RestorePlan
from orbax_nnx_handler.planning.recipes import describe, render_reads


def error_of(plan: RestorePlan) -> RestoreError | None:
    """Returns the error that lists every problem of a plan; None if it fits."""
    problems = [*plan.faults, *(problem for find in _FINDERS for problem in find(plan))]
    if not problems:
        return None
    footer = _footer(plan)
    if len(problems) == 1:
        return type(problems[0])(f"{problems[0]}\n{footer}", paths=problems[0].paths)
    kinds = _distinct(type(problem) for problem in problems)
    combined = type(" + ".join(kind.__name__ for kind in kinds), tuple(kinds), {}) if len(kinds) > 1 else kinds[0]
    body = "\n".join(str(problem) for problem in problems)
    paths = [path for problem in problems for path in problem.paths]
    return combined(f"{body}\n{footer}", paths=paths, problems=problems)


def _distinct(kinds: object) -> list[type[RestoreError]]:
    return list(dict.fromkeys(kinds))  # type: ignore[call-overload]


def _missing(plan: RestorePlan) -> Sequence[RestoreError]:
    bad = [item for item in plan.missing.values() if item.policy == "error"]
    if not bad:
        return []
    rows = aligned(Row(item.wanted.path, (*_leaf(item.wanted), _layers(item))) for item in bad)
    weights = plan.wanted_count - len(plan.defaulted)
    return [
        MissingParamError(
            f"the checkpoint lacks {len(bad)} of the target's {weights} weights:\n{rows}",
            paths=[item.wanted.path for item in bad],
        )
    ]


def _sourceless(plan: RestorePlan) -> Sequence[RestoreError]:
    bad = [item for item in plan.missing.values() if item.policy == "init" and item.filled_by is None]
    if not bad:
        return []
    rows = aligned(Row(item.wanted.path, (*_leaf(item.wanted), _layers(item))) for item in bad)
    return [
        MissingParamError(
            f'policy "init" has no initial value for {len(bad)} missing weights:\n{rows}\n'
            "cause: the target is abstract and no init was given.\n"
            "hint: pass init=..., a function that builds the target with real values, or a concrete target.",
            paths=[item.wanted.path for item in bad],
        )
    ]


def _leaf(leaf: object) -> tuple[str, str]:
    return str(leaf.shape), str(leaf.dtype)  # type: ignore[attr-defined]


def _layers(item: Missing) -> str:
    return f"layers {ranges(item.layers)} missing" if item.layers else ""


def _mismatches(kind: str, error: type[RestoreError], what: str) -> Callable[[RestorePlan], Sequence[RestoreError]]:
    def find(plan: RestorePlan) -> Sequence[RestoreError]:
        bad = [item for item in plan.mismatched.values() if item.kind == kind]
        if not bad:
            return []
        rows = aligned(Row(item.wanted.path, _columns(item)) for item in bad)
        message = f"{len(bad)} leaves have another {what} in the checkpoint:\n{rows}"
        return [error(message, paths=[item.wanted.path for item in bad])]

    return find


def _columns(item: Mismatched) -> tuple[str, ...]:
    stored = f"stored {item.stored_shape} {item.stored_dtype}"
    wanted = f"wanted {item.wanted.shape} {item.wanted.dtype}"
    done = describe(item.recipe)
    source = f"from {render_reads(item.recipe)}" + (f" ({done})" if done else "")
    return tuple(part for part in (stored, wanted, item.detail, source) if part)


def _unexpected(plan: RestorePlan) -> Sequence[RestoreError]:
    if plan.unexpected_policy != "error" or not plan.unexpected:
        return []
    rows = aligned(Row(path, _leaf(leaf)) for path, leaf in plan.unexpected.items())
    return [
        UnexpectedParamError(
            f"the checkpoint holds {len(plan.unexpected)} leaves that the target does not want:\n{rows}",
            paths=list(plan.unexpected),
        )
    ]


def _footer(plan: RestorePlan) -> str:
    about = f"layout: {plan.layout}, {plan.stored_count} stored leaves"
    if plan.unexpected:
        about += f", {len(plan.unexpected)} of them unexpected"
    return "\n".join([f"checkpoint: {plan.directory} ({about})", *hints(plan)])


_FINDERS: tuple[Callable[[RestorePlan], Sequence[RestoreError]], ...] = (
    _missing,
    _sourceless,
    _mismatches("shape", ShapeMismatchError, "shape"),
    _mismatches("dtype", DtypeMismatchError, "kind of dtype"),
    _mismatches("key", KeyMismatchError, "random key implementation or shape"),
    _unexpected,
)
