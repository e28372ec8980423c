"""Along which axes the members of a section are stacked, from the shapes of single layers."""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from orbax_nnx_handler.planning.leaves import Shape
from orbax_nnx_handler.planning.recipes import Index, Recipe, Stack
from orbax_nnx_handler.planning.sections import Kind, Member, Rest, Section

Bases = Mapping[Rest, set[Shape]]
"""The shapes that one layer's leaves may have."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
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


Cuts = Mapping[tuple[int, str | None], Cut]
"""The cuts of a section's members, by the member's place and the collection."""


def readings(section: Section, bases: Bases, said: int | None = None) -> Sequence[Cuts]:
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


def _options(kind: Kind, member: Member, collection: str | None, bases: Bases, said: int | None) -> list[Cut]:
    """Returns the cuts that most leaves of a member allow."""
    votes: Counter[Cut] = Counter()
    for rest, part in member.parts.items():
        if rest[0] == collection:
            votes.update({cut for base in bases.get(rest, ()) for cut in _cuts(kind, part.shape, base)})
    allowed = {cut: count for cut, count in votes.items() if None in (said, cut.outer) or cut.outer == said}
    return [cut for cut, count in allowed.items() if count == max(allowed.values())]


def _cuts(kind: Kind, shape: Shape, base: Shape) -> Iterable[Cut]:
    extra = len(shape) - len(base)
    outers: Iterable[int | None] = range(len(shape)) if kind == "scan" and extra else (None,)
    for outer in outers:
        left = _without(shape, outer)
        inners: Iterable[int | None] = range(len(left)) if len(left) > len(base) else (None,)
        for inner in inners:
            cut = Cut(
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
