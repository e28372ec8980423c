"""Names: another model, or the same one under other names; renames that lead there, rules that lead away.

A rename is proposed where path and shape leave no choice; else the closest stored names are shown.
"""

import dataclasses
import difflib
import functools
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from orbax_nnx_handler.planning.core.dtypes import name_of
from orbax_nnx_handler.planning.core.errors import Cause, Hint
from orbax_nnx_handler.planning.core.folding import fold_paths
from orbax_nnx_handler.planning.core.leaves import Shape, StoredLeaf, WantedLeaf
from orbax_nnx_handler.planning.core.lines import counted
from orbax_nnx_handler.planning.core.paths import Path, Tokens, canonical, is_number, render, segments
from orbax_nnx_handler.planning.core.recipes import Read, reads
from orbax_nnx_handler.planning.diagnosis.evidence import Evidence, selecting
from orbax_nnx_handler.planning.layouts.layout import Placement
from orbax_nnx_handler.planning.mapping.layers import Group, layer_paths
from orbax_nnx_handler.planning.mapping.matches import Discarded
from orbax_nnx_handler.planning.target.roles import Wanted

_MOST = 6
"""More renames than this are a matter for `suggest`."""

Change = tuple[str, str]
"""One name in the checkpoint and in the target."""


def renames(evidence: Evidence, wanted: Sequence[Path], stored: Sequence[Path]) -> tuple[Change, ...]:
    """Returns the renames of single names that explain all these leaves; none if there is a choice.

    Every wanted leaf has to have just one stored leaf of its shape whose path is
    its own but for one name, and the same name has to change everywhere.
    """
    sources = {path: evidence.stored_below(evidence.free_weights[path]) for path in stored}
    places: dict[tuple[Tokens, int, Shape, str], set[str]] = defaultdict(set)
    for path, tokens in sources.items():
        leaf = evidence.free_weights[path].leaf
        for at, name in enumerate(tokens):
            if not is_number(name):
                places[_without(tokens, at), at, leaf.shape, name_of(leaf.dtype)].add(name)
    changes: set[Change] = set()
    for path in wanted:
        found = _changes(evidence, path, places)
        if len(found) != 1:
            return ()
        changes |= found
    return tuple(sorted(changes)) if _is_safe(evidence, changes, sources) else ()


def _changes(
    evidence: Evidence, path: Path, places: Mapping[tuple[Tokens, int, Shape, str], set[str]]
) -> set[Change]:
    tokens, leaf = evidence.below[path], evidence.sides.wanted[path].leaf
    found: set[Change] = set()
    for at, new in enumerate(tokens):
        old = places.get((_without(tokens, at), at, leaf.shape, name_of(leaf.dtype)), set[str]())
        found |= {(name, new) for name in old if not is_number(new) and name != new}
    return found


def _without(tokens: Tokens, at: int) -> Tokens:
    return (*tokens[:at], *tokens[at + 1 :])


def _is_safe(evidence: Evidence, changes: set[Change], sources: Mapping[Path, Tokens]) -> bool:
    """Tells whether the renames are few, single-valued, and touch nothing that is restored already."""
    old, new = ({change[side] for change in changes} for side in (0, 1))
    if not 0 < len(changes) <= _MOST or len(old) != len(changes) or len(new) != len(changes):
        return False
    others = [evidence.stored_below(i) for path, i in evidence.stored_weights.items() if path not in sources]
    return not any(name in old for tokens in others for name in tokens)


_GROUPS = 24
_CANDIDATES = 400


def nearest(
    missing: Iterable[Wanted], unexpected: Iterable[Placement]
) -> list[tuple[WantedLeaf, StoredLeaf]]:
    """Returns missing leaves, one of each layer group, with the closest unexpected leaf of the same part.

    A leaf is close where it has the same shape, or the same last name and most
    of the path. A scalar has the shape of any other: its name has to be the same.
    No stored leaf is the closest of two.
    """
    by_shape: dict[object, list[StoredLeaf]] = defaultdict(list)
    by_name: dict[object, list[StoredLeaf]] = defaultdict(list)
    for item in unexpected:
        if item.leaf.shape:
            by_shape[item.section, item.leaf.shape].append(item.leaf)
        by_name[item.section, _last(item.leaf)].append(item.leaf)
    pairs: list[tuple[WantedLeaf, StoredLeaf]] = []
    taken: set[int] = set()
    for item in _one_of_each_group(missing):
        leaf = item.leaf
        close = _closest(leaf, by_shape[item.role, leaf.shape], 0.3, taken) or _closest(
            leaf, by_name[item.role, _last(leaf)], 0.6, taken
        )
        if close is not None:
            pairs.append((leaf, close))
            taken.add(id(close))
    return pairs


def _last(leaf: WantedLeaf | StoredLeaf) -> str:
    keys = [key for key in leaf.path if str(key) != "value"]
    return str(keys[-1]) if keys else ""


def _one_of_each_group(leaves: Iterable[Wanted]) -> list[Wanted]:
    found: dict[tuple[str, ...], Wanted] = {}
    for item in leaves:
        names = tuple(token for token in canonical(item.leaf.path) if not is_number(token))
        found.setdefault(names, item)
        if len(found) > _GROUPS:
            break
    return list(found.values())


def _closest(
    leaf: WantedLeaf, candidates: Sequence[StoredLeaf], cutoff: float, taken: set[int]
) -> StoredLeaf | None:
    names = {render(other.path): other for other in candidates[:_CANDIDATES] if id(other) not in taken}
    close = _most_alike(render(leaf.path), names, cutoff)
    return names[close] if close is not None else None


def _most_alike(name: str, others: Iterable[str], cutoff: float) -> str | None:
    """Returns what `difflib.get_close_matches` puts first, without working out what cannot be it."""
    best: tuple[float, str] | None = None
    matcher = difflib.SequenceMatcher[str](b=name)
    for other in others:
        least = cutoff if best is None else best[0]
        matcher.set_seq1(other)
        # Upper bounds of the ratio, each more expensive and closer than the one before.
        if matcher.real_quick_ratio() < least or matcher.quick_ratio() < least:
            continue
        ratio = matcher.ratio()
        if ratio >= least and (best is None or (ratio, other) > best):
            best = (ratio, other)
    return None if best is None else best[1]


_NAMES = 4
_FEW = 0.25
_MOST_ALIKE = 0.75
_AUTOMATIC = re.compile(r"[A-Z]\w*_\d+")
"""A name that Linen gives: the class's own and a count (`flax.linen.Module`)."""


_Contents = Mapping[Group, Mapping[Tokens, list[Path]]]
"""The leaves of each group by their path below one layer."""


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
    if named <= _FEW * len(weights) and shaped <= _FEW * len(weights):
        yield Cause(
            kind="AnotherModel",
            text=f"this looks like a checkpoint of another model: it shares {named} of the target's "
            f"{len(weights)} names and {shaped} of its shapes.",
            paths=evidence.with_moments(evidence.missing_weights),
            way=LOOK,
            facts={"weights": len(weights), "named_alike": named, "shaped_alike": shaped},
        )


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
    count, rename = len(wanted[left]), _group_rename(left.name, right.name, sources)
    yield Cause(
        kind="OtherGroup",
        text=f"the stored {right.name!r} holds the same {counted(count, 'weight')}, by name, as the wanted "
        f"{left.name!r}, which is not stored.",
        paths=(*evidence.with_moments(lost), *sources),
        way=_if_the_same([rename]),
        facts={"stored": right.name, "wanted": left.name, "count": count},
    )


def _like_groups(wanted: _Contents, stored: _Contents) -> Iterable[tuple[Group, Group]]:
    """Yields groups under one parent that have another name and hold the same leaves."""
    # Looked up by what they hold: of 20,000 modules on either side, each pair would be 400 million.
    alike: dict[tuple[Tokens, frozenset[Tokens]], list[Group]] = defaultdict(list)
    for group, leaves in stored.items():
        alike[group.parent, frozenset(leaves)].append(group)
    for left, leaves in wanted.items():
        # One weight alone proves nothing: many modules hold just a `kernel`.
        if len(leaves) > 1:
            for right in alike.get((left.parent, frozenset(leaves)), ()):
                if left.name != right.name:
                    yield left, right


def _group_rename(wanted: str, stored: str, sources: Sequence[Path]) -> tuple[str, str]:
    """Returns the rule that renames a group: layers one by one carry their number in the name."""
    names = {part for path in sources for part in segments(path)}
    if stored in names:
        return stored, wanted
    return f"{stored}_{{i}}", f"{wanted}_{{i}}"


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
    only = "only names differ"
    if names:
        shown = ", ".join(names[:_NAMES]) + (", ..." if len(names) > _NAMES else "")
        only = f"the stored ones carry names that Linen gave ({shown})"
    found = _for_each(alike.total(), len(missing))
    changes = renames(evidence, explained, sources)
    yield Cause(
        kind="OtherNames",
        text=f"{found} there is an unexpected stored leaf of the same shape and dtype"
        f"{';' if names else ':'} {only}.",
        paths=(*evidence.with_moments(explained), *sources),
        way=_if_the_same(changes) if changes else _SUGGEST,
        facts={
            "count": alike.total(),
            "weights": len(missing),
            "automatic": tuple(names),
            "renames": changes,
        },
    )


LOOK = Hint("look at what is stored with `orbax-nnx tree CHECKPOINT`, and check the path and the target.")
_SUGGEST = Hint("`orbax-nnx suggest CHECKPOINT MODULE:FACTORY` proposes renames to check and paste.")
_IN_PYTHON = {
    "`orbax-nnx tree CHECKPOINT`": "jax.tree.map(jnp.shape, variables)",
    "`orbax-nnx suggest CHECKPOINT MODULE:FACTORY`": "suggest(variables, target)",
    "check the path and the target": "check it and the target",
    "look for another item or step": "look for the part of the program's state that holds the weights",
    "lists them": "shows all that is there",
}


def of_memory(hint: Hint) -> Hint:
    """Returns a hint as it is followed for a tree in memory, where no command reaches."""
    words = functools.reduce(lambda words, pair: words.replace(*pair), _IN_PYTHON.items(), hint.words)
    return dataclasses.replace(hint, words=words)


def _if_the_same(changes: Sequence[Change]) -> Hint:
    return Hint(f"if they are the same, pass renames={list(changes)!r}.", {"renames": list(changes)})


def _for_each(count: int, weights: int) -> str:
    if weights == 1:
        return "for the missing weight"
    return f"for {'each' if count == weights else count} of the {weights} missing weights"


def _look(leaf: WantedLeaf | StoredLeaf) -> tuple[tuple[int, ...], str]:
    return leaf.shape, name_of(leaf.dtype)


def _ending(tokens: Tokens) -> Tokens:
    # Module and weight: a parent of another name, or layers arranged otherwise, is the same model still.
    return tuple(token for token in tokens if not is_number(token))[-2:]


def find_dropped(evidence: Evidence) -> Iterable[Cause]:
    """Yields the missing weights that a rule leaves behind, by its reason."""
    discarded = {path: i for path, i in evidence.verdict.dropped.items() if isinstance(i, Discarded)}
    if not discarded:
        return
    below = {evidence.below[path]: path for path in evidence.missing_weights}
    groups: dict[str, list[tuple[Path, Path]]] = defaultdict(list)
    for path, item in discarded.items():
        placement = evidence.stored_weights.get(path)
        wanted = below.get(evidence.stored_below(placement)) if placement is not None else None
        if wanted is not None:
            groups[item.reason].append((path, wanted))
    for reason, pairs in groups.items():
        paths = evidence.with_moments([wanted for _, wanted in pairs])
        stored = fold_paths([path for path, _ in pairs])
        yield Cause(
            kind="DroppedByRule",
            text=f"a Drop rule leaves {stored} behind ({reason!r}), and the target wants it.",
            paths=paths,
            way=Hint("take that rule out."),
            filters=selecting(evidence, paths),
            may_be_initialised=True,
            facts={"stored": stored, "reason": reason},
        )


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
