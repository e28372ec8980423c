"""The laws of a mapping, checked on every plan, whatever found it.

Nothing here knows how a mapping was searched. What each wanted leaf reads is written as
elements (a stored leaf, or one layer of a stack), both sides are named (owner, collection,
path, layer), and the names are compared. Where they disagree the plan is refused, and both
readings are said. Leaves that a rule of the user's brought are taken at the rule's word;
that no stored element is used twice holds for them too.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from orbax_nnx_handler.planning.core.errors import AmbiguousMappingError, Hint
from orbax_nnx_handler.planning.core.paths import Path, Tokens, canonical, is_number, render, segments
from orbax_nnx_handler.planning.core.recipes import (
    Concat,
    Fill,
    Index,
    Read,
    Recipe,
    Stack,
    reads,
)
from orbax_nnx_handler.planning.layouts.layout import FLAX_COLLECTIONS, Placement
from orbax_nnx_handler.planning.target.roles import Wanted
from orbax_nnx_handler.planning.verdict.moments import moments_astray
from orbax_nnx_handler.planning.verdict.used_twice import used_twice

_PLAIN = frozenset({"model", "state", "train_state"})
_GATES = {4: "ifgo", 3: "rzn"}
"""The order in which the gates of NNX's LSTM and GRU cells are joined (flax/nnx/nn/recurrent.py)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """What one wanted leaf is made from.

    Attributes:
        recipe: The recipe.
        kind: What the mapping says that it rests on.
    """

    recipe: Recipe
    kind: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Broken:
    """A law that a plan breaks: `wanted` is read from `stored`, which `why` speaks against."""

    law: int
    wanted: Path
    stored: Path
    why: str


def certify(
    wanted: Sequence[Wanted],
    placements: Sequence[Placement],
    sources: Mapping[Path, Source],
    by_rule: frozenset[Path] = frozenset(),
    copies: frozenset[Path] = frozenset(),
) -> list[Broken]:
    """Returns every place where a plan breaks a law; none for a plan that may be carried out.

    Args:
        wanted: The target's leaves with their roles.
        placements: What each stored leaf is.
        sources: What each leaf of the result is made from, by wanted path.
        by_rule: Stored leaves that a rule of the user's names.
        copies: Stored leaves that a rule says are wanted more than once.
    """
    kernel = _Kernel(wanted, placements, sources, by_rule)
    broken = [fault for item in wanted if item.leaf.path in sources for fault in kernel.check(item)]
    recipes = {path: item.recipe for path, item in sources.items()}
    twice = used_twice(recipes, kernel.placed, copies)
    broken += [
        Broken(law=4, wanted=path, stored=stored, why=f"{render(other)} is read from it too")
        for path, stored, other in twice
    ]
    astray = moments_astray(wanted, recipes, kernel.placed, kernel.levels_above(), kernel.name)
    broken += [Broken(law=8, wanted=path, stored=stored, why=why) for path, stored, why in astray]
    return [*broken, *kernel.owners(), *kernel.networks(), *kernel.roots()]


def error_of(broken: Sequence[Broken]) -> AmbiguousMappingError:
    """Returns the error for a plan that breaks laws; names both readings of each leaf."""
    rows = [
        f"  {render(item.wanted)}  <-  {render(item.stored)}: {item.why} (law {item.law})"
        for item in broken[:20]
    ]
    more = [f"  ... and {len(broken) - 20} more"] if len(broken) > 20 else []
    return AmbiguousMappingError(
        "the plan reads leaves from where their names do not say they are:\n" + "\n".join([*rows, *more]),
        paths=[item.wanted for item in broken],
        hints=[Hint("renames=[...] decides: write which stored leaf each of them is.")],
    )


@dataclasses.dataclass(frozen=True)
class _Element:
    """A stored leaf, or layer `at` of it, that becomes all of a wanted leaf, or layer `to` of it.

    `name` is that of the fused gates which the leaf is the first of.
    """

    path: Path
    at: int | None = None
    to: int | None = None
    name: Tokens | None = None


class _Kernel:
    def __init__(
        self,
        wanted: Sequence[Wanted],
        placements: Sequence[Placement],
        sources: Mapping[Path, Source],
        by_rule: frozenset[Path],
    ) -> None:
        self._sources, self._by_rule = sources, by_rule
        self.placed = {item.leaf.path: item for item in placements}
        self._wanted = {item.leaf.path: item for item in wanted}
        self._owners: dict[Path, set[Path]] = defaultdict(set)
        self._roots: dict[tuple[Path, str | None], dict[tuple[Tokens, Tokens], tuple[Path, Path]]]
        self._roots = defaultdict(dict)
        self._read_owners: dict[Path, list[tuple[Path, Path]]] = {}
        self._names: dict[Path, Tokens] = {}
        self._blocks: dict[Tokens, set[int]] | None = None

    def check(self, item: Wanted) -> Iterator[Broken]:
        path, source = item.leaf.path, self._sources[item.leaf.path]
        read = (source.recipe.path,) if isinstance(source.recipe, Read) else reads(source.recipe)
        if self._by_rule and not self._by_rule.isdisjoint(read):
            return
        yield from self._same_path_first(item, read)
        for stored in read:
            placed = self.placed[stored]
            why = _wrong_role(item, placed) if source.kind != "same path" else ""
            if why:
                yield Broken(law=9, wanted=path, stored=stored, why=why)
                return
            if item.role in ("optimizer", "step"):
                self._owners[item.owner].add(placed.owner)
            elif source.kind == "same path":
                if not _is_same_path(path, stored):
                    yield Broken(law=1, wanted=path, stored=stored, why="its whole path is another")
            elif not _may_give(item, placed):
                why = f"it lies in {placed.collection}, not in {item.collection or 'params'}"
                yield Broken(law=2, wanted=path, stored=stored, why=why)
            elif item.role == "model":
                self._read_owners.setdefault(placed.owner, []).append((path, stored))
        if item.role in ("model", "transient") and source.kind not in ("same path", "layout", "random"):
            yield from self._names_meet(item, source)

    def _same_path_first(self, item: Wanted, read: Sequence[Path]) -> Iterator[Broken]:
        if item.role in ("transient", "optimizer"):
            return
        path = item.leaf.path
        same = path if path in self.placed else tuple(map(str, path))
        if same not in self.placed or same in read or same in self._by_rule:
            return
        if item.leaf.kind is not None and self.placed[same].section == "step" and item.role != "step":
            return  # A model's Variable called `step` is a model's.
        if self.placed[same].leaf.shape == item.leaf.shape:
            yield Broken(
                law=1, wanted=item.leaf.path, stored=read[0], why=f"{render(same)} has its whole path"
            )

    def _names_meet(self, item: Wanted, source: Source) -> Iterator[Broken]:
        if source.kind == "module" and isinstance(source.recipe, Read):
            return  # One leaf under another name: its wrapper's own key tells which.
        elements = list(self._elements(source.recipe))
        if any(element is None for element in elements):
            why = "it is rearranged, and no rule says so"
            yield Broken(law=7, wanted=item.leaf.path, stored=reads(source.recipe)[0], why=why)
            return
        for element in elements:
            if element is None:
                continue
            roots = self._meeting(item, element)
            if roots is None:
                number = "" if element.at is None else f", layer {element.at}"
                why = f"its name there is {render(element.name or self.name(element.path))}{number}"
                yield Broken(law=5, wanted=item.leaf.path, stored=element.path, why=why)
                return
            placed = self.placed[element.path]
            known = self._roots[placed.owner, placed.collection]
            known.setdefault(roots, (item.leaf.path, element.path))

    def name(self, path: Path) -> Tokens:
        """Returns the name of a stored leaf within its collection."""
        if path not in self._names:
            self._names[path] = canonical(self.placed[path].path)
        return self._names[path]

    def _meeting(self, item: Wanted, element: _Element) -> tuple[Tokens, Tokens] | None:
        """Returns what lies above the common name of two elements; None where they have none."""
        stored = element.name or self.name(element.path)
        for there in self._readings(stored, element.at, element.path):
            for here in self._readings(item.tokens, element.to, None):
                common = _common_end(here, there)
                above, below = here[: len(here) - common], there[: len(there) - common]
                if common and _may_go(above, below):
                    return above, below
        return None

    def _readings(self, name: Tokens, layer: int | None, stored: Path | None) -> Iterator[Tokens]:
        """Yields the name of one layer of a leaf, in each place where the layer's number may stand."""
        boxed = stored is not None and len(name) > 1 and name[-1] == "value"
        for tokens in (name, name[:-1]) if boxed else (name,):
            if layer is None:
                yield tokens
                yield from self._left_over(tokens)
                continue
            for at in range(1, len(tokens)):
                yield (*tokens[:at], f"#{layer}", *tokens[at:])
            for at in range(2, len(tokens) - 1):
                # A member of a block: layer = cycle * size + position.
                if is_number(tokens[at]) and not is_number(tokens[at - 2]):
                    size = len(self._block_sizes().get(tokens[:at], ()))
                    number = layer * size + int(tokens[at][1:])
                    yield (*tokens[: at - 1], f"#{number}", *tokens[at + 1 :])

    def _left_over(self, tokens: Tokens) -> Iterator[Tokens]:
        """Yields the name of a layer after the last cycle of its block."""
        for at in range(2, len(tokens) - 1):
            group = tokens[at - 2].removesuffix("_remainder")
            if is_number(tokens[at]) and group != tokens[at - 2]:
                block = (*tokens[: at - 2], group, tokens[at - 1])
                for cycles in self._cycles(block):
                    number = cycles * len(self._block_sizes().get(block, ())) + int(tokens[at][1:])
                    yield (*tokens[: at - 2], group, f"#{number}", *tokens[at + 1 :])

    def _block_sizes(self) -> dict[Tokens, set[int]]:
        """The positions of every numbered module below another one, on either side."""
        if self._blocks is None:
            self._blocks = defaultdict(set)
            names = [item.tokens for item in self._wanted.values() if item.role == "model"]
            names += [self.name(path) for path, item in self.placed.items() if item.section == "model"]
            for name in names:
                for at in range(2, len(name) - 1):
                    if is_number(name[at]):
                        self._blocks[name[:at]].add(int(name[at][1:]))
        return self._blocks

    def _cycles(self, block: Tokens) -> Iterable[int]:
        found: set[int] = set()
        for path, placed in self.placed.items():
            if placed.section == "model" and _holds(self.name(path), block):
                found |= set(placed.leaf.shape)
        for item in self._wanted.values():
            if item.role == "model" and _holds(item.tokens, block):
                found |= set(item.leaf.shape)
        return sorted(found | {0})

    def _elements(self, recipe: Recipe, to: int | None = None) -> Iterator[_Element | None]:
        """Yields what a recipe of whole leaves and layers reads; None for any other step."""
        match recipe:
            case Read():
                yield _Element(recipe.path, None, to)
            case Index(source=Read() as source):
                yield _Element(source.path, recipe.index, to)
            case Index(source=Concat() as source) if recipe.axis != source.axis:
                fused = self._fused(source)
                yield fused and dataclasses.replace(fused, at=recipe.index, to=to)
            case Stack() if to is None:
                for at, part in enumerate(recipe.sources):
                    yield from self._elements(part, at)
            case Fill():
                return
            case Concat():
                fused = self._fused(recipe)
                if fused is not None:
                    yield dataclasses.replace(fused, to=to)
                    return
                for part in recipe.sources:
                    yield from self._elements(part, to)
            case _:
                yield None

    def _fused(self, recipe: Concat) -> _Element | None:
        """Returns the gates of one cell, in their order, as the layer that they are in NNX's cell."""
        read = [part.path for part in recipe.sources if isinstance(part, Read)]
        whole = [self.name(path) for path in read]
        boxed = all(len(name) > 3 and name[-1] == "value" for name in whole)
        names = [name[:-1] for name in whole] if boxed else whole
        if len(names) < len(recipe.sources) or any(len(name) < 2 for name in names):
            return None
        ends = {(name[:-2], name[-2][:1], name[-1]) for name in names}
        if len(ends) > 1 or "".join(name[-2][1:] for name in names) != _GATES.get(len(names)):
            return None
        (module, side, weight) = next(iter(ends))
        return _Element(read[0], name=(*module, f"dense_{side}", weight))

    def levels_above(self) -> set[Tokens]:
        """Returns what lies above the common names of the weights in the target."""
        return {above for found in self._roots.values() for above, _ in found}

    def networks(self) -> Iterator[Broken]:
        """Yields where a weight is read from another train state than its path names, or one of several."""
        every = {item.owner for item in self.placed.values() if item.section == "model"}
        owners = set(map(canonical, every))
        unnamed: set[Path] = set()
        for owner, read in self._read_owners.items() if len(owners) > 1 else ():
            for path, stored in read:
                tokens = self._wanted[path].tokens
                named = max((o for o in owners if o and tokens[: len(o)] == o), key=len, default=None)
                if named is None:
                    unnamed.add(owner)
                elif named != canonical(owner):
                    why = f"{render(named)} is another train state"
                    yield Broken(law=3, wanted=path, stored=stored, why=why)
        if len(unnamed) > 1:
            path, stored = self._read_owners[next(iter(unnamed))][0]
            yield Broken(law=3, wanted=path, stored=stored, why="other leaves come from another train state")

    def owners(self) -> Iterator[Broken]:
        """Yields where one optimizer is taken from two train states, or one train state serves two."""
        users: dict[Path, list[Path]] = defaultdict(list)
        for wanted, stored in self._owners.items():
            for owner in stored:
                users[owner].append(wanted)
        split = {wanted for wanted, stored in self._owners.items() if len(stored) > 1}
        lent = {wanted for owners in users.values() if len(owners) > 1 for wanted in owners}
        refused = split | lent
        for item in self._wanted.values() if refused else ():
            is_beside = item.role in ("optimizer", "step") and item.leaf.path in self._sources
            if is_beside and item.owner in refused:
                stored = reads(self._sources[item.leaf.path].recipe)[0]
                why = "several train states share an optimizer or a step"
                yield Broken(law=3, wanted=item.leaf.path, stored=stored, why=why)

    def roots(self) -> Iterator[Broken]:
        """Yields where the leaves of one stored collection have lost levels that others keep."""
        for (owner, collection), found in self._roots.items():
            if len(found) < 2 and not any(below for _, below in found):
                continue
            names = [
                self.name(path)
                for path, item in self.placed.items()
                if item.section == "model" and item.owner == owner and item.collection == collection
            ]
            for (_, below), (wanted, stored) in found.items():
                if below and not all(name[: len(below)] == below for name in names):
                    why = f"{render(below)} is not above the whole model"
                    yield Broken(law=7, wanted=wanted, stored=stored, why=why)
            if len({above for above, below in found if not below}) > 1:
                (first, *_), (wanted, stored) = next(iter(found)), list(found.values())[-1]
                why = f"other leaves lie below {render(first)}"
                yield Broken(law=7, wanted=wanted, stored=stored, why=why)


def _is_same_path(wanted: Path, stored: Path) -> bool:
    if wanted == stored:
        return True
    # By segments: Orbax writes a tuple key of a normalising wrapper as its text.
    here, there = canonical(segments(wanted)), canonical(segments(stored))
    return here == there or (there[-1:] == ("value",) and here == there[:-1])


def _holds(name: Tokens, block: Tokens) -> bool:
    return any(name[at : at + len(block)] == block for at in range(len(name) - len(block)))


def _common_end(left: Tokens, right: Tokens) -> int:
    shorter = min(len(left), len(right))
    if left[len(left) - shorter :] == right[len(right) - shorter :]:
        return shorter  # Nearly every pair.
    return next(n for n in range(shorter) if left[-1 - n] != right[-1 - n])


def _may_go(above: Tokens, below: Tokens) -> bool:
    """Tells whether what lies above a common name may differ: a level that only one side has."""
    if any(map(is_number, above[1:])) or any(map(is_number, below)):
        return False
    named = [token for token in above if token not in _PLAIN and not is_number(token)]
    return not named or not [token for token in below if token not in _PLAIN]


def _wrong_role(item: Wanted, placed: Placement) -> str:
    section = placed.section
    if item.role == "optimizer":
        is_count = section == "step" and item.tokens[-1:] == ("count",)
        return "" if section == "optimizer" or is_count else "it is no part of an optimizer"
    if item.role == "step":
        return "" if section == "step" else "it is not the step of a train state"
    return "it belongs to the optimizer or counts steps" if section in ("optimizer", "step") else ""


def _may_give(item: Wanted, placed: Placement) -> bool:
    """Tells whether the collections agree; a type that Flax does not name may be in any of its own name."""
    stored, wanted = placed.collection, item.collection
    if None in (stored, wanted) or stored == wanted:
        return wanted is not None or stored is None or stored in FLAX_COLLECTIONS or stored in item.tokens
    if wanted in FLAX_COLLECTIONS:
        return stored in item.tokens
    return True
