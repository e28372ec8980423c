"""NNX filters that select some missing leaves and no other missing one, as Python to paste."""

from collections import defaultdict
from collections.abc import Collection, Iterable

from flax import nnx

from orbax_nnx_handler.planning.diagnosis.scene import Scene
from orbax_nnx_handler.planning.paths import Path

_MOST = 4
"""Filters that one policy may need before `policy="init"` is easier to read."""


def selecting(scene: Scene, paths: Iterable[Path]) -> tuple[str, ...]:
    """Returns filters that select the missing leaves among some paths and no other missing leaf.

    A policy speaks of missing leaves only, so what is restored may be selected as well.

    Args:
        scene: The plan.
        paths: Wanted paths; stored ones and those that are not missing are left aside.

    Returns:
        The filters as Python, Variable types before names; empty where a few do not do.
    """
    open_leaves = scene.open_leaves
    wanted = {path for path in paths if path in open_leaves}
    offers = [(text, found) for text, found in _offers(scene, wanted) if found <= wanted]
    chosen: list[str] = []
    while wanted and offers and len(chosen) < _MOST:
        # At a tie the first one: types come before names, and names deep in the path before those above.
        text, found = max(offers, key=lambda offer: len(offer[1] & wanted))
        if not found & wanted:
            break
        chosen.append(text)
        wanted -= found
    return () if wanted else tuple(chosen)


def _offers(scene: Scene, wanted: Collection[Path]) -> list[tuple[str, set[Path]]]:
    kinds: dict[str, set[Path]] = defaultdict(set)
    names: dict[str, set[Path]] = defaultdict(set)
    for path, item in scene.open_leaves.items():
        for kind in _kinds(item.wanted.kind):
            kinds[kind].add(path)
        for key in path:
            if isinstance(key, str):
                names[key].add(path)
    # A module's name says more than `kernel` does.
    keys = [key for path in wanted for key in reversed(path[:-1])] + [path[-1] for path in wanted]
    # What every weight has in its path (`model`) would fill whatever else is missing later.
    paths = list(scene.weights)
    everywhere = {key for key in paths[0] if all(key in path for path in paths)} if paths else set[object]()
    used = dict.fromkeys(key for key in keys if isinstance(key, str) and key not in everywhere)
    return [*kinds.items(), *((f"nnx.PathContains({_quoted(key)})", names[key]) for key in used)]


def _kinds(kind: type | None) -> list[str]:
    """Returns the narrow types that Flax itself names; `nnx.Param` would say nothing."""
    if kind is None:
        return []
    types = (nnx.LoRAParam, nnx.BatchStat, nnx.OptState)
    found = [f"nnx.{each.__name__}" for each in types if issubclass(kind, each)]
    is_own = getattr(nnx, kind.__name__, None) is kind and kind not in (*types, nnx.Param, nnx.Variable)
    narrow = [f"nnx.{kind.__name__}"] if is_own and not issubclass(kind, nnx.OptState) else []
    return [*found, *narrow]


def _quoted(key: str) -> str:
    return '"' + key.replace("\\", "\\\\").replace('"', '\\"') + '"'
