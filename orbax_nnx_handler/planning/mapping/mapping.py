"""What is wrong with a user's rules once the whole mapping is known.

Wanted path to stored paths and transform, for every leaf of a target.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

from flax import nnx

from orbax_nnx_handler.planning.core.errors import RestoreError, RuleError
from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.paths import Path, Tokens, canonical
from orbax_nnx_handler.planning.core.recipes import (
    Read,
    Recipe,
    RecipeError,
    Slice,
    parts_of,
    reads,
    render_reads,
    shape_of,
)
from orbax_nnx_handler.planning.layouts.layout import Layout, Placement, Stored
from orbax_nnx_handler.planning.mapping.arrange import UnclearOrder
from orbax_nnx_handler.planning.mapping.matches import Discarded, Found, ModelMatch, Rivals
from orbax_nnx_handler.planning.mapping.matching import Matcher
from orbax_nnx_handler.planning.mapping.modules import Homeless
from orbax_nnx_handler.planning.mapping.moments import MomentFollower, StuckMoment
from orbax_nnx_handler.planning.mapping.optimizer import (
    StoredStates,
    parameter_paths,
    read_stored,
    virtual_parameters,
    wanted_states,
)
from orbax_nnx_handler.planning.mapping.optimizer_pairs import PairedStates
from orbax_nnx_handler.planning.mapping.random_state import find_random
from orbax_nnx_handler.planning.mapping.restack import UnclearAxis
from orbax_nnx_handler.planning.mapping.roots import Roots, find_roots, strip
from orbax_nnx_handler.planning.rules import Rule, RulesApplied, ScanAxis, apply_rules, unused_rules
from orbax_nnx_handler.planning.rules.entries import Entry, model_entries
from orbax_nnx_handler.planning.target.roles import Wanted, of_role


def rule_faults(
    applied: RulesApplied, match: ModelMatch, found: Mapping[Path, Found]
) -> Iterator[RestoreError]:
    """Yields the errors for parts that go nowhere and for axes that nothing asks for."""
    yield from _loose_parts(applied, found)
    idle = [rule for rule in applied.axes if not any(_meets(rule, group) for group in match.groups)]
    if idle:
        yield unused_rules(idle)


def _meets(rule: ScanAxis, group: Tokens) -> bool:
    return rule.tokens[-len(group) :] == group


def _loose_parts(applied: RulesApplied, found: Mapping[Path, Found]) -> Iterator[RestoreError]:
    """A leaf that is split is used when one of its parts is; the others must not get lost."""
    changed = [entry for entry in applied.entries if not isinstance(entry.recipe, Read)]
    parts = [entry for entry in changed if any(isinstance(part, Slice) for part in parts_of(entry.recipe))]
    if not parts:
        return
    taken = {part for item in found.values() for part in parts_of(item.recipe)}
    loose = [entry for entry in parts if entry.recipe not in taken]
    if loose:
        rows = "\n".join(
            f"  {'/'.join(entry.segments)} {entry.shape}  <-  {render_reads(entry.recipe)} by {entry.reason}"
            for entry in loose
        )
        yield RuleError(
            f"{len(loose)} parts of split leaves are no wanted leaf:\n{rows}",
            paths=[path for entry in loose for path in entry.sources],
            hints=["correct their names, or leave them behind with Drop(name, reason)."],
        )


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
        homeless: Stored values that NNX has no home for; they must be zero.
        discarded: Stored values that the user's rules leave behind, moments included.
        applied: What the user's rules made of the stored model.
        faults: What is wrong with single rules: parts that go nowhere, axes that nothing asks for.
        stuck: Moments that cannot follow their parameters.
    """

    layout: Layout
    found: Mapping[Path, Found]
    placements: Sequence[Placement]
    roots: Roots
    rivals: tuple[Rivals, ...]
    unclear: tuple[UnclearAxis | UnclearOrder, ...]
    homeless: tuple[Homeless, ...]
    discarded: Mapping[Path, Discarded]
    applied: RulesApplied
    faults: tuple[RestoreError, ...] = ()
    stuck: tuple[StuckMoment, ...] = ()
    states: PairedStates = dataclasses.field(default_factory=PairedStates)

    @cached_property
    def shapes(self) -> Mapping[Path, Shape | None]:
        """The shape that each wanted path would have; None where its recipe does not come out."""
        stored = {item.leaf.path: item.leaf.shape for item in self.placements}
        return {path: _shape_under(found.recipe, stored) for path, found in self.found.items()}

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

    Args:
        wanted: The target's leaves with their roles.
        stored: The stored leaves.
        layout: How to read them.
        rules: The user's renames.

    Raises:
        UnusedRuleError: A rule matches no stored leaf.
    """
    placements = layout.place(stored)
    original = model_entries(placements)
    applied = apply_rules(original, rules)
    entries = applied.entries
    model = of_role(wanted, "model", "transient", "random")
    roots = find_roots(_within_model(model, placements), [e.tokens for e in entries])
    optimizer = _stored_states(placements, original, model, roots)
    weights = [strip(item.tokens, roots.wanted) for item in of_role(model, "model")]
    states = wanted_states(of_role(wanted, "optimizer"), weights, roots.wanted)
    virtual = [] if of_role(model, "model") else virtual_parameters(states, of_role(wanted, "optimizer"))
    match = Matcher(wanted=[*model, *virtual], entries=entries, roots=roots, axes=applied.axes).match()
    found = dict(match.found)
    _add_outside_model(found, wanted, placements, roots)
    parameters = {strip(w.tokens, roots.wanted): w.leaf.path for w in [*of_role(model, "model"), *virtual]}
    followed = MomentFollower(optimizer, states, parameters, stored, applied).add_to(found)
    return LeafMapping(
        layout=layout,
        found={item.leaf.path: found[item.leaf.path] for item in wanted if item.leaf.path in found},
        placements=placements,
        roots=roots,
        rivals=match.rivals,
        unclear=match.unclear,
        homeless=_homeless(match, optimizer, stored),
        discarded=_discarded(applied, optimizer, stored),
        applied=applied,
        faults=tuple(rule_faults(applied, match, found)),
        stuck=followed.stuck,
        states=followed.states,
    )


def _within_model(model: Sequence[Wanted], placements: Sequence[Placement]) -> list[Tokens]:
    """Returns the paths that say where the model sits.

    What `nnx_aux` holds under its own path (averaged weights) lies beside the model.
    """
    aside = {canonical(placement.path) for placement in placements if placement.section == "aux"}
    tokens = [item.tokens for item in model if item.role == "model"]
    return [path for path in tokens if path not in aside] or tokens


def _stored_states(
    placements: Sequence[Placement], entries: Sequence[Entry], model: Sequence[Wanted], roots: Roots
) -> StoredStates:
    has_moments = any(placement.section == "optimizer" for placement in placements)
    trained = {"params", None} | {item.collection for item in model if _is_trained(item)}
    return read_stored(placements, parameter_paths(entries, roots.stored, trained) if has_moments else {})


def _is_trained(item: Wanted) -> bool:
    kind = item.leaf.kind
    return kind is not None and issubclass(kind, nnx.Param)


def _add_outside_model(
    found: dict[Path, Found], wanted: Sequence[Wanted], placements: Sequence[Placement], roots: Roots
) -> None:
    steps = [placement for placement in placements if placement.section == "step"]
    for item in of_role(wanted, "step", "model"):
        lone = item.leaf.shape == () and item.tokens[-1] == "step" and item.leaf.path not in found
        own = _own_step(item, steps) if item.role == "step" or lone else None
        if own is not None:
            found[item.leaf.path] = Found(recipe=Read(own.leaf.path))
    find_random(found, of_role(wanted, "random", "model"), placements, roots)


def _own_step(item: Wanted, steps: Sequence[Placement]) -> Placement | None:
    """Returns the count of steps that belongs to a wanted one.

    A train state has one, which every wanted step is. Of two train states (a GAN) each has
    its own: the one whose path has the most of its keys in common, if that is a single one.
    """
    if len(steps) < 2:
        return next(iter(steps), None)
    shared = [_common(item.tokens[:-1], canonical(step.path)[:-1]) for step in steps]
    return steps[shared.index(max(shared))] if shared.count(max(shared)) == 1 else None


def _common(left: Tokens, right: Tokens) -> int:
    """Counts the keys that two paths begin with alike."""
    pairs = zip(left, right, strict=False)
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))


def _homeless(match: ModelMatch, optimizer: StoredStates, stored: Stored) -> tuple[Homeless, ...]:
    """Returns the values without a home, and the moments that belong to them."""
    moments = [
        dataclasses.replace(item, leaf=stored[moment])
        for item in match.homeless
        for moment in optimizer.of_parameter(item.leaf.path)
    ]
    return (*match.homeless, *moments)


def _discarded(applied: RulesApplied, optimizer: StoredStates, stored: Stored) -> dict[Path, Discarded]:
    found = {path: Discarded(leaf=stored[path], reason=reason) for path, reason in applied.discarded.items()}
    for parameter, reason in applied.discarded.items():
        for path in optimizer.of_parameter(parameter):
            found[path] = Discarded(leaf=stored[path], reason=reason)
    return found
