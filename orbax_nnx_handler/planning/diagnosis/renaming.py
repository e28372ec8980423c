"""The renames that lead from stored names to wanted ones, where path and shape leave no choice."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from orbax_nnx_handler.planning.diagnosis.scene import Scene, Tokens
from orbax_nnx_handler.planning.dtypes import name_of
from orbax_nnx_handler.planning.leaves import Shape
from orbax_nnx_handler.planning.paths import Path, is_number

_MOST = 6
"""More renames than this are a matter for `suggest`."""

Change = tuple[str, str]
"""One name in the checkpoint and in the target."""


def renames(scene: Scene, wanted: Sequence[Path], stored: Sequence[Path]) -> tuple[Change, ...]:
    """Returns the renames of single names that explain all these leaves; none if there is a choice.

    Every wanted leaf has to have just one stored leaf of its shape whose path is
    its own but for one name, and the same name has to change everywhere.
    """
    sources = {path: scene.stored_below(scene.free_weights[path]) for path in stored}
    places: dict[tuple[Tokens, int, Shape, str], set[str]] = defaultdict(set)
    for path, tokens in sources.items():
        leaf = scene.free_weights[path].leaf
        for at, name in enumerate(tokens):
            if not is_number(name):
                places[_without(tokens, at), at, leaf.shape, name_of(leaf.dtype)].add(name)
    changes: set[Change] = set()
    for path in wanted:
        found = _changes(scene, path, places)
        if len(found) != 1:
            return ()
        changes |= found
    return tuple(sorted(changes)) if _is_safe(scene, changes, sources) else ()


def _changes(
    scene: Scene, path: Path, places: Mapping[tuple[Tokens, int, Shape, str], set[str]]
) -> set[Change]:
    tokens, leaf = scene.below[path], scene.plan.evidence.wanted[path].leaf
    found: set[Change] = set()
    for at, new in enumerate(tokens):
        old = places.get((_without(tokens, at), at, leaf.shape, name_of(leaf.dtype)), set[str]())
        found |= {(name, new) for name in old if not is_number(new)}
    return found


def _without(tokens: Tokens, at: int) -> Tokens:
    return (*tokens[:at], *tokens[at + 1 :])


def _is_safe(scene: Scene, changes: set[Change], sources: Mapping[Path, Tokens]) -> bool:
    """Tells whether the renames are few, single-valued, and touch nothing that is restored already."""
    old, new = ({change[side] for change in changes} for side in (0, 1))
    if not 0 < len(changes) <= _MOST or len(old) != len(changes) or len(new) != len(changes):
        return False
    others = [scene.stored_below(i) for path, i in scene.stored_weights.items() if path not in sources]
    return not any(name in old for tokens in others for name in tokens)
