"""Layers and names fold where nothing else differs, and the folded line says the same."""

from hypothesis import given
from hypothesis import strategies as st

from orbax_nnx_handler.planning.core import folding
from orbax_nnx_handler.planning.core.folding import Row, fold, fold_in_order, fold_paths, ranges
from orbax_nnx_handler.planning.core.lines import align


def texts(*rows: Row) -> list[str]:
    return [line.text for line in fold(rows)]


def row(path: str, *columns: str, source: str = "", transform: str = "") -> Row:
    return Row(tuple(path.split("/")), columns, source, transform)


def test_layers_fold_to_a_range():
    rows = [row(f"layers/{at}/kernel", "(4,)") for at in range(32)]

    assert texts(*rows) == ["layers/{0..31}/kernel"]


def test_parts_stand_in_the_order_in_which_they_are_joined():
    gates = [("cell", f"h{gate}", "kernel") for gate in "ifgo"]
    blocks = [("layers", f"layers_{at}", "kernel") for at in (0, 1, 2, 3, 0, 1)]

    assert fold_in_order(gates) == "cell/hi/kernel, cell/hf/kernel, cell/hg/kernel, cell/ho/kernel"
    assert fold_in_order(blocks) == "layers/layers_{0..3}/kernel"
    assert fold_in_order(reversed(blocks[:4])) == ", ".join(map(folding.render, reversed(blocks[:4])))


def test_ten_sorts_after_two():
    rows = [row(f"conv_{at}/kernel", str(at)) for at in (10, 2)]

    assert texts(*rows) == ["conv_2/kernel", "conv_10/kernel"]


def test_gaps_stay_visible():
    assert ranges([0, 1, 2, 5, 7, 8]) == "{0..2,5,7..8}"


def test_shapes_that_differ_never_fold():
    rows = [row(f"layers/{at}/kernel", "(4,)" if at < 2 else "(5,)") for at in range(4)]

    assert texts(*rows) == ["layers/{0..1}/kernel", "layers/{2..3}/kernel"]


def test_dtypes_that_differ_never_fold():
    rows = [row("layers/0/kernel", "(4,) float32"), row("layers/1/kernel", "(4,) bfloat16")]

    assert len(texts(*rows)) == 2


def test_two_numbers_fold_only_where_every_pair_is_there():
    whole = [row(f"layers/{at}/wi_{gate}") for at in range(3) for gate in range(2)]

    assert texts(*whole) == ["layers/{0..2}/wi_{0..1}"]
    assert sum(line.count for line in fold(whole[:-1])) == 5
    assert len(texts(*whole[:-1])) == 2


def test_names_fold_where_shape_and_rest_agree_and_the_list_is_long():
    rows = [row(f"{part}/{name}", "(4, 2)") for part in "abcde" for name in ("query", "key", "value")]

    assert texts(*rows, row("a/out", "(2, 4)")) == ["{a,b,c,d,e}/{key,query,value}", "a/out"]


def test_in_a_short_list_every_name_stands_in_full():
    rows = [row(f"attention/{name}/kernel", "(4, 2)") for name in ("query", "key", "value")]

    assert texts(*rows) == ["attention/key/kernel", "attention/query/kernel", "attention/value/kernel"]


def test_unstacked_rows_fold_and_keep_which_element_goes_where():
    rows = [
        row(f"layers/{at}/kernel", "(4,)", source="params/layers/kernel", transform=f"unstack axis 1 [{at}]")
        for at in range(3)
    ]

    (line,) = fold(rows)

    assert (line.text, line.count) == ("layers/{0..2}/kernel", 3)
    assert line.columns == ("(4,)", "<- params/layers/kernel", "unstack axis 1 [0..2]")


def test_unstacked_rows_of_two_axes_never_fold():
    rows = [
        row(f"layers/{at}/kernel", source="params/layers/kernel", transform=f"unstack axis {at} [{at}]")
        for at in range(2)
    ]

    assert len(fold(rows)) == 2


def test_sources_run_along_with_their_layers():
    rows = [row(f"layers/{at}/kernel", source=f"params/layers_{at}/kernel") for at in range(3)]

    (line,) = fold(rows)

    assert line.columns == ("<- params/layers_{0..2}/kernel", "")


def test_crossed_sources_stay_apart():
    rows = [row(f"layers/{at}/kernel", source=f"params/layers_{1 - at}/kernel") for at in range(2)]

    assert [line.columns[0] for line in fold(rows)] == [
        "<- params/layers_1/kernel",
        "<- params/layers_0/kernel",
    ]


def test_a_number_that_nobody_would_write_so_does_not_fold():
    rows = [row("conv_01/kernel"), row("conv_1/kernel")]

    assert sum(line.count for line in fold(rows)) == 2
    assert "01" in fold_paths([("conv_01", "kernel"), ("conv_1", "kernel")])


def test_every_row_is_counted_once():
    rows = [row(f"m/{at % 5}/n{at % 3}/{'abc'[at % 3]}", str(at % 2)) for at in range(30)]

    assert sum(line.count for line in fold(rows)) == 30


def test_a_long_list_ends_in_a_count():
    rows = [row(f"m/{name}", name) for name in "abcdefgh"]

    assert align(fold(rows), limit=3)[-1] == "  ... and 5 more"


def test_columns_are_aligned():
    lines = align(fold([row("a/kernel", "(4,)", "x"), row("bb/kernel", "(16, 4)", "y")]))

    assert lines == ["  a/kernel    (4,)      x", "  bb/kernel   (16, 4)   y"]


_NAMES = st.sampled_from(["layers", "out", "Dense_0", "Dense_1", "mlp"])
_KEYS = st.one_of(_NAMES, st.integers(0, 4), st.integers(0, 4).map(lambda number: f"layers_{number}"))
_ROWS = st.builds(
    Row,
    st.lists(_KEYS, min_size=1, max_size=3).map(tuple),
    st.sampled_from([(), ("(2,)",), ("(3,)",)]),
    st.lists(_KEYS, max_size=2).map(lambda keys: "/".join(map(str, keys))),
    st.sampled_from(["", "", "unstack axis 0 [1]", "unstack axis 0 [2]"]),
)


@given(st.lists(_ROWS, max_size=25))
def test_rows_with_a_single_number_fold_as_all_rows_do(rows: list[Row]) -> None:
    """They take a shorter way: nearly all rows of a model are of that kind."""
    quick = folding._patterns(rows)
    slow = [folding._pattern(row) for row in rows]
    for position in range(3):
        quick, slow = folding._merge(quick, position), folding._merge(slow, position)

    assert [folding._folded(pattern) for pattern in quick] == [folding._folded(pattern) for pattern in slow]
