"""A Linen tree in memory into NNX against a copy of the tree: `python -m benchmarks.in_memory`.

Both on the device, or both from NumPy's memory, and both into memory that was not used before: the
result of a run before is kept. What is compiled once is compiled by that run, but for "first call".
Every value is checked.
"""

from benchmarks.measuring import arguments, interleaved, ratio, report, settings_of, summary, table
from benchmarks.models import sized, write


def main() -> None:
    """Measures leaves that are wanted as they are, layers taken apart, and layers stacked."""
    options = arguments(__doc__ or "")
    size = int(options.gb * 1e9)
    cases = {
        "as they are": sized(101, size),
        "taken apart": sized(101, size, stored="stacked"),
        "stacked": sized(101, size, wanted="stacked"),
    }
    results, tables = {}, {}
    for title, model in cases.items():
        settings = settings_of(model, write(model, options.scratch))
        rows = {}
        for names in (("from_linen", "from_linen, first call", "copy"), ("from_linen, NumPy", "copy, NumPy")):
            found = interleaved(names, options.rounds, settings, toy=options.toy)
            of_kind = {name: summary(model, trials) for name, trials in found.items()}
            for row in of_kind.values():
                for figure in ("seconds", "cpu_seconds"):
                    row[f"{figure} x copy"] = ratio(row[figure], of_kind[names[-1]][figure])
            rows |= of_kind
        results[title] = rows
        heading = f"**{title}**: {model.layers * model.projections} parameters, {model.nbytes / 1e9:.3g} GB"
        tables[heading] = table({"": name, **row} for name, row in rows.items())
    report("in_memory", options, results, tables)


if __name__ == "__main__":
    main()
