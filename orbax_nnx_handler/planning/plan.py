"""The plan: what each wanted leaf will be, and what the checkpoint holds beside it.

What a restore really did, leaf by leaf.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from orbax_nnx_handler.planning.core.errors import RestoreError
from orbax_nnx_handler.planning.core.leaves import StoredLeaf
from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.mapping.matches import Discarded, Dropped
from orbax_nnx_handler.planning.options import Policy, UnexpectedPolicy
from orbax_nnx_handler.planning.text.folding import list_paths
from orbax_nnx_handler.planning.verdict.outcomes import Defaulted, Mismatched, Missing, Restored, Sides

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

    from orbax_nnx_handler.planning.diagnosis.cause import Cause


@dataclasses.dataclass(frozen=True, kw_only=True)
class RestorePlan:
    """The verdict on one checkpoint and one target, from metadata alone.

    The mappings are keyed by path: wanted paths in `restored`, `missing`,
    `mismatched` and `defaulted`, stored paths in `unexpected`, `skipped` and
    `dropped`. `print(plan)` shows it, `plan.check()` raises what is wrong with it.

    Attributes:
        directory: The item directory.
        layout: Title of the layout it was read under.
        stored_count: Leaves in the checkpoint.
        restored: Leaves that come from disk.
        missing: Weights that the checkpoint lacks.
        mismatched: Leaves whose shape, dtype or key differs.
        defaulted: State that a Linen layout never holds.
        unexpected: Stored leaves that the target does not want.
        skipped: Stored leaves of parts the target does not ask for (an optimizer).
        dropped: Stored values that NNX has no home for, and those that the user's rules drop.
        unexpected_policy: What to do about unexpected leaves.
        faults: Errors that no single leaf has: ambiguous mappings.
        evidence: Both sides as the planner saw them, for the diagnosis.
    """

    directory: str
    layout: str
    stored_count: int
    restored: Mapping[Path, Restored]
    missing: Mapping[Path, Missing]
    mismatched: Mapping[Path, Mismatched]
    defaulted: Mapping[Path, Defaulted]
    unexpected: Mapping[Path, StoredLeaf]
    skipped: Mapping[Path, StoredLeaf]
    dropped: Mapping[Path, Dropped | Discarded]
    unexpected_policy: UnexpectedPolicy = "warn"
    faults: tuple[RestoreError, ...] = ()
    evidence: Sides = dataclasses.field(default_factory=Sides, repr=False)

    @property
    def wanted_count(self) -> int:
        """How many leaves the target has."""
        return len(self.restored) + len(self.missing) + len(self.mismatched) + len(self.defaulted)

    @cached_property
    def causes(self) -> "tuple[Cause, ...]":
        """Why it does not fit, as far as there is evidence; see `planning.diagnosis`."""
        from orbax_nnx_handler.planning.diagnosis import diagnose

        return diagnose(self)

    @property
    def fits(self) -> bool:
        """Whether `check` would pass."""
        from orbax_nnx_handler.planning.diagnosis.error import problems_of

        return not problems_of(self)

    def error(self) -> RestoreError | None:
        """Returns the one error that lists every problem, or None."""
        from orbax_nnx_handler.planning.diagnosis.error import error_of

        return error_of(self)

    def check(self, policy: Policy | None = None) -> None:
        """Raises if the restore must fail.

        Args:
            policy: Judges missing weights by this policy instead of the plan's own.

        Raises:
            RestoreError: The one error that lists every problem; its type is the
                problem's, and several types at once where several kinds occur.
        """
        plan = self if policy is None else self.under(policy)
        error = plan.error()
        if error is not None:
            raise error

    def under(self, policy: Policy) -> "RestorePlan":
        """Returns the plan with every missing weight under another policy."""
        changed = {path: dataclasses.replace(item, policy=policy) for path, item in self.missing.items()}
        return dataclasses.replace(self, missing=changed)

    def to_dict(self) -> dict[str, Any]:
        """Returns the whole plan as plain dicts, lists, strings and numbers."""
        from orbax_nnx_handler.planning.rendering import plan_to_dict

        return plan_to_dict(self)

    def __str__(self) -> str:
        from orbax_nnx_handler.planning.rendering import render_plan

        return render_plan(self)

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "Iterable[RenderableType]":
        from orbax_nnx_handler.planning.rendering import plan_sheet, sheet_on_console

        return sheet_on_console(plan_sheet(self), console, options)

    def _repr_html_(self) -> str:
        from orbax_nnx_handler.planning.rendering import plan_sheet, sheet_to_html

        return sheet_to_html(plan_sheet(self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RestoreReport:
    """Every leaf of a result with its one origin.

    Attributes:
        plan: The plan that was carried out.
        seconds: Wall time of the restore, metadata and plan included.
        nbytes: Bytes of the restored leaves in the result, over all devices once.
    """

    plan: RestorePlan
    seconds: float
    nbytes: int

    @classmethod
    def of(cls, plan: RestorePlan, seconds: float) -> "RestoreReport":
        """Returns the report of a plan that was carried out in that time."""
        return cls(
            plan=plan, seconds=seconds, nbytes=sum(item.wanted.nbytes for item in plan.restored.values())
        )

    @property
    def restored(self) -> Mapping[Path, Restored]:
        """Leaves that came from disk."""
        return self.plan.restored

    @property
    def filled(self) -> Mapping[Path, Missing]:
        """Weights that were missing, with the policy that filled them."""
        return self.plan.missing

    @property
    def defaulted(self) -> Mapping[Path, Defaulted]:
        """State that a Linen layout never holds."""
        return self.plan.defaulted

    @property
    def narrowed(self) -> Mapping[Path, Restored]:
        """Restored leaves that lost precision in a cast."""
        return {path: item for path, item in self.plan.restored.items() if item.cast == "narrower"}

    def origin(self, path: Path) -> Restored | Missing | Defaulted:
        """Returns where one leaf came from.

        Raises:
            KeyError: The target has no such leaf.
        """
        for part in (self.restored, self.filled, self.defaulted):
            if path in part:
                return part[path]
        raise KeyError(path)

    @property
    def summary(self) -> str:
        """One line: leaves, bytes, seconds, rate, layout, place."""
        from orbax_nnx_handler.planning.rendering import sized

        rate = self.nbytes / max(self.seconds, 1e-9) / 1e9
        leaves = _counted(len(self.restored), "leaf", "leaves")
        return (
            f"restored {leaves} ({sized(self.nbytes)}) in {self.seconds:.2f} s "
            f"({rate:.2f} GB/s), filled {len(self.filled)}, defaulted {len(self.defaulted)}, "
            f"{len(self.plan.unexpected)} unexpected; layout {self.plan.layout}; "
            f"from {self.plan.directory}"
        )

    @property
    def initialised(self) -> str:
        """Which missing weights were given initial values, and from where; empty for none."""
        paths: dict[str, list[Path]] = {"init": [], "target": []}
        for path, item in self.filled.items():
            if item.policy == "init" and item.filled_by in paths:
                paths[item.filled_by].append(path)
        words = {"init": "computed by init", "target": "the target's own values"}
        parts = [f"{words[source]}: {list_paths(found)}" for source, found in paths.items() if found]
        count = _counted(sum(map(len, paths.values())), "missing weight was", "missing weights were")
        return f"{count} initialised, {'; '.join(parts)}" if parts else ""

    @property
    def warning(self) -> str:
        """What a reader of logs should know, with every path; empty for nothing."""
        zeroed = [path for path, item in self.filled.items() if item.policy == "warn"]
        parts: list[str] = []
        if zeroed:
            parts.append(
                f"{_counted(len(zeroed), 'missing weight was', 'missing weights were')} filled with zeros: "
                f"{list_paths(zeroed)}"
            )
        if self.plan.unexpected and self.plan.unexpected_policy == "warn":
            count = _counted(len(self.plan.unexpected), "stored leaf was", "stored leaves were")
            parts.append(f"{count} not wanted: {list_paths(self.plan.unexpected)}")
        return "; ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as plain dicts, lists, strings and numbers."""
        from orbax_nnx_handler.planning.rendering import plan_to_dict

        return {"seconds": self.seconds, "bytes": self.nbytes, **plan_to_dict(self.plan)}

    def __str__(self) -> str:
        from orbax_nnx_handler.planning.rendering import render_sheet, report_sheet

        return render_sheet(report_sheet(self))

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "Iterable[RenderableType]":
        from orbax_nnx_handler.planning.rendering import report_sheet, sheet_on_console

        return sheet_on_console(report_sheet(self), console, options)

    def _repr_html_(self) -> str:
        from orbax_nnx_handler.planning.rendering import report_sheet, sheet_to_html

        return sheet_to_html(report_sheet(self))


def _counted(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"
