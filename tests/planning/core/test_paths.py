"""Paths are read key by key: what one key gives does not depend on its neighbours."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orbax_nnx_handler.planning.core.folding import NumberedText, fold_paths
from orbax_nnx_handler.planning.core.paths import (
    canonical,
    is_number,
    natural_key,
    render,
    segments,
    sort_paths,
    tree_of,
)

TEXTS = st.text("ab_/()'0,1 ", max_size=5) | st.sampled_from(["('kernel',)", "(1, 'a')", "layers_3", "if_"])
KEYS = TEXTS | st.integers(0, 3) | st.booleans() | st.tuples(TEXTS) | st.tuples() | st.tuples(TEXTS, TEXTS)
PATHS = st.lists(KEYS, max_size=4).map(tuple)


@given(PATHS, PATHS)
def test_a_path_is_read_key_by_key(left, right):
    for read in (segments, canonical, natural_key):
        assert read(left + right) == read(left) + read(right)


@given(PATHS)
def test_a_path_is_printed_by_its_segments(path):
    assert render(path) == ("/".join(segments(path)) or "(root)")


def test_kinds_of_keys():
    assert segments(("a/b", 0, ("c", 1), "('d',)", "(e", "f(g)", ())) == (
        *("a", "b", "0", "c", "1", "d", "(e", "f(g)", "()"),
    )
    assert segments(()) == ()
    assert segments(("",)) == ("",)
    assert canonical(("layers_0_1", 2, True, "if_", ("scale", "kernel_3"))) == (
        *("layers", "#0", "#1", "#2", "True", "if", "scale", "kernel", "#3"),
    )


@pytest.mark.parametrize("name", ["9" * 5000, "w_" + "9" * 5000, "#" + "9" * 5000, "w" + "1" * 5000 + "_2"])
def test_a_name_of_thousands_of_digits_is_no_number(name) -> None:
    assert canonical(("a", name))[1] == (name if name[-2:] != "_2" else name[:-2])
    assert not is_number(canonical((name,))[0])
    assert len(sort_paths([(name,), ("w", 2)])) == 2
    assert name in fold_paths([(name,), (name + "x",)])
    assert str(NumberedText.of(name)) == name


def test_a_name_of_thousands_of_numbers_is_read_and_folded_at_once() -> None:
    name = "a" + "_1" * 5000
    start = time.process_time()

    assert canonical((name,))[1:] == ("#1",) * 16
    assert fold_paths([(name + str(last), "w") for last in range(30)])
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    "inside", ["-" * 900 + "1,", "-" * 5000 + "1,", "(" * 400, "'a'," * 20_000, "9**9**9,"]
)
def test_a_name_that_only_looks_like_a_tuple_is_a_name(inside) -> None:
    assert segments((f"({inside})",)) == (f"({inside})",)


def test_a_place_below_nothing_makes_no_list() -> None:
    assert tree_of({("a", -1): 1, ("a", 0): 2}, lists=True) == {"a": {-1: 1, 0: 2}}
