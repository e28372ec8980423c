"""The parts of a model that hold leaves of their own: a layer with its kernel and bias, a lone parameter."""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.suggesting.words import Concepts, concepts, meanings

Names = tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    """A leaf of either side.

    Attributes:
        names: Its path as the program writes it, in segments, without a last level `value`.
        collection: Its Linen collection, or None where the side tells none.
        shape: Its shape; of a stack of layers that are looked at one by one, that of one layer.
        number: The kind of number it holds, as far as no cast crosses it: `floating`, `integer`, …
        source: Its path on disk or in the target.
        made: Whether it is one of the fused layers that NNX makes of a cell's gates; the last two
            names are NNX's then.
    """

    names: Names
    collection: str | None
    shape: Shape
    number: str
    source: Path
    made: bool = False


@dataclasses.dataclass(frozen=True)
class Level:
    """One name of a path, with the number that belongs to it: `layers_3`, `layers/3` and `layer3`.

    Attributes:
        base: The name without its number.
        number: The number, or None.
        style: What stands between them.
        width: How many segments it takes.
    """

    base: str
    number: int | None = None
    style: str = ""
    width: int = 1


_NUMBERED = re.compile(r"(.*?[A-Za-z])(_?)(\d+)")


def levels(names: Names) -> tuple[Level, ...]:
    """Returns the levels of a path; a number by itself belongs to the name before it."""
    found: list[Level] = []
    for name in names:
        numbered = _NUMBERED.fullmatch(name)
        if name.isdecimal() and found and found[-1].number is None:
            found[-1] = Level(found[-1].base, int(name), "/", 2)
        elif name.isdecimal():
            found.append(Level("", int(name), "/"))
        elif numbered is not None:
            found.append(Level(numbered[1], int(numbered[3]), numbered[2]))
        else:
            found.append(Level(name))
    return tuple(found)


_PARAMETERS = {
    "main": "kernel weight weights w scale gamma embedding embeddings table",
    "bias": "bias b beta offset",
    "mean": "mean running_mean moving_mean",
    "var": "var running_var moving_var variance",
}
_PARAMETER = {spelling: kind for kind, names in _PARAMETERS.items() for spelling in names.split()}
_ENDING = re.compile(r"(.+)_(kernel|weight|bias|scale)")


@dataclasses.dataclass(frozen=True, eq=False)
class ModulePart:
    """A module with leaves of its own, or one parameter that is none of a module's usual ones.

    Attributes:
        names: Its path.
        leaves: Its leaves by what they are: `main` (kernel, scale, embedding), `bias`, `mean`, `var`,
            or a name of their own.
    """

    names: Names
    leaves: Mapping[str, Leaf]

    @cached_property
    def levels(self) -> tuple[Level, ...]:
        """Its path level by level."""
        return levels(self.names)

    @cached_property
    def own(self) -> Concepts:
        """What its last name says."""
        last = self.levels[-1] if self.levels else Level("")
        return frozenset(meanings(last.base)) | self._kind

    @cached_property
    def said(self) -> Concepts:
        """What all its names say."""
        return concepts(level.base for level in self.levels) | self._kind

    @cached_property
    def _kind(self) -> Concepts:
        leaf = self.leaves.get("main")
        if leaf is None or leaf.names == self.names:
            return frozenset()
        return frozenset(
            {"scale": ("norm",), "gamma": ("norm",), "embedding": ("embed",)}.get(leaf.names[-1], ())
        )

    @property
    def is_norm(self) -> bool:
        """Whether it scales or shifts: each of its leaves is a vector, or its name says so."""
        return "norm" in self.own

    @property
    def is_vector(self) -> bool:
        """Whether no leaf of it is a matrix."""
        return all(sum(length != 1 for length in leaf.shape) < 2 for leaf in self.leaves.values())

    @property
    def size(self) -> int:
        """How many elements it holds."""
        return sum(math.prod(leaf.shape) for leaf in self.leaves.values())


def parts_of(leaves: Iterable[Leaf], above: int = 0) -> list[ModulePart]:
    """Returns the parts of a context.

    Args:
        leaves: The leaves of the context.
        above: How many segments of their paths lead to the context.
    """
    found: dict[Names, dict[str, Leaf]] = defaultdict(dict)
    for leaf in leaves:
        names, kind = _place(leaf.names[above:])
        if kind in found[names]:
            names, kind = leaf.names[above:], "main"  # Two spellings of one thing: each by itself.
        found[names][kind] = leaf
    return [ModulePart(names, held) for names, held in found.items()]


def _place(names: Names) -> tuple[Names, str]:
    """Returns the part that a leaf belongs to and what it is there."""
    *above, last = names
    kind = _PARAMETER.get(last)
    if kind is not None:
        return tuple(above), kind
    ending = _ENDING.fullmatch(last)
    if ending is not None and _PARAMETER.get(ending[2]):
        return (*above, ending[1]), _PARAMETER[ending[2]]
    return names, "main"


def sizes_of(leaves: Sequence[Leaf]) -> int:
    """Returns how many elements some leaves hold."""
    return sum(math.prod(leaf.shape) for leaf in leaves)
