"""The plan of a restore and the report on one: a verdict with its explanation, to check, print and keep."""

import dataclasses
import difflib
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from orbax_nnx_handler.planning.core.dtypes import held_dtype
from orbax_nnx_handler.planning.core.errors import Cause, RestoreError
from orbax_nnx_handler.planning.core.folding import list_paths
from orbax_nnx_handler.planning.core.leaves import total_nbytes
from orbax_nnx_handler.planning.core.lines import aligned, counted, rated, sized
from orbax_nnx_handler.planning.core.paths import Path, spelled
from orbax_nnx_handler.planning.diagnosis import Explanation
from orbax_nnx_handler.planning.layouts.layout import Stored
from orbax_nnx_handler.planning.options import Policy, RestoreOptions, check_policy
from orbax_nnx_handler.planning.rendering import Displayed
from orbax_nnx_handler.planning.rendering.summary import Summary, plan_summary, report_summary, to_dict
from orbax_nnx_handler.planning.target import Target
from orbax_nnx_handler.planning.verdict import judge
from orbax_nnx_handler.planning.verdict.leaf_verdicts import Unreadable
from orbax_nnx_handler.planning.verdict.outcomes import (
    Defaulted,
    Missing,
    Restored,
    Verdict,
    copies_of_model,
    evidence_rows,
)


class RestorePlan(Displayed, Verdict):
    """The verdict on one checkpoint and one target, from metadata alone.

    The mappings are keyed by path: wanted paths in `restored`, `missing`,
    `mismatched` and `defaulted`, stored paths in `unexpected`, `skipped` and
    `dropped`. `print(plan)` shows it, `plan.check()` raises what is wrong with it.
    A pickled plan says the same, but for shardings and values, which stay in their process.

    ```python
    plan = plan_restore(path, target)
    print(plan)
    for path, item in plan.restored.items():
        print(path, item.wanted.shape, item.wanted.dtype, item.recipe)
    plan.check()
    ```
    """

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @cached_property
    def _explanation(self) -> Explanation:
        # Of a plain copy: a plan that held itself would wait for the collector with all its leaves.
        return Explanation(Verdict(**self.__getstate__()))

    @property
    def causes(self) -> tuple[Cause, ...]:
        """Why it does not fit, as far as there is evidence."""
        return self._explanation.causes

    @property
    def fits(self) -> bool:
        """Whether `check` would pass."""
        return not self._explanation.problems

    def error(self) -> RestoreError | None:
        """Returns the one error that lists every problem, or None."""
        return self._explanation.error()

    def check(self, policy: Policy | None = None) -> None:
        """Raises if the restore must fail.

        Args:
            policy: Judges missing weights by this policy instead of the plan's own.

        Raises:
            RestoreError: The one error that lists every problem; its type is the
                problem's, and several types at once where several kinds occur.
        """
        if policy is not None:
            check_policy(policy)
        plan = self if policy is None else self.under(policy)
        error = plan.error()
        if error is not None:
            raise error

    def evidence(self) -> str:
        """Returns what each restored leaf rests on, like leaves folded into one line.

        ```python
        print(plan.evidence())
        # model/blocks/{0..31}/mlp/kernel  layer i of blocks, axis 0: its shape allows no other
        ```
        """
        return aligned(evidence_rows(self.restored.values()), indent="")

    def to_dict(self) -> dict[str, Any]:
        """Returns the whole plan as plain dicts, lists, strings and numbers."""
        return to_dict(self, self._explanation)

    @property
    def _summary(self) -> Summary:
        return plan_summary(self, self._explanation)


def make_plan(
    target: Target,
    stored: Stored,
    options: RestoreOptions,
    *,
    directory: str = "",
    overrides: Mapping[Path, Policy] | None = None,
    broken: Unreadable | None = None,
) -> RestorePlan:
    """Returns the verdict of `judge`, which takes the same arguments, as a plan."""
    verdict = judge(target, stored, options, directory=directory, overrides=overrides, broken=broken)
    return RestorePlan(**{field.name: getattr(verdict, field.name) for field in dataclasses.fields(verdict)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class RestoreReport(Displayed):
    """Every leaf of a result with its one origin.

    ```python
    handler = NNXLinenHandler()
    with ocp.CheckpointManager(path, item_handlers=handler) as manager:
        manager.restore(1200, args=NNXLinenRestore(target))
    print(handler.report)  # the same as text, in a notebook as a table
    print(handler.report.origin(("optimizer", "step")))
    ```

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
            plan=plan, seconds=seconds, nbytes=total_nbytes(item.wanted for item in plan.restored.values())
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

    def evidence(self) -> str:
        """Returns what each restored leaf rests on, as `RestorePlan.evidence` does."""
        return self.plan.evidence()

    def origin(self, path: Path | str) -> Restored | Missing | Defaulted:
        """Returns where one leaf came from.

        ```python
        print(handler.report.origin("model/head/kernel").transform)
        ```

        Args:
            path: The leaf's keys, or its path as plans and reports print it.

        Raises:
            KeyError: The target has no such leaf; names those whose paths are nearest.
        """
        parts: dict[Path, Restored | Missing | Defaulted]
        parts = {**self.restored, **self.filled, **self.defaulted}
        same = [own for own in parts if path in (own, spelled(own))]
        if len(same) == 1:
            return parts[same[0]]
        asked = path if isinstance(path, str) else spelled(path)
        near = same or difflib.get_close_matches(asked, map(spelled, parts), n=3)
        more = f"; the nearest: {', '.join(map(str, near))}" if near else ""
        raise KeyError(f"the target has no leaf {asked}{more}")

    @property
    def summary(self) -> str:
        """One line: leaves, bytes, seconds, rate, layout, place."""
        leaves = counted(len(self.restored), "leaf", "leaves")
        return (
            f"restored {leaves} ({sized(self.nbytes)}) in {self.seconds:.2f} s "
            f"({rated(self.nbytes, self.seconds)}), filled {len(self.filled)}, "
            f"defaulted {len(self.defaulted)}, {len(self.plan.unexpected)} unexpected; "
            f"layout {self.plan.layout}; "
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
        count = counted(sum(map(len, paths.values())), "missing weight was", "missing weights were")
        return f"{count} initialised, {'; '.join(parts)}" if parts else ""

    @property
    def warning(self) -> str:
        """What a reader of logs should know, with every path; empty for nothing."""
        zeroed = [path for path, item in self.filled.items() if item.policy == "warn"]
        parts: list[str] = []
        if zeroed:
            parts.append(
                f"{counted(len(zeroed), 'missing weight was', 'missing weights were')} filled with zeros: "
                f"{list_paths(zeroed)}"
            )
        if self.plan.unexpected and self.plan.unexpected_policy == "warn":
            count = counted(len(self.plan.unexpected), "stored leaf was", "stored leaves were")
            parts.append(f"{count} not wanted: {list_paths(self.plan.unexpected)}")
        copies = copies_of_model(self.plan.unexpected, self.plan.restored)
        if copies and self.plan.unexpected_policy == "warn":
            parts.append(f"a copy of the model is stored beside it and was not wanted: {', '.join(copies)}")
        shortened = [path for path, item in self.restored.items() if _is_shortened(item)]
        if shortened:
            count = counted(
                len(shortened), "leaf is stored in 64 bits and comes", "leaves are stored in 64 bits and come"
            )
            parts.append(f"{count} back in 32, set jax_enable_x64 to keep them: {list_paths(shortened)}")
        # Random state that is stored is not begun anew in silence (law 10).
        unread = (*self.plan.unexpected.values(), *self.plan.skipped.values()) if self.defaulted else ()
        if any(leaf.key_impl for leaf in unread):
            parts += [
                cause.text.removesuffix(".") for cause in self.plan.causes if cause.kind == "RandomLayout"
            ]
        return "; ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as plain dicts, lists, strings and numbers."""
        return {"seconds": self.seconds, "bytes": self.nbytes, **self.plan.to_dict()}

    @property
    def _summary(self) -> Summary:
        return report_summary(self.plan, self.seconds, self.nbytes)


def _is_shortened(item: Restored) -> bool:
    """Tells an array of 64-bit floats that JAX cannot hold; single numbers are a program's settings."""
    lost = item.cast == "narrower" and held_dtype(item.stored_dtype) != item.stored_dtype
    return lost and bool(item.wanted.shape)
