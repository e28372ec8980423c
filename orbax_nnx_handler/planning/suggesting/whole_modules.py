"""What is told of whole modules: renames of many, whether one's matrices are transposed, which one is meant.

`('kernel', 'weight')`, and `('{x}_dense', 'net/{x}_linear')` for `up_dense`, `down_dense` and all
others: one rule where each module would have one.
"""

import dataclasses
import functools
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

from orbax_nnx_handler.planning.core.leaves import Shape, with_fields
from orbax_nnx_handler.planning.core.paths import Path, canonical, is_index, segments
from orbax_nnx_handler.planning.core.recipes import Read
from orbax_nnx_handler.planning.likeness.links import Findings, Link, Move, Tie, alike, differing
from orbax_nnx_handler.planning.likeness.module_parts import Leaf, part_of
from orbax_nnx_handler.planning.likeness.shapes import Way
from orbax_nnx_handler.planning.likeness.vocabulary import PYTORCHS, Names, concepts, exclude
from orbax_nnx_handler.planning.rules import Rename
from orbax_nnx_handler.planning.rules.entries import Entries
from orbax_nnx_handler.planning.rules.rule import compiled
from orbax_nnx_handler.planning.verdict.outcomes import Verdict

Renamed = tuple[Names, Names]
"""The segments that a rename is for, and what they become."""

_MANY = 24
"""So many modules are rather renamed at once than one by one."""
_PLACES = ("{x}", "{y}", "{z}")


def of_leaves(moves: Sequence[Move]) -> Iterator[Renamed]:
    """Yields what many modules call a leaf, with what the wanted ones call it: `kernel`, `weight`."""
    return _shared(moves, lambda move: (move.names[-1:], move.aim[-1:]))


def of_modules(moves: Sequence[Move]) -> Iterator[Renamed]:
    """Yields renames of many modules, with places for what tells these apart: `{x}_dense`, `{x}_linear`."""
    others = [move for move in moves if not alike(move.names, move.aim)]
    return _shared(others, lambda move: _with_places(*differing(move)))


def _shared(moves: Sequence[Move], renamed: Callable[[Move], Renamed]) -> Iterator[Renamed]:
    groups = {(differing(move), renamed(move)) for move in moves}
    for (stored, wanted), count in Counter(each for _, each in groups).items():
        if stored != wanted and count > _MANY:
            yield stored, wanted


def _with_places(stored: Names, wanted: Names) -> Renamed:
    """Returns both with places for what their names have in common, where other words tell them still."""
    shared = min(len(stored), len(wanted))
    if shared > len(_PLACES) or any("{" in name for name in stored):
        return stored, wanted
    ends = stored[len(stored) - shared :], wanted[len(wanted) - shared :]
    made = [_with_place(*names) for names in zip(_PLACES, *ends, strict=False)]
    theirs = (*stored[: len(stored) - shared], *(one for one, _ in made))
    ours = (*wanted[: len(wanted) - shared], *(other for _, other in made))
    return (theirs, ours) if {*theirs}.difference(_PLACES) else (stored, wanted)


def _with_place(place: str, one: str, other: str) -> tuple[str, str]:
    """Returns two names with a place for the words that both begin or end with."""
    if one == other:
        return place, place
    if (width := _shared_words(one, other)) > 0:
        return place + one[width:], place + other[width:]
    if (width := _shared_words(one[::-1], other[::-1])) > 0:
        return one[:-width] + place, other[:-width] + place
    return one, other


def _shared_words(one: str, other: str) -> int:
    """Returns how many letters lie before the last `_` of what two names begin with."""
    shared = next((at for at, pair in enumerate(zip(one, other, strict=False)) if len({*pair}) > 1), len(one))
    return one[:shared].rfind("_")


def keeping(list_: str, entries: Entries) -> Rename | None:
    """Returns a rename that only keeps `layers/0`, which a save would join to `layers_0`."""
    rule = Rename(f"{list_}/{{i}}", f"{list_}/{{i}}")
    pattern = compiled(rule.pattern)
    near = (entries[at].segments for at in pattern.among(entries))
    spans = (span for names in near for span in pattern.spans(names))
    return rule if all(is_index(span.bindings["i"]) for span in spans) else None


# Whether the matrices of a module are transposed.

_FEW = 6
"""Of up to so many matrices of a module every order is tried."""


def with_modules_unturned(found: Findings, wanted: Iterable[Leaf], stored: Iterable[Leaf]) -> Findings:
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


# Whether another module may be meant.


def is_rivalled(verdict: Verdict) -> bool:
    """Tells whether a module that nothing wants holds what one does that is wanted, and may be meant.

    An average of the weights, an older copy of them, a layer more. Of what is wanted by its own name, one
    that is counted with it, or called its opposite, is none.
    """
    # Without their numbers: of a list there are few names, however long it is.
    taken = defaultdict[tuple[tuple[Path, Path], Shape], set[tuple[str, bool]]](set)
    for path, item in verdict.restored.items() if verdict.unexpected else ():
        source, called = item.recipe.path if isinstance(item.recipe, Read) else (), canonical(path)
        for at, others in _levels(source):
            is_own = {*canonical(names := segments(source)[at : at + 1])} <= {*called}
            taken[others, item.wanted.shape].add((_unnumbered(*names), is_own))
    rivals = defaultdict[Path, list[set[str]]](list)
    for path, leaf in verdict.unexpected.items() if any(taken.values()) else ():
        for at, others in _levels(path):
            name = _unnumbered(segments(path)[at])
            some = {x for x, is_own in taken[others, leaf.shape] if not is_own or _may_be(name, x)}
            rivals[path[: at + 1]].append(some)
    return any(names[0].intersection(*names[1:]) for names in rivals.values())


def _may_be(name: str, own: str) -> bool:
    return name != own and not exclude(concepts([name]), concepts([own]))


def _levels(path: Path) -> list[tuple[int, tuple[Path, Path]]]:
    """Returns the levels of modules in a path, each with what stands before and behind it."""
    keys = segments(path)
    return [(at, (keys[:at], keys[at + 1 :])) for at in range(1, len(keys) - 1)]


@functools.lru_cache(maxsize=65536)
def _unnumbered(name: str) -> str:
    return re.sub(r"\d+", "", name)
