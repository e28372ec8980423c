"""Restores on more hosts than are at hand: `python -m benchmarks.simulate`.

From metadata alone, and without an array: a 405B train state that 1,024 hosts wrote is decided on, and for
each host of 8, 64 and 1,024 every byte range is planned that it would ask a bucket for. The decision and
the byte plans are those of a real restore, by the same functions; `tests/benchmarks/test_simulate.py`
holds them against what 2 and 4 real processes read. Only the seconds are a model:

    latency x trips in a row before the first array byte, and the processor time of the decision here
    + the larger of: bytes / the host's bandwidth, and
                     (latency + bytes / a stream's bandwidth, of each request) / requests under way
"""

import dataclasses
import itertools
import json
import math
import mmap
import pathlib
import resource
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.measuring import Row, arguments, report, table
from benchmarks.skeleton import Axes, Decoder, Hosts, train_state, write
from orbax_nnx_handler.planner import decide
from orbax_nnx_handler.planning.options import RestoreOptions
from orbax_nnx_handler.planning.restore_plan import RestorePlan
from orbax_nnx_handler.storage.checkpoint.find import find_item
from orbax_nnx_handler.storage.checkpoint.metadata import Checkpoint, read_metadata
from orbax_nnx_handler.storage.reading.byte_plan import OBJECT_STORE, Limits, cut_run, plan_bytes
from orbax_nnx_handler.storage.reading.chunks import ChunkPiece
from orbax_nnx_handler.storage.reading.engine import DEFAULT_WINDOW_BYTES
from orbax_nnx_handler.storage.reading.fetch import LeafToRead, chunks_of, pieces_to_read
from orbax_nnx_handler.storage.reading.jobs import (
    Job,
    PlainJob,
    Work,
    allocate_shards,
    groups,
    plain_job,
    stored_shapes,
)
from orbax_nnx_handler.storage.stores.backends import LocalFiles
from orbax_nnx_handler.storage.stores.files import FileAnswer, FileQuestion, Files, List, Listing, Sizes

LLAMA_405B = Decoder(
    layers=126, width=16384, hidden=53248, heads=128, kv_heads=8, head_size=128, tokens=128256
)
TOY = Decoder(layers=2, width=64, hidden=128, heads=8, kv_heads=8, head_size=8, tokens=128)
_PAGE = 1000  # Names in one answer of a bucket.
_NAME_BYTES = 500  # What a bucket says of each.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """What lies between a host and the bucket.

    Attributes:
        latency: Seconds until the first byte of an answer.
        stream: Bytes a second of one request.
        host: Bytes a second of all requests of a host.
    """

    latency: float = 0.05
    stream: float = 50e6
    host: float = 2.5e9

    def seconds(self, requests: Sequence[int], limits: Limits) -> float:
        """Returns how long requests of such sizes take."""
        alone = sum(self.latency + size / self.stream for size in requests)
        return max(sum(requests) / self.host, alone / min(limits.requests, max(len(requests), 1)))


class Chip(NamedTuple):
    """A device that is not there."""

    number: int
    platform: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnHost:
    """What a host holds of an array: takes the place of a `jax.sharding.NamedSharding`.

    Attributes:
        hosts: All hosts.
        host: Which of them.
        axes: The mesh axis over which each axis of the array is spread.
        platform: What its devices are.
    """

    hosts: Hosts
    host: int
    axes: Axes
    platform: str

    def addressable_devices_indices_map(self, shape: tuple[int, ...]) -> dict[Chip, tuple[slice, ...]]:
        """Returns the part of each of the host's devices."""
        steps = [size // parts for size, parts in zip(shape, self.hosts.parts(self.axes), strict=True)]
        first = self.host * self.hosts.devices
        return {
            Chip(device, self.platform): tuple(
                slice(at * step, (at + 1) * step)
                for at, step in zip(self.hosts.part_of(device, self.axes), steps, strict=True)
            )
            for device in range(first, first + self.hosts.devices)
        }


class Counting:
    """Answers from files as a bucket would, and counts what a bucket would be asked.

    Attributes:
        requests: Requests, each page of a listing one.
        trips: Those that have to wait for the one before.
        nbytes: Bytes of the answers.
    """

    remote = True

    def __init__(self) -> None:
        self.requests = self.trips = self.nbytes = 0
        self._files = LocalFiles()

    def answer(self, questions: Sequence[FileQuestion]) -> list[FileAnswer]:
        """See `Backend`."""
        answers = self._files.answer(questions)
        pages = [1]
        for question, answer in zip(questions, answers, strict=True):
            names = 0
            if isinstance(question, List | Sizes):
                names = len(answer.entries if isinstance(answer, Listing) else answer or ())
                pages.append(max(1, -(-names // _PAGE)))
            self.requests += max(1, -(-names // _PAGE))
            self.nbytes += len(answer) if isinstance(answer, bytes) else names * _NAME_BYTES
        self.trips += max(pages)
        return answers


def target_of(model: Decoder, *, stacked: bool) -> tuple[nnx.State, dict[tuple[Any, ...], Axes]]:
    """Returns MaxText's NNX train state for a model, abstract, and how its leaves are spread."""
    leaves: dict[tuple[Any, ...], Any] = {("optimizer", "step"): nnx.OptState(_abstract((), jnp.uint32))}
    leaves["optimizer", "opt_state", 0, "count"] = nnx.OptState(_abstract((), jnp.int32))
    axes: dict[tuple[Any, ...], Axes] = dict.fromkeys(leaves, ())
    for path, shape, spread in model.parameters(stacked=stacked):
        wanted = _numbered(path)
        leaves["model", *wanted] = nnx.Param(_abstract(shape, jnp.float32))
        for slot in ("mu", "nu"):
            moment = nnx.optimizer.OptVariable(_abstract(shape, jnp.float32))
            leaves["optimizer", "opt_state", 0, slot, *wanted] = moment
            axes["optimizer", "opt_state", 0, slot, *wanted] = spread
        axes["model", *wanted] = spread
    return nnx.from_flat_state(list(leaves.items())), axes


def _abstract(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _numbered(path: tuple[Any, ...]) -> tuple[Any, ...]:
    name, _, number = str(path[1]).partition("_")
    return (path[0], name, int(number), *path[2:]) if number.isdecimal() else path


def byte_plan(
    checkpoint: Checkpoint, jobs: Sequence[PlainJob], limits: Limits = OBJECT_STORE
) -> list[list[tuple[str, int, int]]]:
    """Returns the requests of one host: file, start and length, by what is read before the next is begun."""
    stored = stored_shapes(checkpoint)
    memory = _no_memory(max(job.host_nbytes for job in jobs))
    return [_requests(checkpoint, group, limits, stored, memory) for group in groups(jobs, None)]


def _requests(
    checkpoint: Checkpoint, jobs: Sequence[PlainJob], limits: Limits, stored: Mapping[Any, Any], memory: Any
) -> list[tuple[str, int, int]]:
    work = Work()
    for job in jobs:
        for region, buffer in allocate_shards(job, memory).items():
            work.fill(job.recipe, region, buffer, stored)
    pieces: list[ChunkPiece] = []
    for path, places in work.targets.items():
        array = checkpoint.arrays[path]
        leaf = LeafToRead(path=path, array=array, writes_fill=checkpoint.writes_fill)
        chunks = list(chunks_of(leaf, places))
        pieces += pieces_to_read(array.store, chunks, limits)
    planned = plan_bytes([p.wanted for p in pieces if not p.streamed and p.wanted.runs], limits)
    found = [(r.file, r.start, r.size) for batch in planned.batches for r in batch.requests]
    for piece in pieces:
        if piece.streamed:
            ((start, size),) = piece.wanted.runs
            found += [(piece.wanted.file, *part) for part in cut_run(start, size, limits.range_bytes)]
    return found


def _no_memory(size: int) -> Any:
    """Returns what hands out buffers that are never touched: all are the same addresses."""
    # A hole of a file: no machine could promise so much memory.
    with tempfile.TemporaryFile() as file:
        file.truncate(size + 1)
        memory = np.frombuffer(mmap.mmap(file.fileno(), size + 1), np.uint8)

    def allocate(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
        return memory[: math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)

    return allocate


def jobs_on(
    plan: RestorePlan,
    axes: Mapping[tuple[Any, ...], Axes],
    hosts: Hosts,
    host: int,
    platform: str = "tpu",
) -> list[PlainJob]:
    """Returns what one host has to hold."""
    places = {
        path: OnHost(hosts=hosts, host=host, axes=axes[path], platform=platform) for path in plan.restored
    }
    return [
        plain_job(
            Job(
                path=path,
                recipe=item.recipe,
                shape=item.wanted.shape,
                dtype=item.dtype,
                sharding=places[path],  # type: ignore[arg-type]
            )
        )
        for path, item in plan.restored.items()
    ]


def peak_bytes(jobs: Sequence[PlainJob]) -> int:
    """Returns the host memory of values: a group on its way to the devices, the next, what is unpacked."""
    sizes = [sum(job.host_nbytes for job in group) for group in groups(jobs, None)]
    beside = [first + second for first, second in itertools.pairwise([0, *sizes])]
    return max(beside) + min(DEFAULT_WINDOW_BYTES, max(sizes))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One restore.

    Attributes:
        title: What it shows.
        stored: Whether the layers are stacked on disk.
        stacked: Whether they are in the target.
        writers: Who saved.
        hosts: Who restores.
        every: One host in so many is planned; 1 for each.
    """

    title: str
    stored: bool = True
    stacked: bool
    writers: Hosts
    hosts: Hosts
    every: int = 1


def cases(*, toy: bool) -> list[Case]:
    """Returns the restores."""
    if toy:
        writers, few = Hosts(count=4, devices=2, tensor=2), Hosts(count=2, devices=2)
        hosts, middle = [(few, 1)], few
    else:
        writers, middle = Hosts(count=1024, devices=4, tensor=8), Hosts(count=64, devices=8, tensor=8)
        hosts = [(Hosts(count=8, devices=8), 4), (middle, 16), (writers, 64)]
    kept, apart, single = (
        "stacked layers, as they are",
        "stacked layers, wanted one by one",
        "layers one by one, written by as many hosts",
    )
    return [
        *(Case(title=kept, stacked=True, writers=writers, hosts=each) for each, _ in hosts),
        *(Case(title=apart, stacked=False, writers=writers, hosts=each, every=n) for each, n in hosts),
        Case(
            title=single,
            stored=False,
            stacked=False,
            writers=middle,
            hosts=middle,
            every=middle.count // 4 or 1,
        ),
    ]


def simulate(directory: pathlib.Path, model: Decoder, case: Case, network: Network) -> Row:
    """Returns the figures of a restore."""
    target, axes = target_of(model, stacked=case.stacked)
    before, began = _resident(), time.process_time()
    counting = Counting()
    files = Files(counting)
    checkpoint = read_metadata(find_item(directory, None, files), files)
    plan, _ = decide(checkpoint, target, {}, RestoreOptions(), check=True)
    decided = time.process_time() - began
    metadata = _resident() - before
    plans: list[list[list[int]]] = []
    peak = 0
    began = time.process_time()
    for host in range(0, case.hosts.count, case.every):
        jobs = jobs_on(plan, axes, case.hosts, host)
        plans.append([[size for *_, size in group] for group in byte_plan(checkpoint, jobs)])
        peak = max(peak, peak_bytes(jobs))
    planning = (time.process_time() - began) / len(plans)
    sizes = [[size for group in groups for size in group] for groups in plans]
    waiting = network.latency * counting.trips + counting.nbytes / network.stream
    reading = max(sum(network.seconds(group, OBJECT_STORE) for group in groups) for groups in plans)
    return {
        "hosts": case.hosts.count,
        "metadata requests": counting.requests,
        "metadata MB": counting.nbytes / 1e6,
        "in a row": counting.trips,
        "requests": max(map(len, sizes)),
        "GB": max(map(sum, sizes)) / 1e9,
        "of all that is stored": sum(map(sum, sizes))
        * case.hosts.count
        / len(plans)
        / sum(_stored(checkpoint)),
        "CPU s before reading": decided + planning,
        "peak GB": (peak + metadata) / 1e9,
        "seconds": waiting + decided + planning + reading,
    }


def _stored(checkpoint: Checkpoint) -> Iterator[int]:
    """Yields the bytes of each chunk that lies in a data file."""
    store = next(iter(checkpoint.arrays.values())).store
    for value in (store.catalog or {}).values():
        if not isinstance(value, bytes):
            yield value.size


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Works all cases out."""
    options = arguments(__doc__ or "")
    model = TOY if options.toy else LLAMA_405B
    results: dict[str, list[Row]] = {}
    for case in cases(toy=options.toy):
        name = f"skeleton-{model.layers}-{case.writers.count}-{case.stored}"
        directory = write(options.scratch / name, train_state(model, stacked=case.stored), case.writers)
        row = simulate(directory, model, case, Network())
        results.setdefault(case.title, []).append(row)
        print(json.dumps(row), flush=True)
    report("simulate", options, results, {title: table(rows) for title, rows in results.items()})


if __name__ == "__main__":
    main()
