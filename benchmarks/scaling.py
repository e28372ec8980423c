"""Time and memory against the number of leaves and of layers: `python -m benchmarks.scaling`."""

import argparse
import importlib.util
import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.measuring import RESULTS, Row, arguments, interleaved, report, settings_of, summary, table
from benchmarks.models import Model, sized, write

_TINY_BYTES = 2500


def main() -> None:
    """Measures all curves and fits the exponent of each."""
    options = arguments(__doc__ or "")
    counts = [100, 200] if options.toy else [100, 500, 2000, 8000, 20000]
    depths = [2, 4] if options.toy else [2, 8, 32, 128]
    leaves = {n: sized(n + 1, n * _TINY_BYTES, compressed=True) for n in counts}
    width = 16 if options.toy else 512
    stack = {n: Model(layers=n, width=width, dtype="bfloat16", wanted="stacked") for n in depths}
    unstack = {n: Model(layers=n, width=width, dtype="bfloat16", stored="stacked") for n in depths}
    both = ["ours", "orbax"]
    curves = {
        "leaves": curve(leaves, both, options),
        "layers, stacked on the way": curve(stack, ["ours", "orbax_then_reshape"], options),
        "layers, unstacked on the way": curve(unstack, ["ours", "orbax_then_reshape"], options),
    }
    tables = {title: table(_lines(points)) for title, points in curves.items()}
    if not options.toy:
        _plot(curves, RESULTS / "scaling.svg")
    report("scaling", options, curves, tables)


def curve(
    models: Mapping[int, Model], contestants: Sequence[str], options: argparse.Namespace
) -> dict[str, dict[str, object]]:
    """Returns each contestant's figures by count, and the exponent of its time."""
    found: dict[str, dict[str, Row]] = {name: {} for name in contestants}
    for count, model in models.items():
        path = write(model, options.scratch)
        # Stock Orbax needs half a minute at 20,000 leaves.
        rounds = min(options.rounds, 3) if count > 5000 else options.rounds
        for name, trials in interleaved(
            contestants, rounds, settings_of(model, path), toy=options.toy
        ).items():
            found[name][str(count)] = summary(model, trials)
    return {name: {"exponent": exponent(rows), "points": rows} for name, rows in found.items()}


def exponent(rows: Mapping[str, Row]) -> float:
    """Returns the slope of log time over log count: 1 is linear."""
    counts = [math.log(int(count)) for count in rows]
    times = [math.log(row["seconds"]) for row in rows.values()]
    return float(np.polyfit(counts, times, 1)[0])


def _lines(points: Mapping[str, dict[str, object]]) -> list[Row]:
    lines: list[Row] = []
    for name, found in points.items():
        rows: Mapping[str, Row] = found["points"]  # type: ignore[assignment]
        seconds = {count: row["seconds"] for count, row in rows.items()}
        lines.append({"seconds at": name, **seconds, "exponent": found["exponent"]})
    return lines


def _plot(curves: Mapping[str, Mapping[str, dict[str, object]]], file: pathlib.Path) -> None:
    """Draws time over count, both logarithmic, where matplotlib is there."""
    if not importlib.util.find_spec("matplotlib"):
        return
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves), figsize=(4 * len(curves), 3.2), layout="constrained")
    for axis, (title, points) in zip(axes, curves.items(), strict=True):
        for name, found in points.items():
            rows: Mapping[str, Row] = found["points"]  # type: ignore[assignment]
            seconds = [row["seconds"] for row in rows.values()]
            axis.loglog([int(c) for c in rows], seconds, "o-", label=f"{name} ({found['exponent']:.2f})")
        axis.set(title=title, xlabel="count", ylabel="seconds")
        axis.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


if __name__ == "__main__":
    main()
