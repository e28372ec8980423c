"""The parts of a model that hold leaves of their own."""

import dataclasses
import functools
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from orbax_nnx_handler.planning.core.folding import around
from orbax_nnx_handler.planning.core.leaves import (
    Shape,
    derived,
    families,
    record,
    repeats,
    suffice,
    totals_with,
)
from orbax_nnx_handler.planning.core.paths import Level, Path, levels
from orbax_nnx_handler.planning.likeness.shapes import is_vector, ways
from orbax_nnx_handler.planning.likeness.vocabulary import (
    PARAMETER,
    SAID_BY,
    Concepts,
    Names,
    concepts,
    meanings,
    place_of,
    words,
)


@record
class Leaf:
    """A leaf of either side.

    Attributes:
        names: Its path as the program writes it, in segments, without a last level `value`.
        collection: Its Linen collection, or None where the side tells none.
        shape: Its shape; of a stack of layers that are looked at one by one, that of one layer.
        number: The kind of number it holds, as far as no cast crosses it: `floating`, `integer`, …
        source: Its path on disk or in the target.
        made: Whether NNX fuses a cell's gates into it; the last two names are NNX's then.
        done: What settled rules have done with its shape, in order.
        called: Its whole path as settled rules call it; nothing where they leave it as it is.
    """

    names: Names
    collection: str | None
    shape: Shape
    number: str
    source: Path
    made: bool = False
    done: tuple[str, ...] = ()
    called: Names = ()

    @property
    def part(self) -> tuple[Path, Names]:
        """What tells it from others: rules may make several of one stored leaf."""
        return self.source, self.names

    @derived
    def place(self) -> tuple[Names, str]:
        """The part that it belongs to, and what it is there."""
        return place_of(self.names)


@dataclasses.dataclass(frozen=True, eq=False)
class ModulePart:
    """A module with leaves of its own, or one parameter that is none of a module's usual ones.

    Attributes:
        names: Its path.
        leaves: Its leaves by what they are: `main` (kernel, scale, embedding), `bias`, or another name.
        unsaid: What its name does not say among those beside it: `V` beside `U` and `W` is no value.
    """

    names: Names
    leaves: Mapping[str, Leaf]
    unsaid: Concepts = frozenset()

    @derived
    def levels(self) -> tuple[Level, ...]:
        """Its path level by level."""
        return levels(self.names)

    @derived
    def own(self) -> Concepts:
        """What its last name says, or that of the norm whose scale and shift it computes."""
        last, above, *_ = (frozenset(meanings(x.base)) for x in (*self.levels[:-3:-1], *[Level("")] * 2))
        return (above if not last and "norm" in above else last - self.unsaid) | self._kind

    @derived
    def said(self) -> Concepts:
        """What all its names say."""
        above = self.levels[:-1] if self.unsaid else self.levels
        return concepts(level.base for level in above) | self._kind

    @derived
    def _kind(self) -> Concepts:
        leaf = self.leaves.get("main")
        if leaf is None or leaf.names[-len(self.names) :] == self.names:
            return frozenset()
        return SAID_BY.get(leaf.names[-1], frozenset())

    @derived
    def main_size(self) -> int:
        """How many elements its main leaf holds."""
        return math.prod((self.leaves.get("main") or next(iter(self.leaves.values()))).shape)

    @derived
    def is_norm(self) -> bool:
        """Whether it scales or shifts: each of its leaves is a vector, or its name says so."""
        return "norm" in self.own

    @derived
    def is_vector(self) -> bool:
        """Whether no leaf of it is a matrix."""
        return all(is_vector(leaf.shape) for leaf in self.leaves.values())

    @property
    def is_layer(self) -> bool:
        """Whether it has a matrix, or a kernel of one output with its bias."""
        shapes = [leaf.shape for leaf in self.leaves.values()]
        return not self.is_vector or ("bias" in self.leaves and any(len(shape) > 1 for shape in shapes))

    @derived
    def module(self) -> Names:
        """The path of the module around it."""
        return self.names[: len(self.names) - (self.levels[-1].width if self.levels else 0)]

    @derived
    def family(self) -> tuple[Names, str]:
        """What it shares with the others of its list: the module around them, the name before the number."""
        return self.module, self.levels[-1].base if self.levels else ""


def module_parts(leaves: Iterable[Leaf], above: int = 0) -> list[ModulePart]:
    """Returns the parts of a context.

    Args:
        leaves: The leaves of the context.
        above: How many segments of their paths lead to the context.
    """
    found: dict[Names, dict[str, Leaf]] = defaultdict(dict)
    for leaf in leaves:
        names, kind = place_of(leaf.names[above:]) if above else leaf.place
        held = found[names]
        if kind in held and leaf.names[-1] == "kernel":
            other = held.pop(kind)  # `scale` beside it, of weights that are normalised.
            found[other.names[above:]]["main"] = other
        elif kind in held:
            held, kind = found[leaf.names[above:]], "main"  # Two spellings of one thing: each by itself.
        held[kind] = leaf
    _join_letters(found)
    _join_lists(found)
    _sort_biases(found)
    inside: dict[Names, list[Names]] = defaultdict(list)
    for names in found:
        inside[names[:-1]].append(names)
    for names in [names for names, held in found.items() if held.keys() == {"bias"}]:
        # Praxis: `linear/w` and `bias/b`.
        beside = [other for other in inside[names[:-1]] if other != names and names[-1:] == ("bias",)]
        around, bias = found.get(beside[0] if len(beside) == 1 else names[:-1], {}), found[names]["bias"]
        if "main" in around and "bias" not in around and bias.shape == around["main"].shape[1:]:
            around["bias"] = found.pop(names)["bias"]
    modules = set[Names]()
    for names in found:
        while names and (names := names[:-1]) not in modules:  # Those around a known one are known.
            modules.add(names)
    return [
        ModulePart(_own_place(names, held, modules, above), held, _unsaid(names, inside[names[:-1]]))
        for names, held in found.items()
    ]


def _unsaid(names: Names, beside: Iterable[Names]) -> Concepts:
    """Returns what a letter does not say: of `U`, `V` and `W` none is a value; SAGAN's is `h`, beside `f`."""
    if names[-1:] not in (("v",), ("V",)):
        return frozenset()
    others = {name.lower() for other in beside for name in other[-1:]}
    is_letter = others >= {"u", "w"} and concepts(others).isdisjoint(("q", "k"))
    return frozenset("v") if is_letter or others >= {*"fgh"} else frozenset()


def _join_letters(found: dict[Names, dict[str, Leaf]]) -> None:
    """Makes `output_w` and `output_b` one part, `w_output` and `b_output`, `gamma1` and `beta1`."""
    lasts = [(names[:-1], names[-1]) for names in found if names]
    pairs = [(above, x, f"{x[:-1]}b", x[:-2]) for above, x in lasts if x[-2:] == "_w"]
    pairs += [(above, x, f"beta{x[5:]}", f"norm{x[5:]}") for above, x in lasts if x[:5] == "gamma"]
    # What follows the letter tells the part, or only its number: `w1` stays a name.
    pairs += [
        (above, x, f"b{x[1:]}", x[1:].lstrip("_") if x[1:2] == "_" and x[2:3].isalpha() else x)
        for above, x in lasts
        if x[:1] in "wW" and x[1:]
    ]
    for above, name, bias, part in pairs:
        both = [(at, found.get((*above, at), {})) for at in (name, bias)]
        shapes = [x["main"].shape for at, x in both if [*x] == ["main"] and x["main"].names[-1] == at]
        # An ensemble's bias has 1 in the place of the inputs.
        fits = (y in (x[-len(y) :], (*x[:-2], 1, *x[-1:])) for x, y in itertools.pairwise(shapes))
        is_free = part == name or (*above, part) not in found
        if is_free and any(fits):
            main, other = (found.pop((*above, at))["main"] for at in (name, bias))
            found[*above, part] = {"main": main, "bias": other}


def _join_lists(found: dict[Names, dict[str, Leaf]]) -> None:
    """Makes `weights/0` and `biases/0` one part with a bias."""
    lists: dict[Names, dict[str, Names]] = defaultdict(dict)
    for *above, last, number in (names for names in found if len(names) > 1 and names[-1].isdecimal()):
        kind = "bias" if last == "biases" else PARAMETER.get(last.lower())
        if kind in ("main", "bias") and found[*above, last, number].keys() == {"main"}:
            lists[*above, number][kind] = (*above, last, number)
    for part, held in lists.items():
        if len(held) > 1 and part not in found:
            main, bias = (found[held[kind]]["main"] for kind in ("main", "bias"))
            if bias.shape in (main.shape[-1:], main.shape[:1]):
                del found[held["main"]], found[held["bias"]]
                found[part] = {"main": main, "bias": bias}


def _sort_biases(found: dict[Names, dict[str, Leaf]]) -> None:
    """Gives a bias the only kernel of its module, as `weight_v` beside `weight_g`; beside `a`, `b` counts."""
    beside: dict[Names, list[Names]] = {at: [] for at, held in found.items() if held.keys() == {"bias"}}
    for names, held in found.items():
        if held.keys() == {"main"} and names[:-1] in beside:
            beside[names[:-1]].append(names)
    for names, others in beside.items():
        bias = found[names]["bias"]
        kernels = [other for other in others if _is_kernel(other[-1], found[other]["main"])]
        if bias.names[-1] == "b" and any(other[-1].lower() in ("a", "c") for other in others):
            found[*names, "b"] = {"main": found.pop(names)["bias"]}
        elif len(kernels) == 1:
            found[names]["main"] = found.pop(kernels[0])["main"]


def _is_kernel(name: str, leaf: Leaf) -> bool:
    is_scale = name == "t" and math.prod(leaf.shape) == 1  # SigLIP's, of logits, beside a bias `b`.
    return is_scale or (words(name)[:1] in (("kernel",), ("weight",)) and not is_vector(leaf.shape))


def _own_place(names: Names, held: Mapping[str, Leaf], modules: Collection[Names], above: int) -> Names:
    """Returns the path of a part; a scale beside modules, as of ConvNeXt's blocks, is one by itself."""
    is_scale = names in modules and [*held] == ["main"] and is_vector(held["main"].shape)
    return held["main"].names[above:] if is_scale and names else names


def part_of(leaf: Leaf) -> Names:
    """Returns the path of the part that a leaf belongs to."""
    return leaf.place[0]


def prefixes(part: ModulePart) -> list[tuple[Names, Level]]:
    """Returns the levels of a part, each with what leads to it."""
    return list(zip(((), *around(part.names)), part.levels, strict=False))


def containers(part: ModulePart) -> Sequence[Names]:
    """Returns the modules around a part, the innermost first, the context itself left out."""
    return around(part.names)[::-1]


def ranked(column: Iterable[str]) -> tuple[list[str], list[int]]:
    """Returns the numbers in order, and the rank of each of them."""
    numbers = [*column]
    places = {number: at for at, number in enumerate(sorted({*numbers}, key=int))}
    return [*places], [places[number] for number in numbers]


def counted_parts(parts: Iterable[ModulePart]) -> Mapping[tuple[Names, str], Mapping[int, ModulePart]]:
    """Returns the parts that a program itself counts, by module and name, in their order."""
    found = defaultdict[tuple[Names, str], dict[int, ModulePart]](dict)
    for part, last in ((one, last) for one in parts for last in one.levels[-1:]):
        if last.number is not None and not last.is_automatic:
            found[part.module, last.base][last.number] = part
    return {key: dict(sorted(held.items(), key=lambda x: x[0])) for key, held in found.items()}


def without_place(
    pairs: Collection[tuple[int, int]], sides: Sequence[Sequence[ModulePart]]
) -> set[tuple[int, int]]:
    """Returns pairs of what is in no list and what is in a layer of which no matrix has a place.

    A norm of a layer that the other side lacks is not the one behind all layers.
    """
    within, lacking = list[set[int]](), list[set[int]]()
    for side, parts in enumerate(sides):
        layers: dict[Names, set[int]] = defaultdict(set)
        for at, part in enumerate(parts):
            for names, level in zip(around(part.names), part.levels, strict=False):
                if level.number is not None:
                    layers[names].add(at)
        matrices = {at for at, part in enumerate(parts) if not part.is_vector}
        placed = {pair[side] for pair in pairs} & matrices
        within.append(set[int]().union(*layers.values()))
        without = (held for held in layers.values() if len(held & matrices) > 1 and not held & placed)
        lacking.append(set[int]().union(*without))
    return {
        (at, to)
        for at, to in pairs
        if (at in lacking[0] and to not in within[1]) or (to in lacking[1] and at not in within[0])
    }


Sizes = tuple[int, ...]
BySize = Mapping[int, Sequence[tuple[int, Names, list[Leaf]]]]
Stacks = Mapping[int, list[tuple[Names, list[Leaf], bool]]]


def stacks_in(free: Sequence[Leaf], above: int) -> Stacks:
    """Returns modules (True), and arrays beside the modules in one, by how many layers they may stack."""
    below, beside = leaves_below(free, above), defaultdict[Names, list[Leaf]](list)
    for leaf in free:
        beside[leaf.names[:-1]].append(leaf)
    found: dict[int, list[tuple[Names, list[Leaf], bool]]] = defaultdict(list)
    for prefix, leaves in below.items():
        # Of modules that hold nothing but each other, the innermost one is the layer.
        inner = leaves[0].names[: len(prefix) + 1]
        if len(below.get(inner, ())) < len(leaves) or depth_of(inner, leaves) < 0:
            for count in {*leaves[0].shape[:3]}:
                found[count].append((prefix, leaves, True))
    for prefix, leaves in beside.items():
        for count in {*leaves[0].shape[:3]} if len(leaves) < len(below.get(prefix, free)) else ():
            found[count].append((prefix, leaves, False))
    return found


_Held = TypeVar("_Held", Leaf, ModulePart)


def leaves_below(leaves: Iterable[_Held], above: int = 0) -> dict[Names, list[_Held]]:
    """Returns the leaves, or parts, in each module below a context, however deep, by what leads to it."""
    found: dict[Names, list[_Held]] = defaultdict(list)
    for leaf in leaves:
        for depth in range(above + 1, len(leaf.names)):
            found[leaf.names[:depth]].append(leaf)
    return found


def depth_of(prefix: Names, leaves: Sequence[Leaf]) -> int:
    """Returns how deep a module lies, less than nothing where it holds its leaves itself."""
    return len(prefix) if all(len(leaf.names) > len(prefix) + 1 for leaf in leaves) else -len(prefix)


def sizes_within(leaves: Iterable[Leaf], above: int) -> set[Sizes]:
    """Returns the sizes of each module below a context, part by part."""
    return set(map(part_sizes, leaves_below(leaves, above).values()))


def of_sizes(below: BySize, sizes: Collection[int]) -> Mapping[Names, list[Leaf]]:
    """Returns the outermost modules with a number of some sizes; of one that only holds another one, that."""
    found: dict[Names, list[Leaf]] = {}
    for _, names, held in sorted((x for size in sizes for x in below.get(size, ())), key=lambda x: x[0]):
        outer = next((names[:at] for at in range(1, len(names)) if names[:at] in found), names)
        if outer == names or len(found[outer]) == len(held):
            found.pop(outer, None)
            found[names] = held
    return found


def part_sizes(leaves: Iterable[Leaf]) -> Sizes:
    """Returns the sizes of some leaves in order."""
    return tuple(sorted(math.prod(leaf.shape) for leaf in leaves))


def arrangeable(wanted: Sequence[Leaf], stored: Sequence[Leaf]) -> set[Path]:
    """Returns the wanted leaves that stored ones could be by their shapes, in any arrangement.

    One leaf with its axes in another order, or split, or merged; several of one size in one array,
    or one of several; leaves of modules near each other side by side; one of its place several times.
    """
    groups = defaultdict[tuple[str | None, str, str], list[Leaf]](list)
    for leaf in wanted:
        last = leaf.names[-1] if leaf.names[-1] in ("kernel", "bias") else ""
        groups[leaf.collection, leaf.number, last].append(leaf)
    found = set[Path]()
    for (collection, number, last), ours in groups.items():
        held = {None, collection} if collection else {leaf.collection for leaf in stored}
        theirs = [leaf for leaf in stored if leaf.number == number and leaf.collection in held]
        found |= _arrangeable(ours, theirs, [leaf for leaf in theirs if _is_like(leaf, last)])
    return found


def _is_like(leaf: Leaf, last: str) -> bool:
    """Tells whether a leaf may be in one array with others: of a kernel no vector is, of a bias no kernel."""
    name = leaf.names[-1]
    is_vector_of_kernel = last == "kernel" != name and (name == "bias" or is_vector(leaf.shape))
    return not is_vector_of_kernel and (last, name) != ("bias", "kernel")


def _arrangeable(ours: Sequence[Leaf], theirs: Sequence[Leaf], alike: Sequence[Leaf]) -> set[Path]:
    sized = [[(leaf.names, math.prod(leaf.shape)) for leaf in side] for side in (ours, alike)]
    lacking, held = (Counter(size for _, size in side) for side in sized)
    shapes: dict[object, set[Shape]] = defaultdict(set)
    for leaf, key in ((each, key) for each in theirs for key in _places(each)):
        shapes[key].add(leaf.shape)
    parts, joined = families(sized[0]), set(itertools.chain(*families(sized[1]).values()))
    wholes = dict(sorted((whole, held[size]) for sizes, size in joined for whole in totals_with(sizes, size)))
    likes = {size for size, n in lacking.items() if suffice(size, n, held, 2) or suffice(size, n, wholes)}

    @functools.cache
    def is_part(sizes: tuple[int, ...], size: int) -> bool:
        return any(suffice(total, lacking[size], held) for total in totals_with(sizes, size))

    return {
        leaf.source
        for leaf in ours
        if math.prod(leaf.shape) in likes
        or any(ways(x, leaf.shape) or repeats(x, leaf.shape) for key in _places(leaf) for x in shapes[key])
        or any(is_part(*family) for family in parts.get(leaf.names, ()))
    }


def _places(leaf: Leaf) -> Iterator[object]:
    """Yields what is alike for leaves of one size, of one module, or of modules that are called alike."""
    yield math.prod(leaf.shape)
    yield leaf.names[:-2], leaf.names[-1]
    if len(leaf.names) > 1 and (said := meanings(leaf.names[-2])):
        yield said, leaf.names[-1:]


ModuleKinds = tuple[Names, tuple[Sequence[str], frozenset[Names]]]


def kinds_of_modules(parts: Iterable[Names]) -> Mapping[Names, ModuleKinds]:
    """Returns of what kind each module is: by its path without numbers, and by its name and its parts."""
    held: dict[Names, set[Names]] = defaultdict(set)
    for part in parts:
        for names in around(part):
            held[names].add(part[len(names) :])
    bases = {names: tuple(level.base for level in levels(names)) for names in held}
    last = {names: next(filter(None, reversed(named)), "") for names, named in bases.items()}
    said = {names: meanings(name) or (name,) for names, name in last.items()}  # `Mixed_5b` as `Mixed_5c`.
    kinds = {key: key for key in ((said[names], frozenset(held[names])) for names in bases)}
    # One object for each kind: what is compared often is compared by identity.
    return {names: (named, kinds[said[names], frozenset(held[names])]) for names, named in bases.items()}


def is_alone(names: Names, kinds: Mapping[Names, ModuleKinds]) -> bool:
    """Tells whether a module holds only one part of a name: a convolution beside a norm."""
    own = levels(names)[-1]
    return (module := names[: -own.width]) in kinds and _counted(kinds[module][1][1])[(own.base,)] == 1


@functools.lru_cache(maxsize=1024)  # Asked of every part of a module.
def _counted(parts: frozenset[Names]) -> Counter[tuple[str, ...]]:
    return Counter(tuple(level.base for level in levels(part)) for part in parts)
