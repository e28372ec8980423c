"""A rule that matches nothing is answered with what is stored nearest, and the answer works."""

import time
from typing import Any

import numpy as np
import pytest

from orbax_nnx_handler import (
    Cast,
    Copy,
    Drop,
    Fuse,
    Rename,
    Reshape,
    RuleError,
    Scale,
    Split,
    StackLayers,
    Transpose,
    UnusedRuleError,
)
from orbax_nnx_handler.planning.core.leaves import StoredLeaf
from orbax_nnx_handler.planning.layouts.linen import TRAIN_STATE
from orbax_nnx_handler.planning.rules import apply_rules, as_rules
from orbax_nnx_handler.planning.rules.entries import every_entry
from tests.planning.models import keys
from tests.planning.plans import Numbers, params, plan_of, values_of

STORED = {
    "params/encoder/layers_0/self_attn/q_proj/kernel": (4, 4),
    "params/encoder/layers_1/self_attn/q_proj/kernel": (4, 4),
    "params/encoder/layers_0/self_attn/k_proj/kernel": (4, 4),
    "params/encoder/layers_1/self_attn/k_proj/kernel": (4, 4),
    "params/h/0/mlp/Dense_0/kernel": (4, 8),
    "params/h/1/mlp/Dense_0/kernel": (4, 8),
    "params/h/0/mlp/Dense_1/kernel": (8, 4),
    "params/head/kernel/value": (4, 9),
    "batch_stats/norm/mean": (4,),
}


def entries_of(*paths: str) -> list[Any]:
    shapes = STORED if not paths else dict.fromkeys(paths, (2, 2))
    leaves = {
        keys(path): StoredLeaf(path=keys(path), shape=shape, dtype=np.dtype("float32"))
        for path, shape in shapes.items()
    }
    return every_entry(TRAIN_STATE.place(leaves))


def refused(*rules: Any, stored: list[Any] | None = None) -> str:
    with pytest.raises((UnusedRuleError, RuleError)) as raised:
        apply_rules(stored or entries_of(), as_rules(rules))
    return str(raised.value)


@pytest.mark.parametrize(
    ("rule", "meant"),
    [
        # NNX's spelling of a Linen name, and the other way round.
        (("encoder/layers/{i}", "blocks/{i}"), ("encoder/layers_{i}", "blocks/{i}")),
        (("h_{i}/mlp", "blocks/{i}/mlp"), ("h/{i}/mlp", "blocks/{i}/mlp")),
        (("layers/1/self_attn", "last"), ("layers_1/self_attn", "last")),
        (StackLayers("layers/{i}", "layers", 0), StackLayers("layers_{i}", "layers", 0)),
        # PyTorch's separators, another case, a typo, a singular.
        (("h.0.mlp", "first"), ("h/0/mlp", "first")),
        (Transpose("mlp/dense_1/kernel", (1, 0)), Transpose("mlp/Dense_1/kernel", (1, 0))),
        (Drop("encodr", "unused"), Drop("encoder", "unused")),
        (("batch_stat", "stats"), ("batch_stats", "stats")),
        # A place that is a part of a name, beside a name that is spelt otherwise.
        (("selfattn/{n}_proj", "attn/{n}"), ("self_attn/{n}_proj", "attn/{n}")),
        (Split("self_attention", ("q", "k"), 0), Split("self_attn", ("q", "k"), 0)),
        (Fuse(("q_prj", "k_prj"), "qk", 1), Fuse(("q_proj", "k_proj"), "qk", 1)),
        (("mlp/*/kernels", "mlp/*/w"), ("mlp/*/kernel", "mlp/*/w")),
        # Dots on both sides, and a regular expression that is not called one.
        (("params.encoder", "model.enc"), ("params/encoder", "model/enc")),
        ((r"layers_(\d+)", r"layers/\1"), Rename(r"layers_(\d+)", r"layers/\1", regex=True)),
    ],
    ids=str,
)  # fmt: skip
def test_the_hint_is_the_rule_as_the_checkpoint_spells_it_and_it_works(rule: Any, meant: Any) -> None:
    (expected,) = as_rules([meant])

    message = refused(rule)

    assert message.splitlines()[-1] == f"hint: if that is meant, write {expected}."
    assert any(made for _, made in apply_rules(entries_of(), [expected]).made) or isinstance(expected, Drop)


def test_the_whole_message() -> None:
    assert refused(("encoder/layers/{i}", "blocks/{i}")) == (
        "1 rule matches no stored leaf:\n"
        "  ('encoder/layers/{i}', 'blocks/{i}')\n"
        "    nearest stored: params/encoder/layers_0/self_attn/q_proj/kernel\n"
        "hint: if that is meant, write ('encoder/layers_{i}', 'blocks/{i}')."
    )


def test_what_an_earlier_rule_has_renamed_is_shown_under_both_names() -> None:
    message = refused(("self_attn", "attn"), Transpose("self_attn/q_proj/kernel", (1, 0)))

    assert (
        "('self_attn', 'attn') in front of it has made params/encoder/layers_0/attn/q_proj/kernel "
        "of params/encoder/layers_0/self_attn/q_proj/kernel\n" in message
    )
    assert message.endswith("write Transpose(pattern='attn/q_proj/kernel', permutation=(1, 0)).")


@pytest.mark.parametrize(
    ("rule", "meant"),
    [
        (Cast("head/kernel", "bfloat16"), Cast("last/out/kernel", "bfloat16")),
        (Scale("head/kernel", 2.0), Scale("last/out/kernel", 2.0)),
        (Copy("head", "x"), Copy("last/out", "x")),
        (Drop("head", "why"), Drop("last/out", "why")),
        (Transpose("h/{i}/mlp/Dense_0/kernel", (1, 0)), Transpose("blocks/{i}/mlp/up/kernel", (1, 0))),
        (Scale("params/h/*/mlp/Dense_0/kernel", 2.0), Scale("params/blocks/*/mlp/up/kernel", 2.0)),
        (Split("Dense_0/kernel", ("a", "b"), axis=1), Split("up/kernel", ("a", "b"), axis=1)),
    ],
)
def test_a_rule_for_what_others_have_renamed_is_written_with_the_names_that_they_give(rule: Any, meant: Any):
    renames = [("head", "last/out"), ("h/{i}", "blocks/{i}"), ("mlp/Dense_0", "mlp/up")]

    assert refused(*renames, rule).endswith(f"hint: if that is meant, write {meant}.")
    assert apply_rules(entries_of(), as_rules([*renames, meant]))


def test_a_rule_for_what_others_have_put_together_or_dropped_goes_in_front_of_them():
    parts = ("q_proj/kernel", "k_proj/kernel")
    fuse, turn = Fuse(parts, "qk/kernel", axis=1), Transpose("k_proj/kernel", (1, 0))

    message, dropped = refused(fuse, turn), refused(Drop("q_proj", "why"), turn, fuse)

    assert f"{fuse} in front of it has made params/encoder/layers_0/self_attn/qk/kernel of params" in message
    assert message.endswith(f"hint: put {turn} in front of {fuse}.")
    assert "has dropped params/encoder/layers_0/self_attn/q_proj/kernel" in dropped
    assert "if that is meant" not in dropped
    renamed = refused(("q_proj", "q"), fuse)
    assert "('q_proj', 'q') in front of it has made params/encoder/layers_0/self_attn/q/kernel of" in renamed
    assert renamed.endswith(f"write {Fuse(('q/kernel', 'k_proj/kernel'), 'qk/kernel', axis=1)}.")


def test_a_rule_that_would_also_meet_others_under_the_new_name_is_not_proposed():
    message = refused(("head", "Dense_1"), Transpose("head/kernel", (1, 0)))

    assert "write Transpose(pattern='Dense_1/kernel'" not in message
    assert message.endswith(
        "hint: put Transpose(pattern='head/kernel', permutation=(1, 0)) in front of ('head', 'Dense_1')."
    )


def test_what_would_change_no_name_is_not_proposed() -> None:
    assert refused(("encodr", "encoder")).endswith("correct it or take it out.")


def test_what_is_like_nothing_is_answered_with_what_a_pattern_is() -> None:
    message = refused(("xylophone", "y"))

    assert "nearest" not in message
    assert message.endswith("correct it or take it out.")


def test_several_rules_are_corrected_at_once_or_none_is() -> None:
    both = refused(("selfattn", "attn"), ("encodr", "enc"))
    one = refused(("selfattn", "attn"), ("xylophone", "y"))

    assert both.endswith("hint: if that is meant, write ('self_attn', 'attn'), ('encoder', 'enc').")
    assert "nearest stored: params/encoder/layers_0/self_attn" in one
    assert one.endswith("correct it or take it out.")


def test_a_correction_that_does_not_fit_the_leaves_is_not_proposed() -> None:
    message = refused(Reshape("head/kernl/value", (5, 5)))

    assert "nearest stored: params/head/kernel/value" in message
    assert "if that is meant" not in message


def test_it_takes_no_time_at_twenty_thousand_leaves() -> None:
    paths = [
        f"params/stage_{s}/layers_{i}/{m}/{k}"
        for s in range(4)
        for i in range(250)
        for m in "abcde"
        for k in "uvwx"
    ]
    entries = entries_of(*paths)

    before = time.perf_counter()
    message = refused(Rename("stage_{s}/layer_{i}/a", "x/{s}/{i}"), stored=entries)

    took = time.perf_counter() - before
    print(took)
    assert took < 5
    assert message.endswith("write ('stage_{s}/layers_{i}/a', 'x/{s}/{i}').")


@pytest.mark.parametrize("owner", ["d", "q2", "critic"])
@pytest.mark.parametrize("end", ["l/w", "l/w/v", "l"])
@pytest.mark.parametrize(
    "of",
    [lambda text: Transpose(text, (1, 0)), lambda text: Rename(text, "x/w"), lambda text: Drop(text, "no")],
)
def test_a_rule_for_one_of_several_networks_is_answered_with_one_for_that_network(owner, end, of):
    entries = entries_of(
        f"g/params/{end}", f"{owner}/params/{end}", f"{owner}/params/m/w", "g/opt_state/0/count"
    )

    text = refused(of(f"{owner}/{end}"), stored=entries)
    assert f"nearest stored: {owner}/params/{end}" in text
    assert f"{owner}/params/{end}'" in text.split("hint:")[1]


def attention(numbers: Numbers) -> dict[str, Any]:
    return {name: {"kernel": numbers.array(4, 4)} for name in ("q", "k", "o")}


def corrected(layers: dict[str, Any], *rules: Any) -> tuple[list[str], Any, Any]:
    """Returns the hints for rules on attention, and the target and the tree that they are about."""
    kernel = {"kernel": (4, 4)}
    wanted = dict.fromkeys(("query", "key", "out"), kernel)
    target, stored = params({"blocks": {at: {"attn": wanted} for at in range(2)}}), {"params": layers}
    with pytest.raises(UnusedRuleError) as error:
        plan_of(target, stored, rules)
    return [hint.words for hint in error.value.hints], target, stored


NAMES = [("layers_{i}", "blocks/{i}"), ("q", "attn/query"), ("k", "attn/key")]


def test_levels_of_the_target_in_front_of_what_a_rule_is_for_are_left_out_in_the_hint() -> None:
    numbers = Numbers()
    layers = {f"layers_{at}": attention(numbers) for at in range(2)}

    hints, target, stored = corrected(layers, *NAMES, ("attn/o", "attn/out"))

    assert hints == ["if that is meant, write ('o', 'attn/out')."]
    values = values_of(plan_of(target, stored, [*NAMES, ("o", "attn/out")]), stored)
    for at in range(2):
        for old, new in (("q", "query"), ("k", "key"), ("o", "out")):
            expected = layers[f"layers_{at}"][old]["kernel"]
            np.testing.assert_array_equal(values[f"blocks/{at}/attn/{new}/kernel"], expected)


@pytest.mark.parametrize("rule", [("a/kernel", "attn/out"), ("attn/k", "attn/out")])
def test_a_rule_that_takes_what_others_have_put_in_their_place_is_not_proposed(rule: Any) -> None:
    layers = {f"layers_{at}": attention(Numbers()) for at in range(2)}

    hints, _, _ = corrected(layers, *NAMES, rule)

    assert not any(words.startswith("if that is meant") for words in hints)


def test_a_leaf_that_is_two_parts_of_one_is_copied_first() -> None:
    with pytest.raises(RuleError) as raised:
        Fuse(("q_proj/kernel", "q_proj/kernel", "k_proj/kernel"), "qqk", axis=1)
    copied = [Copy("q_proj", "q2"), Fuse(("q_proj/kernel", "q2/kernel", "k_proj/kernel"), "qqk", axis=1)]

    assert "names the part 'q_proj/kernel' twice." in str(raised.value)
    assert "hint: put Copy('q_proj/kernel', name) in front of it, and name the copy." in str(raised.value)
    assert apply_rules(entries_of(), as_rules(copied))
