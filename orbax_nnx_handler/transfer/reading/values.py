"""A few stored values on the host, for decisions that need them."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from orbax_nnx_handler.planning.paths import Path
from orbax_nnx_handler.planning.regions import whole
from orbax_nnx_handler.transfer.metadata import Checkpoint
from orbax_nnx_handler.transfer.reading.gathering import fill_targets
from orbax_nnx_handler.transfer.reading.targets import Target


def read_values(checkpoint: Checkpoint, paths: Iterable[Path]) -> dict[Path, np.ndarray[Any, Any]]:
    """Reads stored leaves whole, as NumPy arrays; a random key as its bits.

    Args:
        checkpoint: What `read_metadata` returned.
        paths: The stored leaves.

    Raises:
        UnreadableLeafError: Stored bytes are absent or damaged.
    """
    held = checkpoint.values or {}
    values = {path: held[path] for path in paths if path in held}
    layouts = {path: checkpoint.arrays[path].encoding for path in paths if path not in held}
    buffers = {path: np.empty(layout.shape, layout.dtype) for path, layout in layouts.items()}
    targets = {path: [Target(whole(buffer.shape), buffer)] for path, buffer in buffers.items() if buffer.size}
    fill_targets(checkpoint, targets, None, None)
    return values | buffers
