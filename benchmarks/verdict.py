"""The time from the call to the error: `python -m benchmarks.verdict`.

On a checkpoint that lacks a layer, beside the restore of the same checkpoint and
beside reading before checking; and on one of 20,005 leaves in every way in which a
target can differ from it (`benchmarks.broken`), each with the exponent of its
processor time against the leaves. The error's type and the number of leaves that
it lists are checked.
"""

import argparse
import math
import statistics

from benchmarks.broken import WAYS
from benchmarks.measuring import (
    Row,
    arguments,
    earlier,
    interleaved,
    report,
    settings_of,
    summary,
    table,
    trials,
)
from benchmarks.models import sized, write

MANY = 20005
FEWER = 2001
_TINY_BYTES = 2500
_BROKEN = "broken in every way"


def main() -> None:
    """Measures the verdicts."""
    options = arguments(__doc__ or "", choosable=True)
    results: dict[str, dict[str, Row]] = earlier("verdict", options) if options.only else {}
    tables = _beside_restores(options, results)
    rows = {way: _way(way, options) for way in WAYS if options.only in way}
    if rows:
        results[_BROKEN] = {**results.get(_BROKEN, {}), **rows}
        tables[f"**{_BROKEN}**"] = table({"": way, **row} for way, row in rows.items())
    report("verdict", options, results, tables)


def _beside_restores(options: argparse.Namespace, results: dict[str, dict[str, Row]]) -> dict[str, str]:
    """Adds the verdict on a missing layer beside restores of the same checkpoints; returns the tables."""
    tables: dict[str, str] = {}
    size = int(options.gb * 1e9)
    models = {
        "few leaves": sized(37, size),
        "many leaves": sized(100 if options.toy else MANY, min(size, 50_000_000), compressed=True),
    }
    for title in [title for title in models if options.only in title]:
        model = models[title]
        path = write(model, options.scratch)
        rounds = min(options.rounds, 3) if model.leaves > 5000 else options.rounds
        found = interleaved(
            ["verdict", "ours", "read_then_check"], rounds, settings_of(model, path), toy=options.toy
        )
        rows = {name: summary(model, trials) for name, trials in found.items()}
        for row in rows.values():
            row["of a restore"] = row["seconds"] / rows["ours"]["seconds"]
        results[title] = rows
        heading = f"**{title}**: {model.leaves} stored, {model.nbytes / 1e9:.3g} GB"
        tables[heading] = table({"": name, **row} for name, row in rows.items())
    return tables


def _way(way: str, options: argparse.Namespace) -> Row:
    """Returns the figures of one way to be broken, and how its time grows with the leaves."""
    # The target with an optimizer has three leaves for each stored one.
    share = 3 if way == "no optimizer" else 1
    counts = [17, 41] if options.toy else [FEWER, MANY]
    points: dict[int, list[Row]] = {}
    for count in counts:
        leaves = count // share
        model = sized(leaves, leaves * _TINY_BYTES, compressed=True)
        settings = settings_of(model, write(model, options.scratch), contestant=way)
        points[count] = [trials([settings], toy=options.toy)[0] for _ in range(min(options.rounds, 3))]
    fewer, many = (statistics.median(row["cpu_seconds"] for row in rows) for rows in points.values())
    seconds = [row["seconds"] for row in points[counts[-1]]]
    return {
        "seconds": statistics.median(seconds),
        "fastest": min(seconds),
        "slowest": max(seconds),
        "cpu_seconds": many,
        "MB": statistics.median(row["peak_bytes"] for row in points[counts[-1]]) / 1e6,
        "exponent": math.log(many / fewer) / math.log(counts[1] / counts[0]),
    }


if __name__ == "__main__":
    main()
