"""Which module of the target is which module of the checkpoint, and how far what both return lies apart.

Modules that hold the same stored elements are a pair. What is scanned on one side is several modules on the
other, so both sides are taken apart into layers.
"""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.paths import Path, natural_key
from orbax_nnx_handler.planning.core.recipes import Recipe, Shapes
from orbax_nnx_handler.verifying.recording import Array, Call
from orbax_nnx_handler.verifying.weights import Atom, Atoms, layers_seen


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


def calls_in(calls: Mapping[Path, Sequence[Call]]) -> dict[Path, int]:
    """Returns of how many calls one call of each module is made, itself among them."""
    found: dict[Path, int] = defaultdict(int)
    for path, made in calls.items():
        for depth in range(len(path) + 1):
            found[path[:depth]] += len(made)
    return {path: round(found[path] / len(made)) for path, made in calls.items()}


def scanned_axes(calls: Mapping[Path, Sequence[Call]], wanted: Mapping[Path, Shape]) -> dict[Path, int]:
    """Returns the axis of each leaf that the module did not see when it was called."""
    axes: dict[Path, int] = {}
    for leaf, seen in _seen(calls).items():
        whole = wanted.get(leaf, ())
        fits = [axis for axis in range(len(whole)) if (*whole[:axis], *whole[axis + 1 :]) == seen]
        axes |= {leaf: fits[0]} if fits else {}
    return axes


def _seen(calls: Mapping[Path, Sequence[Call]]) -> dict[Path, Shape]:
    """Returns the shape of each leaf that the module saw when it was called."""
    return {(*path, name): shape for path, found in calls.items() for name, shape in found[0].shapes.items()}


def pair_modules(
    recipes: Mapping[Path, Recipe],
    shapes: tuple[Mapping[Path, Shape], Shapes],
    location: Mapping[Path, Path],
    nnx_calls: Mapping[Path, Sequence[Call]],
    linen_calls: Mapping[Path, Sequence[Call]],
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
    layered: Mapping[Path, Sequence[Atoms]], calls: Mapping[Path, Sequence[Call]]
) -> dict[Atoms, list[Unit]]:
    units: dict[Atoms, list[Unit]] = defaultdict(list)
    for module, leaves in _leaves_within(layered, calls).items():
        counts = {len(layered[leaf]) for leaf in leaves}
        count = counts.pop() if len(counts) == 1 else 1
        if count == 1 or len(calls[module]) % count:  # It is in no scan, or holds it.
            whole = frozenset[Atom]().union(*(atoms for leaf in leaves for atoms in layered[leaf]))
            units[whole].append(Unit(path=module))
        for layer in range(count if count > 1 else 0):
            atoms = frozenset[Atom]().union(*(layered[leaf][layer] for leaf in leaves))
            units[atoms].append(Unit(path=module, layer=layer, layers=count))
    return {atoms: sorted(found, key=lambda unit: len(unit.path)) for atoms, found in units.items()}


def _linen_units(
    used: Iterable[Atom],
    location: Mapping[Path, Path],
    calls: Mapping[Path, Sequence[Call]],
    whole: set[Path],
) -> dict[Atoms, list[Unit]]:
    within: dict[Path, set[Atom]] = defaultdict(set)
    for atom in used:
        place = location.get(atom[0], ())
        for depth in range(len(place)):
            if place[:depth] in calls:
                within[place[:depth]].add(atom)
    units: dict[Atoms, list[Unit]] = defaultdict(list)
    for module, atoms in within.items():
        by_layer: dict[tuple[int, ...], set[Atom]] = defaultdict(set)
        for atom in atoms:
            by_layer[() if atom[0] in whole else atom[1]].add(atom)
        is_one = () in by_layer or len({len(layer) for layer in by_layer}) > 1
        if is_one or len(calls[module]) % len(by_layer):  # It is in no scan, or holds it.
            units[frozenset(atoms)].append(Unit(path=module))
        for number, layer in enumerate([] if is_one else sorted(by_layer)):
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


ROUNDING = 3e-6
"""What two ways of computing one module in float32 differ by, and no more, from equal inputs."""


TOLERANCE = 1e-5
"""How far apart two whole programs in float32 may be that compute the same."""


_MOST_ROUNDINGS = 5
"""How much more a whole program may differ by rounding than one module in it."""


_GROWTH = 16
"""How much a module may enlarge a difference that its inputs have already."""


_MOST_AXES = 5


MASK = 1e6
"""Values beyond it are a mask's, and say nothing about how large the others are."""
_LARGE = 1e3
"""From here on, a number that comes several times is a mask's too."""


_COARSE = {"bfloat16": 2e-2, "float16": 2e-3}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distance:
    """How far arrays lie apart.

    Attributes:
        relative: The largest difference of two elements, divided by the larger of the element and the mean
            magnitude of its array.
        absolute: The largest difference itself.
        compared: How many arrays met one of the same size.
        left: How many met none.
        coarse: What a difference may be because the arrays were computed in fewer digits; 0 for float32.
    """

    relative: float = 0.0
    absolute: float = 0.0
    compared: int = 0
    left: int = 0
    coarse: float = 0.0


def distance(reference: Array, other: Array) -> tuple[float, float]:
    """Returns the relative and the absolute difference of two arrays of one size, element by element."""
    a, b = _numbers(reference).reshape(-1), _numbers(other).reshape(-1)
    if not a.size:
        return 0.0, 0.0
    with np.errstate(all="ignore"):
        apart = np.abs(a - b)
        apart[(a == b) | (np.isnan(a) & np.isnan(b))] = 0
        if not np.isfinite(apart).all():
            return float("inf"), float("inf")
        if {reference.dtype.kind, other.dtype.kind} <= set("biu"):
            largest = float(apart.max())  # Of the words 200000 and 200001 none is nearly right.
            return largest, largest
        size = np.abs(a)
        usual = _usual(size)
        mean = float(usual.mean(dtype=np.float64)) if usual.size else 1.0
        relative = apart / np.maximum(size, max(mean, float(np.finfo(np.float32).tiny)))
        relative[apart == 0] = 0  # Where both are no number too.
    return float(relative.max()), float(apart.max())


def _usual(size: Array) -> Array:
    """Returns magnitudes without a mask's: beyond all numbers, or large and several times the same."""
    usual = size[size < MASK]
    while usual.size and (largest := usual.max()) >= _LARGE and 1 < (usual == largest).sum() < usual.size:
        usual = usual[usual < largest]
    return usual


def _numbers(array: Array) -> Array:
    if array.dtype == np.float64 or array.dtype.kind in "iu":
        return array.astype(np.float64)
    return array.astype(np.complex64 if array.dtype.kind == "c" else np.float32)


def compare(reference: Sequence[Array], others: Sequence[Array]) -> Distance:
    """Compares arrays, each with one of its size, whatever its shape: the nearest with each other."""
    pairs = [
        (*_nearest(array, other), one, at)
        for one, array in enumerate(reference)
        for at, other in enumerate(others)
        if _comparable(array, other)
    ]
    relative = absolute = coarse = 0.0
    met, taken = set[int](), set[int]()
    for apart, largest, one, at in sorted(pairs, key=lambda pair: max(ROUNDING, pair[0])):
        if one in met or at in taken:
            continue
        relative, absolute = max(relative, apart), max(absolute, largest)
        coarse = max(coarse, *(_COARSE.get(str(array.dtype), 0.0) for array in (reference[one], others[at])))
        met.add(one)
        taken.add(at)
    left = sum(array.dtype.kind != "b" for one, array in enumerate(reference) if one not in met)
    return Distance(relative=relative, absolute=absolute, compared=len(met), left=left, coarse=coarse)


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
    if found.keys() == wanted.keys() and all(_comparable(wanted[at], found[at]) for at in wanted):
        return _together([compare([array], [found[at]]) for at, array in wanted.items()])
    nearest = compare([*wanted.values()], [*found.values()])
    if exceeds(nearest, TOLERANCE):
        return nearest  # In whichever reading.
    pairs = [pair for pair in itertools.product(wanted.values(), found.values()) if _comparable(*pair)]
    if all(isinstance(key, int) for place in (*wanted, *found) for key in place):
        pairs = _in_order([*wanted.values()], [*found.values()])
    other = _together([compare([one], [two]) for one, two in pairs])
    return Distance(left=len(wanted)) if exceeds(other, TOLERANCE) else nearest


def _in_order(reference: Iterable[Array], others: list[Array]) -> list[tuple[Array, Array]]:
    """Returns each array with the next one of its size."""
    pairs = list[tuple[Array, Array]]()
    for array in reference:
        at = next((at for at, other in enumerate(others) if _comparable(array, other)), None)
        pairs += [] if at is None else [(array, others.pop(at))]
    return pairs


def _together(found: Sequence[Distance]) -> Distance:
    return Distance(
        relative=max((one.relative for one in found), default=0.0),
        absolute=max((one.absolute for one in found), default=0.0),
        compared=sum(one.compared for one in found),
        left=sum(one.left for one in found),
        coarse=max((one.coarse for one in found), default=0.0),
    )


def compare_inputs(reference: Sequence[Array], others: Sequence[Array]) -> Distance:
    """Compares what two modules are called with: floats alone where both have some.

    Masks and positions are a matter of taste: one side has them where the other works them out.
    """
    floats = [[array for array in arrays if array.dtype.kind not in "biu"] for arrays in (reference, others)]
    return compare(*floats) if all(floats) else compare(reference, others)


def _nearest(reference: Array, other: Array) -> tuple[float, float]:
    """Returns how far two arrays lie apart, with their axes in whichever order is nearest: NCHW is NHWC.

    Axes of one element are none: a bias of positions is (1, heads, queries, keys) or (queries, keys, heads).
    """
    apart = distance(reference, other)
    one, two = (tuple(length for length in array.shape if length != 1) for array in (reference, other))
    if apart[0] <= ROUNDING or one == two or not 2 < len(one) == len(two) <= _MOST_AXES:
        return apart
    orders = itertools.permutations(range(len(two)))
    turned = [order for order in orders if tuple(two[axis] for axis in order) == one]
    return min([apart, *(distance(reference, other.reshape(two).transpose(order)) for order in turned)])


def _comparable(one: Array, other: Array) -> bool:
    return one.size == other.size and (one.dtype.kind in "biu") == (other.dtype.kind in "biu")


def exceeds(distance: Distance, limit: float) -> bool:
    """Tells whether a difference is more than a limit, where the arrays have the digits for it."""
    return distance.relative > max(limit, distance.coarse)


def changes_more_than_rounding(inputs: Distance, outputs: Distance, calls: int = 1) -> bool:
    """Tells whether outputs lie further apart than rounding explains.

    Args:
        inputs: How far the inputs lie apart.
        outputs: How far the outputs do.
        calls: Of how many modules, one after the other, the outputs come: each rounds.
    """
    rounding = ROUNDING * min(_MOST_ROUNDINGS, calls**0.5)
    return exceeds(outputs, max(rounding, _GROWTH * inputs.relative))


def same_numbers(reference: Sequence[Array], others: Sequence[Array]) -> bool:
    """Tells whether the arrays, each in its place, hold the same numbers, some of them in another order."""
    pairs = [*zip(reference, others, strict=False)]
    if len(reference) != len(others) or not all(itertools.starmap(_comparable, pairs)):
        return False
    pairs = [(_flat(a), _flat(b)) for a, b in pairs]
    moved = [(a, b) for a, b in pairs if distance(a, b)[0] > 10 * ROUNDING]
    return bool(moved) and all(distance(np.sort(a), np.sort(b))[0] <= 10 * ROUNDING for a, b in moved)


def _flat(array: Array) -> Array:
    return _numbers(array).reshape(-1)
