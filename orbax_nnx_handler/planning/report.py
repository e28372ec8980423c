"""What a restore really did, leaf by leaf."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from orbax_nnx_handler.planning.folding import list_paths
from orbax_nnx_handler.planning.paths import Path
from orbax_nnx_handler.planning.plan import Defaulted, Missing, Restored, RestorePlan

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType


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
