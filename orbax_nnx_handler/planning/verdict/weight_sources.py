"""A weight comes from the leaf of its name: laws 5, 6 and 7, element by element."""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from functools import cached_property
from typing import NamedTuple

from orbax_nnx_handler.planning.core.leaves import GRU_GATES, LSTM_GATES, Shape
from orbax_nnx_handler.planning.core.paths import Path, Tokens, canonical, is_number, render
from orbax_nnx_handler.planning.core.recipes import Read, Recipe, reads
from orbax_nnx_handler.planning.layouts.layout import Placement, ScannedBlocks, is_copy_level
from orbax_nnx_handler.planning.target.roles import Wanted
from orbax_nnx_handler.planning.verdict.elements import (
    Element,
    Name,
    SideNames,
    common_end,
    elements_of,
    members_of,
    positions,
)
from orbax_nnx_handler.planning.verdict.stacked_axes import Stacked, StackedAxes, StackedGroup, options_of

PLAIN = frozenset({"model", "state", "train_state"})  # They tell no network from another.
_STATISTICS = frozenset({"u", "sigma"})
"""What `nnx.SpectralNorm` keeps of a weight (flax/nnx/nn/normalization.py)."""


_Levels = tuple[Tokens, Tokens]
"""What lies above a common name in the target, and in the checkpoint."""


class WrongSource(NamedTuple):
    """A wanted leaf that is read from another leaf than that of its name."""

    law: int
    wanted: Path
    stored: Path
    why: str


class _Meeting(NamedTuple):
    """The names under which two elements are one, and what lies above the common part of either."""

    here: Name
    there: Name
    above: Tokens
    below: Tokens


class _Layer(NamedTuple):
    """A layer of a stored leaf that is proven: what stands before and after its number in the wanted name."""

    above: Tokens
    below: Tokens
    axis: int | None
    collection: str | None
    shape: Shape


class Weights:
    """Proves that each weight is read from the leaves of its name.

    Attributes:
        placed: What each stored leaf is.
        roots: What lies above the common names, wanted and stored, by stored collection; with an example.
    """

    def __init__(
        self,
        wanted: Sequence[Wanted],
        placed: Mapping[Path, Placement],
        by_rule: frozenset[Path],
        scans: Sequence[ScannedBlocks],
        axes: StackedAxes,
    ) -> None:
        self.placed, self._wanted, self._by_rule, self._scans = placed, wanted, by_rule, scans
        self._axes = axes
        self.roots: dict[tuple[Path, str | None], dict[tuple[Tokens, Tokens], tuple[Path, Path]]]
        self.roots = defaultdict(dict)
        self._sides: dict[tuple[Path, str | None], SideNames] = {}
        self._last: dict[Path, _Layer] = {}
        self._last_part: tuple[Path, _Meeting, Element, Placement] | None = None
        self._moved: dict[tuple[Path, str | None], set[Tokens]] = defaultdict(set)

    def name(self, path: Path) -> Tokens:
        """Returns the name of a stored leaf within its collection."""
        return self.placed[path].tokens

    def check(
        self, item: Wanted, recipe: Recipe, in_module: bool, axis_by: str | None = None
    ) -> Iterator[WrongSource]:
        """Yields where a weight is not made of the elements of its name.

        Args:
            item: The weight.
            recipe: What it is made from.
            in_module: Whether one of Flax's own modules is said to call it otherwise.
            axis_by: What is said to tell the axis of its layers.
        """
        path = item.leaf.path
        if isinstance(recipe, Read) and self.is_below_known_roots(item, self.placed[recipe.path]):
            return
        if in_module and isinstance(recipe, Read) and self._is_in_renamed_wrapper(item, recipe.path):
            return
        elements = elements_of(recipe, self.placed)
        if elements is None:
            yield WrongSource(7, path, reads(recipe)[0], "it is rearranged, and no rule says so")
            return
        for element in elements:
            is_layer = len(element.at) == 1 and not element.to and not element.gates
            if is_layer and self.is_next_layer(item, element.path, element.axis, element.at[0]):
                continue
            if self._is_next_part(item, element):
                continue
            meeting = self._meet(item, element, in_module)
            if meeting is None:
                layer = "".join(f", layer {number}" for number in element.at)
                why = f"its name there is {render(self.name(element.path))}{layer}"
                yield WrongSource(5, path, element.path, why)
                return
            placed = self.placed[element.path]
            known = self.roots[placed.owner, placed.collection]
            known.setdefault((meeting.above, meeting.below), (path, element.path))
            if element.at or element.to:
                self._add(item, element, meeting, axis_by)

    def keep_roots(self, whole: Iterable[tuple[Wanted, Path]]) -> None:
        """Keeps what lies above the names of leaves that have their whole paths, in collections of others."""
        for item, path in whole if self.roots else ():
            placed = self.placed[path]
            known = self.roots.get((placed.owner, placed.collection))
            if not known or placed.section != "model" or path in self._by_rule:
                continue
            is_boxed = placed.tokens[-1:] == ("value",) != item.tokens[-1:]
            name = placed.tokens[:-1] if is_boxed else placed.tokens
            known.setdefault((item.tokens[: len(item.tokens) - len(name)], ()), (item.leaf.path, path))

    def levels(self, by_rule: Iterable[tuple[Wanted, Path]]) -> Mapping[Path, Set[_Levels]]:
        """Returns what lies above the names of proven weights, and of those of rules, by train state."""
        found: dict[Path, set[_Levels]] = defaultdict(set)
        for (owner, _), known in self.roots.items():
            found[owner].update(known)
        for item, path in by_rule:
            here, there = item.tokens, self.name(path)
            common = common_end(here, there)
            found[self.placed[path].owner].add((here[: len(here) - common], there[: len(there) - common]))
        return found

    def is_below_known_roots(self, item: Wanted, placed: Placement) -> bool:
        """Tells whether a leaf read whole has the name, and the levels above it, that others have."""
        roots = self.roots.get((placed.owner, placed.collection), ())
        return is_below(item, placed, roots)

    def is_next_layer(self, item: Wanted, path: Path, axis: int | None, index: int) -> bool:
        """Tells whether a weight is a layer of a leaf of which another one is proven, along the same axis."""
        known = self._last.get(path)
        if known is None or item.leaf.shape != known.shape or (axis, item.collection) != known[2:4]:
            return False
        return item.tokens == (*known.above, f"#{index}", *known.below)

    def _is_next_part(self, item: Wanted, element: Element) -> bool:
        """Tells whether an element is the leaf of another layer of the stack that was looked at last."""
        if self._last_part is None or item.leaf.path != self._last_part[0]:
            return False
        _, meeting, last, like = self._last_part
        placed = self.placed[element.path]
        if placed.leaf.shape != like.leaf.shape or (placed.owner, placed.collection) != (
            like.owner,
            like.collection,
        ):
            return False
        if element.at or element.gates or len(element.to) != 1 or element.to_axis != last.to_axis:
            return False
        here, above = meeting.here, len(meeting.above)
        layer = f"#{element.to[0]}"
        named = (*meeting.below, *here.tokens[above : here.depth], layer, *here.tokens[here.depth + 1 :])
        return self.name(element.path) == named

    @cached_property
    def _here(self) -> SideNames:
        models = (item for item in self._wanted if item.role == "model")
        return SideNames(((item.tokens, item.leaf.shape) for item in models), self._scans)

    @cached_property
    def _owners(self) -> Mapping[Tokens, str]:
        """The stored networks with their names, without levels that tell none from another."""
        owners = {canonical(item.owner) for item in self.placed.values() if item.section == "model"}
        named = {at: [name for name in at if name not in PLAIN and not is_number(name)] for at in owners}
        return {at: names[-1] if names else "" for at, names in named.items()}

    @cached_property
    def _apart(self) -> Set[str]:
        """The first names of stored weights that no wanted path has twice, `model/model`, below an owner."""
        models = [item for item in self.placed.values() if item.section == "model" and item.tokens]
        depths = {len(owner) for owner in self._owners}
        twice = ((at, item.tokens) for item in self._wanted for at in depths if len(item.tokens) > at + 1)
        return {item.tokens[0] for item in models} - {of[at] for at, of in twice if of[at] == of[at + 1]}

    @cached_property
    def _tuples(self) -> Set[Tokens]:
        """What holds an optimizer at a number: a model has a place there too, and is no layer."""
        owners = {item.owner for item in self._wanted if item.role == "optimizer" and item.owner}
        return {at[:-1] for at in map(canonical, owners) if is_number(at[-1])}

    def _there(self, owner: Path, collection: str | None) -> SideNames:
        key = owner, collection
        if key not in self._sides:
            models = (
                (item.tokens, item.leaf.shape)
                for path, item in self.placed.items()
                if item.section == "model" and path not in self._by_rule
                if item.owner == owner and item.collection == collection
            )
            self._sides[key] = SideNames(models, self._scans)
        return self._sides[key]

    def _meet(self, item: Wanted, element: Element, in_module: bool) -> _Meeting | None:
        placed = self.placed[element.path]
        side = self._there(placed.owner, placed.collection)
        spellings, owner = list(self._spellings(element, in_module)), canonical(placed.owner)
        for there in (name for tokens in spellings for name in side.of(tokens, element.at)):
            for here in self._here.of(item.tokens, element.to):
                common = common_end(here.tokens, there.tokens)
                above, below = (tokens[: len(tokens) - common] for tokens in (here.tokens, there.tokens))
                if common and self._may_go(above, below, owner):
                    return _Meeting(here, there, above, below)
        return None

    def _may_go(self, above: Tokens, below: Tokens, owner: Tokens) -> bool:
        """Tells whether what lies above a common name may differ: a level that only one side has.

        A number there is a layer's, but in the name of the train state (`agent_0`), as the model's place in a
        tuple right below it, or in a name that Linen makes from a module's class (`MLP_0`). And
        `target/net` is not `net` where a module `target` is stored.
        """
        is_below = above[: len(owner)] == owner
        depth = len(owner) if is_below else 0
        others = {name for other, name in self._owners.items() if other != owner} - {*owner}
        if not others.isdisjoint(above[depth:]):
            return False  # It is the name of another network.
        if is_below and not self._apart.isdisjoint(above[depth : depth + 1]):
            return False
        is_place = 0 < depth == len(above) - 1 or above[:-1] in self._tuples
        layers = (token for last, token in itertools.pairwise(("", *below)) if last == last.lower())
        if any(map(is_number, () if is_place else above[max(depth, 1) :])) or any(map(is_number, layers)):
            return False
        named = [token for token in above if token not in PLAIN and not is_number(token)]
        return not named or not [token for token in below if token not in PLAIN]

    def _spellings(self, element: Element, in_module: bool) -> Iterator[Tokens]:
        """Yields what a stored leaf is called in NNX."""
        name = self.name(element.path)
        if element.gates:
            fused = self._fused(element.gates)
            yield from () if fused is None else (fused,)
            return
        yield name
        if len(name) > 1 and name[-1] == "value":
            yield name[:-1]
        if not in_module or not name:
            return
        last = name[-1]
        plain = name[:-1] if last == "value" else name
        if len(plain) > 1 and plain[-2] in ("i", "h"):
            yield (*plain[:-2], f"dense_{plain[-2]}", plain[-1])
        for wrapper, layer, weight in self._wrapped.values():
            if name[:-1] == (*wrapper, *layer, *weight) and last in _STATISTICS:
                yield (*wrapper, "batch_stats", *weight, last)
            elif name == (*wrapper, *layer, *weight, "scale"):
                yield (*wrapper, "scales", *weight)
            for module in (wrapper, _parent(wrapper)):
                inner = (*module, *layer)
                if name[: len(inner)] == inner:
                    yield (*wrapper, "layer_instance", *name[len(inner) :])

    def _is_in_renamed_wrapper(self, item: Wanted, stored: Path) -> bool:
        """Tells whether a leaf is of the layer in a normalising wrapper that a rule has renamed."""
        name = self.name(stored)
        for path, (wrapper, layer, _) in self._wrapped.items():
            for module in (wrapper, _parent(wrapper)) if path in self._by_rule else ():
                inner = (*module, *layer)
                end = ("layer_instance", *name[len(inner) :])
                if name[: len(inner)] == inner and item.tokens[-len(end) :] == end:
                    return True
        return False

    @cached_property
    def _wrapped(self) -> Mapping[Path, tuple[Tokens, Tokens, Tokens]]:
        """Wrapper, layer and weight of each statistic that Linen keeps under one key with slashes."""
        found: dict[Path, tuple[Tokens, Tokens, Tokens]] = {}
        for path, item in self.placed.items():
            key = item.path[-1] if item.path and item.section == "model" else None
            keys = key.split("/") if isinstance(key, str) else ()
            if len(keys) > 2 and keys[-1] in {*_STATISTICS, "scale"}:
                layer, *weight, _ = keys
                parts = canonical((layer,)), canonical(tuple(weight))
                wrapper = self.name(path)[: -1 - len(parts[0]) - len(parts[1])]
                found[path] = (wrapper, *parts)
        return found

    def of_other_blocks(self, whole: Sequence[tuple[Wanted, Path]]) -> Iterator[tuple[Path, Path, str]]:
        """Yields each leaf read whole from a block that has more positions on one side than on the other.

        Args:
            whole: The weights that are read whole, with what they are read from.
        """
        models = [path for path, item in self.placed.items() if item.section == "model"]
        stored = [self.name(path) for path in models if path not in self._by_rule]
        wanted = [item.tokens for item in self._wanted if item.role == "model"]
        remainders = {token for name in (*stored, *wanted) for token in name if token.endswith("_remainder")}
        here = positions(wanted)
        names = {member[-2:] for member in here}
        blocks = {n for n in names if f"{n[0]}_remainder" in remainders or self._is_scan(*n)}
        if not blocks:
            return  # Nearly every model.
        there = positions(stored)
        for item, path in whole:
            name = self.name(path)
            for member in members_of(item.tokens):
                below = len(item.tokens) - len(member)
                other = name[: len(name) - below]
                if member[-2:] in blocks and other in there and here[member] != there[other]:
                    sizes = len(there[other]), len(here[member])
                    yield item.leaf.path, path, f"a block has {sizes[0]} layers there, and {sizes[1]} here"
                    break

    def of_other_layers(self, whole: Sequence[tuple[Wanted, Path]]) -> Iterator[tuple[Path, Path, str]]:
        """Yields each leaf read whole from a scan of its name that begins at another layer there."""
        for item, path in whole if self._scans else ():
            placed = self.placed[path]
            side = self._there(placed.owner, placed.collection)
            there = side.layers_before(self.name(path), may_be_lost=True)
            here = self._here.layers_before(item.tokens, may_be_lost=False)
            if here and there and here.isdisjoint(there):
                yield item.leaf.path, path, f"{min(there)} layers lie before it there, and {min(here)} here"

    def _is_scan(self, group: str, member: str) -> bool:
        """Tells whether layers of a name in a group are a block: by the layout, or as their names are one."""
        known = any(scan.name == group and member in scan.numbered for scan in self._scans)
        return known or group == member

    def _fused(self, gates: Iterable[Path]) -> Tokens | None:
        """Returns the name of the gates of one cell, in their order, in NNX's cell."""
        whole = [self.name(path) for path in gates]
        boxed = all(len(name) > 3 and name[-1] == "value" for name in whole)
        names = [name[:-1] for name in whole] if boxed else whole
        if any(len(name) < 2 for name in names):
            return None
        ends = {(name[:-2], name[-2][:1], name[-1]) for name in names}
        if len(ends) > 1 or "".join(name[-2][1:] for name in names) not in (LSTM_GATES, GRU_GATES):
            return None
        (module, side, weight) = next(iter(ends))
        return (*module, f"dense_{side}", weight)

    def _add(self, item: Wanted, element: Element, meeting: _Meeting, axis_by: str | None) -> None:
        """Adds the axes of an element to those of its group."""
        here, there = meeting.here, meeting.there
        rest = len(there.tokens if there.depth else here.tokens) - (there.depth or here.depth) - 1
        layers = [name.tokens[: len(name.tokens) - rest - 1] for name in (here, there)]
        placed = self.placed[element.path]
        shape = placed.leaf.shape
        if element.gates:
            # Along the last axis, or the one before layers that are stacked on the last.
            at = len(shape) - (2 if element.axis == len(shape) - 1 else 1)
            size = sum(self.placed[gate].leaf.shape[at] for gate in element.gates)
            shape = (*shape[:at], size, *shape[at + 1 :])
        side = self._there(placed.owner, placed.collection)
        blocks = side.known_blocks(there), self._here.known_blocks(here)
        group = StackedGroup(
            placed.owner,
            placed.collection,
            _spelt(layers, meeting),
            (there.form(element.at), here.form(element.to)),
        )
        leaf = Stacked(
            wanted=item.leaf.path,
            stored=element.path,
            axes=(element.axis, element.to_axis),
            options=options_of(shape, item.leaf.shape, element, blocks),
            ranks=(len(shape), len(item.leaf.shape)),
            ground=axis_by,
        )
        self._axes.add(group, there.tokens[len(there.tokens) - rest :], leaf)
        if there.scan is None and len(element.at) == 1 and not element.gates and not element.to:
            name, depth = self.name(element.path), there.depth
            above = (*meeting.above, *name[len(meeting.below) : depth])
            self._last[element.path] = _Layer(
                above, name[depth:], element.axis, item.collection, item.leaf.shape
            )
        if here.scan is None and len(element.to) == 1 and not element.gates and not element.at:
            self._last_part = (item.leaf.path, meeting, element, placed)


def is_below(item: Wanted, placed: Placement, roots: Iterable[tuple[Tokens, Tokens]]) -> bool:
    """Tells whether two names are one below levels that have been found above names of the two sides."""
    here, there = item.tokens, placed.tokens
    for above, below in roots:  # noqa: SIM110 (nearly every leaf comes here: no generator)
        if here == above + there[len(below) :] and there[: len(below)] == below:
            return True
    return False


def is_of_its_name(item: Wanted, placed: Placement) -> bool:
    """Tells whether a leaf beside the weights is the one of its name, as any Flax wrote it."""
    here, there = item.tokens, canonical(placed.path)
    there = there[:-1] if there[-1:] == ("value",) and here[-1:] != ("value",) else there
    there = there[1:] if there[:1] == ("model",) and here[:1] != ("model",) else there
    # Flax 0.11 took the level with the stream's name away.
    return not any(map(is_copy_level, here[: -len(there)] or there[: -len(here)])) and any(
        _is_end(left, right) or _is_end(right, left)
        for left in (here, (*here[:-2], *here[-1:]))
        for right in (there, (*there[:-2], *there[-1:]))
    )


def is_beside_weights(item: Wanted, placed: Placement, levels: Mapping[Path, Set[_Levels]]) -> bool:
    """Tells whether a leaf aside has its name below the levels that weights of its train state have.

    Args:
        item: The leaf that is read from it.
        placed: The leaf aside.
        levels: What lies above the names of weights, by stored train state.
    """
    own, here = canonical(placed.own), item.tokens
    for above, below in levels.get(placed.owner, ()):
        name = (*below, *here[len(above) :])
        if here[: len(above)] == above and own in (name, ("model", *name), (*above[-1:], *name)):
            return True
    return False


def _is_end(whole: Tokens, end: Tokens) -> bool:
    return len(end) > 0 and whole[len(whole) - len(end) :] == end


def _spelt(layers: Sequence[Tokens], meeting: _Meeting) -> frozenset[Tokens]:
    """Returns the names under which a rule may speak of a group: with the levels above it and without."""
    here, there = layers
    names = {here, there, here[len(meeting.above) :], there[len(meeting.below) :]}
    scans = {name.scan.name for name in (meeting.here, meeting.there) if name.scan is not None}
    return frozenset(names | {(*name[:-1], scan) for name in names for scan in scans if name})


def _parent(module: Tokens) -> Tokens:
    return module[:-2] if module and is_number(module[-1]) else module[:-1]
