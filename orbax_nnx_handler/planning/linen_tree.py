"""Placeholder until the saving side lands."""

from typing import Any, Literal

Flavour = Literal["linen", "maxtext"]


def to_linen_tree(item: Any, flavour: Flavour) -> Any:
    """Returns the tree a Linen program would write."""
    raise NotImplementedError


def is_nnx(item: Any) -> bool:
    """Tells whether an item holds NNX state."""
    from flax import nnx

    return isinstance(item, nnx.State | nnx.Module)
