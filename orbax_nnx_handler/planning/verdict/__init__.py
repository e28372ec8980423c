"""Whether a mapping fits the target: what is restored, missing, mismatched, defaulted."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

from orbax_nnx_handler.planning.core.errors import (
    AmbiguousMappingError,
    Hint,
    RestoreError,
    RuleError,
    UnusedRuleError,
)
from orbax_nnx_handler.planning.core.leaves import OPT_STATE, StoredLeaf
from orbax_nnx_handler.planning.core.paths import Path, Tokens, render
from orbax_nnx_handler.planning.core.recipes import Read, Recipe, reads
from orbax_nnx_handler.planning.layouts.layout import Stored
from orbax_nnx_handler.planning.mapping import (
    best_mappings,
    claims_of_shared,
    faults_of,
    renames_of_shared,
)
from orbax_nnx_handler.planning.mapping.mapping import LeafMapping
from orbax_nnx_handler.planning.mapping.matches import (
    Discarded,
    Dropped,
    MatchEvidence,
    as_saved,
    may_be_saved,
)
from orbax_nnx_handler.planning.mapping.roots import Roots
from orbax_nnx_handler.planning.options import Policy, RestoreOptions, resolve
from orbax_nnx_handler.planning.rules import Drop, Rule, ScanAxis, apply_rules
from orbax_nnx_handler.planning.rules.applying import WHOLE
from orbax_nnx_handler.planning.rules.entries import every_entry
from orbax_nnx_handler.planning.target import Target
from orbax_nnx_handler.planning.target.roles import WEIGHTS, Wanted, of_role, roles_of
from orbax_nnx_handler.planning.target.shardings import indivisible
from orbax_nnx_handler.planning.verdict.laws import Broken, Known, Source, certify
from orbax_nnx_handler.planning.verdict.leaf_verdicts import (
    LeafVerdicts,
    Outcome,
    Unreadable,
    rules_for_readable,
    unreadable,
    unreadable_leaves,
)
from orbax_nnx_handler.planning.verdict.outcomes import (
    Defaulted,
    Mismatched,
    Missing,
    Restored,
    Sides,
    Verdict,
)
from orbax_nnx_handler.planning.verdict.replaced_weights import REPLACED


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leftover:
    """The stored leaves beside the ones that are used; each in exactly one place.

    Attributes:
        unexpected: Leaves of the parts that the target asks for.
        skipped: Leaves of parts it does not ask for, caches of another shape, and
            values that are no arrays.
        dropped: Leaves without a counterpart in NNX, and those that rules leave behind.
    """

    unexpected: Mapping[Path, StoredLeaf]
    skipped: Mapping[Path, StoredLeaf]
    dropped: Mapping[Path, Dropped | Discarded]


def left_over(wanted: Sequence[Wanted], mapping: LeafMapping, used: Iterable[Recipe]) -> Leftover:
    """Sorts the stored leaves that are not used."""
    taken = _paths_of(used)
    dropped = {path: item for path, item in _dropped(mapping).items() if path not in taken}
    left = (
        item for item in mapping.placements if item.leaf.path not in taken and item.leaf.path not in dropped
    )
    left = list(left) if len(taken) < len(mapping.placements) else []
    roles = {item.role for item in wanted}
    asked = {"model"} | (roles & {"optimizer", "step"})
    open_ends = [item.leaf for item in left if item.section in asked and item.leaf.dtype is not None]
    # A leaf that was found and is not used all the same is a cache that the program recomputes.
    passed_over = mapping.used() if open_ends else ()
    unexpected = {leaf.path: leaf for leaf in open_ends if leaf.path not in passed_over}
    skipped = {item.leaf.path: item.leaf for item in left if item.leaf.path not in unexpected}
    return Leftover(unexpected=unexpected, skipped=skipped, dropped=dropped)


def _paths_of(recipes: Iterable[Recipe]) -> set[Path]:
    """Returns the stored leaves that are read."""
    found: set[Path] = set()
    for recipe in recipes:
        if isinstance(recipe, Read):  # Nearly every one.
            found.add(recipe.path)
        else:
            found.update(reads(recipe))
    return found


def _dropped(mapping: LeafMapping) -> dict[Path, Dropped | Discarded]:
    items = mapping.without_variable
    dropped = {item.leaf.path: Dropped(leaf=item.leaf, reason=item.reason) for item in items}
    return {**dropped, **mapping.discarded}


class Chosen(NamedTuple):
    """How a checkpoint is read.

    Attributes:
        mapping: What each wanted leaf is made from.
        faults: What is wrong with the choice.
        broken: Where it breaks a law.
    """

    mapping: LeafMapping
    faults: Sequence[RestoreError]
    broken: Sequence[Broken]


def choose(wanted: Sequence[Wanted], stored: Stored, options: RestoreOptions) -> Chosen:
    """Returns the reading of a checkpoint that a verdict rests on, certified."""
    readings, faults = best_mappings(wanted, stored, options)
    first: Chosen | None = None
    for mapping in readings:
        chosen = Chosen(mapping, faults, _broken_laws(wanted, mapping))
        if not chosen.broken:
            return chosen
        first = first or chosen
    assert first is not None  # There is one reading at least.
    return first


def _as_saved(
    target: Target, wanted: Sequence[Wanted], stored: Stored, options: RestoreOptions, chosen: Chosen
) -> Chosen:
    """Returns the reading of a checkpoint as a save of the target, where no other one finds all of it."""
    mapping = chosen.mapping
    if options.renames or options.layout != "auto" or mapping.unclear:
        return chosen  # The axis of a stack is no matter of where it is stored.
    shapes = mapping.shapes
    is_whole = all(shapes.get(item.leaf.path) == item.leaf.shape for item in of_role(wanted, *WEIGHTS))
    open_ones = chosen.broken or chosen.faults or mapping.rivals or any(s.undecided for s in mapping.states)
    if is_whole and not open_ones:
        return chosen  # Nearly every plan.
    if not may_be_saved(wanted, mapping.placements):
        return chosen
    made = [one for places in target.saved(stored) if (one := as_saved(wanted, stored, places))]
    if not made or any(one.found != made[0].found for one in made):
        return chosen
    found, placed, without_variable = made[0]
    mapping = LeafMapping(
        layout=mapping.layout,
        found=found,
        placements=placed,
        roots=Roots(wanted=(), stored=(), overlap=0),
        rivals=(),
        unclear=(),
        without_variable=without_variable,
        discarded={},
        applied=apply_rules(every_entry(placed), ()),
    )
    again = Chosen(mapping, (), _broken_laws(wanted, mapping))
    return chosen if again.broken else again


def _with_shared(
    target: Target, wanted: Sequence[Wanted], stored: Stored, options: RestoreOptions, chosen: Chosen
) -> tuple[Chosen, RestoreOptions]:
    """Returns the reading, and the options, under which shared Variables are found by any of their names."""
    found = chosen.mapping.found
    if all(item.role != "model" or item.leaf.path in found for item in wanted):
        return chosen, options  # Nearly every plan.
    shared = renames_of_shared(wanted, chosen.mapping, target.aliases())
    if not shared:
        return chosen, options
    more = dataclasses.replace(options, renames=(*options.renames, *(rule for rule, _ in shared.values())))
    try:
        again = choose(wanted, stored, more)
    except RestoreError:
        return chosen, options
    found = dict(again.mapping.found)
    if again.faults or again.broken or not shared.keys() <= found.keys():
        return chosen, options
    for path, (_, alias) in shared.items():
        words = f"as {render(alias)}, the same Variable"
        evidence = MatchEvidence(kind="rule", words=words)
        found[path] = dataclasses.replace(found[path], reason=words, evidence=evidence)
    return again._replace(mapping=dataclasses.replace(again.mapping, found=found)), more


def _broken_laws(wanted: Sequence[Wanted], mapping: LeafMapping) -> list[Broken]:
    """Returns where a mapping breaks a law, whatever found it."""
    sources: list[Source] = []
    unfit: list[tuple[Wanted, Recipe]] = []
    found, shapes = mapping.found, mapping.shapes
    for item in wanted:
        path = item.leaf.path
        source = found.get(path)
        if source is None:
            continue
        if shapes[path] == item.leaf.shape:
            sources.append((item, source.recipe, source.evidence))
        else:
            unfit.append((item, source.recipe))
    return certify(wanted, mapping.placed, sources, dataclasses.replace(known_of(mapping), unfit=unfit))


def judge(
    target: Target,
    stored: Stored,
    options: RestoreOptions,
    *,
    directory: str = "",
    overrides: Mapping[Path, Policy] | None = None,
    broken: Unreadable | None = None,
    chosen: Chosen | None = None,
) -> Verdict:
    """Decides what every leaf of a target will be.

    Args:
        target: What the caller wants.
        stored: What the checkpoint holds, from metadata.
        options: The caller's choices.
        directory: The item directory, for messages.
        overrides: Policies of single leaves.
        broken: Stored leaves that cannot be read.
        chosen: What `choose` returns for these arguments, where the caller has it.

    Raises:
        UnusedRuleError: A policy filter or a rule has no effect.
        UnreadableLeafError: A rule has none, or does not fit, because leaves are damaged.
        UnknownLayoutError: The tree is in no known layout.
    """
    broken = broken or Unreadable()
    options = dataclasses.replace(options, renames=rules_for_readable(options.renames, stored, broken))
    wanted = roles_of(target.leaves)
    policies = resolve(options.policy, target.variables, overrides or {})
    first = chosen or _choice(target, wanted, stored, options, overrides, broken)
    first = _as_saved(target, wanted, stored, options, first)
    (mapping, faults, broken_laws), options = _with_shared(target, wanted, stored, options, first)
    leaves = LeafVerdicts(mapping, stored, options, policies)
    outcomes = {item.leaf.path: leaves.outcome(item) for item in wanted}
    restored, sides = _of_kind(Restored, outcomes), _sides(wanted, mapping)
    others = outcomes if len(restored) < len(outcomes) else {}
    used = [v.recipe for v in outcomes.values() if not isinstance(v, Defaulted) and v.recipe is not None]
    left = left_over(wanted, mapping, used)
    unused = {*left.unexpected, *(path for path in left.skipped if mapping.placed[path].section == "aux")}
    missing, defaulted = _named(_of_kind(Missing, others), target), _of_kind(Defaulted, others)
    return Verdict(
        directory=directory,
        layout=mapping.layout.title,
        stored_count=len(stored),
        restored=restored,
        missing=missing,
        mismatched=_of_kind(Mismatched, others),
        defaulted=defaulted,
        unexpected=left.unexpected,
        skipped=left.skipped,
        dropped=left.dropped,
        unexpected_policy=options.unexpected,
        faults=(
            *faults,
            *mapping.faults,
            *faults_of(mapping, [missing[path].wanted for path in missing]),
            *claims_of_shared(wanted, mapping, target.aliases() if unused else {}, unused),
            *((_error_of(broken_laws, options.renames),) if broken_laws else ()),
            *indivisible(target.leaves.values()),
            *unreadable_leaves(
                broken,
                used=_read_by(used, left.dropped.values()),
                missing=missing,
                defaulted=[path for path in defaulted if sides.wanted[path].role == "random"],
                dropped=mapping.discarded,
                renamed=any(not isinstance(rule, Drop | ScanAxis) for rule in options.renames),
            ),
        ),
        sides=sides,
        renames=options.renames,
        read_as=options.layout,
    )


def _choice(
    target: Target,
    wanted: Sequence[Wanted],
    stored: Stored,
    options: RestoreOptions,
    overrides: Mapping[Path, Policy] | None,
    broken: Unreadable,
) -> Chosen:
    try:
        return choose(wanted, stored, options)
    except RuleError as error:
        if broken.lost:  # It may be what the rule is for.
            raise unreadable(broken.lost) from error
        raise
    except UnusedRuleError as error:
        if broken.lost:
            raise unreadable(broken.lost) from error
        error = _as_meant(error, wanted, stored, options)
        raise _told_if_needless(error, target, stored, options, overrides, broken) from None


def _as_meant(
    error: UnusedRuleError, wanted: Sequence[Wanted], stored: Stored, options: RestoreOptions
) -> UnusedRuleError:
    """Returns an error without the hint at what its rules may be meant to be, where that does not fit."""
    if not error.meant:
        return error
    meant = [*zip(error.rules, error.meant, strict=True)]
    rules = [next((new for old, new in meant if old == rule), rule) for rule in options.renames]
    rest = [rule for rule in options.renames if rule not in error.rules]

    def found(renames: Sequence[Rule]) -> int:
        try:
            mapping = choose(wanted, stored, dataclasses.replace(options, renames=tuple(renames))).mapping
        except RestoreError:
            return -1
        idle = (fault.rules for fault in faults_of(mapping) if isinstance(fault, UnusedRuleError))
        return -2 if any(rule in error.meant for rules in idle for rule in rules) else len(mapping.found)

    if found(rules) >= max(found(rest), -1):
        return error
    without = UnusedRuleError(error.what, paths=error.paths, hints=[WHOLE])
    without.rules = error.rules
    return without


def _told_if_needless(
    error: UnusedRuleError,
    target: Target,
    stored: Stored,
    options: RestoreOptions,
    overrides: Mapping[Path, Policy] | None,
    broken: Unreadable,
) -> UnusedRuleError:
    """Returns an error with the way out that all is restored without its rules, where that is so."""
    rest = tuple(rule for rule in options.renames if rule not in error.rules)
    without = dataclasses.replace(options, renames=rest)
    try:
        verdict = judge(target, stored, without, overrides=overrides, broken=broken) if error.rules else None
    except RestoreError:
        return error
    if verdict is None or verdict.missing or verdict.mismatched or verdict.faults:
        return error
    what = "it" if len(error.rules) == 1 else "them"
    hint = Hint(f"without {what}, every leaf of the target is restored.", {"renames": rest})
    more = UnusedRuleError(error.what, paths=error.paths, hints=[*error.hints, hint])
    more.rules = error.rules
    return more


def _named(missing: dict[Path, Missing], target: Target) -> dict[Path, Missing]:
    """Returns what is missing, shared Variables with all of their names."""
    names: dict[Path, list[Path]] = defaultdict(list)
    for alias, path in target.aliases().items() if missing else ():
        names[path].append(alias)
    return {
        path: dataclasses.replace(item, aliases=tuple(names[path])) if path in names else item
        for path, item in missing.items()
    }


def _error_of(broken: Sequence[Broken], renames: Sequence[Rule]) -> AmbiguousMappingError:
    """Returns the error for a plan that breaks laws; names both readings of each leaf."""
    rows = [
        f"  {render(item.wanted)}  <-  {render(item.stored)}: {item.why} (law {item.law})"
        for item in broken[:20]
    ]
    more = [f"  ... and {len(broken) - 20} more"] if len(broken) > 20 else []
    decides = Hint("renames=[...] decides: write which stored leaf each of them is.")
    kept = [item.stored for item in broken if item.why == REPLACED]
    return AmbiguousMappingError(
        "the plan reads leaves from where their names do not say they are:\n" + "\n".join([*rows, *more]),
        paths=[item.wanted for item in broken],
        hints=[_without(kept, renames)] if len(kept) == len(broken) else [decides],
    )


def _without(kept: Sequence[Path], renames: Sequence[Rule]) -> Hint:
    """Returns the hint that leaves behind what optimizers keep of weights that rules have replaced."""
    ends = ((path, path.index(OPT_STATE) + 1 if OPT_STATE in path else len(path)) for path in kept)
    places = dict.fromkeys(render(path[:end]) for path, end in ends)
    drops = tuple(Drop(place, "it was kept for other weights") for place in places)
    words = f"take it along with its weights by rules of its own, or leave it behind: {[*drops]} in front."
    return Hint(words, {"renames": (*drops, *renames)})


def known_of(mapping: LeafMapping) -> Known:
    """Returns what the laws may go by besides names and shapes."""
    made = (entry for _, entries in mapping.applied.made for entry in entries)
    by_rule = {path for entry in made for path in entry.sources}
    aside = [entry for entry in mapping.applied.entries if entry.section == "aux"] if by_rule else ()
    as_stored = {entry.recipe.path for entry in aside if isinstance(entry.recipe, Read)}
    kept = {path for entry in mapping.applied.entries for path in entry.sources} if mapping.discarded else ()
    called: dict[Path, set[Tokens]] = defaultdict(set)
    for entry in mapping.applied.entries if by_rule else ():
        for path in entry.sources if entry.named and entry.section in ("optimizer", "step") else ():
            called[path].add(entry.owner)
    return Known(
        called=called,
        changed=frozenset(path for entry in aside for path in entry.sources) - as_stored
        | (mapping.applied.discarded.keys() - kept),
        by_rule=frozenset(by_rule | mapping.applied.discarded.keys()),
        copies=mapping.copied,
        said={rule.tokens: rule.axis for rule in mapping.applied.axes},
        scan_axis=mapping.layout.scan_axis,
        scans=mapping.layout.scans,
    )


def _read_by(recipes: Iterable[Recipe], dropped: Iterable[Dropped | Discarded]) -> Iterator[Path]:
    """Yields the stored leaves that are read: for a wanted leaf, or to see that they are zero."""
    for recipe in recipes:
        yield from reads(recipe)
    yield from (item.leaf.path for item in dropped if isinstance(item, Dropped))


_Kind = TypeVar("_Kind", bound=Outcome)


def _of_kind(kind: type[_Kind], outcomes: Mapping[Path, Outcome]) -> dict[Path, _Kind]:
    return {path: outcome for path, outcome in outcomes.items() if isinstance(outcome, kind)}


def _sides(wanted: Sequence[Wanted], mapping: LeafMapping) -> Sides:
    return Sides(
        wanted={item.leaf.path: item for item in wanted},
        placements=mapping.placed,
        roots=mapping.roots,
        stuck=mapping.stuck,
        copied=mapping.copied,
        loose=mapping.loose,
    )
