"""The layers of one module in the order in which it runs them, read from names that carry no common group.

Programs that scan blocks of unlike layers do not call the scan what they call the single layers:

    flat       P/layers_3/rest                   one layer, numbered
    scan       P/scanned_blocks/layers_1/rest    its place in a block, and an axis that counts the cycles
               P/scanned_blocks/local_layers/rest   the same without a number, maybe with a second axis
    remainder  P/layers_remainder/.../rest       what is left over after the last cycle

A scan is known by the word in its name, a member by its last word, which is what the layers are called.

Along which axes the members of a section are stacked, from the shapes of single layers.
"""

import dataclasses
import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.paths import Tokens, is_number
from orbax_nnx_handler.planning.core.recipes import Index, Recipe, Stack
from orbax_nnx_handler.planning.rules.entries import Entry

Kind = Literal["flat", "scan", "remainder"]
Rest = tuple[str | None, Tokens]
"""A collection and the path below one layer."""

_REMAINDER = "_remainder"


@dataclasses.dataclass(frozen=True)
class Part:
    """A leaf of either side that no other evidence has placed."""

    tokens: Tokens
    shape: Shape
    collection: str | None
    entry: Entry | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
    """One layer, or the layers that are stacked in one place of a section.

    Attributes:
        name: Its name below the section; empty where the section is the member.
        number: Its number below the section, if it has one.
        parts: Its leaves.
    """

    name: str
    number: int | None
    parts: Mapping[Rest, Part]


@dataclasses.dataclass(frozen=True, eq=False)
class LayerRun:
    """Layers of one side that follow each other.

    Attributes:
        kind: How they are written.
        name: The module that holds them, or the name that they share.
        members: The members by name and number.
    """

    kind: Kind
    name: str
    members: tuple[Member, ...]

    def orders(self) -> Iterator[tuple[Member, ...]]:
        """Yields every order of the members that their names allow."""
        runs = [
            tuple(run)
            for _, run in itertools.groupby(
                self.members, key=lambda m: (m.name, None if m.number is not None else id(m))
            )
        ]
        for order in itertools.permutations(runs):
            yield tuple(itertools.chain.from_iterable(order))

    @property
    def whole(self) -> bool:
        """Tells whether no number is left out within a block or a remainder."""
        numbers: dict[str, list[int]] = defaultdict(list)
        for member in self.members:
            if member.number is not None:
                numbers[member.name].append(member.number)
        return self.kind == "flat" or all(found == list(range(len(found))) for found in numbers.values())


def parents(parts: Iterable[Part]) -> set[Tokens]:
    """Returns the paths of the modules that hold a scan or a remainder."""
    return {
        part.tokens[:at]
        for part in parts
        for at, token in enumerate(part.tokens[:-1])
        if _container(token) is not None
    }


def nouns(parts: Iterable[Part], parent: Tokens) -> set[str]:
    """Returns the words that the single layers below a parent may be called by."""
    found: set[str] = set()
    for part in parts:
        below = _below(part, parent)
        if len(below) > 2 and is_number(below[1]):
            found |= set(_words(below[0])) if _is_class(below[0]) else {_words(below[0])[-1]}
    return found


def sections(parts: Iterable[Part], parent: Tokens, noun: str) -> list[LayerRun]:
    """Returns the sections of one side below a parent.

    Args:
        parts: The side's leaves.
        parent: The module that runs the layers.
        noun: The singular of what the layers are called.
    """
    found: dict[tuple[Kind, str], dict[tuple[str, int | None], dict[Rest, Part]]] = {}
    for part in parts:
        seat = _seat(_below(part, parent), noun)
        if seat is not None:
            kind, section, name, number, rest = seat
            members = found.setdefault((kind, section), {})
            members.setdefault((name, number), {})[part.collection, rest] = part
    return [LayerRun(kind, name, _members(members)) for (kind, name), members in found.items()]


def _members(found: Mapping[tuple[str, int | None], Mapping[Rest, Part]]) -> tuple[Member, ...]:
    ordered = sorted(found, key=lambda key: (key[0], -1 if key[1] is None else key[1]))
    return tuple(Member(name, number, found[name, number]) for name, number in ordered)


def _below(part: Part, parent: Tokens) -> Tokens:
    return part.tokens[len(parent) :] if part.tokens[: len(parent)] == parent else ()


def _seat(below: Sequence[str], noun: str) -> tuple[Kind, str, str, int | None, Tokens] | None:
    """Returns the section, the member's name and number, and the path below the layer."""
    if len(below) < 2:
        return None
    name, rest = below[0], tuple(below[1:])
    if is_number(rest[0]):
        called = noun in _words(name) if _is_class(name) else _ends_in(name, noun)
        return ("flat", name, "", int(rest[0][1:]), rest[1:]) if called and rest[1:] else None
    kind = _container(name)
    if kind is None:
        return None
    if len(rest) > 2 and is_number(rest[1]):
        return (kind, name, rest[0], int(rest[1][1:]), rest[2:]) if _ends_in(rest[0], noun) else None
    if len(rest) > 1 and _ends_in(rest[0], noun):
        return kind, name, rest[0], None, rest[1:]
    return (kind, name, "", None, rest) if _ends_in(name, noun) else None


def _container(name: str) -> Kind | None:
    if name.endswith(_REMAINDER) and name != _REMAINDER:
        return "remainder"
    return "scan" if not {"scan", "scanned"}.isdisjoint(_words(name)) else None


def _ends_in(name: str, noun: str) -> bool:
    return _words(name)[-1:] == [noun]


def _is_class(name: str) -> bool:
    """Tells whether Flax made the name from a class: `DecoderLayer_0`."""
    return name[:1].isupper()


def _words(name: str) -> list[str]:
    """Returns the words of a name, in the singular: `local_layers` and `LocalLayer` are local, layer."""
    return [word.lower().removesuffix("s") for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]


Bases = Mapping[Rest, set[Shape]]
"""The shapes that one layer's leaves may have."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StackAxes:
    """How the leaves of one member and one collection hold their layers.

    Attributes:
        outer: The axis that counts the cycles, or None.
        inner: The axis that counts the layers of one cycle once the outer axis is gone, or None.
        cycles: How many cycles; 1 without that axis.
        layers: How many layers a cycle has of this member; 1 without that axis.
    """

    outer: int | None
    inner: int | None
    cycles: int
    layers: int

    def layer_shape(self, shape: Shape) -> Shape:
        """Returns the shape of one layer."""
        return _without(_without(shape, self.outer), self.inner)

    def take(self, whole: Recipe, cycle: int, layer: int) -> Recipe:
        """Returns how one layer comes out of the whole leaf."""
        part = whole if self.outer is None else Index(whole, self.outer, cycle)
        return part if self.inner is None else Index(part, self.inner, layer)

    def join(self, layers: Sequence[Recipe]) -> Recipe:
        """Returns how the whole leaf is made from its layers, cycle by cycle."""
        size = self.layers
        cycles = [_stack(layers[at : at + size], self.inner) for at in range(0, len(layers), size)]
        return _stack(cycles, self.outer)


Cuts = Mapping[tuple[int, str | None], StackAxes]
"""The cuts of a section's members, by the member's place and the collection."""


def readings(section: LayerRun, bases: Bases, said: int | None = None) -> Sequence[Cuts]:
    """Returns the ways in which the members of a section can be cut into layers.

    One scan stacks all parameters along one axis, so all members of a section share
    their outer axis and the number of cycles.

    Args:
        section: The section.
        bases: Shapes of single layers.
        said: The axis that the user says counts the cycles.
    """
    options = {
        (at, name): found
        for at, member in enumerate(section.members)
        for name in dict.fromkeys(collection for collection, _ in member.parts)
        if (found := _options(section.kind, member, name, bases, said))
    }
    if {at for at, _ in options} != set(range(len(section.members))):
        return []
    if math.prod(map(len, options.values())) > _MOST:
        return []
    products = itertools.product(*options.values())
    found = [cuts for chosen in products if _agree(cuts := dict(zip(options, chosen, strict=True)))]
    # A scan within a scan of one program shares its axis; another one would be a guess.
    alike = [cuts for cuts in found if all(cut.inner in (None, cut.outer) for cut in cuts.values())]
    return alike or found


_MOST = 4096
"""Readings looked at; shapes that leave more than that open tell nothing."""


def _options(
    kind: Kind, member: Member, collection: str | None, bases: Bases, said: int | None
) -> list[StackAxes]:
    """Returns the cuts that most leaves of a member allow."""
    votes: Counter[StackAxes] = Counter()
    for rest, part in member.parts.items():
        if rest[0] == collection:
            votes.update({cut for base in bases.get(rest, ()) for cut in _cuts(kind, part.shape, base)})
    allowed = {cut: count for cut, count in votes.items() if None in (said, cut.outer) or cut.outer == said}
    return [cut for cut, count in allowed.items() if count == max(allowed.values())]


def _cuts(kind: Kind, shape: Shape, base: Shape) -> Iterable[StackAxes]:
    extra = len(shape) - len(base)
    outers: Iterable[int | None] = range(len(shape)) if kind == "scan" and extra else (None,)
    for outer in outers:
        left = _without(shape, outer)
        inners: Iterable[int | None] = range(len(left)) if len(left) > len(base) else (None,)
        for inner in inners:
            cut = StackAxes(
                outer=outer,
                inner=inner,
                cycles=1 if outer is None else shape[outer],
                layers=1 if inner is None else left[inner],
            )
            if cut.layer_shape(shape) == base and (kind != "flat" or not extra):
                yield cut


def _agree(cuts: Cuts) -> bool:
    if len({cut.cycles for cut in cuts.values()}) > 1:
        return False
    outers: dict[str | None, set[int | None]] = {}
    layers: dict[int, set[int]] = {}
    for (member, collection), cut in cuts.items():
        outers.setdefault(collection, set()).add(cut.outer)
        layers.setdefault(member, set()).add(cut.layers)
    return all(len(found) == 1 for found in itertools.chain(outers.values(), layers.values()))


def _stack(parts: Sequence[Recipe], axis: int | None) -> Recipe:
    return parts[0] if axis is None else Stack(tuple(parts), axis)


def _without(shape: Shape, axis: int | None) -> Shape:
    return shape if axis is None else (*shape[:axis], *shape[axis + 1 :])
