"""What a recipe gives on whole arrays: computed by NumPy on the host, else by JAX where the arrays are."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from orbax_nnx_handler.planning.core import recipes
from orbax_nnx_handler.planning.core.dtypes import is_key
from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.core.recipes import Recipe


def evaluate(recipe: Recipe, values: Mapping[Path, Any], dtype: Any, sharding: Sharding | None = None) -> Any:
    """Returns the value of a recipe in a dtype.

    Arrays on devices go through one jitted function, shared by all recipes that differ in
    their paths only, so that they stay on their devices and processes. NumPy arrays stay NumPy's.

    Args:
        recipe: The recipe. A `Fill` in it is zeros.
        values: The arrays that it reads, by path.
        dtype: The dtype of the result. Products are computed in the wider type and cast last.
        sharding: Where the result goes; by default the compiler decides.
    """
    paths = list(dict.fromkeys(recipes.reads(recipe)))
    sources = [values[path] for path in paths]
    position = {path: (number,) for number, path in enumerate(paths)}
    pattern = recipes.substitute(recipe, lambda path: recipes.Read(position[path]))
    if sharding is None and all(isinstance(source, np.ndarray | np.generic) for source in sources):
        return _cast(_value(np, pattern, sources, dtype), dtype)
    return _compiled(pattern, dtype, sharding)(*sources)


@functools.lru_cache(maxsize=512)
def _compiled(pattern: Recipe, dtype: Any, sharding: Sharding | None) -> Callable[..., Any]:
    def run(*sources: jax.Array) -> jax.Array:
        return _cast(_value(jnp, pattern, sources, dtype), dtype)

    return cast("Callable[..., Any]", jax.jit(run, out_shardings=sharding))


def _cast(value: Any, dtype: Any) -> Any:
    return value if is_key(dtype) or value.dtype == dtype else value.astype(dtype)


def _value(xp: Any, recipe: Recipe, sources: Any, dtype: Any) -> Any:
    def of(source: Recipe) -> Any:
        return _value(xp, source, sources, dtype)

    match recipe:
        case recipes.Read(path):
            return sources[cast(int, path[0])]
        case recipes.Index(source, axis, index):
            return of(source)[(*[slice(None)] * axis, index)]
        case recipes.Slice(source, axis, start, size):
            return of(source)[(*[slice(None)] * axis, slice(start, start + size))]
        case recipes.Stack(parts, axis):
            return xp.stack([of(part) for part in parts], axis)
        case recipes.Concat(parts, axis):
            return xp.concatenate([of(part) for part in parts], axis)
        case recipes.Transpose(source, permutation):
            return xp.transpose(of(source), permutation)
        case recipes.Reshape(source, shape):
            return xp.reshape(of(source), shape)
        case recipes.Scale(source, factor):
            value = of(source)
            wide = functools.reduce(jnp.promote_types, (value.dtype, dtype), jnp.float32)
            return value.astype(wide) * xp.asarray(factor, wide)
        case recipes.Fill(shape):
            return xp.zeros(shape, dtype)
