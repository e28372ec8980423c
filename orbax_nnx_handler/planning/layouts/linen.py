"""The layouts that Flax's own Linen training loops write."""

from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.layouts.layout import Layout, Placement, Section, Stored, has_subtree, tops

AUX = "nnx_aux"
"""Where NNX state without a home in a Linen program is stored, as MaxText names it."""


_TRAIN_STATE_KEYS = frozenset({"opt_state", "step"})
_KEYS = _TRAIN_STATE_KEYS | {"params", "nnx_aux"}


def place_with(stored: Stored, params_depth: int) -> tuple[Placement, ...]:
    """Reads a tree whose first level is the fields of a train state.

    Args:
        stored: The stored leaves.
        params_depth: 1 where `params` holds the parameters, 2 where it holds the
            whole variables dict, one subtree a collection (MaxText).
    """
    return tuple(_placement(stored, path, params_depth) for path in stored)


def _placement(stored: Stored, path: Path, params_depth: int) -> Placement:
    section, collection, rest = _locate(path, params_depth)
    return Placement(leaf=stored[path], section=section, collection=collection, path=rest)


def _locate(path: Path, params_depth: int) -> tuple[Section, str | None, Path]:
    top, rest = str(path[0]), path[1:]
    if top == "opt_state" and rest:
        return "optimizer", None, rest
    if top == "step" and rest in ((), ("value",)):
        return "step", None, path
    if top == "nnx_aux" and rest:
        return "aux", None, rest
    if not rest:
        return "other", None, path
    if top == "params" and params_depth == 2 and len(rest) > 1:
        return "model", str(rest[0]), rest[1:]
    return "model", top, rest


def _is_train_state(stored: Stored) -> bool:
    if _holds_no_params(stored):
        return has_subtree(stored, "opt_state") and len(tops(stored) - _TRAIN_STATE_KEYS) > 0
    return has_subtree(stored, "params") and bool(_TRAIN_STATE_KEYS & tops(stored))


def _is_variables(stored: Stored) -> bool:
    if _holds_no_params(stored):
        return bool(_WITHOUT_PARAMS & tops(stored))
    return has_subtree(stored, "params") and not _TRAIN_STATE_KEYS & tops(stored)


_WITHOUT_PARAMS = frozenset({AUX, "batch_stats", "LoRAParam"})
"""What tells collections from modules where a state without `nnx.Param` was saved (adapters, statistics)."""


def _holds_no_params(stored: Stored) -> bool:
    return not any("params" in path for path in stored)


def _is_maxtext(stored: Stored) -> bool:
    below = [path for path in stored if len(path) > 1 and path[0] == "params"]
    # Collections of one variables dict: `params/params/...`, beside it at most other collections.
    return any(path[1] == "params" and len(path) > 2 for path in below)


TRAIN_STATE = Layout(
    name="train_state",
    title="Flax TrainState",
    fits=_is_train_state,
    place=lambda stored: place_with(stored, 1),
    keys=_KEYS,
)
MAXTEXT = Layout(
    name="maxtext",
    title="MaxText",
    fits=_is_maxtext,
    place=lambda stored: place_with(stored, 2),
    keys=_KEYS,
)
VARIABLES = Layout(
    name="variables",
    title="Linen variables",
    fits=_is_variables,
    place=lambda stored: place_with(stored, 1),
)
