"""Both sides as trees of modules, and what makes two modules alike."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from orbax_nnx_handler.planning.leaves import Shape
from orbax_nnx_handler.planning.paths import Path, is_number

Tokens = tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    """A leaf of either side.

    Attributes:
        tokens: Its canonical path.
        names: Its path as the program writes it: the segments of a rule.
        collection: Its Linen collection, or None where the side tells none.
        shape: Its shape.
        number: The kind of number it holds, as far as no cast crosses it: `floating`, `integer`, …
        source: Its path on disk or in the target.
    """

    tokens: Tokens
    names: tuple[str, ...]
    collection: str | None
    shape: Shape
    number: str
    source: Path

    @property
    def kind(self) -> tuple[str, Shape, str]:
        """What another leaf must share to be this one: collection, shape and kind of number."""
        return str(self.collection), self.shape, self.number


@dataclasses.dataclass(frozen=True, eq=False)
class Module:
    """A module: its own leaves by name, and the modules in it in the order of their creation."""

    path: Tokens
    leaves: Mapping[str, Leaf]
    parts: Mapping[str, "Module"]

    @property
    def every_leaf(self) -> Iterator[Leaf]:
        """All leaves in it, at any depth."""
        yield from self.leaves.values()
        for part in self.parts.values():
            yield from part.every_leaf

    def stacked(self, count: int, axis: int) -> "Module | None":
        """Returns `count` such modules stacked along an axis; None where a leaf has no such axis."""
        if any(len(leaf.shape) < axis for leaf in self.every_leaf):
            return None
        return self._reshaped(lambda shape: (*shape[:axis], count, *shape[axis:]))

    def _reshaped(self, change: Callable[[Shape], Shape]) -> "Module":
        leaves = {
            name: dataclasses.replace(leaf, shape=change(leaf.shape)) for name, leaf in self.leaves.items()
        }
        return Module(self.path, leaves, {name: part._reshaped(change) for name, part in self.parts.items()})

    @property
    def is_series(self) -> bool:
        """Whether it is no module but the numbered ones of one name."""
        return bool(self.parts) and not self.leaves and all(is_number(name) for name in self.parts)

    @property
    def items(self) -> list["Module"]:
        """The modules in it; the numbered ones of one name each by itself."""
        parts = self.parts.values()
        return [item for part in parts for item in (part.items if part.is_series else [part])]

    @property
    def wraps(self) -> "Module | None":
        """The only module in it, where it has nothing else."""
        return next(iter(self.parts.values())) if len(self.parts) == 1 and not self.leaves else None


def number_of(dtype: Any) -> str:
    """Returns the kind of number of a dtype; a restore casts within one kind and never between two."""
    kinds = ("floating", "complexfloating", "integer", "bool_")
    found = [kind for kind in kinds if dtype is not None and jnp.issubdtype(dtype, getattr(jnp, kind))]
    return found[0] if found else "other"


def tree_of(leaves: Iterable[Leaf], order: Mapping[Tokens, Sequence[str]] | None = None) -> Module:
    """Returns the tree of the leaves.

    Args:
        leaves: The leaves of one side.
        order: Names in the order of their creation, by module; numbers come in theirs.
    """
    return _module((), [(leaf.tokens, leaf) for leaf in leaves], order or {})


def _module(
    path: Tokens, below: Sequence[tuple[Tokens, Leaf]], order: Mapping[Tokens, Sequence[str]]
) -> Module:
    own = {tokens[0]: leaf for tokens, leaf in below if len(tokens) == 1}
    groups: dict[str, list[tuple[Tokens, Leaf]]] = {}
    for tokens, leaf in below:
        if len(tokens) > 1:
            groups.setdefault(tokens[0], []).append((tokens[1:], leaf))
    known = {name: at for at, name in enumerate(order.get(path, ()))}

    def rank(name: str) -> tuple[int, int, str]:
        return (known.get(name, len(known)), int(name[1:]) if is_number(name) else 0, name)

    parts = {name: _module((*path, name), groups[name], order) for name in sorted(groups, key=rank)}
    return Module(path, own, parts)


class Signatures:
    """Numbers for modules: equal where the leaves' names and shapes are, whatever the modules are called."""

    def __init__(self) -> None:
        self._numbers: dict[object, int] = {}
        # A module is kept beside its number, so that no other one gets its id.
        self._known: dict[int, tuple[Module, int]] = {}

    def of(self, module: Module) -> int:
        """Returns the module's number; a module that only wraps another has the other's."""
        known = self._known.get(id(module))
        if known is None:
            known = self._known[id(module)] = (module, self._number(module))
        return known[1]

    def _number(self, module: Module) -> int:
        if module.wraps is not None:
            return self.of(module.wraps)
        own = sorted((name, leaf.kind) for name, leaf in module.leaves.items())
        parts = sorted(self.of(item) for item in module.items)
        return self._numbers.setdefault((tuple(own), tuple(parts)), len(self._numbers))
