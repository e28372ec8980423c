"""Programs that train NNX models: openpi and Tunix.

openpi/training/checkpoints.py saves each step as two items: `params`, the tree
`{"params": nnx.state(model)}`, and `train_state` with `step` and `opt_state`.
Every path of `params` ends in `value` (the released checkpoints have it taken
away and are Linen variables to all appearance). Where the training kept an
average of its weights, `params` holds the average and `train_state/params` the
weights that the optimizer's moments belong to; the two items are then not read
together, since only the caller knows which weights are wanted.

tunix/sft/checkpoint_manager.py saves `nnx.state(model)` as `model_params` and
`nnx.state(optimizer, nnx.OptState)` as `optimizer_state`; in both every path
ends in `value`. One of the items alone is an `nnx.State`.
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


_MODEL, _OPTIMIZER = "model_params", "optimizer_state"


def _is_tunix(stored: Stored) -> bool:
    boxed = all(len(path) > 2 and path[-1] == "value" for path in stored)
    return boxed and _MODEL in tops(stored) and tops(stored) <= {_MODEL, _OPTIMIZER}


def _place_tunix(stored: Stored) -> tuple[Placement, ...]:
    return tuple(_in_item(stored, path) for path in stored)


def _in_item(stored: Stored, path: Path) -> Placement:
    leaf, rest = stored[path], path[1:]
    if path[0] == _MODEL and rest:
        return Placement(leaf=leaf, section="model", path=rest)
    if path[0] == _OPTIMIZER and rest in (("step",), ("step", "value")):
        return Placement(leaf=leaf, section="step", path=path)
    if path[0] == _OPTIMIZER and len(rest) > 1 and rest[0] == "opt_state":
        return Placement(leaf=leaf, section="optimizer", path=rest[1:])
    return Placement(leaf=leaf, section="other", path=path)


TUNIX = Layout(
    name="tunix", title="Tunix", fits=_is_tunix, place=_place_tunix, keys=frozenset({_MODEL, _OPTIMIZER})
)
