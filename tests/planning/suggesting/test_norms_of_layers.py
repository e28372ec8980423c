"""A norm goes where its layer has gone, whatever the two programs count."""

import hashlib

import jax
import numpy as np
import pytest
from flax import nnx

from orbax_nnx_handler import from_linen, suggest

WIDTHS = (8, 16, 32)
NAMES = {
    "torchvision": ("conv{}", "bn{}", "downsample/0", "downsample/1"),
    "words": ("conv{}", "norm{}", "skip_conv", "skip_norm"),
    "modules": ("block{}/conv", "block{}/bn", "shortcut/conv", "shortcut/bn"),
    "lists": ("convs/{}", "norms/{}", "res_conv", "res_norm"),
}


def drawn(path, shape):
    seed = int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "little")
    return np.random.default_rng(seed).normal(size=shape).astype("f")


def residual_network(order, norm, names, *, is_flat=False):
    """Returns stored leaves, and the wanted ones with the stored leaf of each."""
    conv, beside, skip_conv, skip_norm = names
    stored, truth = {}, {}
    counted = {"Conv": 0, norm: 0}

    def add(module, target, kind, leaves):
        name = f"{kind}_{counted[kind]}"
        counted[kind] += 1
        for collection, leaf, shape in leaves:
            path = "/".join(filter(None, (collection, module, name, leaf)))
            stored[path] = drawn(path, shape)
            truth[f"{target}/{leaf}"] = path

    def layer(module, targets, size, inputs, outputs):
        add(module, targets[0], "Conv", [("params", "kernel", (size, size, inputs, outputs))])
        leaves = [("params", "scale", (outputs,)), ("params", "bias", (outputs,))]
        statistics = [("batch_stats", "mean", (outputs,)), ("batch_stats", "var", (outputs,))]
        add(module, targets[1], norm, [*leaves, *(statistics if norm == "BatchNorm" else ())])

    layer("", ("stem/conv", "stem/norm"), 3, 3, WIDTHS[0])
    before = WIDTHS[0]
    for at, width in enumerate(WIDTHS):
        module, block = ("", f"blocks/{at}") if is_flat else (f"ResidualBlock_{at}", f"blocks/{at}")
        counted |= {} if is_flat else {"Conv": 0, norm: 0}
        first = 0 if conv.startswith("convs") else 1
        steps = [
            ((conv.format(first + k), beside.format(first + k)), 3, before if k == 0 else width)
            for k in (0, 1)
        ]
        if before != width:
            steps.insert({"first": 0, "middle": 1, "last": 2}[order], ((skip_conv, skip_norm), 1, before))
        for targets, size, inputs in steps:
            layer(module, [f"{block}/{name}" for name in targets], size, inputs, width)
        before = width
    return stored, truth


def tree_of(stored):
    tree = {}
    for path, value in stored.items():
        *above, last = path.split("/")
        node = tree
        for name in above:
            node = node.setdefault(name, {})
        node[last] = value
    return tree


def target_of(stored, truth):
    kinds = {"params": nnx.Param, "batch_stats": nnx.BatchStat}
    return nnx.from_flat_state(
        [
            (
                tuple(int(name) if name.isdecimal() else name for name in path.split("/")),
                kinds[source.split("/")[0]](jax.ShapeDtypeStruct(stored[source].shape, "float32")),
            )
            for path, source in truth.items()
        ]
    )


def check(stored, truth):
    tree, target = tree_of(stored), target_of(stored, truth)

    found = suggest(tree, target)
    state = from_linen(tree, target, renames=found.renames)

    assert not found.questions
    assert not found.unmatched_wanted
    for path, leaf in nnx.to_flat_state(state):
        name = "/".join(map(str, path))
        np.testing.assert_array_equal(leaf[...], stored[truth[name]], err_msg=name)


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("norm", ["BatchNorm", "GroupNorm"])
@pytest.mark.parametrize("order", ["first", "middle", "last"])
def test_the_norm_of_a_shortcut_is_that_of_its_convolution(order, norm, names):
    check(*residual_network(order, norm, names))


@pytest.mark.parametrize("order", ["first", "last"])
def test_all_norms_of_one_compact_module_follow_its_convolutions(order):
    check(*residual_network(order, "BatchNorm", NAMES["torchvision"], is_flat=True))


def test_norms_that_fit_no_layer_all_through_are_left_to_names():
    # Of a block with attention, whose norms are before it and before the network.
    sizes = {"LayerNorm_0": (8,), "LayerNorm_1": (8,), "Dense_0": (8, 32), "Dense_1": (32, 8)}
    leaves = {"LayerNorm": "scale", "Dense": "kernel"}
    stored, truth = {}, {}
    names = {"LayerNorm_0": "norm1", "LayerNorm_1": "norm2", "Dense_0": "fc1", "Dense_1": "fc2"}
    for at in range(2):
        for name, shape in sizes.items():
            leaf = leaves[name.split("_")[0]]
            path = f"params/Block_{at}/{name}/{leaf}"
            stored[path] = drawn(path, shape)
            truth[f"blocks/{at}/{names[name]}/{leaf}"] = path
    check(stored, truth)
