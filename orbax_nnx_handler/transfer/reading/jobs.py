"""What the planner asks of a reader: one array per job."""

import dataclasses
from typing import Any

import jax
import numpy as np

from orbax_nnx_handler.planning.leaves import Shape
from orbax_nnx_handler.planning.paths import Path
from orbax_nnx_handler.planning.recipes import Recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One array to come back.

    Attributes:
        path: The wanted path: the key of the result.
        recipe: How it is made from stored leaves; holds no `Fill`.
        shape: The shape of the array, over all devices and processes.
        dtype: Its dtype, a cast from the stored one included; a key dtype gives
            an array of random keys.
        sharding: Where it must live.
        single_replica: Whether one of the processes that hold the same part reads
            it and the others get it over the mesh.
    """

    path: Path
    recipe: Recipe
    shape: Shape
    dtype: np.dtype[Any]
    sharding: jax.sharding.Sharding
    single_replica: bool = False
