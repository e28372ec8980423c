"""Kauldron: a train state whose collections other than `params` lie under `collections`.

kauldron/train/train_step.py `TrainState`: `step`, `params`, `collections`,
`opt_state`, saved by `StandardSave` as the item `default`. A model without other
collections leaves `collections` empty; that tree is a Flax TrainState.
"""

from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.layouts.layout import Layout, Placement, Stored, has_subtree

_FIELDS = frozenset({"step", "params", "collections", "opt_state"})


def _fits(stored: Stored) -> bool:
    named = any(len(path) > 2 and path[0] == "collections" for path in stored)
    return named and has_subtree(stored, "params") and {path[0] for path in stored if path} <= _FIELDS


def _place(stored: Stored) -> tuple[Placement, ...]:
    return tuple(_placement(stored, path) for path in stored)


def _placement(stored: Stored, path: Path) -> Placement:
    leaf, top, rest = stored[path], path[0], path[1:]
    if path == ("step",):
        return Placement(leaf=leaf, section="step", path=path)
    if top == "opt_state" and rest:
        return Placement(leaf=leaf, section="optimizer", path=rest)
    if top == "params" and rest:
        return Placement(leaf=leaf, section="model", collection="params", path=rest)
    if top == "collections" and len(rest) > 1:
        return Placement(leaf=leaf, section="model", collection=str(rest[0]), path=rest[1:])
    return Placement(leaf=leaf, section="other", path=path)


KAULDRON = Layout(name="kauldron", title="Kauldron", fits=_fits, place=_place, keys=_FIELDS)
