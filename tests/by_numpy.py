"""Has NumPy make, move and combine elements where a small array is asked for outside a program.

For each shape JAX compiles such an operation as a program of its own: 12 ms, also for zeros, for
`jnp.asarray` or a sum of two arrays. Values are the same bit by bit, but for the sign of a largest zero: of
what computes NumPy has only what IEEE 754 determines, element by element, and the largest of all. Sums,
products of matrices and functions such as `exp` are JAX's as ever, and so is all that is large, lies on
several devices, is traced or has a weak type.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

_SMALL = 1 << 14
# By JAX's name. Comparisons among them: they say the same of any two numbers.
_EXACT: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "neg": np.negative,
    "abs": np.abs,
    "square": np.square,
    "max": np.maximum,
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
# By the name of jax.numpy's functions, which are programs of their own.
_UFUNCS: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "negative": np.negative,
}


def move_and_combine_by_numpy() -> None:
    """Has JAX's primitives that make, move or combine elements carried out by NumPy."""
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
        _carry_out(lax.rev_p, lambda x, dimensions: np.flip(x, dimensions))
        _carry_out(slicing.slice_p, _sliced)
        _carry_out(slicing.dynamic_slice_p, _sliced_from)
        _carry_out(lax.select_n_p, _selected)
        for name, combine in _EXACT.items():
            _carry_out(getattr(lax, f"{name}_p"), functools.partial(_exactly, combine))
        _carry_out(lax.div_p, lambda x, y: _combined(np.divide, x, y) if x.dtype == np.float32 else None)
        _carry_out(lax.integer_pow_p, lambda x, y: _combined(np.square, x) if y == 2 else None)
        _carry_out(lax.reduce_max_p, _largest)
        _carry_out_ufuncs()


def _carry_out(primitive: Any, move: Callable[..., Any]) -> None:
    original = primitive.impl

    def implementation(*operands: Any, **how: Any) -> Any:
        arrays = [_elements(operand) for operand in operands]
        places = _places(operands)
        plain = not any(array is None for array in arrays) and len(places) < 2 and not how.get("sharding")
        found = move(*arrays, **how) if plain and jax.sharding.get_abstract_mesh().empty else None
        if found is None:
            return original(*operands, **how)
        return _placed(np.array(found), next(iter(places), None))

    primitive.def_impl(implementation)


def _carry_out_ufuncs() -> None:
    from jax._src.core import trace_state_clean
    from jax._src.numpy.ufunc_api import ufunc

    original = ufunc.__call__

    def call(self: Any, *operands: Any, **how: Any) -> Any:
        combine = _UFUNCS.get(self.__name__)
        # In a trace, what is known is a part of the program too.
        if combine and not how and trace_state_clean() and _is_as_ever():
            places, found = _places(operands), _together(combine, operands)
            if found is not None and len(places) < 2:
                return _placed(np.array(found), next(iter(places), None))
        return original(self, *operands, **how)

    ufunc.__call__ = call


def _is_as_ever() -> bool:
    """Tells whether nothing is set that has JAX refuse or check what it combines."""
    config = jax.config
    promotion = (config.jax_numpy_dtype_promotion, config.jax_numpy_rank_promotion) == ("standard", "allow")
    return promotion and not config.jax_debug_nans and jax.sharding.get_abstract_mesh().empty


def _places(operands: tuple[Any, ...]) -> set[Any]:
    return {each.sharding for each in operands if getattr(each, "committed", False)}


def _together(combine: Callable[..., Any], operands: tuple[Any, ...]) -> Any:
    """Combines arrays of one type and Python's numbers, which take that type; shapes are brought together."""
    arrays = [None if type(each) in (int, float) else _elements(each) for each in operands]
    kinds = {array.dtype for array in arrays if array is not None}
    if len(kinds) != 1:
        return None
    (kind,) = kinds
    for at, each in enumerate(operands):
        if type(each) is float and kind == np.float32:
            arrays[at] = np.asarray(each, np.float32)
        elif type(each) is int and kind in (np.float32, np.int32) and abs(each) < 1 << 24:
            arrays[at] = np.asarray(each, kind)
    if any(array is None for array in arrays):
        return None
    try:
        arrays = np.broadcast_arrays(*arrays)
    except ValueError:
        return None  # JAX says what does not fit.
    return _combined(combine, *arrays) if arrays[0].size <= _SMALL else None


def _placed(elements: np.ndarray[Any, Any], place: Any) -> Any:
    """Returns what `jax.device_put` returns, in a tenth of its time."""
    with contextlib.suppress(ImportError, AttributeError):
        from jax._src.interpreters.pxla import batched_device_put

        if jax.config.jax_default_device is None:
            sharding = place or _first()
            aval, devices = jax.core.ShapedArray(elements.shape, elements.dtype), [*sharding.device_set]
            return batched_device_put(aval, sharding, [elements], devices, committed=place is not None)
    return jax.device_put(elements, place)


@functools.cache
def _first() -> SingleDeviceSharding:
    return SingleDeviceSharding(jax.local_devices()[0])


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


def _combined(combine: Callable[..., Any], x: Any, *others: Any, **how: Any) -> Any:
    """Returns what NumPy makes of float32 or int32, but of numbers so small that XLA takes them for zero."""
    kinds = {x.dtype, *(each.dtype for each in others)}
    alike = len(kinds) == 1 and all(each.ndim == x.ndim for each in others)
    if not alike or x.dtype not in (np.float32, np.int32) or not x.size:
        return None
    with np.errstate(all="ignore"):
        found = combine(x, *others, **how)
    tiny = np.finfo(np.float32).tiny if x.dtype == np.float32 else 0
    return None if any(((each != 0) & (abs(each) < tiny)).any() for each in (x, *others, found)) else found


def _exactly(combine: Callable[..., Any], *operands: Any, **how: Any) -> Any:
    return _combined(combine, *operands) if all(value is None for value in how.values()) else None


def _largest(x: Any, *, axes: Any, **_: Any) -> Any:
    return _combined(np.max, x, axis=tuple(axes)) if x.ndim > max(axes, default=0) else None


def _selected(which: Any, *cases: Any) -> Any:
    if which.dtype != bool or which.shape not in ((), cases[0].shape):
        return None
    return np.where(which, *cases[::-1])


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


def _sliced_from(x: Any, *starts: Any, slice_sizes: Any) -> Any:
    if len(starts) != x.ndim:
        return None
    first = [
        min(max(int(at), 0), all_ - few) for at, all_, few in zip(starts, x.shape, slice_sizes, strict=True)
    ]
    return x[tuple(slice(at, at + few) for at, few in zip(first, slice_sizes, strict=True))]
