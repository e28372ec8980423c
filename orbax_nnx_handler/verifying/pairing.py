"""Which module of the target is which module of the checkpoint, and how far what both return lies apart.

Modules that hold the same stored elements are a pair. What is scanned on one side is several modules on the
other, so both sides are taken apart into layers.
"""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from orbax_nnx_handler.planning.core.folding import fold_paths
from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.lines import counted
from orbax_nnx_handler.planning.core.paths import Path, natural_key
from orbax_nnx_handler.planning.core.recipes import (
    Concat,
    Fill,
    Index,
    Read,
    Recipe,
    Shapes,
    Slice,
    Stack,
    shape_of,
    simplify,
)
from orbax_nnx_handler.planning.core.regions import layer_of
from orbax_nnx_handler.verifying import (
    TOLERANCE,
    Array,
    Distance,
    agree,
    begin_alike,
    comparable,
    compare,
    compare_inputs,
    exceeds,
    together,
)
from orbax_nnx_handler.verifying.recording import Call

Atom = tuple[Path, tuple[int, ...], tuple[tuple[int, int, int], ...]]
"""A stored leaf, the layer in it, and the part of that layer: axis, start and size of each cut."""
Atoms = frozenset[Atom]


def layers_of(recipe: Recipe) -> list[Atoms]:
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


def layers_seen(recipe: Recipe, axis: int | None, shapes: Shapes, *, is_whole: bool) -> list[Atoms]:
    """Returns what each layer of a leaf is made from that its module saw one by one.

    Args:
        recipe: How the leaf is made.
        axis: The axis that the module did not see, where it is known.
        shapes: The stored shapes.
        is_whole: Whether the module saw all of the leaf.
    """
    found = layers_of(recipe)
    if len(found) > 1 and axis is not None:
        count = shape_of(recipe, shapes)[axis]
        layers = [layers_of(simplify(layer_of(recipe, axis, at, shapes), shapes)) for at in range(count)]
        found = [frozenset[Atom]().union(*parts) for parts in layers]
        # Where each layer reads the same leaves, they are stacked in the checkpoint too.
        is_whole = len({frozenset(atom[0] for atom in layer) for layer in found}) == 1
    return [frozenset[Atom]().union(*found)] if is_whole else found


CallsByPath = Mapping[Path, Sequence[Call]]


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


def by_path(calls: Iterable[Call]) -> dict[Path, Sequence[Call]]:
    """Returns calls by module, in their order."""
    found: dict[Path, list[Call]] = defaultdict(list)
    for call in calls:
        found[call.path].append(call)
    return dict(found)


def calls_in(calls: CallsByPath) -> dict[Path, int]:
    """Returns of how many calls one call of each module is made, itself among them."""
    found: dict[Path, int] = defaultdict(int)
    for path, made in calls.items():
        for depth in range(len(path) + 1):
            found[path[:depth]] += len(made)
    return {path: round(found[path] / len(made)) for path, made in calls.items()}


def scanned_axes(calls: CallsByPath, wanted: Mapping[Path, Shape]) -> dict[Path, int]:
    """Returns the axis of each leaf that the module did not see when it was called."""
    axes: dict[Path, int] = {}
    for leaf, seen in _seen(calls).items():
        whole = wanted.get(leaf, ())
        fits = [axis for axis in range(len(whole)) if (*whole[:axis], *whole[axis + 1 :]) == seen]
        axes |= {leaf: fits[0]} if fits else {}
    return axes


def _seen(calls: CallsByPath) -> dict[Path, Shape]:
    """Returns the shape of each leaf that the module saw when it was called."""
    return {(*path, name): shape for path, found in calls.items() for name, shape in found[0].shapes.items()}


def pair_modules(
    recipes: Mapping[Path, Recipe],
    shapes: tuple[Mapping[Path, Shape], Shapes],
    location: Mapping[Path, Path],
    nnx_calls: CallsByPath,
    linen_calls: CallsByPath,
) -> list[ModulePair]:
    """Returns the modules that hold the same stored elements, of those that were called.

    What a module sees as one array is not taken apart: parts joined on an axis are no layers of a scan.

    Args:
        recipes: How each wanted leaf of the model is made.
        shapes: Of each wanted leaf, and of each stored one.
        location: Where each stored leaf lies in the Linen program: keys of the module and the leaf's name.
        nnx_calls: The calls of the one program, by module.
        linen_calls: The calls of the other.
    """
    ours, stored = shapes
    axes, seen, seen_by_linen = scanned_axes(nnx_calls, ours), _seen(nnx_calls), _seen(linen_calls)
    layered = {
        path: layers_seen(recipe, axes.get(path), stored, is_whole=seen.get(path) == ours[path])
        for path, recipe in recipes.items()
    }
    used = {atom for layers in layered.values() for atoms in layers for atom in atoms}
    whole = {path for path, place in location.items() if seen_by_linen.get(place) == stored[path]}
    nnx = _nnx_units(layered, nnx_calls)
    linen = _linen_units(used, location, linen_calls, whole)
    within = _leaves_within(recipes, nnx_calls)
    pairs: list[ModulePair] = []
    for atoms, wanted in nnx.items():
        if atoms and atoms in linen:
            for one, other, certain in _chained(wanted, linen[atoms], (nnx_calls, linen_calls)):
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


def _nnx_units(layered: Mapping[Path, Sequence[Atoms]], calls: CallsByPath) -> dict[Atoms, list[Unit]]:
    units: dict[Atoms, list[Unit]] = defaultdict(list)
    for module, leaves in _leaves_within(layered, calls).items():
        counts = {len(layered[leaf]) for leaf in leaves}
        count = counts.pop() if len(counts) == 1 else 1
        if count == 1 or len(calls[module]) % count:  # It is in no scan, or holds it.
            whole = frozenset[Atom]().union(*(atoms for leaf in leaves for atoms in layered[leaf]))
            units[whole].append(Unit(path=module))
        for layer in range(count if count > 1 and _runs_in_layers(calls[module], count) else 0):
            atoms = frozenset[Atom]().union(*(layered[leaf][layer] for leaf in leaves))
            units[atoms].append(Unit(path=module, layer=layer, layers=count))
    return {atoms: _from_outside(found, calls) for atoms, found in units.items()}


def _linen_units(
    used: Iterable[Atom],
    location: Mapping[Path, Path],
    calls: CallsByPath,
    whole: set[Path],
) -> dict[Atoms, list[Unit]]:
    within: dict[Path, set[Atom]] = defaultdict(set)
    for atom in used:
        place = location.get(atom[0], ())
        for depth in range(len(place)):
            if place[:depth] in calls:
                within[place[:depth]].add(atom)
    within |= _held_by_calls(within, calls)
    units: dict[Atoms, list[Unit]] = defaultdict(list)
    for module, atoms in within.items():
        by_layer: dict[tuple[int, ...], set[Atom]] = defaultdict(set)
        for atom in atoms:
            by_layer[() if atom[0] in whole else atom[1]].add(atom)
        is_one = () in by_layer or len({len(layer) for layer in by_layer}) > 1
        if is_one or len(calls[module]) % len(by_layer):  # It is in no scan, or holds it.
            units[frozenset(atoms)].append(Unit(path=module))
        is_one = is_one or not _runs_in_layers(calls[module], len(by_layer))
        for number, layer in enumerate([] if is_one else sorted(by_layer)):
            unit = Unit(path=module, layer=number, layers=len(by_layer))
            units[frozenset(by_layer[layer])].append(unit)
    return {atoms: _from_outside(found, calls) for atoms, found in units.items()}


def _held_by_calls(within: Mapping[Path, set[Atom]], calls: CallsByPath) -> dict[Path, set[Atom]]:
    """Returns what modules without weights run, as an `nn.RNN` the cell that its caller holds."""
    found: dict[Path, set[Atom]] = defaultdict(set)
    for module, atoms in within.items():
        for outer in {outer for call in calls[module] for outer in call.within} - within.keys():
            found[outer] |= atoms
    return found


def _from_outside(units: Iterable[Unit], calls: CallsByPath) -> list[Unit]:
    return sorted(units, key=lambda unit: (len(calls[unit.path][0].within), len(unit.path)))


def _runs_in_layers(calls: Sequence[Call], count: int) -> bool:
    """Tells whether calls are those of so many layers: one by one, or all in one call."""
    return len(calls) % count == 0 or any(_is_batched(call, count) for call in calls)


def _chained(
    wanted: Sequence[Unit], stored: Sequence[Unit], calls: tuple[CallsByPath, CallsByPath]
) -> Iterable[tuple[Unit, Unit, bool]]:
    """Pairs modules around the same elements: the innermost hold them, the others wrap these.

    A single one is what of several is called as often, a loop over a cell or the cell, and returns as much.
    """
    if wanted[0].path == stored[0].path == ():  # Both programs, whatever modules lie within them.
        yield wanted[0], stored[0], True
        wanted, stored = wanted[1:], stored[1:]
    if not wanted or not stored:
        return
    if len(wanted) == len(stored):
        yield from ((one, other, True) for one, other in zip(wanted, stored, strict=True))
        return
    is_single = min(len(wanted), len(stored)) == 1
    pairs = [*itertools.product(reversed(wanted), reversed(stored))] if is_single else []
    counts = [
        [len(found[unit.path]) // unit.layers for unit, found in zip(pair, calls, strict=True)]
        for pair in pairs
    ]
    alike = [pair for pair, (ours, theirs) in zip(pairs, counts, strict=True) if ours == theirs]
    alike.sort(
        key=lambda pair: (
            not _returns_as_much(*(found[unit.path][0] for unit, found in zip(pair, calls, strict=True)))
        )
    )
    yield (*(alike[0] if alike else (wanted[-1], stored[-1])), is_single)
    for one in wanted[:-1]:
        yield from ((one, other, False) for other in stored[:-1])


def _returns_as_much(one: Call, other: Call) -> bool:
    return not {array.size for array in one.outputs}.isdisjoint(array.size for array in other.outputs)


def nearest_modules(module: Path, others: Sequence[Path]) -> list[Path]:
    """Returns modules from the nearest on: siblings first, then those at the same place of another layer."""

    def apart(other: Path) -> tuple[int, int, object]:
        common = next((at for at, (a, b) in enumerate(zip(module, other, strict=False)) if a != b), 0)
        differing = sum(a != b for a, b in zip(module, other, strict=False))
        return (differing + abs(len(module) - len(other)), -common, natural_key(other))

    return sorted(others, key=apart)


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


def of_one_size(one: Use, other: Use) -> bool:
    """Tells whether two modules return arrays of one size."""
    sizes = [{array.size for array in use.outputs} for use in (one, other)]
    return not sizes[0].isdisjoint(sizes[1])


def uses_of(unit: Unit, calls: CallsByPath, sizes: Collection[int]) -> list[Use]:
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
    return call.is_batched and all(array.shape[:1] == (layers,) for array in call.outputs)


def _layer(call: Call, layer: int, layers: int, sizes: Collection[int]) -> Use:
    inputs = [
        array[layer] if array.shape[:1] == (layers,) and array.size not in sizes else array
        for array in call.inputs
    ]
    return Use(call=call, inputs=inputs, outputs=[array[layer] for array in call.outputs])


def compare_outputs(linen: Use, nnx: Use, outputs: Sequence[Array] | None = None) -> Distance:
    """Compares what two modules return: each array with the one at its place.

    Where they arrange it differently, sizes tell which is which, and among arrays of one size the order of
    tuples and lists. Nothing is compared where arrays agree, but in one of several readings alone.

    Args:
        linen: Linen's module.
        nnx: The target's.
        outputs: What the target's returns now, instead of what was recorded.
    """
    wanted = dict(zip(linen.call.places, linen.outputs, strict=False))
    found = dict(zip(nnx.call.places, nnx.outputs if outputs is None else outputs, strict=False))
    if found.keys() == wanted.keys() and all(comparable(wanted[at], found[at]) for at in wanted):
        return together([compare([array], [found[at]]) for at, array in wanted.items()])
    nearest = compare([*wanted.values()], [*found.values()])
    if exceeds(nearest, TOLERANCE):
        return nearest  # In whichever reading.
    pairs = [pair for pair in itertools.product(wanted.values(), found.values()) if comparable(*pair)]
    if all(isinstance(key, int) for place in (*wanted, *found) for key in place):
        pairs = _in_order([*wanted.values()], [*found.values()])
    other = together([compare([one], [two]) for one, two in pairs])
    return Distance(left=len(wanted)) if exceeds(other, TOLERANCE) else nearest


def _in_order(reference: Iterable[Array], others: list[Array]) -> list[tuple[Array, Array]]:
    """Returns each array with the next one of its size."""
    pairs = list[tuple[Array, Array]]()
    for array in reference:
        at = next((at for at, other in enumerate(others) if comparable(array, other)), None)
        pairs += [] if at is None else [(array, others.pop(at))]
    return pairs


_MOST_CALLS = 16
"""How many calls of one module are compared each with each."""


def call_by_call(linen: Sequence[Use], nnx: Sequence[Use]) -> Iterator[tuple[int, Use, Use, Distance]]:
    """Yields the number of a call in NNX, Linen's call, its own, and how far their inputs lie apart.

    With the same inputs, else in turn: two towers of shared weights may be called in either order. Where one
    program calls a module more often, what has no counterpart is left out, unless none has one.
    """
    left, pairs = dict(enumerate(linen)), dict[int, tuple[int, Distance | None]]()
    for at, use in enumerate(nnx if 1 < max(len(linen), len(nnx)) <= _MOST_CALLS else ()):
        # What is its own, where it may be; else the first one, as the program goes on.
        for number in sorted(left, key=lambda number: number != at):
            if number == at or begin_alike(left[number].inputs, use.inputs):
                inputs = compare_inputs(left[number].inputs, use.inputs)
                if agree(inputs):
                    pairs[at] = number, inputs
                    del left[number]
                    break
    if len(linen) == len(nnx) or not pairs:
        open_ = (at for at in range(len(nnx)) if at not in pairs)
        pairs |= {at: (number, None) for at, number in zip(open_, [*left], strict=False)}
    for at, (number, inputs) in sorted(pairs.items()):
        one, other = linen[number], nnx[at]
        yield at, one, other, inputs or compare_inputs(one.inputs, other.inputs)


def called_otherwise(pairs: Iterable[ModulePair], linen: CallsByPath, nnx: CallsByPath) -> Iterator[str]:
    """Yields which modules are not called as often as in Linen, and which drop what Linen does not."""
    found = dict[str, list[Path]]()
    for pair in pairs:
        theirs, ours = len(uses_of(pair.linen, linen, ())), len(uses_of(pair.nnx, nnx, ()))
        if ours and theirs and ours != theirs:
            words = f"called {counted(theirs, 'time')} in Linen and {counted(ours, 'time')} in NNX"
            found.setdefault(words, []).append(pair.nnx.path)
    yield from (f"{fold_paths(paths)}: {words}." for words, paths in found.items())
    on = {call.path for calls in nnx.values() for call in calls if _drops(call, "rate", "deterministic")}
    if on and not any(_drops(call, "rate") for calls in linen.values() for call in calls):
        yield f"{fold_paths(on)}: dropout is on (deterministic is False), and in Linen none is."


def _drops(call: Call, *settings: str) -> bool:
    """Tells whether a module has a rate, and returns something else than it is called with."""
    has_rate = {*settings} <= call.settings.keys()
    apart = compare(call.inputs[:1] if has_rate else (), call.outputs)
    return bool(apart.compared) and exceeds(apart, TOLERANCE)
