"""What was passed and stands in the way: another model, several states in one, a layout, rules.

Rules that drop or make what the target does not want, and moments that cannot follow what a rule does to
their parameters. And what is of another kind than it is wanted: numbers, texts, a step for a model's number.
"""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from orbax_nnx_handler.planning import layouts
from orbax_nnx_handler.planning.core.dtypes import is_count_dtype, name_of
from orbax_nnx_handler.planning.core.errors import Cause, Hint, UnknownLayoutError, as_python
from orbax_nnx_handler.planning.core.folding import fold_paths
from orbax_nnx_handler.planning.core.leaves import Shape, differing_axes
from orbax_nnx_handler.planning.core.lines import counted, listed
from orbax_nnx_handler.planning.core.paths import Path, Tokens, is_number, render
from orbax_nnx_handler.planning.core.recipes import Read, Recipe, reads
from orbax_nnx_handler.planning.diagnosis.evidence import Evidence
from orbax_nnx_handler.planning.diagnosis.ways import (
    AXES,
    LOOK,
    search_hint,
    selecting,
    suggest_hint,
    weights_alone,
)
from orbax_nnx_handler.planning.likeness.shapes import ways
from orbax_nnx_handler.planning.mapping.matches import Discarded
from orbax_nnx_handler.planning.mapping.moments import StuckMoment
from orbax_nnx_handler.planning.rules import Cast, Drop, Fuse, Repeat, Reshape, Rule, ScanAxis, Split
from orbax_nnx_handler.planning.rules.stacking import stacking_otherwise
from orbax_nnx_handler.planning.verdict.outcomes import Mismatched, dtype_name

_FEW = 0.25
_TRIED = 6
"""Rules that are tried one by one, each by a whole plan."""
_NEW = " of another shape"
_SHORT = 3


def find_given_layout(evidence: Evidence) -> Iterable[Cause]:
    """Yields the verdict that the layout was named, and is not that of the checkpoint."""
    placements = evidence.sides.placements
    faults = [path for fault in evidence.verdict.faults for path in fault.paths]
    if not (evidence.missing_weights or faults) or not placements:
        return
    stored = {path: item.leaf for path, item in placements.items()}
    try:
        fitting = [layout.title for layout in layouts.candidates(stored, "auto")]
    except UnknownLayoutError:
        return
    if evidence.verdict.layout not in fitting:
        given, found = evidence.verdict.layout, fitting[:_SHORT]
        yield Cause(
            kind="LayoutGiven",
            text=f"the checkpoint was read as {given}, as layout=... asks, but does not have the form "
            f"of one: it looks like {' or '.join(found)}.",
            paths=evidence.with_moments(evidence.missing_weights) or tuple(faults),
            way=Hint("leave layout=... out: it is found out from the metadata.", {"layout": "auto"}),
            facts={"given": given, "found": tuple(found)},
        )


def find_another_model(evidence: Evidence) -> Iterable[Cause]:
    """Yields the verdict that a checkpoint is another model's: neither names nor shapes agree."""
    weights = evidence.weights
    if len(weights) < 4 or not evidence.stored_weights or not evidence.missing_weights:
        return
    met = sum(path not in evidence.verdict.missing for path in weights)
    if met > _FEW * len(weights):
        return
    stored_names = {_ending(evidence.stored_below(item)) for item in evidence.stored_weights.values()}
    named = max(met, sum(_ending(tokens) in stored_names for tokens in evidence.below.values()))
    shapes = Counter(item.leaf.shape for item in weights.values())
    shaped = (shapes & Counter(item.leaf.shape for item in evidence.stored_weights.values())).total()
    if len(evidence.links) > _FEW * len(weights):
        return
    if named <= _FEW * len(weights) and shaped <= _FEW * len(weights):
        yield Cause(
            kind="AnotherModel",
            text=f"this looks like a checkpoint of another model: it shares {named} of the target's "
            f"{len(weights)} names and {shaped} of its shapes.",
            paths=evidence.with_moments(evidence.missing_weights),
            way=_unless_renamed(evidence),
            facts={"weights": len(weights), "named_alike": named, "shaped_alike": shaped},
        )


def _unless_renamed(evidence: Evidence) -> Hint:
    """Returns the way out of another model's checkpoint; by other names it may be the same one's."""
    lost = evidence.missing_weights
    if 2 * len(evidence.perhaps_stored.intersection(lost)) < len(lost):
        return LOOK
    return Hint(f"{LOOK.words} If it is this model by other names: {search_hint(evidence).words}")


def _ending(tokens: Tokens) -> Tokens:
    # Module and weight: a parent of another name, or layers arranged otherwise, is the same model still.
    return tuple(token for token in tokens if not is_number(token))[-2:]


def find_replicated(evidence: Evidence) -> Iterable[Cause]:
    """Yields the verdict that the whole train state was saved as copies for devices, or as several states."""
    items = evidence.mismatched
    lengths = {
        item.stored_shape[0] if item.stored_shape[1:] == item.wanted.shape and item.stored_shape else None
        for item in items.values()
    }
    length = lengths.pop() if len(lengths) == 1 else None
    if length is not None and len(items) > 1 and not evidence.verdict.restored:
        yield Cause(
            kind="LeadingAxis",
            text=f"each stored leaf has one axis more in front, of length {length}: the program saved a "
            f"train state that `flax.jax_utils.replicate` had copied to {length} devices, or {length} train "
            "states in one (`jax.vmap`).",
            paths=tuple(items),
            way=_ONE_OF_THEM,
            facts={"length": length},
        )


_ONE_OF_THEM = Hint(
    "read the tree with Orbax, take one of them (`jax.tree.map(lambda x: x[0], tree)`; of copies any, of "
    "several states the one that is meant) and give it to from_linen."
)


def find_dropped(evidence: Evidence) -> Iterable[Cause]:
    """Yields the missing weights that are stored, and that rules leave behind."""
    dropped = {path: i.rule for path, i in evidence.verdict.dropped.items() if isinstance(i, Discarded)}
    lost = evidence.missing_weights if dropped else []
    if not lost:
        return
    found = _without(evidence, [*dict.fromkeys(dropped.values())])
    placed = {path: evidence.stored_weights[path] for path in dropped if path in evidence.stored_weights}
    below = {evidence.stored_below(item): (path,) for path, item in placed.items()}
    links = evidence.links_among([path for path in lost if path not in found], placed.values())
    groups: dict[tuple[str, tuple[Drop, ...]], list[tuple[Path, Collection[Path]]]] = defaultdict(list)
    for path in lost:
        same = below.get(evidence.below[path], ())
        sources = reads(found[path]) if path in found else same or links.get(path, ())
        how = "" if path in found or same else " under another name"
        if sources is same and any(evidence.shape(one) != evidence.shape(path) for one in same):
            how = _NEW
        if rules := tuple(dict.fromkeys(dropped[source] for source in sources if source in dropped)):
            groups[how, rules].append((path, sources))
    for (how, rules), pairs in groups.items():
        paths = evidence.with_moments([path for path, _ in pairs])
        sources = {source for _, each in pairs for source in each if source in dropped}
        it, leave, its = ("it", "leaves", "its") if len(rules) == 1 else ("them", "leave", "a")
        more = any(rule in rules and path not in sources for path, rule in dropped.items() if path in placed)
        words = f"take {it} out{f', or write more of the path in {its} pattern' if more else ''}."
        yield Cause(
            kind="DroppedByRule",
            text=f"{listed(map(as_python, rules))} {leave} {fold_paths(sorted(sources, key=render))} behind, "
            f"and the target wants {fold_paths(path for path, _ in pairs)}{how}.",
            paths=paths,
            way=Hint("" if how is _NEW else words),
            filters=selecting(evidence, paths) if how is _NEW else (),
            may_be_initialised=how is _NEW,
            facts={"stored": sources, "rules": rules},
        )


def _without(evidence: Evidence, drops: Sequence[Drop]) -> Mapping[Path, Recipe]:
    """Returns what would be restored without Drop rules, or without one of them where none is refused."""
    given = evidence.verdict.renames
    if (found := evidence.restored_under([rule for rule in given if rule not in drops])) is not None:
        return found
    each = (evidence.restored_under([rule for rule in given if rule != one]) for one in drops[:_TRIED])
    return {path: recipe for under in each for path, recipe in (under or {}).items()}


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
            way=Hint(rule + weights_alone(evidence)),
            filters=selecting(evidence, missing),
            may_be_initialised=True,
            facts={"reason": reason},
        )


def _why(moments: Iterable[StuckMoment]) -> str:
    """Returns the reasons, at most two: a rule on many layers would list a pair of shapes for each kind."""
    reasons = list(dict.fromkeys(item.why for item in moments))
    return "; ".join([*reasons[:2], *(["and so on"] if len(reasons) > 2 else [])])


def find_unneeded(evidence: Evidence) -> Iterable[Cause]:
    """Yields the weights of another shape that would fit without the rule that made them."""
    groups: dict[str, list[Path]] = defaultdict(list)
    for path in evidence.mismatched_weights:
        item = evidence.mismatched[path]
        if not item.reason or isinstance(item.recipe, Read):
            continue
        sources = [evidence.stored_weights[source].leaf for source in dict.fromkeys(reads(item.recipe))]
        if len(sources) == 1 and sources[0].shape == item.wanted.shape:
            groups[item.reason].append(path)
    for reason, paths in groups.items():
        first, count = evidence.mismatched[paths[0]], len(paths)
        fit = "fits as it is" if count == 1 else "fit as they are"
        yield Cause(
            kind="UnneededRule",
            text=f"{counted(count, 'weight')} {fit} stored: {reason} makes {first.stored_shape} of "
            f"{first.wanted.shape}, which is wanted.",
            paths=evidence.with_moments(paths),
            way=Hint("take the rule out, or write more of the path in its pattern."),
            facts={"rule": reason, "count": count},
        )


def find_rules_of_layers(evidence: Evidence) -> Iterable[Cause]:
    """Yields rules that stack layers or take them apart, and fit along another axis or in front."""
    if not (evidence.mismatched_weights and evidence.is_searched):
        return
    before, wrong = evidence.restored.keys(), [*evidence.mismatched, *evidence.missing]
    for rules, tried in stacking_otherwise(evidence.verdict.renames, range(AXES)):
        found = {axis: (evidence.restored_under(every) or {}).keys() for axis, every in tried.items()}
        most = max(map(len, found.values()))
        best = [axis for axis, paths in found.items() if paths > before and len(paths) == most]
        if not best:
            continue
        names = listed(map(as_python, rules))
        paths = tuple(path for path in wrong if path in found[best[0]])
        fit = counted(len(paths), "more leaf fits", "more leaves fit")
        if None in best:
            text = f"in front of the other rules, which change what it meets, {names} is right: {fit}."
            way = f"put {names} in front of the other rules."
        else:
            text = f"the layers have another axis than in {names}: along axis {best[0]}, {fit}."
            others = [[dataclasses.replace(rule, axis=axis) for rule in rules] for axis in best]
            way = f"pass {' or '.join(listed(map(as_python, each)) for each in others)} instead of {names}."
        yield Cause(kind="RuleOfLayers", text=text, paths=paths, way=Hint(way))
        return


def find_unused_parts(evidence: Evidence) -> Iterable[Cause]:
    """Yields the missing weights that could be what a rule cuts out of a stored leaf and nothing wants."""
    shapes: dict[Path, set[Shape]] = defaultdict(set)
    for entry in evidence.sides.loose:
        shapes[entry.sources[0]].add(entry.shape)
    kept = [*evidence.restored.values(), *evidence.verdict.mismatched.values()] if shapes else []
    used = {path for item in kept for path in reads(item.recipe)}
    found: dict[tuple[Path, ...], list[Path]] = defaultdict(list)
    for source in shapes.keys() & used:
        own = (p for p in evidence.missing_weights if any(ways(x, evidence.shape(p)) for x in shapes[source]))
        found[tuple(own)].append(source)
    found.pop((), None)
    for lost, sources in found.items():
        be = "could be that part under another name" if len(lost) == 1 else "could be such under other names"
        yield Cause(
            kind="UnusedPart",
            text=f"rules take {fold_paths(sources)} apart, and nothing uses a part of it: "
            f"{fold_paths(lost)} {be}.",
            paths=evidence.with_moments(lost),
            way=suggest_hint(evidence),
            facts={"stored": tuple(sources), "wanted": lost},
        )


def follow_weights(evidence: Evidence, lost: Sequence[Path], stored: Iterable[Tokens | None]) -> bool:
    """Tells whether moments are missing, and others left over, because their weights are.

    The rules that are missing for the weights are for their moments too.
    """
    missing = {evidence.below[path][at:] for path in evidence.missing_weights for at in (0, 1)}
    free = {evidence.stored_below(item) for item in evidence.free_weights.values()}
    ours = {evidence.moments[path][1] if path in evidence.moments else None for path in lost}
    return ours <= missing and free.issuperset(stored)


def find_sizes_of_rules(evidence: Evidence) -> Iterable[Cause]:
    """Yields weights of which rules make another size than is wanted, where all that is stored alone fits."""
    groups: dict[tuple[Rule, ...], list[Path]] = defaultdict(list)
    for path in evidence.mismatched_weights:
        item = evidence.mismatched[path]
        if len(differing_axes(item.stored_shape, item.wanted.shape)) == 1:
            groups[_resizing(evidence, item)].append(path)
    if groups.pop((), None):
        return  # The sizes of the models differ, whatever rules make of them.
    for rules, paths in groups.items():
        first = evidence.mismatched[paths[0]]
        sources = [source for path in paths for source in reads(evidence.mismatched[path].recipe)]
        beside = _beside(sources, evidence.free_weights) or _beside(paths, evidence.missing_weights)
        parts = dict.fromkeys(str(evidence.shape(source)) for source in reads(first.recipe))
        makes = "makes" if len(rules) == 1 else "make"
        names, lies = fold_paths(beside), "lies" if len(beside) == 1 else "lie"
        is_stored = any(path in evidence.free_weights for path in beside)
        told = f"{lies} unused beside its parts" if is_stored else "of the target is no part that it makes"
        way = "correct the rule, or build the target with what it makes; a weight is never cut or padded."
        yield Cause(
            kind="SizesOfRule",
            text=f"{listed(map(as_python, rules))} {makes} {first.stored_shape} of {listed(parts)}, and "
            f"{first.wanted.shape} is wanted{f': {names} {told}' if beside else ''}.",
            paths=evidence.with_moments([*paths, *beside]),
            way=Hint("name all parts in the rule, in their order." if beside else way),
            facts={"rules": rules, "beside": tuple(beside), "count": len(paths)},
        )


def _resizing(evidence: Evidence, item: Mismatched) -> tuple[Rule, ...]:
    """Returns the rules that gave a weight sizes which no stored leaf has."""
    given = item.reason.split("; ")
    rules = (rule for rule in evidence.verdict.renames if rule.quoted in given)
    return tuple(rule for rule in rules if isinstance(rule, Fuse | Split | Repeat | Reshape))


def _beside(paths: Iterable[Path], others: Iterable[Path]) -> list[Path]:
    """Returns those of some leaves that lie in a module beside that of one of the others."""
    known = {(path[:-2], path[-1]) for path in paths if len(path) > 1}
    return [path for path in others if len(path) > 1 and (path[:-2], path[-1]) in known]


def other_axis(evidence: Evidence, group: Tokens, lost: Collection[Path]) -> Hint | None:
    """Returns the way out where a rule says a stacked axis from which a group's layers do not come out.

    Returns:
        None where no rule does, or its absence and other axes do not help either.
    """
    given = evidence.verdict.renames
    said = [each for each in given if isinstance(each, ScanAxis) and each.tokens[-len(group) :] == group]
    for rule in said[:1]:
        others = [ScanAxis(rule.group, axis) for axis in range(AXES) if axis != rule.axis]
        rest = [one for one in given if one != rule]
        every = {None: rest, **{other: [other, *rest] for other in others}}
        found = {other: evidence.restored_under(rules) or {} for other, rules in every.items()}
        helping = [other for other in found if found[other].keys() >= set(lost)]
        if None in helping:
            return Hint(f"take {rule} out: the shapes tell the axis.")
        if helping:
            return Hint(f"pass {' or '.join(map(str, helping))} instead of {rule}.")
    return None


def find_own_steps(evidence: Evidence) -> Iterable[Cause]:
    """Yields a number of the target's model that is called as the stored step, which is not read for it."""
    placements = evidence.sides.placements
    steps = {path for path, item in placements.items() if item.section == "step"}
    steps -= {path for item in evidence.restored.values() for path in reads(item.recipe)}
    for path in evidence.missing_weights if steps else ():
        wanted = evidence.missing[path].wanted
        if path != ("step",) or wanted.shape or wanted.kind is None:
            continue
        stored = listed([repr(render(step)) for step in sorted(steps, key=render)])
        yield Cause(
            kind="OwnStep",
            text=f"the wanted {render(path)!r} is a number of a model, by its type {wanted.kind.__name__}, "
            f"and the stored {stored} is the train state's step.",
            paths=(path,),
            way=Hint(
                f"if they are the same, make {render(path)!r} an nnx.OptState in the target, or set it in "
                "the program."
            ),
            filters=selecting(evidence, [path]),
            may_be_initialised=True,
            facts={"stored": stored, "wanted": render(path)},
        )


def of_numbers(mismatched: Iterable[Mismatched]) -> Iterable[Hint]:
    """Yields the way out where kinds of numbers differ, or no numbers are stored."""
    # A mismatch with a detail says itself what to do.
    kinds = [item for item in mismatched if item.kind == "dtype" and not item.detail]
    texts = [item for item in kinds if item.stored_dtype == dtype_name(None)]
    if texts:
        rules = _on_sources(texts, lambda path, _: Drop(path, "no array"))
        words = "a text is no weight: restore another step, or leave it behind, so that the weight is missing"
        yield Hint(f"{words}, with renames={_short(rules)}.", {"renames": rules})
    widths = [item for item in kinds if is_count_dtype(item.wanted.dtype) and "int" in item.stored_dtype]
    if widths:
        rules = _on_sources(widths, lambda path, item: Cast(path, name_of(item.wanted.dtype)))
        words = "integers of another width are a rule, which refuses a value that does not fit"
        yield Hint(f"{words}: renames={_short(rules)}.", {"renames": rules})
    if len(widths) + len(texts) < len(kinds):
        yield Hint(
            "integers, booleans, floats and complex numbers never become each other: give the target's leaf "
            "the stored kind."
        )


def _on_sources(mismatched: Iterable[Mismatched], rule: Callable[[str, Mismatched], Rule]) -> list[Rule]:
    """Returns a rule for each stored leaf that some are made from."""
    pairs = ((render(path), item) for item in mismatched for path in reads(item.recipe))
    return list({path: rule(path, item) for path, item in pairs}.values())


def _short(rules: Sequence[Rule]) -> str:
    return as_python(rules) if len(rules) <= _TRIED else as_python(rules[:1])[:-1] + ", ...]"
