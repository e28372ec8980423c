"""openpi: an NNX model's state under `params`, the rest of training in another item.

openpi/training/checkpoints.py saves each step as two items: `params`, the tree
`{"params": nnx.state(model)}`, and `train_state` with `step` and `opt_state`.
Every path of `params` ends in `value` (the released checkpoints have it taken
away and are Linen variables to all appearance). Where the training kept an
average of its weights, `params` holds the average and `train_state/params` the
weights that the optimizer's moments belong to; the two items are then not read
together, since only the caller knows which weights are wanted.
"""

from orbax_nnx_handler.planning.layouts.linen import tops
from orbax_nnx_handler.planning.paths import Path
from orbax_nnx_handler.planning.placement import Layout, Placement, Stored

_WEIGHTS: Path = ("params", "params")


def _fits(stored: Stored) -> bool:
    if tops(stored) == {"params"}:
        return all(len(path) > 2 and path[-1] == "value" for path in stored)
    return _is_step(stored)


def _is_step(stored: Stored) -> bool:
    """Tells whether the tree is a whole step, its items side by side."""
    weights = [path for path in stored if path[0] == "params"]
    in_place = bool(weights) and all(path[:2] == _WEIGHTS and len(path) > 2 for path in weights)
    return in_place and tops(stored) == {"params", "train_state"} and ("train_state", "step") in stored


def _place(stored: Stored) -> tuple[Placement, ...]:
    if not _is_step(stored):
        # The whole state of an NNX model, so statistics and random state are in it too.
        return tuple(_model(stored, path, path[1:]) for path in stored)
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


def _model(stored: Stored, path: Path, rest: Path) -> Placement:
    return Placement(leaf=stored[path], section="model" if rest else "other", path=rest or path)


OPENPI = Layout(name="openpi", title="openpi", fits=_fits, place=_place)
LAYOUT = OPENPI
