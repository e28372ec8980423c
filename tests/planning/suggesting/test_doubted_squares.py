"""Square matrices that a plan restores by name, beside matrices of their name that are transposed."""

import jax
import numpy as np
import pytest

from orbax_nnx_handler import RestoreError, Transpose, from_linen, suggest
from tests.planning.suggesting.proposals import check, filled, proposed, restored


def _numbers(start, *shape):
    return np.arange(start, start + np.prod(shape), dtype=np.float32).reshape(shape)


def _target(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _check(stored, wanted, rules):
    jax.tree.map(
        np.testing.assert_array_equal, from_linen({"params": stored}, _target(wanted), renames=rules), wanted
    )


def _wanted():
    return {"up": {"kernel": _numbers(0, 16, 8)}, "b": {"up": {"kernel": _numbers(900, 8, 8)}}}


def _layers(at):
    return {"up": {"kernel": _numbers(at, 16, 8)}, "mid": {"kernel": _numbers(at + 200, 8, 8)}}


def _turned(tree):
    return jax.tree.map(lambda x: np.swapaxes(x, -1, -2), tree)


def _stacked(layers):
    return jax.tree.map(lambda *parts: np.stack(parts), *layers)


def test_what_a_plan_restores_as_it_lies_is_not_transposed_because_another_one_is():
    wanted = _wanted()
    stored = {**wanted, "up": _turned(wanted["up"])}

    found = suggest({"params": stored}, _target(wanted))

    assert found.renames == (Transpose("params/up/kernel", (1, 0)),)
    assert (found.confidence, [question.about for question in found.questions]) == ("open", ["transposed"])
    assert found.questions[0].choices == ("as it is", "transposed")
    _check(stored, wanted, found.renames)
    _check(stored, wanted, found.answered([0]))


def test_its_question_answered_transposes_it():
    wanted = _wanted()
    stored = _turned(wanted)

    found = suggest({"params": stored}, _target(wanted))

    _check(stored, wanted, found.answered([1]))
    assert found.questions[0].alternatives[1] == found.answered([1])


LAYERS = [_layers(1000 * at) for at in range(4)]
APART = {f"layers_{at}": layer for at, layer in enumerate(LAYERS)}
LISTED = {"layers": dict(enumerate(LAYERS))}
STACKED = {"layers": _stacked(LAYERS)}


@pytest.mark.parametrize("wanted", [LISTED, STACKED], ids=["list", "stack"])
@pytest.mark.parametrize("stored", [APART, STACKED], ids=["apart", "stacked"])
def test_a_square_matrix_in_every_layer_is_one_question(stored, wanted):
    found = suggest({"params": _turned(stored)}, _target(wanted))

    assert len(found.questions) == 1
    _check(_turned(stored), wanted, found.answered([1]))


def test_a_stack_of_matrices_is_not_transposed_because_the_stack_beside_it_is():
    stored = {"layers": {**STACKED["layers"], "up": _turned(STACKED["layers"]["up"])}}

    found = suggest({"params": stored}, _target(STACKED))
    with pytest.raises(RestoreError) as caught:
        from_linen({"params": stored}, _target(STACKED))

    assert [question.about for question in found.questions] == ["transposed"]
    _check(stored, STACKED, found.renames)
    assert "layers/mid/kernel may be stored so too" in " ".join(str(caught.value).split())


def test_whether_the_square_matrices_of_a_module_are_transposed_is_one_question():
    parts = [(attention, part) for attention in ("attn1", "attn2") for part in ("to_q", "to_k", "to_v")]
    names = {
        f"blocks_{at}/{attention}/{part}/kernel": f"blocks/{at}/{attention}/{part}/weight"
        for at in range(2)
        for attention, part in parts
    }
    stored = filled(dict.fromkeys(names, (4, 4)))
    wanted = dict.fromkeys(names.values(), (4, 4))

    found, _ = proposed(stored, wanted)

    assert [question.about for question in found.questions] == ["transposed", "transposed"]
    values = restored(stored, wanted, found.answered([1, 1]))
    check(values, {other: stored[one].T for one, other in names.items()})


@pytest.mark.parametrize("is_known", [True, False])
def test_kernels_beside_a_turned_one_are_not_taken_as_they_are(is_known):
    around = ("attn/key", "attn/k_proj") if is_known else ("mlp/Dense_0", "mlp/fc1")
    stored = filled(
        {
            "layer/attn/query/kernel": (16, 4, 4),
            "layer/attn/out/kernel": (4, 4, 16),
            f"layer/{around[0]}/kernel": (16, 8) if is_known else (16, 32),
        }
    )
    wanted = {"layer/attn/q_proj/kernel": (16, 16), "layer/attn/o_proj/kernel": (16, 16)}
    turned = f"layer/{around[1]}/kernel"

    found, values = proposed(stored, {**wanted, turned: stored[f"layer/{around[0]}/kernel"].T.shape})

    expected = {
        "layer/attn/q_proj/kernel": stored["layer/attn/query/kernel"].reshape(16, 16).T,
        "layer/attn/o_proj/kernel": stored["layer/attn/out/kernel"].reshape(16, 16).T,
        turned: stored[f"layer/{around[0]}/kernel"].T,
    }
    assert turned in values
    check(values, {path: expected[path] for path in values})
    assert found.covered or found.questions


def test_layers_without_a_name_in_common_are_no_stack():
    stored = filled({f"h/{at}/{name}/kernel": (4, 6) for at in range(2) for name in ("one", "two")})

    found, _ = proposed(stored, {"one/kernel": (2, 4, 6), "two/kernel": (2, 4, 6)})

    assert found.confidence == "open"


def test_a_kernel_beside_a_turned_one_is_not_the_other_layer_of_its_network_as_it_lies():
    stored = filled(
        {
            "layer/attn/key/kernel": (16, 8),
            "layer/ff/layer1/linear/kernel": (16, 64),
            "layer/ff/layer2/linear/kernel": (64, 16),
        }
    )
    names = {
        "attn/k_proj": "attn/key",
        "mlp/up_proj": "ff/layer1/linear",
        "mlp/down_proj": "ff/layer2/linear",
    }
    right = {f"layer/{one}/kernel": stored[f"layer/{other}/kernel"].T for one, other in names.items()}

    _, values = proposed(stored, {path: value.shape for path, value in right.items()})

    assert values.keys() == right.keys()
    check(values, right)


@pytest.mark.parametrize("names", [("fc_1", "fc_2", "proj"), ("Dense_0", "Dense_1", "Dense_2")])
def test_which_of_two_numbered_layers_is_the_gate_is_a_question(names):
    stored, wanted = (
        dict(zip((f"mlp/{x}/kernel" for x in side), [(16, 64), (16, 64), (64, 16)], strict=True))
        for side in (("w1", "w2", "c_proj"), names)
    )
    stored = filled(stored)

    found, values = proposed(stored, wanted)

    back = {f"mlp/{names[2]}/kernel": stored["mlp/c_proj/kernel"]}
    assert values.keys() == back.keys()
    check(values, back)
    gates = [f"mlp/{x}/kernel" for x in names[:2]]
    (question,) = found.questions
    orders = [restored(stored, wanted, found.answered([at])) for at, _ in enumerate(question.choices)]
    ours = stored["mlp/w1/kernel"], stored["mlp/w2/kernel"]
    for order in (ours, ours[::-1]):
        assert any(all(np.array_equal(x[at], y) for at, y in zip(gates, order, strict=True)) for x in orders)


@pytest.mark.parametrize("is_stack", [True, False])
def test_a_stack_of_squares_is_asked_about_beside_a_turned_matrix_that_lies_apart_and_the_other_way_around(
    is_stack,
):
    turned, square = ("head", "blocks/q") if is_stack else ("blocks/up", "head")
    shapes = {
        f"{turned}/kernel": (16, 8) if is_stack else (3, 16, 8),
        f"{square}/kernel": (3, 8, 8) if is_stack else (8, 8),
    }
    stored = filled(shapes)
    names = {"head": "lm_head", "blocks/q": "h/q_proj", "blocks/up": "h/fc"}
    names = {f"{one}/kernel": f"{other}/kernel" for one, other in names.items()}
    expected = {names[path]: np.swapaxes(value, -1, -2) for path, value in stored.items()}

    found, values = proposed(stored, {path: value.shape for path, value in expected.items()})

    assert values.keys() == {names[f"{turned}/kernel"]}
    check(values, {path: expected[path] for path in values})
    assert [question.about for question in found.questions] == ["transposed"]


def test_squares_of_a_block_whose_other_matrices_are_all_transposed_are_too_also_under_the_same_names():
    shapes = {"attn/c_attn": (8, 24), "attn/c_proj": (8, 8), "mlp/c_fc": (8, 32), "mlp/c_proj": (32, 8)}
    wanted = {f"h/{at}/{name}/kernel": shape for at in range(2) for name, shape in shapes.items()}
    stored = filled({f"transformer/{path}": shape[::-1] for path, shape in wanted.items()})

    found, values = proposed(stored, wanted)

    check(values, {path: stored[f"transformer/{path}"].T for path in wanted})
    assert found.questions == ()
