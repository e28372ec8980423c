"""Patterns of rules that match some stored weights and no other one."""

import itertools
import re
from collections.abc import Iterable, Sequence

from orbax_nnx_handler.planning.diagnosis.scene import Scene
from orbax_nnx_handler.planning.paths import Path, segments

_NUMBER = re.compile(r"\d+$")


def patterns_of(scene: Scene, paths: Iterable[Path]) -> list[str]:
    """Returns few patterns that match these stored weights and no other.

    A pattern is the end of a path, as short as it can be and still match nothing
    else: `up/kernel`, `encoder/up/kernel`, `layers_{i}/up/kernel`.
    """
    every = {path: _names(scene, path) for path in scene.stored_weights}
    meant = {path: every[path] for path in dict.fromkeys(paths)}
    others = [names for path, names in every.items() if path not in meant]
    return [
        "/".join(pattern) for pattern in dict.fromkeys(_shortest(names, others) for names in meant.values())
    ]


def _names(scene: Scene, path: Path) -> tuple[str, ...]:
    names = segments(scene.stored_weights[path].path)
    return names[:-1] if len(names) > 1 and names[-1] == "value" else names


def _shortest(names: Sequence[str], others: Sequence[Sequence[str]]) -> tuple[str, ...]:
    lengths = range(min(2, len(names)), len(names) + 1)
    for length, any_number in itertools.product(lengths, (True, False)):
        end = names[-length:]
        if not any(_alike(other[-length:], end, any_number) for other in others):
            return _general(end) if any_number else tuple(end)
    return tuple(names)


def _alike(one: Sequence[str], other: Sequence[str], any_number: bool) -> bool:
    return _general(one) == _general(other) if any_number else tuple(one) == tuple(other)


def _general(names: Sequence[str]) -> tuple[str, ...]:
    """Returns the names with a place for each number, every place with a letter of its own."""
    letters = iter("ijklmnopqrstuvwxyz")
    return tuple(_NUMBER.sub(lambda _: f"{{{next(letters)}}}", name) for name in names)
