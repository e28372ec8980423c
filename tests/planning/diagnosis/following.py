"""Every hint is followed to the letter, and again where it leads: never away from what is stored.

The pairs are models of known programs and somebody else's NNX models of the same: those of
`shown_pairs.json` with rules written by hand, and those that the tests of `suggest` have. Each is begun
without rules, and with its rules but for one. What a hint proposes takes the place of what was passed.

The suite begins half of the pairs without rules, and the other half without one of theirs.
`python -m tests.planning.diagnosis.following` leaves out each of three, and exits 1 where a hint leads away.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from flax import nnx

import orbax_nnx_handler
from orbax_nnx_handler import RestoreError
from orbax_nnx_handler.planning.core.errors import Hint
from orbax_nnx_handler.planning.core.leaves import StoredLeaf
from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.options import RestoreOptions
from orbax_nnx_handler.planning.restore_plan import RestorePlan, make_plan
from orbax_nnx_handler.planning.suggesting import propose
from orbax_nnx_handler.planning.target import Target, flatten_target
from tests.planning.plans import evaluate

HERE = pathlib.Path(__file__).parent
SHOWN = json.loads((HERE / "shown_pairs.json").read_text())
FOREIGN = json.loads((HERE.parent / "suggesting" / "foreign_pairs.json").read_text())
KINDS = {"params": nnx.Param, "batch_stats": nnx.BatchStat}
NAMES = {name: getattr(orbax_nnx_handler, name) for name in orbax_nnx_handler.__all__}
DEPTH = 3


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
    """A checkpoint and a target, with rules that are right for every leaf in `truth`."""

    target: Target
    stored: Mapping[Path, StoredLeaf]
    rules: Sequence[Any]
    truth: Mapping[Path, Any]


def keys(path: str) -> Path:
    return tuple(int(key) if key.isdecimal() else key for key in path.split("/"))


def leaf(path: Path, shape: Sequence[int], dtype: str = "float32") -> StoredLeaf:
    return StoredLeaf(path=path, shape=tuple(shape), dtype=np.dtype(dtype))


@functools.cache
def pair(name: str) -> Pair:
    if name in SHOWN:
        given = SHOWN[name]
        stored = {tuple(path): leaf(tuple(path), shape, dtype) for path, shape, dtype in given["stored"]}
        wanted = [
            (tuple(path), next(getattr(nnx, kind) for kind in kinds if hasattr(nnx, kind)), shape, dtype)
            for path, kinds, shape, dtype, _ in given["wanted"]
        ]
        held = {tuple(path) for path, _, _, _, is_stored in given["wanted"] if is_stored}
        rules = [eval(text, {"__builtins__": {}}, NAMES) for text in given["rules"]]
    else:
        given = FOREIGN[name]
        stored = {
            tuple(path.split("/")): leaf(tuple(path.split("/")), s) for path, s in given["stored"].items()
        }
        wanted = [
            (keys(path), KINDS.get(kind, nnx.Variable), shape, "float32")
            for path, (shape, kind) in given["wanted"].items()
        ]
        held = {keys(path) for path in given["truth"]}
    state = [
        (path, kind(jax.ShapeDtypeStruct(tuple(shape), _dtype(dtype)))) for path, kind, shape, dtype in wanted
    ]
    target = flatten_target(nnx.from_flat_state(state))
    if name not in SHOWN:
        rules = list(proposed(Pair(target, stored, [], {})))
    found = Pair(target, stored, rules, {})
    truth = {
        path: value for path, value in values(plan_of(found, rules, "warn"), found).items() if path in held
    }
    return dataclasses.replace(found, truth=truth)


def _dtype(name: str) -> Any:
    return jax.random.key(0).dtype if name.startswith("key<") else name


@functools.cache
def proposed(given: Pair) -> Sequence[Any]:
    return propose(given.target, given.stored, RestoreOptions.of(policy="warn")).renames


def plan_of(given: Pair, rules: Sequence[Any], policy: Any) -> RestorePlan:
    options = RestoreOptions.of(renames=tuple(rules), policy=policy, init=lambda: None)
    return make_plan(given.target, given.stored, options)


def values(plan: RestorePlan, given: Pair) -> dict[Path, Any]:
    """Returns what a plan restores, where no element of the checkpoint is like another."""
    return {path: _value(given, item.recipe) for path, item in plan.restored.items()}


def _value(given: Pair, recipe: Any) -> bytes:
    return evaluate(recipe, _arrays(tuple(given.stored.values()))).tobytes()


@functools.cache
def _arrays(leaves: Sequence[StoredLeaf]) -> dict[Path, np.ndarray]:
    found, first = {}, 1
    for item in leaves:
        size = math.prod(item.shape)
        found[item.path] = np.arange(first, first + size, dtype="float64").reshape(item.shape)
        first += size
    return found


@dataclasses.dataclass(frozen=True)
class Standing:
    """Where somebody stands: what is passed, what comes of it, and the hint that was followed last."""

    rules: Sequence[Any]
    policy: Any
    right: int
    wrong: int
    trail: tuple[str, ...]
    last: Hint | None


def complaints(given: Pair, rules: Sequence[Any]) -> Iterator[str]:
    """Yields what is wrong with the hints that somebody meets who begins with some rules."""
    seen: set[str] = set()
    waiting = [(list(rules), "error", None)]
    while waiting:
        passed, policy, before = waiting.pop()
        if repr((passed, policy)) in seen:
            continue
        seen.add(repr((passed, policy)))
        trail = before.trail if before is not None else ()
        try:
            plan = plan_of(given, passed, policy)
        except RestoreError as error:
            if before is not None:
                yield f"{trail}: refused: {error}"
            continue
        found = values(plan, given)
        right = sum(found.get(path) == value for path, value in given.truth.items())
        wrong = sum(found.get(path, value) != value for path, value in given.truth.items())
        if before is not None and (right < before.right or wrong > before.wrong):
            yield f"{trail}: {right} right and {wrong} wrong leaves, {before.right} and {before.wrong} before"
        lost = [path for path in plan.missing if path in given.truth]
        if plan.fits and lost:
            yield f"{trail}: fits, and {lost} are stored"
        for hint in () if plan.fits else plan.error().hints:
            if before is not None and hint == before.last and right <= before.right:
                yield f"{trail}: said again, though it did not help: {hint.words}"
            elif len(trail) < DEPTH:
                here = Standing(passed, policy, right, wrong, (*trail, hint.words), hint)
                waiting += _followed(given, hint, here)


def _followed(given: Pair, hint: Hint, here: Standing) -> Iterator[tuple[Any, Any, Standing]]:
    arguments = dict(hint.arguments)
    if hint.command and "proposes" in hint.words:
        arguments = {"renames": proposed(given)}
    if arguments:
        yield list(arguments.get("renames", here.rules)), arguments.get("policy", here.policy), here


def left_out(name: str) -> list[int]:
    """Returns which rules of a pair are left out, one at a time."""
    count = len(pair(name).rules)
    return sorted({count // 5, count // 2, 4 * count // 5}) if count else []


def complaints_without(name: str, left: int) -> list[str]:
    """Returns what is wrong with the hints that are met under a pair's rules but for one."""
    given = pair(name)
    rules = [rule for at, rule in enumerate(given.rules) if at != left]
    # A square matrix that is not transposed fits: no plan can tell.
    return [said for said in complaints(given, rules) if not said.startswith("(): ")]


def main() -> int:
    """Leaves out three rules of each pair, one at a time."""
    bad = 0
    for name in [*SHOWN, *FOREIGN]:
        for left in left_out(name):
            for said in complaints_without(name, left):
                bad += 1
                print(f"{name} without {pair(name).rules[left]}: {said}")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
