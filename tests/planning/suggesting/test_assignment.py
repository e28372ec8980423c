"""The pairs that together have the highest score: the same ones whether SciPy chooses them or not."""

import random

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from orbax_nnx_handler.planning.likeness.assignment import Table


@pytest.mark.parametrize("scores", [(0.0, 20.0, 22.5), (0.0, 0.1, 0.2, 0.3, 22.1), tuple(range(40))])
def test_few_pairs_are_chosen_as_scipy_chooses_among_many_also_where_sums_are_equal(scores):
    draw = random.Random(1)
    for _ in range(300):
        shape = draw.randint(1, 8), draw.randint(1, 8)
        drawn = np.array([[float(draw.choice(scores)) for _ in range(shape[1])] for _ in range(shape[0])])
        drawn[:, 0] += 1.0  # Each row and each column has a pair.
        drawn[0] += 1.0
        pairs = {(at, to): score for (at, to), score in np.ndenumerate(drawn) if score > 0}
        forbidden = draw.choice(sorted(pairs))

        found = Table(pairs).best(), Table(pairs).best(without=forbidden)

        for (chosen, value), without in zip(found, (None, forbidden), strict=True):
            left = drawn.copy()
            if without is not None:
                left[without] = 0.0
            places = {
                (int(at), int(to)) for at, to in zip(*linear_sum_assignment(left, maximize=True), strict=True)
            }
            assert chosen == {place for place in places if left[place] > 0}
            assert value == pytest.approx(sum(left[place] for place in chosen))
