"""Which parameters make one part: a scale with its shift, a kernel with its bias, a norm and no token."""

import numpy as np
import pytest

from tests.planning.suggesting.proposals import check, filled, proposed, restored

NORMED = {"h_{}/ln_1": "blocks/{}/norm1", "h_{}/ln_2": "blocks/{}/norm2", "ln_f": "final_norm"}


def test_what_shifts_beside_a_scale_is_a_bias():
    pairs = [(path.format(at), aim.format(at)) for path, aim in NORMED.items() for at in range(3)]
    paths = {
        f"{path}/{leaf}": f"{aim}/{called}"
        for path, aim in pairs
        for leaf, called in (("scale", "scale"), ("bias", "shift"))
    }
    stored = filled(dict.fromkeys(paths, (8,)))

    found, values = proposed(stored, dict.fromkeys(paths.values(), (8,)))

    assert not found.questions
    check(values, {aim: stored[path] for path, aim in paths.items()})


def test_a_module_that_another_part_tells_does_not_take_a_token_for_its_norm():
    stored = filled(
        {
            "vit/embeddings/position_embeddings": (1, 17, 8),
            "vit/embeddings/cls_token": (1, 1, 8),
            "vit/layernorm/scale": (8,),
            "vit/layernorm/bias": (8,),
        }
    )
    aims = ("encoder/pos_embedding", "class_token", "encoder/ln/weight", "encoder/ln/bias")
    right = dict(zip(aims, stored.values(), strict=True))

    found, values = proposed(stored, {aim: value.shape for aim, value in right.items()})

    assert not found.questions
    check(values, right)


def test_the_bias_of_an_ensemble_may_have_an_axis_in_the_place_of_the_inputs():
    sizes = ((5, 9, 16), (5, 16, 16), (5, 16, 14))
    shapes = {f"Dense_{at}/kernel": size for at, size in enumerate(sizes)}
    shapes |= {f"Dense_{at}/bias": size[::2] for at, size in enumerate(sizes)}
    stored = filled(shapes)
    right = {f"lin{at}_w": stored[f"Dense_{at}/kernel"] for at in range(3)}
    right |= {f"lin{at}_b": stored[f"Dense_{at}/bias"][:, None] for at in range(3)}

    found, values = proposed(stored, {aim: value.shape for aim, value in right.items()})

    assert not found.questions
    check(values, right)


def test_weights_and_a_bias_that_begin_alike_are_one_layer():
    stored = filled({"sop_classifier/kernel": (8, 2), "sop_classifier/bias": (2,)})
    aims = ("seq_relationship/output_weights", "seq_relationship/output_bias")
    right = dict(zip(aims, stored.values(), strict=True))
    shapes = {path: value.shape for path, value in right.items()}

    found, _ = proposed(stored, shapes)

    check(restored(stored, shapes, found.answered([0] * len(found.questions))), right)


def test_two_layers_that_are_called_a_gate_are_both_halves_of_an_array_and_asked_about():
    shapes = {"gating_einsum": (2, 8, 24), "linear": (24, 8)}
    stored = filled({f"layer_{at}/mlp/{path}": shape for at in range(2) for path, shape in shapes.items()})
    right = {
        f"block_{at}/{aim}/kernel": stored[f"layer_{at}/mlp/gating_einsum"][half]
        for at in range(2)
        for half, aim in enumerate(("ffw_gating", "ffw_gating_2"))
    }
    lead_back = {f"block_{at}/ffw_linear/kernel": stored[f"layer_{at}/mlp/linear"] for at in range(2)}
    wanted = {path: value.shape for path, value in (right | lead_back).items()}

    found, values = proposed(stored, wanted)

    check(values, lead_back)
    assert len(found.questions) == 1
    check(restored(stored, wanted, found.answered([0])), right | lead_back)


BOXED = {
    "a kernel in a box of its axes' names": (
        {"fc/kernel/value": (4, 8), "fc/bias": (8,)},
        {"dense/weight": ("fc/kernel/value", (1, 0)), "dense/bias": ("fc/bias", None)},
    ),
    "a scalar of a module": (
        {"net/Dense_0/kernel": (4, 8), "net/Dense_0/bias": (8,), "log_scale/value": (3,)},
        {
            "net/layers/0/kernel": ("net/Dense_0/kernel", None),
            "net/layers/0/bias": ("net/Dense_0/bias", None),
            "log_scale/constant": ("log_scale/value", None),
        },
    ),
    "a matrix called so beside others": (
        {f"attn/{name}": (4, 8) for name in ("query", "key", "value")},
        {f"attn/{name[0]}": (f"attn/{name}", None) for name in ("query", "key", "value")},
    ),
}


@pytest.mark.parametrize(("shapes", "made"), BOXED.values(), ids=BOXED)
def test_the_level_of_a_box_is_no_name_of_a_leaf(shapes, made):
    stored = filled(shapes)
    expected = {
        path: stored[source].transpose(axes) if axes else stored[source]
        for path, (source, axes) in made.items()
    }

    _, values = proposed(stored, {path: x.shape for path, x in expected.items()})

    check(values, expected)


@pytest.mark.parametrize("name", ["rel_bias", "relpos_bias", "pos_bias"])
@pytest.mark.parametrize("is_turned", [True, False])
def test_biases_of_relative_positions_may_have_heads_first_or_last_under_any_name(name, is_turned):
    towers = {"encoder": "enc", "decoder": "dec"}
    stored = filled(
        {f"{x}/relpos_bias/rel_embedding": (3, 7) for x in towers} | {"encoder/fc/kernel": (8, 8)}
    )
    tables = {f"{towers[x]}/{name}": stored[f"{x}/relpos_bias/rel_embedding"] for x in towers}
    expected = {path: np.transpose(x) if is_turned else x for path, x in tables.items()}
    expected["enc/fc/kernel"] = stored["encoder/fc/kernel"]

    _, values = proposed(stored, {path: x.shape for path, x in expected.items()})

    check(values, expected)


def test_what_alone_keeps_its_name_in_a_renamed_module_goes_where_all_beside_it_goes():
    """Only `D` is called the same on both sides: all else in `seq` says too that this is `lru`."""
    shapes = {"nu_log": (6,), "theta_log": (6,), "B_re": (6, 8), "B_im": (6, 8), "D": (8,)}
    called = {"nu_log": "log_nu", "theta_log": "log_theta", "B_re": "B_real", "B_im": "B_imag", "D": "D"}
    stored, made = {}, {}
    for at in range(2):
        stored |= {f"layers_{at}/seq/{name}": shape for name, shape in shapes.items()}
        made |= {f"blocks/{at}/lru/{called[name]}": f"layers_{at}/seq/{name}" for name in shapes}
        norms = {f"{block}/norm/{name}": (8,) for block in (f"layers_{at}",) for name in ("scale", "bias")}
        stored |= norms
        made |= {path.replace(f"layers_{at}", f"blocks/{at}"): path for path in norms}
    tree = filled(stored)

    found, values = proposed(tree, {path: stored[source] for path, source in made.items()})

    assert not found.unmatched_wanted
    check(values, {path: tree[source] for path, source in made.items()})
