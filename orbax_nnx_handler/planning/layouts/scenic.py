"""Scenic: a train state with `global_step` and all collections under `model_state`.

scenic/train_lib/train_utils.py `TrainState`, saved by `flax.training.checkpoints`.
Early Scenic kept `flax.optim`'s optimizer, parameters inside, under `optimizer`,
and the batch statistics without their collection's name under `model_state`
(scenic/train_lib/pretrain_utils.py reads both still).
"""

from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.layouts.layout import Layout, Placement, Stored, has_subtree
from orbax_nnx_handler.planning.layouts.t5x import WRAPPER, holds_optimizer, place_optimizer

_STATISTICS = "batch_stats"


def _fits(stored: Stored) -> bool:
    has_params = has_subtree(stored, "params") or holds_optimizer(stored, (WRAPPER,))
    return ("global_step",) in stored and has_params


def _place(stored: Stored) -> tuple[Placement, ...]:
    optimizer = place_optimizer(stored, (WRAPPER,)) if holds_optimizer(stored, (WRAPPER,)) else ()
    known = {placement.leaf.path for placement in optimizer}
    unnamed = _lacks_collections(stored)
    rest = [_placement(stored, path, unnamed) for path in stored if path not in known]
    return (*optimizer, *rest)


def _placement(stored: Stored, path: Path, unnamed: bool) -> Placement:
    leaf, top, rest = stored[path], path[0], path[1:]
    if path == ("global_step",):
        # An old optimizer counts the same steps itself; one of the two is enough.
        counted = (WRAPPER, "state", "step") in stored
        return Placement(leaf=leaf, section="other" if counted else "step", path=path)
    if top == "opt_state" and rest:
        return Placement(leaf=leaf, section="optimizer", path=rest)
    if top == "model_state" and unnamed and rest:
        return Placement(leaf=leaf, section="model", collection=_STATISTICS, path=rest)
    if top == "model_state" and len(rest) > 1:
        return Placement(leaf=leaf, section="model", collection=str(rest[0]), path=rest[1:])
    if top == "rng":
        return Placement(leaf=leaf, section="aux", path=path)
    if top in ("metadata", "model_state") or not rest:
        return Placement(leaf=leaf, section="other", path=path)
    return Placement(leaf=leaf, section="model", collection=str(top), path=rest)


def _lacks_collections(stored: Stored) -> bool:
    """Tells whether `model_state` holds modules and not collections of modules."""
    below = {path[1] for path in stored if path[0] == "model_state" and len(path) > 1}
    modules = {path[1] for path in stored if path[0] == "params" and len(path) > 1}
    modules |= {path[2] for path in stored if path[:2] == (WRAPPER, "target") and len(path) > 2}
    return bool(below) and _STATISTICS not in below and below <= modules


SCENIC = Layout(name="scenic", title="Scenic", fits=_fits, place=_place, keys=frozenset({WRAPPER}))
