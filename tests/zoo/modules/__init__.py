"""Every pair of modules, by kind."""

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

PAIRS: tuple[Pair, ...] = (
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
