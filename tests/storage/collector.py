"""A program of its own that shows what `paused_collection` does to the collector, as JSON.

Among the million objects of a suite each look at all of them takes seconds.
"""

import gc
import json
import weakref
from collections.abc import Callable
from typing import Any

from orbax_nnx_handler import storage
from orbax_nnx_handler.storage import paused_collection


class Node:
    """Something that refers to itself."""

    def __init__(self) -> None:
        self.own = self


def _is_old(objects: list[Any]) -> list[bool]:
    old = {id(each) for each in gc.get_objects(generation=2)}
    return sorted({id(each) in old for each in objects})


def large() -> Any:
    with paused_collection():
        kept = [[number] for number in range(30_000)]
    return _is_old(kept)


def few() -> Any:
    with paused_collection():
        kept = [[number] for number in range(100)]
    return _is_old(kept)


def garbage() -> Any:
    with paused_collection():
        nodes = [Node() for _ in range(30_000)]
        last = weakref.ref(nodes[-1])
    del nodes
    gc.collect()
    return last() is None


def repeated() -> Any:
    results, found, before = [], [], storage._MANY
    storage._MANY = 70_000
    for _ in range(3):
        with paused_collection():
            results.append([[number] for number in range(30_000)])
        found.append(_is_old(results[-1]))
    storage._MANY = before
    return found


def frozen() -> Any:
    gc.freeze()
    before = gc.get_freeze_count()
    with paused_collection():
        kept = [[number] for number in range(30_000)]
    after = gc.get_freeze_count()
    gc.unfreeze()
    return {"stays": after >= before > 0, "old": _is_old(kept)}


SCENES: tuple[Callable[[], Any], ...] = (large, few, garbage, repeated, frozen)


def main() -> None:
    """Plays each scene where the collector has just looked at everything, and nothing is frozen."""
    seen = {}
    for scene in SCENES:
        gc.collect()
        storage._aged = (-1, 0)
        seen[scene.__name__] = scene()
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
