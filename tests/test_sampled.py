"""What the suite leaves out of a grid."""

import itertools

from tests.sampled import sampled


def test_half_of_a_grid_is_left_out_and_each_two_values_of_two_axes_still_meet(monkeypatch):
    monkeypatch.delenv("ORBAX_NNX_WHOLE_GRIDS", raising=False)
    axes = ("ab", "cdefg", "hij")

    taken = sampled(*axes)

    assert len(taken) == 15
    for one, other in itertools.combinations(range(3), 2):
        assert {(case[one], case[other]) for case in taken} == {*itertools.product(axes[one], axes[other])}


def test_the_command_takes_a_whole_grid(monkeypatch):
    monkeypatch.setenv("ORBAX_NNX_WHOLE_GRIDS", "1")

    assert sampled("ab", "cd", "ef") == [*itertools.product("ab", "cd", "ef")]
