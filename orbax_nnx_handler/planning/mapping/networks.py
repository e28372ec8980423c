"""Matches the weights of every network: first by whole path, then train state by train state.

A stored leaf whose whole path is the wanted leaf's whole path is its source (law 1).
What is left is looked for in the train state that the wanted path names, or in the only
one there is; in a collection beside `params` only where the path names it.
"""

import dataclasses
import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.paths import Path, Tokens, canonical, segments
from orbax_nnx_handler.planning.layouts.layout import (
    FOLLOWERS,
    Layout,
    holds_no_weights,
    is_copy_beside,
    is_copy_level,
    words_of,
)
from orbax_nnx_handler.planning.mapping.cells_and_wrappers import is_wrapper_value
from orbax_nnx_handler.planning.mapping.matches import (
    SAME_PATH,
    CompetingSources,
    Found,
    MatchEvidence,
    ModelMatch,
)
from orbax_nnx_handler.planning.mapping.matching import Matcher
from orbax_nnx_handler.planning.mapping.roots import (
    PLAIN_LEVELS,
    Collections,
    Roots,
    find_roots,
    named_levels,
    owner_of,
    strip,
)
from orbax_nnx_handler.planning.rules import Rename, ScanAxis
from orbax_nnx_handler.planning.rules.entries import Entry, Names
from orbax_nnx_handler.planning.target.roles import Wanted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """Wanted leaves that one stored train state, or one named collection of it, may give.

    Attributes:
        owner: Canonical keys above the stored train state.
        only: The collection that the wanted paths name, or None.
        named: Whether the wanted paths name the owner.
    """

    owner: Tokens
    only: str | None = None
    named: bool = False

    def holds(self, entry: Entry) -> bool:
        """Tells whether an entry is one of the network's."""
        return entry.owner == self.owner and self.only in (None, entry.collection)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Matched:
    """A network whose weights were looked for.

    Attributes:
        network: The network.
        roots: Where its weights sit in the target, and in the stored train state.
        weights: The wanted weights.
        paths: The path of each wanted leaf, without an owner and a collection that it names.
        names: Those of the weights below the model's root.
    """

    network: Network
    roots: Roots
    weights: tuple[Wanted, ...]
    paths: Mapping[Path, Tokens]
    names: Mapping[Path, Tokens]

    @property
    def root(self) -> Tokens:
        """Where its weights sit below what the wanted paths name of it."""
        return self.roots.wanted[len(self.network.owner) if self.network.named else 0 :]


def match_networks(
    wanted: Sequence[Wanted],
    entries: Sequence[Entry],
    axes: Sequence[ScanAxis],
    layout: Layout,
) -> tuple[ModelMatch, list[Matched]]:
    """Matches wanted weights, network by network."""
    found, rivals = by_whole_path(wanted, entries)
    settled = {*found, *(item.wanted.leaf.path for item in rivals)}
    taken = {id(entry) for entry in found.values()}
    by_rule = {path for path, entry in found.items() if entry.named}
    named = {id(found[path]) for path in by_rule}
    fields = {path for path, entry in found.items() if entry.section == "other"}
    models = [entry for entry in entries if entry.section == "model"]
    aside = {entry.tokens for entry in entries if entry.section == "aux"}
    matches = [ModelMatch(found=_as_found(found), rivals=tuple(rivals))]
    levels = {entry.owner for entry in entries if entry.section in ("optimizer", "step")}
    networks: list[Matched] = []
    for network, paths in _networks(wanted, entries).items():
        items = wanted if len(paths) == len(wanted) else [i for i in wanted if i.leaf.path in paths]
        own = [entry for entry in models if network.holds(entry)]
        weights = [item for item in items if item.role == "model"]
        # A field beside the model (`epoch`), found under its own path, says nothing of the model's level.
        beside = [item for item in weights if item.leaf.path not in fields] if fields else weights
        beside = ([item for item in beside if item.tokens not in aside] if aside else beside) or weights
        # What a rule has given a wanted path says nothing of where the others meet.
        others = [item for item in beside if item.leaf.path not in by_rule] if by_rule else beside
        unnamed = [entry for entry in own if id(entry) not in named] if named else own
        meeting, there = (others, unnamed) if others and unnamed else (beside, own)
        collections = Collections.of(own, network.only)
        among = collections if there is own else Collections.of(there, network.only)
        roots = _roots([paths[item.leaf.path] for item in meeting], there, among, levels)
        above = network.owner if network.named else ()
        whole = dataclasses.replace(roots, wanted=(*above, *roots.wanted))
        names = paths
        if roots.wanted or len(weights) < len(paths):
            names = {item.leaf.path: strip(paths[item.leaf.path], roots.wanted) for item in weights}
        networks.append(
            Matched(network=network, roots=whole, weights=tuple(weights), paths=paths, names=names)
        )
        left = [item for item in items if item.leaf.path not in settled] if settled else items
        if left and not (not network.named and _contradict(roots.wanted, network)):
            free = [entry for entry in own if id(entry) not in taken] if taken else own
            matcher = Matcher(
                wanted=left,
                paths=paths,
                entries=free,
                roots=roots,
                collections=collections if free is own else Collections.of(free, network.only),
                axes=axes,
                layout=layout,
            )
            matches.append(_questioned(matcher, collections))
    return _joined(matches), sorted(networks, key=lambda item: -len(item.weights))


def _roots(
    weights: Sequence[Tokens],
    entries: Sequence[Entry],
    collections: Collections,
    levels: Collection[Tokens],
) -> Roots:
    stored = [entry.tokens for entry in entries if collections.is_network(entry)]
    return find_roots(weights, stored or [entry.tokens for entry in entries], _fields(entries, levels))


def _fields(entries: Sequence[Entry], levels: Collection[Tokens]) -> set[Tokens]:
    """Returns the fields beside an optimizer or a step that no name says to be the model's.

    Where a layout keeps no collections apart, `ema_params` beside `step` is one all the same.
    """
    found = {
        entry.tokens[: len(level) + 1]
        for entry in entries
        if entry.collection is None
        for level in levels
        if len(entry.tokens) > len(level) + 1 and entry.tokens[: len(level)] == level
    }
    fields = {field for field in found if field[-1] not in PLAIN_LEVELS and words_of(field[-1])}
    # Also without an optimizer or a step beside it, a tree below `ema_params` alone is such a field,
    # and so is a copy that is a level of its own within a collection (`params/ema`).
    own = next((entry for entry in entries if entry.collection in (None, "params")), None)
    first, of = ((), None) if own is None else (own.tokens, own.collection)
    return fields | {first[:at] for at in range(1, len(first)) if holds_no_weights(first[at - 1], of)}


def by_whole_path(
    wanted: Sequence[Wanted], entries: Sequence[Entry]
) -> tuple[dict[Path, Entry], list[CompetingSources]]:
    """Returns the entries whose whole path is a wanted leaf's whole path, and those that share one."""
    index: dict[Tokens, list[Entry]] = defaultdict(list)
    heads = {item.tokens[:1] for item in wanted}
    for entry in entries:
        if entry.section == "optimizer":
            continue
        # What lies beside train states has its path below the level that the target has above them.
        above = entry.owner if entry.section == "other" else _canonical(entry.prefix)
        if (above or entry.tokens)[:1] not in heads:
            continue  # Nearly every leaf: no wanted path begins so.
        tokens = above + entry.tokens
        index[tokens].append(entry)
        if tokens[-1:] == ("value",) and len(tokens) > 1:
            index[tokens[:-1]].append(entry)
    found: dict[Path, Entry] = {}
    rivals: list[CompetingSources] = []
    _drop_those_of_others(index, wanted)
    by_collection = functools.cache(lambda: _by_collection(entries))
    for item in wanted if index else ():
        claims = _claims_of(item, index, by_collection)
        if len(claims) > 1:
            rivals.append(CompetingSources(wanted=item, entries=tuple(claims)))
        elif claims:
            found[item.leaf.path] = claims[0]
    return found, rivals


def _claims_of(
    item: Wanted,
    index: Mapping[Tokens, Sequence[Entry]],
    by_collection: Callable[[], Mapping[tuple[str | None, Tokens], Sequence[Entry]]],
) -> Sequence[Entry]:
    claims = index.get(item.tokens, ())
    if item.leaf.kind is not None:
        # A model's Variable called `step` is a model's: the train state's own field has another role.
        claims = [entry for entry in claims if entry.section != "step"]
    if len(claims) > 1:
        exact = [entry for entry in claims if entry.whole == tuple(map(str, item.leaf.path))]
        return exact if len(exact) == 1 else claims
    own = item.collection or "params"
    if claims and item.role == "model" and claims[0].collection not in (None, own):
        # In the collection of its type, the name may be another leaf's, with that collection's or without.
        below = item.tokens[item.tokens[:1] == (own,) :]
        of_its_type = (by_collection().get((own, name), ()) for name in {item.tokens, below})
        return [*claims, *itertools.chain.from_iterable(of_its_type)]
    return claims


def _by_collection(entries: Iterable[Entry]) -> Mapping[tuple[str | None, Tokens], Sequence[Entry]]:
    """Returns the entries by their collection and by owner and path without it."""
    found: dict[tuple[str | None, Tokens], list[Entry]] = defaultdict(list)
    for entry in entries:
        found[entry.collection, entry.owner + entry.tokens].append(entry)
    return found


def _drop_those_of_others(index: dict[Tokens, list[Entry]], wanted: Sequence[Wanted]) -> None:
    """Takes out the weights beside a module that is called as their collection.

    Of a model with `w` and `params/w`, the stored `params/w` is `w`, and `params/params/w` the other.
    """
    weights = (
        {item.tokens: item.collection or "params" for item in wanted if item.role == "model"} if index else {}
    )
    for tokens in sorted(index, key=len):  # What is left of a shorter path tells whose a longer one is.
        for entry in list(index[tokens]):
            below = len(_canonical(entry.prefix)) - len(entry.owner)
            own = entry.owner + tokens[len(entry.owner) + below :]
            of_another = own != tokens and not index.get(own) and not entry.named
            if of_another and weights.get(own, "") == entry.collection:
                index[tokens].remove(entry)


@functools.lru_cache(maxsize=256)
def _canonical(path: Tokens) -> Tokens:
    return canonical(path)


def _as_found(entries: Mapping[Path, Entry]) -> dict[Path, Found]:
    return {
        path: Found(recipe=entry.recipe, reason=entry.reason, evidence=_evidence_of(entry))
        for path, entry in entries.items()
    }


def _evidence_of(entry: Entry) -> MatchEvidence:
    if entry.reason:
        return MatchEvidence(kind="rule", words=entry.reason)
    is_moved = entry.section == "other" and (entry.owner or entry.prefix)
    if segments(entry.sources[0]) == entry.whole and not is_moved:
        return SAME_PATH
    return MatchEvidence(kind="layout", words="the path that its layout gives it")


def _names(entries: Sequence[Entry]) -> dict[Tokens, dict[Tokens, str]]:
    """Returns the collections of each stored train state, by their canonical names."""
    names: dict[Tokens, dict[Tokens, str]] = {}
    models = [entry for entry in entries if entry.section == "model"]
    for owner, collection in dict.fromkeys((entry.owner, entry.collection) for entry in models):
        named = names.setdefault(owner, {})
        if collection is not None:
            named.setdefault(_canonical((collection,)), collection)
    # A module of the model that is called like a collection is the model's.
    modules = {(entry.owner, entry.tokens[:1]) for entry in models if entry.collection == "params"}
    return {
        owner: {key: name for key, name in named.items() if (owner, key[:1]) not in modules}
        for owner, named in names.items()
    }


def _networks(left: Sequence[Wanted], entries: Sequence[Entry]) -> dict[Network, dict[Path, Tokens]]:
    """Returns the wanted leaves of each network with their paths below its owner."""
    names = _names(entries)
    found: dict[tuple[Tokens, str | None, bool], dict[Path, Tokens]] = defaultdict(dict)
    alone = next(iter(names)) if len(names) == 1 else () if () in names else None
    if alone is not None and any(map(is_copy_level, alone)):
        alone = None  # A copy is another value, also where it is all that is stored.
    owners = [owner for owner in names if owner]
    if alone is not None and not owners:
        heads = {item.tokens[:1] for item in left}
        if not any(key[:1] in heads for key in names[alone]):
            # Nearly every target: its paths name no collection.
            return {Network(owner=alone): {item.leaf.path: item.tokens for item in left}}
    levels = _levels_of_types(left, names.get(alone, {}) if alone is not None else {})
    for item in left:
        tokens = item.tokens
        owner = owner_of(tokens, owners) if owners else None
        place = alone if owner is None else owner
        if place is None:
            continue
        if owner is not None:
            tokens = tokens[len(owner) :]
        only = _named_collection(tokens, names[place])
        if only is None and owner is None and tokens[:1] in levels:
            tokens = tokens[1:]
        if only is not None and is_wrapper_value(item.leaf.path) and tokens == canonical(item.leaf.path[-2:]):
            only = None
        if only is not None:
            tokens = tokens[len(canonical((only,))) :]
        forced = only if only != item.collection and (item.collection is None or only != "params") else None
        found[place, forced, owner is not None][item.leaf.path] = tokens
    return {
        Network(owner=owner, only=only, named=named): paths for (owner, only, named), paths in found.items()
    }


def _levels_of_types(wanted: Sequence[Wanted], names: Mapping[Tokens, str]) -> set[Tokens]:
    """Returns the keys beside `params` that hold all there is of some collections and of random state.

    What `nnx.split` gives is kept so: `{"params": ..., "model_state": ..., "rest": ...}`.
    """
    held: dict[Tokens, set[str | None]] = defaultdict(set)
    for item in wanted:
        held[item.tokens[:1]].add("" if item.role == "random" else item.collection)
    if held.get(("params",)) != {"params"}:
        return set()
    stored = {*names.values(), ""}
    alone = [key for key, kinds in held.items() if key not in names and kinds <= stored]
    alone = [key for key in alone if not is_copy_beside(key[0], "")]
    return {key for key in alone if [kinds for kinds in held.values() if kinds & held[key]] == [held[key]]}


def _named_collection(tokens: Tokens, names: Mapping[Tokens, str]) -> str | None:
    """Returns the stored collection that a wanted path begins with."""
    found: str | None = None
    for key, name in names.items():
        if tokens[: len(key)] == key and len(tokens) > len(key) and (found is None or len(name) > len(found)):
            found = name
    return found


def _contradict(root: Tokens, network: Network) -> bool:
    """Tells whether the target's own level and the train state's name two networks, or the target a copy."""
    left, right = named_levels(root), named_levels(network.owner)
    copies = {level for level in left if is_copy_level(level)} - {*right}
    return (bool(copies) and network.only is None) or (
        bool(left) and bool(right) and left[: len(right)] != right
    )


def _asked_for(root: Tokens, collections: Collections) -> frozenset[str]:
    """Returns the copies whose name holds a word of the target's level: `ema_params` for `ema`.

    A network that follows another one may be any copy: `target_net` beside a stored `teacher`.
    """
    words = {word for token in root for word in words_of(token)}
    copies = (name for name in collections.copies if name is not None)
    return frozenset(name for name in copies if words & (words_of(name) | FOLLOWERS))


def _questioned(matcher: Matcher, collections: Collections) -> ModelMatch:
    """Returns the match, with a question for each leaf of a copy that the target's level is called after."""
    match, roots = matcher.match(), matcher.roots
    copies = _asked_for(roots.wanted, collections)
    if not copies:
        return match
    own: dict[Tokens, list[Entry]] = defaultdict(list)
    for entry in matcher.entries:
        if entry.collection in copies or entry.collection == "params":
            own[strip(entry.tokens, roots.stored)].append(entry)
    rivals = [
        CompetingSources(wanted=item, entries=tuple(claims))
        for item in matcher.wanted
        if len(claims := own.get(strip(matcher.paths[item.leaf.path], roots.wanted), [])) > 1
    ]
    contested = {rival.wanted.leaf.path for rival in rivals}
    kept = {path: found for path, found in match.found.items() if path not in contested}
    return dataclasses.replace(match, found=kept, rivals=(*match.rivals, *rivals))


def _joined(matches: Sequence[ModelMatch]) -> ModelMatch:
    found: dict[Path, Found] = {}
    for match in matches:
        found |= match.found
    return ModelMatch(
        found=found,
        rivals=tuple(rival for match in matches for rival in match.rivals),
        unclear=tuple(group for match in matches for group in match.unclear),
        without_variable=tuple(item for match in matches for item in match.without_variable),
        groups=frozenset[Tokens]().union(*(match.groups for match in matches)),
    )


def networks_as_parts(entries: Sequence[Entry]) -> Sequence[Entry]:
    """Returns entries under their whole paths where rules call several networks as the target does.

    Such a rule takes `params` away, and what is left above is the name that tells the networks apart.
    """
    model = [entry for entry in entries if entry.section == "model"]
    levels = {(entry.prefix, entry.owner) for entry in model}
    if len(levels) < 2 or any(canonical(prefix) != owner for prefix, owner in levels):
        return entries
    return [dataclasses.replace(entry, segments=entry.whole, prefix=()) for entry in model]


TURNS = ("local", "global")
"""Layers that take turns in a block, in their order, as in Gemma 2."""


def layers_in_turns(entries: Iterable[Entry]) -> tuple[Rename, ...]:
    """Returns rules under which the parts of layers that take turns in one block are layers by number.

    `self_attention_local` and `self_attention_global` in each block of a stack, or `local_layer` and
    `global_layer`: every part is there twice.
    """
    blocks: dict[Names, dict[Names, dict[str, tuple[str, Shape]]]] = defaultdict(lambda: defaultdict(dict))
    held: dict[Names, int] = defaultdict(int)
    for entry in entries:
        for at, name in enumerate(entry.segments[:-1]):
            held[entry.segments[:at]] += 1
            base, turn = _in_turn(name)
            if at and turn:
                blocks[entry.segments[:at]][base, *entry.segments[at + 1 :]][turn] = name, entry.shape
    found: dict[Rename, None] = {}
    for above, parts in blocks.items():
        count = len(TURNS) * len(parts)
        kinds = {len({shape for _, shape in x.values()}) for x in parts.values()}
        if kinds == {1} and held[above] == sum(map(len, parts.values())) == count:
            for (base, *_), each in parts.items():
                for number, turn in enumerate(TURNS):
                    aim = *above, f"{above[-1]}_{number}", *filter(None, [base])
                    found[Rename("/".join((*above, each[turn][0])), "/".join(aim))] = None
    return tuple(found)


def _in_turn(name: str) -> tuple[str, str]:
    """Returns what a name says beside its turn, and its turn: nothing and `local` of `local_layer`."""
    words = name.split("_")
    turn = next((word for word in (words[-1], words[0]) if word in TURNS), "")
    base = "_".join(word for word in words if word != turn)
    return "" if base in ("layer", "block") else base, turn
