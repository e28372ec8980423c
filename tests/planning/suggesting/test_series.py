"""Groups of layers: what all of them hold, where the first one holds something beside it."""

import itertools

import jax
import numpy as np
import pytest
from flax import nnx, traverse_util

from orbax_nnx_handler import Rename, RestoreError, from_linen, suggest
from orbax_nnx_handler.planning.likeness import highest_sums
from orbax_nnx_handler.planning.likeness.assignment import fit_of
from orbax_nnx_handler.planning.likeness.highest_sums import in_turn
from orbax_nnx_handler.planning.likeness.module_parts import Leaf
from orbax_nnx_handler.planning.rules.entries import Entry
from orbax_nnx_handler.planning.suggesting import matching_parts, series
from orbax_nnx_handler.planning.suggesting.series import are_alike, paired_series, series_of
from orbax_nnx_handler.planning.suggesting.stacks import shared_in
from tests.planning.suggesting.pairs import nested, target_of
from tests.planning.suggesting.proposals import abstract, check, filled, proposed, restored
from tests.sampled import sampled

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


def test_a_list_in_each_of_several_layers_is_renamed_by_one_rule_for_all_of_them():
    expected = {}
    for layer in range(3):
        for name, shape in (("q", (4, 8)), ("o", (8, 4))):
            expected[f"blocks/{layer}/attn/w{name}/kernel"] = f"layers_{layer}/mix/{name}_proj/kernel", shape
        for expert, (kind, shape) in itertools.product(range(4), (("up", (4, 6)), ("down", (6, 4)))):
            held = f"layers_{layer}/mlp/experts_{expert}/{kind}_proj/kernel", shape
            expected[f"blocks/{layer}/moe/experts/{expert}/{kind}/kernel"] = held
    stored = filled(dict(expected.values()))

    found, values = proposed(stored, {path: shape for path, (_, shape) in expected.items()})

    check(values, {path: stored[name] for path, (name, _) in expected.items()})
    rules = [str(rule) for rule in found.renames]
    assert "('layers_{i}/mlp/experts_{j}', 'blocks/{i}/moe/experts/{j}')" in rules
    assert len(rules) == 5


def test_layers_that_are_a_list_inside_another_list_are_renamed_by_one_rule_for_each_of_these():
    kinds = {"conv1": "convs/0", "conv2": "convs/1", "out": "out"}
    expected = {
        f"stages/{stage}/blocks/{at}/{wanted}/kernel": (
            f"layer{stage + 1}_block{at}/{name}/kernel",
            (4 + 4 * stage, 4 + 4 * stage + (name == "out")),
        )
        for stage, at, (name, wanted) in itertools.product(range(2), range(4), kinds.items())
    }
    stored = filled(dict(expected.values()))

    found, values = proposed(stored, {path: shape for path, (_, shape) in expected.items()})

    check(values, {path: stored[name] for path, (name, _) in expected.items()})
    rules = [str(rule) for rule in found.renames]
    assert [rule for rule in rules if "stages" in rule] == [
        "('layer1_block{i}', 'stages/0/blocks/{i}')",
        "('layer2_block{i}', 'stages/1/blocks/{i}')",
    ]


def test_the_arms_of_a_u_net_are_told_by_their_names_where_sizes_mirror_each_other():
    arms = {("down_blocks", "encoder"): (4, 8, 16), ("up_blocks", "decoder"): (16, 8, 4)}
    expected = {
        f"{wanted}/{level}/res/{at}/conv_{conv}/{kind}": (
            f"{name}_{level}/resnets_{at}/conv{conv}/{kind}",
            (3, 3, wide, wide)[0 if kind == "kernel" else 3 :],
        )
        for (name, wanted), widths in arms.items()
        for (level, wide), at, conv in itertools.product(enumerate(widths), range(2), (1, 2))
        for kind in ("kernel", "bias")
    }
    stored = filled(dict(expected.values()))

    found, values = proposed(stored, {path: shape for path, (_, shape) in expected.items()})

    check(values, {path: stored[name] for path, (name, _) in expected.items()})
    assert [str(rule) for rule in found.renames] == [
        "('down_blocks_{i}/resnets_{j}', 'encoder/{i}/res/{j}')",
        "('up_blocks_{i}/resnets_{j}', 'decoder/{i}/res/{j}')",
        "('conv{k}', 'conv_{k}')",
    ]


@pytest.mark.parametrize(("rows", "is_left_out"), [(4, True), (400, True), (40_000, False)])
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


def test_the_number_of_the_only_norm_of_its_name_does_not_tell_it_from_a_sibling_of_another_name():
    stored, wanted = {}, {}
    for layer in range(2):
        stored |= {f"Block_{layer}/{norm}/scale": (8,) for norm in ("LayerNorm_0", "spline")}
        stored |= {f"Block_{layer}/Dense_0/kernel": (8, 9), f"Block_{layer}/Dense_0/bias": (9,)}
        wanted |= {f"layers/{layer}/ln_{at}/scale": (8,) for at in range(2)}
        wanted |= {f"layers/{layer}/dense/kernel": (8, 9), f"layers/{layer}/dense/bias": (9,)}

    found, values = proposed(filled(stored), wanted)

    assert values.keys() == {path for path in wanted if "dense" in path}
    assert found.questions


@pytest.mark.parametrize("towers", [("", "_spectrogram"), ("_rgb", "_audio"), ("_image", "_text")])
def test_layers_of_towers_that_are_named_behind_the_number_are_groups_of_their_own(towers):
    names = {"": "video", "_rgb": "video", "_image": "vision"} | {"_spectrogram": "audio", "_text": "text"}
    names["_audio"] = "audio"
    parts = {"Dense_0/kernel": "fc1/kernel", "Dense_1/kernel": "fc2/kernel", "query/kernel": "q/kernel"}
    shapes = {"Dense_0/kernel": (8, 32), "Dense_1/kernel": (32, 8), "query/kernel": (8, 8)}
    stored, right = {}, {}
    for tower in towers:
        stored[f"embedding{tower}/kernel"] = (len(tower) + 3, 8)
        right[f"{names[tower]}/embed/kernel"] = f"embedding{tower}/kernel"
        for layer in range(12):
            for here, there in parts.items():
                stored[f"encoder_{layer}{tower}/{here}"] = shapes[here]
                right[f"{names[tower]}/blocks/{layer}/{there}"] = f"encoder_{layer}{tower}/{here}"
    arrays = filled(stored)

    found, values = proposed(arrays, {path: stored[source] for path, source in right.items()})

    assert values.keys() == right.keys()
    assert all((values[path] == arrays[source]).all() for path, source in right.items())
    assert len(found.renames) < 12


def test_a_norm_that_fits_a_level_of_which_nothing_else_does_is_no_sign_of_the_order():
    stored, right = {}, {}

    def put(here, there, shape):
        stored[here] = shape
        right[there] = here

    width = 16
    for level, out in enumerate((16, 16, 8)):
        for block in range(3):
            here, there = f"up_blocks_{level}/resnets_{block}", f"up/{2 - level}/block/{block}"
            for at, rows in enumerate((width, out), 1):
                put(f"{here}/norm{at}/scale", f"{there}/norm{at}/scale", (rows,))
                put(f"{here}/norm{at}/bias", f"{there}/norm{at}/bias", (rows,))
                put(f"{here}/conv{at}/kernel", f"{there}/conv{at}/kernel", (3, 3, rows, out))
                put(f"{here}/conv{at}/bias", f"{there}/conv{at}/bias", (out,))
            if width != out:
                put(f"{here}/conv_shortcut/kernel", f"{there}/nin_shortcut/kernel", (1, 1, width, out))
            width = out
        if level < 2:
            put(
                f"up_blocks_{level}/upsamplers_0/conv/kernel",
                f"up/{2 - level}/upsample/conv/kernel",
                (3, 3, out, out),
            )
    arrays = filled(stored)

    _, values = proposed(arrays, {path: stored[source] for path, source in right.items()})

    assert [path for path, value in values.items() if (value != arrays[right[path]]).any()] == []


@pytest.mark.parametrize(
    ("kind", "inner", "module", "outer"),
    [
        ("ConvModule", "ppm", "PPM_0", "lateral_convs"),
        ("ConvBnRelu", "aspp/branches", "ASPP_0", "convs"),
        ("ResBlock", "mid/blocks", "Mid_0", "res_blocks"),
        ("ConvNorm", "rpn/layers", "RPN_0", "fpn_convs"),
    ],
)
def test_the_class_of_layers_inside_a_module_and_beside_it_tells_none_from_the_other(
    kind, inner, module, outer
):
    parts = {"Conv_0/kernel": "conv/kernel", "RMSNorm_0/scale": "norm/scale"}
    places = {f"{module}/{kind}_{at}": f"{inner}/{at}" for at in range(2)}
    places |= {f"{kind}_{at + 1}": f"{outer}/{at}" for at in range(2)} | {f"{kind}_0": "bottleneck"}
    names = {f"{old}/{a}": f"{new}/{b}" for old, new in places.items() for a, b in parts.items()}

    def shape(path):
        kernel = (3, 3, 16, 8) if path.startswith(f"{kind}_0/") else (1, 1, 8, 8)
        return kernel if path.endswith("kernel") else (8,)

    stored = filled({path: shape(path) for path in names})
    _, values = proposed(stored, {new: shape(old) for old, new in names.items()})
    check(values, {names[path]: value for path, value in stored.items()})


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)], ids=str)
def test_layers_of_no_elements_are_refused_as_others_are(shape):
    stored = {"params": {"layers_0": {"w": np.zeros(shape, np.float32)}, "o": {"k": np.ones((3, 5))}}}
    leaves = {"layers": {"w": jax.ShapeDtypeStruct(shape, np.float32)}, "o": {"k": np.ones((3, 5))}}
    target = nnx.State(jax.tree.map(nnx.Param, leaves))

    with pytest.raises(RestoreError, match="layers/w"):
        from_linen(stored, target)


def test_layers_that_no_name_or_shape_tells_apart_are_compared_a_few_times(monkeypatch):
    names = ["query", "key", "up", "down"]
    tree = nested({f"params/layers_{i}/{name}/kernel": (2, 2) for i in range(45) for name in names})
    wanted = {f"Block_{i}/Dense_{at}/weight": ((2, 2), "params", "") for i in range(45) for at in range(4)}
    calls = []
    monkeypatch.setattr(matching_parts, "fit_of", lambda *pair: calls.append(pair) or fit_of(*pair))

    found = suggest(tree, target_of(wanted))

    assert len(found.unmatched_wanted) == len(wanted)
    assert len(calls) < 1_000


def test_a_name_that_many_modules_give_to_a_leaf_is_renamed_once_and_so_is_a_word_of_theirs():
    words = ["".join(each) for each in itertools.product("bdgkl", "aeiou", "mn", "o", "rst")][:30]
    kernels = {word: (3, 4 + at) for at, word in enumerate(words)}
    stored = filled(
        {f"{word}_dense/kernel": shape for word, shape in kernels.items()}
        | {f"{word}_dense/bias": shape[1:] for word, shape in kernels.items()}
    )
    expected = {f"net/{word}_linear/weight": stored[f"{word}_dense/kernel"] for word in words}
    expected |= {f"net/{word}_linear/bias": stored[f"{word}_dense/bias"] for word in words}

    found, values = proposed(stored, {path: value.shape for path, value in expected.items()})

    check(values, expected)
    assert found.renames == (Rename("kernel", "weight"), Rename("{x}_dense", "net/{x}_linear"))


def renamed_entries(count, monkeypatch):
    """Returns how often rules rename an entry, where a norm of one of so many layers is stored in part."""
    parts = {
        "attn/query/kernel": ("self_attn/q_proj/kernel", (4, 8)),
        "mlp/fc1/kernel": ("mlp/up_proj/kernel", (4, 16)),
        **{f"LayerNorm_0/{kind}": (f"input_norm/{kind}", (4,)) for kind in ("scale", "bias")},
        **{f"LayerNorm_1/{kind}": (f"post_attention_norm/{kind}", (4,)) for kind in ("scale", "bias")},
    }
    stored = {f"block_{at}/{name}": shape for at in range(count) for name, (_, shape) in parts.items()}
    wanted = {f"layers/{at}/{name}": shape for at in range(count) for name, shape in parts.values()}
    del stored["block_7/LayerNorm_0/scale"]
    renamed, called = [], Entry.called
    with monkeypatch.context() as patched:
        patched.setattr(Entry, "called", lambda *args, **new: renamed.append(1) or called(*args, **new))
        suggest({"params": traverse_util.unflatten_dict(filled(stored), sep="/")}, abstract(wanted))
    return len(renamed)


def test_a_rename_that_takes_a_leaf_along_that_nothing_wants_is_not_tried_anew_in_each_layer(
    monkeypatch,
):
    assert renamed_entries(80, monkeypatch) < 2.5 * renamed_entries(40, monkeypatch)


@pytest.mark.parametrize("upsampled", [True, False])
@pytest.mark.parametrize("is_reversed", [True, False])
def test_levels_of_one_size_on_the_way_up_are_told_by_what_they_hold_or_asked_about(upsampled, is_reversed):
    expected = {"conv_in/kernel": ("conv_in/kernel", (3, 3, 4, 8))}
    for level in range(3):
        other = 2 - level if is_reversed else level
        for at, (arm, of, width) in itertools.product(range(2), (("down", level, 8), ("up", other, 16))):
            block = {"norm1/scale": (width,), "conv1/kernel": (3, 3, width, 8), "conv2/kernel": (3, 3, 8, 8)}
            for name, shape in block.items():
                held = f"{arm}_{of}_block_{at}/{name}", shape
                expected[f"{arm}_blocks/{level}/resnets/{at}/{name}"] = held
        if upsampled and level < 2:
            name = f"up_{other}_upsample/kernel", (3, 3, 8, 8)
            expected[f"up_blocks/{level}/upsamplers/0/conv/kernel"] = name
    stored = filled(dict(expected.values()))

    found, values = proposed(stored, {path: shape for path, (_, shape) in expected.items()})

    told = {path for path in expected if upsampled or not path.startswith("up")}
    check(values, {path: stored[name] for path, (name, _) in expected.items() if path in told})
    assert [len(question.choices) for question in found.questions] == ([] if upsampled else [2])


@pytest.mark.parametrize("widths", [(8, 8, 8), (4, 8, 8), (4, 8, 16)], ids=str)
@pytest.mark.parametrize(
    ("stored_as", "called"),
    [("up_blocks_{}", "levels/{}/up"), ("up_blocks_{}", "decoder/levels/{}"), ("dec_{}", "levels/{}/up")],
)
def test_levels_that_hold_their_way_up_count_from_either_end(stored_as, called, widths):
    expected = {
        f"{called.format(level)}/res/{at}/kernel": (f"{stored_as.format(2 - level)}/res_{at}/kernel", width)
        for (level, width), at in itertools.product(enumerate(widths), range(2))
    }
    stored = filled({name: (3, 3, width, width) for name, width in expected.values()})

    found, values = proposed(stored, {path: (3, 3, width, width) for path, (_, width) in expected.items()})

    is_told = len({*widths}) > 1
    assert [len(question.choices) for question in found.questions] == ([] if is_told else [2])
    check(values, {path: stored[name] for path, (name, _) in expected.items() if is_told})


def test_levels_called_by_the_size_of_their_images_go_down_and_up_again():
    expected = {
        f"{arm}/{level}/res/0/{name}": (f"{of}_{size}x{size}_block0/{name}", (3, 3, width, 8)[-rank:])
        for arm, of, sizes, width in (("down", "enc", (16, 8), 8), ("up", "dec", (8, 16), 16))
        for level, size in enumerate(sizes)
        for name, rank in (("conv0/kernel", 4), ("norm1/scale", 1), ("conv1/kernel", 4))
    }
    stored = filled(dict(expected.values()))

    _, values = proposed(stored, {path: shape for path, (_, shape) in expected.items()})

    check(values, {path: stored[name] for path, (name, _) in expected.items()})


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize(("first", "begin"), [(0, 1), (1, 0)])
@pytest.mark.parametrize("below", [("conv1/kernel", "conv2/kernel"), ("kernel",)])
def test_of_lists_of_one_name_one_may_count_from_0_and_the_other_from_1(below, first, begin, count):
    expected = {
        f"net/layer{at + begin}/{name}": f"backbone/layer{at + first}/{name}"
        for at in range(count)
        for name in below
    }
    stored = filled(dict.fromkeys(expected.values(), (3, 3, 8, 8)))

    _, values = proposed(stored, dict.fromkeys(expected, (3, 3, 8, 8)))

    check(values, {path: stored[name] for path, name in expected.items()})


@pytest.mark.parametrize("held", [("pre", "post"), ("conv_pre", "conv_post")])
@pytest.mark.parametrize("counted", [(0, 2, 4, 6), (0, 1, 3, 5), (1, 3, 5), (0, 3, 6)])
def test_of_lists_as_long_what_one_counts_without_parts_is_none_of_the_other(counted, held):
    expected = {
        f"flows/{at}/{wanted}/kernel": f"flows_{number}/{name}/kernel"
        for (at, number), (name, wanted) in itertools.product(
            enumerate(counted), zip(("pre", "post"), held, strict=True)
        )
    }
    stored = filled(dict.fromkeys(expected.values(), (8, 8)))

    _, values = proposed(stored, dict.fromkeys(expected, (8, 8)))

    check(values, {path: stored[name] for path, name in expected.items()})


def test_a_list_of_parts_in_each_flow_is_not_taken_for_that_beside_the_flows():
    kinds = {"convs_sep": "convs_dilated", "convs_1x1": "convs_pointwise", "norms_1": "norms_1"}
    shapes = {"convs_sep": (3, 1, 16), "convs_1x1": (1, 16, 16), "norms_1": (3, 16)}
    within = {f"dp/flows_{2 * at - 1}/convs": f"predictor/flows/{at}/dds" for at in (1, 2, 3)}
    expected = {
        f"{wanted}/{kinds[name]}/{at}/kernel": (f"{module}/{name}_{at}/kernel", shape)
        for (module, wanted), (name, shape), at in itertools.product(
            {**within, "dp/convs": "predictor/dds"}.items(), shapes.items(), range(3)
        )
    }
    stored = filled(dict(expected.values()))

    _, values = proposed(stored, {path: shape for path, (_, shape) in expected.items()})

    check(values, {path: stored[name] for path, (name, _) in expected.items()})


def test_parameters_called_and_counted_as_their_modules_are_those_of_a_list_called_by_the_plural():
    names = [f"{kind}_projection_{at}" for kind in ("altup", "altup_unembed") for at in range(3)]
    expected = {f"{name[:-2]}s/{name[-1]}/kernel": f"{name}/{name}" for name in names}
    stored = filled(dict.fromkeys(expected.values(), (8, 6)))

    _, values = proposed(stored, dict.fromkeys(expected, (8, 6)))

    check(values, {path: stored[name] for path, name in expected.items()})


@pytest.mark.parametrize(
    ("widths", "blocks", "above"),
    sampled([(16, 8, 8), (8, 8, 4), (16, 16, 8, 8), (8, 8, 8)], [1, 2, 3], ["", "decoder/"]),
)
def test_blocks_in_a_row_are_levels_counted_from_the_end_that_sizes_tell_or_asked_about(
    widths, blocks, above
):
    expected, came, at = {}, 16, itertools.count()
    for level, width in zip(reversed(range(len(widths))), widths, strict=True):
        for block in range(blocks):
            held = {"norm1": ("GroupNorm_0", (came,)), "conv1": ("Conv_0", (3, 3, came, width))}
            held |= {"norm2": ("GroupNorm_1", (width,)), "conv2": ("Conv_1", (3, 3, width, width))}
            number, came = next(at), width
            for name, (kind, shape) in held.items():
                leaf = "scale" if "norm" in name else "kernel"
                stored = f"{above}ResBlock_{number}/{kind}/{leaf}", shape
                expected[f"{above}up/{level}/block/{block}/{name}/{leaf}"] = stored
    stored = filled(dict(expected.values()))

    found, values = proposed(stored, {path: shape for path, (_, shape) in expected.items()})

    check(values, {path: stored[name] for path, (name, _) in expected.items()})
    assert found.confidence == "likely"


def test_blocks_in_a_row_of_one_size_may_be_levels_on_the_way_up_from_either_end():
    expected = {
        f"up/{level}/block/{block}/conv{at + 1}/kernel": (
            f"ResBlock_{2 * (2 - level) + block}/Conv_{at}/kernel",
            (3, 3, 8, 8),
        )
        for level, block, at in itertools.product(range(3), range(2), range(2))
    }
    stored = filled(dict(expected.values()))

    found, values = proposed(stored, {path: shape for path, (_, shape) in expected.items()})

    told = {path: name for path, (name, _) in expected.items() if path.startswith("up/1")}
    check(values, {path: stored[name] for path, name in told.items()})
    (question,) = found.questions
    assert len(question.choices) == 2
    wanted = {path: shape for path, (_, shape) in expected.items()}
    right = [
        all(
            np.array_equal(value, stored[expected[path][0]])
            for path, value in restored(stored, wanted, rules).items()
        )
        for rules in question.alternatives
    ]
    assert sorted(right) == [False, True]


@pytest.mark.parametrize("called", ["dec{}", "decoder/{}", "up{}"])
@pytest.mark.parametrize("is_reversed", [True, False])
def test_levels_on_the_way_up_tell_no_order_of_the_modules_that_linen_numbered(called, is_reversed):
    """Linen numbers the lowest level first; a program may count its levels from the highest one."""
    leads, names = ("encoder/{}" if "/" in called else "enc{}" if "dec" in called else "down{}"), []
    for level, at in itertools.product(range(2), range(2)):
        names.append(f"{leads.format(level + ('/' not in leads))}/conv{at + 1}")
    names += [f"mid/conv{at + 1}" for at in range(2)]
    for level in (1, 0) if is_reversed else (0, 1):
        names += [f"{called.format(level + ('/' not in called))}/conv{at + 1}" for at in range(2)]
    sizes = [3, 8, 8, 8, 8, 8, 16, 8, 16, 8]
    held = dict(zip(names, sizes, strict=True))
    expected = {
        f"{name}/kernel": (f"Conv_{at}/kernel", (3, 3, held[name], 8)) for at, name in enumerate(held)
    }
    stored = filled(dict(expected.values()))

    found, values = proposed(stored, {path: shape for path, (_, shape) in expected.items()})

    assert values
    check(values, {path: stored[name] for path, (name, _) in expected.items() if path in values})
    asked = {"/".join(map(str, path)) for question in found.questions for path in question.wanted}
    assert expected.keys() - values.keys() <= asked


@pytest.mark.parametrize("first", [0, 1])
def test_levels_of_one_name_on_the_way_up_that_count_from_another_number_may_run_the_other_way(first):
    stored, wanted = {"down_0/kernel": (3, 3, 4, 8), "down_1/kernel": (3, 3, 8, 8)}, {}
    for level in range(2):
        stored[f"up_{level}/kernel"] = wanted[f"up{level + first}/conv/kernel"] = (3, 3, 16, 8)
        wanted[f"down{level + first}/conv/kernel"] = stored[f"down_{level}/kernel"]

    found, values = proposed(stored := filled(stored), wanted)

    ways_up = {} if first else {f"up{level}/conv/kernel": stored[f"up_{level}/kernel"] for level in range(2)}
    downs = {f"down{level + first}/conv/kernel": stored[f"down_{level}/kernel"] for level in range(2)}
    check(values, downs | ways_up)
    assert [len(question.choices) for question in found.questions] == [2] * first


@pytest.mark.parametrize("wanted", ["decoder/layers/", "encoder/layers/", "blocks/"])
def test_a_block_that_is_called_encoderblock_is_a_decoders_too(wanted):
    layer = {"LayerNorm_0/scale": (4,), "Dense_0/kernel": (4, 12), "Dense_1/kernel": (12, 4)}
    called = {"LayerNorm_0": "norm", "Dense_0": "fc1", "Dense_1": "fc2"}
    stored, expected = {}, {}
    for number in range(2):
        for path, shape in layer.items():
            name, _, kind = path.partition("/")
            stored[f"Transformer/encoderblock_{number}/{path}"] = shape
            expected[f"{wanted}{number}/{called[name]}/{kind}"] = f"Transformer/encoderblock_{number}/{path}"
    stored = filled(stored)

    _, values = proposed(stored, {path: stored[source].shape for path, source in expected.items()})

    check(values, {path: stored[source] for path, source in expected.items()})


def test_encoderblocks_of_an_encoder_and_of_a_decoder_are_not_exchanged():
    stored = filled(
        {f"{side}/encoderblock_{i}/fc/kernel": (4, 4) for side in ("encoder", "decoder") for i in (0, 1)}
    )

    _, values = proposed(stored, {f"{side}/{i}/fc/kernel": (4, 4) for side in ("dec", "enc") for i in (0, 1)})

    check(values, {f"{path[:3]}/{path[21]}/fc/kernel": value for path, value in stored.items()})


def test_what_the_names_of_many_lists_say_is_asked_once_of_each(monkeypatch):
    asked = []
    concepts = series.concepts
    monkeypatch.setattr(series, "concepts", lambda names: asked.append(names) or concepts(names))
    towers = itertools.product("abcdefgh", "klmno")
    paths = [f"{one}{two}/layers/{at}/{path}" for one, two in towers for at in (0, 1) for path in LAYER]
    sides = [
        series_of([leaf(f"{side}{path}", LAYER[path.split("/", 3)[3]]) for path in paths], 0)
        for side in ("tower_", "net_")
    ]

    paired_series(*sides)

    assert len(asked) == sum(map(len, sides)) == 80


def test_hundreds_of_modules_that_lie_in_turn_are_not_compared_with_each_other(monkeypatch):
    asked = []
    sizes = highest_sums.part_sizes
    monkeypatch.setattr(highest_sums, "part_sizes", lambda leaves: asked.append(leaves) or sizes(leaves))
    sides = [
        [leaf(f"{side}{tower}x/{part}/fc/kernel", (4, 4)) for tower in range(200) for part in parts]
        for side, parts in (("a", ("block_0", "block_1")), ("b", ("left", "right")))
    ]

    assert in_turn(*sides, (0, 0)) == []

    assert not asked


def leaf(path, shape):
    names = tuple(path.split("/"))
    return Leaf(names=names, collection="params", shape=shape, number="floating", source=names)


@pytest.mark.parametrize("middle", ["mid_block", "middle", "bottleneck"])
def test_the_middle_without_a_number_lies_between_the_blocks_on_either_side(middle):
    shapes = {"LayerNorm_0/scale": (8,), "attn/kernel": (8, 8), "Dense_0/kernel": (8, 24)}
    called = {"LayerNorm_0/scale": "norm/scale", "attn/kernel": "attn/kernel", "Dense_0/kernel": "fc/kernel"}
    blocks = ["in_blocks/0", "in_blocks/1", middle, "out_blocks/0", "out_blocks/1"]
    expected = {
        f"{block}/{called[path]}": (f"Block_{at}/{path}", shape)
        for at, block in enumerate(blocks)
        for path, shape in shapes.items()
    }
    expected |= {f"out_blocks/{at}/skip/kernel": (f"Block_{3 + at}/skip/kernel", (16, 8)) for at in range(2)}
    stored = filled(dict(expected.values()))

    found, values = proposed(stored, {path: shape for path, (_, shape) in expected.items()})

    assert not found.questions
    check(values, {path: stored[name] for path, (name, _) in expected.items()})


def _of_depth(count, block, names):
    shapes = {"norm/scale": (4,), "fc1/kernel": (4, 8), "fc1/bias": (8,), "fc2/kernel": (8, 4)}
    head = {"embed/embedding": (9, 4), "head/kernel": (4, 9)}
    inner = dict(zip(names, shapes.values(), strict=True))
    return head | {f"{block.format(at)}/{name}": x for at in range(count) for name, x in inner.items()}


_INNER = (
    ("ln/scale", "up/kernel", "up/bias", "down/kernel"),
    ("norm/scale", "fc1/kernel", "fc1/bias", "fc2/kernel"),
)


@pytest.mark.parametrize(("stored", "wanted"), [(4, 2), (9, 2), (2, 4), (2, 9)])
@pytest.mark.parametrize(
    ("theirs", "ours"), [("layer_{}", "h/{}"), ("encoder/block_{}", "encoder/blocks/{}")]
)
def test_a_model_of_fewer_layers_has_those_of_its_numbers_and_of_more_it_is_asked(
    stored, wanted, theirs, ours
):
    tree, aims = filled(_of_depth(stored, theirs, _INNER[0])), _of_depth(wanted, ours, _INNER[1])

    found, values = proposed(tree, aims)

    outside = {path: tree[path] for path in ("embed/embedding", "head/kernel")}
    sources = {
        f"{ours.format(at)}/{aim}": tree[f"{theirs.format(at)}/{name}"]
        for at in range(min(stored, wanted))
        for name, aim in zip(*_INNER, strict=True)
    }
    if wanted < stored:
        check(values, outside | sources)
    else:
        check(values, outside)
        answered = restored(tree, aims, found.answered([0] * len(found.questions)))
        check({path: answered[path] for path in sources}, sources)


def test_which_modules_that_linen_numbered_a_shorter_model_has_is_asked_the_first_ones_first():
    names = ("LayerNorm_0/scale", "Dense_0/kernel", "Dense_0/bias", "Dense_1/kernel")
    tree, wanted = filled(_of_depth(4, "Block_{}", names)), _of_depth(2, "blocks/{}", _INNER[1])

    found, _ = proposed(tree, wanted)

    (question,) = found.questions
    values = restored(tree, wanted, found.answered([0]))
    expected = {
        f"blocks/{at}/{aim}": tree[f"Block_{at}/{name}"]
        for at in range(2)
        for name, aim in zip(names, _INNER[1], strict=True)
    }
    assert {"/".join(map(str, path)) for path in question.wanted} == expected.keys()
    check(values, expected | {path: tree[path] for path in ("embed/embedding", "head/kernel")})
