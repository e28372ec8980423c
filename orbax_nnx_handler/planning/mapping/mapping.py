"""Wanted path to stored paths and transform, for every leaf of a target.

Also what is wrong with a user's rules once the whole mapping is known.
"""

import dataclasses
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property

from orbax_nnx_handler.planning.core.errors import RestoreError, RuleError
from orbax_nnx_handler.planning.core.folding import Row
from orbax_nnx_handler.planning.core.leaves import OPT_STATE, Shape
from orbax_nnx_handler.planning.core.lines import aligned
from orbax_nnx_handler.planning.core.paths import Path, Tokens, canonical, render
from orbax_nnx_handler.planning.core.recipes import (
    Read,
    Recipe,
    RecipeError,
    reads,
    render_reads,
    shape_of,
)
from orbax_nnx_handler.planning.layouts.layout import FLAX_COLLECTIONS, Layout, Placement, Stored
from orbax_nnx_handler.planning.layouts.linen import without_aux
from orbax_nnx_handler.planning.mapping.cells_and_wrappers import WithoutVariable
from orbax_nnx_handler.planning.mapping.matches import (
    SAME_PATH,
    CompetingSources,
    Discarded,
    Found,
    MatchEvidence,
    ModelMatch,
    UnclearAxis,
)
from orbax_nnx_handler.planning.mapping.moments import FollowedMoments, MomentFollower, StuckMoment
from orbax_nnx_handler.planning.mapping.networks import Matched, match_networks
from orbax_nnx_handler.planning.mapping.optimizer_pairs import (
    PairedStates,
    Trainings,
    parameters_of,
    trained_network,
    trained_of,
    weights_of,
)
from orbax_nnx_handler.planning.mapping.optimizer_states import (
    OptimizerState,
    StoredStates,
    parameter_paths,
    read_stored,
    virtual_parameters,
    wanted_states,
)
from orbax_nnx_handler.planning.mapping.random_state import as_wanted, find_random
from orbax_nnx_handler.planning.mapping.roots import Roots, below_model, of_root
from orbax_nnx_handler.planning.mapping.train_states import (
    StoredOptimizer,
    WantedOptimizer,
    pair_optimizers,
    stored_optimizers,
    under_rules,
    wanted_optimizers,
)
from orbax_nnx_handler.planning.rules import Rule, RulesApplied
from orbax_nnx_handler.planning.rules.applying import unused_axes
from orbax_nnx_handler.planning.rules.entries import Entry, loose_parts
from orbax_nnx_handler.planning.target.roles import Wanted, of_role


def rule_faults(
    applied: RulesApplied, match: ModelMatch, found: Mapping[Path, Found], wanted: Iterable[Wanted]
) -> Iterator[RestoreError]:
    """Yields the errors for parts that go nowhere and for axes that nothing asks for."""
    loose = loose_parts(applied.entries, (item.recipe for item in found.values()))
    read = {path for item in found.values() for path in reads(item.recipe)} if loose else set[Path]()
    # A copy of the weights beside them, of which nothing is wanted, is left as one, whole leaves or not.
    owners = {x.prefix for x in (applied.entries if loose else ()) if not read.isdisjoint(x.sources)}
    loose = [x for x in loose if x.prefix in owners or not owners]
    if loose:  # A leaf that is taken apart is used when one of its parts is; the others must not get lost.
        parts = [Row(x.segments, (str(x.shape),), render_reads(x.recipe)) for x in loose]
        rows = [aligned(parts), *(f"  by {reason}" for reason in dict.fromkeys(x.reason for x in loose))]
        what = "{} of leaves that rules take apart {} no wanted leaf:"
        lacking = {math.prod(item.leaf.shape) for item in wanted if item.leaf.path not in found}
        is_lacked = any(math.prod(entry.shape) in lacking for entry in loose)  # Then none is left behind.
        drop = "" if is_lacked else ", or leave them behind with Drop(name, reason)"
        head = what.format("1 part", "is") if len(loose) == 1 else what.format(f"{len(loose)} parts", "are")
        yield RuleError(
            "\n".join([head, *rows]),
            paths=[path for entry in loose for path in entry.sources],
            hints=[f"correct their names, those of the levels above included{drop}."],
        )
    idle = [rule for rule in applied.axes if all(rule.tokens[-len(at) :] != at for at in match.groups)]
    if idle:
        yield unused_axes(idle)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeafMapping:
    """What a checkpoint can give a target, under one layout.

    Attributes:
        layout: The layout it was read under.
        found: For each wanted path that has one, its source.
        placements: What each stored leaf is.
        roots: Where the model sits on both sides.
        rivals: Wanted leaves that several stored leaves claim.
        unclear: Layer groups whose stacked axis or order is open.
        states: Which stored state of the optimizer each wanted one is.
        without_variable: Stored values that NNX has no Variable for; they must be zero.
        discarded: Stored values that the user's rules leave behind, moments included.
        applied: What the user's rules made of the stored model.
        faults: What is wrong with single rules: parts that go nowhere, axes that nothing asks for.
        stuck: Moments that cannot follow their parameters.
        copied: Stored leaves that a rule says are wanted more than once, and their moments.
    """

    layout: Layout
    found: Mapping[Path, Found]
    placements: Sequence[Placement]
    roots: Roots
    rivals: tuple[CompetingSources, ...]
    unclear: tuple[UnclearAxis, ...]
    without_variable: tuple[WithoutVariable, ...]
    discarded: Mapping[Path, Discarded]
    applied: RulesApplied
    faults: tuple[RestoreError, ...] = ()
    stuck: tuple[StuckMoment, ...] = ()
    states: tuple[PairedStates, ...] = ()
    copied: frozenset[Path] = frozenset()

    @cached_property
    def placed(self) -> Mapping[Path, Placement]:
        """What each stored leaf is, by its path."""
        return {item.leaf.path: item for item in self.placements}

    @cached_property
    def shapes(self) -> Mapping[Path, Shape | None]:
        """The shape that each wanted path would have; None where its recipe does not come out."""
        placed, shapes = self.placed, dict[Path, Shape]()
        found: dict[Path, Shape | None] = {}
        for path, source in self.found.items():
            recipe = source.recipe
            if isinstance(recipe, Read):  # Nearly every leaf.
                found[path] = placed[recipe.path].leaf.shape
            else:
                shapes = shapes or {item.leaf.path: item.leaf.shape for item in self.placements}
                found[path] = _shape_under(recipe, shapes)
        return found

    @property
    def recipes(self) -> Mapping[Path, Recipe]:
        """How each wanted leaf that has a source is made."""
        return {path: found.recipe for path, found in self.found.items()}

    @property
    def loose(self) -> tuple[Entry, ...]:
        """The parts that rules cut out of stored leaves, and that nothing is made of."""
        return tuple(loose_parts(self.applied.entries, self.recipes.values()))

    def used(self) -> set[Path]:
        """Returns the stored paths that the result is made from, and those that say the same."""
        return {path for found in self.found.values() for path in (*reads(found.recipe), *found.spare)}


def _shape_under(recipe: Recipe, stored: Mapping[Path, Shape]) -> Shape | None:
    try:
        return shape_of(recipe, stored)
    except RecipeError:
        return None


def map_leaves(
    wanted: Sequence[Wanted], stored: Stored, layout: Layout, rules: Sequence[Rule]
) -> LeafMapping:
    """Maps a target onto a checkpoint.

    Raises:
        UnusedRuleError: A rule matches no stored leaf.
    """
    mapping = _map(wanted, stored, layout, rules, layout.place(stored))
    models, entries = of_role(wanted, "model", "random"), mapping.applied.entries
    moved = as_wanted(mapping.placements, models, mapping.found, mapping.used(), entries)
    if moved is mapping.placements:
        return mapping  # Nearly every checkpoint.
    again = _map(wanted, stored, layout, rules, moved)
    aside = {new.leaf.path for new, old in zip(moved, mapping.placements, strict=True) if new is not old}
    gained = [(len(each.found), len(each.used() & aside)) for each in (mapping, again)]
    return again if gained[1] > gained[0] or again.unclear else mapping


def _map(
    wanted: Sequence[Wanted],
    stored: Stored,
    layout: Layout,
    rules: Sequence[Rule],
    placements: Sequence[Placement],
) -> LeafMapping:
    placements, as_stored, applied = under_rules(placements, rules, wanted)
    applied = _in_own_collections(applied, wanted)
    entries = applied.entries
    model = of_role(wanted, "model", "transient", "random")
    pairs = _pairs(wanted, placements, entries)
    original = [entry for entry in as_stored if entry.section == "model"] if pairs else []
    alone: _Pairs = [] if any(item.role == "model" for item in model) else pairs
    levels = {own.owner: trained_network(of, entries) for own, of in alone}
    virtual = [one for own, _ in alone for one in virtual_parameters(own.leaves, levels[own.owner])]
    match, networks = match_networks([*model, *virtual], entries, applied.axes, layout)
    found = dict(match.found)
    pairs = pairs if alone else _of_read_states(pairs, found, placements)
    kept = [item for item in placements if item.leaf.path not in applied.discarded]
    if steps := of_role(wanted, "step"):
        _add_steps(found, pairs, steps, kept, entries)
    roots = networks[0].roots if len(networks) == 1 else Roots(wanted=(), stored=(), overlap=0)
    if len(match.found) < len(model) + len(virtual):
        find_random(found, of_role(wanted, "random", "model"), kept, entries, roots, networks)
    optimizers, followed, stuck = list[StoredStates](), list[FollowedMoments](), list[StuckMoment]()
    trainings = Trainings(networks, entries, found, placements)
    for pair_wanted, pair_stored in pairs:
        likely = trainings.of(pair_wanted, pair_stored)
        network = next(iter(likely), None)
        own = weights_of(pair_stored, original, network, entries)
        here, there = _levels(pair_wanted, pair_stored, own, network)
        here = levels.get(pair_wanted.owner, here)
        names = parameters_of(network, here, bool(virtual)) if network else {}
        states = wanted_states(pair_wanted.leaves, names, here)
        trained, at = trained_of(states, names), there if network else roots.stored
        aside = [entry for entry in as_stored if entry.section == "aux" and entry.owner in pair_stored.models]
        optimizers.append(_stored_states(pair_stored, [*own, *aside], trained, at))
        paths = {tokens: item.leaf.path for tokens, item in names.items()}
        follower = MomentFollower(optimizers[-1], states, paths, stored, applied, found)
        followed.append(follower.follow())
        stuck += (*followed[-1].stuck, *_open_moments(pair_wanted, states, likely, found))
    # No moment of a changed parameter is read as it is, nor of a state whose place another kind has.
    lost = {item.path for item in stuck}.union(*(one.states.lacking for one in followed))
    _add_own(found, [item for item in wanted if item.leaf.path not in lost], kept, entries)
    return LeafMapping(
        layout=layout,
        found={item.leaf.path: source for item in wanted if (source := found.get(item.leaf.path))},
        placements=placements,
        roots=roots,
        rivals=match.rivals,
        unclear=match.unclear,
        without_variable=_without_variable(match, optimizers, stored),
        discarded=_discarded(applied, optimizers, stored, found),
        applied=applied,
        faults=tuple(rule_faults(applied, match, found, wanted)),
        stuck=tuple(stuck),
        states=tuple(one.states for one in followed),
        copied=_copied(applied, optimizers),
    )


def _open_moments(
    optimizer: WantedOptimizer,
    states: Sequence[OptimizerState],
    networks: Sequence[Matched],
    found: dict[Path, Found],
) -> Iterator[StuckMoment]:
    """Takes out and yields the moments that may be of several networks which are made in different ways."""
    made = (found[item.leaf.path] for one in networks for item in one.weights if item.leaf.path in found)
    reason = next((source.reason for source in made if source.reason), "")
    names = " or ".join(render(one.roots.wanted) for one in networks)
    why = f"no name tells whether {render(optimizer.owner)} trains {names}"
    moments = (leaf for s in states for field in s.moments.values() for leaf in field.values())
    for leaf in moments if len(networks) > 1 else ():
        if source := found.pop(leaf.path, None):
            yield StuckMoment(path=leaf.path, stored=tuple(reads(source.recipe)), reason=reason, why=why)


def _copied(applied: RulesApplied, optimizers: Sequence[StoredStates]) -> frozenset[Path]:
    moments = (optimizer.of_parameter(path) for path in applied.copied for optimizer in optimizers)
    return applied.copied.union(*moments)


def _in_own_collections(applied: RulesApplied, wanted: Sequence[Wanted]) -> RulesApplied:
    """Returns the entries with those in the collection of a type of the target's that a rule has named so.

    A module may be called like a type: then the path is a module's.
    """
    if not applied.made:
        return applied
    entries = below_model(applied.entries, [item.tokens for item in of_role(wanted, "model")])
    applied = dataclasses.replace(applied, entries=of_root(entries))
    names = {item.collection for item in wanted if item.role == "model"} - {None, *FLAX_COLLECTIONS}
    names = {name for name in names if not any(name in item.path for item in wanted)}
    if not names:
        return applied

    def placed(entry: Entry) -> Entry:
        at = next((at for at, name in enumerate(entry.segments[:-1]) if name in names), None)
        if at is None or not entry.named or entry.prefix or entry.section != "model":
            return entry
        return dataclasses.replace(
            entry,
            segments=entry.segments[at + 1 :],
            prefix=entry.segments[: at + 1],
            collection=entry.segments[at],
            owner=canonical(entry.segments[:at]),
        )

    return dataclasses.replace(applied, entries=[placed(entry) for entry in applied.entries])


_Pairs = Sequence[tuple[WantedOptimizer, StoredOptimizer]]
_OWN_STEP = MatchEvidence(kind="step", words="its own path")


def _pairs(wanted: Sequence[Wanted], placements: Sequence[Placement], entries: Sequence[Entry]) -> _Pairs:
    """Returns which stored optimizer each wanted one is, where the rules say that they lie."""
    optimizers = wanted_optimizers(wanted)
    if not optimizers:
        return []
    owners = {
        path: entry.owner
        for entry in entries
        if entry.section in ("optimizer", "step")
        for path in entry.sources
    }
    return pair_optimizers(
        optimizers,
        stored_optimizers(placements, owners, {e.owner for e in entries if e.named and e.section == "model"}),
        (item.tokens for item in of_role(wanted, "model")),
        [(*entry.owner, *entry.tokens) for entry in entries if entry.section == "model"],
    )


def _levels(
    wanted: WantedOptimizer, stored: StoredOptimizer, own: Sequence[Entry], network: Matched | None
) -> tuple[Tokens, Tokens]:
    """Returns the keys above the model that an optimizer was made for, in the target and in the checkpoint.

    Where no collections are kept apart and both sides have one model beside the optimizer, it is that.
    """
    none: tuple[Tokens, Tokens] = ((), ())
    if network is None:
        return none
    roots = network.roots.wanted, network.roots.stored
    if any(roots) or any(entry.collection is not None for entry in own):
        return roots
    here = _level([item.tokens for item in network.weights], wanted.owner)
    there = _level([entry.tokens for entry in own], stored.owner)
    return (here, there) if here and there else none


def _level(weights: Collection[Tokens], owner: Tokens) -> Tokens:
    """Returns the keys that all weights lie below beside an optimizer, or none."""
    depth = max(len(owner), 1)
    levels = {path[:depth] for path in weights if len(path) > depth and path[: depth - 1] == owner[:-1]}
    return next(iter(levels)) if len(levels) == 1 and all(len(path) > depth for path in weights) else ()


def _stored_states(
    optimizer: StoredOptimizer, own: Sequence[Entry], trained: Mapping[Tokens, str | None], root: Tokens
) -> StoredStates:
    known = parameter_paths(own, root, trained) if optimizer.leaves else {}
    return read_stored((*optimizer.leaves, *optimizer.steps), known)


def _of_read_states(pairs: _Pairs, found: Mapping[Path, Found], placements: Sequence[Placement]) -> _Pairs:
    """Returns the pairs without optimizers and steps of a train state of which no weight is read.

    Others' weights are the target's model then, or nothing tells whose: only its own name does.
    """
    if len({item.owner for item in placements if item.section == "model"}) < 2:
        return pairs  # Nearly every checkpoint.
    sources = {path for each in found.values() for path in reads(each.recipe)}
    read = {canonical(item.owner) for item in placements if item.leaf.path in sources}

    def is_own(wanted: WantedOptimizer, stored: StoredOptimizer) -> bool:
        owner = stored.owner
        is_named = bool(owner) and wanted.owner[: len(owner)] == owner
        return is_named or len(stored.models) > 1 or not read.isdisjoint(stored.models)

    return [pair for pair in pairs if is_own(*pair)]


def _add_steps(
    found: dict[Path, Found],
    pairs: _Pairs,
    steps: Sequence[Wanted],
    placements: Sequence[Placement],
    entries: Sequence[Entry],
) -> None:
    """Adds the step of each train state: its own field, which a model's Variable of that name is not.

    A program may count beside an optimizer that counts as well: each of the two has a path of its own, in
    the tree or in `nnx_aux`. What is left is the step of the train state that the optimizer is paired with.
    """
    ends = {item.tokens[-1:] for item in steps}
    named = {path: entry.whole for entry in entries if entry.named for path in entry.sources}
    at = {item.leaf.path: canonical(named.get(item.leaf.path, item.leaf.path)) for item in placements}
    near = [item for item in placements if at[item.leaf.path][-1:] in ends]
    # Without collections, the step of an optimizer that keeps nothing else looks like a number of a model's.
    read = {path for each in found.values() for path in reads(each.recipe)}
    own = [item for item in near if item.section != "model" or item.collection is None]
    paths = (item.leaf.path for item in own if item.leaf.path not in read)
    whole = {at[path]: path for path in paths}
    aside = {without_aux(item.leaf.path): item.leaf.path for item in near if item.section == "aux"}
    for item in steps:
        if (item.leaf.kind is None or item.owner) and item.tokens in whole:
            found[item.leaf.path] = Found(recipe=Read(whole[item.tokens]), evidence=SAME_PATH)
        elif item.tokens in aside:
            found[item.leaf.path] = Found(recipe=Read(aside[item.tokens]), evidence=_OWN_STEP)
        if item.leaf.path in found:
            read.update(reads(found[item.leaf.path].recipe))
    for owned, stored in pairs:
        of = render(stored.owner) if stored.owner else "the train state"
        evidence = MatchEvidence(kind="step", words=f"the step of {of}")
        for item in owned.steps if len(stored.steps) == 1 else ():
            if item.leaf.path not in found and (step := stored.steps[0].leaf.path) not in read:
                found[item.leaf.path] = Found(recipe=Read(step), evidence=evidence)


def _add_own(
    found: dict[Path, Found], wanted: Sequence[Wanted], kept: Sequence[Placement], entries: Sequence[Entry]
) -> None:
    """Adds what a program keeps below `opt_state` and optax does not know: under its whole path."""
    own = [item.leaf.path for item in wanted if item.leaf.kind is None and OPT_STATE in item.leaf.path[:-1]]
    if own := [path for path in own if path not in found]:
        called = {path for entry in entries if entry.named for path in entry.sources}
        paths = {item.leaf.path for item in kept} - called
        stored = {without_aux(path): path for path in paths} | {canonical(path): path for path in paths}
        for path in own:
            if canonical(path) in stored:
                found[path] = Found(recipe=Read(stored[canonical(path)]), evidence=SAME_PATH)


def _without_variable(
    match: ModelMatch, optimizers: Sequence[StoredStates], stored: Stored
) -> tuple[WithoutVariable, ...]:
    """Returns the values that NNX has no place for, and the moments that belong to them."""
    moments = [
        dataclasses.replace(item, leaf=stored[moment], shape=None)
        for item in match.without_variable
        for optimizer in optimizers
        for moment in optimizer.of_parameter(item.leaf.path)
    ]
    return (*match.without_variable, *moments)


def _discarded(
    applied: RulesApplied, optimizers: Sequence[StoredStates], stored: Stored, found: Mapping[Path, Found]
) -> dict[Path, Discarded]:
    """Returns what rules drop, and the moments of it that nothing is read from."""
    left = dict(applied.discarded)
    read = {path for each in found.values() for path in reads(each.recipe)} if left else set[Path]()
    for parameter, rule in applied.discarded.items():
        for optimizer in optimizers:
            left |= dict.fromkeys(set(optimizer.of_parameter(parameter)) - read, rule)
    return {path: Discarded(leaf=stored[path], rule=rule) for path, rule in left.items()}
