"""Adafactor's row and column statistics under rules: where they can follow, they compute the same."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

from orbax_nnx_handler import (
    Fuse,
    MissingParamError,
    Reshape,
    Split,
    StackLayers,
    Transpose,
    UnstackLayers,
    plan_restore,
    restore,
)
from orbax_nnx_handler.planning.rules import Rule
from tests.zoo.pairs import saved, values

Arrays = dict[str, Any]
Change = Callable[[Arrays], Arrays]

# `optax.adafactor` also clips each leaf by its own norm, which layers in one stack share.
ADAFACTOR = optax.chain(optax.scale_by_factored_rms(min_dim_size_to_factor=2), optax.scale(-0.1))


def trained(params: Mapping[str, np.ndarray]) -> TrainState:
    """Returns a train state after two steps down the squares of its weights."""
    tree = {name: {"kernel": jnp.asarray(value)} for name, value in params.items()}
    state = TrainState.create(apply_fn=None, params=tree, tx=ADAFACTOR)
    return stepped(stepped(state))


@jax.jit
def stepped(state: TrainState) -> TrainState:
    return state.apply_gradients(grads=jax.tree.map(lambda w: w + w**3, state.params))


@nnx.jit
def nnx_stepped(model: nnx.Module, optimizer: nnx.Optimizer[Any]) -> None:
    optimizer.update(model, jax.tree.map(lambda w: w + w**3, nnx.state(model, nnx.Param)))


def target(shapes: Mapping[str, tuple[int, ...]]) -> Any:
    def build() -> Any:
        layers = {name: nnx.Dict(kernel=nnx.Param(jnp.zeros(shape))) for name, shape in shapes.items()}
        model = nnx.Dict(layers)
        return model, nnx.Optimizer(model, ADAFACTOR, wrt=nnx.Param)

    return nnx.eval_shape(build)


def kernels(state: TrainState) -> Arrays:
    return {name: np.asarray(layer["kernel"]) for name, layer in state.params.items()}


SQUARE = {"a": values(4, 4)}
LAYERS = {f"block_{i}": values(4, 6, seed=i) for i in range(3)}
FOLLOWING: dict[str, tuple[Arrays, Rule, Change]] = {
    "a square, transposed": (SQUARE, Transpose("a", (1, 0)), lambda p: {"a": p["a"].T}),
    "an oblong, transposed": ({"a": values(4, 6)}, Transpose("a", (1, 0)), lambda p: {"a": p["a"].T}),
    "three axes, two of one size": (
        {"a": values(4, 2, 4)},
        Transpose("a", (2, 0, 1)),
        lambda p: {"a": p["a"].transpose(2, 0, 1)},
    ),
    "layers stacked": (
        LAYERS,
        StackLayers("block_{i}", "blocks", 0),
        lambda p: {"blocks": np.stack([p[f"block_{i}"] for i in range(3)])},
    ),
    "a stack taken apart": (
        {"blocks": values(4, 3, 6)},
        UnstackLayers("blocks", "block_{i}", 1),
        lambda p: {f"block_{i}": p["blocks"][:, i] for i in range(3)},
    ),
}


@pytest.mark.parametrize(("params", "rule", "change"), FOLLOWING.values(), ids=FOLLOWING)
def test_the_next_step_is_the_one_that_the_stored_moments_lead_to(
    params: Arrays, rule: Rule, change: Change, tmp_path: Path
) -> None:
    state = trained(params)
    wanted = target({name: value.shape for name, value in change(params).items()})

    model, optimizer = restore(
        saved(state, tmp_path / "checkpoint"), wanted, renames=[rule], unexpected="error"
    )
    nnx_stepped(model, optimizer)

    expected = change(kernels(stepped(state)))
    for name, layer in model.items():
        np.testing.assert_allclose(
            layer.kernel.get_value(), expected[name], rtol=1e-5, atol=1e-6, err_msg=str(name)
        )


LOST: dict[str, tuple[Arrays, Rule, Change, str]] = {
    "reshaped": (
        {"a": values(4, 2, 4)},
        Reshape("a/kernel", (4, 8), before=(4, 2, 4)),
        lambda p: {"a": p["a"].reshape(4, 8)},
        (
            "cause: 2 optimizer moments cannot follow what "
            "Reshape(pattern='a/kernel', shape=(4, 8), before=(4, 2, 4)) does to their parameters: "
            "the v_col (2, 4) of (4, 2, 4) is a mean over one axis, "
            "and does not tell the mean (8,) of (4, 8); "
            "the v_row (4, 2) of (4, 2, 4) is a mean over one axis, "
            "and does not tell the mean (4,) of (4, 8)."
        ),
    ),
    "split": (
        {"ab": values(4, 12)},
        Split("ab", ("a", "b"), axis=1),
        lambda p: {"a": p["ab"][:, :6], "b": p["ab"][:, 6:]},
        (
            "cause: 2 optimizer moments cannot follow what "
            "Split(pattern='ab', into=('a', 'b'), axis=1, sizes=None) does to their parameters: "
            "the v_row (4,) of (4, 12) is a mean over one axis, and does not tell the mean (4,) of (4, 6)."
        ),
    ),
    "fused": (
        {"a": values(4, 6), "b": values(4, 6, seed=1)},
        Fuse(("a", "b"), "ab", axis=1),
        lambda p: {"ab": np.concatenate([p["a"], p["b"]], 1)},
        (
            "cause: 1 optimizer moment cannot follow what "
            "Fuse(patterns=('a', 'b'), into='ab', axis=1, sizes=None) does to its parameter: "
            "the v_row (4,) of (4, 6) is a mean over one axis, and does not tell the mean (4,) of (4, 12)."
        ),
    ),
}


@pytest.mark.parametrize(("params", "rule", "change", "cause"), LOST.values(), ids=LOST)
def test_moments_that_a_rule_leaves_behind_are_missing_because_of_the_rule(
    params: Arrays, rule: Rule, change: Change, cause: str, tmp_path: Path
) -> None:
    path = saved(trained(params), tmp_path / "checkpoint")
    wanted = target({name: value.shape for name, value in change(params).items()})

    with pytest.raises(MissingParamError) as raised:
        restore(path, wanted, renames=[rule])

    said = " ".join(str(raised.value).split())
    assert cause in said
    assert said.count("cause:") == 1
    assert plan_restore(path, wanted, renames=[rule], policy={nnx.OptState: "warn", ...: "error"}).fits


@pytest.mark.parametrize("rules", [[], [UnstackLayers("layers", "layers_{i}", axis=0)]], ids=["", "rule"])
def test_the_moment_of_a_parameter_of_one_element_is_no_slot_without_use(
    tmp_path: Path, rules: list[Rule]
) -> None:
    one = optax.scale_by_factored_rms(min_dim_size_to_factor=1)
    weights = {"layers": {"kernel": jnp.asarray([[1.0], [2.0], [3.0]])}}
    state = TrainState.create(apply_fn=None, params=weights, tx=one)
    path = saved(stepped(state), tmp_path / "checkpoint")

    def build() -> Any:
        layers = {f"layers_{at}": nnx.Dict(kernel=nnx.Param(jnp.zeros(1))) for at in range(3)}
        model = nnx.Dict(layers)
        return {"model": model, "optimizer": nnx.Optimizer(model, one, wrt=nnx.Param)}

    # The stack's are means over its layers, and a zero in place of the moment that each layer has.
    with pytest.raises(MissingParamError, match=r"optimizer/opt_state/v/layers_\{0..2\}/kernel"):
        restore(path, nnx.eval_shape(build), renames=rules)
