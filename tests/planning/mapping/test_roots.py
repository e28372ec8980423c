"""Where a model sits in the target and in the checkpoint."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.training.train_state import TrainState

from orbax_nnx_handler import restore
from orbax_nnx_handler.planning.core.paths import canonical, parse
from orbax_nnx_handler.planning.mapping.roots import find_roots
from tests.zoo.pairs import saved


def paths(*texts: str) -> list[tuple[str, ...]]:
    return [canonical(parse(text)) for text in texts]


def test_a_models_place_in_a_tuple_is_no_layer_number() -> None:
    wanted = paths("0/layers/0/kernel", "0/layers/1/kernel")
    stored = paths("layers_0/kernel", "layers_1/kernel")

    roots = find_roots(wanted, stored)

    assert (roots.wanted, roots.stored) == (("#0",), ())


def test_a_model_wrapped_beside_a_new_head_is_found() -> None:
    wanted = paths("backbone/a/kernel", "backbone/b/kernel", "backbone/c/kernel", "head/kernel")
    stored = paths("a/kernel", "b/kernel", "c/kernel")

    roots = find_roots(wanted, stored)

    assert (roots.wanted, roots.stored) == (("backbone",), ())


def test_the_larger_halves_of_two_models_are_not_taken_for_each_other() -> None:
    wanted = paths("decoder/a/kernel", "decoder/b/kernel", "decoder/c/kernel", "head/kernel")
    stored = paths("encoder/a/kernel", "encoder/b/kernel", "encoder/c/kernel", "head/kernel")

    roots = find_roots(wanted, stored)

    assert (roots.wanted, roots.stored, roots.overlap) == ((), (), 1)


def test_two_modules_of_other_names_are_not_one_because_both_have_a_kernel() -> None:
    roots = find_roots(paths("head/kernel", "head/bias"), paths("embed/kernel", "embed/bias"))

    assert (roots.wanted, roots.stored, roots.overlap) == ((), (), 0)


def test_a_model_smaller_than_what_lies_beside_it_is_found_where_no_other_level_has_all_of_it() -> None:
    stored = paths("a/kernel")
    metrics = paths("metrics/loss/total", "metrics/loss/count")

    assert find_roots([*paths("model/a/kernel"), *metrics], stored).wanted == ("model",)
    twice = find_roots([*paths("actor/a/kernel", "ema/a/kernel", "ema/b/kernel"), *metrics], stored)
    assert (twice.wanted, twice.overlap) == ((), 0)
    # `model` is what a program calls the field for its own model, and the other level names another one.
    named = find_roots([*paths("model/a/kernel", "ema/a/kernel", "ema/b/kernel"), *metrics], stored)
    assert named.wanted == ("model",)


def test_a_small_train_state_comes_up_beside_metrics_with_its_moments(tmp_path: Path) -> None:
    tx = optax.adam(1e-3)
    kernel = jnp.arange(4.0).reshape(2, 2)
    state = TrainState.create(apply_fn=None, params={"up": {"kernel": kernel}}, tx=tx)
    state = state.apply_gradients(grads={"up": {"kernel": kernel + 1}})

    def build() -> Any:
        model = nnx.Dict(up=nnx.Linear(2, 2, use_bias=False, rngs=nnx.Rngs(0)))
        metrics = nnx.MultiMetric(loss=nnx.metrics.Average("loss"), accuracy=nnx.metrics.Average("right"))
        return {"model": model, "optimizer": nnx.Optimizer(model, tx, wrt=nnx.Param), "metrics": metrics}

    policy = {nnx.PathContains("metrics"): "init", ...: "error"}
    found = restore(saved(state, tmp_path / "state"), nnx.eval_shape(build), policy=policy, init=build)

    np.testing.assert_array_equal(found["model"].up.kernel[...], state.params["up"]["kernel"])
    moments = found["optimizer"].opt_state[0]
    np.testing.assert_array_equal(moments.mu["up"]["kernel"][...], state.opt_state[0].mu["up"]["kernel"])
    np.testing.assert_array_equal(moments.nu["up"]["kernel"][...], state.opt_state[0].nu["up"]["kernel"])
