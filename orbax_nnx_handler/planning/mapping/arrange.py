"""Layers that two programs hold in sections of other names, joined by their order and their shapes.

`restacking` joins groups of one name. Here names do not meet, so what is asked of the
rest is more: both sides have the same number of layers, one order of the sections and
their members lets the shapes of every layer agree, and no other order does as well.
"""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import cast

from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.paths import Path, Tokens
from orbax_nnx_handler.planning.core.recipes import Fill, Recipe
from orbax_nnx_handler.planning.mapping.layers import Group
from orbax_nnx_handler.planning.mapping.restack import Restacked, UnclearAxis, said_axis
from orbax_nnx_handler.planning.mapping.sections import (
    Bases,
    Cuts,
    LayerRun,
    Member,
    Part,
    Rest,
    StackAxes,
    nouns,
    parents,
    readings,
    sections,
)
from orbax_nnx_handler.planning.rules.entries import Entry


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnclearOrder:
    """Sections whose layers can follow each other in several orders.

    Attributes:
        parent: The module that runs the layers.
        names: The sections and members in question, as paths below the parent.
        tokens: The wanted leaves, below the model's root.
        paths: The same as the target has them.
    """

    parent: Tokens
    names: tuple[str, ...]
    tokens: tuple[Tokens, ...]
    paths: tuple[Path, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arranged:
    """What the sections of all modules give.

    Attributes:
        found: How wanted leaves are made, by canonical wanted path.
        unclear: Sections whose order, or whose stacked axis, the shapes leave open.
        groups: The stacked sections that were compared, by canonical path.
    """

    found: Mapping[Tokens, Restacked] = dataclasses.field(default_factory=dict[Tokens, Restacked])
    unclear: tuple[UnclearOrder | UnclearAxis, ...] = ()
    groups: frozenset[Tokens] = frozenset()


@dataclasses.dataclass(frozen=True, eq=False)
class _Layer:
    """One layer in one reading of its side."""

    member: Member
    cuts: Mapping[str | None, StackAxes]
    cycle: int
    layer: int

    def shapes(self) -> dict[Rest, Shape]:
        return {
            rest: self.cuts[rest[0]].layer_shape(part.shape)
            for rest, part in self.member.parts.items()
            if rest[0] in self.cuts
        }

    @property
    def place(self) -> tuple[int, int, int]:
        return id(self.member), self.cycle, self.layer

    @property
    def axes(self) -> tuple[StackAxes, ...]:
        return tuple(self.cuts.values())


_Run = tuple[_Layer, ...]
_Pairs = list[tuple[_Layer, _Layer]]


def arrange(wanted: Sequence[Part], stored: Sequence[Part], axes: Mapping[Tokens, int]) -> Arranged:
    """Finds wanted leaves that can be made from stored layers in sections of other names.

    Args:
        wanted: The wanted leaves that nothing else has placed.
        stored: The stored leaves that nothing else has used.
        axes: The stacked axis that the user says, by the section's canonical path.
    """
    found: dict[Tokens, Restacked] = {}
    unclear: list[UnclearOrder | UnclearAxis] = []
    groups: set[Tokens] = set()
    for parent in sorted(parents(wanted) | parents(stored)):
        for noun in sorted(nouns(wanted, parent) | nouns(stored, parent)):
            sides = (sections(wanted, parent, noun), sections(stored, parent, noun))
            if not all(map(_readable, sides)):
                continue
            groups |= {(*parent, part.name) for side in sides for part in side if part.kind != "flat"}
            made = _Join(parent, *sides, axes).solve()
            if isinstance(made, dict):
                found |= made
            else:
                unclear.append(made)
    return Arranged(found=found, unclear=tuple(unclear), groups=frozenset(groups))


@dataclasses.dataclass(frozen=True)
class _Join:
    """The sections of one module on both sides."""

    parent: Tokens
    wanted: Sequence[LayerRun]
    stored: Sequence[LayerRun]
    axes: Mapping[Tokens, int]

    def solve(self) -> dict[Tokens, Restacked] | UnclearOrder | UnclearAxis:
        best = self._best()
        if not best:
            return {}
        if len({_order(pairs) for pairs in best}) > 1:
            return self._unclear()
        if len({_order(pairs, with_axes=True) for pairs in best}) > 1:
            return self._unclear_axis(best)
        return _made(best[0])

    def _best(self) -> list[_Pairs]:
        """Returns the pairings of layers under which the most leaves agree."""
        best: list[_Pairs] = []
        most = 1
        bases = self._bases()
        for left, right in itertools.product(self._runs(self.wanted, bases), self._runs(self.stored, bases)):
            pairs = list(zip(left, right, strict=False))
            score = _agreeing(pairs) if len(left) == len(right) else 0
            if score > most:
                best, most = [], score
            if score == most:
                best.append(pairs)
        return best

    def _runs(self, side: Sequence[LayerRun], bases: Bases) -> list[_Run]:
        """Returns the layers of one side in every order that names and shapes allow."""
        found: list[_Run] = []
        for cuts in itertools.product(*(readings(section, bases, self._said(section)) for section in side)):
            for order in itertools.permutations(range(len(side))):
                kinds = [side[at].kind for at in order]
                if "scan" in kinds and "remainder" in kinds[: kinds.index("scan")]:
                    continue  # A remainder is what the cycles leave.
                parts = [list(_laid_out(side[at], cuts[at])) for at in order]
                found += [tuple(itertools.chain.from_iterable(run)) for run in itertools.product(*parts)]
        return found

    def _said(self, section: LayerRun) -> int | None:
        return said_axis(Group(self.parent, section.name), self.axes)

    def _bases(self) -> Bases:
        found: dict[Rest, set[Shape]] = defaultdict(set)
        for section in (*self.wanted, *self.stored):
            for member in section.members if section.kind == "flat" else ():
                for rest, part in member.parts.items():
                    found[rest].add(part.shape)
        return found

    def _unclear_axis(self, best: Sequence[_Pairs]) -> UnclearAxis:
        axes = [{cut.outer for pair in pairs for layer in pair for cut in layer.axes} for pairs in best]
        stacked = next(section for section in (*self.stored, *self.wanted) if section.kind != "flat")
        return UnclearAxis(
            group=Group(self.parent, stacked.name),
            axes=tuple(sorted({axis for found in axes for axis in found if axis is not None})),
            tokens=_tokens(self.wanted),
            sources=_tokens(self.stored),
        )

    def _unclear(self) -> UnclearOrder:
        names = [
            "/".join(filter(None, (section.name, member.name)))
            for section in (*self.wanted, *self.stored)
            for member in section.members
        ]
        return UnclearOrder(
            parent=self.parent, names=tuple(dict.fromkeys(names)), tokens=_tokens(self.wanted)
        )


def _tokens(side: Sequence[LayerRun]) -> tuple[Tokens, ...]:
    return tuple(
        part.tokens for section in side for member in section.members for part in member.parts.values()
    )


_MOST = 5
"""Members without a number; more of them leave more orders than shapes could ever tell apart."""


def _readable(side: Sequence[LayerRun]) -> bool:
    """Tells whether a side has at most one section of a kind, without a gap in its numbers."""
    kinds = [section.kind for section in side]
    loose = [member for section in side for member in section.members if member.number is None]
    single = bool(kinds) and len(kinds) == len(set(kinds))
    return single and len(loose) <= _MOST and all(section.whole for section in side)


def _order(pairs: _Pairs, *, with_axes: bool = False) -> Hashable:
    """Returns which layer is which; equal for two readings that mean the same."""
    axes = [(left.axes, right.axes) if with_axes else None for left, right in pairs]
    return frozenset((left.place, right.place, own) for (left, right), own in zip(pairs, axes, strict=True))


def _laid_out(section: LayerRun, cuts: Cuts) -> Iterator[_Run]:
    """Yields the layers of one section in every order of its members."""
    own = {
        member: {name: cut for (place, name), cut in cuts.items() if place == at}
        for at, member in enumerate(section.members)
    }
    cycles = next(iter(cuts.values())).cycles
    for order in section.orders():
        yield tuple(
            _Layer(member, own[member], cycle, layer)
            for cycle in range(cycles)
            for member in order
            for layer in range(next(iter(own[member].values())).layers)
        )


def _agreeing(pairs: _Pairs) -> int:
    """Counts the leaves that agree in shape; 0 where some layers do not look alike."""
    total = 0
    for left, right in pairs:
        wants, has = left.shapes(), right.shapes()
        same = sum(has.get(rest) == shape for rest, shape in wants.items())
        if same * 2 < len(wants):
            return 0
        total += same
    return total


def _made(pairs: _Pairs) -> dict[Tokens, Restacked]:
    sources: dict[Member, list[tuple[int, _Layer, _Layer]]] = defaultdict(list)
    for number, (left, right) in enumerate(pairs):
        sources[left.member].append((number, left, right))
    return {
        part.tokens: made
        for member, layers in sources.items()
        for rest, part in member.parts.items()
        if (made := _leaf(part, rest, layers)) is not None
    }


def _leaf(part: Part, rest: Rest, layers: Sequence[tuple[int, _Layer, _Layer]]) -> Restacked | None:
    """Returns how one wanted leaf is made from its layers, or None where none of them is stored."""
    cut = layers[0][1].cuts.get(rest[0])
    taken = [_taken(right, rest) for _, _, right in layers]
    if cut is None or not any(taken):
        return None
    empty = Fill(cut.layer_shape(part.shape))
    missing = tuple(number for (number, *_), recipe in zip(layers, taken, strict=True) if recipe is None)
    return Restacked(recipe=cut.join([recipe or empty for recipe in taken]), missing=missing, surplus=0)


def _taken(layer: _Layer, rest: Rest) -> Recipe | None:
    part = layer.member.parts.get(rest)
    if part is None or rest[0] not in layer.cuts:
        return None
    return layer.cuts[rest[0]].take(cast(Entry, part.entry).recipe, layer.cycle, layer.layer)
