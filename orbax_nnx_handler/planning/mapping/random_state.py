"""Random state and other NNX leftovers, where a checkpoint does hold them.

A leaf is looked for under its whole path first, then below `nnx_aux`, where the
model's own lies under `model/...` and what lies beside the model under its own
path, then below the model's root. Flax 0.11 changed the layout of a module's own
stream: `drop/rngs/default/{count,key}` became `drop/rngs/{count,key}`; both are read.
No stored stream is given out twice.

Where names of networks differ, what lies aside goes where the weights of its train state go.

What has another arrangement of layers than the target's is not found so: it is a leaf of the
model then, of the collection of the wanted type, and stacked as all of them are.
"""

import dataclasses
import functools
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property

from orbax_nnx_handler.planning.core.paths import Path, Tokens, canonical, is_number, shared_levels
from orbax_nnx_handler.planning.core.recipes import Read, reads
from orbax_nnx_handler.planning.layouts.layout import Placement, below_owner, is_copy_level
from orbax_nnx_handler.planning.mapping.matches import Found, MatchEvidence
from orbax_nnx_handler.planning.mapping.networks import Matched
from orbax_nnx_handler.planning.mapping.roots import Roots, skeleton, strip
from orbax_nnx_handler.planning.rules.entries import Entry, by_own_leaf
from orbax_nnx_handler.planning.target.roles import Wanted

_MODEL = "model"
"""The level of `nnx_aux` that holds what belongs to the model, whatever the target calls it."""

PathsByTokens = Mapping[Tokens, Path]
Streams = Mapping[Tokens, list[Path]]


_STREAM = MatchEvidence(kind="random", words="the stream of its name")


def find_random(
    found: dict[Path, Found],
    wanted: Sequence[Wanted],
    placements: Sequence[Placement],
    entries: Sequence[Entry],
    roots: Roots,
    networks: Sequence[Matched],
) -> None:
    """Adds to `found` what `nnx_aux`, or an NNX state itself, holds of random state and custom variables.

    Rules move what they name, as they move weights.
    """
    left = [item for item in wanted if item.leaf.path not in found]
    if not any(item.section == "aux" for item in placements):
        left = [item for item in left if item.role == "random"]  # Weights are looked for aside alone.
    if not left:
        return
    moved = {entry.sources[0]: entry for entry in entries if entry.named and isinstance(entry.recipe, Read)}
    made = [entry for entry in entries if entry.section == "aux" and not isinstance(entry.recipe, Read)]
    moved |= by_own_leaf(made)
    matched = [network for network in networks if any(item.leaf.path in found for item in network.weights)]
    places = _Places(wanted, placements, moved, roots, matched, entries)
    taken: set[Path] = set()
    # What all leaves may be with most right comes before what any leaf may be with less. Of the two ways
    # to read `nnx_aux`, the one under which more of it is wanted is how it was written.
    aside = sorted((places.kept, places.rootless), key=lambda find: -sum(any(find(item)) for item in left))
    for find in (places.whole, *aside, places.of_network, places.inline, places.of_another_flax):
        for item in left:
            if item.leaf.path in found:
                continue
            source = next((path for path in find(item) if path not in taken), None)
            if source is not None:
                by_rule = moved.get(source)
                reason = by_rule.reason if by_rule else ""
                evidence = MatchEvidence(kind="rule", words=reason) if reason else _STREAM
                recipe = by_rule.recipe if by_rule else Read(source)
                found[item.leaf.path] = Found(recipe=recipe, reason=reason, evidence=evidence)
                taken.add(source)


def as_wanted(
    placements: Sequence[Placement],
    wanted: Sequence[Wanted],
    found: Mapping[Path, Found],
    read: Collection[Path],
    entries: Sequence[Entry],
) -> Sequence[Placement]:
    """Returns the placements, with what lies aside in another arrangement of layers as the model's own.

    No name says which collection it is of: the type of the wanted leaf of its name does. What lies under
    its own path in the item becomes a train state of its own, where all that is wanted there is found so.

    Args:
        placements: What each stored leaf is.
        wanted: The target's leaves of models, and its random state.
        found: What the wanted leaves come from, those that were found.
        read: The stored paths that are a source.
        entries: What rules call the stored leaves.
    """
    aside = [item for item in placements if item.section == "aux" and item.leaf.path not in read]
    names = {skeleton(canonical(item.path)) for item in aside}
    typed = [item for item in (wanted if aside else ()) if item.leaf.kind is not None]
    if all(item.leaf.path in found and skeleton(item.tokens) not in names for item in typed):
        return placements
    kinds = _collections_by_end(wanted)
    modules = {(item.owner, item.tokens[:1]) for item in placements if item.section == "model"}
    level = _level_of(wanted, [item.owner for item in placements])
    above = _levels_of_models((item.owner, item.tokens) for item in placements if item.section == "model")
    targets = _levels_of_models(_where_read(placements, wanted, found))

    @functools.cache
    def is_asked_for(owner: Path) -> bool:
        names = canonical(owner)
        return any(item.tokens[: len(names)] == names for item in wanted)

    renamed = {entry.sources[0]: entry.tokens for entry in entries if entry.section == "aux" and entry.named}
    moved: dict[Path, Placement] = {}
    # Of a network of which a part becomes a train state, all does.
    for item in (item for item in placements if item.section == "aux"):
        own, owner = item.own, item.owner
        of_model = str(own[0]) == _MODEL
        below = own if owner and (owner, canonical(own)[:1]) in modules else own[1:]
        is_of_model = of_model or below is own
        whole = canonical(below if is_of_model else (*owner, *own))
        # Another network may have the name for another kind. Of a model that is stored below a level which
        # the target has not, the name begins behind it.
        without = strip(whole, above.get(owner, ()) if is_of_model else ())
        by_rule = renamed.get(item.leaf.path, ())
        there = (*targets.get(owner, ()), *whole) if is_of_model else ()
        names = map(skeleton, (by_rule, by_rule[of_model:], canonical((*owner, *own)), there, whole, without))
        named = next((kinds[name] for name in names if name in kinds), ())
        if len(named) == 1 and len(own) > 1 and not (is_of_model and item.leaf.path in read):
            (collection,) = named
            if not is_of_model:
                owner = (*owner, *own[:1])
                owner = owner if is_asked_for(owner) else (*level, *owner)
            moved[item.leaf.path] = dataclasses.replace(
                item, section="model", collection=collection, path=below, owner=owner
            )
    owners = {item.owner for item in placements if item.section != "aux"}
    own = {canonical((*item.owner, *item.path)) for item in moved.values()}
    placed = {skeleton(name) for name in own.union(renamed[path] for path in moved if path in renamed)}
    kept = {item.owner for path, item in moved.items() if path not in read}
    kept = {owner for owner in kept if owner in owners or _is_whole(owner, wanted, found, placed)}
    moved = {path: item for path, item in moved.items() if item.owner in kept}
    return [moved.get(item.leaf.path, item) for item in placements] if moved else placements


def _is_whole(
    owner: Path, wanted: Sequence[Wanted], found: Collection[Path], placed: Collection[Tokens]
) -> bool:
    """Tells whether all that is wanted below an owner is found; random state need not be."""
    names = canonical(owner)
    below = [item for item in wanted if item.tokens[: len(names)] == names]
    below = [item for item in below if item.role != "random"] or below
    return all(item.leaf.path in found or skeleton(item.tokens) in placed for item in below)


def _collections_by_end(wanted: Sequence[Wanted]) -> Mapping[Tokens, set[str | None]]:
    """Returns the collections of the Variables of each end of a name; None for random state."""
    found: dict[Tokens, set[str | None]] = defaultdict(set)
    for item in wanted:
        name = skeleton(item.tokens) if item.leaf.kind is not None else ()
        for at in range(len(name)):
            found[name[at:]].add(None if item.role == "random" else item.collection)
    return found


def _levels_of_models(weights: Iterable[tuple[Path, Tokens]]) -> Mapping[Path, Tokens]:
    """Returns the levels that all weights of each train state lie below."""
    names: dict[Path, list[Tokens]] = defaultdict(list)
    for owner, tokens in weights:
        names[owner].append(tokens)
    return {owner: shared_levels(tokens, 2) for owner, tokens in names.items()}


def _where_read(
    placements: Sequence[Placement], wanted: Sequence[Wanted], found: Mapping[Path, Found]
) -> Iterator[tuple[Path, Tokens]]:
    """Yields the names of wanted weights, each with the stored train state that it is read from."""
    owners = {item.leaf.path: item.owner for item in placements if item.section == "model"}
    for item in wanted:
        read = reads(found[item.leaf.path].recipe) if item.leaf.path in found else ()
        yield from ((owners[path], item.tokens) for path in read[:1] if path in owners)


def _level_of(wanted: Sequence[Wanted], owners: Iterable[Path]) -> Tokens:
    """Returns the levels that all of the target lies below, and nothing of the checkpoint."""
    level = shared_levels([item.tokens for item in wanted], 2)
    while level and is_number(level[-1]):
        level = level[:-1]
    return () if any(canonical(owner)[:1] == level[:1] for owner in owners) else level


class _Places:
    """Where random state may be stored, one way of looking a method."""

    def __init__(
        self,
        wanted: Sequence[Wanted],
        placements: Sequence[Placement],
        moved: Mapping[Path, Entry],
        roots: Roots,
        networks: Sequence[Matched],
        entries: Sequence[Entry],
    ) -> None:
        self._wanted, self._placements, self._moved, self._roots = wanted, placements, moved, roots
        self._root, self._networks, self._entries = roots.wanted, networks, entries

    @cached_property
    def _whole(self) -> PathsByTokens:
        paths = {item.leaf.path: item.leaf.path for item in self._placements}
        return _index(paths | {path: entry.whole for path, entry in self._moved.items()})

    @cached_property
    def _aux(self) -> PathsByTokens:
        return self._below([item for item in self._placements if item.section == "aux"])

    @cached_property
    def _inline(self) -> PathsByTokens:
        own = [item for item in self._placements if item.section == "model" and item.collection is None]
        return {strip(tokens, self._roots.stored): path for tokens, path in self._below(own).items()}

    def _below(self, items: Iterable[Placement]) -> PathsByTokens:
        """Returns leaves by their paths in their part of the checkpoint, where the rules have put them."""
        paths = {item.leaf.path: item.path for item in items}
        return _index({at: self._moved[at].segments if at in self._moved else paths[at] for at in paths})

    @cached_property
    def _model(self) -> PathsByTokens:
        """What belongs to the model, by its path there."""
        own = {tokens[1:]: path for tokens, path in self._aux.items() if tokens[:1] == (_MODEL,)}
        beside = {tokens: path for tokens, path in self._aux.items() if tokens[:1] != (_MODEL,)}
        return {**self._inline, **beside, **own}

    @cached_property
    def _model_streams(self) -> Streams:
        return _by_stream(self._model)

    @cached_property
    def _all(self) -> PathsByTokens:
        return {**self._inline, **self._aux}

    @cached_property
    def _all_streams(self) -> Streams:
        return _by_stream(self._all)

    @cached_property
    def _of_networks(self) -> Sequence[tuple[Matched, Tokens, PathsByTokens]]:
        """What lies aside where the weights of networks come from, by what is above on both sides."""
        aside = [item for item in self._placements if item.section == "aux"]
        found: list[tuple[Matched, Tokens, PathsByTokens]] = []
        for matched in self._networks if aside else ():
            network, roots = matched.network, matched.roots
            copied = {level for level in roots.wanted if is_copy_level(level)} - {*network.owner}
            stored = [item for item in self._entries if item.section == "model" and network.holds(item)]
            placed = [(item, item.placed) for item in stored if item.placed is not None]
            if copied or network.only not in (None, "params") or not placed:
                continue  # A copy has nothing aside.
            (first, weight), owners = placed[0], {canonical(weight.owner) for _, weight in placed}
            own = {item.leaf.path: item.own for item in aside if canonical(item.owner) in owners}
            for path in self._moved.keys() & own.keys():
                own[path] = below_owner(self._moved[path].segments, network.owner)
            # A level that a rule has put above the weights alone is none of what lies aside.
            by_rule = first.tokens[: len(first.tokens) - len(weight.tokens)]
            found.append((matched, strip(roots.stored, by_rule), _index(own)))
        return sorted(found, key=lambda item: -len(item[0].roots.wanted))

    @cached_property
    def _siblings(self) -> Mapping[Tokens, int]:
        return Counter(_unnamed(strip(item.tokens, self._root)) for item in self._wanted)

    @cached_property
    def _level(self) -> Tokens:
        """What all of the target lies below, the model's own field left out."""
        return shared_levels([item.tokens for item in self._wanted], 1)[: max(len(self._root) - 1, 0)]

    @cached_property
    def _named(self) -> bool:
        """Whether, without a root, a first level `model` is part of the wanted paths themselves."""
        return not self._root and any(item.tokens[:1] == (_MODEL,) for item in self._wanted)

    def whole(self, item: Wanted) -> Iterator[Path]:
        """Yields the leaf of the same whole path."""
        if item.role == "random":
            yield from _at(self._whole, canonical(item.leaf.path))

    def kept(self, item: Wanted) -> Iterator[Path]:
        """Yields what `nnx_aux` holds: for the model's own below `model`, else under its own path."""
        may_be_models = self._inside(item) and not any(map(is_copy_level, self._root))
        if self._root:
            yield from _at(self._aux, item.tokens)
        if may_be_models:
            yield from _at(self._aux, (_MODEL, *strip(item.tokens, self._root)))
        yield from _at(self._aux, item.tokens)
        if may_be_models:
            yield from _at(self._aux, strip(item.tokens, self._root))
        # What lies beside the model, below levels that the whole target has and the checkpoint has not.
        if self._level and not self._roots.stored:
            yield from _at(self._aux, strip(item.tokens, self._level))

    def rootless(self, item: Wanted) -> Iterator[Path]:
        """Yields what `nnx_aux` holds of the model where the whole target is the model, whatever its root."""
        yield from _at(self._aux, (_MODEL, *item.tokens))
        # A functional train state's field, which a save takes for the model.
        if item.tokens[:1] == ("params",):
            yield from _at(self._aux, (_MODEL, *item.tokens[1:]))

    def of_network(self, item: Wanted) -> Iterator[Path]:
        """Yields what lies aside in the train state that the weights of the leaf's network come from."""
        for matched, below, aside in self._of_networks:
            path, root = matched.paths.get(item.leaf.path), matched.root
            if path is not None and path[: len(root)] == root:
                own = (*below, *path[len(root) :])
                for attribute in ((_MODEL,), matched.roots.wanted[-1:], ()):
                    yield from _at(aside, (*attribute, *own))
                return

    def inline(self, item: Wanted) -> Iterator[Path]:
        """Yields the leaf of the same path below the model's roots."""
        if item.role == "random":
            yield from _at(self._inline, strip(item.tokens, self._root))

    def of_another_flax(self, item: Wanted) -> Iterator[Path]:
        """Yields the same stream as another Flax wrote it, if just one can be meant."""
        tokens = strip(item.tokens, self._root)
        if item.role != "random" or len(tokens) < 2:
            return
        inside = self._inside(item)
        stored, streams = (self._model, self._model_streams) if inside else (self._all, self._all_streams)
        named = streams.get(tokens, [])
        if len(named) == 1:
            yield named[0]
        elif len(tokens) > 2 and self._siblings[_unnamed(tokens)] == 1:
            yield from _at(stored, _unnamed(tokens))

    def _inside(self, item: Wanted) -> bool:
        return item.tokens[: len(self._root)] == self._root and not self._named


def _at(index: PathsByTokens, tokens: Tokens) -> Iterator[Path]:
    if tokens in index:
        yield index[tokens]


def _index(paths: Mapping[Path, Path]) -> dict[Tokens, Path]:
    """Returns stored leaves by canonical path, with and without a last level `value`."""
    found: dict[Tokens, Path] = {}
    boxed: dict[Tokens, Path] = {}
    for stored, path in paths.items():
        tokens = canonical(path)
        found[tokens] = stored
        if tokens[-1:] == ("value",):
            boxed[tokens[:-1]] = stored
    return {**boxed, **found}


def _unnamed(tokens: Tokens) -> Tokens:
    return (*tokens[:-2], *tokens[-1:])


def _by_stream(index: PathsByTokens) -> Streams:
    """Returns stored leaves by path without the stream's name."""
    found: dict[Tokens, list[Path]] = defaultdict(list)
    for tokens, path in index.items():
        if len(tokens) > 2 and tokens[-1] in ("key", "count"):
            found[_unnamed(tokens)].append(path)
    return found
