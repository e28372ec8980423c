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
