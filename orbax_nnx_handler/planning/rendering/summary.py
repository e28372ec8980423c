"""What there is to say about a plan or a report, before it becomes text, colour or HTML."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal

from orbax_nnx_handler.planning.core.leaves import StoredLeaf, WantedLeaf
from orbax_nnx_handler.planning.diagnosis.cause import Cause, counted
from orbax_nnx_handler.planning.diagnosis.explanation import Explanation
from orbax_nnx_handler.planning.text.folding import Folded, Row, fold
from orbax_nnx_handler.planning.verdict.outcomes import Verdict
from orbax_nnx_handler.planning.verdict.rows import (
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


def sized(nbytes: int) -> str:
    """Returns bytes as a person writes them, in powers of ten: `1.50 GB`."""
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.2f} {unit}"
    return f"{nbytes} B"


def rated(nbytes: int, seconds: float) -> str:
    """Returns how fast bytes were restored: `3.21 GB/s`."""
    return f"{nbytes / max(seconds, 1e-9) / 1e9:.2f} GB/s"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """A titled list of folded rows.

    Attributes:
        title: What the rows have in common.
        count: Leaves, before folding.
        lines: The folded rows.
    """

    title: str
    count: int
    lines: Sequence[Folded]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """A plan or a report, ready to be shown.

    Attributes:
        head: One line: what it is, and the verdict or what was done.
        counts: One line: how many leaves of each kind.
        checkpoint: One line: where it lies and how it is arranged.
        sections: The lists that are not empty.
        advice: Faults that no list shows, causes and ways out; empty for a plan that fits.
        share: The bytes of each part.
    """

    head: str
    counts: str
    checkpoint: str
    sections: tuple[Block, ...]
    advice: tuple[str, ...]
    share: ByteCounts


def plan_summary(verdict: Verdict, explanation: Explanation) -> Summary:
    """Returns what there is to say about a verdict."""
    fits = not explanation.problems
    notes = _notes(verdict, explanation.causes) if fits else _faults(verdict, explanation)
    return Summary(
        head="RestorePlan: fits" if fits else "RestorePlan: does not fit",
        counts=_counts(verdict, "missing"),
        checkpoint=_checkpoint(verdict),
        sections=_sections(verdict, "missing: wanted, but not stored"),
        advice=tuple(notes),
        share=ByteCounts.of(verdict),
    )


def _notes(verdict: Verdict, causes: Iterable[Cause]) -> list[str]:
    notes = [f"note: {cause.cause}\nhint: {cause.hint}" for cause in causes]
    if verdict.missing and not verdict.restored:
        notes.append(
            "note: nothing of the checkpoint is used: a policy fills every leaf.\n"
            'hint: policy="error" says what keeps checkpoint and target apart.'
        )
    return notes


def _faults(verdict: Verdict, explanation: Explanation) -> list[str]:
    # What no list shows: an ambiguous mapping, a rule without effect, a sharding that divides no leaf.
    return [*(line for fault in verdict.faults for line in str(fault).splitlines()), *explanation.advice]


def report_summary(verdict: Verdict, seconds: float, nbytes: int) -> Summary:
    """Returns what there is to say about a restore."""
    return Summary(
        head=f"RestoreReport: {sized(nbytes)} in {seconds:.2f} s ({rated(nbytes, seconds)})",
        counts=_counts(verdict, "filled"),
        checkpoint=_checkpoint(verdict),
        sections=_sections(verdict, "filled"),
        advice=(),
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
    return ", ".join(parts)


def _checkpoint(verdict: Verdict) -> str:
    stored = counted(verdict.stored_count, "stored leaf", "stored leaves")
    return f"{verdict.directory} (layout: {verdict.layout}, {stored})"


def _sections(verdict: Verdict, missing: str) -> tuple[Block, ...]:
    lists: list[tuple[str, list[Row]]] = [
        ("restored", restored_rows(verdict.restored.values())),
        ("defaulted", defaulted_rows(verdict.defaulted.values())),
        (
            "skipped: stored, but of a part that the target does not ask for",
            stored_rows(verdict.skipped.values()),
        ),
        ("dropped", dropped_rows(verdict.dropped.values())),
        ("unexpected: stored, but not wanted", stored_rows(verdict.unexpected.values())),
        (missing, missing_rows(verdict.missing.values(), with_policy=True)),
        ("mismatched", mismatched_rows(verdict.mismatched.values())),
    ]
    return tuple(Block(title=title, count=len(rows), lines=fold(rows)) for title, rows in lists if rows)
