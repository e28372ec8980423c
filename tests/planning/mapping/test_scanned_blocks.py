"""Layers that MaxText scans in blocks, under names of its own: joined by these names, or refused."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orbax_nnx_handler import ScanAxis, UnstackLayers
from orbax_nnx_handler.planning.core.errors import AmbiguousMappingError, MissingParamError
from tests.planning.mapping.scans import (
    Flat,
    Scan,
    assert_exact,
    assert_nothing_wrong,
    one_by_one,
    plan_of,
    stack_of,
)

GEMMA3 = Scan(name="layers", members="numbered", left_over="numbers")
GEMMA4 = {
    "Linen": Scan(left_over="modules"),
    "NNX": Scan(left_over="scan"),
    "converted": Scan(left_over="numbers"),
}
DEEPSEEK4 = Scan(members="numbered", local=1, prefix=3)
FAMILIES = ([GEMMA3], list(GEMMA4.values()), [DEEPSEEK4])

SCANS = st.builds(
    Scan,
    axis=st.integers(0, 1),
    local=st.just(0),
    left_over=st.sampled_from(["class", "remainder", "numbered"]),
    members=st.sampled_from(["named", "numbered"]),
)


@given(
    family=st.sampled_from(FAMILIES),
    axes=st.tuples(st.integers(0, 1), st.integers(0, 1)),
    local=st.integers(1, 5),
    cycles=st.integers(0, 5),
    data=st.data(),
)
def test_what_a_program_writes_becomes_what_any_of_its_family_wants(
    family: list[Scan], axes: tuple[int, int], local: int, cycles: int, data: st.DataObject
) -> None:
    prefix = family[0].prefix
    left_over = 0 if prefix else data.draw(st.integers(0, local))
    layers = stack_of(prefix + (local + 1) * cycles + left_over, local=local, prefix=prefix)
    programs = st.sampled_from([None, *family])
    sides = [
        one_by_one(layers)
        if program is None
        else dataclasses.replace(program, local=local, axis=axis).write(layers)
        for program, axis in zip((data.draw(programs), data.draw(programs)), axes, strict=True)
    ]

    plan, disk = plan_of(*sides)

    if plan.fits or axes == (1, 1):
        assert_exact(plan, disk, sides[1])
    else:
        # As MaxText is configured, it stacks on axis 1; elsewhere shapes alone may leave the axis open.
        assert_nothing_wrong(plan, disk, sides[1])
        with pytest.raises(AmbiguousMappingError, match="can be stacked on axis"):
            plan.check()


def test_as_many_cycles_as_local_layers_are_told_apart_by_the_global_layers() -> None:
    layers = stack_of(30, local=5)
    left, right = Scan(local=5).write(layers), one_by_one(layers)

    plan, disk = plan_of(left, right)

    assert_exact(plan, disk, right)


def test_a_remainder_alone_is_the_whole_model() -> None:
    layers = stack_of(3, local=5)
    left = {
        ("layers_remainder", f"layers_{n}", *p): v for n, layer in enumerate(layers) for p, v in layer.items()
    }
    right = one_by_one(layers)

    for stored, wanted in [(left, right), (right, left)]:
        plan, disk = plan_of(stored, wanted)

        assert_exact(plan, disk, wanted)


def test_a_remainder_whose_cycles_are_lost_is_never_taken_for_the_first_layers() -> None:
    layers = stack_of(8, local=5)
    rest = {
        ("layers_remainder", f"layers_{n}", *p): v
        for n, layer in enumerate(layers[6:])
        for p, v in layer.items()
    }

    plan, _ = plan_of(rest, one_by_one(layers))

    assert {path[-1] for path in plan.restored} == {"embedding", "scale"}
    assert len(plan.missing) == 2 * len(one_by_one(layers))


@pytest.mark.parametrize(
    ("stored", "wanted"), [("scanned_blocks", "local_layers"), ("scanned_blocks", "global_layer")]
)
def test_a_lost_member_is_never_filled_from_another(stored: str, wanted: str) -> None:
    layers = stack_of(8, local=2)
    left = {path: value for path, value in Scan().write(layers).items() if path[:2] != (stored, wanted)}
    right = one_by_one(layers)

    plan, disk = plan_of(left, right)

    assert_nothing_wrong(plan, disk, right)


@pytest.mark.parametrize("lost", range(7))
def test_a_lost_layer_is_never_made_up_for_by_its_neighbours(lost: int) -> None:
    layers = stack_of(7, local=2)
    left = {path: value for path, value in one_by_one(layers).items() if path[0] != f"layers_{lost}"}
    right = Scan().write(layers)

    plan, disk = plan_of(left, right)

    assert_nothing_wrong(plan, disk, right)


def test_a_lost_weight_of_one_member_is_missing_in_its_layers_and_in_no_other() -> None:
    layers = stack_of(6, local=2)
    left = {
        path: v for path, v in Scan().write(layers).items() if path[1:] != ("local_layers", "norm", "scale")
    }
    right = one_by_one(layers)

    plan, disk = plan_of(left, right)

    assert_nothing_wrong(plan, disk, right)
    assert {path[2] for path in plan.missing if path[0] == "model"} == {f"layers_{n}" for n in (0, 1, 3, 4)}


@pytest.mark.parametrize(
    ("name", "renamed"),
    [("scanned_blocks", "blocks"), ("local_layers", "local_layers_old"), ("global_layer", "global")],
)
def test_a_renamed_scan_or_member_is_a_missing_weight(name: str, renamed: str) -> None:
    layers = stack_of(6, local=2)
    left = {
        tuple(renamed if key == name else key for key in path): value
        for path, value in Scan().write(layers).items()
    }
    right = one_by_one(layers)

    plan, _ = plan_of(left, right)

    assert {path[-1] for path in plan.restored} == {"embedding", "scale"}
    with pytest.raises(MissingParamError):
        plan.check()


def test_members_of_one_shape_keep_the_order_of_the_block() -> None:
    layers = stack_of(4, local=1, unlike=False)
    left, right = Scan(local=1).write(layers), one_by_one(layers)

    plan, disk = plan_of(left, right)

    assert_exact(plan, disk, right)


@pytest.mark.parametrize("count", [4, 5])
@pytest.mark.parametrize("name", GEMMA4)
def test_layers_behind_the_last_block_keep_their_numbers(name: str, count: int) -> None:
    layers = stack_of(count, local=2, unlike=False)
    scan, flat = GEMMA4[name].write(layers), one_by_one(layers)

    for stored, wanted in ((scan, flat), (flat, scan)):
        plan, disk = plan_of(stored, wanted)
        assert_exact(plan, disk, wanted)


BLOCKS = {
    "pairs": Scan(name="layers", members="numbered", left_over="numbers", local=1),
    "threes": Scan(name="layers", members="numbered", left_over="numbers"),
    "pairs behind one": Scan(members="numbered", left_over="numbers", local=1, prefix=1),
    "pairs behind two": Scan(members="numbered", left_over="numbers", local=1, prefix=2),
    "named threes": Scan(left_over="numbers"),
}


@pytest.mark.parametrize("count", [6, 7])
@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        (s, w)
        for s, w in itertools.permutations(BLOCKS, 2)
        if {s, w} != {"pairs behind one", "pairs behind two"}
    ],
)
def test_blocks_become_other_blocks_though_all_leaves_have_an_axis_of_features(
    stored: str, wanted: str, count: int
) -> None:
    # Sixteen cycles would be possible too, along the features.
    shapes = {("attention", "query"): (16, 8), ("attention", "value"): (8, 16), ("norm", "scale"): (16,)}
    values = iter(range(count * 10_000))
    layers: list[Flat] = [
        {
            path: np.fromiter(values, np.float32, count=int(np.prod(shape))).reshape(shape)
            for path, shape in shapes.items()
        }
        for _ in range(count)
    ]
    left, right = BLOCKS[stored].write(layers), BLOCKS[wanted].write(layers)

    plan, disk = plan_of(left, right)

    assert_exact(plan, disk, right)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("prefixes", [(2, 1), (1, 2)], ids=str)
def test_a_scan_that_begins_at_another_layer_is_never_taken_for_that_of_its_name(
    prefixes: tuple[int, int], wide: bool
) -> None:
    layers = stack_of(6, local=1, unlike=False)
    if wide:  # All leaves have as many features as another number of cycles would be.
        layers = [
            {path: np.resize(value, (6,) * value.ndim) for path, value in one.items()} for one in layers
        ]
    left, right = (
        Scan(members="numbered", left_over="numbers", local=1, prefix=prefix).write(layers)
        for prefix in prefixes
    )

    plan, _ = plan_of(left, right, policy="warn")

    with pytest.raises(AmbiguousMappingError) as caught:
        plan.check()
    told = f"{prefixes[0]} layers lie before it there, and {prefixes[1]} here (law 5)"
    assert str(caught.value).count(told) >= 6
    assert "a rule says" not in str(caught.value)


def test_a_remainder_alone_is_not_the_layers_behind_a_scan_that_is_left_behind() -> None:
    layers = stack_of(4, local=2, unlike=False)
    program = Scan(left_over="numbers")

    plan, _ = plan_of(program.write(layers), program.write(layers[:1]), policy="warn")

    with pytest.raises(AmbiguousMappingError, match="3 layers lie before it there, and 0 here"):
        plan.check()


def test_the_evidence_names_the_place_in_the_source() -> None:
    layers = stack_of(3, local=2)

    plan, _ = plan_of(Scan().write(layers), one_by_one(layers))

    evidence = plan.restored["model", "decoder", "layers_0", "norm", "scale"].evidence
    assert evidence.kind == "layout"
    assert evidence.words.startswith("layer i of decoder/layers, axis 1 (names of models/gemma4.py")


@pytest.mark.parametrize("program", [*GEMMA4.values(), DEEPSEEK4], ids=str)
def test_the_names_are_no_evidence_in_another_layout(program: Scan) -> None:
    layers = stack_of(8, local=program.local, prefix=program.prefix)
    left, right = program.write(layers), one_by_one(layers)

    plan, disk = plan_of(left, right, variables=())

    assert_nothing_wrong(plan, disk, right)
    with pytest.raises(MissingParamError):
        plan.check()


@pytest.mark.parametrize(
    "second",
    [
        {"layers_9": "after"},
        {"Gemma4DecoderLayerToLinen_0": "rest", "Gemma4DecoderLayerToLinen_1": "rest"},
        {"layers_remainder/layers_0": "rest"},
    ],
    ids=str,
)
def test_a_second_home_of_a_layer_is_never_chosen(second: dict[str, str]) -> None:
    layers = stack_of(8, local=2)
    left, right = Scan().write(layers), one_by_one(layers)
    left |= {(*name.split("/"), *path): value + 1 for name in second for path, value in layers[6].items()}

    plan, disk = plan_of(left, right)

    assert_nothing_wrong(plan, disk, right)


def test_all_layers_one_by_one_beside_a_scan_of_them_are_a_question() -> None:
    layers = stack_of(6, local=2)
    right = one_by_one(layers)

    plan, disk = plan_of(Scan().write(layers) | right, right)

    assert_nothing_wrong(plan, disk, right)
    with pytest.raises(AmbiguousMappingError):
        plan.check()


def test_rules_join_what_only_order_and_shape_would() -> None:
    layers = stack_of(4, local=1)
    left, right = Scan(local=1, name="blocks").write(layers), one_by_one(layers)
    rules: list[Any] = [
        UnstackLayers("blocks/global_layer", "global_{i}", 1),
        UnstackLayers("blocks/local_layers", "cycle_{i}", 1),
        *(UnstackLayers(f"cycle_{at}", f"local_{at}_{{i}}", 1) for at in range(2)),
        *((f"local_{at}_0", f"layers_{2 * at}") for at in range(2)),
        *((f"global_{at}", f"layers_{2 * at + 1}") for at in range(2)),
    ]

    refused, _ = plan_of(left, right)
    plan, disk = plan_of(left, right, renames=rules)

    with pytest.raises(MissingParamError):
        refused.check()
    assert_exact(plan, disk, right)


@pytest.mark.parametrize("name", ["layers", "scanned_blocks"])
def test_a_rule_says_the_axis_where_the_program_was_configured_otherwise(name: str) -> None:
    layers: list[Flat] = [{("kernel",): np.arange(4.0, dtype=np.float32).reshape(2, 2) + n} for n in range(4)]
    right = one_by_one(layers)

    for axis in (0, 1, 2):
        left = Scan(local=1, members="numbered", axis=axis).write(layers)
        plan, disk = plan_of(left, right, renames=[ScanAxis(f"decoder/{name}", axis)])

        assert_exact(plan, disk, right)
