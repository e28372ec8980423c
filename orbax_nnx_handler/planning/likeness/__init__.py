"""How like each other the parts of two models are: by names, shapes and order.

Here what a whole path says of a part: its purpose, its list, a norm's layer. Last, what else is known.
"""

import dataclasses
import functools
import itertools
import math
import operator
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set

from orbax_nnx_handler.planning.core.folding import PLACE, around, same_numbers
from orbax_nnx_handler.planning.core.leaves import with_fields
from orbax_nnx_handler.planning.core.paths import Path, is_index, levels
from orbax_nnx_handler.planning.likeness.links import Findings, Link, Tie
from orbax_nnx_handler.planning.likeness.module_parts import Leaf, ModulePart, part_of
from orbax_nnx_handler.planning.likeness.shapes import Step, Steps
from orbax_nnx_handler.planning.likeness.vocabulary import (
    SINGLE,
    Names,
    arm,
    concepts,
    counts_of,
    meanings,
    order_word,
    place_of,
    telling,
    words,
)

_SPELLINGS = (
    "lm|mlm|vocab|ctc|cls_predictions|predictions_transform|generator_predictions",
    "nsp|seq_relationship|next_sentence",
    "classifier|cls_head|probe",
    "projector|(?<!out_)(?<!output_)projection",
    *("pooler", "neck", "pre_logits", "critic|value", "reward", "policy|actor", "qa|span"),
    *("bbox|box|boxes|det", "mask_head", "adapter", "lora", "prompt"),
)
_PURPOSES = tuple(re.compile(rf"(?:^|_)(?:{spellings})(?:_|$)") for spellings in _SPELLINGS)
"""What heads and the like are for, by the words of each: to tell tokens, a class, a value, ...."""
_OF_HEADS = frozenset((0, 2))  # The first and the third one.
_FIRST_WORDS = frozenset(re.findall(r"(?:^|[|)])([a-z]+)", "|".join(_SPELLINGS)))


@functools.lru_cache(maxsize=1 << 16)
def purposes(names: Names) -> frozenset[int]:
    """Returns what a part is for, by its path; nothing for most."""
    if not any(map(_begins_purpose, names)):
        return frozenset()  # Nearly every part.
    path = "_".join(words("_".join(names)))
    return frozenset(at for at, purpose in enumerate(_PURPOSES) if purpose.search(path))


@functools.lru_cache(maxsize=1 << 16)
def _begins_purpose(name: str) -> bool:
    return not _FIRST_WORDS.isdisjoint(words(name))


def have_other_purposes(one: Names, other: Names) -> bool:
    """Tells whether two parts are each for something, and for nothing in common: `lm_head`, `value_head`.

    Of parts that share no other word, one that nothing but `head` tells is of words or classes.
    """
    left, right = purposes(one), purposes(other)
    if bool(left) == bool(right):
        return bool(left) and left.isdisjoint(right)
    plain, said = ({*words("_".join(x))} for x in ((other, one) if left else (one, other)))
    is_head = plain - (said - {"head"}) == {"head"} and concepts(one) & concepts(other) <= {"head"}
    return is_head and (left | right).isdisjoint(_OF_HEADS)


@functools.lru_cache(maxsize=1 << 18)  # Asked several times of each leaf.
def lists_around(names: Names) -> Sequence[tuple[Names, int, Names]]:
    """Returns the lists that a part is in, the outermost one first, each with its number and path there."""
    every = levels(names)
    ends = itertools.accumulate(level.width for level in every)
    return [
        ((*names[: at - level.width], level.base), level.number, names[at:])
        for at, level in zip(ends, every, strict=True)
        if level.number is not None
    ]


def in_list(names: Names) -> tuple[Names, Names]:
    """Returns the outermost list that a part is in, and its path in a layer; nothing where it is in none."""
    every = lists_around(names)
    return (every[0][0], every[0][2]) if every else ((), ())


def with_sources(several: Iterable[tuple[Link, Sequence[Leaf | None]]]) -> list[Link]:
    """Returns links with other stored leaves, each of the shape of its own; none where one lacks them."""
    found = list[Link]()
    for link, leaves in several:
        stored = tuple(leaf for leaf in leaves if leaf is not None)
        if [leaf.shape for leaf in stored] != [leaf.shape for leaf in link.stored]:
            return []
        seats = same_numbers(link.target.names, stored[0].names, (0, 0))
        found.append(link if stored == link.stored else with_fields(link, stored=stored, levels=seats))
    return found


def choice_of(found: Sequence[Link], *readings: Sequence[Link]) -> Tie:
    """Returns the choice between some readings of what was found, each leaf made of one."""
    ends = zip(*((part_of(link.target), part_of(link.source)) for link in found), strict=True)
    wanted, stored = (tuple(dict.fromkeys(side)) for side in ends)
    return Tie(wanted=wanted, stored=stored, readings=tuple(map(tuple, readings)))


def elsewhere(
    parts: Mapping[tuple[int, int], tuple[ModulePart, ModulePart]], modules: Iterable[tuple[Names, Names]]
) -> Iterator[tuple[int, int]]:
    """Yields pairs of parts of modules that are not each other's: `ffw2_norm` of `mlp2` and another.

    Args:
        parts: The wanted and the stored part of each pair.
        modules: The wanted modules with the stored ones that they are.
    """
    known: dict[tuple[Names, Names], list[tuple[Names, Names]]] = defaultdict(list)
    for one, other in modules:
        known[one[:-1], other[:-1]].append((one, other))
    for pair, both in parts.items():
        beside = known.get((both[0].module, both[1].module), ())
        for side in (0, 1) if beside else ():
            own = {*words("".join(both[1 - side].names[-1:]))}
            counted = {each for each in beside if _share_number(both[side].names, each[side])}
            called = {each for each in beside if {*words(each[1 - side][-1])} <= own}
            if counted and called and not counted & called:
                yield pair
                break


def _share_number(part: Names, module: Names) -> bool:
    """Tells whether a part has the number of a module and says what that is: `pre_ffw2_norm` and `mlp2`."""
    names = "".join(part[-1:]), module[-1]
    return counts_of(names[0]) == counts_of(names[1]) != () and {*meanings(names[1])} <= {*meanings(names[0])}


def misnumbered(links: Sequence[Link], left: Iterable[Names], missing: Iterable[Names]) -> Iterator[Link]:
    """Yields links of parts and layers that numbers speak against; `left` and `missing` are no one's."""
    yield from (*_renumbered(links), *_crossed(links, left, missing), *_against_flow(links))


def _renumbered(links: Iterable[Link]) -> list[Link]:
    """Returns links that nothing but order tells, of parts with another number under one word.

    `conv2_0` in `blocks/1/conv1`: where both sides count alike, no layer is what a part is numbered.
    """
    some = [link for link in links if link.grounds in ("order", "shapes")]
    both = [(link, _numbers(link.target.names), _numbers(link.source.names)) for link in some]
    held: dict[str, tuple[set[str], set[str]]] = defaultdict(lambda: (set(), set()))
    for _, ours, theirs in both:
        for word in ours.keys() & theirs.keys():
            held[word][0].add(ours[word])
            held[word][1].add(theirs[word])
    alike = {word for word, (ours, theirs) in held.items() if ours == theirs}
    return [
        link
        for link, ours, theirs in both
        if any(ours[word] != theirs[word] for word in alike & ours.keys() & theirs.keys())
    ]


def _against_flow(links: Iterable[Link]) -> Iterator[Link]:
    """Yields links of equal layers as Linen counts them, where shapes tell that it counts from the last one.

    Of `Dense(n)(relu(Dense(m)(x)))` the layer that is called last is `Dense_0`.
    """
    held = defaultdict[object, dict[tuple[int, int], list[Link]]](lambda: defaultdict(list))
    for link, level in ((x, y) for x in links for y in levels(part_of(x.source))[-1:] if y.is_automatic):
        own, number = _series(part_of(link.target))
        if number is not None and level.number is not None and not arm(own):  # The way up may be so counted.
            held[own, part_of(link.source)[: -level.width], level.base][level.number, number].append(link)
    groups = [{at: [x.source.shape for x in some[at]] for at in sorted(some)} for some in held.values()]
    pairs = (pair for shapes in groups for pair in itertools.pairwise(shapes.items()))
    if any(one[1] > other[1] and x != y for (one, x), (other, y) in pairs):
        for some, shapes in zip(held.values(), groups, strict=True):
            alike = (at for at, x in shapes.items() if [*shapes.values()].count(x) > 1)
            yield from (link for at in alike for link in some[at])


@functools.lru_cache(maxsize=1 << 18)
def _numbers(names: Names) -> Mapping[str, str]:
    """Returns the number behind each word of a path that has one number."""
    said = [pair for name in names for pair in itertools.pairwise(words(name))]
    found = [(word, number) for word, number in said if number.isdecimal() and not word.isdecimal()]
    counts = Counter(word for word, _ in found)
    return {word: number for word, number in found if counts[word] == 1}


def share_word(one: str, other: str) -> bool:
    """Tells whether two names share a word that says more than that layers are counted."""
    return called_alike(one, other) in (_OWN, _KIND)


@functools.lru_cache(maxsize=1 << 16)
def called_alike(one: str, other: str) -> float:
    """Returns how much tells that two names count one thing, of which `blk` is short for `block`."""
    said = [
        {*(word.removesuffix("s") for word in each), "".join(each), *meanings(name)} - {""}
        for name in (one, other)  # `rdb` is short for all of `ResidualDenseBlock`.
        for each in [[word for word in words(name) if word.isalpha()]]
    ]
    if (shared := said[0] & said[1]) or not any(map(_LINEAR.isdisjoint, said)):
        told = shared - _OF_LAYERS
        return _OWN if told - _KINDS else _KIND if told else _LAYERS
    pairs = (sorted(z, key=len) for z in itertools.product(*(x - _KINDS | x & _OF_LAYERS for x in said)))
    short = [(one, long) for one, long in pairs if re.match(".*".join(one), long)]
    told = [_LETTER if len(one) == 1 else _LAYERS if x in _OF_LAYERS else _SHORT for one, x in short]
    return max(told, default=0)  # A first letter may be that of any other word, too.


_OWN, _SHORT, _KIND, _LAYERS, _LETTER = 1, 0.99, 0.6, 0.375, 0.25
_LINEAR = frozenset(("linear", "lin", "fc", "dense"))
_OF_LAYERS = {*SINGLE, *(word.removesuffix("s") for word in SINGLE), *PLACE}


def _crossed(links: Sequence[Link], left: Iterable[Names], missing: Iterable[Names]) -> Iterator[Link]:
    """Yields links of parts of one shape and name that are in another order than what is made of them.

    Where `fc3` is `fc_in`, which comes first, or `fc1`, the others are hardly those of the same names.

    Args:
        links: What is found.
        left: The stored parts that nothing is made of.
        missing: The wanted parts that are made of nothing.
    """
    held: dict[object, list[tuple[int, float | None, Link]]] = defaultdict(list)
    parts = [(part_of(link.target), part_of(link.source)) for link in links]
    series = [(_series(one), _series(other)) for one, other in parts]
    gone = {other for (own, _), (other, to) in series if to is not None and own[-1:] != other[-1:]}
    lone = {_series(part)[0] for part in missing}, {_series(part)[0] for part in left} & gone
    for link, (part, _), ((own, at), (other, to)) in zip(links, parts, series, strict=True):
        if to is not None and own in lone[0] and other in lone[1] and own[-1:] == other[-1:]:
            yield link  # Another one has gone elsewhere, and either side has one more of the name.
        elif to is not None:
            end = order_word(concepts(part[-2:])) if at is None else 0
            seat = end * math.inf if end else at
            held[other, link.target.names[-1], link.target.shape].append((to, seat, link))
    yield from (link for some in held.values() if _is_crossed(some) for _, _, link in some)


@functools.lru_cache(maxsize=1 << 16)
def _series(part: Names) -> tuple[Names, int | None]:
    """Returns the module around a part with its name, and its number; none of what Linen counts itself."""
    for last in levels(part)[-1:]:
        if last.number is not None and not last.is_automatic:
            return (*part[: -last.width], last.base), last.number
    return (), None


def _is_crossed(numbers: Sequence[tuple[int, float | None, Link]]) -> bool:
    ordered = sorted(numbers, key=operator.itemgetter(0))
    placed = [(to, at, link) for to, at, link in ordered if at is not None]
    inside = {to: at for to, at, _ in placed if math.isfinite(at)}
    parts = [(part_of(link.target), part_of(link.source)) for _, at, link in placed if math.isfinite(at)]
    if len({one[:-1] for one, _ in parts}) != 1 or len({to for to, *_ in numbers}) < len(numbers):
        return False  # Several modules take them.
    if len(placed) < len(numbers) and ordered[0][1] is not None:
        # Of one name on both sides, another part may as well be the first one as the last.
        strangers = [link for _, at, link in numbers if at is None]
        return all(_series(one)[0][-1:] == _series(other)[0][-1:] for one, other in parts) and not any(
            concepts(part_of(x.target)[-1:]) & concepts(part_of(x.source)[-1:]) for x in strangers
        )
    order = [at for _, at, _ in placed]
    are_others = inside.keys() != {*inside.values()} and not inside.keys().isdisjoint(inside.values())
    return order != sorted(order) and (order != sorted(order, reverse=True) or are_others)


_KINDS = frozenset(
    words(
        "conv convs convolution bn bns norm norms batchnorm batch layernorm ln lns groupnorm gn group "
        "instance rms rmsnorm linear linears lin lins fc fcs dense layer layers"
    )
)
"""Words that say what a part is, and not where it is."""

Couples = Mapping[Names, ModulePart]
"""The norm of each layer, by the layer's path."""


def companions(parts: Sequence[ModulePart]) -> Couples:
    """Returns the norm of each layer: the one that names say, or a module's only one of its convolution."""
    found: dict[Names, ModulePart] = {}
    pairs = defaultdict[Names, tuple[list[ModulePart], list[ModulePart]]]
    alone, called = (pairs(lambda: ([], [])) for _ in range(2))
    lists: dict[Names, list[ModulePart]] = defaultdict(list)
    for part in parts:
        if "main" in part.leaves and (part.is_layer or part.is_vector):
            called[tuple(x for name in part.names if (x := _place(name)))][part.is_vector].append(part)
            if "mean" in part.leaves or len(part.leaves["main"].shape) > 2:
                alone[part.module][part.is_vector].append(part)
        if part.names and is_index(part.names[-1]):
            lists[part.names[:-1]].append(part)
    for layers, norms in (*alone.values(), *called.values()):
        if len(layers) == len(norms) == 1:
            found[layers[0].names] = norms[0]
    taken = {norm.names for norm in found.values()}
    for held in lists.values():
        left = [x for x in held if x.names not in found and x.names not in taken]
        found.update(_in_turns(sorted(left, key=lambda part: int(part.names[-1]))))
    return found


def norms_told(pairs: Iterable[tuple[int, int]], sides: Sequence[Sequence[ModulePart]]) -> Mapping[int, int]:
    """Returns which wanted norm is which stored one, by the layers that names say they belong to.

    Args:
        pairs: The places of the wanted and the stored parts that are each other's.
        sides: All parts of either side.
    """
    places = [{id(part): at for at, part in enumerate(parts)} for parts in sides]
    # What Linen numbers it counts by class: `LayerNorm_0` is none of `Dense_0`.
    norms = [
        companions([x for x in parts if not any(y.is_automatic for y in x.levels[-1:])]) for parts in sides
    ]
    found: dict[int, int] = {}
    for at, to in pairs:
        layer, one, other = sides[0][at], norms[0].get(sides[0][at].names), norms[1].get(sides[1][to].names)
        if one is not None and other is not None and is_as_wide(one, layer):
            found[places[0][id(one)]] = places[1][id(other)]
    return found


def is_as_wide(norm: ModulePart, layer: ModulePart) -> bool:
    """Tells whether a norm has an element for each input, or for each output, of a layer."""
    if not {"main"} <= layer.leaves.keys() & norm.leaves.keys():
        return False
    width, shape = norm.leaves["main"].shape[-1:], layer.leaves["main"].shape
    return width in (shape[-2:-1], shape[-1:])


@functools.lru_cache(maxsize=65536)
def _place(name: str) -> str:
    """Returns a name without the words that say what the part is."""
    return "_".join(word for word in words(name) if word not in _KINDS)


def _in_turns(parts: Sequence[ModulePart]) -> Iterator[tuple[Names, ModulePart]]:
    """Yields the layers and norms of a list in which the one comes behind the other, all through."""
    if len(parts) % 2 or len({part.is_vector for part in parts[::2]}) > 1:
        return
    for one, other in zip(parts[::2], parts[1::2], strict=True):
        if one.is_vector != other.is_vector:
            yield (other.names, one) if one.is_vector else (one.names, other)


def have_one_name(one: ModulePart, other: ModulePart) -> bool:
    """Tells whether two parts and the modules around them are called alike, but for numbers and plurals."""
    paths = (next(iter(part.leaves.values())).names for part in (one, other))
    ends = [[at for at in map(_without_numbers, place_of(names)[0]) if at][-2:] for names in paths]
    return ends[0] == ends[1] and len(ends[0]) > 1


def _without_numbers(name: str) -> tuple[str, ...]:
    return tuple(word.removesuffix("s") for word in words(name) if word.isalpha())


def by_first_letters(
    ours: Sequence[int],
    theirs: Sequence[int],
    parts: Sequence[Sequence[ModulePart]],
    possible: Collection[tuple[int, int]],
) -> list[tuple[int, int]]:
    """Returns which parts are each other's where one side has the other's words as first letters alone.

    `init_h` and `init_c` are `init/hidden` and `init/cell`.

    Args:
        ours: The places of the wanted parts.
        theirs: Those of the stored ones.
        parts: All parts of either side.
        possible: The pairs that may be.
    """
    names = [[parts[side][at].names for at in some] for side, some in enumerate((ours, theirs))]
    told = [telling([frozenset(words("_".join(each))) for each in side]) for side in names]
    if any(len(each) != 1 for side in told for each in side):
        return []
    both = [[*map(min, side)] for side in told]
    (one, other), are_letters = ([x[0] for x in y] for y in both), [{*map(len, x)} == {1} for x in both]
    if sorted(are_letters) != [False, True] or {*one} != {*other} or len({*one}) < max(map(len, both)):
        return []
    pairs = [(at, theirs[other.index(letter)]) for at, letter in zip(ours, one, strict=True)]
    return pairs if all(pair in possible for pair in pairs) else []


Own = tuple[Leaf, Mapping[int, int], int]
"""A leaf, where segments of its other path lie in its own, below 0 for nowhere, and how many more follow."""
Owners = dict[tuple[Path, Names], Own]
"""Leaves by what tells them under other names."""


def sizes_of(leaves: Iterable[Leaf]) -> int:
    """Returns how many elements some leaves hold, and one for those that are empty."""
    return max(1, sum(math.prod(leaf.shape) for leaf in leaves))


def list_name(template: Names) -> Names:
    """Returns what a list is called without the number: `fc1` of `fc1_{i}`, and of `fc1/{i}`."""
    front, _, rest = "/".join(template).partition(PLACE)
    return tuple(filter(None, (front.rstrip("_/") + rest).split("/")))


def modules_beside(leaves: Iterable[Leaf], every: Iterable[Leaf], above: int) -> set[Names]:
    """Returns the modules that hold others than some leaves."""
    own = set(map(id, leaves))
    return {names for leaf in every if id(leaf) not in own for names in around(part_of(leaf)[above:])}


def told_by_names(links: Iterable[Link]) -> list[Link]:
    """Returns links that names tell rather than shapes."""
    return [with_fields(link, grounds="names") if link.grounds == "shapes" else link for link in links]


def apart_from(found: Findings, links: Sequence[Link]) -> Findings:
    """Returns what is known without what is about the parts of some links."""
    taken = {part_of(x.target) for x in links}, {part_of(x.source) for x in links}
    kept = [link for link in found.links if not _is_about(link, taken)]
    ties = [made for tie in found.ties if (made := _without(tie, taken))]
    return Findings(links=kept, ties=ties, groups=found.groups)


def _is_about(link: Link, taken: tuple[Set[Names], Set[Names]]) -> bool:
    sides = (link.wanted, taken[0]), (link.stored, taken[1])
    return any(part_of(leaf) in parts for leaves, parts in sides for leaf in leaves)


def _without(tie: Tie, taken: tuple[Set[Names], Set[Names]]) -> Tie | None:
    """Returns a question without the parts that are known; None where nothing is left of it."""
    if taken[0].isdisjoint(tie.wanted) and taken[1].isdisjoint(tie.stored):
        return tie
    left = (tuple(link for link in each if not _is_about(link, taken)) for each in tie.readings)
    readings = tuple({frozenset(map(id, each)): each for each in left if each}.values())
    wanted, stored = (
        tuple(names for names in side if names not in gone)
        for side, gone in zip((tie.wanted, tie.stored), taken, strict=True)
    )
    return dataclasses.replace(tie, wanted=wanted, stored=stored, readings=readings) if readings else None


def with_layers(steps: Iterable[Step], count: int) -> Steps:
    """Returns what is done with one layer as done with a stack of them along the first axis."""
    made = list[Step]()
    for step in steps:
        axes = (*((0,) if step.kind == "transpose" else ()), *(axis + 1 for axis in step.axes))
        before, shape = ((count, *lengths) for lengths in (step.before, step.shape))
        made.append(dataclasses.replace(step, before=before, shape=shape, axes=axes))
    return tuple(made)
