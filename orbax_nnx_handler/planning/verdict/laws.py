"""The laws of a mapping, checked on every plan, whatever found it (docs/how_it_works.md lists them).

Nothing here knows how a mapping was searched. What each wanted leaf reads is written as elements (a stored
leaf, or one layer of a stack), both sides are named (owner, collection, path, layer), and the names are
compared. Where they disagree the plan is refused, and both readings are said. What a mapping says that it
rests on chooses which proof is tried, and replaces none. Leaves that a rule of the user's brought are taken
at the rule's word; that no stored element is used twice holds for them too, and that moments follow.
"""

import dataclasses
import itertools
import operator
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Protocol

from orbax_nnx_handler.planning.core.paths import Path, Tokens, canonical, render
from orbax_nnx_handler.planning.core.recipes import Index, Read, Recipe, computes, reads
from orbax_nnx_handler.planning.layouts.layout import (
    FLAX_COLLECTIONS,
    Placement,
    ScannedBlocks,
    holds_no_weights,
    is_copy_beside,
    is_copy_level,
)
from orbax_nnx_handler.planning.target.roles import Role, Wanted, is_called_like, is_of_another_type
from orbax_nnx_handler.planning.verdict.claims import Claims, is_same_path
from orbax_nnx_handler.planning.verdict.elements import Chain, read_and_steps
from orbax_nnx_handler.planning.verdict.proven_moments import (
    ProvenMoments,
    stored_as_weight,
    wanted_as_weight,
)
from orbax_nnx_handler.planning.verdict.replaced_weights import ReplacedWeights
from orbax_nnx_handler.planning.verdict.stacked_axes import StackedAxes
from orbax_nnx_handler.planning.verdict.weight_sources import (
    Weights,
    is_below,
    is_beside_weights,
    is_of_its_name,
)


class Grounds(Protocol):
    """What a mapping says that the recipe of a leaf rests on."""

    @property
    def kind(self) -> str:
        """In a word."""
        ...

    @property
    def axis_by(self) -> str | None:
        """What tells the axis of its layers; None where it says nothing."""
        ...


Source = tuple[Wanted, Recipe, Grounds]
"""A wanted leaf, what it is made from, and what that rests on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Known:
    """What a mapping may rest on besides names and shapes.

    Attributes:
        by_rule: Stored leaves that a rule of the user's names.
        changed: Stored leaves that rules drop, and what lies aside of which they make something else.
        copies: Stored leaves that a rule says are wanted more than once.
        called: The owners that rules give to the leaves of optimizers, and to steps.
        said: The stacked axis that a rule says, by the path of the group of layers.
        scan_axis: The axis along which the layout's program stacks.
        scans: The scans of blocks that the layout knows by name.
        unfit: Weights whose sources have not their shape or dtype; their moments follow them all the same.
    """

    by_rule: frozenset[Path] = frozenset()
    changed: frozenset[Path] = frozenset()
    copies: frozenset[Path] = frozenset()
    called: Mapping[Path, Set[Tokens]] = dataclasses.field(default_factory=dict[Path, Set[Tokens]])
    said: Mapping[Tokens, int] = dataclasses.field(default_factory=dict[Tokens, int])
    scan_axis: int | None = None
    scans: Sequence[ScannedBlocks] = ()
    unfit: Sequence[tuple[Wanted, Recipe]] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Broken:
    """A law that a plan breaks: `wanted` is read from `stored`, which `why` speaks against."""

    law: int
    wanted: Path
    stored: Path
    why: str


def certify(
    wanted: Sequence[Wanted], placed: Mapping[Path, Placement], sources: Sequence[Source], known: Known
) -> list[Broken]:
    """Returns every place where a plan breaks a law; none for a plan that may be carried out.

    Args:
        wanted: The target's leaves with their roles.
        placed: What each stored leaf is.
        sources: What the leaves of the result are made from.
        known: What the mapping may rest on besides names and shapes.
    """
    kernel = _Kernel(wanted, placed, sources, known)
    broken = [fault for source in kernel.unproven() for fault in kernel.check(source)]
    broken += [*kernel.aside(), *kernel.moments(), *kernel.replaced()]
    broken += [*kernel.kept_beside(), *kernel.claims()]
    return [*broken, *kernel.axes(), *kernel.owners(), *kernel.networks(), *kernel.roots()]


_OWNER = operator.attrgetter("owner")


class _Kernel:
    def __init__(
        self,
        wanted: Sequence[Wanted],
        placed: Mapping[Path, Placement],
        sources: Sequence[Source],
        known: Known,
    ) -> None:
        self._wanted, self._placed, self._known = wanted, placed, known
        chains = [(made.path, ()) if type(made) is Read else read_and_steps(made) for _, made, _ in sources]
        self._by_role: dict[Role, list[Source]] = defaultdict(list)
        self._chains: dict[Role, list[Chain]] = defaultdict(list)
        # In a row: a target has its weights side by side, and so its moments.
        start = 0
        roles: list[Role] = [item.role for item, _, _ in sources]
        for role, alike in itertools.groupby(roles):
            end = start + sum(1 for _ in alike)
            self._by_role[role] += sources[start:end]
            self._chains[role] += chains[start:end]
            start = end
        self._claims = Claims(sources, chains, placed)
        self._are_all = len(sources) == len(wanted)
        self._axes = StackedAxes(known.scan_axis, known.said)
        self._weights = Weights(wanted, placed, known.by_rule, known.scans, self._axes)
        self._aside: list[tuple[Wanted, Path]] = []
        self._owners: dict[Path, set[Path]] = defaultdict(set)
        self._read_owners: dict[Path, list[tuple[Wanted, Path]]] = defaultdict(list)
        stored_tops = {path[0] if path else None for path in placed}
        tops = {item.leaf.path[0] if item.leaf.path else None for item in wanted}
        self._tops = {top for top in tops if top in stored_tops or str(top) in stored_tops}
        self._has_owners = any(map(_OWNER, placed.values()))

    def unproven(self) -> Iterator[Source]:
        """Yields what is not read as nearly each leaf is, to the loop that proves it; optimizers go whole."""
        yield from self._unlike()
        for role, sources in self._by_role.items():
            if role not in ("model", "optimizer"):
                yield from sources

    def _unlike(self) -> Iterator[Source]:
        """Yields the weights that are not read whole, from their collection, below levels that are known."""
        placed, tops, by_rule = self._placed, self._tops, self._known.by_rule
        place, roots = None, dict[tuple[Tokens, Tokens], object]()
        for source, (read, _) in zip(self._by_role["model"], self._chains["model"], strict=True):
            item, recipe, grounds = source
            if by_rule and (read in by_rule if read else not by_rule.isdisjoint(reads(recipe))):
                continue
            if not isinstance(recipe, Read):
                is_proven = isinstance(recipe, Index) and self._is_next_layer(item, recipe, grounds)
            elif grounds.kind == "same path":
                is_proven = recipe.path == item.leaf.path
            else:
                there = placed[recipe.path]
                if not roots or (there.owner, there.collection) != place:
                    place = there.owner, there.collection
                    roots = self._weights.roots.get(place, {})
                is_proven = there.section == "model" and there.collection == item.collection is not None
                is_proven = is_proven and not (tops and self._has_top(item.leaf.path))
                is_proven = is_proven and is_below(item, there, roots)
                if is_proven and self._has_owners:
                    self._read_owners[there.owner].append((item, recipe.path))
            if not is_proven:
                yield source

    def _is_next_layer(self, item: Wanted, recipe: Index, grounds: Grounds) -> bool:
        """Tells whether a weight is a layer of a leaf of which another layer is proven."""
        layer = recipe.source
        if not isinstance(layer, Read) or grounds.kind == "same path" or self._has_top(item.leaf.path):
            return False
        if not self._weights.is_next_layer(item, layer.path, recipe.axis, recipe.index):
            return False
        self._read_owners[self._placed[layer.path].owner].append((item, layer.path))
        return True

    def check(self, source: Source) -> Iterator[Broken]:
        """Yields what the names and the collection of one leaf's sources speak against."""
        item, recipe, grounds = source
        kind, read = grounds.kind, reads(recipe)
        if self._known.by_rule and not self._known.by_rule.isdisjoint(read):
            return
        path = item.leaf.path
        if item.role != "transient" and self._has_top(path):
            yield from self._same_path_first(item, read)
        if kind == "same path":
            if not (isinstance(recipe, Read) and is_same_path(path, recipe.path)):
                yield Broken(law=1, wanted=path, stored=read[0], why="its whole path is another")
            return
        for stored in read:
            law, why = _why_not(item, self._placed[stored])
            if why:
                yield Broken(law=law, wanted=path, stored=stored, why=why)
                return
        yield from self._named(source, read)

    def _named(self, source: Source, read: Sequence[Path]) -> Iterator[Broken]:
        """Yields where a leaf is not that of its name; optimizers are looked at as wholes."""
        item, recipe, grounds = source
        placed = [self._placed[stored] for stored in read]
        path, is_aside = item.leaf.path, all(leaf.section == "aux" for leaf in placed)
        if item.role == "step":
            if not is_aside:  # One of two steps is kept aside under its own path.
                self._owners[item.owner].update(leaf.owner for leaf in placed)
            return
        if is_aside or item.role == "random":
            if isinstance(recipe, Read) and is_of_its_name(item, placed[0]):
                return
            if isinstance(recipe, Read) and placed[0].section == "aux":
                self._aside.append((item, read[0]))
                return
            if item.role != "random" or placed[0].section != "model":
                yield Broken(law=10, wanted=path, stored=read[0], why="it is the stream of another name")
                return
        if item.role == "model":
            for leaf in placed:
                self._read_owners[leaf.owner].append((item, leaf.leaf.path))
        for astray in self._weights.check(item, recipe, grounds.kind == "module", grounds.axis_by):
            yield Broken(law=astray.law, wanted=path, stored=astray.stored, why=astray.why)

    def _has_top(self, path: Path) -> bool:
        return (path[0] if path else None) in self._tops

    def _same_path_first(self, item: Wanted, read: Sequence[Path]) -> Iterator[Broken]:
        path = item.leaf.path
        same = path if path in self._placed else tuple(map(str, path))
        if same not in self._placed or same in read or same in self._known.by_rule:
            return
        if item.leaf.kind is not None and self._placed[same].section == "step" and item.role != "step":
            return  # A model's Variable called `step` is a model's.
        if self._placed[same].leaf.shape == item.leaf.shape and not self._claims.has_its_name(
            item, read, same
        ):
            yield Broken(law=1, wanted=path, stored=read[0], why=f"{render(same)} has its whole path")

    def aside(self) -> Iterator[Broken]:
        """Yields what lies aside and goes not by its name, nor where its weights go, nor as rules say."""
        changed = self._known.changed
        for item, recipe, _ in itertools.chain(*self._by_role.values()) if changed else ():
            if isinstance(recipe, Read) and recipe.path in changed:
                why = "a rule drops it, or makes something else of it"
                yield Broken(law=11, wanted=item.leaf.path, stored=recipe.path, why=why)
        made = zip(self._by_role["model"], self._chains["model"], strict=True) if self._aside else ()
        by_rule = ((item, read) for (item, *_), (read, _) in made if read in self._known.by_rule)
        levels = self._weights.levels(by_rule)
        for item, stored in self._aside:
            if not is_beside_weights(item, self._placed[stored], levels):
                why = "it is the stream of another name"
                yield Broken(law=10, wanted=item.leaf.path, stored=stored, why=why)

    def moments(self) -> Iterator[Broken]:
        """Yields which leaves of optimizers are not made as their parameters are."""
        if not (leaves := self._by_role["optimizer"]):
            return
        unfit = [(*claim, None) for claim in self._known.unfit if claim[0].role == "model"]
        weights = [*self._by_role["model"], *unfit]
        made = [*self._chains["model"], *(read_and_steps(recipe) for _, recipe, _ in unfit)]
        chains = self._chains["optimizer"], made
        moments = ProvenMoments(leaves, weights, self._wanted, self._placed, self._known.by_rule, chains)
        for law, path, stored, why in moments.astray():
            yield Broken(law=law, wanted=path, stored=stored, why=why)
        for owner, read in moments.owners.items():
            self._owners[owner] |= read
        yield from self._orphans(moments)

    def replaced(self) -> Iterator[Broken]:
        """Yields what is kept of weights that a rule has replaced by others."""
        known, made = self._known, self._by_role["model"]
        some = ReplacedWeights(made, self._placed, known.by_rule, known.called, self._wanted)
        for law, path, stored, why in some.kept([*self._by_role["optimizer"], *self._by_role["step"], *made]):
            yield Broken(law=law, wanted=path, stored=stored, why=why)

    def _orphans(self, moments: ProvenMoments) -> Iterator[Broken]:
        """Proves moments whose parameters are not in the result as if they were the weights themselves."""
        if not moments.orphans:
            return
        placed = {
            path: stored_as_weight(item) for path, item in self._placed.items() if item.section == "optimizer"
        }
        items = [(wanted_as_weight(item), recipe) for item, recipe in moments.orphans]
        weights = Weights([item for item, _ in items], placed, frozenset(), self._known.scans, self._axes)
        for item, recipe in items:
            for astray in weights.check(item, recipe, False):
                yield Broken(law=8, wanted=astray.wanted, stored=astray.stored, why=astray.why)

    def axes(self) -> Iterator[Broken]:
        """Yields where nothing proves the axis along which layers are stacked."""
        for leaf, why in self._axes.unproven():
            yield Broken(law=6, wanted=leaf.wanted, stored=leaf.stored, why=why)

    def claims(self) -> Iterator[Broken]:
        """Yields elements that are used twice, weights that are stored twice, and blocks of two lengths."""
        claims = self._claims
        for path, stored, other in claims.used_twice(self._known.copies):
            yield Broken(law=4, wanted=path, stored=stored, why=f"{render(other)} is read from it too")
        unread = claims.unread(self._known.by_rule)
        for path, stored, own in claims.kept_aside(self._known.by_rule):
            yield Broken(law=1, wanted=path, stored=stored, why=f"{render(own)} has its whole path")
        trees = claims.of_other_trees(self._known.by_rule)
        for path, stored, other in (*claims.claimed_twice(self._weights, unread), *trees):
            yield Broken(law=4, wanted=path, stored=stored, why=f"{render(other)} has its name too")
        for path, stored, other in claims.of_two_names(self._wanted, unread) if self._tops else ():
            why = f"if its first level is a module (in {{'model': target}} it is), {render(other)} is meant"
            yield Broken(law=1, wanted=path, stored=stored, why=why)
        yield from self._blocks(unread, claims.used)

    def _blocks(self, unread: Sequence[Path], used: Set[Path]) -> Iterator[Broken]:
        """Yields where blocks of two lengths, or behind other layers, meet, and positions are left over."""
        models = self._by_role["model"]
        are_all = self._are_all or len(models) == sum(item.role == "model" for item in self._wanted)
        if (are_all and not unread) or not used.isdisjoint(self._known.by_rule):
            return
        whole = [(item, recipe.path) for item, recipe, _ in models if isinstance(recipe, Read)]
        others = (self._weights.of_other_blocks(whole), self._weights.of_other_layers(whole))
        for path, stored, why in itertools.chain(*others) if whole else ():
            yield Broken(law=5, wanted=path, stored=stored, why=why)

    def networks(self) -> Iterator[Broken]:
        """Yields where a weight is read from another train state than its path names, or one of several."""
        if not self._has_owners:
            return
        owners = {canonical(item.owner) for item in self._placed.values() if item.section == "model"}
        yield from self._copies()
        unnamed: set[Path] = set()
        for owner, read in self._read_owners.items() if len(owners) > 1 else ():
            for item, stored in read:
                named = max((o for o in owners if o and item.tokens[: len(o)] == o), key=len, default=None)
                if named is None:
                    unnamed.add(owner)
                elif named != canonical(owner):
                    why = f"{render(named)} is another train state"
                    yield Broken(law=3, wanted=item.leaf.path, stored=stored, why=why)
        if len(unnamed) > 1:
            item, stored = self._read_owners[next(iter(unnamed))][0]
            why = "other leaves come from another train state"
            yield Broken(law=3, wanted=item.leaf.path, stored=stored, why=why)

    def _copies(self) -> Iterator[Broken]:
        """Yields where weights are read from a train state that is called a copy, and is not asked for."""
        for owner, read in self._read_owners.items():
            level = next((str(key) for key in owner if is_copy_level(str(key))), None)
            for item, stored in read if level is not None else ():
                if item.tokens[: len(canonical(owner))] != canonical(owner):
                    yield Broken(law=2, wanted=item.leaf.path, stored=stored, why=f"{level} names a copy")

    def kept_beside(self) -> Iterator[Broken]:
        """Yields what a pure dict keeps below `opt_state`, not as optax, of weights that a rule computes."""
        weights, moments = self._by_role["model"], self._by_role["optimizer"]
        some = () if self._claims.are_plain else (*weights, *moments)
        bare = [source for source in some if source[0].leaf.kind is None]
        bare = [source for source in bare if "opt_state" in source[0].leaf.path[:-1]]
        bare = [source for source in bare if source[0].role == "model" or source[2].kind == "same path"]
        computed: dict[Tokens, set[Tokens]] = defaultdict(set)
        for item, made, _ in weights if bare else ():
            if computes(made):
                computed[item.tokens[item.tokens[:1] == ("params",) :]].add(item.tokens)
        for item, made, _ in bare if computed else ():
            own = canonical(item.leaf.path)
            if any(computed.get(own[at:], set()) - {own} for at in range(len(own))):
                why = "it may be a moment of what a rule computes otherwise"
                yield Broken(law=8, wanted=item.leaf.path, stored=reads(made)[0], why=why)

    def owners(self) -> Iterator[Broken]:
        """Yields where train states share an optimizer, or one is read from elsewhere than its own path."""
        users = Counter(owner for stored in self._owners.values() for owner in stored)
        lent = {owner for owner, count in users.items() if count > 1}
        refused = {at for at, stored in self._owners.items() if len(stored) > 1 or stored & lent}
        moved = [at for at, stored in self._owners.items() if {canonical(at)} != {*map(canonical, stored)}]
        some = self._placed.values() if moved else ()
        own = {canonical(item.owner): item.owner for item in some if item.section == "optimizer"}
        refused |= {at for at in moved if own.get(canonical(at)) not in (None, *self._owners[at])}
        states = {item.owner for item in some if item.section == "model"}
        sources = (path for _, recipe, _ in self._by_role["model"] for path in reads(recipe))
        read = {self._placed[path].owner for path in (sources if len(states) > 1 else ())}
        others = states - read if read else set[Path]()  # Of these, only what its own path names is read.
        refused |= {at for at in moved for o in self._owners[at] & others if not o or at[: len(o)] != o}
        why = "train states share an optimizer or a step, or it is another one's"
        for item, recipe, _ in (*self._by_role["step"], *self._by_role["optimizer"]) if refused else ():
            if item.owner in refused:
                yield Broken(law=3, wanted=item.leaf.path, stored=reads(recipe)[0], why=why)

    def roots(self) -> Iterator[Broken]:
        """Yields where the leaves of one stored collection have lost levels that others keep."""
        whole = (source for source in self._by_role["model"] if source[2].kind == "same path")
        self._weights.keep_roots((item, recipe.path) for item, recipe, _ in whole if isinstance(recipe, Read))
        for (owner, collection), found in self._weights.roots.items():
            for (above, _), (wanted, stored) in found.items():
                named = (*canonical(owner), collection)
                level = next((name for name in above if is_copy_level(name) and name not in named), None)
                if level is not None:
                    yield Broken(law=2, wanted=wanted, stored=stored, why=f"{level} asks for a copy")
            if len(found) < 2 and not any(below for _, below in found):
                continue
            names = [
                self._weights.name(path)
                for path, item in self._placed.items()
                if item.section == "model" and item.owner == owner and item.collection == collection
            ]
            for (_, below), (wanted, stored) in found.items():
                if below and not all(name[: len(below)] == below for name in names):
                    why = f"{render(below)} is not above the whole model"
                    yield Broken(law=7, wanted=wanted, stored=stored, why=why)
                if any(holds_no_weights(level, collection) for level in below):
                    why = f"{render(below)} is not the name of a model's own weights"
                    yield Broken(law=2, wanted=wanted, stored=stored, why=why)
            if len({above for above, below in found if not below}) > 1:
                (first, *_), (wanted, stored) = next(iter(found)), list(found.values())[-1]
                why = f"other leaves lie below {render(first)}" if first else "others lie below no level"
                yield Broken(law=7, wanted=wanted, stored=stored, why=why)


def _why_not(item: Wanted, placed: Placement) -> tuple[int, str]:
    """Returns the law, and why it speaks against taking a leaf of this section and collection."""
    section, role = placed.section, item.role
    if role == "step":
        own = section == "aux" and item.tokens in map(canonical, (placed.path, (*placed.owner, *placed.path)))
        return 9, "" if section == "step" or own else "it is not the step of a train state"
    if section in ("optimizer", "step"):
        return 9, "it belongs to the optimizer or counts steps"
    if _may_give(item, placed):
        return 2, ""
    return 2, f"it lies in {placed.collection}, not in {item.collection or 'params'}"


def _may_give(item: Wanted, placed: Placement) -> bool:
    """Tells whether the collections agree; a type that Flax does not name may be in any of its own name."""
    stored, wanted = placed.collection, item.collection
    if None in (stored, wanted) or stored == wanted:
        return wanted is not None or stored is None or stored in FLAX_COLLECTIONS or stored in item.tokens
    if wanted in FLAX_COLLECTIONS:
        return stored in item.tokens
    if stored in item.tokens or is_called_like(item.leaf.kind, stored):
        return True
    return not is_copy_beside(str(stored), str(wanted)) and not is_of_another_type(item.leaf.kind, stored)
