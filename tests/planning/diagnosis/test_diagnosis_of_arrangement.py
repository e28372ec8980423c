"""The same numbers in another arrangement: every hint is pasted and has to make the restore fit."""

import itertools
import re
from typing import Any

import numpy as np
import optax
import pytest
from flax import nnx

import orbax_nnx_handler
from orbax_nnx_handler import Copy, RestorePlan, plan_restore
from orbax_nnx_handler.planning.core.leaves import StoredLeaf
from orbax_nnx_handler.planning.core.recipes import reads
from orbax_nnx_handler.planning.diagnosis import diagnose
from orbax_nnx_handler.planning.options import RestoreOptions
from orbax_nnx_handler.planning.restore_plan import make_plan
from orbax_nnx_handler.planning.target import flatten_target
from tests.planning.models import abstract, keys, kinds, model, moments, plan, stacked, wanted_moments

Shapes = dict[str, Any]
SCOPE = {"nnx": nnx, **{name: getattr(orbax_nnx_handler, name) for name in orbax_nnx_handler.__all__}}


def stored(shapes: Shapes) -> Shapes:
    return {f"params/{path}": shape for path, shape in shapes.items()}


def pasted(text: str, argument: str) -> Any:
    """Returns an argument of a hint as Python reads it."""
    start = text.index(f"{argument}=") + len(argument) + 1
    depth = 0
    for at, letter in enumerate(text[start:], start):
        depth += (letter in "([{") - (letter in ")]}")
        if not depth:
            return eval(text[start : at + 1], SCOPE)
    raise AssertionError(text)


def projections(shape: tuple[int, ...]) -> Shapes:
    return {f"layers/{at}/{name}/kernel": shape for at in range(2) for name in ("query", "key", "value")}


def other(count: int = 2) -> Shapes:
    return {f"layers/{at}/out/kernel": (7, 12) for at in range(count)}


FUSED = {f"layers/{at}/qkv/kernel": (12, 3, 4, 3) for at in range(2)}
JOINED = {f"layers/{at}/qkv/kernel": (12, 24) for at in range(2)}
TURNED = {"layers/0/up/kernel": (8, 12), "layers/1/up/kernel": (12, 8)}


@pytest.mark.parametrize(
    ("have", "want", "kind"),
    [
        (FUSED, projections((12, 4, 3)), "Fused"),
        (projections((12, 4, 3)), FUSED, "Fused"),
        (JOINED, projections((12, 8)), "Fused"),
        (projections((12, 8)), JOINED, "Fused"),
        (projections((12, 12)), projections((12, 4, 3)), "AxesMerged"),
        (projections((12, 4, 3)), projections((12, 12)), "AxesMerged"),
        ({"head/kernel": (11, 12)}, {"head/kernel": (12, 11)}, "AxesPermuted"),
        (TURNED, {f"layers/{at}/up/kernel": (12, 8) for at in range(2)}, "AxesPermuted"),
    ],
)
def test_the_rules_of_the_hint_make_it_fit(have, want, kind):
    have, want = stored(have | other()), want | other()

    (cause,) = diagnose(plan(have, want))

    assert cause.kind == kind
    assert plan(have, want, renames=pasted(cause.hint.words, "renames")).fits
    assert plan(have, want, **cause.hint.arguments).fits


def test_two_names_that_carry_each_others_shapes_are_told_with_the_renames_that_exchange_them():
    have = {"fpn/lateral3/kernel": (1, 1, 8, 12), "fpn/lateral5/kernel": (1, 1, 32, 12)}
    want = dict(zip(have, reversed(have.values()), strict=True))

    (cause,) = diagnose(plan(stored(have | other()), want | other()))

    assert cause.kind == "NamesExchanged"
    assert cause.text == (
        "the stored 'lateral3' has the shapes of the wanted 'lateral5', and the other way round."
    )
    assert plan(stored(have | other()), want | other(), **cause.hint.arguments).fits


@pytest.mark.parametrize(
    ("have", "want"),
    [
        ({"b/wi/kernel": (8, 24)}, {"b/a/kernel": (8, 16), "b/b/kernel": (8, 8)}),
        ({"b/wi/kernel": (8, 16)}, {"b/a/kernel": (8, 8), "b/b/kernel": (8, 8)}),
        ({"b/a/kernel": (8, 8), "b/b/kernel": (8, 8)}, {"b/wi/kernel": (8, 16)}),
        ({"b/wi/kernel": (8, 2, 4)}, {"b/a/kernel": (8, 4), "b/b/kernel": (8, 4)}),
    ],
)
def test_an_order_of_parts_that_nothing_tells_is_left_to_fill_in(have: Shapes, want: Shapes):
    found = plan(stored(have | other()), want | other())

    (cause,) = diagnose(found)

    assert cause.kind == "Fused"
    assert "b/kernel" in cause.way.words
    assert "(?, ?)" in cause.way.words
    assert "in the order in which they were joined, which no metadata tells" in cause.way.words
    assert not [hint for hint in found.error().hints if hint.arguments]
    with pytest.raises(SyntaxError):
        pasted(cause.way.words, "renames")


def blocks(shapes: Shapes, name: str = "blocks/{}") -> Shapes:
    return {f"{name.format(at)}/{path}": shape for at in range(2) for path, shape in shapes.items()}


NORM = {f"norm{at}/scale": (8,) for at in range(9)}
UNEVEN = {f"attn/{name}/kernel": (8, 8) for name in "qkv"} | {"mlp/kernel": (8, 32)}
GATED = {f"attn/{n}/kernel": (8, w) for n, w in (("q", 8), ("k", 4), ("v", 4))}
GATED |= {"mlp/up/kernel": (8, 16), "mlp/gate/kernel": (8, 12)}


@pytest.mark.parametrize(
    ("have", "want"),
    [
        # Parts of unlike sizes at other depths, in one array; and the other way round.
        ({"linear1/kernel": (8, 56)}, UNEVEN),
        (UNEVEN, {"linear1/kernel": (8, 56)}),
        ({"fused/kernel": (8, 44)}, GATED),
        # Keys that several heads share, in one module or of one name in another.
        ({"a/k/kernel": (8, 4)}, {"a/key/kernel": (8, 16)}),
        ({"a/k/kernel": (8, 4)}, {"b/keys/kernel": (8, 16)}),
        ({"a/k/kernel": (8, 1, 4)}, {"a/key/kernel": (8, 3, 4)}),
    ],
)
@pytest.mark.parametrize("name", ["blocks/{}", "single_{}"])
def test_nothing_is_filled_that_unused_leaves_could_be_side_by_side_or_several_times(
    have: Shapes, want: Shapes, name: str
):
    rules = [("single_{i}", "blocks/{i}")] if name == "single_{}" else []

    error = plan(stored(blocks(have | NORM, name)), blocks(want | NORM), renames=rules).error()

    assert error is not None
    assert "init" not in str(error)


@pytest.mark.parametrize(
    ("have", "want"),
    [
        ({"old/kernel": (8, 57)}, UNEVEN),
        ({"old/kernel": (8, 5)}, {"a/new/kernel": (8, 16)}),
        ({"a/k/kernel": (8, 16)}, {"a/new/kernel": (8, 4)}),
        ({"a/query/kernel": (8, 4)}, {"b/head/kernel": (8, 16)}),
    ],
)
def test_what_no_unused_leaf_could_be_may_be_filled(have: Shapes, want: Shapes):
    error = plan(stored(blocks(have | NORM)), blocks(want | NORM)).error()

    assert "init" in str(error)


def within(outer: int, inner: int, shapes: dict[str, tuple[int, ...]]) -> Shapes:
    """Returns layers within layers, one by one."""
    places = [(i, j) for i in range(outer) for j in range(inner)]
    return {f"out/{i}/layers/{j}/{name}": shape for i, j in places for name, shape in shapes.items()}


@pytest.mark.parametrize("beside", [{}, other()], ids=["alone", "beside others"])
@pytest.mark.parametrize(
    ("leaves", "wanted", "axes"),
    [
        ({"w": (2, 3, 4, 5)}, {"w": (4, 5)}, (0,)),
        ({"w": (4, 3, 2, 5)}, {"w": (4, 5)}, (2,)),
        ({"w": (3, 2, 4, 5), "b": (3, 2, 5)}, {"w": (4, 5), "b": (5,)}, (1,)),
        ({"w": (2, 3, 2, 5)}, {"w": (2, 5)}, (0, 2)),
    ],
)
def test_a_scan_within_a_scan_is_taken_apart_by_the_rule_of_the_hint(leaves, wanted, axes, beside):
    have = stored({f"out/layers/{name}": shape for name, shape in leaves.items()} | beside)
    want = within(2, 3, wanted) | beside

    (cause,) = diagnose(plan(have, want))

    assert (cause.kind, cause.facts["axes"]) == ("NestedStacks", axes)
    assert plan(have, want, renames=pasted(cause.hint.words, "renames")).fits
    # Which of two axes it is, only the reader knows.
    assert bool(cause.hint.arguments) == (len(axes) == 1)
    assert plan(have, want, **cause.hint.arguments).fits == (len(axes) == 1)


def test_a_stack_on_another_axis_is_turned_also_where_its_layers_are_square():
    have = stored({"layers/up/kernel": (3, 5, 3), "layers/up/bias": (3, 5)} | other())
    want = {"layers/up/kernel": (5, 3, 3), "layers/up/bias": (5, 3)} | other()

    (cause,) = diagnose(plan(have, want))

    assert cause.kind == "AxesPermuted"
    assert "if all layers of 'layers/up' lie on axis 1 in the checkpoint and on axis 0" in cause.hint.words
    turned = plan(have, want, renames=pasted(cause.hint.words, "renames"))
    assert turned.fits
    assert turned.restored["layers", "up", "kernel"].transform.endswith(", transpose (1, 0, 2)")


def test_a_wrapper_that_linen_numbered_is_renamed_by_the_rule_of_the_hint():
    inner, statistic = ("params", "up", "kernel"), ("params", "WeightNorm_0", "up/kernel/scale")
    leaves = {
        path: StoredLeaf(path=path, shape=shape, dtype=np.dtype(np.float32))
        for path, shape in ((inner, (8, 12)), (statistic, (12,)))
    }
    wanted = {"wn/layer_instance/kernel": (8, 12), "wn/scales/kernel": (12,)}
    target = flatten_target(
        nnx.from_flat_state([(keys(p), nnx.Param(abstract(s))) for p, s in wanted.items()])
    )

    (cause,) = diagnose(make_plan(target, leaves, RestoreOptions.of()))

    assert cause.kind == "OtherWrapper"
    assert cause.hint.words == "if it is the same, pass renames=[('WeightNorm_0', 'wn')]."
    assert make_plan(target, leaves, RestoreOptions.of(**cause.hint.arguments)).fits


def test_weights_that_carry_each_others_names_are_read_in_both_ways():
    have = stored({"up/kernel": (8, 12), "down/kernel": (12, 8)} | other())
    want = {"up/kernel": (12, 8), "down/kernel": (8, 12)} | other()

    (cause,) = diagnose(plan(have, want))

    assert cause.kind == "AxesPermuted"
    assert cause.facts["swapped"] == ("down", "up")
    assert plan(have, want, renames=[("down", "up"), ("up", "down")]).fits
    assert plan(have, want, renames=pasted(cause.hint.words, "renames")).fits
    assert plan(have, want, **cause.hint.arguments).fits


def test_a_fused_array_of_another_size_is_no_fused_array():
    have = stored({"qkv/kernel": (12, 25)} | other())
    want = {f"{name}/kernel": (12, 8) for name in ("query", "key", "value")} | other()

    assert "Fused" not in kinds(diagnose(plan(have, want)))


def test_a_square_kernel_is_not_said_to_be_turned():
    assert diagnose(plan(stored({"up/kernel": (8, 8)}), {"up/kernel": (8, 8)})) == ()


def test_a_stack_with_fewer_layers_than_wanted_one_by_one_is_another_number_of_layers():
    have = stored(stacked(3) | {"head/kernel": (4, 11)})

    (cause,) = diagnose(plan(have, model(5, "", "layers/{}") | {"embed/embedding": (11, 4)} | {}))[:1]

    assert cause.kind == "LayerCount"
    assert (cause.facts["stored"], cause.facts["wanted"]) == (3, 5)


def test_layers_that_are_numbered_from_one_are_shifted_and_the_renames_restore():
    have = {re.sub(r"layers_(\d)", lambda m: f"layers_{int(m[1]) + 1}", k): v for k, v in model(3).items()}
    want = model(3, "", "layers/{}")

    (cause,) = diagnose(plan(have, want))

    assert cause.kind == "LayersShifted"
    assert plan(have, want, renames=pasted(cause.hint.words, "renames")).fits
    assert plan(have, want, **cause.hint.arguments).fits


@pytest.mark.parametrize("name", ["fc", "conv", "block", "layer", "q"])
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("above", ["", "encoder/"])
def test_a_hint_never_leaves_a_list_that_counts_from_another_number_read_one_layer_off(
    name: str, first: int, above: str
):
    # All but one fit by equal names: the one that is left over is not the one that is missing.
    rest = {"kernel": (4, 4), "bias": (4,)}
    here, there = (
        {f"{above}{name}{at}/{k}": v for at in range(n, n + 3) for k, v in rest.items()}
        for n in (first, 1 - first)
    )
    have, want = stored(there | {"stem/kernel": (8, 4)}), here | {"stem/kernel": (8, 4)}

    (cause,) = diagnose(plan(have, want))

    assert cause.kind == "LayersShifted"
    fitting = plan(have, want, **cause.hint.arguments)
    assert fitting.fits
    for path, item in fitting.restored.items():
        old = re.sub(rf"{name}(\d)", lambda m: f"{name}{int(m[1]) + 1 - 2 * first}", "/".join(path))
        assert reads(item.recipe) == (("params", *old.split("/")),)


def test_where_the_search_asks_how_a_list_counts_no_rename_is_offered_and_the_numbers_are_told():
    # A U-Net's way up may be counted from either end.
    rest = {"kernel": (4, 4), "bias": (4,)}
    have = stored({f"up{at}/{k}": v for at in (1, 2, 3) for k, v in rest.items()} | {"stem/kernel": (8, 4)})
    want = {f"up{at}/{k}": v for at in (0, 1, 2) for k, v in rest.items()} | {"stem/kernel": (8, 4)}

    (cause,) = diagnose(plan(have, want))

    assert (
        cause.text == "the 3 layers of 'up' are numbered 1 to 3 in the checkpoint and 0 to 2 in the target."
    )
    assert cause.hint.command == "suggest"
    assert not cause.hint.arguments


def test_layers_one_by_one_under_another_name_come_with_the_rename_that_restores():
    have, want = model(2, name="block_{}"), model(2, "", "layers/{}")

    (cause,) = diagnose(plan(have, want))

    assert cause.kind == "OtherGroup"
    assert plan(have, want, renames=pasted(cause.hint.words, "renames")).fits
    assert plan(have, want, **cause.hint.arguments).fits


def test_several_other_names_are_renames_where_path_and_shape_leave_no_choice():
    want = model(2, "", "layers/{}")
    have = {k.replace("/up/", "/wi/").replace("head", "output"): v for k, v in model(2).items()}

    (cause,) = diagnose(plan(have, want))

    assert cause.kind == "OtherNames"
    assert cause.facts["renames"] == (("output", "head"), ("wi", "up"))
    assert plan(have, want, renames=cause.facts["renames"]).fits


def test_names_that_could_go_either_way_are_left_to_suggest():
    want = {f"attention/{name}/kernel": (4, 6) for name in ("query", "key")} | other()
    have = stored({f"attention/{name}/kernel": (4, 6) for name in ("a", "b")} | other())

    (cause,) = diagnose(plan(have, want))

    assert cause.kind == "OtherNames"
    assert cause.facts["renames"] == ()


def test_biases_that_are_stored_nowhere_were_never_there():
    want = {
        f"{name}/{leaf}": shape
        for name in ("up", "down")
        for leaf, shape in (("kernel", (4, 6)), ("bias", (6,)))
    }
    have = stored({path: shape for path, shape in want.items() if "bias" not in path})

    (cause,) = diagnose(plan(have, want))

    assert cause.kind == "NoBias"
    assert cause.facts["modules"] == ()
    assert plan(have, want, policy=pasted(cause.hint.words, "policy"), init=lambda: None).fits


def test_biases_of_one_kind_of_module_are_told_from_those_of_the_others():
    norms = {f"norm{at}/scale": (4,) for at in range(2)}
    want = {"up/kernel": (4, 6), "up/bias": (6,)} | norms | {f"norm{at}/bias": (4,) for at in range(2)}
    have = stored({"up/kernel": (4, 6), "up/bias": (6,)} | norms)

    (cause,) = diagnose(plan(have, want))

    assert cause.kind == "NoBias"
    assert cause.facts["modules"] == ("norm",)


def test_an_output_layer_that_is_the_embedding_turned_may_be_tied():
    want = {"embed/embedding": (11, 4), "head/kernel": (4, 11)} | other()
    have = stored({"embed/embedding": (11, 4)} | other())

    (cause,) = diagnose(plan(have, want))

    assert cause.kind == "TiedEmbedding"


@pytest.mark.parametrize(
    "wanted", ["head/weight", "lm_head/embedding", "unembed/embedding", "decoder/weight"]
)
def test_a_head_of_the_shape_of_a_stored_table_is_a_copy_of_it_before_it_is_a_new_one(wanted: str):
    table = {"embed/embedding": (11, 4)}
    report = plan(stored(table | other()), {wanted: (11, 4)} | table | other())

    first, *rest = report.error().hints

    assert first.arguments["renames"] == [Copy("params/embed/embedding", wanted)]
    assert plan(stored(table | other()), {wanted: (11, 4)} | table | other(), **first.arguments).fits
    assert all(hint.words.startswith("or ") for hint in rest if hint.arguments)


def test_a_table_of_positions_as_long_as_the_vocabulary_is_no_copy_of_it():
    have = stored({"embed/embedding": (11, 4)} | other())

    found = diagnose(plan(have, {"embed/embedding": (11, 4), "pos_embed/embedding": (11, 4)} | other()))

    assert "TiedEmbedding" not in kinds(found)


def test_keys_that_join_levels_by_dots_come_with_the_rule_that_takes_them_apart():
    want = model(2, "", "layers/{}")
    have = {
        f"params/{path.removeprefix('params/').replace('/', '.')}": shape for path, shape in model(2).items()
    }

    (cause,) = diagnose(plan(have, want))

    assert cause.kind == "FlatKeys"
    assert plan(have, want, renames=pasted(cause.hint.words, "renames")).fits
    assert plan(have, want, **cause.hint.arguments).fits


def test_an_output_layer_of_another_shape_is_a_new_part():
    have = stored({"embed/embedding": (11, 4)} | other())

    found = diagnose(plan(have, {"embed/embedding": (11, 4), "head/kernel": (4, 9)} | other()))

    assert "TiedEmbedding" not in kinds(found)


def test_a_checkpoint_of_scalars_holds_no_weights():
    (cause,) = diagnose(plan({"step": ()}, model(1, "", "layers/{}")))

    assert cause.kind == "NoWeights"
    assert cause.text == "the checkpoint holds no weights: all it holds is step."


def test_a_layout_that_was_named_and_does_not_fit_is_said_so():
    (cause,) = diagnose(plan(model(1), model(1, "", "layers/{}"), layout="t5x"))

    assert cause.kind == "LayoutGiven"
    assert plan(model(1), model(1, "", "layers/{}")).fits


@pytest.mark.parametrize("more", [{}, {"bn/scale": (4,)}], ids=["all is read", "some is missing"])
def test_a_layout_that_was_named_and_reads_names_otherwise_is_the_one_hint(more):
    found = plan(model(1), model(1, "", "layers/{}") | more, layout="maxtext")
    error = found.error()

    assert [hint.arguments for hint in error.hints] == [{"layout": "auto"}]
    assert error.causes[0].text.startswith("the checkpoint was read as MaxText, as layout=... asks, but")
    assert str(error).endswith("\nhint: leave layout=... out: it is found out from the metadata.")
    assert str(error).count("hint: ") == 1


def test_a_moment_more_is_told_from_another_optimizer():
    weights, wanted = model(1), model(1, "model/", "layers/{}")
    have = weights | moments("mu", weights, "params/") | {"step": ()}

    ema = {path.replace("/0/", "/1/"): leaf for path, leaf in wanted_moments("ema", wanted).items()}

    (cause,) = diagnose(plan(have, wanted | wanted_moments("mu", wanted) | ema))

    assert cause.kind == "OtherOptimizer"
    assert cause.text == "the target's optimizer keeps ema as well; the stored one does not, it keeps mu."


def test_a_state_with_a_moment_more_is_another_optimizers():
    weights, wanted = model(1), model(1, "model/", "layers/{}")
    have = weights | moments("mu", weights, "params/") | {"step": ()}

    (cause,) = diagnose(plan(have, wanted | wanted_moments("mu", wanted) | wanted_moments("nu", wanted)))

    assert cause.kind == "OtherOptimizer"
    assert cause.text == (
        "the checkpoint was written with another optimizer: it keeps mu, the target's keeps mu and nu."
    )


def test_moments_in_other_places_are_an_optimizer_that_is_nested_otherwise():
    weights, wanted = model(1), model(1, "model/", "layers/{}")
    first = moments("mu", weights, "params/")
    second = {path.replace("opt_state/0", "opt_state/1"): shape for path, shape in first.items()}
    third = {path.replace("/0/", "/2/"): leaf for path, leaf in wanted_moments("mu", wanted).items()}

    (cause,) = diagnose(plan(weights | first | second | {"step": ()}, wanted | third))

    assert cause.kind == "OptimizerNested"
    assert (cause.facts["stored"], cause.facts["wanted"]) == ("{0..1}/mu", "2/mu")


class _Network(nnx.Module):
    def __init__(self):
        self.Dense_0 = nnx.Linear(3, 4, rngs=nnx.Rngs(0))


class _Trained(nnx.Module):
    def __init__(self):
        self.model = _Network()
        self.optimizer = nnx.Optimizer(self.model, optax.adam(1e-3), wrt=nnx.Param)


class _Both(nnx.Module):
    def __init__(self):
        self.gen, self.critic = _Trained(), _Trained()


RENAMED = [("disc/params", "critic/params")]


@pytest.mark.parametrize(
    ("rules", "what"),
    [
        (RENAMED, "optimizer"),
        ([("disc", "critic"), ("critic/opt_state", "critic/optimizer/opt_state")], "step"),
    ],
)
def test_what_a_renamed_network_leaves_behind_comes_with_the_rule_to_paste(rules: list[Any], what: str):
    params = {"Dense_0": {"kernel": np.ones((3, 4), "f"), "bias": np.ones(4, "f")}}
    state = {"params": params, "opt_state": optax.adam(1e-3).init(params), "step": np.int32(3)}
    tree, target = {"gen": state, "disc": state}, nnx.eval_shape(_Both)

    message = str(plan_restore(tree, target, renames=rules).error())

    assert f"cause: the {what} that is wanted below 'critic/optimizer' is stored below 'disc'" in message
    assert "init" not in message
    assert plan_restore(tree, target, renames=[*pasted(message, "renames"), *rules]).fits


def test_a_new_network_with_an_optimizer_of_its_own_is_a_new_part_and_no_other_optimizer():
    params = {"Dense_0": {"kernel": np.ones((3, 4), "f"), "bias": np.ones(4, "f")}}
    state = {"params": params, "opt_state": optax.adam(1e-3).init(params), "step": np.int32(3)}

    target = nnx.eval_shape(lambda: {name: _Trained() for name in ("critic", "gen", "value")})

    found = plan_restore({"gen": state, "critic": state}, target).error().causes

    assert kinds(found) == ["NewPart"]
    assert found[0].facts["names"] == ("value",)


def quantised(scale: str) -> RestorePlan:
    leaves = {"params/up/kernel": ((4, 6), np.int8), f"params/up/{scale}": ((6,), np.float32)}
    have = {keys(k): StoredLeaf(path=keys(k), shape=s, dtype=np.dtype(d)) for k, (s, d) in leaves.items()}
    want = flatten_target(nnx.State({"up": {"kernel": nnx.Param(abstract((4, 6)))}}))
    return make_plan(want, have, RestoreOptions.of())


def test_integers_with_scales_beside_them_are_quantised():
    assert kinds(diagnose(quantised("kernel_scale"))) == ["Quantised"]


def test_integers_without_scales_are_not_said_to_be_quantised():
    assert diagnose(quantised("bias")) == ()


def test_a_policy_of_several_causes_fills_all_of_them_and_nothing_else():
    weights, wanted = model(2), model(3, "model/", "layers/{}") | {"model/classifier/kernel": (4, 3)}
    wanted |= wanted_moments("mu", wanted)

    message = str(plan(weights, wanted).error())

    policy = pasted(message, "policy")
    assert plan(weights, wanted, policy=policy, init=lambda: None).fits
    del weights["params/embed/embedding"]
    assert not plan(weights, wanted, policy=policy, init=lambda: None).fits


@pytest.mark.parametrize("count", [2, 3])
def test_layers_of_other_numbers_are_not_said_to_be_layers_of_another_name(count):
    have = stored({f"Dense_{at}/{name}": (5, 5) for at in range(count) for name in ("kernel", "scale")})
    want = {f"layers/{2 * at}/{name}": (5, 5) for at in range(count) for name in ("kernel", "scale")}

    causes = diagnose(plan(have, want))

    assert "OtherGroup" not in kinds(causes)
    assert not any("renames" in cause.hint.arguments for cause in causes if cause.hint)


def test_one_module_that_linen_named_is_spelt_as_it_is_stored():
    shapes = {"kernel": (3, 4), "bias": (4,), "A": (3, 2)}
    have, want = (
        stored({f"Dense_0/{k}": v for k, v in shapes.items()}),
        {f"low/{k}": v for k, v in shapes.items()},
    )

    (cause,) = diagnose(plan(have, want))

    assert cause.kind == "OtherGroup"
    assert cause.hint.arguments == {"renames": [("Dense_0", "low")]}
    assert plan(have, want, **cause.hint.arguments).fits


def test_gates_of_unlike_shapes_are_no_cell():
    gates = {f"{side}{gate}/kernel": (2, 2) for side in "ih" for gate in "ifgo"} | {"ii/kernel": (2, 4)}
    error = plan(stored({f"cell/{k}": v for k, v in gates.items()}), {"cell/dense_i/kernel": (2, 10)}).error()
    assert isinstance(error, orbax_nnx_handler.RestoreError)


def test_an_optimizer_of_the_same_names_is_not_said_to_be_for_other_groups(tmp_path):
    def state(tx):
        model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
        return {"model": model, "optimizer": nnx.Optimizer(model, tx, wrt=nnx.Param)}

    params = {"kernel": np.ones((3, 4), np.float32), "bias": np.ones(4, np.float32)}
    stored = {"params": params, "opt_state": optax.adam(0.1).init(params), "step": np.int32(1)}
    text = str(plan_restore(stored, nnx.eval_shape(lambda: state(optax.novograd(0.1)))).error())
    assert "other groups" not in text
    assert "have other shapes" in text


class _Agent(nnx.Module):
    def __init__(self, suffix: str):
        for name in ("actor", "critic"):
            setattr(self, name, _Network())
            optimizer = nnx.Optimizer(getattr(self, name), optax.adam(1e-3), wrt=nnx.Param)
            setattr(self, f"{name}{suffix}", optimizer)


def _train_state() -> dict[str, Any]:
    params = {"Dense_0": {"kernel": np.ones((3, 4), "f"), "bias": np.ones(4, "f")}}
    return {"params": params, "opt_state": optax.adam(1e-3).init(params), "step": np.int32(3)}


@pytest.mark.parametrize("suffix", ["_opt", "_optimizer"])
def test_optimizers_beside_their_networks_come_with_the_rules_that_restore_them(suffix: str):
    tree = {name: _train_state() for name in ("actor", "critic")}
    target = nnx.eval_shape(lambda: _Agent(suffix))

    error = plan_restore(tree, target).error()

    assert error is not None
    assert "init" not in str(error)
    (hint,) = (hint for hint in error.hints if "renames" in hint.arguments)
    assert plan_restore(tree, target, **hint.arguments).fits


@pytest.mark.parametrize("name", ["target_critic", "slow_critic"])
def test_a_copy_beside_several_train_states_is_not_said_to_be_stored_nowhere(name: str):
    states = {name: _train_state() for name in ("actor", "critic")}
    tree = states | {f"{name}_params": states["critic"]["params"]}
    target = nnx.eval_shape(lambda: {"actor": _Trained(), "critic": _Trained(), name: _Network()})

    error = plan_restore(tree, target).error()

    assert error is not None
    assert "nothing is stored" not in str(error)
    (hint,) = (hint for hint in error.hints if "renames" in hint.arguments)
    assert hint.arguments["renames"] == [(f"{name}_params", name)]
    assert plan_restore(tree, target, **hint.arguments).fits


def test_an_optimizer_of_a_name_that_no_layout_knows_is_not_said_to_be_unsaved():
    state = _train_state()
    tree = {"params": state["params"], "actor_opt_state": state["opt_state"], "step": state["step"]}
    text = str(plan_restore(tree, nnx.eval_shape(_Trained)).error())
    assert "no optimizer was saved" not in text
    assert "stored below 'actor_opt_state'" in text
    known = {"params": tree["params"], "opt_state": tree["actor_opt_state"], "step": tree["step"]}
    assert plan_restore(known, nnx.eval_shape(_Trained)).fits


def test_an_optimizer_that_lies_beside_its_model_is_told_by_its_form_and_never_begun_anew():
    state = _train_state()
    tree = {"model": {"params": state["params"]}, "optimizer": state["opt_state"]}
    target = nnx.eval_shape(_Trained)

    error = plan_restore(tree, target).error()

    assert error is not None
    assert "no optimizer was saved" not in str(error)
    assert "from_linen({'params': ..., 'opt_state': tree['optimizer']}, target)" in str(error)
    assert all("policy" not in hint.arguments for hint in error.hints)
    known = {"params": state["params"], "opt_state": tree["optimizer"]}
    assert [path[-1] for path in plan_restore(known, target).missing] == ["step"]


@pytest.mark.parametrize(("old", "new"), [("encoder_out", "decoder_in"), ("pre_norm", "post_norm")])
def test_no_hint_takes_a_name_for_its_opposite(old: str, new: str):
    weights = {"kernel": (4, 4), "bias": (4,)}
    have = {f"params/{old}/{name}": shape for name, shape in weights.items()} | {
        "params/trunk/kernel": (4, 6)
    }
    want = {f"{new}/{name}": shape for name, shape in weights.items()} | {"trunk/kernel": (4, 6)}

    error = plan(have, want).error()

    assert error is not None
    assert all("renames" not in hint.arguments for hint in error.hints)


def test_of_two_networks_none_is_said_to_be_the_closest():
    weights = {"a": {"kernel": np.ones((4, 4), "f")}, "b": {"kernel": np.ones((4, 6), "f")}}
    tree = {name: {"params": weights} for name in ("gen", "disc")}
    target = nnx.eval_shape(
        lambda: nnx.Dict(
            **{name: nnx.Dict(kernel=nnx.Param(part["kernel"])) for name, part in weights.items()}
        )
    )

    error = plan_restore(tree, target).error()

    assert error is not None
    assert "closest" not in str(error)
    assert (
        "if it is that of 'disc', or pass renames=[('gen/params', 'params')] if it is that of 'gen'"
        in " ".join(str(error).split())
    )


def test_leaves_that_the_search_finds_elsewhere_are_not_said_to_be_joined():
    have = {f"params/layers_0/{name}/{end}": (8,) for name in ("ln_1", "ln_2") for end in ("scale", "bias")}
    have |= {"params/layers_0/mlp/fc_in/kernel": (8, 16), "params/layers_0/mlp/fc_in/bias": (16,)}
    want = {f"layers/0/{name}/{end}": (8,) for name in ("norm1", "norm2") for end in ("scale", "bias")}
    want |= {"layers/0/up/kernel": (8, 16), "layers/0/up/bias": (16,)}

    assert "Fused" not in kinds(diagnose(plan(have, want)))


def test_modules_beside_each_other_are_taken_from_an_ensemble_by_a_proposal_alone():
    stacked_layers = {f"params/both/{name}/kernel": (2, 3, 4) for name in ("up", "down")}
    wanted = {f"q{at}/{name}/kernel": (3, 4) for at in (1, 2) for name in ("up", "down")}
    kernels = {
        "up": np.arange(24, dtype="f").reshape(2, 3, 4),
        "down": -np.arange(24, dtype="f").reshape(2, 3, 4),
    }
    tree = {"params": {"both": {name: {"kernel": kernel} for name, kernel in kernels.items()}}}
    assert not plan(stacked_layers, wanted).fits
    target = nnx.eval_shape(
        lambda: nnx.Dict(
            **{
                f"q{at}": nnx.Dict(
                    **{n: nnx.Dict(kernel=nnx.Param(np.ones((3, 4), "f"))) for n in ("up", "down")}
                )
                for at in (1, 2)
            }
        )
    )
    found = orbax_nnx_handler.suggest(tree, target)

    assert found.confidence == "likely"
    state = orbax_nnx_handler.from_linen(tree, target, renames=found.renames)
    for at, name in itertools.product((1, 2), kernels):
        np.testing.assert_array_equal(state[f"q{at}"][name]["kernel"].get_value(), kernels[name][at - 1])


def test_a_list_of_which_a_rule_gives_the_first_layer_is_no_shorter_one_where_the_others_may_be_unused():
    """VGG's convolutions, of which only the first one is known by its shape."""
    names = ("conv1_1", "conv1_2", "conv2_1", "conv2_2")
    shapes = {name: (3, 3, 3 if name == names[0] else 8, 8) for name in names}
    stored = {f"params/{name}/kernel": shape for name, shape in shapes.items()}
    wanted = {f"features/conv/{at}/kernel": shape for at, shape in enumerate(shapes.values())}

    causes = diagnose(plan(stored, wanted, renames=[("conv1_1", "features/conv/0")]))

    assert "LayerCount" not in kinds(causes)
    assert "suggest" in causes[0].way.words
