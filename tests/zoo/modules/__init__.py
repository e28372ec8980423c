"""Every pair of modules, by kind."""

from flax import nnx

from tests.zoo.modules import (
    attention,
    convolution,
    custom,
    lifted,
    lifts,
    linear,
    normalisation,
    recurrent,
    wrapped,
)
from tests.zoo.pairs import Pair

ALL: tuple[Pair, ...] = (
    *linear.PAIRS,
    *convolution.PAIRS,
    *normalisation.PAIRS,
    *attention.PAIRS,
    *recurrent.PAIRS,
    *lifted.PAIRS,
    *lifts.PAIRS,
    *wrapped.PAIRS,
    *custom.PAIRS,
)

PAIRS: tuple[Pair, ...] = tuple(pair for pair in ALL if not pair.needs or hasattr(nnx, pair.needs))
"""What the installed version of Flax has."""
