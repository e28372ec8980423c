"""Networks that a checkpoint keeps each with `params` of its own, in a target that names parts otherwise."""

import jax
import numpy as np
import pytest
from flax import nnx

from orbax_nnx_handler import from_linen, suggest

SHAPES = {"Dense_0": (4, 8), "Dense_1": (8, 8), "Dense_2": (8, None)}
OURS = {"Dense_0": "fc1", "Dense_1": "fc2", "Dense_2": "out"}


def network(first, width):
    return {
        name: {
            "kernel": first + at * 100 + np.arange(a * (b or width), dtype="float32").reshape(a, b or width)
        }
        for at, (name, (a, b)) in enumerate(SHAPES.items())
    }


def target_of(names, widths):
    return nnx.from_flat_state(
        [
            (
                (key, OURS[name], "kernel"),
                nnx.Param(jax.ShapeDtypeStruct((shape[0], shape[1] or width), "float32")),
            )
            for key, width in zip(names, widths, strict=True)
            for name, shape in SHAPES.items()
        ]
    )


@pytest.mark.parametrize("widths", [(3, 1), (1, 1)])
@pytest.mark.parametrize("wanted", [("actor", "critic"), ("policy_net", "value_net")])
@pytest.mark.parametrize(
    "stored", [("actor", "critic"), ("policy", "value"), ("actor_params", "critic_params")]
)
def test_each_network_is_found_by_its_key(stored, wanted, widths):
    tree = {
        key: {"params": network(1000.0 * at, width)}
        for at, (key, width) in enumerate(zip(stored, widths, strict=True))
    }

    found = suggest(tree, target_of(wanted, widths))
    state = from_linen(tree, target_of(wanted, widths), renames=found.renames)

    assert found.confidence == "likely"
    for key, other in zip(wanted, stored, strict=True):
        for name, ours in OURS.items():
            np.testing.assert_array_equal(
                state[key][ours]["kernel"].get_value(), tree[other]["params"][name]["kernel"]
            )


def test_networks_of_which_no_name_tells_which_is_which_are_asked_about():
    tree = {"0": {"params": network(0.0, 1)}, "1": {"params": network(1000.0, 1)}}

    found = suggest(tree, target_of(("actor", "critic"), (1, 1)))

    assert found.confidence == "open"
    assert found.questions
