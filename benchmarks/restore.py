"""Restores of the same values by everyone: `python -m benchmarks.restore`.

Few large leaves, two thousand, twenty thousand; plain, compressed, Zarr 2; one
device and eight with sharded and replicated parameters; layers stacked and
unstacked on the way.
"""

import dataclasses
import importlib.util

from benchmarks.measuring import (
    Cache,
    Row,
    arguments,
    compared,
    earlier,
    interleaved,
    report,
    settings_of,
    table,
)
from benchmarks.models import Model, sized, write

READERS = ["ours", "orbax", "orbax_v1", "orbax_then_reshape", "tensorstore"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison.

    Attributes:
        title: What it shows.
        model: What is restored.
        contestants: Who restores it.
        placement: `one`, `sharded` or `replicated`.
        devices: Number of CPU devices, where there is no accelerator.
        cache: Whether the files are in the page cache.
        rounds: At most so many, for slow contestants.
    """

    title: str
    model: Model
    contestants: list[str]
    placement: str = "one"
    devices: int = 1
    cache: Cache = "warm"
    rounds: int = 100


def cases(gb: float, *, toy: bool) -> list[Case]:
    """Returns the comparisons for models of about `gb` · 1e9 bytes."""
    size = int(gb * 1e9)
    many = 24 if toy else 2169
    most = 40 if toy else 20005
    few = sized(37, size, dtype="bfloat16")
    middle = sized(many, size)
    # As small as in real models of so many leaves: counts, scales, low-rank factors.
    tiny = sized(most, min(size, 50_000_000), compressed=True)
    conversions = sized(33, size, dtype="bfloat16")
    both = ["ours", "orbax", "orbax_then_reshape"]
    eight = {"devices": 8, "contestants": ["ours", "orbax", "orbax_v1"]}
    others = ["safetensors"] if importlib.util.find_spec("safetensors") else []
    return [
        Case(title="37 leaves, bfloat16", model=few, contestants=[*READERS, *others]),
        Case(
            title="37 leaves, cold cache",
            model=few,
            contestants=["ours", "orbax", "tensorstore"],
            cache="cold",
        ),
        Case(title="37 leaves, zstd", model=dataclasses.replace(few, compressed=True), contestants=READERS),
        Case(title=f"{middle.leaves} leaves, float32", model=middle, contestants=[*READERS, *others]),
        Case(
            title=f"{middle.leaves} leaves, Zarr 2, zstd",
            model=dataclasses.replace(middle, zarr3=False, compressed=True),
            contestants=READERS,
        ),
        Case(title=f"{tiny.leaves} leaves, float32, zstd", model=tiny, contestants=READERS, rounds=3),
        Case(
            title=f"{middle.leaves} leaves, sharded over 8 devices",
            model=middle,
            placement="sharded",
            **eight,
        ),
        Case(
            title=f"{middle.leaves} leaves, replicated on 8 devices",
            model=middle,
            placement="replicated",
            **eight,
        ),
        Case(
            title="stack: 8 layers one by one to stacked",
            model=dataclasses.replace(conversions, wanted="stacked"),
            contestants=["ours", "orbax_then_reshape"],
        ),
        Case(
            title="unstack: 8 stacked layers to one by one",
            model=dataclasses.replace(conversions, stored="stacked"),
            contestants=["ours", "orbax_then_reshape"],
        ),
        Case(title="the same layers without conversion", model=conversions, contestants=both),
    ]


def run(case: Case, rounds: int, scratch: object, *, toy: bool) -> dict[str, Row]:
    """Returns the figures of each contestant, with ratios to stock Orbax where it takes part."""
    path = write(case.model, scratch)  # type: ignore[arg-type]
    settings = settings_of(case.model, path, placement=case.placement, devices=case.devices)
    trials = interleaved(case.contestants, min(rounds, case.rounds), settings, case.cache, toy=toy)
    return compared(case.model, trials, "orbax", "tensorstore")


def main() -> None:
    """Runs all comparisons."""
    options = arguments(__doc__ or "", choosable=True)
    results: dict[str, dict[str, Row]] = earlier("restore", options) if options.only else {}
    tables: dict[str, str] = {}
    for case in cases(options.gb, toy=options.toy):
        if options.only not in case.title:
            continue
        rows = run(case, options.rounds, options.scratch, toy=options.toy)
        results[case.title] = rows
        title = f"**{case.title}** ({case.model.nbytes / 1e9:.3g} GB, {case.cache} cache)"
        tables[title] = table({"": name, **row} for name, row in rows.items())
        print(f"{title}\n{tables[title]}\n", flush=True)
    report("restore", options, results, {})


if __name__ == "__main__":
    main()
