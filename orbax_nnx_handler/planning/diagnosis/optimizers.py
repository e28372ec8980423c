"""Optimizers: none saved, another one, one that is nested differently, moments that cannot follow.

Moments cannot follow some rules on their parameters; and a T5X checkpoint leaves the axes of some of
Adafactor's factored moments open.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Sequence

from orbax_nnx_handler.planning.core.errors import Cause, Hint, fill_hint
from orbax_nnx_handler.planning.core.folding import fold_paths
from orbax_nnx_handler.planning.core.leaves import FACTORED, is_optax_state
from orbax_nnx_handler.planning.core.lines import counted, listed
from orbax_nnx_handler.planning.core.paths import Path, Tokens, canonical, render
from orbax_nnx_handler.planning.core.recipes import reads
from orbax_nnx_handler.planning.diagnosis.evidence import Evidence, spell
from orbax_nnx_handler.planning.diagnosis.ways import selecting
from orbax_nnx_handler.planning.layouts.layout import Placement
from orbax_nnx_handler.planning.mapping.moments import StuckMoment
from orbax_nnx_handler.planning.mapping.optimizer_states import split
from orbax_nnx_handler.planning.rules import as_rules


def _weights_alone(evidence: Evidence) -> str:
    """Returns the way out that leaves the optimizer aside."""
    model, root = spell(evidence.root), evidence.root
    part = f"the target's {model!r} by itself" if model else "the model by itself"
    optimizers = (path for path, item in evidence.sides.wanted.items() if item.role == "optimizer")
    if model and any(canonical(path)[: len(root)] == root for path in optimizers):
        part = f"what the target has below {model!r}, without its optimizers,"
    return f"to restore the weights alone, pass {part} as target."


def find_optimizers(evidence: Evidence) -> Iterable[Cause]:
    """Yields what is wrong with the optimizer as a whole; a single missing moment is no cause."""
    wanted = [path for path, item in evidence.sides.wanted.items() if item.role == "optimizer"]
    lost = evidence.of_role(evidence.missing, "optimizer")
    if not any(path in evidence.restored for path in evidence.weights):
        return
    if not lost:
        yield from _other_network(evidence, evidence.of_role(evidence.missing, "step"))
        return
    stored = [item for item in evidence.sides.placements.values() if item.section == "optimizer"]
    if stored:
        yield from _other_optimizer(evidence, lost)
        return
    lost += evidence.of_role(evidence.missing, "step")
    elsewhere = _like_optimizers(evidence)
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
        way=Hint(_weights_alone(evidence)),
        filters=selecting(evidence, lost),
        may_be_initialised=True,
        facts={"moments": len(wanted), "weights": len(evidence.weights)},
    )


def _like_optimizers(evidence: Evidence) -> list[str]:
    """Returns the first keys below which nothing is read and all is arranged as optax arranges a state."""
    below: dict[str, list[Path]] = defaultdict(list)
    for path, item in evidence.sides.placements.items():
        if item.section == "other" or path in evidence.unexpected:
            below[str(path[0])].append(path[1:])
    return sorted(top for top, paths in below.items() if "opt_state" in top or is_optax_state(paths))


def _unknown_place(evidence: Evidence, lost: Sequence[Path], places: Sequence[str]) -> Cause:
    """Returns that optimizers are stored, and no layout tells whose they are."""
    where = listed([repr(place) for place in places])
    step = ", 'step': tree['step']" if ("step",) in evidence.sides.placements else ""
    tree = f"{{'params': ..., 'opt_state': tree[{places[0]!r}]{step}}}"
    return Cause(
        kind="OptimizerNested",
        text=f"what looks like an optimizer is stored below {where}, and no name tells of which network.",
        paths=tuple(lost),
        way=Hint(f"load the tree with Orbax, and pass from_linen({tree}, target), network by network."),
        facts={"stored": ", ".join(places), "wanted": ""},
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
    way, counts = _weights_alone(evidence), sum(path[-1] == "count" for path in alone)
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


def _other_network(evidence: Evidence, lost: Sequence[Path]) -> Iterable[Cause]:
    """Yields that an optimizer or a step is stored below another name: a rule may say that it is the same."""
    free, wanted = _free(evidence, "optimizer") or _free(evidence, "step"), evidence.sides.wanted
    there, here = {item.owner for item in free}, {wanted[path].owner for path in lost}
    if len(here) > 1 and all(here):
        yield from _other_networks(evidence, lost, free)
    if len(there) != 1 or len(here) != 1 or not all([*there, *here]):
        return
    (stored,), (owner,) = there, here
    network = owner[:-1] or owner
    steps = [path for path in evidence.of_role(evidence.missing, "step") if wanted[path].owner == owner]
    weights = [path for path in evidence.missing_weights if path[: len(network)] == network]
    sources = [item for item in evidence.free_weights.values() if item.owner == stored]
    parts = {str(item.collection): network for item in sources} if weights else {}
    parts |= {str(free[0].leaf.path[len(stored)]): owner} | ({"step": owner} if steps else {})
    rules = [(render((*stored, part)), render((*at, part))) for part, at in parts.items()]
    if not _restores(evidence, rules, [*lost, *weights]):
        return
    what = "optimizer" if evidence.of_role(lost, "optimizer") else "step"
    yield Cause(
        kind="OptimizerNested",
        text=f"the {what} that is wanted below {render(owner)!r} is stored below {render(stored)!r}, and "
        "nothing of one network is lent to another unasked.",
        paths=(*lost, *steps, *weights, *(item.leaf.path for item in (*free, *sources))),
        way=Hint(f"if both are one network, pass renames={rules!r}.", {"renames": rules}),
        facts={"stored": render(stored), "wanted": render(owner)},
    )


def _other_networks(evidence: Evidence, lost: Sequence[Path], free: Sequence[Placement]) -> Iterable[Cause]:
    """Yields the optimizers that the target has beside their networks: `actor_opt` beside `actor`."""
    wanted = evidence.sides.wanted
    here = dict.fromkeys(wanted[path].owner for path in lost)
    fields = {item.owner: _above(item) for item in free if item.owner}
    pairs = [(owner, stored) for owner in here for stored in fields if _is_called_after(owner, stored)]
    if len({owner for owner, _ in pairs}) != len(here) or len({stored for _, stored in pairs}) != len(pairs):
        return
    at = {owner: (fields[stored], "opt_state") for owner, stored in pairs}
    steps = {owner: (*stored, "step") for owner, stored in pairs if (*stored, "step") in evidence.unexpected}
    parts = [*at.items(), *((owner, (path, "step")) for owner, path in steps.items())]
    rules = [(render(path), render((*owner, field))) for owner, (path, field) in parts]
    steps = [path for path in evidence.of_role(evidence.missing, "step") if wanted[path].owner in steps]
    if not rules or not _restores(evidence, rules, [*lost, *steps]):
        return
    below = {owner: path[:-1] if path[-1] == "opt_state" else path for owner, (path, _) in at.items()}
    names = listed([f"{render(path)!r} ({render(owner)!r} is wanted)" for owner, path in below.items()])
    yield Cause(
        kind="OptimizerNested",
        text=f"optimizers are stored below {names}, and nothing of one network is lent to another unasked.",
        paths=(*lost, *steps, *(item.leaf.path for item in free)),
        way=Hint(f"if they are the same, pass renames={rules!r}.", {"renames": rules}),
        facts={"stored": names, "wanted": names},
    )


def _above(item: Placement) -> Path:
    """Returns the keys of an optimizer's own field."""
    at = len(item.leaf.path) - len(item.path)
    return (
        item.leaf.path[:at]
        if item.leaf.path[at:] == item.path
        else (*item.owner, item.leaf.path[len(item.owner)])
    )


def _is_called_after(owner: Path, stored: Path) -> bool:
    """Tells whether the attribute that holds an optimizer is called after a stored train state."""
    words = set("_".join(map(str, owner)).split("_"))
    return set("_".join(map(str, stored)).split("_")) < words


def _restores(evidence: Evidence, rules: Sequence[tuple[str, str]], lost: Iterable[Path]) -> bool:
    """Tells whether rules restore what is lost, behind the rules that were passed or in front of them."""
    given, more = evidence.verdict.renames, as_rules(rules)
    found = (evidence.restored_under(every) for every in ([*given, *more], [*more, *given]))
    return any(each is not None and each.issuperset(lost) for each in found)


def _nested(evidence: Evidence, lost: Sequence[Path]) -> Iterable[Cause]:
    elsewhere = list(_other_network(evidence, lost))
    if elsewhere:
        yield from elsewhere
        return
    parameters = {evidence.stored_below(item) for item in evidence.stored_weights.values()}
    free = [split(_unboxed(canonical(item.path)), parameters) for item in _free(evidence, "optimizer")]
    stored = {slot for slot, parameter in free if parameter is not None}
    wanted = {evidence.moments[path][0] for path in lost if path in evidence.moments}
    if stored and wanted:
        there, here = map(_folded, (stored, wanted))
        text = f"structured differently: its moments are at {there}, the target's at {here}"
        text = f"{text}, and no name says which of them belong together"
        saved = "build the target's optimizer as the chain that was saved"
        way = f"{saved}; {_weights_alone(evidence)}"
        if stored == wanted:
            slot = min(stored)
            theirs = _folded({parameter for at, parameter in free if at == slot and parameter is not None})
            moments = (evidence.moments[path] for path in lost if path in evidence.moments)
            ours = _folded({parameter for at, parameter in moments if at == slot})
            text = f"for other groups of parameters: {spell(slot)} is of {theirs}, the target's of {ours}"
            way = f"build the target's optimizer with the groups that were saved; {_weights_alone(evidence)}"
            if theirs == ours:
                text = f"another one of the same names: {there} have other shapes, or are of others"
                way = f"build the target's optimizer as it was saved; {_weights_alone(evidence)}"
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


def find_stuck_moments(evidence: Evidence) -> Iterable[Cause]:
    """Yields, for each rule, the missing moments that cannot follow."""
    groups: dict[str, list[StuckMoment]] = defaultdict(list)
    for item in evidence.sides.stuck:
        if item.path in evidence.missing:
            groups[item.reason].append(item)
    for reason, moments in groups.items():
        missing = [item.path for item in moments]
        stored = dict.fromkeys(
            path for item in moments for path in item.stored if path in evidence.unexpected
        )
        count, by = len(missing), reason or "another arrangement of the layers"
        owners = "its parameter" if count == 1 else "their parameters"
        rule = "leave the rule out and change the value in the program; or, " if reason else ""
        yield Cause(
            kind="MomentsStay",
            text=f"{counted(count, 'optimizer moment')} cannot follow what {by} does to {owners}: "
            f"{_why(moments)}.",
            paths=(*missing, *stored),
            way=Hint(rule + _weights_alone(evidence)),
            filters=selecting(evidence, missing),
            may_be_initialised=True,
            facts={"reason": reason},
        )


def _why(moments: Iterable[StuckMoment]) -> str:
    """Returns the reasons, at most two: a rule on many layers would list a pair of shapes for each kind."""
    reasons = list(dict.fromkeys(item.why for item in moments))
    return "; ".join([*reasons[:2], *(["and so on"] if len(reasons) > 2 else [])])


def find_open_factoring(evidence: Evidence) -> Iterable[Cause]:
    """Yields the missing factored moments, where the checkpoint has some that no one can name."""
    placements = evidence.sides.placements
    stored = [
        path for path, item in placements.items() if item.section == "other" and _is_factored(item.slot)
    ]
    if not stored:
        return
    missing: list[Path] = [path for path, (slot, _) in evidence.moments.items() if _is_factored(slot[-1:])]
    missing = [path for path in missing if path in evidence.missing]
    if missing:
        yield Cause(
            kind="OpenFactoring",
            text=f"{len(stored)} stored v_row and v_col belong to parameters with two axes of one size, and "
            "T5X does not store which axis it took for the row: optax may call them the other way round.",
            paths=(*missing, *stored),
            may_be_initialised=True,
            facts={"moments": len(missing), "stored": len(stored)},
        )


def _is_factored(slot: Path | None) -> bool:
    return slot is not None and slot[-1:] in {(name,) for name in FACTORED}
