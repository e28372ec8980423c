"""The right verdict on every broken restore that is measured, in work that grows with the leaves."""

import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from benchmarks import planning, suggesting
from benchmarks.broken import VERDICTS, WAYS, target_of
from benchmarks.models import Model, placement, write
from orbax_nnx_handler.planning.core.leaves import StoredLeaf
from orbax_nnx_handler.planning.likeness.links import Findings, Link
from orbax_nnx_handler.planning.likeness.module_parts import Leaf
from orbax_nnx_handler.planning.likeness.named_parts import named_parts
from orbax_nnx_handler.planning.likeness.norms_of_layers import with_counted_parts
from orbax_nnx_handler.planning.likeness.shapes import Way
from orbax_nnx_handler.planning.options import RestoreOptions
from orbax_nnx_handler.planning.restore_plan import make_plan
from orbax_nnx_handler.planning.suggesting import matching_parts, propose
from orbax_nnx_handler.planning.suggesting.whole_modules import with_modules_asked
from orbax_nnx_handler.planning.target import flatten_target
from tests.sampled import every

FLOAT = np.dtype("float32")
TOY = Model(layers=10, width=4, compressed=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write(TOY, tmp_path_factory.mktemp("benchmarks"))


@pytest.mark.parametrize("way", WAYS)
def test_a_checkpoint_broken_in_this_way_gets_its_verdict(way: str, checkpoint: Any) -> None:
    call, collect = VERDICTS[way](TOY, checkpoint, placement("one"))

    error = call()

    collect(error)


def test_a_plan_under_many_rules_is_the_expected_one() -> None:
    state, stored, rules, expected = planning.problem(600, 11)

    plan = make_plan(flatten_target(state), stored, RestoreOptions.of(renames=rules))

    planning.check(plan, expected)


# Few leaves are looked at in another way than many where these ask for what could be meant.
OTHERWISE_FOR_FEW = {
    "the layers have another name",
    "all names differ",
    "all names differ, deep",
    "all names differ, one level",
    "half of the layers unexpected",
}


@pytest.mark.parametrize("way", every(3, WAYS))
def test_the_work_of_a_verdict_grows_no_faster_than_the_leaves(way: str) -> None:
    def verdict(layers: int) -> Callable[[], object]:
        target, stored, options = problem(way, layers)
        return lambda: str(make_plan(target, stored, options).error())

    # What grows with a square is bent half as much at half the size or a little less.
    size, bound = (30, 0.025) if way in OTHERWISE_FOR_FEW else (15, 0.01)

    assert bent(*lines_run(verdict, size)) < bound


# These ask for a rule for each layer, and each rule is tried on every leaf.
RULE_BY_RULE = {"all names differ", "all names differ, deep", "all names differ, one level", "another model"}


@pytest.mark.parametrize("way", every(2, [way for way in WAYS if way not in RULE_BY_RULE], 1))
def test_the_work_of_a_suggestion_grows_no_faster_than_the_leaves(way: str) -> None:
    def suggestion(layers: int) -> Callable[[], object]:
        target, stored, _ = problem(way, layers)
        return lambda: str(propose(target, stored, RestoreOptions.of(policy="warn")))

    assert bent(*lines_run(suggestion, 10)) < 0.03


def test_the_work_of_pairing_gates_grows_no_faster_than_the_leaves() -> None:
    def suggestion(layers: int) -> Callable[[], object]:
        target, stored, _ = suggesting.problem(suggesting.CASES["experts in joined names"], 192 * layers)
        return lambda: propose(target, stored, RestoreOptions.of())

    assert bent(*lines_run(suggestion, 2)) < 0.03


def test_the_work_of_telling_modules_by_their_shapes_grows_no_faster_than_the_leaves() -> None:
    def suggestion(modules: int) -> Callable[[], object]:
        parts = [(name, part, at) for at, name in enumerate(words(modules)) for part in (0, 1)]
        stored = {("params", name, "ab"[part], "kernel"): (part + 2, at + 3) for name, part, at in parts}
        wanted = {("net", f"{name}_x", "cd"[part], "kernel"): (part + 2, at + 3) for name, part, at in parts}
        target = nnx.from_flat_state(
            {path: nnx.Param(jax.ShapeDtypeStruct(shape, "float32")) for path, shape in wanted.items()}
        )
        leaves = {path: StoredLeaf(path=path, shape=shape, dtype=FLOAT) for path, shape in stored.items()}
        return lambda: propose(flatten_target(target), leaves, RestoreOptions.of())

    assert bent(*lines_run(suggestion, 50)) < 0.005


def test_the_work_of_asking_what_whole_layers_tell_of_torn_ones_grows_no_faster_than_these() -> None:
    def told(layers: int) -> Callable[[], object]:
        stored = [leaf(f"layers_{at}", f"Dense_{part}", "kernel") for at in range(layers) for part in (0, 1)]
        return lambda: with_counted_parts(Findings(), [leaf("unit", "up", "kernel")], stored, {})

    assert bent(*lines_run(told, 50)) < 0.005


def test_the_work_of_asking_which_networks_lie_beside_others_grows_no_faster_than_these() -> None:
    def asked(networks: int) -> Callable[[], object]:
        pairs = [(leaf("net", x, "up", "kernel"), leaf(x, "up", "kernel")) for x in words(networks)]
        links = [Link(wanted=(x,), stored=(y,), grounds="shapes", ways=((Way(()),),)) for x, y in pairs]
        return lambda: with_modules_asked(Findings(links=links), *zip(*pairs, strict=True))

    assert bent(*lines_run(asked, 50)) < 0.005


@pytest.mark.parametrize("case", suggesting.NOTHING_TELLS)
def test_where_no_part_can_be_compared_with_another_no_name_is_looked_at(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, stored, _ = suggesting.problem(suggesting.CASES[case], 1000)
    looked = list[int]()

    def named(parts: Sequence[Any], *args: Any) -> Any:
        looked.append(len(parts))
        return named_parts(parts, *args)

    monkeypatch.setattr(matching_parts, "named_parts", named)

    found = propose(target, stored, RestoreOptions.of())

    assert len(found.unmatched_wanted) == len(target.leaves)
    assert max(looked, default=0) < 20


def words(count: int) -> list[str]:
    """Returns names that mean nothing."""
    return ["".join(word) for word in itertools.islice(itertools.product("klmnprst", repeat=4), count)]


def leaf(*names: str) -> Leaf:
    """Returns a leaf of a model, all of one shape."""
    return Leaf(names=names, collection="params", shape=(2, 3), number="floating", source=names)


def problem(way: str, layers: int) -> tuple[Any, dict[Any, StoredLeaf], RestoreOptions]:
    """Returns target, stored leaves and options of a broken restore, in memory."""
    model = Model(layers=layers, width=4)
    broken = WAYS[way](model)
    paths = [
        ("params", f"layers_{n}", name, "kernel")
        for n in range(layers)
        for name in ("key", "out", "query", "value")
    ]
    stored = {path: StoredLeaf(path=path, shape=(4, 4), dtype=FLOAT) for path in paths}
    stored["step",] = StoredLeaf(path=("step",), shape=(), dtype=np.dtype("int32"))
    options = RestoreOptions.of(unexpected=broken.unexpected)
    return flatten_target(target_of(broken, model)), stored, options


def lines_run(problem_of: Callable[[int], Callable[[], object]], size: int) -> list[int]:
    """Counts what is run of a problem at one, two and three times the size."""
    few, more, most = (problem_of(times * size) for times in (1, 2, 3))
    most()  # What is set up once and kept is no part of it.
    return [_lines_run(call) for call in (most, more, few)][::-1]


def _lines_run(call: Callable[[], object]) -> int:
    """Counts the lines and returns that a call runs, each pass of a loop anew: no clock, no noise."""
    count = 0

    def inside(*_: Any) -> None:  # What returns nothing stays the one that is called.
        nonlocal count
        count += 1

    def trace(*_: Any) -> Any:
        return inside

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def bent(few: int, more: int, most: int) -> float:
    """Returns how far counts at one, two and three times the size are from a line, over the first."""
    return (most - 2 * more + few) / few
