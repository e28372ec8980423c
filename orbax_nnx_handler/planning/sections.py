"""The layers of one module in the order in which it runs them, read from names that carry no common group.

Programs that scan blocks of unlike layers do not call the scan what they call the single layers:

    flat       P/layers_3/rest                   one layer, numbered
    scan       P/scanned_blocks/layers_1/rest    its place in a block, and an axis that counts the cycles
               P/scanned_blocks/local_layers/rest   the same without a number, maybe with a second axis
    remainder  P/layers_remainder/.../rest       what is left over after the last cycle

A scan is known by the word in its name, a member by its last word, which is what the layers are called.
"""

import dataclasses
import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

from orbax_nnx_handler.planning.entries import Entry
from orbax_nnx_handler.planning.layers import Tokens
from orbax_nnx_handler.planning.leaves import Shape
from orbax_nnx_handler.planning.paths import is_number

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
class Section:
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


def sections(parts: Iterable[Part], parent: Tokens, noun: str) -> list[Section]:
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
    return [Section(kind, name, _members(members)) for (kind, name), members in found.items()]


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
