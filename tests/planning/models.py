"""Small models as shapes by path, on both sides, and the plans between them."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from orbax_nnx_handler import RestorePlan
from orbax_nnx_handler.planning.core.errors import Cause
from orbax_nnx_handler.planning.core.leaves import StoredLeaf
from orbax_nnx_handler.planning.options import RestoreOptions
from orbax_nnx_handler.planning.restore_plan import make_plan
from orbax_nnx_handler.planning.target import flatten_target

Shapes = Mapping[str, tuple[int, ...]]


def keys(path: str) -> tuple[Any, ...]:
    return tuple(int(part) if part.isdecimal() else part for part in path.split("/"))


def stored_leaves(shapes: Shapes, **impls: str) -> dict[Any, StoredLeaf]:
    return {
        keys(path): StoredLeaf(path=keys(path), shape=shape, dtype=np.dtype(np.float32))
        for path, shape in shapes.items()
    }


def plan(stored: Shapes, wanted: Mapping[str, Any], **options: Any) -> RestorePlan:
    """Plans a restore of float32 leaves; a wanted shape is a Param, anything else a Variable itself."""
    variables = [(keys(path), as_variable(value)) for path, value in wanted.items()]
    target = flatten_target(nnx.from_flat_state(variables))
    return make_plan(target, stored_leaves(stored), RestoreOptions.of(**options))


def as_variable(value: Any) -> nnx.Variable[Any]:
    return value if isinstance(value, nnx.Variable) else nnx.Param(abstract(value))


def abstract(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def kinds(found: tuple[Cause, ...]) -> list[str]:
    return [cause.kind for cause in found]


def layer(at: str, width: int = 4) -> dict[str, tuple[int, ...]]:
    return {f"{at}/up/kernel": (width, 6), f"{at}/up/bias": (6,), f"{at}/norm/scale": (width,)}


def model(layers: int, prefix: str = "params/", name: str = "layers_{}", width: int = 4) -> dict[str, Any]:
    found: dict[str, Any] = {f"{prefix}embed/embedding": (11, width), f"{prefix}head/kernel": (width, 11)}
    for at in range(layers):
        found |= layer(prefix + name.format(at), width)
    return found


def moments(slot: str, shapes: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {f"opt_state/0/{slot}/{path.removeprefix(prefix)}": shape for path, shape in shapes.items()}


def wanted_moments(slot: str, shapes: Mapping[str, Any]) -> dict[str, Any]:
    return {
        f"optimizer/opt_state/0/{slot}/{path.removeprefix('model/')}": nnx.OptVariable(abstract(shape))
        for path, shape in shapes.items()
    }


def stacked(count: int, axis: int = 1) -> dict[str, tuple[int, ...]]:
    return {
        f"layers/{path.removeprefix('x/')}": (*shape[:axis], count, *shape[axis:])
        for path, shape in layer("x").items()
    }
