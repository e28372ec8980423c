"""Train states: a network or an optimizer under another name, another optimizer, one nested otherwise."""

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from orbax_nnx_handler.planning.core.errors import Cause, Hint, as_python
from orbax_nnx_handler.planning.core.folding import fold_paths
from orbax_nnx_handler.planning.core.leaves import MOMENTS, begins_a_state
from orbax_nnx_handler.planning.core.lines import listed
from orbax_nnx_handler.planning.core.paths import (
    Path,
    Tokens,
    called_after,
    canonical,
    render,
    spelled,
    without_box,
)
from orbax_nnx_handler.planning.core.recipes import Recipe, reads
from orbax_nnx_handler.planning.diagnosis.evidence import Evidence, spell
from orbax_nnx_handler.planning.diagnosis.passed_rules import follow_weights
from orbax_nnx_handler.planning.diagnosis.ways import selecting, weights_alone
from orbax_nnx_handler.planning.layouts.layout import FLAX_COLLECTIONS, STATISTICS, Placement, field_of
from orbax_nnx_handler.planning.mapping.optimizer_states import split
from orbax_nnx_handler.planning.rules import Rule, as_rules
from orbax_nnx_handler.planning.verdict.replaced_weights import statistics_of_both


def find_optimizers(evidence: Evidence) -> Iterable[Cause]:
    """Yields what is wrong with the optimizer as a whole; a single missing moment is no cause."""
    lost = evidence.of_role(evidence.missing, "optimizer")
    if not any(path in evidence.restored for path in evidence.weights):
        return
    steps = evidence.of_role(evidence.missing, "step")
    for cause in _whose(evidence, [*lost, *steps]):
        yield cause
        evidence = evidence.without(cause.paths)
    lost = [path for path in lost if path in evidence.missing]
    if not lost:
        return
    stored = [item for item in evidence.sides.placements.values() if item.section == "optimizer"]
    if stored:
        yield from _other_optimizer(evidence, lost)


def _other_optimizer(evidence: Evidence, lost: Sequence[Path]) -> Iterable[Cause]:
    kept = {path: slot[-1] for path, (slot, _) in evidence.moments.items() if slot}
    restored = {kept[path] for path in kept if path in evidence.restored}
    names, new = _stored_slots(evidence), set(kept.values()) - restored
    alone = [path for path in lost if path not in evidence.moments]
    # A count alone: every moment is there, and no stored count is left over that it might be.
    scalars = all(not evidence.sides.wanted[path].leaf.shape for path in alone)
    if scalars and len(alone) == len(lost) and not _free(evidence, "optimizer"):
        new = {fold_paths(alone)}
    # A state is restored whole or not at all: of Lion's one moment and Adam's two, neither is the other's.
    other = not new & names or (not restored and new != names)
    if not names or not new or not other:
        yield from _nested(evidence, lost)
        return
    there, here = listed(sorted(names)), listed(sorted(new | restored))
    text = f"the checkpoint was written with another optimizer: it keeps {there}, the target's keeps {here}."
    way, counts = weights_alone(evidence), sum(path[-1] == "count" for path in alone)
    if restored:
        more = listed(sorted(new - restored))
        text = f"the target's optimizer keeps {more} as well; the stored one does not, it keeps {there}."
        if counts:
            count = "a count that begins at 0 begins" if counts == 1 else "counts that begin at 0 begin"
            way = f"{way.removesuffix('.')}; {count} a schedule anew."
    yield Cause(
        kind="OtherOptimizer",
        text=text,
        paths=tuple(lost),
        way=Hint(way),
        filters=selecting(evidence, lost),
        may_be_initialised=True,
        facts={
            "stored": tuple(sorted(names)),
            "wanted": tuple(sorted(new | restored)),
            "kept": tuple(sorted(restored)),
        },
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Move:
    """What is stored below another name, and the rules under which it is the wanted one.

    Attributes:
        owner: The keys above the wanted one.
        place: Where the stored one lies.
        what: `network`, `optimizer`, or `step` where only that is elsewhere.
        rules: The rules; an optimizer's include those for its network's weights if these are missing as well.
        wanted: The leaves that the rules restore.
        stored: What they are made from.
    """

    owner: Path
    place: Path
    what: str
    rules: Sequence[tuple[str, str] | Rule]
    wanted: Sequence[Path]
    stored: Sequence[Path]


_MOST_CHOICES = 3


def find_networks(evidence: Evidence) -> Iterable[Cause]:
    """Yields whole networks that are stored below another train state's name, or as the copy of one.

    Only what holds the same weights is a choice, however layers are arranged; then names decide.
    """
    explained = evidence.explained
    networks = {
        owner: {at: x for at, x in found.items() if explained.isdisjoint(item.leaf.path for item in x)}
        for owner, found in evidence.networks.items()
    }
    lost = {
        owner: [path for path in evidence.missing_weights if path[: len(owner)] == owner]
        for owner in networks
    }
    alike = {owner: list(found) for owner, found in networks.items() if found and lost[owner]}
    named = {owner: called_after(owner, found) for owner, found in alike.items()}
    free = evidence.free_weights.values()
    # While the model itself lies unused, a copy of it is no network that is not called after it.
    is_left = any(not item.owner and item.collection in (None, *FLAX_COLLECTIONS) for item in free)
    yield from _moved(
        evidence,
        alike,
        _paired(named, named if is_left else alike),
        lambda owner, at: _network_move(evidence, owner, at, lost[owner], networks[owner][at]),
    )


def _network_move(
    evidence: Evidence, owner: Path, place: Path, wanted: Sequence[Path], stored: Sequence[Placement]
) -> _Move:
    fields = {field_of(item): str(item.collection) for item in stored}
    kinds = {field: kind if kind in FLAX_COLLECTIONS else "params" for field, kind in fields.items()}
    whole = [(spelled(field), spelled((*owner, kind))) for field, kind in kinds.items()]
    short = [(spelled(field), spelled(owner)) for field in fields]
    is_whole = not STATISTICS.isdisjoint(kinds.values())
    shared = [] if is_whole else statistics_of_both(evidence.verdict, owner, place[:-1], wanted)
    whole += shared
    move = _Move(
        owner=owner,
        place=place,
        what="network",
        rules=[*short, *shared] if owner and len(fields) == 1 else whole,
        wanted=wanted,
        stored=[item.leaf.path for item in stored],
    )
    # Moved by itself, a network leaves behind an optimizer that no name leads to.
    lost = [p for p in evidence.missing if p[: len(owner) - 1] == owner[:-1]]
    lost = [p for p in lost if evidence.role(p) in ("optimizer", "step")]
    held = [item for what in ("optimizer", "step") for item in _free(evidence, what) if item.owner == place]
    state = dataclasses.replace(
        move,
        rules=[(spelled(place), spelled(owner[:-1]))],
        wanted=[*wanted, *lost],
        stored=[*move.stored, *(item.leaf.path for item in held)],
    )
    if lost and held and _are_restored(evidence, [state]):
        return state
    return move if _are_restored(evidence, [move]) else dataclasses.replace(move, rules=whole)


def _whose(evidence: Evidence, lost: Iterable[Path]) -> Iterable[Cause]:
    """Yields optimizers and steps that are stored below another name: rules may say that they are the same.

    Whose one is, its network tells by the train state that its weights come from; else its name, else the
    number of its elements, however layers are arranged. Whatever tells it, the rules were tried.
    """
    here: dict[Path, list[Path]] = defaultdict(list)
    there: dict[Path, list[Placement]] = defaultdict(list)
    for path in lost:
        here[evidence.sides.wanted[path].owner].append(path)
    for item in (*_free(evidence, "optimizer"), *_free(evidence, "step")):
        there[item.owner].append(item)
    alone = [at for at, items in there.items() if {item.section for item in items} == {"step"}]
    # One above the optimizer is its own, that of another network is not.
    if len(there) - 1 == len(alone) == 1 and all(at[: len(alone[0])] == alone[0] for at in there):
        there = {at: [*items, *there[alone[0]]] for at, items in there.items() if at not in alone}
    stored = {at: sum(math.prod(i.leaf.shape) for i in items) for at, items in there.items()}
    sizes = {at: sum(math.prod(evidence.shape(path)) for path in paths) for at, paths in here.items()}
    alike = {owner: [at for at in there if stored[at] == size] for owner, size in sizes.items()}
    yield from _moved(
        evidence,
        alike,
        _paired({owner: _named(evidence, owner, there) for owner in here}, alike),
        lambda owner, at: _move(evidence, owner, here[owner], there[at]),
    )


def _moved(
    evidence: Evidence,
    alike: Mapping[Path, Sequence[Path]],
    pairs: Mapping[Path, Path],
    move: Callable[[Path, Path], _Move],
) -> Iterable[Cause]:
    """Yields what rules restore: where names or contents leave one choice, and where there are a few."""
    moves = [move(owner, at) for owner, at in pairs.items()]
    if not _are_restored(evidence, moves):
        moves = [one for one in moves if len(moves) > 1 and _are_restored(evidence, [one])]
    if moves:
        yield _elsewhere(evidence, moves)
    left = {
        owner: [at for at in found if at not in pairs.values()]
        for owner, found in alike.items()
        if owner not in pairs
    }
    choices = [[(owner, at) for at in found] for owner, found in left.items() if len(found) > 1]
    # One that may be each of several which it alone may be.
    only = {at: [owner for owner in left if left[owner] == [at]] for found in left.values() for at in found}
    choices += [[(owner, at) for owner in owners] for at, owners in only.items() if len(owners) > 1]
    for pairing in choices:
        each = [move(owner, at) for owner, at in pairing[: _MOST_CHOICES + 1]]
        if each[0].what == "step" and each[0].place == each[-1].place:
            continue  # One step of several optimizers is set in the program.
        if len(each) <= _MOST_CHOICES and all(_are_restored(evidence, [one]) for one in each):
            yield _one_of(evidence, each)


def _paired(named: Mapping[Path, Sequence[Path]], alike: Mapping[Path, Sequence[Path]]) -> dict[Path, Path]:
    """Returns the stored train state of each wanted one for which just one is left, names before sizes."""
    pairs: dict[Path, Path] = {}
    for choices in (named, alike, alike):
        left = {
            owner: [at for at in found if at not in pairs.values()]
            for owner, found in choices.items()
            if owner not in pairs
        }
        taken = Counter(found[0] for found in left.values() if len(found) == 1)
        pairs |= {owner: found[0] for owner, found in left.items() if len(found) == 1 == taken[found[0]]}
    return pairs


def _named(evidence: Evidence, owner: Path, stored: Collection[Path]) -> list[Path]:
    """Returns the train states that an optimizer's network is, or else those that it is called after."""
    network = _network(evidence, owner)
    sources = {
        evidence.sides.placements[source].owner
        for path, item in evidence.restored.items()
        if evidence.role(path) == "model" and path[: len(network)] == network
        for source in reads(item.recipe)
    }
    return sorted(sources.intersection(stored)) if len(sources) == 1 else called_after(owner, stored)


def _network(evidence: Evidence, owner: Path) -> Path:
    """Returns the keys above the weights that an optimizer is for, as far as a name tells."""
    above = owner[:-1]
    beside = {path[: len(owner)] for path in evidence.weights if path[: len(above)] == above}
    found = called_after(owner[-1:], [path[-1:] for path in beside])
    return (*above, *found[0]) if len(found) == 1 else above


def _move(evidence: Evidence, owner: Path, lost: Sequence[Path], stored: Sequence[Placement]) -> _Move:
    # A step goes where its optimizer goes.
    role = "optimizer" if evidence.of_role(lost, "optimizer") else "step"
    held = [item for item in stored if item.section == role] or stored
    network = _network(evidence, owner)
    weights = [path for path in evidence.missing_weights if network and path[: len(network)] == network]
    sources = [item for item in evidence.free_weights.values() if weights and item.owner == stored[0].owner]
    field = field_of(held[0])
    above = {field_of(item): network for item in sources}
    above[field] = (*owner, "opt_state" if role == "optimizer" else "step")
    steps = [item for item in stored if item.section == "step"]  # One of several networks goes by itself.
    above |= {item.leaf.path: (*owner, "step") for item in steps if item.owner != held[0].owner}
    return _Move(
        owner=owner,
        place=field[:-1] if field[-1:] in (("opt_state",), ("step",)) else field,
        what=role,
        rules=[(spelled(old), spelled(new)) for old, new in above.items()],
        wanted=[*(path for path in lost if steps or evidence.role(path) != "step"), *weights],
        stored=[item.leaf.path for item in (*stored, *sources)],
    )


def _elsewhere(evidence: Evidence, moves: Sequence[_Move]) -> Cause:
    rules = [rule for move in moves for rule in move.rules]
    unasked, way = "and nothing of one network is lent to another unasked", "they are the same"
    stored, wanted = (listed([repr(render(at)) for at in ends]) for ends in _ends(moves))
    text = f"the {moves[0].what} that is wanted below {wanted} is stored below {stored}, {unasked}."
    if not moves[0].owner:
        text = f"the wanted weights are stored below {stored}, {unasked}."
    elif len(moves) > 1:
        names = [f"{render(move.place)!r} ({render(move.owner)!r} is wanted)" for move in moves]
        text = f"{moves[0].what}s are stored below {listed(names)}, {unasked}."
    elif len(rules) > 1:
        way = "both are one network"
    return _cause(
        evidence, [moves], text, Hint(f"if {way}, pass renames={as_python(rules)}.", {"renames": rules})
    )


def _one_of(evidence: Evidence, moves: Sequence[_Move]) -> Cause:
    """Returns that what is wanted may be each of several that are stored, or the other way about."""
    stored, wanted = (listed(list(dict.fromkeys(repr(render(at)) for at in e))) for e in _ends(moves))
    what, below = moves[0].what, f" below {wanted}" if moves[0].owner else ""
    text = f"{what}s are stored below {stored}, and no name tells which of them is wanted{below}."
    ends = [f"that of {render(move.place)!r}" for move in moves]
    if moves[0].place == moves[-1].place:
        text = f"what is stored below {stored} may be each {what} wanted{below}, and no name tells which."
        ends = [f"wanted below {render(move.owner)!r}" for move in moves]
    places = [_found_by(evidence, [move])[0] for move in moves]
    each = zip(moves, places, ends, strict=True)
    ways = [f"pass renames={as_python(list(move.rules))}{place} if it is {end}" for move, place, end in each]
    return _cause(evidence, [[move] for move in moves], text, Hint(f"{', or '.join(ways)}."))


def _ends(moves: Sequence[_Move]) -> tuple[list[Path], list[Path]]:
    return [move.place for move in moves], [move.owner for move in moves]


def _cause(evidence: Evidence, ways: Sequence[Sequence[_Move]], text: str, way: Hint) -> Cause:
    """Returns what is stored elsewhere, with all that every one of some ways restores beside it."""
    moves = [move for moves in ways for move in moves]
    stored, owners = (tuple(map(render, ends)) for ends in _ends(moves))
    paths = dict.fromkeys(evidence.with_moments([path for move in moves for path in move.wanted]))
    if more := evidence.missing.keys() - paths:
        # With a copy out of the way, `params` may be found by itself.
        found = [_found_by(evidence, moves)[1] for moves in ways]
        more = more.intersection(*found)
        paths |= dict.fromkeys(more) | {source: None for path in more for source in reads(found[0][path])}
    return Cause(
        kind="OtherNetwork" if moves[0].what == "network" else "OptimizerNested",
        text=text,
        paths=(*paths, *(path for move in moves for path in move.stored)),
        way=way,
        facts={"stored": stored, "wanted": owners},
    )


def _are_restored(evidence: Evidence, moves: Sequence[_Move]) -> bool:
    """Tells whether rules restore that too, behind the rules that were passed or in front of them."""
    return bool(_found_by(evidence, moves)[1])


def _found_by(evidence: Evidence, moves: Sequence[_Move]) -> tuple[str, Mapping[Path, Recipe]]:
    """Returns where rules are to be put, and what is then restored: all that was and all they are for."""
    given, more = evidence.verdict.renames, as_rules(rule for move in moves for rule in move.rules)
    lost = {*evidence.restored, *(path for move in moves for path in move.wanted)}
    orders = {"behind": [*given, *more], "in front of": [*more, *given]} if given else {"": more}
    for where, every in orders.items() if more else ():
        found = evidence.restored_under(every)
        if found is not None and found.keys() >= lost:
            return where and f" {where} the rules passed so far", found
    return "", {}


def _nested(evidence: Evidence, lost: Sequence[Path]) -> Iterable[Cause]:
    parameters = {evidence.stored_below(item) for item in evidence.stored_weights.values()}
    free = [split(without_box(canonical(item.path)), parameters) for item in _free(evidence, "optimizer")]
    stored = {slot for slot, parameter in free if parameter is not None}
    # What lies below a network's name is looked for as that network's.
    left = [item for item in _free(evidence, "optimizer") if begins_a_state(item.path)]
    wanted = {evidence.moments[path][0] for path in lost if path in evidence.moments}
    if follow_weights(evidence, lost, [parameter for _, parameter in free]):
        return
    if stored and wanted:
        there, here = map(_folded, (stored, wanted))
        text = f"structured differently: its moments are at {there}, the target's at {here}"
        text = f"{text}, and no name says which of them belong together"
        way = f"build the target's optimizer as the chain that was saved; {weights_alone(evidence)}"
        if stored == wanted:
            slot = min(stored)
            theirs = _folded({parameter for at, parameter in free if at == slot and parameter is not None})
            moments = (evidence.moments[path] for path in lost if path in evidence.moments)
            ours = _folded({parameter for at, parameter in moments if at == slot})
            text = f"for other groups of parameters: {spell(slot)} is of {theirs}, the target's of {ours}"
            way = f"build the target's optimizer with the groups that were saved; {weights_alone(evidence)}"
            if theirs == ours:
                text = f"another one of the same names: {there} have other shapes, or are of others"
                way = f"build the target's optimizer as it was saved; {weights_alone(evidence)}"
        yield Cause(
            kind="OptimizerNested",
            text=f"the stored optimizer is {text}.",
            paths=tuple(lost),
            way=Hint(way),
            facts={"stored": there, "wanted": here},
        )
    elif stored:
        yield Cause(
            kind="OptimizerNested",
            text=f"an optimizer is stored, with moments at {_folded(stored)}, and no name or rule says which "
            "of the target's it is.",
            paths=(*lost, *evidence.of_role(evidence.missing, "step")),
            way=Hint("build the target's optimizer as it was saved, and take it apart in the program."),
            facts={"stored": _folded(stored), "wanted": ""},
        )
    elif names := {str(key) for item in left for key in item.path} & MOMENTS:
        yield Cause(
            kind="OptimizerNested",
            text=f"an optimizer is stored, and below its {listed(sorted(names))} are no paths of stored "
            "weights, as where it was made for a part of the model alone.",
            paths=tuple(lost),
            way=Hint(
                "read it with Orbax, and give from_linen its moments below the paths of their weights, as "
                f"tx.init(params) has them; {weights_alone(evidence)}"
            ),
            # No filter: moments that are stored are not begun anew.
            facts={"stored": ", ".join(sorted(names)), "wanted": ""},
        )


def _folded(names: Iterable[Tokens]) -> str:
    return fold_paths(tuple(spell(name).split("/")) for name in sorted(names))


def _free(evidence: Evidence, section: str) -> list[Placement]:
    placements = evidence.sides.placements
    return [placements[path] for path in evidence.unexpected if placements[path].section == section]


def _stored_slots(evidence: Evidence) -> set[str]:
    """Returns the names of the stored moments: the keys right above a parameter's path."""
    names = [name for item in evidence.stored_weights.values() if (name := evidence.stored_below(item))]
    lasts, tops = {name[-1] for name in names}, {name[0] for name in names} | {"params"}
    found: set[str] = set()
    for item in evidence.sides.placements.values():
        tokens = without_box(canonical(item.path))
        if item.section != "optimizer" or tokens[-1] not in lasts:
            continue
        at = next((at for at, token in enumerate(tokens) if token in tops), 0)
        slot = item.slot[-1] if item.slot else tokens[at - 1] if at else ""
        found |= {slot} if slot and not slot.startswith("#") else set()
    return found
