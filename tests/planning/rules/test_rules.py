"""Rules with transforms: values compared with NumPy's own operations, errors word for word."""

import math
import re

import jax
import numpy as np
import pytest
from flax import nnx

import orbax_nnx_handler as onh
from orbax_nnx_handler import (
    Cast,
    Copy,
    Drop,
    Fuse,
    Rename,
    Repeat,
    Reshape,
    RuleError,
    Scale,
    ScanAxis,
    Split,
    StackLayers,
    Transpose,
    UnstackLayers,
    invert,
)
from tests.planning.plans import params, plan_of, values_of

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype("float32")


def restored(target: object, stored: object, *rules: object) -> dict[str, np.ndarray]:
    plan = plan_of(nnx.State(params(target)), stored, rules)
    plan.check()
    return values_of(plan, stored)


def failure(target: object, stored: object, *rules: object) -> str:
    """Returns the message of the error that the rules lead to, without the checkpoint's line."""
    with pytest.raises(RuleError) as raised:
        restored(target, stored, *rules)
    return str(raised.value).split("\ncheckpoint:")[0]


KERNEL, BIAS = normal(3, 4), normal(4)
DENSE = {"params": {"dense": {"kernel": KERNEL, "bias": BIAS}}}


def test_transpose_moves_the_axes_of_what_it_matches_and_of_nothing_else():
    values = restored({"dense": {"kernel": (4, 3), "bias": (4,)}}, DENSE, Transpose("dense/kernel", (1, 0)))

    np.testing.assert_array_equal(values["dense/kernel"], KERNEL.T)
    np.testing.assert_array_equal(values["dense/bias"], BIAS)


def test_reshape_keeps_the_elements_in_c_order():
    values = restored({"dense": {"kernel": (2, 6), "bias": (4,)}}, DENSE, Reshape("kernel", (2, 6)))

    np.testing.assert_array_equal(values["dense/kernel"], KERNEL.reshape(2, 6))


def test_split_cuts_every_leaf_below_the_pattern_in_order():
    stored = {"params": {"qkv": {"kernel": normal(2, 6), "bias": normal(6)}}}
    wanted = {name: {"kernel": (2, 2), "bias": (2,)} for name in ("q", "k", "v")}

    values = restored(wanted, stored, Split("qkv", ("q", "k", "v"), axis=-1))

    for at, name in enumerate(("q", "k", "v")):
        for leaf in ("kernel", "bias"):
            expected = np.split(stored["params"]["qkv"][leaf], 3, axis=-1)[at]
            np.testing.assert_array_equal(values[f"{name}/{leaf}"], expected)


def test_split_takes_sizes():
    stored = {"params": {"wide": normal(5, 2)}}

    values = restored({"a": (1, 2), "b": (4, 2)}, stored, Split("wide", ("a", "b"), axis=0, sizes=(1, 4)))

    np.testing.assert_array_equal(values["a"], stored["params"]["wide"][:1])
    np.testing.assert_array_equal(values["b"], stored["params"]["wide"][1:])


def test_fuse_joins_in_the_order_of_the_patterns_in_every_place_they_occur():
    stored = {"params": {f"layer_{i}": {"up": normal(2, 3), "gate": normal(2, 3)} for i in range(2)}}

    values = restored(
        {"layer": {i: {"both": (2, 6)} for i in range(2)}}, stored, Fuse(("gate", "up"), "both", axis=1)
    )

    for i in range(2):
        layer = stored["params"][f"layer_{i}"]
        expected = np.concatenate([layer["gate"], layer["up"]], axis=1)
        np.testing.assert_array_equal(values[f"layer/{i}/both"], expected)


def test_layers_are_stacked_by_number_not_by_name():
    stored = {"params": {f"Block_{i}": {"kernel": normal(2, 3)} for i in range(11)}}

    values = restored({"blocks": {"kernel": (2, 11, 3)}}, stored, StackLayers("Block_{i}", "blocks", axis=1))

    expected = np.stack([stored["params"][f"Block_{i}"]["kernel"] for i in range(11)], axis=1)
    np.testing.assert_array_equal(values["blocks/kernel"], expected)


def test_stacked_layers_are_taken_apart():
    stored = {"params": {"ScanBlock_0": {"kernel": normal(2, 3, 4)}}}

    values = restored(
        {"blocks": {i: {"kernel": (2, 4)} for i in range(3)}},
        stored,
        UnstackLayers("ScanBlock_0", "blocks/{i}", axis=1),
    )

    for i in range(3):
        expected = stored["params"]["ScanBlock_0"]["kernel"][:, i]
        np.testing.assert_array_equal(values[f"blocks/{i}/kernel"], expected)


def test_cast_lets_integers_become_floats():
    stored = {"params": {"table": np.arange(6, dtype="int8").reshape(2, 3)}}

    refused = plan_of(nnx.State(params({"table": (2, 3)})), stored)
    values = restored({"table": (2, 3)}, stored, Cast("table", "float32"))

    assert isinstance(refused.error(), onh.DtypeMismatchError)
    np.testing.assert_array_equal(values["table"], np.arange(6, dtype="float32").reshape(2, 3))


def test_a_cast_must_give_the_dtype_that_the_target_wants():
    plan = plan_of(
        nnx.State(params({"dense": {"kernel": (3, 4), "bias": (4,)}})), DENSE, [Cast("kernel", "bfloat16")]
    )

    (found,) = plan.mismatched.values()

    assert (found.kind, found.stored_dtype, str(found.wanted.dtype)) == ("dtype", "bfloat16", "float32")


def test_scale_multiplies_every_element():
    values = restored({"dense": {"kernel": (3, 4), "bias": (4,)}}, DENSE, Scale("kernel", 0.25))

    np.testing.assert_array_equal(values["dense/kernel"], KERNEL * np.float32(0.25))


def test_a_dropped_leaf_is_shown_with_its_reason_and_is_not_unexpected():
    plan = plan_of(
        nnx.State(params({"dense": {"kernel": (3, 4)}})),
        DENSE,
        [Drop("dense/bias", "the new model has none")],
        unexpected="error",
    )

    plan.check()

    assert not plan.unexpected
    assert [(path, item.reason) for path, item in plan.dropped.items()] == [
        (("params", "dense", "bias"), "the new model has none")
    ]


def test_rules_apply_in_order_each_on_what_the_last_one_left():
    stored = {"params": {"attn": {"qkv": normal(6, 2)}}}

    values = restored(
        {"attention": {"query": (2, 3), "key": (2, 3)}},
        stored,
        ("attn", "attention"),
        Transpose("attention/qkv", (1, 0)),
        Split("attention/qkv", ("attention/q", "attention/k"), axis=1),
        ("q", "query"),
        Rename("k", "key"),
    )

    query, key = np.split(stored["params"]["attn"]["qkv"].T, 2, axis=1)
    np.testing.assert_array_equal(values["attention/query"], query)
    np.testing.assert_array_equal(values["attention/key"], key)


def test_a_pattern_may_begin_at_the_root_of_the_stored_path():
    values = restored(
        {"dense": {"kernel": (4, 3), "bias": (4,)}}, DENSE, Transpose("params/dense/kernel", (1, 0))
    )

    np.testing.assert_array_equal(values["dense/kernel"], KERNEL.T)


def test_a_transposed_gate_still_goes_into_the_fused_cell():
    gates = {side + gate: {"kernel": normal(2, 3)} for side in "ih" for gate in "ifgo"}

    values = restored(
        {"cell": {"dense_i": {"kernel": (3, 8)}, "dense_h": {"kernel": (3, 8)}}},
        {"params": {"cell": gates}},
        Transpose("cell/*/kernel", (1, 0)),
    )

    expected = np.concatenate([gates["i" + gate]["kernel"].T for gate in "ifgo"], axis=1)
    np.testing.assert_array_equal(values["cell/dense_i/kernel"], expected)


def test_the_scan_axis_decides_what_shapes_leave_open():
    stored = {"params": {"layers": {"kernel": normal(3, 3, 5)}}}
    wanted = {"layers": {i: {"kernel": (3, 5)} for i in range(3)}}

    unclear = plan_of(nnx.State(params(wanted)), stored).error()
    values = {axis: restored(wanted, stored, ScanAxis("layers", axis)) for axis in (0, 1)}

    assert isinstance(unclear, onh.AmbiguousMappingError)
    assert "renames=[ScanAxis('layers', 0)]" in str(unclear)
    for axis in (0, 1):
        expected = np.take(stored["params"]["layers"]["kernel"], 2, axis)
        np.testing.assert_array_equal(values[axis]["layers/2/kernel"], expected)


@pytest.mark.parametrize("cast", ["a", "c", "both"])
def test_a_cast_of_one_of_two_copies_is_never_one_of_the_other(cast):
    stored = {"params": {"a": {"k": KERNEL}}}
    target = {name: {"k": nnx.Param(jax.ShapeDtypeStruct((3, 4), "int32"))} for name in ("a", "c")}
    rules = [Copy("a", "c"), *(Cast(name, "int32") for name in ("a", "c") if cast in (name, "both"))]

    plan = plan_of(nnx.State(target), stored, rules) if cast == "both" else None
    if plan is None:
        with pytest.raises(RuleError, match="and not for these") as raised:
            plan_of(nnx.State(target), stored, rules)
        assert "in front of the Copy" in str(raised.value)
        plan = plan_of(nnx.State(target), stored, [Cast("a", "int32"), Copy("a", "c")])
    plan.check()

    for name in ("a/k", "c/k"):
        np.testing.assert_array_equal(values_of(plan, stored)[name], KERNEL.astype("int32"))


# What cannot be done, word for word.

WAY_OUT = (
    "hint: a rule meets leaves as the rules before it made them; correct it, or write more of the path "
    "in its pattern to leave others out."
)


def test_a_shape_that_does_not_come_out_is_quoted_with_its_rule():
    message = failure({"dense": {"kernel": (4, 3), "bias": (4,)}}, DENSE, Transpose("dense", (1, 0)))

    assert message == (
        "Transpose(pattern='dense', permutation=(1, 0)) does not fit 1 stored leaf:\n"
        "  dense/bias   (4,): permutation (1, 0) does not fit shape (4,)   <- params/dense/bias\n" + WAY_OUT
    )


def test_a_split_that_leaves_a_rest_says_what_the_axis_holds():
    message = failure({}, {"params": {"wide": normal(5, 2)}}, Split("wide", ("a", "b"), axis=0))

    assert message == (
        "Split(pattern='wide', into=('a', 'b'), axis=0, sizes=None) does not fit 1 stored leaf:\n"
        "  wide   (5, 2): axis 0 has 5 elements, which are not 2 equal parts   <- params/wide\n" + WAY_OUT
    )


def test_a_fuse_names_the_part_that_is_not_there():
    message = failure({}, {"params": {"q": normal(2), "k": normal(2)}}, Fuse(("q", "k", "v"), "qkv", axis=0))

    assert message == (
        "Fuse(patterns=('q', 'k', 'v'), into='qkv', axis=0, sizes=None) does not fit 2 stored leaves:\n"
        "  qkv   'v' is not there   <- params/q (2,), params/k (2,)\n" + WAY_OUT
    )


def test_unequal_parts_need_their_sizes_said():
    layer = {"q": {"kernel": normal(3, 4)}, "k": {"kernel": normal(3, 2)}}
    stored = {"params": {f"l_{i}": layer for i in range(3)}}
    wanted = {f"l_{i}": {"qk": {"kernel": (3, 6)}} for i in range(3)}

    message = failure(wanted, stored, Fuse(("q", "k"), "qk", axis=1))
    (sizes,) = re.findall(r"unequal parts need sizes=\((\d), (\d)\)", message)
    values = restored(wanted, stored, Fuse(("q", "k"), "qk", axis=1, sizes=tuple(map(int, sizes))))

    assert message == (
        "Fuse(patterns=('q', 'k'), into='qk', axis=1, sizes=None) does not fit 6 stored leaves:\n"
        "  l_{0..2}/qk/kernel   the parts have (4, 2) elements on axis 1; unequal parts need sizes=(4, 2)\n"
        "      <- params/l_{0..2}/q/kernel (3, 4), params/l_{0..2}/k/kernel (3, 2)\n" + WAY_OUT
    )
    np.testing.assert_array_equal(
        values["l_1/qk/kernel"], np.concatenate([layer["q"]["kernel"], layer["k"]["kernel"]], axis=1)
    )


def test_a_gap_in_the_layers_is_refused():
    stored = {"params": {f"b_{i}": normal(2) for i in (0, 2)}}

    message = failure({"b": (2, 2)}, stored, StackLayers("b_{i}", "b", axis=0))

    assert "  b   the layers are [0, 2], not 0, 1, 2, ...   <- params/b_0 (2,), params/b_2 (2,)\n" in message


def test_a_scan_axis_that_does_not_fit_is_refused_and_an_unneeded_one_too():
    stored = {"params": {"layers": {"kernel": normal(3, 3, 5)}}}
    wanted = {"layers": {i: {"kernel": (3, 5)} for i in range(3)}}

    refused = failure(wanted, stored, ScanAxis("layers", 2))
    with pytest.raises(onh.UnusedRuleError, match=r"1 rule matches no stored leaf") as idle:
        restored(wanted, stored, ScanAxis("blocks", 0))

    assert "ScanAxis(group='layers', axis=2)" in refused
    assert "ScanAxis(group='blocks', axis=0)" in str(idle.value)


def test_an_axis_for_stacks_on_both_sides_is_refused_and_the_transpose_of_its_hint_is_right():
    layers = np.arange(512, dtype=np.float32).reshape(8, 8, 8)
    stored = {"params": {"layers": {"kernel": np.moveaxis(layers, 0, 1)}}}
    wanted = {"layers": {"kernel": (8, 8, 8)}}

    with pytest.raises(
        onh.UnusedRuleError, match=r"both sides are\s+stacked, along other\s+axes, pass a Transpose"
    ):
        restored(wanted, stored, ScanAxis("layers", 1))

    found = restored(wanted, stored, onh.Transpose("layers/kernel", (1, 0, 2)))
    np.testing.assert_array_equal(found["layers/kernel"], layers)


def test_a_part_of_a_split_leaf_that_nobody_wants_is_an_error():
    stored = {"params": {"qk": normal(4)}}

    message = failure({"q": (2,)}, stored, Split("qk", ("q", "kk"), axis=0))
    dropped = restored({"q": (2,)}, stored, Split("qk", ("q", "kk"), axis=0), Drop("kk", "tied to q"))

    assert message.startswith(
        "1 part of leaves that rules take apart is no wanted leaf:\n  kk   (2,)   <- params/qk\n  by Split("
    )
    np.testing.assert_array_equal(dropped["q"], stored["params"]["qk"][:2])


def test_no_part_is_to_be_left_behind_while_a_wanted_leaf_of_its_size_is_missing():
    stored = {"params": {"qk": normal(4)}}
    rule = Split("qk", ("q", "kk"), axis=0)

    assert "Drop" in failure({"q": (2,)}, stored, rule)
    assert "Drop" not in failure({"q": (2,), "k": (2,)}, stored, rule)
    assert "Drop" in failure({"q": (2,), "k": (3,)}, stored, rule)


def test_two_rules_that_land_on_one_leaf_are_both_quoted():
    stored = {"params": {"a": normal(2), "b": normal(2)}}

    with pytest.raises(onh.AmbiguousMappingError) as raised:
        restored({"c": (2,)}, stored, ("a", "c"), ("b", "c"))

    assert "  c\n    <- params/a (2,)  by ('a', 'c')\n    <- params/b (2,)  by ('b', 'c')" in str(
        raised.value
    )


def test_a_rule_that_matches_nothing_is_quoted():
    with pytest.raises(onh.UnusedRuleError) as raised:
        restored({"dense": {"kernel": (3, 4), "bias": (4,)}}, DENSE, Drop("dens", "typo"))

    assert "  Drop(pattern='dens', reason='typo')" in str(raised.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Rename("", "a"),
        lambda: Rename("a", "{i}"),
        lambda: Rename("a", "*"),
        lambda: Transpose("a", (0, 2)),
        lambda: Reshape("a", (-2, 2)),
        lambda: Reshape("a", (-1, -1)),
        lambda: Reshape("a", (4,), before=(-1, -1)),
        lambda: Split("a", ("b", "c"), axis=0, sizes=(1, 1), drop_axis=True),
        lambda: Fuse(("a", "c"), "b", axis=0, sizes=(1, 1), new_axis=True),
        lambda: Reshape("a", (4,), before=(5,)),
        lambda: Split("a", ("b",), axis=0),
        lambda: Split("a", ("b", "b"), axis=0),
        lambda: Split("a", ("b", "c"), axis=0, sizes=(1,)),
        lambda: Split("a", "bc", axis=0),
        lambda: Fuse(("a", ""), "b", axis=0),
        lambda: StackLayers("a_{i}", "a/{i}", axis=0),
        lambda: StackLayers("a_{i}_{j}", "a", axis=0),
        lambda: UnstackLayers("a", "b", axis=0),
        lambda: Cast("a", "flaot32"),
        lambda: Scale("a", 0),
        lambda: Scale("a", math.inf),
        lambda: Drop("a", " "),
        lambda: ScanAxis("", 0),
        lambda: ScanAxis("a", -1),
    ],
)
def test_a_rule_without_a_meaning_cannot_be_made(make):
    with pytest.raises(RuleError):
        make()


def test_what_is_no_rule_is_refused():
    with pytest.raises(RuleError, match="is no rule"):
        plan_of(nnx.State({}), DENSE, ["dense"])


# Printing and undoing.

INVERTIBLE = (
    Rename("Block_{i}/*/w", "blocks/{i}/*/kernel"),
    Transpose("kernel", (2, 0, 1)),
    Reshape("kernel", (2, 6), before=(3, 4)),
    Reshape("kernel", (-1, 6), before=(3, -1)),
    Split("qkv", ("q", "k"), axis=-1, sizes=(1, 2)),
    Split("qk", ("q", "k"), axis=0, drop_axis=True),
    Fuse(("q", "k"), "qk", axis=-1, new_axis=True),
    Fuse(("q_{i}", "k_{i}"), "{i}/qk", axis=0),
    StackLayers("Block_{i}", "blocks", axis=1),
    UnstackLayers("blocks", "Block_{i}", axis=0),
    Scale("kernel", -0.125),
)
LOSSY = (
    Rename("a/b", ""),
    Rename("{i}_b", "b"),
    Reshape("kernel", (2, 6)),
    Split("q_{i}", ("q", "k"), axis=0),
    Scale("kernel", 3),
    Cast("kernel", np.dtype("float32")),
    Drop("kernel", "tied"),
    ScanAxis("layers", 1),
)


@pytest.mark.parametrize("rule", [*INVERTIBLE, *LOSSY], ids=repr)
def test_a_printed_rule_is_the_python_that_makes_it(rule):
    assert eval(repr(rule), vars(onh)) == rule
    assert hash(eval(repr(rule), vars(onh))) == hash(rule)


def test_lists_are_taken_for_tuples():
    assert Transpose("a", [1, 0]) == Transpose("a", (1, 0))
    assert hash(Split("a", ["b", "c"], 0, [1, 2])) == hash(Split("a", ("b", "c"), 0, (1, 2)))


@pytest.mark.parametrize("rule", INVERTIBLE, ids=repr)
def test_undoing_twice_is_the_rule_itself(rule):
    assert invert(invert([rule])) == (rule,)


@pytest.mark.parametrize("rule", LOSSY, ids=repr)
def test_a_rule_that_cannot_be_undone_is_named(rule):
    with pytest.raises(RuleError) as raised:
        invert([rule])

    assert str(raised.value).startswith(f"{rule} cannot be undone, so it cannot save: ")


def test_all_rules_that_cannot_be_undone_are_named_at_once():
    with pytest.raises(RuleError) as raised:
        invert([Scale("a", 3), ("b", "c"), Drop("d", "gone")])

    assert [line.split("(")[0] for line in str(raised.value).splitlines()] == ["Drop", "Scale"]


def verdict(target: object, stored: object, *rules: object) -> str:
    with pytest.raises(onh.RestoreError) as caught:
        restored(target, stored, *rules)
    return str(caught.value)


def test_a_weight_that_a_rule_drops_is_missing_because_of_the_rule():
    stored = {"params": {"a": {"kernel": normal(2, 3)}, "b": {"kernel": normal(3, 2)}}}
    wanted = {name: {"kernel": value["kernel"].shape} for name, value in stored["params"].items()}

    message = verdict(wanted, stored, Drop("a", "no longer used"))

    assert "cause: Drop('a', 'no longer used') leaves params/a/kernel behind, and the target wants" in message
    assert message.count("cause:") == 1


def test_a_rule_without_which_a_weight_would_fit_is_named():
    stored = {"params": {"a": {"kernel": normal(2, 3)}, "b": {"kernel": normal(3, 2)}}}
    wanted = {name: {"kernel": value["kernel"].shape} for name, value in stored["params"].items()}

    message = " ".join(verdict(wanted, stored, Transpose("a/kernel", (1, 0))).split())

    assert (
        "cause: 1 weight fits as it is stored: Transpose(pattern='a/kernel', permutation=(1, 0)) "
        "makes (3, 2) of (2, 3), which is wanted." in message
    )
    assert message.count("cause:") == 1


def test_a_cast_to_what_nobody_wants_is_named():
    message = verdict({"a": (2,)}, {"params": {"a": normal(2)}}, Cast("a", "int8"))

    assert "Cast(pattern='a', dtype='int8')" in message
    assert "never become each other" not in message


def test_a_rename_of_what_a_rename_wrote_says_why_it_has_no_effect():
    message = verdict({"c": (2,)}, {"params": {"a": normal(2)}}, ("a", "b"), ("b", "c"))

    assert message.startswith("1 rule matches no stored leaf:\n  ('b', 'c')\n")
    assert message.endswith(
        "hint: what a rename wrote is not renamed again, so that names can be swapped; write in one rule "
        "what it becomes in the end: ('a', 'c') for ('a', 'b') and ('b', 'c')."
    )


def test_a_rename_that_comes_late_is_called_that_beside_an_optimizer_of_the_same_names():
    weights = {"a": normal(2), "b": normal(2)}
    tree = {"params": weights, "opt_state": [{"count": np.int32(3), "mu": weights, "nu": weights}]}
    rules = [("b", "x"), ("a", "b"), ("b", "y")]

    message = verdict({"x": (2,), "y": (2,)}, tree, *rules)

    assert message.endswith("becomes in the end: ('a', 'y') for ('a', 'b') and ('b', 'y').")


def test_rules_that_match_nothing_where_nothing_needs_them_are_told_to_be_so():
    tree = {"params": {"a": normal(2), "b": normal(3)}}

    one = verdict({"a": (2,), "b": (3,)}, tree, ("xylophone", "a"))
    two = verdict({"c": (2,), "b": (3,)}, tree, ("a", "c"), ("xylophone", "a"), ("lyre", "b"))
    needed = verdict({"c": (2,), "b": (3,)}, tree, ("xylophone", "c"))

    assert one.endswith("take it out.\nhint: without it, every leaf of the target is restored.")
    assert two.endswith("take it out.\nhint: without them, every leaf of the target is restored.")
    assert needed.endswith("take it out.")


def test_a_star_in_a_segment_is_answered_with_the_place_that_it_means():
    with pytest.raises(onh.RuleError) as error:
        onh.Rename("layers_*/attn", "layers/*/attn")

    assert str(error.value) == (
        "('layers_*/attn', 'layers/*/attn') writes *, which 'layers_*/attn' does not hold.\n"
        "hint: * is a whole segment; a part of one has a name, as in ('Block_{i}', 'blocks/{i}')."
    )


# Renames one after another.


@pytest.mark.parametrize(
    ("stored", "rules", "wanted"),
    [
        ("a/q_p/kernel", [("a", "attn"), ("attn/{n}_p/kernel", "attn/{n}_p/w")], "attn/q_p/w"),
        ("self_attn/q", [("self_attn", "attn"), ("attn/q", "attn/query"), ("attn/query/*", "no/*")], None),
        ("a/q/k", [("a", "b"), ("b/q", "b/r"), ("b/r/k", "b/r/v")], "b/r/v"),
        ("a/k", [("a", "b"), ("b/k", "a/k")], None),
        ("x/y", [("x", "m/n"), ("n/y", "n/inner/z")], "m/n/inner/z"),
        ("a/b", [("a/b", "a/c"), ("a", "d")], "d/c"),
    ],
)  # fmt: skip
def test_what_a_rename_wrote_may_be_named_by_a_later_one_that_leaves_it(stored, rules, wanted):
    tree = {"params": nested(stored, KERNEL)}

    if wanted is None:
        assert "matches no stored leaf" in verdict({}, tree, *rules)
    else:
        np.testing.assert_array_equal(restored(nested(wanted, (3, 4)), tree, *rules)[wanted], KERNEL)


def nested(path: str, leaf: object) -> dict:
    for name in reversed(path.split("/")):
        leaf = {name: leaf}
    return leaf


def test_two_names_are_swapped_whether_alone_or_below_a_name_that_stays():
    stored = {"params": {"m": {"a": normal(2), "b": normal(2)}}}

    for rules in ([("a", "b"), ("b", "a")], [("m/a", "m/b"), ("m/b", "m/a")]):
        values = restored({"m": {"a": (2,), "b": (2,)}}, stored, *rules)
        np.testing.assert_array_equal(values["m/a"], stored["params"]["m"]["b"])
        np.testing.assert_array_equal(values["m/b"], stored["params"]["m"]["a"])


# One rule for models of every depth, and parts that lose their axis.


@pytest.mark.parametrize(
    ("shape", "before", "expected"),
    [((-1, 2, 8), None, (3, 2, 8)), ((3, -1), (-1, 16), (3, 16)), ((48,), (3, -1), (48,))],
)  # fmt: skip
def test_one_axis_of_a_reshape_follows_from_what_is_stored(shape, before, expected):
    value = normal(3, 16)

    values = restored({"w": expected}, {"params": {"w": value}}, Reshape("w", shape, before))

    np.testing.assert_array_equal(values["w"], value.reshape(shape))


def test_a_reshape_of_stacked_layers_is_one_rule_for_every_depth():
    rules = [StackLayers("h_{i}", "h", axis=0), Reshape("h/kernel", (-1, 4, 2, 2), before=(-1, 4, 4))]

    for depth in (2, 5):
        kernels = [normal(4, 4) for _ in range(depth)]
        stored = {"params": {f"h_{i}": {"kernel": kernel} for i, kernel in enumerate(kernels)}}
        values = restored({"h": {"kernel": (depth, 4, 2, 2)}}, stored, *rules)
        np.testing.assert_array_equal(values["h/kernel"], np.stack(kernels).reshape(depth, 4, 2, 2))


def test_what_is_no_multiple_is_refused():
    message = failure({}, {"params": {"w": normal(5, 3)}}, Reshape("w", (-1, 4)))

    assert "(5, 3): (5, 3) has 15 elements, which are no multiple of 4" in message


def test_a_split_into_single_elements_may_drop_the_axis():
    einsum = normal(3, 2, 4, 8)
    stored = {"params": {"mlp": {"gating_einsum": einsum}}}
    wanted = {"mlp": {"gate": (3, 4, 8), "up": (3, 4, 8)}}

    for axis in (1, -3):
        split = Split("gating_einsum", ("gate", "up"), axis, drop_axis=True)
        values = restored(wanted, stored, split)
        np.testing.assert_array_equal(values["mlp/gate"], einsum[:, 0])
        np.testing.assert_array_equal(values["mlp/up"], einsum[:, 1])


def test_a_fuse_may_put_its_parts_along_an_axis_of_their_own():
    gate, up = normal(4, 8), normal(4, 8)
    stored = {"params": {"mlp": {"gate": gate, "up": up}}}

    for axis in (0, 2, -1):
        fuse = Fuse(("up", "gate"), "both", axis, new_axis=True)
        expected = np.stack([up, gate], axis)
        values = restored({"mlp": {"both": expected.shape}}, stored, fuse)
        np.testing.assert_array_equal(values["mlp/both"], expected)


def test_parts_that_would_keep_several_elements_lose_no_axis():
    stored = {"params": {"w": normal(4, 3)}}

    message = failure({}, stored, Split("w", ("a", "b"), 0, drop_axis=True))

    assert "axis 0 has 4 elements, which are not 2 parts of one element" in message


def test_a_part_without_its_axis_that_nobody_wants_is_an_error():
    stored = {"params": {"w": normal(2, 3)}}

    message = failure({"a": (3,)}, stored, Split("w", ("a", "b"), 0, drop_axis=True))

    assert message.startswith(
        "1 part of leaves that rules take apart is no wanted leaf:\n  b   (3,)   <- params/w\n"
    )


def test_parts_of_a_reshaped_leaf_are_its_own_elements_each():
    fused = normal(4, 18)
    rules = [
        Reshape("qkv", (4, 3, 2, 3)),
        Split("qkv", ("q", "k", "v"), 1, drop_axis=True),
        Reshape("q", (-1,)),
    ]
    rules.append(Split("q", ("q_left", "q_right"), 0, sizes=(5, 19)))

    wanted = {"k": (4, 2, 3), "v": (4, 2, 3), "q_left": (5,), "q_right": (19,)}
    values = restored(wanted, {"params": {"qkv": fused}}, *rules)

    query, key, value = np.moveaxis(fused.reshape(4, 3, 2, 3), 1, 0)
    np.testing.assert_array_equal(values["k"], key)
    np.testing.assert_array_equal(values["v"], value)
    np.testing.assert_array_equal(values["q_left"], query.ravel()[:5])
    np.testing.assert_array_equal(values["q_right"], query.ravel()[5:])


def test_a_rule_for_what_an_optimizer_holds_says_that_none_reaches_there():
    stored = {
        "params": {"up": {"kernel": normal(2, 3)}},
        "opt_state": [{}, {"count": np.int32(1), "ema": {"up": {"kernel": normal(2, 3)}}}],
        "step": np.int32(1),
    }

    with pytest.raises(onh.UnusedRuleError) as raised:
        restored({"up": {"kernel": (2, 3)}}, stored, Drop("params", "why"), ("opt_state/1/ema", "params"))

    assert raised.value.hints[0].words.startswith("no rule reaches below opt_state: ")


def test_layers_that_are_numbers_at_the_front_of_a_pattern_are_stacked() -> None:
    stored = {"params": {str(i): {"kernel": normal(2, 3)} for i in range(3)}}

    values = restored({"blocks": {"kernel": (3, 2, 3)}}, stored, StackLayers("{i}", "blocks", axis=0))

    np.testing.assert_array_equal(
        values["blocks/kernel"], np.stack([stored["params"][str(i)]["kernel"] for i in range(3)])
    )


WRONG_KINDS = [
    (Copy, {"pattern": "a", "into": ("b", "c")}, "into"),
    (Copy, {"pattern": None, "into": "b"}, "pattern"),
    (Rename, {"pattern": "a", "replacement": 1}, "replacement"),
    (Rename, {"pattern": "a", "replacement": "b", "regex": "yes"}, "regex"),
    (Drop, {"pattern": b"a", "reason": "why"}, "pattern"),
    (Drop, {"pattern": "a", "reason": 3}, "reason"),
    (Cast, {"pattern": ["a"], "dtype": "float32"}, "pattern"),
    (Transpose, {"pattern": "a", "permutation": 1}, "permutation"),
    (Reshape, {"pattern": "a", "shape": (2.5, 2)}, "shape"),
    (Reshape, {"pattern": "a", "shape": (4,), "before": {2}}, "before"),
    (Repeat, {"pattern": "a", "axis": "0", "count": 2}, "axis"),
    (Repeat, {"pattern": "a", "axis": 0, "count": 2.5}, "count"),
    (Scale, {"pattern": "a", "factor": "2"}, "factor"),
    (Split, {"pattern": "a", "into": ("b", 1), "axis": 0}, "into"),
    (Split, {"pattern": "a", "into": ("b", "c"), "axis": 0, "sizes": (1.5, 2.5)}, "sizes"),
    (Fuse, {"patterns": ("a", "b"), "into": ("c",), "axis": 0}, "into"),
    (StackLayers, {"pattern": "l_{i}", "into": "l", "axis": None}, "axis"),
    (UnstackLayers, {"pattern": "l", "into": ("l_{i}",), "axis": 0}, "into"),
    (ScanAxis, {"group": 4, "axis": 0}, "group"),
    (ScanAxis, {"group": "layers", "axis": 0.5}, "axis"),
]


@pytest.mark.parametrize(("rule", "arguments", "wrong"), WRONG_KINDS)
def test_a_rule_says_which_of_its_arguments_is_of_another_kind(rule, arguments, wrong):
    with pytest.raises(RuleError, match=rf"^{rule.__name__} takes .* as {wrong}, not "):
        rule(**arguments)


def test_lists_and_integers_of_numpy_become_what_a_rule_declares():
    rule = Reshape("a", [np.int64(2), 3], before=np.array([6]))

    assert rule == Reshape("a", (2, 3), before=(6,))
    assert hash(rule) == hash(Reshape("a", (2, 3), before=(6,)))


def test_no_dtype_is_not_a_float64():
    with pytest.raises(RuleError, match="names no dtype"):
        Cast("a", None)
