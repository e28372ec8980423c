"""What the suite leaves out of many cases that are alike."""

import itertools

from tests.sampled import drawn, every, sampled


def test_half_of_a_grid_is_left_out_and_each_two_values_of_two_axes_still_meet(monkeypatch):
    monkeypatch.delenv("ORBAX_NNX_WHOLE_GRIDS", raising=False)
    axes = ("ab", "cdefg", "hij")

    taken = sampled(*axes)

    assert len(taken) == 15
    for one, other in itertools.combinations(range(3), 2):
        assert {(case[one], case[other]) for case in taken} == {*itertools.product(axes[one], axes[other])}


def test_of_a_list_each_so_many_th_is_taken_and_few_random_cases_are_drawn(monkeypatch):
    monkeypatch.delenv("ORBAX_NNX_WHOLE_GRIDS", raising=False)

    assert every(2, "abcde") == ["a", "c", "e"]
    assert every(2, "abcde", 1) == ["b", "d"]
    assert drawn(3, 5) == 3


def test_the_command_takes_a_whole_grid_the_whole_list_and_many_random_cases(monkeypatch):
    monkeypatch.setenv("ORBAX_NNX_WHOLE_GRIDS", "1")

    assert sampled("ab", "cd", "ef") == [*itertools.product("ab", "cd", "ef")]
    assert every(2, "abcde", 1) == [*"abcde"]
    assert drawn(3, 5) == 5
