"""A changed optimizer gets each state's own values, or a question where several readings are equally good.

A longer run: `python -m tests.planning.mapping.test_chains FIRST_SEED COUNT`.
"""

import collections
import itertools
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
import pytest
from flax import nnx

from orbax_nnx_handler.planning.core.leaves import StoredLeaf
from orbax_nnx_handler.planning.core.recipes import reads
from orbax_nnx_handler.planning.options import RestoreOptions
from orbax_nnx_handler.planning.restore_plan import make_plan
from orbax_nnx_handler.planning.target import flatten_target
from tests.planning.mapping.chains import Keys, Program, State, flat, readings, states_of

Outcome = Literal["right", "asked", "refused", "wrong"]


def outcome(seed: int) -> tuple[Outcome, str]:
    """Restores one random chain into a changed one."""
    program = Program(seed)
    old = program.chain()
    new = program.changed(old)
    params = program.params()
    stored, wanted = states_of(old, params), states_of(new, params)
    best = readings(wanted, stored)
    got, asked = restored(wanted, stored, params)
    free = set(range(len(stored))).difference(*(reading.values() for reading in best))
    several, refused = False, ""
    for at, state in enumerate(wanted):
        possible = {reading.get(at) for reading in best}
        several |= len(possible) > 1
        # A chain in another order is another optimizer: its states are asked about.
        out = [at in moved(reading, wanted, stored) for reading in best]
        kept = [below for below in state.leaves if got.get((*state.place, *below)) is not None]
        if all(out) and kept:
            return "wrong", f"{state.place} is restored from a chain in another order"
        if any(out) and not kept:
            several = True
            continue
        # The group of parameters that a part is for may have changed: then some are missing.
        grown = {it for it in free if stored[it].like(state)} if possible == {None} else set[int]()
        for below in state.leaves:
            source = got.get((*state.place, *below))
            allowed = {None if it is None else (*stored[it].place, *below) for it in grown or possible}
            text = f"{state.place} {below} <- {source}, not {sorted(map(str, allowed))}"
            if source is not None and {source} != allowed:
                return "wrong", text
            if source is None and None not in allowed and len(possible) == 1 and not grown:
                refused = text
    if refused:
        return "refused", refused
    return (
        ("refused", "asked where one reading is best")
        if asked and not several
        else ("asked" if asked else "right", "")
    )


def moved(reading: Mapping[int, int], wanted: Sequence[State], stored: Sequence[State]) -> set[int]:
    """Returns the wanted states that are not in every longest run that rises, among those of one label."""
    alike: dict[Any, list[int]] = collections.defaultdict(list)
    for here, there in sorted(reading.items()):
        alike[_labels(wanted[here].place), _labels(stored[there].place)].append(here)
    out = set[int]()
    for group in alike.values():
        runs = [
            run
            for size in range(1, len(group) + 1)
            for run in itertools.combinations(group, size)
            if all(reading[a] < reading[b] for a, b in itertools.pairwise(run))
        ]
        longest = [set(run) for run in runs if len(run) == len(runs[-1])]
        out |= set(group) - set.intersection(*longest)
    return out


def _labels(place: Keys) -> tuple[Any, ...]:
    return tuple(place[at + 1] for at, key in enumerate(place[:-1]) if key == "inner_states")


def restored(wanted: Any, stored: Any, params: Any) -> tuple[dict[Keys, Keys], bool]:
    """Returns the stored place of each wanted optimizer leaf, and whether the plan asks about any."""
    leaves = {("params", *path): leaf for path, leaf in flat(params)}
    leaves |= {("opt_state", *s.place, *below): leaf for s in stored for below, leaf in s.leaves.items()}
    leaves[("step",)] = jax.ShapeDtypeStruct((), np.dtype("int32"))
    target = {("model", *path): nnx.Param(leaf) for path, leaf in flat(params)}
    target |= {
        ("optimizer", "opt_state", *s.place, *below): nnx.OptState(leaf)
        for s in wanted
        for below, leaf in s.leaves.items()
    }
    have = {path: StoredLeaf(path=path, shape=leaf.shape, dtype=leaf.dtype) for path, leaf in leaves.items()}
    plan = make_plan(flatten_target(nnx.from_flat_state(target)), have, RestoreOptions.of())
    assert all(path in plan.restored for path in target if path[0] == "model")
    found: dict[Keys, Keys] = {}
    for path, item in plan.restored.items():
        if path[0] == "optimizer":
            (source,) = reads(item.recipe)
            found[path[2:]] = source[1:]
    return found, any(
        way in str(fault) for way in ("in several ways", "in another order") for fault in plan.faults
    )


@pytest.mark.parametrize("first", range(0, 150, 50))
def test_no_state_of_a_changed_chain_is_another_ones(first: int) -> None:
    outcomes = {seed: outcome(seed) for seed in range(first, first + 50)}

    wrong = {seed: text for seed, (kind, text) in outcomes.items() if kind in ("wrong", "refused")}
    assert not wrong
    assert collections.Counter(kind for kind, _ in outcomes.values())["right"] > 25


if __name__ == "__main__":
    start, count = int(sys.argv[1]), int(sys.argv[2])
    counts = collections.Counter[str]()
    for number in range(start, start + count):
        ended, why = outcome(number)
        counts[ended] += 1
        if ended in ("wrong", "refused"):
            print(number, ended, why)
    print(dict(counts))
