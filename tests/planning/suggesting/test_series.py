"""Groups of layers: what all of them hold, where the first one holds something beside it."""

import pytest

from orbax_nnx_handler.planning.suggesting.module_parts import Leaf
from orbax_nnx_handler.planning.suggesting.series import are_alike, series_of, shared_in

LAYER = {"attn/q/kernel": (8, 8), "attn/o/kernel": (8, 8), "mlp/up/kernel": (8, 32)}


def layers(*held):
    leaves = [
        Leaf(names=names, collection="params", shape=shape, number="floating", source=names)
        for at, inside in enumerate(held)
        for path, shape in inside.items()
        for names in [("layers", str(at), *path.split("/"))]
    ]
    (series,) = series_of(leaves, 0)
    return series


@pytest.mark.parametrize(("rows", "is_left_out"), [(4, True), (400, False)])
def test_what_only_the_first_layer_holds_is_left_out_where_it_is_little(rows, is_left_out):
    series = layers({**LAYER, "attn/relative/embedding": (rows, 2)}, LAYER, LAYER)

    shared = shared_in(series)

    assert are_alike(shared) is is_left_out
    assert (shared is series) is not is_left_out
    assert sum(leaf.names[-2] == "relative" for leaf in shared.members[0]) == (not is_left_out)


def test_layers_that_hold_the_same_stay_as_they_are():
    series = layers(LAYER, LAYER)

    assert shared_in(series) is series


def test_a_leaf_of_another_shape_in_one_layer_is_none_that_all_hold():
    series = layers(LAYER, {**LAYER, "attn/q/kernel": (8, 9)}, LAYER)

    assert shared_in(series) is series
