"""Causes that are a matter of size: layers, dimensions, and how layers are arranged."""

import dataclasses
from typing import ClassVar

from orbax_nnx_handler.planning.diagnosis.causes import Cause, counted, listed
from orbax_nnx_handler.planning.numbered import ranges


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCount(Cause):
    """A group of layers has another length.

    Attributes:
        group: The group, as its path is written.
        stored: Layers in the checkpoint.
        wanted: Layers in the target.
        kind: What is counted: experts where the path says so.
    """

    group: str
    stored: int
    wanted: int
    kind: str = "layer"
    may_begin_anew: ClassVar[bool] = True

    def _cause(self) -> str:
        stored = counted(self.stored, self.kind)
        return f"{self.group!r} has {stored} in the checkpoint and {self.wanted} in the target."

    def _way(self) -> str:
        return f"restore into a model with {counted(self.stored, self.kind)}."


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayersAbsent(Cause):
    """Single layers of a group are not stored, though later ones are.

    Attributes:
        group: The group.
        layers: The absent layers.
        stored: How many are stored.
    """

    group: str
    layers: tuple[int, ...]
    stored: int

    def _cause(self) -> str:
        return (
            f"of {self.group!r}, {'layer' if len(self.layers) == 1 else 'layers'} {ranges(self.layers)} "
            f"{'is' if len(self.layers) == 1 else 'are'} not stored, while "
            f"{'another is' if self.stored == 1 else f'{self.stored} others are'}: the checkpoint has a hole."
        )

    def _way(self) -> str:
        layers = "this layer was" if len(self.layers) == 1 else "these layers were"
        return f"restore another step, or find out why {layers} not saved."


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScannedOnOneSide(Cause):
    """Layers are stacked on one side only, and could not be rearranged.

    Attributes:
        group: The group of layers.
        stacked: The side on which they are stacked.
        why: Why the rearrangement did not work out.
    """

    group: str
    stacked: str
    why: str

    def _cause(self) -> str:
        one, other = ("checkpoint", "target") if self.stacked == "checkpoint" else ("target", "checkpoint")
        return (
            f"the layers of {self.group!r} are stacked in the {one} and one by one in the {other}; "
            f"they could not be rearranged, since {self.why}."
        )

    def _way(self) -> str:
        return "correct the sizes first: stacking is done by itself once one layer has the wanted shape."


@dataclasses.dataclass(frozen=True, kw_only=True)
class DimensionDiffers(Cause):
    """One dimension explains several mismatches.

    Attributes:
        pairs: The dimension in the checkpoint and in the target; several that
            share one ratio.
        ratio: Target over checkpoint, as text (`2`, `1/2`).
        count: Mismatched weights that have the dimension.
        mismatches: Mismatched weights in all.
        alone: Whether the weights that have it differ in nothing else.
        name: What the dimension is, where the places it stands at tell; or empty.
    """

    pairs: tuple[tuple[int, int], ...]
    ratio: str
    count: int
    mismatches: int
    alone: bool = True
    name: str = ""

    def _cause(self) -> str:
        ratio = f" (ratio {self.ratio})" if self.ratio else ""
        return f"{self._what}{ratio}. This {'explains' if self.alone else 'shows in'} {self._share}."

    @property
    def _what(self) -> str:
        if len(self.pairs) == 1:
            stored, wanted = self.pairs[0]
            return f"{self.name or 'a dimension'} differs: {stored} stored, {wanted} wanted"
        sizes = [f"{stored} stored for {wanted} wanted" for stored, wanted in self.pairs]
        return f"{self.name or 'the width of the model'} differs: {listed(sizes)}"

    @property
    def _share(self) -> str:
        return share(self.count, self.mismatches, "mismatched weight")

    def _way(self) -> str:
        return SIZES


SIZES = "build the target with the stored sizes; a weight is never cut or padded."


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadsDivided(Cause):
    """The same features are divided among another number of heads.

    Attributes:
        stored: Heads and size of one in the checkpoint.
        wanted: Heads and size of one in the target.
        count: Mismatched weights that it explains.
        mismatches: Mismatched weights in all.
    """

    stored: tuple[int, int]
    wanted: tuple[int, int]
    count: int
    mismatches: int

    def _cause(self) -> str:
        stored, wanted = (f"{counted(heads, 'head')} of {size}" for heads, size in (self.stored, self.wanted))
        return (
            f"the division into heads differs: {stored} stored, {wanted} wanted. "
            f"This explains {share(self.count, self.mismatches, 'mismatched weight')}."
        )

    def _way(self) -> str:
        return SIZES


def share(count: int, total: int, noun: str) -> str:
    """Returns a part of a whole in words: `the only mismatch`, `both`, `all 19`, `4 of the 19`."""
    if total == 1:
        return f"the {noun}"
    if count == total:
        return f"both {noun}s" if total == 2 else f"all {total} {noun}s"
    return f"{count} of the {total} {noun}s"


@dataclasses.dataclass(frozen=True, kw_only=True)
class OtherOutput(Cause):
    """One module has another number of outputs, and nothing else differs with it: a head.

    Attributes:
        module: The module in the target, as its path is written.
        key: Its own name.
        pattern: Its stored path below the collection; empty where it is made from several.
        stored: The stored number of outputs.
        wanted: The wanted number.
    """

    module: str
    key: str
    pattern: str
    stored: int
    wanted: int

    def _cause(self) -> str:
        stored = counted(self.stored, "output")
        return f"{self.module!r} has {stored} in the checkpoint and {self.wanted} in the target."

    def _way(self) -> str:
        same = f"build the target with {self.stored}"
        if not self.pattern:
            return f"{same}; a weight is never cut or padded."
        return (
            f"{same}; or leave the stored one behind and begin a new one, with "
            f"renames=[Drop({self.pattern!r}, 'a new head')] and "
            f'policy={{nnx.PathContains("{self.key}"): "init", ...: "error"}}; '
            "an abstract target needs init=..., a function that builds it, as well."
        )
