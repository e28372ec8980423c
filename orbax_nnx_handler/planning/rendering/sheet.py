"""How the bytes of a target divide: restored, filled, missing; and what is stored beside them.

What there is to say about a plan or a report, before it becomes text, colour or HTML.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal

from orbax_nnx_handler.planning.core.leaves import StoredLeaf, WantedLeaf
from orbax_nnx_handler.planning.diagnosis.cause import counted
from orbax_nnx_handler.planning.diagnosis.error import advice
from orbax_nnx_handler.planning.plan import RestorePlan, RestoreReport
from orbax_nnx_handler.planning.text.folding import Folded, Row, fold
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
    def of(cls, plan: RestorePlan) -> "ByteCounts":
        """Returns the shares of a plan."""
        open_ = [item for item in plan.missing.values() if item.policy == "error" or item.filled_by is None]
        settled = [
            item for item in plan.missing.values() if item.policy != "error" and item.filled_by is not None
        ]
        return cls(
            restored=_bytes(item.wanted for item in plan.restored.values()),
            filled=_bytes(item.wanted for item in (*settled, *plan.defaulted.values())),
            missing=_bytes(item.wanted for item in (*open_, *plan.mismatched.values())),
            unexpected=_bytes(plan.unexpected.values()),
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


def plan_sheet(plan: RestorePlan) -> Summary:
    """Returns what there is to say about a plan."""
    fits = plan.fits
    notes = _notes(plan) if fits else _faults(plan)
    return Summary(
        head="RestorePlan: fits" if fits else "RestorePlan: does not fit",
        counts=_counts(plan, "missing"),
        checkpoint=_checkpoint(plan),
        sections=_sections(plan, "missing: wanted, but not stored"),
        advice=tuple(notes),
        share=ByteCounts.of(plan),
    )


def _notes(plan: RestorePlan) -> list[str]:
    notes = [f"note: {cause.cause}\nhint: {cause.hint}" for cause in plan.causes]
    if plan.missing and not plan.restored:
        notes.append(
            "note: nothing of the checkpoint is used: a policy fills every leaf.\n"
            'hint: policy="error" says what keeps checkpoint and target apart.'
        )
    return notes


def _faults(plan: RestorePlan) -> list[str]:
    # What no list shows: an ambiguous mapping, a rule without effect, a sharding that divides no leaf.
    return [*(line for fault in plan.faults for line in str(fault).splitlines()), *advice(plan)]


def report_sheet(report: RestoreReport) -> Summary:
    """Returns what there is to say about a restore."""
    rate = report.nbytes / max(report.seconds, 1e-9) / 1e9
    return Summary(
        head=f"RestoreReport: {sized(report.nbytes)} in {report.seconds:.2f} s ({rate:.2f} GB/s)",
        counts=_counts(report.plan, "filled"),
        checkpoint=_checkpoint(report.plan),
        sections=_sections(report.plan, "filled"),
        advice=(),
        share=ByteCounts.of(report.plan),
    )


def _counts(plan: RestorePlan, missing: str) -> str:
    parts = [
        f"{len(plan.restored)} restored",
        f"{len(plan.defaulted)} defaulted",
        f"{len(plan.missing)} {missing}",
        f"{len(plan.mismatched)} mismatched",
        f"{len(plan.unexpected)} unexpected",
    ]
    parts += [f"{len(plan.skipped)} skipped"] if plan.skipped else []
    parts += [f"{len(plan.dropped)} dropped"] if plan.dropped else []
    return ", ".join(parts)


def _checkpoint(plan: RestorePlan) -> str:
    stored = counted(plan.stored_count, "stored leaf", "stored leaves")
    return f"{plan.directory} (layout: {plan.layout}, {stored})"


def _sections(plan: RestorePlan, missing: str) -> tuple[Block, ...]:
    lists: list[tuple[str, list[Row]]] = [
        ("restored", restored_rows(plan.restored.values())),
        ("defaulted", defaulted_rows(plan.defaulted.values())),
        (
            "skipped: stored, but of a part that the target does not ask for",
            stored_rows(plan.skipped.values()),
        ),
        ("dropped", dropped_rows(plan.dropped.values())),
        ("unexpected: stored, but not wanted", stored_rows(plan.unexpected.values())),
        (missing, missing_rows(plan.missing.values(), with_policy=True)),
        ("mismatched", mismatched_rows(plan.mismatched.values())),
    ]
    return tuple(Block(title=title, count=len(rows), lines=fold(rows)) for title, rows in lists if rows)
