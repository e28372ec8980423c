"""What a recipe gives on whole arrays: computed by NumPy on the host, else by JAX where the arrays are."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Sharding

from orbax_nnx_handler.planning.core import recipes
from orbax_nnx_handler.planning.core.dtypes import holds, is_key, wide_dtype
from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.core.recipes import Arithmetic, Recipe, computes, without_arithmetic
from orbax_nnx_handler.storage.arithmetic import LostValueError, compute, lost_values, refuse_lost

Loss = tuple[Any, Any]
"""Whether a value is lost in the last cast, and the largest magnitude among those that are."""


def evaluate(recipe: Recipe, values: Mapping[Path, Any], dtype: Any, sharding: Sharding | None = None) -> Any:
    """Returns the value of a recipe in a dtype.

    Arrays on devices go through one jitted function, shared by all recipes that differ in
    their paths only, so that they stay on their devices and processes. NumPy arrays stay NumPy's.

    Args:
        recipe: The recipe. A `Fill` in it is zeros.
        values: The arrays that it reads, by path; traced ones are not looked at.
        dtype: The dtype of the result. Arithmetic is done in the wider type and cast last.
        sharding: Where the result goes; by default the compiler decides.

    Raises:
        DtypeMismatchError: A value does not fit the dtype; names a leaf that it is made from.
    """
    dtype = dtype if is_key(dtype) else np.dtype(dtype)
    paths = list(dict.fromkeys(recipes.reads(recipe)))
    sources = [values[path] for path in paths]
    position = {path: (number,) for number, path in enumerate(paths)}
    pattern = recipes.substitute(recipe, lambda path: recipes.Read(position[path]))
    try:
        if sharding is None and all(isinstance(source, np.ndarray | np.generic) for source in sources):
            return _on_host(pattern, sources, dtype)
        value, loss = _compiled(pattern, dtype, sharding)(*sources)
        if loss is not None and not isinstance(loss[0], Tracer) and bool(loss[0]):
            raise LostValueError(loss[1], loss[1], sources[0].dtype, dtype)
    except LostValueError as error:
        raise error.of(paths[0]) from None
    return value


def _on_host(pattern: Recipe, sources: Sequence[Any], dtype: Any) -> Any:
    with np.errstate(all="ignore"):
        plain, computed = _values(np, pattern, sources, dtype)
        if _may_be_lost(pattern, plain, dtype):
            refuse_lost(plain, computed, dtype)
        return _cast(computed, dtype)


@functools.lru_cache(maxsize=512)
def _compiled(pattern: Recipe, dtype: Any, sharding: Sharding | None) -> Callable[..., Any]:
    def run(*sources: jax.Array) -> tuple[jax.Array, Loss | None]:
        plain, computed = _values(jnp, pattern, sources, dtype)
        return _cast(computed, dtype), _loss(plain, computed, dtype) if _may_be_lost(
            pattern, plain, dtype
        ) else None

    return cast("Callable[..., Any]", jax.jit(run, out_shardings=(sharding, None)))


def _may_be_lost(recipe: Recipe, plain: Any, dtype: Any) -> bool:
    return not is_key(dtype) and (computes(recipe) or not holds(dtype, plain.dtype))


def _loss(plain: jax.Array, computed: jax.Array, dtype: Any) -> Loss:
    lost = lost_values(plain, computed, dtype)
    return lost.any(), jnp.max(jnp.where(lost, abs(plain), jnp.zeros_like(plain)), initial=0)


def _cast(value: Any, dtype: Any) -> Any:
    return value if is_key(dtype) or value.dtype == dtype else value.astype(dtype)


def _values(xp: Any, recipe: Recipe, sources: Sequence[Any], dtype: Any) -> tuple[Any, Any]:
    """Returns a recipe's value without its arithmetic, and with it, both before the last cast."""
    plain = _value(xp, without_arithmetic(recipe), sources, dtype)
    if not computes(recipe):
        return plain, plain
    wide = wide_dtype(*(source.dtype for source in sources), dtype)
    return plain, _value(xp, recipe, [source.astype(wide) for source in sources], wide)


def _value(xp: Any, recipe: Recipe, sources: Sequence[Any], dtype: Any) -> Any:
    match recipe:
        case recipes.Read(path):
            return sources[cast(int, path[0])]
        case recipes.Fill(shape):
            return xp.zeros(shape, dtype)
        case recipes.Stack(parts, axis):
            return xp.stack([_value(xp, part, sources, dtype) for part in parts], axis)
        case recipes.Concat(parts, axis):
            return xp.concatenate([_value(xp, part, sources, dtype) for part in parts], axis)
        case _:
            return _applied(xp, recipe, _value(xp, recipe.source, sources, dtype), dtype)


def _applied(xp: Any, recipe: recipes.OneSource, value: Any, dtype: Any) -> Any:
    """Returns what the outermost step of a recipe makes of its source's value."""
    match recipe:
        case recipes.Index(_, axis, index):
            return value[(*[slice(None)] * axis, index)]
        case recipes.Slice(_, axis, start, size):
            return value[(*[slice(None)] * axis, slice(start, start + size))]
        case recipes.Transpose(_, permutation):
            return xp.transpose(value, permutation)
        case recipes.Reshape(_, shape):
            return xp.reshape(value, shape)
        case recipes.Scale(_, factor):
            return compute(value, [Arithmetic(factor=factor)], dtype)
        case recipes.Add(_, constant):
            return compute(value, [Arithmetic(constant=constant)], dtype)
