"""Writes a converted checkpoint block by block; it appears under its name only when it is complete.

Orbax does the rest of the save: tree, merge and commit.
"""

import asyncio
import contextlib
import dataclasses
from collections.abc import Generator, Mapping, Sequence
from typing import Any, cast

import jax
import tensorstore as ts
from etils import epath

from orbax_nnx_handler.orbax_interfaces import v0 as ocp
from orbax_nnx_handler.planning.core.dtypes import is_key
from orbax_nnx_handler.planning.core.errors import RestoreError
from orbax_nnx_handler.planning.core.folding import Row
from orbax_nnx_handler.planning.core.lines import aligned
from orbax_nnx_handler.planning.core.paths import Path, is_empty, tree_of
from orbax_nnx_handler.planning.core.recipes import Read
from orbax_nnx_handler.planning.core.regions import slices
from orbax_nnx_handler.storage.checkpoint.directories import COMMIT_FILE, is_item
from orbax_nnx_handler.storage.checkpoint.metadata import Checkpoint, read_metadata
from orbax_nnx_handler.storage.converting.blocks import (
    Block,
    Digests,
    Written,
    block_shape,
    by_source,
    digests_of,
    read_blocks,
    window_of,
)
from orbax_nnx_handler.storage.reading import Job, check_one_save, read_arrays
from orbax_nnx_handler.storage.reading.engine import Progress
from orbax_nnx_handler.storage.saving.atomic import appearing, writing
from orbax_nnx_handler.storage.saving.saved import check_names
from orbax_nnx_handler.storage.stores.kvstore import files_at
from orbax_nnx_handler.storage.stores.locations import absolute, check_writable, is_url, parents_of

# How many directories above a destination might be an item that would be changed.
_LOOKED_AT = 3


@dataclasses.dataclass(frozen=True)
class Pending:
    """Stands in Orbax's tree for a leaf whose values come later."""

    leaf: Written


class BlockWriter(ocp.type_handlers.TypeHandler):
    """Writes leaves in blocks while Orbax does the rest of a save: tree, merge, commit."""

    def __init__(
        self,
        source: Checkpoint,
        leaves: Sequence[Written],
        window: int,
        progress: Progress | None,
        *,
        may_finish: bool,
    ) -> None:
        """Writes nothing yet.

        Args:
            source: The checkpoint that is read.
            leaves: The leaves to write.
            window: Bytes of one batch.
            progress: Called with the bytes written since the last call.
            may_finish: Whether the save may end as if all were well, `failure` aside: nobody sees
                its directory yet.
        """
        self.digests = Digests()
        self.leaves = leaves
        self.window = window
        self.failure: Exception | None = None
        self._source = source
        self._progress = progress
        self._may_finish = may_finish

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
        try:
            await self._write_all(places)
        except Exception as error:
            if not self._may_finish:
                raise
            # Orbax writes random keys and the tree in threads of its own. Let it finish, or they would
            # go on in a directory that is being removed, and say so with tracebacks of their own.
            self.failure = error
        return []

    async def _write_all(self, places: Mapping[Path, Any]) -> None:
        arrays: dict[Path, ts.TensorStore] = {}
        for batch in read_blocks(self._source, self.leaves, self.window):
            new = {block.leaf.path: block.leaf for block in batch if block.leaf.path not in arrays}
            opened = {path: self._open(leaf, places[path]) for path, leaf in new.items()}
            arrays |= {path: future.result() for path, future in opened.items()}
            self._write(batch, arrays)
            for block in batch:
                if block.is_last:
                    del arrays[block.leaf.path]
            batch.clear()
            # An interrupt arrives here where the event loop has taken over the signal.
            await asyncio.sleep(0)

    def _write(self, batch: Sequence[Block], arrays: Mapping[Path, ts.TensorStore]) -> None:
        writes: list[Any] = [
            arrays[block.leaf.path][slices(block.region)].write(
                block.values, can_reference_source_data_indefinitely=True
            )
            for block in batch
            if block.values.size
        ]
        for block in batch:
            self.digests.add(block)
        for write in writes:
            write.result()
        if self._progress is not None:
            self._progress(sum(block.values.nbytes for block in batch))

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
            local_shape=block_shape(leaf.shape, leaf.dtype, self.window),
            dtype=leaf.dtype,
            process_index=0,
        )
        return ts.open(ts.Spec(spec), create=True, open=True, context=info.ts_context)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversion:
    """What is to be written.

    Attributes:
        source: The checkpoint that is read.
        leaves: The leaves to write.
        given: Values that are in no checkpoint, by path: random state, and the
            empty nodes of an optax state.
        lists: Whether int keys number a list; an `nnx.State` keeps them as keys.
    """

    source: Checkpoint
    leaves: Sequence[Written]
    given: Mapping[Path, Any] = dataclasses.field(default_factory=dict[Path, Any])
    lists: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves."""
        return sum(leaf.nbytes for leaf in self.leaves)


def write_converted(
    conversion: Conversion,
    destination: epath.PathLike,
    *,
    memory_bytes: int | None,
    progress: Progress | None = None,
    verifying: Progress | None = None,
) -> dict[Path, str]:
    """Writes a conversion as one item that stock Orbax reads, and reads it again to compare.

    Args:
        conversion: What to write.
        destination: The item directory to create.
        memory_bytes: Upper bound of this process's memory; None as for `window_of`.
        progress: Called with the bytes written since the last call.
        verifying: Called with the bytes read again since the last call.

    Returns:
        The digest of each leaf.

    Raises:
        RestoreError: Something is at the destination, two leaves would have one name, the memory does
            not do, or what was read again is not what was written. Nothing was left behind.
    """
    destination = absolute(destination)
    given = (path for path, value in conversion.given.items() if not is_empty(value))
    check_names([*(leaf.path for leaf in conversion.leaves), *given])
    window = window_of(memory_bytes)
    leaves = ((leaf.path, leaf.nbytes) for leaf in conversion.leaves)
    with writing(destination, leaves), _appearing(destination) as unfinished:
        plain = [leaf for leaf in conversion.leaves if not is_key(leaf.dtype)]
        writer = BlockWriter(
            conversion.source,
            by_source(plain, conversion.source),
            window,
            progress,
            may_finish=not is_url(destination),
        )
        _save(conversion, writer, unfinished)
        check_one_save(conversion.source)
        _verify(unfinished, plain, writer.digests.done, window, verifying)
    return writer.digests.done


def check_free(destination: epath.Path) -> None:
    """Raises where a destination is taken.

    Raises:
        RestoreError: Names it, or says why nothing can be written to it.
    """
    check_writable(destination)
    files = files_at(destination)
    if files.exists(destination):
        raise RestoreError(
            f"there is something at {destination} already; nothing is overwritten.",
            hints=["name another destination, or take away what is there."],
        )
    parents = parents_of(destination)
    above = next((part for part in parents if files.exists(part)), destination)
    if files.exists(above) and not files.is_folder(above):
        raise RestoreError(f"{above} is a file, so nothing can be written to {destination}.")
    inside = next((part for part in parents[:_LOOKED_AT] if is_item(part, files)), None)
    if inside is not None:
        raise RestoreError(f"{destination} lies inside the checkpoint {inside}, which would be changed.")


def _appearing(destination: epath.Path) -> contextlib.AbstractContextManager[epath.Path]:
    """Gives a directory to write to, which is the destination at the end, or goes."""
    check_free(destination)
    return _committed(destination) if is_url(destination) else appearing(destination)


@contextlib.contextmanager
def _committed(destination: epath.Path) -> Generator[epath.Path]:
    """Writes in place: until the commit file is there, no reader takes it for a checkpoint."""
    try:
        yield destination
    except BaseException:
        with contextlib.suppress(Exception):
            (destination / COMMIT_FILE).unlink(missing_ok=True)
            destination.rmtree(missing_ok=True)
        raise


def _save(conversion: Conversion, writer: BlockWriter, directory: epath.Path) -> None:
    values: dict[Path, Any] = {leaf.path: Pending(leaf) for leaf in writer.leaves}
    values |= _read_keys(conversion) | dict(conversion.given)
    registry = ocp.type_handlers.create_type_handler_registry(
        (Pending, writer), (jax.Array, ocp.type_handlers.get_type_handler(jax.Array))
    )
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_ocdbt=True, use_zarr3=True)
    custom = dict(conversion.source.custom_metadata) or None
    tree = tree_of(values, lists=conversion.lists)
    with cast(Any, ocp.Checkpointer(handler)) as checkpointer:
        # The bound of a data file is also what the store holds of one in memory before it is written.
        checkpointer.save(
            directory,
            args=ocp.args.PyTreeSave(tree, custom_metadata=custom, ocdbt_target_data_file_size=writer.window),
            custom_metadata=dict(conversion.source.step_metadata) or None,
        )
    if writer.failure is not None:
        raise writer.failure


def _read_keys(conversion: Conversion) -> dict[Path, jax.Array]:
    """Reads the random keys: a few bytes, which Orbax writes in its own way."""
    local = jax.sharding.SingleDeviceSharding(cast(Any, jax.local_devices(backend="cpu")[0]))
    jobs = [
        Job(path=leaf.path, recipe=leaf.recipe, shape=leaf.shape, dtype=leaf.dtype, sharding=local)
        for leaf in conversion.leaves
        if is_key(leaf.dtype)
    ]
    return read_arrays(conversion.source, jobs) if jobs else {}


def _verify(
    directory: epath.Path,
    leaves: Sequence[Written],
    written: Mapping[Path, str],
    window: int,
    progress: Progress | None,
) -> None:
    again = read_metadata(directory)
    stored = {tuple(map(str, path)): path for path in again.leaves}
    paths = {leaf.path: stored.get(tuple(map(str, leaf.path))) for leaf in leaves}
    plain = [dataclasses.replace(leaf, recipe=Read(path)) for leaf in leaves if (path := paths[leaf.path])]
    found = digests_of(again, by_source(plain, again), window, progress)
    wrong = [leaf for leaf in leaves if found.get(leaf.path) != written[leaf.path]]
    if wrong:
        rows = aligned(Row(leaf.path, (str(leaf.shape), str(leaf.dtype))) for leaf in wrong)
        raise RestoreError(
            f"{len(wrong)} leaves were read again with other values than were written:\n{rows}",
            paths=[leaf.path for leaf in wrong],
            hints=["the disk or the memory is at fault; nothing was left at the destination."],
        )
