"""Causes that are a matter of size: layers, dimensions, and how layers are arranged."""

import dataclasses

from orbax_nnx_handler.planning.diagnosis.causes import Cause
from orbax_nnx_handler.planning.folding import ranges


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCount(Cause):
    """A group of layers has another length.

    Attributes:
        group: The group, as its path is written.
        stored: Layers in the checkpoint.
        wanted: Layers in the target.
        kind: What is counted: experts where the path says so.
        fillable: Whether the policy `init` can make the layers that are not stored:
            a stack of another length is another shape, which no policy fills.
    """

    group: str
    stored: int
    wanted: int
    kind: str = "layers"
    fillable: bool = False

    def _cause(self) -> str:
        return f"the stored {self.group!r} has {self.stored} {self.kind}, the target's has {self.wanted}."

    def _hint(self) -> str:
        same = f"restore into a model with {self.stored} {self.kind}"
        if self.stored > self.wanted or not self.fillable:
            return f"{same}."
        return f'{same}, or pass policy="init" to initialise the {self.wanted - self.stored} new ones.'


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

    def _hint(self) -> str:
        return "restore another step, or find out why these layers were not saved."


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

    def _hint(self) -> str:
        return "correct the sizes first: stacking is done by itself once one layer has the wanted shape."


@dataclasses.dataclass(frozen=True, kw_only=True)
class DimensionDiffers(Cause):
    """One dimension explains several mismatches.

    Attributes:
        pairs: The dimension in the checkpoint and in the target; several that
            share one ratio.
        ratio: Target over checkpoint, as text (`2`, `1/2`).
        count: Mismatched weights that it explains.
        mismatches: Mismatched weights in all.
        name: What the dimension is, where the places it stands at tell; or empty.
    """

    pairs: tuple[tuple[int, int], ...]
    ratio: str
    count: int
    mismatches: int
    name: str = ""

    def _cause(self) -> str:
        what = f"{self.name or 'a dimension'} differs"
        if len(self.pairs) > 1 and not self.name:
            what = "the model's width differs"
        sizes = ", ".join(f"{stored} stored, {wanted} wanted" for stored, wanted in self.pairs)
        if len(self.pairs) > 1:
            sizes = " and ".join(f"{stored} stored for {wanted} wanted" for stored, wanted in self.pairs)
        ratio = f" (ratio {self.ratio})" if self.ratio else ""
        return f"{what}: {sizes}{ratio}. This explains {self._share}."

    @property
    def _share(self) -> str:
        if self.mismatches == 1:
            return "the mismatch"
        if self.count == self.mismatches:
            return f"all {self.count} mismatched weights"
        return f"{self.count} of the {self.mismatches} mismatched weights"

    def _hint(self) -> str:
        if len(self.pairs) == 1:
            return f"build the target with {self.pairs[0][0]}; a weight is never cut or padded."
        return "build the target with the stored sizes; a weight is never cut or padded."
