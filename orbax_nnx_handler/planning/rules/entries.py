"""What rules act on: stored leaves under the paths that `orbax-nnx tree` prints; which are like a name."""

import dataclasses
import difflib
import functools
import operator
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np

from orbax_nnx_handler.planning.core.leaves import Shape, derived, record, with_fields
from orbax_nnx_handler.planning.core.paths import Path, Tokens, canonical, parse, segments
from orbax_nnx_handler.planning.core.recipes import (
    Concat,
    Fill,
    Index,
    Read,
    Recipe,
    Slice,
    Stack,
    parts_of,
    reads,
)
from orbax_nnx_handler.planning.layouts.layout import FLAX_COLLECTIONS, Placement, Section, is_copy_name
from orbax_nnx_handler.planning.layouts.linen import AUX

Names = tuple[str, ...]
OPT_STATE = "opt_state"


@record
class Entry:
    """A value that the checkpoint can give, under the path the target would know it by.

    Attributes:
        segments: Path within its collection, after renames.
        collection: The Linen collection, or None where the layout tells none.
        recipe: How to make it from stored leaves; a plain `Read` unless a rule acted.
        shape: The shape that the recipe gives.
        dtype: The stored dtype.
        reason: What was done to the stored leaf and by whom; empty for nothing.
        prefix: The segments above the collection's paths (`params/params`).
        fixed: Which segments of the whole path a rename wrote; those are not renamed again.
        named: Whether a rule gave it its path, which then is a wanted one.
        cast: The dtype that a rule casts it to, or None.
        section: The part of a train state that it belongs to. An optimizer is one entry: the
            path that ends in its `opt_state`, since moments follow their parameters.
        owner: Canonical keys above its train state.
        leaves: The stored leaves of an optimizer.
        placed: What the stored leaf is, where it is one leaf.
    """

    segments: tuple[str, ...]
    collection: str | None
    recipe: Recipe
    shape: Shape
    dtype: np.dtype[Any] | None
    reason: str = ""
    prefix: tuple[str, ...] = ()
    fixed: tuple[bool, ...] = ()
    named: bool = False
    cast: np.dtype[Any] | None = None
    section: Section = "model"
    owner: Tokens = ()
    leaves: tuple[Path, ...] = ()
    placed: Placement | None = dataclasses.field(default=None, compare=False)

    @derived
    def tokens(self) -> Tokens:
        """The canonical path within the collection."""
        if self.placed is not None and self.placed.path == self.segments:
            return self.placed.tokens  # Nearly every leaf: no rule has renamed it.
        return canonical(self.segments)

    @derived
    def whole(self) -> tuple[str, ...]:
        """The whole path, owner and collection included."""
        return self.prefix + self.segments

    @property
    def unboxed(self) -> Tokens | None:
        """The canonical path without a last level `value`, where there is one.

        `nn.with_partitioning` boxes and `nnx.State` add that level; a module or
        parameter may be called `value` too, so both readings are kept.
        """
        return self.tokens[:-1] if len(self.tokens) > 1 and self.tokens[-1] == "value" else None

    @derived
    def sources(self) -> tuple[Path, ...]:
        """The stored leaves it is made from."""
        return self.leaves or tuple(dict.fromkeys(reads(self.recipe)))

    def called(self, whole: Sequence[str], fixed: Sequence[bool] = (), **changes: Any) -> "Entry":
        """Returns the entry under another whole path, and with other changes.

        Where a rule wrote above the collection's own paths, the path is read anew: a key that is
        its own collection or one of Flax's tells owner and collection, a path without one belongs to none.
        """
        depth = len(self.prefix)
        names, marks = tuple(whole), tuple(fixed)
        if names[:depth] == self.prefix and len(names) > depth and self.section not in ("optimizer", "step"):
            owner = () if self.section == "other" else self.owner
            return with_fields(self, segments=names[depth:], fixed=marks, owner=owner, **changes)
        if self.section == "optimizer":
            above = names[:-1] if names[-1:] == (OPT_STATE,) else names
            return dataclasses.replace(
                self, segments=names, prefix=(), fixed=marks, owner=canonical(above), **changes
            )
        if self.section == "step":
            return dataclasses.replace(
                self, segments=names, prefix=(), fixed=marks, owner=canonical(names[:-1]), **changes
            )
        if (known := self._in_its_collection(names)) is not None:
            above, owner = known
            return with_fields(
                self, segments=names[above:], prefix=names[:above], fixed=marks, owner=owner, **changes
            )
        if self.collection is None and depth and self.owner == canonical(self.prefix):
            # Without collections, its network is what stands above its own path.
            above = max(len(names) - len(self.segments), 0)
            return with_fields(
                self,
                segments=names[above:],
                prefix=names[:above],
                fixed=marks,
                owner=canonical(names[:above]),
                **changes,
            )
        at = next((at for at, name in enumerate(names[:-1]) if name in FLAX_COLLECTIONS), None)
        if at is None and depth == 1 and self.owner == canonical(names[:1]):
            # Weights that have their network and `params` in one key, `policy_params`, under its name.
            return with_fields(self, segments=names[1:], prefix=names[:1], fixed=marks, **changes)
        if at is None:
            # What a rule has taken out of a copy is a parameter like any other.
            is_kept = len(names) < len(self.whole) and not is_copy_name(self.collection or "")
            kept = self.collection if is_kept else None
            return dataclasses.replace(
                self, segments=names, prefix=(), fixed=marks, collection=kept, owner=(), **changes
            )
        return dataclasses.replace(
            self,
            segments=names[at + 1 :],
            prefix=names[: at + 1],
            fixed=marks,
            collection=names[at],
            owner=canonical(names[:at]),
            section="model",
            **changes,
        )

    def _in_its_collection(self, names: Names) -> tuple[int, Tokens] | None:
        """Returns how many levels are above its collection's paths, and the owner; None if it has left it."""
        if names[:1] == self.prefix[:1] == (AUX,) and self.placed and len(names) == len(self.whole):
            # What lies aside, in another arrangement of layers, goes with its network.
            return len(self.prefix), canonical(names[1 : 1 + len(self.placed.owner)])
        # One level, or two where each collection lies below `params`.
        depths = range(len(self.prefix))
        own = next((self.prefix[at:] for at in depths if canonical(self.prefix[:at]) == self.owner), ())
        starts = range(len(names) - len(own)) if own else ()
        start = next((at for at in starts if names[at : at + len(own)] == own), None)
        return None if start is None else (start + len(own), canonical(names[:start]))


class PathIndex:
    """Which of many paths hold a segment, and some that held it before they were changed."""

    def __init__(self, paths: Iterable[Names]) -> None:
        self._holding: dict[str, set[int]] = defaultdict(set)
        for at, path in enumerate(paths):
            self.add(at, path)

    def add(self, at: int, path: Names) -> None:
        """Takes note of what a path is called now."""
        for segment in path:
            self._holding[segment].add(at)

    def holding_all(self, segments: Iterable[str]) -> list[int]:
        """Returns the paths that may hold each of some segments."""
        fewest, *others = sorted((self._holding.get(one, set[int]()) for one in segments), key=len)
        return sorted(fewest.intersection(*others))

    def holding_any(self, accepts: Callable[[str], object]) -> list[int]:
        """Returns the paths that may hold some segment that is accepted."""
        found = (held for segment, held in self._holding.items() if accepts(segment))
        return sorted(set[int]().union(*found))


Called = Callable[[Entry], Names]


def whole_of(entry: Entry) -> tuple[str, ...]:
    """Returns the whole path of an entry."""
    return entry.whole


class Entries(Sequence[Entry]):
    """Stored leaves as rules meet them, indexed by the segments of their paths once several rules have asked.

    A rename leaves each in its place, so that what comes of it shares the index, which only grows, and the
    list of all, beside the few that were changed since: twenty thousand rules for a leaf each copy it rarely.

    Attributes:
        changed: What the last rename has made, by place.
    """

    def __init__(self, entries: Iterable[Entry]) -> None:
        self._all: Sequence[Entry] = [*entries]
        self._since: Mapping[int, Entry] = {}
        self.changed: Mapping[int, Entry] = {}
        self._asked: dict[Called, int] = {}
        self._indices: dict[Called, PathIndex] = {}

    def __len__(self) -> int:
        return len(self._all)

    @overload
    def __getitem__(self, at: int) -> Entry: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Entry]: ...
    def __getitem__(self, at: Any) -> Any:
        if self._since and not (isinstance(at, int) and at >= 0):
            return [*self][at]
        return self._since.get(at) or self._all[at] if self._since else self._all[at]

    def __iter__(self) -> Iterator[Entry]:
        if self._since:
            every = [*self._all]
            for at, entry in self._since.items():
                every[at] = entry
            self._all, self._since = every, {}
        return iter(self._all)

    @classmethod
    def of(cls, entries: Sequence[Entry]) -> "Entries":
        """Returns entries as such a list."""
        return entries if isinstance(entries, cls) else cls(entries)

    def index_of(self, called: Called) -> PathIndex | None:
        """Returns the index of what the entries are called; None where a look at each is as quick."""
        self._asked[called] = self._asked.get(called, 0) + 1
        if called not in self._indices and self._asked[called] > _LOOKS:
            self._indices[called] = PathIndex(map(called, self))
        return self._indices.get(called)

    def holding(self, names: Names) -> Sequence[int]:
        """Returns the places of the entries that may hold all of some segments."""
        index = self.index_of(whole_of)
        return range(len(self)) if index is None else index.holding_all(names)

    def has(self, names: Names) -> bool:
        """Tells whether an entry has a path."""
        return any(self[at].segments == names for at in self.holding(names))

    def with_changes(self, changed: Mapping[int, Entry]) -> "Entries":
        """Returns the entries with others in some places."""
        found = Entries.__new__(Entries)
        found._all, found.changed, found._since = self._all, changed, {**self._since, **changed}
        found._asked, found._indices = dict(self._asked), dict(self._indices)
        if len(found._since) > _MOST_CHANGES:
            iter(found)
        for at, entry in changed.items():
            for called, index in self._indices.items():
                index.add(at, called(entry))
        return found


_LOOKS, _MOST_CHANGES = 3, 256


def model_entries(placements: Iterable[Placement]) -> list[Entry]:
    """Returns one entry for each stored leaf of the models."""
    return [_entry(placement) for placement in placements if placement.section == "model"]


def every_entry(placements: Sequence[Placement]) -> list[Entry]:
    """Returns the model's entries, those of steps and of leaves beside, and one for each optimizer."""
    plain = [_entry(placement) for placement in placements if placement.section != "optimizer"]
    optimizers: dict[Path, list[Placement]] = {}
    for placement in placements:
        if placement.section == "optimizer":
            optimizers.setdefault(placement.owner, []).append(placement)
    return plain + [_optimizer(owner, items) for owner, items in optimizers.items()]


def by_own_leaf(entries: Iterable[Entry]) -> dict[Path, Entry]:
    """Returns the entries that are made of one leaf each, which nothing else is made of, by that leaf."""
    listed = list(entries)
    count = Counter(path for entry in listed for path in entry.sources)
    return {entry.sources[0]: entry for entry in listed if [count[path] for path in entry.sources] == [1]}


def loose_parts(entries: Iterable[Entry], made: Iterable[Recipe]) -> list[Entry]:
    """Returns the parts that rules cut out of stored leaves, and that nothing is made of."""
    cut = [entry for entry in entries if not isinstance(entry.recipe, Read)]
    cut = [x for x in cut if any(isinstance(part, Index | Slice) for part in parts_of(x.recipe))]
    taken = {part for recipe in (made if cut else ()) for part in parts_of(recipe)}
    return [entry for entry in cut if entry.recipe not in taken]


def from_entries(recipe: Recipe, made: Mapping[Recipe, Path]) -> Recipe:
    """Returns a recipe with what rules have made, whole or inside it, read from paths of its own."""
    if recipe in made:
        return Read(made[recipe])
    if isinstance(recipe, Stack | Concat):
        return type(recipe)(tuple(from_entries(source, made) for source in recipe.sources), recipe.axis)
    if isinstance(recipe, Read | Fill):
        return recipe
    return dataclasses.replace(recipe, source=from_entries(recipe.source, made))


def _optimizer(owner: Path, items: Sequence[Placement]) -> Entry:
    path, below = items[0].leaf.path, items[0].path
    above = path[: -len(below)] if path[-len(below) :] == below else (*owner, OPT_STATE)
    return Entry(
        segments=segments(above) or (OPT_STATE,),
        collection=None,
        recipe=Read(items[0].leaf.path),
        shape=(),
        dtype=None,
        section="optimizer",
        owner=canonical(owner),
        leaves=tuple(item.leaf.path for item in items),
    )


def _entry(placement: Placement) -> Entry:
    leaf, below = placement.leaf, placement.path
    above = leaf.path[: -len(below)]
    names = segments(below)
    # Nearly every path within its collection is an end of the stored path.
    is_end = leaf.path[len(above) :] == below
    return Entry(
        segments=names,
        collection=placement.collection,
        recipe=Read(leaf.path),
        shape=leaf.shape,
        dtype=leaf.dtype,
        prefix=_prefix(above) if is_end else _above(segments(leaf.path), names),
        section=placement.section,
        owner=_owner(placement.owner),
        placed=placement,
    )


def _above(stored: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    """Returns the stored keys above a path that a layout has put in other words: where most of them agree."""
    offsets = range(max(len(stored) - len(names), 0) + 1)
    return tuple(stored[: max(offsets, key=lambda at: (sum(map(operator.eq, stored[at:], names)), at))])


@functools.lru_cache(maxsize=256)
def _prefix(path: Path) -> tuple[str, ...]:
    return segments(path) if path else ()


@functools.lru_cache(maxsize=256)
def _owner(path: Path) -> Tokens:
    return canonical(path)


SHOWN = 3
ALIKE = 0.6
_MOST_NAMES = 20_000
"""How many different runs of segments are compared; numbers and spellings aside, a model has hundreds."""

NUMBER = re.compile(r"\d+")
PLACE = re.compile(r"\{[A-Za-z_]\w*\}|(?<![^/])\*(?![^/])")
PLACE_OR_NUMBER = re.compile(f"{PLACE.pattern}|{NUMBER.pattern}")


def alike(text: str, entries: Iterable[Entry]) -> list[tuple[Names, Entry]]:
    """Returns the runs of segments that are most like a pattern, each with a leaf that has it, best first.

    A run begins no later than the first segment that the pattern names: `d/params/l/w` for `d/l/w`, and
    not the `l/w` that other networks have too.
    """
    aim, numbers = plain(text), NUMBER.findall(PLACE.sub("", text))
    parts = [*map(plain, parse(text.replace(".", "/")))]
    if with_levels := _with_levels_between(parts, numbers, entries):
        return with_levels
    width, said = len(parts), {*parts} - {"#"}
    found: dict[str, tuple[Names, Entry]] = {}
    seen: dict[Names, int] = {}
    most: dict[str, int] = {}
    for entry in entries:
        count = len(said.intersection(map(plain, entry.whole)))
        for names in _runs(entry.whole, width):
            if seen.get(names, -1) >= count or len(seen) == _MOST_NAMES:
                continue
            seen[names] = count
            key = "/".join(map(plain, names))
            is_better = numbers and NUMBER.findall("/".join(names)) == numbers
            if count > most.get(key, -1) or (count == most[key] and is_better):
                found[key], most[key] = (names, entry), count
    ratios = _ratios(aim, found)
    best = sorted(ratios, key=lambda key: (-ratios[key], -most[key]))[:SHOWN]
    kept = [found[key] for key in best if ratios[key] >= max(ALIKE, ratios[best[0]] - 0.15)]
    return [(_from_what_is_named(names, entry.whole, said), entry) for names, entry in kept]


def _with_levels_between(
    parts: Sequence[str], numbers: Sequence[str], entries: Iterable[Entry]
) -> list[tuple[Names, Entry]]:
    """Returns the runs with all segments of a pattern and others between, shortest first: `d/params/l`."""
    found: dict[Names, tuple[Names, Entry]] = {}
    for entry in entries:
        places, at = list[int](), 0
        whole = tuple(map(plain, entry.whole))
        while len(places) < len(parts) and parts[len(places)] in whole[at:]:
            places.append(whole.index(parts[len(places)], at))
            at = places[-1] + 1
        if 0 < len(parts) == len(places) < at - places[0]:
            names = entry.whole[places[0] : at]
            if whole[places[0] : at] not in found or NUMBER.findall("/".join(names)) == numbers:
                found[whole[places[0] : at]] = (names, entry)
    return sorted(found.values(), key=lambda item: len(item[0]))[:SHOWN]


def _from_what_is_named(names: Names, whole: Names, said: Collection[str]) -> Names:
    """Returns a run of a path's segments with those in front of it from the first that is named."""
    start = next(at for at in range(len(whole)) if whole[at : at + len(names)] == names)
    first = next((at for at in range(start) if plain(whole[at]) in said), start)
    return whole[first : start + len(names)]


def _runs(whole: Names, width: int) -> Iterable[Names]:
    """Yields the runs of about so many segments; a number may be a segment of its own on one side only."""
    for length in range(max(width - 2, 1), width + 3):
        for start in range(len(whole) - length + 1):
            yield whole[start : start + length]


def _ratios(aim: str, keys: Iterable[str]) -> dict[str, float]:
    matcher = difflib.SequenceMatcher(None, "", aim, autojunk=False)
    found: dict[str, float] = defaultdict(float)
    for key in keys:
        matcher.set_seq1(key)
        if matcher.real_quick_ratio() >= ALIKE and matcher.quick_ratio() >= ALIKE:
            found[key] = matcher.ratio()
    return found


@functools.lru_cache(maxsize=65536)
def plain(text: str) -> str:
    """Returns names as they are compared: no case, one separator, every number and place alike."""
    return re.sub(r"[._/]+", "/", PLACE_OR_NUMBER.sub("#", text)).strip("/").lower()
