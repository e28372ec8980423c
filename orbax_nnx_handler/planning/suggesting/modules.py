"""Both sides as trees of modules, and what makes two modules alike.

Which modules are more alike than any others, by the names and kinds of their leaves.

In which order a program creates its modules.
"""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import jax.numpy as jnp
from flax import nnx

from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.paths import Path, Tokens, canonical, is_number


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModuleLeaf:
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
    leaves: Mapping[str, ModuleLeaf]
    parts: Mapping[str, "Module"]

    @property
    def every_leaf(self) -> Iterator[ModuleLeaf]:
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


def tree_of(leaves: Iterable[ModuleLeaf], order: Mapping[Tokens, Sequence[str]] | None = None) -> Module:
    """Returns the tree of the leaves.

    Args:
        leaves: The leaves of one side.
        order: Names in the order of their creation, by module; numbers come in theirs.
    """
    return _module((), [(leaf.tokens, leaf) for leaf in leaves], order or {})


def _module(
    path: Tokens, below: Sequence[tuple[Tokens, ModuleLeaf]], order: Mapping[Tokens, Sequence[str]]
) -> Module:
    own = {tokens[0]: leaf for tokens, leaf in below if len(tokens) == 1}
    groups: dict[str, list[tuple[Tokens, ModuleLeaf]]] = {}
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


_Kind = tuple[str, Hashable]
_Contents = frozenset[tuple[_Kind, int]]
"""How many leaves of each name and kind a module holds."""


def lone_pairs(left: Sequence[Module], right: Sequence[Module]) -> list[tuple[float, Module, Module]]:
    """Returns pairs that share most of their leaves, and of which neither half is in another as good.

    Returns:
        The share of leaves that are alike, and the pair; the best first.
    """
    ours, theirs = _by_contents(left), _by_contents(right)
    # Modules of the same contents are alike to the same others: of 5,000 layers a few kinds are compared.
    shares = {(a, b): _share(a, b) for a, b in _touching(ours, theirs)}
    rivals: Counter[tuple[int, _Contents, float]] = Counter()
    for (a, b), share in shares.items():
        rivals[0, a, share] += len(theirs[b])
        rivals[1, b, share] += len(ours[a])
    found = [
        (share, ours[a][0], theirs[b][0])
        for (a, b), share in shares.items()
        if share > 0.5 and rivals[0, a, share] == rivals[1, b, share] == 1
    ]
    return sorted(found, key=lambda pair: -pair[0])


def _by_contents(modules: Iterable[Module]) -> Mapping[_Contents, list[Module]]:
    found: dict[_Contents, list[Module]] = defaultdict(list)
    for module in modules:
        leaves = Counter((leaf.tokens[-1], leaf.kind) for leaf in module.every_leaf)
        found[frozenset(leaves.items())].append(module)
    return found


def _touching(
    ours: Iterable[_Contents], theirs: Mapping[_Contents, object]
) -> Iterable[tuple[_Contents, _Contents]]:
    """Yields the contents of both sides that have a leaf in common, in the order of the modules."""
    places = {contents: at for at, contents in enumerate(theirs)}
    holders: dict[_Kind, list[_Contents]] = defaultdict(list)
    for contents in theirs:
        for kind, _ in contents:
            holders[kind].append(contents)
    for contents in ours:
        near = {other for kind, _ in contents for other in holders.get(kind, ())}
        yield from ((contents, other) for other in sorted(near, key=places.__getitem__))


def _share(one: _Contents, other: _Contents) -> float:
    left, right = Counter(dict(one)), Counter(dict(other))
    return (left & right).total() / max(left.total(), right.total(), 1)


Order = Mapping[Tokens, Sequence[str]]
"""Names in the order of their creation, by the module's canonical path."""


def creation_order(item: Any) -> Order:
    """Returns the order in which attributes were set; empty where nothing tells it.

    A module remembers it until it is split and merged: what comes out of
    `nnx.eval_shape` or `nnx.jit` has its attributes sorted by name, so that an
    item in which every module is sorted tells nothing.
    """
    found = dict(_walk(item, ()))
    named = [[name for name in names if not is_number(name)] for names in found.values()]
    return {} if all(names == sorted(names) for names in named) else found


def order_of(target: Any, init: Callable[[], Any] | None) -> Order:
    """Returns the order of a target's modules, from the function that builds it where there is one."""
    if init is None:
        return creation_order(target)
    found: list[Order] = []

    def build() -> Any:
        built = init()
        found.append(creation_order(built))
        return built

    nnx.eval_shape(build)
    return found[0]


def _walk(item: Any, path: Tokens) -> Iterator[tuple[Tokens, list[str]]]:
    children = _children(item)
    if children is None:
        return
    # A name with a number (`conv_1`) is a number below a name in canonical paths.
    yield path, list(dict.fromkeys(canonical((key,))[0] for key, _ in children))
    for key, child in children:
        yield from _walk(child, (*path, *canonical((key,))))


def _children(item: Any) -> list[tuple[Any, Any]] | None:
    if isinstance(item, nnx.Variable | nnx.State):
        return None
    if isinstance(item, nnx.List | list | tuple):
        return list(enumerate(cast(Sequence[Any], item)))
    if isinstance(item, dict):
        return list(cast(dict[Any, Any], item).items())
    if isinstance(item, nnx.Pytree):
        return [(name, part) for name, part in vars(item).items() if _is_part(name, part)]
    return None


def _is_part(name: str, part: Any) -> bool:
    # `_pytree__...`: Flax keeps its own records of a module beside the module's parts.
    kinds: tuple[type[Any], ...] = (nnx.Pytree, nnx.Variable, dict, list, tuple)
    return not name.startswith("_pytree") and isinstance(part, kinds)
