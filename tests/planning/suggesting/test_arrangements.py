"""Proposals whose values shapes alone do not tell: square matrices, heads, layers told by a number only."""

import functools
import itertools

import numpy as np
import pytest
from flax import nnx, traverse_util

from orbax_nnx_handler import Rename, UnstackLayers, suggest
from tests.planning.suggesting.proposals import abstract, check, filled, proposed, restored

HEADS = {"query": (12, 3, 4), "key": (12, 3, 4), "value": (12, 3, 4), "out": (3, 4, 12)}
OURS = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}


@pytest.mark.parametrize("kind", ["kernel", "weight", "w"])
def test_heads_that_become_a_square_matrix_are_turned_as_the_matrices_beside_them(kind):
    stored = filled(
        {f"MultiHeadDotProductAttention_0/{name}/kernel": shape for name, shape in HEADS.items()}
        | {"MlpBlock_0/Dense_0/kernel": (12, 48), "MlpBlock_0/Dense_1/kernel": (48, 12)}
    )
    arranged = np.asarray if kind == "kernel" else np.transpose
    expected = {
        f"attn/{OURS[name]}/{kind}": arranged(
            stored[f"MultiHeadDotProductAttention_0/{name}/kernel"].reshape(12, 12)
        )
        for name in HEADS
    } | {f"mlp/fc{at + 1}/{kind}": arranged(stored[f"MlpBlock_0/Dense_{at}/kernel"]) for at in range(2)}

    found, values = proposed(stored, {path: value.shape for path, value in expected.items()})

    check(values, expected)
    assert found.questions == ()


@pytest.mark.parametrize("width", [4, 6])
@pytest.mark.parametrize("kind", ["kernel", "weight"])
def test_heads_go_into_the_layer_that_leads_out_of_an_attention_also_where_they_lie_last(kind, width):
    stored = filled({f"attention/{name}/w": (12, 3, width) for name in ("query", "key", "value", "post")})
    stored |= filled({"ff/linear/w": (12, 40)})
    arranged = np.asarray if kind == "kernel" else np.transpose
    expected = {
        f"attn/{ours}/{kind}": arranged(stored[f"attention/{name}/w"].reshape(12, -1))
        for name, ours in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"))
    }
    expected[f"attn/o_proj/{kind}"] = arranged(stored["attention/post/w"].reshape(12, -1).T)
    expected[f"ffn/{kind}"] = arranged(stored["ff/linear/w"])

    _, values = proposed(stored, {path: value.shape for path, value in expected.items()})

    check(values, expected)


@pytest.mark.parametrize("called", ["weight", "kernel"])
@pytest.mark.parametrize(("heads", "width"), [(2, 4), (3, 4), (2, 6)])
def test_queries_keys_and_values_in_one_array_of_heads_are_turned_as_their_block_is(called, heads, width):
    inputs = heads * width
    stored = filled(
        {
            "attn/qkv/kernel": (inputs, 3, heads, width),
            "attn/out/kernel": (heads, width, inputs),
            "mlp/up/kernel": (inputs, 40),
            "mlp/down/kernel": (40, inputs),
        }
    )
    names = {"attn/in_proj": "attn/qkv", "attn/out_proj": "attn/out", "mlp/up_proj": "mlp/up"}
    expected = {
        f"{ours}/{called}": stored[f"{name}/kernel"]
        .reshape(-1 if ours == "attn/out_proj" else inputs, *rest)
        .T
        for (ours, name), rest in zip(names.items(), [(3 * inputs,), (inputs,), (40,)], strict=True)
    }

    _, values = proposed(stored, {path: value.shape for path, value in expected.items()})

    assert values.keys() == expected.keys()
    check(values, expected)


@pytest.mark.parametrize("layers", [2, 3])
def test_layers_of_a_stack_are_not_the_halves_of_a_fused_kernel(layers):
    stored = filled(
        {
            "layers/norm/scale": (layers, 6),
            "layers/ffn/linear_gate/kernel": (layers, 6, 24),
            "layers/ffn/linear_up/kernel": (layers, 6, 24),
            "layers/ffn/linear_down/kernel": (layers, 24, 6),
        }
    )
    wanted = {
        f"layers/{i}/{name}": shape
        for i in range(layers)
        for name, shape in (
            ("norm/scale", (6,)),
            ("feed_forward/wi/kernel", (6, 48)),
            ("feed_forward/wo/kernel", (24, 6)),
        )
    }

    found, values = proposed(stored, wanted)

    assert {path for path in wanted if path not in values} == {path for path in wanted if "wi" in path}
    both = [stored[f"layers/ffn/linear_{x}/kernel"] for x in ("gate", "up")]
    answers = [
        restored(stored, wanted, found.answered([at])) for at, _ in enumerate(found.questions[0].choices)
    ]
    for order in (both, both[::-1]):
        right = np.concatenate(order, axis=-1)
        assert any(
            all(np.array_equal(x[f"layers/{i}/feed_forward/wi/kernel"], right[i]) for i in range(layers))
            for x in answers
        )


def test_square_kernels_become_heads_as_the_axes_of_the_heads_tell():
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
    stored = filled({f"attention/{name}/kernel": (16, 16) for name in names})
    expected = {
        f"attn/{ours}/w": stored[f"attention/{name}/kernel"].reshape(
            (4, 4, 16) if name == "out" else (16, 4, 4)
        )
        for name, ours in names.items()
    }

    _, values = proposed(stored, {path: value.shape for path, value in expected.items()})

    check(values, expected)


EINSUMS = {"q": "q_einsum/w", "kv": "kv_einsum/w", "o": "attn_vec_einsum/w"}
DENSES = {"q": "query/kernel", "k": "key/kernel", "v": "value/kernel", "o": "out/kernel"}
WIDTHS = [(2, 4, 8), (4, 2, 8), (4, 4, 16), (8, 4, 8), (4, 4, 4), (4, 8, 4)]


def attentions(heads, width, features):
    """Returns the weights of an attention as Gemma has them, with axes of heads, and as matrices."""
    shapes = {"q": (heads, features, width), "kv": (2, heads, features, width), "o": (heads, width, features)}
    gemma = filled({f"attn/{name}": shapes[role] for role, name in EINSUMS.items()})
    query, (key, value), out = (gemma[f"attn/{name}"] for name in EINSUMS.values())
    apart = {"q": query.swapaxes(0, 1), "k": key.swapaxes(0, 1), "v": value.swapaxes(0, 1), "o": out}
    flat = {role: part.reshape(features, -1) for role, part in apart.items()} | {
        "o": out.reshape(-1, features)
    }
    return (
        gemma,
        {f"attn/{DENSES[role]}": part for role, part in apart.items()},
        {f"attn/{role}_proj/kernel": part for role, part in flat.items()},
    )


@pytest.mark.parametrize("sizes", WIDTHS, ids=str)
@pytest.mark.parametrize("side", [0, 1], ids=["heads", "matrices"])
def test_the_names_of_gemmas_queries_tell_heads_from_inputs_whatever_their_numbers(sizes, side):
    gemma, *others = attentions(*sizes)
    other = others[side]

    for stored, expected in ((gemma, other), (other, gemma)):
        found, values = proposed(stored, {path: value.shape for path, value in expected.items()})

        check(values, expected)
        assert found.questions == ()
        assert found.confidence == "likely"


def test_heads_before_or_after_inputs_are_a_question_where_no_name_tells():
    gemma, _, matrices = attentions(2, 4, 8)
    expected = {
        path.replace("kernel", "weight"): value.T for path, value in matrices.items() if "o_proj" not in path
    }

    found, values = proposed(gemma, {path: value.shape for path, value in expected.items()})

    assert values == {}
    assert [question.about for question in found.questions] == ["transposed"] * len(found.questions)
    shapes = {path: value.shape for path, value in expected.items()}
    check(restored(gemma, shapes, found.answered([1] * len(found.questions))), expected)


@pytest.mark.parametrize("kind", ["kernel", "weight"])
def test_three_heads_whose_width_is_a_third_of_the_features_are_fused_side_by_side(kind):
    stored = filled({f"attn/{name}/kernel": (12, 3, 4) for name in ("query", "key", "value")})
    stored |= filled({"mlp/kernel": (12, 48)})
    side = [stored[f"attn/{name}/kernel"].reshape(12, 12) for name in ("query", "key", "value")]
    expected = {
        f"attn/qkv/{kind}": np.concatenate(side, 1)
        if kind == "kernel"
        else np.concatenate([matrix.T for matrix in side])
    }
    expected[f"mlp/{kind}"] = stored["mlp/kernel"] if kind == "kernel" else stored["mlp/kernel"].T

    _, values = proposed(stored, {path: value.shape for path, value in expected.items()})

    check(values, expected)


def test_a_matrix_in_an_embedder_is_no_table_and_is_turned_as_the_one_beside_it():
    stored = filled({"t_embedder/Dense_0/kernel": (8, 12), "t_embedder/Dense_1/kernel": (12, 12)})
    expected = {
        f"time_embed/layers/{at}/weight": stored[f"t_embedder/Dense_{at}/kernel"].T for at in range(2)
    }

    _, values = proposed(stored, {path: value.shape for path, value in expected.items()})

    check(values, expected)


def test_that_weights_are_turned_tells_nothing_of_what_is_called_a_kernel_on_both_sides():
    stored = filled({"attn/to_q/kernel": (12, 12), "fc/kernel": (12, 8)})
    expected = {
        "attn/query/kernel": stored["attn/to_q/kernel"].reshape(12, 3, 4),
        "fc/weight": stored["fc/kernel"].T,
    }

    _, values = proposed(stored, {path: value.shape for path, value in expected.items()})

    check(values, expected)


def test_a_depthwise_kernel_of_tensorflow_becomes_pytorchs_with_height_before_width():
    stored = filled({"mix/depthwise_kernel": (3, 3, 8, 1)})
    expected = {"depthwise/weight": stored["mix/depthwise_kernel"].transpose(2, 3, 0, 1)}

    _, values = proposed(stored, {"depthwise/weight": (8, 1, 3, 3)})

    check(values, expected)


def test_whether_channels_or_places_come_first_in_a_flattened_image_is_left_open():
    _, values = proposed(filled({"fc/kernel": (64, 24)}), {"fc/weight": (24, 16, 2, 2)})

    assert values == {}


IMAGES = {"stem/kernel": (3, 3, 1, 8), "fc/kernel": (32, 24), "head/kernel": (24, 10)}
CODED = {
    "encoder/Conv_0/kernel": (3, 3, 1, 8),
    "encoder/Dense_0/kernel": (32, 6),
    "decoder/Dense_0/kernel": (6, 32),
    "decoder/Conv_0/kernel": (3, 3, 8, 1),
}
MADE = {"Dense_0/kernel": (5, 64), "ConvTranspose_0/kernel": (3, 3, 16, 8), "Conv_0/kernel": (3, 3, 8, 3)}


@pytest.mark.parametrize(
    ("stored", "called", "doubted"),
    [
        (IMAGES, {"stem": "conv", "fc": "hidden", "head": "last"}, ["hidden/kernel"]),
        (IMAGES, {"stem": "conv"}, ["fc/kernel"]),
        (IMAGES, {"head": "last"}, []),
        (IMAGES, {}, []),
        (CODED, {"encoder": "enc", "decoder": "dec"}, ["enc/Dense_0/kernel", "dec/Dense_0/kernel"]),
        (MADE, {"Dense_0": "fc", "ConvTranspose_0": "up", "Conv_0": "last"}, ["fc/kernel"]),
        (IMAGES | {"norm/scale": (32,)}, {"stem": "conv", "fc": "hidden"}, []),
    ],
)
def test_where_an_image_is_flattened_only_one_code_base_is_certain(stored, called, doubted):
    names = {path: "/".join(called.get(name, name) for name in path.split("/")) for path in stored}

    found, values = proposed(filled(stored), {names[path]: shape for path, shape in stored.items()})

    check(values, {names[path]: value for path, value in filled(stored).items()})
    assert {"/".join(map(str, path)) for path in found.flattened} == {*doubted}
    assert found.confidence == ("likely" if doubted else "certain")
    assert ("channels may come first or last, as only outputs tell" in str(found)) == bool(doubted)


LAYER = {"attn/kernel": (8, 8), "mlp/kernel": (8, 16), "norm/scale": (8,)}


def layers(name, numbers, stacked=()):
    return {
        f"{name}{at}/{path}": (shape[0], *stacked, *shape[1:])
        for at in numbers
        for path, shape in LAYER.items()
    }


def test_layers_in_blocks_and_the_remainder_that_no_block_holds_follow_each_other():
    stored = filled(layers("layers/layers_", range(3), (2,)) | layers("layers_remainder/layers_", range(2)))
    wanted = layers("layers/", range(8))
    expected = {
        path: np.take(stored[f"layers/layers_{at % 3}/{rest}"], at // 3, 1)
        if at < 6
        else stored[f"layers_remainder/layers_{at - 6}/{rest}"]
        for path in wanted
        for at, rest in [(int(path.split("/")[1]), path.split("/", 2)[2])]
    }

    _, values = proposed(stored, wanted)

    check(values, expected)


@pytest.mark.parametrize("name", ["layers_remainder/layers_", "dense_layers/layers_", "blocks_"])
def test_no_number_tells_which_layers_of_a_list_a_shorter_one_holds(name):
    table = {"embed/embedding": (30, 8)}

    _, values = proposed(filled(table | layers(name, range(2))), table | layers("layers/", range(7)))

    assert values.keys() == table.keys()


def test_two_lists_that_may_be_the_same_layers_are_none_of_which_the_first_one_is():
    stored = filled(
        layers("block_", range(2)) | {f"a{path}": s for path, s in layers("b_", range(2)).items()}
    )
    stored = {path.replace("ab_0", "b_0_x").replace("ab_1", "b_1_x"): x for path, x in stored.items()}

    _, values = proposed(stored, layers("rgb_blocks/", range(2)) | layers("flow_blocks/", range(2)))

    assert values == {}


def test_the_norm_beside_two_networks_is_that_of_the_one_that_holds_none():
    matrices = {"self_attention/q/kernel": (8, 6), "ff_layer/up/kernel": (8, 16)}
    stored = filled(matrices | {"layer_norm/scale": (8,), "ff_layer/layer_norm/scale": (8,)})
    expected = {
        "input_layernorm/scale": stored["layer_norm/scale"],
        "post_attention_layernorm/scale": stored["ff_layer/layer_norm/scale"],
        "self_attn/q/kernel": stored["self_attention/q/kernel"],
        "mlp/up/kernel": stored["ff_layer/up/kernel"],
    }

    _, values = proposed(stored, {path: value.shape for path, value in expected.items()})

    check(values, expected)


def test_gpt2s_cross_attention_holds_keys_and_values_where_its_queries_lie_beside_them():
    stored = filled({"attn/c_attn/kernel": (24, 8), "crossattention/c_attn/kernel": (16, 8)})
    stored |= filled({"crossattention/q_attn/kernel": (8, 8), "mlp/c_fc/kernel": (32, 8)})
    expected = {
        f"self_attn/{name}/kernel": part.T
        for name, part in zip("qkv", np.split(stored["attn/c_attn/kernel"], 3), strict=True)
    }
    expected |= {
        f"cross_attn/{name}/kernel": part.T
        for name, part in zip("kv", np.split(stored["crossattention/c_attn/kernel"], 2), strict=True)
    }
    expected |= {
        "cross_attn/q/kernel": stored["crossattention/q_attn/kernel"].T,
        "mlp/up/kernel": stored["mlp/c_fc/kernel"].T,
    }

    _, values = proposed(stored, {path: value.shape for path, value in expected.items()})

    check(values, expected)


@pytest.mark.parametrize("kind", ["w", "weight"])
def test_that_a_matrix_fits_as_it_is_tells_nothing_where_all_may_be_turned(kind):
    stored = filled({"ff_layer/ffn_layer1/linear/w": (12, 40), "ff_layer/ffn_layer2/linear/w": (40, 12)})
    expected = {
        f"mlp/{name}_proj/{kind}": stored[f"ff_layer/ffn_layer{at}/linear/w"].T
        for at, name in ((1, "up"), (2, "down"))
    }

    _, values = proposed(stored, {path: value.shape for path, value in expected.items()})

    check(values, expected)


def test_single_numbers_of_layers_of_which_one_block_has_fewer_become_arrays_of_one():
    stored = filled(
        {f"Block_{at}/Layer_{to}/strength": () for at in range(3) for to in range(2 if at else 1)}
        | {f"Block_{at}/Layer_{to}/kernel": (at + 2, 3) for at in range(3) for to in range(2 if at else 1)}
    )
    names = {
        path: path.replace("Block_", "b").replace("Layer_", "conv").replace("b0/conv0", "b0/conv1")
        for path in stored
    }
    expected = {names[path]: value.reshape(value.shape or (1,)) for path, value in stored.items()}

    _, values = proposed(stored, {path: value.shape for path, value in expected.items()})

    check(values, expected)


def test_a_bias_called_by_its_letter_belongs_to_the_matrix_beside_it():
    parts = {
        "attention/query_w": ((12, 2, 6), "mha/linear_q/kernel", (12, 12)),
        "attention/gating_w": ((12, 2, 6), "mha/linear_g/kernel", (12, 12)),
        "attention/gating_b": ((2, 6), "mha/linear_g/bias", (12,)),
        "attention/output_w": ((2, 6, 12), "mha/linear_o/kernel", (12, 12)),
        "attention/output_b": ((12,), "mha/linear_o/bias", (12,)),
        "query_norm/scale": ((12,), "layer_norm/scale", (12,)),
    }
    nodes = {
        "triangle_attention_starting_node": "tri_att_start",
        "triangle_attention_ending_node": "tri_att_end",
    }
    stored = filled({f"{node}/{part}": shape for node in nodes for part, (shape, _, _) in parts.items()})
    expected = {
        f"{wanted}/{name}": stored[f"{node}/{part}"].reshape(shape)
        for node, wanted in nodes.items()
        for part, (_, name, shape) in parts.items()
    }

    found, values = proposed(stored, {path: value.shape for path, value in expected.items()})

    assert not found.questions
    check(values, expected)


@pytest.mark.parametrize("last", [(8, 8), (4, 8)])
def test_what_shapes_tell_of_one_block_holds_for_the_others_of_its_list(last):
    stored = filled(
        {"Block_0/oak/kernel": (4, 8), "Block_0/elm/kernel": (8, 8)}
        | {f"Block_1/{name}/kernel": (8, 8) for name in ("oak", "elm")}
        | {"Block_2/oak/kernel": last, "Block_2/elm/kernel": (8, 8)}
    )

    found, values = proposed(
        stored,
        {
            f"blocks/{at}/{ours}/kernel": stored[f"Block_{at}/{theirs}/kernel"].shape
            for at in range(3)
            for ours, theirs in (("pine", "oak"), ("fir", "elm"))
        },
    )

    assert found.questions == ()
    check(
        values,
        {
            f"blocks/{at}/{ours}/kernel": stored[f"Block_{at}/{theirs}/kernel"]
            for at in range(3)
            for ours, theirs in (("pine", "oak"), ("fir", "elm"))
        },
    )


def test_a_block_that_holds_more_is_not_told_by_those_of_another_list():
    """The second norm of an encoder's layer is not always that of a decoder's, which attends twice."""
    shapes = {"oak/kernel": (4, 8), "elm/kernel": (8, 8)}
    stored = filled(
        {f"enc/Layer_{at}/{name}": shape for at in range(2) for name, shape in shapes.items()}
        | {f"dec/Layer_{at}/{name}/kernel": (8, 8) for at in range(2) for name in ("oak", "elm", "ash")}
    )
    wanted = {
        f"encoder/layers/{at}/{ours}/kernel": shape
        for at in range(2)
        for ours, shape in (("pine", (4, 8)), ("fir", (8, 8)))
    } | {f"decoder/layers/{at}/{ours}/kernel": (8, 8) for at in range(2) for ours in ("pine", "fir", "yew")}

    found, values = proposed(stored, wanted)

    assert {path.split("/")[0] for path in values} == {"encoder"}
    assert found.questions


def test_a_word_that_takes_the_place_of_another_one_does_so_throughout_a_module():
    stored = filled(
        {"rssm/oak_out/kernel": (4, 8), "rssm/elm_out/kernel": (6, 8)}
        | {f"rssm/{name}_stats/kernel": (8, 12) for name in ("oak", "elm")}
    )

    found, values = proposed(
        stored,
        {"dynamics/pine_out/kernel": (4, 8), "dynamics/fir_out/kernel": (6, 8)}
        | {f"dynamics/{name}_stats/kernel": (8, 12) for name in ("pine", "fir")},
    )

    assert found.questions == ()
    check(
        values,
        {
            f"dynamics/{ours}_{name}/kernel": stored[f"rssm/{theirs}_{name}/kernel"]
            for ours, theirs in (("pine", "oak"), ("fir", "elm"))
            for name in ("out", "stats")
        },
    )


def test_a_fused_part_takes_none_that_are_as_like_or_liker_another_one():
    """`encoder_qkv` holds no `to_q` where the query of its own has a name that nobody knows."""
    stored = filled({f"attn/{name}/kernel": (8, 24) for name in ("encoder_qkv", "qkv")})
    ours = ("to_q", "to_k", "to_v")

    for theirs in ("oak", "add_k_proj", "add_v_proj"), ():
        found, values = proposed(stored, {f"attn/{name}/kernel": (8, 8) for name in (*ours, *theirs)})
        check(
            values,
            {
                f"attn/{name}/kernel": value
                for name, value in zip(ours, np.split(stored["attn/qkv/kernel"], 3, axis=1), strict=True)
            },
        )

    alike = filled({f"{name}/qkv/kernel": (8, 24) for name in ("oak", "elm")})
    found, values = proposed(alike, {f"pine/{name}/kernel": (8, 8) for name in ours})
    assert values == {}
    assert found.questions == ()


@pytest.mark.parametrize("called", [("oak", "elm"), ("self_attn", "cross_attn")])
def test_what_a_question_is_about_in_one_group_of_layers_is_matched_with_no_other_group(called):
    """Two attentions that nothing tells apart are not those of the middle block; else all is told."""
    stored, wanted, expected = {}, {}, {}
    blocks = ("down_blocks_0", "zorp/0", 8), ("down_blocks_1", "zorp/1", 16), ("mid_block", "middle", 16)
    for theirs, ours, size in blocks:
        start = f"{theirs}/attentions_0/transformer_blocks_0"
        into = f"{ours}/{'attn' if ours == 'middle' else 'attn/0'}/blocks/0"
        names = {
            f"{start}/{one}/{left}/kernel": f"{into}/{other}/{right}/kernel"
            for one, other in zip(("attn1", "attn2"), called, strict=True)
            for left, right in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out_0", "frob"))
        }
        expected |= {right: left for left, right in names.items()}
        stored |= dict.fromkeys(names, (size, size)) | {f"{start}/ff/net_2/kernel": (4 * size, size)}
        wanted |= dict.fromkeys(names.values(), (size, size)) | {f"{into}/ff_out/kernel": (4 * size, size)}
        stored |= {f"{start}/ff/net_0/proj/kernel": (size, 8 * size)}
        wanted |= {f"{into}/geglu/kernel": (size, 8 * size)}
        stored |= {f"{theirs}/resnets_{at}/conv1/kernel": (3, 3, 8, size) for at in range(1 + (size == 16))}
        wanted |= {f"{ours}/res/{at}/conv_a/kernel": (3, 3, 8, size) for at in range(1 + (size == 16))}
        stored |= {f"{theirs}/downsamplers_0/conv/kernel": (3, 3, size, size)}
        wanted |= {f"{ours}/downsample/kernel": (3, 3, size, size)}
    stored = filled(stored)

    found, values = proposed(stored, wanted)

    assert bool(found.questions) == (called == ("oak", "elm"))
    if not found.questions:
        check({path: values[path] for path in expected}, {path: stored[expected[path]] for path in expected})
    for theirs, ours, _ in blocks:
        own = [value for path, value in stored.items() if path.startswith(f"{theirs}/")]
        for path, value in values.items():
            assert not path.startswith(f"{ours}/") or any(np.array_equal(value, each) for each in own), path


@pytest.mark.parametrize("is_stored_flat", [False, True])
def test_the_order_within_a_flattened_patch_is_likely_and_not_certain(is_stored_flat):
    kernels = {"patch_embed/kernel": (2, 2, 3, 8), "patch_proj/kernel": (12, 8)}
    (one, first), (other, second) = list(kernels.items())[:: -1 if is_stored_flat else 1]
    stored = filled({one: first, "norm/scale": (8,)})
    expected = {other: stored[one].reshape(second), "norm/scale": stored["norm/scale"]}

    found, values = proposed(stored, {path: value.shape for path, value in expected.items()})

    check(values, expected)
    assert found.confidence == "likely"
    assert "rows, columns and channels of a patch in one order on both sides" in str(found)


def test_what_the_word_kernel_tells_of_heads_is_not_certain():
    stored = filled({"attn/out/w": (2, 4, 8)})
    expected = {"attn/out/kernel": stored["attn/out/w"].reshape(8, 8)}

    found, values = proposed(stored, {"attn/out/kernel": (8, 8)})

    check(values, expected)
    assert found.confidence == "likely"


@pytest.mark.parametrize("order", ["kv", "vk"])
def test_an_array_of_keys_and_values_has_them_in_the_order_of_its_name(order):
    stored = filled({f"attn/{name}/kernel": (8, 8) for name in "qkvo"})
    joined = np.concatenate([stored[f"attn/{name}/kernel"] for name in order], -1)
    expected = {f"attn/{name}/kernel": stored[f"attn/{name}/kernel"] for name in "qo"}
    expected[f"attn/{order}/kernel"] = joined

    _, values = proposed(stored, {path: value.shape for path, value in expected.items()})

    check(values, expected)


@pytest.mark.parametrize("layers", [3, 4])
def test_as_many_stacked_layers_as_parts_are_not_taken_for_parts(layers):
    stored = filled({f"layers/attn/w{name}/kernel": (layers, 8, 8) for name in "qkv"})
    joined = np.concatenate([*stored.values()], -1)
    stored |= filled({"layers/attn/wo/kernel": (layers, 8, 8)})

    _, values = proposed(
        stored, {"blocks/mix/qkv/kernel": joined.shape, "blocks/mix/o/kernel": (layers, 8, 8)}
    )

    np.testing.assert_array_equal(values["blocks/mix/qkv/kernel"], joined)


def test_what_leads_from_tokens_to_an_image_does_not_become_what_leads_back():
    names = {
        "cross_attn_image_to_token": "image_to_token_attention",
        "cross_attn_token_to_image": "token_to_image_attention",
    }
    stored = filled({f"{name}/{part}_proj/kernel": (8, 8) for name in names for part in "qkv"})
    expected = {
        path.replace(one, other): value
        for path, value in stored.items()
        for one, other in names.items()
        if one in path
    }

    _, values = proposed(stored, {path: value.shape for path, value in expected.items()})

    check(values, expected)


class Block(nnx.Module):
    """Norms and layers of eight features, created in the order of their names."""

    def __init__(self, names):
        for name in names:
            layer = nnx.LayerNorm if "norm" in name else functools.partial(nnx.Linear, 8)
            setattr(self, name, layer(8, rngs=nnx.Rngs(0)))


NORMS = {
    "as computed": (("attn_norm", "attn", "ffn_norm", "ffn"), True),
    "the network first": (("ffn_norm", "ffn", "attn_norm", "attn"), False),
    "three, as computed": (("self_attn_norm", "attn", "cross_attn_norm", "ffn_norm", "ffn"), True),
    "three, the network first": (("ffn_norm", "ffn", "self_attn_norm", "attn", "cross_attn_norm"), False),
}


@pytest.mark.parametrize(("created", "agree"), NORMS.values(), ids=NORMS)
def test_norms_are_a_question_where_words_and_the_order_of_creation_disagree(created, agree):
    norms = [
        name for name in ("self_attn_norm", "attn_norm", "cross_attn_norm", "ffn_norm") if name in created
    ]
    shapes = {
        f"{name}/{kind}": (8, 8)[: 2 - at]
        for name in ("attn", "ffn")
        for at, kind in enumerate(("kernel", "bias"))
    }
    shapes |= {f"norm{at + 1}/{kind}": (8,) for at in range(len(norms)) for kind in ("scale", "bias")}

    def make():
        return Block(created)

    variables = {"params": traverse_util.unflatten_dict(filled(shapes), sep="/")}
    found = suggest(variables, nnx.eval_shape(make), init=make)

    expected = {Rename(f"norm{at + 1}", name) for at, name in enumerate(norms)}
    assert set(found.renames) == (expected if agree else set())
    assert [question.about for question in found.questions] == ([] if agree else ["which"])


@pytest.mark.parametrize("order", [*map("".join, itertools.permutations("qkv"))])
@pytest.mark.parametrize("name", ["{}", "in_proj_{}"])
def test_an_array_of_queries_keys_and_values_has_them_in_the_order_of_its_name(name, order):
    stored = filled({f"attn/{name.format(order)}/kernel": (8, 24), "attn/out_proj/kernel": (8, 8)})
    parts = dict(zip(order, np.split(stored[f"attn/{name.format(order)}/kernel"], 3, axis=1), strict=True))
    expected = {f"attn/{part}_proj/kernel": parts[part] for part in "qkv"}
    expected["attn/out_proj/kernel"] = stored["attn/out_proj/kernel"]

    _, values = proposed(stored, {path: value.shape for path, value in expected.items()})

    check(values, expected)


@pytest.mark.parametrize("is_stored_flat", [True, False])
def test_a_flat_array_holds_what_is_kept_by_heads_elsewhere_side_by_side_or_head_by_head(is_stored_flat):
    flat, apart = {"kernel": (10, 24), "bias": (24,)}, {"kernel": (10, 4, 3, 2), "bias": (4, 3, 2)}
    shapes, others = (flat, apart) if is_stored_flat else (apart, flat)
    stored = filled({f"h_{at}/attn/qkv/{kind}": shape for at in range(2) for kind, shape in shapes.items()})
    wanted = {f"layers/{at}/attn/qkv/{kind}": shape for at in range(2) for kind, shape in others.items()}

    def side_by_side(value):
        if is_stored_flat:
            return np.moveaxis(value.reshape(*value.shape[:-1], 3, 4, 2), -3, -2)
        return np.moveaxis(value, -2, -3)

    tree = {"params": traverse_util.unflatten_dict(stored, sep="/")}
    (question,) = suggest(tree, abstract(wanted)).questions

    assert question.choices == ("head by head", "side by side")
    for rules, made in zip(question.alternatives, (np.asarray, side_by_side), strict=True):
        for path, value in restored(stored, wanted, rules).items():
            source = made(stored[path.replace("layers/", "h_")])
            np.testing.assert_array_equal(value, source.reshape(value.shape))


UNKNOWN = ["linear_qkv", "mixed_qkv", "fused_qkv", "qkv_fused", "linear_kv", "key_value", "kv_b_proj"]


@pytest.mark.parametrize("is_stored", [True, False])
@pytest.mark.parametrize("name", UNKNOWN)
def test_an_array_that_programs_hold_head_by_head_too_is_a_question(name, is_stored):
    roles = "qkv" if "q" in name else "kv"
    single = {f"attn/{role}_proj/kernel": (8, 8) for role in roles}
    whole = {f"attn/{name}/kernel": (8, 8 * len(roles))}
    stored, wanted = (whole, single) if is_stored else (single, whole)

    found, values = proposed(filled(stored | {"attn/out/kernel": (8, 8)}), wanted)

    assert values == {}
    (question,) = found.questions
    assert question.choices[0] == "side by side"
    assert set(question.wanted) == set(found.unmatched_wanted)


@pytest.mark.parametrize(("one", "other"), [("qkv", "kqv"), ("c_attn", "qvk"), ("kv", "vk")])
def test_an_array_is_none_that_by_its_name_holds_its_parts_in_another_order(one, other):
    stored = filled({f"attn/{one}/kernel": (8, 24), "attn/out/kernel": (8, 8)})

    _, values = proposed(stored, {f"attn/{other}/kernel": (8, 24), "attn/o_proj/kernel": (8, 8)})

    check(values, {"attn/o_proj/kernel": stored["attn/out/kernel"]})


@pytest.mark.parametrize("names", [("gate_proj", "up_proj"), ("up_gate_proj",)])
@pytest.mark.parametrize("whole", ["up_gate_proj", "w12", "gate_up_proj"])
def test_ernies_up_gate_proj_may_hold_either_first(names, whole):
    stored = filled(
        {f"mlp/{name}/kernel": (8, 32 // len(names)) for name in names} | {"mlp/down_proj/kernel": (16, 8)}
    )

    _, values = proposed(stored, {f"mlp/{whole}/kernel": (8, 32), "mlp/down/kernel": (16, 8)})

    is_told = names == (whole,) or (len(names) == 2 and whole != "up_gate_proj")
    assert set(values) == {"mlp/down/kernel"} | ({f"mlp/{whole}/kernel"} if is_told else set())


def test_a_gate_that_both_sides_keep_apart_is_in_no_array_of_the_same_size():
    names = {"mlp/gate_proj": "ffn/gate", "mlp/up_proj": "ffn/up", "delta/in_proj": "mixer/proj"}
    stored = filled({f"{name}/kernel": (8, 64 if "delta" in name else 32) for name in names})

    found, values = proposed(
        stored, {f"{aim}/kernel": stored[f"{name}/kernel"].shape for name, aim in names.items()}
    )

    assert not found.questions
    check(values, {f"{aim}/kernel": stored[f"{name}/kernel"] for name, aim in names.items()})


def test_guided_diffusions_qkv_is_a_question_where_heads_are_kept_apart():
    stored = filled({"attn/qkv/kernel": (8, 24), "attn/proj_out/kernel": (8, 8)})
    expected = {f"attn/to_{part}/kernel": (8, 2, 4) for part in "qkv"} | {"attn/to_out/kernel": (2, 4, 8)}

    found, values = proposed(stored, expected)

    assert [question.choices for question in found.questions] == [("side by side", "head by head, 2 heads")]
    assert [*values] == ["attn/to_out/kernel"]
    by_head = stored["attn/qkv/kernel"].reshape(8, 2, 3, 4)
    values = restored(stored, expected, found.questions[0].alternatives[1])
    for at, part in enumerate("qkv"):
        np.testing.assert_array_equal(values[f"attn/to_{part}/kernel"], by_head[:, :, at])


def test_of_two_layers_that_linen_numbered_from_the_outside_shapes_tell_which_is_the_first():
    """`nn.Dense(8)(nn.relu(nn.Dense(8)(x)))` makes the outer one `Dense_0`; of squares nothing tells."""
    stored = filled(
        {
            f"{name}_mlp/Dense_{at}/{kind}": shape if kind == "kernel" else (8,)
            for name, inputs in (("edge", 17), ("node", 16), ("square", 8))
            for at, shape in enumerate([(8, 8), (inputs, 8)])
            for kind in ("kernel", "bias")
        }
    )
    expected = {
        path.replace("Dense_0", "layers/2").replace("Dense_1", "layers/0"): value
        for path, value in stored.items()
    }

    found, values = proposed(stored, {path: value.shape for path, value in expected.items()})

    check(values, {path: value for path, value in expected.items() if not path.startswith("square")})
    assert [len(question.choices) for question in found.questions] == [2]


@pytest.mark.parametrize("is_backwards", [False, True])
@pytest.mark.parametrize(("width", "hidden"), [(8, 24), (24, 8)])
def test_of_two_layers_of_a_network_shapes_tell_which_one_linen_made_first(width, hidden, is_backwards):
    """In `nn.Dense(8)(nn.gelu(nn.Dense(24)(x)))` `Dense_0` is the last one."""
    stored, expected = {}, {}
    for name, sizes in (("fc1", (width, hidden)), ("fc2", (hidden, width))):
        at = (name == "fc2") != is_backwards
        for kind, shape in (("kernel", sizes), ("bias", sizes[1:])):
            one = f"encoderblock_0/MlpBlock_0/Dense_{int(at)}/{kind}"
            stored[one], expected[f"blocks/0/mlp/{name}/{kind}"] = shape, one
    stored = filled(stored)
    expected = {path: stored[one] for path, one in expected.items()}

    found, values = proposed(stored, {path: value.shape for path, value in expected.items()})

    check(values, expected)
    assert found.questions == ()


@pytest.mark.parametrize("is_backwards", [False, True])
def test_where_a_layer_shows_that_linen_numbered_from_the_outside_no_number_tells_beside_it(is_backwards):
    """Of three layers written inline `Dense_0` is the last one, and `LayerNorm_0` the last norm."""
    shapes = {
        "l1/kernel": (8, 8),
        "l2/kernel": (8, 8),
        "out/kernel": (8, 3),
        "n1/scale": (8,),
        "n2/scale": (8,),
    }
    counted = {"l1": "Dense_0", "l2": "Dense_1", "out": "Dense_2", "n1": "LayerNorm_0", "n2": "LayerNorm_1"}
    if is_backwards:
        counted = {
            "l1": "Dense_2",
            "l2": "Dense_1",
            "out": "Dense_0",
            "n1": "LayerNorm_1",
            "n2": "LayerNorm_0",
        }
    sources = {path: path.replace(name := path.partition("/")[0], counted[name], 1) for path in shapes}
    stored = filled({sources[path]: shape for path, shape in shapes.items()})
    expected = {path: stored[source] for path, source in sources.items()}

    found, values = proposed(stored, shapes)

    told = {"out/kernel": expected["out/kernel"]} if is_backwards else expected
    check(values, told)
    assert [len(question.choices) for question in found.questions] == ([2, 2] if is_backwards else [])


def maxvit(width):
    """Returns the leaves of a block by their names in a Linen MaxViT and in timm's words."""
    kernels = {"expand_conv": "conv1_1x1", "project_conv": "conv3_1x1", "depthwise_conv": "conv2_kxk"}
    shapes = dict(
        zip(kernels, [(1, 1, width, 3 * width), (1, 1, 3 * width, width), (3, 3, 1, 3 * width)], strict=True)
    )
    leaves = {(f"mbconv/{one}/kernel", f"conv/{kernels[one]}/kernel"): shapes[one] for one in kernels}
    norms = {"pre_norm": ("pre_norm", 1), "expand_norm": ("norm1", 3), "depthwise_norm": ("norm2", 3)}
    for one, (other, times) in norms.items():
        for kind in ("scale", "bias", "mean", "var"):
            leaves[f"mbconv/{one}/{kind}", f"conv/{other}/{kind}"] = (times * width,)
    for at, one in enumerate(("attn_norm", "ffn_norm")):
        for kind in ("scale", "bias"):
            leaves[f"block_attention/{one}/{kind}", f"attn_block/norm{at + 1}/{kind}"] = (width,)
    for one, other, shape in (
        ("attn/qkv", "attn/qkv", (width, 3 * width)),
        ("attn/out", "attn/proj", (width, width)),
        ("ffn/Dense_0", "mlp/fc1", (width, 5 * width)),
        ("ffn/Dense_1", "mlp/fc2", (5 * width, width)),
    ):
        leaves[f"block_attention/{one}/kernel", f"attn_block/{other}/kernel"] = shape
    return leaves


def test_the_blocks_of_one_stage_are_no_stages_and_norms_with_statistics_none_without():
    names = {
        (f"stage_{stage}_block_{block}/{one}", f"stages/{stage}/blocks/{block}/{other}"): shape
        for stage, width in enumerate((8, 16))
        for block in range(2)
        for (one, other), shape in maxvit(width).items()
    }
    stored = filled({one: shape for (one, _), shape in names.items()})

    found, values = proposed(stored, {other: shape for (_, other), shape in names.items()})

    check(values, {other: stored[one] for one, other in names})
    assert found.questions == ()


def test_timms_gate_and_what_it_gates_are_told_by_their_letters():
    shapes = {"gate/kernel": (4, 10), "up/kernel": (4, 10), "down/kernel": (10, 4)}
    ours = {"gate": "fc1_g", "up": "fc1_x", "down": "fc2"}
    stored = filled({f"SwiGLU_0/{path}": shape for path, shape in shapes.items()})
    expected = {f"mlp/{ours[part]}/kernel": stored[f"SwiGLU_0/{part}/kernel"] for part in ours}

    _, values = proposed(stored, {path: value.shape for path, value in expected.items()})

    check(values, expected)


@pytest.mark.parametrize("length", [2, 3])
def test_one_layer_of_a_list_does_not_tell_where_the_others_of_it_are(length):
    """Two lists that a program creates in turns; only the last layers have shapes of their own."""
    shapes = [(8, 8)] * (2 * length - 2) + [(8, 12), (8, 20)]
    stored = filled({f"Dense_{at}/kernel": shape for at, shape in enumerate(shapes)})
    names = [f"{name}/{at}/kernel" for at in range(length) for name in ("oak", "elm")]

    _, values = proposed(stored, dict(zip(names, shapes, strict=True)))

    expected = {name: stored[f"Dense_{at}/kernel"] for at, name in enumerate(names)}
    assert all(np.array_equal(value, expected[path]) for path, value in values.items())
    assert len(values) == 2


def test_a_convolution_over_one_place_is_no_patch():
    stored = {"squeeze/kernel": (1, 1, 8, 2), "patches/kernel": (2, 2, 3, 8)}
    wanted = {"fc/kernel": (8, 2), "embed/kernel": (12, 8)}

    found, _ = proposed(filled(stored), wanted)

    why = {str(item.rule): item.why for item in found.proposals}
    assert "of a patch" in why["Reshape(pattern='patches/kernel', shape=(12, 8), before=(2, 2, 3, 8))"]
    assert why["Reshape(pattern='squeeze/kernel', shape=(8, 2), before=(1, 1, 8, 2))"] == ""


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("experts", [4, 3])
@pytest.mark.parametrize("is_module", [True, False])
def test_layers_that_are_scanned_with_experts_that_are_stacked_become_lists_in_a_list(
    axis, experts, is_module
):
    def stacked(*shape):
        return (*shape[:axis], 3, *shape[axis:])

    called = "moe/experts/{}/kernel" if is_module else "moe/{}"
    held = {called.format("wi"): (experts, 5, 7), called.format("wo"): (experts, 7, 5)}
    plain = {"attn/query/kernel": (5, 6), "attn/key/kernel": (5, 2), "norm/scale": (5,)}
    plain["moe/router/kernel"] = (5, experts)
    stored = filled({f"layers/{name}": stacked(*shape) for name, shape in (held | plain).items()})
    names = {"attn/query/kernel": "self_attn/q_proj/kernel", "attn/key/kernel": "self_attn/k_proj/kernel"}
    expected = {}
    for at in range(3):
        for name in plain:
            expected[f"blocks/{at}/{names.get(name, name)}"] = np.take(stored[f"layers/{name}"], at, axis)
        for name, number in itertools.product(held, range(experts)):
            part = "fc1" if "wi" in name else "fc2"
            layer = np.take(stored[f"layers/{name}"], at, axis)
            expected[f"blocks/{at}/moe/experts/{number}/{part}/kernel"] = layer[number]

    found, values = proposed(stored, {path: value.shape for path, value in expected.items()})

    check(values, expected)
    assert found.questions == ()


def test_a_stack_of_stacks_that_shapes_allow_along_two_axes_is_not_taken_apart():
    stored = filled({"layers/norm/scale": (3, 3), "layers/experts/wi/kernel": (3, 3, 3, 3)})
    wanted = {f"blocks/{at}/norm/scale": (3,) for at in range(3)}
    wanted |= {f"blocks/{at}/experts/{number}/wi/kernel": (3, 3) for at in range(3) for number in range(3)}

    found = suggest({"params": traverse_util.unflatten_dict(stored, sep="/")}, abstract(wanted))

    assert not any(isinstance(rule, UnstackLayers) for rule in found.renames)


@pytest.mark.parametrize("is_plain", [True, False])
def test_along_which_axis_queries_keys_and_values_of_three_heads_lie_is_asked(is_plain):
    stored = filled({"attn/qkv/kernel": (12, 3, 3, 4), "attn/out/kernel": (3, 4, 12)})
    wanted = {f"attn/{role}_proj/kernel": (12, 12) if is_plain else (12, 3, 4) for role in "qkv"}
    wanted["attn/o_proj/kernel"] = (12, 12)

    found, values = proposed(stored, wanted)

    assert values.keys() == {"attn/o_proj/kernel"}
    (question,) = found.questions
    assert question.choices == ("along axis 1", "along axis 2")
    for axis, rules in zip((1, 2), question.alternatives, strict=True):
        state = restored(stored, wanted, rules)
        for at, role in enumerate("qkv"):
            path = f"attn/{role}_proj/kernel"
            part = np.take(stored["attn/qkv/kernel"], at, axis)
            np.testing.assert_array_equal(state[path], part.reshape(wanted[path]))


@pytest.mark.parametrize(("heads", "depth", "width"), [(4, 16, 16), (16, 4, 16), (4, 8, 8)])
@pytest.mark.parametrize("fused", [False, True])
def test_heads_of_as_many_features_as_inputs_are_transposed_where_all_beside_them_are(
    heads, depth, width, fused
):
    """A kernel of `(16, 4, 16)` fits a weight of `(64, 16)` with its first two axes joined, too."""
    stored, expected = {}, {}
    rng = np.random.default_rng(0)

    def kernel(path, *shape):
        stored[path] = rng.normal(size=shape).astype("f")
        return stored[path]

    for at in range(2):
        layer, block = f"layers_{at}", f"blocks/{at}"
        parts = [
            kernel(f"{layer}/attn/{name}/kernel", width, heads, depth).reshape(width, -1).T
            for name in ("query", "key", "value")
        ]
        named = (
            {"to_qkv": np.concatenate(parts)}
            if fused
            else dict(zip(("to_q", "to_k", "to_v"), parts, strict=True))
        )
        expected |= {f"{block}/attn/{name}/weight": value for name, value in named.items()}
        out = kernel(f"{layer}/attn/out/kernel", heads, depth, width).reshape(-1, width).T
        expected[f"{block}/attn/to_out/weight"] = out
        for name, shape in {"fc1": (width, 24), "fc2": (24, width)}.items():
            expected[f"{block}/{name}/weight"] = kernel(f"{layer}/{name}/kernel", *shape).T

    _, values = proposed(stored, {path: value.shape for path, value in expected.items()})

    check(values, {path: expected[path] for path in values})
    assert len(values) >= 4
