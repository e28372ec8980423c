"""Whether the two sides are the same model at all, and whether only names differ."""

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from orbax_nnx_handler.planning.diagnosis.causes import Cause
from orbax_nnx_handler.planning.diagnosis.name_causes import AnotherModel, OtherGroup, OtherNames
from orbax_nnx_handler.planning.diagnosis.scene import Scene, Tokens
from orbax_nnx_handler.planning.layers import Group, seats
from orbax_nnx_handler.planning.leaves import StoredLeaf, WantedLeaf
from orbax_nnx_handler.planning.paths import Path, is_number, segments

_FEW = 0.25
_MOST = 0.75
_AUTOMATIC = re.compile(r"[A-Z]\w*_\d+")
"""A name that Linen gives: the class's own and a count (`flax.linen.Module`)."""


_Contents = Mapping[Group, Mapping[Tokens, list[Path]]]
"""The leaves of each group by their path below one layer."""


def find_another_model(scene: Scene) -> Iterable[Cause]:
    """Yields the verdict that a checkpoint is another model's: neither names nor shapes agree."""
    weights = scene.weights
    if len(weights) < 4 or not scene.stored_weights or not scene.missing_weights:
        return
    met = sum(path not in scene.plan.missing for path in weights)
    stored_names = {_ending(scene.stored_below(item)) for item in scene.stored_weights.values()}
    named = max(met, sum(_ending(tokens) in stored_names for tokens in scene.below.values()))
    shapes = Counter(item.leaf.shape for item in weights.values())
    shaped = (shapes & Counter(item.leaf.shape for item in scene.stored_weights.values())).total()
    if named <= _FEW * len(weights) and shaped <= _FEW * len(weights):
        yield AnotherModel(
            paths=scene.with_moments(scene.missing_weights),
            weights=len(weights),
            named_alike=named,
            shaped_alike=shaped,
        )


def find_other_groups(scene: Scene) -> Iterable[Cause]:
    """Yields the verdict that a group of layers, or a module, has another name and the same contents."""
    wanted = _contents({path: scene.below[path] for path in scene.missing_weights})
    stored = _contents({path: scene.stored_below(item) for path, item in scene.free_weights.items()})
    # Two are enough to know that it is not clear.
    pairs = list(itertools.islice(_like_groups(wanted, stored), 2))
    if len(pairs) != 1:
        return
    (left, right) = pairs[0]
    lost = [path for paths in wanted[left].values() for path in paths]
    sources = [path for paths in stored[right].values() for path in paths]
    yield OtherGroup(
        paths=(*scene.with_moments(lost), *sources),
        stored=right.name,
        wanted=left.name,
        count=len(wanted[left]),
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


def _contents(leaves: Mapping[Path, Tokens]) -> _Contents:
    found: dict[Group, dict[Tokens, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for path, tokens in leaves.items():
        for seat in seats(tokens):
            if seat.form in ("flat", "stacked") and seat.rest:
                found[seat.group][seat.rest].append(path)
    return found


def find_other_names(scene: Scene) -> Iterable[Cause]:
    """Yields the verdict that the missing weights are stored under other names."""
    missing, free = scene.missing_weights, scene.free_weights
    if not missing or not free:
        return
    wanted = Counter(_look(scene.missing[path].wanted) for path in missing)
    stored = Counter(_look(item.leaf) for item in free.values())
    alike = wanted & stored
    # Scalars and small vectors agree by chance; most of the weights have to, matrices among them.
    has_matrix = any(len(shape) > 1 for shape, _ in alike) or not any(len(shape) > 1 for shape, _ in wanted)
    if alike.total() < _MOST * len(missing) or not has_matrix:
        return
    explained = [path for path in missing if _look(scene.missing[path].wanted) in alike]
    sources = [path for path, item in free.items() if _look(item.leaf) in alike]
    names = {part for path in sources for part in segments(path) if _AUTOMATIC.fullmatch(part)}
    yield OtherNames(
        paths=(*scene.with_moments(explained), *sources),
        count=alike.total(),
        weights=len(missing),
        automatic=tuple(sorted(names)[:3]),
        rename=_one_rename(scene, explained, sources),
    )


def _look(leaf: WantedLeaf | StoredLeaf) -> tuple[tuple[int, ...], str]:
    return leaf.shape, str(leaf.dtype)


def _ending(tokens: Tokens) -> Tokens:
    # Module and weight: a parent of another name, or layers arranged otherwise, is the same model still.
    return tuple(token for token in tokens if not is_number(token))[-2:]


def _one_rename(scene: Scene, wanted: Sequence[Path], stored: Sequence[Path]) -> tuple[str, str] | None:
    """Returns the change of one name that leads from the stored leaves to the wanted ones."""
    if len(wanted) != len(stored):
        return None
    left = _by_rest([scene.plan.evidence.wanted[path].leaf for path in wanted])
    right = _by_rest([scene.free_weights[path].leaf for path in stored])
    changes = {(old, new) for rest, new in left.items() for old in [right.get(rest)] if old is not None}
    if len(left) != len(wanted) or len(changes) != 1 or left.keys() != right.keys():
        return None
    old, new = changes.pop()
    return None if old == new else (old, new)


def _by_rest(leaves: Iterable[WantedLeaf | StoredLeaf]) -> Mapping[Any, str]:
    """Returns the name that may differ, by last key and shape: the module's own, right above the weight."""
    found: dict[Any, set[str]] = defaultdict(set)
    for leaf in leaves:
        parts = [part for part in segments(leaf.path) if part != "value"]
        if len(parts) > 1:
            found[parts[-1], leaf.shape].add(parts[-2])
    return {rest: names.pop() for rest, names in found.items() if len(names) == 1}
