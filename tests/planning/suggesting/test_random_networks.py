"""Random checkpoints of several networks, in short; `random_networks.py` is the long form as a program."""

import pytest

from tests.planning.suggesting.random_networks import try_modules_settled, try_networks, try_renames_settled
from tests.sampled import drawn, every


@pytest.mark.parametrize("seed", [*range(drawn(3, 8)), 93])
def test_what_is_proposed_for_several_networks_is_right(seed):
    try_networks(seed)


@pytest.mark.parametrize(("seed", "how_many"), every(2, [(0, 1), (1, 2), (2, 1), (3, 2), (5, 2)]))
def test_networks_whose_renames_are_settled_are_found_no_worse(seed, how_many):
    try_renames_settled(seed, how_many)


@pytest.mark.parametrize("seed", [4, 22])
def test_networks_whose_modules_are_settled_are_found(seed):
    try_modules_settled(seed)
