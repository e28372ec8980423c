"""What there is to say about a plan or a report, before it becomes text, colour or HTML; as dicts too."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, cast

from orbax_nnx_handler.planning.core.errors import (
    AmbiguousMappingError,
    Cause,
    Hint,
    RestoreError,
    RuleError,
    ShapeMismatchError,
    ShardingMismatchError,
    UnreadableLeafError,
    UnusedRuleError,
    as_python,
)
from orbax_nnx_handler.planning.core.folding import Folded, Row, fold
from orbax_nnx_handler.planning.core.leaves import StoredLeaf, WantedLeaf
from orbax_nnx_handler.planning.core.lines import Line, Sentence, counted, lines_of, rated, sized
from orbax_nnx_handler.planning.core.paths import Path, printable, spelled
from orbax_nnx_handler.planning.core.recipes import reads, render_reads
from orbax_nnx_handler.planning.diagnosis import Explanation
from orbax_nnx_handler.planning.verdict.outcomes import (
    Mismatched,
    Missing,
    Restored,
    Verdict,
    defaulted_rows,
    dropped_rows,
    mismatched_rows,
    missing_rows,
    restored_rows,
    stored_rows,
)

Part = Literal["restored", "filled", "missing", "unexpected"]

COLOURS: dict[Part, str] = {
    "restored": "#2e7d32",
    "filled": "#1565c0",
    "missing": "#c62828",
    "unexpected": "#9e9e9e",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByteCounts:
    """Bytes of each part; mismatched leaves count as missing, defaulted ones as filled."""

    restored: int
    filled: int
    missing: int
    unexpected: int

    @classmethod
    def of(cls, verdict: Verdict) -> "ByteCounts":
        """Returns the shares of a verdict."""
        open_ = [
            item for item in verdict.missing.values() if item.policy == "error" or item.filled_by is None
        ]
        settled = [
            item for item in verdict.missing.values() if item.policy != "error" and item.filled_by is not None
        ]
        return cls(
            restored=_bytes(item.wanted for item in verdict.restored.values()),
            filled=_bytes(item.wanted for item in (*settled, *verdict.defaulted.values())),
            missing=_bytes(item.wanted for item in (*open_, *verdict.mismatched.values())),
            unexpected=_bytes(verdict.unexpected.values()),
        )

    def parts(self) -> list[tuple[Part, int]]:
        """Returns the parts that are not empty, with their bytes."""
        every: list[tuple[Part, int]] = [
            ("restored", self.restored),
            ("filled", self.filled),
            ("missing", self.missing),
            ("unexpected", self.unexpected),
        ]
        return [(part, nbytes) for part, nbytes in every if nbytes]


def _bytes(leaves: Iterable[WantedLeaf | StoredLeaf]) -> int:
    return sum(leaf.nbytes for leaf in leaves)


ListKind = Literal[
    "restored", "defaulted", "skipped", "dropped", "unexpected", "missing", "filled", "mismatched"
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeafList:
    """A titled list of folded rows.

    Attributes:
        kind: What the rows are.
        title: The same in words.
        count: Leaves, before folding.
        lines: The folded rows.
    """

    kind: ListKind
    title: str
    count: int
    lines: Sequence[Folded]

    @property
    def is_wrong(self) -> bool:
        """Whether a reader has to see the rows."""
        return self.kind in ("missing", "filled", "mismatched", "unexpected")

    def cells(self, limit: int) -> list[tuple[str, ...]]:
        """Returns the cells of the first rows, without the columns that are empty in all of them."""
        shown = [(line.text, *line.columns) for line in self.lines[:limit]]
        width = max(map(len, shown))
        shown = [(*cells, *[""] * (width - len(cells))) for cells in shown]
        used = [at for at in range(width) if any(cells[at] for cells in shown)]
        return [tuple(cells[at] for at in used) for cells in shown]

    def left_out(self, limit: int) -> int:
        """Returns how many leaves the rows after the first ones stand for."""
        return sum(line.count for line in self.lines[limit:])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """A plan or a report, ready to be shown.

    Attributes:
        head: One line: what it is, and the verdict or what was done.
        is_good: Whether it fits, or was done.
        counts: One line: how many leaves of each kind.
        checkpoint: One line: where it is and how it is arranged.
        blocks: The lists that are not empty.
        faults: What is wrong and no list shows.
        advice: Stored leaves that may be meant, causes and ways out.
        share: The bytes of each part.
    """

    head: str
    is_good: bool
    counts: str
    checkpoint: str
    blocks: tuple[LeafList, ...]
    share: ByteCounts
    faults: Sequence[Line] = ()
    advice: Sequence[Line] = ()

    @property
    def reasons(self) -> list[Line]:
        """The faults, causes and ways out: what a screen shows before any list."""
        return [*self.faults, *(line for line in self.advice if isinstance(line, Sentence))]

    @property
    def meant(self) -> list[Line]:
        """The rows of the advice: stored leaves that may be meant."""
        return [line for line in self.advice if not isinstance(line, Sentence)]


def plan_summary(verdict: Verdict, explanation: Explanation) -> Summary:
    """Returns what there is to say about a verdict."""
    fits = not explanation.problems
    return Summary(
        head="RestorePlan: fits" if fits else "RestorePlan: does not fit",
        is_good=fits,
        counts=_counts(verdict, "missing"),
        checkpoint=_checkpoint(verdict),
        blocks=_blocks(verdict, "missing", "missing: wanted, but not stored"),
        share=ByteCounts.of(verdict),
        # An ambiguous mapping, a rule without effect, a sharding that divides no leaf.
        faults=[line for fault in verdict.faults for line in lines_of(fault)],
        advice=_notes(verdict, explanation.causes) if fits else explanation.advice,
    )


def _notes(verdict: Verdict, causes: Iterable[Cause]) -> list[Line]:
    notes: list[Line] = []
    for cause in causes:
        notes += [Sentence("note", cause.text), Sentence("hint", cause.hint.words)]
    if verdict.missing and not verdict.restored:
        notes += [
            Sentence("note", "nothing of the checkpoint is used: a policy fills every leaf."),
            Sentence("hint", 'policy="error" says what keeps checkpoint and target apart.'),
        ]
    return notes


def report_summary(verdict: Verdict, seconds: float, nbytes: int) -> Summary:
    """Returns what there is to say about a restore."""
    return Summary(
        head=f"RestoreReport: {sized(nbytes)} in {seconds:.2f} s ({rated(nbytes, seconds)})",
        is_good=True,
        counts=_counts(verdict, "filled"),
        checkpoint=_checkpoint(verdict),
        blocks=_blocks(verdict, "filled", "filled"),
        share=ByteCounts.of(verdict),
    )


def _counts(verdict: Verdict, missing: str) -> str:
    parts = [
        f"{len(verdict.restored)} restored",
        f"{len(verdict.defaulted)} defaulted",
        f"{len(verdict.missing)} {missing}",
        f"{len(verdict.mismatched)} mismatched",
        f"{len(verdict.unexpected)} unexpected",
    ]
    parts += [f"{len(verdict.skipped)} skipped"] if verdict.skipped else []
    parts += [f"{len(verdict.dropped)} dropped"] if verdict.dropped else []
    for kind, words in _FAULTS.items():
        count = sum(_size(fault) for fault in verdict.faults if isinstance(fault, kind))
        parts += [counted(count, *words)] if count else []
    return ", ".join(parts)


_FAULTS: Mapping[type[RestoreError], tuple[str, ...]] = {
    UnreadableLeafError: ("unreadable", "unreadable"),
    AmbiguousMappingError: ("ambiguous", "ambiguous"),
    RuleError: ("whose rule does not fit", "whose rules do not fit"),
    UnusedRuleError: ("rule without effect", "rules without effect"),
    ShardingMismatchError: ("that its sharding does not divide", "that their shardings do not divide"),
    ShapeMismatchError: ("that NNX keeps otherwise", "that NNX keeps otherwise"),
}
"""Faults that no list of leaves shows, in words behind how many."""


def _size(fault: RestoreError) -> int:
    return len(fault.rules if isinstance(fault, UnusedRuleError) else fault.paths)


def _checkpoint(verdict: Verdict) -> str:
    stored = counted(verdict.stored_count, "stored leaf", "stored leaves")
    return f"{printable(verdict.directory)} (layout: {verdict.layout}, {stored})"


def _blocks(verdict: Verdict, missing: ListKind, missing_title: str) -> tuple[LeafList, ...]:
    skipped = "skipped: stored, but of a part that the target does not ask for"
    blocks: list[tuple[ListKind, str, list[Row]]] = [
        ("restored", "restored", restored_rows(verdict.restored.values())),
        ("defaulted", "defaulted", defaulted_rows(verdict.defaulted.values())),
        ("skipped", skipped, stored_rows(verdict.skipped.values())),
        ("dropped", "dropped", dropped_rows(verdict.dropped.values())),
        ("unexpected", "unexpected: stored, but not wanted", stored_rows(verdict.unexpected.values())),
        (missing, missing_title, missing_rows(verdict.missing.values(), with_policy=True)),
        ("mismatched", "mismatched", mismatched_rows(verdict.mismatched.values())),
    ]
    return tuple(
        LeafList(kind=kind, title=title, count=len(rows), lines=fold(rows))
        for kind, title, rows in blocks
        if rows
    )


# As plain dicts.


def to_dict(verdict: Verdict, explanation: Explanation) -> dict[str, Any]:
    """Returns a verdict and its explanation as plain dicts, lists, strings and numbers, nothing cut."""
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
