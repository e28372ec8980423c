"""All stored leaves of a wave, read into all their places."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from orbax_nnx_handler.planning.paths import Path
from orbax_nnx_handler.planning.regions import slices
from orbax_nnx_handler.transfer.metadata import Checkpoint
from orbax_nnx_handler.transfer.reading.leaf_reader import LeafReader
from orbax_nnx_handler.transfer.reading.presence import check_presence
from orbax_nnx_handler.transfer.reading.sources import Opener
from orbax_nnx_handler.transfer.reading.targets import Target
from orbax_nnx_handler.transfer.reading.tasks import Progress, Task, run_tasks


def fill_targets(
    checkpoint: Checkpoint,
    targets: Mapping[Path, Sequence[Target]],
    concurrent_bytes: int | None,
    progress: Progress | None,
) -> None:
    """Reads the values of stored leaves into all the places they go to.

    Args:
        checkpoint: Where the leaves lie.
        targets: The places of each leaf.
        concurrent_bytes: Upper bound of the bytes under way between store and place.
        progress: Called with the number of bytes put in place since the last call.

    Raises:
        UnreadableLeafError: Stored bytes are absent or damaged.
    """
    values = checkpoint.values or {}
    tasks = [_copy_task(path, values[path], places) for path, places in targets.items() if path in values]
    stored = {path: places for path, places in targets.items() if path not in values}
    check_presence(checkpoint, {path: [place.region for place in places] for path, places in stored.items()})
    stores = {id(store): store for store in (checkpoint.arrays[path].store for path in stored)}
    with contextlib.ExitStack() as stack:
        openers = {
            key: stack.enter_context(contextlib.closing(Opener(store))) for key, store in stores.items()
        }
        for path, places in stored.items():
            array = checkpoint.arrays[path]
            reader = LeafReader(path, array, openers[id(array.store)], checkpoint.writes_fill)
            tasks += reader.tasks(places)
        local = all(store.local for store in stores.values())
        run_tasks(tasks, local=local, concurrent_bytes=concurrent_bytes, progress=progress)


def _copy_task(path: Path, value: np.ndarray[Any, Any], places: Sequence[Target]) -> Task:
    def run() -> None:
        for place in places:
            np.copyto(place.view, value[(..., *slices(place.region))], casting="unsafe")

    return Task(path, value.nbytes, run)
