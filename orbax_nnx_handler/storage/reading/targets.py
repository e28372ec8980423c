"""All places that one stored leaf's values go to, gathered over all jobs.

A stacked leaf that feeds eighty layers is read once and scattered, not read
eighty times.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.core.recipes import Arithmetic, Read, Recipe
from orbax_nnx_handler.planning.core.regions import (
    Piece,
    Refolded,
    Region,
    cut,
    place,
    shape_of_region,
    slices,
)
from orbax_nnx_handler.storage.arithmetic import put
from orbax_nnx_handler.storage.checkpoint.metadata import Checkpoint
from orbax_nnx_handler.storage.reading.jobs import Buffer


@dataclasses.dataclass(frozen=True)
class Destination:
    """One rectangle of a stored leaf and the view that it fills.

    Attributes:
        region: The rectangle.
        view: Writable, of the rectangle's shape and the wanted dtype.
        steps: What is done to the stored values before they are cast.
    """

    region: Region
    view: Buffer
    steps: tuple[Arithmetic, ...] = ()

    def put(self, values: Buffer) -> None:
        """Computes stored values of the rectangle, or of a shape that spreads over it, into place.

        Raises:
            LostValueError: A value does not fit the wanted dtype.
        """
        spread = values if values.shape == self.view.shape else np.broadcast_to(values, self.view.shape)
        put(self.view, spread, self.steps)

    def part(self, region: Region, inside: tuple[slice, ...]) -> "Destination":
        """Returns the destination of a part of the rectangle.

        Args:
            region: The part, as the caller counts it.
            inside: Where the part is in the view.
        """
        return Destination(region, self.view[(..., *inside)], self.steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What fills a set of buffers: reads, then what is left to do on the host.

    Attributes:
        targets: The places of each stored leaf.
        finish: To be called in order once all targets are filled.
    """

    targets: dict[Path, list[Destination]] = dataclasses.field(default_factory=dict[Path, list[Destination]])
    finish: list[Callable[[], None]] = dataclasses.field(default_factory=list[Callable[[], None]])

    def fill(
        self,
        recipe: Recipe,
        region: Region,
        buffer: Buffer,
        stored: Mapping[Path, Shape],
        steps: tuple[Arithmetic, ...] = (),
    ) -> None:
        """Adds what fills a buffer with a region of a recipe's value, and does some steps to that."""
        if isinstance(recipe, Read):
            # Most leaves of most models: nothing to cut, and thousands of them.
            self.targets.setdefault(recipe.path, []).append(Destination(region, buffer, steps))
            return
        for part in cut(recipe, region, stored):
            view, all_steps = place(part, buffer), (*part.arithmetic, *steps)
            if isinstance(part.source, Refolded):
                self._fold(part, part.source, view, stored, all_steps)
            else:
                destination = Destination(part.source_region, view, all_steps)
                self.targets.setdefault(part.source, []).append(destination)

    def _fold(
        self,
        part: Piece,
        folded: Refolded,
        view: Buffer,
        stored: Mapping[Path, Shape],
        steps: tuple[Arithmetic, ...],
    ) -> None:
        rectangle = shape_of_region(folded.region)
        if view.shape == folded.shape and view.flags.c_contiguous:
            # The place itself can take the rectangle's shape: no second copy.
            self.fill(folded.recipe, folded.region, view.reshape(rectangle), stored, steps)
            return
        below = np.empty(rectangle, view.dtype)
        self.fill(folded.recipe, folded.region, below, stored, steps)
        chosen = below.reshape(folded.shape)[(..., *slices(part.source_region))]
        self.finish.append(lambda: np.copyto(view, chosen))


def stored_shapes(checkpoint: Checkpoint) -> dict[Path, Shape]:
    """Returns the shape of everything that can be read, the bits of random keys included."""
    shapes = {path: array.encoding.shape for path, array in checkpoint.arrays.items()}
    return shapes | {path: value.shape for path, value in (checkpoint.values or {}).items()}
