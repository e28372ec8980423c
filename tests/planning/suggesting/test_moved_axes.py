"""Groups of layers stacked along another axis: hints and `suggest` move all of a group, or ask."""

import jax
import numpy as np
import pytest

from orbax_nnx_handler import RestoreError, Transpose, from_linen, suggest
from tests.planning.suggesting.proposals import abstract, check, filled, proposed, restored, variables_of


def _numbers(start, *shape):
    return np.arange(start, start + np.prod(shape), dtype=np.float32).reshape(shape)


def _target(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _stacked(layer_shapes, length, axis):
    """Returns a checkpoint with the layers of each leaf along an axis, and as wanted: along the first."""
    wanted = {
        name: _numbers(1000 * at, length, *shape) for at, (name, shape) in enumerate(layer_shapes.items())
    }
    stored = {name: np.moveaxis(x, 0, min(axis, x.ndim - 1)) for name, x in wanted.items()}
    return {"params": {"layers": stored}}, {"layers": wanted}


def _refused(variables, wanted):
    with pytest.raises(RestoreError) as caught:
        from_linen(variables, _target(wanted))
    return caught.value


def _hinted(error):
    return [rule for hint in error.hints for rule in hint.arguments.get("renames", ())]


def _check(variables, wanted, rules):
    jax.tree.map(np.testing.assert_array_equal, from_linen(variables, _target(wanted), renames=rules), wanted)


GROUPS = {
    "a kernel of as many inputs": ({"kernel": (8, 16), "bias": (16,)}, 8, 1),
    "two kernels": ({"up": (8, 32), "down": (32, 8)}, 8, 1),
    "a scale as long as the layers are many": ({"kernel": (8, 16), "scale": (8,), "bias": (16,)}, 8, 1),
    "nothing of one length": ({"kernel": (6, 16), "scale": (5,), "bias": (16,)}, 8, 1),
    "a name with a number in it": ({"kernel": (4, 16), "k2": (16, 4)}, 4, 2),
}


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_the_hint_moves_every_leaf_of_the_group(group):
    variables, wanted = _stacked(*group)

    error = _refused(variables, wanted)

    _check(variables, wanted, _hinted(error))


@pytest.mark.parametrize("group", [*GROUPS.values()][:-1], ids=[*GROUPS][:-1])
def test_suggest_moves_every_leaf_of_the_group(group):
    variables, wanted = _stacked(*group)

    found = suggest(variables, _target(wanted))

    _check(variables, wanted, found.renames)


def test_what_rests_on_the_group_is_not_called_certain():
    variables, wanted = _stacked(*GROUPS["a kernel of as many inputs"])

    assert suggest(variables, _target(wanted)).confidence != "certain"
    assert "if all layers of 'layers' lie on axis 1 in the checkpoint and on axis 0" in str(
        _refused(variables, wanted)
    ).replace("\n      ", " ")


def test_an_order_of_axes_beside_another_one_of_the_same_shape_is_not_proposed():
    wanted = {"a": {"kernel": _numbers(0, 4, 16, 4)}}
    stored = {"a": {"kernel": np.moveaxis(wanted["a"]["kernel"], 0, 1)}}

    found = suggest({"params": stored}, _target(wanted))

    assert not found.renames
    assert found.confidence == "open"
    assert "another order, which shapes do not tell: pass a Transpose" in str(found)
    (question,) = found.questions
    assert question.choices == ("transpose (1, 0, 2)", "transpose (2, 0, 1)")
    _check({"params": stored}, wanted, found.answered([0]))


@pytest.mark.parametrize("order", [(4, 3, 0, 1, 2), (4, 0, 1, 2, 3)], ids=["PyTorch", "MLX"])
def test_the_axes_of_space_of_a_kernel_keep_their_order(order):
    stored = filled({"stem/kernel": (3, 5, 5, 3, 6), "Conv_0/kernel": (1, 3, 3, 4, 6)})
    expected = {
        "stem/weight": stored["stem/kernel"].transpose(order),
        "conv/weight": stored["Conv_0/kernel"].transpose(order),
    }

    found, values = proposed(stored, {path: value.shape for path, value in expected.items()})

    assert not found.questions
    check(values, expected)


def test_two_axes_that_explain_a_group_are_a_question():
    variables, wanted = _stacked({"kernel": (4, 4), "k2": (16, 4)}, 4, 2)

    error, found = _refused(variables, wanted), suggest(variables, _target(wanted))

    assert not _hinted(error)
    assert not found.renames
    assert found.confidence == "open"


def _kernels_as_in_pytorch():
    wanted = {
        name: {"kernel": _numbers(1000 * at, *shape)}
        for at, (name, shape) in enumerate({"a": (8, 16), "b": (8, 8), "c": (16, 8)}.items())
    }
    return {"params": jax.tree.map(np.transpose, wanted)}, wanted


def test_a_square_sibling_of_transposed_kernels_is_named_with_its_own_rule():
    variables, wanted = _kernels_as_in_pytorch()

    text = " ".join(str(_refused(variables, wanted)).split())

    assert "b/kernel may be stored so too" in text
    assert "then pass [Transpose('b/kernel', (1, 0))] as well" in text
    _check(variables, wanted, [Transpose(f"{name}/kernel", (1, 0)) for name in "acb"])


def test_a_hint_with_a_doubt_has_nothing_to_paste_unread():
    variables, wanted = _kernels_as_in_pytorch()

    assert not _hinted(_refused(variables, wanted))


def scanned(width, layers, axis):
    """Returns the arrays of scanned blocks, each square, and the first layer of each in its place."""
    shapes = {f"attn/{name}/kernel": (width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    shapes |= {f"attn/{name}/bias": (width,) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    shapes |= {
        "norm/scale": (width,),
        "mlp/up/kernel": (width, 2 * width),
        "mlp/down/kernel": (2 * width, width),
    }
    stored = filled(
        {f"blocks/{path}": (*shape[:axis], layers, *shape[axis:]) for path, shape in shapes.items()}
    )
    return stored, {path: np.moveaxis(value, axis, 0) for path, value in stored.items()}


@pytest.mark.parametrize("layers", [2, 3, 4])
def test_heads_of_a_stack_whose_layers_lie_elsewhere_follow_them(layers):
    stored, front = scanned(16, layers, 1)
    expected = dict(front)
    for name in ("q_proj", "k_proj", "v_proj"):
        for kind, shape in (("kernel", (16, 4, 4)), ("bias", (4, 4))):
            path = f"blocks/attn/{name}/{kind}"
            expected[path] = front[path].reshape(layers, *shape)
    path = "blocks/attn/out_proj/kernel"
    expected[path] = front[path].reshape(layers, 4, 4, 16)

    found, values = proposed(stored, {path: value.shape for path, value in expected.items()})

    assert found.confidence == "likely"
    check(values, expected)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("layers", [2, 3])
def test_arrays_of_a_stack_are_joined_in_each_layer(layers, axis):
    stored, front = scanned(16, layers, axis)
    apart = ("q_proj", "k_proj", "v_proj")
    expected = {path: value for path, value in front.items() if path.split("/")[2] not in apart}
    for kind in ("kernel", "bias"):
        parts = [front[f"blocks/attn/{name}/{kind}"] for name in apart]
        expected[f"blocks/attn/qkv/{kind}"] = np.concatenate(parts, axis=-1)

    found, values = proposed(stored, {path: value.shape for path, value in expected.items()})

    check(values, expected)
    again, _ = proposed(expected, {path: value.shape for path, value in stored.items()})
    assert again.unmatched_wanted == ()
    check(restored(expected, {path: value.shape for path, value in stored.items()}, again.renames), stored)
    assert found.unmatched_wanted == ()


def test_whether_a_matrix_is_turned_is_not_asked_where_it_has_one_row_or_one_column():
    stored = filled({"rate/kernel": (4, 32, 1), "mix/kernel": (4, 8, 8)})
    wanted = {"learning/rate_weight": (4, 1, 32), "learning/mix_weight": (4, 8, 8)}

    found, values = proposed(stored, wanted)

    check(values, {"learning/rate_weight": stored["rate/kernel"].reshape(4, 1, 32)})
    assert [question.choices for question in found.questions] == [("as it is", "transposed")]


def _convolutions(order, **shapes):
    stored = {name: {"kernel": _numbers(1000 * at, *x)} for at, (name, x) in enumerate(shapes.items())}
    wanted = {name: {"weight": x["kernel"].transpose(order)} for name, x in stored.items()}
    return {"params": stored}, wanted


STEMS = {
    "of three colours": (3, 3, 3, 8),
    "of a square": (4, 4, 4, 4),
    "of fewer channels than its sides": (7, 7, 2, 2),
}


@pytest.mark.parametrize("order", [(3, 2, 0, 1), (3, 0, 1, 2)], ids=["PyTorch's", "MLX's"])
@pytest.mark.parametrize("stem", STEMS.values(), ids=STEMS)
def test_convolutions_of_one_model_have_their_axes_in_one_order(stem, order):
    variables, wanted = _convolutions(order, conv_in=stem, conv_1=(3, 3, 8, 16), conv_2=(1, 1, 4, 2))

    found = suggest(variables, _target(wanted))

    assert not found.questions
    _check(variables, wanted, found.renames)


@pytest.mark.parametrize("order", [(2, 1, 0), (2, 0, 1)], ids=["PyTorch's", "MLX's"])
def test_so_have_convolutions_over_time(order):
    variables, wanted = _convolutions(order, conv_in=(3, 3, 8), conv_1=(3, 8, 8), conv_2=(5, 8, 16))

    found = suggest(variables, _target(wanted))

    assert not found.questions
    _check(variables, wanted, found.renames)


def test_of_one_convolution_alone_two_orders_are_asked_about():
    variables, wanted = _convolutions((3, 0, 1, 2), conv_in=(3, 3, 3, 8))

    found = suggest(variables, _target(wanted))

    assert not found.covered
    _check(variables, wanted, found.answered([1]))


def test_a_convolution_over_one_place_may_be_a_matrix():
    kernel = _numbers(0, 1, 1, 4, 8)
    variables, wanted = (
        {"params": {"conv_shortcut": {"kernel": kernel}}},
        {"conv_shortcut": {"weight": kernel[0, 0].T}},
    )

    found = suggest(variables, _target(wanted))

    _check(variables, wanted, found.renames)


def test_a_transposed_convolution_of_as_many_outputs_as_inputs_has_the_order_of_the_others_or_is_asked():
    shapes = {"up_1": (2, 2, 8, 8), "up_2": (2, 2, 8, 4), "conv_1": (3, 3, 4, 4), "conv_2": (3, 3, 4, 8)}
    variables, wanted = _convolutions((3, 2, 0, 1), **shapes)
    for name in ("up_1", "up_2"):
        wanted[name] = {"weight": variables["params"][name]["kernel"].transpose(2, 3, 0, 1)}

    _check(variables, wanted, suggest(variables, _target(wanted)).renames)
    del variables["params"]["up_2"], wanted["up_2"]

    assert suggest(variables, _target(wanted)).questions


def _of_one_size(before, after):
    return {"params": {"table": _numbers(0, *before)}}, {"table": np.zeros(after, np.float32)}


@pytest.mark.parametrize(
    "shapes", [((7, 7, 16), (16, 7, 7)), ((4, 9, 9), (9, 9, 4)), ((16, 4, 4), (4, 4, 16))]
)
def test_which_of_two_axes_of_one_size_comes_first_is_asked(shapes):
    variables, wanted = _of_one_size(*shapes)

    found = suggest(variables, _target(wanted))

    assert found.confidence == "open"
    assert found.questions


def test_a_matrix_is_turned_as_convolutions_over_one_place_are():
    variables, wanted = _convolutions((2, 1, 0), conv_in=(3, 4, 8), conv_1=(1, 8, 8))
    logits = _numbers(5000, 8, 8)
    variables["params"]["logits"], wanted["logits"] = (
        {"kernel": logits},
        {"weight": logits.T[:, :, None, None]},
    )

    _check(variables, wanted, suggest(variables, _target(wanted)).renames)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("names", [("up", "gate"), ("w1", "w2")], ids="/".join)
def test_matrices_of_stacks_along_one_axis_on_both_sides_are_turned_within_their_layers(axis, names):
    sources = {"up_proj/kernel": names[0], "gate_proj/kernel": names[1], "down_proj/kernel": "down"}
    shapes = {path: (20, 8) if "down" in path else (8, 20) for path in sources} | {"norm/scale": (8,)}
    stored = filled({f"layers/{path}": (*x[:axis], 3, *x[axis:]) for path, x in shapes.items()})
    order = (0, 2, 1) if axis == 0 else (2, 1, 0)
    right = {f"h/{to}/weight": stored[f"layers/{path}"].transpose(order) for path, to in sources.items()}
    right["h/ln/weight"] = stored["layers/norm/scale"]
    wanted = {path: x.shape for path, x in right.items()}

    found = suggest(variables_of(stored), abstract(wanted))

    assert len(found.questions) == (names == ("w1", "w2"))
    check(restored(stored, wanted, found.answered([0] * len(found.questions))), right)
