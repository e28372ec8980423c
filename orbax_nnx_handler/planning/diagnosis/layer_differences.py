"""Layers: another number of them, single ones absent, stacked on one side only, numbered from elsewhere."""

import itertools
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from orbax_nnx_handler.planning.core.errors import Cause, Hint, as_python
from orbax_nnx_handler.planning.core.folding import ranges
from orbax_nnx_handler.planning.core.leaves import differing_axes
from orbax_nnx_handler.planning.core.lines import counted
from orbax_nnx_handler.planning.core.paths import (
    Path,
    Tokens,
    canonical,
    is_number,
    numbers_below,
    segments,
    shared_levels,
)
from orbax_nnx_handler.planning.core.recipes import Fill, Index, Read, Recipe, Stack, children
from orbax_nnx_handler.planning.diagnosis.evidence import Evidence, spell
from orbax_nnx_handler.planning.diagnosis.passed_rules import other_axis
from orbax_nnx_handler.planning.diagnosis.ways import layer_pattern, leaving_out, numbers_apart, selecting
from orbax_nnx_handler.planning.mapping.layer_paths import Form, Group, flat_paths, layer_paths
from orbax_nnx_handler.planning.rules import UnstackLayers


def find_layer_counts(evidence: Evidence) -> Iterable[Cause]:
    """Yields groups of layers whose number differs, and those with holes."""
    for find in (_flat_groups, _partial_stacks, _surplus, _stacked_groups):
        yield from (leaving_out(evidence, cause) for cause in find(evidence))


def _flat_groups(evidence: Evidence) -> Iterable[Cause]:
    """Layers one by one on both sides: the numbers in the paths tell."""
    groups = _open_groups(evidence)
    if not groups:
        return
    below = {path: evidence.stored_below(item) for path, item in evidence.stored_weights.items()}
    wanted, stored = _flat_positions(evidence.below, groups), _flat_positions(below, groups)
    owners = {canonical(owner) for owner in {item.owner for item in evidence.stored_weights.values()}}
    for group in wanted:
        states = numbers_below((*group.parent, group.name), owners)  # Train states of that name.
        if not is_whole(states):
            absent = tuple(sorted(wanted[group].keys() - states))
            if lost := [path for at in absent for path in wanted[group][at] if path in evidence.missing]:
                yield _hole(name_of_group(group), absent, len(states), evidence.with_moments(lost))
        elif group in stored:
            yield from _compare(evidence, group, wanted[group], stored[group])
        else:
            yield from _unstacked(evidence, group, wanted[group])


def _unstacked(evidence: Evidence, group: Group, wanted: "_Positions") -> Iterable[Cause]:
    """Layers one by one in the target only: those that a stack gives, and those it has not."""
    paths = [path for each in wanted.values() for path in each]
    present = {at for at, each in wanted.items() if any(_is_moved(evidence, path) for path in each)}
    absent = {at for at in wanted if all(path in evidence.missing for path in wanted[at])}
    is_cut = present | absent == set(wanted) and is_whole(present) and is_whole(set(wanted))
    # What lies unused may be the other layers under other names.
    is_cut &= not evidence.perhaps_stored.issuperset(path for at in absent for path in wanted[at])
    if present and absent and is_cut:
        lost = evidence.with_moments([path for path in paths if path in evidence.missing])
        name, filters = name_of_group(group), selecting(evidence, lost)
        yield _another_number(name, len(present), len(wanted), lost, filters=filters)


def _is_moved(evidence: Evidence, path: Path) -> bool:
    """Tells whether a weight comes out of a stack, or from a layer of another name by a rule."""
    item = evidence.restored.get(path) or evidence.verdict.mismatched.get(path)
    if item is None or not isinstance(item.recipe, Read):
        return item is not None
    source = evidence.stored_weights.get(item.recipe.path)
    return source is not None and any(seat.rest for seat in flat_paths(evidence.stored_below(source)))


def _open_groups(evidence: Evidence) -> set[Group]:
    """Returns the groups that something missing or unexpected belongs to."""
    open_ends = [evidence.below[path] for path in evidence.missing_weights]
    open_ends += [evidence.stored_below(item) for item in evidence.free_weights.values()]
    return {seat.group for tokens in open_ends for seat in flat_paths(tokens)}


def _compare(evidence: Evidence, group: Group, wanted: "_Positions", stored: "_Positions") -> Iterable[Cause]:
    want, have = wanted.keys(), stored.keys()
    absent = {at for at in want - have if all(path in evidence.missing for path in wanted[at])}
    extra = {at for at in have - want if all(path in evidence.unexpected for path in stored[at])}
    if not have & want or bool(absent) == bool(extra):
        return
    lost = evidence.with_moments([path for at in sorted(absent) for path in wanted[at]])
    more = tuple(path for at in sorted(extra) for path in stored[at])
    name = name_of_group(group)
    if is_whole(set(have)) and is_whole(set(want)):
        unit = _unit((*group.parent, group.name))
        yield _another_number(name, len(have), len(want), (*lost, *more), unit, selecting(evidence, lost))
    elif absent:
        yield _hole(name, tuple(sorted(absent)), len(have & want), lost)


def _another_number(
    group: str,
    stored: int,
    wanted: int,
    paths: Sequence[Path],
    unit: str = "layer",
    filters: Sequence[Any] = (),
) -> Cause:
    there = counted(stored, unit)
    return Cause(
        kind="LayerCount",
        text=f"{group!r} has {there} in the checkpoint and {wanted} in the target.",
        paths=tuple(paths),
        way=Hint(f"restore into a model with {there}."),
        filters=tuple(filters),
        may_be_initialised=True,
        facts={"group": group, "stored": stored, "wanted": wanted, "unit": unit},
    )


def _hole(group: str, layers: tuple[int, ...], stored: int, paths: tuple[Path, ...]) -> Cause:
    one = len(layers) == 1
    others = "another is" if stored == 1 else f"{stored} others are"
    return Cause(
        kind="LayersAbsent",
        text=f"of {group!r}, {'layer' if one else 'layers'} {ranges(layers)} {'is' if one else 'are'} not "
        f"stored, while {others}: the checkpoint has a hole.",
        paths=paths,
        way=Hint(
            "restore another step, or find out why "
            f"{'this layer was' if one else 'these layers were'} not saved."
        ),
        facts={"group": group, "layers": layers, "stored": stored},
    )


_Positions = Mapping[int, Sequence[Path]]
"""The leaves of each layer of a group."""


def _flat_positions(
    leaves: Mapping[Path, Tokens], groups: Collection[Group] | None = None
) -> Mapping[Group, _Positions]:
    known: dict[Tokens, Group] = {(*group.parent, group.name): group for group in groups or ()}
    found: dict[Group, dict[int, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for path, names in leaves.items():
        tokens = numbers_apart(names) if groups is None else names
        for at, token in enumerate(tokens[:-1]):
            if at and is_number(token):
                name = tokens[:at]
                group = known.get(name)
                if group is None and groups is None:
                    group = known[name] = Group(name[:-1], name[-1])
                if group is not None:
                    found[group][int(token[1:])].append(path)
    return found


def is_whole(numbers: set[int]) -> bool:
    """Tells whether numbers count from zero without a gap."""
    return numbers == set(range(len(numbers)))


def _partial_stacks(evidence: Evidence) -> Iterable[Cause]:
    """Stacked in the target and one by one on disk: the plan knows which layers are absent."""
    groups: dict[tuple[str, int, tuple[int, ...]], list[Path]] = defaultdict(list)
    for path in evidence.missing_weights:
        item = evidence.missing[path]
        stack = _stack_in(item.recipe)
        if item.layers and stack is not None:
            groups[_container(evidence, path, "stacked"), len(stack.sources), item.layers].append(path)
    for (group, wanted, layers), paths in groups.items():
        explained = evidence.with_moments(paths)
        stored = wanted - len(layers)
        if layers == tuple(range(stored, wanted)):
            yield _another_number(group, stored, wanted, explained, filters=selecting(evidence, explained))
        else:
            yield _hole(group, layers, stored, explained)


def _stack_in(recipe: Recipe | None) -> Stack | None:
    if recipe is None or isinstance(recipe, Stack):
        return recipe
    return next((found for child in children(recipe) if (found := _stack_in(child))), None)


def _surplus(evidence: Evidence) -> Iterable[Cause]:
    """More layers on disk than in the target, in a group that was rearranged."""
    groups: dict[tuple[str, int], list[Path]] = defaultdict(list)
    for path in evidence.mismatched_weights:
        item = evidence.mismatched[path]
        if item.surplus and item.stored_shape == item.wanted.shape:
            form: Form = "flat" if _stack_in(item.recipe) is None else "stacked"
            groups[_container(evidence, path, form), item.surplus].append(path)
    for (group, surplus), paths in groups.items():
        wanted = _wanted_layers(evidence, paths)
        if holes := _holes_in(evidence.mismatched[paths[0]].recipe):
            yield _hole(group, holes, wanted - len(holes) + surplus, evidence.with_moments(paths))
            continue
        yield _another_number(group, wanted + surplus, wanted, evidence.with_moments(paths))


def _holes_in(recipe: Recipe) -> tuple[int, ...]:
    """Returns the layers of a stack that no stored leaf gives."""
    stack = _stack_in(recipe)
    return tuple(at for at, part in enumerate(stack.sources) if isinstance(part, Fill)) if stack else ()


def _wanted_layers(evidence: Evidence, paths: Sequence[Path]) -> int:
    stacks = [stack for path in paths if (stack := _stack_in(evidence.mismatched[path].recipe)) is not None]
    if stacks:
        return len(stacks[0].sources)
    positions = {seat.position for path in paths for seat in flat_paths(evidence.below[path])[:1]}
    return len(positions)


def _container(evidence: Evidence, path: Path, form: Form) -> str:
    """Returns the name of the group that a weight's layers belong to, as the target spells it."""
    groups = [seat.group for seat in layer_paths(evidence.below[path]) if seat.form == form]
    # `layers/wi_0` counts layers and gates: the name of the group tells which is which.
    named = [group for group in groups if _is_layer_name(group.name)]
    return name_of_group((named or groups)[0]) if groups else spell(evidence.below[path])


def _is_layer_name(name: str) -> bool:
    return any(word in name.lower() for word in ("layer", "block", "stage", "scan"))


def _stacked_groups(evidence: Evidence) -> Iterable[Cause]:
    """Stacked on both sides: every leaf below one module differs on the same axis, by the same sizes."""
    for paths in _common_modules(evidence).values():
        changes = {_one_axis(evidence, path) for path in paths}
        ranks = {len(evidence.mismatched[path].wanted.shape) for path in paths}
        change = changes.pop() if len(changes) == 1 else None
        # Leaves of one rank may share a feature axis; a bias and a kernel share none but the stacked one.
        if change is None or len(ranks) < 2:
            continue
        _, stored, wanted = change
        module = shared_levels([evidence.below[path][:-1] for path in paths])
        explained = evidence.with_moments(paths)
        yield _another_number(spell(module), stored, wanted, explained, _unit(module))


def _common_modules(evidence: Evidence) -> dict[Group, list[Path]]:
    """Returns the highest modules of which every weight is mismatched."""
    # Layers that were taken apart already differ by their own sizes.
    wrong = {p for p in evidence.mismatched_weights if not isinstance(evidence.mismatched[p].recipe, Index)}
    if not wrong:
        return {}
    below: dict[Group, list[Path]] = defaultdict(list)
    for path, tokens in evidence.below.items():
        for seat in layer_paths(tokens):
            if seat.form == "stacked":
                below[seat.group].append(path)
    whole = {group: paths for group, paths in below.items() if len(paths) > 1 and wrong.issuperset(paths)}
    return {
        group: paths
        for group, paths in whole.items()
        if not any(Group(group.parent[:at], group.parent[at]) in whole for at in range(len(group.parent)))
    }


def _one_axis(evidence: Evidence, path: Path) -> tuple[int, int, int] | None:
    """Returns axis, stored and wanted size where a mismatch is on one axis only."""
    item = evidence.mismatched[path]
    axes = differing_axes(item.stored_shape, item.wanted.shape)
    return (axes[0], item.stored_shape[axes[0]], item.wanted.shape[axes[0]]) if len(axes) == 1 else None


def _unit(module: Sequence[str]) -> str:
    return "expert" if any("expert" in token.lower() for token in module) else "layer"


def name_of_group(group: Group) -> str:
    """Returns a group as its path is written."""
    return spell((*group.parent, group.name))


_SIZES = Hint("correct the sizes first: stacking is done by itself once one layer has the wanted shape.")


def find_scanned(evidence: Evidence) -> Iterable[Cause]:
    """Yields groups that are stacked on one side only and were not rearranged."""
    wanted = {path: evidence.below[path] for path in evidence.missing_weights}
    stored = {path: evidence.stored_below(item) for path, item in evidence.free_weights.items()}
    sides = (("checkpoint", "target", stored, wanted), ("target", "checkpoint", wanted, stored))
    for side, other, stacked, flat in sides:
        stacks = {
            (s.group, s.rest): p
            for p, tokens in stacked.items()
            for s in layer_paths(tokens)
            if s.form == "stacked"
        }
        found: dict[Group, list[tuple[Path, Path]]] = defaultdict(list)
        for path, tokens in flat.items():
            for seat in flat_paths(tokens):
                stack = stacks.get((seat.group, seat.rest))
                if stack is not None and len(evidence.shape(stack)) == len(evidence.shape(path)) + 1:
                    found[seat.group].append((stack, path))
        for group, pairs in found.items():
            explained = [path for pair in pairs for path in pair]
            lost = [path for path in dict.fromkeys(explained) if path in wanted]
            rest = [path for path in dict.fromkeys(explained) if path not in wanted]
            name, way = name_of_group(group), other_axis(evidence, (*group.parent, group.name), lost)
            why = "a rule says another axis than theirs" if way else _why(evidence, *pairs[0])
            yield Cause(
                kind="ScannedOnOneSide",
                text=f"the layers of {name!r} are stacked in the {side} and one by one in the {other}; "
                f"they could not be rearranged, since {why}.",
                paths=(*evidence.with_moments(lost), *rest),
                way=way or _SIZES,
                facts={"group": name, "stacked": side},
            )


class _Within(NamedTuple):
    """A wanted leaf of a layer within a layer, with both numbers."""

    path: Path
    outer: int
    inner: int


def find_nested_stacks(evidence: Evidence) -> Iterable[Cause]:
    """Yields layers within layers that are one array in the checkpoint: a scan within a scan."""
    stored = {evidence.stored_below(item): path for path, item in evidence.free_weights.items()}
    found: dict[Tokens, dict[Path, list[_Within]]] = defaultdict(lambda: defaultdict(list))
    for path in evidence.missing_weights:
        tokens = evidence.below[path]
        places = [at for at, token in enumerate(tokens[:-1]) if at and is_number(token)]
        for outer, inner in itertools.combinations(places, 2):
            name = (*tokens[:outer], *tokens[outer + 1 : inner], *tokens[inner + 1 :])
            if name in stored:
                item = _Within(path, int(tokens[outer][1:]), int(tokens[inner][1:]))
                found[tokens[:outer]][stored[name]].append(item)
    for module, leaves in found.items():
        axes = set[int].intersection(*(_outer_axes(evidence, path, items) for path, items in leaves.items()))
        if axes:
            yield _nested(evidence, module, leaves, sorted(axes))


def _outer_axes(evidence: Evidence, path: Path, items: Sequence[_Within]) -> set[int]:
    """Returns the axes along which a stored leaf may hold the outer ones of layers within layers."""
    shape, layer = evidence.shape(path), evidence.shape(items[0].path)
    counts = 1 + max(item.outer for item in items), 1 + max(item.inner for item in items)
    return {
        outer
        for outer, inner in itertools.permutations(range(len(shape)), 2)
        if (shape[outer], shape[inner]) == counts
        and tuple(size for at, size in enumerate(shape) if at not in (outer, inner)) == layer
    }


def _nested(
    evidence: Evidence, module: Tokens, leaves: Mapping[Path, Sequence[_Within]], axes: Sequence[int]
) -> Cause:
    name = "/".join(module).replace("/#", "_")
    # The whole path: a module of that name may lie elsewhere too.
    stored, below = next(
        (path, evidence.below[items[0].path][len(module) :]) for path, items in leaves.items()
    )
    depth = next(at for at in range(len(stored)) if len(canonical(stored[at:])) <= len(below) - 2)
    whole = "/".join(segments(stored[:depth]))
    rules = [UnstackLayers(whole, f"{whole}_{{i}}", axis=axis) for axis in axes]
    ways = [f"renames={as_python([rule])}" for rule in rules]
    if len(axes) > 1:
        ways = [f"{way} if the layers lie on axis {axis}" for way, axis in zip(ways, axes, strict=True)]
    told = {"renames": rules} if len(rules) == 1 else {}
    way = Hint(f"pass {', '.join(ways)}; the layers within come out by themselves.", told)
    lost = [item.path for items in leaves.values() for item in items]
    return Cause(
        kind="NestedStacks",
        text=f"the layers of {name!r} hold layers themselves, and both are stacked in the checkpoint.",
        paths=(*evidence.with_moments(lost), *leaves),
        way=way,
        facts={"group": name, "axes": tuple(axes)},
    )


def _why(evidence: Evidence, stacked: Path, flat: Path) -> str:
    whole, layer = evidence.shape(stacked), evidence.shape(flat)
    slices = {(*whole[:axis], *whole[axis + 1 :]) for axis in range(len(whole))}
    if layer not in slices:
        return f"{whole} without any one axis is not {layer}"
    return "the layers of other leaves of the group do not come out"


def find_shifted(evidence: Evidence) -> Iterable[Cause]:
    """Yields groups of as many layers on both sides that are numbered from another beginning."""
    if not evidence.free_weights:
        return
    below = {path: evidence.stored_below(item) for path, item in evidence.stored_weights.items()}
    wanted, stored = _flat_positions(evidence.below), _flat_positions(below)
    stacked = _open_stacks(evidence, below)
    for group, theirs in stored.items():
        ours = wanted.get(group, {at: stacked.get(group, ()) for at in range(len(theirs))})
        lost = [path for at in ours.keys() - theirs.keys() for path in ours[at] if _is_open(evidence, path)]
        free = [
            path for at in theirs.keys() - ours.keys() for path in theirs[at] if path in evidence.unexpected
        ]
        if lost and free and len(ours) == len(theirs) and _is_run(ours) and _is_run(theirs):
            paths = (*evidence.with_moments(list(dict.fromkeys(lost))), *free)
            pattern = layer_pattern(evidence, free[0], (*group.parent, group.name))
            yield _shifted(name_of_group(group), pattern, min(theirs), min(ours), len(ours), paths)


def _open_stacks(evidence: Evidence, stored: Mapping[Path, Tokens]) -> Mapping[Group, Sequence[Path]]:
    """Returns the wanted stacks that do not come out and are just what single stored layers make."""
    layers: dict[tuple[Group, Tokens], list[Path]] = defaultdict(list)
    for path, tokens in stored.items():
        for seat in flat_paths(tokens):
            layers[seat.group, seat.rest].append(path)
    found: dict[Group, list[Path]] = defaultdict(list)
    for path, tokens in evidence.below.items():
        for seat in layer_paths(tokens) if _is_open(evidence, path) else ():
            parts = layers.get((seat.group, seat.rest), ()) if seat.form == "stacked" else ()
            whole = evidence.sides.wanted[path].leaf.shape
            slices = {(*whole[:at], *whole[at + 1 :]) for at, n in enumerate(whole) if n == len(parts)}
            if parts and {evidence.shape(part) for part in parts} <= slices:
                found[seat.group].append(path)
    return found


def _is_open(evidence: Evidence, path: Path) -> bool:
    return path in evidence.missing or path in evidence.mismatched


def _shifted(
    group: str, pattern: str, stored: int, wanted: int, count: int, paths: tuple[Path, ...]
) -> Cause:
    there, here = (f"{at} to {at + count - 1}" for at in (stored, wanted))
    old, new = (pattern.replace("{}", f"{{i + {first}}}" if first else "{i}") for first in (stored, wanted))
    sides = ([pattern.replace("{}", str(at + i)) for i in range(count)] for at in (stored, wanted))
    renames = list(zip(*sides, strict=True))
    text = f"the {count} layers of {group!r} are numbered {there} in the checkpoint and {here} in the target."
    words = f'if they are the same layers, pass renames=[(f"{old}", f"{new}") for i in range({count})].'
    if count == 1:
        text = f"the one layer of {group!r} is number {stored} in the checkpoint and {wanted} in the target."
        words = f"if it is the same layer, pass renames={renames!r}."
    return Cause(
        kind="LayersShifted",
        text=text,
        paths=paths,
        way=Hint(words, {"renames": renames}),
        facts={"group": group, "stored": stored, "wanted": wanted, "count": count},
    )


def _is_run(numbers: Collection[int]) -> bool:
    return is_whole({number - min(numbers) for number in numbers})
