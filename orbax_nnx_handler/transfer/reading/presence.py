"""Which chunks are absent, as far as metadata shows: known before anything is read."""

from collections.abc import Mapping, Sequence

from orbax_nnx_handler.planning.errors import UnreadableLeafError
from orbax_nnx_handler.planning.paths import Path, render
from orbax_nnx_handler.planning.regions import Region
from orbax_nnx_handler.transfer.metadata import Checkpoint


def absent_chunks(checkpoint: Checkpoint, regions: Mapping[Path, Sequence[Region]]) -> dict[Path, list[str]]:
    """Returns the keys of the chunks that the store's catalog does not list.

    Args:
        checkpoint: The checkpoint. Where its writer left out chunks of zeros,
            an absent chunk is none of these.
        regions: The regions needed of each stored leaf.

    Returns:
        The absent keys by stored leaf; leaves that have all their chunks are left out.
    """
    if not checkpoint.writes_fill:
        return {}
    found: dict[Path, list[str]] = {}
    for path, needed in regions.items():
        array = checkpoint.arrays.get(path)
        if array is None or array.store.catalog is None:
            continue
        indices = dict.fromkeys(index for region in needed for index in array.encoding.chunks(region))
        keys = [array.key(index) for index in indices]
        absent = [key for key in keys if array.store.lacks(key)]
        if absent:
            found[path] = absent
    return found


def check_presence(checkpoint: Checkpoint, regions: Mapping[Path, Sequence[Region]]) -> None:
    """Raises if the catalog shows that a needed chunk is absent.

    Raises:
        UnreadableLeafError: Lists every leaf and every absent chunk.
    """
    absent = absent_chunks(checkpoint, regions)
    if absent:
        lines = [f"  {render(path)}: {', '.join(keys)}" for path, keys in absent.items()]
        raise UnreadableLeafError(
            "\n".join(
                [f"chunks of {len(absent)} stored leaves are absent from {checkpoint.directory}:", *lines]
            ),
            paths=list(absent),
        )
