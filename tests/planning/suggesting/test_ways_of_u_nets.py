"""U-Nets whose modules say on both sides where they lie: on the way down, in the middle, or on the way up."""

import pytest

from tests.planning.suggesting.proposals import check, filled, proposed

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
