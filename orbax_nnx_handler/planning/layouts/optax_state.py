"""An optax state as an item of its own: `tx.init(params)` saved beside an item of weights.

On disk a chain is a list, a named tuple a dict of its fields (optax/_src/transform.py,
optax/transforms): `0/count`, `0/mu/<parameter>`. Nothing is a parameter here.
"""

from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.layouts.layout import Layout, Placement, Stored

_MOMENTS = frozenset(
    {"mu", "nu", "trace", "v", "v_row", "v_col", "momentum", "acc_grads", "sum_of_squares", "ema"}
)
_WRAPPERS = frozenset({"inner_state", "inner_opt_state", "inner_states", "base_optimizer_state", "opt_state"})
_SCALARS = frozenset({"count", "mini_step", "gradient_step", "notfinite_count", "hyperparams"})


def _fits(stored: Stored) -> bool:
    firsts = {str(path[0]) for path in stored if path}
    placed = all(first.isdecimal() or first in _MOMENTS | _WRAPPERS | _SCALARS for first in firsts)
    return bool(firsts) and placed and any(_is_state(path) for path in stored)


def _is_state(path: Path) -> bool:
    """Tells whether the first key below the chain and its wrappers is a field of an optimizer."""
    names = [str(key) for key in path if not str(key).isdecimal() and str(key) not in _WRAPPERS]
    return bool(names) and names[0] in _MOMENTS | _SCALARS


def _place(stored: Stored) -> tuple[Placement, ...]:
    return tuple(
        Placement(leaf=leaf, section="step" if path == ("step",) else "optimizer", path=path)
        for path, leaf in stored.items()
    )


OPTAX_STATE = Layout(name="optax_state", title="optax state", fits=_fits, place=_place)
