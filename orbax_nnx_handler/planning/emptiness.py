"""Targets that ask for nothing: always a mistake, which a restore of nothing would hide."""

from typing import Any

from flax import nnx

from orbax_nnx_handler.planning.errors import RestoreError
from orbax_nnx_handler.planning.target import Target

_WAYS_OUT = (
    "pass the module, optimizer or state that is to be filled, such as nnx.eval_shape(make_model).",
    "to read the stored tree as it is, use Orbax alone: ocp.PyTreeCheckpointer().restore(ITEM).",
)
_FILTERED = "a State that nnx.state(model, FILTER) made is empty where the filter matches nothing."


def refuse_empty(item: Any, target: Target) -> None:
    """Raises where a target has no leaf.

    Args:
        item: What the caller passed.
        target: The same, taken apart.

    Raises:
        RestoreError: Nothing is wanted.
    """
    if target.leaves:
        return
    what = "None" if item is None else f"a {type(item).__name__} without a leaf"
    hints = (*_WAYS_OUT, _FILTERED) if isinstance(item, nnx.State) else _WAYS_OUT
    listed = "".join(f"\nhint: {hint}" for hint in hints)
    raise RestoreError(f"the target is {what}: there is nothing to restore into.{listed}")
