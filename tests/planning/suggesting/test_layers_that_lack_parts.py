"""Lists that are stored counted from 1 and wanted from 0, of which a layer lacks a part on one side."""

import numpy as np
import pytest

from tests.planning.suggesting.proposals import filled, proposed

PARTS = {
    "attn/query": ("attn/q", (8, 8)),
    "attn/out": ("attn/o", (8, 8)),
    "mlp/up": ("mlp/fc1", (8, 16)),
    "mlp/down": ("mlp/fc2", (16, 8)),
    "norm": ("ln", (8,)),
}
SMALL = {"dense": ("dense", (8, 8)), "norm": ("norm", (8,))}
CONVS = {
    "conv1": ("conv1", (3, 3, 8, 8)),
    "bn1": ("norm1", (8,)),
    "conv2": ("conv2", (3, 3, 8, 8)),
    "bn2": ("norm2", (8,)),
    "skip": ("proj", (1, 1, 8, 8)),
}
LISTS = [
    ("layers_{}", "layers/{}"),
    ("block{}", "blocks/{}"),
    ("trunk/unit_{}", "units/{}"),
    ("ResBlock_{}", "body/{}"),
    ("encoder/cell{}", "encoder/cells/{}"),
]


def lists(names, lacking, count=4, *, parts=PARTS, renamed=True, gone=()):
    """Returns the stored arrays and, by wanted path, the shape and the stored path of one or several lists.

    Args:
        names: What leads into a layer of each list on both sides.
        lacking: The list, the layer and the part that a side lacks: 0 is what is stored.
        count: How many layers there are.
        parts: What a layer holds, by stored names.
        renamed: Whether the parts have other names on both sides.
        gone: Layers of the first list that are not stored.
    """
    stored, wanted = {}, {}
    for list_, (one, other) in enumerate(names):
        for at in range(count):
            for part, (called, shape) in parts.items():
                leaf = "scale" if len(shape) == 1 else "kernel"
                path = f"{one.format(at + 1)}/{part}/{leaf}"
                is_stored = (0, list_, at, part) not in lacking and not (list_ == 0 and at in gone)
                if is_stored:
                    stored[path] = shape
                if (1, list_, at, part) not in lacking:
                    aim = f"{other.format(at)}/{called if renamed else part}/{leaf}"
                    wanted[aim] = shape, path if is_stored else None
    return filled(stored), wanted


def wrong_in(values, stored, wanted):
    """Returns the wanted leaves that are settled and made of another one, or of any where there is none."""
    sources = {path: source for path, (_, source) in wanted.items()}
    return {
        path
        for path, value in values.items()
        if sources[path] is None or not np.array_equal(value, stored[sources[path]])
    }


@pytest.mark.parametrize("names", LISTS, ids=str)
@pytest.mark.parametrize("renamed", [True, False], ids=["renamed", "kept"])
@pytest.mark.parametrize("lacking", [(0, 0, 1, "norm"), (1, 0, 2, "norm"), (0, 0, 0, "mlp/up")], ids=str)
def test_each_layer_is_that_of_its_place_whatever_one_lacks(names, renamed, lacking):
    stored, wanted = lists([names], {lacking}, renamed=renamed)

    _, values = proposed(stored, {path: shape for path, (shape, _) in wanted.items()})

    assert wrong_in(values, stored, wanted) == set()
    made = {path for path, (_, source) in wanted.items() if source}
    assert len(values) > len(made) / 3


@pytest.mark.parametrize("names", LISTS[1:], ids=str)
@pytest.mark.parametrize("gone", [1, 2])
def test_beside_a_layer_that_is_gone_no_other_one_takes_its_place(names, gone):
    stored, wanted = lists([names], {(1, 0, 5, "bn1")}, 6, parts=CONVS, gone=(gone,))

    _, values = proposed(stored, {path: shape for path, (shape, _) in wanted.items()})

    assert wrong_in(values, stored, wanted) == set()


@pytest.mark.parametrize(
    "names",
    [
        [("res{}", "resblocks/{}"), ("dec/res{}", "decoder/resblocks/{}")],
        [("text/layer_{}", "txt/layers/{}"), ("layer_{}", "layers/{}")],
        [("stage{}", "stages/{}"), ("teacher/stage{}", "teacher/stages/{}")],
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "lacking",
    [{(1, 0, 2, "norm"), (0, 1, 0, "norm")}, {(0, 0, 1, "norm"), (1, 1, 3, "norm")}],
    ids=["0", "1"],
)
def test_a_list_of_which_a_layer_lacks_a_part_is_no_other_list(names, lacking):
    stored, wanted = lists(names, lacking, 5, parts=SMALL)

    _, values = proposed(stored, {path: shape for path, (shape, _) in wanted.items()})

    assert wrong_in(values, stored, wanted) == set()


def test_a_part_that_keeps_its_name_moves_with_its_layer():
    """By their numbers alone, the norms would be those of the next layers."""
    stored = {f"h_{at}/{part}": shape for at in range(1, 6) for part, shape in NORMED.items()}
    wanted = {f"h/{at}/norm/scale": (8,) for at in range(1, 5)}
    wanted |= {f"h/{at}/fc/kernel": (8, 8) for at in range(5)}
    arrays = filled(stored)

    _, values = proposed(arrays, wanted)

    for path, value in values.items():
        _, at, part, leaf = path.split("/")
        source = f"h_{int(at) + 1}/{part.replace('fc', 'dense')}/{leaf}"
        np.testing.assert_array_equal(value, arrays[source], err_msg=path)


NORMED = {"dense/kernel": (8, 8), "norm/scale": (8,)}
