"""What a save writes, leaf by leaf: where, under which name of an array, and what of the item."""

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.core.recipes import Fill, Read, Recipe, reads
from orbax_nnx_handler.storage.arithmetic import evaluate
from orbax_nnx_handler.storage.saving.item import ItemLeaf


@dataclasses.dataclass(frozen=True, kw_only=True)
class SavedLeaf:
    """One leaf of a tree to be stored.

    Attributes:
        recipe: How it is made, over paths of the item; a `Fill` is zeros.
        shape: Its shape.
        dtype: Its dtype.
        like: The leaf of the item whose devices and save args it takes.
    """

    recipe: Recipe
    shape: Shape
    dtype: Any
    like: Path

    @classmethod
    def of(cls, leaf: ItemLeaf) -> "SavedLeaf":
        """Returns a leaf of the item as it is."""
        value = leaf.value if hasattr(leaf.value, "dtype") else np.asarray(leaf.value)
        return cls(recipe=Read(leaf.path), shape=tuple(value.shape), dtype=value.dtype, like=leaf.path)

    def through(self, recipe: Recipe, shape: Shape) -> "SavedLeaf":
        """Returns what a recipe makes of it."""
        return dataclasses.replace(self, recipe=recipe, shape=shape)

    @property
    def sources(self) -> tuple[Path, ...]:
        """The leaves of the item that it is made from."""
        return tuple(dict.fromkeys(reads(self.recipe)))

    def value(self, values: Mapping[Path, Any]) -> Any:
        """Returns what is stored: the item's own array where nothing changes.

        Args:
            values: The item's values by path: arrays, numbers, or `jax.ShapeDtypeStruct`s.
        """
        like = values[self.like]
        if isinstance(self.recipe, Read) and getattr(like, "dtype", self.dtype) == self.dtype:
            return like
        if _is_abstract(like) or any(_is_abstract(values[path]) for path in self.sources):
            return jax.ShapeDtypeStruct(self.shape, self.dtype)
        if isinstance(self.recipe, Fill):
            return _zeros(self.shape, self.dtype, like)
        return evaluate(self.recipe, values, self.dtype)


def _is_abstract(value: Any) -> bool:
    return isinstance(value, jax.ShapeDtypeStruct)


def _zeros(shape: Shape, dtype: Any, like: Any) -> Any:
    if not isinstance(like, jax.Array):
        return np.zeros(shape, dtype)

    def zeros(_: Any) -> jax.Array:
        return jnp.zeros(shape, dtype)

    # Under jit with the other as an argument, so that it is on the same devices of every process.
    return cast(jax.Array, jax.jit(zeros, keep_unused=True)(like))
