"""Tunix: the state of an NNX model and of its optimizer, as two items of one step.

tunix/sft/checkpoint_manager.py saves `nnx.state(model)` as `model_params` and
`nnx.state(optimizer, nnx.OptState)` as `optimizer_state`; in both every path
ends in `value`. One of the items alone is an `nnx.State`.
"""

from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.layouts.layout import Layout, Placement, Stored, tops

_MODEL, _OPTIMIZER = "model_params", "optimizer_state"


def _fits(stored: Stored) -> bool:
    boxed = all(len(path) > 2 and path[-1] == "value" for path in stored)
    return boxed and _MODEL in tops(stored) and tops(stored) <= {_MODEL, _OPTIMIZER}


def _place(stored: Stored) -> tuple[Placement, ...]:
    return tuple(_placement(stored, path) for path in stored)


def _placement(stored: Stored, path: Path) -> Placement:
    leaf, rest = stored[path], path[1:]
    if path[0] == _MODEL and rest:
        return Placement(leaf=leaf, section="model", path=rest)
    if path[0] == _OPTIMIZER and rest in (("step",), ("step", "value")):
        return Placement(leaf=leaf, section="step", path=path)
    if path[0] == _OPTIMIZER and len(rest) > 1 and rest[0] == "opt_state":
        return Placement(leaf=leaf, section="optimizer", path=rest[1:])
    return Placement(leaf=leaf, section="other", path=path)


TUNIX = Layout(name="tunix", title="Tunix", fits=_fits, place=_place, keys=frozenset({_MODEL, _OPTIMIZER}))
