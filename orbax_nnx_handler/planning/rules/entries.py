"""The stored model, leaf by leaf, as rules and structure rules rewrite it."""

import dataclasses
import functools
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np

from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.paths import Path, canonical, segments
from orbax_nnx_handler.planning.core.recipes import Read, Recipe, reads
from orbax_nnx_handler.planning.layouts.layout import Placement


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A value that the checkpoint can give, under the path the model would know it by.

    Attributes:
        segments: Path within its collection, after renames.
        collection: The Linen collection, or None where the layout tells none.
        recipe: How to make it from stored leaves; a plain `Read` unless a rule acted.
        shape: The shape that the recipe gives.
        dtype: The stored dtype.
        reason: What was done to the stored leaf and by whom; empty for nothing.
        prefix: The stored segments above the collection's paths (`params/params`).
        fixed: Which segments a rename wrote; those are not renamed again.
        named: Whether a rule gave it its path, which then is a wanted one.
        cast: The dtype that a rule casts it to, or None.
    """

    segments: tuple[str, ...]
    collection: str | None
    recipe: Recipe
    shape: Shape
    dtype: np.dtype[Any] | None
    reason: str = ""
    prefix: tuple[str, ...] = ()
    fixed: tuple[bool, ...] = ()
    named: bool = False
    cast: np.dtype[Any] | None = None

    @cached_property
    def tokens(self) -> tuple[str, ...]:
        """The canonical path within the collection."""
        return canonical(self.segments)

    @property
    def unboxed(self) -> tuple[str, ...] | None:
        """The canonical path without a last level `value`, where there is one.

        `nn.with_partitioning` boxes and `nnx.State` add that level; a module or
        parameter may be called `value` too, so both readings are kept.
        """
        return self.tokens[:-1] if len(self.tokens) > 1 and self.tokens[-1] == "value" else None

    @property
    def sources(self) -> tuple[Path, ...]:
        """The stored leaves it is made from."""
        return tuple(dict.fromkeys(reads(self.recipe)))


def model_entries(placements: Iterable[Placement]) -> list[Entry]:
    """Returns one entry for each stored leaf of the model."""
    return [_entry(placement) for placement in placements if placement.section == "model"]


def _entry(placement: Placement) -> Entry:
    leaf, below = placement.leaf, placement.path
    above = leaf.path[: -len(below)]
    names = segments(below)
    # Nearly every path within its collection is an end of the stored path.
    is_end = leaf.path[len(above) :] == below
    return Entry(
        segments=names,
        collection=placement.collection,
        recipe=Read(leaf.path),
        shape=leaf.shape,
        dtype=leaf.dtype,
        prefix=_prefix(above) if is_end else segments(leaf.path)[: -len(names)],
    )


@functools.lru_cache(maxsize=256)
def _prefix(path: Path) -> tuple[str, ...]:
    return segments(path)
