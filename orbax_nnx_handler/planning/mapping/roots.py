"""Which part of each path is the model's own; what stands above it: where the model sits, and its collection.

`model/decoder/norm/scale` in a train state module and `decoder/norm/scale` in a
params tree are the same leaf. The root is the prefix under which most leaves of
the two sides meet.

A collection is a part of the name (law 2): a parameter comes from `params`, a
statistic from `batch_stats`, and so on for every type that Flax, or the program,
has given a name. What lies beside them (`ema_params`, `grads`) is another value,
unless the target or a rule asks for it by name.
"""

import dataclasses
import functools
import itertools
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set

from orbax_nnx_handler.planning.core.leaves import with_fields
from orbax_nnx_handler.planning.core.paths import Tokens, canonical, is_number, shared_levels
from orbax_nnx_handler.planning.layouts.layout import FLAX_COLLECTIONS, is_copy_beside, is_copy_level
from orbax_nnx_handler.planning.rules.entries import Entry
from orbax_nnx_handler.planning.target.roles import (
    Wanted,
    base_collection,
    is_called_like,
    is_named,
    is_of_another_type,
    of_role,
)

PLAIN_LEVELS = frozenset({"model", "train_state", "state"})
"""Levels that name no network: what a program calls the field that holds a model or a train state.

`model`: MaxText's `TrainStateNNX.model`, Flax's checkpointing guide; `state`, `train_state`:
Flax's and MaxText's examples.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roots:
    """The canonical prefixes above the model.

    Attributes:
        wanted: Tokens above the model in the target.
        stored: Tokens above the model below the stored collection.
        overlap: How many wanted leaves the stored side meets under these roots.
    """

    wanted: Tokens
    stored: Tokens
    overlap: int


def find_roots(
    wanted: Collection[Tokens], stored: Collection[Tokens], fields: Collection[Tokens] = ()
) -> Roots:
    """Returns the roots under which the most leaves meet; shorter ones win ties.

    Args:
        wanted: The wanted paths.
        stored: The stored ones.
        fields: Fields of stored train states that are collections of a name of their own: what lies
            in one is meant only where it is named.
    """
    here, there = _Below(wanted), _Below(stored)
    if there.names(()) >= {*wanted}:
        return Roots(wanted=(), stored=(), overlap=len(wanted))  # Many a model: no pair is shorter.
    best, most = Roots(wanted=(), stored=(), overlap=0), (-1, -1, False, -1)
    above = dict.fromkeys([*_chain(wanted), *_only_level_above(stored, wanted)])
    pairs = itertools.product(above, _chain(stored))
    for left, right in sorted(pairs, key=lambda pair: (len(pair[0]) + len(pair[1]), len(pair[1]))):
        if any(right[: len(field)] == field for field in fields):
            continue
        if right and not (_holds_all(wanted, left) and _holds_all(stored, right)):
            continue  # The larger part of a stored model is not the wanted one by size alone.
        if left and right and not _may_both_go(wanted, left, right):
            continue  # Two modules of other names are not one module, though their leaves are called alike.
        names = there.names(right)
        exact = sum(strip(path, left) in names for path in wanted)
        if exact == len(wanted):
            return Roots(wanted=left, stored=right, overlap=exact)  # No other pair can meet in more.
        # Leaves, not skeletons: a root that keeps like layers apart would count each of them.
        may_meet = not {*map(_skeleton, here.heads(left))}.isdisjoint(map(_skeleton, there.heads(right)))
        overlap = _meeting(here.skeletons(left), there.skeletons(right)) if may_meet else 0
        # Where scanned blocks name their layers otherwise, no whole path meets; the model's parts still do.
        heads = _meeting(here.heads(left), there.heads(right))
        # Of two that hold the same, `model` is the program's own field, and `teacher` names another network.
        meeting = (overlap, exact, bool(exact and not named_levels(left)), heads)
        if meeting > most:
            best, most = Roots(wanted=left, stored=right, overlap=overlap), meeting
    return best


class _Below:
    """What the paths of one side are below each root, worked out when first asked for."""

    def __init__(self, paths: Collection[Tokens]) -> None:
        self.names = functools.cache(functools.partial(_names, paths))
        self.skeletons = functools.cache(functools.partial(_skeletons, paths))
        self.heads = functools.cache(functools.partial(_heads, paths))


def _names(paths: Collection[Tokens], root: Tokens) -> Set[Tokens]:
    return {strip(path, root) for path in paths}


def _meeting(wanted: Counter[Tokens], stored: Counter[Tokens]) -> int:
    return sum(count for path, count in wanted.items() if path in stored)


def named_levels(path: Tokens) -> Tokens:
    """Returns the levels of a path that name something."""
    return tuple(token for token in path if token not in PLAIN_LEVELS)


def strip(tokens: Tokens, root: Tokens) -> Tokens:
    """Returns the tokens below a root; unchanged where they are not below it."""
    return tokens[len(root) :] if root and tokens[: len(root)] == root else tokens


def levels_with_most(moments: Iterable[Tokens], weights: Iterable[Tokens], above: Tokens) -> list[Tokens]:
    """Returns the levels below some keys whose weights have the names that most moments end in."""
    depth = len(above) + 1
    names: dict[Tokens, set[Tokens]] = defaultdict(set)
    for path in weights:
        if len(path) > depth and path[: depth - 1] == above:
            names[path[:depth]].add(path[depth:])
    ends = [[moment[at:] for at in range(len(moment))] for moment in moments]
    # By the longest names: a `head/kernel` ends as a lone `kernel` does.
    longest = {
        at: [next((len(e) for e in each if e in own), 0) for each in ends] for at, own in names.items()
    }
    most = max(map(sum, longest.values()), default=0)
    return [level for level, lengths in longest.items() if sum(lengths) == most]


def owner_of(tokens: Tokens, owners: Collection[Tokens]) -> Tokens | None:
    """Returns the stored train state that a wanted path names, the deepest one; None for none."""
    named = [owner for owner in owners if owner and tokens[: len(owner)] == owner]
    return max(named, key=len, default=None)


def below_model(entries: Sequence[Entry], wanted: Iterable[Tokens]) -> Sequence[Entry]:
    """Returns the entries, those that rules call by the target's whole path below the model as others are.

    `("dense", "model/up")` leaves a weight in its collection, where no other one has `model` above it. What
    holds a wrapper's value, which Linen stores in one key with slashes, is a module itself.
    """
    tops: dict[str, list[Tokens]] = defaultdict(list)
    for path in wanted:
        tops[path[0]].append(path)
    own = [top for top in tops if len(tops) == 1 or top in PLAIN_LEVELS]
    below = tops[own[0]] if len(own) == 1 else []
    level = shared_levels(below, 1) if below else ()
    if level and is_number(below[0][len(level)]):
        level = level[:-1]  # The name of a list is none of a module above the model.
    named = [entry for entry in entries if level and entry.named and entry.prefix]
    named = [entry for entry in named if canonical(entry.segments[: len(level)]) == level]
    moved = {id(entry) for entry in named if not _is_of_wrapper(entry, len(level))}
    left = [x for x in entries if moved and x.section == "model" and id(x) not in moved]
    if any(not is_copy_level(top) for top in {*tops}.difference(own)):
        # Beside another network, `model` is one of them unless what is left lies in it without its name.
        inside = {path[len(level)] for path in below} - tops.keys()
        apart = {x.owner for x in left} - {x.owner for x in left if x.tokens[0] in inside}
        moved -= {id(entry) for entry in named if entry.owner in apart}
    if not moved:
        return entries
    others: dict[Tokens, set[Tokens]] = defaultdict(set)
    for entry in left:
        others[entry.owner].update(entry.tokens[:at] for at in range(len(level) + 1))
    # Where rules call all of a model so, what names nothing goes.
    alone = {tuple(itertools.dropwhile(PLAIN_LEVELS.__contains__, level))}
    depths = {
        owner: next(at for at in range(len(level) + 1) if level[at:] in (others[owner] or alone))
        for owner in {entry.owner for entry in entries if id(entry) in moved}
    }
    return [
        with_fields(entry, segments=entry.segments[depths[entry.owner] :]) if id(entry) in moved else entry
        for entry in entries
    ]


def _is_of_wrapper(entry: Entry, depth: int) -> bool:
    return "/" in (key := str(entry.sources[0][-1])) and "/".join(entry.segments[depth:]) == key


def of_root(entries: Sequence[Entry]) -> Sequence[Entry]:
    """Returns the entries, the root's own model in the root's train state also where rules put a level above.

    `("params", "model/params")` names no other network: statistics and optimizer beside `params` are its own.
    """
    fields = [entry for entry in entries if entry.section in FIELDS]
    left = {entry.owner for entry in fields if not entry.named}
    rules = [entry for entry in fields if entry.named and entry.owner]
    own = [entry for entry in rules if entry.section == "model" and not named_levels(entry.owner)]
    others = left.union(entry.owner for entry in rules if entry.section != "model" or not _is_of_root(entry))
    plain = {entry.owner for entry in own} - {owner[:at] for owner in others for at in range(len(owner) + 1)}
    if () not in left or not plain:
        return entries  # Nearly every plan.
    return [with_fields(entry, owner=()) if entry.owner in plain else entry for entry in entries]


def _is_of_root(entry: Entry) -> bool:
    placed = entry.placed
    return placed is None or (not placed.owner and placed.collection in FLAX_COLLECTIONS)


_NONE: tuple[Tokens, Tokens] = ((), ())


def level_of_one_side(
    owners: Collection[Tokens], beside: Set[Tokens], wanted: Sequence[Wanted]
) -> tuple[Tokens, Tokens]:
    """Returns the level above all train states that the target has alone, or the checkpoint alone."""
    weights = [item.tokens for item in of_role(wanted, "model") if item.tokens not in beside]
    whole = [*weights, *(canonical(item.owner) for item in of_role(wanted, "optimizer", "step"))]
    here, there = _NONE
    if not any(_is_below(path, owners) for path in weights):
        for level in _levels_above(whole):
            if _hold_all([path[len(level) :] for path in weights], owners, beside):
                here = level
        for level in _levels_above(list(owners)):
            below = [owner[len(level) :] for owner in owners]
            if all(below) and _hold_all(weights, below, {strip(path, level) for path in beside}):
                there = level
    if bool(here) == bool(there) or any(map(is_copy_level, (*here, *there))):
        return _NONE
    return here, there


def _hold_all(weights: Sequence[Tokens], owners: Collection[Tokens], beside: Set[Tokens]) -> bool:
    """Tells whether weights lie in train states, but for those that lie beside them under their whole paths.

    What is beside a single one is no reason to look for a level: that is the model's root then.
    """
    inside = [path for path in weights if _is_below(path, owners)]
    is_one = len(owners) == 1 and len(inside) == len(weights)
    return bool(inside) and not is_one and {*weights}.difference(inside) <= beside


def _levels_above(paths: Sequence[Tokens]) -> Iterator[Tokens]:
    """Yields the keys that all paths begin with, the shortest first."""
    first: Tokens = min(paths, key=len, default=())
    for depth in range(1, len(first) + 1):
        if any(path[:depth] != first[:depth] for path in paths):
            return
        yield first[:depth]


def _is_below(path: Tokens, owners: Iterable[Tokens]) -> bool:
    return any(path[: len(owner)] == owner for owner in owners)


FIELDS = frozenset({"model", "optimizer", "step"})
"""The parts of a checkpoint that lie in train states."""


def _chain(paths: Collection[Tokens]) -> Sequence[Tokens]:
    """Returns every prefix that more than half of the paths share, the empty one first.

    More than half, not all: a model may be wrapped beside a new head. Of two
    models of equal size (a smoothed copy) neither is the root.
    """
    chain: list[Tokens] = [()]
    inside: list[Tokens] = list(paths)
    while inside:
        depth = len(chain[-1])
        # The last key names the leaf itself and is never part of a root.
        heads: Counter[str] = Counter(path[depth] for path in inside if len(path) > depth + 1)
        name, count = heads.most_common(1)[0] if heads else ("", 0)
        if count * 2 <= len(paths):
            break
        chain.append((*chain[-1], name))
        inside = [path for path in inside if len(path) > depth + 1 and path[depth] == name]
    return [root for root in chain if not _names_layers(paths, root) and _keeps_apart(paths, root)]


def _only_level_above(stored: Collection[Tokens], wanted: Collection[Tokens]) -> Iterable[Tokens]:
    """Yields the first level of the target that has all of the stored model below it, if no other one has.

    However large what lies beside it is: the model's small, and its metrics are many. It is looked for
    below the levels that all of the target has (`agent` above `model` and `ema`).
    """
    depth = len(shared_levels(list(wanted), 1)) + 1
    names, first = {*wanted}, next(iter(stored), ())
    levels = {path[: -len(first)] for path in wanted if first and path[-len(first) :] == first}
    found = [level for level in levels if all((*level, *name) in names for name in stored)]
    if len(found) > 1:  # `model` beside `ema` is the program's field for its model; `ema` names another one.
        found = [level for level in found if len(level) == depth and level[-1] in PLAIN_LEVELS]
    is_one = [*map(len, found)] == [depth] and not _names_layers(wanted, found[0])
    if is_one and _keeps_apart(wanted, found[0]):
        yield found[0]


def _may_both_go(wanted: Collection[Tokens], left: Tokens, right: Tokens) -> bool:
    """Tells whether levels of both sides may go: the target's own field for its model is no module's name."""
    named = named_levels(left)
    return _names_modules(wanted, left) and (not named or named == right[-len(named) :])


def _heads(paths: Collection[Tokens], root: Tokens) -> Counter[Tokens]:
    """Counts the paths by their first key below a root."""
    return Counter([strip(path, root)[:1] for path in paths])


def _holds_all(paths: Collection[Tokens], root: Tokens) -> bool:
    return all(path[: len(root)] == root for path in paths)


def _names_modules(paths: Collection[Tokens], root: Tokens) -> bool:
    """Tells whether any path below a root names more than the leaf itself."""
    return any(len(strip(path, root)) > 1 for path in paths if path[: len(root)] == root)


def _keeps_apart(paths: Collection[Tokens], root: Tokens) -> bool:
    """Tells whether no two paths become one when the root is taken away."""
    if not root:
        return True
    # Only a path beside the root can be what one below it becomes.
    outside = {path for path in paths if path[: len(root)] != root}
    return not outside or outside.isdisjoint(strip(path, root) for path in paths if path not in outside)


def _names_layers(paths: Collection[Tokens], root: Tokens) -> bool:
    """Tells whether a root ends in the name of layers: without it, no one knows what their numbers count.

    `layers/layers_0` may be a block of a scan, whose numbers are no layers'. The target's own field for its
    model names none: the model is the list.
    """
    if not root or root[-1] in PLAIN_LEVELS:
        return False
    depth = len(root)
    below = [path[depth : depth + 2] for path in paths if len(path) > depth and path[:depth] == root]
    return all(
        token[:1] == "#" or (token == root[-1] and rest[:1] and rest[0][:1] == "#") for token, *rest in below
    )


def _skeletons(paths: Collection[Tokens], root: Tokens) -> Counter[Tokens]:
    """Counts the paths below a root without layer numbers and scan levels."""
    found = Counter[Tokens]()  # Most of a model's paths differ in the numbers alone: those go first.
    for path, count in Counter([_without_numbers(strip(path, root)) for path in paths]).items():
        found[_skeleton(path)] += count
    return found


def _without_numbers(path: Tokens) -> Tokens:
    # A number at the very start is no layer of the model but the model's place in a tuple of targets.
    return (*path[:1], *[token for token in path[1:] if token[:1] != "#"])


def skeleton(path: Tokens) -> Tokens:
    """Returns a canonical path without layer numbers, scan levels and a last level `value`."""
    return _skeleton(_without_numbers(path))


def _skeleton(path: Tokens) -> Tokens:
    names = [token.removesuffix("_remainder") for token in path]
    if len(names) > 1 and names[-1] == "value":
        names.pop()
    return tuple(name for i, name in enumerate(names) if i == 0 or name != names[i - 1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collections:
    """The collections of one stored train state.

    Attributes:
        paths: The canonical paths in each.
        only: The one that the target names, if it names one.
        copies: Those that repeat the paths of a collection of Flax's: averages, gradients.
    """

    paths: Mapping[str | None, frozenset[Tokens]]
    only: str | None
    copies: frozenset[str | None]

    @staticmethod
    def of(entries: Iterable[Entry], only: str | None) -> "Collections":
        """Returns the collections of these entries."""
        found: dict[str | None, set[Tokens]] = defaultdict(set)
        for entry in entries:
            found[entry.collection].add(entry.tokens)
        known = [found[name] for name in FLAX_COLLECTIONS if name in found]
        own = {name: paths for name, paths in found.items() if name not in (None, *FLAX_COLLECTIONS)}
        copies = (x for x, paths in own.items() if any(len(paths & of) * 2 > len(paths) for of in known))
        return Collections(
            paths={name: frozenset(paths) for name, paths in found.items()},
            only=only,
            copies=frozenset(copies),
        )

    def eligible(self, item: Wanted, claims: Sequence[Entry]) -> Sequence[Entry]:
        """Returns the claims that the collection allows; of a type without a name, its own first."""
        allowed = [entry for entry in claims if self.may_give(entry, item)]
        if allowed and item.collection is None:
            return [*allowed, *(entry for entry in claims if self.contests(entry.collection, item))]
        own = [entry for entry in allowed if entry.collection == item.collection]
        return own if own and item.collection is not None else allowed

    def may_give(self, entry: Entry, item: Wanted) -> bool:
        """Tells whether a wanted leaf may come from an entry."""
        return self.allows(entry.collection, item)

    def allows(self, collection: str | None, item: Wanted) -> bool:
        """Tells whether a wanted leaf may come from a collection; None where the layout tells none."""
        if self.only is not None:
            return collection == self.only
        if collection is None:
            return True
        if item.role == "random":
            return False
        if item.collection is None:
            return collection in FLAX_COLLECTIONS
        return collection == item.collection or self._may_stray(collection, item)

    def contests(self, collection: str | None, item: Wanted) -> bool:
        """Tells whether a collection is a copy whose leaves an array without a type might mean as well."""
        untyped = item.collection is None and item.role == "model" and self.only is None
        return untyped and collection in self.copies

    def _may_stray(self, collection: str, item: Wanted) -> bool:
        """Tells whether a collection may be that of a type that nobody has named.

        Linen names custom collections freely, so a custom Variable type may come from a custom
        collection, or from that of the type it is a kind of, unless another is called like it; never
        from a copy, nor from the collection that has been named for another type.
        """
        kind = item.leaf.kind
        if item.role != "model" or item.collection in self.paths:
            return False
        if is_called_like(kind, collection):
            return True
        if is_named(kind):
            return False
        if collection in FLAX_COLLECTIONS:
            own = (name for name in self.paths if name not in (None, *FLAX_COLLECTIONS))
            return collection == base_collection(kind) and not any(is_called_like(kind, name) for name in own)
        is_copy = collection in self.copies or is_copy_beside(collection, item.collection or "")
        return not is_copy and not is_of_another_type(kind, collection)

    def is_network(self, entry: Entry) -> bool:
        """Tells whether an entry is one of a network's own values, which its modules may rearrange."""
        if self.only is not None:
            return entry.collection == self.only
        return entry.collection is None or entry.collection in FLAX_COLLECTIONS
