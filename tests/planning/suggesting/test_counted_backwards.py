"""Layers that one side counts from the other end, or from another number: order tells nothing of them."""

import pytest

from tests.planning.suggesting.proposals import check, filled, proposed
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
