"""Modules whose names begin as those of the layers that they lie in or beside: `layer_norm` in `layer_0`."""

import itertools

import numpy as np
import pytest
from flax import nnx, traverse_util

from orbax_nnx_handler import plan_restore, to_linen
from tests.planning.suggesting.proposals import abstract, check, filled, proposed

DENSE, WIDE, NORM = (
    {"kernel": (8, 16), "bias": (16,)},
    {"kernel": (16, 8), "bias": (8,)},
    {"scale": (8,), "bias": (8,)},
)
MODELS = {
    "the same names within": {
        "layer_{i}/dense": ("layers/{i}/dense", DENSE),
        "layer_{i}/layer_norm": ("layers/{i}/layer_norm", NORM),
    },
    "other names within": {
        "h_{i}/h_proj": ("layers/{i}/fc", DENSE),
        "h_{i}/h_out": ("layers/{i}/proj", WIDE),
        "h_{i}/h_norm": ("layers/{i}/norm", NORM),
    },
    "two levels within": {
        "block_{i}/mixer/block_in": ("blocks/{i}/mixer/w_in", DENSE),
        "block_{i}/mixer/block_out": ("blocks/{i}/mixer/w_out", WIDE),
    },
    "beside the layers, as within": {
        "layer_{i}/dense": ("layers/{i}/fc", DENSE),
        "layer_{i}/layer_norm": ("layers/{i}/norm", NORM),
        "layer_norm": ("ln_f", NORM),
    },
    "beside the layers, staying": {
        "encoder/layer_{i}/dense": ("encoder/layers/{i}/dense", DENSE),
        "encoder/layer_{i}/layer_norm": ("encoder/layers/{i}/layer_norm", NORM),
        "encoder/layer_norm": ("encoder/layer_norm", NORM),
        "head/layer_out": ("head/layer_out", WIDE),
    },
}


def leaves(model, side):
    """Returns the shapes of the stored (0) or of the wanted (1) leaves by their paths, two layers of each."""
    return {
        f"{(stored, wanted)[side].replace('{i}', str(layer))}/{name}": shape
        for layer in range(2)
        for stored, (wanted, module) in model.items()
        for name, shape in module.items()
    }


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_rule_for_layers_leaves_alone_what_is_only_called_like_them(model):
    stored, wanted = filled(leaves(model, 0)), leaves(model, 1)

    found, values = proposed(stored, wanted)

    assert not found.questions
    assert len(found.proposals) <= len(model) + 1
    check(values, dict(zip(wanted, stored.values(), strict=True)))
    state = abstract(wanted)
    state = nnx.from_flat_state(
        [
            (path, nnx.Param(np.asarray(values["/".join(map(str, path))])))
            for path, _ in nnx.to_flat_state(state)
        ]
    )
    saved = to_linen(state, renames=found.renames)
    check(traverse_util.flatten_dict(saved["params"], sep="/"), stored)


def test_the_hint_of_a_plan_is_no_rule_that_takes_what_is_only_called_like_layers():
    model = MODELS["the same names within"]
    stored = {"params": traverse_util.unflatten_dict(filled(leaves(model, 0)), sep="/")}

    plan = plan_restore(stored, abstract(leaves(model, 1)))

    assert "holds the same" in str(plan)
    assert "layer_{i}" not in str(plan)
    assert "suggest" in str(plan)


def test_a_letter_beside_a_bare_parameter_at_the_root_is_read_as_any_other_name():
    stored = {"dev/variance": (3,)}
    wanted = {"variance": (3,)}
    for at in range(3):
        stored |= {f"lin{at}/weight_v": (4, 8), f"lin{at}/bias": (8,)}
        wanted |= {f"layers/{at}/v": (4, 8), f"layers/{at}/bias": (8,)}
    values = filled(stored)
    _, found = proposed(values, wanted)
    for at in range(3):
        np.testing.assert_array_equal(found[f"layers/{at}/v"], values[f"lin{at}/weight_v"])


LETTERS = {
    "a generator is no gate": {
        "G/Conv_0": ("gen/stem/conv", {"kernel": (7, 7, 3, 4)}),
        "G/Conv_1": ("gen/down1/conv", {"kernel": (3, 3, 4, 8)}),
    },
    "the first pointwise convolution may expand": {
        "b_0/expand": ("blocks/0/pw", {"kernel": (8, 32)}),
        "b_0/project": ("blocks/0/pwl", {"kernel": (32, 8)}),
        "b_1/expand": ("blocks/1/pw", {"kernel": (8, 32)}),
        "b_1/project": ("blocks/1/pwl", {"kernel": (32, 8)}),
    },
}


@pytest.mark.parametrize("name", LETTERS)
def test_a_letter_means_what_it_means_there(name):
    stored = leaves(LETTERS[name], 0)
    values = filled(stored)
    found, restored = proposed(values, leaves(LETTERS[name], 1))
    assert not found.unmatched_wanted
    check(restored, {f"{LETTERS[name][at][0]}/kernel": values[f"{at}/kernel"] for at in LETTERS[name]})


def test_the_norm_of_a_full_layer_is_the_last_one_of_its_block():
    block = {
        "attention/query": ("attn/q", {"kernel": (8, 8)}),
        "ffn": ("fc1", DENSE),
        "ffn_output": ("fc2", WIDE),
    }
    norms = {"attention/LayerNorm": ("ln1", NORM), "full_layer_layer_norm": ("ln2", NORM)}
    values = filled(leaves(block | norms, 0))

    _, found = proposed(values, leaves(block | norms, 1))

    for stored, (wanted, _) in norms.items():
        np.testing.assert_array_equal(found[f"{wanted}/scale"], values[f"{stored}/scale"])


def test_a_rule_that_changes_nothing_says_what_it_is_for():
    sizes = {"up": ("up_proj", 5), "down": ("down_proj", 6)}
    stored = filled({f"layer/{at}/{name}/kernel": (4, n) for at in (0, 1) for name, (_, n) in sizes.items()})

    found, _ = proposed(
        stored, {f"layer/{at}/{name}/kernel": (4, n) for at in (0, 1) for name, n in sizes.values()}
    )

    (kept,) = (rule for rule in found.renames if rule.pattern == rule.replacement)
    assert f"    {kept},  # stays as it is, in a save as well" in str(found).splitlines()


@pytest.mark.parametrize("name", ["q", "fc", "layer"])
@pytest.mark.parametrize("inner", ["Dense_{}", "linear_{}"])
def test_a_network_that_is_called_like_a_layer_does_not_tell_which_of_its_layers_that_is(name, inner):
    widths = [(10, 16), (16, 16), (16, 1)]
    stored, expected = {}, {}
    for net, (at, shape) in itertools.product((1, 2), enumerate(widths)):
        path = f"critic/{name}{net}/{inner.format(at)}"
        expected |= {f"critic/{name}{3 * net + at - 2}/kernel": f"{path}/kernel"}
        expected |= {f"critic/{name}{3 * net + at - 2}/bias": f"{path}/bias"}
        stored |= {f"{path}/kernel": shape, f"{path}/bias": shape[1:]}
    values = filled(stored)

    _, found = proposed(values, {aim: stored[path] for aim, path in expected.items()})

    check(found, {aim: values[path] for aim, path in expected.items()})


def test_the_last_layer_of_a_network_that_nothing_else_wants_is_asked_about():
    stored = {f"backbone/Dense_{at}/kernel": (8, 8) for at in range(3)}
    body = {f"backbone/fc{at + 1}/kernel": (8, 8) for at in range(3)}
    head = {"projector/Dense_0/kernel": (8, 8), "projector/Dense_1/kernel": (8, 6)}

    found, values = proposed(filled(stored | head), body | {"fc/kernel": (8, 6)})

    assert values.keys() == body.keys()
    assert len(found.questions) == 1
