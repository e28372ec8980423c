"""A leaf of a checkpoint to be written."""

import dataclasses
import itertools
import math
from typing import Any

import numpy as np

from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.core.recipes import Recipe
from orbax_nnx_handler.planning.layouts.layout import Section


@dataclasses.dataclass(frozen=True, kw_only=True)
class Written:
    """One leaf of a checkpoint to be written.

    Attributes:
        path: Where it will be.
        recipe: The stored leaves it is made from.
        shape: Its shape.
        dtype: Its dtype; a key dtype for random keys.
        section: The part of a train state that it belongs to.
        collection: The Linen collection of a model leaf, where the layout tells.
        parameter: For a model leaf its keys below the collection, for a moment
            those of its parameter; None for a leaf of neither.
        owner: The keys above the train state that it belongs to.
    """

    path: Path
    recipe: Recipe
    shape: Shape
    dtype: np.dtype[Any]
    section: Section = "model"
    collection: str | None = None
    parameter: Path | None = None
    owner: Path = ()

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def above(self) -> Path:
        """The keys above the parameter's own; an optimizer may know it by the last of them alone."""
        pairs = zip(reversed(self.path), reversed(self.parameter or ()), strict=False)
        own = sum(1 for _ in itertools.takewhile(lambda pair: str(pair[0]) == str(pair[1]), pairs))
        return self.path[: len(self.path) - own]
