"""A Linen tree in memory into NNX against a copy of the tree: `python -m benchmarks.in_memory`.

Both on the device, or both from NumPy's memory. What is compiled once is compiled before, but for the rows
"first call". Every value is checked.
"""

from benchmarks.measuring import arguments, interleaved, report, settings_of, summary, table
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
        for kind in ("", ", first call", ", NumPy"):
            names = [f"from_linen{kind}", f"copy{kind}"]
            found = interleaved(names, options.rounds, settings, toy=options.toy)
            ours, copy = (summary(model, found[name]) for name in names)
            for figure in ("seconds", "cpu_seconds"):
                ours[f"{figure} x copy"] = ours[figure] / copy[figure]
            rows |= dict(zip(names, (ours, copy), strict=True))
        results[title] = rows
        heading = f"**{title}**: {model.layers * model.projections} parameters, {model.nbytes / 1e9:.3g} GB"
        tables[heading] = table({"": name, **row} for name, row in rows.items())
    report("in_memory", options, results, tables)


if __name__ == "__main__":
    main()
