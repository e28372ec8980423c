"""Causes that are a matter of how the same numbers are arranged in arrays; each comes with the rules."""

import dataclasses

from orbax_nnx_handler.planning.diagnosis.causes import Cause, counted, listed
from orbax_nnx_handler.planning.leaves import Shape

_RULES = 8
"""Rules that a hint writes out; more of them are a matter for `suggest` or a loop."""


def _renames(rules: tuple[str, ...]) -> str:
    if len(rules) <= _RULES:
        return f"renames=[{', '.join(rules)}]"
    return f"{len(rules)} such rules in renames, of which the first is {rules[0]}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AxesPermuted(Cause):
    """Weights are stored with their axes in another order.

    Attributes:
        stored: The stored shape of one of them.
        wanted: The wanted shape of it.
        count: How many.
        rules: What puts the axes right, as Python.
        swapped: Two names that may have been exchanged instead; empty if none fit.
    """

    stored: Shape
    wanted: Shape
    count: int
    rules: tuple[str, ...]
    swapped: tuple[str, ...] = ()

    def _cause(self) -> str:
        weights = "1 weight is" if self.count == 1 else f"{self.count} weights are"
        # Both readings give the same shapes: only the writer knows.
        other = f", or {listed(map(repr, self.swapped))} carry each other's names" if self.swapped else ""
        return f"{weights} stored with the axes in another order ({self.stored} for {self.wanted}){other}."

    def _way(self) -> str:
        turned = f"pass {_renames(self.rules)}"
        if not self.swapped:
            return f"{turned}."
        one, other = self.swapped
        return f"{turned} for the first, renames=[{(one, other)!r}, {(other, one)!r}] for the second."


@dataclasses.dataclass(frozen=True, kw_only=True)
class AxesMerged(Cause):
    """Weights have neighbouring axes as one on one side: heads and head size, mostly.

    Attributes:
        stored: The stored shape of one of them.
        wanted: The wanted shape of it.
        count: How many.
        rules: What gives them the wanted shape, as Python.
    """

    stored: Shape
    wanted: Shape
    count: int
    rules: tuple[str, ...]

    def _cause(self) -> str:
        weights = "1 weight has" if self.count == 1 else f"{self.count} weights have"
        side = "in the checkpoint" if len(self.stored) < len(self.wanted) else "in the target"
        return (
            f"{weights} neighbouring axes merged into one {side} ({self.stored} for {self.wanted}): "
            "the same number of elements."
        )

    def _way(self) -> str:
        return f"if the elements are in the same order, pass {_renames(self.rules)}."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fused(Cause):
    """Several weights of one module are one array on one side.

    Attributes:
        whole: The name of the one.
        parts: The names of the several.
        side: Where they are one: `checkpoint` or `target`.
        shape: The shape of the one.
        part_shape: The shape of the first of the several.
        count: How many times in the model.
        rules: What takes them apart or joins them, as Python.
        ordered: Whether the name of the one tells the order (`qkv`).
    """

    whole: str
    parts: tuple[str, ...]
    side: str
    shape: Shape
    part_shape: Shape
    count: int
    rules: tuple[str, ...]
    ordered: bool

    def _cause(self) -> str:
        other = "target" if self.side == "checkpoint" else "checkpoint"
        times = f", in {counted(self.count, 'module')}" if self.count > 1 else ""
        parts = listed(map(repr, self.parts))
        return (
            f"{parts} are one array {self.whole!r} in the {self.side} {self.shape} and "
            f"{len(self.parts)} in the {other} {self.part_shape}{times}."
        )

    def _way(self) -> str:
        order = "" if self.ordered else " (in the order in which they were joined, which no metadata tells)"
        return f"pass {_renames(self.rules)}{order}."
