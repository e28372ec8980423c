"""What Linen counts goes where its layer has gone, or where the order of the target leaves one place."""

import hashlib

import jax
import numpy as np
import pytest
from flax import nnx, traverse_util

from orbax_nnx_handler import from_linen, plan_restore, suggest
from orbax_nnx_handler.planning.core.recipes import reads
from tests.planning.suggesting import proposals

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


def flat_program(calls):
    """Returns stored leaves of one compact module, and the wanted ones with the stored leaf of each.

    `calls` are the class, the wanted part and the shape of the kernel, or the width, in order.
    """
    stored, truth, counted = {}, {}, {}
    for kind, target, shape in calls:
        number = counted[kind] = counted.get(kind, -1) + 1
        width = shape[-1:]
        leaves = {"scale": width, "bias": width} if kind == "LayerNorm" else {"kernel": shape}
        for leaf, size in leaves.items():
            path = f"params/{kind}_{number}/{leaf}"
            stored[path], truth[f"{target}/{leaf}"] = drawn(path, size), path
    return stored, truth


def transformer(*, before=(), behind=(), norms=("norm1", "norm2"), lacking=()):
    """Returns the calls of an encoder of three blocks, with other norms before or behind them."""
    calls = [("Dense", "embed/linear", (3, 8)), *(("LayerNorm", name, (8,)) for name in before)]
    for at in range(3):
        block = [
            ("LayerNorm", norms[0], (8,)),
            ("Dense", "attn/qkv", (8, 24)),
            ("Dense", "attn/out", (8, 8)),
            ("LayerNorm", norms[1], (8,)),
            ("Dense", "mlp/fc1", (8, 32)),
            ("Dense", "mlp/fc2", (32, 8)),
        ]
        made = [(kind, f"blocks/{at}/{name}", shape) for kind, name, shape in block]
        calls += [call for call in made if call[1] not in lacking]
    calls += [("LayerNorm", name, (8,)) for name in behind]
    return flat_program([*calls, ("Dense", "classifier", (8, 5))])


def settled_in(stored, truth):
    """Returns the leaves that a proposal settles, after checking that each is right."""
    tree, target = tree_of(stored), target_of(stored, truth)
    found = suggest(tree, target)
    state = from_linen(tree, target, renames=found.renames, policy="warn", unexpected="ignore")
    left = {"/".join(map(str, path)) for path in found.unmatched_wanted}
    values = {"/".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(state)}
    settled = values.keys() - left
    for name in settled:
        np.testing.assert_array_equal(values[name], stored[truth[name]], err_msg=name)
    return settled


@pytest.mark.parametrize("norms", [("norm1", "norm2"), ("ln_1", "ln_2"), ("attn_norm", "mlp_norm")])
@pytest.mark.parametrize(
    ("before", "behind"),
    [
        ((), ("ln_f",)),
        ((), ("final_norm",)),
        ((), ("norm_out",)),
        ((), ("encoder_norm",)),
        ((), ("head/norm",)),
        (("emb_norm",), ()),
        (("in_norm",), ()),
        (("embeddings/LayerNorm",), ()),
        (("ln_pre",), ("ln_post",)),
    ],
)
def test_a_norm_that_says_so_is_before_or_behind_all_blocks(before, behind, norms):
    stored, truth = transformer(before=before, behind=behind, norms=norms)
    assert settled_in(stored, truth) == truth.keys()


@pytest.mark.parametrize(
    "shape",
    [
        {"behind": ("norm",)},
        {"behind": ("ln_f", "head_norm")},
        {"behind": ("pre_head_norm",)},
        {"before": ("post_embed_norm",)},
        {"behind": ("final_norm",), "lacking": ("blocks/0/norm1",), "before": ("norm",)},
        {"behind": ("final_norm",), "norms": ("inner_norm", "other_norm")},
    ],
    ids=str,
)
def test_norms_of_blocks_are_asked_about_where_nothing_tells_where_a_lone_one_is(shape):
    stored, truth = transformer(**shape)
    settled = settled_in(stored, truth)
    assert not any(name.endswith("scale") for name in settled)


def test_layers_of_blocks_go_in_their_order_where_some_are_known_by_shape():
    calls, before = [], 3
    for at, width in enumerate((8, 16, 16, 16)):
        for name in ("conv_a", "conv_b"):
            calls.append(("Conv", f"blocks/{at}/{name}", (3, 3, before, width)))
            before = width
    stored, truth = flat_program(calls)
    assert settled_in(stored, truth) == truth.keys()


@pytest.mark.parametrize("rises", [True, False])
def test_a_way_up_is_counted_as_its_known_layers_are_and_norms_follow_those_that_have_one(rises):
    widths = (8, 16, 32)
    levels = [(f"enc{at}", 3 if at == 1 else width // 2, width) for at, width in enumerate(widths, 1)]
    levels.append(("middle", 32, 64))
    for at, width in enumerate(reversed(widths), 1):
        levels.append((f"dec{at if rises else 4 - at}", 2 * width, width))
    calls = []
    for name, before, width in levels:
        for number in (1, 2):
            inputs = before if number == 1 else width
            calls.append(("Conv", f"{name}/conv{number}", (3, 3, inputs, width)))
            calls.append(("LayerNorm", f"{name}/norm{number}", (width,)))
    stored, truth = flat_program([*calls, ("Conv", "out_conv", (1, 1, 8, 2))])
    assert settled_in(stored, truth) == truth.keys()


def test_levels_that_a_program_computes_from_the_last_one_are_asked_about():
    calls = [("Conv", f"backbone/{at}", (3, 3, 3 if at == 0 else 4 * 2**at, 8 * 2**at)) for at in range(3)]
    calls += [("Conv", f"lateral_convs/{at}", (1, 1, 8 * 2**at, 8)) for at in (2, 1, 0)]
    calls += [("Conv", f"fpn_convs/{at}", (3, 3, 8, 8)) for at in (2, 1, 0)]
    stored, truth = flat_program([*calls, ("Conv", "head", (3, 3, 8, 8))])
    assert not any(name.startswith("fpn_convs") for name in settled_in(stored, truth))


def test_a_layer_that_names_place_nowhere_leaves_its_equals_open():
    calls = [("Dense", f"trunk/{at}", (3 if at == 0 else 8, 8)) for at in range(4)]
    stored, truth = flat_program([*calls, ("Dense", "extra", (8, 8)), ("Dense", "classifier", (8, 5))])
    assert "extra/kernel" not in settled_in(stored, truth)


def double_convolutions(*, reverses=()):
    """Returns a U-Net of modules of one class, of which some compute their parts the other way round."""
    sizes = {"inc": (3, 8)}
    sizes |= {f"down{at}/conv": (4 * 2**at, 8 * 2**at) for at in (1, 2, 3)}
    sizes |= {f"up{at}/conv": (128 // 2**at, 64 // 2**at) for at in (1, 2, 3)}
    stored, truth = {}, {}
    for at, (module, (inputs, width)) in enumerate(sizes.items()):
        parts = {"Conv_0": "0", "BatchNorm_0": "1", "Conv_1": "3", "BatchNorm_1": "4"}
        if module.split("/")[0] in reverses:
            parts |= {"Conv_0": "3", "Conv_1": "0", "BatchNorm_0": "4", "BatchNorm_1": "1"}
        for name, target in parts.items():
            kernel = (3, 3, inputs if target == "0" else width, width)
            made = [("params", "scale", (width,)), ("params", "bias", (width,))]
            made += [("batch_stats", "mean", (width,)), ("batch_stats", "var", (width,))]
            for collection, leaf, shape in [("params", "kernel", kernel)] if target in "03" else made:
                path = f"{collection}/DoubleConv_{at}/{name}/{leaf}"
                stored[path] = drawn(path, shape)
                truth[f"{module}/double_conv/{target}/{leaf}"] = path
        if module.startswith("up"):
            number = int(module[2])
            path = f"params/ConvTranspose_{number - 1}/kernel"
            stored[path] = drawn(path, (2, 2, inputs, width))
            truth[f"up{number}/up/kernel"] = path
    return stored, truth


def test_what_is_left_of_a_module_goes_as_in_the_others_of_its_class():
    stored, truth = double_convolutions()
    assert settled_in(stored, truth) == truth.keys()


def test_modules_of_one_class_that_go_in_two_ways_tell_nothing_of_the_others():
    stored, truth = double_convolutions(reverses=("down1",))
    assert "inc/double_conv/3/kernel" not in settled_in(stored, truth)


def decoder_of_lists(last):
    """Returns blocks of which each part lies in a list of pairs, a norm and what it belongs to."""
    parts = {"MultiHeadDotProductAttention_0": "0/fn", "MultiHeadDotProductAttention_1": "1/fn"}
    stored, truth = {}, {}

    def add(source, target, shape):
        path = f"params/{source}"
        stored[path] = drawn(path, shape)
        truth[target] = path

    for at in range(2):
        block = f"DecoderLayer_{at}"
        for name, target in parts.items():
            for own, ours in {"query": "to_q", "key": "to_k", "value": "to_v", "out": "to_out"}.items():
                add(f"{block}/{name}/{own}/kernel", f"layers/{at}/{target}/{ours}/kernel", (8, 8))
        for number, target in enumerate(("0/norm", "1/norm", last)):
            add(f"{block}/LayerNorm_{number}/scale", f"layers/{at}/{target}/scale", (8,))
        add(f"{block}/Dense_0/kernel", f"layers/{at}/2/net/0/kernel", (8, 24))
        add(f"{block}/Dense_1/kernel", f"layers/{at}/2/net/3/kernel", (24, 8))
    return stored, truth


@pytest.mark.parametrize("last", ["2/norm", "2/pre", "3/norm"])
def test_the_only_part_left_of_a_module_goes_to_the_only_one_left_of_where_it_has_gone(last):
    stored, truth = decoder_of_lists(last)
    assert settled_in(stored, truth) >= {f"layers/{at}/{last}/scale" for at in range(2)}


def test_two_parts_left_of_a_module_are_told_by_nothing():
    stored, truth = decoder_of_lists("2/norm")
    for at in range(2):
        path = f"params/DecoderLayer_{at}/LayerNorm_3/scale"
        stored[path] = drawn(path, (8,))
    assert not settled_in(stored, truth) & {f"layers/{at}/2/norm/scale" for at in range(2)}


BRANCHES = {"dense": (3, "3x3"), "1x1": (1, "1x1")}
BATCH_NORM = {"scale": "params", "bias": "params", "mean": "batch_stats", "var": "batch_stats"}


def named_layer(stored, truth, names, targets, kernel):
    """Adds a convolution and its norm, both called by names."""
    for name, target, leaves in zip(
        names, targets, ({"kernel": "params"}, BATCH_NORM) if kernel else (BATCH_NORM,), strict=True
    ):
        for leaf, collection in leaves.items():
            path = f"{collection}/{name}/{leaf}"
            stored[path] = drawn(path, kernel if leaf == "kernel" else (8,))
            truth[f"{target}/{leaf}"] = path


def test_norms_of_branches_follow_the_convolutions_that_names_say_they_are_of():
    # The kernels tell which branch is which, RepVGG's; the norms are all of one width.
    stored, truth = {}, {}
    for at in range(3):
        for branch, (size, name) in BRANCHES.items():
            names = (f"stage_{at}/rbr_{branch}/conv", f"stage_{at}/rbr_{branch}/bn")
            targets = (f"stages/{at}/conv{name}", f"stages/{at}/bn{name}")
            named_layer(stored, truth, names, targets, (size, size, 8, 8))
        named_layer(stored, truth, (f"stage_{at}/rbr_identity",), (f"stages/{at}/bn_id",), None)

    check(stored, truth)


def test_the_norm_of_a_shortcut_leaves_those_of_the_block_in_their_order():
    stored, truth = {}, {}
    for at in range(3):
        block, target = f"layer1_{at}", f"layer1/{at}"
        named_layer(stored, truth, (f"{block}/bn_in",), (f"{target}/bn1",), None)
        for number, norm in ((1, "bn_mid"), (2, "bn_out")):
            names = (f"{block}/conv{number}", f"{block}/{norm}")
            targets = (f"{target}/conv{number}", f"{target}/bn{number + 1}")
            named_layer(stored, truth, names, targets, (3, 3, 8, 8))
        if at == 0:
            names, targets = (
                (f"{block}/short_conv", f"{block}/short_bn"),
                (f"{target}/downsample/0", f"{target}/downsample/1"),
            )
            named_layer(stored, truth, names, targets, (1, 1, 8, 8))

    check(stored, truth)


def layers_with_two_norms(count, lost):
    """Returns layers of two norms of one width and a square layer; some leaves are not stored."""
    stored, truth = {}, {}
    for at in range(count):
        parts = {
            "LayerNorm_0": ("input_norm", ("scale", "bias")),
            "LayerNorm_1": ("post_attention_norm", ("scale", "bias")),
            "proj": ("self_attn/o_proj", ("kernel",)),
        }
        for name, (target, leaves) in parts.items():
            for leaf in leaves:
                path = f"params/layer_{at}/{name}/{leaf}"
                stored[path] = drawn(path, (8, 8) if leaf == "kernel" else (8,))
                truth[f"layers/{at}/{target}/{leaf}"] = path
    return {path: array for path, array in stored.items() if path not in lost}, truth, stored


@pytest.mark.parametrize("gone", ["LayerNorm_0/scale", "LayerNorm_0/bias", "LayerNorm_1/scale"])
def test_a_layer_of_which_a_leaf_is_missing_is_as_the_others_are(gone):
    lost = f"params/layer_1/{gone}"
    stored, truth, whole = layers_with_two_norms(4, [lost])

    tree, target = tree_of(stored), target_of(whole, truth)
    found = suggest(tree, target)
    plan = plan_restore(tree, target, renames=found.renames)

    (missing,) = (path for path, source in truth.items() if source == lost)
    assert ["/".join(map(str, path)) for path in found.unmatched_wanted] == [missing]
    assert len(found.renames) < 6
    for path, item in plan.restored.items():
        assert "/".join(reads(item.recipe)[0]) == truth["/".join(map(str, path))]


def test_a_layer_that_holds_one_norm_of_two_tells_not_which_it_is():
    lost = [f"params/layer_1/LayerNorm_1/{leaf}" for leaf in ("scale", "bias")]
    stored, truth, whole = layers_with_two_norms(4, lost)

    found = suggest(tree_of(stored), target_of(whole, truth))

    assert {path[:3] for path in found.unmatched_wanted} >= {
        ("layers", 1, "input_norm"),
        ("layers", 1, "post_attention_norm"),
    }


@pytest.mark.parametrize(("actions", "is_told"), [(4, True), (16, False)])
def test_a_layer_that_is_called_as_a_list_leads_out_of_it_where_none_of_its_layers_is_as_wide(
    actions, is_told
):
    stored, truth = {}, {}
    aims = [
        "mlp/policy_net/0",
        "mlp/policy_net/2",
        "action_net",
        "mlp/value_net/0",
        "mlp/value_net/2",
        "value_net",
    ]
    widths = [(8, 16), (16, 16), (16, actions), (8, 16), (16, 16), (16, 1)]
    for at, (aim, width) in enumerate(zip(aims, widths, strict=True)):
        for leaf, shape in (("kernel", width), ("bias", width[1:])):
            path = f"params/Dense_{at}/{leaf}"
            stored[path] = drawn(path, shape)
            truth[f"{aim}/{leaf}"] = path

    assert (settled_in(stored, truth) == truth.keys()) == is_told


@pytest.mark.parametrize("others", [[], ["second_bn"]])
def test_the_only_norm_of_a_module_is_that_of_its_only_convolution(others):
    kinds = ("scale", "bias", "mean", "var")
    names = {"stem_conv/kernel": "conv1_conv/kernel", "output_projection/kernel": "predictions/kernel"}
    shapes = {"stem_conv/kernel": (7, 7, 3, 4), "output_projection/kernel": (4, 9)}
    names |= {f"init_bn/{kind}": f"conv1_bn/{kind}" for kind in kinds}
    shapes |= {f"{norm}/{kind}": (4,) for norm in ("init_bn", *others) for kind in kinds}
    stored = proposals.filled(shapes)

    found, values = proposals.proposed(stored, {aim: shapes[path] for path, aim in names.items()})

    expected = {aim: stored[path] for path, aim in names.items() if not others or "bn" not in path}
    assert len(found.questions) == len(others)
    proposals.check(values, expected)


def test_a_layer_whose_norm_names_find_elsewhere_is_asked_about():
    def norms(*names):
        return {f"{name}/{leaf}": (width,) for name, width in names for leaf in ("scale", "bias")}

    stored = proposals.filled(
        norms(("unit/gn1", 8), ("unit/gn2", 8), ("unit/gn3", 32), ("unit/gn_proj", 32))
        | {"unit/conv3/kernel": (1, 1, 8, 32)}
    )
    wanted = norms(("0/norm1", 8), ("0/norm2", 8), ("0/norm3", 32), ("0/downsample/norm", 32))
    wanted |= {"0/downsample/conv/kernel": (1, 1, 8, 32)}

    found, values = proposals.proposed(stored, wanted)

    assert found.unmatched_wanted == ((0, "downsample", "conv", "kernel"),)
    np.testing.assert_array_equal(values["0/downsample/norm/scale"], stored["unit/gn_proj/scale"])


def test_a_batch_norm_whose_layer_is_found_elsewhere_is_asked_about():
    shapes = {"kxk": (3, 3, 4, 8), "1x1": (1, 1, 8, 6), "fusion": (3, 3, 16, 8)}
    stored, wanted = {}, {}
    for at, (name, shape) in enumerate(shapes.items()):
        stored[f"ConvNormAct_{at}/Conv_0/kernel"] = wanted[f"{name}/convolution/kernel"] = shape
        for kind in ("scale", "bias", "mean", "var"):
            stored |= {f"ConvNormAct_{at}/BatchNorm_0/{kind}": shape[-1:]} if name != "fusion" else {}
            wanted |= {f"{name}/normalization/{kind}": shape[-1:]} if name != "kxk" else {}

    found, values = proposals.proposed(proposals.filled(stored), wanted)

    assert [question.wanted[0][:2] for question in found.questions] == [("fusion", "normalization")]
    assert len(values) == len(wanted) - 4


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("cross_attn", "cross_attention"),
        ("ff_mha", "ff_mhsa"),
        ("post_attn", "post_attention"),
        ("pre_mlp", "pre_ffn"),
        ("attn", "attention"),
        ("cross_attn/out", "cross_attention/out"),
    ],
)
@pytest.mark.parametrize("norm", ["{}_norm -> ln_{}", "{}_ln -> {}_layer_norm", "{}_norm -> norm_{}"])
def test_a_vector_beside_a_norm_is_not_told_by_where_that_norm_stands(one, other, norm):
    before, after = (
        "/".join((*name.split("/")[:-1], text.format(name.split("/")[-1])))
        for name, text in zip((one, other), norm.split(" -> "), strict=True)
    )
    stored = proposals.filled({f"{one}_scale": (16,), f"{before}/scale": (16,)})
    right = {
        f"{other}_scale": stored[f"{one}_scale"],
        f"{after}/scale": stored[f"{before}/scale"],
    }

    found, values = proposals.proposed(stored, dict.fromkeys(right, (16,)))

    assert found.unmatched_wanted == ()
    proposals.check(values, right)


def test_the_norm_of_a_dense_network_beside_experts_is_not_that_of_the_input():
    stored = proposals.filled({f"layers_0/{x}_norm/scale": (16,) for x in ("attn", "dense", "moe")})
    wanted = {f"layers/0/{x}_layernorm/scale": (16,) for x in ("input", "residual", "post_attention")}

    found, values = proposals.proposed(stored, wanted)

    assert values.keys() <= {"layers/0/input_layernorm/scale"}
    assert found.questions


class Scale(nnx.Module):
    def __init__(self):
        self.scale = nnx.Param(np.ones(8, "f"))


class Block(nnx.Module):
    def __init__(self):
        self.pre_attn_norm, self.pre_ffn_norm, self.attn_norm = Scale(), Scale(), Scale()


class Blocks(nnx.Module):
    def __init__(self):
        self.blocks = nnx.List([Block(), Block()])


def test_norms_of_which_one_no_longer_fits_are_no_error():
    norms = ("input_layernorm/weight", "post_attention_layernorm/weight", "layernorm_after/scale")
    stored = proposals.filled({f"layers/{at}/{name}": (8,) for at in range(2) for name in norms})

    found = suggest(traverse_util.unflatten_dict(stored, sep="/"), nnx.eval_shape(Blocks))

    assert found.questions
