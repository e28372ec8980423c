"""Optimizers: none saved, another one, one of another name or nested differently; steps likewise."""

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

from orbax_nnx_handler.planning.core.errors import Cause, Hint, fill_hint
from orbax_nnx_handler.planning.core.folding import fold_paths
from orbax_nnx_handler.planning.core.leaves import begins_a_state, is_optax_state
from orbax_nnx_handler.planning.core.lines import counted, listed
from orbax_nnx_handler.planning.core.paths import Path, Tokens, canonical, render, spelled
from orbax_nnx_handler.planning.core.recipes import reads
from orbax_nnx_handler.planning.diagnosis.evidence import Evidence, spell
from orbax_nnx_handler.planning.diagnosis.ways import selecting, weights_alone
from orbax_nnx_handler.planning.layouts.layout import Placement
from orbax_nnx_handler.planning.mapping.optimizer_states import split
from orbax_nnx_handler.planning.rules import as_rules


def find_optimizers(evidence: Evidence) -> Iterable[Cause]:
    """Yields what is wrong with the optimizer as a whole; a single missing moment is no cause."""
    wanted = [path for path, item in evidence.sides.wanted.items() if item.role == "optimizer"]
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
    elsewhere = _like_optimizers(evidence)
    if stored and not (elsewhere and all(map(_is_by_network, stored))):
        yield from _other_optimizer(evidence, lost)
        return
    lost += evidence.of_role(evidence.missing, "step")
    if elsewhere:
        yield _unknown_place(evidence, lost, elsewhere)
        return
    found = "there are weights"
    if evidence.weights_complete:
        found = f"all {counted(len(evidence.weights), 'weight')} are there"
    yield Cause(
        kind="NoOptimizer",
        text=f"no optimizer was saved: {found}, and 0 of the optimizer's {len(wanted)} leaves.",
        paths=tuple(lost),
        way=Hint(weights_alone(evidence)),
        filters=selecting(evidence, lost),
        may_be_initialised=True,
        facts={"moments": len(wanted), "weights": len(evidence.weights)},
    )


def _like_optimizers(evidence: Evidence) -> list[Path]:
    """Returns the keys below which nothing is read and all is arranged as optax arranges a state.

    The first keys of a path, or `opt_state` and a network's name below it.
    """
    below: dict[Path, list[Path]] = defaultdict(list)
    for path, item in evidence.sides.placements.items():
        if item.section == "other" or path in evidence.unexpected:
            depth = len(_field(item)) if _is_by_network(item) else 0
            below[path[: depth + 1]].append(path[depth + 1 :])
    places = (top for top, paths in below.items() if "opt_state" in str(top[-1]) or is_optax_state(paths))
    return sorted(places, key=render)


def _is_by_network(item: Placement) -> bool:
    """Tells whether a leaf lies below a network's name in `opt_state`."""
    return item.section == "optimizer" and len(item.path) > 1 and not begins_a_state(item.path)


def _unknown_place(evidence: Evidence, lost: Sequence[Path], places: Sequence[Path]) -> Cause:
    """Returns that optimizers are stored, and no layout tells whose they are."""
    where = listed([repr(render(place)) for place in places])
    step = ", 'step': tree['step']" if ("step",) in evidence.sides.placements else ""
    keys = "".join(f"[{key!r}]" for key in places[0])
    tree = f"{{'params': ..., 'opt_state': tree{keys}{step}}}"
    return Cause(
        kind="OptimizerNested",
        text=f"what looks like an optimizer is stored below {where}, and no name tells of which network.",
        paths=tuple(lost),
        way=Hint(f"load the tree with Orbax, and pass from_linen({tree}, target), network by network."),
        facts={"stored": ", ".join(map(render, places)), "wanted": ""},
    )


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
        text = (
            f"the target's optimizer keeps {more} as well, which the stored one does not: it keeps {there}."
        )
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
    """An optimizer that is stored below another name, and the rules under which it is the wanted one.

    Attributes:
        owner: The keys above the wanted one.
        place: Where the stored one lies.
        what: `optimizer`, or `step` where only that is elsewhere.
        rules: The rules, those for its network's weights included where these are missing as well.
        wanted: The leaves that the rules restore.
        stored: What they are made from.
    """

    owner: Path
    place: Path
    what: str
    rules: Sequence[tuple[str, str]]
    wanted: Sequence[Path]
    stored: Sequence[Path]


_MOST_CHOICES = 3


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
    stored = {at: sum(math.prod(i.leaf.shape) for i in items) for at, items in there.items()}
    sizes = {at: sum(math.prod(evidence.shape(path)) for path in paths) for at, paths in here.items()}
    alike = {owner: [at for at in there if stored[at] == size] for owner, size in sizes.items()}
    pairs = _paired({owner: _named(evidence, owner, there) for owner in here}, alike)
    moves = [_move(evidence, owner, here[owner], there[at]) for owner, at in pairs.items()]
    if not _are_restored(evidence, moves):
        moves = [move for move in moves if len(moves) > 1 and _are_restored(evidence, [move])]
    if moves:
        yield _elsewhere(moves)
    for owner in here:
        rest = [at for at in alike[owner] if owner not in pairs and at not in pairs.values()]
        each = [_move(evidence, owner, here[owner], there[at]) for at in rest]
        if 1 < len(each) <= _MOST_CHOICES and all(_are_restored(evidence, [move]) for move in each):
            yield _one_of(each)


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
    return sorted(sources.intersection(stored)) if len(sources) == 1 else _called_after(owner, stored)


def _network(evidence: Evidence, owner: Path) -> Path:
    """Returns the keys above the weights that an optimizer is for, as far as a name tells."""
    above = owner[:-1]
    beside = {path[: len(owner)] for path in evidence.weights if path[: len(above)] == above}
    found = _called_after(owner[-1:], [path[-1:] for path in beside])
    return (*above, *found[0]) if len(found) == 1 else above


_GENERAL_WORDS = frozenset({"optimizer", "opt", "optim", "tx", "state"})


def _called_after(owner: Path, names: Iterable[Path]) -> list[Path]:
    """Returns the names that an optimizer's own holds best, short or whole: `g_opt` is called after `gen`."""
    words = {*_words(owner)} - _GENERAL_WORDS
    scores: dict[Path, int] = {}
    for name in names:
        each = [
            2 if word in words else any(word.startswith(one) or one.startswith(word) for one in words)
            for word in _words(name)
        ]
        scores[name] = sum(each) if all(each) else 0
    best = max(scores.values(), default=0)
    return [name for name, score in scores.items() if score == best > 0]


def _words(name: Path) -> list[str]:
    return [word for word in "_".join(map(str, name)).lower().split("_") if word]


def _move(evidence: Evidence, owner: Path, lost: Sequence[Path], stored: Sequence[Placement]) -> _Move:
    # A step goes where its optimizer goes.
    role = "optimizer" if evidence.of_role(lost, "optimizer") else "step"
    held = [item for item in stored if item.section == role] or stored
    network = _network(evidence, owner)
    weights = [path for path in evidence.missing_weights if network and path[: len(network)] == network]
    sources = [item for item in evidence.free_weights.values() if item.owner == stored[0].owner]
    sources = sources if weights else []
    field = _field(held[0])
    above = {_field(item): network for item in sources} | {
        field: (*owner, "opt_state" if role == "optimizer" else "step")
    }
    is_stepped = any(item.section == "step" for item in stored)
    return _Move(
        owner=owner,
        place=field[:-1] if field[-1:] in (("opt_state",), ("step",)) else field,
        what=role,
        rules=[(spelled(old), spelled(new)) for old, new in above.items()],
        wanted=[*(path for path in lost if is_stepped or evidence.role(path) != "step"), *weights],
        stored=[item.leaf.path for item in (*stored, *sources)],
    )


def _field(item: Placement) -> Path:
    """Returns the keys of the field of a train state that a leaf lies in."""
    whole, depth = item.leaf.path, len(item.leaf.path) - len(item.path)
    return whole if item.section == "step" else whole[:depth]


def _elsewhere(moves: Sequence[_Move]) -> Cause:
    rules = [rule for move in moves for rule in move.rules]
    unasked, way = "and nothing of one network is lent to another unasked", "they are the same"
    stored = listed([repr(render(move.place)) for move in moves])
    wanted = listed([repr(render(move.owner)) for move in moves])
    text = f"the {moves[0].what} that is wanted below {wanted} is stored below {stored}, {unasked}."
    if len(moves) > 1:
        names = [f"{render(move.place)!r} ({render(move.owner)!r} is wanted)" for move in moves]
        text = f"optimizers are stored below {listed(names)}, {unasked}."
    elif len(rules) > 1:
        way = "both are one network"
    return Cause(
        kind="OptimizerNested",
        text=text,
        paths=tuple(path for move in moves for path in (*move.wanted, *move.stored)),
        way=Hint(f"if {way}, pass renames={rules!r}.", {"renames": rules}),
        facts={"stored": stored, "wanted": wanted},
    )


def _one_of(moves: Sequence[_Move]) -> Cause:
    """Returns that one wanted optimizer may be each of several stored ones."""
    stored, wanted = [render(move.place) for move in moves], render(moves[0].owner)
    ways = [f"pass renames={list(move.rules)!r} if it is that of {render(move.place)!r}" for move in moves]
    return Cause(
        kind="OptimizerNested",
        text=f"optimizers are stored below {listed(map(repr, stored))}, and no name tells which of them is "
        f"wanted below {wanted!r}.",
        paths=(*moves[0].wanted, *(path for move in moves for path in move.stored)),
        way=Hint(f"{', or '.join(ways)}."),
        facts={"stored": tuple(stored), "wanted": wanted},
    )


def _are_restored(evidence: Evidence, moves: Sequence[_Move]) -> bool:
    """Tells whether rules restore what is lost, behind the rules that were passed or in front of them."""
    given, more = evidence.verdict.renames, as_rules(rule for move in moves for rule in move.rules)
    lost = {path for move in moves for path in move.wanted}
    found = (evidence.restored_under(every) for every in ([*given, *more], [*more, *given]))
    return any(each is not None and each.issuperset(lost) for each in found if more)


def _nested(evidence: Evidence, lost: Sequence[Path]) -> Iterable[Cause]:
    parameters = {evidence.stored_below(item) for item in evidence.stored_weights.values()}
    free = [split(_unboxed(canonical(item.path)), parameters) for item in _free(evidence, "optimizer")]
    stored = {slot for slot, parameter in free if parameter is not None}
    wanted = {evidence.moments[path][0] for path in lost if path in evidence.moments}
    if stored and wanted:
        there, here = map(_folded, (stored, wanted))
        text = f"structured differently: its moments are at {there}, the target's at {here}"
        text = f"{text}, and no name says which of them belong together"
        saved = "build the target's optimizer as the chain that was saved"
        way = f"{saved}; {weights_alone(evidence)}"
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
            # Moments that are stored are not begun anew.
            filters=(),
            may_be_initialised=False,
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


def _folded(names: Iterable[Tokens]) -> str:
    return fold_paths(tuple(spell(name).split("/")) for name in sorted(names))


def _free(evidence: Evidence, section: str) -> list[Placement]:
    placements = evidence.sides.placements
    return [placements[path] for path in evidence.unexpected if placements[path].section == section]


def _unboxed(tokens: Tokens) -> Tokens:
    return tokens[:-1] if tokens[-1] == "value" else tokens


def _stored_slots(evidence: Evidence) -> set[str]:
    """Returns the names of the stored moments: the keys right above a parameter's path."""
    lasts = {evidence.stored_below(item)[-1] for item in evidence.stored_weights.values()}
    tops = {evidence.stored_below(item)[0] for item in evidence.stored_weights.values()} | {"params"}
    found: set[str] = set()
    for item in evidence.sides.placements.values():
        tokens = canonical(item.path)
        tokens = _unboxed(tokens)
        if item.section != "optimizer" or tokens[-1] not in lasts:
            continue
        at = next((at for at, token in enumerate(tokens) if token in tops), 0)
        slot = item.slot[-1] if item.slot else tokens[at - 1] if at else ""
        found |= {slot} if slot and not slot.startswith("#") else set()
    return found


def find_steps(evidence: Evidence) -> Iterable[Cause]:
    """Yields that one step is stored where the target counts more than once: no count is read twice."""
    lost = evidence.of_role(evidence.missing, "step")
    placements = evidence.sides.placements
    steps = [path for path, item in placements.items() if item.section == "step" and not item.leaf.shape]
    if not lost or len(steps) != 1 or evidence.weights.keys().isdisjoint(evidence.restored):
        return
    taken = [at for at, item in evidence.restored.items() if reads(item.recipe) == (steps[0],)]
    if len(lost) > 1:
        yield _step_of_all(evidence, lost, render(steps[0]), is_wanted=bool(taken))
    for path in taken if len(lost) == 1 else ():
        if path[:-1] == lost[0][: len(path) - 1] or lost[0][:-1] == path[: len(lost[0]) - 1]:
            yield _second_step(lost[0], path, render(steps[0]))


def _step_of_all(evidence: Evidence, lost: Sequence[Path], stored: str, *, is_wanted: bool) -> Cause:
    fill = fill_hint(selecting(evidence, lost), len(lost))
    words = f"set these from {stored!r} in the program; for the restore, {fill.words}"
    return Cause(
        kind="SecondStep",
        text=f"{stored!r} is the one stored step, and no name says which of the {len(lost)} that are missing "
        "it is.",
        paths=tuple(lost),
        way=dataclasses.replace(
            fill, words=words if is_wanted else f"add {stored!r} to the target, and {words}"
        ),
        facts={"stored": stored, "wanted": tuple(map(render, lost))},
    )


def _second_step(path: Path, other: Path, stored: str) -> Cause:
    ours, theirs = render(path), render(other)
    return Cause(
        kind="SecondStep",
        text=f"{stored!r} is the one stored step, and the target wants two: {theirs!r} takes it, and nothing "
        f"is left for {ours!r}.",
        paths=(path,),
        way=Hint(f"leave {theirs!r} out of the target, and set it from {ours!r} in the program."),
        facts={"stored": stored, "wanted": (theirs, ours)},
    )
