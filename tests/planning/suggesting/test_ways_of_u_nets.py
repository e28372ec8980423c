"""U-Nets whose modules say on both sides where they lie: on the way down, in the middle, or on the way up."""

import numpy as np
import pytest

from tests.planning.suggesting.proposals import check, filled, proposed, restored

WIDTHS = (8, 12)
STORED = {
    "FlaxDiff": ("down_{}_residual_{}", "down_{}_attention_{}", "middle_res{}_0", "up_{}_residual_{}"),
    "enc": ("enc_{}_res_{}", "enc_{}_attn_{}", "mid_res_{}", "dec_{}_res_{}"),
}
WANTED = {
    "diffusers": (
        "down_blocks/{}/resnets/{}",
        "down_blocks/{}/attentions/{}",
        "mid_block/resnets/{}",
        "up_blocks/{}/resnets/{}",
    ),
    "lucidrains": ("downs/{}/blocks/{}", "downs/{}/attns/{}", "mid_block{}", "ups/{}/blocks/{}"),
    "autoencoder": ("encoder/{}/res/{}", "encoder/{}/attn/{}", "bottleneck/res{}", "decoder/{}/res/{}"),
}


def u_net(down, attention, middle, up, *, first):
    """Returns the shapes of a U-Net with an attention behind each block of its last level.

    The parts of its middle are counted from `first`.
    """
    shapes = {}

    def block(names, into, out):
        shapes.update({f"{names}/norm1/scale": (into,), f"{names}/norm2/scale": (out,)})
        shapes.update({f"{names}/conv1/kernel": (3, 3, into, out), f"{names}/conv2/kernel": (3, 3, out, out)})
        shapes[f"{names}/time_emb_proj/kernel"] = (16, out)

    for level, width in enumerate(WIDTHS):
        for at in range(2):
            block(down.format(level, at), width if at or not level else WIDTHS[level - 1], width)
    for at, name in ((at, name) for at in range(2) for name in ("to_q", "to_k", "to_v", "to_out")):
        shapes[f"{attention.format(1, at)}/{name}/kernel"] = (12, 12)
    for at in range(2):
        block(middle.format(at + first), 12, 12)
    for level, width in enumerate(WIDTHS[::-1]):
        for at in range(2):
            block(up.format(level, at), 2 * width, width)
    return shapes


@pytest.mark.parametrize("ours", WANTED)
@pytest.mark.parametrize("theirs", STORED)
def test_what_is_called_the_middle_is_made_of_nothing_on_the_way_down(theirs, ours):
    """Shapes alone would make it of the last level, whose attention tells what its other parts are."""
    shapes = u_net(*STORED[theirs], first=theirs == "FlaxDiff")
    wanted = u_net(*WANTED[ours], first=ours != "diffusers")
    stored = filled(shapes)

    found, values = proposed(stored, wanted)

    assert found.confidence == "likely"
    check(values, dict(zip(wanted, stored.values(), strict=True)))


@pytest.mark.parametrize(
    ("stored", "wanted", "is_known"),
    [
        ("up_blocks_{}/upsamplers_0/conv", "up/{}/upsample/conv", True),
        ("decoder/up_blocks_{}/upsamplers_0/conv", "decoder/up/{}/upsample/conv", True),
        ("up_blocks_{}/ups_0/deconv", "up_levels/{}/up/conv", True),
        ("ups_{}/upsampler/conv", "up_levels/{}/upsampling/conv", False),
    ],
)
@pytest.mark.parametrize("first", [0, 1])
def test_what_enlarges_each_level_of_one_width_is_asked_about_with_its_level(stored, wanted, is_known, first):
    shapes = {"kernel": (3, 3, 8, 8), "bias": (8,)}
    ends = {"inp": "conv_in", "out": "conv_out"}
    levels = {stored.format(at): wanted.format(first + 2 - at) for at in range(3)}
    made = {f"{aim}/{x}": f"{path}/{x}" for path, aim in {**levels, **ends}.items() for x in shapes}
    widths = {"conv_in": (4, 8), "conv_out": (8, 3)}
    wanted_shapes = {
        aim: (3, 3, *pair) if aim.endswith("kernel") else pair[1:]
        for aim in made
        for pair in [widths.get(aim.split("/")[0], (8, 8))]
    }
    tree = filled({path: wanted_shapes[aim] for aim, path in made.items()})

    found, values = proposed(tree, wanted_shapes)

    assert {path.split("/")[0] for path in values} == {*ends.values()}
    (question,) = found.questions
    orders = [restored(tree, wanted_shapes, rules) for rules in question.alternatives]
    are_right = [all(np.array_equal(one[aim], tree[path]) for aim, path in made.items()) for one in orders]
    assert sum(are_right) == 1
    assert are_right[0] or not is_known


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize(("one", "other"), [("", ""), ("/conv", "/conv")])
@pytest.mark.parametrize("down", [("down_{}", "enc{}"), ("down_blocks_{}", "encoder_level{}")])
@pytest.mark.parametrize("up", [("up_{}", "dec{}"), ("up_blocks_{}", "decoder_level{}")])
def test_levels_of_one_width_may_count_from_either_end_where_one_side_counts_steps_upwards(
    up, down, one, other, first
):
    shapes = {"kernel": (3, 16, 8), "bias": (8,)}
    both = {
        way: {
            f"{names[1].format(at + first)}{other}/{leaf}": f"{names[0].format(at)}{one}/{leaf}"
            for at in range(3)
            for leaf in shapes
        }
        for way, names in {"down": down, "up": up}.items()
    }
    pairs = both["down"] | both["up"]
    narrow = {path: (3, 8, 8) for path in both["down"] if path.endswith("kernel")}
    wanted = {path: narrow.get(path, shapes[path.split("/")[-1]]) for path in pairs}
    stored = filled({source: wanted[path] for path, source in pairs.items()})

    found, values = proposed(stored, wanted)

    check(values, {path: stored[source] for path, source in both["down"].items()})
    (question,) = found.questions
    assert len(question.choices) == 2


def test_levels_that_their_widths_tell_count_from_the_end_that_these_tell():
    widths = (4, 8, 16)
    stored = filled({f"up_{at}/conv/kernel": (3, 3, width, 5) for at, width in enumerate(widths[::-1])})
    wanted = {f"dec{at + 1}/conv/kernel": (3, 3, width, 5) for at, width in enumerate(widths)}

    found, values = proposed(stored, wanted)

    assert found.questions == ()
    check(values, {f"dec{3 - at}/conv/kernel": stored[f"up_{at}/conv/kernel"] for at in range(3)})


@pytest.mark.parametrize(
    ("stored", "wanted", "is_told"),
    [
        ("dec_{}", "decoder{}/transp_conv", False),
        ("decoder_{}/up", "dec{}/up", False),
        ("dec{}/up", "decoder/{}/up", True),
    ],
)
def test_decoders_of_an_image_may_count_from_either_end_but_from_one_number(stored, wanted, is_told):
    """MONAI calls the finest level `decoder1`, where a program in Linen counts as it computes them."""
    names = {f"{stored.format(at)}/kernel": f"{wanted.format(at + 1 - is_told)}/kernel" for at in range(3)}
    tree = filled(dict.fromkeys(names, (3, 3, 8, 8)))
    shapes = dict.fromkeys(names.values(), (3, 3, 8, 8))

    found, values = proposed(tree, shapes)

    if is_told:
        check(values, {path: tree[source] for source, path in names.items()})
    else:
        (question,) = found.questions
        assert len(question.choices) == 2
        turned = dict(zip(names, [*names.values()][::-1], strict=True))
        orders = [restored(tree, shapes, rules) for rules in question.alternatives]
        assert any(all(np.array_equal(x[aim], tree[path]) for path, aim in turned.items()) for x in orders)
