"""A dimension is named by the places it stands at; a coincidence of sizes is no cause."""

import pytest

from orbax_nnx_handler.planning.diagnosis import diagnose
from tests.planning.models import model, plan


def attention(
    heads: int, size: int, shared: int | None = None, width: int = 12
) -> dict[str, tuple[int, ...]]:
    keys = {f"block/attention/{name}/kernel": (width, shared or heads, size) for name in ("key", "value")}
    return keys | {
        "block/attention/query/kernel": (width, heads, size),
        "block/attention/out/kernel": (heads, size, width),
        "block/up/kernel": (width, 40),
        "block/norm/scale": (width,),
    }


def stored(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {f"params/{path}": shape for path, shape in shapes.items()}


@pytest.mark.parametrize(
    ("have", "want", "name"),
    [
        (attention(3, 4), attention(6, 4), "the number of heads"),
        (attention(4, 3), attention(4, 5), "the size of a head"),
        (attention(4, 4), attention(4, 7), "the size of a head"),
        (attention(4, 3), attention(4, 3, shared=2), "the number of key and value heads"),
        (attention(4, 3, width=12), attention(4, 3, width=20), "the hidden size"),
    ],
)
def test_what_differs_in_an_attention_is_told_by_the_axis(have, want, name):
    (cause,) = diagnose(plan(stored(have), want))

    assert cause.kind == "DimensionDiffers"
    assert cause.facts["name"] == name


def test_the_same_features_divided_among_other_heads_are_said_so():
    (cause,) = diagnose(plan(stored(attention(4, 4)), attention(8, 2)))

    assert cause.kind == "HeadsDivided"
    assert cause.text == (
        "the division into heads differs: 4 heads of 4 stored, 8 heads of 2 wanted. "
        "This explains all 4 mismatched weights."
    )


@pytest.mark.parametrize("spoilt", [None, "block/up/kernel", "block/norm/scale"])
def test_a_train_state_that_was_saved_as_copies_for_devices_is_said_to_be_one(spoilt):
    wanted = attention(3, 4)
    copied = {path: (8, *shape) if path != spoilt else (9, *shape) for path, shape in wanted.items()}

    causes = diagnose(plan(stored(copied), wanted))

    found = [cause for cause in causes if cause.kind == "LeadingAxis"]
    assert [cause.facts["length"] for cause in found] == ([8] if spoilt is None else [])
    for cause in found:
        assert "flax.jax_utils.replicate" in cause.text
        assert set(cause.paths) == {tuple(path.split("/")) for path in wanted}


def test_a_stored_axis_in_front_is_no_devices_where_another_leaf_is_as_wanted():
    wanted = attention(3, 4)
    stacked = {path: (8, *shape) if path != "block/norm/scale" else shape for path, shape in wanted.items()}

    assert not [cause for cause in diagnose(plan(stored(stacked), wanted)) if cause.kind == "LeadingAxis"]


def test_experts_are_no_hidden_size_though_as_many_as_heads():
    def moe(experts: int) -> dict[str, tuple[int, ...]]:
        return attention(4, 3) | {
            "block/experts_up": (experts, 12, 40),
            "block/experts_down": (experts, 40, 12),
            "block/router/kernel": (12, experts),
        }

    (cause,) = diagnose(plan(stored(moe(4)), moe(8)))

    assert cause.text == (
        "the number of experts differs: 4 stored, 8 wanted (ratio 2). This explains all 3 mismatched weights."
    )


def test_positions_are_no_vocabulary():
    def positions(count: int) -> dict[str, tuple[int, ...]]:
        return attention(4, 3) | {"pos_embed": (count, 12)}

    (cause,) = diagnose(plan(stored(positions(32)), positions(64)))

    assert cause.text.startswith("the number of positions differs: 32 stored, 64 wanted")


def test_two_sizes_that_happen_to_double_are_two_differences():
    def sizes(inner: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
        return attention(4, 3) | {
            "embed/embedding": (vocabulary, 12),
            "head/kernel": (12, vocabulary),
            "block/up/kernel": (12, inner),
            "block/down/kernel": (inner, 12),
        }

    found = diagnose(plan(stored(sizes(40, 96)), sizes(80, 192)))

    assert [cause.text for cause in found] == [
        f"{what} (ratio 2). This explains 2 of the 4 mismatched weights."
        for what in (
            "a dimension of down and up differs: 40 stored, 80 wanted",
            "the vocabulary differs: 96 stored, 192 wanted",
        )
    ]


def test_one_of_two_dimensions_does_not_explain_what_differs_in_both():
    found = diagnose(plan(model(2, width=4), model(2, "", "layers/{}", width=8) | {"head/kernel": (8, 15)}))

    assert "This shows in all 6 mismatched weights." in found[0].text


def test_a_head_of_other_classes_can_be_left_behind():
    have = stored(attention(4, 3) | {"classes/kernel": (12, 10), "classes/bias": (10,)})
    want = attention(4, 3) | {"classes/kernel": (12, 5), "classes/bias": (5,)}

    (cause,) = diagnose(plan(have, want))

    assert cause.kind == "OtherOutput"
    assert cause.text == "'classes' has 10 outputs in the checkpoint and 5 in the target."
    assert "renames=[Drop('classes', 'a new head')]" in cause.hint.words
