"""Writes leaves slab by slab while Orbax does the rest of a save: tree, merge, commit."""

import asyncio
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import orbax.checkpoint as ocp
import tensorstore as ts

from orbax_nnx_handler.planning.conversion import Written
from orbax_nnx_handler.planning.paths import Path
from orbax_nnx_handler.planning.regions import slices
from orbax_nnx_handler.transfer.digests import Digests, Progress
from orbax_nnx_handler.transfer.metadata import Checkpoint
from orbax_nnx_handler.transfer.slabs import Slab, read_slabs, slab_shape


@dataclasses.dataclass(frozen=True)
class Pending:
    """Stands in Orbax's tree for a leaf whose values come later."""

    leaf: Written


class SlabWriter(ocp.type_handlers.TypeHandler):
    """Writes leaves in slabs while Orbax does the rest of a save: tree, merge, commit."""

    def __init__(
        self, source: Checkpoint, leaves: Sequence[Written], window: int, progress: Progress | None
    ) -> None:
        self.digests = Digests()
        self.leaves = leaves
        self.window = window
        self._source = source
        self._progress = progress

    def typestr(self) -> str:
        """Returns the name under which any Orbax reads the leaves: whole arrays of no sharding."""
        return "np.ndarray"

    async def serialize(
        self, values: Sequence[Any], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[Any]:
        """Writes all leaves; done when it returns."""
        del args
        places = {value.leaf.path: info for value, info in zip(values, infos, strict=True)}
        for info in infos[:1]:
            await info.await_path_creation()
        arrays: dict[Path, ts.TensorStore] = {}
        for batch in read_slabs(self._source, self.leaves, self.window):
            new = {slab.leaf.path: slab.leaf for slab in batch if slab.leaf.path not in arrays}
            opened = {path: self._open(leaf, places[path]) for path, leaf in new.items()}
            arrays |= {path: future.result() for path, future in opened.items()}
            self._write(batch, arrays)
            for slab in batch:
                if slab.is_last:
                    del arrays[slab.leaf.path]
            batch.clear()
            # An interrupt arrives here where the event loop has taken over the signal.
            await asyncio.sleep(0)
        return []

    def _write(self, batch: Sequence[Slab], arrays: Mapping[Path, ts.TensorStore]) -> None:
        writes: list[Any] = [
            arrays[slab.leaf.path][slices(slab.region)].write(
                slab.values, can_reference_source_data_indefinitely=True
            )
            for slab in batch
            if slab.values.size
        ]
        for slab in batch:
            self.digests.add(slab)
        for write in writes:
            write.result()
        if self._progress is not None:
            self._progress(sum(slab.values.nbytes for slab in batch))

    async def metadata(self, infos: Sequence[Any]) -> Sequence[Any]:
        """Not called: this handler only writes."""
        raise NotImplementedError

    async def deserialize(self, infos: Sequence[Any], args: Sequence[Any] | None = None) -> Sequence[Any]:
        """Not called: this handler only writes."""
        raise NotImplementedError

    def _open(self, leaf: Written, info: Any) -> Any:
        # Public, though marked as being for those who know what they do: Orbax's own description of an array
        # on disk. Written by hand it would go stale with the next option that Orbax adds.
        spec = ocp.type_handlers.get_json_tspec_write(
            info,
            use_ocdbt=True,
            global_shape=leaf.shape,
            local_shape=slab_shape(leaf.shape, leaf.dtype, self.window),
            dtype=leaf.dtype,
            process_index=0,
        )
        return ts.open(ts.Spec(spec), create=True, open=True, context=info.ts_context)
