"""Attention in blocks: of two streams that look at each other, and beside a network in one list."""

import itertools

import numpy as np
import pytest

from tests.planning.suggesting.proposals import check, filled, proposed, restored

STREAMS = {
    "x_block": (("to_q", "to_k", "to_v"), "norm_{}", "to_out_0", "norm1"),
    "context_block": (
        ("add_q_proj", "add_k_proj", "add_v_proj"),
        "norm_added_{}",
        "to_add_out",
        "norm1_context",
    ),
}
WIDTH, LAYERS = 8, 3


def parts():
    """Yields each layer's streams: by which names both sides lead into it, and what the stream is called."""
    for layer in range(LAYERS):
        for block, names in STREAMS.items():
            is_dead = layer == LAYERS - 1 and block == "context_block"
            yield f"joint_blocks_{layer}/{block}", f"transformer_blocks_{layer}", names, is_dead


def joint():
    """Returns shapes of streams in modules of their own, their other paths, and both paths of q, k and v."""
    shapes, others, fused = {}, {}, []
    for ours, theirs, (names, norm, out, modulation), is_dead in parts():
        for letter in "qk":
            shapes[f"{ours}/attn/ln_{letter}/scale"] = (4,)
            others[f"{ours}/attn/ln_{letter}/scale"] = f"{theirs}/attn/{norm.format(letter)}/scale"
        shapes[f"{ours}/modulation/kernel"] = (WIDTH, (2 if is_dead else 6) * WIDTH)
        others[f"{ours}/modulation/kernel"] = f"{theirs}/{modulation}/linear/kernel"
        if not is_dead:
            shapes[f"{ours}/attn/proj/kernel"] = (WIDTH, WIDTH)
            others[f"{ours}/attn/proj/kernel"] = f"{theirs}/attn/{out}/kernel"
        fused.append((f"{ours}/attn/qkv/kernel", [f"{theirs}/attn/{name}/kernel" for name in names]))
    return shapes, others, fused


def of_list(path):
    return path.replace("_blocks_", "_blocks/")


def test_queries_of_a_module_for_the_context_are_those_that_are_added():
    shapes, others, fused = joint()
    for whole, single in fused:
        for letter, path in zip("qkv", single, strict=True):
            ours = whole.replace("qkv", letter)
            shapes[ours], others[ours] = (WIDTH, WIDTH), path
    stored = filled(shapes)

    found, values = proposed(stored, {of_list(others[path]): value.shape for path, value in stored.items()})

    assert not found.questions
    check(values, {of_list(others[path]): value for path, value in stored.items()})


def test_queries_keys_and_values_of_both_streams_are_taken_apart():
    shapes, others, fused = joint()
    stored = filled(shapes | {whole: (WIDTH, 3 * WIDTH) for whole, _ in fused})
    expected = {of_list(others[path]): stored[path] for path in shapes}
    for whole, single in fused:
        expected |= zip(map(of_list, single), np.split(stored[whole], 3, axis=1), strict=True)

    found, values = proposed(stored, {path: value.shape for path, value in expected.items()})

    assert not found.questions
    check(values, expected)


@pytest.mark.parametrize("called", ["attn/qkv", "qkv"])
def test_queries_keys_and_values_of_two_streams_in_one_module_become_one_array_of_each(called):
    shapes, others, fused = joint()
    stored = filled(
        {others[path]: shape for path, shape in shapes.items()}
        | {path: (WIDTH, WIDTH) for _, single in fused for path in single}
    )
    expected = {of_list(path): stored[others[path]] for path in shapes}
    for whole, single in fused:
        path = of_list(whole.replace("attn/qkv", called))
        expected[path] = np.concatenate([stored[part] for part in single], axis=1)

    found, values = proposed(stored, {path: value.shape for path, value in expected.items()})

    assert not found.questions
    check(values, expected)


@pytest.mark.parametrize("count", [1, 3])
def test_a_list_that_is_called_an_attention_and_holds_one_holds_a_network_too(count):
    stored, aims = {}, {}
    attention = {
        f"attn/{a}": f"0/attention/{b}" for a, b in zip(("query", "key", "value"), "qkv", strict=True)
    }
    network = {"mlp/wi": "1/1", "mlp/wo": "1/3"}
    for layer in range(count):
        above, into = f"cross_attend_{layer}" if count > 1 else "cross_attend", "cross_attention"
        into = f"{into}/{layer}" if count > 1 else into
        for one, other in {**attention, "attn/out": "0/attention/o_proj", **network}.items():
            shape = {"mlp/wi": (8, 32), "mlp/wo": (32, 8)}.get(one, (8, 8))
            stored |= {f"{above}/{one}/kernel": shape, f"{above}/{one}/bias": shape[1:]}
            aims |= {f"{above}/{one}/{leaf}": f"{into}/{other}/{leaf}" for leaf in ("kernel", "bias")}
        for one, other in {"norm": "0/norm", "mlp/norm": "1/0"}.items() if count > 1 else ():
            stored[f"{above}/{one}/scale"], aims[f"{above}/{one}/scale"] = (8,), f"{into}/{other}/scale"
    stored = filled(stored)

    found, values = proposed(stored, {aims[path]: value.shape for path, value in stored.items()})

    assert not found.questions
    check(values, {aims[path]: value for path, value in stored.items()})


def test_the_fused_projection_of_a_block_that_leads_out_is_not_one_that_leads_in():
    shapes = {"norm1/scale": (8,), "attn/qkv/kernel": (8, 24), "attn/proj/kernel": (8, 8)}
    names = {"norm1/scale": "ln1/scale", "attn/qkv/kernel": "attn/in_proj/kernel"}
    names["attn/proj/kernel"] = "attn/out_proj/kernel"
    stored = filled({f"out_blocks_{to}/{path}": shape for to in range(2) for path, shape in shapes.items()})
    expected = {
        f"up/{to}/{name}": stored[f"out_blocks_{to}/{at}"] for to in range(2) for at, name in names.items()
    }

    _, values = proposed(stored, {path: value.shape for path, value in expected.items()})

    check(values, expected)


@pytest.mark.parametrize("query", ["to_q", "muz"])
def test_the_norm_beside_an_attention_is_not_that_of_self_attention_where_there_are_two(query):
    """As in diffusers' spectrogram diffusion, of which the first and the last layer hold more."""
    parts = {
        "pre_self_attention_norm/scale": ("layer/0/layer_norm/scale", (8,)),
        "film_0/kernel": ("layer/0/film/kernel", (32, 16)),
        "pre_cross_attention_norm/scale": ("layer/1/layer_norm/scale", (8,)),
        "pre_mlp_norm/scale": ("layer/2/layer_norm/scale", (8,)),
        "film_1/kernel": ("layer/2/film/kernel", (32, 16)),
        "mlp/wi/kernel": ("layer/2/mlp/wi/kernel", (8, 24)),
        "mlp/wo/kernel": ("layer/2/mlp/wo/kernel", (24, 8)),
    }
    called = {"query": query, "key": "to_k", "value": "to_v", "out": "to_out"}
    for at, module in enumerate(("self_attention", "MultiHeadDotProductAttention_0")):
        for name, wanted in called.items():
            parts[f"{module}/{name}/kernel"] = f"layer/{at}/attention/{wanted}/kernel", (8, 8)
    expected = {
        f"decoders/{at}/{wanted}": (f"layers_{at}/{name}", shape)
        for at in range(2)
        for name, (wanted, shape) in parts.items()
    }
    stored = filled(dict(expected.values()))

    _, values = proposed(stored, {path: shape for path, (_, shape) in expected.items()})

    check(values, {path: stored[expected[path][0]] for path in values})
    assert {path for path in expected if "norm" in path} <= values.keys()


@pytest.mark.parametrize("cross", ["pre_cross_attention_layernorm", "cross_layernorm"])
@pytest.mark.parametrize(
    "names",
    [
        ("LayerNorm_0", "LayerNorm_1", "LayerNorm_2"),
        ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
    ],
)
def test_a_norm_behind_an_attention_is_none_of_the_cross_attention_that_is_created_after_it(names, cross):
    attentions = ("self_attn", "encoder_attn", "attn", "cross_attn")
    stored, values = {}, {}
    for at in range(2):
        for one, other in zip(attentions[:2], attentions[2:], strict=True):
            for part in ("q", "k", "v", "o"):
                stored[f"layers_{at}/{one}/{part}_proj/kernel"] = (8, 8)
                values[f"layers/{at}/{other}/{part}_proj/kernel"] = f"layers_{at}/{one}/{part}_proj/kernel"
        for one, other, shape in (("fc1", "mlp/up", (8, 32)), ("fc2", "mlp/down", (32, 8))):
            stored[f"layers_{at}/{one}/kernel"] = shape
            values[f"layers/{at}/{other}/kernel"] = f"layers_{at}/{one}/kernel"
        norms = dict(zip(("input_layernorm", cross, "post_attention_layernorm"), names, strict=True))
        for other in ("input_layernorm", "post_attention_layernorm", cross):
            stored[f"layers_{at}/{norms[other]}/scale"] = (8,)
            values[f"layers/{at}/{other}/scale"] = f"layers_{at}/{norms[other]}/scale"
    stored = filled(stored)

    found, made = proposed(stored, {path: stored[name].shape for path, name in values.items()})

    check(made, {path: stored[name] for path, name in values.items()})
    assert found.confidence == "likely"


def counted_blocks(above, attentions, names, crossing):
    """Returns blocks that Linen counted, and wanted paths with what they are: norm, attention, network.

    Args:
        above: What leads into the stored and the wanted blocks.
        attentions: The wanted attentions in the order of computation.
        names: The wanted norms, that of each attention, and the last one.
        crossing: The blocks that have the second attention.
    """
    shapes, values = {}, {}
    for at in range(3):
        left, right = f"{above[0]}_{at}", f"{above[1]}/{at}"
        held = attentions if at in crossing else attentions[:1]
        pairs = [*zip(names, held, strict=False)]
        for number, (norm, attention) in enumerate(pairs):
            values[f"{right}/{norm}/scale"] = f"{left}/LayerNorm_{number}/scale"
            for part in ("query", "key", "value", "out"):
                path = f"{left}/MultiHeadDotProductAttention_{number}/{part}/kernel"
                values[f"{right}/{attention}/{part}/kernel"] = path
                shapes[path] = (8, 2, 4) if part != "out" else (2, 4, 8)
        values[f"{right}/{names[-1]}/scale"] = f"{left}/LayerNorm_{len(pairs)}/scale"
        shapes |= {f"{left}/LayerNorm_{number}/scale": (8,) for number in range(len(pairs) + 1)}
        for number, shape in enumerate([(8, 32), (32, 8)]):
            shapes[f"{left}/Dense_{number}/kernel"] = shape
            values[f"{right}/mlp/fc{number + 1}/kernel"] = f"{left}/Dense_{number}/kernel"
    return filled(shapes), values


@pytest.mark.parametrize("attentions", [("self_attn", "cross_attn"), ("cross_attn", "self_attn")])
def test_which_attention_latents_compute_first_is_asked(attentions):
    norms = [name.replace("attn", "norm") for name in attentions]
    stored, values = counted_blocks(("LatentBlock", "layers"), attentions, [*norms, "mlp_norm"], range(3))

    found, made = proposed(stored, {path: stored[name].shape for path, name in values.items()})

    assert found.questions
    check(made, {path: stored[values[path]] for path in made})
    assert all("mlp" in path for path in made)


def test_a_decoder_looks_at_itself_before_it_looks_across():
    norms = ["self_norm", "cross_norm", "mlp_norm"]
    above = "decoder/Block", "decoder/layers"
    stored, values = counted_blocks(above, ("self_attn", "cross_attn"), norms, range(3))

    found, made = proposed(stored, {path: stored[name].shape for path, name in values.items()})

    assert not found.questions
    check(made, {path: stored[name] for path, name in values.items()})


def test_numbers_of_blocks_without_a_cross_attention_tell_nothing_of_those_that_have_one():
    attentions, norms = ("attn", "crossattention"), ["ln_1", "ln_cross_attn", "ln_2"]
    stored, values = counted_blocks(("Block", "h"), attentions, norms, {1})

    found, made = proposed(stored, {path: stored[name].shape for path, name in values.items()})

    assert found.questions
    check(made, {path: stored[values[path]] for path in made})


def norms_in_blocks(stored, wanted):
    """Returns what is proposed for two blocks with some norms, whatever else they hold."""
    shapes = {f"layers_{at}/{name}/scale": (8,) for at in range(2) for name in stored}
    others = {f"blocks/{at}/{name}/weight": (8,) for at in range(2) for name in wanted}
    for at in range(2):
        for name, shape in (("attn/qkv", (8, 24)), ("attn/proj", (8, 8)), ("mlp/fc1", (8, 16))):
            shapes[f"layers_{at}/{name}/kernel"] = others[f"blocks/{at}/{name}/kernel"] = shape
    found, _ = proposed(filled(shapes), others)
    return found


def asked_in(found):
    """Returns the wanted paths that questions are about."""
    return {"/".join(map(str, path)) for question in found.questions for path in question.wanted}


@pytest.mark.parametrize(
    ("stored", "wanted", "taken"),
    [
        (("attention_norm", "ffn_norm"), ("pre_norm", "norm", "attn/attn_sub_norm"), "attn/attn_sub_norm"),
        (("norm_attn", "norm_mlp"), ("norm1", "norm2", "attn/norm", "mlp/norm"), "attn/norm"),
        (("pre_norm", "attn/attn_sub_norm"), ("attention_norm",), "attention_norm"),
        (
            ("input_layernorm", "post_attention_layernorm"),
            (
                "input_layernorm",
                "post_attention_layernorm",
                "pre_feedforward_layernorm",
                "post_feedforward_layernorm",
            ),
            "post_attention_layernorm",
        ),
        (("norm1", "norm2", "norm3"), ("norm1", "cross_norm", "norm2"), "norm2"),
    ],
)
def test_a_norm_that_another_one_of_a_block_may_be_as_well_is_asked_about(stored, wanted, taken):
    assert asked_in(norms_in_blocks(stored, wanted)) >= {f"blocks/{at}/{taken}/weight" for at in range(2)}


def test_the_norm_of_a_layer_that_leads_out_is_not_the_last_one_beside_an_attention():
    shapes = {f"Block_0/GroupNorm_{at}/scale": (8,) for at in range(3)}
    shapes |= {f"Block_0/Conv_{at}/kernel": (3, 3, 8, 8) for at in range(2)}
    shapes["Block_0/Dense_0/kernel"] = (8, 24)
    names = ["in_norm", "out_norm", "attn/norm"]
    wanted = {f"block/{name}/scale": (8,) for name in names} | {"block/attn/qkv/kernel": (8, 24)}
    wanted |= {f"block/{name}/kernel": (3, 3, 8, 8) for name in ("in_conv", "out_conv")}

    found, _ = proposed(filled(shapes), wanted)

    assert asked_in(found) >= {f"block/{name}/scale" for name in ("out_norm", "attn/norm")}


def test_the_last_norm_of_a_block_is_asked_about_where_one_more_is_stored():
    names = ("pre_attention_norm", "cross_attn_norm", "pre_feedforward_layernorm")
    stored = filled({f"layers_{at}/LayerNorm_{k}/scale": (8,) for at in range(2) for k in range(4)})

    found, _ = proposed(stored, {f"blocks/{at}/{name}/scale": (8,) for at in range(2) for name in names})

    assert asked_in(found) == {f"blocks/{at}/{name}/scale" for at in range(2) for name in names}


@pytest.mark.parametrize("layers", [("w_1", "w_2"), ("layers/0", "layers/2"), ("fc1", "fc2")])
def test_a_network_is_not_made_of_the_halves_of_two(layers):
    shapes = {"up": (8, 24), "down": (24, 8)}
    stored = filled({f"ffn{k}/{name}/kernel": shapes[name] for k in (1, 2) for name in shapes})
    wanted = {f"mlp/{name}/kernel": shape for name, shape in zip(layers, shapes.values(), strict=True)}

    found, _ = proposed(stored, wanted)

    assert asked_in(found) == {*wanted}


def test_attn1_and_attn2_in_one_block_are_the_self_and_the_cross_attention_of_diffusers():
    dense = {"kernel": (8, 8), "bias": (8,)}
    stored = filled(
        {
            f"blocks_{at}/{name}/{kind}": (*shape[:-1], count * 8)
            for at in range(2)
            for name, count in {
                "attn/qkv": 3,
                "attn/proj": 1,
                "cross_attn/q_linear": 1,
                "cross_attn/kv_linear": 2,
                "cross_attn/proj": 1,
            }.items()
            for kind, shape in dense.items()
        }
    )
    expected = {}
    for at, kind in itertools.product(range(2), dense):
        ours, block = f"transformer_blocks/{at}", f"blocks_{at}"
        parts = np.split(stored[f"{block}/attn/qkv/{kind}"], 3, axis=-1)
        parts.append(stored[f"{block}/cross_attn/q_linear/{kind}"])
        parts += np.split(stored[f"{block}/cross_attn/kv_linear/{kind}"], 2, axis=-1)
        names = [f"attn{number}/to_{role}" for number in (1, 2) for role in "qkv"]
        expected |= {f"{ours}/{name}/{kind}": part for name, part in zip(names, parts, strict=True)}
        expected[f"{ours}/attn1/to_out/0/{kind}"] = stored[f"{block}/attn/proj/{kind}"]
        expected[f"{ours}/attn2/to_out/0/{kind}"] = stored[f"{block}/cross_attn/proj/{kind}"]

    _, values = proposed(stored, {path: value.shape for path, value in expected.items()})

    check(values, expected)


def test_sa_and_ca_in_one_block_are_the_self_and_the_cross_attention():
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
    kinds = {"self_attn": "sa", "cross_attn": "ca"}
    paths = [f"layers_{at}/{kind}/{name}/kernel" for at in range(2) for kind in kinds for name in names]
    stored = filled(dict.fromkeys(paths, (8, 8)))
    expected = {
        f"blocks/{at}/{kinds[kind]}/{ours}/kernel": stored[f"layers_{at}/{kind}/{name}/kernel"]
        for at in range(2)
        for kind in kinds
        for name, ours in names.items()
    }

    _, values = proposed(stored, {path: value.shape for path, value in expected.items()})

    check(values, expected)


@pytest.mark.parametrize("names", [("local_layer", "global_layer"), ("local", "global")])
def test_local_and_global_layers_in_each_block_of_a_stack_take_turns_as_in_gemma(names):
    shapes = {"attn/q/kernel": (8, 6), "attn/k/kernel": (8, 4), "norm/scale": (8,)}
    stored = filled(
        {f"layers/{name}/{path}": (3, *shape) for name in names for path, shape in shapes.items()}
    )
    expected = {
        f"layers/{2 * block + turn}/{path}": stored[f"layers/{name}/{path}"][block]
        for turn, name in enumerate(names)
        for block in range(3)
        for path in shapes
    }

    found, values = proposed(stored, {path: value.shape for path, value in expected.items()})

    check(values, expected)
    assert any(each.fact == "Gemma 2" for each in found.proposals)


UNNAMED = {
    "OLMo": {"att_proj": "qkv", "attn_out": "o"},
    "one attention": {"attention/linear_0": "qkv", "attention/linear_1": "o"},
    "CTranslate2": {"attention/linear_0": "q", "attention/linear_1": "kv", "attention/linear_2": "o"},
}


@pytest.mark.parametrize("kinds", [("kernel",), ("kernel", "bias")])
@pytest.mark.parametrize("names", UNNAMED.values(), ids=UNNAMED)
def test_queries_keys_and_values_in_an_array_that_no_name_tells_are_asked_about(names, kinds):
    stored, single, joined, shapes = {}, {}, {}, {}
    shape = {"kernel": (WIDTH, WIDTH), "bias": (WIDTH,)}
    for at, (name, roles), kind in itertools.product(range(2), names.items(), kinds):
        sources = [f"layers_{at}/self_attn/{role}_proj/{kind}" for role in roles if role + kind != "kbias"]
        stored |= dict.fromkeys(sources, shape[kind])
        aim = f"blocks/{at}/{name}/{kind}"
        shapes[aim] = (*shape[kind][1:], len(roles) * WIDTH)
        if len(sources) == len(roles):  # Whisper has no bias of keys.
            (joined if roles[1:] else single)[aim] = sources
    stored = filled(stored)
    right = {aim: np.concatenate([stored[x] for x in y], -1) for aim, y in (joined | single).items()}

    found, values = proposed(stored, shapes)

    check(values, {aim: right[aim] for aim in single})
    answered = restored(stored, shapes, found.answered([0] * len(found.questions)))
    check({aim: answered[aim] for aim in right}, right)


@pytest.mark.parametrize("is_apart", [False, True], ids=["of a layer", "of heads in a list"])
@pytest.mark.parametrize("heads", ["heads/{}", "mha_heads_{}", "attns/{}"])
def test_heads_of_a_list_are_the_outputs_of_queries_keys_and_values(heads, is_apart):
    whole, single = {}, {}
    for layer, letter in itertools.product(range(2), "qkv"):
        name = f"layers/{layer}/attention/{letter}_lin"
        kernel = filled({f"{name}/kernel": (WIDTH, WIDTH), f"{name}/bias": (WIDTH,)})
        whole |= {path: x + 1000 * len(whole) for path, x in kernel.items()}
        for kind, head in itertools.product(("kernel", "bias"), range(2)):
            part = f"layers/{layer}/attention/{heads.format(head)}/{letter}/{kind}"
            single[part] = np.split(whole[f"{name}/{kind}"], 2, axis=-1)[head]
    beside = {"out/kernel": (WIDTH, WIDTH), "norm/scale": (WIDTH,)}
    for layer, (part, shape) in itertools.product(range(2), beside.items()):
        path = f"layers/{layer}/attention/{part}"
        whole[path] = single[path] = 1000 * len(whole) + np.ones(shape, "f")
    stored, expected = (single, whole) if is_apart else (whole, single)

    found, values = proposed(stored, {path: x.shape for path, x in expected.items()})

    assert not found.questions
    check(values, expected)


def test_a_norm_of_a_modules_outputs_comes_behind_it_where_its_inputs_have_one_too():
    layers = {"attn": ("attention", ("q", "k", "v", "o"), (8, 8)), "ff": ("mlp", ("up",), (8, 12))}
    stored, places = {}, {}
    for at, (short, (long, names, shape)) in itertools.product(range(2), layers.items()):
        kernels = {
            f"layers_{at}/{long}/{name}/kernel": f"layers/{at}/{short}/{name}/kernel" for name in names
        }
        norms = {
            f"layers_{at}/{side}_{long}_norm/scale": f"layers/{at}/{short}/norm_{end}/scale"
            for side, end in (("pre", "in"), ("post", "out"))
        }
        stored |= dict.fromkeys(kernels, shape) | dict.fromkeys(norms, (8,))
        places |= kernels | norms

    arrays = filled(stored)
    found, values = proposed(arrays, {places[path]: shape for path, shape in stored.items()})

    assert not found.questions
    check(values, {places[path]: value for path, value in arrays.items()})


@pytest.mark.parametrize(("counted", "is_told"), [("linear_layers/{}", True), ("Dense_{}", False)])
def test_a_list_of_layers_in_an_attention_is_its_queries_keys_and_values(counted, is_told):
    places = {f"blocks_0/attention/{x}/kernel": at for at, x in enumerate(("query", "key", "value"))}
    stored = filled({**dict.fromkeys(places, (8, 8)), "blocks_0/attention/out/kernel": (8, 8)})
    ends = {path: f"blocks/0/attention/{counted.format(at)}/kernel" for path, at in places.items()}
    ends |= {"blocks_0/attention/out/kernel": "blocks/0/attention/output/kernel"}

    found, values = proposed(stored, dict.fromkeys(ends.values(), (8, 8)))

    # Linen numbers them as they are called, which may be in any order.
    assert bool(found.questions) is not is_told
    check(values, {ends[path]: x for path, x in stored.items() if is_told or "out" in path})


def test_an_array_without_a_bias_holds_the_kernels_beside_biases_of_their_own():
    stored = filled({"attn/qkv/kernel": (8, 24), "attn/q_bias": (8,), "attn/v_bias": (8,)})
    kernels = np.split(stored["attn/qkv/kernel"], 3, axis=1)
    wanted = {f"attn/{x}/kernel": y for x, y in zip(("query", "key", "value"), kernels, strict=True)}
    wanted |= {f"attn/{x}_bias": stored[f"attn/{x}_bias"] for x in "qv"}

    _, values = proposed(stored, {path: x.shape for path, x in wanted.items()})

    check(values, wanted)


def test_the_macaron_network_of_a_block_is_its_first_one():
    ends = {
        f"blocks_{at}/ffn{number}/{part}": f"blocks/{at}/feed_forward{name}/w_{to}/kernel"
        for at, (number, name), (part, to) in itertools.product(
            range(2), ((1, "_macaron"), (2, "")), (("expand/kernel", 1), ("contract/kernel", 2))
        )
    }
    for at, (number, name) in itertools.product(range(2), ((1, "_macaron"), (2, ""))):
        ends[f"blocks_{at}/ffn{number}/norm/scale"] = f"blocks/{at}/norm_ff{name}/scale"
    ends |= {f"blocks_{at}/mha/{x}/kernel": f"blocks/{at}/attn/{x}/kernel" for at in range(2) for x in "qkvo"}
    kinds = {"expand": (8, 16), "contract": (16, 8), "norm": (8,)}
    shapes = {path: kinds.get(path.split("/")[2], (8, 8)) for path in ends}
    stored = filled(shapes)

    found, values = proposed(stored, {end: shapes[path] for path, end in ends.items()})

    assert not found.questions
    check(values, {end: stored[path] for path, end in ends.items()})


@pytest.mark.parametrize("inner", [8, 16])
def test_v_beside_f_g_and_h_is_no_value(inner):
    shapes = {"f": (1, 1, 16, 2), "g": (1, 1, 16, 2), "h": (1, 1, 16, inner), "v": (1, 1, inner, 16)}
    places = dict(zip(shapes, ("query", "key", "value", "out"), strict=True))
    stored = filled({f"attn/{name}/kernel": shape for name, shape in shapes.items()})

    found, values = proposed(stored, {f"attn/{to}_conv/kernel": shapes[at] for at, to in places.items()})

    # Its shape tells the output, as long as that is no square.
    told = {places[at]: stored[f"attn/{at}/kernel"] for at in ("h", "v") if inner == 8}
    check(values, {f"attn/{to}_conv/kernel": value for to, value in told.items()})
    assert len(found.unmatched_wanted) == 4 - len(told)


@pytest.mark.parametrize(("first", "is_told"), [(0, True), (1, False)])
def test_queries_keys_and_values_of_modules_that_both_sides_count_alike_become_one_array_of_each(
    first, is_told
):
    layers = {f"h{at + first}_attn": f"h/{at}/attn/c_attn/kernel" for at in range(3)}
    stored = filled(
        {f"{layer}/{name}/kernel": (8, 8) for layer in layers for name in ("query", "key", "value")}
    )
    expected = {
        whole: np.concatenate(
            [stored[f"{layer}/{name}/kernel"] for name in ("query", "key", "value")], axis=1
        )
        for layer, whole in layers.items()
    }

    _, values = proposed(stored, {path: value.shape for path, value in expected.items()})

    # Of two counts that overlap nothing tells here which begins where.
    check(values, expected if is_told else {})


@pytest.mark.parametrize("width", [8, 16])
@pytest.mark.parametrize("names", [("wq", "wk", "wv", "wo"), ("query", "key", "value", "out")])
def test_the_array_of_pytorchs_attention_is_one_also_directly_in_a_block(width, names):
    shapes, expected = {}, {}
    for at in range(2):
        shapes |= {f"layer_{at}/{name}/kernel": (8, 8) for name in names}
        shapes |= {f"layer_{at}/ffn_1/kernel": (8, width), f"layer_{at}/ffn_2/kernel": (width, 8)}
    stored = filled(shapes)
    for at in range(2):
        each = {name: stored[f"layer_{at}/{name}/kernel"] for name in (*names, "ffn_1", "ffn_2")}
        fused = np.concatenate([each[name] for name in names[:3]], axis=1)
        layers = fused, each[names[3]], each["ffn_1"], each["ffn_2"]
        for name, value in zip(("in_proj", "out_proj", "linear1", "linear2"), layers, strict=True):
            expected[f"layers/{at}/{name}/kernel"] = value

    _, values = proposed(stored, {path: value.shape for path, value in expected.items()})

    check(values, expected)


def test_what_is_called_as_pytorchs_array_is_none_where_it_is_not_as_large_as_three_outputs():
    shapes = {f"layer_{at}/{name}/kernel": (8, 8) for at in range(2) for name in ("wq", "wk", "wv", "wo")}
    wanted = {f"layers/{at}/in_proj/kernel": (8, 32) for at in range(2)}

    _, values = proposed(
        filled(shapes), wanted | {f"layers/{at}/out_proj/kernel": (16, 8) for at in range(2)}
    )

    assert values == {}


@pytest.mark.parametrize("joined", ["{}{}", "{}_{}"])
def test_letters_of_an_attention_are_read_where_a_word_follows_them_at_once(joined):
    """Conditional DETR: `sa_qcontent_proj` is of the self-attention, `ca_kpos_proj` of the cross one."""
    parts = [*itertools.product("qk", ("content", "pos"))]
    made = {
        f"layers/{at}/{short}_{joined.format(letter, word)}_proj": f"layer_{at}/{said}_{letter}_{word}"
        for at, (short, said), (letter, word) in itertools.product(
            range(2), (("sa", "self"), ("ca", "cross")), parts
        )
    }
    stored = filled({f"{path}/kernel": (8, 8) for path in made.values()})

    found, values = proposed(stored, {f"{aim}/kernel": (8, 8) for aim in made})

    assert not found.questions
    check(values, {f"{aim}/kernel": stored[f"{path}/kernel"] for aim, path in made.items()})


def test_a_tower_for_boxes_may_be_called_bbox():
    names = {"class_tower": "cls_tower", "box_tower": "bbox_tower"}
    made = {f"{aim}/{3 * at}": f"{path}/conv_{at}" for path, aim in names.items() for at in range(3)}
    stored = filled({f"{path}/kernel": (3, 3, 8, 8) for path in made.values()})

    _, values = proposed(stored, {f"{aim}/kernel": (3, 3, 8, 8) for aim in made})

    check(values, {f"{aim}/kernel": stored[f"{path}/kernel"] for aim, path in made.items()})


@pytest.mark.parametrize(
    ("theirs", "ours", "shape"),
    [
        ("qk", "query_key", (8, 8)),
        ("query_key", "to_qk", (8, 16)),
        ("dw", "qkv_dwconv", (3, 3, 1, 24)),
        ("depthwise_conv", "qkv_dw", (3, 3, 1, 24)),
    ],
)
def test_what_holds_queries_and_keys_on_both_sides_is_no_array_to_be_cut(theirs, ours, shape):
    """Reformer shares its queries and keys; Restormer has a depthwise convolution behind its `qkv`."""
    others, made = {"norm": (8,), "to_out": (8, 8)}, {}
    for at in range(2):
        made |= {f"layers/{at}/attn/{x}": f"block_{at}/attn/{x}" for x in others}
        made[f"layers/{at}/attn/{ours}"] = f"block_{at}/attn/{theirs}"
    shapes = {x: others.get(x.split("/")[-1], shape) for x in made}
    leaf = {x: f"{x}/{'scale' if 'norm' in x else 'kernel'}" for x in (*made, *made.values())}
    stored = filled({leaf[path]: shapes[aim] for aim, path in made.items()})

    found, values = proposed(stored, {leaf[aim]: shape for aim, shape in shapes.items()})

    assert not found.questions
    check(values, {leaf[aim]: stored[leaf[path]] for aim, path in made.items()})
