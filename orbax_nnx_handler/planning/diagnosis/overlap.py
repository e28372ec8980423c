"""Whether the two sides are the same model at all, and whether only names differ."""

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from orbax_nnx_handler.planning.diagnosis.causes import Cause
from orbax_nnx_handler.planning.diagnosis.name_causes import AnotherModel, OtherGroup, OtherNames
from orbax_nnx_handler.planning.diagnosis.renaming import renames
from orbax_nnx_handler.planning.diagnosis.scene import Scene, Tokens
from orbax_nnx_handler.planning.dtypes import name_of
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
    if met > _FEW * len(weights):
        return
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
        rename=_group_rename(left.name, right.name, sources),
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
        automatic=tuple(sorted(names)),
        renames=renames(scene, explained, sources),
    )


def _look(leaf: WantedLeaf | StoredLeaf) -> tuple[tuple[int, ...], str]:
    return leaf.shape, name_of(leaf.dtype)


def _ending(tokens: Tokens) -> Tokens:
    # Module and weight: a parent of another name, or layers arranged otherwise, is the same model still.
    return tuple(token for token in tokens if not is_number(token))[-2:]
