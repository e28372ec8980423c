"""Models of several networks of one width: what each holds tells which it is, and none is torn apart."""

import itertools

import jax
import numpy as np
import pytest
from flax import nnx, traverse_util

from orbax_nnx_handler import from_linen, suggest
from orbax_nnx_handler.planning.likeness.links import Findings
from orbax_nnx_handler.planning.likeness.module_parts import Leaf
from orbax_nnx_handler.planning.likeness.networks import with_networks_apart
from tests.planning.suggesting.proposals import check, filled, proposed, restored

WIDTH = 8
KERNELS = {"Dense": (WIDTH, WIDTH), "Conv": (3, 3, WIDTH, WIDTH), "ConvTranspose": (3, 3, WIDTH, WIDTH)}
NORMS = {"BatchNorm": ("mean", "var"), "LayerNorm": ()}


def leaves_of(name, outputs=WIDTH):
    """Returns the leaves of a module by collection and name, with their shapes."""
    kind = name.split("/")[-1].rsplit("_", 1)[0]
    if kind in NORMS:
        both = {("params", leaf): (WIDTH,) for leaf in ("scale", "bias")}
        return both | {("batch_stats", leaf): (WIDTH,) for leaf in NORMS[kind]}
    return {("params", "kernel"): (*KERNELS[kind][:-1], outputs), ("params", "bias"): (outputs,)}


def pair_of(*modules):
    """Returns a stored tree, a target, and which stored leaf each wanted leaf is.

    Args:
        modules: The stored and the wanted path of each module, with the outputs of a last layer behind it.
    """
    stored, wanted, right, first = {}, [], {}, 0
    kinds = {"params": nnx.Param, "batch_stats": nnx.BatchStat}
    for one, other, *outputs in modules:
        for (collection, leaf), shape in leaves_of(one, *outputs).items():
            path = tuple(int(key) if key.isdecimal() else key for key in (*other.split("/"), leaf))
            size = int(np.prod(shape))
            stored[collection, *one.split("/"), leaf] = np.arange(
                first, first + size, dtype="float32"
            ).reshape(shape)
            wanted.append((path, kinds[collection](jax.ShapeDtypeStruct(shape, "float32"))))
            right[path] = stored[collection, *one.split("/"), leaf]
            first += size
    return traverse_util.unflatten_dict(stored), nnx.from_flat_state(wanted), right


def wrong_under(rules, tree, target, right):
    """Returns the leaves that rules make of another stored leaf."""
    state = from_linen(tree, target, renames=rules, policy="warn", unexpected="ignore")
    made = {path: np.asarray(leaf.get_value()) for path, leaf in nnx.to_flat_state(state)}
    return {path for path, value in made.items() if value.any() and not np.array_equal(value, right[path])}


def layers(stored, wanted, count, *others):
    """Returns modules that Linen counts beside each other, one after another in a wanted list."""
    return [
        (f"{stored}/{kind}_{at}", f"{wanted}/{at}/{inner}") for kind, inner in others for at in range(count)
    ]


def blocks(stored, wanted, *parts):
    """Returns the parts of two layers, of each the stored name, the wanted one and the outputs."""
    return [
        (f"{stored}/layer_{at}/{one}", f"{wanted}/layers/{at}/{other}", outputs)
        for at in range(2)
        for one, other, outputs in parts
    ]


PLAIN = ("Dense_0", "fc", 9), ("LayerNorm_0", "norm", WIDTH)
CROSSED = *PLAIN, ("Dense_1", "cross", 7)

NETWORKS = {
    "layers of another class": [
        *layers("q_network", "q/blocks", 3, ("ConvTranspose", "up"), ("BatchNorm", "norm")),
        *((f"image_encoder/Conv_{at}", f"vision/conv{at + 1}") for at in range(3)),
    ],
    "norms of another network": [
        *layers("embedding_net", "embedder/blocks", 3, ("ConvTranspose", "deconv"), ("BatchNorm", "norm")),
        ("embedding_net/Dense_0", "embedder/out", 6),
        *layers("disc", "discriminator/blocks", 3, ("ConvTranspose", "deconv"), ("BatchNorm", "norm")),
    ],
    "a module beside a last layer": [
        *layers("actor/MLP_0", "policy/layers", 2, ("Dense", "linear"), ("LayerNorm", "norm")),
        ("actor/Dense_0", "policy/out", 6),
        *layers("continue_head/MLP_0", "cont/layers", 2, ("Dense", "linear"), ("LayerNorm", "norm")),
        ("continue_head/Dense_0", "cont/out", 1),
    ],
    "the same in both, told by names": [
        *layers("reward_head/MLP_0", "reward/layers", 2, ("Dense", "linear"), ("LayerNorm", "norm")),
        ("reward_head/Dense_0", "reward/out", 6),
        *layers("critic/MLP_0", "value/layers", 2, ("Dense", "linear"), ("LayerNorm", "norm")),
        ("critic/Dense_0", "value/out", 6),
    ],
    "the towers of a retriever": [
        *layers("question_encoder", "query_encoder/layers", 2, ("Dense", "fc"), ("LayerNorm", "norm")),
        *layers("ctx_encoder", "passage_encoder/layers", 2, ("Dense", "fc"), ("LayerNorm", "norm")),
    ],
    "an encoder beside its decoder, and another one": [
        *blocks("style_encoder", "encoder", *PLAIN),
        *blocks("encoder", "transformer/encoder", *PLAIN),
        *blocks("decoder", "transformer/decoder", *CROSSED),
    ],
}


@pytest.mark.parametrize("modules", NETWORKS.values(), ids=NETWORKS)
def test_each_network_is_found_as_a_whole_by_what_it_holds(modules):
    tree, target, right = pair_of(*modules)

    found = suggest(tree, target)

    assert not found.unmatched_wanted
    assert not found.questions
    assert wrong_under(found.renames, tree, target, right) == set()


def test_networks_that_hold_the_same_are_one_question_where_no_name_tells():
    names = {"alpha": "one", "omega": "two"}
    tree, target, right = pair_of(
        *(
            module
            for stored, wanted in names.items()
            for module in layers(stored, f"{wanted}/layers", 2, ("Dense", "linear"), ("LayerNorm", "norm"))
        )
    )

    found = suggest(tree, target)

    (question,) = found.questions
    assert len(question.choices) == 2
    assert {*question.wanted} == {*found.unmatched_wanted} == right.keys()
    answers = [wrong_under(rules, tree, target, right) for rules in question.alternatives]
    assert sorted(map(len, answers)) == [0, len(right)]


def test_a_network_that_its_name_leads_elsewhere_than_the_one_beside_it_is_asked_about():
    names = {"obs_encoder": "encoder", "encoder": "vae/encoder", "decoder": "vae/decoder"}
    plain = [(f"{one}/Dense_{at}", f"{other}/{at}") for one, other in names.items() for at in range(3)]
    tree, target, right = pair_of(*plain)

    found = suggest(tree, target)

    (question,) = found.questions
    assert {path[:-2] for path in question.wanted} == {("encoder",), ("vae", "encoder")}
    assert {*question.wanted} == {*found.unmatched_wanted}
    answers = [wrong_under(rules, tree, target, right) for rules in question.alternatives]
    assert [*map(len, answers)] == [0, 12]


# `encoder/layers_0/fc/bias` is called so on both sides below the root of the target, and its kernel is not.
UNLIKE = {"encoder": "vae_encoder", "transformer/encoder": "encoder", "transformer/decoder": "decoder"}


def unlike_pair(*parts):
    """Returns stored arrays and wanted shapes of three networks, and which array each wanted leaf is."""
    stored, wanted, right = {}, {}, {}
    for (one, other), at in itertools.product(UNLIKE.items(), range(2)):
        for part, size in [*parts, *[("cross", 7)] * other.startswith("decoder")]:
            for leaf, to, shape in (("kernel", "weight", (4, size)), ("bias", "bias", (size,))):
                stored[path := f"{one}/layers_{at}/{part}/{leaf}"] = shape
                wanted[into := f"model/{other}/layers/{at}/{part}/{to}"] = shape[::-1]
                right[into] = path
    tree = filled(stored)
    return tree, wanted, {into: tree[path].T for into, path in right.items()}


def test_no_leaf_of_a_module_keeps_its_name_where_the_module_is_another_one():
    tree, wanted, right = unlike_pair(("fc", 9), ("out", 5))

    found, values = proposed(tree, wanted)

    assert not found.questions
    check(values, right)


def test_a_leaf_that_its_name_finds_is_asked_about_with_its_module():
    tree, wanted, right = unlike_pair(("fc", 9))

    found, _ = proposed(tree, wanted)

    (question,) = found.questions
    assert {"/".join(map(str, path)) for path in question.wanted} == {x for x in wanted if "encoder" in x}
    assert found.covered == len(wanted) - len(question.wanted)
    check(restored(tree, wanted, question.alternatives[0]), right)


BLOCK = {"LayerNorm_0/scale": (8,), "query/kernel": (8, 8), "Dense_0/kernel": (8, 24)}


def lists_beside(tables, names=(("alpha", "one"), ("omega", "two"))):
    """Returns what is stored and wanted of two lists, with tables that lie in them on one side."""
    called = {path: path.replace("_0", "").lower() for path in BLOCK}
    expected = {
        f"{two}/blocks/{at}/{called[path]}": (f"{one}/encoderblock_{at}/{path}", shape)
        for (one, two), at, (path, shape) in itertools.product(names, range(2), BLOCK.items())
    }
    return expected | tables


def test_lists_of_which_nothing_tells_which_is_which_are_one_question_and_not_one_for_each_part():
    expected = lists_beside({"one/pos_embed": ("pos", (17, 8)), "two/mask_token": ("mask_token", (1, 1, 8))})
    stored = filled(dict(expected.values()))
    shapes = {path: shape for path, (_, shape) in expected.items()}

    found, _ = proposed(stored, shapes)

    (question,) = found.questions
    assert (len(question.choices), len(question.wanted)) == (2, 12)
    answers = [restored(stored, shapes, found.answered([at])) for at in range(2)]
    assert any(
        all(np.array_equal(made[path], stored[name]) for path, (name, _) in expected.items())
        for made in answers
    )


@pytest.mark.parametrize(
    ("tables", "is_told"),
    [
        ({"two/pos_embed": ("omega_pos_embedding", (19, 8))}, True),
        ({"two/bridge/kernel": ("omega_bridge/kernel", (8, 19))}, False),  # May lead to the other network.
        ({"two/pos_embed": ("omega_pos", (19, 8)), "one/cls": ("omega_cls", (1, 1, 8))}, False),
    ],
)
def test_what_is_called_after_a_network_tells_which_one_it_is(tables, is_told):
    expected = lists_beside(tables)
    stored = filled(dict(expected.values()))

    found, values = proposed(stored, {path: shape for path, (_, shape) in expected.items()})

    assert bool(found.questions) != is_told
    for path, value in values.items():
        np.testing.assert_array_equal(value, stored[expected[path][0]], err_msg=path)
    assert (len(values) == len(expected)) == is_told


def test_what_is_left_of_two_networks_of_the_same_sizes_may_be_elsewhere():
    # A decoder's logits are as large as the table that another decoder keeps for itself.
    table, logits = (11, WIDTH), (WIDTH, 11)
    plain = [
        *layers("decoder", "decoder/blocks", 2, ("Dense", "linear"), ("LayerNorm", "norm")),
        *layers("encoder", "encoder/blocks", 3, ("Dense", "linear"), ("LayerNorm", "norm")),
    ]
    tree, target, right = pair_of(*plain)
    tree["params"]["embed"] = {"embedding": np.full(table, 0.5, "float32")}
    tree["params"]["decoder"]["logits"] = {"kernel": np.full(logits, 1.5, "float32")}
    more = {("decoder", "embed", "embedding"): table, ("lm_head", "kernel"): logits}
    target = nnx.from_flat_state(
        [
            *nnx.to_flat_state(target),
            *((path, nnx.Param(jax.ShapeDtypeStruct(shape, "float32"))) for path, shape in more.items()),
        ]
    )
    right |= {("decoder", "embed", "embedding"): tree["params"]["embed"]["embedding"]}
    right |= {("lm_head", "kernel"): tree["params"]["decoder"]["logits"]["kernel"]}

    found = suggest(tree, target)

    assert not found.unmatched_wanted
    assert wrong_under(found.renames, tree, target, right) == set()


@pytest.mark.parametrize(("count", "apart"), [(3, True), (40, False)])
def test_a_list_of_modules_without_numbers_is_matched_once(count, apart):
    def side(form):
        return [
            Leaf(
                names=tuple(form.format(word, name).split("/")),
                collection="params",
                shape=(WIDTH, WIDTH),
                number="floating",
                source=(form, word, name),
            )
            for word in itertools.islice(map("".join, itertools.product("bdgk", "aeiou", "mnt")), count)
            for name in ("first", "second")
        ]

    wanted, stored = side("net_{}/{}/kernel"), side("{}_net/{}/kernel")
    matched = []

    def match(ours, theirs):
        matched.append((len(ours), len(theirs)))
        return Findings()

    with_networks_apart(Findings(), wanted, stored, match)

    assert bool(matched) == apart


AGENT = {
    "network_params/params/Conv_0": ("network/convs/0", (3, 3, 4, 8)),
    "network_params/params/Conv_1": ("network/convs/1", (3, 3, 8, 8)),
    "network_params/params/Dense_0": ("network/fc", (32, 16)),
    "actor_params/params/Dense_0": ("actor", (16, 6)),
    "critic_params/params/Dense_0": ("critic", (16, 1)),
}
"""CleanRL's `AgentParams`: the variables of three Linen modules."""


@pytest.mark.parametrize("above", [(), ("params",), ("params", "params")])
def test_variables_of_several_networks_are_read_below_what_each_is_called(above):
    shapes = {
        f"{one}/{leaf}": shape if leaf == "kernel" else shape[-1:]
        for one, (_, shape) in AGENT.items()
        for leaf in ("kernel", "bias")
    }
    stored = filled(shapes)
    wanted = {
        f"{AGENT[path.rpartition('/')[0]][0]}/{path.rpartition('/')[2]}": x for path, x in stored.items()
    }
    tree = traverse_util.unflatten_dict({(*above, *path.split("/")): x for path, x in stored.items()})
    target = nnx.from_flat_state(
        [
            (
                tuple(int(x) if x.isdecimal() else x for x in path.split("/")),
                nnx.Param(jax.ShapeDtypeStruct(x.shape, x.dtype)),
            )
            for path, x in wanted.items()
        ]
    )

    found = suggest(tree, target)

    assert found.unmatched_wanted == ()
    state = from_linen(tree, target, renames=found.renames)
    check({"/".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}, wanted)
