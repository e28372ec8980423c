"""What a save writes, leaf by leaf: where, under which name of an array, and what of the item."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from orbax_nnx_handler.planning.core.dtypes import held_dtype
from orbax_nnx_handler.planning.core.errors import RestoreError
from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.paths import Path, printable, render, segments
from orbax_nnx_handler.planning.core.recipes import Fill, Read, Recipe, reads
from orbax_nnx_handler.storage.arithmetic import evaluate
from orbax_nnx_handler.storage.checkpoint.trees import array_name, leads_out
from orbax_nnx_handler.storage.saving.item import ItemLeaf
from orbax_nnx_handler.storage.stores.locations import MISREAD, is_misread


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
        """Returns a leaf of the item as it is.

        Raises:
            RestoreError: It holds several arrays of unlike shapes, as `optax.sm3` keeps.
        """
        value = leaf.value
        try:
            value = value if hasattr(value, "dtype") else np.asarray(value)
        except ValueError as error:
            what = (
                f"{render(leaf.path)} is a {type(value).__name__} of arrays, and a Variable is stored as one."
            )
            hint = "save the parts of the state without such Variables."
            raise RestoreError(what, paths=[leaf.path], hints=[hint]) from error
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
        if isinstance(self.recipe, Read):  # Of a copy, it is another leaf than the one it is like.
            read = values[self.recipe.path]
            if getattr(read, "dtype", self.dtype) == self.dtype:
                return read
        if _is_abstract(like) or any(_is_abstract(values[path]) for path in self.sources):
            return jax.ShapeDtypeStruct(self.shape, self.dtype)
        if isinstance(self.recipe, Fill):
            return _zeros(self.shape, self.dtype, like)
        held = held_dtype(self.dtype)
        if held == self.dtype or not isinstance(like, jax.Array):
            return evaluate(self.recipe, values, self.dtype)
        if isinstance(like, Tracer):
            return evaluate(self.recipe, values, held)
        return _on_host(evaluate(self.recipe, values, like.dtype), self.dtype)


def _on_host(value: jax.Array, dtype: Any) -> Any:
    """Returns an array in a dtype of 64 bits, of which JAX takes half."""
    if value.is_fully_addressable:
        return np.asarray(value).astype(dtype)
    # Of what is sharded over several processes, none has all.
    return np.asarray(value.addressable_data(0)).astype(dtype) if value.is_fully_replicated else value


def _is_abstract(value: Any) -> bool:
    return isinstance(value, jax.ShapeDtypeStruct)


def _zeros(shape: Shape, dtype: Any, like: Any) -> Any:
    if not isinstance(like, jax.Array):
        return np.zeros(shape, dtype)

    def zeros(_: Any) -> jax.Array:
        return jnp.zeros(shape, dtype)

    # Under jit with the other as an argument, so that it is on the same devices of every process.
    return cast(jax.Array, jax.jit(zeros, keep_unused=True)(like))


_LOCK, _LONGEST = ".__lock", 255
_RENAME = "call one of the two otherwise, or save them as items of their own."


def check_names(paths: Iterable[Path]) -> None:
    """Raises where arrays would have one name on disk, or a name that no reader takes.

    Args:
        paths: The stored path of each array.

    Raises:
        RestoreError: Names both paths, and the name.
    """
    known: dict[str, Path] = {}
    for path in paths:
        name = array_name(path)
        if leads_out(name):
            raise RestoreError(
                f"{_keys(path)} cannot be stored: its array would be called {name!r}, which is no name "
                "inside a checkpoint.",
                paths=[path],
                hints=["no part of a key between slashes may be empty, '.' or '..': call it otherwise."],
            )
        other = known.setdefault(name, path)
        if other is not path:
            raise _both_at(repr(name), other, path, "Orbax joins the keys of a path by dots.")


def check_folders(paths: Iterable[Path]) -> None:
    """Raises where an array could not have a directory of its own, under its name.

    Raises:
        RestoreError: Names the path.
    """
    for path in paths:
        name = array_name(path)
        reason = MISREAD if is_misread(name) else ""
        if any(part.endswith(_LOCK) for part in name.split("/")):
            reason = f"TensorStore keeps names that end in '{_LOCK}' for itself"
        if any(len(part.encode(errors="replace")) > _LONGEST for part in name.split("/")):
            reason = f"a directory's name has at most {_LONGEST} bytes"
        if reason:
            raise RestoreError(
                f"{_keys(path)} cannot be stored in a directory of its own: {reason}.",
                paths=[path],
                hints=["save with use_ocdbt=True: the database keeps such names. Or call it otherwise."],
            )


def check_spellings(paths: Iterable[Path]) -> None:
    """Raises where two paths are spelled alike, so that no rule and no restore could tell them apart.

    Raises:
        RestoreError: Names both paths.
    """
    known: dict[tuple[str, ...], Path] = {}
    for path in paths:
        other = known.setdefault(segments(path), path)
        if other is not path:
            why = "a key with a slash is spelled as two keys are, and no restore could tell them apart."
            raise _both_at("/".join(segments(path)), other, path, why)


def _both_at(place: str, one: Path, other: Path, why: str) -> RestoreError:
    return RestoreError(
        f"{_keys(one)} and {_keys(other)} would both be stored at {place}: {why}",
        paths=[one, other],
        hints=[_RENAME],
    )


def _keys(path: Path) -> str:
    return printable(repr(tuple(map(str, path))))
