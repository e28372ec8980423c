"""Proposals where one side counts otherwise: from the last level on, by numbers alone, norms across first."""

import itertools

import numpy as np
import pytest
from flax import traverse_util

from orbax_nnx_handler import from_linen, suggest, to_linen
from tests.planning.suggesting.proposals import abstract, check, filled, proposed, restored, variables_of


@pytest.mark.parametrize("widths", [[(4, 4), (8, 4), (8, 12)], [(4, 4), (4, 4), (4, 12)]])
def test_levels_that_one_side_counts_from_the_last_one_are_told_by_their_sizes(widths):
    stored = filled(
        {
            f"up_{at}/{part}/kernel": shape
            for at, (inputs, outputs) in enumerate(widths)
            for part, shape in (("conv1", (3, 3, inputs, outputs)), ("conv2", (3, 3, outputs, outputs)))
        }
    )
    names = {path: path.replace(f"up_{path[3]}", f"up_blocks/{2 - int(path[3])}") for path in stored}

    found, values = proposed(stored, {names[path]: value.shape for path, value in stored.items()})

    assert not found.questions
    check(values, {names[path]: value for path, value in stored.items()})


def test_layers_called_by_numbers_alone_get_names():
    shapes = {"fc1/kernel": (4, 8), "fc1/bias": (8,), "fc2/kernel": (8, 4), "fc2/bias": (4,)}
    stored = filled({f"{at}/{path}": shape for at in range(3) for path, shape in shapes.items()})
    stored |= filled({"post_norm/scale": (4,), "post_norm/bias": (4,)})

    found, values = proposed(
        stored,
        {f"encoder/layers/{at}/{path}": shape for at in range(3) for path, shape in shapes.items()}
        | {"encoder/norm_after/scale": (4,), "encoder/norm_after/bias": (4,)},
    )

    assert not found.unmatched_wanted
    expected = {f"encoder/layers/{path}": value for path, value in stored.items() if path[0].isdecimal()}
    check(values, expected | {f"encoder/norm_after/{x}": stored[f"post_norm/{x}"] for x in ("scale", "bias")})


COUNTED = ["norm1", "norm2", "norm3"]


@pytest.mark.parametrize("is_deformable", [True, False])
def test_the_numbers_of_norms_tell_nothing_where_programs_count_the_cross_attention_first(is_deformable):
    attention = {f"{name}/kernel": (8, 8) for name in ("q", "k", "v", "o")}
    cross = {"sampling_offsets/kernel": (8, 24)} if is_deformable else {"o/kernel": (8, 8)}
    network = {"linear1/kernel": (8, 16), "linear2/kernel": (16, 8)}

    def layer(norms):
        return (
            {f"self_attn/{path}": shape for path, shape in attention.items()}
            | {f"cross_attn/{path}": shape for path, shape in cross.items()}
            | network
            | {f"{norm}/scale": (8,) for norm in norms}
        )

    layers = {f"layer{at}/{path}": shape for at in range(2) for path, shape in layer(COUNTED).items()}
    stored = filled({f"decoder/{path}": shape for path, shape in layers.items()})
    norms = ["self_attn_layer_norm", "cross_attn_layer_norm", "final_layer_norm"]

    found, values = proposed(
        stored, {f"decoder/layers/{at}/{p}": shape for at in range(2) for p, shape in layer(norms).items()}
    )

    left = {path[-2] for path in found.unmatched_wanted}
    assert left == ({"self_attn_layer_norm", "cross_attn_layer_norm"} if is_deformable else set())
    assert bool(found.questions) == is_deformable
    assert (values["decoder/layers/1/final_layer_norm/scale"] == stored["decoder/layer1/norm3/scale"]).all()


def test_a_bias_belongs_to_the_only_kernel_beside_it():
    shapes = {"kernel": (3, 4, 8), "bias": (8,)}
    stored = filled({f"Conv_{at}/{name}": shape for at in range(2) for name, shape in shapes.items()})
    names = {"weight_v": "kernel", "bias": "bias"}
    made = {f"convs/{at}/{name}": f"Conv_{at}/{of}" for at in range(2) for name, of in names.items()}

    found, values = proposed(stored, {path: stored[of].shape for path, of in made.items()})

    assert not found.unmatched_wanted
    check(values, {path: stored[of] for path, of in made.items()})


def test_b_beside_other_letters_is_no_bias():
    made = {"mixer/a": "ssm/A", "mixer/b": "ssm/B", "mixer/c": "ssm/C", "out/kernel": "out/kernel"}
    stored = filled({"ssm/A": (6, 4), "ssm/B": (6, 4), "ssm/C": (4, 6), "out/kernel": (4, 3)})

    found, values = proposed(stored, {path: stored[of].shape for path, of in made.items()})

    assert not found.unmatched_wanted
    check(values, {path: stored[of] for path, of in made.items()})


def test_the_inputs_of_a_quantizer_are_no_attention():
    stored = filled({"in_proj/Conv_0/kernel": (1, 12, 4), "out_proj/Conv_0/kernel": (1, 4, 12)})

    found, values = proposed(stored, {"in_proj/weight": (4, 12, 1), "out_proj/weight": (12, 4, 1)})

    assert not found.unmatched_wanted
    check(values, {f"{side}_proj/weight": stored[f"{side}_proj/Conv_0/kernel"].T for side in ("in", "out")})


def test_blocks_with_the_numbers_of_a_stage_and_of_a_block_in_one_are_those_of_stages():
    numbers = [(stage, at) for stage, count in ((1, 2), (2, 3), (3, 2)) for at in range(count)]
    parts = {
        "mlp/fc1/kernel": (4, 8),
        "mlp/fc2/kernel": (8, 4),
        "proj_1/kernel": (4, 4),
        "proj_2/kernel": (4, 4),
    }
    names = {
        "mlp/fc1/kernel": "mlp/in_dense/kernel",
        "mlp/fc2/kernel": "mlp/out_dense/kernel",
        "proj_1/kernel": "pre_projection/kernel",
        "proj_2/kernel": "post_projection/kernel",
    }
    stored = filled({f"block{s}{at}/{part}": shape for s, at in numbers for part, shape in parts.items()})

    found, values = proposed(
        stored,
        {
            f"stages/{s - 1}/layers/{at}/{names[part]}": shape
            for s, at in numbers
            for part, shape in parts.items()
        },
    )

    assert not found.questions
    check(
        values,
        {
            f"stages/{s - 1}/layers/{at}/{names[part]}": stored[f"block{s}{at}/{part}"]
            for s, at in numbers
            for part in parts
        },
    )


@pytest.mark.parametrize("name", ["layers_{}", "layer_{}", "stage{}"])
def test_what_closes_a_stage_on_one_side_and_opens_the_next_one_on_the_other_is_told_by_its_sizes(name):
    blocks = {"fc1/kernel": 4, "fc2/kernel": 3}
    stored = filled(
        {
            f"{name.format(s)}/blocks_{at}/{part}": (2**s * 2, 2**s * times)
            for s in range(4)
            for at in range(2)
            for part, times in blocks.items()
        }
        | {f"{name.format(s)}/downsample/reduction/kernel": (2**s * 8, 2**s * 4) for s in range(3)}
        | {f"{name.format(s)}/downsample/norm/scale": (2**s * 8,) for s in range(3)}
    )
    expected = {}
    for path, value in stored.items():
        head, rest = path.split("/", 1)
        number = int(head[-1]) + rest.startswith("downsample")
        expected[f"layers/{number}/{rest.replace('_', '/')}"] = value

    found, values = proposed(stored, {path: value.shape for path, value in expected.items()})

    assert not found.questions
    check(values, expected)


def test_layers_counted_alone_are_those_of_a_list_with_functions_between_them():
    shapes = {"0/kernel": (2, 12), "0/bias": (12,), "1/kernel": (12, 3)}
    stored = filled({f"block_{at}/cpb_{part}": shape for at in range(2) for part, shape in shapes.items()})
    names = {
        path: path.replace("block_", "blocks/").replace("cpb_1", "cpb/2").replace("_", "/") for path in stored
    }

    found, values = proposed(stored, {names[path]: value.shape for path, value in stored.items()})

    assert not found.questions
    check(values, {names[path]: value for path, value in stored.items()})


WI_WO = {"wi": (8, 24), "wo": (24, 8)}


@pytest.mark.parametrize("name", ["expert", "experts"])
def test_experts_in_a_list_below_the_parts_of_a_block_are_those_stacked_in_every_second_one(name):
    stored = filled(
        {f"layers_{at}/attention/{part}/kernel": (8, 8) for at in range(4) for part in ("query", "key")}
        | {f"layers_{at}/pre_mlp_layer_norm/scale": (8,) for at in range(4)}
        | {f"layers_{at}/mlp/{part}/kernel": shape for at in (0, 2) for part, shape in WI_WO.items()}
        | {
            f"layers_{at}/mlp/{name}/{part}/kernel": (3, *shape)
            for at in (1, 3)
            for part, shape in WI_WO.items()
        }
    )
    expected = {
        **{
            f"block/{at}/layer/0/attn/{x[0]}/kernel": stored[f"layers_{at}/attention/{x}/kernel"]
            for at in range(4)
            for x in ("query", "key")
        },
        **{
            f"block/{at}/layer/1/layer_norm/scale": stored[f"layers_{at}/pre_mlp_layer_norm/scale"]
            for at in range(4)
        },
        **{
            f"block/{at}/layer/1/mlp/{x}/kernel": stored[f"layers_{at}/mlp/{x}/kernel"]
            for at in (0, 2)
            for x in WI_WO
        },
        **{
            f"block/{at}/layer/1/mlp/experts/expert_{to}/{x}/kernel": stored[
                f"layers_{at}/mlp/{name}/{x}/kernel"
            ][to]
            for at in (1, 3)
            for to in range(3)
            for x in WI_WO
        },
    }

    _, values = proposed(stored, {path: value.shape for path, value in expected.items()})

    check(values, expected)


@pytest.mark.parametrize("first", [(3, 3, 4, 8), (3, 3, 8, 8)])
def test_layers_that_linen_counts_through_are_those_of_lists_of_lists(first):
    """IMPALA's stage: one convolution and two blocks of two, which Linen numbers from 0 to 4."""
    stored = filled(
        {
            f"Stage_{at}/Conv_{number}/kernel": (3, 3, 4 if at == 0 else first[2], 8)
            if number == 0
            else (3, 3, 8, 8)
            for at in range(2)
            for number in range(5)
        }
    )
    names = ["conv", "block0/conv0", "block0/conv1", "block1/conv0", "block1/conv1"]
    expected = {
        f"stages/{at}/{name}/kernel": stored[f"Stage_{at}/Conv_{number}/kernel"]
        for at in range(2)
        for number, name in enumerate(names)
    }

    found, values = proposed(stored, {path: value.shape for path, value in expected.items()})

    assert found.questions == ()
    check(values, expected)


def test_a_number_behind_the_size_of_a_kernel_counts_and_the_size_does_not():
    shapes = {"3x3": (3, 3, 8, 4), "1x1": (1, 1, 4, 8)}
    stored = filled({f"res{size}_{at}/kernel": shape for at in range(2) for size, shape in shapes.items()})
    expected = {
        f"res/{at}/conv{size[0]}/kernel": stored[f"res{size}_{at}/kernel"]
        for at in range(2)
        for size in shapes
    }

    found, values = proposed(stored, {path: value.shape for path, value in expected.items()})

    assert found.questions == ()
    check(values, expected)


def test_letters_that_one_kind_of_layer_is_counted_by_count_the_norms_beside_it():
    stored = filled(
        {"Block_0/Conv_0/kernel": (3, 3, 4, 8), "Block_0/Conv_1/kernel": (3, 3, 8, 8)}
        | {f"Block_0/BatchNorm_{at}/{kind}": (8,) for at in range(2) for kind in ("scale", "bias")}
    )
    expected = {
        f"block/{ours}_{letter}/{kind}": stored[f"Block_0/{theirs}_{at}/{kind}"]
        for at, letter in enumerate("ab")
        for ours, theirs, kinds in (("conv", "Conv", ["kernel"]), ("bn", "BatchNorm", ["scale", "bias"]))
        for kind in kinds
    }

    found, values = proposed(stored, {path: value.shape for path, value in expected.items()})

    assert found.questions == ()
    check(values, expected)


def block(name, inputs, outputs):
    skip = {f"{name}/skip/kernel": (1, 1, inputs, outputs)} if inputs != outputs else {}
    return skip | {
        f"{name}/norm1/scale": (inputs,),
        f"{name}/conv1/kernel": (3, 3, inputs, outputs),
        f"{name}/norm2/scale": (outputs,),
        f"{name}/conv2/kernel": (3, 3, outputs, outputs),
    }


def attention(name, width):
    return {f"{name}/norm/scale": (width,), f"{name}/out/kernel": (width, width)}


def unet():
    """Returns a U-Net of blocks, attentions and samplers in levels, and what each of them is in lists."""
    shapes, names = {"conv_in/kernel": (3, 3, 3, 4)}, {"conv_in": "input_blocks/0/0"}
    widths = {"down": [(4, 4), (8, 8), (8, 8)], "mid": [(8, 8)], "up": [(8, 8), (8, 8), (4, 4)]}
    before, skips = 4, [4]
    for way, called in (("down", "input_blocks"), ("mid", "middle_block"), ("up", "output_blocks")):
        count = 1 if way == "down" else 0
        for level, pair in enumerate(widths[way]):
            above = "mid_block" if way == "mid" else f"{way}_blocks_{level}"
            for at, width in enumerate((*pair, pair[0]) if way == "up" else pair):
                inputs = before + skips.pop() if way == "up" else before
                shapes |= block(f"{above}/resnets_{at}", inputs, width)
                place = f"{called}/{2 * at}" if way == "mid" else f"{called}/{count}/0"
                names[f"{above}/resnets_{at}"] = place
                if width == 8 and not (way == "mid" and at):
                    shapes |= attention(f"{above}/attentions_{at}", width)
                    names[f"{above}/attentions_{at}"] = (
                        f"{called}/1" if way == "mid" else f"{called}/{count}/1"
                    )
                count, before = count + 1, width
                skips += [width] * (way == "down")
            if way != "mid" and level < 2:
                last = f"{called}/{count}/0" if way == "down" else f"{called}/{count - 1}/{1 + (before == 8)}"
                shapes[f"{above}/{way}samplers_0/conv/kernel"] = (3, 3, before, before)
                names[f"{above}/{way}samplers_0"] = last
                count += way == "down"
                skips += [before] * (way == "down")
    return shapes, names


def test_levels_of_blocks_attentions_and_samplers_are_a_list_in_the_order_of_computation():
    shapes, names = unet()
    stored = filled(shapes)
    aims = {
        path: next(path.replace(a, b, 1) for a, b in names.items() if path.startswith(f"{a}/"))
        for path in stored
    }

    found, values = proposed(stored, {aims[path]: value.shape for path, value in stored.items()})

    assert not found.questions
    check(values, {aims[path]: value for path, value in stored.items()})


def test_blocks_that_linen_counts_through_a_network_are_those_of_its_lists_and_of_the_lists_in_them():
    shapes, names = unet()
    shapes = {path: shape for path, shape in shapes.items() if "resnets" in path}
    called = {above: f"ResBlock_{at}" for at, above in enumerate(x for x in names if "resnets" in x)}
    above = {path: "/".join(path.split("/")[:2]) for path in shapes}
    stored = filled({path.replace(above[path], called[above[path]]): x for path, x in shapes.items()})
    aims = {path.replace(at, called[at]): path.replace(at, names[at]) for path, at in above.items()}

    found, values = proposed(stored, {aims[path]: value.shape for path, value in stored.items()})

    assert not found.questions
    check(values, {aims[path]: value for path, value in stored.items()})


@pytest.mark.parametrize("names", [("resnet", "attention"), ("oak", "elm")])
def test_which_of_two_modules_of_one_size_comes_first_is_not_told_by_their_place(names):
    parts = {"norm/scale": (8,), "out/kernel": (8, 8)}
    stored = filled({f"mid/{at}_0/{part}": x for at in names for part, x in parts.items()})

    found, values = proposed(
        stored, {f"middle/{at}/{part}": x for at in range(2) for part, x in parts.items()}
    )

    assert found.questions
    assert not values


def test_a_list_is_no_longer_one_whose_layers_grow_otherwise():
    network = {"norm/scale": (8,), "up/kernel": (8, 24), "down/kernel": (24, 8)}
    attention = {"norm/scale": (8,), "q/kernel": (8, 8), "k/kernel": (8, 8), "o/kernel": (8, 8)}
    stored, aims = {}, {}
    for above, into, parts in (("cross", "layers/0", attention), ("cross_mlp", "layers/1", network)):
        stored |= {f"{above}/{path}": shape for path, shape in parts.items()}
        aims |= {f"{above}/{path}": f"{into}/{path}" for path in parts}
    for at, part in itertools.product(range(2), ("attn", "mlp")):
        parts = attention if part == "attn" else network
        stored |= {f"self_{at}/{part}/{path}": shape for path, shape in parts.items()}
        aims |= {f"self_{at}/{part}/{path}": f"layers/2/{at}/{int(part == 'mlp')}/{path}" for path in parts}
    stored = filled(stored)

    _, values = proposed(stored, {aims[path]: value.shape for path, value in stored.items()})

    check(values, {aims[path]: value for path, value in stored.items() if aims[path] in values})


def test_one_level_of_a_u_net_is_no_block_of_the_same_size_in_a_list():
    stored, aims = {"conv_in/kernel": (3, 3, 3, 8)}, {"conv_in/kernel": "input_blocks/0/0/kernel"}
    levels = {
        "down_blocks_0/resnets_0": "1/0",
        "down_blocks_0/attentions_0": "1/1",
        "down_blocks_1/resnets_0": "3/0",
    }
    for above, place in levels.items():
        parts = attention(above, 8) if "attn" in above or "attentions" in above else block(above, 8, 8)
        stored |= parts
        aims |= {path: path.replace(above, f"input_blocks/{place}") for path in parts}
    stored["down_blocks_0/downsamplers_0/conv/kernel"] = (3, 3, 8, 8)
    aims["down_blocks_0/downsamplers_0/conv/kernel"] = "input_blocks/2/0/conv/kernel"
    stored = filled(stored)

    found, values = proposed(stored, {aims[path]: value.shape for path, value in stored.items()})

    assert not found.questions
    check(values, {aims[path]: value for path, value in stored.items()})


@pytest.mark.parametrize("names", ["w1 b1 w2 b2", "W_hid b_hid W_out b_out", "hid_w hid_b out_w out_b"])
@pytest.mark.parametrize("layers", ["Dense_0 Dense_1", "hid out"])
def test_a_bias_beside_its_kernel_is_called_by_a_letter_and_the_layers_name(names, layers):
    one, other = layers.split()
    aims = [f"{one}/kernel", f"{one}/bias", f"{other}/kernel", f"{other}/bias"]
    shapes = [(6, 8), (8,), (8, 5), (5,)]
    stored = filled(dict(zip(aims, shapes, strict=True)))

    _, values = proposed(stored, dict(zip(names.split(), shapes, strict=True)))

    check(values, {name: stored[aim] for name, aim in zip(names.split(), aims, strict=True)})


@pytest.mark.parametrize("is_turned", [False, True])
@pytest.mark.parametrize("lists", [("weights/{}", "biases/{}"), ("W/{}", "b/{}")], ids=str)
def test_a_list_of_weights_and_one_of_biases_are_layers(lists, is_turned):
    sizes = [5, 16, 16, 16, 3]
    pairs = {
        f"layers_{at}/{name}": (each.format(at), sizes[at : at + 2][-rank:])
        for at in range(len(sizes) - 1)
        for name, each, rank in zip(("kernel", "bias"), lists, (2, 1), strict=True)
    }
    expected = pairs if not is_turned else {name: (path, shape) for path, (name, shape) in pairs.items()}
    stored = filled({name: tuple(shape) for name, shape in expected.values()})

    found, values = proposed(stored, {path: tuple(shape) for path, (_, shape) in expected.items()})

    assert not found.questions
    check(values, {path: stored[name] for path, (name, _) in expected.items()})


@pytest.mark.parametrize("lacking", [0, 2])
def test_the_only_norm_of_one_block_does_not_tell_which_of_two_the_first_one_of_the_others_is(lacking):
    stored, values = {}, {}
    for at in range(3):
        for number, name in enumerate(("token_norm", "channel_norm")[at == lacking :]):
            stored[f"Block_{at}/LayerNorm_{number}/scale"] = (16,)
            values[f"blocks/{at}/{name}/scale"] = f"Block_{at}/LayerNorm_{number}/scale"
        for number, shape in enumerate(((16, 40), (40, 16))):
            stored[f"Block_{at}/Dense_{number}/kernel"] = shape
            values[f"blocks/{at}/fc{number + 1}/kernel"] = f"Block_{at}/Dense_{number}/kernel"
    stored = filled(stored)

    _, made = proposed(stored, {path: stored[name].shape for path, name in values.items()})

    check(made, {path: stored[name] for path, name in values.items() if path in made})


@pytest.mark.parametrize("first", ["final_norm", "in_norm"])
def test_numbers_of_one_class_are_no_places_of_another(first):
    stored = filled(
        {f"LayerNorm_{at}/scale": (16,) for at in range(3)}
        | {"Dense_0/kernel": (5, 16), "Dense_3/kernel": (16, 3)}
        | {f"Dense_{at}/kernel": (16, 16) for at in (1, 2)}
    )
    values = {"embed/kernel": "Dense_0/kernel", "head/kernel": "Dense_3/kernel"}
    shift = first == "in_norm"
    values[f"{first}/scale"] = f"LayerNorm_{0 if shift else 2}/scale"
    for at in range(2):
        values[f"layers/{at}/norm/scale"] = f"LayerNorm_{at + shift}/scale"
        values[f"layers/{at}/fc/kernel"] = f"Dense_{at + 1}/kernel"

    _, made = proposed(stored, {path: stored[name].shape for path, name in values.items()})

    check(made, {path: stored[name] for path, name in values.items() if path in made})


@pytest.mark.parametrize("names", [("pooler",), ("classifier", "dense")])
def test_a_new_head_is_not_filled_with_what_remains_of_another_one(names):
    path = "/".join(names)
    stored = filled(
        {"bert/embed/embedding": (9, 8), "lm_head/dense/kernel": (8, 8), "lm_head/norm/scale": (8,)}
    )

    found, made = proposed(stored, {"embed/embedding": (9, 8), f"{path}/kernel": (8, 8)})

    assert made.keys() == {"embed/embedding"}
    assert len(found.questions) == 1


@pytest.mark.parametrize("widths", [(8, 8, 8, 8), (4, 8, 16, 8)], ids=["equal", "other"])
@pytest.mark.parametrize(("first", "then"), [(0, 1), (1, 0)], ids=["from-0", "from-1"])
@pytest.mark.parametrize("name", ["block{}", "encoder/layer{}"])
def test_names_that_each_side_counts_from_another_number_are_shifted(name, first, then, widths):
    shapes, aims = {"stem/kernel": (3, widths[0])}, {"stem/kernel": "embed/kernel"}
    for at, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        for part, shape in (
            ("fc1/kernel", (inputs, 32)),
            ("fc2/kernel", (32, outputs)),
            ("norm/scale", (inputs,)),
        ):
            path = f"{name.format(first + at)}/{part}"
            shapes[path], aims[path] = shape, f"{name.format(then + at)}/{part}"
    stored = filled(shapes)

    found, values = proposed(stored, {aims[path]: x.shape for path, x in stored.items()})

    assert not found.questions
    check(values, {aims[path]: x for path, x in stored.items()})


def test_a_list_that_lost_one_layer_and_has_another_beside_is_not_shifted():
    # Of three heads only that in the middle is on both sides: `head1`, `head2` and `head1`, `head4`.
    stored = filled({f"head{at}/kernel": (8, 4) for at in (1, 2)})

    _, values = proposed(stored, {f"head{at}/kernel": (8, 4) for at in (1, 4)})

    check({path: values[path] for path in ("head1/kernel",)}, {"head1/kernel": stored["head1/kernel"]})


def test_norms_called_by_the_letters_of_what_they_follow_are_those_of_attention_and_of_the_network():
    names = {
        "ln_1": "sa_norm",
        "attn/qkv": "attn/qkv",
        "attn/out": "attn/out",
        "ln_2": "ff_norm",
        "fc1": "ff/up",
    }
    shapes = {
        "ln_1": (8,),
        "ln_2": (8,),
        "attn/qkv": (8, 24),
        "attn/out": (8, 8),
        "fc1": (8, 32),
        "fc2": (32, 8),
    }
    names["fc2"] = "ff/down"
    aims = {
        f"h_{at}/{one}/{'scale' if 'ln' in one else 'kernel'}": f"blocks/{at}/{other}"
        for at in range(2)
        for one, other in names.items()
    }
    aims = {path: f"{aim}/{path.rsplit('/', 1)[1]}" for path, aim in aims.items()}
    stored = filled({path: shapes[path.split("/", 1)[1].rsplit("/", 1)[0]] for path in aims})

    found, values = proposed(stored, {aims[path]: x.shape for path, x in stored.items()})

    assert not found.questions
    check(values, {aims[path]: x for path, x in stored.items()})


@pytest.mark.parametrize(
    ("own", "theirs", "parts"),
    [
        ("{part}_{layer}/kernel", "blocks/{layer}/{part}/kernel", ("conv1", "conv2", "skip")),
        ("{part}/{layer}/kernel", "layers/{layer}/{part}/kernel", ("fc1", "fc2")),
    ],
    ids=["numbers in one name", "lists of layers"],
)
def test_of_as_many_layers_as_numbered_parts_none_is_taken_for_the_other(own, theirs, parts):
    names = [{"part": part, "layer": layer} for part, layer in itertools.product(parts, range(2))]
    stored = filled({own.format(**each): (8, 8) for each in names})
    expected = {theirs.format(**each): stored[own.format(**each)] for each in names}

    _, values = proposed(stored, {path: value.shape for path, value in expected.items()})

    assert values
    check(values, {path: expected[path] for path in values})


def _counted_twice(own, theirs, counts, more=()):
    """Returns square kernels that two numbers count, and what is wanted of each; `more` one counts."""
    names = [{"a": a, "b": b, "c": a - 1} for a, b in itertools.product(*counts)]
    ends = {f"{own.format(**each)}/kernel": f"{theirs.format(**each)}/kernel" for each in names}
    ends |= {f"{x}_{b}/kernel": f"layers/{b}/{x}/kernel" for x in more for b in counts[1]}
    stored = filled(dict.fromkeys(ends, (8, 8)))
    return stored, {ends[path]: value for path, value in stored.items()}


@pytest.mark.parametrize(
    ("own", "theirs", "more"),
    [
        ("fc{a}s_{b}", "layers/{b}/fc{a}", ()),
        ("layers_{b}/fc{a}", "fc{a}s/{b}", ()),
        ("task{a}_fc{b}", "heads/{c}/fc{b}", ()),
        ("dense{a}_{b}", "layers/{b}/linear{a}", ("gate",)),
        ("convs{a}_{b}", "resblock/{b}/convs/{c}", ()),
        ("blocks_{b}/conv{a}", "convs{a}/{b}", ()),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_a_number_is_the_one_of_its_word_and_lists_count_from_where_they_do(own, theirs, more):
    stored, expected = _counted_twice(own, theirs, ((1, 2), (0, 1)), more)

    found, values = proposed(stored, {path: value.shape for path, value in expected.items()})

    assert not found.questions
    check(values, expected)


@pytest.mark.parametrize(
    ("own", "theirs", "counts"),
    [
        ("conv{a}_{b}", "block{a}/conv{b}", ((1, 2), (1, 2))),
        ("conv{b}_{a}", "block{a}/conv{b}", ((1, 2), (1, 2))),
        ("layers_{a}/experts_{b}", "experts/{b}/{a}", ((0, 1), (0, 1))),
        ("layers_{a}/experts_{b}", "experts/{a}/{b}", ((0, 1), (0, 1))),
    ],
)
def test_which_of_two_numbers_of_one_word_is_the_outer_one_is_asked_with_both_readings(own, theirs, counts):
    stored, expected = _counted_twice(own, theirs, counts)
    shapes = {path: value.shape for path, value in expected.items()}

    found, values = proposed(stored, shapes)

    (question,) = found.questions
    assert not values
    made = [restored(stored, shapes, rules) for rules in question.alternatives]
    right = [all(np.array_equal(each[path], x) for path, x in expected.items()) for each in made]
    assert len(right) == 2
    assert right.count(True) == 1


def test_what_leads_down_is_none_of_what_leads_up():
    stored, expected = _counted_twice("down_{c}_resnet{b}", "ups/{c}/{b}", ((1, 2), (0, 1)))

    found, values = proposed(stored, {path: value.shape for path, value in expected.items()})

    assert not values
    assert not found.questions


@pytest.mark.parametrize("to", ["layers/{}", "net/block/{}"])
@pytest.mark.parametrize(
    ("widths", "confidence"), [([(4, 4), (4, 4)], "likely"), ([(4, 6), (6, 5)], "certain")]
)
def test_of_layers_of_one_shape_the_order_in_which_linen_made_them_is_likely(to, widths, confidence):
    # `Dense(n)(relu(Dense(n)(x)))` makes the layer first that it calls last.
    stored = filled({f"Dense_{at}/kernel": shape for at, shape in enumerate(widths)})

    found, values = proposed(stored, {f"{to.format(at)}/kernel": shape for at, shape in enumerate(widths)})

    assert (found.unmatched_wanted, found.questions, found.confidence) == ((), (), confidence)
    assert ("by the order" in str(found)) == (confidence == "likely")
    check(values, {f"{to.format(at)}/kernel": stored[f"Dense_{at}/kernel"] for at in range(2)})


def test_the_same_class_is_counted_as_it_was():
    stored = filled({f"Dense_{at}/kernel": (4, 4) for at in range(2)})

    found, _ = proposed(stored, {f"net/{path}": value.shape for path, value in stored.items()})

    assert found.confidence == "certain"


@pytest.mark.parametrize(
    ("block", "number"), [("conv{s}_block{b}_", "{n}_conv"), ("stage{s}_block{b}_", "conv{n}")]
)
def test_a_part_called_after_its_block_lies_in_it(block, number):
    stored, aims = {}, {}
    for at, (s, b, width) in enumerate([(2, 1, 4), (2, 2, 4), (3, 1, 6), (3, 2, 6), (3, 3, 6)]):
        for n, shape in enumerate(
            [(1, 1, 2 * width, width), (3, 3, width, width), (1, 1, width, 2 * width)], 1
        ):
            source = f"ResidualBlock_{at}/conv{n}/kernel"
            stored[source], aims[source] = shape, f"{block}{number}/kernel".format(s=s, b=b, n=n)
    arrays = filled(stored)

    found, values = proposed(arrays, {aims[path]: shape for path, shape in stored.items()})

    assert not found.questions
    check(values, {aims[path]: x for path, x in arrays.items()})


@pytest.mark.parametrize("widths", [(8, 8, 8), (8, 9, 10)])
def test_numbers_that_are_no_index_tell_no_more_than_an_order(widths):
    stored = {f"branch_{size}/kernel": (4, width) for size, width in zip((3, 5, 7), widths, strict=True)}
    wanted = {f"branches/{at}/kernel": shape for at, shape in enumerate(stored.values())}

    found, values = proposed(filled(stored), wanted)

    assert values.keys() == wanted.keys()
    assert found.confidence == ("likely" if len({*widths}) == 1 else "certain")


def counted_by_class(outside):
    """Stored shapes and aims: `LayerNorm`s in three layers, and before or behind them what is called so."""
    order = [*outside[:1], *(f"layers/{at}/norm" for at in range(3)), *outside[1:]]
    aims = {f"LayerNorm_{at}": home for at, home in enumerate(filter(None, order))}
    stored = {f"{own}/{kind}": (8,) for own in aims for kind in ("scale", "bias")}
    for at, (number, name, shape) in itertools.product(range(3), [(0, "fc1", (8, 16)), (1, "fc2", (16, 8))]):
        aims[f"MLP_{at}/Dense_{number}"] = f"layers/{at}/mlp/{name}"
        stored[f"MLP_{at}/Dense_{number}/kernel"] = shape
    return stored, {path: f"{aims[(parts := path.rpartition('/'))[0]]}/{parts[2]}" for path in stored}


@pytest.mark.parametrize(
    "outside", [("embed_norm", "final_norm"), ("embed_norm",), (None, "final_norm"), ("stem", "head_norm")]
)
def test_layers_are_those_behind_what_names_say_comes_first(outside):
    stored, aims = counted_by_class(outside)
    arrays = filled(stored)

    found, values = proposed(arrays, {aims[path]: shape for path, shape in stored.items()})

    assert found.confidence == "likely"
    check(values, {aims[path]: x for path, x in arrays.items()})


@pytest.mark.parametrize("outside", [("bridge",), (None, "bridge"), ("bridge", "final_norm")])
def test_which_of_a_class_are_layers_is_asked_where_no_name_tells(outside):
    stored, aims = counted_by_class(outside)
    arrays = filled(stored)

    found, values = proposed(arrays, {aims[path]: shape for path, shape in stored.items()})

    right = {aims[path]: x for path, x in arrays.items()}
    norms = {path for path in right if "mlp" not in path}
    check(values, {path: x for path, x in right.items() if path not in norms})
    (question,) = found.questions
    answers = [
        restored(arrays, {aims[path]: shape for path, shape in stored.items()}, found.answered([at]))
        for at in range(len(question.choices))
    ]
    assert any(all(np.array_equal(each[path], right[path]) for path in right) for each in answers)


@pytest.mark.parametrize("is_against", [True, False])
def test_linens_numbers_tell_no_order_in_a_program_whose_calls_stand_inside_each_other(is_against):
    # Of `Dense(8)(relu(Dense(16)(x)))` the layer that is called first is `Dense_1`.
    numbers = (1, 0) if is_against else (0, 1)
    shapes = {"fc1": (8, 16), "fc2": (16, 8), "conv1": (3, 3, 8, 8), "conv2": (3, 3, 8, 8)}
    homes = {"Dense_0": f"fc{numbers.index(0) + 1}", "Dense_1": f"fc{numbers.index(1) + 1}"}
    homes |= {"Conv_0": "conv1", "Conv_1": "conv2"}
    every = [(at, own, home) for at in range(2) for own, home in homes.items()]
    stored = filled({f"Block_{at}/{own}/kernel": shapes[home] for at, own, home in every})

    found, values = proposed(stored, {f"blocks/{at}/{home}/kernel": shapes[home] for at, _, home in every})

    told = {f"blocks/{at}/{home}/kernel": stored[f"Block_{at}/{own}/kernel"] for at, own, home in every}
    check(values, {path: x for path, x in told.items() if not is_against or "conv" not in path})
    assert bool(found.questions) is is_against


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize(("own", "home"), [("Block_{}", "blocks/{}"), ("trunk/MLP_{}", "trunk/layers/{}")])
def test_which_modules_of_a_class_are_a_shorter_list_is_asked(first, own, home):
    sizes = {("Dense_0", "fc1"): (4, 8), ("Dense_1", "fc2"): (8, 4)}
    stored = filled({f"{own.format(at)}/{x}/kernel": s for at in range(3) for (x, _), s in sizes.items()})
    wanted = {f"{home.format(at)}/{y}/kernel": s for at in range(2) for (_, y), s in sizes.items()}

    found, values = proposed(stored, wanted)

    assert not values
    (question,) = found.questions
    assert len(question.choices) == 2
    check(
        restored(stored, wanted, found.answered([first])),
        {
            f"{home.format(at)}/{y}/kernel": stored[f"{own.format(at + first)}/{x}/kernel"]
            for at in range(2)
            for x, y in sizes
        },
    )


def test_numbers_tell_in_a_list_that_a_program_counts_itself():
    sizes = {("Dense_0", "fc1"): (4, 8), ("Dense_1", "fc2"): (8, 4)}
    stored = filled({f"block_{at}/{x}/kernel": s for at in range(3) for (x, _), s in sizes.items()})
    told = {f"blocks/{at}/{y}/kernel": stored[f"block_{at}/{x}/kernel"] for at in range(2) for x, y in sizes}

    found, values = proposed(stored, {path: array.shape for path, array in told.items()})

    assert not found.questions
    check(values, told)


@pytest.mark.parametrize(("name", "into"), [("layers", "layers"), ("block", "blocks"), ("enc/layer", "h")])
@pytest.mark.parametrize("first", [1, 2])
@pytest.mark.parametrize("inner", [("fc", "ln"), ("linear", "norm")])
def test_layers_that_are_not_counted_from_zero_are_stacked_from_their_first_one(name, into, first, inner):
    layers = range(first, first + 3)
    stored = {f"{name}_{at}/fc/kernel": (4, 5) for at in layers} | {
        f"{name}_{at}/ln/scale": (4,) for at in layers
    }
    stored = filled(stored)
    wanted = {f"{into}/{inner[0]}/kernel": (3, 4, 5), f"{into}/{inner[1]}/scale": (3, 4)}

    found, values = proposed(stored, wanted)

    right = {
        path: np.stack([stored[f"{name}_{at}/{leaf}"] for at in layers])
        for path, leaf in zip(wanted, ("fc/kernel", "ln/scale"), strict=True)
    }
    check(values, right)
    state = from_linen(variables_of(stored), abstract(wanted), renames=found.renames)
    saved = traverse_util.flatten_dict(to_linen(state, renames=found.renames)["params"], sep="/")
    check(saved, stored)


def test_layers_that_are_not_counted_from_zero_lie_in_no_other_order_of_axes():
    layers = {f"layers_{at}/fc/kernel": (4, 5) for at in (1, 2, 4)}

    found = suggest(variables_of(filled(layers)), abstract({"layers/fc/kernel": (3, 4, 5)}))

    assert "Transpose" not in str(found)
