"""Which stored module is which wanted one: by structure, then shapes, then order, then names."""

import dataclasses
import difflib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from orbax_nnx_handler.planning.core.paths import Tokens, is_number
from orbax_nnx_handler.planning.suggesting.modules import Module, ModuleLeaf, Signatures, lone_pairs

Grounds = Literal["shapes", "order", "names", "likeness", "nothing"]
"""What tells the pair: shapes allow no other; equal modules in the order of their
creation; equal modules with similar names; most leaves are alike; nothing does."""

RANKING: tuple[Grounds, ...] = ("shapes", "order", "names", "likeness", "nothing")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """A stored and a wanted leaf that belong together.

    Attributes:
        stored: The stored leaf.
        wanted: The wanted leaf, or any one of the layers it is a stack of.
        grounds: The weakest reason on the way from the root.
        unstacked: Depth of the layer number that only the wanted path has, or None.
        stacked: Depth of the layer number that only the stored path has, or None.
    """

    stored: ModuleLeaf
    wanted: ModuleLeaf
    grounds: Grounds
    unstacked: int | None = None
    stacked: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """Equal modules that only order, names or nothing tells apart.

    Attributes:
        stored: Paths of the stored modules, in the order they were paired.
        wanted: Paths of the wanted modules, in that order.
        grounds: What the pairs rest on.
    """

    stored: tuple[Tokens, ...]
    wanted: tuple[Tokens, ...]
    grounds: Grounds


@dataclasses.dataclass
class Pairing:
    """Pairs the modules of two trees.

    Attributes:
        signatures: Shared by both trees.
        ordered: Whether the wanted modules come in the order of their creation.
        pairs: The leaves that belong together.
        choices: Where several pairings were possible.
    """

    signatures: Signatures
    ordered: bool
    pairs: list[Pair] = dataclasses.field(default_factory=list[Pair])
    choices: list[Choice] = dataclasses.field(default_factory=list[Choice])

    def pair(self, wanted: Module, stored: Module, grounds: Grounds = "shapes") -> None:
        """Pairs two modules that belong together, leaf by leaf."""
        self._pair_leaves(wanted, stored, grounds)
        left, right = wanted.items, stored.items
        named = {b.path[len(stored.path) :]: b for b in right}
        same = [(a, named[name]) for a in left if (name := a.path[len(wanted.path) :]) in named]
        alike = [(a, b) for a, b in same if self._equal(a, b)]
        self._take(alike, left, right, grounds)
        for ours, theirs in self._classes(left, right):
            self._pair_equal(ours, theirs, left, right, grounds)
        self._pair_stacks(left, right, grounds)
        still = {id(module) for module in (*left, *right)}
        self._take([(a, b) for a, b in same if id(a) in still and id(b) in still], left, right, grounds)
        self._pair_like(left, right, grounds)

    def _equal(self, one: Module, other: Module) -> bool:
        return self.signatures.of(one) == self.signatures.of(other)

    def _take(
        self,
        pairs: Iterable[tuple[Module, Module]],
        left: list[Module],
        right: list[Module],
        grounds: Grounds,
    ) -> None:
        for ours, theirs in pairs:
            left.remove(ours)
            right.remove(theirs)
            self.pair(_unwrapped(ours, theirs), _unwrapped(theirs, ours), grounds)

    def _classes(
        self, left: Sequence[Module], right: Sequence[Module]
    ) -> Iterator[tuple[list[Module], list[Module]]]:
        classes: dict[int, tuple[list[Module], list[Module]]] = defaultdict(lambda: ([], []))
        for side, modules in enumerate((left, right)):
            for module in modules:
                classes[self.signatures.of(module)][side].append(module)
        yield from [both for both in classes.values() if all(both)]

    def _pair_equal(
        self,
        ours: list[Module],
        theirs: list[Module],
        left: list[Module],
        right: list[Module],
        grounds: Grounds,
    ) -> None:
        if len(ours) != len(theirs):
            self.choices.append(_choice(theirs, ours, "nothing"))
            return
        found = self._grounds(ours, theirs)
        if found == "names":
            ours = [_closest(module, ours) for module in theirs]
        if found in ("nothing", "names") or (found == "order" and not _counted(ours, theirs)):
            self.choices.append(_choice(theirs, ours, found))
        if found == "order" and _counted(ours, theirs):
            found = "shapes"
        self._take(zip(ours, theirs, strict=True), left, right, weakest(grounds, found))

    def _grounds(self, ours: Sequence[Module], theirs: Sequence[Module]) -> Grounds:
        """Returns what tells equal modules apart."""
        if len(ours) == 1:
            return "shapes"
        if len({module.path[:-1] for module in theirs}) == 1 and is_number(theirs[0].path[-1]):
            return "order" if self.ordered or _counted(ours, theirs) else "nothing"
        closest = [_closest(module, ours) for module in theirs]
        return "names" if len({module.path for module in closest}) == len(ours) else "nothing"

    def _pair_stacks(self, left: list[Module], right: list[Module], grounds: Grounds) -> None:
        """Pairs layers one by one on one side with their stack on the other."""
        for layers in _series(left):
            for stack, (whole,) in self._stacked(layers, right, every=False):
                _remove([*layers, stack], left, right)
                self._pair_layers(whole, stack, grounds, unstacked=len(layers[0].path) - 1)
        for layers in _series(right):
            for stack, wholes in self._stacked(layers, left, every=True):
                _remove([*layers, stack], left, right)
                for whole in wholes:
                    self._pair_layers(stack, whole, grounds, stacked=len(layers[0].path) - 1)

    def _stacked(
        self, layers: Sequence[Module], others: Sequence[Module], *, every: bool
    ) -> list[tuple[Module, list[Module]]]:
        """Returns the one module that is the stack of some layers, and the layers as if stacked."""
        if len({self.signatures.of(layer) for layer in layers}) > 1:
            return []
        found: list[tuple[Module, list[Module]]] = []
        for axis in range(3):
            wholes = [layer.stacked(len(layers), axis) for layer in (layers if every else layers[:1])]
            whole = [module for module in wholes if module is not None]
            found += [(stack, whole) for stack in others if whole and self._equal(whole[0], stack)]
        return found if len(found) == 1 else []

    def _pair_layers(
        self,
        ours: Module,
        theirs: Module,
        grounds: Grounds,
        *,
        unstacked: int | None = None,
        stacked: int | None = None,
    ) -> None:
        inner = Pairing(self.signatures, self.ordered)
        inner.pair(_unwrapped(ours, theirs), _unwrapped(theirs, ours), grounds)
        self.choices += [choice for choice in inner.choices if choice not in self.choices]
        self.pairs += [dataclasses.replace(p, unstacked=unstacked, stacked=stacked) for p in inner.pairs]

    def _pair_like(self, left: list[Module], right: list[Module], grounds: Grounds) -> None:
        """Pairs what is left by how many leaves are alike, the best pairs first."""
        for _, ours, theirs in lone_pairs(left, right):
            if ours in left and theirs in right:
                self._take([(ours, theirs)], left, right, weakest(grounds, "likeness"))

    def _pair_leaves(self, wanted: Module, stored: Module, grounds: Grounds) -> None:
        left, right = dict(wanted.leaves), dict(stored.leaves)
        both = [name for name in left if name in right]
        alike = {name for name in both if left[name].kind == right[name].kind}
        for name in both if alike else ():
            # One leaf of another shape makes the others no more than alike.
            found = grounds if len(alike) == len(both) else weakest(grounds, "likeness")
            self.pairs.append(Pair(stored=right.pop(name), wanted=left.pop(name), grounds=found))
        kinds: dict[object, tuple[list[ModuleLeaf], list[ModuleLeaf]]] = defaultdict(lambda: ([], []))
        for side, leaves in enumerate((left, right)):
            for leaf in leaves.values():
                kinds[leaf.kind][side].append(leaf)
        for ours, theirs in kinds.values():
            if len(ours) == len(theirs) == 1:
                self.pairs.append(Pair(stored=theirs[0], wanted=ours[0], grounds=grounds))
            elif ours and theirs:
                paths = [tuple(leaf.tokens for leaf in leaves) for leaves in (theirs, ours)]
                self.choices.append(Choice(stored=paths[0], wanted=paths[1], grounds="nothing"))


def weakest(*grounds: Grounds) -> Grounds:
    """Returns the least of several grounds."""
    return max(grounds, key=RANKING.index)


def _unwrapped(module: Module, other: Module) -> Module:
    """Returns what a module wraps, where the other one is that itself."""
    while module.wraps is not None and other.wraps is None:
        module = module.wraps
    return module


def _remove(modules: Iterable[Module], *sides: list[Module]) -> None:
    for module in modules:
        for side in sides:
            if module in side:
                side.remove(module)


def _choice(theirs: Sequence[Module], ours: Sequence[Module], grounds: Grounds) -> Choice:
    return Choice(
        stored=tuple(module.path for module in theirs),
        wanted=tuple(module.path for module in ours),
        grounds=grounds,
    )


def _counted(ours: Sequence[Module], theirs: Sequence[Module]) -> bool:
    """Tells whether both programs count these modules: a list here, one automatic name there."""
    return all(
        len({module.path[:-1] for module in side}) == 1 and is_number(side[0].path[-1])
        for side in (ours, theirs)
    )


def _closest(module: Module, others: Sequence[Module]) -> Module:
    name = "/".join(module.path).lower()
    return max(
        others, key=lambda other: difflib.SequenceMatcher(None, name, "/".join(other.path).lower()).ratio()
    )


def _series(modules: Sequence[Module]) -> list[list[Module]]:
    groups: dict[Tokens, list[Module]] = defaultdict(list)
    for module in modules:
        if is_number(module.path[-1]):
            groups[module.path[:-1]].append(module)
    return [group for group in groups.values() if len(group) > 1]
