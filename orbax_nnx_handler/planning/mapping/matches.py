"""What the mapping finds: where each wanted leaf comes from, what that rests on, and what stays open."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from orbax_nnx_handler.planning.core.leaves import StoredLeaf, record
from orbax_nnx_handler.planning.core.paths import Path, Tokens, numbers_below
from orbax_nnx_handler.planning.core.recipes import Recipe
from orbax_nnx_handler.planning.mapping.cells_and_wrappers import WithoutVariable
from orbax_nnx_handler.planning.mapping.layer_paths import Group
from orbax_nnx_handler.planning.rules.entries import Entry
from orbax_nnx_handler.planning.target.roles import Wanted

EvidenceKind = Literal[
    "same path",
    "path below roots",
    "layers",
    "module",
    "rule",
    "moment",
    "optimizer",
    "step",
    "random",
    "layout",
]


AxisGround = Literal["shape", "group", "layout", "rule"]
"""What says along which axis a leaf is stacked: its own shape, the one axis of all others of its group, the
program of its layout, or a `ScanAxis` for its group."""

GROUNDS: Mapping[AxisGround, str] = {
    "shape": "its shape allows no other",
    "group": "that of all others of the group",
    "layout": "where the layout's program stacks",
    "rule": "as ScanAxis says",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatchEvidence:
    """What the mapping of one leaf rests on.

    Attributes:
        kind: `same path` is the whole path; `path below roots` the path below the train state and
            the model's root on either side; `layers` layer i of a stack; `module` how Flax's own
            module keeps the same parameters in Linen and in NNX; `rule` what the user said;
            `moment` the parameter's own recipe; `optimizer` a field of a whole optimizer state;
            `step` the train state's field; `random` a stream of its name; `layout` names that the
            layout's program is known to write, `words` say where in its source.
        words: The same in a few words, for people.
        axis_by: What says the axis of a leaf that is made of layers.
    """

    kind: EvidenceKind
    words: str
    axis_by: AxisGround | None = None


SAME_PATH = MatchEvidence(kind="same path", words="same path")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restacked:
    """How one wanted leaf comes from a layer group.

    Attributes:
        recipe: The recipe; holds `Fill` where a layer is missing.
        group: The group.
        axis: The stacked axis of the stored leaf, or of the wanted one where only that is stacked; None
            where a layer is read whole.
        ground: What says that axis.
        is_against_layout: Whether its shape allows another axis only than the one that the layout knows.
        missing: The layers that no stored leaf holds.
        surplus: How many layers the stored group has more than the wanted one.
        claims: Where several stored leaves are the same layer: all of them.
        sources: The stored leaves that its layers come from.
        moved: Whether it is stacked along another axis than the stored leaf.
        naming: Where the program's source gives the scan a name that is not its layers'; empty if nowhere.
    """

    recipe: Recipe
    group: Group
    axis: int | None
    missing: tuple[int, ...] = ()
    surplus: int = 0
    claims: tuple[Entry, ...] = ()
    sources: tuple[Entry, ...] = ()
    moved: bool = False
    naming: str = ""
    ground: AxisGround | None = None
    is_against_layout: bool = False


@record
class Found:
    """Where a wanted leaf comes from.

    Attributes:
        recipe: How it is made from stored leaves.
        reason: The rule or structure that led there; empty for the path itself.
        missing_layers: Layers of a stack that no stored leaf holds.
        surplus: Layers that the stored group has and the wanted one has not.
        spare: Stored leaves that say the same as those of the recipe.
        evidence: What the mapping rests on.
    """

    recipe: Recipe
    reason: str = ""
    missing_layers: tuple[int, ...] = ()
    surplus: int = 0
    spare: tuple[Path, ...] = ()
    evidence: MatchEvidence = SAME_PATH


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompetingSources:
    """One wanted leaf that several stored leaves claim."""

    wanted: Wanted
    entries: tuple[Entry, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnclearAxis:
    """A layer group whose shapes allow several stacked axes, or not the one that the user says.

    Attributes:
        group: The group.
        axes: The axes that are possible; empty if the user said another one.
        tokens: Its wanted leaves, below the model's root.
        sources: Its stored leaves.
        paths: Its wanted leaves as the target has them.
        moved: Whether the axes of the two sides may not be the same.
        collection: The collection that is stacked.
        owner: Canonical keys above its stored train state.
    """

    group: Group
    axes: tuple[int, ...]
    tokens: tuple[Tokens, ...]
    sources: tuple[Tokens, ...]
    paths: tuple[Path, ...] = ()
    moved: bool = False
    collection: str | None = None
    owner: Tokens = ()

    @property
    def absent(self) -> tuple[int, ...]:
        """The numbers that its stored layers leave out before their last one."""
        numbers = numbers_below((*self.group.parent, self.group.name), self.sources)
        return tuple(sorted(set(range(max(numbers, default=0))) - numbers))

    @property
    def has_hole(self) -> bool:
        """Whether other layers than the first ones are left out."""
        return self.absent != tuple(range(len(self.absent)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelMatch:
    """The model's part of a mapping; `groups` are the layer groups that had to be arranged anew."""

    found: Mapping[Path, Found]
    rivals: tuple[CompetingSources, ...] = ()
    unclear: tuple[UnclearAxis, ...] = ()
    without_variable: tuple[WithoutVariable, ...] = ()
    groups: frozenset[Tokens] = frozenset()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dropped:
    """A stored value that has no counterpart in NNX; it must be zero."""

    leaf: StoredLeaf
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Discarded:
    """A stored value that a rule of the user's leaves behind, whatever it is."""

    leaf: StoredLeaf
    reason: str
