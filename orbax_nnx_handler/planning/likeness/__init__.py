"""How like each other the parts of two models are: by names, shapes and order.

Here what a whole path says of a part: what it is for, the list that it is in, the layer that a norm belongs
to, and which matrices are transposed. Then which may take features of several positions as one axis, which
no name tells.
"""

import dataclasses
import functools
import itertools
import math
import operator
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set

from orbax_nnx_handler.planning.core.folding import PLACE, plain_names
from orbax_nnx_handler.planning.core.paths import Path, is_index, levels
from orbax_nnx_handler.planning.likeness.assignment import Fit
from orbax_nnx_handler.planning.likeness.links import Link
from orbax_nnx_handler.planning.likeness.module_parts import Leaf, ModulePart, part_of
from orbax_nnx_handler.planning.likeness.named_parts import NamedPart
from orbax_nnx_handler.planning.likeness.vocabulary import (
    SINGLE,
    STRONG,
    Concepts,
    Names,
    concepts,
    counts_of,
    meanings,
    order_word,
    place_of,
    words,
)

_SPELLINGS = (
    "lm|mlm|vocab|ctc|cls_predictions|predictions_transform|generator_predictions",
    "nsp|seq_relationship|next_sentence",
    "classifier|cls_head|probe",
    "projector|(?<!out_)(?<!output_)projection",
    *("pooler", "neck", "pre_logits", "critic|value", "reward", "policy|actor", "qa|span"),
    *("bbox|box|boxes|det", "mask_head", "adapter|lora|prompt"),
)
_PURPOSES = tuple(re.compile(rf"(?:^|_)(?:{spellings})(?:_|$)") for spellings in _SPELLINGS)
"""What heads and the like are for, by the words of each: to tell tokens, a class, a value, ...."""
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
    """Tells whether two parts are each for something, and for nothing in common: `lm_head`, `value_head`."""
    left, right = purposes(one), purposes(other)
    return bool(left and right) and left.isdisjoint(right)


@functools.lru_cache(maxsize=1 << 18)  # Asked several times of each leaf.
def in_list(names: Names) -> tuple[Names, Names]:
    """Returns the outermost list that a part is in, and its path in a layer; nothing where it is in none."""
    at = 0
    for level in levels(names):
        at += level.width
        if level.number is not None:
            return (*names[: at - level.width], level.base), names[at:]
    return (), ()


def layer_of(names: Names) -> tuple[Names, int | None]:
    """Returns the outermost list that a part is in, and its number there."""
    level = next((x for x in levels(names) if x.number is not None), None)
    return in_list(names)[0], level.number if level else None


def lists_in(parts: Iterable[Names]) -> Mapping[tuple[Names, str], set[int]]:
    """Returns the numbers of each list, by where it is and what it is called."""
    found: dict[tuple[Names, str], set[int]] = defaultdict(set)
    for part in parts:
        at = 0
        for level in levels(part):
            if level.number is not None:
                found[part[:at], level.base].add(level.number)
            at += level.width
    return found


@functools.lru_cache(maxsize=1 << 16)
def count_of(names: Names) -> int:
    """Returns how many numbers a path has."""
    return sum(map(str.isdecimal, itertools.chain(*map(words, names))))


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
    yield from (*_renumbered(links), *_crossed(links, left, missing))


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


@functools.lru_cache(maxsize=1 << 18)
def _numbers(names: Names) -> Mapping[str, str]:
    """Returns the number behind each word of a path that has one number."""
    said = [pair for name in names for pair in itertools.pairwise(words(name))]
    found = [(word, number) for word, number in said if number.isdecimal() and not word.isdecimal()]
    counts = Counter(word for word, _ in found)
    return {word: number for word, number in found if counts[word] == 1}


def share_word(one: str, other: str) -> bool:
    """Tells whether two names share a word that says more than that layers are counted."""
    said = (
        {*(word.removesuffix("s") for word in words(name) if word.isalpha()), *meanings(name)}
        for name in (one, other)
    )
    return not set.intersection(*said) <= _OF_LAYERS


_OF_LAYERS = {*SINGLE, *(word.removesuffix("s") for word in SINGLE), *PLACE, ""}


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
        end = order_word(concepts(part[-2:]))
        if to is not None and own in lone[0] and other in lone[1] and own[-1:] == other[-1:]:
            yield link  # Another one has gone elsewhere, and either side has one more of the name.
        elif to is not None:
            seat = end * math.inf if at is None and end else at
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
    if len(placed) < len(numbers):
        # Of one name on both sides, another part may as well be the first one as the last.
        strangers = [link for _, at, link in numbers if at is None]
        return all(_series(one)[0][-1:] == _series(other)[0][-1:] for one, other in parts) and not any(
            concepts(part_of(x.target)[-1:]) & concepts(part_of(x.source)[-1:]) for x in strangers
        )
    order = [at for _, at, _ in placed]
    are_others = inside.keys() != {*inside.values()} and not inside.keys().isdisjoint(inside.values())
    return order != sorted(order) and (order != sorted(order, reverse=True) or are_others)


def turned_lists(links: Iterable[Link]) -> Collection[tuple[Names, str]]:
    """Returns lists with a parameter, all of whose matrices but the squares, of several names, are turned."""
    turned: dict[tuple[Names, str], dict[Names, bool]] = defaultdict(dict)
    for link in links:
        shape, names = link.target.shape, link.target.names
        if (list_ := in_list(names)[0]) and len({*shape}) == len(shape) > 1:
            is_turned = any(way.turned for several in link.ways for way in several)
            held = turned[list_, names[-1]]
            held[plain_names(names)] = is_turned and held.get(plain_names(names), True)
    return {key for key, held in turned.items() if len(held) > 1 and all(held.values())}


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
    """Returns the norm of each layer that names say belongs to it."""
    found: dict[Names, ModulePart] = {}
    called: dict[Names, tuple[list[ModulePart], list[ModulePart]]] = defaultdict(lambda: ([], []))
    lists: dict[Names, list[ModulePart]] = defaultdict(list)
    for part in parts:
        if "main" in part.leaves and (part.is_layer or part.is_vector):
            called[tuple(x for name in part.names if (x := _place(name)))][part.is_vector].append(part)
        if part.names and is_index(part.names[-1]):
            lists[part.names[:-1]].append(part)
    for layers, norms in called.values():
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
        if one is not None and other is not None and {"main"} <= layer.leaves.keys() & one.leaves.keys():
            width = one.leaves["main"].shape[-1:]
            if width in (layer.leaves["main"].shape[-2:-1], layer.leaves["main"].shape[-1:]):
                found[places[0][id(one)]] = places[1][id(other)]
    return found


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


def beside_turned(
    fits: Mapping[tuple[int, int], Fit], wanted: Sequence[NamedPart], stored: Sequence[NamedPart]
) -> list[tuple[int, int]]:
    """Returns pairs of matrices as they are, where those of one role on both sides only fit transposed.

    Of Praxis' `ffn_layer1` and `ffn_layer2` either has the shape of the other one, transposed.
    """
    told: dict[tuple[str, str], set[bool]] = defaultdict(set)
    as_they_are: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    for pair, fit in fits.items():
        for one, other, options in fit.pairs:
            if min(len(one.shape), len(other.shape)) > 1 == len(options):
                names, is_turned = (one.names[-1], other.names[-1]), options[0].turned
                if wanted[pair[0]].said & stored[pair[1]].said & STRONG:
                    told[names].add(is_turned)
                elif not is_turned and len(one.shape) == len(other.shape):
                    as_they_are[names].append(pair)
    return [pair for names, held in as_they_are.items() if told[names] == {True} for pair in held]


_SIDES = frozenset(("enc", "dec"))
_OF_AN_IMAGE = 4
"""Up to as many channels are an input's own, of which no layer makes several positions."""
_Kernel = tuple[int, int, Path, Concepts]


def flattened(leaves: Iterable[Leaf], own: Set[Path]) -> set[Path]:
    """Returns stored matrices that may take or make features of several positions; not only `own` leaves.

    Nothing gives as many inputs, and they are several times what a convolution returns. Or nothing takes
    as many outputs, and they are several times what a convolution takes that nothing gives. Between
    an encoder and a decoder lies what each has of its own.
    """
    given: dict[int, set[Concepts]] = defaultdict(set)
    taken: dict[int, set[Concepts]] = defaultdict(set)
    images: list[_Kernel] = []
    matrices: list[_Kernel] = []
    for leaf in leaves:
        said, (*above, inputs, outputs) = concepts(leaf.names), (1, 1, *leaf.shape)
        side, spans, is_named = said & _SIDES, above[2:], leaf.names[-1] == "kernel"
        is_kernel = len(above) > 1 and (is_named or leaf.names[-1] == "w")
        is_layered = is_named and len(spans) == 1 and spans[0] < min(inputs, outputs)
        is_image = is_named and len(spans) > 1 and len({*spans}) == 1
        kernel = inputs, outputs, leaf.source, side
        given[outputs].add(side)
        if is_image or (is_kernel and spans and "conv" in said):
            images.append(kernel)
        elif is_kernel and (is_layered or not spans):
            matrices += [kernel] * said.isdisjoint(("attn", "q", "k", "v"))
            given[outputs // 2].add(side)  # The other half may be a gate.
        elif spans:
            given[inputs].add(side)  # Gemma's gate has its outputs first.
        if is_kernel or place_of(leaf.names)[1] != "bias":
            taken[inputs if is_kernel else outputs].add(side)
    returned, needed = defaultdict[int, set[Path]](set), defaultdict[int, set[Path]](set)
    for inputs, outputs, path, side in images:
        returned[outputs].add(path)
        if inputs > _OF_AN_IMAGE and not _explain(given[inputs], side):
            needed[inputs].add(path)
    return {
        path
        for inputs, outputs, path, side in matrices
        for size, others, widths in ((inputs, given, returned), (outputs, taken, needed))
        if not _explain(others[size], side)
        and any(
            size in range(2 * width, size + 1, width) and not own >= {path, *paths}
            for width, paths in widths.items()
            if width > 1
        )
    }


def _explain(sides: Iterable[Concepts], side: Concepts) -> bool:
    return any(not (other and side) or other == side for other in sides)


# Levels on the way up of a U-Net.

_UP = re.compile(r"((?:.*?[/_])??(up[a-z_]*)/?)(\d+)(.*)")
_WAYS_UP = (
    re.compile(r"((?:.*?/)??([a-z_]+)/?)(\d+)(/(?:up|dec)[a-z_]*(?:[/_]\d+)?/[^/]+/.*)"),
    _UP,
    re.compile(r"((?:.*?/)??(dec(?:oder)?s?(?:[/_][a-z_]+)?)[/_]?)(\d+)(.*)"),
)
"""A level that holds its way up, `levels/0/up`; one of these, `up_blocks/0`; one of a decoder."""

_Level = tuple[Link, re.Match[str], re.Match[str]]


def by_level(links: Sequence[Link]) -> tuple[list[Link], list[list[list[Link]]]]:
    """Returns links under which one level is made from one, and readings of levels that may be reversed.

    diffusers counts the levels on the way up from the lowest one, CompVis and ADM from the highest.
    """
    groups: dict[tuple[str, str], list[_Level]] = defaultdict(list)
    for link in links:
        one, other = (_way_up("/".join(leaf.names).lower()) for leaf in (link.target, link.source))
        # Of two decoders none is known to be a U-Net's.
        is_known = one and other and (one.re is not other.re or one.re is _UP)
        if one and other and is_known and link.layers is None and link.joint is None:
            groups[one[1], other[1]].append((link, one, other))
    made, several = {id(link): [link] for link in links}, list[list[list[Link]]]()
    for group in groups.values():
        is_image = any(len(link.source.shape) > 3 for link, *_ in group)
        is_told = is_image or all(match.re is _UP for _, *ends in group for match in ends)
        found = [reading for step in (1, -1) if is_told and (reading := _read(group, step))]
        # Of one name, levels that count from 1 may count from the other end.
        sides = zip(*(ends for _, *ends in group), strict=True)
        names = {(each[0][2].replace("_", ""), min(int(x[3]) for x in each)) for each in sides}
        if found:
            made |= {id(link): [] for link, *_ in group}
            is_told = len(found) == 1 or len(names) == 1
            made[id(group[0][0])] = found[0] if is_told else []
            several += [] if is_told else [found]
    return [link for each in made.values() for link in each], several


def _way_up(path: str) -> re.Match[str] | None:
    """Returns how a path may lie in a level on the way up of a U-Net."""
    found = (each.fullmatch(path) for each in _WAYS_UP) if "up" in path or "dec" in path else ()
    return next(filter(None, found), None)


def _read(group: Sequence[_Level], step: int) -> list[Link]:
    """Returns the links of levels one by one, or the other way around; none where one does not fit."""
    stored = {(int(other[3]), other[4]): link.source for link, _, other in group}
    ours, theirs = sorted({int(one[3]) for _, one, _ in group}), sorted({at for at, _ in stored})
    below = {(one[4], other[4]) for _, one, other in group}
    if len(ours) != len(theirs) or len(ours) < 2 or len({one for one, _ in below}) < len(below):
        return []
    level, found = dict(zip(ours, theirs[::step], strict=True)), list[Link]()
    for link, one, other in group:
        leaf = stored.get((level[int(one[3])], other[4]))
        if leaf is None or leaf.shape != link.source.shape:
            return []
        found.append(link if leaf is link.source else dataclasses.replace(link, stored=(leaf,), levels=()))
    return found
