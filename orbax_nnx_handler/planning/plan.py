"""The plan: what each wanted leaf will be, and what the checkpoint holds beside it."""

import dataclasses
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from orbax_nnx_handler.planning.dtypes import Cast
from orbax_nnx_handler.planning.errors import RestoreError
from orbax_nnx_handler.planning.evidence import Evidence
from orbax_nnx_handler.planning.leaves import Shape, StoredLeaf, WantedLeaf
from orbax_nnx_handler.planning.paths import Path
from orbax_nnx_handler.planning.policies import Policy
from orbax_nnx_handler.planning.recipes import Recipe, describe

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

    from orbax_nnx_handler.planning.diagnosis.causes import Cause

UnexpectedPolicy = Literal["error", "warn", "ignore"]
DefaultSource = Literal["target", "init", "seed", "zeros"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restored:
    """A leaf that comes from disk.

    Attributes:
        wanted: The leaf.
        recipe: The stored leaves and the transform.
        stored_dtype: The dtype on disk.
        dtype: The dtype in the result.
        cast: What the cast does; `count` is checked to fit when it is read.
        reason: The rule or module structure behind the mapping; empty for the path itself.
    """

    wanted: WantedLeaf
    recipe: Recipe
    stored_dtype: np.dtype[Any]
    dtype: np.dtype[Any]
    cast: Cast
    reason: str = ""

    @property
    def transform(self) -> str:
        """What is done to the stored value, in a few words; empty for nothing."""
        cast = "" if self.cast == "same" else f"cast {self.stored_dtype} to {self.dtype}"
        return ", ".join(part for part in (self.reason, describe(self.recipe), cast) if part)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Missing:
    """A weight that the checkpoint lacks, whole or in some layers.

    Attributes:
        wanted: The leaf.
        policy: What is to become of it.
        filled_by: Where an initial value comes from; None where `init` has no source.
        layers: The layers that are missing; empty if the whole leaf is.
        recipe: How to make the layers that are stored, with `Fill` for the others.
    """

    wanted: WantedLeaf
    policy: Policy
    filled_by: DefaultSource | None = None
    layers: tuple[int, ...] = ()
    recipe: Recipe | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mismatched:
    """A leaf whose stored counterpart cannot become it.

    Attributes:
        wanted: The leaf.
        recipe: What it was mapped to.
        kind: What differs.
        stored_shape: The shape that the recipe gives.
        stored_dtype: The stored dtype; the implementation's name for keys.
        detail: One more fact where shapes and dtypes do not say it all.
        surplus: How many layers the stored group has more than the wanted one.
        reason: The rule or structure that made it what it is; empty for none.
    """

    wanted: WantedLeaf
    recipe: Recipe
    kind: Literal["shape", "dtype", "key"]
    stored_shape: Shape
    stored_dtype: str
    detail: str = ""
    surplus: int = 0
    reason: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Defaulted:
    """State that a Linen layout never holds: random state, caches, intermediates."""

    wanted: WantedLeaf
    source: DefaultSource
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dropped:
    """A stored value that NNX has no home for; it must be zero."""

    leaf: StoredLeaf
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Discarded:
    """A stored value that a rule of the user's leaves behind, whatever it is."""

    leaf: StoredLeaf
    reason: str


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
    evidence: Evidence = dataclasses.field(default_factory=Evidence, repr=False)

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
        from orbax_nnx_handler.planning.verdict import problems_of

        return not problems_of(self)

    def error(self) -> RestoreError | None:
        """Returns the one error that lists every problem, or None."""
        from orbax_nnx_handler.planning.verdict import error_of

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
