"""What is known of a checkpoint before any array is read."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from orbax_nnx_handler.planning.core.leaves import StoredLeaf
from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.verdict.unreadable import Unreadable
from orbax_nnx_handler.storage.checkpoint.zarr import Encoding
from orbax_nnx_handler.storage.stores.kvstore import Store


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredArray:
    """Where and how one array is stored.

    Attributes:
        name: Its name in the store, dots between the keys of its path.
        store: The store that holds it.
        encoding: Its layout there; for a random key, that of the key's bits.
    """

    name: str
    store: Store
    encoding: Encoding

    def key(self, index: tuple[int, ...]) -> str:
        """Returns the store's key of one chunk."""
        return f"{self.name}/{self.encoding.chunk_key(index)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What is known of one item from its metadata.

    Attributes:
        directory: The item directory (or the msgpack file or NumPy archive itself).
        leaves: All leaves by path, as the disk's tree has them: a string for a
            dict key, an int for a list index. `None` and empty containers are no
            leaves. A random key has its key dtype and no trailing axis of bits.
        lost: Leaves that the tree names but whose array metadata cannot be read,
            with the reason.
        damaged: Leaves whose shapes are known and whose bytes are not all there, with the reason.
        disk_format: The format, such as "ocdbt+zarr3", "zarr", "msgpack" or "npz".
        custom_metadata: What the program stored with the item.
        step_metadata: What the program stored with the step (MaxText says there
            whether layers are scanned).
        values: The values that an older msgpack file held, and random state that
            this library saved in the custom metadata; None without any.
        nodes: Every path of the disk's tree with its value type, empty nodes
            included: the containers that Orbax expects an item to have.
        arrays: Where each array lies; the values of a msgpack file are not in it.
        writes_fill: Whether the writer stored chunks even where they equal the
            fill value. Then an absent chunk is a loss, otherwise it is zeros.
        foreign: Leaves that are whole but hold no numbers (pickled objects, records),
            with what they hold.
    """

    directory: epath.Path
    leaves: Mapping[Path, StoredLeaf]
    lost: Mapping[Path, str]
    disk_format: str
    custom_metadata: Mapping[str, Any]
    step_metadata: Mapping[str, Any]
    values: Mapping[Path, np.ndarray[Any, Any]] | None
    nodes: Mapping[Path, str]
    arrays: Mapping[Path, StoredArray]
    writes_fill: bool
    damaged: Mapping[Path, str] = dataclasses.field(default_factory=dict[Path, str])
    foreign: Mapping[Path, str] = dataclasses.field(default_factory=dict[Path, str])

    @property
    def broken(self) -> Unreadable:
        """Every leaf that cannot be read, for a verdict."""
        return Unreadable(lost=self.lost, damaged=self.damaged, foreign=self.foreign)
