"""Groups of layers whose stacked axis lies elsewhere on the other side: what one leaf shows, all of them do.

A leaf whose layers are as many as its features has one shape either way, and no sign of its own. Its group
has: all of it is stacked along one axis, and holds as many layers.
"""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Sequence

from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.suggesting.module_parts import Link
from orbax_nnx_handler.planning.suggesting.shapes import Step, Way

Move = tuple[int, int]
"""From which axis to which other one."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """A wanted leaf with the stored one that it is made from.

    Attributes:
        names: The wanted path.
        stored: The stored shape.
        wanted: The wanted shape.
    """

    names: tuple[str, ...]
    stored: Shape
    wanted: Shape


@dataclasses.dataclass(frozen=True)
class MovedGroup:
    """Leaves that one move of an axis arranges, all of them.

    Attributes:
        name: The path that all of them lie below.
        members: Their positions among the pairs.
        moves: The moves, each with other results, under which the shapes of all come out.
    """

    name: tuple[str, ...]
    members: tuple[int, ...]
    moves: tuple[Move, ...]


def moved_groups(pairs: Sequence[Pair]) -> list[MovedGroup]:
    """Returns the groups, the widest, of leaves of which one at least shows that the axis is another."""
    below: dict[tuple[str, ...], list[int]] = defaultdict(list)
    telling = [at for at, pair in enumerate(pairs) if _is_arranged(pair)]
    names = {pairs[at].names[:depth] for at in telling for depth in range(1, len(pairs[at].names))}
    for at, pair in enumerate(pairs if names else ()):
        for depth in range(1, len(pair.names)):
            if pair.names[:depth] in names:
                below[pair.names[:depth]].append(at)
    found: list[MovedGroup] = []
    for name in sorted(names, key=lambda name: (len(name), name)):
        if any(name[: len(group.name)] == group.name for group in found):
            continue
        moves = _moves([pairs[at] for at in below[name]])
        if moves:
            found.append(MovedGroup(name, tuple(below[name]), moves))
    return found


def order_of(rank: int, move: Move) -> tuple[int, ...]:
    """Returns the order of axes that a move leaves, as a transpose takes it."""
    axis, to = move
    rest = [at for at in range(rank) if at != axis]
    return (*rest[:to], axis, *rest[to:])


def permuted(shape: Shape, order: Sequence[int]) -> Shape:
    """Returns a shape with its axes in another order."""
    return tuple(shape[axis] for axis in order)


def _is_arranged(pair: Pair) -> bool:
    return pair.stored != pair.wanted and sorted(pair.stored) == sorted(pair.wanted)


def _moves(pairs: Sequence[Pair]) -> tuple[Move, ...]:
    """Returns the moves that explain some leaves as one group of as many layers."""
    ranks = [len(pair.stored) for pair in pairs]
    if len(pairs) < 2 or max(ranks) < 3:
        return ()  # Matrices alone are transposed rather than stacks.
    found: dict[tuple[tuple[int, ...], ...], Move] = {}
    # Of two that do the same, that to the front: programs stack there.
    for move in sorted(itertools.permutations(range(min(ranks)), 2), key=lambda move: move[1]):
        if min(move) > 0 and len({pair.stored[0] for pair in pairs}) == 1:
            continue  # Layers may lie in front on both sides, and matrices are transposed in each.
        orders = tuple(order_of(rank, move) for rank in ranks)
        comes_out = all(
            permuted(pair.stored, order) == pair.wanted for pair, order in zip(pairs, orders, strict=True)
        )
        if comes_out and len({pair.stored[move[0]] for pair in pairs}) == 1:
            found.setdefault(orders, move)
    return tuple(found.values())


def with_moved_axes(links: Sequence[Link]) -> list[Link]:
    """Returns links under which all of a group is stacked along the axis that one of its leaves shows.

    Of a group whose axis may be several ones, what differs in shape is left out.
    """
    made = list(links)
    plain = [at for at, link in enumerate(links) if _is_plain(link)]
    pairs = [Pair(links[at].target.names, links[at].source.shape, links[at].target.shape) for at in plain]
    for group in moved_groups(pairs):
        members = [links[plain[at]] for at in group.members]
        above = {link.source.names[: len(group.name) - len(link.target.names)] for link in members}
        if len(above) > 1:
            continue  # What is several modules in the checkpoint is no one stack.
        for at, link in zip(group.members, members, strict=True):
            before, order = link.source.shape, order_of(len(link.source.shape), group.moves[0])
            step = Step("transpose", before, permuted(before, order), order)
            grounds = "names" if link.grounds == "shapes" else link.grounds
            made[plain[at]] = dataclasses.replace(link, ways=((Way((step,)),),), grounds=grounds)
        if len(group.moves) > 1:
            unclear = {id(made[plain[at]]) for at in group.members}
            made = [link for link in made if id(link) not in unclear]
            return with_moved_axes(made)
    moved = {plain[at] for group in moved_groups(pairs) for at in group.members}
    return [link for at, link in enumerate(made) if at in moved or not _is_one_order_of_several(link)]


def _is_one_order_of_several(link: Link) -> bool:
    """Tells whether a link moves axes that come out the same moved otherwise, and no convention tells how."""
    for steps in [ways[0].steps for ways in link.ways if len(ways) == 1 and not ways[0].turned]:
        if len(steps) == 1 and steps[0].kind == "transpose":
            before, after = steps[0].before, [length for length in steps[0].shape if length > 1]
            orders = itertools.permutations(at for at, length in enumerate(before) if length > 1)
            if sum([*permuted(before, order)] == after for order in orders) > 1:
                return True
    return False


def _is_plain(link: Link) -> bool:
    """Tells whether a link is one stored leaf and one wanted one, whole."""
    is_one = len(link.wanted) == len(link.stored) == len(link.ways) == 1
    return is_one and link.joint is None and link.layers is None and not (link.source.made or link.copied)
