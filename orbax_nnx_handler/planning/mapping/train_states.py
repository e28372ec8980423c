"""Train states on both sides, and which wanted one is which stored one.

A train state is a model's collections, its optimizer and its step, below one owner path. An optimizer and
a step are never lent to another train state, also where only one is stored or only one is wanted (law 3):
pairs are made by owner path alone, or because there is one train state on either side and no name speaks
against it.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence, Set

from orbax_nnx_handler.planning.core.paths import Path, Tokens, canonical, is_number, segments
from orbax_nnx_handler.planning.layouts.layout import (
    FLAX_COLLECTIONS,
    Placement,
    Section,
    in_its_field,
    is_copy_beside,
    lies_in,
)
from orbax_nnx_handler.planning.mapping.optimizer_states import parted_by_rules
from orbax_nnx_handler.planning.mapping.roots import (
    FIELDS,
    PLAIN_LEVELS,
    level_of_one_side,
    levels_with_most,
    named_levels,
    strip,
)
from orbax_nnx_handler.planning.rules import Rule, RulesApplied, apply_rules
from orbax_nnx_handler.planning.rules.entries import OPT_STATE, Entry, every_entry
from orbax_nnx_handler.planning.target.roles import Wanted, of_role


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredOptimizer:
    """The optimizer and the step of one stored train state.

    Attributes:
        owner: Canonical keys above `opt_state`.
        models: Owners of the parameters that its moments may belong to.
        leaves: The leaves of its optimizer state.
        steps: Its step; more than one where a program counts twice.
        has_attribute: Whether the last key of the owner is the attribute that holds the optimizer, as in NNX.
    """

    owner: Tokens
    models: frozenset[Tokens]
    leaves: tuple[Placement, ...]
    steps: tuple[Placement, ...]
    has_attribute: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class WantedOptimizer:
    """The optimizer and the step that a target has below one owner path."""

    owner: Tokens
    leaves: tuple[Wanted, ...]
    steps: tuple[Wanted, ...]

    @property
    def has_attribute(self) -> bool:
        """Whether the last key of the owner is the attribute that holds the optimizer."""
        return bool(self.owner)


def stored_optimizers(
    placements: Iterable[Placement], owners: Mapping[Path, Tokens], networks: Collection[Tokens]
) -> list[StoredOptimizer]:
    """Returns the stored optimizers, by owner.

    Args:
        placements: What each stored leaf is.
        owners: Where the rules say that the leaves of optimizers and steps lie; those that a rule drops
            are not there.
        networks: What the rules call the train states that hold weights.
    """
    leaves: dict[Path, list[Placement]] = defaultdict(list)
    steps: dict[Path, list[Placement]] = defaultdict(list)
    models: set[Tokens] = set()
    collections = False
    for item in placements:
        collections = collections or item.collection is not None
        if item.section == "model":
            models.add(canonical(item.owner))
        elif item.leaf.path in owners:
            (leaves if item.section == "optimizer" else steps)[item.owner].append(item)
    moved = {state: owners[items[0].leaf.path] for state, items in leaves.items()}
    homes = {owner: state for state, owner in moved.items()}
    placed: dict[tuple[Path, Tokens], list[Placement]] = defaultdict(list)
    for state, items in steps.items():
        for step in items:
            own = owners[step.leaf.path]
            # A step goes where its optimizer goes, unless a rule moves it by itself, to another one even.
            own = moved.get(state, own) if own == canonical(state) else own
            placed[homes.get(own, state), own].append(step)
    # A place in a tuple that holds no model is an optimizer's own.
    places = {at for at in map(canonical, (*leaves, *steps)) if any(map(is_number, at[-1:]))} - models
    return [
        StoredOptimizer(
            owner=owner,
            models=_models(canonical(state), models),
            leaves=tuple(leaves[state]) if owner == moved.get(state) else (),
            steps=tuple(placed[state, owner]),
            # A Linen train state holds `opt_state` itself; NNX puts an attribute between.
            has_attribute=bool(owner)
            and not (collections and owner in {*networks, *({canonical(state)} - places)}),
        )
        for state, owner in dict.fromkeys((*moved.items(), *placed))
    ]


def _models(owner: Tokens, models: Collection[Tokens]) -> frozenset[Tokens]:
    """Returns the train state that an optimizer lies in; where a rule moved it away, all of them."""
    if owner in models:
        return frozenset({owner})
    return frozenset(models)


def wanted_optimizers(wanted: Iterable[Wanted]) -> list[WantedOptimizer]:
    """Returns the wanted optimizers, by owner."""
    leaves: dict[Path, list[Wanted]] = {}
    steps: dict[Path, list[Wanted]] = {}
    for item in wanted:
        if item.role == "optimizer":
            leaves.setdefault(item.owner, []).append(item)
        elif item.role == "step":
            steps.setdefault(item.owner, []).append(item)
    return [
        WantedOptimizer(
            owner=canonical(owner), leaves=tuple(leaves.get(owner, ())), steps=tuple(steps.get(owner, ()))
        )
        for owner in dict.fromkeys((*leaves, *steps))
    ]


def under_rules(
    placements: Sequence[Placement], rules: Sequence[Rule], wanted: Sequence[Wanted]
) -> tuple[Sequence[Placement], Sequence[Entry], RulesApplied]:
    """Returns the placements, what rules act on and what they make of it, a level of one side taken away.

    A level above several train states, such as that of a module with an actor and a critic, may go where
    all of them lie below it, and every wanted weight lies in one of them then, as rules call it, or is what
    lies beside them under its name (`target_critic`).

    Raises:
        RuleError: A rule does not fit a leaf, or matches none.
    """
    placements = parted_by_rules(placements, rules)
    as_stored = every_entry(placements)
    applied = apply_rules(as_stored, rules)
    if (fields := _fields_of_networks(placements, applied, wanted)) is not placements:
        placements, as_stored = fields, every_entry(fields)
        applied = apply_rules(as_stored, rules)
    applied = _as_target_spells(applied, wanted)
    distinct = {item.owner for item in placements if item.section in FIELDS}
    beside = {entry.tokens for entry in applied.entries if entry.section == "other"}
    if len(distinct) < (1 if beside else 2) or () in distinct:
        return placements, as_stored, applied  # Nearly every checkpoint.
    owners = {item.leaf.path: canonical(item.owner) for item in placements if item.section in FIELDS}
    named = [entry for entry in applied.entries if entry.named and entry.owner and entry.section in FIELDS]
    renamed = {path: entry.owner for entry in named for path in entry.sources}
    here, there = level_of_one_side({*(owners | renamed).values()}, beside, wanted)
    kept = {item.tokens for item in wanted} & beside
    if here or there:
        placements = _moved(placements, here, there, kept)
        placed = {item.leaf.path: item for item in placements}
        entries = [
            entry
            if entry.section == "other" and entry.tokens in kept
            else _below_level(entry, here, there, placed)
            for entry in applied.entries
        ]
        return placements, every_entry(placements), dataclasses.replace(applied, entries=entries)
    # A rule may have written the target's level itself.
    here, there = level_of_one_side({*owners.values()}, beside, wanted) if renamed else ((), ())
    if not here and not there:
        return placements, as_stored, applied
    placements = _moved(placements, here, there, kept)
    as_stored = every_entry(placements)
    return placements, as_stored, _as_target_spells(apply_rules(as_stored, rules), wanted)


def _fields_of_networks(
    placements: Sequence[Placement], applied: RulesApplied, wanted: Sequence[Wanted]
) -> Sequence[Placement]:
    """Returns the placements with fields of no train state as parts of the one that rules put them in.

    `("gen_opt_state", "gen/opt_state")` makes an optimizer of what no layout knows as one, and the weights
    and the step that rules put beside it are its own.
    """
    moved = [entry for entry in applied.entries if entry.named and entry.section in ("model", "other")]
    moved = [entry for entry in moved if entry.placed is not None and len(entry.sources) == 1]
    if not moved:
        return placements  # Nearly every plan.
    found: dict[Path, tuple[Section, str | None, Path]] = _steps_by_rules(placements, moved, wanted)
    networks = {entry.prefix[:-1] for entry in applied.entries if entry.section == "model" and entry.prefix}
    # Beside the attribute that holds the optimizer lies what it trains.
    networks |= {segments(item.owner[:-1]) for item in of_role(wanted, "optimizer")}
    for entry in moved:
        names = entry.whole
        if OPT_STATE in names[:-1] and entry.sources[0][-1] != OPT_STATE:
            above = names[: names.index(OPT_STATE)]
            own = (above[:at] for at in range(len(above), 0, -1) if above[:at] in networks)
            if field := _without_end(entry.sources[0], names[len(above) + 1 :]):
                found[field] = ("optimizer", None, next(own, above))
    trained = {owner for _, _, owner in found.values()}
    moments = [item.leaf.path for item in placements if found and lies_in(item, found)]
    weights: dict[tuple[Path, str], dict[Path, Path]] = defaultdict(dict)
    for entry in moved if found else ():
        names, path = entry.whole, entry.sources[0]
        depth = max((len(owner) for owner in trained if names[: len(owner)] == owner), default=0)
        if not depth or OPT_STATE in names or len(names) == depth:
            continue
        if names[-1] == "step" and not entry.shape:
            found[path] = ("step", None, names[:depth])
        else:
            # Rules may rename below a field that keeps its name.
            field, kept = path[: depth + 1], segments(path[: depth + 1]) == names[: depth + 1]
            weights[names[:depth], names[depth]][path] = (
                field if kept else _without_end(path, names[depth + 1 :])
            )
    for (owner, level), fields in weights.items():
        others = {path for item in placements if (path := item.leaf.path) not in fields}
        # Where rules rename every weight, the moments still have their stored names.
        above = {*filter(None, fields.values())} or _above_parameters([*fields], moments, others)
        found |= {field: ("model", own, owner) for field in above if (own := _collection(field, level))}
    return [in_its_field(item, found) for item in placements] if found else placements


def _steps_by_rules(
    placements: Sequence[Placement], moved: Iterable[Entry], wanted: Sequence[Wanted]
) -> dict[Path, tuple[Section, str | None, Path]]:
    """Returns the numbers that rules call as a train state's step is called; not a model's own number."""
    own = {segments(item.owner): item.owner for item in placements if item.section == "model"}
    taken = {item.tokens for item in of_role(wanted, "model")}
    taken |= {canonical((*item.owner, "step")) for item in placements if item.section == "step"}
    return {
        entry.sources[0]: ("step", None, own[entry.whole[:-1]])
        for entry in (moved if of_role(wanted, "step") else ())
        if entry.whole[-1] == "step" and not entry.shape and entry.whole[:-1] in own
        if canonical(entry.whole) not in taken
    }


def _above_parameters(paths: Iterable[Path], moments: Iterable[Path], others: Iterable[Path]) -> list[Path]:
    """Returns the keys above some stored weights and no others, as the paths of their moments tell them."""
    ends = {moment[at:] for moment in moments for at in range(1, len(moment))}
    levels = [{path[:at] for at in range(1, len(path)) if path[at:] in ends} for path in paths]
    shared = set[Path]().union(*levels).intersection(*filter(None, levels))
    return [level for level in sorted(shared, key=len) if not _begin(others, level)][:1]


def _collection(field: Path, level: str) -> str | None:
    """Returns the collection that a field is in a network; None for a copy, and where no name tells it.

    A level that names nothing (`gen/model`) leaves that to the field: `gen_batch_stats`.
    """
    name = f"_{field[-1]}"
    ends = (end for end in FLAX_COLLECTIONS if level in PLAIN_LEVELS and name.endswith(f"_{end}"))
    own = level if level in FLAX_COLLECTIONS else next(ends, None)
    return None if own is None or any(is_copy_beside(str(key), own) for key in field) else own


def _without_end(path: Path, end: Path) -> Path:
    """Returns the keys of a stored path above its last ones, or nothing where they are not at its end."""
    return path[: -len(end)] if segments(path[-len(end) :]) == end else ()


def _as_target_spells(applied: RulesApplied, wanted: Sequence[Wanted]) -> RulesApplied:
    """Returns the entries with networks of their own for weights that rules call as the target spells them.

    `("params", "model/backbone")` names no collection; what it names is a network as much as
    `("params", "model/params/backbone")` does.
    """
    parts: dict[tuple[Path, str], list[Entry]] = defaultdict(list)
    for entry in applied.entries if applied.made else ():
        placed = entry.placed if entry.section == "model" else None
        if placed is not None and placed.collection is not None:
            parts[placed.owner, placed.collection].append(entry)
    parts = {part: entries for part, entries in parts.items() if all(map(_names_no_collection, entries))}
    if not parts:
        return applied
    moved = {id(entry) for entries in parts.values() for entry in entries}
    others = [e.tokens for e in applied.entries if id(e) not in moved and e.section != "aux"]
    weights = [item.tokens for item in of_role(wanted, "model")]
    moments = [item.tokens for item in of_role(wanted, "optimizer")]
    above: dict[int, int] = {}
    for entries in parts.values():
        depth = min(_shared_depth(entries), _depth_of_model(entries, moments))
        level = canonical(entries[0].whole[:depth])
        # A module that holds other leaves too is a part of their network.
        if level and _begin(weights, level) and not _begin(others, level):
            above |= dict.fromkeys(map(id, entries), depth)
    own = {*FLAX_COLLECTIONS, *(item.collection for item in of_role(wanted, "model"))}
    entries = [
        _in_network(entry, above[id(entry)], own) if id(entry) in above else entry
        for entry in applied.entries
    ]
    return dataclasses.replace(applied, entries=entries)


def _names_no_collection(entry: Entry) -> bool:
    return entry.named and entry.owner == canonical(entry.prefix)


def _begin(paths: Iterable[Path], level: Path) -> bool:
    return any(path[: len(level)] == level for path in paths)


def _in_network(entry: Entry, depth: int, collections: Collection[str | None]) -> Entry:
    """Returns an entry as one of a network; a copy that a rule makes a network of is its values."""
    names = entry.whole
    return dataclasses.replace(
        entry,
        prefix=names[:depth],
        segments=names[depth:],
        owner=canonical(names[:depth]),
        collection=entry.collection if entry.collection in collections else None,
    )


def _shared_depth(entries: Sequence[Entry]) -> int:
    """Returns how many levels lie above all entries; names of layers, and their numbers, are none."""
    first = entries[0].whole
    same = [all(entry.whole[at : at + 1] == (name,) for entry in entries) for at, name in enumerate(first)]
    depth = (*same[:-1], False).index(False)
    while depth and any(is_number(canonical(entry.whole[: depth + 1])[-1]) for entry in entries):
        depth -= 1
    return depth


def _depth_of_model(entries: Sequence[Entry], moments: Sequence[Tokens]) -> int:
    """Returns how many levels lie above the model that moments have been made for, as their paths tell."""
    names = min((entry.whole for entry in entries), key=len)
    return next(
        (
            at
            for at in range(len(names))
            if any(_ends_in(moment, canonical(names[at:])) for moment in moments)
        ),
        len(names),
    )


def _ends_in(path: Tokens, end: Tokens) -> bool:
    return path[-len(end) :] == end


def _below_level(entry: Entry, here: Tokens, there: Tokens, placed: Mapping[Path, Placement]) -> Entry:
    own = placed[entry.placed.leaf.path] if entry.placed is not None else None
    if entry.section == "other":
        names = _below(entry.whole, there)
        above = entry.whole[: len(entry.whole) - len(names)]
        return dataclasses.replace(entry, owner=here, prefix=above, segments=names, placed=own)
    if entry.section not in FIELDS or not entry.owner:
        return entry
    return dataclasses.replace(entry, owner=(*here, *strip(entry.owner, there)), placed=own)


def _moved(
    placements: Sequence[Placement], here: Tokens, there: Tokens, kept: Set[Tokens]
) -> Sequence[Placement]:
    """Returns the placements with a level more or less above train states and what lies beside them."""
    return [
        dataclasses.replace(item, owner=here, path=_below(item.path, there))
        if item.section == "other" and item.tokens not in kept
        else dataclasses.replace(item, owner=(*here, *_below(item.owner, there)))
        if item.section in FIELDS or (item.section == "aux" and item.owner)
        else item
        for item in placements
    ]


def _below(owner: Path, level: Tokens) -> Path:
    depths = range(len(owner) + 1)
    return next((owner[depth:] for depth in depths if canonical(owner[:depth]) == level), owner)


def pair_optimizers(
    wanted: Sequence[WantedOptimizer],
    stored: Sequence[StoredOptimizer],
    wanted_models: Iterable[Tokens],
    stored_models: Collection[Tokens],
) -> list[tuple[WantedOptimizer, StoredOptimizer]]:
    """Returns which stored optimizer each wanted one is."""
    by_owner = {item.owner: item for item in stored}
    pairs = [(item, by_owner[item.owner]) for item in wanted if item.owner in by_owner]
    used = {item.owner for item, _ in pairs}
    # A rule may have brought the step alone to where an optimizer is wanted.
    left = [i for i in wanted if i.owner not in used or (i.leaves and not by_owner[i.owner].leaves)]
    # A number beside an optimizer that counts for itself is the train state's step; the optimizer is free.
    steps = {item.owner for item, other in pairs if other.leaves and not item.leaves}
    stored = [item for item in stored if not _is_of_none(item, stored_models)]
    free = [item for item in stored if item.owner not in used - steps]
    for item in left:
        alike = [other for other in free if _are_alike(item, other, stored_models)]
        if len(alike) == 1 and sum(_are_alike(other, alike[0], stored_models) for other in left) == 1:
            pairs.append((item, alike[0]))
    if not pairs and len(wanted) == len(stored) == 1:
        here, there = _state(wanted[0]), _state(stored[0])
        # A level that only one side has may go where everything lies below it.
        apart = (here and there) or not _same_attribute(wanted[0], stored[0], stored_models)
        if not apart and _hold(here, wanted_models) and _hold(there, stored_models):
            pairs.append((wanted[0], stored[0]))
    return pairs


def _is_of_none(optimizer: StoredOptimizer, models: Collection[Tokens]) -> bool:
    """Tells whether it is a step alone beside several networks, or their optimizers, and no rule gives it."""
    depth = len(optimizer.owner)
    if keys := {(canonical(item.slot or ()) + item.tokens)[:1] for item in optimizer.leaves}:
        names = {name[depth : depth + 1] for name in models if name[:depth] == optimizer.owner}
        return keys <= {key for key in names if not any(map(is_number, key))}
    is_moved = any(canonical(item.owner) != optimizer.owner for item in optimizer.steps)
    return len(optimizer.models) > 1 and not is_moved


def _are_alike(wanted: WantedOptimizer, stored: StoredOptimizer, models: Collection[Tokens]) -> bool:
    return _state(wanted) == _state(stored) and _same_attribute(wanted, stored, models)


def _state(optimizer: WantedOptimizer | StoredOptimizer) -> Tokens:
    """Returns the levels above an optimizer that name a network."""
    return named_levels(optimizer.owner[:-1] if optimizer.has_attribute else optimizer.owner)


def _same_attribute(wanted: WantedOptimizer, stored: StoredOptimizer, models: Collection[Tokens]) -> bool:
    """Tells whether what holds the optimizers may be one; a train state of Linen's has no such attribute.

    Another place in a tuple may, where it can only be one network's: else nothing tells which that is.
    """
    if not (wanted.has_attribute and stored.has_attribute):
        return True
    here, there = wanted.owner[-1], stored.owner[-1]
    if here != there and is_number(here) and is_number(there):
        moments = [item.tokens for item in stored.leaves]
        return len(levels_with_most(moments, models, stored.owner[:-1])) < 2
    return here == there or all(is_number(name) or name in _ATTRIBUTES for name in (here, there))


_ATTRIBUTES = frozenset({"optimizer", "opt", "tx", "optim"})
"""What programs call the attribute of a train state that holds its only optimizer."""


def _hold(names: Tokens, paths: Iterable[Tokens]) -> bool:
    """Tells whether all paths lie below some names."""
    return not names or all(named_levels(path)[: len(names)] == names for path in paths)
