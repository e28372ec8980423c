"""Ways from a file to an accelerator's memory: `python -m benchmarks.accelerator`.

The same raw leaves, read by the same threads into host memory, and then: a copy a leaf, as `restore` does it;
large blocks, each copied at once and cut into leaves on the device; the same through pinned memory; and each
of these with the next block being read while one is copied. The first run compiles, the second does not.
What is faster on a kind of accelerator should be the way there. Every value is checked. On processors
alone it runs, and says nothing: there the memory that is read into becomes the array.
"""

import functools
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.contestants import ours
from benchmarks.measuring import Row, arguments, report, table
from benchmarks.models import DTYPES, Model, check, placement, sized, write
from orbax_nnx_handler.storage.checkpoint.metadata import read_metadata
from orbax_nnx_handler.storage.reading.base_store import LocalData
from orbax_nnx_handler.storage.reading.memory import ALIGNMENT, Arena

_BLOCK_BYTES = 256 << 20
_THREADS = 8


class Leaf(NamedTuple):
    """A raw leaf: its key, where its bytes lie, and its place in a block."""

    key: tuple[Any, ...]
    file: str
    start: int
    size: int
    at: int


class Ways:
    """A model's leaves in blocks, and how they can get to one device."""

    def __init__(self, model: Model, path: pathlib.Path, block_bytes: int) -> None:
        self._device = jax.devices()[0]
        self._shape = (model.width, model.width)
        self._dtype = DTYPES[model.dtype]
        self._files = LocalData(str(path), shared=True)
        self._blocks = list(_blocks(path, block_bytes))
        self._read_threads = ThreadPoolExecutor(_THREADS)
        self._ahead = ThreadPoolExecutor(1)

    def read(self, block: Sequence[Leaf]) -> np.ndarray:
        """Returns the bytes of a block in fresh host memory."""
        size = block[-1].at + block[-1].size
        memory = Arena().allocate((size,), np.dtype(np.uint8))

        def one(leaf: Leaf) -> None:
            target = memory[leaf.at : leaf.at + leaf.size].data
            self._files.read_into(leaf.file, leaf.start, [target])

        list(self._read_threads.map(one, block))
        return memory

    def leaf_by_leaf(self, block: Sequence[Leaf], memory: np.ndarray) -> dict[Any, jax.Array]:
        """A copy a leaf, all of a block handed over together."""
        views = [
            memory[leaf.at : leaf.at + leaf.size].view(self._dtype).reshape(self._shape) for leaf in block
        ]
        arrays = jax.device_put(views, self._device)
        return {leaf.key: array for leaf, array in zip(block, arrays, strict=True)}

    def cut_on_the_device(self, block: Sequence[Leaf], memory: np.ndarray) -> dict[Any, jax.Array]:
        """One copy of the block."""
        return self._cut(block, jax.device_put(memory, self._device))

    def through_pinned_memory(self, block: Sequence[Leaf], memory: np.ndarray) -> dict[Any, jax.Array]:
        """One copy into pinned memory, and one from there."""
        here = jax.sharding.SingleDeviceSharding(self._device)
        pinned = jax.device_put(memory, here.with_memory_kind("pinned_host"))
        return self._cut(block, jax.device_put(pinned, here))

    def _cut(self, block: Sequence[Leaf], moved: jax.Array) -> dict[Any, jax.Array]:
        return {leaf.key: _leaf_of(moved, leaf.at, self._shape, self._dtype) for leaf in block}

    def run(self, move: Callable[..., dict[Any, jax.Array]], *, overlapped: bool) -> dict[Any, jax.Array]:
        """Moves all blocks, the next one being read meanwhile if asked for."""
        arrays: dict[Any, jax.Array] = {}
        under_way: dict[Any, jax.Array] = {}
        following = self._ahead.submit(self.read, self._blocks[0])
        for number, block in enumerate(self._blocks):
            memory = following.result()
            more = number + 1 < len(self._blocks)
            if more and overlapped:
                following = self._ahead.submit(self.read, self._blocks[number + 1])
            moved = move(block, memory)
            # Two blocks of host memory at most: the one that is copied and the one that is read.
            jax.block_until_ready(under_way if overlapped else moved)
            under_way = moved
            if more and not overlapped:
                following = self._ahead.submit(self.read, self._blocks[number + 1])
            arrays |= moved
        return jax.block_until_ready(arrays)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _leaf_of(block: jax.Array, start: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    size = int(np.prod(shape)) * dtype.itemsize
    content = jax.lax.dynamic_slice(block, (start,), (size,)).reshape(*shape, dtype.itemsize)
    return jax.lax.bitcast_convert_type(content, jnp.dtype(dtype))


def _blocks(path: pathlib.Path, block_bytes: int) -> Iterator[list[Leaf]]:
    arrays = read_metadata(path).arrays
    block: list[Leaf] = []
    at = 0
    for (_, layer, name, kernel), array in ((key, value) for key, value in arrays.items() if len(key) == 4):
        extent = array.store.listed_extent(array.key((0, 0)))
        assert extent is not None
        size = array.encoding.chunk_nbytes
        if block and at + size > block_bytes:
            yield block
            block, at = [], 0
        key = ("layers", int(str(layer).removeprefix("layers_")), name, kernel)
        block.append(Leaf(key, extent.file, extent.start, size, at))
        at += -(-size // ALIGNMENT) * ALIGNMENT
    yield block


def main() -> None:
    """Runs every way for few large leaves and for many small ones."""
    options = arguments(__doc__ or "")
    results: dict[str, dict[str, Row]] = {}
    tables: dict[str, str] = {}
    device = jax.devices()[0]
    for leaves in (9, 41) if options.toy else (37, 2169):
        model = sized(leaves, int(options.gb * 1e9), dtype="bfloat16")
        path = write(model, options.scratch)
        title = f"{model.leaves} leaves, {model.nbytes / 1e9:.3g} GB, to {device.device_kind}"
        results[title] = measured(model, path, options.rounds, (1 << 20) if options.toy else _BLOCK_BYTES)
        tables[f"**{title}**"] = table({"": way, **row} for way, row in results[title].items())
    report("accelerator", options, results, tables)


def measured(model: Model, path: pathlib.Path, rounds: int, block_bytes: int) -> dict[str, Row]:
    """Returns the seconds of each way, as it compiles and at best afterwards."""
    ways = Ways(model, path, block_bytes)
    restore, collect = ours(model, path, placement("one"))
    runs: dict[str, Callable[[], Any]] = {"restore": lambda: collect(restore())}
    for move in (ways.leaf_by_leaf, ways.cut_on_the_device, ways.through_pinned_memory):
        name = move.__name__.replace("_", " ")
        runs[name] = functools.partial(ways.run, move, overlapped=False)
        runs[f"{name}, overlapped"] = functools.partial(ways.run, move, overlapped=True)
    rows: dict[str, Row] = {name: {"first": 0.0, "best": float("inf")} for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            arrays = jax.block_until_ready(run())
            seconds = time.perf_counter() - start
            if number:
                rows[name]["best"] = min(rows[name]["best"], seconds)
            else:
                rows[name]["first"] = seconds
                check(model, path, dict(arrays))
            del arrays
    return {name: {**row, "GB/s": model.nbytes / row["best"] / 1e9} for name, row in rows.items()}


if __name__ == "__main__":
    main()
