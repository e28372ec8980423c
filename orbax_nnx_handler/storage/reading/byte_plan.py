"""Which bytes of which files are asked for, and together with which others, before any is read.

What is wanted are runs of bytes, each in one file. Neighbours become one request where the gap
between them costs less than a request of their own, and a long run becomes several requests that
are under way together. The result is a value that can be counted: so many requests, so many bytes,
so many waits one after the other. Nothing here reads, and nothing depends on what a run means.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

GAP_VARIABLE = "ORBAX_NNX_GAP_BYTES"
RANGE_VARIABLE = "ORBAX_NNX_RANGE_BYTES"
REQUESTS_VARIABLE = "ORBAX_NNX_REQUESTS"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What a kind of store makes cheap and what expensive.

    Attributes:
        gap_bytes: Bytes between two wanted runs that are read rather than skipped, at most.
        range_bytes: Length of one request, at most; what is longer is cut.
        requests: How many requests may be under way at the same time.
        packed_bytes: A packed chunk up to this size is held whole before it is unpacked, which is
            faster; a larger one is unpacked while it comes, which takes less memory.
        member_bytes: The same for a member of an archive, whose checksum needs its bytes in order.
    """

    gap_bytes: int
    range_bytes: int
    requests: int
    packed_bytes: int
    member_bytes: int


# A call costs some microseconds, as long as the memory takes for 16 kB. Blocks of 4 MB are long
# enough that the calls do not count, and short enough to spread one leaf over all threads and to
# stay in the processor's last cache where they are unpacked or scattered.
DISK = Limits(
    gap_bytes=16 << 10, range_bytes=4 << 20, requests=16, packed_bytes=32 << 20, member_bytes=4 << 20
)

# A request takes 20 to 100 ms until its first byte, and a stream carries 20 to 100 MB/s: in the time of
# a request a stream carries about 1 MB, so a gap of that size is not worth a request. 8 MB take a
# few times as long to carry as to ask for; longer ranges would leave the other streams idle at the
# end. 64 streams fill the network of most hosts.
OBJECT_STORE = Limits(
    gap_bytes=1 << 20, range_bytes=8 << 20, requests=64, packed_bytes=128 << 20, member_bytes=128 << 20
)


def limits_of(*, local: bool, environment: Mapping[str, str] = os.environ) -> Limits:
    """Returns the limits for a kind of store, as far as the environment does not set others.

    Args:
        local: Whether the files are this machine's own.
        environment: May hold `ORBAX_NNX_GAP_BYTES`, `ORBAX_NNX_RANGE_BYTES`, `ORBAX_NNX_REQUESTS`.

    Raises:
        ValueError: A variable is no positive whole number (a gap may be 0).
    """
    usual = DISK if local else OBJECT_STORE
    return dataclasses.replace(
        usual,
        gap_bytes=_setting(environment, GAP_VARIABLE, usual.gap_bytes, least=0),
        range_bytes=_setting(environment, RANGE_VARIABLE, usual.range_bytes, least=1),
        requests=_setting(environment, REQUESTS_VARIABLE, usual.requests, least=1),
    )


def _setting(environment: Mapping[str, str], name: str, usual: int, *, least: int) -> int:
    text = environment.get(name)
    if text is None:
        return usual
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"{name}={text!r} is no whole number from {least} on.\nhint: unset it for {usual}.")
    return int(text)


class WantedBytes(NamedTuple):
    """Bytes that belong together: runs of one file, in the order of their places.

    Attributes:
        file: The file.
        runs: Start and length of each run.
    """

    file: str
    runs: tuple[tuple[int, int], ...]


class RequestPart(NamedTuple):
    """A piece of one request and where it goes.

    Attributes:
        wanted: The number of the `WantedBytes` that it is a part of.
        at: Its place among the bytes of that one, its runs end to end.
        start: Its place in the request.
        size: Its length.
    """

    wanted: int
    at: int
    start: int
    size: int


class Request(NamedTuple):
    """One range of one file, and the parts that it brings, in their order and without overlap."""

    file: str
    start: int
    size: int
    parts: tuple[RequestPart, ...]


class Batch(NamedTuple):
    """Requests that bring everything of some `WantedBytes`s and nothing of any other.

    Attributes:
        requests: The requests, to be under way together.
        wanted: The numbers of what they bring.
    """

    requests: tuple[Request, ...]
    wanted: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that the requests bring, gaps included."""
        return sum(request.size for request in self.requests)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BytePlan:
    """All requests of a read, in the order in which they are to be sent.

    Attributes:
        batches: The requests by what they bring.
        limits: The limits that they keep.
    """

    batches: tuple[Batch, ...]
    limits: Limits

    @property
    def requests(self) -> int:
        """How many requests there are."""
        return sum(len(batch.requests) for batch in self.batches)

    @property
    def nbytes(self) -> int:
        """How many bytes they bring, gaps included."""
        return sum(batch.nbytes for batch in self.batches)

    @property
    def trips(self) -> int:
        """How many waits for the store follow each other: one, if all requests may be under way together."""
        return -(-self.requests // self.limits.requests)


def plan_bytes(wanted: Sequence[WantedBytes], limits: Limits) -> BytePlan:
    """Returns the requests that bring what is wanted."""
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    batches: list[Batch] = []
    open_batch: _Open | None = None
    for number in order:
        if open_batch is None or not open_batch.joined(number, wanted[number]):
            if open_batch is not None:
                batches.append(open_batch.close())
            open_batch = _Open(wanted[number].file, limits)
            open_batch.add(number, wanted[number])
    if open_batch is not None:
        batches.append(open_batch.close())
    # The longest first, so that none is left for the end; all others as they lie in their files.
    batches.sort(key=lambda batch: -len(batch.requests) if len(batch.requests) > 1 else 0)
    return BytePlan(batches=tuple(batches), limits=limits)


class _Open:
    """A batch that still grows."""

    def __init__(self, file: str, limits: Limits) -> None:
        self._file = file
        self._limits = limits
        # What is joined to a full request, such as the index behind a chunk, may exceed it a little.
        self._most = limits.range_bytes + limits.range_bytes // 64
        self._numbers: list[int] = []
        self._requests: list[Request] = []
        self._start = self._end = -1
        self._parts: list[RequestPart] = []

    def joined(self, number: int, wanted: WantedBytes) -> bool:
        """Adds what is joined to the last request; False for what is asked for by itself."""
        file, runs = wanted
        start, size = runs[0]
        if len(runs) > 1 or file != self._file or not self._joins(start, size):
            return False
        if size > self._limits.range_bytes:
            self.add(number, wanted)
            return True
        # Nearly every leaf of a model of thousands.
        self._numbers.append(number)
        self._parts.append(RequestPart(number, 0, start - self._start, size))
        self._end = start + size
        return True

    def add(self, number: int, wanted: WantedBytes) -> None:
        """Adds all runs, cut where they are too long."""
        at = 0
        self._numbers.append(number)
        for start, size in wanted.runs:
            for first, length in cut_run(start, size, self._limits.range_bytes):
                if not self._joins(first, length):
                    self._send()
                    self._start = first
                self._parts.append(RequestPart(number, at, first - self._start, length))
                self._end = first + length
                at += length

    def close(self) -> Batch:
        """Returns the batch."""
        self._send()
        return Batch(tuple(self._requests), tuple(self._numbers))

    def _joins(self, start: int, size: int) -> bool:
        gap = start - self._end
        within = 0 <= gap <= self._limits.gap_bytes and start + size - self._start <= self._most
        return bool(self._parts) and within

    def _send(self) -> None:
        if self._parts:
            size = self._end - self._start
            self._requests.append(Request(self._file, self._start, size, tuple(self._parts)))
            self._parts = []


def cut_run(start: int, size: int, most: int) -> Iterator[tuple[int, int]]:
    """Yields a run of bytes in pieces of at most so many, as equal as they come."""
    if size <= most:
        yield start, size
        return
    count = -(-size // most)
    step = -(-size // count)
    for first in range(0, size, step):
        yield start + first, min(step, size - first)
