"""Which module of the target is which module of the checkpoint: the ones that hold the same stored elements.

What is scanned on one side is several modules on the other, so both sides are taken apart into layers.
"""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.core.recipes import (
    Add,
    Concat,
    Fill,
    Index,
    Read,
    Recipe,
    Reshape,
    Scale,
    Shapes,
    Slice,
    Stack,
    Transpose,
    shape_of,
)
from orbax_nnx_handler.verifying.recording import Array, Call

Atom = tuple[Path, tuple[int, ...], tuple[tuple[int, int, int], ...]]
"""A stored leaf, the layer in it, and the part of that layer: axis, start and size of each cut."""
_Atoms = frozenset[Atom]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit:
    """A module, or one layer of a module that is scanned.

    Attributes:
        path: Keys to the module.
        layer: Which layer it is, counted from 0; None for a module that is not scanned.
        layers: How many there are; 1 for a module that is not scanned.
    """

    path: Path
    layer: int | None = None
    layers: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModulePair:
    """Two modules that hold the same stored elements.

    Attributes:
        nnx: The module of the target.
        linen: The module of the checkpoint.
        leaves: The wanted leaves in it.
        is_certain: Whether nothing but the two can be meant: of wrappers around one module, one side may
            have more than the other.
    """

    nnx: Unit
    linen: Unit
    leaves: tuple[Path, ...]
    is_certain: bool = True


def layers_of(recipe: Recipe) -> list[_Atoms]:
    """Returns what each layer of a stacked leaf is made from, or one set for a leaf that is not stacked."""
    match recipe:
        case Read(path):
            return [frozenset({(path, (), ())})]
        case Fill():
            return [frozenset()]
        case Stack(sources, _):
            return [layer for source in sources for layer in layers_of(source)]
        case Concat(sources, _):
            parts = [layers_of(source) for source in sources]
            counts = {len(part) for part in parts}
            if len(counts) == 1:
                return [frozenset[Atom]().union(*same) for same in zip(*parts, strict=True)]
            return [frozenset[Atom]().union(*(layer for part in parts for layer in part))]
        case Index(source, _, index):
            return [
                frozenset((path, (*layer, index), cuts) for path, layer, cuts in atoms)
                for atoms in layers_of(source)
            ]
        case Slice(source, axis, start, size):
            return [
                frozenset((path, layer, (*cuts, (axis, start, size))) for path, layer, cuts in atoms)
                for atoms in layers_of(source)
            ]
        case _:
            return layers_of(recipe.source)


def layer_of(recipe: Recipe, axis: int, layer: int, shapes: Shapes) -> Recipe:
    """Returns the recipe of one element of a leaf along an axis."""
    match recipe:
        case Stack(sources, at) if at == axis:
            return sources[layer]
        case Stack(sources, at):
            inner = axis - (at < axis)
            parts = tuple(layer_of(source, inner, layer, shapes) for source in sources)
            return Stack(parts, at - (axis < at))
        case Transpose(source, permutation):
            inner = permutation[axis]
            rest = tuple(at - (at > inner) for at in permutation if at != inner)
            return Transpose(layer_of(source, inner, layer, shapes), rest)
        case Reshape(source, shape) if axis == 0 and shape_of(source, shapes)[:1] == shape[:1]:
            return Reshape(layer_of(source, 0, layer, shapes), shape[1:])
        case Concat(sources, at) if at != axis:
            parts = tuple(layer_of(source, axis, layer, shapes) for source in sources)
            return Concat(parts, at - (axis < at))
        case Scale(source, factor):
            return Scale(layer_of(source, axis, layer, shapes), factor)
        case Add(source, constant):
            return Add(layer_of(source, axis, layer, shapes), constant)
        case _:
            return Index(recipe, axis, layer)


def scanned_axes(calls: Mapping[Path, Sequence[Call]], wanted: Mapping[Path, Shape]) -> dict[Path, int]:
    """Returns the axis of each leaf that the module did not see when it was called."""
    axes: dict[Path, int] = {}
    for module, found in calls.items():
        for name, seen in found[0].shapes.items():
            whole = wanted.get((*module, name))
            if whole is not None and len(whole) == len(seen) + 1:
                fits = [axis for axis in range(len(whole)) if (*whole[:axis], *whole[axis + 1 :]) == seen]
                axes |= {(*module, name): fits[0]} if fits else {}
    return axes


def pair_modules(
    recipes: Mapping[Path, Recipe],
    location: Mapping[Path, Path],
    nnx_calls: Collection[Call],
    linen_calls: Collection[Call],
) -> list[ModulePair]:
    """Returns the modules that hold the same stored elements, of those that were called.

    Args:
        recipes: How each wanted leaf of the model is made.
        location: Where each stored leaf lies in the Linen program: keys of the module and the leaf's name.
        nnx_calls: The calls of the one program.
        linen_calls: The calls of the other.
    """
    layered = {path: layers_of(recipe) for path, recipe in recipes.items()}
    used = {atom for layers in layered.values() for atoms in layers for atom in atoms}
    nnx_counts, linen_counts = (Counter(call.path for call in calls) for calls in (nnx_calls, linen_calls))
    nnx = _nnx_units(layered, nnx_counts)
    linen = _linen_units(used, location, linen_counts)
    within = _leaves_within(recipes, nnx_counts)
    pairs: list[ModulePair] = []
    for atoms, wanted in nnx.items():
        if atoms and atoms in linen:
            for one, other, certain in _chained(wanted, linen[atoms]):
                leaves = tuple(within[one.path])
                pairs.append(ModulePair(nnx=one, linen=other, leaves=leaves, is_certain=certain))
    return pairs


def _leaves_within(leaves: Iterable[Path], modules: Collection[Path]) -> dict[Path, list[Path]]:
    found: dict[Path, list[Path]] = defaultdict(list)
    for leaf in leaves:
        for depth in range(len(leaf) + 1):
            if leaf[:depth] in modules:
                found[leaf[:depth]].append(leaf)
    return found


def _nnx_units(
    layered: Mapping[Path, Sequence[_Atoms]], calls: Mapping[Path, int]
) -> dict[_Atoms, list[Unit]]:
    units: dict[_Atoms, list[Unit]] = defaultdict(list)
    for module, leaves in _leaves_within(layered, calls).items():
        counts = {len(layered[leaf]) for leaf in leaves}
        count = counts.pop() if len(counts) == 1 else 1
        if calls[module] % count:  # It holds the scan.
            whole = frozenset[Atom]().union(*(atoms for leaf in leaves for atoms in layered[leaf]))
            units[whole].append(Unit(path=module))
        for layer in range(count):
            atoms = frozenset[Atom]().union(
                *(
                    layered[leaf][layer] if count > 1 else frozenset[Atom]().union(*layered[leaf])
                    for leaf in leaves
                )
            )
            units[atoms].append(Unit(path=module, layer=layer if count > 1 else None, layers=count))
    return {atoms: sorted(found, key=lambda unit: len(unit.path)) for atoms, found in units.items()}


def _linen_units(
    used: Iterable[Atom], location: Mapping[Path, Path], calls: Mapping[Path, int]
) -> dict[_Atoms, list[Unit]]:
    within: dict[Path, set[Atom]] = defaultdict(set)
    for atom in used:
        place = location.get(atom[0], ())
        for depth in range(len(place)):
            if place[:depth] in calls:
                within[place[:depth]].add(atom)
    units: dict[_Atoms, list[Unit]] = defaultdict(list)
    for module, atoms in within.items():
        by_layer: dict[tuple[int, ...], set[Atom]] = defaultdict(set)
        for atom in atoms:
            by_layer[atom[1]].add(atom)
        if () in by_layer or len({len(layer) for layer in by_layer}) > 1:
            units[frozenset(atoms)].append(Unit(path=module))
            continue
        if calls[module] % len(by_layer):  # It holds the scan.
            units[frozenset(atoms)].append(Unit(path=module))
        for number, layer in enumerate(sorted(by_layer)):
            unit = Unit(path=module, layer=number, layers=len(by_layer))
            units[frozenset(by_layer[layer])].append(unit)
    return {atoms: sorted(found, key=lambda unit: len(unit.path)) for atoms, found in units.items()}


def _chained(wanted: Sequence[Unit], stored: Sequence[Unit]) -> Iterable[tuple[Unit, Unit, bool]]:
    """Pairs modules around the same elements: the innermost hold them, the others wrap these."""
    if wanted[0].path == stored[0].path == ():  # Both programs, whatever modules lie within them.
        yield wanted[0], stored[0], True
        wanted, stored = wanted[1:], stored[1:]
    if not wanted or not stored:
        return
    if len(wanted) == len(stored):
        yield from ((one, other, True) for one, other in zip(wanted, stored, strict=True))
        return
    yield wanted[-1], stored[-1], min(len(wanted), len(stored)) == 1
    for one in wanted[:-1]:
        yield from ((one, other, False) for other in stored[:-1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Use:
    """A unit's part in one call.

    Attributes:
        call: The call.
        inputs: The arrays that the unit was called with.
        outputs: The arrays that it returned.
    """

    call: Call
    inputs: Sequence[Array]
    outputs: Sequence[Array]


def uses_of(unit: Unit, calls: Mapping[Path, Sequence[Call]], sizes: Collection[int]) -> list[Use]:
    """Returns a unit's part in the calls of its module, in their order; nothing if they do not come out.

    Args:
        unit: The unit.
        calls: The calls of its program, by module.
        sizes: The sizes of what its counterpart is called with: an input that all layers share is left whole.
    """
    found = calls.get(unit.path, ())
    if unit.layer is not None and len(found) % unit.layers == 0:
        each = len(found) // unit.layers
        found = found[unit.layer * each : (unit.layer + 1) * each]
    elif unit.layer is not None:
        batched = [call for call in found if _is_batched(call, unit.layers)]
        return [_layer(call, unit.layer, unit.layers, sizes) for call in batched]
    return [Use(call=call, inputs=call.inputs, outputs=call.outputs) for call in found]


def _is_batched(call: Call, layers: int) -> bool:
    """Tells whether all layers were computed in one call, by `jax.vmap`."""
    return bool(call.outputs) and all(array.shape[:1] == (layers,) for array in call.outputs)


def _layer(call: Call, layer: int, layers: int, sizes: Collection[int]) -> Use:
    inputs = [
        array[layer] if array.shape[:1] == (layers,) and array.size not in sizes else array
        for array in call.inputs
    ]
    return Use(call=call, inputs=inputs, outputs=[array[layer] for array in call.outputs])
