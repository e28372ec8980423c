"""openpi: an NNX model's state under `params`, the rest of training in another item.

openpi/training/checkpoints.py saves each step as two items: `params`, the tree
`{"params": nnx.state(model)}`, and `train_state` with `step` and `opt_state`.
Every path of `params` ends in `value` (the released checkpoints have it taken
away and are Linen variables to all appearance). Where the training kept an
average of its weights, `params` holds the average and `train_state/params` the
weights that the optimizer's moments belong to; the two items are then not read
together, since only the caller knows which weights are wanted.
"""

from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.layouts.layout import Layout, Placement, Stored, tops

_WEIGHTS: Path = ("params", "params")


def _is_step(stored: Stored) -> bool:
    weights = [path for path in stored if path[:1] == ("params",)]
    in_place = bool(weights) and all(path[:2] == _WEIGHTS and len(path) > 2 for path in weights)
    return in_place and tops(stored) == {"params", "train_state"} and ("train_state", "step") in stored


def _place_step(stored: Stored) -> tuple[Placement, ...]:
    return tuple(_placement(stored, path) for path in stored)


def _placement(stored: Stored, path: Path) -> Placement:
    leaf, rest = stored[path], path[2:]
    if path == ("train_state", "step"):
        return Placement(leaf=leaf, section="step", path=path)
    if path[:2] == ("train_state", "opt_state") and rest:
        return Placement(leaf=leaf, section="optimizer", path=rest)
    if path[:2] == _WEIGHTS:
        return _model(stored, path, rest)
    return Placement(leaf=leaf, section="other", path=path)


def _is_weights(stored: Stored) -> bool:
    boxed = all(len(path) > 2 and path[-1] == "value" for path in stored)
    return boxed and tops(stored) == {"params"}


def _place_weights(stored: Stored) -> tuple[Placement, ...]:
    return tuple(_model(stored, path, path[1:]) for path in stored)


def _model(stored: Stored, path: Path, rest: Path) -> Placement:
    # No collection: it is the whole state of an NNX model, statistics and random state included.
    return Placement(leaf=stored[path], section="model" if rest else "other", path=rest or path)


def _is_train_state(stored: Stored) -> bool:
    weights = [path for path in stored if path[:1] == ("params",)]
    boxed = all(len(path) > 2 and path[-1] == "value" for path in weights)
    return bool(weights) and boxed and tops(stored) == {"params", "opt_state", "step"}


def _place_train_state(stored: Stored) -> tuple[Placement, ...]:
    return tuple(_in_train_state(stored, path) for path in stored)


def _in_train_state(stored: Stored, path: Path) -> Placement:
    top, rest = path[0], path[1:]
    if top == "step":
        return Placement(leaf=stored[path], section="other" if rest else "step", path=path)
    if top == "opt_state" and rest:
        return Placement(leaf=stored[path], section="optimizer", path=rest)
    return _model(stored, path, rest)


OPENPI = Layout(
    name="openpi", title="openpi", fits=_is_step, place=_place_step, keys=frozenset({"params", "train_state"})
)
OPENPI_WEIGHTS = Layout(name="openpi_weights", title="openpi weights", fits=_is_weights, place=_place_weights)
OPENPI_TRAIN_STATE = Layout(
    name="openpi_train_state",
    title="openpi train state",
    fits=_is_train_state,
    place=_place_train_state,
    keys=frozenset({"params", "opt_state", "step"}),
)
