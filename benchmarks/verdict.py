"""The time from the call to the error on a checkpoint that lacks a layer: `python -m benchmarks.verdict`."""

from benchmarks.measuring import arguments, interleaved, report, settings_of, summary, table
from benchmarks.models import sized, write


def main() -> None:
    """Measures verdicts beside the restore of the same checkpoint and beside reading before checking."""
    options = arguments(__doc__ or "")
    size = int(options.gb * 1e9)
    models = {
        "few leaves": sized(37, size),
        "many leaves": sized(100 if options.toy else 20005, min(size, 50_000_000), compressed=True),
    }
    results, tables = {}, {}
    for title, model in models.items():
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
    report("verdict", options, results, tables)


if __name__ == "__main__":
    main()
