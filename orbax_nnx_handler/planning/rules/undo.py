"""Rules backwards: how the leaves of a Linen tree are stored under the names and shapes before the rules."""

import dataclasses
from collections.abc import Mapping, Sequence

from orbax_nnx_handler.planning.core.errors import RuleError
from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.paths import Path, canonical, render, segments
from orbax_nnx_handler.planning.core.recipes import Read, Recipe, reads, render_reads, simplify, substitute
from orbax_nnx_handler.planning.rules import Rule, apply_rules, invert
from orbax_nnx_handler.planning.rules.entries import Entry

Key = tuple[str | None, tuple[str, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Undone:
    """What is stored under rules.

    Attributes:
        ways: For each path to store, from the tree's root, its recipe over the tree's own leaves.
        copies: For each leaf that a `Copy` has made, what the rules will restore it as, over the
            tree's other leaves: it is not stored, so it has to be equal.
    """

    ways: dict[Path, Recipe]
    copies: dict[Path, Recipe]


def undo_rules(entries: Sequence[Entry], rules: Sequence[Rule]) -> Undone:
    """Returns how each leaf is stored so that the rules restore it.

    Args:
        entries: The leaves of the tree to save, each a plain `Read`.
        rules: The rules of the restore.

    Raises:
        RuleError: A rule cannot be undone, matches nothing, or would not restore what is saved.
    """
    after: Sequence[Entry] = entries
    for rule in invert(rules):
        after = _applied(rule, after)
    stored: dict[Path, Entry] = {}
    for entry in after:
        path = _path(entry)
        if path in stored:
            names = [render_reads(one.recipe) for one in (stored[path], entry)]
            raise RuleError(
                f"{names[0]} and {names[1]} would both be stored at {render(path)}: "
                "undone, the rules give them one name.",
                paths=[*stored[path].sources, *entry.sources],
                hints=["name more of their paths in the rules."],
            )
        stored[path] = entry
    copies = _check_way_back(entries, stored, rules)
    return Undone(ways={path: entry.recipe for path, entry in stored.items()}, copies=copies)


class _Number(str):
    """A number that Linen joins to the name in front of it: `layers`, `0` of `layers_0`."""

    name: str


def _applied(rule: Rule, entries: Sequence[Entry]) -> Sequence[Entry]:
    """Applies a rule to paths as NNX spells them (`layers/0`); to Linen's spelling where nothing matches.

    What the rule writes stays as it stands there, and so does everything else.
    """
    spelled = rule.apply([_respelled(entry, _split(entry.segments)) for entry in entries])
    if spelled.matched:
        return [_respelled(entry, _joined(entry.segments)) for entry in spelled.entries]
    applied = rule.apply(entries)
    if not applied.matched:
        raise RuleError(f"the rule that saves, {rule}, matches no leaf of the state.")
    return applied.entries


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
    entries: Sequence[Entry], stored: Mapping[Path, Entry], rules: Sequence[Rule]
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
    back = {_key(entry): entry for entry in apply_rules(fresh, rules).entries}
    shapes = {entry.sources[0]: entry.shape for entry in entries}
    kept = {path for entry in stored.values() for path in reads(entry.recipe)}
    lost, copies = list[str](), dict[Path, Recipe]()
    for entry in entries:
        found = back.pop(_key(entry), None)
        path = entry.sources[0]
        way = None if found is None else substitute(found.recipe, lambda read: stored[read].recipe)
        if found is not None and way is not None and path not in kept and found.shape == entry.shape:
            copies[path] = simplify(way, shapes)
        elif found is None or way is None or not _is_same(way, path, found.shape, shapes):
            lost.append("/".join(entry.segments))
    lost += ["/".join(entry.segments) for entry in back.values()]
    if lost:
        listed = "\n".join(f"  {name}" for name in lost[:20])
        raise RuleError(
            f"what these rules save, they would not restore: {len(lost)} leaves end elsewhere:\n{listed}",
            hints=["undone, a rule meets every leaf of that name; name more of the path in it."],
        )
    return copies


def _key(entry: Entry) -> Key:
    return entry.collection, canonical(entry.segments)


def _is_same(recipe: Recipe, path: Path, shape: Shape, shapes: Mapping[Path, Shape]) -> bool:
    """Tells whether a recipe gives the leaf at `path`, element for element."""
    return shape == shapes[path] and simplify(recipe, shapes) == Read(path)
