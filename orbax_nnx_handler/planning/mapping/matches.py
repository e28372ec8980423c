"""What the matcher finds: where each wanted leaf comes from, and what stays open."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from orbax_nnx_handler.planning.core.leaves import StoredLeaf
from orbax_nnx_handler.planning.core.paths import Path, Tokens
from orbax_nnx_handler.planning.core.recipes import Recipe
from orbax_nnx_handler.planning.mapping.arrange import UnclearOrder
from orbax_nnx_handler.planning.mapping.modules import Homeless
from orbax_nnx_handler.planning.mapping.restack import UnclearAxis
from orbax_nnx_handler.planning.rules.entries import Entry
from orbax_nnx_handler.planning.target.roles import Wanted

if TYPE_CHECKING:
    pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """Where a wanted leaf comes from.

    Attributes:
        recipe: How it is made from stored leaves.
        reason: The rule or structure that led there; empty for the path itself.
        missing_layers: Layers of a stack that no stored leaf holds.
        surplus: Layers that the stored group has and the wanted one has not.
        spare: Stored leaves that say the same as those of the recipe.
    """

    recipe: Recipe
    reason: str = ""
    missing_layers: tuple[int, ...] = ()
    surplus: int = 0
    spare: tuple[Path, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rivals:
    """One wanted leaf that several stored leaves claim."""

    wanted: Wanted
    entries: tuple[Entry, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelMatch:
    """The model's part of a mapping; `groups` are the layer groups that had to be arranged anew."""

    found: Mapping[Path, Found]
    rivals: tuple[Rivals, ...] = ()
    unclear: tuple[UnclearAxis | UnclearOrder, ...] = ()
    homeless: tuple[Homeless, ...] = ()
    groups: frozenset[Tokens] = frozenset()


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
