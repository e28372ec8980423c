"""A verdict as the diagnosis looks at it: what is wrong and not yet explained, and what is stored unused."""

import contextlib
import dataclasses
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property

from orbax_nnx_handler.planning.core.errors import RestoreError, UnreadableLeafError
from orbax_nnx_handler.planning.core.leaves import MOMENTS, Shape, StoredLeaf
from orbax_nnx_handler.planning.core.paths import Path, Tokens, canonical, is_number, without_box
from orbax_nnx_handler.planning.core.recipes import Recipe, reads
from orbax_nnx_handler.planning.layouts.layout import FLAX_COLLECTIONS, STATISTICS, Placement, words_of
from orbax_nnx_handler.planning.likeness.links import Findings
from orbax_nnx_handler.planning.likeness.module_parts import arrangeable
from orbax_nnx_handler.planning.mapping import faults_of
from orbax_nnx_handler.planning.mapping.optimizer_states import split
from orbax_nnx_handler.planning.mapping.roots import strip
from orbax_nnx_handler.planning.options import RestoreOptions
from orbax_nnx_handler.planning.rules import Rule
from orbax_nnx_handler.planning.rules.entries import model_entries
from orbax_nnx_handler.planning.suggesting.search import (
    Searched,
    paths_of,
    search,
    stored_leaves,
    wanted_leaves,
    without_repeats,
)
from orbax_nnx_handler.planning.target.roles import Role, Wanted
from orbax_nnx_handler.planning.verdict import choose
from orbax_nnx_handler.planning.verdict.outcomes import Mismatched, Missing, Restored, Sides, Verdict


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evidence:
    """A verdict, less what was explained already.

    Attributes:
        verdict: The verdict.
        explained: Wanted and stored paths that a cause accounts for.
    """

    verdict: Verdict
    explained: frozenset[Path] = frozenset()

    def without(self, paths: Iterable[Path]) -> "Evidence":
        """Returns the evidence with some paths explained."""
        added = frozenset(paths) - self.explained
        if not added:
            return self
        later = dataclasses.replace(self, explained=self.explained | added)
        # What both sides hold does not depend on what is explained, and a big model takes long to work out.
        kept = {*vars(later), *_OPEN}
        vars(later).update((name, value) for name, value in vars(self).items() if name not in kept)
        return later

    @property
    def sides(self) -> Sides:
        """Both sides, leaf by leaf."""
        return self.verdict.sides

    @property
    def restored(self) -> Mapping[Path, Restored]:
        """Leaves that come from disk."""
        return self.verdict.restored

    @cached_property
    def missing(self) -> Mapping[Path, Missing]:
        """Missing leaves that make the restore fail."""
        return {path: item for path, item in self.open_leaves.items() if path not in self.explained}

    @cached_property
    def open_leaves(self) -> Mapping[Path, Missing]:
        """Missing leaves that make the restore fail, explained ones included."""
        return {path: item for path, item in self.verdict.missing.items() if item.policy == "error"}

    @cached_property
    def mismatched(self) -> Mapping[Path, Mismatched]:
        """Mismatched leaves."""
        return {path: item for path, item in self.verdict.mismatched.items() if path not in self.explained}

    @cached_property
    def unexpected(self) -> Mapping[Path, StoredLeaf]:
        """Stored leaves that nobody wants."""
        return {path: leaf for path, leaf in self.verdict.unexpected.items() if path not in self.explained}

    def role(self, path: Path) -> Role:
        """Returns what a wanted leaf is."""
        return self.sides.wanted[path].role

    def shape(self, path: Path) -> Shape:
        """Returns the shape of a stored leaf, or of a wanted one."""
        placement = self.sides.placements.get(path)
        return placement.leaf.shape if placement else self.sides.wanted[path].leaf.shape

    def of_role(self, paths: Collection[Path], role: Role) -> list[Path]:
        """Returns the wanted paths of one role."""
        return [path for path in paths if self.role(path) == role]

    @cached_property
    def weights(self) -> Mapping[Path, Wanted]:
        """All wanted weights, statistics included."""
        return {path: item for path, item in self.sides.wanted.items() if item.role == "model"}

    @cached_property
    def missing_weights(self) -> list[Path]:
        """Missing leaves of the model."""
        return self.of_role(self.missing, "model")

    @cached_property
    def mismatched_weights(self) -> list[Path]:
        """Leaves of the model whose shape differs."""
        return [p for p in self.of_role(self.mismatched, "model") if self.mismatched[p].kind == "shape"]

    @cached_property
    def stored_weights(self) -> Mapping[Path, Placement]:
        """All stored leaves of the model."""
        return {path: item for path, item in self.sides.placements.items() if item.section == "model"}

    @cached_property
    def free_weights(self) -> Mapping[Path, Placement]:
        """Stored leaves of the model that nobody wants."""
        return {path: item for path, item in self.stored_weights.items() if path in self.unexpected}

    @cached_property
    def unused_weights(self) -> Mapping[Path, Placement]:
        """Stored leaves of the model that nothing wants, explained ones included, but for copies of it.

        A copy has the path of a leaf that is used, in another collection or of another owner; what lies
        below another owner than all that is used is another network's.
        """
        left = {path: item for path, item in self.stored_weights.items() if path in self.verdict.unexpected}
        used = {source for item in self.restored.values() for source in reads(item.recipe)}
        placed = [self.stored_weights[path] for path in used if path in self.stored_weights]
        names, owners = {self.stored_below(item) for item in placed}, {item.owner for item in placed}
        return {
            path: item
            for path, item in left.items()
            if self.stored_below(item) not in names and (not owners or item.owner in owners)
        }

    @cached_property
    def networks(self) -> Mapping[Path, Mapping[Path, Sequence[Placement]]]:
        """Networks of which nothing is found, each with the unused stored ones that hold the same weights.

        What lies unused below a train state's name, or as a copy beside one, however layers are arranged.
        """
        there = defaultdict[Path, list[Placement]](list)
        left = {*self.verdict.unexpected, *self.verdict.skipped}
        owners = {item.owner for item in self.sides.placements.values() if item.section == "model"}
        for path, item in self.sides.placements.items() if self.open_leaves else ():
            is_own = item.collection in (None, *FLAX_COLLECTIONS)
            if item.section == "model" and (item.owner or not is_own):
                there[item.owner if is_own else (*item.owner, str(item.collection))].append(item)
            for depth in range(1, min(len(path), DEPTH) if item.section == "other" else 0):
                if path[:depth] not in owners:
                    there[path[:depth]].append(dataclasses.replace(item, path=path[depth:]))
        there = {
            at: items for at, items in there.items() if left.issuperset(item.leaf.path for item in items)
        }
        here: Mapping[Path, Sequence[Path]] = self._lost_networks if there else {}
        held = {
            at: (
                _held((item.path, item.leaf.shape) for item in items),
                _held(self._as_restored(items) if here else ()),
            )
            for at, items in there.items()
        }
        aside = [item for item in self.sides.placements.values() if item.section == "aux"] if here else []
        shared = [i for i in self.stored_weights.values() if i.collection in STATISTICS]
        kept = {
            at: _held((i.own[str(i.own[0]) == "model" :], i.leaf.shape) for i in aside if i.owner == at)
            | _held((i.path, i.leaf.shape) for i in shared if i.owner == at[:-1])
            for at in there
        }
        alike: dict[Path, dict[Path, Sequence[Placement]]] = {}
        for owner, paths in here.items():
            wanted = _held((path[len(owner) :], self.shape(path)) for path in paths).items()
            # What a save keeps aside may be more, as the streams. One of another number is another network.
            found = [
                at
                for at in there
                if unnumbered(at) != unnumbered(owner)
                and any(
                    one and one.items() <= wanted and (kept[at] | one).items() >= wanted for one in held[at]
                )
            ]
            if found and not any(owner[: len(above)] == above for above in alike):
                alike[owner] = {at: there[at] for at in found}
        return alike

    def _as_restored(self, copy: Iterable[Placement]) -> list[tuple[Tokens, Shape]]:
        """Returns the leaves of a copy as those are called and shaped that its twins are restored to."""
        made = {p for x in copy for p in self._made_of.get((self.stored_below(x), x.leaf.shape), ())}
        return [(self.below[path], self.shape(path)) for path in made]

    @cached_property
    def _made_of(self) -> Mapping[tuple[Tokens, Shape], Sequence[Path]]:
        """The weights that are restored from each stored one, by its path below the stored root."""
        found = defaultdict[tuple[Tokens, Shape], list[Path]](list)
        read = ((path, source) for path, item in self.restored.items() for source in reads(item.recipe))
        for path, source in read:
            if path in self.below and (item := self.stored_weights.get(source)):
                found[self.stored_below(item), item.leaf.shape].append(path)
        return found

    @cached_property
    def _lost_networks(self) -> Mapping[Path, Sequence[Path]]:
        """The weights below each name all of which are missing, the highest names first."""
        below = defaultdict[Path, list[Path]](list)
        for path in self.weights:
            for depth in range(min(len(path), DEPTH)):
                below[path[:depth]].append(path)
        lost = {path for path in self.weights if path in self.open_leaves}
        # Statistics may be stored once, for the model and for a copy of its parameters.
        once = {path for path, item in self.weights.items() if item.collection in STATISTICS}
        return {at: below[at] for at in sorted(below, key=len) if set[Path]() < {*below[at]} - once <= lost}

    @cached_property
    def perhaps_stored(self) -> frozenset[Path]:
        """Missing leaves that unused stored ones could be, in any arrangement, with their optimizer.

        Moments follow their parameters, and an optimizer is restored whole or not at all.
        """
        lost = [item for path, item in self.weights.items() if path in self.open_leaves]
        unused = model_entries(self.unused_weights.values())
        held = stored_leaves([*unused, *self.sides.loose], False)
        found = arrangeable(wanted_leaves(lost), held) if held else set[Path]()
        found.update(p for at in self.networks for p in self._lost_networks[at] if p in self.open_leaves)
        sections = {item.section for item in self.sides.placements.values()}
        follows = found and not sections.isdisjoint(("optimizer", "step"))
        unknown = {str(key) for path in self._unknown_fields for key in path}
        moments = follows or not MOMENTS.isdisjoint(unknown)
        steps = moments or any("step" in words_of(name) for name in unknown)
        roles = {role for role, is_stored in (("optimizer", moments), ("step", steps)) if is_stored}
        rest = [path for path in self.open_leaves if self.role(path) in roles]
        return frozenset(found).union(rest, self._copied, self.kept_aside)

    @property
    def unknown_steps(self) -> Sequence[Path]:
        """Stored numbers in such fields whose names have the word `step`."""
        called = (path for path in self._unknown_fields if "step" in words_of(str(path[-1])))
        return [path for path in called if not self.shape(path)]

    @cached_property
    def _unread(self) -> Sequence[tuple[Path, Placement]]:
        used = {source for item in self.restored.values() for source in reads(item.recipe)}
        return [(path, item) for path, item in self.sides.placements.items() if path not in used]

    @cached_property
    def _unknown_fields(self) -> Sequence[Path]:
        """Stored leaves that nothing reads in fields that no layout knows: `disc_opt_state`, `gen_step`."""
        own = {path for path, item in self._unread if item.slot or item.collection in FLAX_COLLECTIONS}
        return [p for p, item in self._unread if item.section in ("model", "other") and p not in own]

    @cached_property
    def kept_aside(self) -> frozenset[Path]:
        """Missing weights of whose name and shape a save kept a leaf aside that nothing reads."""
        aside = {(canonical(p)[-1], item.leaf.shape) for p, item in self._unread if item.section == "aux"}
        lost = [item for path, item in self.weights.items() if path in self.open_leaves]
        return frozenset(i.leaf.path for i in lost if (i.tokens[-1], i.leaf.shape) in aside)

    @cached_property
    def links(self) -> Mapping[Path, frozenset[Path]]:
        """The stored leaves that a missing weight is probably made of, by names and shapes alike.

        The search that proposes rules, on what is left over of both sides; not for very big models.
        """
        lost = [path for path in self.weights if path in self.perhaps_stored]
        return {**self.links_among(lost, self.unused_weights.values()), **self._copied}

    def links_among(
        self, lost: Iterable[Path], held: Collection[Placement]
    ) -> Mapping[Path, frozenset[Path]]:
        """Returns the stored leaves among some that wanted ones are probably made of."""
        wanted = [self.weights[path] for path in lost]
        return _sources(self._searched(wanted, held)) if _few_pairs(wanted, held) else {}

    def speaks_against(self, wanted: Iterable[Path], stored: Collection[Path]) -> bool:
        """Tells whether the search pairs wanted leaves with others than these stored ones."""
        return any(not self.links[path].issubset(stored) for path in wanted if path in self.links)

    @property
    def has_networks(self) -> bool:
        """Whether weights of several networks lie unused: `suggest` looks at their keys as well."""
        return bool(self.networks) or len({item.owner for item in self.unused_weights.values()}) > 1

    @cached_property
    def links_anew(self) -> Mapping[Path, frozenset[Path]]:
        """What `links` would be without the rules that were passed."""
        return self._found_anew(copied=False)

    @cached_property
    def _copied(self) -> Mapping[Path, frozenset[Path]]:
        """Missing weights that one stored leaf probably is beside the wanted one that it is already."""
        return self._found_anew(copied=True)

    def _found_anew(self, *, copied: bool) -> Mapping[Path, frozenset[Path]]:
        found = _sources(self._whole if self.open_leaves else _NOTHING, copied=copied)
        return {path: sources for path, sources in found.items() if path in self.open_leaves}

    @cached_property
    def _whole(self) -> Searched:
        return self._searched(self.weights.values(), self.stored_weights.values())

    @property
    def is_asked(self) -> bool:
        """Whether `suggest` asks what is made of which stored leaves."""
        return bool(self._whole.found.ties)

    def is_found(self, recipes: Mapping[Path, Recipe]) -> bool:
        """Tells whether the search of the whole model finds what recipes read, where it finds anything.

        It does not look at stored copies: what is made of one is no part of what it asks about.
        """
        asked = (tie.readings for tie in self._whole.found.ties)
        every = [_sources(self._whole), *(paths_of(each) for each in itertools.chain(*asked))]
        known = set[Path]().union(*(sources for each in every for sources in each.values()))
        made = {path: set(reads(recipe)) for path, recipe in recipes.items()}
        copies = {path for path, of in made.items() if of.isdisjoint(known)}
        told = [each for at, each in enumerate(every) if at == 0 or copies.isdisjoint(each)]
        return all(each.get(p, of) == of for each in told for p, of in made.items() if p not in copies)

    def _searched(self, wanted: Iterable[Wanted], placed: Collection[Placement]) -> Searched:
        ours = wanted_leaves(wanted)
        is_readable = not any(isinstance(fault, UnreadableLeafError) for fault in self.verdict.faults)
        if not ours or not self.is_searched or not is_readable:
            return _NOTHING
        # Of which of several networks a leaf is, its path within them does not tell.
        held = Counter((item.collection, item.tokens) for item in placed)
        known = [item for item in placed if held[item.collection, item.tokens] == 1]
        entries = without_repeats(ours, model_entries(known))
        theirs = stored_leaves(entries, any("dense_i" in leaf.names[-2:-1] for leaf in ours))
        with contextlib.suppress(RecursionError):
            return search(ours, theirs, {})
        return _NOTHING

    @cached_property
    def is_searched(self) -> bool:
        """Whether the search takes no time: few leaves, and few pairs of one size."""
        lost = (self.weights[path] for path in self.open_leaves if path in self.weights)
        is_small = max(len(self.weights), len(self.stored_weights)) <= _SEARCHED
        return is_small and _few_pairs(lost, self.unused_weights.values())

    def restored_under(self, rules: Sequence[Rule]) -> Mapping[Path, Recipe] | None:
        """Returns what would be restored under other rules, and how; None where they are refused."""
        stored = {path: item.leaf for path, item in self.sides.placements.items()}
        options = RestoreOptions.of(renames=tuple(rules), layout=self.verdict.read_as)
        try:
            mapping, faults, _ = choose(list(self.sides.wanted.values()), stored, options)
        except RestoreError:
            return None
        if faults or mapping.faults or any(faults_of(mapping)):
            return None
        wants = self.sides.wanted
        fitting = {path for path, shape in mapping.shapes.items() if shape == wants[path].leaf.shape}
        return {path: recipe for path, recipe in mapping.recipes.items() if path in fitting}

    @cached_property
    def weights_complete(self) -> bool:
        """Whether every weight is restored."""
        return all(path in self.restored for path in self.weights)

    @cached_property
    def root(self) -> Tokens:
        """Where the model sits in the target; found by its optimizer where no name meets a stored one."""
        root = self.sides.roots.wanted
        tops = {item.tokens[:1] for item in self.weights.values() if len(item.tokens) > 1}
        moments = [i.tokens for i in self.sides.wanted.values() if i.role == "optimizer"]
        if root or len(tops) != 1 or not moments:
            return root
        (top,) = tops
        return root if any(top[0] in tokens for tokens in moments) else top

    @cached_property
    def below(self) -> Mapping[Path, Tokens]:
        """The canonical path of each weight below the target's root."""
        return {path: strip(item.tokens, self.root) for path, item in self.weights.items()}

    def stored_below(self, placement: Placement) -> Tokens:
        """Returns the canonical path of a stored leaf below the stored root."""
        return self._stored_below[placement.leaf.path]

    @cached_property
    def _stored_below(self) -> Mapping[Path, Tokens]:
        root, placed = self.sides.roots.stored, self.sides.placements
        return {path: without_box(strip(canonical(item.path), root)) for path, item in placed.items()}

    @cached_property
    def moments(self) -> Mapping[Path, tuple[Tokens, Tokens]]:
        """Slot and parameter of each wanted optimizer leaf that belongs to a parameter."""
        # Beside an average the model's own weights lie a level deeper than its optimizer calls them.
        parameters = {tokens[at:] for tokens in self.below.values() for at in range(1 + (len(tokens) > 2))}
        wanted = self.sides.wanted
        apart = {path: split(i.tokens, parameters) for path, i in wanted.items() if i.role == "optimizer"}
        return {path: (slot, parameter) for path, (slot, parameter) in apart.items() if parameter is not None}

    def with_moments(self, weights: Collection[Path]) -> tuple[Path, ...]:
        """Returns weights and those of their moments that are wrong as well."""
        parameters = {self.below[path][at:] for path in weights if path in self.below for at in (0, 1)}
        wrong = self.missing.keys() | self.mismatched.keys()
        followers = [
            p for p, (_, parameter) in self.moments.items() if parameter in parameters and p in wrong
        ]
        return (*weights, *followers)


def _sources(found: Searched, *, copied: bool = False) -> Mapping[Path, frozenset[Path]]:
    links = (link for link in (*found.links, *found.turns) if link.copied or not copied)
    return {path: frozenset(sources) for path, sources in paths_of(links).items()}


def _few_pairs(lost: Iterable[Wanted], held: Iterable[Placement]) -> bool:
    """Tells whether so few leaves have the sizes of others that the search takes no time."""
    sizes = Counter(math.prod(item.leaf.shape) for item in held)
    return sum(sizes[math.prod(item.leaf.shape)] for item in lost) <= _PAIRS


_NOTHING = Searched(links=(), turns=(), found=Findings())
_PAIRS = 10_000
_SEARCHED = 2000
"""Leaves of one side that the search goes through for an error; a proposal has no such bound."""

_OPEN = {"missing", "missing_weights", "mismatched", "mismatched_weights", "unexpected", "free_weights"}
"""The properties that depend on what is explained; all others stay what they are."""


def spell(tokens: Tokens) -> str:
    """Returns a canonical path as a person writes it."""
    return "/".join(token.removeprefix("#") for token in tokens)


DEPTH = 4
"""Levels of a target at which a network may lie."""


def _held(leaves: Iterable[tuple[Path, Shape]]) -> dict[Tokens, int]:
    """Returns the number of elements of each weight, that of all layers together."""
    found: dict[Tokens, int] = defaultdict(int)
    for path, shape in leaves:
        found[unnumbered(path)] += math.prod(shape)
    return found


def unnumbered(path: Path) -> Tokens:
    """Returns the canonical path of a leaf, layers and boxes left out."""
    return tuple(token for token in without_box(canonical(path)) if not is_number(token))
