"""What the mapping finds: where each wanted leaf comes from, what that rests on, and what stays open."""

import dataclasses
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from orbax_nnx_handler.planning.core.errors import AmbiguousMappingError, Hint
from orbax_nnx_handler.planning.core.folding import Row
from orbax_nnx_handler.planning.core.leaves import StoredLeaf, record
from orbax_nnx_handler.planning.core.lines import aligned, counted, listed
from orbax_nnx_handler.planning.core.paths import Path, Tokens, numbers_below, render, segments
from orbax_nnx_handler.planning.core.recipes import Fill, Read, Recipe, reads, render_reads, shape_of
from orbax_nnx_handler.planning.layouts.layout import Placement, Section, Stored
from orbax_nnx_handler.planning.mapping.cells_and_wrappers import WithoutVariable
from orbax_nnx_handler.planning.mapping.layer_paths import Group
from orbax_nnx_handler.planning.rules.entries import Entry
from orbax_nnx_handler.planning.rules.inverse import inverse
from orbax_nnx_handler.planning.rules.rule import Pattern
from orbax_nnx_handler.planning.rules.values import Drop
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
    rule: Drop

    @property
    def reason(self) -> str:
        """Why, in the rule's words."""
        return self.rule.reason


def competing(rivals: Sequence[CompetingSources], stored: Iterable[Path]) -> AmbiguousMappingError:
    """Returns the error for wanted leaves that several stored leaves claim.

    Args:
        rivals: The wanted leaves, each with what claims it.
        stored: The leaves of the checkpoint that rules are for.
    """
    # Each once: two ways of search may have found it.
    first: dict[Path, CompetingSources] = {}
    for rival in rivals:
        first.setdefault(rival.wanted.leaf.path, rival)
    rivals = list(first.values())
    leaves = counted(len(rivals), "wanted leaf is", "wanted leaves are")
    return AmbiguousMappingError(
        f"{leaves} claimed by several stored leaves:\n{_claims(rivals)}",
        paths=[rival.wanted.leaf.path for rival in rivals],
        hints=_spelt_alike(rivals) or _of_collections(rivals) or [_one_left_behind(rivals, stored)],
    )


def _claims(rivals: Sequence[CompetingSources]) -> str:
    """Returns each wanted leaf with what claims it, or folded rows where there are many."""
    rows, folded = list[str](), list[Row]()
    for rival in rivals:
        rows.append(f"  {render(rival.wanted.leaf.path)}")
        for entry in rival.entries:
            rule, source = f"  by {entry.reason}" if entry.reason else "", render_reads(entry.recipe)
            rows.append(f"    <- {source} {entry.shape}{rule}")
            folded.append(Row(rival.wanted.leaf.path, (str(entry.shape), rule.strip()), source))
    return "\n".join(rows) if len(rivals) <= _LISTED else aligned(folded)


def _spelt_alike(rivals: Sequence[CompetingSources]) -> Sequence[Hint]:
    """Returns the way out where several stored paths are spelled alike: no rule tells them apart."""
    for rival in rivals:
        read = dict.fromkeys(path for entry in rival.entries for path in reads(entry.recipe))
        spelt = defaultdict[Tokens, list[Path]](list)
        for path in read:
            spelt[segments(path)].append(path)
        for alike in (paths for paths in spelt.values() if len(paths) > 1):
            keys = listed([str(path) for path in alike])
            words = f"{render(alike[0])} is stored at several keys, {keys}, and no rule tells which is meant"
            return [Hint(f"{words}: take the others out of the tree, or call them otherwise.")]
    return ()


def _of_collections(rivals: Sequence[CompetingSources]) -> Sequence[Hint]:
    """Returns the ways out where all that is wanted lies in two collections; empty where it does not."""
    found = {tuple(_around(rival, entry) for entry in rival.entries) for rival in rivals}
    ways = found.pop() if len(found) == 1 else ()
    if len(ways) != 2 or not all(ways):
        return ()
    hints: list[Hint] = []
    for name, root in (way for way in ways if way):
        words = f"pass renames=[({name!r}, {root!r})]" if root else f"pass {{{name!r}: target}} as the target"
        hints.append(
            Hint(f"{words} if what {name!r} holds is meant.", {"renames": [(name, root)]} if root else {})
        )
    return hints


def _around(rival: CompetingSources, entry: Entry) -> tuple[str, str] | None:
    """Returns a stored leaf's collection and the key above the wanted one, if all below them is alike."""
    read = list(reads(entry.recipe))
    if entry.reason or entry.collection is None or len(read) != 1:
        return None
    stored, wanted = segments(read[0])[1:], segments(rival.wanted.leaf.path)
    above = len(wanted) - len(stored)
    if segments(read[0])[0] != entry.collection or above not in (0, 1) or wanted[above:] != stored:
        return None
    return entry.collection, "".join(wanted[:above])


_SHOWN = 3
_LISTED = 10


def _one_left_behind(rivals: Sequence[CompetingSources], stored: Iterable[Path]) -> str:
    """Returns the way out: no name is free for the ones that lose, so they have to be dropped."""
    own = [[entry for entry in rival.entries if not entry.reason] for rival in rivals]
    if not all(own):
        return "take out the rule that brings the leaf which is not meant."
    # One is kept of each: what a rule brings, or else the first.
    lost = [each[len(each) == len(rival.entries) :] for each, rival in zip(own, rivals, strict=True)]
    paths = dict.fromkeys(path for each in lost for one in each for path in reads(one.recipe))
    patterns = _naming(paths, set(stored).difference(paths))
    drops = ", ".join(f"Drop({pattern!r}, 'why')" for pattern in patterns[:_SHOWN])
    by_rule, many = lost != [each[1:] for each in own], f"{drops} and so on for each of them"
    which = f"renames=[{drops}{', ...' if by_rule else ''}]" if len(patterns) <= _SHOWN else many
    if not by_rule:
        return f"pass {which} to leave behind what is not meant."
    return (
        f"pass {which} in front of the other rules to leave what is stored there behind, or take out the "
        "rule that brings the other."
    )


def _naming(paths: Collection[Path], others: Collection[Path]) -> list[str]:
    """Returns patterns that match some stored leaves and no others: whole levels where there are many."""
    whole = [render(path) for path in paths]
    if len(whole) <= _SHOWN:
        return whole
    held = {other[:at] for other in others for at in range(len(other) + 1)}
    levels = (
        next((path[:at] for at in range(1, len(path)) if path[:at] not in held), path) for path in paths
    )
    found = [*dict.fromkeys(render(level) for level in levels)]
    names, rest = [Pattern(text) for text in found[:_SHOWN]], [segments(other) for other in others]
    is_exact = len(found) <= _SHOWN and not any(any(name.spans(other)) for name in names for other in rest)
    return found if is_exact else whole


SavedAs = tuple[Path, Recipe]
"""The leaf of an item that a stored one is a save of, and how it is made from the item's leaves."""


class AsSaved(NamedTuple):
    """A checkpoint that is a save of the target and no more.

    Attributes:
        found: What each wanted leaf comes from.
        placed: What each stored leaf is, at its path in the target.
        without_variable: Stored values that the target has no Variable for.
    """

    found: Mapping[Path, Found]
    placed: Sequence[Placement]
    without_variable: tuple[WithoutVariable, ...]


def may_be_saved(wanted: Sequence[Wanted], placements: Sequence[Placement]) -> bool:
    """Tells fast whether a checkpoint may be a save of the target, by its size and the last names of weights.

    A save takes away a level above a whole model, and calls the parts of a cell otherwise.
    """
    cells = {"dense_i", "dense_h"}
    others = [item for item in wanted if cells.isdisjoint(item.path)]
    if len(others) == len(wanted) < len(placements):
        return False
    ends = {item.tokens[-2:] for item in placements}
    weights = (item for item in others if item.role == "model" and len(item.tokens) > 3)
    return all(item.tokens[-2:] in ends for item in weights)


def as_saved(wanted: Sequence[Wanted], stored: Stored, places: Mapping[Path, SavedAs]) -> AsSaved | None:
    """Returns the reading of a checkpoint that is a save of the target and no more.

    There is nothing that levels, groups and owners would have to tell: each leaf has its path in the item.

    Args:
        wanted: The target's leaves.
        stored: The stored leaves.
        places: What a save of the target stores, by stored path.
    """
    items, found = {item.leaf.path: item for item in wanted}, dict[Path, Found]()
    shapes, parts = {path: item.leaf.shape for path, item in items.items()}, dict[Path, Recipe]()
    placed, without = list[Placement](), list[WithoutVariable]()
    for at, leaf in stored.items():
        own, recipe = places.get(at, _NOWHERE)
        if own not in items or shape_of(recipe, shapes) != leaf.shape:
            return None
        if isinstance(recipe, Read):
            found[own] = Found(recipe=Read(at), evidence=_SAVED)
        elif isinstance(recipe, Fill):
            without.append(WithoutVariable(leaf=leaf, reason="a save writes zeros there", shape=leaf.shape))
        else:
            parts[at] = recipe
        placed.append(_placed_as(items[own], leaf, in_module=not isinstance(recipe, Read)))
    if parts:
        whole = inverse(parts, shapes, {at: leaf.shape for at, leaf in stored.items()})
        evidence = dataclasses.replace(_SAVED, kind="module")
        found |= {own: Found(recipe=recipe, evidence=evidence) for own, recipe in whole.items()}
    absent = (item for path, item in items.items() if path not in found)
    is_whole = all(item.role in ("random", "transient") for item in absent)
    return AsSaved(found, placed, tuple(without)) if is_whole else None


def _placed_as(item: Wanted, leaf: StoredLeaf, *, in_module: bool) -> Placement:
    """Returns a stored leaf as what it is in the target; parts of a cell have names of their own there."""
    section: Section = "aux" if item.role == "random" else "model"
    section = item.role if item.role in ("optimizer", "step") else section
    path = (*item.path[:-2], *leaf.path[-2:]) if in_module else item.path
    return Placement(leaf=leaf, section=section, path=path, collection=item.collection, owner=item.owner)


_SAVED = MatchEvidence(kind="layout", words="where a save of the target stores it")
_NOWHERE: SavedAs = ((), Read(()))


Ends = tuple[str, str]


def ends_of(tokens: Tokens) -> Ends:
    """Returns what a path begins and ends with in every reading as a part of a group of layers."""
    return "".join(tokens[:1]).removesuffix("_remainder"), "".join(tokens[-1:])


def ends_of_groups(wanted: Sequence[Tokens], stored: Sequence[Tokens]) -> set[Ends]:
    """Returns the ends that paths of both sides have, one of them with a number: most models share none."""
    sides = wanted, stored
    numbered = [{ends_of(tokens) for tokens in side if "#" in "".join(tokens)} for side in sides]
    ends = [{*map(ends_of, side)} for side in sides] if any(numbered) else numbered
    return (ends[0] & numbered[1]) | (numbered[0] & ends[1])
