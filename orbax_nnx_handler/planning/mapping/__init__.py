"""Which stored leaf becomes which wanted one: the reading of a stored tree that a restore goes by.

Two readings that are as good are an error.
"""

import dataclasses
import difflib
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from orbax_nnx_handler.planning import layouts
from orbax_nnx_handler.planning.core.errors import (
    AmbiguousMappingError,
    Hint,
    RestoreError,
    RuleError,
    ShapeMismatchError,
    UnusedRuleError,
)
from orbax_nnx_handler.planning.core.folding import ranges
from orbax_nnx_handler.planning.core.leaves import WantedLeaf
from orbax_nnx_handler.planning.core.paths import Path, Tokens, canonical, render, segments
from orbax_nnx_handler.planning.core.recipes import Read, reads, render_reads
from orbax_nnx_handler.planning.layouts.layout import Stored, is_of_parameters
from orbax_nnx_handler.planning.mapping.cells_and_wrappers import WithoutVariable
from orbax_nnx_handler.planning.mapping.mapping import LeafMapping, map_leaves
from orbax_nnx_handler.planning.mapping.matches import CompetingSources, UnclearAxis, competing
from orbax_nnx_handler.planning.mapping.optimizer_pairs import UndecidedState
from orbax_nnx_handler.planning.mapping.roots import strip
from orbax_nnx_handler.planning.options import RestoreOptions
from orbax_nnx_handler.planning.rules import Copy, Drop, Rename, Rule, ScanAxis
from orbax_nnx_handler.planning.rules.entries import Entry
from orbax_nnx_handler.planning.rules.rule import shared_ends
from orbax_nnx_handler.planning.target.roles import WEIGHTS, Wanted, of_role


def two_layouts(first: LeafMapping, second: LeafMapping) -> AmbiguousMappingError:
    """Returns the error for a tree that two layouts read differently, equally well."""
    paths = [path for path, recipe in first.recipes.items() if second.recipes.get(path) != recipe]
    rows = [
        f"  {render(path)}  <-  {_source(first, path)}  or  {_source(second, path)}" for path in paths[:10]
    ]
    return AmbiguousMappingError(
        f"the checkpoint can be read as {first.layout.title} or as {second.layout.title}, "
        f"and {_leaves(len(paths))} would differ:\n" + "\n".join(rows),
        paths=paths,
        hints=[
            Hint(
                f"pass layout={first.layout.name!r} or layout={second.layout.name!r}.",
                {"layout": first.layout.name},
            )
        ],
    )


def _leaves(count: int, kind: str = "") -> str:
    return f"1 {kind}leaf" if count == 1 else f"{count} {kind}leaves"


def _source(mapping: LeafMapping, path: Path) -> str:
    found = mapping.found.get(path)
    return render_reads(found.recipe) if found else "(missing)"


def faults_of(mapping: LeafMapping, missing: Sequence[WantedLeaf] = ()) -> Iterable[RestoreError]:
    """Yields what is wrong with a mapping itself, whatever the policy.

    Args:
        mapping: The mapping.
        missing: The wanted leaves that nothing is found for, of which a rule may have one nearly by name.
    """
    if mapping.rivals:
        yield competing(mapping.rivals, _outside_optimizers(mapping))
    for group in mapping.unclear:
        yield _unclear(group, mapping.applied.axes)
    for states in mapping.states:
        yield from _undecided(states.undecided)
    strange = [item for item in mapping.without_variable if item.shape not in (None, item.leaf.shape)]
    if strange:
        yield _strange(strange)
    idle = _idle_rules(mapping, missing)
    if idle is not None:
        yield idle
    shared = _read_twice(mapping)
    if shared:
        yield _shared_weights(shared)


def _outside_optimizers(mapping: LeafMapping) -> Sequence[Path]:
    return [item.leaf.path for item in mapping.placements if item.section != "optimizer"]


def claims_of_shared(
    wanted: Sequence[Wanted], mapping: LeafMapping, aliases: Mapping[Path, Path], unexpected: Collection[Path]
) -> Iterable[RestoreError]:
    """Yields the error for a Variable that a target shares and that is stored under several of its names.

    Args:
        wanted: The wanted leaves.
        mapping: What they come from.
        aliases: The other paths of shared Variables, each with the wanted one.
        unexpected: The stored leaves that are not used.
    """
    rivals: list[CompetingSources] = []
    own = {path: entry for entry in mapping.applied.entries for path in entry.sources} if aliases else {}
    for item, claims in _under_aliases(wanted, mapping, aliases, unexpected):
        found = mapping.found.get(item.leaf.path)
        first = own.get(next(iter(reads(found.recipe)), ())) if found else None
        if item.role != "model" or (found and first is None):
            continue  # A program's own random streams, say.
        entries = [
            entry
            for entry, _ in claims
            if first is None
            or entry.collection == first.collection
            or "aux" in (entry.section, first.section)
        ]
        entries = [first, *entries] if first else entries
        if len(entries) > 1:
            rivals.append(CompetingSources(wanted=item, entries=tuple(entries)))
    if rivals:
        yield competing(rivals, _outside_optimizers(mapping))


def renames_of_shared(
    wanted: Sequence[Wanted], mapping: LeafMapping, aliases: Mapping[Path, Path]
) -> dict[Path, tuple[Rename, Path]]:
    """Returns, for each shared Variable that is stored under another of its names alone, the rename and it.

    A target wants a shared Variable once, under the first of its paths; a Linen program that shared the
    module may have stored it under another. Each is its name. Takes what `claims_of_shared` takes.
    """
    found: dict[Path, tuple[Rename, Path]] = {}
    if not aliases:
        return found  # Nearly every target.
    unused = {path for path, item in mapping.placed.items() if item.section != "aux"} - mapping.used()
    for item, claims in _under_aliases(wanted, mapping, aliases, unused):
        if item.leaf.path in mapping.found or len(claims) != 1 or item.role != "model":
            continue
        ((entry, alias),) = claims
        try:
            rule = Rename("/".join(entry.whole), "/".join(_renamed(entry.whole, alias, item.leaf.path)))
        except RuleError:  # A stored name is no pattern.
            continue
        if rule.apply(mapping.applied.entries).matched == 1:
            found[item.leaf.path] = rule, alias
    return found


def _renamed(whole: tuple[str, ...], alias: Path, path: Path) -> tuple[str, ...]:
    """Returns a stored path with one name of a shared Variable in the place of another that it ends in."""
    old, new = segments(alias), segments(path)
    same, _ = shared_ends(old, new)
    ends = ((start, at) for at in range(same, -1, -1) for start in range(len(whole)))
    made = (
        (*whole[:start], *new[at:]) for start, at in ends if canonical(whole[start:]) == canonical(old[at:])
    )
    return next(made, whole)


def _under_aliases(
    wanted: Sequence[Wanted], mapping: LeafMapping, aliases: Mapping[Path, Path], unused: Collection[Path]
) -> Iterator[tuple[Wanted, list[tuple[Entry, Path]]]]:
    """Yields shared Variables with the unused stored values that have another of their names."""
    if not aliases:
        return
    free: dict[tuple[str | None, Tokens], Entry] = {}
    model = [entry for entry in mapping.applied.entries if entry.section == "model"]
    is_one = len({entry.owner for entry in model}) == 1
    for entry in model:
        if any(path in unused for path in entry.sources):
            tokens = strip(entry.tokens, mapping.roots.stored)
            above = () if is_one else entry.owner
            free |= {(entry.collection, (*above, *name)): entry for name in (entry.tokens, tokens)}
    # What is kept aside has the whole path that the program called it by.
    aside = [entry for entry in mapping.applied.entries if entry.section == "aux"]
    whole = {entry.tokens: entry for entry in aside if any(path in unused for path in entry.sources)}
    items = {item.leaf.path: item for item in wanted}
    claims: dict[Path, dict[Path, tuple[Entry, Path]]] = defaultdict(dict)
    for alias, path in aliases.items():
        item, tokens = items[path], canonical(alias)
        if entry := whole.get(tokens):
            claims[path][entry.sources[0]] = entry, alias
        for collection in (item.collection, None):
            for name in (tokens, strip(tokens, mapping.roots.wanted)):
                if entry := free.get((collection, name)):
                    claims[path].setdefault(entry.sources[0], (entry, alias))
    for path, found in claims.items():
        yield items[path], list(found.values())


def _read_twice(mapping: LeafMapping) -> dict[Path, list[Path]]:
    """Returns the stored weights that several wanted leaves would be: `layers_0` and `layers/0`, say.

    A tied weight is one leaf of an NNX state, so two leaves are never one weight.
    """
    read = [
        found.recipe.path
        for found in mapping.found.values()
        if isinstance(found.recipe, Read) and found.recipe.path not in mapping.copied
    ]
    if len(set(read)) == len(read):
        return {}
    weights = {placement.leaf.path for placement in mapping.placements if placement.section == "model"}
    users: dict[Path, list[Path]] = defaultdict(list)
    for path, found in mapping.found.items():
        if isinstance(found.recipe, Read) and found.recipe.path in weights - mapping.copied:
            users[found.recipe.path].append(path)
    return {source: paths for source, paths in users.items() if len(paths) > 1}


def _shared_weights(shared: Mapping[Path, Sequence[Path]]) -> AmbiguousMappingError:
    rows = [f"  {render(source)}  ->  {', '.join(map(render, paths))}" for source, paths in shared.items()]
    return AmbiguousMappingError(
        f"{_leaves(len(shared), 'stored ')} would become several wanted leaves each:\n" + "\n".join(rows),
        paths=[path for paths in shared.values() for path in paths],
        hints=["renames=[...] decides: say which wanted leaf each stored leaf is."],
    )


def _unclear(group: UnclearAxis, rules: Sequence[ScanAxis]) -> RestoreError:
    is_plain = not group.owner and is_of_parameters(group.collection)
    above = () if is_plain else (*group.owner, group.collection or "params")
    name = "/".join((*above, *group.group.parent, group.group.name)).replace("/#", "_")
    if not group.axes:
        listed = "\n".join(f"  {rule}" for rule in rules)
        return RuleError(
            f"the layers of {name!r} cannot be stacked on the axis that a rule says: the shapes of its "
            f"{len(group.tokens)} wanted leaves do not come out.\n{listed}",
            paths=group.paths,
        )
    axes, leaves = " or ".join(map(str, group.axes)), _leaves(len(group.tokens), "wanted ")
    told = f"axis {axes}: the shapes of its {leaves} fit each of them"
    if len(group.axes) == 1:
        told = f"axis {axes}, or otherwise (on the last one, say): the shapes of its {leaves} do not tell"
    if group.absent:
        told += f"; and layer {ranges(group.absent)} is not stored, though a later one is"
    return AmbiguousMappingError(
        f"the layers of {name!r} can be stacked on {told}.",
        paths=group.paths,
        # Where the first ones alone are absent, the layers may be numbered from elsewhere.
        hints=[_HOLE] if group.has_hole else [_axis_hint(name, axis) for axis in group.axes],
    )


_HOLE = Hint("no axis gives layers that are not there: restore another step, or find out why they are not.")


def _axis_hint(name: str, axis: int) -> Hint:
    rule = ScanAxis(name, axis)
    return Hint(
        f"renames=[ScanAxis({name!r}, {axis})] if the program stacked them on axis {axis}; you have to know.",
        {"renames": [rule]},
    )


def _undecided(states: Sequence[UndecidedState]) -> Iterable[AmbiguousMappingError]:
    moved = [item for item in states if item.moved]
    if moved:
        rows = [f"  {item.wanted}  <-  {item.stored[0]}" for item in moved]
        yield _states_error("would be taken from a chain in another order", moved, rows)
    several = [item for item in states if not item.doubtful and not item.moved]
    if several:
        rows = [f"  {item.wanted}  <-  {' or '.join(map(str, item.stored))}" for item in several]
        yield _states_error("can be stored ones in several ways, and no field tells which", several, rows)
    unclear = [item for item in states if item.doubtful and not item.moved]
    if unclear:
        rows = [f"  {item.wanted}" for item in unclear]
        cause = "can be read in two ways: a module of the model is called like one of their fields"
        yield _states_error(cause, unclear, rows)


def _states_error(cause: str, states: Sequence[UndecidedState], rows: Sequence[str]) -> AmbiguousMappingError:
    count = "1 state" if len(states) == 1 else f"{len(states)} states"
    listed = "\n".join(rows)
    return AmbiguousMappingError(
        f"{count} of the optimizer {cause}:\n{listed}",
        paths=[path for item in states for path in item.paths],
        hints=[
            Hint(
                "restore into the optimizer that was saved, and carry its values over in the program; "
                "or restore the weights alone: pass the model by itself as target."
            )
        ],
    )


def _strange(leaves: Sequence[WithoutVariable]) -> ShapeMismatchError:
    """Returns the error for values that NNX has no place for, and that are not what a module keeps there."""
    rows = [f"  {render(item.leaf.path)} {item.leaf.shape}: {item.shape} there" for item in leaves]
    verb = "has" if len(leaves) == 1 else "have"
    return ShapeMismatchError(
        f"{_leaves(len(leaves), 'stored ')} of a module that NNX keeps otherwise {verb} another "
        "shape than that module has:\n" + "\n".join(rows),
        paths=[item.leaf.path for item in leaves],
        hints=[
            Hint(
                f"renames=[Drop({render(leaves[0].leaf.path)!r}, 'why')] leaves it behind.",
                {"renames": [Drop(render(leaves[0].leaf.path), "not of this module")]},
            )
        ],
    )


def _idle_rules(mapping: LeafMapping, missing: Sequence[WantedLeaf]) -> UnusedRuleError | None:
    """Returns the error for rules whose every result is no wanted leaf."""
    if not mapping.applied.made:
        return None
    # A rule whose result is contested does lead somewhere, and what a later one drops is no wrong name.
    used = mapping.used() | {path for rival in mapping.rivals for e in rival.entries for path in e.sources}
    used |= mapping.applied.discarded.keys()
    copies = any(isinstance(rule, Copy) for rule, _ in mapping.applied.made)
    sources = (set(reads(found.recipe)) for found in mapping.found.values()) if copies else ()
    uses = Counter(path for paths in sources for path in paths)
    idle = [
        (rule, entries[0])
        for rule, entries in mapping.applied.made
        if entries
        and not any(
            path in used and not (isinstance(rule, Copy) and uses[path] == 1)  # The leaf itself alone.
            for entry in entries
            for path in entry.sources
        )
    ]
    if not idle:
        return None
    rows = [
        f"  {rule}: {render_reads(entry.recipe)} becomes {render(entry.segments)}" for rule, entry in idle
    ]
    meant = [new for rule, entry in idle if (new := _nearly(rule, entry, missing)) is not None]
    hint = "a rule writes the wanted path as the target spells it; correct it, add to it or take it out."
    if len(meant) == len(idle):
        hint = f"if that is meant, write {', '.join(map(str, meant))}."
    error = UnusedRuleError(
        f"{'1 rule leads' if len(idle) == 1 else f'{len(idle)} rules lead'} to no wanted leaf:\n"
        + "\n".join(rows),
        paths=[entry.sources[0] for _, entry in idle],
        hints=[hint],
    )
    error.rules = [rule for rule, _ in idle]
    return error


def _nearly(rule: Rule, entry: Entry, missing: Sequence[WantedLeaf]) -> Rename | None:
    """Returns a rename with the one name corrected in which what it makes is not quite a missing leaf."""
    if not isinstance(rule, Rename) or rule.regex:
        return None
    written, made = rule.replacement.split("/"), entry.segments
    changes = set[tuple[str, str]]()
    for leaf in missing:
        names = segments(leaf.path)[-len(made) :]
        differing = [pair for pair in zip(made, names, strict=False) if pair[0] != pair[1]]
        if len(names) == len(made) and len(differing) == 1 and leaf.shape == entry.shape:
            changes |= {(old, new) for old, new in differing if difflib.get_close_matches(new, [old])}
    if len(changes) != 1:
        return None
    ((old, new),) = changes
    corrected = [new if name == old else name for name in written]
    return Rename(rule.pattern, "/".join(corrected)) if corrected != written else None


def best_mappings(
    wanted: Sequence[Wanted], stored: Stored, options: RestoreOptions
) -> tuple[list[LeafMapping], list[RestoreError]]:
    """Returns the reading that finds the most leaves, and what is wrong with the choice.

    Layouts may read one tree alike and call its parts otherwise: a module, or a collection of its
    name. Then there are several readings, of which the laws may accept one.

    Args:
        wanted: The target's leaves.
        stored: The stored leaves.
        options: The caller's choices.

    Raises:
        RestoreError: No layout fits, or the rules fit under none of those that do.
    """
    mappings, refused = list[LeafMapping](), list[RestoreError]()
    for layout in layouts.candidates(stored, options.layout):
        try:
            mappings.append(map_leaves(wanted, stored, layout, options.renames))
        except RestoreError as error:  # A rule may be meant for one layout of several.
            refused.append(error)
    if not mappings:
        raise refused[0]
    scores = [_score(mapping, wanted) for mapping in mappings]
    best = mappings[scores.index(max(scores))]
    rivals = [m for m, score in zip(mappings, scores, strict=True) if score == max(scores)]
    different = [m for m in rivals if m is not best and m.recipes != best.recipes]
    if options.layout == "auto":
        plain = _plain_mapping(wanted, stored, options, max(scores))
        if plain is not None:
            return [plain] if different else [plain, best], []  # A reading that the laws refuse loses.
    if different:
        return [best], [two_layouts(best, different[0])]
    # Where a program has left the names of its own modules, no other reading makes up for its laws.
    is_certain = best.layout.is_certain
    return [best] if is_certain is not None and is_certain(stored) else rivals, []


def _plain_mapping(
    wanted: Sequence[Wanted], stored: Stored, options: RestoreOptions, best: tuple[int, int, int]
) -> LeafMapping | None:
    """Returns the reading under which no key has a meaning, where it is the better one.

    So a module may be called `params`, and a Linen `TrainState` is found as it was written.
    """
    weights = of_role(wanted, *WEIGHTS)
    if best[1] >= len(weights) or not _may_be_plain(weights, options):
        return None
    untyped = [dataclasses.replace(w, role="model", path=w.leaf.path) for w in wanted if w.leaf.kind is None]
    plain = untyped if len(untyped) == len(wanted) else wanted
    try:
        mapping = map_leaves(plain, stored, layouts.UNNAMED, options.renames)
    except RestoreError:
        return None
    score = _score(mapping, weights)
    return mapping if score[1] == len(weights) or (plain is untyped and score > best) else None


_TELLING_KEYS = frozenset[str]().union(*(layout.keys for layout in layouts.LAYOUTS))


def _may_be_plain(weights: Sequence[Wanted], options: RestoreOptions) -> bool:
    """Tells whether a model may hold a module that is called like a part of a train state, or a rule may.

    A second mapping is as dear as the first, and nearly every model has no such module.
    """
    rules = options.renames
    names = (name for rule in rules for name in re.findall(r"\w+", str(rule)))
    return (
        any(isinstance(rule, Rename) and rule.regex for rule in rules)
        or not _TELLING_KEYS.isdisjoint(names)
        or any(item.leaf.kind is None or not _TELLING_KEYS.isdisjoint(item.tokens[:-1]) for item in weights)
    )


def _score(mapping: LeafMapping, wanted: Sequence[Wanted]) -> tuple[int, int, int]:
    """Returns how many wanted leaves have stored values, how many by one claim that fits, and how many whole.

    A leaf that several stored ones claim is there, as is a moment that cannot follow its parameter: a
    reading that doesn't see them is no better for it.
    """
    shapes, claimed = mapping.shapes, {item.wanted.leaf.path for item in mapping.rivals}
    claimed |= {item.path for item in mapping.stuck}
    fitting = {item.leaf.path for item in wanted if shapes.get(item.leaf.path) == item.leaf.shape}
    in_part = [path for path, found in mapping.found.items() if found.missing_layers and path in fitting]
    found = fitting | {item.leaf.path for item in wanted if item.leaf.path in claimed} if claimed else fitting
    return len(found), len(fitting), len(fitting) - len(in_part)
