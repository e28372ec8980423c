"""Counts, lists and sizes as a sentence has them."""

from collections.abc import Iterable


def counted(count: int, one: str, many: str = "", *, thousands: str = "") -> str:
    """Returns a count with its noun: `1 layer`, `4 layers`; `1,200 leaves` with `thousands=","`."""
    return f"{count:{thousands}} {one if count == 1 else many or one + 's'}"


def listed(names: Iterable[str]) -> str:
    """Returns names as a sentence lists them: `mu`, `mu and nu`, `a, b and c`."""
    every = list(names)
    return " and ".join([", ".join(every[:-1]), every[-1]] if len(every) > 1 else every)


def share(count: int, total: int, noun: str) -> str:
    """Returns a part of a whole in words: `the mismatch`, `both mismatches`, `all 19`, `4 of the 19`."""
    if total == 1:
        return f"the {noun}"
    if count == total:
        return f"both {noun}s" if total == 2 else f"all {total} {noun}s"
    return f"{count} of the {total} {noun}s"


def sized(nbytes: int, digits: int = 2) -> str:
    """Returns bytes as a person writes them, in powers of ten: `1.50 GB`."""
    value, units = float(nbytes), ["B", "kB", "MB", "GB", "TB"]
    # What would be rounded to 1000 of a unit is 1 of the next.
    while value >= 1000 - 0.5 * 10**-digits and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{nbytes} B" if units[0] == "B" else f"{value:.{digits}f} {units[0]}"


def rated(nbytes: int, seconds: float) -> str:
    """Returns how fast bytes were restored: `3.21 GB/s`."""
    return f"{nbytes / max(seconds, 1e-9) / 1e9:.2f} GB/s"
