"""What a checkpoint lacks is not made of something else that is stored: it stays open, or is asked about."""

import pytest
from flax import traverse_util

from orbax_nnx_handler import suggest
from tests.planning.suggesting.absent import taken_instead
from tests.planning.suggesting.pairs import UNSEEN, nested, target_of, wrong_under
from tests.planning.suggesting.proposals import check, filled, proposed
from tests.sampled import every


@pytest.mark.parametrize("name", every(12, [*UNSEEN]))
def test_no_other_leaf_takes_the_place_of_those_that_are_gone(name):
    part, wrong = taken_instead(name, 0)

    assert wrong == {}, part


@pytest.mark.parametrize(
    ("name", "part"),
    [
        # Linen numbered both attentions of a block: the one that lacks a layer was the other one.
        ("wmt_mha", "decoder/layers/#/self_attn/value"),
        # What Linen numbered before one of its class was lost.
        ("resmlp_short_first", "blocks/#/proj"),
        ("detr_facebook", "transformer/encoder/layers/#/self_attn/v_proj"),
        ("layers_from_one", "layers/#/attn/out"),
        # Blocks of one shape, of which the convolutions told which is which.
        ("unet_scenic", "up#/conv/conv#"),
        ("efficientnet_torchvision", "features/#/#/block/#/fc#"),
        # Of a list that another module is called after, though it is asked about.
        ("ddpm_ho", "mid"),
        # Of the longer one of two lists, where the other one is left altogether.
        ("mllama", "layers/#/post_attention_layernorm"),
        # Networks that were exchanged, though other parts tell which they are.
        ("whisper_mha", "text/blocks/mlp"),
    ],
)
def test_where_a_part_of_every_layer_is_gone_the_others_are_still_told_apart(name, part):
    assert taken_instead(name, part=part) == (part, {})


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("clip_text_truncated", "layers/1/mlp"),
        ("hiql", "target_value/members/0/layers/1"),
        ("vqgan", "encoder/down_blocks/0/resnets/1"),
    ],
)
def test_where_a_part_of_one_layer_is_gone_no_other_layer_takes_its_place(name, part):
    assert taken_instead(name, part=part) == (part, {})


@pytest.mark.parametrize(
    ("name", "gone"),
    [
        ("painn", "layers/2/update/context_mlp"),
        ("painn", "layers/0/update/context_mlp"),
        # What is left of a network is not one that follows another.
        ("dreamerv3", "task_behavior/value/layers"),
        ("ijepa", "target_encoder/blocks/0/mlp"),
    ],
)
def test_what_is_stored_of_a_part_that_the_target_lacks_does_not_go_elsewhere(name, gone):
    wanted = {path: x for path, x in UNSEEN[name]["wanted"].items() if not path.startswith(f"{gone}/")}
    tree = nested(UNSEEN[name]["stored"])

    found = suggest(tree, target_of(wanted))

    opened = {"/".join(map(str, path)) for path in found.unmatched_wanted}
    assert wrong_under(found.renames, tree, {"wanted": wanted}) <= opened


def test_layers_are_not_those_of_two_lists_of_which_layers_are_left():
    pair = UNSEEN["t5_encoder_only"]
    # The decoder's first block lacks an attention, so that it is as large as one of the encoder.
    stored = traverse_util.flatten_dict(nested(pair["stored"]), sep="/")
    stored = {path: x for path, x in stored.items() if not path.startswith("params/decoder/block/0/layer/0/")}
    tree = traverse_util.unflatten_dict(stored, sep="/")

    found = suggest(tree, target_of(pair["wanted"]))

    opened = {"/".join(map(str, path)) for path in found.unmatched_wanted}
    assert wrong_under(found.renames, tree, pair) <= opened


def test_a_head_is_not_made_of_another_one_that_the_target_has_too():
    stored = filled(
        {f"mask_head/conv_{at}/kernel": shape for at, shape in ((1, (3, 3, 4, 6)), (2, (1, 1, 6, 9)))}
    )

    _, values = proposed(
        stored,
        {
            "flow_head/conv1/kernel": (3, 3, 4, 6),
            "flow_head/conv2/kernel": (3, 3, 6, 2),
            "mask/0/kernel": (3, 3, 4, 6),
            "mask/2/kernel": (1, 1, 6, 9),
        },
    )

    assert not any(path.startswith("flow") for path in values)


@pytest.mark.parametrize("lacking", [(), ("out",), ("key", "out")])
def test_lists_of_as_many_layers_are_each_other_from_their_first_one_on(lacking):
    layer = {f"{name}/kernel": (4, 8 + at) for at, name in enumerate(("query", "key", "out"))}
    stored = filled(
        {
            f"layers_{at + 1}/{path}": shape
            for at in range(3)
            for path, shape in layer.items()
            if path.partition("/")[0] not in lacking
        }
    )

    _, values = proposed(
        stored, {f"layers/{at}/{path}": shape for at in range(3) for path, shape in layer.items()}
    )

    check(values, {f"layers/{int(path[7]) - 1}{path[8:]}": value for path, value in stored.items()})


def test_of_a_gated_network_numbers_do_not_tell_the_gate_where_one_of_its_layers_is_gone():
    stored = filled({"mlp/w1/kernel": (4, 8), "mlp/w2/kernel": (8, 4)})

    _, values = proposed(
        stored, {"mlp/gate/kernel": (4, 8), "mlp/up/kernel": (4, 8), "mlp/down/kernel": (8, 4)}
    )

    check(values, {"mlp/down/kernel": stored["mlp/w2/kernel"]})


def test_a_network_is_not_made_of_its_target_network_where_it_is_gone():
    names = ("actor", "actor_target", "qf_target")
    stored = filled({f"{name}/Dense_0/kernel": (4, 5 + ("qf" in name)) for name in names})

    found, values = proposed(stored, {"actor/fc/kernel": (4, 5), "qf/fc/kernel": (4, 6)})

    assert [str(question).partition("?")[0] for question in found.questions] == [
        "is qf_target/Dense_0 meant by qf/fc"
    ]
    check(values, {"actor/fc/kernel": stored["actor/Dense_0/kernel"]})


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [("modules_value", "target_value"), ("qf", "critic_target"), ("net_actor_target", "actor")],
)
def test_a_network_is_not_made_of_its_copy_where_a_prefix_or_another_word_for_it_is_said(stored, wanted):
    tree = filled({f"{stored}/Dense_0/kernel": (4, 5), f"{stored}/Dense_1/kernel": (5, 6)})

    _, values = proposed(tree, {f"{wanted}/layers/0/kernel": (4, 5), f"{wanted}/layers/1/kernel": (5, 6)})

    check(values, {})


LEFTOVERS = {
    "scale": """
        input_layernorm:pre_feedforward_layernorm input_layernorm:post_attention_layernorm ln_1:ffn_norm
        input_layernorm:mlp_norm attention_norm:ffn_norm ln_1:norm2 ln_2:norm1 norm2:attn_norm norm:q_norm
        layernorm_before:mlp_norm layernorm_after:attn_norm self_attn_layer_norm:final_layer_norm ln_f:ln_1
        post_attention_layernorm:attention_norm output_layer_norm:sa_layer_norm norm3:encoder_attn_layer_norm
        bn1:downsample_bn final_layer_norm:cross_attn_norm""",
    "kernel": """
        wi:wo wo:wi c_fc:c_proj c_proj:c_fc intermediate:output out_proj:v_proj query:out_proj wo:q_proj
        se_reduce:se_expand squeeze:excite""",
    "embedding": """
        embed_positions:embedding wpe:embed token_type_embeddings:embed pos_embed:embedding query_embed:embed
        embed:pos_embed rel_embeddings:word_embeddings segment_embed:embed""",
}
"""What is stored and unwanted beside what is wanted and not stored: names say that neither is the other."""


@pytest.mark.parametrize("kind", LEFTOVERS)
@pytest.mark.parametrize("above", [("layers_0/", "blocks/0/"), ("", "model/")])
def test_what_is_left_over_on_both_sides_is_not_each_other_where_names_say_so(kind, above):
    settled = []
    for stored, wanted in (each.split(":") for each in LEFTOVERS[kind].split()):
        shape = {"scale": (8,), "kernel": (8, 8), "embedding": (20, 8)}[kind]
        tree = filled({f"{above[0]}{stored}/{kind}": shape, f"{above[0]}zoo/kernel": (8, 5)})
        _, values = proposed(tree, {f"{above[1]}{wanted}/{kind}": shape, f"{above[1]}zoo/kernel": (8, 5)})
        settled += [(stored, wanted)] if f"{above[1]}{wanted}/{kind}" in values else []
        assert f"{above[1]}zoo/kernel" in values
    assert settled == []


@pytest.mark.parametrize(
    ("stored", "wanted", "shape"),
    [
        ("conv_norm_out/scale", "norm_out/scale", (8,)),
        ("final_norm_1/scale", "norm/scale", (8,)),
        ("fc6_bn/scale", "fc1_norm/scale", (8,)),
        ("positional_encodings/embedding/kernel", "positional_embedding/kernel", (8, 8)),
        ("ln_f/scale", "ln_out/scale", (8,)),
        ("mlp_norm/scale", "norm2/scale", (8,)),
        ("embed/embedding", "shared/embedding", (20, 8)),
        ("embed_in/embedding", "wte/embedding", (20, 8)),
    ],
)
def test_what_is_left_over_on_both_sides_is_each_other_where_names_say_the_same_or_nothing(
    stored, wanted, shape
):
    tree = filled({f"layers_0/{stored}": shape, "layers_0/zoo/kernel": (8, 5)})

    _, values = proposed(tree, {f"blocks/0/{wanted}": shape, "blocks/0/zoo/kernel": (8, 5)})

    assert f"blocks/0/{wanted}" in values
