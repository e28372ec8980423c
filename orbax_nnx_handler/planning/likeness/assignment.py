"""How well a stored part fits a wanted one, and which pairs of two sides together fit best."""

import dataclasses
import functools
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set

from orbax_nnx_handler.planning.core.leaves import Shape, permuted
from orbax_nnx_handler.planning.core.paths import Level
from orbax_nnx_handler.planning.likeness.highest_sums import MOST_PAIRS
from orbax_nnx_handler.planning.likeness.links import Findings, Link
from orbax_nnx_handler.planning.likeness.module_parts import Leaf, ModulePart, part_of
from orbax_nnx_handler.planning.likeness.named_parts import NamedPart
from orbax_nnx_handler.planning.likeness.shapes import Step, Way, is_vector, transposed, ways
from orbax_nnx_handler.planning.likeness.vocabulary import (
    FUSED,
    NUMBERED,
    OF_EITHER,
    PLACING,
    PYTORCHS,
    STRONG,
    UNTOLD,
    Concepts,
    Names,
    concepts,
    counts_of,
    directions,
    exclude,
    likeness,
    meanings,
    same_name,
    same_number,
    same_place,
    words,
)

_INNER = frozenset(("sub", "inner", "mid", "hidden"))  # Of norms within an attention or a network.
_UP = frozenset(("up", "upsample"))  # What a transposed convolution does.
_COMPLETE, _LACKING, _UNLIKE, _NUMBER, _LITERAL, _TRANSPOSED = 2.0, 1.0, 10.0, 2.0, 1.0, 3.0


@dataclasses.dataclass(frozen=True)
class Fit:
    """How well a stored part fits a wanted one; `differs` where both have a level of another number."""

    score: float
    pairs: tuple[tuple[Leaf, Leaf, tuple[Way, ...]], ...]
    is_exact: bool
    differs: bool


def fit_of(one: NamedPart, other: NamedPart) -> Fit | None:
    """Returns how a stored part may become a wanted one; None where shapes do not come out."""
    ours, theirs = one.part.leaves.keys(), other.part.leaves.keys()
    shared, lacking = [kind for kind in ours if kind in theirs], len(ours ^ theirs)
    if not shared and (lone := _lone_bias(one, other)) is not None:
        equal, differs = _compare_numbers(one, other)
        score = 20.0 + _COMPLETE + likeness(one.said, other.said) + _NUMBER * equal
        return Fit(score, (lone,), is_exact=True, differs=differs)
    # A norm with statistics and a bias is none that does nothing but scale.
    if not shared or lacking > 2 or ("main" not in shared and "main" in ours | theirs):
        return None
    pairs, cost = list[tuple[Leaf, Leaf, tuple[Way, ...]]](), 0.0
    for kind in shared:
        left, right = one.part.leaves[kind], other.part.leaves[kind]
        found = _ways(left, right, one, other)
        if not found or not _are_of_a_kind(kind, left, right, one, other):
            return None
        if found[0].turned and {left.names[-1], right.names[-1]} == {"embedding", "kernel"}:
            return None  # Of a layer's kernel nobody makes a table: tied weights are stored as the table.
        # Under another name, or PyTorch's, outputs before inputs may be the convention of all.
        kept = right.names[-1] == left.names[-1] not in PYTORCHS or right.names[-1] == "embedding"
        if not found[0].turned or kept:
            cost += found[0].cost + 0.5 * found[0].turned
        pairs.append((left, right, found))
    # A norm with statistics is one without only where there is none like it.
    score = _COMPLETE - _LACKING * lacking - cost - _UNLIKE * bool({"mean", "var"} & (ours ^ theirs))
    if one.place is not None and other.place is not None:
        is_there = one.place == other.place or "cross" in one.part.own & other.part.own
        score += likeness(one.said - PLACING, other.said - PLACING) + 2 * is_there
    else:
        # Where a norm stands says nothing of a vector that no name calls one.
        said = PLACING if "norm" in one.said ^ other.said and (one.place or other.place) else set[str]()
        score += likeness(one.said - said, other.said - said) + 0.5 * likeness(one.part.own, other.part.own)
    equal, differs = _compare_numbers(one, other)
    is_called_so = one.part.names[-1:] == other.part.names[-1:] and not _count_otherwise(one, other)
    is_up = any("deconv" in x.part.own and _UP & y.part.own for x, y in ((one, other), (other, one)))
    score += _NUMBER * equal + _LITERAL * is_called_so + _TRANSPOSED * is_up
    # A pair that shapes allow is better than none.
    return Fit(score + 20.0, tuple(pairs), not lacking, differs)


def _lone_bias(one: NamedPart, other: NamedPart) -> tuple[Leaf, Leaf, tuple[Way, ...]] | None:
    """Returns a parameter called a bias of something (`gating_bias`, `rel_bias`) with one that is not."""
    if len(one.part.leaves) > 1 or len(other.part.leaves) > 1:
        return None
    (left,), (right,) = one.part.leaves.values(), other.part.leaves.values()
    both = (one.part, left), (other.part, right)
    if any("bias" in part.leaves and leaf.names[-1] in ("bias", "b") for part, leaf in both):
        return None
    are_alike = left.shape == right.shape or (is_vector(left.shape) and is_vector(right.shape))
    found = _ways(left, right, one, other) if are_alike or (_is_table(one) and _is_table(other)) else ()
    return (left, right, found) if found else None


def may_be(fit: Fit, one: NamedPart, other: NamedPart) -> bool:
    """Tells whether no name and no number speaks against a pair that fits."""
    left, right = one.said, other.said
    if one.place is not None and other.place is not None:
        if not same_place(one.place, other.place):
            return False
        left, right = left - PLACING, right - PLACING
    if all("bias" in role.part.leaves and not role.part.is_norm for role in (one, other)):
        left, right = left - {"embed"}, right - {"embed"}  # DETR's `class_embed` is no table.
    # Of a text in diffusers' SD3 and Flux, of an image in Wan.
    left, right = (said - ({"text"} if "added" in said else set[str]()) for said in (left, right))
    both = _order(one), _order(other)
    if both[0] != both[1] and (sorted(both[0]) == sorted(both[1]) or "up" in (*both[0], *both[1])):
        return False  # In one array in another order, or, of a gate and what it gates, perhaps so.
    whole, plain = (one, other) if one.fused else (other, one)  # What says something else is no fused one.
    own = plain.part.own - (whole.part.own - STRONG) - {"conv"}  # Shapes tell that.
    if exclude(left, right) or (whole.fused and not plain.fused and own):
        return False
    # The norm of keys is none of a block, nor one of what an attention puts out.
    both = (one, other), (other, one)
    placed = [(x, y) for x, y in both if x.place and x.part.own & PLACING | x.part.said & {"out"}]
    is_of_keys = any(y.part.is_norm and (y.part.own - x.said) & {*"qkv"} for x, y in placed)
    back = {(to, at) for at, to in directions(one.part.names) if at != to}
    return not (fit.differs or is_of_keys) and back.isdisjoint(directions(other.part.names))


def _order(role: NamedPart) -> tuple[str, ...]:
    """Returns the parts in one array in their order; of a gate and what it gates, that it holds both."""
    return role.fused or role.untold or tuple(sorted({"gate", "up"} & role.part.own)[1:])


def _ways(wanted: Leaf, stored: Leaf, one: NamedPart, other: NamedPart) -> tuple[Way, ...]:
    is_other = None not in (wanted.collection, stored.collection) and wanted.collection != stored.collection
    if wanted.number != stored.number or is_other:
        return ()
    if _is_table(one) and _is_table(other) and stored.names[-1] != "kernel":
        found, names = ways(stored.shape, wanted.shape), {stored.names[-1], wanted.names[-1]}
        # T5X's has a row for each head, and an embedding has one for each distance.
        if "rel_embedding" in names and len(names) > 1:
            return found[-1:] if names & {"embedding", "weight"} else found
        return found[:1]
    return ways_of_heads((stored, stored.shape), (wanted, wanted.shape), one.said | other.said)


def _is_table(role: NamedPart) -> bool:
    """Tells whether a part is a table of rows, which nobody stores the other way around."""
    return bool(role.said & {"embed", "pos", "rel", "token", "type", "cls"}) and "head" not in role.said


def ways_of_heads(one: tuple[Leaf, Shape], other: tuple[Leaf, Shape], said: Concepts) -> tuple[Way, ...]:
    """Returns the ways of one part, less those that the names of arrays of heads rule out.

    A `kernel` has inputs before outputs, `w` of a query's einsum in Gemma has heads, inputs, features.
    Heads go into the layer that leads out of an attention, also where they lie last, as in Praxis.

    Args:
        one: A stored leaf, and the shape of what of it becomes the part.
        other: A wanted leaf, and the shape of what of it is made of the part.
        said: What the names of the part say.
    """
    (stored, wanted), kinds = (one[1], other[1]), (_kind(one[0]), _kind(other[0]))
    found, is_out, is_led = ways(stored, wanted), "o" in said, bool(said & {"q", "k", "v", "o"})
    if is_led and {*kinds} == {"kernel", "einsum"}:
        way = _of_gemma(stored, wanted, is_stored=kinds[0] == "einsum", is_out=is_out)
        return found if way is None else (way,)
    if len(found) < 2 or {len(stored), len(wanted)} != {2, 3}:
        return found
    heads, plain = sorted((stored, wanted), key=len, reverse=True)
    is_either = heads[0] == heads[2] and _kind(one[0] if plain is stored else other[0]) != "kernel"
    are_last = not is_either and (heads[0] == plain[0] or heads[2] != plain[1])
    if are_last and is_out:
        found = tuple(dataclasses.replace(x, turned=not x.turned) for x in found[::-1])
    is_told = is_out or are_last if is_led else plain is wanted and not are_last
    if kinds[plain is wanted] == "kernel" and is_told:
        return (dataclasses.replace(found[0], named=True), *found[1:])
    is_alike = one[0].names[-1] == other[0].names[-1] not in PYTORCHS
    is_open = are_last and not (is_alike or is_led or "gate" in said)
    return tuple(dataclasses.replace(way, named=None) for way in found) if is_open else found


def _of_gemma(stored: Shape, wanted: Shape, *, is_stored: bool, is_out: bool) -> Way | None:
    """Returns the way between an einsum's array and a kernel, inputs first; None where they do not fit."""
    heads, kernel = (stored, wanted) if is_stored else (wanted, stored)
    if len(heads) != 3:
        return None
    apart = heads if is_out else permuted(heads, (1, 0, 2))
    first, middle, last = apart
    if kernel not in (apart, (first * middle, last) if is_out else (first, middle * last)):
        return None
    moved = () if is_out else (transposed(stored if is_stored else apart, (1, 0, 2)),)
    step = Step("reshape", *((apart, kernel) if is_stored else (kernel, apart)))
    joined = (step,) if kernel != apart else ()
    return Way(moved + joined if is_stored else joined + moved, named=True)


def _kind(leaf: Leaf) -> str:
    """Returns what tells the order of an array's axes; nothing where its name does not."""
    above, last = leaf.names[-2:] if len(leaf.names) > 1 else ("", *leaf.names)
    return "einsum" if last == "w" and "einsum" in words(above) else last if last == "kernel" else ""


def _are_of_a_kind(kind: str, wanted: Leaf, stored: Leaf, one: NamedPart, other: NamedPart) -> bool:
    """Tells whether a vector stays one, but for a bias of heads and a norm of them."""
    shared = one.said & other.said & {*"qkvo"} or one.part.own & other.part.own - {"norm"}
    are_norms = one.part.is_norm and other.part.is_norm and bool(shared)
    return are_norms or kind == "bias" or is_vector(wanted.shape) == is_vector(stored.shape)


def _compare_numbers(one: NamedPart, other: NamedPart) -> tuple[int, bool]:
    """Returns how many numbered levels of two parts count the same, and whether one does not.

    Numbers that begin alike are compared as they are; `ln_0, ln_1` and `norm1, norm2` by their rank. A module
    of several counted layers is no layer: that it is `q2` does not tell which of those is the layer `q2`.
    """
    both = (one, other), (other, one)
    is_one = any(_counts_through(x, y) or (x.is_either and x.part.is_norm) for x, y in both)
    is_one |= _count_otherwise(one, other)
    pairs = itertools.product(() if is_one else one.numbers, other.numbers)
    alike = ((x, y) for x, y in pairs if same_name(x[0].base, y[0].base))
    same = [same_number(*x, *y) for x, y in alike if not _is_around(one, x[0], other, y[0])]
    return same.count(True), False in same


def _is_around(one: NamedPart, level: Level, other: NamedPart, its: Level) -> bool:
    """Tells whether of two levels one is a part itself, the other a module of several like the other part."""
    sides = (one, level, other, its), (other, its, one, level)
    named = (each for each in sides if each[1].style != "/" and each[1] is each[0].part.levels[-1])
    lasts = ((y.numbers[-1], y.part.levels[-1]) for _, _, y, at in named if at is not y.part.levels[-1])
    # Numbers alone may count norms too.
    return any(level is last and level.base and len(held) > 1 for (level, held), last in lasts)


def _count_otherwise(one: NamedPart, other: NamedPart) -> bool:
    """Tells whether one side numbers more norms: `norm2` of three, or of `norm1, cross_norm, norm2`."""
    counted = [
        x.numbers[-1] for x in (one, other) if x.numbers and "norm" in meanings(x.part.levels[-1].base)
    ]
    # The first one is the first one.
    are_first = all(level.number == numbers[0] for level, numbers in counted)
    are_counted = all(x.part.levels[-1:] == (x.numbers[-1][0],) for x in (one, other) if x.numbers)
    return are_counted and len({len(numbers) for _, numbers in counted}) > 1 and not are_first


def _counts_through(one: NamedPart, other: NamedPart) -> bool:
    """Tells whether Linen counts through on one side what the other has in lists of lists: `Conv_{0..4}`."""
    sizes, counted = [len(held) for _, held in other.numbers], [held for _, held in one.numbers]
    is_last = len(counted) == 1 < len(sizes) and one.part.levels[-1].number is not None
    is_automatic = is_last and one.part.levels[-1].is_automatic
    return is_automatic and max(sizes) < math.prod(sizes) <= len(counted[0])


# What is compared.


def sizes_of_few(counts: Iterable[Mapping[int, int]]) -> set[int]:
    """Returns the sizes of which parts are compared: those of the fewest pairs, up to so many in all."""
    ours, theirs = counts
    pairs = {size: count * theirs[size] for size, count in ours.items() if size in theirs}
    order = sorted(pairs, key=pairs.__getitem__)
    # One for each part is no choice.
    total = itertools.accumulate(pairs[size] - min(ours[size], theirs[size]) for size in order)
    return {size for size, several in zip(order, total, strict=True) if several <= MOST_PAIRS}


def are_unlike(
    wanted: Sequence[ModulePart], stored: Sequence[ModulePart], above: Iterable[Iterable[str]]
) -> bool:
    """Tells whether no parts of two sides are compared, by sizes, nor as several in one array, by names."""
    few = sizes_of_few(Counter(part.main_size for part in side) for side in (wanted, stored))
    return not few and not _may_be_joined((*wanted, *stored), itertools.chain(*above))


_COUNTED = frozenset(base for base, _ in NUMBERED)


def _may_be_joined(parts: Iterable[ModulePart], above: Iterable[str]) -> bool:
    """Tells whether names below some others allow that one of some parts holds several, or is gated."""
    return "gate" in concepts(above) or any(
        "gate" in x.said or _may_hold_several(x.names[-1], x.levels[-1], "attn" in x.said)
        for x in parts
        if x.names
    )


@functools.lru_cache(maxsize=4096)
def _may_hold_several(name: str, last: Level, is_in_attention: bool) -> bool:
    is_named = name in FUSED or UNTOLD.search(last.base.lower()) is not None or last.base in _COUNTED
    is_counted = is_in_attention and last.number is not None and last.base[:1].isupper()
    return is_named or is_counted or len({*"qkv"}.intersection(meanings(last.base))) > 1


def across_networks(
    possible: Iterable[tuple[int, int]], wanted: Sequence[NamedPart], stored: Sequence[NamedPart]
) -> Iterator[tuple[int, int]]:
    """Yields pairs across networks, where a network of the wanted one's own name has enough to give."""
    groups: dict[tuple[str, int], list[tuple[int, int]]] = defaultdict(list)
    for at, to in possible:
        names = wanted[at].part.names
        if len(names) > 1:
            groups[names[0], wanted[at].part.main_size].append((at, to))
    for (name, _), pairs in groups.items():
        networks = {to: stored[to].part.names[:-1][:1] for _, to in pairs}
        own = {to for to, network in networks.items() if network == (name,)}
        if len(own) >= len({at for at, _ in pairs}):
            yield from (pair for pair in pairs if networks[pair[1]] not in ((), (name,)))


def displaced(
    best: Set[tuple[int, int]],
    group: Collection[tuple[int, int]],
    wanted: Sequence[NamedPart],
    stored: Sequence[NamedPart],
) -> Iterator[frozenset[tuple[int, int]]]:
    """Yields best pairs with those of what is left that nothing but modules around tells from them."""
    taken = {at for at, _ in best}, {to for _, to in best}
    beside: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for pair in group:
        for side in (0, 1):
            if pair[1 - side] not in taken[1 - side]:
                beside[side, pair[side]].append(pair)

    def is_unsaid(pair: tuple[int, int]) -> bool:
        return STRONG.isdisjoint(wanted[pair[0]].said) != STRONG.isdisjoint(stored[pair[1]].said)

    for pair, (side, part, others) in itertools.product(best, ((0, stored, wanted), (1, wanted, stored))):
        for other in beside[side, pair[side]]:
            three = others[pair[side]], part[pair[1 - side]], part[other[1 - side]]
            if (is_unsaid(pair) and is_unsaid(other)) or _is_within(*three):
                yield frozenset((pair, other))


def _is_within(source: NamedPart, one: NamedPart, other: NamedPart) -> bool:
    """Tells whether of two norms the other one may be made of the same norm, by where all three lie.

    BitNet's `attn_sub_norm` lies in an attention, the `attention_norm` of a block before it. Llama's
    `post_attention_layernorm` is none of Gemma 2 that has `pre_feedforward_layernorm`, too.
    """
    parts = source.part, one.part, other.part
    if not all(part.is_norm for part in parts):
        return False
    around, own, free = (len(part.levels) for part in parts)
    is_said = not _INNER.isdisjoint(one.part.own) and _INNER.isdisjoint(source.part.own | other.part.own)
    are_other = source.place != one.place and not {source.place, one.place}.isdisjoint(OF_EITHER)
    return is_said or own > free == around or are_other


def beside_namesakes(
    possible: Collection[tuple[int, int]], wanted: Sequence[NamedPart], stored: Sequence[NamedPart]
) -> Iterator[tuple[int, int]]:
    """Yields pairs of one part that is called and counted as another one, but for how that is spelled.

    `down_1_block_1` is `down/1/block/1`, and not `down/2/block/0`, which has its size.
    """
    ours, theirs = _by_template(wanted), _by_template(stored)
    same: dict[int, int] = {}
    for template, counted in ours.items():
        others = theirs.get(template, {})
        pairs = [(at, others.get(numbers, -1)) for numbers, at in counted.items()]
        if all(pair in possible for pair in pairs) and min(counted) == min(others):
            same |= pairs
    taken = {to: at for at, to in same.items()}
    yield from ((at, to) for at, to in possible if same.get(at, to) != to or taken.get(to, at) != at)


def _by_template(parts: Sequence[NamedPart]) -> Mapping[Names, Mapping[Names, int]]:
    """Returns the parts that two numbers count by their words without numbers, and by these."""
    found: dict[Names, dict[Names, int]] = defaultdict(dict)
    for at, one in enumerate(parts):
        path = "/".join(one.part.names)
        if len(numbers := counts_of(path)) > 1:
            found[tuple("#" if word.isdecimal() else word for word in words(path))][numbers] = at
    return found


# The ways of a U-Net.

_SPELLINGS = {
    "down": ("in input", "enc encoder", "down downs downblock downblocks"),
    "mid": ("mid middle bottleneck midblock",),
    "up": ("out output", "dec decoder", "up ups upblock upblocks"),
}
"""Words of modules on the way down, in the middle, and on the way up: what tells more comes last."""
_EVERY = ((way, *each) for way, several in _SPELLINGS.items() for each in enumerate(several))
_WAYS = {word: (way, rank) for way, rank, spellings in _EVERY for word in spellings.split()}
_Match = Callable[[Sequence[Leaf], Sequence[Leaf]], Findings]


def ways_apart(wanted: Sequence[Leaf], stored: Sequence[Leaf], match: _Match) -> Findings:
    """Matches what both sides have on each way of a U-Net by itself, then what is on none, or left of one.

    What is called a part of the middle is no part of the way down, whatever shapes say.
    """
    ours, theirs = _by_way(wanted), _by_way(stored)
    if not (ours and theirs):
        return match(wanted, stored)
    if all("dec" in concepts(side["up"][0].names) for side in (ours, theirs)):
        for side in (ours, theirs):  # Which level is which of a decoder, its encoder may tell.
            side["down"] += side.pop("up")
    found, own = Findings(), {id(x): way for y in (ours, theirs) for way, held in y.items() for x in held}
    for way, held in ours.items():
        found.add(match(held, theirs[way]))
    used = {leaf.part for link in found.every for leaf in (*link.wanted, *link.stored)}
    rest = match(*([leaf for leaf in side if leaf.part not in used] for side in (wanted, stored)))

    def is_within(link: Link) -> bool:
        return len({own.get(id(leaf)) for leaf in (*link.wanted, *link.stored)} - {None}) < 2

    ties = [tie for tie in rest.ties if all(map(is_within, itertools.chain(*tie.readings)))]
    found.add(dataclasses.replace(rest, links=[*filter(is_within, rest.links)], ties=ties))
    return found


def _by_way(leaves: Sequence[Leaf]) -> dict[str, list[Leaf]]:
    """Returns what is on each way of U-Nets; nothing where no modules beside each other say all three.

    An `encoder` is the way down only where nothing beside it says `down`.
    """
    found = defaultdict[str, list[Leaf]](list)
    if not any(_way(name)[0] == "mid" for name in {name for leaf in leaves for name in leaf.names}):
        return found  # Nearly every model.
    ranks = defaultdict[Names, dict[str, int]](dict)
    parts = {part: _ways_around(part) for part in map(part_of, leaves)}
    # A layer of a network leads up or down, too.
    for above, way, rank in ((x[:at], y, z) for x, held in parts.items() for at, y, z in held if x[at + 1 :]):
        ranks[above][way] = max(rank, ranks[above].get(way, 0))
    nets = {above: held for above, held in ranks.items() if len(held) == len(_SPELLINGS)}
    for leaf in leaves if nets else ():
        part = part_of(leaf)
        held = (way for at, way, rank in parts[part] if nets.get(part[:at], {}).get(way) == rank)
        if way := next(held, None):
            found[way].append(leaf)
    return found


def _ways_around(part: Names) -> list[tuple[int, str, int]]:
    """Returns which segments of a path say a way, and how much that tells: `in_blocks/0`, not `conv_in`."""
    said = ((at, *_way(name)) for at, name in enumerate(part))
    return [x for x in said if x[1] and (x[1] == "mid" or x[2] or counts_of("/".join(part[x[0] :][:2])))]


@functools.lru_cache(maxsize=65536)
def _way(name: str) -> tuple[str, int]:
    return next((_WAYS[word] for word in words(name) if word in _WAYS), ("", 0))
