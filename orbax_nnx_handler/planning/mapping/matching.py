"""Finds the stored value of each wanted model leaf, by path first."""

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

from flax import nnx

from orbax_nnx_handler.planning.core.leaves import StoredLeaf
from orbax_nnx_handler.planning.core.paths import Path, Tokens, segments
from orbax_nnx_handler.planning.core.recipes import Read, Recipe, reads, shape_of, substitute
from orbax_nnx_handler.planning.mapping.arrange import Arranged, UnclearOrder, arrange
from orbax_nnx_handler.planning.mapping.layers import LayerPiece, Side, pieces_of
from orbax_nnx_handler.planning.mapping.matches import Found, ModelMatch, Rivals
from orbax_nnx_handler.planning.mapping.modules import Homeless, derive
from orbax_nnx_handler.planning.mapping.restack import UnclearAxis, restack
from orbax_nnx_handler.planning.mapping.roots import Roots, strip
from orbax_nnx_handler.planning.mapping.sections import Part
from orbax_nnx_handler.planning.rules import ScanAxis
from orbax_nnx_handler.planning.rules.entries import Entry
from orbax_nnx_handler.planning.target.roles import Wanted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Matcher:
    """Matches the leaves of one model against the entries of one checkpoint."""

    wanted: Sequence[Wanted]
    entries: Sequence[Entry]
    roots: Roots
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
        return {item.leaf.path: strip(item.tokens, self.roots.wanted) for item in self.wanted}

    @cached_property
    def _collections(self) -> Mapping[str | None, set[Tokens]]:
        found: dict[str | None, set[Tokens]] = defaultdict(set)
        for entry in self.entries:
            found[entry.collection].add(entry.tokens)
        return found

    def match(self) -> ModelMatch:
        """Matches by path, then by module structure, then by layer groups."""
        direct, rivals = self._by_path()
        fitting = {item.leaf.path: e for item, e in direct if e.shape == item.leaf.shape or _transient(item)}
        contested = {item.wanted.leaf.path for item in rivals}
        left = [w for w in self.wanted if w.leaf.path not in fitting and w.leaf.path not in contested]
        used = {id(entry) for entry in fitting.values()}
        free = [entry for entry in self.entries if id(entry) not in used]
        derived, homeless = self._derived(free)
        restacked, unclear, groups = self._restacked(left, [*free, *derived.values()])
        found = {path: Found(recipe=e.recipe, reason=e.reason) for path, e in fitting.items()}
        for item in left:
            by_structure = derived.get(self._below[item.leaf.path])
            if by_structure is not None:
                found[item.leaf.path] = Found(recipe=by_structure.recipe, reason=by_structure.reason)
        found |= restacked
        placed, arranged = self._arranged(left, free, found)
        found |= placed
        # A leaf with the right path and the wrong shape: better shown as that than as missing.
        for item, entry in direct:
            if item.leaf.path not in found:
                found[item.leaf.path] = Found(recipe=entry.recipe, reason=entry.reason)
        return ModelMatch(
            found=found,
            rivals=tuple(rivals),
            unclear=tuple(map(self._with_paths, (*unclear, *arranged.unclear))),
            homeless=tuple(homeless),
            groups=frozenset(groups | arranged.groups),
        )

    def _with_paths(self, group: UnclearAxis | UnclearOrder) -> UnclearAxis | UnclearOrder:
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

    def _by_path(self) -> tuple[list[tuple[Wanted, Entry]], list[Rivals]]:
        direct: list[tuple[Wanted, Entry]] = []
        rivals: list[Rivals] = []
        index, below = self.index, self._below
        for item in self.wanted:
            named = index.get(below[item.leaf.path])
            claims = self._eligible(item, named) if named else ()
            if len(claims) > 1:
                rivals.append(Rivals(wanted=item, entries=tuple(claims)))
            elif claims:
                direct.append((item, claims[0]))
        return direct, rivals

    def _eligible(self, item: Wanted, claims: Sequence[Entry]) -> Sequence[Entry]:
        if len(claims) == 1 and claims[0].collection == item.collection and item.role == "model":
            return claims  # Nearly every leaf.
        own = [
            e for e in claims if e.collection == item.collection or None in (e.collection, item.collection)
        ]
        if item.role == "random":
            own = [entry for entry in own if entry.collection is None]
        if not own and self._may_stray(item):
            own = [entry for entry in claims if entry.collection not in self._shadows]
        if len(own) > 1 and not any(entry.named for entry in own):
            exact = [entry for entry in own if entry.segments == self._segments(item)]
            own = exact or own
        return own

    def _segments(self, item: Wanted) -> tuple[str, ...]:
        names = segments(item.path)
        return names[-len(self._below[item.leaf.path]) :] if len(names) == len(item.tokens) else names

    def _may_stray(self, item: Wanted) -> bool:
        """Tells whether a leaf may come from a collection of another name.

        Linen names custom collections freely, so a custom Variable type may. A
        parameter comes from `params` wherever the checkpoint has one: a copy of
        it (`ema_params`) is another value.
        """
        if item.role != "model":
            return False
        return item.leaf.kind is not nnx.Param or "params" not in self._collections

    @cached_property
    def _shadows(self) -> set[str | None]:
        """The collections that are copies of the parameters, more than half of them."""
        params = self._collections.get("params", set[Tokens]())
        return {
            name
            for name, paths in self._collections.items()
            if name not in ("params", None) and len(paths & params) * 2 > len(paths)
        }

    def _derived(self, free: Sequence[Entry]) -> tuple[dict[Tokens, Entry], list[Homeless]]:
        leaves, sources = dict[Tokens, StoredLeaf](), dict[Path, Entry]()
        for at, entry in enumerate(free):
            leaf = _as_leaf(entry, at)
            leaves[strip(entry.tokens, self.roots.stored)] = leaf
            sources[leaf.path] = entry
        derived, homeless = derive(leaves)
        entries = {item.path: _entry_of(item.path, item.recipe, item.reason, sources) for item in derived}
        return entries, [item for item in homeless if isinstance(sources[item.leaf.path].recipe, Read)]

    def _restacked(
        self, left: Sequence[Wanted], free: Sequence[Entry]
    ) -> tuple[dict[Path, Found], list[UnclearAxis], set[Tokens]]:
        found: dict[Path, Found] = {}
        groups: set[Tokens] = set()
        unclear: list[UnclearAxis] = []
        for collection in dict.fromkeys(item.collection for item in left):
            some = [item for item in left if item.collection == collection]
            paths = {self._below[item.leaf.path]: item for item in some}
            wanted = Side(
                [p for tokens, item in paths.items() for p in pieces_of(tokens, item.leaf.shape)],
                self._wanted_pieces,
            )
            stored = Side(
                list(self._stored_pieces(free, collection)),
                functools.partial(self._stored_pieces, self.entries, collection),
            )
            made, open_groups = restack(wanted, stored, {rule.tokens: rule.axis for rule in self.axes})
            unclear += open_groups
            groups |= {
                (*group.parent, group.name) for group, _ in wanted.by_key.keys() & stored.by_key.keys()
            }
            for tokens, item in made.items():
                leaf = paths[tokens].leaf
                found[leaf.path] = Found(
                    recipe=item.recipe, missing_layers=item.missing, surplus=item.surplus
                )
        return found, unclear, groups

    def _arranged(
        self, left: Sequence[Wanted], free: Iterable[Entry], found: Mapping[Path, Found]
    ) -> tuple[dict[Path, Found], Arranged]:
        """Joins what is left by the order and the shapes of layers."""
        open_places = [item for item in left if item.role == "model" and item.leaf.path not in found]
        if not open_places:
            return {}, Arranged()
        used = {path for item in found.values() for path in reads(item.recipe)}
        unused = [entry for entry in free if used.isdisjoint(entry.sources)]
        told = all(item.collection for item in (*open_places, *unused))
        wanted = [
            Part(self._below[item.leaf.path], item.leaf.shape, item.collection if told else None)
            for item in open_places
        ]
        stored = [
            Part(tokens, entry.shape, entry.collection if told else None, entry)
            for entry in unused
            for tokens in self._readings(entry)
        ]
        arranged = arrange(wanted, stored, {rule.tokens: rule.axis for rule in self.axes})
        placed = {
            item.leaf.path: Found(recipe=made.recipe, missing_layers=made.missing)
            for item in open_places
            if (made := arranged.found.get(self._below[item.leaf.path])) is not None
        }
        return placed, arranged

    def _wanted_pieces(self) -> Iterable[LayerPiece]:
        for item in self.wanted:
            yield from pieces_of(self._below[item.leaf.path], item.leaf.shape)

    def _stored_pieces(self, free: Iterable[Entry], collection: str | None) -> Iterable[LayerPiece]:
        for entry in free:
            if entry.collection == collection or None in (entry.collection, collection):
                for tokens in self._readings(entry):
                    yield from pieces_of(tokens, entry.shape, entry)


def _transient(item: Wanted) -> bool:
    return item.role == "transient"


def _as_leaf(entry: Entry, number: int) -> StoredLeaf:
    """Returns an entry as a stored leaf; its path is made up where a rule acted on its value."""
    path: Path = entry.recipe.path if isinstance(entry.recipe, Read) else ("(by rule)", number)
    return StoredLeaf(path=path, shape=entry.shape, dtype=entry.dtype)


def _entry_of(tokens: Tokens, recipe: Recipe, reason: str, sources: Mapping[Path, Entry]) -> Entry:
    parts = [sources[path] for path in reads(recipe)]
    return dataclasses.replace(
        parts[0],
        segments=tokens,
        recipe=substitute(recipe, lambda path: sources[path].recipe),
        shape=shape_of(recipe, {path: sources[path].shape for path in reads(recipe)}),
        reason="; ".join(dict.fromkeys(filter(None, (*(part.reason for part in parts), reason)))),
        fixed=(),
        named=False,
    )
