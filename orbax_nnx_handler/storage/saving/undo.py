"""The leaves of a save under the names and shapes before the user's rules, or before a restore."""

import contextlib
import dataclasses
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from flax import nnx

from orbax_nnx_handler.planning.core.errors import RuleError
from orbax_nnx_handler.planning.core.leaves import COPIES, OF_GRADIENTS, Shape, StoredLeaf, WantedLeaf
from orbax_nnx_handler.planning.core.paths import Path, canonical, render, segments
from orbax_nnx_handler.planning.core.recipes import (
    Fill,
    Read,
    Recipe,
    Scale,
    computes,
    describe,
    of_moment,
    parts_of,
    reads,
    render_reads,
    repeats,
    shape_of,
    simplify,
    substitute,
)
from orbax_nnx_handler.planning.layouts.language import MAXTEXT
from orbax_nnx_handler.planning.layouts.linen import AUX, TRAIN_STATE
from orbax_nnx_handler.planning.mapping.matches import Dropped
from orbax_nnx_handler.planning.restore_plan import RestorePlan
from orbax_nnx_handler.planning.rules import Rename, Rule, invert
from orbax_nnx_handler.planning.rules.applying import numbered_as_weights
from orbax_nnx_handler.planning.rules.entries import Entry, by_own_leaf, every_entry, model_entries
from orbax_nnx_handler.planning.rules.inverse import inverse, undo_rules
from orbax_nnx_handler.storage.saving.arrange import Flavour, check_distinct
from orbax_nnx_handler.storage.saving.saved import PlacesInLayout, SavedLeaf, moved_empty

SavedLeaves = Mapping[Path, SavedLeaf]
Empty = Mapping[Path, Any]
Copies = Sequence[tuple[SavedLeaf, SavedLeaf]]
"""Leaves that are not stored, each with what will be restored for it: they have to be equal."""


def without_rules(
    leaves: SavedLeaves, empty: Empty, rules: Sequence[Rule], flavour: Flavour, streams: Collection[Path] = ()
) -> tuple[SavedLeaves, Empty, Copies]:
    """Returns the leaves and empty nodes as they must be stored for the rules to restore them, and copies.

    Random state, whose stored paths are `streams`, stays where it is: see `streams_as_stored`.

    Raises:
        RuleError: A rule cannot be undone, a moment cannot follow its parameter, or what lies beside the
            model would not be restored as it is.
    """
    if not rules:
        return leaves, empty, ()
    model = {path: leaf for path, leaf in leaves.items() if path[0] != "opt_state"}
    stored = {path: StoredLeaf(path=path, shape=leaf.shape, dtype=leaf.dtype) for path, leaf in model.items()}
    placed = (MAXTEXT if flavour == "maxtext" else TRAIN_STATE).place(stored)
    entries = model_entries(placed)
    beside = [at for at in placed if at.section == "aux" and at.leaf.path not in streams]
    try:
        own = {path: leaf.like for path, leaf in model.items()}
        rules_undone = undo_rules(entries, rules, own, [_stream(path[1:]) for path in streams])
    except RuleError as error:
        raise _of_what_lies_beside(every_entry(beside), entries, rules) or error from None
    copies = rules_undone.copies
    touched = {path for entry in entries for path in entry.sources}
    aside = _aside({entry.sources[0]: entry for entry in every_entry(beside)}, rules)
    kept = {path: Read(path) for path in model if path not in touched | aside.keys()}
    ways = {**rules_undone.ways, **kept, **dict(aside.values())}
    undone = {path: _combined(way, model) for path, way in ways.items()}
    pairs = [(model[path], _as(model[path], _combined(way, model))) for path, way in copies.items()]
    moments = _Moments(ways, copies, model, depth=2 if flavour == "maxtext" else 1)
    written, nothing = moments.added(undone, leaves, empty)
    return written, nothing, (*pairs, *moments.copies(leaves, empty))


def _of_what_lies_beside(
    beside: Sequence[Entry], model: Sequence[Entry], rules: Sequence[Rule]
) -> RuleError | None:
    """Returns the error for a rule that names nothing of the model, but what is kept beside it."""
    for rule in reversed(rules):
        if not isinstance(rule, Rename):
            return None  # What it makes beside the model is not read.
        found, own = rule.inverse().apply(beside), rule.inverse().apply(model)
        if found.matched and not own.matched:
            return RuleError(
                f"{rule} names what lies beside the model, and rules alone do not tell that it was a "
                "collection.",
                hints=["pass what the restore did, which is undone leaf by leaf: renames=handler.report."],
            )
        beside, model = found.entries, own.entries
    return None


def _aside(entries: Mapping[Path, Entry], rules: Sequence[Rule]) -> dict[Path, tuple[Path, Recipe]]:
    """Returns where, and made how, each leaf that is kept aside is stored to be restored as it is.

    Rules move and change it, as a second model's weight. What they make of several leaves is not read:
    those are stored as they are.

    Raises:
        RuleError: The rules would restore another leaf in its place, or none.
    """
    undone = by_own_leaf(_undone(list(entries.values()), rules)) if entries else {}
    undone = {path: new for path, new in undone.items() if new.prefix == entries[path].prefix}
    gone = _lost(entries, {**entries, **undone}, rules)
    stored = {path: entry if path in gone else undone.get(path, entry) for path, entry in entries.items()}
    if lost := _lost(entries, stored, rules):
        listed = "\n".join(f"  {render(entries[path].whole)}" for path in lost[:20])
        raise RuleError(
            f"what lies beside the model would not be restored as it is under these rules, which meet it too:"
            f"\n{listed}",
            paths=lost,
            hints=["begin the patterns and replacements with params/, and they are for the model alone."],
        )
    # A number that only rules join to the name in front of it stays a key of its own.
    moved = {path: new.whole for path, new in stored.items() if new.tokens != entries[path].tokens}
    return {path: (moved.get(path, path), new.recipe) for path, new in stored.items()}


def _undone(entries: Sequence[Entry], rules: Sequence[Rule]) -> Sequence[Entry]:
    """Returns what lies aside before rules, as far as they can be undone there."""
    back = invert(rules)
    entries = numbered_as_weights(entries, back)
    for rule in back:
        with contextlib.suppress(RuleError):  # What it leaves as it is may still be restored so.
            entries = rule.apply(entries).entries
    return entries


def _lost(entries: Mapping[Path, Entry], stored: Mapping[Path, Entry], rules: Sequence[Rule]) -> list[Path]:
    """Returns which leaves a restore by rules would not find as they are."""
    fresh = [
        dataclasses.replace(entry, recipe=Read(path), named=False, reason="", fixed=(), placed=None)
        for path, entry in stored.items()
    ]
    after = by_own_leaf(_renamed(rules, numbered_as_weights(fresh, rules))) if fresh else {}
    shapes = {path: entry.shape for path, entry in entries.items()}

    def is_same(path: Path, found: Entry) -> bool:
        way = simplify(substitute(found.recipe, lambda at: stored[at].recipe), shapes)
        return found.tokens == entries[path].tokens and way == Read(path)

    return [path for path in entries if path not in after or not is_same(path, after[path])]


def _as(copy: SavedLeaf, made: SavedLeaf) -> SavedLeaf:
    return copy.through(made.recipe, made.shape)


def check_lead_back(leaves: SavedLeaves, rules: Sequence[Rule], plan: RestorePlan) -> None:
    """Checks that rules undone store each leaf under the name that a restore by them has read it from.

    Rules alone do not tell: of `encoder/ln` and `decoder/norm`, `("ln", "norm")` makes two `norm`.

    Raises:
        RuleError: A leaf would get another name.
    """
    if tuple(rules) != tuple(plan.renames):
        return
    places = {leaf.like: at for at, leaf in leaves.items() if leaf.recipe == Read(leaf.like)}
    rows = dict[str, Path]()
    for path, item in plan.restored.items():
        at, source = places.get(path), item.recipe
        if at is None or not isinstance(source, Read):
            continue
        # A save has levels of its own above the model.
        now, then = canonical(at)[::-1], plan.sides.placements[source.path].tokens[::-1]
        if any(one != other for one, other in zip(now, then, strict=False)):
            rows[f"  {render(source.path)} would be stored as {render(at)}"] = path
    if rows:
        raise RuleError(
            "these rules do not lead back to what the restore has read:\n" + "\n".join([*rows][:20]),
            paths=[*rows.values()],
            hints=[
                "a name that a rule writes was there before: name more of the path on both of its sides.",
                "or undo what the restore did, leaf by leaf: NNXLinenSave(item, renames=handler.report).",
            ],
        )


def as_restored(leaves: SavedLeaves, empty: Empty, plan: RestorePlan) -> tuple[SavedLeaves, Empty, Copies]:
    """Returns leaves and empty nodes as the checkpoint had them that they were restored from, and copies.

    Args:
        leaves: The leaves as they would be stored without a restore, cells whole.
        empty: The nodes that hold nothing.
        plan: What the restore did. Leaves that it has not restored stay where they are.

    Raises:
        RuleError: What was done to a leaf cannot be undone.
        ValueError: The plan is of another item.
    """
    restored = {path: item for path, item in plan.restored.items() if not _is_kept_apart(item.wanted)}
    shapes = {leaf.like: leaf.shape for leaf in leaves.values()}
    strange = [path for path, item in restored.items() if shapes.get(path) != item.wanted.shape]
    if strange:
        raise _of_another(strange, restored, shapes)
    stored = {path: placement.leaf for path, placement in plan.sides.placements.items()}
    read = Counter(path for item in restored.values() for path in reads(item.recipe))
    # One count of T5X's is the step and that of each state, one zero the unused moment of all layers.
    copied = plan.sides.copied.union(path for path, count in read.items() if count > 1)
    # The last one is undone first: of a leaf and its copy, the one that has all its digits is stored.
    order = sorted(restored, key=lambda path: restored[path].cast == "same") if copied else restored
    ways = inverse(
        {path: restored[path].recipe for path in order},
        {path: leaf.shape for path, leaf in stored.items()},
        shapes,
        copied,
    )
    place = PlacesInLayout(leaves, empty, plan)
    unsourced = {at: leaf for at, leaf in leaves.items() if leaf.like not in restored}
    made = ((at, reads(way)[0]) for at, way in ways.items())
    # A leaf that was not restored may have the path that a rule has taken from another one.
    check_distinct((*((place(at), leaf.like) for at, leaf in unsourced.items()), *made))
    written = {place(at): leaf for at, leaf in unsourced.items()}
    by_item = {leaf.like: leaf for leaf in leaves.values()}
    for at, way in ways.items():
        source = by_item[reads(way)[0]]
        origin = restored[source.like]
        dtype = origin.stored_dtype if origin.cast in ("count", "integer") else source.dtype
        shape = shape_of(way, shapes)
        written[at] = dataclasses.replace(source, recipe=way, shape=shape, dtype=dtype)
    # They were zeros, or they would not have been restored, and have no counterpart in the state.
    dropped = {at: item.leaf.shape for at, item in plan.dropped.items() if isinstance(item, Dropped)}
    written |= _zeros(dropped, written, slice(-2))
    # Of layers that became one stack, the zeros of one were read.
    unused = {at: item.leaf.shape for at, item in plan.sides.placements.items() if item.is_unused}
    known = written.keys() | plan.unexpected.keys()
    written |= _zeros({at: unused[at] for at in unused if at not in known}, written, slice(3))
    again = {
        path: simplify(substitute(item.recipe, ways.__getitem__), shapes)
        for path, item in restored.items()
        if not copied.isdisjoint(reads(item.recipe)) or repeats(item.recipe)
    }
    copies = [
        (by_item[path], by_item[path].through(recipe, shapes[path]))
        for path, recipe in again.items()
        if recipe != Read(path)
    ]
    return written, moved_empty(empty, leaves, written, place), copies


def _of_another(
    strange: Sequence[Path], restored: Collection[Path], shapes: Mapping[Path, Shape]
) -> ValueError:
    listed = "\n".join(f"  {render(path)}" for path in strange[:20])
    ends = {path[at:] for path in restored for at in range(len(path))}
    is_part = ends.issuperset(shapes) and not any(path in shapes for path in strange)
    what, hint = "another item", "pass what was restored, or the rules themselves."
    if is_part:
        what = "a whole of which this item is a part"
        hint = "save the whole, or pass the plan of the part alone: renames=plan_restore(path, part)."
    lost = "are not in this one" if is_part else "are not in this one, or have another shape"
    count = f"{len(strange)} of its leaves {lost}"
    return ValueError(f"the plan in renames= is of {what}: {count}:\n{listed}\nhint: {hint}")


def _zeros(shapes: Mapping[Path, Shape], beside: SavedLeaves, above: slice) -> dict[Path, SavedLeaf]:
    """Returns zeros of shapes for those paths beside which something is saved, like the first of it."""
    first: dict[Path, SavedLeaf] = {}
    for path, leaf in beside.items() if shapes else ():
        first.setdefault(path[above], leaf)
    return {
        at: first[at[above]].through(Fill(shape), shape) for at, shape in shapes.items() if at[above] in first
    }


def streams_as_stored(streams: Mapping[Path, Path], undone: RestorePlan | Sequence[Rule]) -> dict[Path, Path]:
    """Returns where random state is stored below `nnx_aux` so that it is restored from there.

    Args:
        streams: Its places below `nnx_aux` by its own names, with its paths in the item.
        undone: What the restore did, or its rules.
    """
    if isinstance(undone, RestorePlan):
        read = {path: reads(item.recipe)[0] for path, item in undone.restored.items()}
        own = {at: read[path] for at, path in streams.items() if path in read}
        return {at: own[at][1:] if own.get(at, ())[:1] == (AUX,) else at for at in streams}
    entries = {(AUX, *at): _stream(at) for at in streams}
    stored = _aside(entries, [rule for rule in undone if isinstance(rule, Rename)])
    return {at: stored[AUX, *at][0][1:] for at in streams}


def _stream(at: Path) -> Entry:
    names = segments(at)
    return Entry(
        segments=names,
        collection=None,
        recipe=Read((AUX, *names)),
        shape=(),
        dtype=None,
        prefix=(AUX,),
        section="aux",
    )


def _renamed(rules: Sequence[Rule], entries: Sequence[Entry]) -> Sequence[Entry]:
    for rule in rules:
        entries = rule.apply(entries).entries
    return entries


def _is_kept_apart(leaf: WantedLeaf) -> bool:
    """Tells what a save has its own way with: random state, and what a program computes again."""
    return leaf.kind is not None and issubclass(leaf.kind, nnx.RngState | nnx.Cache | nnx.Intermediate)


def _combined(recipe: Recipe, leaves: SavedLeaves) -> SavedLeaf:
    """Returns what a recipe over stored paths makes of the leaves at them."""
    first = leaves[reads(recipe)[0]]
    if isinstance(recipe, Read):
        return first
    shapes = {path: leaves[path].shape for path in reads(recipe)}
    return first.through(substitute(recipe, lambda path: leaves[path].recipe), shape_of(recipe, shapes))


def _is_field(key: Any) -> bool:
    return key != "inner_state" and not str(key).isdecimal()


class _Moments:
    """Undoes, for every part of an optimizer that mirrors the parameters, what is undone for these."""

    def __init__(
        self,
        ways: Mapping[Path, Recipe],
        copies: Mapping[Path, Recipe],
        model: SavedLeaves,
        depth: int,
    ):
        self._ways, self._copies, self._depth = ways, copies, depth
        self._head: Path = ("params",) * depth
        self._shapes = {path: leaf.shape for path, leaf in model.items()}
        self._parameters: dict[Path, Path] = {}
        # Beside a parameter, something else may have its path in another collection.
        for path in sorted(model, key=self._is_below_params, reverse=True):
            # What has its own path in the item lies beside the model: an average of its weights, say.
            if self._is_below_params(path) or segments(model[path].like) != segments(path):
                self._parameters.setdefault(self._below(path), path)
        self._parameters.pop((), None)

    def _is_below_params(self, path: Path) -> bool:
        return path[: self._depth] == self._head

    def _below(self, path: Path) -> Path:
        """Returns a parameter's path without its collection, which a moment's path does not have."""
        return path[2:] if path[:2] == (AUX, "model") else path[self._depth :]

    def added(self, undone: SavedLeaves, leaves: SavedLeaves, empty: Empty) -> tuple[SavedLeaves, Empty]:
        """Returns the model's leaves with those of the optimizer, and what holds nothing."""
        written, nothing = (
            dict(undone),
            {path: value for path, value in empty.items() if path[0] != "opt_state"},
        )
        for at, below in self._all_subtrees(leaves, empty):
            if at is None:
                written |= {path: leaves[path] for path in below if path in leaves}
                nothing |= {path: empty[path] for path in below if path in empty}
                continue
            moments = {self._parameters[path[len(at) :]]: path for path in below}
            for name, way in self._ways.items():
                found = [moments[path] for path in reads(way) if path in moments]
                if not found:
                    continue
                to = (*at, *self._below(name))
                if all(path in empty for path in found):
                    nothing[to] = None
                else:
                    known = {p: leaves[q] for p, q in moments.items() if q in leaves}
                    written[to] = self._moved(way, known, self._field(at))
        return written, nothing

    def copies(self, leaves: SavedLeaves, empty: Empty) -> Iterator[tuple[SavedLeaf, SavedLeaf]]:
        """Yields the moments that are not stored, each with what will be restored for it."""
        for at, below in self._all_subtrees(leaves, empty) if self._copies else ():
            moments = {} if at is None else {self._parameters[path[len(at) :]]: path for path in below}
            known = {own: leaves[path] for own, path in moments.items() if path in leaves}
            for path, way in self._copies.items():
                if path in known and known.keys() >= set(reads(way)):
                    yield known[path], _as(known[path], self._moved(way, known, self._field(at or ())))

    def _all_subtrees(
        self, leaves: SavedLeaves, empty: Empty
    ) -> Iterator[tuple[Path | None, Sequence[Path]]]:
        return self._subtrees([path for path in (*leaves, *empty) if path[0] == "opt_state"], 1)

    def _subtrees(self, paths: Sequence[Path], depth: int) -> Iterator[tuple[Path | None, Sequence[Path]]]:
        """Yields the paths of each subtree that mirrors the parameters with where it is, and the others."""
        if self._mirrors(paths, depth):
            yield (paths[0][:depth] if paths else None), paths
            return
        inner: dict[Path, list[Path]] = defaultdict(list)
        for path in paths:
            inner[path[: depth + 1]].append(path)
        for at, below in inner.items():
            if below == [at]:
                yield None, below
            else:
                yield from self._subtrees(below, depth + 1)

    def _mirrors(self, paths: Sequence[Path], depth: int) -> bool:
        if any(path[depth:] not in self._parameters for path in paths):
            return False
        # A counter of the model may be called as one of optax is, which lies in no field.
        is_field = depth > 1 and all(_is_field(path[depth - 1]) for path in paths[:1])
        return is_field or all(self._is_below_params(self._parameters[path[depth:]]) for path in paths)

    def _field(self, at: Path) -> str:
        """Returns the name of the field that holds a subtree, of which MaxText calls the top `params`."""
        return str((*("",) * self._depth, *at)[-self._depth])

    def _moved(self, way: Recipe, moments: SavedLeaves, field: str) -> SavedLeaf:
        made = of_moment(way, field)
        if not isinstance(way, Read):
            self._check(way, moments, field, is_whole=isinstance(made, Read))
        return _combined(made, moments)

    def _check(self, way: Recipe, moments: SavedLeaves, field: str, *, is_whole: bool) -> None:
        absent = [path for path in reads(way) if path not in moments]
        pairs = [(moments[path].shape, self._shapes[path]) for path in reads(way) if path in moments]
        unlike = next((pair for pair in pairs if pair[0] != pair[1]), None)
        if any(isinstance(part, Scale) for part in parts_of(way)):
            why = "its parameter is scaled"
        elif repeats(way):
            why = "elements of its parameter are repeated"
        elif computes(way) and field not in COPIES | OF_GRADIENTS:
            why = f"nothing tells whether {field!r} is computed of gradients or holds parameters"
        elif unlike and not is_whole:
            why = (
                f"its shape is {unlike[0]}, that of its parameter {unlike[1]}; "
                "rules speak of the parameter's axes"
            )
        elif absent:
            why = "the optimizer leaves a part of it alone"
        else:
            return
        raise RuleError(
            f"a moment of {render_reads(way)} cannot be saved under these rules ({describe(way)}): {why}.",
            paths=list(reads(way)),
            hints=["save the model without its optimizer, or without renames."],
        )
