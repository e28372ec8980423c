"""Hints are followed one after the other, rules of `suggest` included: in a few steps, to a fit."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx, traverse_util

from orbax_nnx_handler import plan_restore, suggest
from tests.planning.suggesting.proposals import Model, abstract, filled, variables_of

STEPS = 3


def followed(variables, target):
    """Returns the plan to which the first hint of each error leads that says what to pass."""
    passed = {"renames": ()}
    plan = plan_restore(variables, target, init=lambda: None)
    for _ in range(STEPS):
        if not plan.fits:
            hint = next(x for x in plan.error().hints if x.arguments or (x.command or "").startswith("sugg"))
            if hint.command:
                given = passed["renames"] if hint.command == "suggest more" else ()
                passed["renames"] = [*given, *suggest(variables, target, renames=given).renames]
            passed |= hint.arguments
            plan = plan_restore(variables, target, init=lambda: None, **passed)
    return plan


def block(names, width=16):
    """Returns the shapes of a block: an attention, two dense layers and two norms."""
    *attention, up, down, first, second = names
    shapes = {f"{name}/kernel": (width, width) for name in attention}
    shapes |= {f"{up}/kernel": (width, 4 * width), f"{down}/kernel": (4 * width, width)}
    shapes |= {f"{path.rpartition('/')[0]}/bias": shape[1:] for path, shape in shapes.items()}
    return shapes | {f"{norm}/{kind}": (width,) for norm in (first, second) for kind in ("scale", "bias")}


def layers(pattern, names, count=2):
    return {f"{pattern.format(at)}/{path}": x for at in range(count) for path, x in block(names).items()}


def dense(name, *shape):
    return {f"{name}/kernel": shape, f"{name}/bias": shape[1:]}


THEIRS = [f"attn/{name}" for name in ("query", "key", "value", "out")]
THEIRS += ["MlpBlock_0/Dense_0", "MlpBlock_0/Dense_1", "LayerNorm_0", "LayerNorm_1"]
OURS = [f"attn/{name}" for name in "qkvo"] + ["mlp/fc1", "mlp/fc2", "norm1", "norm2"]
VIT = dense("embedding", 48, 16) | layers("encoderblock_{}", THEIRS)
OUR_VIT = dense("patch_embed", 48, 16) | layers("blocks/{}", OURS)
CNN = dense("Conv_0", 9, 8) | dense("Conv_1", 8, 16)
OUR_CNN = dense("conv1", 9, 8) | dense("conv2", 8, 16)
DECODER = layers("decoderblock_{}", THEIRS) | dense("decoder_pred", 16, 48) | {"mask_token": (1, 1, 16)}
CHANGES = {
    "all is renamed, and the classes are others": (
        CNN | dense("Dense_0", 16, 1000),
        OUR_CNN | dense("fc", 16, 10),
    ),
    "a head of the same name": (VIT | dense("head", 16, 1000), OUR_VIT | dense("head", 16, 10)),
    "a head of another name": (VIT | dense("head", 16, 1000), OUR_VIT | dense("classifier", 16, 10)),
    "only the head has another name": (VIT | dense("head", 16, 1000), VIT | dense("classifier", 16, 10)),
    "a decoder is left behind": (VIT | DECODER, VIT | dense("classifier", 16, 10)),
}


@pytest.mark.parametrize("case", CHANGES.values(), ids=CHANGES)
def test_a_new_head_is_initialised_and_all_else_restored(case):
    """What nothing unused has the shapes of is new, whatever else is left over."""
    stored, wanted = case

    plan = followed(variables_of(filled(stored)), abstract(wanted))

    assert plan.fits
    new = {path for path in wanted if path.startswith(("fc/", "head/", "classifier/"))}
    assert {"/".join(map(str, path)) for path in plan.missing} == new
    assert {item.policy for item in plan.missing.values()} == {"init"}


def test_what_could_be_stored_under_another_name_is_not_said_to_be_new():
    stored = dense("a", 4, 4) | dense("head", 4, 3) | dense("other", 3, 4)

    plan = plan_restore(variables_of(filled(stored)), abstract(dense("a", 4, 4) | dense("new", 4, 3)))

    assert [cause.kind for cause in plan.causes] != ["NewPart"]


def test_a_kernel_is_not_taken_for_many_biases_in_one_array():
    """Ten biases of 16 have as many elements as a kernel of 16 and 10; none of them is a part of it."""
    kept = dense("a", 16, 16) | dense("b", 16, 16)
    others = {path: shape for at in range(6) for path, shape in dense(f"old_{at}", 4, 16).items()}
    others |= {f"norm_{at}/{kind}": (16,) for at in range(6) for kind in ("scale", "bias")}

    plan = plan_restore(variables_of(filled(kept | others)), abstract(kept | dense("classifier", 16, 10)))

    assert [cause.kind for cause in plan.causes] == ["NewPart"]
    assert {path[0] for cause in plan.causes for path in cause.paths} == {"classifier"}


def test_a_part_of_another_size_under_another_name_is_shown_beside_the_new_one():
    stored = dense("a", 4, 4) | dense("b", 4, 8) | dense("head", 4, 1000)
    wanted = dense("a", 4, 4) | dense("b", 4, 8) | dense("fc", 4, 10)

    error = str(plan_restore(variables_of(filled(stored)), abstract(wanted)).error()).replace(
        "\n       ", " "
    )

    assert "or has it in another size (params/head/kernel (4, 1000) for fc/kernel (4, 10))." in error
    assert "hint: if it is the same part, build the target with the stored sizes." in error
    assert 'hint: or pass policy={nnx.PathContains("fc"): "init", ...: "error"} to initialise' in error


def test_a_hint_leads_to_the_question_that_suggest_asks_and_its_answer_on_to_a_fit():
    network = dense("mlp/a", 3, 3) | dense("mlp/b", 3, 4)
    stored = {f"{of}_{path}": shape for of in ("coarse", "fine") for path, shape in network.items()}
    variables = variables_of(filled(stored))
    target = abstract(dense("net/x", 3, 3) | dense("net/y", 3, 4) | dense("head", 3, 5))

    (hint, *_) = plan_restore(variables, target).error().hints

    assert hint.command == "suggest"
    assert hint.words.endswith("no name tells which: suggest(variables, target) asks, and takes the answer.")
    found = suggest(variables, target)
    assert [question.choices for question in found.questions] == [("coarse_mlp", "fine_mlp")]
    rules = found.answered([1])
    (cause,) = plan_restore(variables, target, renames=rules).causes
    assert cause.kind == "NewPart"
    policy = {**dict.fromkeys(cause.filters, "init"), ...: "error"}
    made = plan_restore(variables, target, renames=rules, policy=policy, init=lambda: None)
    assert made.fits
    assert made.missing.keys() == {("head", "bias"), ("head", "kernel")}


def test_the_moments_of_a_new_head_are_initialised_with_it_also_beside_an_average():
    """Where an average lies beside the model, an optimizer calls weights by what is below the model alone."""
    params = traverse_util.unflatten_dict(filled(CNN | dense("head", 16, 1000)), sep="/")
    tx = optax.adam(1e-3)
    opt_state = jax.tree.map(np.asarray, tx.init(params))
    tree = {"params": params, "ema_params": params, "opt_state": opt_state, "step": np.int32(1)}
    shapes = traverse_util.unflatten_dict(OUR_CNN | dense("fc", 16, 10), sep="/")

    def make():
        model = Model(shapes)
        return {
            "model": model,
            "ema": Model(shapes),
            "optimizer": nnx.Optimizer(model, tx, wrt=nnx.Param),
        }

    plan = followed(tree, nnx.eval_shape(make))

    assert plan.fits
    new = {(*above, "fc", name) for above in [("model",), ("ema",)] for name in ("kernel", "bias")}
    new |= {("optimizer", "opt_state", 0, of, "fc", x) for of in ("mu", "nu") for x in ("kernel", "bias")}
    assert plan.missing.keys() == new
