"""What links make of whole modules and lists: they would tear one, or make it of what is called otherwise.

Such links are asked about. What one module holds alone in another one, what two modules would have of each
other, and what goes elsewhere though there is a module of its name. And a network for one thing as that for
another one, whatever lies in it and at whatever depth; and a layer as the next one of its list.
"""

import functools
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set

from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.paths import levels, shared_levels
from orbax_nnx_handler.planning.layouts.layout import FOLLOWERS, says_copy
from orbax_nnx_handler.planning.likeness import called_alike, lists_around, purposes, share_word
from orbax_nnx_handler.planning.likeness.links import Link
from orbax_nnx_handler.planning.likeness.module_parts import ModulePart, part_of
from orbax_nnx_handler.planning.likeness.vocabulary import (
    PARAMETER,
    SINGLE,
    STRONG,
    Names,
    concepts,
    counts_of,
    exclude,
    meanings,
    telling,
    words,
)

LinksByParts = Mapping[tuple[Names, Names], Sequence[Link]]
"""The links of each wanted part and each stored one of which it is made."""


def by_parts(links: Iterable[Link]) -> LinksByParts:
    """Returns the links of each wanted part and each stored one of which it is made."""
    parts = defaultdict[tuple[Names, Names], list[Link]](list)
    for link in links:
        for one, other in itertools.product(link.wanted, link.stored):
            parts[part_of(one), part_of(other)].append(link)
    return parts


def torn_modules(
    links: Sequence[Link], parts: LinksByParts, sides: Sequence[Sequence[ModulePart]]
) -> Iterator[Link]:
    """Yields links that would tear a module.

    Args:
        links: What is found.
        parts: The same by the wanted and the stored part.
        sides: All wanted parts, and all stored ones.
    """
    yield from _astray(links)
    yield from _between_modules(parts)
    yield from _from_others(parts, sides)
    yield from _in_two(parts)


def _astray(links: Sequence[Link]) -> Iterator[Link]:
    """Yields links of the only part that two modules share, where each has the rest in another one.

    And those of two modules that are both made of the same two: their layers may be exchanged.
    """
    pairs = {(part_of(link.target), part_of(link.source)): link for link in links}
    depths = [len(shared_levels(side, own=2)) for side in zip(*pairs, strict=True)]
    tops = {pair: (_called_above(pair[0], depths[0]), _called_above(pair[1], depths[1])) for pair in pairs}
    counts = Counter(each for each in tops.values() if all(each))
    several = [Counter(side) for side in zip(*counts, strict=True)]
    shared = [x for x in counts if several[0][x[0]] > 1 < several[1][x[1]]]
    crossed = {
        (one, other)
        for (one, other), (at, to) in itertools.permutations(shared, 2)
        if one != at and other != to and counts[one, to] and counts[at, other]
    }
    for link in links if shared else ():
        top = tops[part_of(link.target), part_of(link.source)]
        is_lone = link.joint is None and link.layers is None and counts[top] == 1 and top in shared
        if is_lone or top in crossed:
            yield link


def _called_above(names: Names, depth: int) -> str:
    """Returns what the module at a depth is called; nothing for a part, and for what a program counts."""
    name = names[depth] if len(names) > depth + 1 else ""
    return "" if counts_of(name) else name


def _between_modules(parts: LinksByParts) -> Iterator[Link]:
    """Yields links of the only part that two modules share, where each has several in one other module."""
    led, back = (defaultdict[Names, Counter[Names]](Counter) for _ in range(2))
    for (one, other), count in Counter((one[:-1], other[:-1]) for one, other in parts).items():
        for at, to in itertools.product(range(1, len(one) + 1), range(1, len(other) + 1)):
            led[one[:at]][other[:to]] += count
            back[other[:to]][one[:at]] += count
    for (one, other), some in parts.items():
        into, module = one[:-1], other[:-1]
        if led[into][module] == 1 and _is_shared(led[into], module) and _is_shared(back[module], into):
            yield from (link for link in some if link.joint is None)


def _is_shared(modules: Mapping[Names, int], own: Names) -> bool:
    """Tells whether several parts are shared with one module that does not lie around, or in, another one."""
    return any(n > 1 and x[: len(own)] != own[: len(x)] for x, n in modules.items())


def _from_others(parts: LinksByParts, sides: Sequence[Sequence[ModulePart]]) -> Iterator[Link]:
    """Yields links between modules of which one has a namesake that holds the same on the other side.

    Where an `encoder` is on both sides, it is no `discriminator`, nor is a `generator` the `encoder`. But a
    `style_encoder` may be, where the `encoder` is one in a `transformer`.
    """
    depths = [len(shared_levels([part.names for part in side], own=2)) for side in sides]
    held = [defaultdict[Names, list[int]](list) for _ in sides]
    for side, some, depth in zip(held, sides, depths, strict=True):
        for part in some:
            for at in range(depth + 1, len(part.names)):
                side[part.names[depth:at]].append(part.main_size)
    shared = {x for x in held[0].keys() & held[1].keys() if sorted(held[0][x]) == sorted(held[1][x])}
    for (one, other), some in parts.items() if shared else ():
        both = one[depths[0] :], other[depths[1] :]
        at = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*both, strict=False)))
        is_module = at + 1 < min(map(len, both)) and not any(counts_of(x[at]) for x in both)
        is_said = is_module and share_word(*("/".join(x[:-1]) for x in both))
        if is_module and not is_said and any(x[: at + 1] in shared for x in both):
            yield from (link for link in some if link.joint is None)


def _in_two(parts: LinksByParts) -> Iterator[Link]:
    """Yields links of two modules that both go into the same two, a part each, though one may be the other.

    Not where a word of a module is one of the parts of the other side: `fc1/{0,1}` are `layers/{0,1}/fc1`.
    """
    led = defaultdict[tuple[Names, Names], list[tuple[Names, Names]]](list)
    for pair in parts:
        led[pair[0][:-1], pair[1][:-1]].append(pair)
    homes, looks = defaultdict[Names, set[Names]](set), defaultdict[Names, list[list[Shape]]](list)
    for (into, module), pairs in led.items():
        homes[module].add(into)
        for pair in pairs:
            shapes = sorted(link.source.shape for link in parts[pair])
            looks[into].append(shapes)
            looks[module].append(shapes)
    several = defaultdict[frozenset[Names], list[Names]](list)
    for module, intos in homes.items():
        if len(intos) > 1 and all(
            sorted(map(str, looks[x])) == sorted(map(str, looks[module])) for x in intos
        ):
            several[frozenset(intos)].append(module)
    for intos, modules in several.items():
        pairs = [pair for both in itertools.product(intos, modules) for pair in led[both]]
        ends = [[[level.base for level in levels(names)[-2:]] for names in pair] for pair in pairs]
        crossed = ((one[:1], other[-1:]) for both in ends for one, other in (both, both[::-1]))
        is_told = any(called_alike("".join(outer), "".join(inner)) for outer, inner in crossed)
        if len(modules) == len(intos) and not is_told:
            yield from (link for pair in pairs for link in parts[pair] if link.joint is None)


# What each side calls a whole network.

_ModulePair = tuple[Names, Names]
"""The paths of a wanted module and of the stored one that it is made of."""

_NETWORKS = concepts(
    ("enc", "dec", "head", "tower", "branch", "stream", "out", "embed", "projector", "expert", "agent")
)
"""What a network is, beside which its name says which one."""
_BUILDS = "mlp cnn conv rnn lstm gru resnet res unet vit former gan bert gpt llama clip train default"
_PLAIN = "in norm token trunk decode encode pretrained frozen"
_NO_ROLE = _NETWORKS | concepts((*_BUILDS.split(), *_PLAIN.split(), *SINGLE, *PARAMETER))
_ARCHITECTURE = re.compile(r"\w{3,}(?:net|former|gan)|\w*bert\w*|\w*fpn|pre(?:layer)?norm|stages?")
_IMAGES = frozenset(("image", "images", "img", "vision", "visual"))
_ALIKE = 0.9  # Where a word is the other one, or short for it.


def of_other_roles(links: Iterable[Link]) -> Iterator[Sequence[Link]]:
    """Yields the links of each network that both sides call after other things, or count otherwise.

    What it is, on both sides, leaves the word that says which one: an encoder of the `flow` is none for
    `thermal` images, though one program joins both words and the other one has a level for each. Or all
    beside it are called after the same things: an `actor` beside a `world` of either side is no `q1`.
    """
    parts = by_parts(links)
    for (into, within), pairs in _whole_modules(parts).items():
        called = {x: (x[0][len(into) :], x[1][len(within) :]) for x in pairs}
        agree = {x: _agree(*names) for x, names in called.items()}
        counts = Counter(tuple(map(_uncounted, names)) for names in called.values())
        for pair, names in called.items():
            if agree[pair]:
                is_other = counts[tuple(map(_uncounted, names))] == 1 and _are_counted_otherwise(*names)
            else:
                is_alone = len(pairs) > 1 and all(agree[x] for x in pairs if x != pair)
                is_other = _are_of_other_roles(*names, is_alone=is_alone)
            held = {x: parts[x] for x in (parts if is_other else ()) if _lies_in(x, pair)}
            modules = [x for x, some in held.items() if x[0] != some[0].target.names]  # No bare parameters.
            if len(modules) > 1 and not _are_images(parts, held, names):
                every = {id(link): link for some in held.values() for link in some if not link.copied}
                yield [*every.values()]


def _whole_modules(parts: LinksByParts) -> Mapping[_ModulePair, Sequence[_ModulePair]]:
    """Returns modules that are each other's as a whole, outside of lists, by those that they lie in.

    Each with the levels around it that hold nothing else: `decoders/keypoints` is `heads_edges`.
    """
    counts, both = (Counter[Names](), Counter[Names]()), Counter[_ModulePair]()
    for pair, count in Counter((_outside(one), _outside(other)) for one, other in parts).items():
        one, other = ([names[:at] for at in range(len(names) + 1)] for names in pair)
        for side, some in zip(counts, (one, other), strict=True):
            side.update(dict.fromkeys(some, count))
        both.update(dict.fromkeys(itertools.product(one, other), count))
    around = [{x[:-1] for x, count in side.items() if x and count == side[x[:-1]]} for side in counts]
    alike = (x for x, count in both.items() if count == counts[0][x[0]] == counts[1][x[1]])
    whole = {x for x in alike if x[0] not in around[0] and x[1] not in around[1]}
    found = defaultdict[_ModulePair, list[_ModulePair]](list)
    for one, other in whole:
        ends = itertools.product(range(len(one) + 1), range(len(other) + 1))
        above = ((one[:at], other[:to]) for at, to in ends if (at, to) != (len(one), len(other)))
        outer = max((x for x in above if x in whole), key=lambda x: len(x[0] + x[1]), default=((), ()))
        if one[len(outer[0]) :] and other[len(outer[1]) :]:
            found[outer].append((one, other))
    return found


@functools.lru_cache(maxsize=1 << 16)
def _outside(names: Names) -> Names:
    """Returns what leads into the outermost list that a part is in, with its number; networks lie there."""
    at = next((at for at, name in enumerate(names) if any(map(str.isdecimal, name))), len(names))
    return names[: min(at + 1, 4)]


def _lies_in(parts: _ModulePair, modules: _ModulePair) -> bool:
    return all(x[: len(y)] == y for x, y in zip(parts, modules, strict=True))


@functools.lru_cache(maxsize=1 << 16)
def _roles(names: Names) -> str:
    """Returns the words of a network's names that say which one it is: no letters, nor how it is built."""
    said = [word for name in names for word in meanings(name) if not _ARCHITECTURE.fullmatch(word)]
    is_encoder = not {"enc", "dec"}.isdisjoint(said)  # Of queries, where it is called by a letter.
    said = [x for x in said if x not in ("q", "v")] if is_encoder else said
    said += [] if is_encoder else [x for word in words("_".join(names)) if (x := _FUNCTIONS.get(word))]
    said = [_SAME.get(word, word) for word in said]
    return "_".join(word for word in said if len(word) > 1 and word not in _NO_ROLE)


_FUNCTIONS = {letter + end: f"{letter}_critic" for letter in "qv" for end in ("", "s", "f", "fs", "net")}
"""A function of states is none of actions, as `value` and `critic` may be either."""


_SPELLINGS = {"critic": ("q", "v"), "box": ("bbox", "boxes", "regression"), "tgt": FOLLOWERS}
_SAME = {spelling: word for word, spellings in _SPELLINGS.items() for spelling in spellings}


def _agree(one: Names, other: Names) -> bool:
    """Tells whether two networks are called after the same thing, or mean the same."""
    is_alike = called_alike(_roles(one), _roles(other)) > _ALIKE and not _are_opposites(one, other)
    plain = (concepts(words("_".join(x))) for x in (one, other))
    return is_alike or concepts(one) == concepts(other) or len({*plain}) == 1


def _are_opposites(one: Names, other: Names) -> bool:
    return exclude(*(frozenset(_roles(x).split("_")) for x in (one, other)))


def _are_of_other_roles(one: Names, other: Names, *, is_alone: bool) -> bool:
    """Tells whether two networks are called after other things, and what they are is, or all beside them."""
    is_told = is_alone or (_is_network(one) and _is_network(other)) or _are_opposites(one, other)
    return bool(is_told and _roles(one) and _roles(other) and not purposes(one) & purposes(other))


def _is_network(names: Names) -> bool:
    return not _NETWORKS.isdisjoint(concepts(names))


def _uncounted(names: Names) -> str:
    return re.sub(r"\d", "", "/".join(names))


def _are_counted_otherwise(one: Names, other: Names) -> bool:
    """Tells whether a network has another number: `q1` and `qf2`, and `critic_1` and `critics/1`.

    The first one may be counted from 0 as well as from 1.
    """
    (number, source), is_list = (counts_of(x[-1]) for x in (one, other)), one[-1].isdecimal()
    own = one[-1 - is_list :]  # What is counted, and not what that lies in.
    if not (number and source and (_roles(own) or _is_network(own))):
        return False
    is_first = _uncounted(one) != _uncounted(other) and {*number[-1:], *source[-1:]} <= {"0", "1"}
    is_from_0 = is_list and not other[-1].isdecimal() and number[-1] != "0"
    return (number != source and not is_first) or is_from_0


def _are_images(parts: LinksByParts, held: Iterable[_ModulePair], names: _ModulePair) -> bool:
    """Tells whether a network that is called after images holds most of their convolutions."""
    is_said = not _IMAGES.isdisjoint(words("_".join(itertools.chain(*names))))
    images = {x for x, some in parts.items() if any(len(link.source.shape) == 4 for link in some)}
    return is_said and 2 * len(images & {*held}) > len(images)


# What a checkpoint calls its networks.

_BUILT = concepts((*_BUILDS.split()[:9], "agent", "train", "state", "variables", "item", "default"))
"""How a network is built, or where it is kept, which says not which one it is."""


def says_nothing(name: str) -> bool:
    """Tells whether a network's name says only what it is built of, or nothing."""
    return concepts([name]) <= _BUILT


def unlike_networks(pairs: Iterable[tuple[Names, Names]]) -> list[tuple[Names, Names]]:
    """Returns networks that are called after different things, or one as a copy of what the other is.

    Where other names tell which is which, and are other ones on both sides, a program has names of its own,
    and what is left is each other's too: of `policy` and `value` the `value` is the `critic`.
    """
    said = {pair: (concepts(pair[0]) - _BUILT, concepts(pair[1]) - _BUILT) for pair in pairs if pair[1]}
    renamed = (said[pair] for pair in said if pair[0] != pair[1])
    has_own = any(one & other and (one <= other or other <= one) for one, other in renamed)
    found = list[tuple[Names, Names]]()
    for pair, (one, other) in said.items():
        is_other = bool(one - other and other - one) and (not has_own or exclude(one, other))
        if is_other or len({any(map(_is_copied, names)) for names in pair}) > 1:
            found.append(pair)
    return found


def _is_copied(name: str) -> bool:
    return says_copy(name) or "tgt" in meanings(name)


# Layers in another place of their list, or of another list.


def of_other_lists(
    pairs: Iterable[_ModulePair], wanted: Iterable[Names], stored: Iterable[Names]
) -> set[_ModulePair]:
    """Returns parts of lists that are another list's by their names, or in another place of one as long.

    One list may count from 0 and the other from 1, whatever a layer of either lacks; and the whole list may
    be counted from its end.

    Args:
        pairs: Wanted parts with what they are made of.
        wanted: All wanted parts.
        stored: All stored ones.
    """
    ours, theirs = _outermost_lists(wanted), _outermost_lists(stored)
    held = defaultdict[tuple[Names, Names], list[tuple[_Place, _Place]]](list)
    places = dict[tuple[_Place, _Place], tuple[Names, Names]]()
    for pair in pairs:
        one, other = (next(iter(lists_around(names)), _NOWHERE) for names in pair)
        if one[0] in ours and other[0] in theirs:
            held[one[0], other[0]].append((one, other))
            places[one, other] = pair
    said = [
        dict(zip(x, telling([concepts(names) - _LOOKS for names in x]), strict=True)) for x in (ours, theirs)
    ]
    several = [Counter(pair[side] for pair in held) for side in (0, 1)]
    found = set[tuple[_Place, _Place]]()
    for (one, other), some in held.items():
        own = said[0][one], said[1][other]
        kinds = len(theirs[other]), len(ours[one])  # Of parts in a layer.
        far = (
            itertools.chain(*(x for list_, x in words_.items() if len(held_[list_]) == count))
            for words_, held_, count in zip(said[::-1], (theirs, ours), kinds, strict=True)
        )
        if own[0].isdisjoint(own[1]) and any(not x.isdisjoint(y) for x, y in zip(own, far, strict=True)):
            found.update(some)
        elif several[0][one] == several[1][other] == 1 and _WAYS.isdisjoint(concepts((*one, *other))):
            found.update(_out_of_place(some, ours[one], theirs[other]))
    return {places[each] for each in found}


_Place = tuple[Names, int, Names]
"""The list that a part is in, the number of its layer and its path there."""
_LOOKS = frozenset(("conv", "norm", "attn", "mlp"))  # What many layers are.
_WAYS = frozenset(("up", "down"))  # Of a U-Net, which count from either end.
_NOWHERE: _Place = (), 0, ()


def _outermost_lists(parts: Iterable[Names]) -> Mapping[Names, Mapping[Names, set[int]]]:
    """Returns the lists that lie in no other one: the numbers of the layers that hold a part, by its path."""
    found = defaultdict[Names, dict[Names, set[int]]](lambda: defaultdict(set))
    for list_, number, inside in itertools.chain(*(lists_around(names)[:1] for names in parts)):
        if inside:
            found[list_][inside].add(number)
    return {x: held for x, held in found.items() if len({*itertools.chain(*held.values())}) > 1}


def _out_of_place(
    links: Sequence[tuple[_Place, _Place]], ours: Mapping[Names, Set[int]], theirs: Mapping[Names, Set[int]]
) -> Iterator[tuple[_Place, _Place]]:
    """Yields links of another shift than that of the whole lists, but of parts that are all used so.

    What ends one layer may begin the next one elsewhere.
    """
    shift = _shift(*({*itertools.chain(*side.values())} for side in (ours, theirs)))
    led = defaultdict[int, set[int]](set)
    for one, other in links:
        led[one[1]].add(other[1])
    # The whole list may be counted from its end, or within what is counted first on the other side.
    is_turned = len({one[1] + other[1] for one, other in links}) == 1 or all(len(x) > 1 for x in led.values())
    if shift is None or is_turned:
        return
    parts = defaultdict[tuple[Names, Names], list[tuple[_Place, _Place]]](list)
    for one, other in links:
        parts[one[2], other[2]].append((one, other))
    for (one, other), some in parts.items():
        is_whole = len(some) == len(ours[one]) == len(theirs[other])
        made = {to[1] - at[1] for at, to in some}
        if not (is_whole and len(made) == 1):
            yield from (x for x in some if x[1][1] - x[0][1] != shift)


def _shift(wanted: Set[int], stored: Set[int]) -> int | None:
    """Returns how much higher a stored list counts than a wanted one; None where no number tells."""
    low, high = min(stored) - min(wanted), max(stored) - max(wanted)
    if low == high and max(wanted) - min(wanted) + 1 == len(wanted) == len(stored):
        return low
    moved = {shift: {number - shift for number in stored} for shift in (0, low, high)}
    held = [shift for shift, numbers in moved.items() if numbers < wanted]
    return held[0] if len(held) == 1 and 2 * len(stored) > len(wanted) else None


# What tells.

GENERAL = frozenset(("norm", "attn", "mlp", "enc", "dec", "conv", "head", "embed"))
"""Words that many parts of a model share."""


@functools.lru_cache(maxsize=65536)
def telling_words(names: Names) -> frozenset[str]:
    """Returns the words of a path that say more than what many parts are; a letter may only count."""
    said = (word for name in names for word in words(name) if word.isalpha())
    said = (word for word in said if len(word) > 1 or word in STRONG)
    return frozenset(word for word in said if not meanings(word) or {*meanings(word)} - GENERAL)
