"""What is told of whole modules: renames of many, whether one's matrices are transposed, which one is meant.

`('kernel', 'weight')`, and `('{x}_dense', 'net/{x}_linear')` for `up_dense`, `down_dense` and all
others: one rule where each module would have one. Last, leaves that are looked at under other names.
"""

import dataclasses
import functools
import itertools
import operator
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set

from orbax_nnx_handler.planning.core.folding import PLACE, numbered, plain_names
from orbax_nnx_handler.planning.core.leaves import with_fields
from orbax_nnx_handler.planning.core.paths import Path, is_index, levels, shared_levels
from orbax_nnx_handler.planning.likeness import Owners, sizes_of
from orbax_nnx_handler.planning.likeness.highest_sums import best_pairs
from orbax_nnx_handler.planning.likeness.links import (
    Findings,
    Link,
    Move,
    Tie,
    Turns,
    alike,
    differing,
    simplest,
)
from orbax_nnx_handler.planning.likeness.module_parts import BySize, Leaf, part_of
from orbax_nnx_handler.planning.likeness.shapes import Way
from orbax_nnx_handler.planning.likeness.vocabulary import PYTORCHS, Names, meanings, words
from orbax_nnx_handler.planning.rules.rename import with_place

Renamed = tuple[Names, Names]
"""The segments that a rename is for, and what they become."""

_MANY = 24
"""So many modules are rather renamed at once than one by one."""
_PLACES = ("{x}", "{y}", "{z}")
counted_levels = functools.lru_cache(maxsize=65536)(numbered)  # Asked of each leaf in every context.


def of_leaves(moves: Sequence[Move]) -> Iterator[Renamed]:
    """Yields what many modules call a leaf, with what the wanted ones call it: `kernel`, `weight`."""
    return _shared(moves, lambda move, _: (move.names[-1:], move.aim[-1:]))


def of_modules(moves: Sequence[Move]) -> Iterator[Renamed]:
    """Yields renames of many modules, with places for what tells these apart: `{x}_dense`, `{x}_linear`."""
    others = [move for move in moves if not alike(move.names, move.aim)]
    return _shared(others, lambda _, both: _with_places(*both))


def _shared(moves: Sequence[Move], renamed: Callable[[Move, Renamed], Renamed]) -> Iterator[Renamed]:
    groups = {(both := differing(move), renamed(move, both)) for move in moves}
    for (stored, wanted), count in Counter(each for _, each in groups).items():
        if stored != wanted and count > _MANY:
            yield stored, wanted


def _with_places(stored: Names, wanted: Names) -> Renamed:
    """Returns both with places for what their names have in common, where other words tell them still."""
    shared = min(len(stored), len(wanted))
    if shared > len(_PLACES) or any("{" in name for name in stored):
        return stored, wanted
    ends = stored[len(stored) - shared :], wanted[len(wanted) - shared :]
    made = [with_place(*names) for names in zip(_PLACES, *ends, strict=False)]
    theirs = (*stored[: len(stored) - shared], *(one for one, _ in made))
    ours = (*wanted[: len(wanted) - shared], *(other for _, other in made))
    return (theirs, ours) if {*theirs}.difference(_PLACES) else (stored, wanted)


# Whether the matrices of a module are transposed.

_FEW = 6
"""Of up to so many matrices of a module every order is tried."""


def with_modules_asked(found: Findings, wanted: Iterable[Leaf], stored: Iterable[Leaf]) -> Findings:
    """Returns what is known, asked where a whole module may be another one, or may be transposed."""
    return _with_modules_unturned(_with_siblings(found), wanted, stored)


def _with_modules_unturned(found: Findings, wanted: Iterable[Leaf], stored: Iterable[Leaf]) -> Findings:
    """Returns what is known, asked where names transpose matrices that fit as they are in another order.

    The matrices of a module are all stored transposed, or none is: Llama's `w2` leads back, in DINOv2 `w3`
    does. Names decide where all of a model are transposed and some of them fit in no other order.

    Args:
        found: What is known.
        wanted: All wanted leaves.
        stored: All stored ones.
    """
    parts = defaultdict[tuple[object, ...], list[Link]](list)
    for link in found.links:
        parts[part_of(link.target), part_of(link.source), link.layers, link.layer].append(link)
    turned = defaultdict[tuple[object, ...], list[Sequence[Link]]](list)
    straight = set[object]()
    for links in parts.values():
        for link in filter(_is_told, links):
            name, modules = link.target.names[-1], (part_of(x)[:-1] for x in (link.target, link.source))
            if link.ways[0][0].turned:
                turned[name, *modules, link.layers, link.layer].append(links)
            else:
                straight.add(name)
    orders = {key: [*_unturned(held)] for key, held in turned.items()}
    settled = {name for name, *_ in (key for key, made in orders.items() if not made)} - straight
    asked = [(turned[key], made) for key, made in orders.items() if made and key[0] not in settled]
    ties = [_tie(held, made) for held, made in asked] + _exchanged(found, wanted, stored)
    gone = {id(link) for held, _ in asked for links in held for link in links}
    kept = [link for link in found.links if id(link) not in gone]
    return dataclasses.replace(found, links=kept, ties=[*found.ties, *ties]) if ties else found


def _exchanged(found: Findings, wanted: Iterable[Leaf], stored: Iterable[Leaf]) -> list[Tie]:
    """Returns a question about parts that nothing is known of, and that fit exchanged within their module.

    With a bias no layer is transposed: `w2` and `w3` of Llama, and of DINOv2.
    """
    modules = {
        tuple(part_of(leaf)[:-1] for leaf in (link.target, link.source)): link.levels
        for link in found.links
        if link.joint is None and link.layers is None
    }
    known = {leaf.part for link in found.every for leaf in (*link.wanted, *link.stored)}
    sides = [defaultdict[Names, dict[Names, dict[str, Leaf]]](dict) for _ in range(2)]
    for side, leaves in zip(sides, (wanted, stored), strict=True):
        for leaf in leaves:
            if leaf.part not in known and (part := part_of(leaf)):
                side[part[:-1]].setdefault(part[-1:], {})[leaf.place[1]] = leaf
    links = list[Link]()
    for (one, other), seats in modules.items():
        ours, theirs = sides[0].get(one, {}), sides[1].get(other, {})
        levels = tuple((at, to) for at, to in seats if at < len(other) and to < len(one))
        parts = [
            [
                Link(wanted=(x,), stored=(y,), grounds="names", ways=((Way(()),),), levels=levels)
                for kind, x in ours[name].items()
                if (y := theirs[name].get(kind))
            ]
            for name in ours
            if name in theirs
        ]
        if all(any(x.target.shape == x.source.shape[::-1] != x.source.shape for x in each) for each in parts):
            orders = [*itertools.islice(_unturned(parts), 2)]
            links += orders[0] if len(orders) == 1 else ()
    return [_tie([links], [])] if links else []


def _is_told(link: Link) -> bool:
    """Tells whether shapes alone say if a matrix, whose parameter has one name, is transposed."""
    one, other = link.target, link.source
    is_plain = link.joint is None and len(link.wanted) == len(link.stored) == len(link.ways[0]) == 1
    is_matrix = len(one.shape) == len(other.shape) > 1 and len({*one.shape}) > 1
    return is_plain and is_matrix and one.names[-1] == other.names[-1] not in PYTORCHS


def _unturned(parts: Sequence[Sequence[Link]]) -> Iterator[list[Link]]:
    """Yields the orders of some parts in which all of their leaves fit as they are."""
    held = [{link.source.place[1]: link for link in links} for links in parts]
    for order in itertools.permutations(held) if len(parts) <= _FEW else ():
        pairs = [
            (link, other.get(kind))
            for links, other in zip(held, order, strict=True)
            for kind, link in links.items()
        ]
        made = [
            with_fields(one, stored=other.stored, ways=((Way(()),),), grounds="names", fact="")
            for one, other in pairs
            if other and other.source.shape == one.target.shape and one.levels == other.levels
        ]
        if len(made) == len(pairs):
            yield made


def _tie(parts: Sequence[Sequence[Link]], orders: Iterable[Sequence[Link]]) -> Tie:
    """Returns the question in which order parts are meant; last, whether they are transposed by name."""
    named = tuple(itertools.chain(*parts))
    return Tie(
        wanted=tuple(dict.fromkeys(part_of(link.target) for link in named)),
        stored=tuple(dict.fromkeys(part_of(link.source) for link in named)),
        readings=(*map(tuple, orders), named),
    )


# What a program computes one after another.


def modules_by_size(free: Sequence[Leaf], above: int) -> BySize:
    """Returns the modules with a number, and a U-Net's middle, each with its place: the outer ones first."""
    below: dict[Names, list[Leaf]] = defaultdict(list)
    found: dict[int, list[tuple[int, Names, list[Leaf]]]] = defaultdict(list)
    for leaf in free:
        counted = counted_levels(leaf.names, above)
        for (template, _), number in counted:
            is_alone = template[-1] == PLACE  # Else the name is as it was.
            below[(*template[:-1], str(number)) if is_alone else leaf.names[: len(template)]].append(leaf)
        at = next((at for at in range(above, len(leaf.names) - 1) if _is_middle(leaf.names[at])), None)
        if at is not None and all(len(template) > at + 1 for (template, _), _ in counted):
            below[leaf.names[: at + 1]].append(leaf)
    for at, names in enumerate(sorted(below, key=len)):
        found[sizes_of(below[names])].append((at, names, below[names]))
    return found


@functools.lru_cache(maxsize=65536)
def _is_middle(name: str) -> bool:
    return not {"mid", "middle", "bottleneck"}.isdisjoint(meanings(name))


# Whether another module may be meant.


def pairs_beside(
    scores: Mapping[tuple[int, int], float],
    wanted: Sequence[tuple[Names, Sequence[int]]],
    stored: Sequence[tuple[Names, Sequence[int]]],
) -> list[tuple[int, int]]:
    """Returns the best pairs of lists; of lists that are as large, those that lie beside known ones.

    Where `transformer/decoder` is `decoder`, nothing but its name says so much as that `transformer/encoder`
    is `encoder`. Where names alone tell something else, neither is told.

    Args:
        scores: How well pairs fit.
        wanted: What leads into each wanted list, and how large its layers are.
        stored: The same of the stored lists.
    """
    best = best_pairs(scores)
    equal = {(at, to) for at, to in scores if wanted[at][1] == stored[to][1]}
    counts = [Counter(pair[side] for pair in equal) for side in (0, 1)]
    alone = {(at, to) for at, to in equal if counts[0][at] == counts[1][to] == 1}
    around = {(at, to): _around(wanted[at][0], stored[to][0]) for at, to in equal if len(alone) < len(equal)}
    known = {place for pair in alone & around.keys() for place in around[pair]}
    beside = {pair for pair, places in around.items() if pair not in alone and not known.isdisjoint(places)}
    if not beside:
        return best
    told = best_pairs({pair: score + _BESIDE * (pair in beside) for pair, score in scores.items()})
    forth, back = dict(best), {to: at for at, to in best}
    return [(at, to) for at, to in told if forth.get(at, to) == to and back.get(to, at) == at]


_BESIDE = 2.0
"""Of a list that lies beside another one on both sides."""


def _around(one: Names, other: Names) -> set[tuple[Names, ...]]:
    """Returns what stands around each name that two paths share."""
    return {
        (one[:at], one[at + 1 :], other[:to], other[to + 1 :])
        for (at, name), (to, own) in itertools.product(enumerate(one), enumerate(other))
        if PLACE not in name and words(name) == words(own)
    }


def _with_siblings(found: Findings) -> Findings:
    """Returns what is known, asked where a network has gone elsewhere than one beside it.

    Where `decoder` is `vae/decoder`, `encoder` beside it may as well be `vae/encoder` as a lone `encoder`.
    """
    led = defaultdict[tuple[Names, Names], list[Link]](list)
    for link in found.links:
        for pair in itertools.product(_networks(part_of(link.target)), _networks(part_of(link.source))):
            led[pair].append(link)
    held = [Counter(x for link in found.links for x in _networks(part_of(end(link)))) for end in _ENDS]
    whole = [x for x, links in led.items() if len(links) == held[0][x[0]] == held[1][x[1]]]
    sources, homes, ties, gone = dict(whole), {other: one for one, other in whole}, [*found.ties], set[int]()
    beside = defaultdict[Names, list[Names]](list)
    for source in homes:
        beside[source[:-1]].append(source)
    kept = dict.fromkeys((one[:-1], other[:-1]) for one, other in whole if one[-1] == other[-1])
    for above, other in kept:
        for source in beside[other]:
            into = *above, source[-1]
            if into not in sources or (into, source) in led:
                continue
            now = [*led[into, sources[into]], *led[homes[source], source]]
            if gone.isdisjoint(map(id, now)):
                gone.update(map(id, now))
                exchanged = _exchanged_networks(now, source, sources[into])
                ties.append(_tie([now], filter(None, [exchanged])))
    return dataclasses.replace(found, links=[x for x in found.links if id(x) not in gone], ties=ties)


def _exchanged_networks(links: Sequence[Link], one: Names, other: Names) -> list[Link]:
    """Returns links with two networks in each other's place; none where these do not hold the same."""
    leaves = {leaf.names: leaf for link in links for leaf in link.stored}
    made = list[Link]()
    for link in links:
        now, into = (one, other) if link.source.names[: len(one)] == one else (other, one)
        stored = [leaves.get((*into, *leaf.names[len(now) :])) for leaf in link.stored]
        if [x and x.shape for x in stored] != [x.shape for x in link.stored] or link.layers is not None:
            return []
        levels = tuple((at + len(into) - len(now), to) for at, to in link.levels)
        made.append(with_fields(link, stored=tuple(stored), levels=levels))
    return made


_ENDS = operator.attrgetter("target"), operator.attrgetter("source")


@functools.lru_cache(maxsize=65536)
def _networks(names: Names) -> Sequence[Names]:
    """Returns the modules around a part that are in no list."""
    plain = itertools.takewhile(
        lambda name: not is_index(name) and levels((name,))[0].number is None, names[:-1]
    )
    return [names[: at + 1] for at, _ in enumerate(plain)]


# Questions that are one.


def as_one(several: Iterable[Sequence[Sequence[Link]]]) -> list[Sequence[Sequence[Link]]]:
    """Returns possible readings, those as one that say the same of blocks of one kind.

    Lone ones of the parts of a module, or of one part in several layers, are one.
    """
    groups: dict[object, list[dict[object, Sequence[Link]]]] = defaultdict(list)
    for at, readings in enumerate(several):
        said, count = _said_by(readings), len(readings)
        is_told = len({*said}) == count > 1
        key, each = (frozenset(said), said) if is_told else (at, range(count))
        key = _module_alone(readings[0]) or at if count == 1 else key
        groups[key].append(dict(zip(each, readings, strict=True)))
    return [[[link for x in group for link in x[each]] for each in group[0]] for group in groups.values()]


def _module_alone(reading: Sequence[Link]) -> object:
    """Returns the modules that a part alone and its source lie in; of parts of layers, and models, these."""
    pairs = {(part_of(link.target), part_of(link.source)) for link in reading}
    ends = next(iter(pairs)) if len(pairs) == 1 else ()
    is_module = bool(ends) and all(x[:-1] and levels(x[:-1])[-1].number is None for x in ends)
    return tuple((plain_names(x[:-1]), is_module or x[-1:]) for x in ends)


def _said_by(readings: Sequence[Sequence[Link]]) -> list[object]:
    """Returns what each reading says, whichever block it says it of."""
    ends = [{part_of(link.target): part_of(link.source) for link in reading} for reading in readings]
    back = [{other: one for one, other in pairs.items()} for pairs in ends]

    def within(names: Names, options: Sequence[Mapping[Names, Names]], other: Names) -> object:
        several = [pairs[other] for pairs in options if other in pairs]
        at = len(shared_levels(several, own=1))
        above = levels(names[:at])  # What Linen numbered is a class, the same everywhere.
        first = -1 if above and above[-1].style == "_" and above[-1].base[:1].isupper() else 0
        said = [frozenset(words("_".join(each[at:]))) for each in (names, *several)]
        told = said[0] - frozenset.intersection(*said)  # `a_p` and `b_p` as `a_g` and `b_g`.
        is_told = told or len({*several}) == len({*said}) > 1  # `p` and `p_b` as `g` and `g_b`.
        return tuple(level.base for level in above[first:]), told if is_told else names[at:]

    return [
        frozenset((within(one, back, other), within(other, ends, one)) for one, other in pairs.items())
        for pairs in ends
    ]


def exchanged(
    best: Iterable[tuple[int, int]],
    homes: Mapping[tuple[int, int], tuple[Names, Names]],
    told: Set[tuple[Names, Names]],
) -> Iterator[frozenset[tuple[int, int]]]:
    """Yields best pairs by which a told module takes a part and gives one away; beside them, one within."""
    outer = [pair for pair in best if homes[pair] not in told]
    given = {to for _, to in outer}
    inner = [pair for pair, home in homes.items() if pair[1] in given and home in told]
    yield from (frozenset((pair, other)) for pair in outer for other in inner if pair[0] == other[0])


def left_open(
    ties: Iterable[Tie], covered: Set[Path], used: Set[tuple[Path, Names]], told: Turns
) -> Iterator[list[Sequence[Link]]]:
    """Yields the readings of ties that nothing speaks against, squares turned as others of the model."""
    for tie in ties:
        readings = [
            simplest(reading, told)
            for reading in tie.readings
            if covered.isdisjoint(leaf.source for link in reading for leaf in link.wanted)
            and used.isdisjoint(one.part for link in reading if not link.copied for one in link.stored)
        ]
        if len(readings) == len(tie.readings) or len(readings) > 1:
            yield [reading for reading in readings if reading]


def torn_by_name(settled: Mapping[Path, set[Path]], links: Iterable[Link], ties: Iterable[Tie]) -> set[Path]:
    """Returns leaves that names alone find, of modules of which the rest is, or may be, another module.

    No module is made of two: of a `linear1` a `bias` is called the same on both sides, a `kernel` is not.

    Args:
        settled: What names alone find, with what it is made of.
        links: What a search finds.
        ties: What it leaves open.
    """
    found = defaultdict[Names, list[tuple[Link, bool]]](list)
    asked = (link for tie in ties for reading in tie.readings for link in reading)
    for link, is_told in (*((x, True) for x in links), *((x, False) for x in asked)):
        found[part_of(link.target)].append((link, is_told))
    torn = set[Path]()
    for some in found.values() if settled else ():
        paths = {leaf.source for link, _ in some for leaf in link.wanted}
        named = [
            (link, is_told, settled[path])
            for link, is_told in some
            if (path := link.target.source) in settled
        ]
        differ = [(own.isdisjoint(x.source for x in link.stored), is_told) for link, is_told, own in named]
        if not paths <= settled.keys() and (False, True) not in differ and any(each for each, _ in differ):
            torn |= paths
    return torn


# Leaves under other names.


def as_they_lie(found: Findings, own: Owners) -> Findings:
    """Returns what is known of leaves under other names as that of their own, given by those."""

    def seat(leaf: Leaf, at: int) -> int:
        _, moved, more = own.get(leaf.part, (leaf, dict[int, int](), 0))
        return moved.get(at, at + more if at > max(moved, default=at) else at)

    def lying(leaf: Leaf) -> Leaf:
        first, *_ = own.get(leaf.part, (leaf,))
        is_same = (first.shape, first.collection) == (leaf.shape, leaf.collection)
        return first if is_same else with_fields(leaf, names=first.names)

    def back(links: Sequence[Link]) -> list[Link]:
        levels = ([(seat(x.source, at), seat(x.target, to)) for at, to in x.levels] for x in links)
        return [
            with_fields(
                link,
                wanted=tuple(map(lying, link.wanted)),
                stored=tuple(map(lying, link.stored)),
                levels=tuple(pair for pair in pairs if min(pair) >= 0),
            )
            for link, pairs in zip(links, levels, strict=True)
        ]

    plain = found.mapped(back)
    ties = [
        dataclasses.replace(
            tie,
            wanted=tuple(dict.fromkeys(part_of(x.target) for each in tie.readings for x in each)),
            stored=tuple(dict.fromkeys(part_of(x.source) for each in tie.readings for x in each)),
        )
        for tie in plain.ties
    ]
    return Findings(links=plain.links, ties=ties)
