"""Each stacked leaf has its own axis (law 6), proven from shapes, rules and what the layout does."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import NamedTuple

from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.paths import Path, Tokens, canonical
from orbax_nnx_handler.planning.layouts.layout import above_groups, is_of_parameters
from orbax_nnx_handler.planning.verdict.elements import BlockCounts, Element

Axes = tuple[int | None, int | None]
"""The stacked axis of a stored leaf and of the wanted one; None where a side has its layers one by one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stacked:
    """A stored leaf and a wanted one, of which at least one holds several layers.

    Attributes:
        wanted: The wanted leaf's path.
        stored: The stored leaf's path.
        axes: The axes that the recipe takes.
        options: All axes under which the shapes of the two hold layers of one shape.
        ranks: How many axes either leaf has.
        ground: What the mapping says that tells the axis; None where it says nothing.
    """

    wanted: Path
    stored: Path
    axes: Axes
    options: Set[Axes]
    ranks: tuple[int, int]
    ground: str | None = None


class StackedGroup(NamedTuple):
    """What is stacked along one axis: the layers of one name in one collection, arranged in one way.

    Attributes:
        owner: The stored train state.
        collection: Its collection.
        names: The spellings under which a rule may speak of the group, below its collection.
        forms: How each side holds the layers.
    """

    owner: Path
    collection: str | None
    names: frozenset[Tokens]
    forms: tuple[str, str]


def options_of(
    stored: Shape,
    wanted: Shape,
    element: Element,
    blocks: tuple[BlockCounts | None, BlockCounts | None] = (None, None),
) -> frozenset[Axes]:
    """Returns the axes under which a layer of a stored leaf has the shape of a layer of a wanted one.

    Args:
        stored: The shape of the stored leaf, fused gates as one.
        wanted: The shape of the wanted leaf.
        element: Which layer it is.
        blocks: The scan of either side that the layout knows by name.
    """
    here, there = (
        _layers(shape, len(layer), block)
        for shape, layer, block in zip((wanted, stored), (element.to, element.at), blocks[::-1], strict=True)
    )
    return frozenset((a, b) for a, left in there.items() for b, right in here.items() if left == right)


def _layers(shape: Shape, count: int, blocks: BlockCounts | None) -> dict[int | None, Shape]:
    """Returns the shape of one layer by each axis along which a leaf may be stacked."""
    if not count:
        return {None: shape}
    return {
        axis: (*shape[:axis], *shape[axis + count :])
        for axis in range(len(shape) - count + 1)
        if blocks is None or _admits(blocks, shape[axis : axis + count])
    }


def _admits(blocks: BlockCounts, lengths: Shape) -> bool:
    return lengths[0] in blocks.cycles and lengths[1:] in ((), (blocks.inner,))


class StackedAxes:
    """Collects what is stacked, and tells whose axis nothing proves."""

    def __init__(self, known: int | None, said: Mapping[Tokens, int]) -> None:
        """Takes the axis along which the layout's program stacks, and the axes that rules say by group."""
        self._known, self._said = known, said
        self._groups: dict[StackedGroup, dict[Tokens, Stacked]] = defaultdict(dict)
        self._broken: list[tuple[Stacked, str]] = []

    def add(self, group: StackedGroup, rest: Tokens, leaf: Stacked) -> None:
        """Adds a leaf of a group by its path below the layer."""
        known = self._groups[group].setdefault(rest, leaf)
        if known is leaf:
            return
        if known.axes != leaf.axes:
            self._broken.append((leaf, f"other layers of it are stacked along {_words(known.axes)}"))
        if known.options != leaf.options:
            both = known.options & leaf.options
            self._groups[group][rest] = dataclasses.replace(known, options=both)

    def unproven(self) -> Iterator[tuple[Stacked, str]]:
        """Yields each leaf whose axis does not follow, and why."""
        yield from self._broken
        for group, leaves in self._groups.items():
            yield from self._of_group(group, list(leaves.values()))

    def _of_group(self, group: StackedGroup, leaves: Sequence[Stacked]) -> Iterator[tuple[Stacked, str]]:
        said = self._said_of(group) if self._said else set[int]()
        # A target may stack what is stored layer by layer as `nnx.vmap` does by default.
        is_open = bool(self._known) and all((None, 0) in leaf.options for leaf in leaves)
        is_known = self._is_known if is_of_parameters(group.collection) and not is_open else _is_single
        for leaf in leaves:
            one, known = len(leaf.options) == 1, is_known(leaf)
            holds = {None: True, "group": True, "shape": one, "layout": known, "rule": bool(said)}
            if not holds[leaf.ground]:
                yield leaf, "what is said to tell its axis does not"
        for axis in said:
            leaves = _as_said(leaves, axis)
        wrong = [leaf for leaf in leaves if leaf.axes not in leaf.options]
        yield from ((leaf, "its shape does not allow that axis, or a rule says another") for leaf in wrong)
        several = [leaf for leaf in leaves if len(leaf.options) > 1]
        if wrong or not several or all(map(is_known, leaves)):
            return
        if len(several) > 1 or _alike(leaves, group.forms) != {tuple(leaf.axes for leaf in leaves)}:
            for leaf in several:
                others = " or ".join(sorted(map(_words, leaf.options)))
                yield leaf, f"its layers may be stacked along {others}, and nothing tells which"

    def _said_of(self, group: StackedGroup) -> set[int]:
        """Returns what rules say of a group: of parameters, or behind the name of another collection."""
        heads = above_groups(canonical(group.owner), group.collection)
        names = {(*head, *name) for head in heads for name in group.names}
        return {self._said[name] for name in names & self._said.keys()}

    def _is_known(self, leaf: Stacked) -> bool:
        return all(axis in (None, self._known) for axis in leaf.axes)


def _is_single(leaf: Stacked) -> bool:
    return leaf.axes == (None, None)


def _words(axes: Axes) -> str:
    named = [axis for axis in axes if axis is not None]
    return f"axis {named[0]}" if len(set(named)) == 1 else f"axes {axes[0]} and {axes[1]}"


def _as_said(leaves: Sequence[Stacked], said: int) -> Sequence[Stacked]:
    """Returns the leaves with the axes that a rule leaves: on both sides, else where the layers come from."""

    def first(axes: Axes) -> int | None:
        return axes[0] if axes[0] is not None else axes[1]

    def both(axes: Axes) -> bool:
        return all(axis in (None, said) for axis in axes)

    ways: tuple[Callable[[Axes], bool], ...] = (
        both,
        lambda axes: first(axes) == said,
        lambda axes: axes[1] == said,
    )
    for allowed in ways:
        agreed = [
            dataclasses.replace(leaf, options={axes for axes in leaf.options if allowed(axes)})
            for leaf in leaves
        ]
        if all(leaf.options for leaf in agreed):
            return agreed
    return [dataclasses.replace(leaf, options=frozenset()) for leaf in leaves]


_BACKS = ((False, False), (False, True), (True, False), (True, True))
"""Whether the program of either side, stored first, counts its axis from the back."""


def _alike(leaves: Sequence[Stacked], forms: Iterable[str]) -> set[tuple[Axes, ...]]:
    """Returns the choices in which each side is stacked along one axis, from the front or from the back."""
    found: set[tuple[Axes, ...]] = set()
    for backs in _BACKS if "known blocks" not in forms else _BACKS[:1]:
        named = [{_named(axes, leaf.ranks, backs): axes for axes in leaf.options} for leaf in leaves]
        common = set[Axes].intersection(*(set(names) for names in named))
        # Programs count from the back for the last axis alone.
        common = {
            axes
            for axes in common
            if all(axis in (None, -1) for axis, back in zip(axes, backs, strict=True) if back)
        }
        found |= {tuple(names[name] for names in named) for name in common}
    return found


def _named(axes: Axes, ranks: tuple[int, int], backs: tuple[bool, bool]) -> Axes:
    here, there = (
        axis - rank if back and axis is not None else axis
        for axis, rank, back in zip(axes, ranks, backs, strict=True)
    )
    return here, there
