"""Layers that one side counts from the other end, or from another number: order tells nothing of them."""

import numpy as np
import pytest

from orbax_nnx_handler import suggest
from tests.planning.suggesting.proposals import abstract, check, filled, proposed, variables_of
from tests.planning.suggesting.proposals import restored as restored_by

DENSE, NORM = {"kernel": (5, 5), "bias": (5,)}, {"scale": (5,), "bias": (5,)}


def case(*lines):
    """Returns stored and wanted shapes, and what each wanted leaf is made from."""
    stored, wanted, sources = {}, {}, {}
    for one, other, module in lines:
        for name, shape in module.items():
            stored[f"{one}/{name}"] = wanted[f"{other}/{name}"] = shape
            sources[f"{other}/{name}"] = f"{one}/{name}"
    return stored, wanted, sources


def levels(stored, wanted, count, module=None):
    """Returns lines of levels that are counted backwards, as wide as they count, or each as `module` is."""
    return [
        (stored.format(at), wanted.format(count - 1 - at), module or {"kernel": (4 << at, 3)})
        for at in range(count)
    ]


def from_a_stem(stem, first):
    """Returns lines of layers and norms of which the first ones have a name of their own elsewhere."""
    return [
        ("fc1", stem.format("fc"), first), ("fc2", "fc1", DENSE), ("fc3", "fc2", DENSE),
        ("bn1", stem.format("bn"), NORM), ("bn2", "bn1", NORM), ("bn3", "bn2", NORM),
    ]  # fmt: skip


SETTLED = {
    "by their widths": levels("feat_{}", "feats/{}", 3),
    "by their widths, four": levels("feat_{}", "feats/{}", 4),
    "in their layers": [
        line
        for at in (0, 1)
        for line in (
            (f"l_{at}/a", f"ls/{1 - at}/a", {"kernel": (4 << at, 3)}),
            (f"l_{at}/b", f"ls/{1 - at}/b", DENSE),
        )
    ],
    "of which two widths differ": [
        line
        for at, (to, width, out) in enumerate([(3, 5, 4), (2, 5, 5), (1, 5, 5), (0, 6, 5)])
        for line in (
            (f"dec_conv_{at}", f"stages/{to}/conv", {"kernel": (width, out)}),
            (f"dec_norm_{at}", f"stages/{to}/norm", {"scale": (width,), "bias": (width,)}),
        )
    ],
    "a decoder grows": [(f"dec_{16 << at}/conv", f"decoder/{at}/conv", DENSE) for at in range(3)],
    "from one of another shape": [
        ("fc1", "fc_in", {"kernel": (7, 5)}), ("fc2", "fc1", DENSE), ("fc3", "fc2", DENSE)
    ],
    "norms with their layers": from_a_stem("stem/{}", {"kernel": (7, 5)}),
    "in each block": [
        (f"b_{at}/{one}", f"b/{at}/{other}", module)
        for at in (0, 1)
        for one, other, module in from_a_stem("{}_in", {"kernel": (7, 5)})
    ],
}  # fmt: skip
ASKED = {
    "beside a list that is reversed": [*levels("a_{}", "as/{}", 2), *levels("b_{}", "bs/{}", 2, DENSE)],
    "in the same levels": [*levels("a_{}", "levels/{}/a", 2), *levels("b_{}", "levels/{}/b", 2, DENSE)],
    "heads of levels": [*levels("f_{}", "feats/{}", 3), *levels("cls_{}", "cls_heads/{}", 3, DENSE)],
    "called by sizes": [(f"enc_{64 >> at}/conv", f"encoder/{at}/conv", DENSE) for at in range(3)],
    "from one that is the first": [
        ("fc1", "fc_in", DENSE), ("fc2", "fc1", DENSE), ("fc3", "fc2", DENSE)
    ],
    "from a stem": [("conv1", "stem", DENSE), ("conv2", "conv1", DENSE), ("conv3", "conv2", DENSE)],
    "from another number within a name": [
        (f"stage{at}_fc{to}", f"stage{at + 1}_fc{to}", DENSE) for at in (0, 1) for to in (1, 2)
    ],
    "from one of another name": [("fc1", "proj", DENSE), ("fc2", "fc1", DENSE), ("fc3", "fc2", DENSE)],
    "norms": [("norm1", "norm_in", NORM), ("norm2", "norm1", NORM), ("norm3", "norm2", NORM)],
    "norms with their layers": from_a_stem("stem/{}", DENSE),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTLED)
def test_levels_that_shapes_or_words_tell_are_settled(name):
    stored, wanted, sources = case(*SETTLED[name])
    values = filled(stored)
    found, restored = proposed(values, wanted)
    assert not found.questions
    assert not found.unmatched_wanted
    check(restored, {path: values[source] for path, source in sources.items()})


@pytest.mark.parametrize("name", ASKED)
def test_what_nothing_but_order_tells_is_asked(name):
    stored, wanted, sources = case(*ASKED[name])
    values = filled(stored)
    found, restored = proposed(values, wanted)
    assert found.questions
    check(restored, {path: values[sources[path]] for path in restored})


def test_which_end_is_the_first_one_is_asked_with_both_readings():
    stored, wanted, sources = case(
        *[(f"lateral_p{at + 3}", f"laterals/{2 - at}", {"kernel": (4 << at, 3)}) for at in range(3)],
        *[(f"out_p{at + 3}", f"outs/{2 - at}", DENSE) for at in range(3)],
    )
    values = filled(stored)

    found, restored = proposed(values, wanted)

    assert {path.split("/")[0] for path in restored} == {"laterals"}
    (question,) = found.questions
    assert len(question.choices) == 2
    rules = found.answered([0])
    check(restored_by(values, wanted, rules), {path: values[source] for path, source in sources.items()})


@pytest.mark.parametrize("name", ["from one that is the first", "from a stem", "norms with their layers"])
def test_what_may_be_counted_from_another_number_is_asked_with_both_readings(name):
    stored, wanted, sources = case(*ASKED[name])
    values = filled(stored)

    found, restored = proposed(values, wanted)

    assert not restored
    (question,) = found.questions
    assert len(question.choices) == 2
    rules = found.answered([0])
    check(restored_by(values, wanted, rules), {path: values[source] for path, source in sources.items()})


CONV = {"kernel": (3, 3, 5, 5), "bias": (5,)}
BESIDE_ANOTHER_ORDER = {
    "reversed": [
        *((f"Conv_{at}", f"inner/{2 - at}", {"kernel": (1, 1, 9 + at, 5)}) for at in range(3)),
        *((f"Conv_{at + 3}", f"layer/{2 - at}", CONV) for at in range(3)),
    ],
    "in turns": [
        line
        for at in range(3)
        for line in (
            (f"Conv_{2 * at}", f"inner/{2 - at}", {"kernel": (1, 1, 9 + at, 5)}),
            (f"Conv_{2 * at + 1}", f"smooth/{2 - at}", CONV),
        )
    ],
    "of another class": [
        *((f"Dense_{at}", f"proj/{to}", {"kernel": (9 + at, 5)}) for at, to in enumerate((1, 2, 0))),
        *((f"LayerNorm_{at}", f"norm/{to}", NORM) for at, to in enumerate((1, 2, 0))),
    ],
}


@pytest.mark.parametrize("name", BESIDE_ANOTHER_ORDER)
def test_what_linen_counts_beside_layers_in_another_order_is_asked_with_that_order(name):
    stored, wanted, sources = case(*BESIDE_ANOTHER_ORDER[name])
    values = filled(stored)

    found, restored = proposed(values, wanted)

    assert 0 < len(restored) < len(wanted)
    check(restored, {path: values[sources[path]] for path in restored})
    (question,) = found.questions
    assert len(question.choices) == 2
    rules = found.answered([0])
    check(restored_by(values, wanted, rules), {path: values[source] for path, source in sources.items()})


def test_what_linen_counts_in_the_layers_of_one_list_is_in_one_order():
    stored, wanted, sources = case(
        *[
            (f"Block_{at}/Conv_0", f"decoder/{1 - at}/block/conv", {"kernel": (3, 3, 5, 5 - at)})
            for at in (0, 1)
        ],
        *[(f"ConvTranspose_{at}", f"decoder/{1 - at}/up", {"kernel": (2, 2, 5, 5)}) for at in (0, 1)],
    )
    values = filled(stored)

    found, restored = proposed(values, wanted)

    assert not found.questions
    check(restored, {path: values[source] for path, source in sources.items()})


def test_a_module_is_not_torn_where_one_of_its_leaves_has_the_shape_of_another_one():
    stored, wanted, sources = case(
        *[
            (f"lateral_{at}", f"lateral/{2 - at}", {"kernel": (1, 1, 9 + at, 5), "bias": (5,)})
            for at in range(3)
        ]
    )
    values = filled(stored)

    _, restored = proposed(values, wanted)

    check(restored, {path: values[source] for path, source in sources.items()})


def test_what_is_called_an_end_is_the_last_one():
    stored, wanted, sources = case(("fc1", "fc1", DENSE), ("fc2", "fc2", DENSE), ("fc3", "fc_out", DENSE))
    values = filled(stored)
    found, restored = proposed(values, wanted)
    assert not found.questions
    check(restored, {path: values[source] for path, source in sources.items()})


def in_order(stored, wanted, count, module=DENSE, first=(0, 0)):
    """Returns lines of levels that both sides count one by one, from these numbers."""
    return [(stored.format(at + first[0]), wanted.format(at + first[1]), module) for at in range(count)]


def reversed_or_not(stored, wanted, count, module=DENSE, first=(0, 0)):
    """Returns lines of levels in both orders that they may have: reversed, and one by one."""
    straight = in_order(stored, wanted, count, module, first)
    wanted_ones = [aim for _, aim, _ in straight]
    return [
        (one, aim, held) for (one, _, held), aim in zip(straight, wanted_ones[::-1], strict=True)
    ], straight


def u_net(reverse, above=""):
    """Returns lines of a way down, and of a way up that may be reversed; shapes tell both."""
    down = [
        (f"enc{at + 1}/conv", f"encoder/{at}/conv", {"kernel": (3, 3, 3 << at, 6 << at)}) for at in range(3)
    ]
    up = [
        (
            f"dec{at + 1}/conv",
            f"decoder/{2 - at if reverse else at}/conv",
            {"kernel": (3, 3, 9 << at, 4 << at)},
        )
        for at in range(3)
    ]
    return [(f"{above}{one}", f"{above}{other}", held) for one, other, held in down + up]


LATERALS = levels("lateral_{}", "laterals/{}", 4)
NOTHING_TELLS = {
    "outputs": (LATERALS, reversed_or_not("output_{}", "output_convs/{}", 4, CONV)),
    "outputs of equal names": (LATERALS, reversed_or_not("output_{}", "output_{}", 4, CONV)),
    "outputs that differ as lists do": (LATERALS, reversed_or_not("outputs_{}", "outputs/{}", 4, CONV)),
    "both of equal names": (levels("lateral_{}", "lateral_{}", 4), reversed_or_not("out_{}", "out_{}", 4)),
    "outputs from another number": (LATERALS, reversed_or_not("output_{}", "outputs/{}", 4, CONV, (1, 0))),
    "levels of a pyramid": (
        [(f"lateral_p{at + 3}", f"laterals/{2 - at}", {"kernel": (4 << at, 3)}) for at in range(3)],
        reversed_or_not("out_p{}", "out_p{}", 3, CONV, (3, 3)),
    ),
    "what lies between levels": (LATERALS, reversed_or_not("fuse_{}", "fuses/{}", 3, CONV)),
    "what lies between levels, by equal names": (LATERALS, reversed_or_not("fuse_{}", "fuse_{}", 3, CONV)),
    "heads": (LATERALS, reversed_or_not("head/cls_{}", "head/cls_{}", 4)),
    "heads of two layers": (
        LATERALS,
        [
            [line for pair in zip(one, other, strict=True) for line in pair]
            for one, other in zip(
                reversed_or_not("head_{}/conv1", "head_{}/conv1", 4, CONV),
                reversed_or_not("head_{}/conv2", "head_{}/conv2", 4, CONV),
                strict=True,
            )
        ],
    ),
    "an hourglass": (levels("low_{}", "lows/{}", 3), reversed_or_not("up1_{}", "up1_{}", 3, CONV)),
    "in the levels of an hourglass": (
        levels("low_{}", "levels/{}/low", 3), reversed_or_not("up1_{}", "levels/{}/up1", 3, CONV)
    ),
    "gates of a U-Net": (u_net(reverse=True), reversed_or_not("gate{}", "gates/{}", 3, DENSE, (1, 0))),
    "attentions of a decoder": (u_net(reverse=True), reversed_or_not("dec_attn_{}", "dec_attn_{}", 3)),
    "in a module": (
        u_net(reverse=True, above="net/"), reversed_or_not("net/attn{}", "net/attn{}", 3, DENSE, (1, 1))
    ),
    "of a fusion": (LATERALS, reversed_or_not("bifpn/td_{}", "bifpn/td_{}", 4, CONV)),
}  # fmt: skip


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", NOTHING_TELLS)
def test_beside_levels_in_reverse_no_equal_number_tells_an_order(name, reverse):
    told, (backwards, straight) = NOTHING_TELLS[name]
    stored, wanted, sources = case(*told, *(backwards if reverse else straight))
    asked = {path for _, aim, module in straight for path in (f"{aim}/{leaf}" for leaf in module)}
    values = filled(stored)

    found = suggest(variables_of(values), abstract(wanted))

    assert asked <= {"/".join(map(str, path)) for path in found.unmatched_wanted}
    first, *others = sorted(found.questions, key=lambda question: -len(question.choices))
    assert len(first.choices) == 2
    made = [
        restored_by(
            values, wanted, found.answered([answer if one is first else 0 for one in found.questions])
        )
        for answer in (0, 1)
    ]
    expected = {path: values[source] for path, source in sources.items()}
    check(made[0 if reverse else 1], expected)
    assert all(len(question.choices) == 1 for question in others)


def test_repeated_levels_beside_levels_in_reverse_are_asked_in_each():
    stored, wanted, sources = case(
        *LATERALS,
        *[(f"bifpn_{at}/td_{to}", f"bifpn/{at}/td/{3 - to}", CONV) for at in (0, 1) for to in range(4)],
    )
    values = filled(stored)

    found, restored = proposed(values, wanted)

    assert {path.split("/")[0] for path in restored} == {"laterals"}
    check(
        restored_by(values, wanted, found.answered([0] * len(found.questions))),
        {path: values[source] for path, source in sources.items()},
    )


def test_fused_projections_go_with_their_layers():
    laterals, wanted, sources = case(*LATERALS)
    queries = {f"attn_{at}/{name}/kernel": (5, 5) for at in range(4) for name in ("q", "k", "v", "out")}
    wanted |= {f"attns/{at}/qkv/kernel": (5, 15) for at in range(4)}
    wanted |= {f"attns/{at}/out/kernel": (5, 5) for at in range(4)}
    values = filled(laterals | queries)
    expected = {path: values[source] for path, source in sources.items()}
    for at in range(4):
        parts = [values[f"attn_{3 - at}/{name}/kernel"] for name in "qkv"]
        expected[f"attns/{at}/qkv/kernel"] = np.concatenate(parts, axis=1)
        expected[f"attns/{at}/out/kernel"] = values[f"attn_{3 - at}/out/kernel"]

    found, restored = proposed(values, wanted)

    assert {path.split("/")[0] for path in restored} == {"laterals"}
    (question,) = found.questions
    check(restored_by(values, wanted, question.alternatives[0]), expected)


STRAIGHT = {
    "outputs of a pyramid": [
        *[(f"lateral_{at}", f"laterals/{at}", {"kernel": (4 << at, 3)}) for at in range(4)],
        *in_order("output_{}", "outputs/{}", 4, CONV),
    ],
    "outputs of equal names": [
        *[(f"lateral_{at}", f"laterals/{at}", {"kernel": (4 << at, 3)}) for at in range(4)],
        *in_order("output_{}", "output_{}", 4, CONV),
    ],
    "heads and what lies between": [
        *[(f"lateral_{at}", f"laterals/{at}", {"kernel": (4 << at, 3)}) for at in range(4)],
        *in_order("cls_{}", "cls_heads/{}", 4),
        *in_order("fuse_{}", "fuses/{}", 3, CONV),
    ],
    "an hourglass": [
        *[(f"low_{at}", f"lows/{at}", {"kernel": (4 << at, 3)}) for at in range(3)],
        *in_order("up1_{}", "up1s/{}", 3, CONV),
    ],
    "outputs that grow, beside a list in reverse": [
        *LATERALS,
        *[(f"output_{at}", f"output_convs/{at}", {"kernel": (3, 3, 5, 5 + at)}) for at in range(4)],
    ],
    "outputs of equal names that grow, beside a list in reverse": [
        *LATERALS,
        *[(f"output_{at}", f"output_{at}", {"kernel": (3, 3, 5, 5 + at)}) for at in range(4)],
    ],
    "in a list that is told": [
        *LATERALS,
        *[
            (f"stage_{at}/{one}", f"stages/{at}/{one}", {"kernel": (6 + (one == "a") * at, 6)})
            for at in range(4)
            for one in "ab"
        ],
    ],
    "attentions of both ways": [*u_net(reverse=False), *in_order("enc_attn_{}", "enc_attns/{}", 3)],
    "attentions of the way that is told": [*u_net(reverse=True), *in_order("enc_attn_{}", "enc_attn_{}", 3)],
    "a tower of more layers": [*LATERALS, *in_order("tower/fc_{}", "tower/layers/{}", 6)],
    "layers of another module": [*LATERALS, *in_order("mlp/fc{}", "mlp/layers/{}", 4, DENSE, (1, 0))],
    "dilated layers": [
        *in_order("dilated_{}/conv", "layers/{}/filter", 6, CONV),
        *in_order("dilated_{}/skip", "layers/{}/skip", 6),
        ("in_conv", "input", {"kernel": (1, 7, 5)}),
    ],
    "a temporal network": [
        *[(f"tcn_{at}/conv", f"blocks/{at}/conv", {"kernel": (3, 4 << at, 4 << at + 1)}) for at in range(3)],
        *in_order("gate_{}", "gates/{}", 3),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", STRAIGHT)
def test_levels_beside_a_list_that_counts_one_by_one_are_settled(name):
    stored, wanted, sources = case(*STRAIGHT[name])
    values = filled(stored)

    found, restored = proposed(values, wanted)

    assert not found.questions
    check(restored, {path: values[source] for path, source in sources.items()})


def test_what_rules_say_of_an_order_is_not_asked_again():
    told, (backwards, _) = NOTHING_TELLS["outputs of equal names"]
    stored, wanted, _ = case(*told, *backwards)
    values = filled(stored)
    rules = suggest(variables_of(values), abstract(wanted)).answered([0])

    found = suggest(variables_of(values), abstract(wanted), renames=rules)

    assert not found.questions
    assert not found.unmatched_wanted


def test_where_it_is_open_which_module_is_which_linen_may_have_counted_their_layers_from_the_last():
    stored, wanted, truth = case(
        *(
            (f"Mlp_{2 * block + at}/Dense_{1 - layer}", f"blocks/{block}/{name}_mlp/lin{layer + 1}", DENSE)
            for block in range(2)
            for at, name in enumerate(("token", "channel"))
            for layer in range(2)
        )
    )
    values = filled(stored)

    found, settled = proposed(values, wanted)

    assert settled == {}
    (question,) = found.questions
    made = [restored_by(values, wanted, rules) for rules in question.alternatives]
    assert sum(all(np.array_equal(x[aim], values[path]) for aim, path in truth.items()) for x in made) == 1
