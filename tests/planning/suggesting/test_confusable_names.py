"""Modules of one shape whose names could be mistaken for each other: asked about or right, never swapped."""

import itertools

import numpy as np
import pytest
from flax import nnx

from orbax_nnx_handler import plan_restore, suggest
from orbax_nnx_handler.planning.core.recipes import reads
from orbax_nnx_handler.planning.likeness.highest_sums import components
from orbax_nnx_handler.planning.options import RestoreOptions
from orbax_nnx_handler.planning.suggesting import propose
from orbax_nnx_handler.planning.target import flatten_target
from tests.planning.plans import leaves_of, params, stored_of
from tests.planning.suggesting.proposals import check, filled, proposed, restored
from tests.sampled import sampled

NORM = {"scale": (8,), "bias": (8,)}
DENSE = {"kernel": (8, 8), "bias": (8,)}

CLEAR = [
    "norm_pre=pre_norm norm_post=post_norm",
    "pre_layrnorm=ln_pre post_layernorm=ln_post",
    "forward_lstm=fwd backward_lstm=bwd",
    "self_attn=attention cross_attn=cross_attention",
    "norm_before=norm1 norm_after=norm2",
    "start=first end=last",
    "query=q key=k value=v",
    "q_proj=query k_proj=key v_proj=value out_proj=out",
    "up_proj=up down_proj=down",
    "input_proj=proj_in output_proj=proj_out",
    "encoder=enc decoder=dec",
    "gate_proj=gate up_proj=up",
    "attention_norm=attn_norm ffn_norm=mlp_norm",
    "token_norm=norm_token channel_norm=norm_channel",
    "vision_ln=image_norm text_ln=language_norm",
    "src_embed=source_proj tgt_embed=target_proj",
    "mean_head=mu var_head=variance",
    "left_tower=tower_left right_tower=tower_right",
    "ln_0=norm1 ln_1=norm2",
    "post_attention_layernorm=pre_ffw_norm input_layernorm=pre_attention_norm",
    "teacher_head=teacher_proj student_head=student_proj",
    "local_branch=local_mixer global_branch=global_mixer",
    "actor_net=actor critic_net=critic",
    "incoming_edges=edges_in outgoing_edges=edges_out",
    "starting_node=node_start ending_node=node_end",
    "attention_scaling=layer_scale_1 mlp_scaling=layer_scale_2",
]
"""Pairs `stored=wanted` that words of the field tell apart."""

DOUBTFUL = [
    "to_hidden=hidden_in from_hidden=hidden_out",
    "alpha=one beta=two",
    "shallow=near deep=far",
    "bright=light dark=heavy",
    "fc_a=one_fc fc_b=two_fc",
    "mix=blend fold=bend",
    "north=upper_half south=lower_half",
    "student=follower teacher=leader",
    "short=brief long=extended",
    "hot=warm cold=cool",
    "stem=trunk crown=canopy",
    "reader=consumer writer=producer",
    "user=customer item=product",
    "real=re_part imag=im_part",
    "odd=uneven even=paired",
    "major=main minor=secondary",
    "prev=older next=newer",
    "G_A=gen_AtoB G_B=gen_BtoA",
    "spatial=space_mix temporal=time_mix",
    "content=what position=where",
    "row=horizontal column=vertical",
    "anchor=reference positive=match",
    "encoder_to_decoder=bridge_a decoder_to_encoder=bridge_b",
    "coarse=rough fine=precise",
    "low=slow_path high=fast_path",
    "inner=core_loop outer=shell_loop",
    "generator=painter discriminator=judge",
    "reset=r update=z",
    "scale_net=s shift_net=t",
    "online=student_net target=teacher_net",
]
"""Pairs that a reader may guess and letters may mislead: an open question or right, never swapped."""

SETS = [*CLEAR, *DOUBTFUL]


def found_pairs(text: str, module: dict[str, tuple[int, ...]], order: str) -> dict[str, str]:
    """Returns what is proposed or found without rules: stored names by wanted ones."""
    pairs = [pair.split("=") for pair in text.split()]
    zeros = {name: np.zeros(shape, "float32") for name, shape in module.items()}
    target = flatten_target(nnx.State(params({wanted: module for _, wanted in pairs})))
    stored = stored_of(leaves_of({"params": {stored: zeros for stored, _ in pairs}}))
    names = [wanted for _, wanted in pairs]
    created = {"": None, "created": {(): names}, "reversed": {(): names[::-1]}}[order]
    found = propose(target, stored, RestoreOptions.of(policy="warn"), created)
    assert found.problem == ""
    rules = {}
    for rule in found.renames:
        for number in ("0", "1", "2") if "{" in rule.pattern else ("",):
            places = [text.replace("{i}", number) for text in (rule.replacement, rule.pattern)]
            if places[0].removeprefix("params/") in names:
                rules[places[0]] = places[1]
    return {wanted.removeprefix("params/"): name.removeprefix("params/") for wanted, name in rules.items()}


@pytest.mark.parametrize("order", ["", "created", "reversed"])
@pytest.mark.parametrize("module", [NORM, DENSE], ids=["norms", "layers"])
def test_confusable_names_are_never_swapped(module, order):
    wrong = []
    for text in SETS:
        truth = dict(reversed(pair.split("=")) for pair in text.split())
        found = found_pairs(text, module, order)
        wrong += [f"{text}: {found}" for wanted, stored in found.items() if truth[wanted] != stored]

    assert wrong == []


@pytest.mark.parametrize("module", [NORM, DENSE], ids=["norms", "layers"])
def test_words_of_the_field_decide_where_they_are_clear(module):
    for text in CLEAR:
        truth = dict(reversed(pair.split("=")) for pair in text.split())
        assert found_pairs(text, module, "") == truth, text


def test_the_encoders_of_queries_and_of_keys_are_the_online_network_and_its_average():
    truth = {"base_encoder": "encoder_q", "momentum_encoder": "encoder_k"}

    assert found_pairs("encoder_q=base_encoder encoder_k=momentum_encoder", DENSE, "") == truth


BLOCKS = {
    "input_layernorm=pre_attention_norm post_self_attn_layernorm=post_attention_norm "
    "post_attention_layernorm=pre_ffw_norm post_mlp_layernorm=post_ffw_norm": ("scale", 4),
    "ln_pre_attn=input_layernorm ln_post_attn=third_layernorm "
    "ln_pre_mlp=post_attention_layernorm ln_post_mlp=fourth_layernorm": ("scale", 0),
    "q=to_q k=to_k v=to_v k_img=add_k_proj v_img=add_v_proj": ("kernel", 1),
    "img_q=to_q img_k=to_k txt_q=add_q_proj txt_k=add_k_proj": ("kernel", 4),
    "text_encoder=enc_p posterior_encoder=enc_q": ("kernel", 0),
    "norm_x=ln_latents norm_media=ln_kv": ("scale", 0),
    "Conv_0=down Conv_1=up": ("kernel", 0),
    "ffn/Dense_0=mlp/w1 ffn/Dense_1=mlp/w3 ffn/Dense_2=mlp/w2": ("kernel", 0),
    "ln_1=input_layernorm pre_ffn_norm=norm2": ("scale", 0),
    "norm1=first_norm second_norm=norm_2": ("scale", 0),
    "attention/query=q attention/key=k attention/value=v output=out intermediate=ff_in projection=ff_out": (
        "kernel",
        4,
    ),
    "q=wq k=wk v=wv proj=out_proj fc=mlp_in fc_out=mlp_out": ("kernel", 4),
}
"""Parts of a block, `stored=wanted`: what each is, and how many of them names tell.

GLM-4 has two norms around either part of a block, as Gemma; one name means another norm in each, and in
CogView, too. What is added is an image in Wan, a text in Flux. The encoders are those of VITS. An `output`
beside an attention that has none is its own or the network's.
"""


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("text", BLOCKS)
def test_parts_of_a_block_that_names_do_not_tell_are_asked_about(text, turned):
    kind, told = BLOCKS[text]
    pairs = [pair.split("=")[:: -1 if turned else 1] for pair in text.split()]
    shape = {"kernel": (8, 8), "scale": (8,)}[kind]
    stored = filled({f"layer_{at}/{name}/{kind}": shape for at in range(2) for name, _ in pairs})
    truth = {
        f"blocks/{at}/{name}/{kind}": stored[f"layer_{at}/{other}/{kind}"]
        for at in range(2)
        for other, name in pairs
    }

    found, values = proposed(stored, dict.fromkeys(truth, shape))

    asked = {"/".join(map(str, path)) for question in found.questions for path in question.wanted}
    check(values, {path: x for path, x in truth.items() if path in values})
    assert truth.keys() <= asked | values.keys()
    assert len(values) >= 2 * told


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    "text",
    [
        "wq=to_q wk=to_k wv=to_v wo=to_out w1=wi w2=wo",
        "wq=q_proj wk=k_proj wv=v_proj wo=o_proj w1=wi w2=wo",
        "q_proj=wq k_proj=wk v_proj=wv out_proj=wo fc_in=w1 fc_out=w2",
        "q=wq k=wk v=wv o=out ff_in=fc1 ff_out=fc2",
    ],
)
def test_an_output_belongs_to_the_layers_that_are_spelled_like_it(text, turned):
    names = [pair.split("=") for pair in text.split()]
    truth = {pair[turned]: pair[not turned] for pair in names}
    tree = {
        f"layers_{at}": {name: {"kernel": np.zeros((8, 8), "float32")} for name in truth} for at in range(2)
    }
    target = {
        ("h", at, wanted, "kernel"): nnx.Param(np.zeros((8, 8), "float32"))
        for at in range(2)
        for wanted in truth.values()
    }

    found = suggest({"params": tree}, nnx.from_flat_state([*target.items()]))
    plan = plan_restore({"params": tree}, nnx.from_flat_state([*target.items()]), renames=found.renames)

    assert plan.fits
    assert {path[2]: next(iter(reads(item.recipe)))[2] for path, item in plan.restored.items()} == {
        wanted: stored for stored, wanted in truth.items()
    }


def blocks(above, attention, network, width):
    """Returns the shapes of two blocks with an attention and a gated network: gate, down, up."""
    sizes = [(8, width), (width, 8), (8, width)]
    layers = [*((name, (8, 8)) for name in attention.split()), *zip(network, sizes, strict=True)]
    return {f"{above}{at}/{name}/kernel": shape for at in range(2) for name, shape in layers}


GATED = [*itertools.product(["w1", "gate", "nib"], ["w2", "down_proj"], ["up", "ors"]), ("nib", "ors", "up")]


@pytest.mark.parametrize(
    ("stored", "wanted", "width"),
    sampled(["w1 w2 foo", "w1 foo w3", "foo w2 w3", "w1 w2 w3"], GATED, [8, 16]),
)
def test_two_numbered_layers_of_a_gated_network_are_not_the_two_of_a_plain_one(stored, wanted, width):
    theirs = [f"mlp/{name}" for name in stored.split()]
    ours = [f"mlp/{name}" for name in wanted]
    arrays = filled(blocks("layers_", "wq wk wv wo", theirs, width))

    found, values = proposed(arrays, blocks("blocks/", "q_proj k_proj v_proj o_proj", ours, width))

    asked = {path[-2] for question in found.questions for path in question.wanted}
    for name, other in zip(ours, theirs, strict=True):
        value = values.get(f"blocks/0/{name}/kernel")
        if value is not None:
            np.testing.assert_array_equal(value, arrays[f"layers_0/{other}/kernel"])
        else:
            assert name.removeprefix("mlp/") in asked


def test_the_norm_of_keys_is_none_that_a_block_has_behind_its_attention():
    names = [
        "attention/q_norm=attn/q_norm",
        "attention/k_norm=attn/yew",
        "attention_norm=post_attention_layernorm",
    ]
    shapes = {"attention/q_proj/kernel": (8, 8), "attention/k_proj/kernel": (8, 8)}
    aims = {path: path.replace("attention", "attn") for path in shapes}
    for stored, wanted in (pair.split("=") for pair in names):
        shapes[f"{stored}/scale"], aims[f"{stored}/scale"] = (8,), f"{wanted}/scale"
    stored = filled(shapes)

    _, values = proposed(stored, {aims[path]: x.shape for path, x in stored.items()})

    check(values, {aims[path]: x for path, x in stored.items() if aims[path] in values})


def test_the_norm_of_keys_is_none_of_what_an_attention_puts_out():
    names = {
        "attention/self/query": "attn/q_proj",
        "attention/self/key": "attn/k_proj",
        "attention/self/value": "attn/v_proj",
        "attention/output/dense": "attn/o_proj",
        "intermediate/dense": "mlp/up",
        "output/dense": "mlp/down",
        "attention/output/LayerNorm": "attn_norm",
        "output/LayerNorm": "mlp_norm",
        "attn_sub_norm": "attn/k_norm",  # Another norm; that of keys is new.
    }
    shapes = {"mlp/up": (8, 32), "mlp/down": (32, 8)}
    paths, stored = {}, {}
    for at, (one, other) in itertools.product(range(2), names.items()):
        last, shape = ("scale", (8,)) if "norm" in other else ("kernel", shapes.get(other, (8, 8)))
        paths[f"encoder/layer/{at}/{one}/{last}"] = f"layers/{at}/{other}/{last}"
        stored[f"encoder/layer/{at}/{one}/{last}"] = shape
    stored = filled(stored)

    _, values = proposed(stored, {aim: stored[path].shape for path, aim in paths.items()})

    check(values, {aim: stored[path] for path, aim in paths.items() if aim in values})
    assert not any("k_norm" in path for path in values)


def test_what_fits_as_it_is_and_what_would_be_reshaped_do_not_change_places():
    shapes = {"embedding": (4, 4, 3, 12), "pool/MlpBlock_0/Dense_1": (48, 12)}
    aims = {"embedding": "fir/proj", "pool/MlpBlock_0/Dense_1": "attn_pool/ash/fc2"}
    stored = filled(
        {f"{path}/kernel": shape for path, shape in shapes.items()}
        | {f"{path}/bias": (12,) for path in shapes}
    )
    expected = {
        f"{aims[path]}/{kind}": stored[f"{path}/{kind}"] for path in shapes for kind in ("kernel", "bias")
    }

    _, values = proposed(stored, {path: x.shape for path, x in expected.items()})

    check(values, {path: x for path, x in expected.items() if path in values})


def test_the_kernel_that_embeds_patches_makes_no_output_layer():
    stored = filled({"embedding/kernel": (4, 4, 3, 16), "embedding/bias": (16,), "pool/k/kernel": (16, 4, 4)})
    wanted = {
        "patch_embedding/kernel": (4, 4, 3, 16),
        "patch_embedding/bias": (16,),
        "head/fir/weight": (48, 16),
    }

    _, values = proposed(stored, wanted)

    assert "head/fir/weight" not in values


def test_a_table_is_made_of_no_kernel_turned():
    stored = filled({"token_embedder/embedding": (20, 8), "decoder/fern/kernel": (8, 20)})
    table, kernel = stored.values()
    expected = {"encoder/embed_tokens/embedding": table, "decoder/embed_tokens/embedding": table}
    expected["lm_head/kernel"] = kernel

    _, values = proposed(stored, {path: x.shape for path, x in expected.items()})

    check(values, {path: x for path, x in expected.items() if path in values})


@pytest.mark.parametrize(("one", "other"), [("target_critic", "critic"), ("actor", "target_actor")])
@pytest.mark.parametrize("above", ["", "agent/"])
def test_a_network_is_not_what_it_is_a_copy_of(one, other, above):
    shapes = {"fc1/kernel": (3, 8), "fc1/bias": (8,), "out/kernel": (8, 2), "out/bias": (2,)}
    world = {f"{above}world/{name}": (*shape[:-1], 5) for name, shape in shapes.items()}
    stored = filled({f"{above}{one}/{name}": shape for name, shape in shapes.items()} | world)

    found, values = proposed(stored, {f"{above}{other}/{name}": s for name, s in shapes.items()} | world)

    assert values.keys() == world.keys()
    assert found.questions


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("target_q", "critic"),
        ("target_encoder", "backbone"),
        ("old_policy", "policy"),
        ("ref_model", "model"),
        ("teacher", "net"),
        ("averaged_model", "model"),
        ("ema", "net"),
        ("momentum_encoder", "trunk"),
    ],
)
@pytest.mark.parametrize("with_head", [False, True])
def test_a_network_that_follows_another_is_asked_about_though_nothing_else_is_stored(one, other, with_head):
    layers = {"Dense_0/kernel": "layers/0/kernel", "Dense_1/kernel": "layers/1/kernel"}
    shapes = dict(zip(layers, ((3, 8), (8, 2)), strict=True))
    head = {"reward_head/kernel": (5, 1)} if with_head else {}
    stored = filled({f"{one}/{path}": x for path, x in shapes.items()} | head)

    wanted = {f"{other}/{layers[at]}": x for at, x in shapes.items()} | head
    found, values = proposed(stored, wanted)

    assert values.keys() == head.keys()
    assert {path for question in found.questions for path in question.wanted} == {*found.unmatched_wanted}
    answered = restored(stored, wanted, found.answered([0] * len(found.questions)))
    check(answered, {f"{other}/{aim}": stored[f"{one}/{at}"] for at, aim in layers.items()} | values)


def test_a_pathway_that_is_called_slow_beside_a_fast_one_follows_nothing():
    shapes = {"conv/kernel": (3, 3, 3, 8), "out/kernel": (8, 2)}
    kinds = {"slow": 1, "fast": 2}
    stored = filled(
        {f"{at}_path/{x}": (*y[:-1], kinds[at] * y[-1]) for at in kinds for x, y in shapes.items()}
    )
    aims = {f"{at}_path/{x}": f"pathways/{n}/{x}" for n, at in enumerate(kinds) for x in shapes}

    _, values = proposed(stored, {aim: stored[path].shape for path, aim in aims.items()})

    check(values, {aim: stored[path] for path, aim in aims.items()})


def test_the_copy_of_a_network_that_is_used_is_asked_about_as_one():
    layers = {"Dense_0/kernel": "fc1/kernel", "Dense_1/kernel": "out/kernel"}
    shapes = dict(zip(layers, ((3, 8), (8, 2)), strict=True))
    stored = filled({f"{net}/{at}": shapes[at] for net in ("actor", "actor_target") for at in layers})

    found, values = proposed(
        stored, {f"{net}/{aim}": shapes[at] for net in ("actor", "net") for at, aim in layers.items()}
    )

    check(values, {f"actor/{aim}": stored[f"actor/{at}"] for at, aim in layers.items()})
    (question,) = found.questions
    assert {*question.wanted} == {*found.unmatched_wanted}


def test_a_copy_is_not_taken_for_what_another_network_may_be():
    shapes = {"Dense_0/kernel": (6, 8), "LayerNorm_0/scale": (8,), "Dense_1/kernel": (8, 4)}
    stored = filled(
        {f"{above}/{path}": x for above in ("ivy", "target_critic") for path, x in shapes.items()}
    )
    aims = {
        "Dense_0/kernel": "linear/kernel",
        "LayerNorm_0/scale": "norm/scale",
        "Dense_1/kernel": "out/kernel",
    }
    expected = {f"critic/{aim}": stored[f"ivy/{path}"] for path, aim in aims.items()}

    _, values = proposed(stored, {path: x.shape for path, x in expected.items()})

    check(values, {path: x for path, x in expected.items() if path in values})


def test_pairs_that_share_a_part_by_way_of_others_are_one_group():
    pairs = {(0, 1), (0, 2), (2, 0), (3, 0), (3, 2)}

    assert components(pairs) == [pairs]


def test_v_beside_u_and_w_is_no_value():
    stored = filled({f"attention/{name}/kernel": (8, 8) for name in "UVW"})
    wanted = {f"attn/{name}_w/kernel": (8, 8) for name in ("query", "key", "value")}

    found, values = proposed(stored, wanted)

    assert values == {}
    assert len(found.questions) == 1


def test_v1_beside_w1_may_be_the_gate_or_what_it_gates():
    stored = filled({"ffn/w1/kernel": (8, 16), "ffn/v1/kernel": (8, 16), "ffn/w2/kernel": (16, 8)})
    wanted = {"mlp/gate/kernel": (8, 16), "mlp/up/kernel": (8, 16), "mlp/down/kernel": (16, 8)}

    _, values = proposed(stored, wanted)

    assert {"mlp/gate/kernel", "mlp/up/kernel"}.isdisjoint(values)


def test_a_norm_of_embeddings_is_none_at_the_end():
    stored = filled({"decoder/layernorm_embedding/scale": (8,), "decoder/fc/kernel": (8, 16)})

    _, values = proposed(stored, {"decoder/final_norm/scale": (8,), "decoder/fc/kernel": (8, 16)})

    check(values, {"decoder/fc/kernel": stored["decoder/fc/kernel"]})


def test_no_question_and_no_answer_is_empty():
    layer = {
        "mlp/0": "filter_net/fc1",
        "mlp/2": "filter_net/fc2",
        "conv/lin1": "in2f",
        "conv/lin2": "f2out/0",
        "lin": "f2out/1",
    }  # SchNet's
    names = {f"interactions_{i}/{one}": f"blocks/{i}/{two}" for i in range(2) for one, two in layer.items()}
    names |= {"lin1": "outnet/0", "lin2": "outnet/1"}

    plain = ("conv/lin1", "in2f")  # They have no bias.
    stored, wanted = (
        {f"{name}/kernel": (8, 8) for name in side}
        | {f"{name}/bias": (8,) for name in side if not name.endswith(plain)}
        for side in (names, names.values())
    )

    found, _ = proposed(filled(stored), wanted)

    assert found.questions
    for question in found.questions:
        assert all(question.parts)
        assert all(question.choices)
        assert question.choices


def test_order_does_not_tell_which_of_two_layers_is_the_gate():
    def network(one, two, back):
        return {f"mlp/{one}/kernel": (8, 24), f"mlp/{two}/kernel": (8, 24), f"mlp/{back}/kernel": (24, 8)}

    # Qwen's first program activates `w2`, T5 `wi_0`.
    found, _ = proposed(filled(network("w1", "w2", "c_proj")), network("wi_0", "wi_1", "wo"))

    (question,) = found.questions
    assert len(question.alternatives) == 2


OPPOSITES = [
    "hh=ih",
    "theta=phi",
    "policy/mean=value/mean",
    "reward=value",
    "value=advantage",
    "energy=duration",
    "hn=iz",
    "io=ig",
    "question_encoder/pooler=ctx_encoder/pooler",
    "generator/out=critic/out",
    "prior_out=posterior_out",
    "v_ext=v_int",
]


@pytest.mark.parametrize("text", OPPOSITES)
def test_the_only_two_parts_left_of_a_shape_are_no_pair_where_their_names_are_opposites(text):
    for pair in (text, "=".join(reversed(text.split("=")))):
        stored, wanted = pair.split("=")
        tree = {"fc1/kernel": (4, 8)} | {f"{{}}/{name}": shape for name, shape in DENSE.items()}
        sides = [{path.format(part): shape for path, shape in tree.items()} for part in (stored, wanted)]
        _, values = proposed(filled(sides[0]), sides[1])

        assert values.keys() == {"fc1/kernel"}, pair


@pytest.mark.parametrize("numbered", ["LayerNorm_{}", "norm{}"])
@pytest.mark.parametrize(("first", "last"), [("tokens", "channels"), ("time", "feature")])
def test_a_mixer_mixes_tokens_before_channels(numbered, first, last):
    names = [numbered.format(at + (numbered[0] == "n")) for at in range(2)]
    stored = filled({f"Block_{at}/{name}/scale": (8,) for at in range(2) for name in names})
    expected = {
        f"blocks/{at}/{word}_norm/scale": stored[f"Block_{at}/{name}/scale"]
        for at in range(2)
        for word, name in zip((last, first), reversed(names), strict=True)
    }

    _, values = proposed(stored, {path: value.shape for path, value in expected.items()})

    check(values, expected)


def test_which_layer_is_for_tokens_is_asked_outside_of_a_mixer():
    stored = filled({f"Dense_{at}/kernel": (8, 8) for at in range(2)})

    found, values = proposed(stored, {f"{word}_proj/kernel": (8, 8) for word in ("token", "channel")})

    assert values == {}
    assert len(found.questions) == 1


def test_a_transposed_convolution_is_what_is_called_one():
    names = {"ConvTranspose_0": "deconv1", "ConvTranspose_1": "deconv2", "Conv_0": "out"}
    stored = filled({f"decoder/{name}/kernel": (3, 3, 8, 8) for name in names})
    expected = {f"dec/{ours}/kernel": stored[f"decoder/{name}/kernel"] for name, ours in names.items()}

    _, values = proposed(stored, {path: value.shape for path, value in expected.items()})

    check(values, expected)


def test_the_convolution_that_expands_is_conv_pw_in_timm():
    shapes = {"expand_conv": (1, 1, 8, 32), "depthwise_conv": (3, 3, 1, 32), "project_conv": (1, 1, 32, 8)}
    called = {"expand_conv": "conv_pw", "depthwise_conv": "conv_dw", "project_conv": "conv_pwl"}
    stored = filled(
        {f"MBConv_{at}/{name}/kernel": shape for at in range(2) for name, shape in shapes.items()}
    )
    expected = {
        f"blocks/{at}/{ours}/kernel": stored[f"MBConv_{at}/{name}/kernel"]
        for at in range(2)
        for name, ours in called.items()
    }

    _, values = proposed(stored, {path: value.shape for path, value in expected.items()})

    check(values, expected)


def test_biases_of_content_and_of_positions_are_those_of_transformer_xl():
    stored = filled(
        {f"attention_{at}/{name}": (1, 4, 1, 8) for at in range(2) for name in ("r_w_bias", "r_r_bias")}
    )
    expected = {
        f"layers/{at}/rel_{word}_bias": stored[f"attention_{at}/{name}"]
        for at in range(2)
        for word, name in (("pos", "r_r_bias"), ("content", "r_w_bias"))
    }

    _, values = proposed(stored, {path: value.shape for path, value in expected.items()})

    check(values, expected)


def test_an_encoder_of_goals_holds_no_gate():
    widths = (6, 8, 8, 8)
    stored = filled({f"g_encoder/Dense_{at}/kernel": (width, 8) for at, width in enumerate(widths)})
    expected = {f"goal/trunk/{at}/kernel": stored[f"g_encoder/Dense_{at}/kernel"] for at in range(4)}

    _, values = proposed(stored, {path: value.shape for path, value in expected.items()})

    check(values, expected)


PURPOSES = ["lm_head=value_head", "mlm_head=classifier", "pooler=projection", "qa_outputs=reward_head"]


@pytest.mark.parametrize("text", PURPOSES)
def test_a_head_for_one_purpose_is_at_most_asked_about_for_another_one(text):
    for pair in (text, "=".join(reversed(text.split("=")))):
        stored, wanted = pair.split("=")
        trees = [
            {"body/kernel": (4, 8), f"{name}/kernel": (8, 9), f"{name}/bias": (9,)}
            for name in (stored, wanted)
        ]

        _, values = proposed(filled(trees[0]), trees[1])

        assert values.keys() == {"body/kernel"}, pair


def test_what_is_left_of_a_dropped_module_is_at_most_asked_about_in_another_one():
    encoder = {f"encoder/Dense_{at}/kernel": shape for at, shape in enumerate([(6, 8), (8, 5)])}
    dropped = {f"decoder/Dense_{at}/kernel": shape for at, shape in enumerate([(5, 8), (8, 7), (7, 6)])}
    body = {f"encoder/fc{at}/kernel": encoder[f"encoder/Dense_{at}/kernel"] for at in range(2)}
    new = {"top/fc1/kernel": (5, 8), "top/fc2/kernel": (8, 3)}

    found, values = proposed(filled(encoder | dropped), body | new)

    assert values.keys() == body.keys()
    assert len(found.questions) == 1


def test_a_norm_of_a_dropped_module_is_at_most_asked_about_in_a_module_that_is_made_of_another_one():
    norm = {"scale": (8,), "bias": (8,)}
    shapes = {f"encoder/Dense_{at}/kernel": shape for at, shape in enumerate([(6, 8), (8, 8)])}
    dropped = {"projector/Dense_0/kernel": (8, 9), "projector/Dense_1/kernel": (9, 7)}
    dropped |= {f"projector/LayerNorm_0/{kind}": shape for kind, shape in norm.items()}
    body = {f"backbone/layers/{at}/kernel": shape for at, shape in enumerate(shapes.values())}
    new = {f"backbone/final_norm/{kind}": shape for kind, shape in norm.items()}

    _, values = proposed(filled(shapes | dropped), body | new)

    assert values.keys() == body.keys()


def test_a_head_with_a_bias_that_nothing_stored_is_may_be_a_new_one():
    stored = filled({"embed/embedding": (9, 8), "body/kernel": (8, 7)})
    wanted = {"tok_embed/embedding": (9, 8), "body/kernel": (8, 7), "lm_head/kernel": (8, 9)}

    _, tied = proposed(stored, wanted)
    found, values = proposed(stored, wanted | {"lm_head/bias": (9,)})

    assert tied.keys() == wanted.keys()
    assert values.keys() == wanted.keys() - {"lm_head/kernel"}
    assert len(found.questions) == 1


@pytest.mark.parametrize("other", ["filter_norm", "conv_norm", "norm"])
def test_of_two_norms_the_one_of_the_network_comes_last(other):
    stored = filled({f"blocks_{at}/norm{number}/scale": (8,) for at in range(2) for number in (1, 2)})
    expected = {
        f"layers/{at}/{name}/scale": stored[f"blocks_{at}/norm{number}/scale"]
        for at in range(2)
        for number, name in ((2, "mlp_norm"), (1, other))
    }

    _, values = proposed(stored, {path: value.shape for path, value in expected.items()})

    check(values, expected)


def test_layers_that_two_programs_count_from_far_apart_are_told_by_their_rank():
    stored = filled({"box_head/fc0/kernel": (40, 8), "box_head/fc1/kernel": (8, 8)})
    expected = {f"heads/box_head/fc{at + 6}/kernel": stored[f"box_head/fc{at}/kernel"] for at in range(2)}

    _, values = proposed(stored, {path: value.shape for path, value in expected.items()})

    check(values, expected)


@pytest.mark.parametrize("number", [1, 2])
def test_a_network_of_one_number_is_none_of_another_one(number):
    stored = filled({f"critic/Q1/Dense_{at}/kernel": shape for at, shape in enumerate([(6, 8), (8, 1)])})
    wanted = {f"critic/q{number}/fc{at + 1}/kernel": shape for at, shape in enumerate([(6, 8), (8, 1)])}

    _, values = proposed(stored, wanted)

    assert values.keys() == (wanted.keys() if number == 1 else set())


def test_a_part_that_alone_goes_from_one_module_into_anothers_is_at_most_asked_about():
    shapes = {"Dense_0": (6, 8), "Dense_1": (8, 5)}
    stored = {f"representation/{name}/kernel": shape for name, shape in shapes.items()}
    stored |= {f"dynamics/{name}/kernel": (shape[0] + 1, shape[1] + 2) for name, shape in shapes.items()}
    body = {
        f"{net}_net/fc{at}/kernel": stored[f"{module}/Dense_{at}/kernel"]
        for net, module in (("repr", "representation"), ("dyn", "dynamics"))
        for at in range(2)
    }
    norm = {"stem/{}/scale": (9,), "stem/{}/bias": (9,)}
    stored |= {f"representation/{path.format('LayerNorm_0')}": shape for path, shape in norm.items()}
    new = {f"dyn_net/{path.format('ln')}": shape for path, shape in norm.items()}

    found, values = proposed(filled(stored), body | new)

    assert values.keys() == body.keys()
    assert len(found.questions) == 1


@pytest.mark.parametrize(
    "names", ["up conv", "upconv conv", "conv_up conv_same", "upsample conv", "deconv conv"]
)
@pytest.mark.parametrize("first", ["ConvTranspose_0", "Conv_0"])
def test_a_transposed_convolution_is_what_samples_up_beside_a_convolution_of_its_shape(names, first):
    up, same = names.split()
    calls = {"ConvTranspose_0": up, "Conv_0": same}
    order = sorted(calls, key=lambda name: name != first)
    paths = {f"Up_{at}/{name}/kernel": f"ups/{at}/{calls[name]}/kernel" for at in range(2) for name in order}
    stored = filled({path: (7, 64 << int(path[3]), 32 << int(path[3])) for path in paths})

    found, values = proposed(stored, {aim: stored[path].shape for path, aim in paths.items()})

    assert not found.questions
    check(values, {aim: stored[path] for path, aim in paths.items()})


@pytest.mark.parametrize("block", ["", "blocks/0/"])
def test_a_gamma_beside_a_beta_is_of_a_norm_and_scales_a_layer_alone(block):
    expected = {
        f"{block}{wanted}{at}": f"{block}{stored.format(at)}"
        for at in (1, 2)
        for wanted, stored in (("gamma", "norm{}/scale"), ("beta", "norm{}/bias"), ("ls", "gamma{}"))
    }
    stored = filled(dict.fromkeys(expected.values(), (8,)))

    found, values = proposed(stored, dict.fromkeys(expected, (8,)))

    assert not found.questions
    check(values, {path: stored[source] for path, source in expected.items()})


@pytest.mark.parametrize("output", ["generator", "decoder/output_projection", "decoder/projection"])
@pytest.mark.parametrize("leaf", ["weight", "kernel"])
def test_the_only_table_is_that_of_encoder_decoder_and_the_output_by_any_of_its_names(output, leaf):
    tables = {f"{side}/embed_tokens/embedding": (9, 8) for side in ("encoder", "decoder")}
    body = {"encoder/layer/kernel": (8, 7), "decoder/layer/kernel": (7, 8)}
    head = {f"{output}/{leaf}": (9, 8) if leaf == "weight" else (8, 9)}
    stored = filled({"shared_embedding/embedding": (9, 8), **body})

    found, values = proposed(stored, {**body, **tables, **head})

    table = stored["shared_embedding/embedding"]
    assert not found.questions
    made = {path: table.T if path.endswith("kernel") else table for path in (*tables, *head)}
    check(values, {**{path: stored[path] for path in body}, **made})


def test_the_table_of_an_encoder_is_none_of_a_decoder():
    stored = filled({"encoder/embedding": (9, 8)})
    wanted = {f"{side}/embed_tokens/embedding": (9, 8) for side in ("encoder", "decoder")}

    _, values = proposed(stored, wanted)

    assert "decoder/embed_tokens/embedding" not in values


OTHER_VALUES = [
    "log_std=std",
    "std=log_std",
    "logstd=sigma",
    "A_log=A",
    "inv_std=std",
    "temperature=inverse_temperature",
    "keep_prob=drop_prob",
    "raw_sigma=sigma",
    "omega=omega_squared",
    "sqrt_alpha=alpha",
    "neg_slope=slope",
]
"""Names of which only one side says that a logarithm, an inverse, ... of a value is held."""

SAME_VALUES = [
    "log_std=logstd",
    "log_stds=log_sigma",
    "logvar=log_var",
    "inv_freq=inverse_freq",
    "logit=logits",
]


def of_one_value(text, shape=(4,)):
    stored, wanted = text.split("=")
    shared = {"trunk/fc1/kernel": (8, 16), "mean/kernel": (16, 4)}
    return proposed(filled({**shared, stored: shape}), {**shared, wanted: shape})[0]


@pytest.mark.parametrize("text", [*OTHER_VALUES, "blocks/0/A_log=blocks/0/A"])
def test_a_function_of_a_value_is_not_the_value(text):
    found = of_one_value(text)
    assert found.confidence == "open"
    assert not found.renames
    assert all("the value may be another function" in str(question) for question in found.questions)


@pytest.mark.parametrize("text", SAME_VALUES)
def test_a_function_of_a_value_has_several_spellings(text):
    assert not of_one_value(text).unmatched_wanted


def test_a_layer_whose_output_is_called_a_logarithm_on_one_side_is_at_most_asked_about():
    assert of_one_value("log_alpha/kernel=alpha/kernel", (16, 4)).unmatched_wanted
    assert not of_one_value("conv_exp/kernel=conv/kernel", (1, 1, 16, 4)).unmatched_wanted


def test_a_function_of_a_value_is_not_the_value_in_a_stack_of_layers():
    stored = {**{f"layers_{at}/log_decay": (4,) for at in (0, 1)}, "out/kernel": (4, 6)}
    wanted = {"layers/decay": (2, 4), "out/kernel": (4, 6)}
    found, _ = proposed(filled(stored), wanted)
    assert found.unmatched_wanted == (("layers", "decay"),)


@pytest.mark.parametrize("known", ["he", "ab"])
def test_words_stand_for_each_other_in_all_parts_that_do_so_in_some(known):
    places, shapes = {}, {"ffn": (8, 24), "out": (8, 8)}
    for kind, letter, other, rows in (("node", "h", known[0], 11), ("edge", "e", known[1], 5)):
        places[f"{kind}_embed/embedding"], shapes[f"{kind}_embed"] = f"embedding_{other}/weight", (rows, 8)
        for part, called in (("norm1", "layer_norm1"), ("norm2", "layer_norm2")):
            places[f"layers_0/{part}_{kind}/scale"] = f"layers/0/{called}_{letter}/weight"
        for part, called in (("out", "O"), ("ffn", "FFN")):
            places[f"layers_0/{part}_{kind}/kernel"] = f"layers/0/{called}_{letter}/kernel"
            shapes[f"layers_0/{part}_{kind}"] = shapes[part]
    stored = filled({path: shapes.get(path.rsplit("/", 1)[0], (8,)) for path in places})

    found, values = proposed(stored, {path: stored[at].shape for at, path in places.items()})

    is_told = known == "he"
    check(values, {path: stored[at] for at, path in places.items() if is_told or "embed" in at})
    assert bool(found.questions) is not is_told


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (("G_AB", "G_BA"), ("gen_a2b", "gen_b2a")),
        (("G_A2B", "G_B2A"), ("netG_AB", "netG_BA")),
        (("cell/i2h", "cell/h2h"), ("cell/ih", "cell/hh")),
    ],
)
def test_what_leads_from_a_letter_to_another_is_said_with_a_2_or_without(theirs, ours):
    stored = filled({f"{name}/kernel": (8, 8) for name in theirs})
    aims = dict(zip(theirs, ours, strict=True))

    _, values = proposed(stored, {f"{aim}/kernel": (8, 8) for aim in aims.values()})

    check(values, {f"{aim}/kernel": stored[f"{name}/kernel"] for name, aim in aims.items()})


def test_the_norms_of_marians_decoder_are_told_by_what_they_follow():
    names, expected, shapes = {"self_attn": "self", "encoder_attn": "context"}, dict[str, str](), {}
    for side, at in itertools.product(("encoder", "decoder"), range(2)):
        theirs, ours = f"{side}/layers/{at}", f"{side}_l{at + 1}"
        for attn, name in [*names.items()][: 1 + (side == "decoder")]:
            for letter, x in zip("qkvo", ("q", "k", "v", "out"), strict=True):
                expected[f"{ours}_{name}_W{letter}"] = f"{theirs}/{attn}/{x}_proj/kernel"
                expected[f"{ours}_{name}_b{letter}"] = f"{theirs}/{attn}/{x}_proj/bias"
            for kind in ("scale", "bias"):
                expected[f"{ours}_{name}_Wo_ln_{kind}"] = f"{theirs}/{attn}_layer_norm/{kind}"
        for number in (1, 2):
            expected[f"{ours}_ffn_W{number}"] = f"{theirs}/fc{number}/kernel"
            expected[f"{ours}_ffn_b{number}"] = f"{theirs}/fc{number}/bias"
        for kind in ("scale", "bias"):
            expected[f"{ours}_ffn_ffn_ln_{kind}"] = f"{theirs}/final_layer_norm/{kind}"
    for path in expected.values():
        wide = ((8, 16), (16,)) if "fc1" in path else ((16, 8), (8,)) if "fc2" in path else ((8, 8), (8,))
        shapes[path] = wide[not path.endswith("kernel")]
    stored = filled(shapes)

    _, values = proposed(stored, {path: shapes[source] for path, source in expected.items()})

    assert any("context_Wo_ln" in path for path in values)
    check(values, {path: stored[expected[path]] for path in values})


@pytest.mark.parametrize(
    ("known", "left", "new"),
    [
        ({"action_heads_bridge": "heads/bridge"}, "action_heads_kuka", "heads/aloha"),
        (
            {"classifier_rte": "classifiers/rte", "classifier_wic": "classifiers/wic"},
            "classifier_anli",
            "classifiers/cb",
        ),
    ],
)
def test_a_head_is_no_other_one_where_all_beside_it_have_one_name_behind_a_prefix(known, left, new):
    stored = filled({f"{name}/{kind}": shape for name in (*known, left) for kind, shape in DENSE.items()})
    wanted = {f"{name}/{kind}": shape for name in (*known.values(), new) for kind, shape in DENSE.items()}

    _, values = proposed(stored, wanted)

    check(values, {f"{aim}/{x}": stored[f"{name}/{x}"] for name, aim in known.items() for x in DENSE})


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (("residual", "skip"), ("res", "skip_conn")),
        (("h_res", "h_skip"), ("conv_res", "conv_skip")),
        (("residual_out", "skip_out"), ("resid", "skip")),
        (("residual/conv", "sub_0/conv", "sub_1/conv"), ("res/0", "mconv/0", "mconv/5")),
    ],
)
def test_a_residual_may_be_called_res_and_is_not_what_skips(theirs, ours):
    made = {
        f"blocks/{at}/{aim}/kernel": f"blocks_{at}/{path}/kernel"
        for at in range(2)
        for path, aim in zip(theirs, ours, strict=True)
    }
    stored = filled(dict.fromkeys(made.values(), (1, 8, 8)))

    _, values = proposed(stored, dict.fromkeys(made, (1, 8, 8)))

    check(values, {aim: stored[path] for aim, path in made.items()})


def test_w1_and_w3_are_a_gate_and_what_it_gates_though_w2_is_not_stored():
    names = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    shapes = {f"h/{at}/mlp/{name}/kernel": (8, 8) for at in range(2) for name in names}
    made = {
        f"layers/{at}/mlp/{aim}/kernel": f"h/{at}/mlp/{x}/kernel"
        for at in range(2)
        for x, aim in names.items()
    }
    stored = filled({path: shape for path, shape in shapes.items() if "/w2/" not in path})

    _, values = proposed(stored, dict.fromkeys(made, (8, 8)))

    check(values, {aim: stored[path] for aim, path in made.items() if path in stored})


@pytest.mark.parametrize(("names", "is_told"), [(("wg", "wu", "wd"), True), (("wi", "wu", "wo"), False)])
def test_wu_leads_up_and_what_wi_is_beside_it_is_asked(names, is_told):
    """`wi` is all that leads in, or in some programs the layer that is activated."""
    shapes = {"w1": (8, 12), "w3": (8, 12), "w2": (12, 8)}
    made = {
        f"blocks/{at}/mlp/{aim}/kernel": f"layers_{at}/mlp/{path}/kernel"
        for at in range(2)
        for path, aim in zip(shapes, names, strict=True)
    }
    stored = filled({path: shapes[path.split("/")[2]] for path in made.values()})

    found, values = proposed(stored, {aim: stored[path].shape for aim, path in made.items()})

    check(values, {aim: stored[path] for aim, path in made.items() if aim in values})
    assert bool(found.questions) != is_told
    assert len(values) == (6 if is_told else 2)
