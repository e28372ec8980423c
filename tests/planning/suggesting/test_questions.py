"""What a proposal says of what it leaves open: which leaves, how many orders, how many answers."""

import itertools

import jax
import numpy as np
import pytest
from flax import nnx

from orbax_nnx_handler import Drop, Split, from_linen, suggest
from orbax_nnx_handler.planning.likeness.links import Link
from orbax_nnx_handler.planning.likeness.module_parts import Leaf
from orbax_nnx_handler.planning.likeness.shapes import Way, ways
from orbax_nnx_handler.planning.suggesting.questions import Choice, held_by
from tests.planning.plans import params
from tests.planning.suggesting.proposals import (
    DENSE,
    OTHER,
    abstract,
    arrays,
    check,
    filled,
    proposal,
    proposed,
    restored,
    variables_of,
)

NORM = {"scale": (8,), "bias": (8,)}


def said(found):
    """Returns the lines of a proposal from its first question to how it is settled."""
    lines = str(found).splitlines()
    first = next(at for at, line in enumerate(lines) if line.startswith("# question"))
    last = next(at for at, line in enumerate(lines) if line.startswith("# to settle"))
    return lines[first:last]


def test_coverage_counts_what_is_settled_and_says_how_much_is_asked():
    twins = {"zeta": DENSE, "alpha": DENSE}
    stored = {"Dense_0": DENSE, "Dense_1": DENSE}

    asked = proposal({**twins, "head": OTHER}, {**stored, "Dense_2": OTHER})
    open_too = proposal({**twins, "head": OTHER, "new": {"kernel": (5, 7)}}, {**stored, "Dense_2": OTHER})

    assert asked.coverage == "covers 2 of 6 leaves; 4 open, all asked about"
    assert open_too.coverage == "covers 2 of 7 leaves; 5 open, 4 of them asked about"


def test_a_leaf_that_is_found_by_its_name_and_asked_about_is_not_covered():
    block = {"c_attn": {"kernel": (24, 8)}, "c_proj": {"kernel": (8, 8)}}
    turned = {"c_attn": {"kernel": (8, 24)}, "c_proj": {"kernel": (8, 8)}}

    found = proposal({"h": {0: turned, 1: turned}}, {"h": {"0": block, "1": block}})

    assert (found.unmatched_wanted, found.covered, found.wanted_count) == ((), 2, 4)
    assert (
        said(found)[0]
        == "# question: are h/0/c_proj/kernel, h/1/c_proj/kernel transposed? Shapes allow both."
    )


def test_a_question_about_one_of_a_modules_leaves_names_the_leaf():
    found = proposal(
        {"log_temperature": (), "net": {"out_bias": (3,), "kernel": (2, 4)}},
        {"logit_scale": (), "net": {"kernel": (2, 4)}},
    )

    assert said(found)[0] == (
        "# question: is logit_scale meant by log_temperature? Shapes allow it, but only one is called log: "
        "the value may be another function."
    )


def leaf(path, collection="params", shape=(8,)):
    names = (*path.split("/"),)
    return Leaf(
        names=names, collection=collection, shape=shape, number="floating", source=(collection, *names)
    )


def link(stored, wanted):
    return Link(wanted=(wanted,), stored=(stored,), grounds="names", ways=((Way(()),),))


def test_leaves_of_one_path_in_two_collections_are_told_apart():
    own, average = (leaf("norm/scale", name) for name in ("params", "ema_params"))
    wanted = leaf("final/scale")
    choice = Choice("which", ((link(own, wanted),), (link(average, wanted),)))

    question = choice.question(lambda _: (), held_by([own, average], [wanted]))

    assert str(question) == "which of params/norm, ema_params/norm is final? The shapes allow each."
    assert question.choices == ("params/norm -> final", "ema_params/norm -> final")


def test_statistics_and_parameters_of_one_module_are_not():
    stored = [leaf("bn/scale"), leaf("bn/mean", "batch_stats")]
    wanted = [leaf("norm/scale"), leaf("norm/mean", "batch_stats")]
    choice = Choice("which", (tuple(map(link, stored, wanted)),))

    question = choice.question(lambda _: (), held_by(stored, wanted))

    assert str(question) == "is bn meant by norm? Shapes allow it, and no name tells."


def test_every_order_is_said_only_where_every_order_is_possible():
    four = [leaf(f"Embed_{at}/embedding") for at in range(4)]
    wanted = [leaf(f"{name}/embedding") for name in ("src", "tgt", "src_pos", "tgt_pos")]
    straight, crossed = (
        tuple(link(four[at], wanted[to]) for to, at in enumerate(order))
        for order in ((0, 1, 2, 3), (1, 0, 3, 2))
    )
    sizes = held_by(four, wanted)

    both = Choice("which", (straight, crossed)).question(lambda _: (), sizes)
    cut = Choice("which", (straight, crossed) * 12)
    five = (*straight, link(leaf("Embed_4/embedding"), leaf("type/embedding")))
    many = Choice("which", (five,) * 24).question(lambda _: (), sizes)

    assert str(both).endswith("The shapes allow both.")
    assert str(cut.question(lambda _: (), sizes)).endswith("The shapes allow every order.")
    assert str(many).endswith("The shapes allow every order.")
    assert [*many.lines][-1] == "    ... and 114 more, 24 of all by number"


def test_orders_within_each_of_several_blocks_are_counted_once():
    norms = {name: {"scale": (8,)} for name in ("a", "b", "c", "d")}
    wide = {"wide": {"kernel": (8, 3)}}

    found = proposal(
        {"layers": {at: {name: {"scale": (8,)} for name in ("p", "q", "r", "s")} | wide for at in range(2)}},
        {f"block_{at}": norms | wide for at in range(2)},
    )

    (question,) = found.questions
    assert len(question.parts[0]) == 8
    assert question.orders == len(question.choices) == 24


def test_what_is_one_in_a_stack_is_named_in_all_layers():
    block = {"LayerNorm_0": NORM, "LayerNorm_1": NORM, "wide": {"kernel": (8, 3)}}
    stacked = {name: {"scale": (3, 8), "bias": (3, 8)} for name in ("left_norm", "right_norm")}

    found = proposal(
        {"blocks": {**stacked, "wide": {"kernel": (3, 8, 3)}}}, {f"MixerBlock_{at}": block for at in range(3)}
    )

    assert said(found)[1].startswith("#     0: MixerBlock_{0..2}/LayerNorm_0 -> blocks/")


def test_many_parts_of_a_question_are_folded_by_number_and_name():
    stored = [leaf(f"net/{at}/{name}/kernel") for at in range(3) for name in ("key", "value")]
    wanted = [leaf(f"{name}s/{at}/kernel") for at in range(3) for name in ("k", "v")]
    choice = Choice("which", (tuple(map(link, stored, wanted)), tuple(map(link, stored[::-1], wanted))))

    question = choice.question(lambda _: (), held_by(stored, wanted))

    assert str(question) == (
        "which of net/{0..2}/{key,value} is which of {ks,vs}/{0..2}? The shapes allow both."
    )


def test_a_rename_that_only_shapes_tell_says_so():
    found = proposal(
        {"up": DENSE, "down": OTHER, "norm_out": {"scale": (9,)}},
        {"Dense_0": OTHER, "Dense_1": DENSE, "norm_outs": {"scale": (9,)}},
    )

    assert {str(each.rule): each.why for each in found.proposals} == {
        "('Dense_0', 'down')": "by shapes",
        "('Dense_1', 'up')": "by shapes",
        "('norm_outs', 'norm_out')": "",
    }


def test_answers_that_are_shown_are_answers():
    found = proposal({"zeta": DENSE, "alpha": DENSE}, {"Dense_0": DENSE, "Dense_1": DENSE})
    several = proposal(
        {"log_temperature": (), "zeta": DENSE, "alpha": DENSE, "eta": OTHER, "beta": OTHER},
        {"logit_scale": (), **{f"Dense_{at}": DENSE for at in range(2)}, "One": OTHER, "Two": OTHER},
    )

    assert "# renames=found.answered([0]) answers it by number." in str(found)
    assert "# renames=found.answered([0, None, 0]) answers them by number; None leaves one open." in str(
        several
    )
    assert several.answered([0, None, 0])
    with pytest.raises(ValueError, match="1 question, 0 answers: each takes one, None to leave it open"):
        found.answered([])
    with pytest.raises(ValueError, match="question 1 has answers 0 to 1, not 2"):
        found.answered([2])


def test_every_answer_alone_is_one_that_the_planner_takes():
    layer = {"self": {"query": {"kernel": (8, 8)}}, "up": {"dense": {"kernel": (8, 16)}}}
    block = {"attn": {"query": {"kernel": (8, 2, 4)}}, "fc1": {"kernel": (8, 16)}}
    tree = {f"{name}_encoder": {"layer": {"0": layer, "1": layer}} for name in ("elm", "oak")}
    target = nnx.State(params({f"{name}_tower": {"layers": {0: block, 1: block}} for name in ("fir", "yew")}))
    stored = jax.tree.map(np.asarray, {"params": arrays(tree)})

    found = suggest(stored, target)

    assert [len(question.choices) for question in found.questions] == [2]  # Of both towers together.
    for at, question in enumerate(found.questions):
        for choice in range(len(question.choices)):
            answers = [choice if at == place else None for place in range(len(found.questions))]
            from_linen(stored, target, renames=found.answered(answers), policy="warn", unexpected="ignore")


@pytest.mark.parametrize("count", [2, 3])
def test_an_answer_within_layers_that_are_stacked_is_for_all_of_them(count):
    gates = [f"layer_{layer}/gate{at}" for layer in range(count) for at in (1, 2)]
    stored = filled({f"net/{gate}/Dense_{at}/kernel": (4, 4) for gate in gates for at in range(3)})
    stored |= filled({f"net/{gate}/gating_bias": (4,) for gate in gates})
    stored |= filled({f"net/layer_{layer}/out/kernel": (4, 5) for layer in range(count)})
    wanted = {f"blocks/gate{at}/{x}/kernel": (count, 4, 4) for at in (1, 2) for x in ("u_r", "u_z", "w_g")}
    wanted |= {f"blocks/gate{at}/b_g": (count, 4) for at in (1, 2)} | {"blocks/out/kernel": (count, 4, 5)}

    found = suggest(variables_of(stored), abstract(wanted))

    (question,) = found.questions
    for choice in (0, len(question.choices) - 1):
        values = restored(stored, wanted, found.answered([choice]))
        for at in (1, 2):
            made = [values[f"blocks/gate{at}/{x}/kernel"] for x in ("u_r", "u_z", "w_g")]
            layers = [
                {stored[f"net/layer_{layer}/gate{at}/Dense_{x}/kernel"].tobytes() for x in range(3)}
                for layer in range(count)
            ]
            assert [{x[layer].tobytes() for x in made} for layer in range(count)] == layers


def test_a_table_of_another_size_is_told_and_may_be_cut_as_is_said():
    stored = {"embed_positions": {"embedding": (14, 8)}, "wte": {"embedding": (20, 8)}, "up": DENSE}
    wanted = {"pos_embed": {"embedding": (12, 8)}, "tok_embed": {"embedding": (32, 8)}, "up": DENSE}
    tree, target = {"params": filled_tree(stored)}, nnx.State(params(wanted))

    found = suggest(tree, target)
    cut = Split("embed_positions", ("unused", "pos_embed"), axis=0, sizes=(2, 12))
    rules = [*found.renames, cut, Drop("unused", "an offset")]
    state = from_linen(tree, target, renames=rules, policy="warn", unexpected="ignore")

    part, larger = found.resized
    assert part == (
        "pos_embed/embedding (12, 8) may be a part of params/embed_positions/embedding (14, 8): "
        "if you know which, a Split takes it out."
    )
    assert larger == (
        "tok_embed/embedding (32, 8) is larger than what may be meant, params/wte/embedding (20, 8): "
        "no rule pads a weight."
    )
    assert all(f"# {text}" in str(found).splitlines() for text in found.resized)
    np.testing.assert_array_equal(
        state["pos_embed"]["embedding"][...], tree["params"]["embed_positions"]["embedding"][2:]
    )


def filled_tree(tree):
    if isinstance(tree, dict):
        return {key: filled_tree(part) for key, part in tree.items()}
    return np.arange(np.prod(tree), dtype="float32").reshape(tree)


def test_an_answer_turns_a_square_matrix_as_the_others_of_the_model_are():
    # Of two layers of one shape no name tells which is which; the wide ones are turned by their shapes.
    stored = {"first": (4, 9), "Dense_0": (6, 6), "Dense_1": (6, 6), "last": (7, 3)}
    wanted = {"first": "first", "Dense_0": "omega", "Dense_1": "alpha", "last": "last"}
    tree = filled({f"{one}/kernel": shape for one, shape in stored.items()})
    target = {f"{other}/weight": stored[one][::-1] for one, other in wanted.items()}
    right = {f"{other}/weight": tree[f"{one}/kernel"].T for one, other in wanted.items()}

    found, _ = proposed(tree, target)

    (question,) = found.questions
    values = [restored(tree, target, rules) for rules in question.alternatives]
    assert sum(all(np.array_equal(each[path], right[path]) for path in right) for each in values) == 1


def test_rows_and_columns_of_a_kernel_keep_their_order():
    assert not ways((1, 5, 20, 8), (8, 20, 5, 1))
    assert len(ways((1, 5, 20, 8), (8, 20, 1, 5))) == 1


def test_norms_are_no_rows_of_a_matrix():
    found = proposal(
        {"gate": {"weight": (3, 8)}, **{f"{word}_norm": {"scale": (8,)} for word in ("a", "b", "c", "d")}},
        {"router": {"w": (8, 3)}, "rms_norm": {"scale": (8,)}}
        | {f"rms_norm_{at}": {"scale": (8,)} for at in (1, 2, 3)},
    )

    asked = {path for question in found.questions for path in question.wanted if path[0] == "gate"}
    made = {path for question in found.questions if asked & {*question.wanted} for path in question.stored}
    assert not any("rms_norm" in str(path) for path in made)


def test_a_leaf_that_a_question_pairs_with_another_one_is_not_said_to_be_of_the_wrong_shape():
    """Of w2 and w3, two projections of a gated network that programs call the other way round."""
    block = {"w1": {"kernel": (8, 16)}, "w2": {"kernel": (8, 16)}, "w3": {"kernel": (16, 8)}}
    exchanged = block | {"w2": block["w3"], "w3": block["w2"]}
    sizes = {"lateral3": {"kernel": (4, 3)}, "lateral4": {"kernel": (5, 3)}, "lateral5": {"kernel": (7, 3)}}

    found = proposal({"ffn": exchanged}, {"ffn": block})
    of_sizes = proposal(dict(zip(sizes, reversed(sizes.values()), strict=True)), sizes)

    for each in (found, of_sizes):
        assert each.questions
        assert each.problem == ""
        assert "pass a Transpose" not in str(each)
        assert "build the target" not in str(each)


def test_the_first_answers_agree_with_words_and_order_and_none_pairs_opposites():
    names = {
        "attn_prenorm": "ln1",
        "attn_postnorm": "ln1_post",
        "ffn_prenorm": "ln2",
        "ffn_postnorm": "ln2_post",
    }
    layer = {"wide": {"kernel": (8, 3)}}

    found = proposal(
        {"layers": {at: {wanted: {"scale": (8,)} for wanted in names.values()} | layer for at in range(2)}},
        {f"block_{at}": {stored: {"scale": (8,)} for stored in names} | layer for at in range(2)},
    )

    (question,) = found.questions
    pairs = [dict(pair.split(" -> ") for pair in x.split(", ") if "->" in pair) for x in question.choices]
    assert len(pairs) == 4
    assert pairs[0] == {f"block_0/{stored}": f"layers/0/{wanted}" for stored, wanted in names.items()}
    assert all(("post" in stored) == ("post" in wanted) for each in pairs for stored, wanted in each.items())


def test_the_first_answers_keep_the_order_of_lists():
    kinds = {"conv": ("kernel", (3, 3, 8, 8)), "norm": ("scale", (8,))}
    towers, heads = {}, {}
    for (kind, (leaf, shape)), at in itertools.product(kinds.items(), range(4)):
        towers |= {f"{tower}_tower/{kind}_{at}/{leaf}": shape for tower in ("box", "cls")}
        place = 3 * at + (kind == "norm")
        heads |= {f"{head}_head/conv/{place}/{leaf}": shape for head in ("left", "other")}
    stored = filled(towers)

    found, _ = proposed(stored, heads)

    assert [len(question.choices) for question in found.questions] == [24, 24]
    for answer, order in enumerate((("left", "other"), ("other", "left"))):
        values = restored(stored, heads, found.answered([answer] * 2))
        for (tower, head), at in itertools.product(zip(("box", "cls"), order, strict=True), range(4)):
            source = stored[f"{tower}_tower/conv_{at}/kernel"]
            np.testing.assert_array_equal(values[f"{head}_head/conv/{3 * at}/kernel"], source)


def test_the_first_answer_keeps_the_order_of_blocks_in_several_stages():
    """Of all ways by which the blocks of stages may be each other's, the order of numbers comes first."""
    names, stored, wanted = ("conv1/kernel", "conv2/kernel", "bn1/scale", "bn2/scale"), {}, {}
    for stage, branch, block, name in itertools.product((2, 3), (0, 1), (0, 1), names):
        width = (4, 8)[branch]
        shape = (width,) if name.startswith("bn") else (3, 3, width, width)
        stored[f"stage{stage}_branch{branch}_block{block}/{name}"] = shape
        wanted[f"stage{stage}/0/branches/{branch}/{block}/{name}"] = shape
    values = filled(stored)

    found, _ = proposed(values, wanted)
    answered = restored(values, wanted, found.answered([0] * len(found.questions)))

    assert len(found.questions) == 2
    check(answered, dict(zip(wanted, values.values(), strict=True)))


def test_the_first_answer_keeps_the_order_of_an_encoder_and_a_decoder():
    """Numbers of one module tell nothing of another one, nor of a part that has none."""
    names = ("encoder/fc2", "encoder/fc_mu", "encoder/fc_logvar", "decoder/fc1", "decoder/fc2")
    values = filled({f"Dense_{at}/kernel": (4, 4) for at in range(len(names))})
    wanted = dict.fromkeys((f"{name}/kernel" for name in names), (4, 4))

    found, _ = proposed(values, wanted)
    answered = restored(values, wanted, found.answered([0] * len(found.questions)))

    assert found.questions
    check(answered, dict(zip(wanted, values.values(), strict=True)))


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        (("encoder/embed", "decoder/embed"), ("src_embed", "tgt_embed")),
        (("enc/tokens", "dec/tokens"), ("source_tokens", "target_tokens")),
        (("embed_src", "embed_tgt"), ("encoder/embedding", "decoder/embedding")),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_the_first_answer_takes_the_source_for_the_encoders_and_the_target_for_the_decoders(
    stored, wanted, turned
):
    made = dict(zip(wanted, stored, strict=True))
    leaves = filled({f"{path}/embedding": (9, 4) for path in (stored[::-1] if turned else stored)})
    shapes = {f"{aim}/embedding": (9, 4) for aim in wanted}

    found, _ = proposed(leaves, shapes)

    (question,) = found.questions
    values = restored(leaves, shapes, question.alternatives[0])
    for aim, path in made.items():
        np.testing.assert_array_equal(values[f"{aim}/embedding"], leaves[f"{path}/embedding"])


def test_what_may_be_meant_is_asked_once_for_all_layers_and_for_all_of_a_module():
    layers = {f"layers_{at}/mlp/fc": f"blocks/{at}/mlp/fc" for at in range(3)}
    beside = {f"layers_{at}/cost_norm": f"blocks/{at}/mood_norm" for at in range(3)}
    tower = {f"ham_tower/{name}": f"egg_tower/{name}" for name in ("fc1", "fc2", "fc3")}
    made = {**layers, **beside, **tower}
    shapes = {path: (9 + len(path), 8) if "fc" in path else (8,) for path in made}
    leaf = {path: f"{path}/{'kernel' if 'fc' in path else 'scale'}" for path in (*made, *made.values())}
    stored = filled({leaf[path]: shape for path, shape in shapes.items()})
    wanted = {leaf[aim]: shapes[path] for path, aim in made.items()}

    found, _ = proposed(stored, wanted)

    assert [str(question).split("?")[0] for question in found.questions] == [
        "are layers_{0..2}/cost_norm meant by blocks/{0..2}/mood_norm",
        "are ham_tower/fc{1..3} meant by egg_tower/fc{1..3}",
    ]
    answered = restored(stored, wanted, found.answered([0, 0]))
    check(answered, {leaf[aim]: stored[leaf[path]] for path, aim in made.items()})
