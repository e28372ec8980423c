"""Rules and recipes backwards: how leaves are stored so that they are restored as they are."""

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

from orbax_nnx_handler.planning.core.errors import RuleError
from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.paths import Path, canonical, linen_path, render, segments
from orbax_nnx_handler.planning.core.recipes import (
    Add,
    Concat,
    Fill,
    Index,
    Read,
    Recipe,
    Repeat,
    Reshape,
    Scale,
    Slice,
    Stack,
    Transpose,
    describe,
    first_of_each,
    reads,
    render_reads,
    repeats,
    shape_of,
    simplify,
    substitute,
)
from orbax_nnx_handler.planning.rules import Rename, Rule, StackLayers, UnstackLayers, apply_rules, invert
from orbax_nnx_handler.planning.rules.entries import Entry, PathIndex
from orbax_nnx_handler.planning.rules.rename import leads_back, unclear_undone
from orbax_nnx_handler.planning.rules.rule import compiled

__all__ = ["Undone", "inverse", "leads_back", "undo_rules", "unwritten_lists"]

_Known = tuple[Recipe, Recipe]
"""A recipe over stored leaves, and its value as a recipe over wanted ones."""


def inverse(
    recipes: Mapping[Path, Recipe],
    stored: Mapping[Path, Shape],
    wanted: Mapping[Path, Shape],
    copied: Collection[Path] = (),
) -> dict[Path, Recipe]:
    """Returns each stored leaf as a recipe over the wanted leaves that were made from it.

    Args:
        recipes: How each wanted leaf was made.
        stored: The shapes of the stored leaves that are read.
        wanted: The shapes of the wanted leaves.
        copied: Stored leaves that several wanted ones hold; made from one of them.

    Raises:
        RuleError: A step cannot be undone, two wanted leaves hold one stored element, or
            an element of a stored leaf is in none of them.
    """
    found: dict[Recipe, Recipe] = {}
    parts: dict[tuple[Recipe, int], dict[tuple[int, int], Recipe]] = defaultdict(dict)
    pending: list[_Known] = [(recipe, Read(path)) for path, recipe in recipes.items()]
    while pending:
        recipe, value = pending.pop()
        if isinstance(recipe, Index | Slice):
            start, size = (recipe.index, 0) if isinstance(recipe, Index) else (recipe.start, recipe.size)
            pieces = parts[recipe.source, recipe.axis]
            if (start, size) in pieces:
                if _are_copied(recipe, copied):
                    continue
                raise _twice(recipe, pieces[start, size], value)
            pieces[start, size] = value
            whole = _whole(pieces, recipe.axis, shape_of(recipe.source, stored)[recipe.axis])
            if whole is not None:
                pending.append((recipe.source, whole))
                del parts[recipe.source, recipe.axis]
        elif recipe in found and _are_copied(recipe, copied):
            continue
        elif recipe in found:
            raise _twice(recipe, found[recipe], value)
        else:
            found[recipe] = value
            pending += _undone(recipe, value, stored)
    made = {recipe.path: value for recipe, value in found.items() if isinstance(recipe, Read)}
    _check_whole(recipes, made, {key: part for key, part in parts.items() if not _are_copied(key[0], copied)})
    return {path: simplify(value, wanted) for path, value in made.items()}


def _are_copied(recipe: Recipe, copied: Collection[Path]) -> bool:
    return bool(copied) and all(path in copied for path in reads(recipe))


def _check_whole(
    recipes: Mapping[Path, Recipe],
    made: Mapping[Path, Recipe],
    parts: Mapping[tuple[Recipe, int], Mapping[tuple[int, int], Recipe]],
) -> None:
    """Raises where a stored leaf is not whole, or an element of it is there once more."""
    for (source, _), pieces in parts.items():
        whole = next((made[path] for path in reads(source) if path in made), None)
        if whole is not None:
            raise _twice(source, whole, next(iter(pieces.values())))
    lost = dict.fromkeys(path for recipe in recipes.values() for path in reads(recipe) if path not in made)
    if lost:
        listed = "\n".join(f"  {render(path)}" for path in lost)
        raise RuleError(
            f"{len(lost)} stored leaves are only in part in the state, so they cannot be written again:\n"
            f"{listed}",
            paths=list(lost),
            hints=["save without renames: NNX's own names and shapes are written."],
        )


def _whole(pieces: Mapping[tuple[int, int], Recipe], axis: int, length: int) -> Recipe | None:
    """Returns what pieces along an axis make together, once none is missing."""
    ordered = sorted(pieces)
    values = tuple(pieces[key] for key in ordered)
    if ordered == [(index, 0) for index in range(length)]:
        return Stack(values, axis)
    ends = list(itertools.accumulate(size for _, size in ordered))
    tiled = [start for start, _ in ordered] == [0, *ends[:-1]] and ends[-1] == length
    return Concat(values, axis) if tiled else None


def _undone(recipe: Recipe, value: Recipe, stored: Mapping[Path, Shape]) -> Iterable[_Known]:
    """Yields the recipes inside one whose value is known, with their values."""
    match recipe:
        case Stack(sources, axis):
            return [(source, Index(value, axis, at)) for at, source in enumerate(sources)]
        case Concat(sources, axis):
            sizes = [shape_of(source, stored)[axis] for source in sources]
            starts = itertools.accumulate(sizes, initial=0)
            cuts = zip(sources, starts, sizes, strict=False)
            return [(source, Slice(value, axis, start, size)) for source, start, size in cuts]
        case Transpose(source, permutation):
            back = sorted(range(len(permutation)), key=permutation.__getitem__)
            return [(source, Transpose(value, tuple(back)))]
        case Reshape(source, _):
            return [(source, Reshape(value, shape_of(source, stored)))]
        case Repeat(source, axis, count):
            return [(source, first_of_each(value, shape_of(recipe, stored), axis, count))]
        case Scale(source, factor) if abs(math.frexp(factor)[0]) == 0.5:
            # A power of two, so that no digit is lost either way.
            return [(source, Scale(value, 1 / factor))]
        case Add(source, constant):
            return [(source, Add(value, -constant))]
        case Read() | Fill():
            return []
        case _:
            raise RuleError(
                f"{render_reads(recipe)} cannot be written again: {describe(recipe)} is not undone exactly.",
                paths=list(reads(recipe)),
                hints=["save without renames: NNX's own names and values are written."],
            )


def _twice(recipe: Recipe, first: Recipe, second: Recipe) -> RuleError:
    return RuleError(
        f"{render_reads(first)} and {render_reads(second)} were both restored from {render_reads(recipe)}, "
        "which cannot be written twice.",
        paths=[*reads(first), *reads(second)],
        hints=["save without renames: NNX's own names are written, one leaf each."],
    )


EntryKey = tuple[str | None, tuple[str, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Undone:
    """What is stored under rules.

    Attributes:
        ways: For each path to store, from the tree's root, its recipe over the tree's own leaves.
        copies: For each leaf that a `Copy` has made, or that holds what a `Repeat` has made, what
            the rules will restore it as: not all of it is stored, so the two have to be equal.
    """

    ways: dict[Path, Recipe]
    copies: dict[Path, Recipe]


def undo_rules(
    entries: Sequence[Entry],
    rules: Sequence[Rule],
    own: Mapping[Path, Path] | None = None,
    beside: Sequence[Entry] = (),
) -> Undone:
    """Returns how each leaf is stored so that the rules restore it.

    Args:
        entries: The leaves of the tree to save, each a plain `Read`.
        rules: The rules of the restore.
        own: The path in the state of each leaf, which tells a number in a list (`layers`, `0`) from a
            name with one (`norm_1`); without it, each number that Linen may have joined is one.
        beside: The random state that is stored beside them: a rule may be for it alone.

    Raises:
        RuleError: A rule cannot be undone, matches nothing, or would not restore what is saved.
    """
    paths = own or {}
    after: Sequence[Entry] = [_apart(entry, paths.get(entry.sources[0])) for entry in entries]
    done: list[tuple[Rule, Sequence[Entry]]] = []
    for rule in invert(rules):
        moved = rule.apply(beside) if isinstance(rule, Rename) else None
        done.append((rule, after))
        after = _applied(done, may_miss=moved is not None and moved.matched > 0)
        beside = beside if moved is None else moved.entries
    stored: dict[Path, Entry] = {}
    for entry in after:
        whole = _respelled(entry, _joined(entry.segments))
        path = _path(whole)
        if path in stored:
            names = [render_reads(one.recipe) for one in (stored[path], entry)]
            raise RuleError(
                f"{names[0]} and {names[1]} would both be stored at {render(path)}: "
                "undone, the rules give them one name.",
                paths=[*stored[path].sources, *entry.sources],
                hints=["name more of their paths in the rules."],
            )
        stored[path] = whole
    copies = _check_way_back(entries, stored, rules, beside)
    return Undone(ways={path: entry.recipe for path, entry in stored.items()}, copies=copies)


_UNCLEAR = (
    "rules that lead to one name do not tell which of them it came from: name more of the path on both "
    "sides of each, or save with the plan or the report of the restore in their place."
)


_OF_THE_RESTORE = "rules are those of the restore, each from a stored name to one that the state has."

_MEETS_EVERY = (
    "undone, a rule meets every leaf of the name that it wrote: name more of the path on both sides, or save "
    "with the plan or the report of the restore in the place of the rules."
)


_UNCLEAR_IN_PATH = (
    'name more of the path on both sides, as ("params/word_embed", "params/embedding") does for '
    "params/embedding/embedding, or save with the plan or the report of the restore instead."
)


class _Number(str):
    """A number that Linen joins to the name in front of it: `layers`, `0` of `layers_0`."""

    name: str


def _applied(done: Sequence[tuple[Rule, Sequence[Entry]]], *, may_miss: bool) -> Sequence[Entry]:
    """Applies a rule to paths as NNX spells them (`layers/0`); where it does not match, as Linen does.

    What the rule writes stays as it stands there, and so does everything else.

    Args:
        done: The rules so far, this one last, each with what it is applied to.
        may_miss: Whether it may match nothing.
    """
    rule, entries = done[-1]
    applied = rule.apply(entries)
    if applied.matched and not isinstance(rule, Rename):
        return applied.entries
    left = [at for at, entry in enumerate(entries) if not applied.matched or applied.entries[at] is entry]
    joined = [_respelled(entries[at], _joined(entries[at].segments)) for at in left]
    again = rule.apply(joined)
    if not (applied.matched or again.matched or may_miss):
        raise _unmatched(rule, done)
    # What did not match keeps its numbers apart for the rules to come.
    known = {id(entry): entries[at] for at, entry in zip(left, joined, strict=True)}
    after = [known.get(id(entry)) or _apart(entry, None) for entry in again.entries]
    if not isinstance(rule, Rename):
        return after
    met = [entry for entry, new in zip(entries, applied.entries, strict=True) if new is not entry]
    met += [entry for entry, new in zip(joined, again.entries, strict=True) if new is not entry]
    if unclear := unclear_undone(rule, {entry.whole: rule.spans(entry) for entry in met}):
        raise RuleError(
            f"{rule.inverse()} cannot be undone: it may have written {rule.pattern} in several places of "
            f"{render(unclear)}, or as a module as well as a leaf, and nothing tells where it has.",
            paths=[unclear],
            hints=[_UNCLEAR_IN_PATH],
        )
    changed = list(applied.entries) if applied.matched else list(entries)
    for at, entry in zip(left, after, strict=True):
        changed[at] = entry
    return changed


def _unmatched(rule: Rule, done: Sequence[tuple[Rule, Sequence[Entry]]]) -> RuleError:
    """Returns the error for a rule that saves nothing: another one took it, or the state has no such name.

    Args:
        rule: The rule.
        done: The rules so far, each with what it was applied to.
    """

    def matches(one: Rule, entries: Sequence[Entry]) -> bool:
        joined = [_respelled(entry, _joined(entry.segments)) for entry in entries]
        return any(one.apply(some).matched for some in (entries, joined))

    why, hint, entries = "", _OF_THE_RESTORE, done[-1][1]
    # Rules that led to one name: undone first, another one takes all that has it.
    if taken := [before for before, found in done[:-1] if matches(rule, found)]:
        why = f": {taken[-1]}, which undoes a rule behind it, takes all that it is for"
        hint = _UNCLEAR
    elif isinstance(rule, Rename) and matches(rule.inverse(), entries):
        hint = f"{_OF_THE_RESTORE[:-1]}: write {rule}."
    return RuleError(f"the rule that saves, {rule}, matches no leaf of the state{why}.", hints=[hint])


def _apart(entry: Entry, own: Path | None) -> Entry:
    """Returns a leaf of a Linen tree under its names in NNX, the numbers of lists apart."""
    for start in range(len(own or ())):
        below = (own or ())[start:]
        if linen_path(below) == entry.segments:
            return _respelled(entry, _as_listed(below))
    return _respelled(entry, _split(entry.segments))


def _as_listed(path: Path) -> tuple[str, ...]:
    found: list[str] = []
    for key in path:
        if isinstance(key, int) and found:
            number = _Number(key)
            number.name = found[-1]
            found.append(number)
        else:
            found += linen_path((key,))
    return tuple(found)


def _respelled(entry: Entry, names: tuple[str, ...]) -> Entry:
    fixed = entry.fixed if len(entry.fixed) == len(entry.prefix) + len(names) else ()
    return dataclasses.replace(entry, segments=names, fixed=fixed)


def _split(names: Sequence[str]) -> tuple[str, ...]:
    found: list[str] = []
    for name in names:
        stem, numbers = name, list[str]()
        while (parts := stem.rpartition("_"))[0] and parts[2].isdecimal():
            stem = parts[0]
            numbers.insert(0, parts[2])
        found.append(stem)
        for number in numbers:
            part = _Number(number)
            part.name = found[-1]
            found.append(part)
    return tuple(found)


def _joined(names: Sequence[str]) -> tuple[str, ...]:
    """Joins the numbers again that are still behind their names."""
    found: list[str] = []
    for at, name in enumerate(names):
        if isinstance(name, _Number) and at and names[at - 1] is name.name:
            found[-1] = f"{found[-1]}_{name}"
        else:
            found.append(str(name))
    return tuple(found)


def _path(entry: Entry) -> Path:
    """Returns where an entry is stored; a key that holds slashes (`WeightNorm`) stays one key."""
    path: Path = (*entry.prefix, *entry.segments)
    source = entry.sources[0]
    if segments(source) == path:
        return source
    tail = segments(source[-1:])
    return (*path[: -len(tail)], source[-1]) if len(tail) > 1 and path[-len(tail) :] == tail else path


def _check_way_back(
    entries: Sequence[Entry], stored: Mapping[Path, Entry], rules: Sequence[Rule], beside: Sequence[Entry]
) -> dict[Path, Recipe]:
    """Applies the rules to what would be saved: every leaf must come back from itself, unchanged.

    Returns the leaves that are not saved, since they come back from others that they are copies of.
    """
    fresh = [
        Entry(
            segments=entry.segments,
            collection=entry.collection,
            recipe=Read(path),
            shape=entry.shape,
            dtype=entry.dtype,
            prefix=entry.prefix,
        )
        for path, entry in stored.items()
    ]
    unnamed = [dataclasses.replace(entry, fixed=()) for entry in beside]
    after = apply_rules([*fresh, *unnamed], rules).entries
    back = {_key(entry): entry for entry in after if stored.keys() >= set(entry.sources)}
    shapes = {entry.sources[0]: entry.shape for entry in entries}
    kept = {path for entry in stored.values() for path in reads(entry.recipe)}
    lost, copies = list[str](), dict[Path, Recipe]()
    for entry in entries:
        found = back.pop(_key(entry), None)
        path = entry.sources[0]
        way = None if found is None else substitute(found.recipe, lambda read: stored[read].recipe)
        is_copy = way is not None and (path not in kept or repeats(way))
        if found is not None and way is not None and is_copy and found.shape == entry.shape:
            copies[path] = simplify(way, shapes)
        elif found is None or way is None or not _is_same(way, path, found.shape, shapes):
            lost.append(render(entry.segments))
    lost = lost or [render(entry.segments) for entry in back.values()]
    if lost:
        listed = "\n".join(f"  {name}" for name in lost[:20])
        raise RuleError(
            f"what these rules save, they would not restore: {len(lost)} leaves end elsewhere:\n{listed}",
            hints=[_MEETS_EVERY],
        )
    return copies


def _key(entry: Entry) -> EntryKey:
    return entry.collection, canonical(entry.segments)


def _is_same(recipe: Recipe, path: Path, shape: Shape, shapes: Mapping[Path, Shape]) -> bool:
    """Tells whether a recipe gives the leaf at `path`, element for element."""
    return shape == shapes[path] and simplify(recipe, shapes) == Read(path)


def unwritten_lists(whole: Iterable[tuple[str, ...]], rules: Iterable[Rule]) -> set[str]:
    """Returns the names before numbers of their own, `layers/0`, that no rename and no stack writes."""
    written = [getattr(rule, _WRITES[type(rule)]) for rule in rules if type(rule) in _WRITES]
    paths = [*{*whole}]
    listed = [at for at, names in enumerate(paths) if any(map(str.isdecimal, names[1:]))]
    held: dict[int, set[int]] = {at: {0} for at in listed}
    index = PathIndex(paths)
    for pattern in map(compiled, written if listed else ()):
        for at in held.keys() & pattern.within(index):
            for span in pattern.spans(paths[at]):
                held[at].update(range(span.start, span.stop))
    return {
        paths[at][seat - 1]
        for at, spans in held.items()
        for seat, name in enumerate(paths[at])
        if name.isdecimal() and seat not in spans
    }


_WRITES: Mapping[type[Rule], str] = {Rename: "replacement", StackLayers: "pattern", UnstackLayers: "into"}
"""The paths with numbers that a save finds in a rule."""
