"""The long form: `python -m tests.laws.fuzz --trees 20000`. Exits 1 where a value was silently wrong."""

import argparse
import collections
import os
import pathlib
import sys
import tempfile
import time

# Before JAX is imported: targets are spread over eight devices with --shard.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
    )

from absl import logging

from tests.laws.fuzz.placements import try_placed
from tests.laws.fuzz.programs import try_program
from tests.laws.fuzz.renamed import try_renamed
from tests.laws.fuzz.replaced import try_replaced
from tests.laws.fuzz.round_trips import try_round_trip
from tests.laws.fuzz.trial import Outcome, try_seed

RESULTS = ("right", "refused", "refused without need", "wrong", "crashed")
ANSWERS = ("must restore", "may refuse", "must refuse")
EVERY = 20
"""One tree in so many is written and restored; of the others the plan is made and carried out in NumPy."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.laws.fuzz", description=__doc__)
    parser.add_argument("--trees", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="the first; each tree has a seed of its own")
    parser.add_argument("--shard", action="store_true", help="restore the written ones over eight devices")
    parser.add_argument("--real", type=int, default=EVERY, help="write and restore one tree in so many")
    parser.add_argument("--save", action="store_true", help="save random NNX states and restore them instead")
    parser.add_argument("--programs", action="store_true", help="save random programs, restore changed ones")
    parser.add_argument("--rules", action="store_true", help="random programs, restored under rules")
    parser.add_argument("--networks", action="store_true", help="rules that put networks in others' places")
    parser.add_argument("--placed", action="store_true", help="save random programs of several networks")
    parser.add_argument("--examples", type=int, default=10, help="how many of each fault are shown")
    options = parser.parse_args()
    logging.set_verbosity(logging.FATAL)
    start, outcomes = time.monotonic(), list[Outcome]()
    for seed in range(options.seed, options.seed + options.trees):
        with tempfile.TemporaryDirectory() as place:
            real = seed % options.real == 0
            if options.save:
                outcomes.append(try_round_trip(seed, pathlib.Path(place)))
            elif options.rules:
                outcomes.append(try_renamed(seed, pathlib.Path(place)))
            elif options.networks:
                outcomes.append(try_replaced(seed, pathlib.Path(place)))
            elif options.placed:
                outcomes.append(try_placed(seed, pathlib.Path(place)))
            elif options.programs:
                outcomes.append(try_program(seed, pathlib.Path(place)))
            else:
                outcomes.append(try_seed(seed, pathlib.Path(place) if real else None, shard=options.shard))
        _show(outcomes, options.examples)
    print(table(outcomes), f"\n{(time.monotonic() - start) / options.trees * 1000:.0f} ms a tree")
    bad = sum(outcome.result in ("wrong", "crashed") for outcome in outcomes)
    return int(bad > 0 or needless(outcomes) > 0.02)


def _show(outcomes: list[Outcome], most: int) -> None:
    last = outcomes[-1]
    if last.result in RESULTS[2:] and sum(outcome.result == last.result for outcome in outcomes) <= most:
        print(f"seed {last.seed}: {last.result} ({last.answer}): {last.detail}", flush=True)


def needless(outcomes: list[Outcome]) -> float:
    """Returns the share refused of the trees with one reading only."""
    one = [outcome for outcome in outcomes if outcome.answer == "must restore"]
    return sum(outcome.result == "refused without need" for outcome in one) / max(len(one), 1)


def table(outcomes: list[Outcome]) -> str:
    """Returns the counts of every result, by what the laws demand and by what was done to the tree."""
    counts = collections.Counter((outcome.answer, outcome.result) for outcome in outcomes)
    kinds = collections.Counter((outcome.change or "(nothing)", outcome.result) for outcome in outcomes)
    rows = [("", *RESULTS)]
    rows += [(answer, *(str(counts[answer, result]) for result in RESULTS)) for answer in ANSWERS]
    changes = sorted({change for change, _ in kinds})
    rows += [(change, *(str(kinds[change, result]) for result in RESULTS)) for change in changes]
    lines = ["".join(f"{cell:>22}" if at else f"{cell:26}" for at, cell in enumerate(row)) for row in rows]
    return "\n".join([*lines, f"refused of those with one reading only: {needless(outcomes):.1%}"])


if __name__ == "__main__":
    sys.exit(main())
