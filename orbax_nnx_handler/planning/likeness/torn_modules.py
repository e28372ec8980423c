"""Links that would tear a module: parts that lie together on both sides, and would not under them.

Such links are asked about. What one module holds alone in another one, what two modules would have of each
other, and what goes elsewhere though there is a module of its name.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.paths import levels, shared_levels
from orbax_nnx_handler.planning.likeness import called_alike, share_word
from orbax_nnx_handler.planning.likeness.links import Link
from orbax_nnx_handler.planning.likeness.module_parts import ModulePart, part_of
from orbax_nnx_handler.planning.likeness.vocabulary import Names, counts_of

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
