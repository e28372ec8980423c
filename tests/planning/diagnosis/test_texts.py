"""A text where a weight or a step is wanted: it is no array of another shape."""

import numpy as np
import optax
import pytest
from flax import nnx

from orbax_nnx_handler import DtypeMismatchError, MissingParamError, restore
from tests.laws.worlds import Numbers, model_target, training_target, write


def test_a_text_for_a_weight_is_told_and_what_its_hint_says_leads_on(tmp_path):
    numbers = Numbers()
    params = {"up": {"kernel": numbers(4, 8), "bias": numbers(8)}}
    path = write(tmp_path, {"params": {"up": {"kernel": "see the other file", "bias": params["up"]["bias"]}}})
    target = model_target(params)

    with pytest.raises(DtypeMismatchError) as caught:
        restore(path, target)

    said = str(caught.value)
    assert "up/kernel   stored () not an array   wanted (4, 8) float32   <- params/up/kernel" in said
    assert "a text is no weight" in said
    assert "never cut" not in said
    (hint,) = caught.value.hints
    with pytest.raises(MissingParamError) as caught:
        restore(path, target, **hint.arguments)
    assert list(caught.value.paths) == [("up", "kernel")]
    policy = {nnx.PathContains("kernel"): "warn", ...: "error"}
    result = restore(path, target, **hint.arguments, policy=policy)
    np.testing.assert_array_equal(result.up.bias[...], params["up"]["bias"])


def test_a_text_beside_another_kind_of_number_has_a_hint_of_its_own(tmp_path):
    numbers = Numbers()
    params = {"up": {"kernel": numbers(4, 8), "bias": numbers(8)}}
    opt_state = numbers.optimizer(optax.sgd(0.1), params)
    tree = {"params": {"up": params["up"] | {"bias": numbers(8, dtype=np.int32)}}, "step": "seven"}
    path = write(tmp_path, tree | {"opt_state": opt_state})

    with pytest.raises(DtypeMismatchError) as caught:
        restore(path, training_target(params, optax.sgd(0.1)))

    words = [hint.words for hint in caught.value.hints]
    assert len(words) == 2
    assert "renames=[Drop('step', 'no array')]" in words[0]
    assert words[1].startswith("integers, booleans, floats")
