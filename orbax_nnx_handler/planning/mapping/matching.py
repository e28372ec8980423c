"""Finds the stored value of each weight of one network: by path, by Flax's own modules, by layers."""

import dataclasses
import functools
import operator
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property

from orbax_nnx_handler.planning.core.leaves import StoredLeaf, may_hold_layer
from orbax_nnx_handler.planning.core.paths import Path, Tokens, segments
from orbax_nnx_handler.planning.core.recipes import Read, Recipe, reads, shape_of, substitute
from orbax_nnx_handler.planning.layouts.layout import Layout, ScannedBlocks, above_groups, is_of_parameters
from orbax_nnx_handler.planning.mapping.cells_and_wrappers import WithoutVariable, derive
from orbax_nnx_handler.planning.mapping.layer_paths import (
    FLAT,
    Group,
    Key,
    LayerPath,
    LayerPiece,
    Side,
    layer_paths,
    pieces_of,
    scan_paths,
)
from orbax_nnx_handler.planning.mapping.matches import (
    GROUNDS,
    CompetingSources,
    Found,
    MatchEvidence,
    ModelMatch,
    Restacked,
    UnclearAxis,
    ends_of,
    ends_of_groups,
)
from orbax_nnx_handler.planning.mapping.roots import Collections, Roots, strip
from orbax_nnx_handler.planning.mapping.stack_and_unstack import restack
from orbax_nnx_handler.planning.rules import ScanAxis
from orbax_nnx_handler.planning.rules.entries import Entry
from orbax_nnx_handler.planning.target.roles import Wanted


def stored_twice(
    fitting: Mapping[Path, Entry],
    wanted: Sequence[Wanted],
    below: Mapping[Path, Tokens],
    free: Iterable[tuple[Tokens, Entry]],
    scans: Sequence[ScannedBlocks] = (),
) -> Iterator[CompetingSources]:
    """Yields the wanted layers that have their path, and are in another stored arrangement besides.

    Both claim the wanted layer (law 4), also where one of them alone has its path. Layers that
    have numbers may also lie in front of a scan that the layout knows; but then the target has
    more layers than these.

    Args:
        fitting: The entry of each wanted leaf that was found by its path.
        wanted: All wanted leaves.
        below: The canonical path of each below the model's root.
        free: The entries that no wanted leaf has the path of, with each reading of their paths.
        scans: The scans that the layout knows by name.
    """
    if not fitting or not (others := _by_place(free, scans)):
        return
    left = [below[item.leaf.path] for item in wanted if item.leaf.path not in fitting]
    lacking = {place.group for tokens in left for place in layer_paths(tokens) if place.form == "flat"}
    for item in wanted:
        entry = fitting.get(item.leaf.path)
        if entry is None:
            continue
        for place in layer_paths(below[item.leaf.path]):
            form = _OTHER.get(place.form)
            rivals = others.get((form, (place.group, place.rest)), ()) if form else ()
            claims = [other for number, other in rivals if _is_same_layer(item, place, entry, other, number)]
            if place.form == "flat" and place.group not in lacking:
                scanned = others.get(("known scan", (place.group, place.rest)), ())
                claims += [other for _, other in scanned if other.collection == entry.collection]
            if claims:
                yield CompetingSources(wanted=item, entries=(entry, *claims))
                break


def _by_place(
    free: Iterable[tuple[Tokens, Entry]], scans: Sequence[ScannedBlocks]
) -> Mapping[tuple[str, Key], list[tuple[int, Entry]]]:
    """Returns the entries with their layers, by arrangement, group of layers and path below a layer."""
    found: dict[tuple[str, Key], list[tuple[int, Entry]]] = defaultdict(list)
    for tokens, entry in free:
        for place in layer_paths(tokens):
            if place.form in _OTHER:
                found[place.form, (place.group, place.rest)].append((place.position, entry))
        for place in scan_paths(tokens, scans):
            found["known scan", (place.group, place.rest)].append((place.position, entry))
    return found


_OTHER: Mapping[str, str] = {"flat": "stacked", "stacked": "flat"}


def _is_same_layer(item: Wanted, place: LayerPath, entry: Entry, other: Entry, number: int) -> bool:
    """Tells whether the one of two leaves that is a stack may hold the layer that is the other."""
    if other.collection != entry.collection:
        return False
    if place.form == "flat":
        return may_hold_layer(other.shape, item.leaf.shape, place.position)
    return may_hold_layer(item.leaf.shape, other.shape, number)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Matcher:
    """Matches the weights that a target wants of one stored train state.

    Attributes:
        wanted: The wanted leaves.
        paths: The canonical path of each below its train state's owner.
        entries: The entries of the train state.
        roots: Where the model sits on both sides.
        collections: Those of the entries.
        axes: The rules that say along which axis layers are stacked.
        layout: The layout that the entries are read under.
    """

    wanted: Sequence[Wanted]
    paths: Mapping[Path, Tokens]
    entries: Sequence[Entry]
    roots: Roots
    layout: Layout
    collections: Collections
    axes: Sequence[ScanAxis] = ()

    @cached_property
    def index(self) -> Mapping[Tokens, list[Entry]]:
        """Entries by canonical path below the root; a `value` box in both readings."""
        found: dict[Tokens, list[Entry]] = defaultdict(list)
        root = self.roots.stored
        for entry in self.entries:
            if entry.named or entry.segments[-1:] == ("value",):
                for tokens in self._readings(entry):
                    found[tokens].append(entry)
            else:
                found[strip(entry.tokens, root)].append(entry)  # Nearly every entry.
        return found

    @cached_property
    def _below(self) -> Mapping[Path, Tokens]:
        root = self.roots.wanted
        if not root and len(self.paths) == len(self.wanted):
            return self.paths
        return {item.leaf.path: strip(self.paths[item.leaf.path], root) for item in self.wanted}

    def match(self, apart: frozenset[Path] = frozenset()) -> ModelMatch:
        """Matches by path, then by module structure, then by layer groups.

        Args:
            apart: The wanted leaves whose path alone does not tell their source.
        """
        direct, rivals = self._by_path()
        direct = [pair for pair in direct if pair[0].leaf.path not in apart] if apart else direct
        fitting = {item.leaf.path: e for item, e in direct if e.shape == item.leaf.shape or _transient(item)}
        contested = {item.wanted.leaf.path for item in rivals}
        left = [w for w in self.wanted if w.leaf.path not in fitting and w.leaf.path not in contested]
        used = {id(entry) for entry in fitting.values()}
        free = [entry for entry in self.entries if id(entry) not in used]
        readings = [(tokens, entry) for entry in free for tokens in self._readings(entry)]
        rivals += stored_twice(fitting, self.wanted, self._below, readings, self.layout.scans)
        derived, without_variable = self._derived(free)
        # What a cell's gates make under its own path is as good as a leaf there.
        whole = {
            w.leaf.path: e for w in left if (e := self._made_for(w, derived)) and e.shape == w.leaf.shape
        }
        rest = [item for item in left if item.leaf.path not in whole]
        made = set(map(id, whole.values()))
        others = [*free, *(entry for entry in derived.values() if id(entry) not in made)]
        restacked, clashes, unclear, groups, moved = self._restacked(rest, others)
        doubtful = self._stacks_in(moved, fitting)
        if doubtful:
            return self.match(apart | doubtful)
        found = {path: self._found(entry) for path, entry in fitting.items()}
        for item in left:
            if (by_structure := self._made_for(item, derived)) is not None:
                found[item.leaf.path] = Found(
                    recipe=by_structure.recipe,
                    reason=by_structure.reason,
                    evidence=MatchEvidence(kind="module", words=by_structure.reason),
                )
        found |= restacked
        # A leaf with the right path and the wrong shape: better shown as that than as missing.
        for item, entry in direct:
            if item.leaf.path not in found:
                found[item.leaf.path] = self._found(entry)
        return ModelMatch(
            found=found,
            rivals=(*rivals, *clashes),
            unclear=tuple(map(self._with_paths, unclear)),
            without_variable=tuple(_in_fused(without_variable, found)),
            groups=frozenset(groups),
        )

    def _made_for(self, item: Wanted, derived: Mapping[Tokens, Entry]) -> Entry | None:
        """Returns what is made of a module's leaves under a wanted path."""
        made = derived.get(self._below[item.leaf.path])
        return made if made is not None and self.collections.may_give(made, item) else None

    def _stacks_in(self, groups: Collection[Group], paths: Collection[Path]) -> frozenset[Path]:
        """Returns the stacks of some groups among wanted leaves.

        As many cycles as a layer is wide make one shape on either axis: where the others of a
        group move to another axis, a leaf of the same path and shape may have to move too.
        """
        return frozenset(
            item.leaf.path
            for item in (self.wanted if groups else ())
            if item.leaf.path in paths
            for piece in self._wanted_pieces([item])
            if piece.place.group in groups and piece.place.form not in FLAT
        )

    def _found(self, entry: Entry) -> Found:
        if entry.reason:
            evidence = MatchEvidence(kind="rule", words=entry.reason)
            return Found(recipe=entry.recipe, reason=entry.reason, evidence=evidence)
        return Found(
            recipe=entry.recipe, evidence=_below_roots(self.roots.wanted, entry.prefix, self.roots.stored)
        )

    def _with_paths(self, group: UnclearAxis) -> UnclearAxis:
        tokens = set(group.tokens)
        paths = tuple(path for path, below in self._below.items() if below in tokens)
        return dataclasses.replace(group, paths=paths)

    def _readings(self, entry: Entry) -> list[Tokens]:
        readings = [strip(entry.tokens, self.roots.stored)]
        unboxed = entry.unboxed
        if unboxed is None and not entry.named:
            return readings
        if unboxed is not None:
            readings.append(strip(unboxed, self.roots.stored))
        if entry.named and self.roots.wanted:
            # A rename may have been written with the wanted path from the target's root.
            readings += [strip(tokens, self.roots.wanted) for tokens in readings]
        return list(dict.fromkeys(readings))

    def _by_path(self) -> tuple[list[tuple[Wanted, Entry]], list[CompetingSources]]:
        direct: list[tuple[Wanted, Entry]] = []
        rivals: list[CompetingSources] = []
        index, below = self.index, self._below
        is_any = self.collections.only is None
        for item in self.wanted:
            claims: Sequence[Entry] = index.get(below[item.leaf.path], ())
            is_own = len(claims) == 1 and claims[0].collection == item.collection
            if claims and not (is_own and is_any and item.role == "model"):  # Few leaves.
                claims = self._eligible(item, claims)
            if len(claims) > 1:
                rivals.append(CompetingSources(wanted=item, entries=tuple(claims)))
            elif claims:
                direct.append((item, claims[0]))
        return direct, rivals

    def _eligible(self, item: Wanted, claims: Sequence[Entry]) -> Sequence[Entry]:
        own = self.collections.eligible(item, claims)
        if len(own) > 1 and not any(entry.named for entry in own):
            exact = [entry for entry in own if entry.segments == self._segments(item)]
            own = exact or own
        return own

    def _segments(self, item: Wanted) -> tuple[str, ...]:
        names = segments(item.path)
        below = self._below[item.leaf.path]
        return names[-len(below) :] if len(names) == len(item.tokens) else names

    def _derived(self, free: Sequence[Entry]) -> tuple[dict[Tokens, Entry], list[WithoutVariable]]:
        leaves, sources = dict[Tokens, StoredLeaf](), dict[Path, Entry]()
        for at, entry in enumerate(free):
            if not self.collections.is_network(entry):
                continue
            leaf = _as_leaf(entry, at)
            # A gate may be in a box of `nn.with_partitioning`.
            leaves[strip(entry.unboxed or entry.tokens, self.roots.stored)] = leaf
            sources[leaf.path] = entry
        derived, without_variable = derive(leaves)
        entries = {item.path: _entry_of(item.path, item.recipe, item.reason, sources) for item in derived}
        return entries, [
            dataclasses.replace(
                item, fused=frozenset(path for at in item.fused for path in reads(sources[at].recipe))
            )
            for item in without_variable
            if isinstance(sources[item.leaf.path].recipe, Read)
        ]

    def _restacked(
        self, left: Sequence[Wanted], free: Sequence[Entry]
    ) -> tuple[dict[Path, Found], list[CompetingSources], list[UnclearAxis], set[Tokens], set[Group]]:
        found: dict[Path, Found] = {}
        clashes: list[CompetingSources] = []
        groups: set[Tokens] = set()
        unclear: list[UnclearAxis] = []
        moved: set[Group] = set()
        made: dict[Path, list[Restacked]] = defaultdict(list)
        for collection in dict.fromkeys(entry.collection for entry in self.entries):
            # An array without a type may be claimed by a copy of the weights too, which makes a question.
            some = [
                item
                for item in left
                if self.collections.allows(collection, item) or self.collections.contests(collection, item)
            ]
            if not some:
                continue
            paths = {self._below[item.leaf.path]: item.leaf.path for item in some}
            some, others = self._of_one_group(some, free)
            wanted, stored = self._wanted_side(some), self._stored_side(others, collection)
            wanted, stored = wanted.without_blocks(stored), stored.without_blocks(wanted)
            known = self.layout.scan_axis if is_of_parameters(collection) else None
            restacked, open_groups = restack(wanted, stored, self._said(collection), known)
            owner = self.entries[0].owner
            unclear += (dataclasses.replace(at, collection=collection, owner=owner) for at in open_groups)
            moved |= {item.group for item in (*restacked.values(), *open_groups) if item.moved}
            groups |= {
                (*piece.place.group.parent, name)
                for key in wanted.by_key.keys() & stored.by_key.keys()
                for piece in (*wanted.by_key[key], *stored.by_key[key])
                for name in _names_of(piece)
            }
            for tokens, item in restacked.items():
                made[paths[tokens]].append(item)
        for item in left:
            options = made.get(item.leaf.path, [])
            claims = tuple(entry for option in options for entry in (option.claims or option.sources))
            own = [o for o in options if self.collections.allows(o.sources[0].collection, item)]
            if own and (len(options) > 1 or options[0].claims):
                clashes.append(CompetingSources(wanted=item, entries=claims))
            elif own:
                found[item.leaf.path] = _restacked(own[0])
        return found, clashes, unclear, groups, moved

    def _of_one_group(
        self, left: Sequence[Wanted], free: Sequence[Entry]
    ) -> tuple[Sequence[Wanted], Sequence[Entry]]:
        """Returns the leaves that may be of one group of layers on both sides."""
        if self.layout.scans or self.axes:
            return left, free  # Of any name, or one that a rule names and that stays as it is.
        theirs = [self._readings(entry) for entry in free]
        ends = ends_of_groups([self._below[x.leaf.path] for x in left], [x for each in theirs for x in each])
        if not ends:
            return [], []
        return (
            [item for item in left if ends_of(self._below[item.leaf.path]) in ends],
            [x for x, each in zip(free, theirs, strict=True) if not ends.isdisjoint(map(ends_of, each))],
        )

    def _said(self, collection: str | None) -> Mapping[Tokens, int]:
        """Returns the axis that a rule says for a group of a collection, by its path below the model's root.

        A rule may write the path from the model's root, from the target's, or from the stored one.
        """
        if not self.axes:
            return {}
        heads = above_groups(self.entries[0].owner, collection)
        roots = ((), self.roots.wanted, self.roots.stored)
        above = {(*head, *root) for head in heads for root in roots}
        return {
            rule.tokens[len(root) :]: rule.axis
            for root in sorted(above, key=len)
            for rule in self.axes
            if rule.tokens[: len(root)] == root
        }

    def _wanted_side(self, left: Sequence[Wanted]) -> Side:
        pieces = list(self._wanted_pieces(left))
        if len(left) == len(self.wanted):  # A model of other names: nothing is found by its path.
            return Side(pieces, lambda: pieces)
        return Side(pieces, functools.partial(self._wanted_pieces, self.wanted))

    def _stored_side(self, free: Sequence[Entry], collection: str | None) -> Side:
        pieces = list(self._stored_pieces(free, collection))
        if len(free) == len(self.entries) and all(map(operator.is_, free, self.entries)):
            return Side(pieces, lambda: pieces)
        return Side(pieces, functools.partial(self._stored_pieces, self.entries, collection))

    def _wanted_pieces(self, items: Iterable[Wanted]) -> Iterable[LayerPiece]:
        for item in items:
            yield from pieces_of(self._below[item.leaf.path], item.leaf.shape, scans=self.layout.scans)

    def _stored_pieces(self, free: Iterable[Entry], collection: str | None) -> Iterable[LayerPiece]:
        for entry in free:
            if entry.collection == collection:
                for tokens in self._readings(entry):
                    yield from pieces_of(tokens, entry.shape, entry, self.layout.scans)


def _names_of(piece: LayerPiece) -> set[str]:
    """Returns the names under which a rule may speak of a group."""
    scan = piece.place.scan
    return {piece.place.group.name} if scan is None else {piece.place.group.name, scan.name}


def _restacked(item: Restacked) -> Found:
    name = "/".join((*item.group.parent, item.group.name)).replace("/#", "_")
    words = f"layer i of {name}" + (f", axis {item.axis}" if item.axis is not None else "")
    words += f" (names of {item.naming})" if item.naming else ""
    words += f": {GROUNDS[item.ground]}" if item.ground is not None else ""
    return Found(
        recipe=item.recipe,
        missing_layers=item.missing,
        surplus=item.surplus,
        evidence=MatchEvidence(kind="layout" if item.naming else "layers", words=words, axis_by=item.ground),
    )


@functools.lru_cache(maxsize=1024)
def _below_roots(root: Tokens, prefix: Tokens, stored_root: Tokens) -> MatchEvidence:
    wanted, stored = "/".join(root), "/".join((*prefix, *stored_root))
    words = f"same path below {wanted or '(root)'} and {stored or '(root)'}".replace("/#", "_")
    return MatchEvidence(kind="path below roots", words=words)


def _transient(item: Wanted) -> bool:
    return item.role == "transient"


def _as_leaf(entry: Entry, number: int) -> StoredLeaf:
    """Returns an entry as a stored leaf; its path is made up where a rule acted on its value."""
    path: Path = entry.recipe.path if isinstance(entry.recipe, Read) else ("(by rule)", number)
    return StoredLeaf(path=path, shape=entry.shape, dtype=entry.dtype)


def _in_fused(items: Sequence[WithoutVariable], found: Mapping[Path, Found]) -> list[WithoutVariable]:
    """Returns the values of modules that the target has as NNX's: a cell of the caller's may hold them."""
    if not items:
        return []
    made = [each.recipe for each in found.values() if not isinstance(each.recipe, Read)]
    fused = {path for recipe in made for path in reads(recipe)}
    return [item for item in items if item.fused <= fused]


def _entry_of(tokens: Tokens, recipe: Recipe, reason: str, sources: Mapping[Path, Entry]) -> Entry:
    parts = [sources[path] for path in reads(recipe)]
    return dataclasses.replace(
        parts[0],
        segments=tokens,
        recipe=substitute(recipe, lambda path: sources[path].recipe),
        shape=shape_of(recipe, {path: sources[path].shape for path in reads(recipe)}),
        reason="; ".join(dict.fromkeys(filter(None, (*(part.reason for part in parts), reason)))),
        prefix=(),
        fixed=(),
        named=False,
    )
