"""Names: the same model under other names, or in a copy.

A rename is proposed where path and shape leave no choice, and the search that proposes rules does not
say otherwise. A copy of the weights (an average, gradients, a target network) is used only where the
target or a rule names it: the rule is what the hint gives.
"""

import functools
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

from flax import nnx

from orbax_nnx_handler.planning.core.dtypes import name_of
from orbax_nnx_handler.planning.core.errors import Cause, Hint, as_python
from orbax_nnx_handler.planning.core.leaves import Shape, StoredLeaf, WantedLeaf
from orbax_nnx_handler.planning.core.lines import counted, listed
from orbax_nnx_handler.planning.core.paths import (
    Path,
    Tokens,
    canonical,
    is_index,
    is_number,
    render,
    segments,
    spelled,
    without_box,
)
from orbax_nnx_handler.planning.diagnosis.evidence import Evidence, unnumbered
from orbax_nnx_handler.planning.diagnosis.ways import search_hint, weights_alone
from orbax_nnx_handler.planning.layouts.layout import (
    FLAX_COLLECTIONS,
    STATISTICS,
    is_copy_name,
    words_of,
)
from orbax_nnx_handler.planning.likeness.vocabulary import concepts, exclude
from orbax_nnx_handler.planning.mapping.layer_paths import Group, layer_paths
from orbax_nnx_handler.planning.rules import as_rules
from orbax_nnx_handler.planning.rules.rule import Pattern
from orbax_nnx_handler.planning.target.roles import is_named
from orbax_nnx_handler.planning.verdict.replaced_weights import statistics_kept_once

_MOST_RULES = 6
"""More renames than this are a matter for `suggest`."""

Change = tuple[str, str]
"""One name in the checkpoint and in the target."""


def renames(evidence: Evidence, wanted: Sequence[Path], stored: Sequence[Path]) -> tuple[Change, ...]:
    """Returns the renames of single names that explain all these leaves; none if there is a choice.

    Every wanted leaf has to have just one stored leaf of its shape whose path is
    its own but for one name, and the same name has to change everywhere. What is stored under the
    wanted name of a module, under other names within, is not passed over for another module.
    """
    sources = {path: evidence.stored_below(evidence.free_weights[path]) for path in stored}
    places: dict[tuple[Tokens, int, Shape, str], set[str]] = defaultdict(set)
    for path, tokens in sources.items():
        leaf = evidence.free_weights[path].leaf
        for at, name in enumerate(tokens):
            if not is_number(name):
                places[_without(tokens, at), at, leaf.shape, name_of(leaf.dtype)].add(name)
    changes: set[Change] = set()
    levels = {tokens[:depth] for tokens in sources.values() for depth in range(1, len(tokens))}
    for path in wanted:
        found = _changes(evidence, path, places, levels)
        if len(found) != 1:
            return ()
        changes |= found
    if evidence.speaks_against(wanted, stored):
        return ()
    paths = [evidence.below[path] for path in wanted]
    if any(exclude(concepts([old]), concepts([new])) and not _is_network(new, paths) for old, new in changes):
        return ()
    return tuple(sorted(changes)) if _is_safe(evidence, changes, sources) else ()


def _is_network(name: str, paths: Iterable[Tokens]) -> bool:
    """Tells whether a name is the root of modules: `actor` wants a `critic` where nothing else is stored."""
    return all(tokens[0] == name and len(tokens) > 2 for tokens in paths if name in tokens)


def _changes(
    evidence: Evidence,
    path: Path,
    places: Mapping[tuple[Tokens, int, Shape, str], set[str]],
    levels: Collection[Tokens],
) -> set[Change]:
    tokens, leaf = evidence.below[path], evidence.sides.wanted[path].leaf
    found: set[Change] = set()
    for at, new in enumerate(tokens):
        old = places.get((_without(tokens, at), at, leaf.shape, name_of(leaf.dtype)), set[str]())
        is_stored = tokens[: at + 1] in levels
        found |= {(name, new) for name in old if not (is_number(new) or is_stored or name == new)}
    return found


def _without(tokens: Tokens, at: int) -> Tokens:
    return (*tokens[:at], *tokens[at + 1 :])


def _is_safe(evidence: Evidence, changes: set[Change], sources: Mapping[Path, Tokens]) -> bool:
    """Tells whether the renames are few, single-valued, and touch nothing that is restored already."""
    old, new = ({change[side] for change in changes} for side in (0, 1))
    if not 0 < len(changes) <= _MOST_RULES or len(old) != len(changes) or len(new) != len(changes):
        return False
    others = [evidence.stored_below(i) for path, i in evidence.stored_weights.items() if path not in sources]
    return not any(name in old for tokens in others for name in tokens)


_UNTOLD = ", but no name says that they are the same"
_SAME, _MEANT = "they are the same", "that is what you want"
_NAMES = 4
_MOST_ALIKE = 0.75
_AUTOMATIC = re.compile(r"[A-Z]\w*_\d+")
"""A name that Linen gives: the class's own and a count (`flax.linen.Module`)."""

_Contents = Mapping[Group, Mapping[Tokens, list[Path]]]
"""The leaves of each group by their path below one layer."""


def find_other_groups(evidence: Evidence) -> Iterable[Cause]:
    """Yields the verdict that a group of layers, or a module, has another name and the same contents."""
    wanted = _contents({path: evidence.below[path] for path in evidence.missing_weights})
    stored = _contents({path: evidence.stored_below(item) for path, item in evidence.free_weights.items()})
    # Two are enough to know that it is not clear.
    pairs = list(itertools.islice(_like_groups(wanted, stored), 2))
    if len(pairs) != 1:
        return
    (left, right) = pairs[0]
    lost = [path for paths in wanted[left].values() for path in paths]
    sources = [path for paths in stored[right].values() for path in paths]
    ours = _numbers((evidence.below[path] for path in lost), left)
    theirs = _numbers((evidence.stored_below(evidence.free_weights[path]) for path in sources), right)
    if (ours and theirs and ours != theirs) or evidence.speaks_against(lost, sources):
        return  # Layers of other numbers are other layers.
    if exclude(concepts([left.name]), concepts([right.name])) or evidence.perhaps_stored.isdisjoint(lost):
        return  # `encoder_out` is not what `decoder_in` wants; a head with more outputs is another one.
    count, name = len(wanted[left]), right.name
    if theirs and not ours and len(theirs) == 1:
        # No list: the one module of a name that Linen gave, or the only one of a list that has weights.
        is_level = any(name in segments(path) for path in sources)
        name = f"{name}{'/' if is_level else '_'}{next(iter(theirs))[1:]}"
    rename = _group_rename(left.name, name, sources)
    yield Cause(
        kind="OtherGroup",
        text=f"the stored {name!r} holds the same {counted(count, 'weight')}, by name, as the wanted "
        f"{left.name!r}, which is not stored.",
        paths=(*evidence.with_moments(lost), *sources),
        way=search_hint(evidence) if _takes_more(rename[0], sources) else _pass_if(_SAME, [rename]),
        facts={"stored": name, "wanted": left.name, "count": count},
    )


def _numbers(names: Iterable[Tokens], group: Group) -> set[str]:
    """Returns the numbers of a group's layers where they are kept one by one."""
    at = len(group.parent) + 1
    return {name[at] for name in names if len(name) > at and is_number(name[at])}


def _like_groups(wanted: _Contents, stored: _Contents) -> Iterable[tuple[Group, Group]]:
    """Yields groups under one parent that have another name and hold the same leaves."""
    # Looked up by what they hold: of 20,000 modules on either side, each pair would be 400 million.
    alike: dict[tuple[Tokens, frozenset[Tokens]], list[Group]] = defaultdict(list)
    for group, leaves in stored.items():
        alike[group.parent, frozenset(leaves)].append(group)
    for left, leaves in wanted.items():
        # One weight proves nothing, many modules hold just a `kernel`; what is stored as itself is no other.
        if len(leaves) > 1 and len(stored.get(left, ())) < len(leaves):
            for right in alike.get((left.parent, frozenset(leaves)), ()):
                if left.name != right.name:
                    yield left, right


def _group_rename(wanted: str, stored: str, sources: Sequence[Path]) -> tuple[str, str]:
    """Returns the rule that renames a group: layers one by one carry their number in the name."""
    names = {part for path in sources for part in segments(path)}
    if stored in names or "/" in stored:
        return stored, wanted
    return f"{stored}_{{i}}", f"{wanted}_{{i}}"


def _takes_more(pattern: str, sources: Iterable[Path]) -> bool:
    """Tells whether a pattern for layers is for what is no number too, as `layer_{i}` is for `layer_norm`."""
    spans = (span for path in sources for span in Pattern(pattern).spans(segments(path)))
    return any(not is_index(text) for span in spans for text in span.bindings.values())


def _contents(leaves: Mapping[Path, Tokens]) -> _Contents:
    found: dict[Group, dict[Tokens, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for path, tokens in leaves.items():
        for seat in layer_paths(tokens):
            if seat.form in ("flat", "stacked") and seat.rest:
                found[seat.group][seat.rest].append(path)
    return found


def find_other_names(evidence: Evidence) -> Iterable[Cause]:
    """Yields the verdict that the missing weights are stored under other names."""
    missing, free = evidence.missing_weights, evidence.free_weights
    if not missing or not free:
        return
    wanted = Counter(_look(evidence.missing[path].wanted) for path in missing)
    stored = Counter(_look(item.leaf) for item in free.values())
    alike = wanted & stored
    # Scalars and small vectors agree by chance; most of the weights have to, matrices among them.
    has_matrix = any(len(shape) > 1 for shape, _ in alike) or not any(len(shape) > 1 for shape, _ in wanted)
    if alike.total() < _MOST_ALIKE * len(missing) or not has_matrix:
        return
    explained = [path for path in missing if _look(evidence.missing[path].wanted) in alike]
    sources = [path for path, item in free.items() if _look(item.leaf) in alike]
    names = sorted({part for path in sources for part in segments(path) if _AUTOMATIC.fullmatch(part)})
    changes = renames(evidence, explained, sources)
    told = len(explained) if changes or not evidence.is_searched else len(evidence.links.keys() & explained)
    only = ": only names differ"
    if names:
        shown = ", ".join(names[:_NAMES]) + (", ..." if len(names) > _NAMES else "")
        only = f"; the stored ones carry names that Linen gave ({shown})"
    elif told < len(explained):
        only = f", and for {told} of them names or shapes tell which it is" if told else _UNTOLD
    found = _for_each(alike.total(), len(missing))
    yield Cause(
        kind="OtherNames",
        text=f"{found} there is an unexpected stored leaf of the same shape and dtype{only}.",
        paths=(*evidence.with_moments(explained), *sources),
        way=_pass_if(_SAME, changes) if changes else search_hint(evidence),
        facts={
            "count": alike.total(),
            "weights": len(missing),
            "automatic": tuple(names),
            "renames": changes,
        },
    )


def _pass_if(so: str, rules: Sequence[Change]) -> Hint:
    return Hint(f"if {so}, pass renames={list(rules)!r}.", {"renames": list(rules)})


def _for_each(count: int, weights: int) -> str:
    if weights == 1:
        return "for the missing weight"
    return f"for {'each' if count == weights else count} of the {weights} missing weights"


def _look(leaf: WantedLeaf | StoredLeaf) -> tuple[tuple[int, ...], str]:
    return leaf.shape, name_of(leaf.dtype)


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
    yield from _statistics_kept_once(evidence)
    yield from _in_another_collection(evidence)


def _statistics_kept_once(evidence: Evidence) -> Iterable[Cause]:
    """Yields statistics that are missing of a copy whose parameters are restored."""
    for owner, paths, rules in statistics_kept_once(evidence.verdict, evidence.missing_weights):
        where = listed([repr(rule.pattern) for rule in rules])
        yield Cause(
            kind="CopyRenamed",
            text=f"the parameters of the wanted {render(owner)!r} are those of a copy, and its "
            f"{counted(len(paths), 'statistic')} would be in {where}, which is stored once, for averages "
            "and what they are of.",
            paths=tuple(paths),
            way=Hint(f"if both use the same, pass renames={as_python(rules)}.", {"renames": rules}),
            facts={"stored": where, "wanted": render(owner), "count": len(paths)},
        )


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
        shown = repr(rules) if len(rules) <= _MOST_RULES else f"{repr(rules[:_MOST_RULES])[:-1]}, ...]"
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
    """Yields the verdict that all parameters that are stored are a copy: a tree, a train state, a collection.

    Statistics may be restored, since they are no copy.
    """
    free = evidence.free_weights
    others = (item for path, item in evidence.stored_weights.items() if path not in free)
    if any(item.collection not in STATISTICS for item in others):
        return
    first = segments(next(iter(free)))
    for at, name in enumerate(first[:-1]):
        if not is_copy_name(name):
            continue
        depth = at + 1 + (first[at + 1] == "params")
        level = first[:depth]
        stored = {_end(segments(path)[depth:]): path for path in free if segments(path)[:depth] == level}
        lost = evidence.missing_weights
        if len(stored) == len(free) and any(_below_model(evidence, path) in stored for path in lost):
            what = "averages" if "ema" in words_of(name) else "a copy"
            yield Cause(
                kind="OnlyACopy",
                text=f"all parameters that are stored lie below {name!r}, the name of {what}; "
                "a copy is used only where the target or a rule names it.",
                # Of what has another name in it the next plan tells, behind the rule.
                paths=(*evidence.with_moments(lost), *free),
                way=_of_the_copy(evidence, [("/".join(level), "params")]),
                facts={"stored": "/".join(level), "count": len(stored)},
            )
            return


def _of_the_copy(evidence: Evidence, rules: Sequence[Change]) -> Hint:
    """Returns the way to a copy that is all that is stored: what trained the parameters did not train it."""
    found = evidence.restored_under([*evidence.verdict.renames, *as_rules(rules)])
    left = evidence.restored.keys() - (found or evidence.restored).keys()
    if not left or any(evidence.role(path) == "model" for path in left):
        return _pass_if(_MEANT, rules)
    why = "the stored optimizer is of parameters that are not stored, and is left"
    return Hint(f"if {_MEANT}, pass renames={list(rules)!r}; {why}: {weights_alone(evidence)}")


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
            way=_pass_if(_MEANT, [(copy, field) for copy in copies]),
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
            kept[path[:depth]].add(unnumbered(path[depth:]))
    for path in evidence.weights if kept else ():
        for depth in range(1, min(len(path), _DEPTH)):
            lost[path[:depth]].add(unnumbered(path[depth:]) if path in evidence.missing else ())
    rules, words = dict[Path, Path](), functools.cache(words_of)
    for level in sorted(lost, key=len):
        alike = [at for at in kept if words(str(at[-1])) & words(str(level[-1]))]
        holding = [at for at in alike if lost[level] <= kept[at]]
        pair = {level: holding[0]} if len(holding) == 1 else {}
        inside = (
            new == level[: len(new)] or old == at[: len(old)] for new, old in rules.items() for at in holding
        )
        rules |= {} if any(inside) else pair
    pairs = [(spelled(stored), spelled(level)) for level, stored in rules.items()]
    found = evidence.restored_under([*evidence.verdict.renames, *as_rules(pairs)]) if pairs else None
    met = [path for path in evidence.missing if path in found] if found else []
    if found and met and found.keys() >= evidence.restored.keys():
        stored, wanted = (listed([repr(name) for name in names]) for names in zip(*pairs, strict=True))
        yield Cause(
            kind="CopyRenamed",
            text=f"what a save kept aside as {stored} holds the weights of the wanted {wanted}; "
            "it is used only where the target or a rule names it.",
            paths=tuple(met),
            way=_pass_if(_MEANT, pairs),
            facts={"stored": stored, "wanted": wanted, "count": len(met)},
        )


def _below_model(evidence: Evidence, path: Path) -> Tokens:
    tokens = evidence.below[path]
    return tokens[1:] if tokens[:1] == ("model",) else tokens


def _end(path: Path) -> Tokens:
    return without_box(canonical(path))
