"""Verdicts as plain dicts: everything, nothing folded, nothing cut."""

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

from orbax_nnx_handler.planning.core.errors import Cause, Hint, RestoreError, as_python
from orbax_nnx_handler.planning.core.leaves import StoredLeaf, WantedLeaf
from orbax_nnx_handler.planning.core.paths import Path, spelled
from orbax_nnx_handler.planning.core.recipes import reads, render_reads
from orbax_nnx_handler.planning.diagnosis.explanation import Explanation
from orbax_nnx_handler.planning.verdict.outcomes import Mismatched, Missing, Restored, Verdict


def to_dict(verdict: Verdict, explanation: Explanation) -> dict[str, Any]:
    """Returns a verdict and its explanation as plain dicts, lists, strings and numbers."""
    return {
        "directory": verdict.directory,
        "layout": verdict.layout,
        "stored_leaves": verdict.stored_count,
        "fits": not explanation.problems,
        "restored": [_restored(item) for item in verdict.restored.values()],
        "missing": [_missing(item) for item in verdict.missing.values()],
        "mismatched": [_mismatched(item) for item in verdict.mismatched.values()],
        "defaulted": [
            _leaf(item.wanted) | {"source": item.source, "reason": item.reason}
            for item in verdict.defaulted.values()
        ],
        "unexpected": _stored(verdict.unexpected),
        "skipped": _stored(verdict.skipped),
        "dropped": [{"path": spelled(path), "reason": item.reason} for path, item in verdict.dropped.items()],
        "faults": [_fault(fault) for fault in verdict.faults],
        "causes": [_cause(cause) for cause in explanation.causes],
        "hints": [_hint(hint) for hint in explanation.hints],
    }


def error_to_dict(error: RestoreError) -> dict[str, Any]:
    """Returns an error with its paths and its ways out as plain dicts, lists and strings."""
    return {
        "type": type(error).__name__,
        "message": str(error),
        "paths": [spelled(path) for path in error.paths],
        "hints": [_hint(hint) for hint in error.hints],
    }


def _fault(fault: RestoreError) -> dict[str, Any]:
    return {"kind": type(fault).__name__, "message": str(fault), "paths": [spelled(p) for p in fault.paths]}


def _cause(cause: Cause) -> dict[str, Any]:
    return {
        "kind": cause.kind,
        "cause": cause.text,
        "hint": cause.hint.words,
        "paths": [spelled(path) for path in cause.paths],
        "facts": {name: _plain(fact) for name, fact in cause.facts.items()},
    }


def _hint(hint: Hint) -> dict[str, Any]:
    """Returns a way out with the arguments that it proposes, each as Python to paste."""
    return {
        "words": hint.words,
        "arguments": {name: as_python(value) for name, value in hint.arguments.items()},
    }


def _plain(fact: Any) -> Any:
    return [_plain(part) for part in cast("list[Any]", fact)] if isinstance(fact, list | tuple) else fact


def _restored(item: Restored) -> dict[str, Any]:
    return _leaf(item.wanted) | {
        "stored": [spelled(source) for source in dict.fromkeys(reads(item.recipe))],
        "stored_dtype": str(item.stored_dtype),
        "result_dtype": str(item.dtype),
        "transform": item.transform,
        "evidence": dataclasses.asdict(item.evidence),
    }


def _missing(item: Missing) -> dict[str, Any]:
    return _leaf(item.wanted) | {
        "policy": item.policy,
        "filled_by": item.filled_by,
        "layers": list(item.layers),
    }


def _mismatched(item: Mismatched) -> dict[str, Any]:
    return _leaf(item.wanted) | {
        "kind": item.kind,
        "stored": render_reads(item.recipe),
        "stored_shape": list(item.stored_shape),
        "stored_dtype": item.stored_dtype,
        "detail": item.detail,
    }


def _stored(leaves: Mapping[Path, StoredLeaf]) -> list[dict[str, Any]]:
    return [_leaf(leaf) for leaf in leaves.values()]


def _leaf(leaf: WantedLeaf | StoredLeaf) -> dict[str, Any]:
    return {"path": spelled(leaf.path), "shape": list(leaf.shape), "dtype": str(leaf.dtype)}
