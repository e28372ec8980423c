"""Copies: weights in another collection, of a network that is kept beside the model, or under another name.

A copy of the weights (an average, gradients, a target network) is used only where the target or a rule
names it: the rule is what the hint gives.
"""

import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from flax import nnx

from orbax_nnx_handler.planning.core.errors import Cause, Hint
from orbax_nnx_handler.planning.core.lines import counted, listed
from orbax_nnx_handler.planning.core.paths import (
    Path,
    Tokens,
    canonical,
    is_number,
    render,
    segments,
    spelled,
    without_box,
)
from orbax_nnx_handler.planning.diagnosis.evidence import Evidence
from orbax_nnx_handler.planning.diagnosis.names import MOST_RULES
from orbax_nnx_handler.planning.layouts.layout import FLAX_COLLECTIONS, is_copy_name, words_of
from orbax_nnx_handler.planning.rules import as_rules
from orbax_nnx_handler.planning.target.roles import is_named

_DEPTH = 4
"""Levels of a target at which a network may lie."""


def find_copies(evidence: Evidence) -> Iterable[Cause]:
    """Yields the verdict that the missing weights lie in a copy."""
    if not evidence.missing_weights:
        return
    if evidence.free_weights:
        yield from _only_a_copy(evidence)
    yield from _named_otherwise(evidence)
    yield from _kept_aside(evidence)
    yield from _in_another_collection(evidence)


def _in_another_collection(evidence: Evidence) -> Iterable[Cause]:
    """Yields missing weights of a type without a known collection whose path lies in some collection."""
    stored: dict[Tokens, list[Path]] = defaultdict(list)
    for path, item in evidence.free_weights.items():
        if item.collection is not None and not is_copy_name(item.collection):
            stored[evidence.stored_below(item)].append(path)
    met: dict[Path, Path] = {}
    for path in evidence.missing_weights:
        found = stored.get(evidence.below[path], [])
        # A custom type is rather kept in a custom collection.
        own = [one for one in found if evidence.free_weights[one].collection not in FLAX_COLLECTIONS]
        found = own or found
        if len(found) == 1 and not _has_collection(evidence, path):
            met[path] = found[0]
    if met:
        rules = [(render(source), render(path)) for path, source in met.items()]
        shown = repr(rules) if len(rules) <= MOST_RULES else f"{repr(rules[:MOST_RULES])[:-1]}, ...]"
        where = listed(sorted({repr(evidence.free_weights[source].collection) for source in met.values()}))
        kinds = listed(sorted({getattr(evidence.missing[path].wanted.kind, "__name__", "") for path in met}))
        yield Cause(
            kind="OtherCollection",
            text=f"{counted(len(met), 'wanted leaf', 'wanted leaves')} of type {kinds} "
            f"{'has its path' if len(met) == 1 else 'have their paths'} in {where}; "
            "no name says that the type is kept there.",
            paths=(*evidence.with_moments(list(met)), *met.values()),
            way=Hint(f"if they are the same, pass renames={shown}.", {"renames": rules}),
            facts={"count": len(met)},
        )


def _has_collection(evidence: Evidence, path: Path) -> bool:
    kind = evidence.missing[path].wanted.kind
    return kind is None or (kind is not nnx.Variable and is_named(kind))


def _only_a_copy(evidence: Evidence) -> Iterable[Cause]:
    """Yields the verdict that nothing but a copy is stored: a tree, a train state or all of `params`."""
    free = evidence.free_weights
    kept_apart = any(item.collection not in (None, "params") for item in free.values())
    if kept_apart or len(free) < len(evidence.stored_weights):
        return
    first = segments(next(iter(free)))
    for at, name in enumerate(first[:-1]):
        if not is_copy_name(name):
            continue
        depth = at + 1 + (first[at + 1] == "params")
        level = first[:depth]
        stored = {_end(segments(path)[depth:]): path for path in free if _is_below(path, level)}
        met = [path for path in evidence.missing_weights if _below_model(evidence, path) in stored]
        if len(stored) == len(free) and met:
            yield Cause(
                kind="OnlyACopy",
                text=f"all that is stored lies below {name!r}, the name of a copy; "
                "a copy is used only where the target or a rule names it.",
                paths=(*evidence.with_moments(met), *free),
                way=_if_meant(["/".join(level)], "params"),
                facts={"stored": "/".join(level), "count": len(stored)},
            )
            return


def _named_otherwise(evidence: Evidence) -> Iterable[Cause]:
    """Yields the fields of the target that are called after a stored copy and hold its weights."""
    fields: dict[str, dict[Tokens, Path]] = defaultdict(dict)
    for path in evidence.missing_weights:
        if len(path) > 1 and isinstance(path[0], str):
            fields[path[0]][canonical(path[1:])] = path
    pairs = list(_pairs(evidence, fields))
    for field, copies, sources in pairs:
        others = {path[0] for path in evidence.missing_weights} - {one for one, *_ in pairs}
        # What `params` holds meets by itself once the copies are out of the way.
        met = (
            [path for other in others for path in fields.get(str(other), {}).values()]
            if len(others) == 1
            else []
        )
        lost = list(fields[field].values())
        names, ends = listed(list(map(repr, copies))), ("s", "") if len(copies) > 1 else ("", "s")
        yield Cause(
            kind="CopyRenamed",
            text=f"the stored collection{ends[0]} {names} hold{ends[1]} the weights of the wanted {field!r}; "
            "a copy is used only where the target or a rule names it.",
            paths=(*evidence.with_moments([*lost, *met]), *sources),
            way=_if_meant(copies, field),
            facts={"stored": ", ".join(copies), "wanted": field, "count": len(lost)},
        )


def _pairs(
    evidence: Evidence, fields: Mapping[str, Mapping[Tokens, Path]]
) -> Iterable[tuple[str, Sequence[str], Sequence[Path]]]:
    copies: dict[str, dict[Tokens, Path]] = defaultdict(dict)
    for path, item in evidence.free_weights.items():
        if item.collection is not None and item.collection not in FLAX_COLLECTIONS and not item.owner:
            copies[item.collection][_end(item.path)] = path
    for path, item in evidence.sides.placements.items():
        if item.section == "other" and len(path) > 1:  # Beside several train states.
            copies[str(path[0])][_end(path[1:])] = path
    for field, wanted in fields.items():
        holding = [copy for copy in copies if not wanted.keys().isdisjoint(copies[copy])]
        alike = [copy for copy in holding if wanted.keys() <= copies[copy].keys()] or holding
        shared = {copy: len(words_of(copy) & words_of(field)) for copy in alike}
        best = [copy for copy in alike if shared[copy] == max(shared.values()) > 0]
        # A copy of each collection (`ema_params`, `ema_batch_stats`): none holds what another one does.
        met = [(tokens, copies[copy][tokens]) for copy in best for tokens in wanted if tokens in copies[copy]]
        if len(met) == len(dict(met)) == len(wanted):
            yield field, best, [source for _, source in met]


def _kept_aside(evidence: Evidence) -> Iterable[Cause]:
    """Yields networks that a save kept aside that are wanted below another level, or another such name."""
    kept, lost = defaultdict[Path, set[Tokens]](set), defaultdict[Path, set[Tokens]](set)
    for path in (*evidence.verdict.unexpected, *evidence.verdict.skipped):
        for depth in range(2, len(path) if evidence.sides.placements[path].section == "aux" else 0):
            kept[path[:depth]].add(_unnumbered(path[depth:]))
    for path in evidence.weights if kept else ():
        for depth in range(1, min(len(path), _DEPTH)):
            lost[path[:depth]].add(_unnumbered(path[depth:]) if path in evidence.missing else ())
    rules, words = dict[Path, Path](), functools.cache(words_of)
    for level in sorted(lost, key=len):
        alike = [at for at in kept if words(str(at[-1])) & words(str(level[-1]))]
        holding = [at for at in alike if lost[level] <= kept[at]]
        pair = {level: holding[0]} if len(holding) == 1 else {}
        inside = (
            new == level[: len(new)] or old == at[: len(old)] for new, old in rules.items() for at in holding
        )
        rules |= {} if any(inside) else pair
    renames = [(spelled(stored), spelled(level)) for level, stored in rules.items()]
    found = evidence.restored_under([*evidence.verdict.renames, *as_rules(renames)]) if renames else None
    met = [path for path in evidence.missing if path in found] if found else []
    if found and met and found.keys() >= evidence.restored.keys():
        stored, wanted = (listed([repr(name) for name in names]) for names in zip(*renames, strict=True))
        yield Cause(
            kind="CopyRenamed",
            text=f"what a save kept aside as {stored} holds the weights of the wanted {wanted}; "
            "it is used only where the target or a rule names it.",
            paths=tuple(met),
            way=Hint(f"if that is what you want, pass renames={renames!r}.", {"renames": renames}),
            facts={"stored": stored, "wanted": wanted, "count": len(met)},
        )


def _unnumbered(path: Path) -> Tokens:
    return tuple(token for token in _end(path) if not is_number(token))


def _below_model(evidence: Evidence, path: Path) -> Tokens:
    tokens = evidence.below[path]
    return tokens[1:] if tokens[:1] == ("model",) else tokens


def _is_below(path: Path, level: Sequence[str]) -> bool:
    return segments(path)[: len(level)] == tuple(level)


def _end(path: Path) -> Tokens:
    return without_box(canonical(path))


def _if_meant(stored: Iterable[str], wanted: str) -> Hint:
    rules = [(level, wanted) for level in stored]
    return Hint(f"if that is what you want, pass renames={rules!r}.", {"renames": rules})
