"""Has NumPy make and move elements where a small array is asked for outside a program.

For each shape JAX compiles such an operation as a program of its own: 12 ms, also for zeros or for
`jnp.asarray`. Values are the same bit by bit. What computes is JAX's as ever, and so is all that is large,
lies on several devices, is traced or has a weak type.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

_SMALL = 1 << 14


def move_by_numpy() -> None:
    """Has JAX's primitives that make or move elements carried out by NumPy."""
    # Nothing public: where a version has it elsewhere, the suite only takes longer.
    with contextlib.suppress(ImportError, AttributeError):
        from jax._src.core import stage_p
        from jax._src.lax import lax, slicing

        _carry_out(stage_p, lambda x: x)
        _carry_out(lax.copy_p, lambda x: x)
        _carry_out(lax.broadcast_in_dim_p, _broadcast)
        _carry_out(lax.convert_element_type_p, _converted)
        _carry_out(lax.reshape_p, _reshaped)
        _carry_out(lax.transpose_p, lambda x, permutation: x.transpose(permutation))
        _carry_out(lax.squeeze_p, lambda x, dimensions: x.squeeze(dimensions))
        _carry_out(lax.concatenate_p, lambda *xs, dimension: np.concatenate(xs, dimension))
        _carry_out(slicing.slice_p, _sliced)


def _carry_out(primitive: Any, move: Callable[..., Any]) -> None:
    original = primitive.impl

    def implementation(*operands: Any, **how: Any) -> Any:
        arrays = [_elements(operand) for operand in operands]
        places = {each.sharding for each in operands if getattr(each, "committed", False)}
        plain = not any(array is None for array in arrays) and len(places) < 2 and not how.get("sharding")
        found = move(*arrays, **how) if plain and jax.sharding.get_abstract_mesh().empty else None
        if found is None:
            return original(*operands, **how)
        return jax.device_put(np.array(found), next(iter(places), None))

    primitive.def_impl(implementation)


def _elements(operand: Any) -> np.ndarray[Any, Any] | None:
    """Returns the elements of a small array with nothing special about it."""
    if getattr(operand, "weak_type", False) or np.size(operand) > _SMALL:
        return None
    if type(operand) is np.ndarray:
        return operand if jax.dtypes.canonicalize_dtype(operand.dtype) == operand.dtype else None
    if isinstance(operand, jax.Array) and not isinstance(operand, jax.core.Tracer):
        single = type(operand.sharding) is SingleDeviceSharding
        return np.asarray(operand) if single and isinstance(operand.dtype, np.dtype) else None
    return getattr(operand, "val", None)  # A constant of JAX's own.


def _broadcast(x: Any, *lengths: Any, shape: Any, broadcast_dimensions: Any, **_: Any) -> Any:
    if lengths or np.prod(shape) > _SMALL:
        return None
    axes = dict(zip(broadcast_dimensions, x.shape, strict=True))
    return np.broadcast_to(x.reshape([axes.get(axis, 1) for axis in range(len(shape))]), shape)


def _converted(x: Any, *, new_dtype: Any, weak_type: bool, **_: Any) -> Any:
    whole = x.dtype.kind in "biu" and isinstance(new_dtype, np.dtype) and new_dtype.kind in "iuf"
    if weak_type or not whole:
        return None
    with np.errstate(over="ignore"):  # As in XLA, what a float16 cannot hold is infinite.
        return x.astype(new_dtype)


def _reshaped(x: Any, *, new_sizes: Any, dimensions: Any, **_: Any) -> Any:
    return x.reshape(new_sizes) if dimensions is None else None


def _sliced(x: Any, *, start_indices: Any, limit_indices: Any, strides: Any) -> Any:
    return x[tuple(map(slice, start_indices, limit_indices, strides or (None,) * x.ndim))]
