"""Disks and devices: metadata, reading, transforms, filling, writing."""

import contextlib
import gc
from collections.abc import Generator


@contextlib.contextmanager
def paused_collection() -> Generator[None]:
    """Pauses the collector for the time of a `with` block.

    Each new object would otherwise be visited again and again, a tenth of the
    time at 2,000 leaves, and none of them can be garbage yet. At the end many of them count as old.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    before = gc.get_count()[0]
    try:
        yield
    finally:
        if was_enabled:
            # To ask whether anything is frozen takes as long as there is much of it.
            if gc.get_count()[0] - before > _FEW:
                _age()
            gc.enable()


# So few that the collector is through with them in a millisecond.
_FEW = 10_000
# So many are let pass between two collections of everything. Twice what a restore of 20,000 leaves makes.
_MANY = 2_000_000
_aged = (-1, 0)


def _age() -> None:
    """Makes old what is young, as the collector would once it had visited all of it in three rounds.

    Those rounds take a tenth of the restore of 20,000 leaves, and find nothing: it is the result, or is
    freed without them. So that what becomes garbage later is found, the collector is passed by for a while
    only, and not at all where the program has frozen objects of its own, which would be thawed.
    """
    global _aged
    young, rounds = gc.get_count()[0], int(gc.get_stats()[-1]["collections"])
    since, aged = _aged
    aged = aged + young if since == rounds else young
    if aged <= _MANY and not gc.get_freeze_count():
        _aged = rounds, aged
        gc.freeze()
        gc.unfreeze()
