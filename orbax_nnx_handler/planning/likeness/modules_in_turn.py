"""Modules by what they hold: computed in turn, or with a stack; and leaves that may be arranged as others."""

import functools
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from orbax_nnx_handler.planning.core.leaves import Shape, families, repeats, suffice, totals_with
from orbax_nnx_handler.planning.core.paths import Path, levels
from orbax_nnx_handler.planning.likeness.assignment import best_pairs
from orbax_nnx_handler.planning.likeness.module_parts import Leaf
from orbax_nnx_handler.planning.likeness.shapes import ways
from orbax_nnx_handler.planning.likeness.vocabulary import Names, arm, concepts, exclude, likeness, meanings

Module = tuple[Names, list[Leaf]]


Sizes = tuple[int, ...]


BySize = Mapping[int, Sequence[tuple[int, Names, list[Leaf]]]]


Stacks = Mapping[int, list[tuple[Names, list[Leaf], bool]]]


Run = dict[tuple[int, str, int], Module]
"""Modules beside each other, or those in a list, by the number in the list, the name and its number."""


def in_turn(wanted: Sequence[Leaf], stored: Sequence[Leaf], above: Sequence[int]) -> list[list[Module]]:
    """Returns modules that both sides compute one after the other, each as large as the one in its place.

    `input_blocks/{0..11}/{0..2}` are `down_blocks_{0..2}/{resnets,attentions,downsamplers}_{0..1}`: which of
    several names comes next, sizes tell.
    """
    ours, theirs = _runs(wanted, above[0]), _runs(stored, above[1])
    scores, found = dict[tuple[int, int], float](), dict[tuple[int, int], list[list[Module]]]()
    alike: dict[tuple[bool, int], list[int]] = defaultdict(list)
    for to, (_, other) in enumerate(theirs):
        for length in range(len(other) - 1, len(other) + 2):
            alike[not _is_counted(other), length].append(to)  # Of one side alone numbers tell the order.
    for at, to in ((at, to) for at, (_, x) in enumerate(ours) for to in alike[_is_counted(x), len(x)]):
        (names, run), (others, other) = ours[at], theirs[to]
        pairs = _one_by_one(run, other) if _is_counted(run) else [x[::-1] for x in _one_by_one(other, run)]
        are_modules = sum(len({leaf.names[:-1] for leaf in held}) > 1 for (_, held), _ in pairs) > 1
        is_known = not any(exclude(concepts(one), concepts(two)) for (one, _), (two, _) in pairs)
        if are_modules and arm(names) * arm(others) >= 0 and is_known:
            found[at, to], scores[at, to] = pairs, 20 + likeness(concepts(names), concepts(others))
    return [pair for best in best_pairs(scores) for pair in found[best]]


def _runs(leaves: Iterable[Leaf], above: int) -> list[tuple[Names, Run]]:
    found: dict[tuple[Names, bool], Run] = defaultdict(dict)
    for leaf in leaves:
        path, end = levels(leaf.names), 0
        for level, inner in itertools.pairwise(path):
            end += level.width
            if end <= above:
                continue
            names, number = (*leaf.names[: end - level.width], level.base), level.number or 0
            key, deeper = (number, inner.base, inner.number or 0), leaf.names[: end + inner.width]
            found[names, True].setdefault(key, (deeper, []))[1].append(leaf)
            if level.number is not None:
                key = (0, "", number)
                found[names, False].setdefault(key, (leaf.names[:end], []))[1].append(leaf)
                break
    # What holds leaves beside its modules is no run of them.
    return [
        (names, run)
        for (names, _), run in found.items()
        if all(held[0].names != at for at, held in run.values())
    ]


def _one_by_one(run: Run, other: Run) -> list[list[Module]]:
    """Returns the pairs of a run of which only numbers tell the order, and of another one."""
    keys = sorted(run, key=lambda key: (key[0], key[2]))
    if len(keys) == len(other) + 1 and len({leaf.names[:-1] for leaf in run[keys[0]][1]}) == 1:
        keys = keys[1:]  # What leads in lies beside the list elsewhere.
    if len(keys) != len(other):
        return []
    left: dict[int, dict[str, list[Module]]] = defaultdict(lambda: defaultdict(list))
    for key in sorted(other, key=lambda key: key[::2], reverse=True):
        left[key[0]][key[1]].append(other[key])
    pairs: list[list[Module]] = []
    for key in keys:
        first = next(left[number] for number in sorted(left) if any(left[number].values()))
        size = sum(part_sizes(run[key][1]))
        heads = [held for held in first.values() if held and sum(part_sizes(held[-1][1])) == size]
        if len(heads) != 1:
            return []
        pairs.append([run[key], heads[0].pop()])
    return pairs


def _is_counted(run: Run) -> bool:
    return len({key[:2] for key in run}) == len({key[0] for key in run})


def stacks_in(free: Sequence[Leaf], above: int) -> Stacks:
    """Returns modules (True), and arrays beside the modules in one, by how many layers they may stack."""
    below, beside = _below(free, above), defaultdict[Names, list[Leaf]](list)
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


def _below(leaves: Iterable[Leaf], above: int) -> dict[Names, list[Leaf]]:
    found: dict[Names, list[Leaf]] = defaultdict(list)
    for leaf in leaves:
        for depth in range(above + 1, len(leaf.names)):
            found[leaf.names[:depth]].append(leaf)
    return found


def depth_of(prefix: Names, leaves: Sequence[Leaf]) -> int:
    """Returns how deep a module lies, less than nothing where it holds its leaves itself."""
    return len(prefix) if all(len(leaf.names) > len(prefix) + 1 for leaf in leaves) else -len(prefix)


def sizes_within(leaves: Iterable[Leaf], above: int) -> set[Sizes]:
    """Returns the sizes of each module below a context, part by part."""
    return set(map(part_sizes, _below(leaves, above).values()))


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
    found: set[Path] = set()
    for collection in {leaf.collection for leaf in wanted}:
        ours = [leaf for leaf in wanted if leaf.collection == collection]
        theirs = [leaf for leaf in stored if collection is None or leaf.collection in (None, collection)]
        for number in {leaf.number for leaf in ours}:
            left, right = ([leaf for leaf in side if leaf.number == number] for side in (ours, theirs))
            found |= _arrangeable(left, right)
    return found


def _arrangeable(ours: Sequence[Leaf], theirs: Sequence[Leaf]) -> set[Path]:
    sized = [[(leaf.names, math.prod(leaf.shape)) for leaf in side] for side in (ours, theirs)]
    lacking, held = (Counter(size for _, size in side) for side in sized)
    shapes: dict[object, set[Shape]] = defaultdict(set)
    for leaf in theirs:
        for key in (math.prod(leaf.shape), *_places(leaf)):
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
        or any(ways(shape, leaf.shape) for shape in shapes.get(math.prod(leaf.shape), ()))
        or any(is_part(*family) for family in parts.get(leaf.names, ()))
        or any(repeats(shape, leaf.shape) for key in _places(leaf) for shape in shapes.get(key, ()))
    }


def _places(leaf: Leaf) -> Iterator[tuple[object, ...]]:
    """Yields what is alike for leaves of one place: the module above, or what their own module is called."""
    yield leaf.names[:-2], leaf.names[-1]
    if len(leaf.names) > 1 and (said := meanings(leaf.names[-2])):
        yield said, leaf.names[-1:]
