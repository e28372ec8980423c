"""What a proposal leaves open, as questions: which part is which, how an array is made, what is turned.

Then ties as one question, and the ways to pair some parts that become its answers.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Literal

from orbax_nnx_handler.planning.core.folding import Row, fold, fold_names, list_paths
from orbax_nnx_handler.planning.core.paths import Path, natural_key, shared_levels
from orbax_nnx_handler.planning.likeness.links import Findings, Link, Tie, readings_of
from orbax_nnx_handler.planning.likeness.module_parts import Leaf, part_of
from orbax_nnx_handler.planning.likeness.vocabulary import (
    Names,
    component,
    concepts,
    counts_of,
    exclude,
    likeness,
    meanings,
    order_word,
    words,
)
from orbax_nnx_handler.planning.rules import Rule
from orbax_nnx_handler.planning.suggesting.link_groups import by_module, outermost_apart
from orbax_nnx_handler.planning.suggesting.unlike_names import why_unlike

About = Literal["which", "how", "transposed"]

CHOICES = 6  # How many answers to a question are printed.
_MOST_READINGS = 24  # All orders of four parts; of more parts, not every order can be chosen.
_SHOWN, _FEW, _ENDS = 4, 5, {"src": "enc", "tgt": "dec"}  # An encoder has what is of the source.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """Leaves that names, order and shapes leave open.

    Attributes:
        wanted: The wanted leaves that the answer is about.
        stored: The stored leaves that they could be made from.
        parts: The stored and the wanted modules that it is about; the leaf itself where it is about one of
            several that a module has.
        about: What is open: which part is which, how one array holds several, or whether a square matrix is
            transposed.
        choices: Each possible answer in words.
        orders: How many orders the shapes allow where they allow every one; 0 where they do not.
        settle: Returns the rules with this one question answered, by the number of the choice.
    """

    wanted: tuple[Path, ...]
    stored: tuple[Path, ...]
    parts: tuple[tuple[Path, ...], tuple[Path, ...]]
    about: About
    choices: tuple[str, ...]
    orders: int = 0
    settle: Callable[[int], tuple[Rule, ...]] = dataclasses.field(repr=False, compare=False)

    @cached_property
    def alternatives(self) -> tuple[tuple[Rule, ...], ...]:
        """For each answer the complete list of rules, this one question settled; written when asked for."""
        return tuple(map(self.settle, range(len(self.choices))))

    @property
    def lines(self) -> Iterator[str]:
        """The question, and its first answers by number."""
        yield f"question: {self}"
        yield from (f"    {at}: {choice}" for at, choice in enumerate(self.choices[:CHOICES]))
        more = max(len(self.choices), self.orders) - CHOICES
        if more > 0:
            cut = f", {len(self.choices)} of all by number" if self.orders > len(self.choices) else ""
            yield f"    ... and {more} more{cut}"

    def __str__(self) -> str:
        stored, wanted = map(parts_in_words, self.parts)
        verb = "is" if len(self.parts[0]) == 1 else "are"
        if self.about == "transposed":
            into = f" for {wanted}" if wanted != stored else ""
            return f"{verb} {stored} transposed{into}? Shapes allow both."
        if len(self.choices) == 1:
            why, sides = why_unlike(self.wanted[0], self.stored[0]), map(_folded, self.parts)
            return f"{verb} {' meant by '.join(map(', '.join, sides))}? Shapes allow it, {why}."
        if self.about == "how":
            return f"how {verb} {stored} made into {wanted}? Shapes allow several ways."
        if len(self.parts[1]) == 1 and len(self.parts[0]) > 1:
            return f"which of {stored} is {wanted}? The shapes allow each."
        allowed = "every order" if self.orders else "both" if len(self.choices) == 2 else "several orders"
        return f"which of {stored} is which of {wanted}? The shapes allow {allowed}."


def parts_in_words(paths: Sequence[Path]) -> str:
    """Returns paths in full where they are few; where they are many, numbers and names folded."""
    return list_paths(paths) if len(paths) < _FEW else ", ".join(_folded(paths))


def _folded(paths: Iterable[Path]) -> list[str]:
    return [line.text for line in fold_names(fold(Row(path=path) for path in dict.fromkeys(paths)))]


Sizes = tuple[Mapping[Names, int], Mapping[Names, int]]
"""How many leaves the stored and the wanted modules have."""


def held_by(stored: Iterable[Leaf], wanted: Iterable[Leaf]) -> Sizes:
    """Returns how many leaves the modules of both sides have, by which a question names a leaf or all."""
    return Counter(map(part_of, stored)), Counter(map(part_of, wanted))


@dataclasses.dataclass(frozen=True)
class Choice:
    """A choice that nothing has made, with the possible readings."""

    about: About
    readings: tuple[tuple[Link, ...], ...]

    def question(self, settle: Callable[[Sequence[Link]], tuple[Rule, ...]], sizes: Sizes) -> Question:
        """Returns the question which reading is right.

        Args:
            settle: Writes the rules with the links of one reading.
            sizes: How many leaves the modules have.
        """
        links = [link for reading in self.readings for link in reading]
        wanted = {leaf.part: leaf for link in links for leaf in link.wanted}
        stored = {leaf.part: leaf for link in links for leaf in link.stored}
        stored = dict(sorted(stored.items(), key=lambda item: natural_key(item[1].names)))
        is_whole = self.about != "transposed"
        names = [
            _called(leaves.values(), held if is_whole else {})
            for leaves, held in zip((stored, wanted), sizes, strict=True)
        ]
        parts = tuple(dict.fromkeys(names[0].values())), tuple(dict.fromkeys(names[1].values()))
        return Question(
            wanted=tuple(dict.fromkeys(leaf.source for leaf in wanted.values())),
            stored=tuple(dict.fromkeys(leaf.source for leaf in stored.values())),
            parts=parts,
            about=self.about,
            choices=self._in_words({**names[0], **names[1]}),
            orders=self._orders(parts, wanted.values(), stored.values()),
            settle=lambda answer: settle(self.readings[answer]),
        )

    def _orders(self, parts: Sequence[Sequence[Path]], wanted: Iterable[Leaf], stored: Iterable[Leaf]) -> int:
        """Returns the number of orders of the parts, or of a block's, where every one is possible; else 0."""
        count = math.factorial(min(len(parts[0]), 20))
        if self.about != "which" or len(parts[0]) != len(parts[1]) or len(self.readings) < 2:
            return 0
        if len(self.readings) == count:
            return count
        pairs = {(x.target.source, x.source.source) for reading in self.readings for x in reading}
        count = _MOST_READINGS if {*Counter(one for one, _ in pairs).values()} == {4} else count
        is_some = len(self.readings) == _MOST_READINGS <= count
        return count if is_some and _are_alike(wanted) and _are_alike(stored) else 0

    def _in_words(self, names: "_Called") -> tuple[str, ...]:
        """Returns each reading in words: its rules are for the machine."""
        if self.about == "which":
            return _pairs_in_words(self.readings, names)
        if self.about == "transposed":
            return tuple("transposed" if is_turned(reading) else "as it is" for reading in self.readings)
        orders = {each[0].parts for each in self.readings}
        return tuple(_way_in_words(reading[0], with_order=len(orders) > 1) for reading in self.readings)


def of_turns(turns: Iterable[Link]) -> Iterator[Choice]:
    """Yields whether square matrices are transposed, those of one name in all layers as one question."""
    for group in by_module(turns).values():
        plain, turned = zip(*map(readings_of, group), strict=True)
        yield Choice("transposed", (plain, turned))


_Called = Mapping[tuple[Path, Names], Names]
"""What a question calls each leaf, or the module that it is of."""


def _called(leaves: Iterable[Leaf], held: Mapping[Names, int]) -> _Called:
    """Returns what a question calls its leaves: their module where it is about all of its leaves.

    Where two collections hold a leaf of one path, the collection stands before it.
    """
    every = list(leaves)
    asked = Counter(map(part_of, every))
    sources: dict[Names, set[Path]] = {}
    for leaf in every:
        sources.setdefault(leaf.names, set()).add(leaf.source)
    twice = {part_of(leaf) for leaf in every if len(sources[leaf.names]) > 1}

    def called(leaf: Leaf) -> Names:
        part = part_of(leaf)
        is_module = bool(part) and leaf.names[: len(part)] == part and asked[part] >= held.get(part, 1)
        names = part if is_module and held else leaf.names
        return (leaf.collection, *names) if part in twice and leaf.collection else names

    return {leaf.part: called(leaf) for leaf in every}


def _are_alike(leaves: Iterable[Leaf]) -> bool:
    """Tells whether the modules of some leaves have leaves of the same names and shapes."""
    found: dict[Names, set[object]] = {}
    for leaf in leaves:
        found.setdefault(part_of(leaf), set()).add((leaf.names[-1], leaf.shape))
    return len({frozenset(each) for each in found.values()}) == 1


def is_turned(reading: Sequence[Link]) -> bool:
    """Tells whether some links transpose a matrix, or may."""
    return any(way.turned for link in reading for ways in link.ways for way in ways)


def _way_in_words(link: Link, *, with_order: bool) -> str:
    said = link.told or ", ".join(map(str, link.ways[0][0].steps)) or "one after the other"
    return f"{said}: {', '.join(link.parts)}" if with_order else said


def _pairs_in_words(readings: Sequence[Sequence[Link]], names: _Called) -> tuple[str, ...]:
    """Returns a few pairs of parts of each reading: the first ones by which most readings differ."""

    def said(leaves: Sequence[Leaf]) -> str:
        return " + ".join(_folded(names[leaf.part] for leaf in leaves))

    def told(reading: Sequence[Link]) -> Mapping[str, str]:
        sources: dict[str, list[Leaf]] = {}
        for link in reading:  # One for each layer of a stack.
            sources.setdefault(said(link.wanted), []).extend(link.stored)
        return {wanted: said(stored) for wanted, stored in sources.items()}

    pairs = [told(reading) for reading in readings]
    shown = list[str]()
    while len(shown) < _SHOWN or len({_of(shown, each) for each in pairs}) < len(pairs):
        left = [part for part in dict.fromkeys(part for each in pairs for part in each) if part not in shown]
        if not left:
            break
        shown.append(max(left, key=lambda part: len({_of([*shown, part], each) for each in pairs})))
    named = ([part for part in each if part in shown] or list(each)[:1] for each in pairs)
    texts = (
        (each, [f"{each[at]} -> {at}" for at in parts]) for each, parts in zip(pairs, named, strict=True)
    )
    return tuple(", ".join([*parts, *["..."][: len(each) > len(parts)]]) for each, parts in texts)


def _of(parts: Iterable[str], pairs: Mapping[str, str]) -> tuple[str | None, ...]:
    return tuple(pairs.get(part) for part in parts)


_ModulePairs = frozenset[tuple[Names, Names]]


def by_modules(ties: Iterable[Tie]) -> Iterator[Tie]:
    """Yields ties; those about parts of the same modules, the outermost ones, as one: none is torn apart."""
    groups: dict[object, list[tuple[Tie, Mapping[_ModulePairs, tuple[Link, ...]]]]] = defaultdict(list)
    for tie in ties:
        readings = {_module_pairs(reading): reading for reading in tie.readings}
        sides = {tuple(map(frozenset, zip(*pairs, strict=True))) for pairs in readings}
        is_one = len(sides) == 1 and all(len(pairs) == len(tie.wanted) > 1 for pairs in readings)
        groups[next(iter(sides)) if is_one else id(tie)].append((tie, readings))
    for items in groups.values():
        shared = [pairs for pairs in items[0][1] if all(pairs in readings for _, readings in items)]
        if len(items) == 1 or len(shared) < 2:
            yield from (tie for tie, _ in items)
            continue
        yield Tie(
            wanted=tuple(names for tie, _ in items for names in tie.wanted),
            stored=tuple(names for tie, _ in items for names in tie.stored),
            readings=tuple(tuple(link for _, made in items for link in made[pairs]) for pairs in shared),
        )


def _module_pairs(reading: Iterable[Link]) -> _ModulePairs:
    parts = [(part_of(link.target), part_of(link.source)) for link in reading]
    return frozenset(zip(*map(outermost_apart, zip(*parts, strict=True)), strict=True))


def as_questions(found: Findings, odd: Mapping[Path, Link]) -> Findings:
    """Returns what is known with some links as questions, those of one part as one."""
    kept = [link for link in found.links if link.target.source not in odd]
    asked: dict[tuple[Names, Names], list[Link]] = defaultdict(list)
    for link in (x for x in odd.values() if x.layers is None):  # One layer of a stack is no answer.
        asked[part_of(link.target), part_of(link.source)].append(link)
    known = {(tie.wanted, tie.stored) for tie in found.ties}
    made = (Tie(wanted=key[:1], stored=key[1:], readings=(tuple(some),)) for key, some in asked.items())
    ties = [*found.ties, *(tie for tie in made if (tie.wanted, tie.stored) not in known)]
    return dataclasses.replace(found, links=kept, ties=ties)


def of_one_tower(found: Findings, stored: Sequence[Leaf]) -> Sequence[Leaf]:
    """Returns the stored leaves without towers of which nothing is told, where all that is comes from one.

    An image's `patch_embed` tells that `blocks` are those of `vision_model`, not of `text_model`.
    """
    asked = [link for tie in found.ties for reading in tie.readings for link in reading]
    depth = len(shared_levels([part_of(leaf) for leaf in stored], own=2)) if asked else 0
    tops = {part: part[depth] for part in map(part_of, stored if asked else ()) if len(part) > depth + 1}
    told = {part for link in found.links for part in map(part_of, link.stored) if part in tops}
    own = {tops[part] for part in told}
    for tie in found.ties:
        parts = {part_of(leaf) for reading in tie.readings for link in reading for leaf in link.stored}
        if len(told) < 2 or len(own) != 1 or len([x for x in parts if tops.get(x) in own]) < len(tie.wanted):
            return stored
    others = {tops[part] for link in asked for part in map(part_of, link.stored) if part in tops} - own
    return [leaf for leaf in stored if tops.get(part_of(leaf)) not in others]


def with_words_told(found: Findings) -> Findings:
    """Returns what is known, with what is asked as words tell that stand for each other in known parts.

    Where `embedding_h` is `node_embed` and `embedding_e` is `edge_embed`, `O_h` is `out_node`.
    """
    said = _words_told(found.links if found.ties else ())
    told = [_told_by_words(tie, said) for tie in found.ties]
    ties = [tie for tie, links in zip(found.ties, told, strict=True) if not links]
    return dataclasses.replace(found, links=[*found.links, *itertools.chain(*told)], ties=ties)


def _words_told(links: Iterable[Link]) -> Mapping[str, str]:
    """Returns wanted words with the stored ones that alone tell names of known parts apart, if always so."""
    pairs = set[tuple[str, str]]()
    for link in (x for x in links if x.grounds != "order" and x.joint is None):
        one, other = (_words_of(part_of(leaf)[-1:]) for leaf in (link.target, link.source))
        if one & other and len(one - other) == len(other - one) == 1:
            pairs.add((min(one - other), min(other - one)))
    counts = [Counter(side) for side in zip(*pairs, strict=True)]
    return {one: other for one, other in pairs if counts[0][one] == counts[1][other] == 1}


@functools.lru_cache(maxsize=1 << 16)
def _words_of(names: Names) -> frozenset[str]:
    said = (word for name in names for word in words(name) if word.isalpha())
    return frozenset(itertools.chain(*(meanings(word) or (word,) for word in said)))


def _told_by_words(tie: Tie, told: Mapping[str, str]) -> Sequence[Link]:
    """Returns the reading in which two words or more that are told say of each part that it is no other one.

    Numbers decide between parts called alike. Where not all readings are listed, nothing is told.
    """
    ends = [[(part_of(x.target), part_of(x.source)) for x in each] for each in tie.readings]
    listed = Counter(one for one, _ in {*itertools.chain(*ends)})
    if len(ends) >= _MOST_READINGS and {*listed.values()} != {4}:
        return ()
    near, marks = defaultdict[Names, set[Names]](set), dict[Names, frozenset[str]]()
    for one, other in itertools.chain(*ends):
        marks[one] = frozenset(told[word] for word in _words_of(one) & told.keys())
        if marks[one] and marks[one] == _words_of(other) & {*told.values()}:
            near[one].add(other)
    for one, others in ((one, others) for one, others in near.items() if len(others) > 1):
        near[one] = {other for other in others if counts_of("/".join(other)) == counts_of("/".join(one))}
    both = zip(tie.readings, ends, strict=True)
    fitting = [x for x, each in both if all(near[one] == {other} for one, other in each)]
    return fitting[0] if len(fitting) == 1 < min(len(ends), len({*marks.values()})) else ()


def tie_of(
    sides: tuple[Sequence[int], Sequence[int]],
    names: Sequence[Sequence[Names]],
    possible: Container[tuple[int, int]],
    links: Callable[[int, int], Sequence[Link]],
) -> Tie:
    """Returns a question about some parts of both sides, with some ways to pair them, the likeliest first.

    Args:
        sides: The parts, wanted and stored.
        names: The paths of all parts of either side.
        possible: The pairs that may be.
        links: The leaves of a pair.
    """
    some = _pairings(sides, names, possible)
    readings = [tuple(itertools.chain.from_iterable(links(*pair) for pair in pairs)) for pairs in some]
    # What names exclude may hide another reading of a few.
    if len(readings) == 1 < min(map(len, sides)):
        single = (links(*pair) for pair in itertools.product(*sides) if pair in possible)
        readings += [tuple(each) for each in single if not {*each} <= {*readings[0]}]
    ours, theirs = (tuple(some[at] for at in side) for some, side in zip(names, sides, strict=True))
    return Tie(wanted=ours, stored=theirs, readings=tuple(readings))


_Pairing = tuple[tuple[int, int], ...]


def _pairings(
    sides: tuple[Sequence[int], Sequence[int]],
    names: Sequence[Sequence[Names]],
    possible: Container[tuple[int, int]],
) -> list[_Pairing]:
    """Returns some ways in which the parts of the shorter side may each be one of the other side's.

    First those by which lists keep their order, then those of the most words and the best order in common;
    none with opposites where one without them is left.
    """
    (ours, theirs), (shorter, longer) = sides, sorted(map(len, sides))
    several = (
        tuple(sorted(zip(left, right, strict=True)))
        for left in itertools.islice(itertools.combinations(ours, shorter), _MOST_READINGS)
        for right in itertools.islice(itertools.permutations(theirs, shorter), 120)
    )
    by_lists = [*_by_lists(sides, names)]
    every = itertools.chain(by_lists, several)
    fitting = (pairs for pairs in every if all(pair in possible for pair in pairs))
    count = min(math.perm(longer, shorter), _MOST_READINGS * _FEW) if shorter <= _FEW else 2 * _MOST_READINGS
    kept = {pairs: _against(pairs, names) for pairs in itertools.islice(fitting, count + len(by_lists))}
    least = min(kept.values(), default=(0,))[0]
    scored = ((opposites, pairs not in by_lists, *rest) for pairs, (opposites, *rest) in kept.items())
    best = sorted(zip(scored, kept, strict=True), key=lambda each: each[0])
    return [pairs for (opposites, *_), pairs in best if opposites == least][:_MOST_READINGS]


def _by_lists(
    sides: tuple[Sequence[int], Sequence[int]], names: Sequence[Sequence[Names]]
) -> Iterator[_Pairing]:
    """Yields pairings of whole lists, each in the order of its numbers."""
    held: list[list[list[int]]] = []
    for parts, paths in zip(sides, ([*map("/".join, each)] for each in names), strict=True):
        lists = defaultdict[str, list[int]](list)
        for at in sorted(parts, key=lambda at: [*map(int, counts_of(paths[at]))]):
            lists[re.sub(r"\d+", "", paths[at])].append(at)
        held.append([*lists.values()])
    are_lists = len(held[0]) == len(held[1]) and min(map(len, itertools.chain(*held)), default=0) > 1
    orders = itertools.permutations(held[1] if are_lists else ())
    for several in itertools.islice(orders if are_lists else (), math.factorial(_FEW)):
        if [*map(len, several)] == [*map(len, held[0])]:
            yield tuple(sorted(zip(itertools.chain(*held[0]), itertools.chain(*several), strict=True)))


def _against(pairs: _Pairing, names: Sequence[Sequence[Names]]) -> tuple[int, float, int]:
    """Returns what speaks against a pairing: opposites, words that are not shared, and another order."""
    paths = [(names[0][at], names[1][to]) for at, to in pairs]
    said = [(concepts(one), concepts(other)) for one, other in paths]
    crossed = sum(
        _order_of(one[0], other[0]) * _order_of(one[1], other[1]) < 0
        for one, other in itertools.combinations(paths if len(paths) <= _FEW else (), 2)
    )
    near = (tuple(x | {_ENDS[word] for word in x & _ENDS.keys()} for x in pair) for pair in said)
    return sum(itertools.starmap(exclude, said)), -sum(itertools.starmap(likeness, near)), crossed


def _order_of(one: Names, other: Names) -> int:
    """Returns -1 where the first of two parts comes first by the numbers or words that differ, 1 for last."""
    names = next(((x, y) for x, y in zip(one, other, strict=False) if x != y), ("", ""))
    numbers, said = [[*map(int, counts_of(name))] for name in names], [concepts([name]) for name in names]
    places = [place for each in said if (place := component(each)) is not None]
    places = places if len(places) == 2 else [0.0, 0.0]
    numbers = numbers if len(numbers[0]) == len(numbers[1]) else [[0], [0]]
    first, last = zip(numbers, ["dec" in each for each in said], places, map(order_word, said), strict=True)
    return (first > last) - (first < last)
