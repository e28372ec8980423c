"""Causes that are a matter of the optimizer: none saved, another one, one that is nested otherwise."""

import dataclasses
from typing import ClassVar

from orbax_nnx_handler.planning.diagnosis.causes import Cause, counted, listed


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoOptimizer(Cause):
    """The checkpoint holds no optimizer state.

    Attributes:
        moments: Optimizer leaves that the target wants.
        weights: Weights that the checkpoint gives, or None if not all of them.
        model: Where the model sits in the target; empty at its root.
    """

    moments: int
    weights: int | None
    model: str = ""
    may_begin_anew: ClassVar[bool] = True

    def _cause(self) -> str:
        found = (
            "there are weights"
            if self.weights is None
            else f"all {counted(self.weights, 'weight')} are there"
        )
        return f"no optimizer was saved: {found}, and 0 of the optimizer's {self.moments} leaves."

    def _way(self) -> str:
        return weights_alone(self.model)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OtherOptimizer(Cause):
    """The stored optimizer keeps other state than the target's.

    Attributes:
        stored: What the stored optimizer keeps, by name.
        wanted: What the target's optimizer keeps.
        kept: What of that is restored; the rest is what is missing.
        counts: How many counts are missing.
        model: Where the model sits in the target; empty at its root.
    """

    stored: tuple[str, ...]
    wanted: tuple[str, ...]
    kept: tuple[str, ...] = ()
    counts: int = 0
    model: str = ""
    may_begin_anew: ClassVar[bool] = True

    def _cause(self) -> str:
        stored = listed(self.stored) or "no moments"
        if not self.kept:
            return (
                f"the checkpoint was written with another optimizer: it keeps {stored}, "
                f"the target's keeps {listed(self.wanted)}."
            )
        new = listed(name for name in self.wanted if name not in self.kept)
        return (
            f"the target's optimizer keeps {new} as well, which the stored one does not: it keeps {stored}."
        )

    def _way(self) -> str:
        if not self.kept or not self.counts:
            return weights_alone(self.model)
        count = "a count that begins at 0 begins" if self.counts == 1 else "counts that begin at 0 begin"
        return f"{weights_alone(self.model).removesuffix('.')}; {count} a schedule anew."


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerNested(Cause):
    """The stored optimizer keeps its moments at other places than the target's.

    Attributes:
        stored: The stored places that nobody takes, folded.
        wanted: The wanted places that nothing fills, folded.
        model: Where the model sits in the target; empty at its root.
    """

    stored: str
    wanted: str
    model: str = ""
    may_begin_anew: ClassVar[bool] = True

    def _cause(self) -> str:
        return (
            f"the stored optimizer is built otherwise: its moments lie at {self.stored}, the target's at "
            f"{self.wanted}, and which of them belong together no name tells."
        )

    def _way(self) -> str:
        return weights_alone(self.model)


def weights_alone(model: str) -> str:
    """Returns the way out that leaves the optimizer aside."""
    part = f"the target's {model!r} by itself" if model else "the model by itself"
    return f"to restore the weights alone, pass {part} as target."
