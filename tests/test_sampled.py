"""What the suite leaves out of many cases that are alike."""

import itertools

import pytest

from tests.sampled import checkered, drawn, every, sampled


@pytest.mark.parametrize(
    ("axes", "few"), [(("ab", "cdefg", "hij"), 15), (("abcde", "fghij", "kl", "mno"), 25)]
)
def test_a_half_of_a_grid_or_more_is_left_out_and_each_two_values_of_two_axes_still_meet(
    axes, few, monkeypatch
):
    monkeypatch.delenv("ORBAX_NNX_WHOLE_GRIDS", raising=False)

    taken = sampled(*axes)

    assert len(taken) == few
    for one, other in itertools.combinations(range(len(axes)), 2):
        assert {(case[one], case[other]) for case in taken} == {*itertools.product(axes[one], axes[other])}


def test_of_two_axes_every_other_combination_is_taken_with_each_value(monkeypatch):
    monkeypatch.delenv("ORBAX_NNX_WHOLE_GRIDS", raising=False)

    assert checkered("abc", "de") == [("a", "d"), ("b", "e"), ("c", "d")]


def test_of_a_list_each_so_many_th_is_taken_and_few_random_cases_are_drawn(monkeypatch):
    monkeypatch.delenv("ORBAX_NNX_WHOLE_GRIDS", raising=False)

    assert every(2, "abcde") == ["a", "c", "e"]
    assert every(2, "abcde", 1) == ["b", "d"]
    assert drawn(3, 5) == 3


def test_the_command_takes_a_whole_grid_the_whole_list_and_many_random_cases(monkeypatch):
    monkeypatch.setenv("ORBAX_NNX_WHOLE_GRIDS", "1")

    assert sampled("ab", "cd", "ef") == [*itertools.product("ab", "cd", "ef")]
    assert checkered("abc", "de") == [*itertools.product("abc", "de")]
    assert every(2, "abcde", 1) == [*"abcde"]
    assert drawn(3, 5) == 5
