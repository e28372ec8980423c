"""Which jobs are on their way at the same time.

On CPU devices the buffers that are read into become the arrays, so there is
nothing to bound. Elsewhere they are copied to the device, and only as many as
the window allows exist on the host at once.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from orbax_nnx_handler.planning import recipes
from orbax_nnx_handler.planning.paths import Path
from orbax_nnx_handler.transfer.reading.shards import PlainJob

# Without a bound of the caller's: enough to keep disk and device busy.
DEFAULT_WINDOW_BYTES = 4 << 30

_Item = TypeVar("_Item")


def waves(jobs: Sequence[PlainJob], concurrent_bytes: int | None) -> Iterator[list[PlainJob]]:
    """Yields the jobs in groups that fit the window, largest first.

    Jobs that read the same stored leaf stay together, so that it is read once;
    such a family may exceed the window on its own.
    """
    if all(job.on_cpu for job in jobs):
        yield list(jobs)
        return
    # Half: while one wave is on its way to the devices, the next is read.
    limit = (concurrent_bytes or DEFAULT_WINDOW_BYTES) // 2
    yield from packed(sorted(families(jobs), key=_size, reverse=True), _size, limit)


def packed(
    families: Iterable[Sequence[_Item]], size_of: Callable[[Sequence[_Item]], int], limit: int
) -> Iterator[list[_Item]]:
    """Yields families in groups of bounded size, in order; one may exceed the bound on its own."""
    wave: list[_Item] = []
    size = 0
    for family in families:
        if wave and size + size_of(family) > limit:
            yield wave
            wave, size = [], 0
        wave += family
        size += size_of(family)
    if wave:
        yield wave


def _size(family: Sequence[PlainJob]) -> int:
    return sum(job.host_nbytes for job in family)


def families(jobs: Sequence[PlainJob]) -> list[list[PlainJob]]:
    """Groups the jobs that share a stored leaf, directly or through others."""
    family_of: dict[Path, list[PlainJob]] = {}
    for job in jobs:
        paths = set(recipes.reads(job.recipe))
        relatives = {id(family_of[path]): family_of[path] for path in paths if path in family_of}
        home = max(relatives.values(), key=len, default=list[PlainJob]())
        for other in relatives.values():
            if other is not home:
                home += other
                paths |= {path for member in other for path in recipes.reads(member.recipe)}
        home.append(job)
        family_of |= dict.fromkeys(paths, home)
    return list({id(family): family for family in family_of.values()}.values())
