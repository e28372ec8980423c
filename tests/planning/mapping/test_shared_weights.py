"""One stored weight never becomes two wanted ones."""

import jax
import numpy as np
import pytest
from flax import nnx

from orbax_nnx_handler import AmbiguousMappingError
from tests.planning.plans import params, plan_of


def test_a_stored_weight_that_two_wanted_leaves_spell_alike_is_ambiguous() -> None:
    wanted = nnx.State(params({"layers_0": {"kernel": (2, 3)}, "layers": {"0": {"kernel": (2, 3)}}}))

    plan = plan_of(wanted, {"params": {"layers_0": {"kernel": np.ones((2, 3), np.float32)}}})

    with pytest.raises(AmbiguousMappingError, match="params/layers_0/kernel  ->") as caught:
        plan.check()
    assert set(caught.value.paths) == {("layers_0", "kernel"), ("layers", "0", "kernel")}


def test_a_tied_weight_is_one_leaf_and_no_fault() -> None:
    class Tied(nnx.Module):
        def __init__(self) -> None:
            self.embed = nnx.Param(jax.numpy.ones((2, 3)))
            self.out = self.embed

    plan = plan_of(nnx.eval_shape(Tied), {"params": {"embed": np.ones((2, 3), np.float32)}})

    plan.check()
