"""Saves against the parent handler's: `python -m benchmarks.save`."""

from benchmarks.measuring import arguments, compared, interleaved, report, settings_of, table
from benchmarks.models import sized, write


def main() -> None:
    """Measures saves of few and of many leaves; every value is read back by stock Orbax."""
    options = arguments(__doc__ or "")
    size = int(options.gb * 1e9)
    results, tables = {}, {}
    for leaves in (37, 24 if options.toy else 2169):
        model = sized(leaves, size)
        path = write(model, options.scratch)
        for what, ours, parents in (
            ("", "save_ours", "save_orbax"),
            (", until it goes on in the background", "begin_ours", "begin_orbax"),
        ):
            settings = settings_of(model, path)
            found = interleaved([ours, parents], options.rounds, settings, toy=options.toy)
            rows = compared(model, found, parents)
            results[f"{model.leaves} leaves{what}"] = rows
            heading = f"**{model.leaves} leaves{what}**, {model.nbytes / 1e9:.3g} GB"
            tables[heading] = table({"": name, **row} for name, row in rows.items())
    report("save", options, results, tables)


if __name__ == "__main__":
    main()
