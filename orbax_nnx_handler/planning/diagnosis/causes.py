"""Why a plan does not fit: each cause a type, with its evidence and its way out.

A cause is only named where the plan holds the evidence; `cause` says what that
evidence is, in one sentence, and `hint` what to do about it.
"""

import dataclasses
from abc import ABC, abstractmethod

from orbax_nnx_handler.planning.folding import ranges
from orbax_nnx_handler.planning.paths import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cause(ABC):
    """One reason why a checkpoint does not become a target.

    Attributes:
        paths: The leaves that it explains, wanted ones before stored ones.
    """

    paths: tuple[Path, ...]

    @property
    @abstractmethod
    def cause(self) -> str:
        """What differs, and how that shows: one sentence."""

    @property
    @abstractmethod
    def hint(self) -> str:
        """The way out: what to change or to pass."""


def _counted(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnotherModel(Cause):
    """The checkpoint and the target have little in common.

    Attributes:
        weights: Weights of the target.
        named_alike: How many of them have a stored counterpart by name.
        shaped_alike: How many of them have a stored leaf of their shape.
    """

    weights: int
    named_alike: int
    shaped_alike: int

    @property
    def cause(self) -> str:
        return (
            f"this looks like a checkpoint of another model: of the target's {self.weights} weights, "
            f"{self.named_alike} have a stored leaf of their name and {self.shaped_alike} one of their shape."
        )

    @property
    def hint(self) -> str:
        return "look at what is stored with `orbax-nnx tree CHECKPOINT`, and check the path and the target."


@dataclasses.dataclass(frozen=True, kw_only=True)
class OtherNames(Cause):
    """Leaves that are missing and leaves that are unexpected have the same shapes.

    Attributes:
        count: How many.
        weights: Missing weights in all.
        automatic: Names among the stored ones that Linen gave (`Dense_0`).
        rename: The one rule that explains all of them, if there is one.
    """

    count: int
    weights: int
    automatic: tuple[str, ...]
    rename: tuple[str, str] | None

    @property
    def cause(self) -> str:
        each = f"{self.count} of the {self.weights} missing weights have" if self.weights > 1 else "the missing weight has"
        found = f"{each} an unexpected stored leaf of the same shape and dtype"
        if self.automatic:
            return f"{found}; the stored ones carry names that Linen gave ({', '.join(self.automatic)})."
        return f"{found}: the modules have other names."

    @property
    def hint(self) -> str:
        if self.rename is not None:
            return f"if they are the same, pass renames=[{self.rename!r}]."
        return "`orbax-nnx suggest CHECKPOINT MODULE:FACTORY` proposes renames=[...] to check and paste."


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
    kind: str = "layers"

    @property
    def cause(self) -> str:
        return f"the stored {self.group} has {self.stored} {self.kind}, the target wants {self.wanted}."

    @property
    def hint(self) -> str:
        same = f"restore into a model with {self.stored} {self.kind}"
        if self.stored > self.wanted or self.kind != "layers":
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

    @property
    def cause(self) -> str:
        return (
            f"{self.group} lacks {'layer' if len(self.layers) == 1 else 'layers'} {ranges(self.layers)}, "
            f"while {_counted(self.stored, 'other layer is', 'other layers are')} stored: "
            "the checkpoint has a hole, the model does not differ in depth."
        )

    @property
    def hint(self) -> str:
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

    @property
    def cause(self) -> str:
        one, other = ("checkpoint", "target") if self.stacked == "checkpoint" else ("target", "checkpoint")
        return (
            f"the layers of {self.group} are stacked in the {one} and one by one in the {other}; "
            f"they could not be rearranged, since {self.why}."
        )

    @property
    def hint(self) -> str:
        return "compare the two shapes: once one layer has the wanted shape, stacking is done by itself."


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

    @property
    def cause(self) -> str:
        what = f"{self.name} differs" if self.name else "a dimension differs"
        if len(self.pairs) > 1:
            what = "the model's width differs"
        sizes = ", ".join(f"{stored} stored, {wanted} wanted" for stored, wanted in self.pairs)
        share = f"{self.count} of the {self.mismatches} mismatches" if self.mismatches > 1 else "the mismatch"
        ratio = f" (ratio {self.ratio})" if self.ratio else ""
        return f"{what}: {sizes}{ratio}. This explains {share}."

    @property
    def hint(self) -> str:
        if len(self.pairs) == 1:
            return f"build the target with {self.pairs[0][0]} there; a weight is never cut or padded."
        return "build the target with the stored sizes; a weight is never cut or padded."


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoOptimizer(Cause):
    """The checkpoint holds no optimizer state.

    Attributes:
        moments: Optimizer leaves that the target wants.
        weights: Weights that the checkpoint gives, or None if not all of them.
    """

    moments: int
    weights: int | None

    @property
    def cause(self) -> str:
        found = f"all {self.weights} weights are there" if self.weights is not None else "weights are there"
        return f"no optimizer was saved: {found}, and 0 of the optimizer's {self.moments} leaves."

    @property
    def hint(self) -> str:
        return _FRESH_OPTIMIZER


@dataclasses.dataclass(frozen=True, kw_only=True)
class OtherOptimizer(Cause):
    """The stored optimizer keeps other moments than the target's.

    Attributes:
        stored: Names of the stored moments.
        wanted: Names of the wanted ones.
    """

    stored: tuple[str, ...]
    wanted: tuple[str, ...]

    @property
    def cause(self) -> str:
        stored = " and ".join(self.stored) or "no moments"
        return (
            f"the checkpoint was written with another optimizer: it keeps {stored}, "
            f"the target's wants {' and '.join(self.wanted)}."
        )

    @property
    def hint(self) -> str:
        return _FRESH_OPTIMIZER


_FRESH_OPTIMIZER = (
    "restore the weights alone: pass the model (or nnx.state of it) as target; "
    'or start the optimizer anew with policy={nnx.OptState: "init", ...: "error"}.'
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CollectionMissing(Cause):
    """A whole collection was not saved.

    Attributes:
        collection: Its name in Linen.
        filter: The NNX filter that selects its variables.
        count: Wanted leaves of it.
        stored: The collections that are there.
    """

    collection: str
    filter: str
    count: int
    stored: tuple[str, ...]

    @property
    def cause(self) -> str:
        return (
            f"the collection {self.collection!r} was not saved: 0 of its {self.count} leaves are stored, "
            f"the checkpoint holds {' and '.join(map(repr, self.stored))}."
        )

    @property
    def hint(self) -> str:
        return (
            f"save it from the Linen program too (a field {self.collection} of the train state); "
            f'to start it from its initial values, pass policy={{{self.filter}: "init", ...: "error"}}.'
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class NewPart(Cause):
    """A part of the target is new: LoRA weights or a head that a base checkpoint has not.

    Attributes:
        names: What is new, in a few words.
        filters: NNX filters that select it, as Python.
        complete: Weights outside the part, all of which are stored.
    """

    names: tuple[str, ...]
    filters: tuple[str, ...]
    complete: int

    @property
    def cause(self) -> str:
        return (
            f"nothing is stored for {' and '.join(self.names)}, "
            f"and everything for the other {self.complete} weights: a part that the checkpoint's model did not have."
        )

    @property
    def hint(self) -> str:
        rules = ", ".join(f'{rule}: "init"' for rule in self.filters)
        return f'pass policy={{{rules}, ...: "error"}} to initialise it and nothing else.'


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyImplementation(Cause):
    """Random keys of two implementations.

    Attributes:
        stored: The stored implementation, or dtype.
        wanted: The wanted one.
    """

    stored: str
    wanted: str

    @property
    def cause(self) -> str:
        return f"the checkpoint's random keys are {self.stored}, the target's {self.wanted}."

    @property
    def hint(self) -> str:
        return (
            "build the target under the writer's jax_default_prng_impl, or with keys of that implementation; "
            "another one would draw other numbers."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomLayout(Cause):
    """Stored random streams that no wanted stream takes: another Flax names them otherwise.

    Attributes:
        stored: One stored stream, as its path is written.
        wanted: The wanted stream beside it.
        count: Wanted random leaves that start anew because of it.
    """

    stored: str
    wanted: str
    count: int

    @property
    def cause(self) -> str:
        return (
            f"the checkpoint holds random streams in the layout of another Flax ({self.stored}), and which of them "
            f"is {self.wanted} is open: {_counted(self.count, 'random leaf starts', 'random leaves start')} anew."
        )

    @property
    def hint(self) -> str:
        return f"pass renames=[({self.stored!r}, {self.wanted!r})] to go on with that stream."
