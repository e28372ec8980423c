"""What is told where rules that were passed stand in the way: which of them, and no way that leads away."""

from typing import Any

import numpy as np
import optax
import pytest
from flax import nnx, traverse_util

from orbax_nnx_handler import Drop, Fuse, Split, UnstackLayers
from orbax_nnx_handler.planning.core.errors import as_python
from tests.planning.models import kinds, plan
from tests.planning.plans import plan_of

STORED = {
    "params/embed/embedding": (20, 8),
    "params/up/kernel": (8, 12),
    "params/up/bias": (12,),
    "params/down/kernel": (12, 8),
    "params/down/bias": (8,),
    "params/head/kernel": (8, 7),
}
WANTED = {
    "tok/embedding": (20, 8),
    "up/kernel": (8, 12),
    "up/bias": (12,),
    "down/kernel": (12, 8),
    "down/bias": (8,),
    "head/kernel": (8, 7),
}
RENAME = ("embed", "tok")


def message(stored: Any, wanted: Any, *rules: Any) -> str:
    return " ".join(str(plan(stored, wanted, renames=rules).error()).split())


@pytest.mark.parametrize(
    ("rules", "stored", "wanted"),
    [
        ([RENAME, Drop("tok", "x")], "params/embed/embedding", "tok/embedding"),
        ([Drop("embed", "x")], "params/embed/embedding", "tok/embedding under another name"),
        ([RENAME, Drop("bias", "x")], "params/down/bias, params/up/bias", "down/bias, up/bias"),
    ],
)
def test_a_rule_that_drops_what_is_wanted_is_the_cause(rules: Any, stored: str, wanted: str):
    text = message(STORED, WANTED, *rules)

    told = f"cause: {as_python(rules[-1])} leaves {stored} behind, and the target wants {wanted}."
    assert text.endswith(f"{told} hint: take it out.")
    assert text.count("cause:") == text.count("hint:") == 1


def test_a_rule_that_drops_more_than_what_is_wanted_is_written_narrower():
    stored = STORED | {"params/old/head/kernel": (8, 9)}

    text = message(stored, WANTED, RENAME, Drop("head", "x"))

    assert (
        "cause: Drop('head', 'x') leaves params/head/kernel behind, and the target wants head/kernel." in text
    )
    assert text.endswith("hint: take it out, or write more of the path in its pattern.")


def test_each_of_two_rules_with_one_reason_is_told_for_what_it_drops():
    found = plan(STORED, WANTED, renames=[RENAME, Drop("up", "x"), Drop("head", "x")]).causes

    assert [cause.text.partition(" leaves ")[0] for cause in found] == [
        "Drop('up', 'x')",
        "Drop('head', 'x')",
    ]


def test_what_is_fused_and_then_dropped_is_told_as_dropped():
    stored = {"params/q/kernel": (8, 4), "params/k/kernel": (8, 4), "params/o/kernel": (8, 8)}
    wanted = {"qk/kernel": (8, 8), "o/kernel": (8, 8)}
    rules = [Fuse(("q/kernel", "k/kernel"), "qk/kernel", axis=1), Drop("qk", "x")]

    text = message(stored, wanted, *rules)

    assert "no wanted leaf" not in text
    assert (
        "leaves params/k/kernel, params/q/kernel behind, and the target wants qk/kernel. hint: take" in text
    )


def test_a_head_of_another_size_that_a_rule_leaves_behind_may_be_initialised():
    found = plan(STORED, WANTED | {"head/kernel": (8, 3)}, renames=[RENAME, Drop("head", "new")])

    assert kinds(found.causes) == ["DroppedByRule"]
    assert "leaves params/head/kernel behind, and the target wants head/kernel of another shape." in str(
        found.error()
    )
    assert any(hint.fills for hint in found.error().hints)


def test_a_new_part_beside_what_is_dropped_for_good_is_a_new_part():
    stored = STORED | {f"params/layers_{at}/norm/scale": (8,) for at in range(3)}
    wanted = WANTED | {"layers/0/norm/scale": (8,), "adapter/kernel": (8, 2)}

    found = plan(stored, wanted, renames=[RENAME, Drop("layers_1", "x"), Drop("layers_2", "x")]).causes

    assert kinds(found) == ["NewPart"]


def test_axes_to_exchange_beside_what_may_be_exchanged_too_come_with_a_place_among_the_rules():
    stored = {"params/head/kernel": (7, 8), "params/out/kernel": (8, 8)}
    wanted = {"cls/kernel": (8, 7), "proj/kernel": (8, 8)}

    text = message(stored, wanted, ("head", "cls"), ("out", "proj"))

    assert (
        "pass renames=[Transpose('head/kernel', (1, 0))]. Put it in front of the rules passed so far." in text
    )
    assert "then pass [Transpose('out/kernel', (1, 0))] as well" in text


APART = {f"params/attn/{name}/kernel": (8, 8) for name in ("query", "key", "value")}
TWO = Fuse(("query/kernel", "key/kernel"), "qkv/kernel", axis=1)


def test_a_part_that_a_rule_leaves_out_is_told_and_no_other_target():
    text = message(APART, {"attn/qkv/kernel": (8, 24)}, TWO)

    assert text.endswith(
        f"cause: {as_python(TWO)} makes (8, 16) of (8, 8), and (8, 24) is wanted: params/attn/value/kernel "
        "lies unused beside its parts. hint: name all parts in the rule, in their order."
    )


def test_a_part_that_a_split_leaves_out_is_told():
    rule = Split("qkv/kernel", ("q/kernel", "k/kernel"), axis=1)
    wanted = {f"attn/{name}/kernel": (8, 8) for name in "qkv"}

    text = message({"params/attn/qkv/kernel": (8, 24)}, wanted, rule)

    assert (
        f"cause: {as_python(rule)} makes (8, 12) of (8, 24), and (8, 8) is wanted: attn/v/kernel of the "
        "target is no part that it makes. hint: name all parts in the rule, in their order." in text
    )
    assert "stored sizes" not in text
    assert "init" not in text


def test_a_part_of_a_split_whose_rename_was_forgotten_is_not_said_to_be_stored_nowhere():
    rules = [Split("qkv", ("q", "k", "v"), axis=1), ("x/q", "y/q"), ("x/k", "y/k")]
    have = {"params/x/qkv/kernel": (8, 24), "params/embed/embedding": (20, 8)}
    wanted = {f"y/{name}/kernel": (8, 8) for name in "qkv"} | {"embed/embedding": (20, 8)}

    text = message(have, wanted, *rules)

    assert "take params/x/qkv/kernel apart, and nothing uses a part of it: y/v/kernel could be that" in text
    assert "init" not in text
    assert plan(have, wanted, renames=[*rules, ("x/v", "y/v")]).fits
    assert "init" in message(have, wanted | {"new/kernel": (5, 5)}, *rules, ("x/v", "y/v"))
    # A leaf larger than what is left of the stored one, or one of other axes, is none of its parts.
    assert "init" in message(have, wanted | {"new/kernel": (8, 16)}, *rules)
    assert "init" in message(have, wanted | {"new/kernel": (5, 5)}, *rules)


def test_sizes_of_parts_that_do_not_fit_are_the_rules_and_not_stored():
    rule = Split("qkv/kernel", ("q/kernel", "k/kernel", "v/kernel"), axis=1, sizes=(8, 12, 4))
    wanted = {f"attn/{name}/kernel": (8, 8) for name in "qkv"}

    text = message({"params/attn/qkv/kernel": (8, 24)}, wanted, rule)

    assert f"cause: {as_python(rule)} makes (8, 12) of (8, 24), and (8, 8) is wanted. hint: correct" in text
    assert "differs: 12 stored" not in text


def test_a_model_of_another_width_has_that_whatever_rules_make_of_its_weights():
    stored = APART | {"params/attn/out/kernel": (8, 8)}
    whole = Fuse(("query/kernel", "key/kernel", "value/kernel"), "qkv/kernel", axis=1)

    found = plan(stored, {"attn/qkv/kernel": (16, 48), "attn/out/kernel": (16, 16)}, renames=[whole]).causes

    assert "SizesOfRule" not in kinds(found)
    assert kinds(found)


def test_parts_that_another_rule_makes_one_are_used():
    rules = [Split("x/qkv", ("q", "k", "v"), axis=1), Fuse(("k", "v"), "kv", axis=1)]

    text = message({"params/x/qkv": (8, 24)}, {"x/kv": (8, 16), "x/query": (8, 8)}, *rules)

    assert "take params/x/qkv apart, and nothing uses a part of it: x/query could be that part" in text
    assert "init" not in text


LAYERS = {"params/h/fused/kernel": (3, 8, 24), "params/h/norm/scale": (3, 8), "params/wte/embedding": (20, 8)}
PLACES = {
    **{f"layers/{at}/att/query": (2, 8, 4) for at in range(3)},
    **{f"layers/{at}/att/kv/kernel": (8, 16) for at in range(3)},
    **{f"layers/{at}/norm/scale": (8,) for at in range(3)},
    "embed/embedding": (20, 8),
}
TAKEN = [
    ("wte", "embed"),
    UnstackLayers("h", "layers/{i}", axis=0),
    Split("fused/kernel", ("q/kernel", "kv/kernel"), axis=1, sizes=(8, 16)),
    ("kv", "att/kv"),
]


def test_a_part_that_rules_cut_out_is_never_begun_anew():
    found = plan(LAYERS, PLACES, renames=TAKEN)

    error = found.error()
    (cause,) = error.causes
    assert (cause.kind, {*cause.facts["wanted"]}) == (
        "UnusedPart",
        {("layers", at, "att", "query") for at in range(3)},
    )
    assert not any("policy" in hint.arguments for hint in error.hints)
    assert "init" not in str(error)


def test_parts_that_rules_cut_out_are_told_as_lines_of_a_plan():
    text = str(plan(LAYERS, PLACES, renames=TAKEN[:3]).error())

    assert text.startswith(
        "6 parts of leaves that rules take apart are no wanted leaf:\n"
        "  layers/{0..2}/kv/kernel   (8, 16)   <- params/h/fused/kernel\n"
        "  layers/{0..2}/q/kernel    (8, 8)    <- params/h/fused/kernel\n"
        "  by UnstackLayers("
    )


def test_moments_whose_weights_lack_a_rule_are_no_fault_of_the_optimizer():
    stored = {"params/embed/embedding": (20, 8), "params/up/kernel": (8, 8), "params/head/kernel": (8, 7)}
    moments = {
        path.replace("params", f"opt_state/0/{slot}"): x
        for path, x in stored.items()
        for slot in ("mu", "nu")
    }
    model = nnx.State(
        {
            "tok": {"embedding": nnx.Param(np.zeros((20, 8), "f"))},
            "p": {"a": {"kernel": nnx.Param(np.zeros((8, 8), "f"))}},
            "q": {"b": {"kernel": nnx.Param(np.zeros((8, 7), "f"))}},
        }
    )
    target = {"model": model, "opt_state": optax.adam(1e-3).init(nnx.to_pure_dict(model))}
    tree = traverse_util.unflatten_dict(
        {path: np.ones(shape, "f") for path, shape in (stored | moments).items()}
        | {"opt_state/0/count": np.int32(3), "step": np.int32(3)},
        sep="/",
    )

    text = str(plan_of(target, tree, [RENAME]).error())

    assert "other groups" not in text
    assert "by itself" not in text
