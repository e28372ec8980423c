"""Parts of a target that are not stored: what is unused takes their place only where names tell it.

Each beside a transformer whose parts all have other names in the target.
"""

import pytest

from tests.planning.suggesting.proposals import check, filled, proposed

BLOCK = {
    "MultiHeadDotProductAttention_0/query": "attn/q",
    "MultiHeadDotProductAttention_0/key": "attn/k",
    "MultiHeadDotProductAttention_0/value": "attn/v",
    "MultiHeadDotProductAttention_0/out": "attn/out",
    "MlpBlock_0/Dense_0": "mlp/fc1",
    "MlpBlock_0/Dense_1": "mlp/fc2",
    "LayerNorm_0": "norm1",
    "LayerNorm_1": "norm2",
}
SHAPES = {"fc1": (8, 32), "fc2": (32, 8), "norm1": (8,), "norm2": (8,)}
MODULES = {
    f"Transformer/encoderblock_{at}/{one}": (f"blocks/{at}/{other}", SHAPES.get(other.split("/")[-1], (8, 8)))
    for at in range(2)
    for one, other in BLOCK.items()
} | {"embedding": ("patch_embed/proj", (4, 4, 3, 8)), "head": ("head", (8, 5))}


def transformer(*more):
    """Returns the stored and the wanted shapes of a transformer, and which leaf is which.

    Args:
        more: Further parts, `stored=wanted`, each with its shape; modules where the names end in `/`.
    """
    stored, wanted = {}, {}
    modules = [(one, *other) for one, other in MODULES.items()]
    pairs = {}
    for text, shape in more:
        one, other = text.split("=")
        if one.endswith("/"):
            modules.append((one[:-1], other[:-1], shape))
        else:
            stored[one], wanted[other], pairs[other] = shape, shape, one
    for one, other, shape in modules:
        for name in ("kernel" if len(shape) > 1 else "scale", "bias"):
            stored[f"{one}/{name}"] = wanted[f"{other}/{name}"] = shape if name != "bias" else shape[-1:]
            pairs[f"{other}/{name}"] = f"{one}/{name}"
    return filled(stored), wanted, pairs


NEW = [
    ("distillation_token=register_token", (1, 1, 8)),
    ("dist_pos_embed=cls_pos_embed", (1, 1, 8)),
    ("prompt=register_tokens", (4, 8)),
    ("query_tokens=register_tokens", (1, 4, 8)),
    ("bos_embed=null_embed", (8,)),
    ("token_bias=unigram_bias", (50,)),
    ("pooler_ln/=feature_norm/", (8,)),
    ("pooler/LayerNorm/=feature_norm/", (8,)),
    ("mlm_ln/=q_norm/", (8,)),
    ("old/norm/=norm/", (8,)),
    ("value_head/norm/=norm_f/", (8,)),
    ("adapter/norm/=final_norm/", (8,)),
    ("head_norm/=embed_norm/", (8,)),
    ("memory_proj/=query_proj/", (8, 8)),
    ("adapter_down/=lora_a/", (8, 2)),
    ("cost_head/=reward_head/", (8, 1)),
    ("cost_critic/=reward_critic/", (8, 1)),
    ("vad_head/=asr_head/", (8, 7)),
    ("speaker_embed/=emotion_embed/", (9, 8)),
    ("pose_net/fc/=depth_net/fc/", (8, 9)),
    ("start_head/=answerable_head/", (8, 1)),
    ("cls_tower/Conv_0/=box_tower/conv/", (3, 3, 8, 8)),
    ("edge_decoder/Dense_0/=node_decoder/fc1/", (8, 9)),
    ("Transformer/encoder_norm/=embed_norm/", (8,)),
    ("decoder_norm/=pre_norm/", (8,)),
]
"""Parts that are not stored, each beside an unused one of its shape that is something else."""

RENAMED = [
    ("cls=cls_token", (1, 1, 8)),
    ("class_embedding=cls_token", (1, 1, 8)),
    ("dist_token=distillation_token", (1, 1, 8)),
    ("register_tokens=registers", (1, 4, 8)),
    ("query_tokens=queries", (1, 4, 8)),
    ("null_token=null_embed", (8,)),
    ("Transformer/encoder_norm/=norm/", (8,)),
    ("final_norm/=ln_f/", (8,)),
    ("norm/=norm_out/", (8,)),
    ("pooler/LayerNorm/=pool_norm/", (8,)),
    ("embeddings/LayerNorm/=norm_embed/", (8,)),
    ("fc_norm/=head_norm/", (8,)),
    ("pooler/dense/=pool_head/", (8, 8)),
    ("projector/layer1/=proj_head/fc1/", (8, 12)),
]
"""Parts that are stored under another name."""


@pytest.mark.parametrize(("text", "shape"), NEW)
def test_a_new_part_is_not_what_an_unused_one_of_another_meaning_holds(text, shape):
    stored, wanted, pairs = transformer((text, shape))
    new = {path for path in wanted if path.startswith(text.split("=")[1])}

    found, values = proposed(stored, wanted)

    assert {"/".join(map(str, path)) for path in found.unmatched_wanted} == new
    check(values, {path: stored[pairs[path]] for path in wanted.keys() - new})


@pytest.mark.parametrize(("text", "shape"), RENAMED)
def test_an_unused_part_that_names_tell_is_found_under_its_other_name(text, shape):
    stored, wanted, pairs = transformer((text, shape))

    _, values = proposed(stored, wanted)

    check(values, {path: stored[pairs[path]] for path in wanted})


@pytest.mark.parametrize(
    "text", ["adapter_norm=cross_norm", "adapter_scale=attn_temperature", "attn/sink=attn/head_scale"]
)
def test_a_new_vector_of_each_layer_is_not_what_an_unused_one_of_another_meaning_holds(text):
    one, other = text.split("=")
    more = [(f"Transformer/encoderblock_{at}/{one}=blocks/{at}/{other}", (8,)) for at in range(2)]
    stored, wanted, pairs = transformer(*more)

    _, values = proposed(stored, wanted)

    check(values, {path: stored[pairs[path]] for path in wanted if not path.endswith(f"/{other}")})


BESIDE = {"trunk/fc1": (6, 8), "trunk/fc2": (8, 8), "policy": (8, 4)}
"""What is called the same on both sides, beside a part that is not."""


@pytest.mark.parametrize(
    "text",
    [
        "aux_classifier=classifier",
        "head_dist=head",
        "cost=reward",
        "predictor=projector",
        "left_hand=face",
        "bbox_pred=objectness",
        "opponent/fc=agent/fc",
    ],
)
def test_a_new_part_is_not_what_is_left_where_all_beside_it_keep_their_names(text):
    one, other = text.split("=")
    sides = [
        {
            f"{module}/{leaf}": shape[at:]
            for module, shape in {**BESIDE, name: (8, 1)}.items()
            for at, leaf in enumerate(("kernel", "bias"))
        }
        for name in (one, other)
    ]
    stored, wanted = filled(sides[0]), sides[1]

    found, values = proposed(stored, wanted)

    assert len(found.questions) == 1
    check(values, {path: stored[path] for path in wanted.keys() & stored.keys()})


@pytest.mark.parametrize(
    "texts",
    [
        ["img_in=prior_in", "img_out=prior_out"],
        ["recurrent_block/lru_gate=temporal_block/lru_gate", "recurrent_block/fc=temporal_block/fc"],
    ],
)
def test_a_word_that_stands_for_another_one_in_several_parts_is_another_name(texts):
    shapes = [(8, 9), (8, 7)]
    stored, wanted, pairs = transformer(
        *(("/=".join(text.split("=")) + "/", shape) for text, shape in zip(texts, shapes, strict=True))
    )

    _, values = proposed(stored, wanted)

    check(values, {path: stored[pairs[path]] for path in wanted})


@pytest.mark.parametrize(("one", "other"), [("reward", "cost"), ("class", "box"), ("intent", "slot")])
def test_a_head_is_none_for_something_else_though_both_programs_call_heads_otherwise(one, other):
    trunk = {"encoder/Dense_0/kernel": "backbone/fc1/kernel", "encoder/Dense_1/kernel": "backbone/fc2/kernel"}
    shapes = dict(zip(trunk, ((5, 16), (16, 8)), strict=True))
    stored = filled(shapes | {f"{one}_head/kernel": (8, 3)})

    found, values = proposed(
        stored, {trunk[at]: x for at, x in shapes.items()} | {f"{other}_proj/kernel": (8, 3)}
    )

    check(values, {aim: stored[at] for at, aim in trunk.items()})
    assert found.questions


def test_a_new_part_of_a_module_is_not_what_is_left_of_another_one():
    stored, wanted, pairs = {}, {}, {}
    for at in range(2):
        for one, other in (("gated_cross_attn", "gated"), ("layers", "self")):
            for layer in ("query", "key", "value", "out"):
                path, aim = (
                    f"{one}_{at}/MultiHeadDotProductAttention_0/{layer}",
                    f"blocks/{at}/{other}/attn/{layer}",
                )
                stored |= {f"{path}/kernel": (8, 8)} if (other, layer) != ("gated", "key") else {}
                wanted |= {f"{aim}/kernel": (8, 8)} if (other, layer) != ("self", "key") else {}
                pairs[f"{aim}/kernel"] = f"{path}/kernel"
    stored = filled(stored)

    found, values = proposed(stored, wanted)

    assert len(found.questions) == 1  # The same of both layers.
    check(values, {path: stored[pairs[path]] for path in wanted if "gated/attn/key" not in path})


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        *(("n/mean", "n/var"), ("n/gamma", "n/beta"), ("n/beta", "n/scale"), ("n/gain", "n/offset")),
        *(("n/rel_pos_h", "n/rel_pos_w"), ("pos_bias_u", "pos_bias_v"), ("n/B", "n/C")),
        *(("n/running_mean", "n/running_var"), ("n/time_decay", "n/time_first")),
    ],
)
def test_a_parameter_is_not_made_of_its_opposite_without_asking(stored, wanted):
    tree = filled({stored: (8,), "d/kernel": (8, 8)})

    found, _ = proposed(tree, {wanted: (8,), "d/kernel": (8, 8)})

    assert found.confidence == "open"
    assert tuple(wanted.split("/")) in found.unmatched_wanted


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *(("gen_ab", "gen_ba"), ("query_encoder", "key_encoder")),
        ("blocks_0/adaln_msa", "blocks/0/adaln_mlp"),
    ],
)
def test_a_module_is_not_made_of_its_opposite_without_asking_also_where_its_layers_are_called_otherwise(
    one, other
):
    sides = [
        {"head/fc/kernel": (3, 7)}
        | {f"{module}/{layers.format(at)}/{fc}/kernel": shape for at in range(2) for fc, shape in inside}
        for module, layers, inside in (
            (one, "layers_{}", (("fc1", (8, 16)), ("fc2", (16, 8)))),
            (other, "blocks/{}", (("up", (8, 16)), ("down", (16, 8)))),
        )
    ]
    stored = filled(sides[0])

    _, values = proposed(stored, sides[1])

    check(values, {"head/fc/kernel": stored["head/fc/kernel"]})


@pytest.mark.parametrize(
    ("one", "other"),
    [("image", "extra_head"), ("image/conv,image/head", "extra_head/lin1,extra_head/lin2")],
)
def test_a_network_is_no_new_one_of_another_name_also_where_nothing_in_it_is_called_the_same(one, other):
    layers = {"text/fc1": (5, 8), "text/fc2": (8, 4)}
    sides = [
        {
            f"{layer}/kernel": shape
            for layer, shape in {
                **layers,
                **dict(zip(names.split(","), ((6, 8), (8, 4)), strict=False)),
            }.items()
        }
        for names in (one, other)
    ]
    stored = filled(sides[0])

    found, values = proposed(stored, sides[1])

    check(values, {path: value for path, value in stored.items() if path.startswith("text")})
    assert found.questions


@pytest.mark.parametrize(("one", "other"), [("reward", "cost"), ("intent", "slot")])
def test_of_several_heads_one_is_none_for_something_else(one, other):
    stored = {"encoder/Dense_0/kernel": (5, 8), f"heads/{one}/kernel": (8, 1), f"heads/{one}/bias": (1,)}
    wanted = {"backbone/fc1/kernel": (5, 8), f"outputs/{other}/kernel": (8, 1), f"outputs/{other}/bias": (1,)}
    stored = filled(stored)

    found, values = proposed(stored, wanted)

    check(values, {"backbone/fc1/kernel": stored["encoder/Dense_0/kernel"]})
    assert found.questions
