"""What the command line takes: `python -m benchmarks.command_line`.

`plan` on 20,005 stored leaves, with the time that importing JAX takes for itself
beside it. The verdict is checked by its exit status.
"""

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.measuring import Row, arguments, command, program, report, table
from benchmarks.models import sized, write

MANY = 20005


def main() -> None:
    """Measures the verdict."""
    options = arguments(__doc__ or "")
    plans = _plans(options)
    report("command_line", options, {"plan": plans}, {"**plan**": _titled(plans)})


def _titled(rows: dict[str, Row]) -> str:
    return table({"": name, **row} for name, row in rows.items())


def _plans(options: Any) -> dict[str, Row]:
    leaves = 101 if options.toy else MANY
    path = str(write(sized(leaves, 50_000_000, compressed=True), options.scratch))
    commands = {
        "import jax": (["-c", "import jax"], 0),
        "import orbax_nnx_handler": (["-c", "import orbax_nnx_handler"], 0),
        "plan, fits": (command("plan", path, f"benchmarks.factory:wanted({leaves})"), 0),
        "plan, a layer is missing": (
            command("plan", path, f"benchmarks.factory:wanted({leaves}, 1)"),
            1,
        ),
    }
    trials: dict[str, list[Row]] = {name: [] for name in commands}
    for _ in range(options.rounds):
        for name, (words, status) in commands.items():
            trials[name].append(program(words, status, toy=options.toy))
    rows = {name: _medians(found) for name, found in trials.items()}
    alone = rows["import jax"]
    return {
        name: row
        | {
            "beyond JAX": row["seconds"] - alone["seconds"],
            "cpu beyond JAX": row["cpu_seconds"] - alone["cpu_seconds"],
        }
        for name, row in rows.items()
    }


def _medians(trials: Sequence[Row]) -> Row:
    return {key: statistics.median(row[key] for row in trials) for key in trials[0]}


if __name__ == "__main__":
    main()
