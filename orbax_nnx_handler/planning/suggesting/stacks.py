"""Stacks: what of the other side holds the layers of a group along an axis, or every second, third, ….

Then, lists that the other side counts through as one. Last, modules that both sides keep stacked: one layer
tells how each array of all of them is made.
"""

import dataclasses
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from orbax_nnx_handler.planning.core.leaves import Shape, with_fields
from orbax_nnx_handler.planning.core.paths import levels
from orbax_nnx_handler.planning.likeness import share_word, sizes_of, with_layers
from orbax_nnx_handler.planning.likeness.arrangements import moves
from orbax_nnx_handler.planning.likeness.highest_sums import best_pairs
from orbax_nnx_handler.planning.likeness.links import Findings, Link, numbered, settle_turns
from orbax_nnx_handler.planning.likeness.module_parts import Leaf, Stacks, depth_of, leaves_below
from orbax_nnx_handler.planning.likeness.shapes import Step, Steps, Way, transposed, without_axis
from orbax_nnx_handler.planning.likeness.vocabulary import (
    MARGIN,
    RESTS,
    Names,
    arm,
    concepts,
    exclude,
    likeness,
)
from orbax_nnx_handler.planning.suggesting.series import (
    Pairs,
    Series,
    alone,
    are_alike,
    by_front,
    have_equal_layers,
    is_complete,
    series_of,
)


def without_rest(series: Series, others: Iterable[Series]) -> tuple[Series, Pairs] | None:
    """Returns a group without its last layers, and these with a group named so: the remainder."""
    found = [other for other in others if other.said & RESTS and have_equal_layers(series, other)]
    if len(found) != 1 or len(found[0].members) >= len(series.members) or not is_complete(found[0]):
        return None
    other, numbers, first = found[0], series.numbers, len(series.numbers) - len(found[0].numbers)
    members = {number: series.members[number] for number in numbers[:first]}
    pairs = [
        (alone(series.place(at), series.members[at], 0), alone(other.place(to), other.members[to], 1))
        for at, to in zip(numbers[first:], other.numbers, strict=True)
    ]
    return dataclasses.replace(series, members=members), pairs


def with_inner(groups: Iterable[Series]) -> list[Series]:
    """Returns groups of layers with those within their layers: experts in a list of a block's parts."""
    found = list(groups)
    for one in found:  # It grows.
        kinds = {one.looks[number]: held for number, held in one.members.items()}
        holding = {looks for looks, held in kinds.items() if series_of(held, one.depth)}
        inner = (held for number, held in one.members.items() if one.looks[number] in holding)
        found += [each for held in inner for each in series_of(held, one.depth)]
    return found


def kinds_of(series: Series) -> list[Series]:
    """Returns a group as its layers of each kind: those that hold parts of the same names."""
    kinds: dict[frozenset[Names], dict[int, list[Leaf]]] = defaultdict(dict)
    names: dict[object, frozenset[Names]] = {}
    for number, leaves in series.members.items():
        if (looks := series.looks[number]) not in names:
            names[looks] = frozenset(tuple(level.base for level in levels(path)) for path, _ in looks)
        kinds[names[looks]][number] = leaves
    each = [dataclasses.replace(series, members=members, is_kind=True) for members in kinds.values()]
    return each if len(kinds) > 1 else [series]


def shared_in(series: Series) -> Series:
    """Returns a group with what all of its layers hold, where that is nearly all.

    The first one often holds something beside it: the table of relative positions. Of layers that
    only lack something, or hold something beside the rest, half is enough.
    """
    looks = [{*held} for held in series.looks.values()]
    shared = set[tuple[Names, Shape]].intersection(*looks)
    if all(held == shared for held in looks) or not shared:
        return series
    members = {
        number: [leaf for leaf in held if (leaf.names[series.depth :], leaf.shape) in shared]
        for number, held in series.members.items()
    }
    usual, count = Counter(map(frozenset, looks)).most_common(1)[0]
    is_one_kind = 2 * count > len(looks) and all(held <= usual or held >= usual for held in looks)
    shared_part = dataclasses.replace(series, members=members)
    return shared_part if shared_part.size > (0.5 if is_one_kind else 0.9) * series.size else series


_Stack = tuple[bool, float, float, int, Names, int, list[Leaf]]
"""How much of a group of layers a module may hold, how alike they are called, and what a share is."""


def _stacks_for(series: Series, possible: Stacks, least: int) -> list[_Stack]:
    """Returns the modules whose leaves all have an axis for the layers of a group."""
    said, count, found = series.said, len(series.members), list[_Stack]()
    for prefix, leaves, is_module in possible.get(count, ()):
        lengths = enumerate(leaves[0].shape[:3])
        axes = [at for at, length in lengths if length == count and _have_axis(leaves, at, count)]
        # What is a list or holds one is no query and no value of an attention.
        says, way = concepts(level.base for level in levels(prefix)), arm(series.base) * arm(prefix)
        if not axes or exclude(said - {"q", "v"}, says) or way < 0 or "tgt" in said ^ says:
            continue  # Nor is the network that follows another one that one.
        if least == 1 and "norm" in said ^ says:
            continue  # Norms are no rows of a matrix.
        size = sizes_of(leaves)
        ratio = min(size, series.size) / max(size, series.size)
        if ratio > (0.5 if is_module and least > 1 else 0.99):
            # `enc` is what leads down a U-Net, as `down_blocks` do.
            alike, axis = likeness(said, concepts(prefix)) + 2 * way, _likeliest_axis(series, leaves, axes)
            is_whole = 10 * size >= 9 * series.size  # Else it is a part of one that holds two groups.
            found.append((is_whole, ratio, alike, depth_of(prefix, leaves), prefix, axis, leaves))
    return found


Share = tuple[Series, Names, int | Series, list[Leaf]]
"""Some layers of a group, and what holds them: its names, the axis if it is a stack or a list, its leaves."""


def stack_of(series: Series, possible: Stacks, least: int, beside: Iterable[Series] = ()) -> Share | None:
    """Returns a group with the module whose leaves have an axis for the layers, and that no other may be."""
    # A network of the group's own name comes first.
    found = _stacks_for(series, possible, least)
    if not (found := [item for item in found if item[4][:1] == series.template[:1]] or found):
        return None
    best, *others = sorted(found, key=lambda item: item[:6], reverse=True)
    # Of two of one size, that of the group's own words.
    alike = best[2] - MARGIN if best[2] > 0 else -math.inf
    rivals = [item for item in others if item[1] == best[1] and item[2] > alike]
    apart = (x != y for item in rivals for x, y in zip(item[4], best[4], strict=False))
    # Of two lists of one size that may be in it, that of its own words.
    like = (x for x in beside if best[1] == 1 and x is not series and x.sizes == series.sizes)
    shared = (x[2] for y in like for x in _stacks_for(y, possible, least) if x[4:6] == best[4:6])
    is_open = any(alike > best[2] - MARGIN for alike in shared)
    return None if best[5] < 0 or any(apart) or is_open else (series, *best[4:])


def in_any_order(groups: Sequence[Series], others: Sequence[Series], possible: Stacks) -> list[list[Share]]:
    """Returns the orders in which groups may be as many stacks, or lists beside them; no word tells which."""
    held: dict[int, list[Mapping[Names, Share]]] = defaultdict(list)
    for one in filter(are_alike, groups):
        like = (x for x in others if x.sizes == one.sizes and not exclude(one.said, x.said))
        shares: list[Share] = [(one, x.template, x, x.leaves) for x in like]
        shares += [(one, *x[4:]) for x in _stacks_for(one, possible, 2) if x[1] == 1]
        held[one.size].append({share[1]: share for share in shares})
    for several in held.values():
        names = sorted({*itertools.chain(*several)})
        are_stacked = any(isinstance(x[2], int) for each in several for x in each.values())
        if are_stacked and 1 < len(several) == len(names) <= _MOST:
            orders = ([*zip(several, order, strict=True)] for order in itertools.permutations(names))
            return [[each[at] for each, at in x] for x in orders if all(at in each for each, at in x)]
    return []


_MOST = 4
"""Of more stacks, not every order can be chosen."""


def shares_of(series: Series, possible: Stacks, blocks: Callable[[], Iterable[Series]]) -> list[Share]:
    """Returns the stacks that together hold a group, each those of one kind or every second, third, …."""
    kinds = kinds_of(series)
    found = [x for x in (stack_of(kind, possible, 2) for kind in kinds) if x is not None and are_alike(x[0])]
    if len(kinds) > 1 and len(found) == len(kinds) and len({share[1] for share in found}) == len(found):
        return found
    options = [_every_few(series, block) for block in blocks()]
    options = [shares for shares in options if shares]
    return options[0] if len(options) == 1 else []


def _every_few(series: Series, block: Series) -> list[Share]:
    """Returns the layers of a group by the place in a block of layers, where a program scans over blocks."""
    step, numbers = len(block.members), series.numbers
    count, rest = divmod(len(numbers), step)
    firsts = range(step) if not rest and count > 1 and is_complete(block) else ()
    each = ({at: series.members[at] for at in numbers[first::step]} for first in firsts)
    return _one_by_one_in([dataclasses.replace(series, members=members) for members in each], block)


def stacked_lists(series: Series, other: Series) -> list[list[Share]]:
    """Returns how another list may hold the lists in a list's layers stacked: each, or one layer of each.

    `layers_{i}/blocks_{j}` are `scan/layers_{i}` or `scan/layers_{j}`: where both sides count as many, only
    a word of the inner list tells. Where its layers hold a module alone, that is the stack.
    """
    if series.size != other.size:
        return []
    held = {leaf.names[other.depth] for leaf in other.members[other.numbers[0]]}
    ranks = [max(len(leaf.shape) for leaf in x.members[x.numbers[0]]) for x in (series, other)]
    if len(held) < 2 or ranks[0] >= ranks[1]:
        return []
    lists = _lists_in(series) if are_alike(series) and are_alike(other) else []
    if sum(each.size for each in lists) != series.size:
        return []
    turned = [
        Series(
            (*series.template, *lists[0].place(at)[series.depth :]),
            lists[0].base,
            {number: each.members[at] for number, each in zip(series.numbers, lists, strict=True)},
        )
        for at in lists[0].numbers
    ]
    found = [shares for each in (lists, turned) if (shares := _one_by_one_in(each, other))]
    words = ("/".join(names) for names in (lists[0].template[series.depth :], other.template))
    return found[1:] if len(found) > 1 and share_word(*words) else found


def lists_in_lists(series: Series, others: Iterable[Series]) -> Pairs:
    """Returns the list in each layer of a list with the one that has the layer's number in front.

    The lists in `stages/{0..1}` are `stage1_block{i}` and `stage2_block{i}`; `ln1_{i}` names a part of each.
    """
    inner, said = _lists_in(series), series.said
    inside = "/".join(inner[0].template[series.depth :]) if inner else ""
    fitting = [
        each
        for (front, _), each in by_front(others).items()
        if len(each) == len(inner) > 1
        and not (share_word(inside, front) or exclude(said, each[0].said))
        and [x.sizes for x in each] == [x.sizes for x in inner]
    ]
    return list(zip(inner, fitting[0], strict=True)) if len(fitting) == 1 else []


def _lists_in(series: Series) -> list[Series]:
    """Returns the list in each layer of a list; nothing where one has none or several."""
    each = (series_of(series.members[at], series.depth) for at in series.numbers)
    found = [x for inner in itertools.takewhile(lambda x: len(x) == 1, each) for x in inner]
    return found if len(found) == len(series.numbers) else []


def _one_by_one_in(groups: Sequence[Series], other: Series) -> list[Share]:
    """Returns groups as what the layers of another one hold stacked, each the one in its place."""
    found: list[Share] = []
    for group, place in zip(groups, other.numbers, strict=False) if len(groups) == len(other.numbers) else ():
        leaves = other.members[place]
        axes = [axis for axis in range(3) if _have_axis(leaves, axis, len(group.members))]
        axis = _likeliest_axis(group, leaves, axes) if axes else -1
        if axis < 0 or sizes_of(leaves) != group.size or not are_alike(group):
            return []
        found.append((group, other.place(place), axis, leaves))
    return found


def _have_axis(leaves: Iterable[Leaf], axis: int, count: int) -> bool:
    return all(len(leaf.shape) > axis and leaf.shape[axis] == count for leaf in leaves)


def _likeliest_axis(series: Series, leaves: Sequence[Leaf], axes: Sequence[int]) -> int:
    """Returns the one axis under which a layer has the shapes of the others; -1 where two have."""
    first = sorted(leaf.shape for leaf in series.members[series.numbers[0]])
    fitting = [axis for axis in axes if sorted(without_axis(leaf.shape, axis) for leaf in leaves) == first]
    return (fitting or axes)[0] if len(fitting or axes) == 1 else -1


# Lists that the other side counts through.


def counted_through(ours: Sequence[Series], theirs: Sequence[Series]) -> Iterator[list[Pairs]]:
    """Yields the ways in which the layers of a list are those of a few lists, each of these in its order.

    `Cell_{0..3}` are `forward/{0..1}` and `backward/{0..1}`: in turns, one list after the other, or mixed.
    """
    for side, (groups, others) in enumerate(((ours, theirs), (theirs, ours))):
        for one in groups:
            lists = [x for x in others if have_equal_layers(one, x) and not exclude(one.said, x.said)]
            is_whole = 1 < len(lists) <= _FEW and sum(len(x.members) for x in lists) == len(one.members)
            if is_whole and [x for x in groups if have_equal_layers(one, x)] == [one]:
                yield [_through(one, lists, order, side) for order in _mixed([len(x.members) for x in lists])]


_FEW, _MOST_ORDERS = 3, 24


def _mixed(lengths: Sequence[int]) -> list[tuple[int, ...]]:
    """Returns the orders in which lists may be counted as one, by the list of each number.

    Of very many only those in turns, and one list after the other.
    """
    starts = [*itertools.permutations(range(len(lengths)))]
    turns = [tuple(at for step in range(max(lengths)) for at in x if step < lengths[at]) for x in starts]
    after = [tuple(at for at in x for _ in range(lengths[at])) for x in starts]
    count = math.factorial(sum(lengths)) // math.prod(map(math.factorial, lengths))
    return [*dict.fromkeys([*turns, *after, *(_every_mix(lengths) if count <= _MOST_ORDERS else ())])]


def _every_mix(left: Sequence[int]) -> Iterator[tuple[int, ...]]:
    for first in [at for at, count in enumerate(left) if count]:
        rest = [count - (at == first) for at, count in enumerate(left)]
        yield from ((first, *more) for more in _every_mix(rest))
    if not any(left):
        yield ()


def _through(series: Series, lists: Sequence[Series], order: Sequence[int], side: int) -> Pairs:
    """Returns the layers of a list, which is wanted (0) or stored (1), with those of lists in an order."""
    ones = [alone(series.place(at), series.members[at], 0) for at in series.numbers]
    left = [iter([alone(x.place(at), x.members[at], 1) for at in x.numbers]) for x in lists]
    pairs = [(one, next(left[at])) for one, at in zip(ones, order, strict=True)]
    return [(other, one) for one, other in pairs] if side else pairs


# Modules that both sides keep stacked.


@dataclasses.dataclass(frozen=True)
class StackedModule:
    """A module all of whose arrays have an axis for its layers.

    Attributes:
        names: What leads to it.
        axis: The axis.
        leaves: Its leaves.
    """

    names: Names
    axis: int
    leaves: Sequence[Leaf]

    @property
    def layer(self) -> list[Leaf]:
        """The leaves as they are in one layer."""
        return [with_fields(leaf, shape=without_axis(leaf.shape, self.axis)) for leaf in self.leaves]


def stacked_twice(
    wanted: Iterable[Leaf], stored: Iterable[Leaf]
) -> list[tuple[StackedModule, StackedModule]]:
    """Returns the modules that are stacks of as many layers on both sides, but not of the same shapes."""
    ours, theirs = _stacked(wanted), _stacked(stored)
    scores = dict[tuple[int, int], float]()
    for at, one in enumerate(ours):
        for to, other in enumerate(theirs):
            low, high = sorted((sizes_of(one.leaves), sizes_of(other.leaves)))
            counts = {each.leaves[0].shape[each.axis] for each in (one, other)}
            said, says = (concepts(level.base for level in levels(x.names)) for x in (one, other))
            if len(counts) == 1 and 2 * low > high and not exclude(said, says):
                scores[at, to] = 20 + 4 * low / high + likeness(said, says)
    pairs = [(ours[at], theirs[to]) for at, to in best_pairs(scores)]
    return [(x, y) for x, y in pairs if (x.axis, _shapes(x)) != (y.axis, _shapes(y))]


def _shapes(stacked: StackedModule) -> list[Shape]:
    return sorted(leaf.shape for leaf in stacked.leaves)


def _stacked(leaves: Iterable[Leaf]) -> list[StackedModule]:
    """Returns the outermost modules that may be stacks, by each axis: of vectors, and of matrices."""
    found: dict[Names, list[StackedModule]] = {}
    listed = [*leaves]
    may_be = any(len(leaf.shape) > 2 for leaf in listed)  # In many a model there is none.
    for names, held in sorted(leaves_below(listed if may_be else ()).items(), key=lambda item: len(item[0])):
        ranks, first = {len(leaf.shape) for leaf in held}, held[0].shape
        if min(ranks) != 2 or max(ranks) < 3 or any(names[:depth] in found for depth in range(len(names))):
            continue
        if depth_of(names, held) < 0:
            continue  # Arrays beside each other may be experts'.
        axes = [axis for axis in (0, 1) if first[axis] > 1 and _have_axis(held, axis, first[axis])]
        if axes:
            found[names] = [StackedModule(names, axis, held) for axis in axes]
    return list(itertools.chain(*found.values()))


def in_stacks(found: Findings, one: StackedModule, other: StackedModule) -> Findings | None:
    """Returns what is found of one layer for all layers of two stacks; None where that cannot be said."""
    if any(x.layers is not None or x.copied or x.source.made for x in found.every):
        return None
    wanted, stored = ({leaf.names: leaf for leaf in each.leaves} for each in (one, other))
    count = one.leaves[0].shape[one.axis]

    def lifted(links: Sequence[Link]) -> list[Link]:
        every = itertools.chain(*settle_turns(links))
        return [_in_stack(link, wanted, stored, (one.axis, other.axis), count) for link in every]

    return dataclasses.replace(found.mapped(lifted), groups=[])


def _in_stack(
    link: Link, wanted: Mapping[Names, Leaf], stored: Mapping[Names, Leaf], axes: tuple[int, int], count: int
) -> Link:
    """Returns a link of one layer as that of the stacks: the layers first, and at last where they belong."""
    ours = tuple(wanted[leaf.names] for leaf in link.wanted)
    theirs = tuple(stored[leaf.names] for leaf in link.stored)
    first = [moves(leaf.shape, (axes[1], 0)) for leaf in theirs]
    last = [moves((count, *leaf.shape), (0, axes[0])) for leaf in link.wanted]

    def made(way: Way, steps: Steps) -> Way:
        # One layer tells what the axes are, or that nothing does.
        return dataclasses.replace(way, steps=_as_one(steps), named=len(link.ways[0]) == 1 or None)

    each = [[with_layers(way.steps, count) for way in options] for options in link.ways]
    after, joint = with_layers(link.after, count), link.joint
    if joint is None and not link.is_split:
        plain = moves(theirs[0].shape, (axes[1], axes[0]))
        each = [[(*first[0], *steps, *last[0]) if steps else plain for steps in some] for some in each]
    elif link.is_split:
        after = (*first[0], *after)
        each = [[(*steps, *back) for steps in some] for some, back in zip(each, last, strict=True)]
    else:
        after = (*after, *last[0])
        each = [[(*front, *steps) for steps in some] for some, front in zip(each, first, strict=True)]
    made_ways = tuple(
        tuple(made(way, steps) for way, steps in zip(options, some, strict=True))
        for options, some in zip(link.ways, each, strict=True)
    )
    if joint is not None:
        joint = dataclasses.replace(joint, axis=joint.axis + 1, parts=made_ways)
    return with_fields(link, wanted=ours, stored=theirs, ways=made_ways, joint=joint, after=_as_one(after))


def _as_one(steps: Iterable[Step]) -> Steps:
    """Returns steps with transposes that follow each other as one: no rule is written twice."""
    made = list[Step]()
    for step in steps:
        if made and step.kind == made[-1].kind == "transpose":
            before = made.pop()
            step = transposed(before.before, tuple(before.axes[axis] for axis in step.axes))
        made.append(step)
    return tuple(step for step in made if step.kind != "transpose" or step.axes != tuple(sorted(step.axes)))


def from_zero(link: Link, into: Names, first: int) -> Link:
    """Returns a link of layers that are counted from another number on, as they are called once they are not.

    No stack has a first layer of another number than 0.
    """
    assert link.layers is not None
    size, layers = len(link.layers.stored), dataclasses.replace(link.layers, stored=(*into, "{i}"))
    called = numbered(layers.stored, link.layer - first)
    return dataclasses.replace(
        link,
        stored=tuple(dataclasses.replace(x, names=(*called, *x.names[size:])) for x in link.stored),
        levels=tuple((at + len(called) - size, to) for at, to in link.levels if at >= size),
        layers=layers,
        layer=link.layer - first,
    )
