"""Layers: another number of them, single ones absent, stacked on one side only."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile

from orbax_nnx_handler.planning.diagnosis.causes import Cause
from orbax_nnx_handler.planning.diagnosis.scene import Scene, Tokens, spell
from orbax_nnx_handler.planning.diagnosis.size_causes import LayerCount, LayersAbsent, ScannedOnOneSide
from orbax_nnx_handler.planning.layers import Form, Group, Seat, seats
from orbax_nnx_handler.planning.leaves import Shape
from orbax_nnx_handler.planning.paths import Path
from orbax_nnx_handler.planning.recipes import Recipe, Stack, children


def find_layer_counts(scene: Scene) -> Iterable[Cause]:
    """Yields groups of layers whose number differs, and those with holes."""
    yield from _flat_groups(scene)
    yield from _partial_stacks(scene)
    yield from _surplus(scene)
    yield from _stacked_groups(scene)


def _flat_groups(scene: Scene) -> Iterable[Cause]:
    """Layers one by one on both sides: the numbers in the paths tell."""
    groups = _open_groups(scene)
    if not groups:
        return
    below = {path: scene.stored_below(item) for path, item in scene.stored_weights.items()}
    wanted, stored = _flat_positions(scene.below, groups), _flat_positions(below, groups)
    for group in [group for group in wanted if group in stored]:
        yield from _compare(scene, group, wanted[group], stored[group])


def _open_groups(scene: Scene) -> set[Group]:
    """Returns the groups that something missing or unexpected belongs to."""
    open_ends = [scene.below[path] for path in scene.missing_weights]
    open_ends += [scene.stored_below(item) for item in scene.free_weights.values()]
    return {seat.group for tokens in open_ends for seat in _flat_seats(tokens)}


def _compare(scene: Scene, group: Group, wanted: "_Positions", stored: "_Positions") -> Iterable[Cause]:
    want, have = wanted.keys(), stored.keys()
    absent = {at for at in want - have if all(path in scene.missing for path in wanted[at])}
    extra = {at for at in have - want if all(path in scene.unexpected for path in stored[at])}
    if not have & want or bool(absent) == bool(extra):
        return
    lost = scene.with_moments([path for at in sorted(absent) for path in wanted[at]])
    more = tuple(path for at in sorted(extra) for path in stored[at])
    name = _name(group)
    if _whole(set(have)) and _whole(set(want)):
        kind = _kind((*group.parent, group.name))
        yield LayerCount(
            paths=(*lost, *more), group=name, stored=len(have), wanted=len(want), kind=kind, fillable=True
        )
    elif absent:
        yield LayersAbsent(paths=lost, group=name, layers=tuple(sorted(absent)), stored=len(have & want))


_Positions = Mapping[int, Sequence[Path]]
"""The leaves of each layer of a group."""


def _flat_positions(leaves: Mapping[Path, Tokens], groups: set[Group]) -> Mapping[Group, _Positions]:
    found: dict[Group, dict[int, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for path, tokens in leaves.items():
        for seat in _flat_seats(tokens):
            if seat.group in groups:
                found[seat.group][seat.position].append(path)
    return found


def _flat_seats(tokens: Tokens) -> list[Seat]:
    # `Dense_0/kernel` alone is no layer of a group; a module with something below it may be.
    return [seat for seat in seats(tokens) if seat.form == "flat" and seat.rest]


def _whole(numbers: set[int]) -> bool:
    return numbers == set(range(len(numbers)))


def _partial_stacks(scene: Scene) -> Iterable[Cause]:
    """Stacked in the target and one by one on disk: the plan knows which layers are absent."""
    groups: dict[tuple[str, int, tuple[int, ...]], list[Path]] = defaultdict(list)
    for path in scene.missing_weights:
        item = scene.missing[path]
        stack = _stack_in(item.recipe)
        if item.layers and stack is not None:
            groups[_container(scene, path, "stacked"), len(stack.sources), item.layers].append(path)
    for (group, wanted, layers), paths in groups.items():
        explained = scene.with_moments(paths)
        stored = wanted - len(layers)
        if layers == tuple(range(stored, wanted)):
            yield LayerCount(paths=explained, group=group, stored=stored, wanted=wanted, fillable=True)
        else:
            yield LayersAbsent(paths=explained, group=group, layers=layers, stored=stored)


def _stack_in(recipe: Recipe | None) -> Stack | None:
    if recipe is None or isinstance(recipe, Stack):
        return recipe
    return next((found for child in children(recipe) if (found := _stack_in(child))), None)


def _surplus(scene: Scene) -> Iterable[Cause]:
    """More layers on disk than in the target, in a group that was rearranged."""
    groups: dict[tuple[str, int], list[Path]] = defaultdict(list)
    for path in scene.mismatched_weights:
        item = scene.mismatched[path]
        if item.surplus and item.stored_shape == item.wanted.shape:
            form: Form = "flat" if _stack_in(item.recipe) is None else "stacked"
            groups[_container(scene, path, form), item.surplus].append(path)
    for (group, surplus), paths in groups.items():
        wanted = _wanted_layers(scene, paths)
        yield LayerCount(paths=scene.with_moments(paths), group=group, stored=wanted + surplus, wanted=wanted)


def _wanted_layers(scene: Scene, paths: Sequence[Path]) -> int:
    stacks = [stack for path in paths if (stack := _stack_in(scene.mismatched[path].recipe)) is not None]
    if stacks:
        return len(stacks[0].sources)
    positions = {seat.position for path in paths for seat in _flat_seats(scene.below[path])[:1]}
    return len(positions)


def _container(scene: Scene, path: Path, form: Form) -> str:
    """Returns the name of the group that a weight's layers belong to, as the target spells it."""
    groups = [seat.group for seat in seats(scene.below[path]) if seat.form == form]
    # `layers/wi_0` counts layers and gates: the name of the group tells which is which.
    named = [group for group in groups if _is_layer_name(group.name)]
    return _name((named or groups)[0]) if groups else spell(scene.below[path])


def _is_layer_name(name: str) -> bool:
    return any(word in name.lower() for word in ("layer", "block", "stage", "scan"))


def _stacked_groups(scene: Scene) -> Iterable[Cause]:
    """Stacked on both sides: every leaf below one module differs on the same axis, by the same sizes."""
    for paths in _common_modules(scene).values():
        changes = {_one_axis(scene, path) for path in paths}
        ranks = {len(scene.mismatched[path].wanted.shape) for path in paths}
        change = changes.pop() if len(changes) == 1 else None
        # Leaves of one rank may share a feature axis; a bias and a kernel share none but the stacked one.
        if change is None or len(ranks) < 2:
            continue
        _, stored, wanted = change
        module = _shared([scene.below[path][:-1] for path in paths])
        yield LayerCount(
            paths=scene.with_moments(paths),
            group=spell(module),
            stored=stored,
            wanted=wanted,
            kind=_kind(module),
        )


def _shared(modules: Sequence[Tokens]) -> Tokens:
    """Returns the path that all modules lie below."""
    first, last = min(modules), max(modules)
    same = takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return tuple(token for token, _ in same)


def _common_modules(scene: Scene) -> dict[Group, list[Path]]:
    """Returns the highest modules of which every weight is mismatched."""
    wrong = set(scene.mismatched_weights)
    if not wrong:
        return {}
    below: dict[Group, list[Path]] = defaultdict(list)
    for path, tokens in scene.below.items():
        for seat in seats(tokens):
            if seat.form == "stacked":
                below[seat.group].append(path)
    whole = {group: paths for group, paths in below.items() if len(paths) > 1 and wrong.issuperset(paths)}
    return {
        group: paths
        for group, paths in whole.items()
        if not any(Group(group.parent[:at], group.parent[at]) in whole for at in range(len(group.parent)))
    }


def _one_axis(scene: Scene, path: Path) -> tuple[int, int, int] | None:
    """Returns axis, stored and wanted size where a mismatch is on one axis only."""
    item = scene.mismatched[path]
    axes = differing_axes(item.stored_shape, item.wanted.shape)
    return (axes[0], item.stored_shape[axes[0]], item.wanted.shape[axes[0]]) if len(axes) == 1 else None


def differing_axes(stored: Shape, wanted: Shape) -> list[int]:
    """Returns the axes on which two shapes of one rank differ; none for other ranks."""
    if len(stored) != len(wanted):
        return []
    return [at for at, (a, b) in enumerate(zip(stored, wanted, strict=True)) if a != b]


def _kind(module: Sequence[str]) -> str:
    return "experts" if any("expert" in token.lower() for token in module) else "layers"


def _name(group: Group) -> str:
    return spell((*group.parent, group.name))


def find_scanned(scene: Scene) -> Iterable[Cause]:
    """Yields groups that are stacked on one side only and were not rearranged."""
    wanted = {path: scene.below[path] for path in scene.missing_weights}
    stored = {path: scene.stored_below(item) for path, item in scene.free_weights.items()}
    for side, stacked, flat in (("checkpoint", stored, wanted), ("target", wanted, stored)):
        stacks = {
            (s.group, s.rest): p
            for p, tokens in stacked.items()
            for s in seats(tokens)
            if s.form == "stacked"
        }
        found: dict[Group, list[tuple[Path, Path]]] = defaultdict(list)
        for path, tokens in flat.items():
            for seat in _flat_seats(tokens):
                if (seat.group, seat.rest) in stacks:
                    found[seat.group].append((stacks[seat.group, seat.rest], path))
        for group, pairs in found.items():
            explained = [path for pair in pairs for path in pair]
            lost = [path for path in dict.fromkeys(explained) if path in wanted]
            rest = [path for path in dict.fromkeys(explained) if path not in wanted]
            yield ScannedOnOneSide(
                paths=(*scene.with_moments(lost), *rest),
                group=_name(group),
                stacked=side,
                why=_why(scene, *pairs[0]),
            )


def _why(scene: Scene, stacked: Path, flat: Path) -> str:
    whole, layer = _shape(scene, stacked), _shape(scene, flat)
    slices = {(*whole[:axis], *whole[axis + 1 :]) for axis in range(len(whole))}
    if layer not in slices:
        return f"{whole} without any one axis is not {layer}"
    return "the layers of other leaves of the group do not come out"


def _shape(scene: Scene, path: Path) -> Shape:
    placement = scene.plan.evidence.placements.get(path)
    return placement.leaf.shape if placement else scene.plan.evidence.wanted[path].leaf.shape
