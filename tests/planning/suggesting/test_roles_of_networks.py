"""Whole networks that each side calls after another thing: no shape tells that one is the other."""

import pytest
from flax import traverse_util

from orbax_nnx_handler import Fuse, suggest
from tests.planning.suggesting.proposals import abstract, check, filled, proposed

NECK = {"neck/fc0": (5, 6), "neck/fc1": (6, 7)}


def leaves(layers):
    return {
        f"{layer}/{leaf}": shape[at:]
        for layer, shape in layers.items()
        for at, leaf in enumerate(("kernel", "bias"))
    }


def sides(*networks, layers=("Dense_{}", "fc{}"), beside=NECK):
    """Returns the stored values and the wanted shapes of networks given by both of their paths."""
    both = [
        leaves({f"{name}/{layer.format(at)}": (8 + at, 9 + at) for name in names for at in range(3)} | beside)
        for names, layer in zip(zip(*networks, strict=True), layers, strict=True)
    ]
    return filled(both[0]), both[1]


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        ("heads_edges", "decoders/keypoints"),
        ("encoder_flow", "encoders/thermal"),
        ("grasp_decoder", "decoder/place"),
        ("LidarEncoder_0", "encoders/radar"),
        ("heads/pose", "head_gaze"),
        ("streams/motion/net", "stream_audio"),
        ("math_expert", "experts/code"),
        ("embedder_state", "embedders/goal"),
        ("projectors/speech", "projector_music"),
    ],
)
@pytest.mark.parametrize("layers", [("Dense_{}", "fc{}"), ("fc{}", "fc{}")], ids=["renamed", "kept"])
def test_a_network_for_something_else_is_asked_about_at_any_depth(stored, wanted, layers):
    tree, target = sides((stored, wanted), layers=layers)

    found, values = proposed(tree, target)

    check(values, {path: tree[path] for path in leaves(NECK)})
    assert {path[: len(wanted.split("/"))] for asked in found.questions for path in asked.wanted} == {
        tuple(wanted.split("/"))
    }


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        ("heads_edges", "decoders/edges"),
        ("encoder_flow", "encoders/flow"),
        ("text_model", "language_encoder"),
        ("pretrained_resnet", "encoder"),
        ("reconstruction_head", "decoder"),
        ("env_encoder", "environment/encoder"),
        ("img_encoder", "vision_tower"),
        ("Critic_0", "q_network"),
        ("pi", "policy_head"),
        ("critic_1", "critics/0"),
    ],
)
def test_a_network_that_is_called_after_the_same_thing_needs_no_question(stored, wanted):
    tree, target = sides((stored, wanted))

    found, values = proposed(tree, target)

    assert found.questions == ()
    check(values, dict(zip(target, tree.values(), strict=True)))


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        *(("actor", "q1"), ("q1", "qf2"), ("vf", "qf"), ("pi", "critic"), ("vnet", "policy")),
        *(("QNetwork_0", "actor"), ("discriminator", "generator"), ("encoder_1", "enc2")),
        *(("critic_2", "critics/0"), ("head_1", "heads/1"), ("agent_3", "agents/2"), ("q0", "q1")),
    ],
)
@pytest.mark.parametrize("beside", [{}, NECK], ids=["alone", "beside"])
def test_a_network_of_another_role_or_number_is_asked_about(stored, wanted, beside):
    tree, target = sides((stored, wanted), beside=beside)

    found, values = proposed(tree, target)

    check(values, {path: tree[path] for path in leaves(beside)})
    assert found.confidence == "open"


@pytest.mark.parametrize(
    ("beside", "odd"),
    [
        ([("img_in", "img_in"), ("txt_in", "txt_in"), ("time_in", "time_embed")], ("vector_in", "guidance")),
        ([("camera_in", "camera_proj"), ("lidar_in", "lidar_mlp")], ("wheel_in", "grip_mlp")),
        ([("world", "world_model"), ("policy", "actor")], ("curiosity", "empowerment")),
    ],
)
def test_a_network_alone_that_names_do_not_tell_is_asked_about(beside, odd):
    tree, target = sides(*beside, odd)
    widths = {one: at for at, (one, _) in enumerate(reversed([*beside, odd]))}
    tree = {path: value[..., widths.get(path.split("/")[0], 0) :] for path, value in tree.items()}
    target = {path: tree[source].shape for path, source in zip(target, tree, strict=True)}

    found, values = proposed(tree, target)

    made = dict(zip(target, tree.values(), strict=True))
    check(values, {path: value for path, value in made.items() if not path.startswith(odd[1])})
    assert found.questions


@pytest.mark.parametrize("name", ["key_encoder", "encoder_k", "key_network", "k_encoder"])
def test_the_encoder_of_keys_follows_the_one_that_is_trained(name):
    tree, target = sides((name, "encoder"))

    found, values = proposed(tree, target)

    check(values, {path: tree[path] for path in leaves(NECK)})
    assert found.questions


def test_beside_one_of_queries_an_encoder_of_keys_is_one_of_documents():
    tree, target = sides(("query_encoder", "question_encoder"), ("key_encoder", "doc_encoder"))

    found, values = proposed(tree, target)

    assert found.questions == ()
    check(values, dict(zip(target, tree.values(), strict=True)))


def test_nothing_of_a_network_for_something_else_is_fused():
    stored = leaves({f"lidar_encoder/{name}": (8, 8) for name in ("query", "key", "value")} | NECK)
    wanted = leaves({"encoders/radar/qkv": (8, 24)} | NECK)

    found, values = proposed(filled(stored), wanted)

    assert not any(isinstance(rule, Fuse) for rule in found.renames)
    assert values.keys() == leaves(NECK).keys()


@pytest.mark.parametrize(("stored", "wanted"), [("actor", "q1"), ("vf", "qf"), ("q1", "qf2")])
def test_networks_below_keys_are_asked_about_by_their_roles_and_numbers(stored, wanted):
    values, target = sides((stored, wanted), ("world", "world"), beside={})
    tree = traverse_util.unflatten_dict(values, sep="/")

    found = suggest({name: {"params": held} for name, held in tree.items()}, abstract(target))

    assert {path[0] for path in found.unmatched_wanted} == {wanted}


@pytest.mark.parametrize("stored", ["momentum_{}", "{}_momentum", "momentum/{}"])
@pytest.mark.parametrize("names", [("text_encoder", "text_proj"), ("visual_encoder", "vision_proj")])
def test_a_network_called_m_follows_by_momentum_the_one_beside_it(stored, names):
    pairs = [(name, name) for name in names] + [(stored.format(name), f"{name}_m") for name in names]
    tree, target = sides(*pairs)

    found, values = proposed(tree, target)

    assert found.unmatched_wanted == ()
    right = {path: tree[path] for path in leaves(NECK)}
    for one, other in pairs:
        for at in range(3):
            for leaf in ("kernel", "bias"):
                right[f"{other}/fc{at}/{leaf}"] = tree[f"{one}/Dense_{at}/{leaf}"]
    check(values, right)


@pytest.mark.parametrize("name", ["text_encoder_m", "proj_m"])
def test_what_a_network_follows_by_momentum_is_none_that_follows(name):
    tree, target = sides((name, name.removesuffix("_m")))

    found, _ = proposed(tree, target)

    assert found.confidence == "open"


@pytest.mark.parametrize("wanted", ["encoder", "ref_encoder"])
def test_an_encoder_of_references_follows_none(wanted):
    tree, target = sides(("reference_encoder", wanted))

    found, values = proposed(tree, target)

    assert found.questions == ()
    check(values, dict(zip(target, tree.values(), strict=True)))


@pytest.mark.parametrize(
    "pairs",
    [
        [("query_encoder", "encoder_q"), ("key_encoder", "encoder_k")],
        [("online_network", "student"), ("target_network", "teacher")],
        [("online_net", "online_model"), ("slow_net", "target_model")],
    ],
)
def test_networks_called_after_the_same_things_in_other_words_are_not_asked_about(pairs):
    tree, target = sides(*pairs)

    found, values = proposed(tree, target)

    assert found.questions == ()
    check(values, dict(zip(target, tree.values(), strict=True)))
