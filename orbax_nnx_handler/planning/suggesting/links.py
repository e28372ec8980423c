"""What the search finds: wanted leaves with the stored ones that they are made from."""

import dataclasses
from typing import Literal

from orbax_nnx_handler.planning.suggesting.parts import Leaf, Names
from orbax_nnx_handler.planning.suggesting.shapes import Joint, Way

Grounds = Literal["shapes", "order", "names", "fact", "siblings", "outputs"]
"""What tells the pair: shapes allow no other; the order in which both programs number or compute
their parts; names; the convention of a known code base; how its siblings are arranged."""


@dataclasses.dataclass(frozen=True)
class Layers:
    """A group of layers that one side keeps one by one and the other stacked.

    Attributes:
        stored: The stored names that lead into a layer, `{i}` for its number; or into the stack.
        wanted: The same in the target.
        axis: The stacked axis.
        stacks: Whether the wanted side is the stacked one.
    """

    stored: Names
    wanted: Names
    axis: int
    stacks: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Link:
    """Leaves that belong together: one stored and one wanted, or one and several.

    Attributes:
        wanted: The wanted leaf; the parts of a stored one that is split.
        stored: The stored leaf; the parts of a wanted one that is fused, in their order.
        grounds: What it rests on.
        ways: For each part its ways of shape; more than one where shapes leave a choice.
        joint: How the parts lie in the whole, where there are several.
        fact: The code base whose convention it follows.
        levels: Segments of the stored and of the wanted path that count the same layers.
        copied: Whether the stored leaf has a wanted leaf of its own beside this one.
        layers: The stack that either side is part of.
        layer: The number of the layer in it.
    """

    wanted: tuple[Leaf, ...]
    stored: tuple[Leaf, ...]
    grounds: Grounds
    ways: tuple[tuple[Way, ...], ...]
    joint: Joint | None = None
    fact: str = ""
    levels: tuple[tuple[int, int], ...] = ()
    copied: bool = False
    layers: Layers | None = None
    layer: int = 0

    @property
    def target(self) -> Leaf:
        """The wanted leaf, or the first of several."""
        return self.wanted[0]

    @property
    def source(self) -> Leaf:
        """The stored leaf, or the first of several."""
        return self.stored[0]

    @property
    def is_split(self) -> bool:
        """Whether one stored leaf becomes several wanted ones."""
        return len(self.wanted) > 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tie:
    """Parts of which nothing tells which is which.

    Attributes:
        wanted: Paths of the wanted parts.
        stored: Paths of the stored ones.
        readings: Some ways to pair them, each as links.
    """

    wanted: tuple[Names, ...]
    stored: tuple[Names, ...]
    readings: tuple[tuple[Link, ...], ...]
