"""Lists beside each other: as parts of the blocks of one list, or with single modules among its layers."""

import itertools

import numpy as np
import pytest

from orbax_nnx_handler import StackLayers
from tests.planning.suggesting.proposals import check, filled, proposed, restored

LAYER = {
    "norm1/scale": (8,),
    "attn/q/kernel": (8, 8),
    "attn/k/kernel": (8, 8),
    "attn/v/kernel": (8, 8),
    "attn/out/kernel": (8, 8),
    "norm2/scale": (8,),
    "mlp/fc1/kernel": (8, 32),
    "mlp/fc2/kernel": (32, 8),
}
SQUARE = {"kernel": (8, 8), "bias": (8,)}


def blocks(called):
    """Returns the stored leaves of two lists, and where they are in the blocks of one."""
    paths = {
        f"{name}/{at}/{path}": f"blocks/{at}/{aim}/{path}"
        for name, aim in called.items()
        for at in range(3)
        for path in LAYER
    }
    return filled({path: LAYER[path.split("/", 2)[2]] for path in paths}), paths


@pytest.mark.parametrize(
    "called",
    [
        {"layers": "self", "gated_cross_attn": "gated"},
        {"h": "layer", "xattn_layers": "cross"},
        {"decoder_layers": "decoder_layer", "cross_layers": "xattn"},
    ],
    ids=lambda called: ",".join(called),
)
@pytest.mark.parametrize("turned", [False, True])
def test_lists_as_large_as_the_parts_of_blocks_are_those_by_their_names(called, turned):
    stored, paths = blocks(called)
    aims = {aim: path for path, aim in paths.items()} if turned else paths
    stored = filled({paths[path]: x.shape for path, x in stored.items()}) if turned else stored

    found, values = proposed(stored, {aims[path]: x.shape for path, x in stored.items()})

    assert not found.questions
    check(values, {aims[path]: x for path, x in stored.items()})


def test_lists_that_no_name_gives_to_the_parts_of_blocks_are_one_question():
    stored, paths = blocks({"oak": "near", "elm": "far"})
    shapes = {paths[path]: x.shape for path, x in stored.items()}

    found, values = proposed(stored, shapes)

    (question,) = found.questions
    assert not values
    expected = {paths[path]: x for path, x in stored.items()}
    made = [restored(stored, shapes, rules) for rules in question.alternatives]
    assert [all(np.array_equal(one[path], x) for path, x in expected.items()) for one in made].count(
        True
    ) == 1


TWO_NUMBERS = [
    ("stage{s}_block{j}", "stages/{t}/{j}"),
    ("stage{t}_block{j}", "stages/{t}/{j}"),
    ("stages_{t}_{j}", "stage_{t}/{j}"),
    ("block{s}_{j}", "stages/{t}/{j}"),
    ("layers_{t}/blocks_{j}", "stage{s}_block{j}"),
    ("layer{s}/block{j}", "block{s}_{k}"),
    ("group{s}_layer{k}", "layer{s}/{j}"),
    ("down_{t}_{j}", "stages/{t}/{j}"),
    ("stage{s}_block{j}", "stage{s}/block{j}"),
    ("stage{t}_block{j}", "stage{s}/block{k}"),
    ("stages_{t}_{j}", "stage{s}/block{j}"),
]
# A name says that it is a part of a layer.
PARTS = [("ln{k}_{t}", "layers/{t}/ln{k}"), ("mlp{k}_{t}", "layers/{t}/mlp_{j}")]


@pytest.mark.parametrize("names", TWO_NUMBERS + PARTS, ids=" ".join)
def test_of_two_numbers_the_first_one_is_the_outer_one_on_both_sides(names):
    shapes, held, aims = {"fc1/kernel": (8, 16), "fc2/kernel": (16, 8), "norm/scale": (8,)}, {}, {}
    for t, j, (path, shape) in itertools.product(range(2), range(2), shapes.items()):
        name, aim = (f"{x.format(t=t, j=j, s=t + 1, k=j + 1)}/{path}" for x in names)
        held[name], aims[name] = shape, aim
    stored = filled(held)

    found, values = proposed(stored, {aims[path]: x.shape for path, x in stored.items()})

    assert not found.questions
    check(values, {aims[path]: x for path, x in stored.items()})


def test_the_lists_in_the_layers_of_a_list_get_one_rule_each():
    stored = filled(
        {f"stage{t + 1}_block{j}/{path}": x for t in range(2) for j in range(3) for path, x in LAYER.items()}
    )
    aims = {path: f"stages/{int(path[5]) - 1}/{path[12:]}" for path in stored}

    found, values = proposed(stored, {aims[path]: x.shape for path, x in stored.items()})

    check(values, {aims[path]: x for path, x in stored.items()})
    assert [str(rule) for rule in found.renames] == [
        "('stage1_block{i}', 'stages/0/{i}')",
        "('stage2_block{i}', 'stages/1/{i}')",
    ]


def stacked_in_a_list(name, aim, counts, over):
    """Returns the leaves of a list of lists, and of a list of the lists along one number, as stacks."""
    shapes = {"fc1/kernel": (8, 16), "fc1/bias": (16,), "fc2/kernel": (16, 8), "fc2/bias": (8,)}
    places = list(itertools.product(*map(range, counts)))
    stored = filled({f"{name.format(*at)}/{path}": x for at in places for path, x in shapes.items()})
    expected = {
        f"{aim.format(number)}/{path}": np.stack(
            [stored[f"{name.format(*at)}/{path}"] for at in places if at[1 - over] == number]
        )
        for number in range(counts[1 - over])
        for path in shapes
    }
    return stored, expected


@pytest.mark.parametrize("name", ["layers_{}/blocks_{}", "layers/{}/blocks/{}", "stage{}/block{}"])
@pytest.mark.parametrize("aim", ["scan/layers_{}", "stages/block{}", "layer{}"])
@pytest.mark.parametrize("count", [2, 3])
def test_where_as_many_are_in_a_list_as_in_its_layers_it_is_asked_which_ones_are_stacked(name, aim, count):
    both = [stacked_in_a_list(name, aim, (count, count), over) for over in (0, 1)]
    stored, shapes = both[0][0], {path: x.shape for path, x in both[0][1].items()}

    found, values = proposed(stored, shapes)

    assert not values
    (question,) = found.questions
    made = [restored(stored, shapes, rules) for rules in question.alternatives]
    for _, expected in both:
        assert sum(all(np.array_equal(one[path], x) for path, x in expected.items()) for one in made) == 1


@pytest.mark.parametrize(
    ("name", "aim", "counts", "over"),
    [
        ("layers_{}/blocks_{}", "scan/layers_{}", (3, 2), 0),
        ("layers_{}/blocks_{}", "scan/layers_{}", (3, 2), 1),
        ("layers_{}/blocks_{}", "layer{}", (2, 3), 1),
        ("layer_{}/expert_{}", "layers/experts/{}", (2, 2), 0),
    ],
)
def test_counts_or_a_word_of_the_inner_list_tell_which_ones_of_a_list_of_lists_are_stacked(
    name, aim, counts, over
):
    stored, expected = stacked_in_a_list(name, aim, counts, over)

    found, values = proposed(stored, {path: x.shape for path, x in expected.items()})

    assert not found.questions
    check(values, expected)


@pytest.mark.parametrize(
    "names", ["resnets_0 attentions_0 resnets_1", "Foo_0 AttnBlock_0 Foo_1", "oak_0 elm oak_1"]
)
@pytest.mark.parametrize("first", ["conv1", "norm1"])
def test_what_lies_between_two_layers_may_be_any_of_a_list_of_three(names, first):
    aims, shapes = {}, {}
    for at, name in enumerate(names.split()):
        for part in (first if at != 1 else "conv1", "conv2"):
            held = {"scale": (8,), "bias": (8,)} if part == "norm1" else SQUARE
            shapes |= {f"mid/{name}/{part}/{kind}": shape for kind, shape in held.items()}
            aims |= {f"mid/{name}/{part}/{kind}": f"middle/{at}/{part}/{kind}" for kind in held}
    stored = filled(shapes)

    _, values = proposed(stored, {aims[path]: x.shape for path, x in stored.items()})

    check(values, {aims[path]: x for path, x in stored.items() if aims[path] in values})


def test_a_layer_that_has_another_name_is_no_doubt_about_the_others_of_its_list():
    stored = filled({f"layers_{at}/{name}/kernel": (8, 8) for at in range(4) for name in "qkvo"})
    aims = {path: f"layers/{path[7:]}" if path[7] != "0" else f"first/{path[9:]}" for path in stored}

    _, values = proposed(stored, {aims[path]: x.shape for path, x in stored.items()})

    check(values, {aims[path]: x for path, x in stored.items()})


def test_a_module_that_holds_two_layers_does_not_tell_what_each_of_them_does():
    shapes = {"kernel": (8, 8), "bias": (8,)}
    blocks = {"ResnetBlock_0": "in_block", "AttnBlock_0": "attn", "ResnetBlock_1": "out_block"}
    aims = {
        f"{name}/{layer}/{kind}": f"{aim}/{into}/{kind}"
        for name, aim in blocks.items()
        for layer, into in (("Dense_0", "fc1"), ("Dense_1", "fc2"))
        for kind in shapes
    }
    stored = filled({path: shapes[path.split("/")[2]] for path in aims})

    _, values = proposed(stored, {aims[path]: x.shape for path, x in stored.items()})

    check(values, {aims[path]: x for path, x in stored.items() if aims[path] in values})


@pytest.mark.parametrize("experts", ["experts/{}", "experts_{}"])
def test_experts_in_layers_that_are_called_otherwise_are_stacked_by_one_rule(experts):
    shapes = {"gate_proj": (8, 24), "down_proj": (24, 8), "up_proj": (8, 24)}
    paths = {
        f"model/layers_{at}/mlp/{experts.format(number)}/{part}/kernel": shape
        for at, number, (part, shape) in itertools.product(range(2), range(4), shapes.items())
    }
    rest = {"mlp/gate/kernel": "moe/router/kernel", "input_layernorm/scale": "ln1/scale"}
    rest |= {f"self_attn/{x}_proj/kernel": f"attn/{x}_proj/kernel" for x in "qkvo"}
    sizes = {"mlp/gate/kernel": (8, 4), "input_layernorm/scale": (8,)}
    paths |= {f"model/layers_{at}/{path}": sizes.get(path, (8, 8)) for at in range(2) for path in rest}
    stored = filled(paths)
    expected = {
        f"layers/{at}/{aim}": stored[f"model/layers_{at}/{x}"] for at in range(2) for x, aim in rest.items()
    }
    for at, (part, into) in itertools.product(range(2), zip(shapes, ("w1", "w2", "w3"), strict=True)):
        each = [f"model/layers_{at}/mlp/{experts.format(number)}/{part}/kernel" for number in range(4)]
        expected[f"layers/{at}/moe/{into}"] = np.stack([stored[path] for path in each])

    found, values = proposed(stored, {path: x.shape for path, x in expected.items()})

    check(values, expected)
    assert sum(isinstance(rule, StackLayers) for rule in found.renames) == 1


def test_an_attention_beside_one_that_says_what_it_is_is_the_other_one():
    shapes = {f"{x}/kernel": (8, 8) for x in ("query", "key", "value", "out")}
    attentions = {
        "MultiHeadDotProductAttention_0": "self_attn",
        "MultiHeadDotProductAttention_1": "multihead_attn",
    }
    aims = {
        f"DecoderBlock_{at}/{name}/{path}": f"layers/{at}/{aim}/{path}"
        for at, (name, aim), path in itertools.product(range(2), attentions.items(), shapes)
    }
    stored = filled({path: shapes[path.split("/", 2)[2]] for path in aims})

    found, values = proposed(stored, {aims[path]: x.shape for path, x in stored.items()})

    assert not found.questions
    check(values, {aims[path]: x for path, x in stored.items()})


def test_a_layer_that_is_called_an_embedding_may_be_a_head():
    stored = filled(
        {f"{name}_head/{kind}": shape for name in ("class", "box") for kind, shape in SQUARE.items()}
    )
    aims = {path: path.replace("_head", "_embed") for path in stored}

    _, values = proposed(stored, {aims[path]: x.shape for path, x in stored.items()})

    check(values, {aims[path]: x for path, x in stored.items()})


def test_layers_that_a_program_lists_by_kind_are_in_their_order_those_of_one_list():
    kinds = {0: "self", 1: "cross", 2: "self", 3: "self", 4: "cross"}
    aims, seen = {}, {"self": 0, "cross": 0}
    for at, kind in kinds.items():
        gates = {"gate_attn": "attn_gate", "gate_ffwd": "mlp_gate"} if kind == "cross" else {}
        for path in LAYER:
            called = path.replace("attn/", f"{kind}_attn/")
            aims[f"{kind}_attn_layers_{seen[kind]}/{called}"] = f"layers/{at}/{called}"
        aims |= {f"{kind}_attn_layers_{seen[kind]}/{x}": f"layers/{at}/{y}" for x, y in gates.items()}
        seen[kind] += 1
    stored = filled(
        {
            path: (1,)
            if "gate" in path
            else LAYER[path.split("/", 1)[1].replace("self_", "").replace("cross_", "")]
            for path in aims
        }
    )

    found, values = proposed(stored, {aims[path]: x.shape for path, x in stored.items()})

    assert not found.questions
    check(values, {aims[path]: x for path, x in stored.items()})


@pytest.mark.parametrize("widths", [(8, 16, 16, 4), (8, 8, 8, 8), (16, 16, 16, 4), (4, 16, 16, 16)])
def test_a_list_between_what_leads_in_and_what_leads_out_is_the_middle_of_a_longer_list(widths):
    """SAM's networks: `layers_{0..2}` are `proj_in`, `layers/0` and `proj_out`."""
    sizes = list(itertools.pairwise(widths))
    called = {"layers_0": "proj_in", "layers_1": "layers/0", "layers_2": "proj_out"}
    shapes = {
        f"head/{old}/{kind}": size[-n:]
        for old, size in zip(called, sizes, strict=True)
        for kind, n in (("kernel", 2), ("bias", 1))
    }
    stored = filled(shapes)

    aims = {path: path.replace(path.split("/")[1], called[path.split("/")[1]]) for path in shapes}
    found, values = proposed(stored, {aims[path]: shape for path, shape in shapes.items()})

    assert found.confidence != "open"
    check(values, {aims[path]: x for path, x in stored.items()})


def test_a_list_of_which_the_other_side_has_more_is_open_where_no_name_tells_the_others():
    stored = filled({f"head/layers_{at}/{kind}": shape for at in range(3) for kind, shape in SQUARE.items()})
    called = ("layers/0", "alpha", "omega")

    found, values = proposed(
        stored, {f"head/{name}/{kind}": x for name in called for kind, x in SQUARE.items()}
    )

    assert not values
    assert found.confidence == "open"


def test_a_module_is_not_torn_where_names_say_so_of_one_of_its_layers():
    around, within = "memory_attention_layer/update_layer", "memory/update"
    expected = {
        f"{within}/concat_mlp/fc1/kernel": (f"{around}/concat_mlp/kernel", (24, 64)),
        f"{within}/concat_mlp/fc2/kernel": (f"{around}/concat_dense/kernel", (64, 16)),
    }
    lists = {"additional_concat_mlp_layers_0": "concat_layers", "pooled_mlp_layers_0": "pooled_layers"}
    for stored, wanted in lists.items():
        for name, part, shape in (("mlp", "fc1", (16, 64)), ("dense", "fc2", (64, 16))):
            expected[f"{within}/{wanted}/0/{part}/kernel"] = f"{around}/{stored}/{name}/kernel", shape
        expected[f"{within}/{wanted}/0/norm/scale"] = f"{around}/{stored}/layer_norm/scale", (16,)
    stored = filled(dict(expected.values()))

    found, values = proposed(stored, {path: shape for path, (_, shape) in expected.items()})

    check(values, {path: stored[expected[path][0]] for path in values})
    (question,) = found.questions
    assert {"/".join(map(str, path)) for path in question.wanted} == expected.keys() - values.keys()
    assert len(values) == 6


@pytest.mark.parametrize("outputs", [1, 3])
def test_a_layer_of_a_module_that_another_one_tells_is_not_one_beside_it_that_is_called_alike(outputs):
    expected = {
        f"{wanted}/{name}": (f"{held}/{name}", shape if name == "kernel" else shape[1:])
        for held, wanted, shape in (
            ("Dense_0", "hyper_b_1", (14, 8)),
            ("HyperNetwork_2/Dense_0", "V/0", (14, 8)),
            ("HyperNetwork_2/Dense_1", "V/2", (8, outputs)),
        )
        for name in ("kernel", "bias")
    }
    stored = filled(dict(expected.values()))

    _, values = proposed(stored, {path: shape for path, (_, shape) in expected.items()})

    check(values, {path: stored[name] for path, (name, _) in expected.items()})


def test_what_two_modules_would_exchange_because_of_a_word_alone_they_keep():
    pairs = {
        "initial_projection": ("linear_in", (16, 16)),
        "fold/sidechain/input_projection": ("resnet/linear_in", (16, 16)),
        "fold/sidechain/input_projection_1": ("resnet/linear_initial", (16, 16)),
        "fold/sidechain/angles": ("resnet/linear_out", (16, 14)),
    }
    expected = {
        f"{wanted}/{name}": (f"{held}/{name}", shape if name == "kernel" else shape[1:])
        for held, (wanted, shape) in pairs.items()
        for name in ("kernel", "bias")
    }
    stored = filled(dict(expected.values()))

    found, values = proposed(stored, {path: shape for path, (_, shape) in expected.items()})

    told = {path: name for path, (name, _) in expected.items() if not path.startswith("resnet/linear_in")}
    check(values, {path: stored[name] for path, name in told.items()})
    assert found.questions


@pytest.mark.parametrize(
    "names", [("up1", "low1", "low3"), ("conv1", "conv2", "skip"), ("fc1", "fc2", "gate")]
)
def test_lists_of_equal_layers_are_the_parts_of_blocks_that_have_their_names(names):
    # As many layers as parts with a number: both numbers could be either.
    paths = {
        f"hg/{name}_{at}/{leaf}": f"levels/{at}/{name}/{leaf}"
        for name in names
        for at in range(2)
        for leaf in SQUARE
    }
    paths |= {
        f"hg/{names[0][:-1]}7_1/{leaf}": f"levels/1/bottom/{leaf}" for leaf in SQUARE
    }  # In one block alone.
    stored = filled({path: SQUARE[path.rsplit("/", 1)[1]] for path in paths})

    found, values = proposed(stored, {aim: stored[path].shape for path, aim in paths.items()})

    assert not found.questions
    check(values, {aim: stored[path] for path, aim in paths.items()})


BLOCK = {
    "attn/q/kernel": (8, 8),
    "attn/k/kernel": (8, 8),
    "norm1/scale": (8,),
    "norm2/scale": (8,),
    "fc1/kernel": (8, 16),
    "fc2/kernel": (16, 8),
}
FLAT = {
    "lists of lists": {
        "attn/q": "attentions/{}/q_lin",
        "attn/k": "attentions/{}/k_lin",
        "norm1": "layer_norm1/{}",
        "norm2": "layer_norm2/{}",
        "fc1": "ffns/{}/lin1",
        "fc2": "ffns/{}/lin2",
    },
    "numbers behind words": {
        "attn/q": "attention_layers_{}/query",
        "attn/k": "attention_layers_{}/key",
        "norm1": "attention_norms_{}",
        "norm2": "ffn_norms_{}",
        "fc1": "ffn_layers_{}/up",
        "fc2": "ffn_layers_{}/down",
    },
    "parts behind numbers": {
        "attn/q": "layer{}_self_query",
        "attn/k": "layer{}_self_key",
        "norm1": "layer{}_norm_self",
        "norm2": "layer{}_norm_ffn",
        "fc1": "layer{}_ffn_in",
        "fc2": "layer{}_ffn_out",
    },
}


@pytest.mark.parametrize(("first", "count"), [(0, 2), (0, 3), (1, 3)])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("names", FLAT.values(), ids=FLAT)
def test_lists_that_hold_together_what_blocks_hold_are_these_block_by_block(names, first, turned, count):
    paths = {
        f"{names[part].format(at + first)}/{leaf}": f"layers/{at}/{part}/{leaf}"
        for part, leaf in (path.rsplit("/", 1) for path in BLOCK)
        for at in range(count)
    }
    shapes = {path: BLOCK[aim.split("/", 2)[2]] for path, aim in paths.items()}
    if turned:
        shapes, paths = {paths[path]: x for path, x in shapes.items()}, {y: x for x, y in paths.items()}
    stored = filled(shapes)

    found, values = proposed(stored, {aim: shapes[path] for path, aim in paths.items()})

    assert not found.questions
    assert len(found.renames) <= (2 if first == 0 else 2 + count) * len(BLOCK)  # One for all blocks.
    check(values, {aim: stored[path] for path, aim in paths.items()})


@pytest.mark.parametrize("count", [2, 3])
def test_lists_beside_each_other_are_the_blocks_also_where_these_hold_queries_keys_and_values_in_one(count):
    called = {"ln1s_{}": "ln_1", "ln2s_{}": "ln_2", "attns_{}/o": "attn/c_proj"}
    called |= {"fcs_{}": "mlp/c_fc", "projs_{}": "mlp/c_proj"}
    shapes = {"ln_1": (8,), "ln_2": (8,), "c_proj": (8, 8), "mlp/c_fc": (8, 32), "mlp/c_proj": (32, 8)}
    leaf = {path: "scale" if aim[:2] == "ln" else "kernel" for path, aim in called.items()}
    every = [(path, aim, at) for path, aim in called.items() for at in range(count)]
    paths = {f"{path.format(at)}/{leaf[path]}": f"h/{at}/{aim}/{leaf[path]}" for path, aim, at in every}
    sizes = {f"{path.format(at)}/{leaf[path]}": shapes.get(aim, (8, 8)) for path, aim, at in every}
    sizes |= {f"attns_{at}/{name}/kernel": (8, 8) for at in range(count) for name in "qkv"}
    stored = filled({**sizes, "lnf/scale": (8,)})
    expected = {aim: stored[path] for path, aim in paths.items()} | {"ln_f/scale": stored["lnf/scale"]}
    for at in range(count):
        parts = [stored[f"attns_{at}/{name}/kernel"] for name in "qkv"]
        expected[f"h/{at}/attn/c_attn/kernel"] = np.concatenate(parts, axis=1)

    found, values = proposed(stored, {path: x.shape for path, x in expected.items()})

    assert not found.questions
    check(values, expected)


SIDES = {
    "enc_att_{}/q/kernel": "encoder/{}/attn/wq/kernel",
    "enc_att_{}/k/kernel": "encoder/{}/attn/wk/kernel",
    "enc_ln1_{}/scale": "encoder/{}/attn_norm/scale",
    "enc_ln2_{}/scale": "encoder/{}/mlp_norm/scale",
    "enc_fc1_{}/kernel": "encoder/{}/mlp/fc1/kernel",
    "enc_fc2_{}/kernel": "encoder/{}/mlp/fc2/kernel",
    "dec_att_{}/q/kernel": "decoder/{}/self_attn/wq/kernel",
    "dec_att_{}/k/kernel": "decoder/{}/self_attn/wk/kernel",
    "dec_cross_{}/q/kernel": "decoder/{}/cross_attn/wq/kernel",
    "dec_cross_{}/k/kernel": "decoder/{}/cross_attn/wk/kernel",
    "dec_ln1_{}/scale": "decoder/{}/self_norm/scale",
    "dec_ln2_{}/scale": "decoder/{}/cross_norm/scale",
    "dec_ln3_{}/scale": "decoder/{}/mlp_norm/scale",
    "dec_fc1_{}/kernel": "decoder/{}/mlp/fc1/kernel",
    "dec_fc2_{}/kernel": "decoder/{}/mlp/fc2/kernel",
}
SHAPES = {"wq/kernel": (8, 8), "wk/kernel": (8, 8), "fc1/kernel": (8, 16), "fc2/kernel": (16, 8)}


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("turned", [False, True])
def test_lists_of_two_sides_of_a_model_are_the_layers_of_each_beside_the_norm_of_each(count, turned):
    paths = {path.format(at): aim.format(at) for path, aim in SIDES.items() for at in range(count)}
    paths |= {"enc_final/scale": "norm_enc/scale", "dec_final/scale": "norm_dec/scale"}
    shapes = {path: SHAPES.get("/".join(aim.split("/")[-2:]), (8,)) for path, aim in paths.items()}
    if turned:
        shapes, paths = {paths[path]: x for path, x in shapes.items()}, {y: x for x, y in paths.items()}
    stored = filled(shapes)

    found, values = proposed(stored, {aim: shapes[path] for path, aim in paths.items()})

    assert not found.questions
    assert len(found.renames) <= len(SIDES) + 2  # One for all layers.
    check(values, {aim: stored[path] for path, aim in paths.items()})


@pytest.mark.parametrize("name", ["stage{1}_block{0}", "norm{1}_{0}", "conv{1}/{0}"])
def test_of_two_numbers_that_may_each_be_the_block_nothing_is_crossed(name):
    # All of one shape, as many blocks as parts: the first number may be either.
    paths = {
        f"{name.format(at, part)}/scale": f"stages/{part}/{at}/scale" for part in range(2) for at in range(2)
    }
    stored = filled(dict.fromkeys(paths, (8,)))

    _, values = proposed(stored, dict.fromkeys(paths.values(), (8,)))

    crossed = {stored[path].tobytes(): aim for path, aim in paths.items()}
    assert all(crossed[value.tobytes()] == path for path, value in values.items())


SWAPPED = [
    ("branch_{b}/stage_{s}", "stages/{s}/branches/{b}"),
    ("branch_{b}/block_{s}", "blk/{s}/br/{b}"),
    ("head_{b}/level_{s}", "lvl/{s}/hd/{b}"),
    ("tower_{b}/layer_{s}", "layers/{s}/twr/{b}"),
    ("expert_{b}/Dense_{s}", "fc/{s}/experts/{b}"),
    ("Branch_{b}/Stage_{s}/Dense_0", "stages/{s}/branches/{b}/fc"),
]
UNSAID = [("stream_{b}/block_{s}", "b/{s}/s/{b}"), ("critic_{b}/Dense_{s}", "fc{s}_q{b}")]


@pytest.mark.parametrize("names", SWAPPED + UNSAID, ids=" ".join)
def test_a_word_at_another_depth_takes_its_number_along_and_a_first_letter_asks(names):
    both = [[f"{x.format(b=b, s=s)}/kernel" for x in names] for b in range(2) for s in range(2)]
    stored = filled({path: (8, 8) for path, _ in both})

    found, values = proposed(stored, dict.fromkeys((aim for _, aim in both), (8, 8)))

    assert bool(found.questions) == (names in UNSAID)
    check(values, {aim: stored[path] for path, aim in both if names in SWAPPED})


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", ["b{s}_conv{j}", "block{s}_conv{j}"])
def test_a_word_before_a_number_says_as_much_as_what_both_sides_count_from(name, count):
    # The blocks count from 0 as the skips and the stored convolutions do, and from 1 those in a block.
    numbers = [{"t": t, "s": t + 1, "j": j, "k": j + 1} for t in range(count) for j in range(count)]
    paths = {f"{name.format(**each)}/{x}": "blocks/{t}/conv{k}/{x}".format(**each, x=x)
             for each in numbers for x in SQUARE}  # fmt: skip
    paths |= {f"skip_{at}/{x}": f"blocks/{at}/skip/{x}" for at in range(count) for x in SQUARE}
    stored = filled({path: SQUARE[path.rsplit("/", 1)[1]] for path in paths})
    shapes = {aim: stored[path].shape for path, aim in paths.items()}

    found, values = proposed(stored, shapes)

    check(values, {aim: stored[path] for path, aim in paths.items() if aim in values})
    each = (
        [restored(stored, shapes, rules) for rules in found.questions[0].alternatives]
        if found.questions
        else [values]
    )
    assert any(all(np.array_equal(one[aim], stored[path]) for path, aim in paths.items()) for one in each)


def test_of_blocks_of_networks_the_spatial_one_comes_before_that_of_the_channels():
    paths = {
        f"main_blocks_{at}/{kind}_block/{part}": f"blocks/{at}/{number}/{part}"
        for at in range(3)
        for number, kind in enumerate(("spatial", "channel"))
        for part in LAYER
    }
    stored = filled({path: LAYER[path.split("/", 2)[2]] for path in paths})

    found, values = proposed(stored, {aim: stored[path].shape for path, aim in paths.items()})

    assert not found.questions
    check(values, {aim: stored[path] for path, aim in paths.items()})


@pytest.mark.parametrize(
    "paths",
    [
        {"init_h": "start/hidden", "init_c": "start/cell"},
        {"scale_a": "scale_audio", "scale_t": "scale_text"},
        {"acts_0/alpha": "amps/0/0/deep/0/alpha", "acts_0/beta": "amps/0/0/deep/0/beta"},
    ],
    ids=lambda paths: next(iter(paths)),
)
def test_first_letters_and_what_lies_in_the_same_module_tell(paths):
    stored = filled(dict.fromkeys(paths, (8,)))

    found, values = proposed(stored, dict.fromkeys(paths.values(), (8,)))

    assert not found.questions
    check(values, {aim: stored[path] for path, aim in paths.items()})


CONV, NORM = {"kernel": (3, 3, 8, 8), "bias": (8,)}, {"scale": (8,), "bias": (8,)}
UNET = {"enc": "down_blocks", "bottleneck": "mid_blocks", "dec": "up_blocks"}


def stacks_and_lists(lists, outside, count=2):
    """Returns the stored leaves of stacks, with those outside them, and the values of lists made of these."""
    parts = {"conv_a": ("conv1", CONV), "ln_a": ("norm1", NORM), "conv_b": ("conv2", CONV)}
    shapes = {
        f"{stack}/{name}/{leaf}": (count, *shape)
        for stack in lists
        for name, (_, held) in parts.items()
        for leaf, shape in held.items()
    }
    stored = filled({**shapes, **{f"{name}/{leaf}": x for name in outside for leaf, x in CONV.items()}})
    values = {
        f"{aim}/{at}/{part}/{leaf}": stored[f"{stack}/{name}/{leaf}"][at]
        for stack, aim in lists.items()
        for name, (part, held) in parts.items()
        for leaf in held
        for at in range(count)
    }
    values |= {f"{aim}/{leaf}": stored[f"{name}/{leaf}"] for name, aim in outside.items() for leaf in CONV}
    return stored, values


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("lists", [UNET, {"encoder": "downs", "middle": "mids", "decoder": "ups"}])
def test_equal_stacks_of_a_u_net_are_the_lists_of_the_arms_by_their_names(lists, turned):
    stored, values = stacks_and_lists(lists, {"shrink": "downsample", "grow": "upsample"})
    stored, values = (values, stored) if turned else (stored, values)

    found, made = proposed(stored, {path: x.shape for path, x in values.items()})

    assert not found.questions
    check(made, values)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("count", [2, 3])
def test_which_of_equal_stacks_is_which_list_is_one_question_where_no_name_tells(count, turned):
    lists = dict(itertools.islice(zip(("oak", "elm", "ash"), ("near", "far", "wide"), strict=True), count))
    stored, values = stacks_and_lists(lists, {"oak_conv": "far_conv"}, count=2)
    stored, values = (values, stored) if turned else (stored, values)
    shapes = {path: x.shape for path, x in values.items()}

    found, made = proposed(stored, shapes)

    assert made.keys() == {path for path in values if "_conv" in path}
    (question,) = found.questions
    assert len(question.choices) == [2, 6][count - 2]
    each = [restored(stored, shapes, rules) for rules in question.alternatives]
    assert sum(all(np.array_equal(one[path], x) for path, x in values.items()) for one in each) == 1


def stacked_and_listed(stacked, listed):
    """Returns the leaves of towers that are stacked or lists, and those of lists with fused projections."""
    block = {"attn/query/kernel": (8, 8), "attn/key/kernel": (8, 8), "attn/value/kernel": (8, 8)}
    block |= {"ln/scale": (8,), "fc/kernel": (8, 32)}
    paths = {name: f"{name}/blocks/" for name in stacked} | {name: f"{name}/blocks_{{}}/" for name in listed}
    stored = filled(
        {
            (path + part).format(at): (3, *shape) if name in stacked else shape
            for name, path in paths.items()
            for part, shape in block.items()
            for at in range(1 if name in stacked else 3)
        }
    )
    values = {}
    for (name, aim), at in itertools.product({**stacked, **listed}.items(), range(3)):
        held = {part: stored[(paths[name] + part).format(at)] for part in block}
        held = {part: x[at] if name in stacked else x for part, x in held.items()}
        above = f"{aim}/layers/{at}"
        values[f"{above}/qkv/kernel"] = np.concatenate([held[part] for part in [*block][:3]], axis=1)
        values |= {f"{above}/norm/scale": held["ln/scale"], f"{above}/up/kernel": held["fc/kernel"]}
    return stored, values


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("stacked", "listed"),
    [
        ({"visual": "img"}, {"transformer": "txt"}),
        ({"visual": "img"}, {"oak": "net"}),
        ({"visual": "img"}, {"core": "crown"}),
        ({"visual": "img", "audio": "audio"}, {"oak": "stack"}),
        ({"visual": "img"}, {"transformer": "txt", "audio": "sound"}),
        ({"core": "far"}, {"text": "txt"}),
    ],
)
def test_the_list_that_is_left_beside_stacks_is_the_only_one_left_on_the_other_side(stacked, listed, turned):
    stored, values = stacked_and_listed(stacked, listed)
    stored, values = (values, stored) if turned else (stored, values)

    found, made = proposed(stored, {path: x.shape for path, x in values.items()})

    check(made, values)
    assert found.confidence == "likely"
    assert not any("layers/1" in str(rule) for rule in found.renames)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("stacked", "listed"),
    [
        ({"visual": "img"}, {"oak": "crown"}),
        ({"visual": "img", "audio": "audio"}, {"oak": "far"}),
        ({"oak": "far"}, {"text": "txt"}),
    ],
)
def test_the_list_that_is_left_is_asked_about_where_it_is_called_after_something_else(
    stacked, listed, turned
):
    stored, values = stacked_and_listed(stacked, listed)
    stored, values = (values, stored) if turned else (stored, values)
    shapes = {path: x.shape for path, x in values.items()}

    found, made = proposed(stored, shapes)

    assert not any(path.startswith(("oak", "crown", "far")) for path in made)
    check(restored(stored, shapes, found.answered([0] * len(found.questions))), values)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("stacked", "listed"),
    [
        ({"oak": "near"}, {"elm": "far"}),
        ({"oak": "far"}, {"elm": "near"}),
        ({"oak": "wide"}, {"elm": "near", "ash": "far"}),
        ({"oak": "wide", "visual": "img"}, {"ash": "far"}),
    ],
)
def test_which_list_is_stacked_is_one_question_where_no_name_tells(stacked, listed, turned):
    stored, values = stacked_and_listed(stacked, listed)
    stored, values = (values, stored) if turned else (stored, values)
    shapes = {path: x.shape for path, x in values.items()}

    found, made = proposed(stored, shapes)

    check(made, {path: values[path] for path in made})
    assert all(path.startswith(("img/", "visual/")) for path in made)
    (question,) = found.questions
    each = [restored(stored, shapes, found.answered([at])) for at, _ in enumerate(question.choices)]
    assert sum(all(np.array_equal(one[path], x) for path, x in values.items()) for one in each) == 1


def test_towers_are_told_by_what_one_of_them_is_for():
    ends = {
        f"{tower}_tower/{kind}_{at}/{leaf}": f"head/{head}_head/conv/{3 * at + place}/{leaf}"
        for (tower, head), at, (kind, leaf, place) in itertools.product(
            (("box", "regression"), ("cls", "classification")),
            range(4),
            (("conv", "kernel", 0), ("norm", "scale", 1)),
        )
    }
    stored = filled({path: (8,) if path.endswith("scale") else (3, 3, 8, 8) for path in ends})

    found, values = proposed(stored, {end: stored[path].shape for path, end in ends.items()})

    assert not found.questions
    check(values, {end: stored[path] for path, end in ends.items()})


@pytest.mark.parametrize(
    ("pairs", "is_told"),
    [
        ([("alpha", "zeta"), ("beta", "eta")], False),
        ([("beta", "eta"), ("alpha", "zeta"), ("gamma", "theta")], False),
        ([("rgb_stem", "color_convs"), ("depth_stem", "z_convs")], False),
        ([("semantic_tower", "stuff_convs"), ("instance_tower", "thing_convs")], False),
        ([("class_tower", "cls_convs"), ("box_tower", "reg_convs")], True),
        ([("mask_tower", "mask_convs"), ("kernel_tower", "kernel_convs")], True),
        ([("policy_branch", "pi_convs"), ("value_branch", "critic_convs")], True),
    ],
)
@pytest.mark.parametrize(
    ("one", "other"), [("{}_{}", "{1}/{0}"), ("{}_{}", "{0}s/{1}"), ("{}{}", "layers/{1}/{0}")]
)
def test_the_lists_of_two_modules_are_no_others_because_of_an_order_of_names(pairs, is_told, one, other):
    parts = {"conv/kernel": (3, 3, 8, 8), "gn/scale": (8,), "gn/bias": (8,)}
    both = {
        f"{stored}/{one.format(*path.split('/')[:1], at)}/{path.split('/')[1]}": (
            f"{wanted}/{other.format(*path.split('/')[:1], at)}/{path.split('/')[1]}",
            shape,
        )
        for stored, wanted in pairs
        for at in range(2)
        for path, shape in parts.items()
    }
    stored = filled({path: shape for path, (_, shape) in both.items()})

    found, values = proposed(stored, dict(both.values()))

    for path, (wanted, _) in both.items():
        if wanted in values:
            np.testing.assert_array_equal(values[wanted], stored[path], err_msg=wanted)
    assert bool(values) is is_told
    asked = {path for question in found.questions for path in question.wanted}
    assert asked == {*found.unmatched_wanted}
