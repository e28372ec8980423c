"""How long a plan of 20,000 leaves under 50 rules takes, and whether it is right.

    python -m benchmarks.planning

The model is made up: blocks of dense layers under automatic names, each with its
moments. Every restored leaf is compared with the stored path that a loop over
the same names gives, so that a fast wrong plan fails. The share is that of the laws
which certify the plan (`planning/verdict/laws.py`), of the planner's processor time.
"""

import statistics
import time
from typing import Any
from unittest import mock

import jax
import numpy as np
from flax import nnx

from benchmarks.measuring import Row, arguments, report, table
from orbax_nnx_handler import Rename, Transpose
from orbax_nnx_handler.planning import verdict
from orbax_nnx_handler.planning.core.leaves import StoredLeaf
from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.core.recipes import reads
from orbax_nnx_handler.planning.options import RestoreOptions
from orbax_nnx_handler.planning.restore_plan import RestorePlan, make_plan
from orbax_nnx_handler.planning.target import flatten_target
from orbax_nnx_handler.planning.verdict.laws import certify
from orbax_nnx_handler.storage import paused_collection

FLOAT = np.dtype("float32")
SHAPE = (4, 8)
MEASURED = ("seconds", "cpu_seconds", "share of the laws")


def names_of(rules: int) -> list[tuple[str, str]]:
    """Returns the stored and the wanted name of each module of a block; a rule for each, less one."""
    return [(f"Dense_{at}", f"part_{chr(97 + at // 26)}{chr(97 + at % 26)}") for at in range(rules - 1)]


def problem(leaves: int, rules: int) -> tuple[Any, dict[Path, StoredLeaf], tuple[Any, ...], dict[Path, Path]]:
    """Returns target, stored leaves, rules, and the stored path of each wanted one."""
    names = names_of(rules)
    blocks = leaves // (len(names) * 3)
    stored, wanted, expected = dict[Path, StoredLeaf](), list[tuple[Path, Any]](), dict[Path, Path]()
    for block in range(blocks):
        for before, after in names:
            theirs, ours = (f"Block_{block}", before, "kernel"), ("blocks", block, after, "kernel")
            tops: tuple[tuple[Path, Path, type[Any]], ...] = (
                (("params",), ("model",), nnx.Param),
                (("opt_state", 0, "mu"), ("optimizer", "opt_state", 0, "mu"), nnx.optimizer.OptArray),
                (("opt_state", 0, "nu"), ("optimizer", "opt_state", 0, "nu"), nnx.optimizer.OptArray),
            )
            for top, top_wanted, kind in tops:
                path = (*top, *theirs)
                stored[path] = StoredLeaf(path=path, shape=SHAPE, dtype=FLOAT)
                wanted.append(((*top_wanted, *ours), kind(jax.ShapeDtypeStruct(SHAPE[::-1], FLOAT))))
                expected[(*top_wanted, *ours)] = path
    renames = tuple(Rename(f"Block_{{i}}/{a}", f"blocks/{{i}}/{b}") for a, b in names)
    return nnx.from_flat_state(wanted), stored, (*renames, Transpose("*/kernel", (1, 0))), expected


def check(plan: RestorePlan, expected: dict[Path, Path]) -> None:
    """Raises where the plan is not the expected one."""
    plan.check()
    found = {path: tuple(reads(item.recipe)) for path, item in plan.restored.items()}
    if found != {path: (source,) for path, source in expected.items()}:
        raise SystemExit("the plan is wrong")


def timed_laws(took: list[float]) -> Any:
    """Adds to a list the processor time of each certificate, as long as the context is open."""

    def timed(*arguments: Any) -> Any:
        start = time.process_time()
        broken = certify(*arguments)
        took.append(time.process_time() - start)
        return broken

    return mock.patch.object(verdict, "certify", timed)


def planned(leaves: int, rules: int) -> Row:
    """Plans once, checks the plan, and returns what the planner alone took."""
    state, stored, renames, expected = problem(leaves, rules)
    target, options = flatten_target(state), RestoreOptions.of(renames=renames)
    laws: list[float] = []
    cpu, start = time.process_time(), time.perf_counter()
    with timed_laws(laws), paused_collection():  # As `plan_restore` and `restore` plan.
        plan = make_plan(target, stored, options)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    check(plan, expected)
    row: Row = {"leaves": len(stored), "rules": len(renames), "seconds": seconds, "cpu_seconds": cpu}
    return row | {"share of the laws": sum(laws) / cpu}


def main() -> None:
    """Measures the planner in this process; the profile is `python -m cProfile -m benchmarks.planning`."""
    options = arguments(__doc__ or "")
    sizes = [(600, 11)] if options.toy else [(20_000, 2), (20_000, 50), (5_000, 50)]
    rows: list[Row] = []
    for leaves, rules in sizes:
        trials = [planned(leaves, rules) for _ in range(options.rounds)]
        medians = {key: statistics.median(row[key] for row in trials) for key in MEASURED}
        rows.append(trials[0] | medians)
    report("planning", options, rows, {"**plan in memory**": table(rows)})


if __name__ == "__main__":
    main()
