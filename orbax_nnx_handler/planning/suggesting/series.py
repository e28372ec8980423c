"""Groups of layers: numbered modules of one name, and which of them are the same on both sides."""

import dataclasses
import functools
import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from orbax_nnx_handler.planning.core.folding import PLACE, numbered
from orbax_nnx_handler.planning.core.leaves import Shape, derived, with_fields
from orbax_nnx_handler.planning.core.paths import is_count, levels, natural_key, shared_levels
from orbax_nnx_handler.planning.likeness import Owners, list_name, share_word, sizes_of
from orbax_nnx_handler.planning.likeness.module_parts import Leaf, module_parts, of_sizes
from orbax_nnx_handler.planning.likeness.vocabulary import (
    MARGIN,
    SINGLE,
    Names,
    arm,
    concepts,
    counts_of,
    exclude,
    likeness,
    telling,
    words,
)
from orbax_nnx_handler.planning.suggesting.whole_modules import counted_levels, modules_by_size, pairs_beside


@dataclasses.dataclass(frozen=True, eq=False)
class Series:
    """Numbered modules of one name, each with parts of its own.

    Attributes:
        template: The names of one of them, with a place for its number.
        base: The names without numbers.
        members: Their leaves by number.
        is_kind: Whether they are those of one kind, among others that the program counts with them.
    """

    template: Names
    base: Names
    members: Mapping[int, list[Leaf]]
    is_kind: bool = False

    @derived
    def depth(self) -> int:
        """How many segments lead into a member."""
        return len(self.template)

    @derived
    def numbers(self) -> list[int]:
        """The numbers in order."""
        return sorted(self.members)

    @derived
    def leaves(self) -> list[Leaf]:
        """The leaves of all members."""
        return [leaf for held in self.members.values() for leaf in held]

    @derived
    def held(self) -> Mapping[int, list[int]]:
        """How many elements the leaves of each member hold, the smallest first."""
        return {at: sorted(math.prod(leaf.shape) for leaf in each) for at, each in self.members.items()}

    @derived
    def sizes(self) -> list[int]:
        """How many elements each member holds, by their numbers."""
        return [max(1, sum(self.held[number])) for number in self.numbers]

    @derived
    def looks(self) -> Mapping[int, tuple[tuple[Names, Shape], ...]]:
        """The names and shapes below each member; layers of equal looks are matched once."""
        held = ((at, [(x.names[self.depth :], x.shape) for x in each]) for at, each in self.members.items())
        return {at: tuple(sorted(looks)) for at, looks in held}

    @derived
    def size(self) -> int:
        """How many elements all members hold."""
        return sum(self.sizes)

    @derived
    def said(self) -> frozenset[str]:
        """What the names of the group say."""
        return concepts(self.base)

    @derived
    def said_within(self) -> frozenset[str]:
        """What the names of the group say, and of which kind is what its layers hold."""
        inside = concepts(name for leaf in self.members[self.numbers[0]] for name in leaf.names)
        return self.said | inside & _KINDS

    def place(self, number: int) -> Names:
        """Returns the names that lead into a member."""
        return tuple(name.replace(PLACE, str(number)) for name in self.template)

    @property
    def seat(self) -> int:
        """The segment that holds the number."""
        return max(at for at, name in enumerate(self.template) if PLACE in name)


Pairs = list[tuple[Series, Series]]
_Waiting = list[tuple[Leaf, list[Any]]]
_said = functools.lru_cache(maxsize=65536)(concepts)  # Asked of each module beside every list.


def series_of(leaves: Sequence[Leaf], above: int, least: int = 2) -> list[Series]:
    """Returns the groups of numbered modules of a context, the outermost ones, below some segments.

    A layer must have `least` parts: a single one is rather a part with a number.
    """
    waiting = [(leaf, counted_levels(leaf.names, above)) for leaf in leaves]
    found: list[Series] = []
    while waiting:
        groups: dict[tuple[Names, Names], dict[int, _Waiting]] = defaultdict(lambda: defaultdict(list))
        for leaf, ((key, number), *rest) in (pair for pair in waiting if pair[1]):
            groups[key][number].append((leaf, rest))
        waiting = _Waiting()
        for (template, base), members in groups.items():
            held = {number: [leaf for leaf, _ in pairs] for number, pairs in members.items()}
            if _is_series(template, base, held, least):
                found.append(Series(template, base, held))
            else:
                waiting += [pair for pairs in members.values() for pair in pairs]
    return found


def _is_series(template: Names, base: Names, members: Mapping[int, Sequence[Leaf]], least: int) -> bool:
    above, is_list = len(template), len(members) > 1 or base[-1].lower() in SINGLE
    some = members.values() if least > 1 and is_list else ()
    looks = {tuple((leaf.names[above:], leaf.shape) for leaf in held): held for held in some}
    return is_list and all(len(module_parts(held, above)) >= least for held in looks.values())


def paired_series(ours: Sequence[Series], theirs: Sequence[Series]) -> Pairs:
    """Returns which groups of layers are the same, where no other pairing comes near."""
    scores = dict[tuple[int, int], float]()
    said, says = (telling([each.said for each in side]) for side in (ours, theirs))
    lists = [[each for each in by_front(side).values() if each[1:]] for side in (ours, theirs)]
    places = [{id(x): (at, len(each)) for each in some for at, x in enumerate(each)} for some in lists]
    for (at, one), (to, other) in itertools.product(enumerate(ours), enumerate(theirs)):
        if _may_be_one(one, other):
            ratio = min(one.size, other.size) / max(one.size, other.size)
            is_same = places[0].get(id(one)) == places[1].get(id(other), 0)
            scores[at, to] = 20 + 4 * ratio + likeness(said[at], says[to]) + is_same
    sides = [[(each.template, each.sizes) for each in side] for side in (ours, theirs)]
    return [(ours[at], theirs[to]) for at, to in pairs_beside(scores, *sides)]


def equal_series(ours: Sequence[Series], theirs: Sequence[Series]) -> Iterator[list[Pairs]]:
    """Yields the ways in which a few lists of equal layers, which nothing tells apart, are each other's."""
    groups = defaultdict[tuple[int, ...], tuple[list[Series], list[Series]]](lambda: ([], []))
    for each, side in [*((x, 0) for x in ours), *((x, 1) for x in theirs)]:
        groups[tuple(each.sizes)][side].append(each)
    for left, right in groups.values():
        if 1 < len(left) == len(right) <= _FEW and all(
            itertools.starmap(_may_be_one, itertools.product(left, right))
        ):
            yield [list(zip(left, order, strict=True)) for order in itertools.permutations(right)]


def by_front(groups: Iterable[Series]) -> Mapping[tuple[str, str], list[Series]]:
    """Returns the groups that differ in what is counted before their layers alone, in that order."""
    found: dict[tuple[str, str], list[Series]] = defaultdict(list)
    for each in sorted(groups, key=lambda each: natural_key(each.template)):
        front, _, rest = "/".join(each.template).partition(PLACE)
        found[front.translate(_UNCOUNTED), rest].append(each)
    return found


def parts_of(series: Series) -> list[Series]:
    """Returns the modules that all layers of a group hold as groups, where these hold nothing else alone."""
    held: dict[str, dict[int, list[Leaf]]] = defaultdict(lambda: defaultdict(list))
    for number, leaves in series.members.items():
        for leaf in leaves:
            held["/".join(leaf.names[series.depth : -1][:1])][number].append(leaf)
    shared = {name: members for name, members in held.items() if len(members) == len(series.members)}
    if len(shared) < 2 or "" in held:
        return []
    return [Series((*series.template, x), (*series.base, x), members) for x, members in shared.items()]


def lists_within(series: Series, others: Sequence[Series]) -> tuple[list[Pairs], bool]:
    """Returns the ways in which lists of the other side may be the parts of a list's blocks, as pairs.

    `layers_{i}` and `gated_{i}` are `blocks/{i}/self` and `blocks/{i}/gated`. One alone where names tell it;
    whether names do, and not sizes, is returned too.
    """
    others = [other for other in others if other.numbers == series.numbers]
    parts = parts_of(series) if others and all(x.sizes != series.sizes for x in others) else []
    held, holds = ([each.said_within for each in side] for side in (parts, others))
    like = [
        [at for at, y in enumerate(others) if y.sizes == x.sizes and not exclude(said, holds[at])]
        for x, said in zip(parts, held, strict=True)
    ]
    both = zip(parts, like, strict=True)
    like = [_called_so(one, others, options, parts) or options for one, options in both]
    if not parts or not 0 < math.prod(map(len, like)) <= _MOST_WAYS:
        return [], False
    said, says = telling(held), telling(holds)
    scores: dict[tuple[int, ...], float] = {}
    for choice in itertools.product(*like):
        pairs = [(part, others[at]) for part, at in zip(parts, choice, strict=True)]
        if len({*choice}) == len(parts) and _may_be_within(pairs):
            scores[choice] = sum(likeness(one, says[at]) for one, at in zip(said, choice, strict=True))
    best = sorted(scores, key=lambda choice: -scores[choice])
    is_told = len(best) > 1 and scores[best[0]] - scores[best[1]] >= MARGIN
    made = ([others[at] for at in choice] for choice in best[: 1 if is_told else None])
    return [list(zip(parts, choice, strict=True)) for choice in made], sum(map(len, like)) > len(parts)


_FEW, _MOST_WAYS, _UNCOUNTED = 4, 24, str.maketrans("", "", "0123456789")
_KINDS = frozenset(("self", "cross", "attn", "mlp", "conv"))


def _called_so(
    part: Series, others: Sequence[Series], places: Sequence[int], parts: Sequence[Series]
) -> list[int]:
    """Returns the lists that have a part's own name, with its number: `low1_{i}` of `levels/{i}/low1`.

    Nothing where the parts are numbered as their blocks: `conv1_2` may lie in either `block1` or `block2`.
    """
    base = part.template[-1].translate(_UNCOUNTED)
    beside = {counts_of(x.template[-1]) for x in parts if x.template[-1].translate(_UNCOUNTED) == base}
    if sorted(beside) == [(str(number),) for number in part.numbers]:
        return []
    fronts = [("/".join(others[at].template).partition(PLACE), at) for at in places]
    return [
        at
        for (front, _, rest), at in fronts
        if not rest and words(front.rstrip("_/").rsplit("/", 1)[-1]) == words(part.template[-1])
    ]


def _may_be_within(pairs: Pairs) -> bool:
    """Tells whether lists may be the parts of a list's blocks; those alike but for numbers are so in order.

    `ln1_{i}` and `ln2_{i}` are `layers/{i}/ln1` and `layers/{i}/ln2`. But `stage1_block{i}` and
    `stage2_block{i}` are no `stages/{i}/0` and `stages/{i}/1`: what both count first lies outside.
    """
    groups: dict[tuple[str, ...], list[tuple[list[int], ...]]] = defaultdict(list)
    for part, other in pairs:
        names = part.template[-1], *"/".join(other.template).partition(PLACE)[::2]
        key = (*(name.translate(_UNCOUNTED) for name in names[:2]), names[2], str(part.sizes))
        groups[key].append(tuple([*map(int, counts_of(name))] for name in names[:2]))
    return all(
        len(it) < 2 or (share_word(*key[:2]) and [x for _, x in sorted(it)] == sorted(x for _, x in it))
        for key, it in groups.items()
    )


_Layers = tuple[Series, Owners]
"""Layers whose leaves have other names than their own, and by these which they are."""


def side_by_side(series: Series, others: Sequence[Series], above: int) -> _Layers | None:
    """Returns lists that hold together what the blocks of one list do as one, by the names of the lists.

    `attentions/{i}`, `norm1/{i}`, `fc1_{i}` are `layers/{i}/attn`, `layers/{i}/norm1`, `layers/{i}/fc1`.
    """
    possible = [other for other in others if not exclude(series.said, other.said)]  # `enc_attn_{i}`.
    counts = [series.numbers, [1 - 2 * series.numbers[0] + at for at in series.numbers]]  # From 0, from 1.
    lists = next(filter(None, ([x for y in possible for x in _lists_of(y, n)] for n in counts)), [series])
    if sum(x.size for x in lists) != series.size or any(x.sizes == series.sizes for x in lists):
        return None
    sizes = [*map(sum, zip(*(x.sizes for x in lists), strict=True))]
    fronts = [list_name(x.template[above:]) for x in lists]
    if sizes != series.sizes or not all(fronts) or _may_count_blocks(series, lists, fronts):
        return None
    shared = len(shared_levels(fronts, own=1))
    members, own = defaultdict[int, list[Leaf]](list), Owners()
    for one, front in zip(lists, fronts, strict=True):
        for at, leaf in ((at, leaf) for at, leaves in one.members.items() for leaf in leaves):
            names = (*leaf.names[:above], str(at), *front[shared:], *leaf.names[one.depth :])
            members[at].append(made := with_fields(leaf, names=names))
            own[made.part] = leaf, {above: one.seat}, len(leaf.names) - len(names)
    template = (*lists[0].template[:above], PLACE)
    return Series(template, (*lists[0].base[:above], ""), members), own


def _lists_of(series: Series, numbers: list[int]) -> list[Series]:
    """Returns a list that counts so, or those in its members, where these do: `norm1/{i}`, `norm2/{i}`."""
    inner = (series_of(held, series.depth, 1) for held in series.members.values())
    alike = itertools.takewhile(
        lambda some: [(x.numbers, x.depth) for x in some] == [(numbers, series.depth + 1)], inner
    )
    every = [x for some in (() if series.numbers == numbers else alike) for x in some]
    return [series] if series.numbers == numbers else every if len(every) == len(series.members) else []


def _may_count_blocks(series: Series, lists: Sequence[Series], fronts: Sequence[Names]) -> bool:
    """Tells whether the number that tells lists apart may be the block's: `conv1_{i}` and `conv2_{i}`.

    Not where one beside them counts the blocks alone, and otherwise: `attn_{0..2}` and `ln{1..3}_{0..2}`.
    """
    parts = {x for held in series.members.values() for leaf in held for x in leaf.names[series.depth : -1]}
    counted: dict[str, list[tuple[tuple[str, ...], bool]]] = defaultdict(list)
    for one, front in zip(lists, map("/".join, fronts), strict=True):
        counted[front.translate(_UNCOUNTED)].append((counts_of(front), one.template[-1] == PLACE))
    is_beside = any(numbers == () for held in counted.values() for numbers, _ in held)
    before = {x.translate(_UNCOUNTED): re.split(r"\d", x)[0] for x in map("/".join, fronts)}
    for base, held in counted.items():
        own = [word for word in words(before[base]) if share_word(word, word)][-1:]  # `ln` of `enc_ln1`.
        if len({*held}) < len(held) or share_word("".join(own), "/".join(series.base)):
            return len(held) > 1
        if len(held) > 1 and not all(is_list for _, is_list in held):
            numbers, called = {each for each, _ in held}, {counts_of(x) for x in parts if share_word(x, base)}
            is_told = called >= numbers or len(held) != len(series.numbers) or is_beside
            if not is_told or numbers == {(str(at),) for at in series.numbers}:
                return True
    return False


def in_sequence(groups: Sequence[Series], free: Sequence[Leaf], above: int, arms: int) -> list[list[Pairs]]:
    """Returns the modules of the other side that one after the other are the layers of a group, as pairs.

    `Block_{0..3}` are `stages/{0..1}/{0..1}`, `stage_{0..1}_block_{0..1}`, or what lies in so many arms of a
    U-Net: as many modules with numbers, each as large as the one in its place. Else, or of two groups, none.
    Two readings where levels on the way up may count from either end.
    """
    complete = [series for series in groups if is_complete(series)]
    held = functools.cache(functools.partial(of_sizes, modules_by_size(free if complete else (), above)))
    found = [_in_sequence(series, held(frozenset(series.sizes)), arms) for series in complete]
    claims = Counter(other.template for each in found for pairs in each[:1] for _, other in pairs)
    return [each for each in found if each and all(claims[other.template] == 1 for _, other in each[0])]


def _in_sequence(series: Series, found: Mapping[Names, list[Leaf]], arms: int) -> list[Pairs]:
    said, says = series.said, {at: _said(at) for at in found if len(found) >= len(series.sizes)}
    found = {at: found[at] for at in says if not exclude(said, says[at])}
    # A list in `mid` is none that begins on the way down.
    if len(found) != len(series.sizes) or len({said & says[names] for names in found}) > 1:
        return []
    shared = len(shared_levels(list(found), own=1))  # `mid` of a decoder is the middle, and no way up.
    shared *= any(arm(names[shared:]) for names in found)
    bases = {at: tuple(level.base.translate(_UNCOUNTED) for level in levels(at[shared:])) for at in found}
    places = {at: (arm(base), _counts("/".join(at[shared:]), arm(base))) for at, base in bases.items()}
    is_told = len({*map(arm, bases.values())}) >= max(len({*bases.values()}), arms)
    # CompVis counts the levels on the way up from the last one.
    back = {at: (way, -max(way, 0) * sum(n[:1]), n) for at, (way, n) in places.items()}
    orders = dict.fromkeys(tuple(sorted(found, key=each.__getitem__)) for each in (places, back))
    fitting = [each for each in orders if [sizes_of(found[names]) for names in each] == series.sizes]
    if not (is_told and fitting and len({*places.values()}) == len(places)):
        return []
    spelled = {words("/".join(each)): at for at, each in zip(series.numbers, fitting[0], strict=True)}
    if any(spelled.get(words("/".join(series.place(at))), at) != at for at in series.numbers):
        return []  # `down_2_block_0` is `down/2/block/0`, and no other one.
    counted = [x for names in fitting[0] for x in numbered((*names, ""), 0)[-1:]]
    if len({key for key, _ in counted}) == 1 and [number for _, number in counted] == series.numbers:
        members = {number: found[names] for (_, number), names in zip(counted, fitting[0], strict=True)}
        return [[(series, Series(*counted[0][0], members))]]  # A list, in another one.
    ours = [alone(series.place(number), series.members[number], 0) for number in series.numbers]
    theirs = {names: alone(names, held, 1) for names, held in found.items()}
    is_open = any("up" in concepts(names) and len(n) > 1 for names, (_, n) in places.items())
    return [list(zip(ours, map(theirs.__getitem__, x), strict=True)) for x in fitting[: 1 + is_open]]


def _counts(path: str, way: int) -> tuple[int, ...]:
    """Returns what a path counts; images, `16x16`, are smaller down a U-Net's way and larger up again."""
    counted = (re.fullmatch(r"(\d+)(x\1)?", word) for word in words(path))
    return tuple(int(match[1]) * (way if match[2] else 1) for match in counted if match)


def have_equal_layers(one: Series, other: Series) -> bool:
    """Tells whether each layer of two groups is as large as every other one."""
    return one.sizes[0] == other.sizes[0] and are_alike(one) and are_alike(other)


def alone(names: Names, leaves: list[Leaf], number: int) -> Series:
    """Returns a module as the only one of its group."""
    return Series(names, tuple(level.base for level in levels(names)), {number: leaves}, is_kind=True)


def _may_be_one(one: Series, other: Series) -> bool:
    """Tells whether two groups may be the same layers: nearly as large each, and named no opposites."""
    held = [(one.held[left], other.held[right]) for left, right in same_layers(one, other)]
    if not held or exclude(one.said, other.said) or arm(one.base) * arm(other.base) < 0:
        return False
    if one.is_kind or other.is_kind:
        # Nothing but what they hold speaks for layers of one kind.
        return all(left == right for left, right in held)
    sizes = [(sum(left), sum(right)) for left, right in held]
    ratios = [left / max(right, 1) for left, right in sizes]
    if len(one.members) != len(other.members) and max(ratios) > 1.5 * min(ratios):
        return False  # Of lists of other lengths, layers that grow otherwise are others.
    low, high = sorted(max(each) / max(min(each), 1) for each in zip(*sizes, strict=True))
    left, right = one.size * len(other.members), other.size * len(one.members)
    # The blocks of one stage are no stages, of which one is much wider.
    return min(left, right) * 2 > max(left, right) and (low > 1.5 or high < 2.5)


def same_layers(one: Series, other: Series) -> list[tuple[int, int]]:
    """Returns which layer is which: those of one number, or one by one where both count all from 0 or 1.

    Where sizes are those of the other side from the last one on, this counts them so: on the way up of a
    U-Net. Where only one run of a list is as large as the shorter one, this is that list.
    """
    spans = [series.numbers[-1] - series.numbers[0] + 1 - len(series.numbers) for series in (one, other)]
    # The levels of a pyramid count from 2 or 3.
    are_levels, are_whole = len({*one.sizes}) == len(one.sizes), is_complete(one) and is_complete(other)
    if (are_whole or (are_levels and not any(spans))) and is_reversed(one, other):
        return list(zip(one.numbers, reversed(other.numbers), strict=True))
    in_order = list(zip(one.numbers, other.numbers, strict=False))
    low, high = sorted(map(len, (one.members, other.members)))
    # One side may lack a leaf of each layer.
    are_equal = one.sizes == other.sizes or (low == high and are_alike(one) and are_alike(other))
    if low == high and bool(spans[0]) != bool(spans[1]):
        # What holds nothing leaves a gap in one list, which the other one does not count.
        return in_order if are_equal else []
    both = sorted(one.members.keys() & other.members.keys())
    are_counted = are_whole and low == high  # From 0 and from 1, also where a layer lacks a part.
    alike = one.numbers[0] == other.numbers[0] or (one.base[-1] == other.base[-1] and not are_counted)
    # Layers of one kind in a list are another list's, one by one.
    in_turn = one.is_kind != other.is_kind or (are_equal and (are_whole or are_levels))
    has_fewer = 1 < low == len(both) and all(one.held[at] == other.held[at] for at in both)
    if alike and not in_turn and (has_fewer or len(both) * 2 > high):
        return _run_within(one, other) or [(number, number) for number in both]
    return in_order if are_counted or (one.sizes == other.sizes and not any(spans)) else []


def _run_within(one: Series, other: Series) -> list[tuple[int, int]]:
    """Returns the layers of the shorter list with the only run of the longer one that is as large."""
    short, long = sorted((one, other), key=lambda series: len(series.sizes))
    count = len(short.sizes)
    starts = [at for at in range(len(long.sizes) - count + 1) if long.sizes[at : at + count] == short.sizes]
    if count in (1, len(long.sizes)) or len(starts) != 1:
        return []
    run = long.numbers[starts[0] : starts[0] + count]
    return list(zip(*((short.numbers, run) if short is one else (run, short.numbers)), strict=True))


def is_reversed(one: Series, other: Series) -> bool:
    """Tells whether sizes are those of the other side in reverse, and one of them is there once."""
    # The layer that alone holds a table beside is no level of another width.
    are_even = len({len(held) for held in one.members.values()}) == 1
    are_levels = (are_even or 2 * max(one.sizes) > 3 * min(one.sizes)) and 1 in Counter(one.sizes).values()
    return one.sizes != other.sizes == one.sizes[::-1] and are_levels


def is_complete(series: Series) -> bool:
    """Tells whether a group counts its layers without a gap, or in every stage: `block10` to `block32`."""
    return series.is_kind or is_count(tuple(series.numbers))


def are_alike(series: Series) -> bool:
    """Tells whether all layers of a group look alike."""
    return len({*series.looks.values()}) == 1
